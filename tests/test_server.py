"""Rounds over real Flower messages: drop-outs, the roll call, checkpoints, events, resumption."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from client.app import make_client_app
from samaritan.config import config_sha256, parse_config
from samaritan.errors import DataError, FederationError, StorageError
from samaritan.files import write_atomically
from samaritan.wire import message_bytes
from server import rounds
from server.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
from server.events import append_event
from server.rollcall import Caller
from server.rounds import run_rounds
from simulation.engines import run_in_process
from simulation.grid import InProcessGrid

PLANTED = "/secret/patient_007"


QUICK = {"wait_s": 0.3, "retries": 0, "quarantine_rounds": 0}


def config_of(**keys):
    keys["federation"] = QUICK | keys.get("federation", {})
    return parse_config({"rounds": 3, "data": {"source": "phantoms"}} | keys)


CONFIG = config_of()


def events(federation):
    return [json.loads(line) for line in federation.events.read_text().splitlines()]


def written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def filled(value):
    return {"a": torch.full((2, 3), value), "b": torch.full((4,), value)}


def same(state, value):
    return all(torch.allclose(t, torch.tensor(float(value))) for t in state.values())


# Rounds.


def test_after_n_rounds_the_adapter_is_n_times_the_mean_update(fake_site, fake_federation):
    sites = [fake_site("a", CONFIG, 1.0), fake_site("b", CONFIG, 4.0, examples=2)]
    federation = fake_federation(CONFIG, ["a", "b"])
    state = run_in_process(federation, sites)
    assert state.server_round == 3
    assert same(state.adapter, 9.0)  # (1 * 1 + 2 * 4) / 3, three times
    assert [entry["round"] for entry in state.history] == [1, 2, 3]
    assert state.history[0]["sites"]["b"]["num_examples"] == 2
    assert state.history[2]["dice_mean"] == pytest.approx(0.09)
    assert sites[0].asked == [1, 2, 3]


def test_uniform_weighting_ignores_the_number_of_examples(fake_site, fake_federation):
    config = config_of(rounds=1, federation={"weighting": "uniform"})
    sites = [fake_site("a", config, 1.0), fake_site("b", config, 4.0, examples=1000)]
    assert same(run_in_process(fake_federation(config, ["a", "b"]), sites).adapter, 2.5)


def test_the_server_reports_each_round_as_summary_and_events_hold_it(fake_site, fake_federation):
    told = []
    federation = fake_federation(CONFIG, ["a"], on_round=told.append)
    state = run_in_process(federation, [fake_site("a", CONFIG)])
    finished = [e for e in events(federation) if e["event"] == "round_finished"]
    assert told == state.history
    assert [{k: e[k] for k in state.history[0]} for e in finished] == state.history
    kinds = [event["event"] for event in events(federation)]
    each = ["round_started", "round_finished"]
    assert kinds == ["run_started", "roll_call", *each * 3, "run_finished"]


@pytest.mark.parametrize("every", [2, 5])
def test_scores_come_every_nth_round_and_after_the_last(fake_site, fake_federation, every):
    config = config_of(evaluation={"every_rounds": every})
    state = run_in_process(fake_federation(config, ["a"]), [fake_site("a", config)])
    scored = [entry["round"] for entry in state.history if entry["dice_mean"] is not None]
    assert scored == ([2, 3] if every == 2 else [3])


def test_bytes_are_those_of_the_messages(fake_site, fake_federation, monkeypatch):
    up: dict[int, int] = {}
    down: dict[int, int] = {}
    answer = InProcessGrid._answer

    def spy(grid, message):
        reply = answer(grid, message)
        if message.metadata.message_type != "query":
            node = message.metadata.dst_node_id
            down[node] = down.get(node, 0) + message_bytes(message)
            up[node] = up.get(node, 0) + message_bytes(reply)
        return reply

    monkeypatch.setattr(InProcessGrid, "_answer", spy)
    config = config_of(rounds=1)
    sites = [fake_site("a", config), fake_site("b", config)]
    entry = run_in_process(fake_federation(config, ["a", "b"]), sites).history[0]["sites"]
    assert [entry[s]["bytes_up"] for s in "ab"] == list(up.values())
    assert [entry[s]["bytes_down"] for s in "ab"] == list(down.values())
    assert min(*up.values(), *down.values()) > 40


# Sites that fail.

FAULTS = {
    "exception": (ValueError(f"cannot open {PLANTED}"), "failed: SAM-F299"),
    "site error": (DataError("SAM-D102", f"case {PLANTED}", PLANTED), "failed: SAM-D102"),
    "system exit": (OSError(2, "no such file", PLANTED), "failed: SAM-F299"),
    "unknown tensor": (
        lambda a: (a | {PLANTED: torch.ones(1)}, {"num-examples": 1, "train-loss": 0.1}),
        "refused: the message is about tensors of other names or shapes",
    ),
    "not finite": (
        lambda a: (filled(float("nan")), {"num-examples": 1, "train-loss": 0.1}),
        "failed: SAM-F205",
    ),
    "made-up metric": (
        lambda a: (a, {"num-examples": 0, "train-loss": 0.1, PLANTED: 1.0}),
        "refused: num-examples is 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_site_is_dropped_with_a_code_and_returns(
    fake_site, fake_federation, fault, capfd
):
    instead, status = FAULTS[fault]
    told = []
    federation = fake_federation(CONFIG, ["a", "b", "c"], on_round=told.append)
    sites = [
        fake_site("a", CONFIG, 1.0),
        fake_site("b", CONFIG, 4.0, instead={2: instead}),
        fake_site("c", CONFIG, 1.0),
    ]
    state = run_in_process(federation, sites)
    assert same(state.adapter, 2.0 + 1.0 + 2.0)
    assert [entry["sites"]["b"]["status"] for entry in state.history] == ["ok", status, "ok"]
    assert state.history[1]["sites"]["b"]["train_loss"] is None
    assert {entry["sites"]["a"]["status"] for entry in state.history} == {"ok"}
    assert sites[1].asked == [1, 2, 3]
    for text in (written(federation.run_dir), json.dumps(told).encode()):
        assert b"secret" not in text
        assert b"patient" not in text


def test_too_few_usable_answers_end_the_run_and_keep_the_rounds_before(fake_site, fake_federation):
    federation = fake_federation(CONFIG, ["a", "b"])
    sites = [fake_site("a", CONFIG), fake_site("b", CONFIG, instead={3: ValueError(PLANTED)})]
    with pytest.raises(FederationError) as caught:
        run_in_process(federation, sites)
    assert caught.value.code == "SAM-F102"
    assert "round 3: 1 usable answers, 2 needed (b failed: SAM-F299)" in caught.value.message
    assert "secret" not in str(caught.value)
    kept = latest_checkpoint(federation.checkpoints)
    assert kept is not None
    assert kept.server_round == 2
    assert same(kept.adapter, 2.0)
    assert b"secret" not in written(federation.run_dir)
    last = events(federation)[-1]
    assert (last["event"], last["code"], last["rounds_done"]) == ("run_paused", "SAM-F102", 2)


def test_after_a_lost_quorum_the_run_goes_on_where_it_stopped(fake_site, fake_federation):
    federation = fake_federation(CONFIG, ["a", "b"])
    good = fake_site("a", CONFIG)
    with pytest.raises(FederationError):
        run_in_process(federation, [good, fake_site("b", CONFIG, instead={2: ValueError()})])
    state = run_in_process(federation, [good, fake_site("b", CONFIG)])
    assert good.asked == [1, 2, 2, 3]
    assert same(state.adapter, 3.0)


# The roll call.


@pytest.mark.parametrize(
    ("hello", "message"),
    [
        ({"base-sha256": "f" * 64}, "site b: base-sha256 ffffffffffffffff not ba5eba5eba5eba5e"),
        ({"config-sha256": "0" * 64}, "site b: config-sha256 0000000000000000 not "),
        ({"samaritan": "9.9"}, "site b: samaritan 9.9 not 0."),
        ({"site": "a"}, "site a: a second node claims to be this site"),
        ({"site": "stranger"}, "not an approved site"),
        ({"config-sha256": PLANTED}, "site b: config-sha256 (unreadable) not "),
    ],
)
def test_a_site_of_another_study_is_refused_at_the_roll_call(
    fake_site, fake_federation, hello, message
):
    federation = fake_federation(CONFIG, ["a", "b"])
    sites = [fake_site("a", CONFIG), fake_site("b", CONFIG, hello=hello)]
    with pytest.raises(FederationError) as caught:
        run_in_process(federation, sites)
    assert caught.value.code == "SAM-F103"
    assert "1 of 2 sites are ready" in caught.value.message
    assert message in caught.value.message
    assert "stranger" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert [site.asked for site in sites] == [[], []]


def test_with_enough_right_sites_a_wrong_one_is_left_out_and_never_asked(
    fake_site, fake_federation
):
    sites = [fake_site(name, CONFIG) for name in "ab"]
    sites.append(fake_site("c", CONFIG, 50.0, hello={"base-sha256": "0" * 64}))
    sites.append(fake_site("unknown", CONFIG, 50.0))
    federation = fake_federation(CONFIG, ["a", "b", "c"])
    state = run_in_process(federation, sites)
    assert same(state.adapter, 3.0)
    assert sites[2].asked == sites[3].asked == []
    (roll,) = (e for e in events(federation) if e["event"] == "roll_call")
    assert roll["present"] == ["a", "b"]
    assert len(roll["refused"]) == 2


@pytest.mark.parametrize("nodes", [0, 1])
def test_missing_sites_end_the_wait_quickly(fake_site, fake_federation, nodes):
    sites = [fake_site("a", CONFIG)][:nodes]
    begun = time.monotonic()
    with pytest.raises(FederationError) as caught:
        run_in_process(fake_federation(CONFIG, ["a", "b"]), sites)
    assert time.monotonic() - begun < 5
    assert caught.value.code in {"SAM-F101", "SAM-F103"}
    assert f"{nodes} of 2 sites" in caught.value.message


def test_a_node_that_fails_at_the_roll_call_is_named_by_itself_and_its_code_alone(
    fake_site, fake_federation, monkeypatch
):
    broken = fake_site("b", CONFIG)
    monkeypatch.setattr(broken, "hello", lambda: {}[PLANTED])
    with pytest.raises(FederationError, match="node 1001: failed: SAM-F299") as caught:
        run_in_process(fake_federation(CONFIG, ["a", "b"]), [fake_site("a", CONFIG), broken])
    assert "secret" not in str(caught.value)


def test_nodes_lost_after_the_roll_call_end_the_run_in_time(
    fake_site, fake_federation, monkeypatch
):
    sites = [fake_site("a", CONFIG), fake_site("b", CONFIG)]
    federation = fake_federation(CONFIG, ["a", "b"])
    grid = InProcessGrid(make_client_app(lambda c: sites[c.node_config["partition-id"]]), 2)
    call = Caller.call

    def one_goes(self, *arguments):
        found = call(self, *arguments)
        grid._contexts.pop(1001)
        return found

    monkeypatch.setattr(Caller, "call", one_goes)
    with pytest.raises(FederationError, match="1 sites are online") as caught:
        run_rounds(grid, federation)
    assert caught.value.code == "SAM-F101"


# Checkpoints.


def checkpoint(number, value=None, size=3):
    adapter = {"a": torch.full((size,), float(value or number)), "b": torch.arange(4.0)}
    return Checkpoint(number, adapter, [{"round": n + 1} for n in range(number)], "c" * 64)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    save_checkpoint(tmp_path, checkpoint(2))
    back = latest_checkpoint(tmp_path)
    assert back.server_round == 2
    assert back.history == [{"round": 1}, {"round": 2}]
    assert torch.equal(back.adapter["a"], torch.full((3,), 2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["round_00002.safetensors"]


def test_without_checkpoints_there_is_none(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def flip(path, where=-3):
    data = bytearray(path.read_bytes())
    data[where] ^= 4
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("damage", [truncate, empty, flip])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    tmp_path, damage, fake_site, fake_federation
):
    federation = fake_federation(CONFIG, ["a"])
    run_in_process(federation, [fake_site("a", CONFIG)])
    damage(federation.checkpoints / "round_00003.safetensors")
    site = fake_site("a", CONFIG)
    assert same(run_in_process(federation, [site]).adapter, 3.0)
    assert site.asked == [3]
    (event,) = (e for e in events(federation) if e["event"] == "checkpoints_damaged")
    assert event["files"] == ["round_00003.safetensors"]


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1))
    whole = path.read_bytes()
    expected = latest_checkpoint(tmp_path)
    for position in range(len(whole)):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(bytes(damaged))
            try:
                found = latest_checkpoint(tmp_path)
            except StorageError:
                continue
            assert found.history == expected.history
            assert found.config_sha256 == expected.config_sha256
            assert found.adapter.keys() == expected.adapter.keys()
            for name, value in expected.adapter.items():
                assert torch.equal(found.adapter[name], value), (position, bit)


def test_when_every_checkpoint_is_damaged_the_run_says_so(fake_site, fake_federation):
    federation = fake_federation(CONFIG, ["a"])
    run_in_process(federation, [fake_site("a", CONFIG)])
    for path in federation.checkpoints.iterdir():
        truncate(path)
    site = fake_site("a", CONFIG)
    with pytest.raises(StorageError, match="none of the 3 checkpoints") as caught:
        run_in_process(federation, [site])
    assert caught.value.code == "SAM-S103"
    assert site.asked == []


def test_checkpoints_of_another_configuration_are_refused(fake_site, fake_federation):
    run_in_process(fake_federation(CONFIG, ["a"]), [fake_site("a", CONFIG)])
    other = config_of(seed=7)
    site = fake_site("a", other)
    with pytest.raises(StorageError) as caught:
        run_in_process(fake_federation(other, ["a"]), [site])
    assert caught.value.code == "SAM-S104"
    assert config_sha256(other)[:16] in caught.value.message
    assert site.asked == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_checkpoint_before_and_no_part(tmp_path, monkeypatch, call):
    save_checkpoint(tmp_path, checkpoint(1))

    def full(*arguments, **keys):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path if call == "replace" else os, call, full)
        with pytest.raises(StorageError, match="No space left on device") as caught:
            save_checkpoint(tmp_path, checkpoint(2))
    assert caught.value.code == "SAM-S101"
    assert [p.name for p in tmp_path.iterdir()] == ["round_00001.safetensors"]
    assert latest_checkpoint(tmp_path).server_round == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_rewritten_keeps_what_it_held(tmp_path, monkeypatch, call):
    path = tmp_path / "summary.json"
    write_atomically(path, b"old")

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(Path if call == "replace" else os, call, full)
        with pytest.raises(StorageError):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_round_that_cannot_be_kept_ends_the_run_and_is_repeated_on_resumption(
    fake_site, fake_federation, monkeypatch
):
    federation = fake_federation(CONFIG, ["a"])
    save = rounds.save_checkpoint

    def full(directory, state):
        if state.server_round == 2:
            raise StorageError("SAM-S101", "full")
        return save(directory, state)

    site = fake_site("a", CONFIG)
    with monkeypatch.context() as patched:
        patched.setattr(rounds, "save_checkpoint", full)
        with pytest.raises(StorageError, match="full"):
            run_in_process(federation, [site])
    state = run_in_process(federation, [site])
    assert site.asked == [1, 2, 2, 3]
    assert same(state.adapter, 3.0)


def test_a_write_that_the_system_cuts_short_leaves_no_part(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    large = checkpoint(2, size=100_000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(StorageError, match="File too large") as caught:
            save_checkpoint(tmp_path, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.code == "SAM-S101"
    assert [p.name for p in tmp_path.iterdir()] == ["round_00001.safetensors"]
    save_checkpoint(tmp_path, large)
    assert latest_checkpoint(tmp_path).server_round == 2


# Events.


def test_events_are_one_object_per_line_with_their_time(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, "first", text="two\nlines", number=1)
    append_event(path, "second")
    lines = path.read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["first", "second"]
    assert json.loads(lines[0])["text"] == "two\nlines"
    assert json.loads(lines[0])["time"].endswith("+00:00")


@pytest.mark.parametrize("torn", [b'{"time": "2', b"x" * 200_000])
def test_a_line_a_crash_left_unfinished_is_dropped(tmp_path, torn):
    path = tmp_path / "events.jsonl"
    append_event(path, "first")
    with path.open("ab") as file:
        file.write(torn)
    append_event(path, "second")
    found = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    assert found == ["first", "second"]


def test_an_event_that_cannot_be_written_is_a_clear_error(tmp_path):
    with pytest.raises(StorageError) as caught:
        append_event(tmp_path / "missing" / "events.jsonl", "lost")
    assert caught.value.code == "SAM-S102"


# Resumption.


class Stop(Exception):
    pass


def judged(state):
    """The history without times, and without bytes: after a stop sites are sent the whole state."""
    rest = [{k: v for k, v in entry.items() if "seconds" not in k} for entry in state.history]
    for entry in rest:
        entry["sites"] = {
            name: {k: v for k, v in site.items() if k not in ("seconds", "bytes_down")}
            for name, site in entry["sites"].items()
        }
    return rest


@pytest.mark.parametrize("after", [1, 2])
def test_a_stopped_and_resumed_run_equals_one_that_never_stopped(fake_site, fake_federation, after):
    def sites():
        return [fake_site("a", CONFIG, 0.1), fake_site("b", CONFIG, 0.7, examples=3)]

    def stop(entry):
        if entry["round"] == after:
            raise Stop

    straight = run_in_process(fake_federation(CONFIG, ["a", "b"], "straight"), sites())
    with pytest.raises(Stop):
        run_in_process(fake_federation(CONFIG, ["a", "b"], "stopped", on_round=stop), sites())
    agents = sites()
    resumed = run_in_process(fake_federation(CONFIG, ["a", "b"], "stopped"), agents)
    assert agents[0].asked == list(range(after + 1, 4))
    assert all(torch.equal(straight.adapter[n], resumed.adapter[n]) for n in "ab")
    assert judged(straight) == judged(resumed)


def test_a_finished_run_is_not_trained_again(fake_site, fake_federation):
    federation = fake_federation(CONFIG, ["a"])
    first = run_in_process(federation, [fake_site("a", CONFIG)])
    site = fake_site("a", CONFIG)
    again = run_in_process(federation, [site])
    assert site.asked == []
    assert all(torch.equal(first.adapter[n], again.adapter[n]) for n in "ab")
    assert again.history == first.history
