"""A private run that is killed wherever it stands pays for all it did, and for no answer twice.

Every start is the real command in a process of its own. Beside the run, a trace notes whenever a
site begins to train, what its ledgers held then, and each step it made: what ledgers say is
compared with what was done.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from samaritan.data.phantoms import write_phantoms
from samaritan.keys import make_identity
from samaritan.privacy.accounting import Spending, epsilon_of
from samaritan.privacy.ledger import verify
from server.checkpoints import latest_checkpoint
from tests.test_kill import FORKS, event, starts_of, wait_until

PRIVATE = """\
rounds: 3
strategy: ffa
model: {image_size: 32}
peft: {rank: 2}
data: {source: phantoms, sites: 3, cases_per_site: 4, slice_axis: axial}
training: {precision: fp32}
federation: {weighting: uniform, retry_wait_s: 0, wait_s: 1}
privacy: {unit: patient, epsilon: 30, records: 10, sampling_rate: 0.5, steps_per_round: 2,
          slices_per_patient: 2, noise_multiplier: 1.0}
"""
SITES = ("site_01", "site_02", "site_03")
ROUNDS, STEPS = 3, 2

STRIKES = [  # the file or folder that has just reached the disk, and what its last line says
    (r"site_02/ledger/\w+\.jsonl", '"type":"reserve"'),  # its copy lacks the line
    (r"site_03/ledger_copy/\w+\.jsonl", '"type":"reserve"'),
    (r"site_03/ledger/outbox", ""),  # the answer is there, and nobody knows it
    (r"site_03/ledger_copy/\w+\.jsonl", '"type":"commit"'),  # known, and not sent
    (r"checkpoints/\.round_00001\.\S+\.partial", ""),  # sent and used, and the round is lost
]

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").is_dir(), reason="needs /proc to tell which file was synced"
)


# Inside the processes that are killed.


def command(arguments, folder, fatal):
    """The command line, traced; killed once the file of `fatal` is synced."""
    import client.agent
    import samaritan.privacy.budget
    from samaritan.cli.main import main

    torch.set_num_threads(1)
    # It takes seconds in every process, and has tests of its own.
    samaritan.privacy.budget.require_sound_mechanism = lambda: None
    client.agent.train_privately = traced(client.agent.train_privately, folder)
    if fatal:
        os.fsync = striking(os.fsync, *fatal)
    sys.argv = ["samaritan", "simulate", *arguments]
    with folder.with_suffix(".log").open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    main()


def traced(train, folder):
    def note(**fields):
        with folder.with_suffix(".trace").open("a") as file:
            file.write(json.dumps(fields) + "\n")

    def work(model, cache, cases, *rest, on_step, **more):
        site = cases[0].site
        places = [folder / "sites" / site / name for name in ("ledger", "ledger_copy")]
        note(site=site, charged=[reserves(place) for place in places])

        def step(number, steps, loss):
            note(site=site, step=number)
            on_step(number, steps, loss)

        return train(model, cache, cases, *rest, on_step=step, **more)

    return work


def reserves(place):
    return sum(path.read_text().count('"type":"reserve"') for path in place.glob("*.jsonl"))


def striking(sync, where, last):
    def fsync(descriptor):
        sync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if re.search(where + "$", str(path)) and (
            not last or last in path.read_text().splitlines()[-1]
        ):
            signal.raise_signal(signal.SIGKILL)

    return fsync


# Outside.


def start(base, folder, fatal=None):
    arguments = [base / "private.yaml", "--out", folder, "--data", base / "phantoms"]
    if folder.exists():
        arguments.append("--resume")
    process = FORKS.Process(
        target=command, args=([str(part) for part in arguments], folder, fatal), daemon=True
    )
    process.start()
    return process


def end(base, folder, fatal=None):
    """How a process ended that was left to itself, or to its strike."""
    process = start(base, folder, fatal)
    process.join(300)
    return process.exitcode


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A configuration and phantoms."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "private.yaml").write_text(PRIVATE)
    write_phantoms(folder / "phantoms", len(SITES), 4, 0)
    return folder


@pytest.fixture(scope="module")
def killed(base, tmp_path_factory):
    """A run that was killed six times and went on to its end.

    Beside it lie `older`, the sites after the first kill, and `later`, the run after the last.
    """
    folder = tmp_path_factory.mktemp("killed") / "run"
    for fatal in STRIKES:
        assert end(base, folder, fatal) == -signal.SIGKILL, log_of(folder)
        if fatal == STRIKES[0]:
            shutil.copytree(folder / "sites", folder.parent / "older")
    process = start(base, folder)
    wait_until(event(folder, "round_started", 2), process)
    time.sleep(random.Random(5).uniform(0, 1))  # noqa: S311
    process.kill()
    process.join()
    shutil.copytree(folder, folder.parent / "later")
    assert end(base, folder) == 0, log_of(folder)
    return folder


def log_of(folder):
    return folder.with_suffix(".log").read_text()


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def trace_of(folder, site, what):
    found = map(json.loads, folder.with_suffix(".trace").read_text().splitlines())
    return [line[what] for line in found if line["site"] == site and what in line]


def ledger_of(folder, site, place="ledger"):
    (path,) = (folder / "sites" / site / place).glob("*.jsonl")
    return path


def records(folder, site, *kinds):
    found = map(json.loads, ledger_of(folder, site).read_text().splitlines())
    return [record for record in found if record["type"] in kinds]


def test_a_private_run_that_was_killed_is_complete(killed):
    assert starts_of(killed) == len(STRIKES) + 2
    rounds = summary_of(killed)["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2, 3]
    for entry in rounds:
        assert {n: s["status"] for n, s in entry["sites"].items()} == dict.fromkeys(SITES, "ok")
    assert event(killed, "run_finished")()
    assert not list(killed.rglob("*.partial"))


@pytest.mark.parametrize("site", SITES)
def test_every_attempt_is_charged_on_both_disks_before_it_begins(killed, site):
    attempts = trace_of(killed, site, "charged")
    assert len(attempts) >= ROUNDS
    for number, on_disks in enumerate(attempts, start=1):
        assert min(on_disks) >= number, f"attempt {number} began with {on_disks} charges"
    charges = records(killed, site, "reserve")
    assert len(attempts) <= len(charges) <= len(attempts) + len(STRIKES) + 1
    done = len(trace_of(killed, site, "step"))
    assert ROUNDS * STEPS <= done <= sum(record["steps_planned"] for record in charges)


def test_what_a_kill_cut_off_is_charged_again(killed):
    """Else the other tests would hold for a run that nobody killed."""
    assert [r["attempt"] for r in records(killed, "site_02", "reserve")][:2] == [1, 2]
    assert [r["attempt"] for r in records(killed, "site_03", "reserve")][:3] == [1, 2, 3]


@pytest.mark.parametrize("site", SITES)
def test_a_question_that_was_answered_is_not_paid_again(killed, site):
    answered = []
    for record in records(killed, site, "reserve", "commit"):
        question = record["plan_hash"], record["round"], record["model_in_hash"]
        assert question not in answered
        if record["type"] == "commit":
            answered.append(question)
            kept = killed / "sites" / site / "ledger" / "outbox" / record["update_hash"]
            assert hashlib.sha256(kept.read_bytes()).hexdigest() == record["update_hash"]
            assert record["steps_done"] == STEPS
    assert [question[1] for question in answered] == [1, 2, 3]


@pytest.mark.parametrize("site", SITES)
def test_the_chain_holds_and_ends_where_the_server_was_told(killed, site):
    home = killed / "sites" / site
    public = make_identity(home / "identity.key").public
    assert verify(home / "ledger", public, home / "ledger_copy") == []
    lines = ledger_of(killed, site).read_bytes().splitlines()
    head = hashlib.sha256(lines[-1]).hexdigest()
    assert summary_of(killed)["rounds"][-1]["sites"][site]["ledger"] == head


@pytest.mark.parametrize("site", SITES)
def test_the_epsilon_told_is_that_of_all_charges(killed, site):
    charges = records(killed, site, "reserve")
    spent = [Spending(float(r["sampling"]), float(r["sigma"]), r["steps_planned"]) for r in charges]
    told = summary_of(killed)["privacy"]["sites"][site]
    expected = epsilon_of(spent, told["delta"])
    assert told["epsilon"] == pytest.approx(expected.pld)
    assert told["epsilon_rdp"] == pytest.approx(expected.rdp)


def test_a_site_whose_ledger_was_restored_is_refused_and_the_others_go_on(killed, base, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(killed.parent / "later", folder)
    done = latest_checkpoint(folder / "checkpoints").server_round
    assert 1 <= done < ROUNDS
    (backup,) = (killed.parent / "older" / "site_02" / "ledger").glob("*.jsonl")
    old = backup.read_bytes()
    places = [ledger_of(folder, "site_02", place) for place in ("ledger", "ledger_copy")]
    for path in places:
        assert path.read_bytes().startswith(old)
        assert path.read_bytes() != old
        path.write_bytes(old)
    assert end(base, folder) == 0, log_of(folder)
    later = summary_of(folder)["rounds"][done:]
    assert len(later) == ROUNDS - done
    for entry in later:
        status = {site: told["status"] for site, told in entry["sites"].items()}
        assert status == {"site_01": "ok", "site_02": "failed: SAM-P103", "site_03": "ok"}
    assert "LEDGER ROLLED BACK" in log_of(folder)
    assert "LEDGER ROLLED BACK" not in (folder / "events.jsonl").read_text()
    assert [path.read_bytes() for path in places] == [old, old]
    assert not trace_of(folder, "site_02", "charged")
    assert trace_of(folder, "site_03", "charged")
