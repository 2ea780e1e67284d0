"""A real run that is killed wherever it stands and resumed ends to the bit as one never stopped.

Every start is the real command in a process of its own, forked from one that has imported torch.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from client.agent import SiteAgent
from client.exchange import Exchange, KnownStates
from client.memory import Memory
from samaritan.audit.log import entries
from samaritan.codecs import decode, encode
from samaritan.config import CodecConfig, config_sha256, load_config, parse_config
from samaritan.errors import StorageError
from samaritan.lock import locked
from samaritan.messages import Instruction
from samaritan.models.bases import state_sha256
from samaritan.shares import CONTROL, public_state
from server.checkpoints import latest_checkpoint
from simulation.run import simulate

# Sites remember personal tensors, controls and what int4 and top-k left out; the server remembers
# what its sites hold, its control and two moments.
STATEFUL = """\
rounds: 3
model: {image_size: 32}
peft: {rank: 2}
data: {source: phantoms, sites: 2, cases_per_site: 2, slice_axis: axial}
training: {slices_per_case: 2, batch_size: 4, precision: fp32, scaffold: true}
federation: {wait_s: 1}
wire: {up: {top_k: 0.1, numbers: int4}, down: {numbers: int8}}
server_optimiser: {name: adam}
personal: {parts: [decoder]}
"""

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["simulation.run", "samaritan.cli.main"])


def command(arguments, log, fatal):
    """The command line; `fatal` names a file and a signal that strikes as it is renamed."""
    from samaritan.cli.main import main

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    sys.argv = ["samaritan", "simulate", *arguments]
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if fatal:
        replace, (end, when, number) = Path.replace, fatal

        def struck(path, target):
            hit = str(target).endswith(end)
            if hit and when == "before":
                signal.raise_signal(number)
            done = replace(path, target)
            if hit and when == "after":
                signal.raise_signal(number)
            return done

        Path.replace = struck
    main()


def start(config, folder, fatal=None):
    arguments = [str(config), "--out", str(folder)]
    if folder.exists():
        arguments.append("--resume")
    log = folder.with_suffix(".log")
    process = FORKS.Process(target=command, args=(arguments, log, fatal), daemon=True)
    process.start()
    return process


def wait_until(happened, process):
    """Looks often: some of what it waits for is over in milliseconds."""
    end = time.monotonic() + 300
    while not happened():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.0005)


def event(folder, kind, number=None):
    """Whether a line of the log tells of it, in this start or an earlier one."""
    mark = f'"event": "{kind}"' + (f', "round": {number},' if number else "")

    def happened():
        try:
            return mark in (folder / "events.jsonl").read_text()
        except FileNotFoundError:
            return False

    return happened


def written(folder, place, number):
    """Whether the file of a round is there, or is being written."""

    def happened():
        try:
            return any(f"round_{number:05d}" in path.name for path in (folder / place).iterdir())
        except FileNotFoundError:
            return False

    return happened


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "stateful.yaml"
    path.write_text(STATEFUL)
    return path


@pytest.fixture(scope="module")
def straight(config, tmp_path_factory):
    """The run that nobody stops."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    finish(config, folder)
    return folder


def finish(config, folder):
    process = start(config, folder)
    process.join(300)
    assert process.exitcode == 0, folder.with_suffix(".log").read_text()


def untimed(history):
    """Without times, and without bytes down: after a stop sites are sent the whole state again."""
    if isinstance(history, dict):
        return {
            k: untimed(v) for k, v in history.items() if "seconds" not in k and k != "bytes_down"
        }
    return [untimed(v) for v in history] if isinstance(history, list) else history


def same(folder, straight):
    """Nothing more, nothing less, and the same numbers in the files of the server and its sites."""
    names = [
        sorted(str(p.relative_to(run)) for p in run.rglob("*") if p.suffix != ".fragment")
        for run in (folder, straight)
    ]
    assert names[0] == names[1]
    logs = [name for name in names[0] if name.endswith("log.jsonl")]
    assert len(logs) == 3  # of the server and two sites: what happened twice stands there twice
    for name in logs:
        assert list(entries((folder / name).read_bytes())), name
    exact = [n for n in names[0] if n.startswith(("sites/", "adapter/")) and n not in logs]
    assert sum("round_" in name for name in exact) == 6  # two sites, the last round and two before
    for name in exact:
        if (folder / name).is_file():
            assert (folder / name).read_bytes() == (straight / name).read_bytes(), name
    ours, theirs = (latest_checkpoint(run / "checkpoints") for run in (folder, straight))
    groups = [{"adapter": kept.adapter} | kept.slots for kept in (ours, theirs)]
    assert set(groups[0]) == set(groups[1]) == {
        "adapter", "control", "momentum", "second", "sent/None"
    }  # fmt: skip
    for group, tensors in groups[0].items():
        assert tensors.keys() == groups[1][group].keys()
        assert all(torch.equal(v, groups[1][group][name]) for name, v in tensors.items()), group
    assert untimed(ours.history) == untimed(theirs.history)
    assert any(v.any() for v in ours.slots["control"].values())
    for line in (folder / "events.jsonl").read_text().splitlines():
        json.loads(line)


def test_a_run_killed_at_ten_random_points_ends_as_if_nothing_had_happened(
    config, straight, tmp_path
):
    folder = tmp_path / "run"
    rounds = latest_checkpoint(straight / "checkpoints").history
    training = min(sum(s["seconds"] for s in r["sites"].values()) for r in rounds)
    site_1, site_2, kept = "sites/site_01", "sites/site_02", "checkpoints"
    points = [  # what is waited for, and the longest time until the process is killed
        (event(folder, "round_started", 1), training),
        (written(folder, site_1, 1), 0.0),
        (written(folder, site_2, 1), 0.0),
        (written(folder, site_2, 1), training / 4),  # scoring, since the last site has trained
        (written(folder, kept, 1), 0.0),
        (event(folder, "round_started", 2), training),
        (written(folder, kept, 2), 0.01),
        (written(folder, site_1, 3), 0.01),
        (event(folder, "round_started", 3), training),
        (event(folder, "run_finished"), 1.0),
    ]
    dice = random.Random(26)  # noqa: S311
    codes = []
    for number, (happened, longest) in enumerate(points):
        starts = starts_of(folder)
        process = start(config, folder)
        # Something that was there before the start must not end it before it is at work.
        wait_until(lambda before=starts: starts_of(folder) > before, process)
        wait_until(happened, process)
        if number == 5:
            with pytest.raises(StorageError, match="another process works in") as caught:
                simulate(load_config(config), folder, resume=True)
            assert caught.value.code == "SAM-S110"
        time.sleep(dice.uniform(0, longest))
        process.kill()
        process.join()
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL] * len(points)
    finish(config, folder)
    same(folder, straight)
    assert starts_of(folder) == len(points) + 1


def starts_of(folder):
    log = folder / "events.jsonl"
    return log.read_text().count('"event": "run_started"') if log.exists() else 0


STRIKES = [
    ("sites/site_01/round_00001.safetensors", "before", signal.SIGKILL),
    ("sites/site_02/round_00001.safetensors", "after", signal.SIGINT),
    ("checkpoints/round_00001.safetensors", "before", signal.SIGKILL),
    ("checkpoints/round_00001.safetensors", "after", signal.SIGKILL),
    ("sites/site_02/round_00002.safetensors", "before", signal.SIGINT),
    ("checkpoints/round_00002.safetensors", "before", signal.SIGINT),
    ("sites/site_02/round_00003.safetensors", "after", signal.SIGKILL),
    ("adapter/adapter_model.safetensors", "before", signal.SIGKILL),
    ("run/summary.json", "before", signal.SIGKILL),
]


def test_a_signal_in_the_middle_of_a_write_leaves_the_file_before(config, straight, tmp_path):
    folder = tmp_path / "run"
    for fatal in STRIKES:
        process = start(config, folder, fatal)
        process.join(300)
        interrupted = fatal[2] == signal.SIGINT
        assert process.exitcode == (130 if interrupted else -signal.SIGKILL), fatal
        assert (folder / fatal[0].removeprefix("run/")).exists() == (fatal[1] == "after"), fatal
        if interrupted:
            assert not list(folder.rglob("*.partial"))
    log = folder.with_suffix(".log").read_text()
    assert log.count("finished rounds of a run are kept, go on with --resume") == 3
    assert "Traceback" not in log
    finish(config, folder)
    same(folder, straight)


def test_a_site_goes_on_from_the_control_and_the_tensors_it_kept(tmp_path, monkeypatch):
    config = parse_config(
        {"rounds": 3, "training": {"scaffold": True}, "personal": {"parts": ["decoder"]}}
    )
    shared, own = "image_encoder.a", "decoder.b"
    initial = {shared: torch.zeros(2), own: torch.zeros(2)}
    seen, model = [], SimpleNamespace(base=SimpleNamespace(sha256="b" * 64), segmenter=None)
    model.state = lambda: {name: value.clone() for name, value in model.held.items()}
    model.load = lambda adapter: setattr(model, "held", dict(adapter))

    def train(model, *arguments, control, **keys):
        seen.append(control[shared].tolist())
        model.held = {name: value + 1 for name, value in model.held.items()}
        gradient = {name: torch.full((2,), 10.0 * len(seen)) for name in initial}
        return SimpleNamespace(loss=0.5, steps=1, seconds=0.1, mean_gradient=gradient)

    monkeypatch.setattr("client.agent.train_locally", train)
    monkeypatch.setattr("client.agent.evaluate_cases", lambda *arguments, **keys: [])
    sent = public_state(config, initial) | {CONTROL + shared: torch.full((2,), 3.0)}
    exchange = Exchange("a", config, public_state(config, initial), KnownStates(2))
    memory = Memory(tmp_path)
    agent = SiteAgent("a", config, model, initial, exchange, memory, None, ("case",), ())
    payload = encode(sent, CodecConfig(), header={}, seed=0)
    shapes = dict.fromkeys((shared, CONTROL + shared), (2,))
    changes = []
    for number in (1, 2):
        asked = Instruction(
            number, 3, config_sha256(config), "b" * 64, 60.0, state_sha256(sent),
            used_round=number - 1,
        )  # fmt: skip
        update, _ = agent.train(payload, asked)
        changes.append(decode(update, shapes)[0][CONTROL + shared].tolist())
        agent.evaluate(payload, replace(asked, used_round=number))
        assert model.held[own].tolist() == [number] * 2
        assert model.held[shared].tolist() == [0.0, 0.0]
    assert seen == [[3.0, 3.0], [-7.0, -7.0]]  # everyone's control minus its own of round 1
    assert changes == [[10.0, 10.0], [10.0, 10.0]]  # 10 from nothing, then 20 from 10


def test_notes_with_one_wrong_bit_are_passed_over(tmp_path):
    memory = Memory(tmp_path)
    for number in (1, 2):
        memory.remember(number, {"control": {"a": torch.full((3,), float(number))}}, number - 1)
    path = tmp_path / "round_00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(bytes(data))
    assert memory.recall(2)["control"]["a"].tolist() == [1.0] * 3


def test_notes_of_a_lost_round_are_gone_before_new_ones_are_written(tmp_path, monkeypatch):
    memory = Memory(tmp_path)
    for number in (1, 2, 3):
        memory.remember(number, {"control": {"a": torch.ones(1)}}, number - 1)

    def killed(path, payload):
        raise KeyboardInterrupt

    monkeypatch.setattr("client.memory.write_atomically", killed)
    with pytest.raises(KeyboardInterrupt):
        memory.remember(2, {"control": {"a": torch.zeros(1)}}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["round_00001.safetensors"]


def test_a_folder_is_locked_for_others_and_free_again_whatever_happens(tmp_path):
    (tmp_path / "sites").mkdir()
    torn = tmp_path / "sites" / ".round_00001.safetensors.0a1b2c3d.partial"
    torn.write_bytes(b"half")
    kept = tmp_path / "sites" / "of.partial"
    kept.write_bytes(b"a file of that name")

    def work():
        assert not torn.exists()
        torn.write_bytes(b"being written")
        with pytest.raises(StorageError) as caught, locked(tmp_path):
            pass
        assert caught.value.code == "SAM-S110"
        assert torn.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        work()
    with locked(tmp_path):
        pass
    assert sorted(tmp_path.rglob("*.partial")) == [kept]
