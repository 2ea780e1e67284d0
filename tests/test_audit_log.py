"""The log of a site, and what its verification finds: everything but what it says it cannot see."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message

from client.app import make_client_app
from client.site import Site
from samaritan.audit import reading
from samaritan.audit.gate import Gate
from samaritan.audit.log import START, LineError, Log, entries
from samaritan.audit.policy import SitePolicy
from samaritan.audit.verify import match, verify_log
from samaritan.codecs import encode
from samaritan.config import parse_config
from samaritan.errors import AuditError, DataError
from samaritan.keys import Identity, make_identity
from samaritan.lines import canonical, line_hash
from samaritan.messages import Answer, Instruction, Request, answer_hash, sealed, sealed_fields
from samaritan.wire import MESSAGE_TYPES, answer_content, request_content
from server.ingress import Ingress
from simulation.grid import InProcessGrid

OWNER = {"site": "A"}
PLAN = "f" * 64
SHAPES = {"a": (2, 3), "b": (4,)}
ROUNDS = 12
FAILED = 3
"""The round in which the training of every site fails."""


# Real logs of sites and their server: 25 questions, through courier, gate and ingress.


class Agent:
    """Answers as an agent does, without data or model."""

    def __init__(self, seed):
        self.config = parse_config({"rounds": ROUNDS})
        self.initial = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.generator = torch.Generator().manual_seed(seed)

    def hello(self):
        hashes = ("config-sha256", "base-sha256", "adapter-sha256")
        return {"site": self.site, "samaritan": "0.1.0"} | dict.fromkeys(hashes, "0" * 64)

    def train(self, payload, instruction):
        if instruction.server_round == FAILED:
            raise DataError("SAM-D101", "case /data/patient_007.nii.gz")
        update = {k: torch.randn(shape, generator=self.generator) for k, shape in SHAPES.items()}
        header = {"round": str(instruction.server_round), "state": instruction.state_sha256}
        numbers = {"num-examples": 7, "train-loss": 0.5, "steps": 4, "seconds": 1.25}
        return encode(update, self.config.wire.up, header=header, seed=0), numbers

    def evaluate(self, payload, instruction):
        dice = float(torch.rand((), generator=self.generator))
        return {"dice": dice, "num-cases": 3, "seconds": 0.5}


@dataclass(frozen=True)
class World:
    """Two logs about the same messages, and the key of the site."""

    site: bytes
    server: bytes
    key: Identity

    def verdict(self, folder, site=None, server=None, key=True):
        """Of these logs, or of others in their place."""
        paths = folder / "site.jsonl", folder / "server.jsonl"
        for path, own, other in zip(paths, (self.site, self.server), (site, server), strict=True):
            path.write_bytes(own if other is None else other)
        return match(paths[0], [paths[1]], self.key.public if key is True else key)


def make_world(folder, seed=1, names=("A", "B"), signed=True):
    """The logs of the first of some sites and of their server."""
    keys = {name: make_identity(folder / f"{name}.key") for name in names}
    sites = []
    for number, name in enumerate(names):
        agent = Agent(seed + number)
        agent.site = name
        gate = Gate(
            Log(folder / f"{name}.jsonl", {"site": name}), SitePolicy(), "server.example:9092"
        )
        identity = keys[name] if signed else None
        sites.append(Site(name, lambda _, agent=agent: agent, gate, identity))
    app = make_client_app(lambda context: sites[int(context.node_config["partition-id"])])
    grid = InProcessGrid(app, len(names))
    signers = {name: key.public for name, key in keys.items()} if signed else {}
    ingress = Ingress(Log(folder / "server.jsonl", {"server": "study"}), signers)
    questions = [Request("hello", PLAN)]
    for number in range(1, ROUNDS + 1):
        instruction = Instruction(number, ROUNDS, "c" * 64, "b" * 64, 60.0, "5" * 64)
        questions.append(Request("train", PLAN, instruction=instruction, payload=b"state"))
        questions.append(Request("evaluate", PLAN, instruction=instruction))
    for request in questions:
        for number, name in enumerate(names):
            message = Message(
                request_content(request),
                message_type=MESSAGE_TYPES[request.kind],
                dst_node_id=1000 + number,
            )
            (reply,) = grid.send_and_receive([message])
            assert ingress.admits(name, request, reply)
    logs = (folder / f"{names[0]}.jsonl", folder / "server.jsonl")
    return World(*(path.read_bytes() for path in logs), keys[names[0]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """The same names and questions, other answers and times."""
    return make_world(tmp_path_factory.mktemp("foreign"), seed=50)


def read(path):
    return [entry for entry, _ in entries(path.read_bytes())]


def lines_of(data):
    return data.splitlines(keepends=True)


def parsed(data):
    return [json.loads(line) for line in lines_of(data)]


def chained(found):
    """The lines of a chain that an insider makes anew, whatever the entries say."""
    lines, previous, time = [], START, "2026-11-28T10:00:00.000+00:00"
    for number, entry in enumerate(found):
        whole = {"schema": 1, "time_utc": time} | entry
        time = whole["time_utc"]
        lines.append(canonical(whole | {"seq": number, "prev": previous}) + b"\n")
        previous = line_hash(lines[-1])
    return b"".join(lines)


def rewritten(data, change):
    """A log whose entries an insider has changed, with a chain that is right again."""
    found = parsed(data)
    return chained(change(found) or found)


def where(data, entry_type, /, **fields):
    """The index of the first entry of a type with these fields."""
    wanted = {"type": entry_type} | fields
    return next(i for i, e in enumerate(parsed(data)) if wanted.items() <= plain(e).items())


def plain(entry):
    return {name: value for name, value in entry.items() if isinstance(value, str | int)}


def first(verdict):
    """The first bad line; 0 where there is none."""
    return verdict.faults[0].line if verdict.faults else 0


def other_time(line):
    """The line with one byte of its time changed."""
    at = line.index(b'"time_utc":"') + 12 + len("2026-11-28T10:00:00.00")
    return line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]


def of_plan(data, plan):
    """A log of the same messages about another plan; each message has a name of its own."""

    def change(found):
        return [
            {k: named(k, v) for k, v in entry.items()} if "plan" in entry else entry
            for entry in found
        ]

    def named(name, value):
        return plan if name == "plan" else f"{value} of {plan}" if name == "message" else value

    return rewritten(data, change)


def three_studies(data, plans):
    """A site's log of three studies, one after the other."""
    studies = [parsed(of_plan(data, plan)) for plan in plans]
    found = [studies[0][0], *(entry for study in studies for entry in study[1:])]
    return chained([{k: v for k, v in entry.items() if k != "time_utc"} for entry in found])


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write_chain(path, found):
    path.write_bytes(chained(found))
    return path


# The log itself.


def test_lines_stand_in_a_chain_that_anybody_can_follow(tmp_path):
    log = Log(tmp_path / "log.jsonl", OWNER)
    log.append("request", kind="hello", message="m")
    log.append("refused", code="SAM-F299")
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    previous = "0" * 64
    for number, line in enumerate(lines):
        entry = json.loads(line)
        assert line == json.dumps(entry, sort_keys=True, separators=(",", ":")).encode()
        assert (entry["schema"], entry["seq"], entry["prev"]) == (1, number, previous)
        previous = hashlib.sha256(line).hexdigest()
    assert [json.loads(line)["type"] for line in lines] == ["genesis", "request", "refused"]
    assert json.loads(lines[0])["site"] == "A"
    assert json.loads(lines[1])["kind"] == "hello"


def test_an_entry_is_named_by_its_hash_and_is_on_the_disk_when_it_is_written(tmp_path, monkeypatch):
    log = Log(tmp_path / "log.jsonl", OWNER)
    synced, sync = [], os.fsync

    def fsync(descriptor):
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    digest = log.append("request")
    assert digest == line_hash((tmp_path / "log.jsonl").read_bytes().splitlines()[-1])
    assert synced == ["log.jsonl", tmp_path.name]


def test_a_log_that_is_opened_again_goes_on_and_says_nothing(tmp_path):
    Log(tmp_path / "log.jsonl", OWNER).append("request")
    before = (tmp_path / "log.jsonl").read_bytes()
    log = Log(tmp_path / "log.jsonl", OWNER)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    log.append("refused")
    assert [e["type"] for e in read(tmp_path / "log.jsonl")] == ["genesis", "request", "refused"]


def test_two_objects_and_two_threads_take_turns(tmp_path):
    path = tmp_path / "log.jsonl"
    one, two = Log(path, OWNER), Log(path, OWNER)
    one.append("request", n=1)
    two.append("request", n=2)
    one.append("request", n=3)

    def write(log, start):
        for number in range(start, start + 20):
            log.append("request", n=number)

    threads = [threading.Thread(target=write, args=(Log(path, OWNER), 100 * i)) for i in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    two.append("refused")
    found = read(path)
    assert len(found) == 45
    assert [e["n"] for e in found[1:4]] == [1, 2, 3]
    assert {e["n"] for e in found[4:44]} == {*range(100, 120), *range(200, 220)}
    assert verify_log(path).whole


def test_whoever_writes_waits_for_the_other(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, OWNER)
    before = path.read_bytes()
    thread = threading.Thread(target=log.append, args=("request",))
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive()
        assert path.read_bytes() == before
    thread.join()
    assert len(read(path)) == 2


def test_only_the_owner_can_read_a_log(tmp_path):
    old = os.umask(0)
    try:
        Log(tmp_path / "made" / "log.jsonl", OWNER)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "made" / "log.jsonl").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "made").stat().st_mode) == 0o700


@pytest.mark.parametrize("owner", [{"site": "B"}, {"site": "A", "key": "00"}, {"server": "A"}])
def test_the_log_of_another_is_refused(tmp_path, owner):
    Log(tmp_path / "log.jsonl", OWNER)
    with pytest.raises(AuditError, match=r"SAM-A101[^\n]*line 1 .*another's"):
        Log(tmp_path / "log.jsonl", owner)


def test_a_first_line_of_any_form_is_refused_in_words(tmp_path):
    write_chain(tmp_path / "log.jsonl", [{"type": "genesis", "site": ["A"], "more": {"a": []}}])
    with pytest.raises(AuditError, match="SAM-A101"):
        Log(tmp_path / "log.jsonl", OWNER)


@pytest.mark.parametrize("torn", [b'{"kind":"tra', b"{", b'{"a":1}', b"\xff\x00\xff"])
def test_a_line_that_was_cut_short_is_set_aside_and_noted(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    Log(path, OWNER).append("request")
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    Log(path, OWNER).append("request")
    assert path.read_bytes().startswith(whole)
    last, repair = read(path)[-1], read(path)[-2]
    assert (last["type"], repair["type"]) == ("request", "repair")
    digest = hashlib.sha256(torn).hexdigest()
    assert (repair["fragment_sha256"], repair["fragment_bytes"]) == (digest, len(torn))
    (aside,) = tmp_path.glob("*.fragment")
    assert aside.read_bytes() == torn
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    verdict = verify_log(path)
    assert verdict.whole
    assert [w.line for w in verdict.warnings] == [3]


def test_a_torn_line_of_another_process_is_set_aside_while_the_log_is_open(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, OWNER)
    with path.open("ab") as file:
        file.write(b'{"half')
    log.append("request")
    assert [e["type"] for e in read(path)] == ["genesis", "repair", "request"]


def test_a_first_line_that_was_cut_short_is_written_again(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"prev":"000')
    Log(path, OWNER)
    assert [e["type"] for e in read(path)] == ["genesis"]
    assert len(list(tmp_path.glob("*.fragment"))) == 1


def test_a_torn_line_that_cannot_be_set_aside_stops_the_log(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    Log(path, OWNER)
    with path.open("ab") as file:
        file.write(b'{"half')
    torn = path.read_bytes()
    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(AuditError, match="SAM-A102"):
        Log(path, OWNER)
    assert path.read_bytes() == torn


@pytest.mark.parametrize("written", [0, 7, 10_000])
def test_a_full_disk_leaves_no_part_of_a_line(tmp_path, monkeypatch, written):
    path = tmp_path / "log.jsonl"
    log, write, calls = Log(path, OWNER), os.write, []
    before = path.read_bytes()

    def some(descriptor, data):
        calls.append(len(data))
        if len(calls) > 1 or not written:
            full_disk()
        return write(descriptor, data[:written])

    monkeypatch.setattr(os, "write", some)
    if written < 10_000:
        with pytest.raises(AuditError, match="SAM-A102") as error:
            log.append("refused", note="x" * 100)
        assert str(path) in error.value.message
        assert path.read_bytes() == before
    else:
        log.append("refused")
    monkeypatch.undo()
    log.append("request")
    assert read(path)[-1]["type"] == "request"
    assert verify_log(path).whole
    assert not verify_log(path).warnings


def test_a_line_that_cannot_be_synced_is_taken_back(tmp_path, monkeypatch):
    log = Log(tmp_path / "log.jsonl", OWNER)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(AuditError, match="SAM-A102"):
        log.append("egress")
    assert len(read(tmp_path / "log.jsonl")) == 1


def test_a_limit_of_the_system_leaves_no_part_of_a_line(tmp_path):
    """As a full disk, without any pretence."""
    code = """
import resource, sys
from pathlib import Path
from samaritan.audit.log import Log
from samaritan.errors import AuditError
log = Log(Path(sys.argv[1]), {"site": "A"})
size = log.path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 50, resource.RLIM_INFINITY))
try:
    log.append("egress", note="x" * 100)
except AuditError as error:
    assert error.code == "SAM-A102", error
else:
    raise SystemExit("written")
assert log.path.stat().st_size == size
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.append("request")
"""
    path = tmp_path / "log.jsonl"
    subprocess.run([sys.executable, "-c", code, path], check=True, cwd=Path(__file__).parents[1])
    assert [e["type"] for e in read(path)] == ["genesis", "request"]


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(AuditError, match="SAM-A102"):
        Log(tmp_path / "file" / "log.jsonl", OWNER)


def test_a_log_that_was_cut_while_open_takes_no_more_entries(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, OWNER)
    log.append("request")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0])
    with pytest.raises(AuditError, match=r"SAM-A101[^\n]*line 2 .*gone"):
        log.append("egress")
    assert path.read_bytes() == lines[0]


def test_a_log_that_was_changed_while_open_takes_no_more_entries(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path, OWNER)
    log.append("request")
    write_chain(path, [{"type": "genesis"} | OWNER, {"type": "refused"}, {"type": "refused"}])
    with pytest.raises(AuditError, match="SAM-A101"):
        log.append("egress")


def test_a_damaged_log_is_not_added_to(tmp_path):
    path = tmp_path / "log.jsonl"
    Log(path, OWNER).append("request", kind="hello")
    Log(path, OWNER).append("request", kind="train")
    data = path.read_bytes().replace(b"hello", b"Hello")
    path.write_bytes(data)
    with pytest.raises(AuditError, match=r"SAM-A101[^\n]*line 3 .*follow"):
        Log(path, OWNER)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    "line",
    [
        b"[]", b"3", b"null", b'"x"', b"{}", b"nonsense", b"\xff", b"[" * 100_000, b"1" * 10_000,
        b'{"schema":2,"seq":0,"prev":"","time_utc":"","type":"genesis"}',
        b'{"prev":"","schema":2,"seq":0,"time_utc":"","type":"genesis"}',
        b'{"prev":"","prev":"","schema":1,"seq":0,"time_utc":"","type":"genesis"}',
        b'{"prev":NaN,"schema":1,"seq":0,"time_utc":"","type":"genesis"}',
        b'{"prev":"","schema":1,"seq":0,"type":"genesis"}',
        b'{"prev": "","schema":1,"seq":0,"time_utc":"","type":"genesis"}',
        b'{"prev":"\xc3\xbc","schema":1,"seq":0,"time_utc":"","type":"genesis"}',
    ],
    ids=lambda line: line[:20].decode("latin1"),
)  # fmt: skip
def test_what_no_log_has_written_is_no_line(line):
    with pytest.raises(LineError, match="line 1: it is damaged"):
        list(entries(line + b"\n"))


def test_only_the_first_line_is_a_first_line(tmp_path):
    write_chain(tmp_path / "a", [{"type": "request"}])
    write_chain(tmp_path / "b", [{"type": "genesis"}, {"type": "genesis"}])
    assert first(verify_log(tmp_path / "a")) == 1
    assert first(verify_log(tmp_path / "b")) == 2


def test_lines_are_numbered(tmp_path):
    """Whoever makes a chain anew must do this too."""
    lines = lines_of(chained([{"type": "genesis"}, {"type": "request"}]))
    skipped = json.loads(lines[1]) | {"seq": 2}
    (tmp_path / "a").write_bytes(lines[0] + canonical(skipped) + b"\n")
    (fault,) = verify_log(tmp_path / "a").faults
    assert (fault.line, fault.what) == (2, "it has number 2 where 1 is due")


def test_entries_hold_no_fractions_that_are_no_numbers(tmp_path):
    log = Log(tmp_path / "log.jsonl", OWNER)
    with pytest.raises(ValueError, match="JSON"):
        log.append("egress", value=float("nan"))
    assert len(read(tmp_path / "log.jsonl")) == 1


# Verification of one log.


def test_a_log_that_nobody_touched_is_whole(world, tmp_path):
    verdict = verify_log(put(tmp_path, world.site))
    assert verdict.whole
    assert not verdict.warnings
    assert verdict.entries == 51
    assert len(verdict.left) == 24
    train = [d for d in verdict.left if d.kind == "train"]
    assert [d.server_round for d in train] == [n for n in range(1, ROUNDS + 1) if n != FAILED]
    sizes = {e["bytes"] for e in parsed(world.site) if e["type"] == "egress" and e["round"]}
    assert {d.size_bytes for d in verdict.left if d.server_round} == sizes
    assert train[0].numbers == {
        "num-examples": "7", "train-loss": "0.5", "steps": "4", "seconds": "1.25"
    }  # fmt: skip
    assert (train[0].tensors, train[0].destination) == (2, "server.example:9092")
    server = verify_log(put(tmp_path, world.server))
    assert server.whole
    assert not server.warnings
    assert server.entries == 51
    assert not server.departures


def test_any_flipped_byte_is_found(world, tmp_path):
    """But in the last line, of which the chain says nothing."""
    starts, at = [], 0
    for line in lines_of(world.site):
        starts.append(at)
        at += len(line)
    quiet = 0
    for place in range(0, len(world.site), 11):
        data = bytearray(world.site)
        data[place] ^= (1, 2, 4, 32, 128)[place // 11 % 5]
        changed = sum(start <= place for start in starts)
        verdict = verify_log(put(tmp_path, data))
        if changed < 50:
            assert first(verdict) == changed, place
        elif changed == 50:  # one successor cannot say which of the two it is
            assert first(verdict) in (50, 51), place
        elif verdict.whole and not verdict.warnings:
            quiet += 1
        else:
            assert first(verdict) in (0, 51), place
    assert quiet < len(lines_of(world.site)[-1]) / 22


def test_a_change_that_the_chain_alone_shows_is_told_of_the_line_that_has_it(world, tmp_path):
    """Not of the last two: nothing vouches for the last line, and nothing at all holds its hash."""
    lines = lines_of(world.site)
    for number in range(1, 52):
        changed = [*lines]
        changed[number - 1] = other_time(lines[number - 1])
        verdict = verify_log(put(tmp_path, b"".join(changed)))
        if number < 50:
            assert [f.line for f in verdict.faults] == [number]
            assert f"changed after line {number + 1} was written" in verdict.faults[0].what
            assert verdict.entries == number - 1
        elif number == 50:
            assert [f.line for f in verdict.faults] == [51]
            assert "one of the two was changed" in verdict.faults[0].what
        else:
            assert verdict.whole


def test_neighbours_that_were_both_changed_are_told_as_one_of_two(world, tmp_path):
    """The second does not count as a witness: its successor does not know it."""
    lines = lines_of(world.site)
    for at in range(48):
        changed = [*lines]
        changed[at], changed[at + 1] = other_time(lines[at]), other_time(lines[at + 1])
        (fault,) = verify_log(put(tmp_path, b"".join(changed))).faults
        assert fault.line == at + 2
        assert "one of the two was changed" in fault.what
    for witness in (b"nonsense\n", lines[9], lines[12].replace(b'"schema":1', b'"schema":2')):
        changed = [*lines[:10], other_time(lines[10]), lines[11], witness]
        (fault,) = verify_log(put(tmp_path, b"".join(changed))).faults
        assert (fault.line, "one of the two" in fault.what) == (12, True)
        changed = [*lines[:10], other_time(lines[10]), witness, lines[12]]
        (fault,) = verify_log(put(tmp_path, b"".join(changed))).faults
        assert fault.line == 12


def test_a_first_line_that_follows_another_is_told_so(world, tmp_path):
    lines = lines_of(world.site)
    head = canonical(json.loads(lines[0]) | {"prev": "1" * 64}) + b"\n"
    (fault,) = verify_log(put(tmp_path, head + b"".join(lines[1:]))).faults
    assert (fault.line, "there is none" in fault.what) == (1, True)


def test_a_line_that_was_changed_after_it_was_read_is_named_by_what_follows(tmp_path):
    """By a process that reads only what others have added since."""
    path = tmp_path / "log.jsonl"
    log = Log(path, OWNER)
    log.append("request")
    lines = lines_of(path.read_bytes())
    path.write_bytes(lines[0] + other_time(lines[1]))
    for kind, said in (("started", "line 3 .*one of the two"), ("stopped", "line 2 .*line 3 hol")):
        Log(path, OWNER).append(kind)
        with pytest.raises(AuditError, match=rf"SAM-A101[^\n]*{said}"):
            log.append("refused")
    assert verify_log(path).whole


def test_in_a_part_of_a_log_lines_have_their_numbers_in_the_log(world):
    lines = lines_of(world.site)
    for number in range(11, 50):
        part = [*lines[10 : number - 1], other_time(lines[number - 1]), *lines[number:]]
        found = entries(b"".join(part), 10, line_hash(lines[9]))
        assert len([next(found) for _ in range(11, number)]) == number - 11
        with pytest.raises(LineError, match=f"line {number}: it was changed after line"):
            next(found)


def test_the_end_of_the_last_line_counts(world, tmp_path):
    data = bytearray(world.site)
    data[-1] ^= 1
    verdict = verify_log(put(tmp_path, data))
    assert [w.line for w in verdict.warnings] == [51]
    assert "cut short" in verdict.warnings[0].what
    assert verdict.entries == 50


def test_any_missing_line_is_found(world, tmp_path):
    lines = lines_of(world.site)
    for number in range(1, 51):
        data = b"".join(lines[: number - 1] + lines[number:])
        assert first(verify_log(put(tmp_path, data))) == number


def test_any_repeated_line_is_found(world, tmp_path):
    lines = lines_of(world.site)
    for copied in range(51):
        for place in range(0, 52, 3):
            data = b"".join([*lines[:place], lines[copied], *lines[place:]])
            # A copy before its original is the original itself.
            bad = place + 1 if copied != place else place + 2
            assert first(verify_log(put(tmp_path, data))) == bad, (copied, place)


def test_any_two_lines_swapped_are_found(world, tmp_path):
    lines = lines_of(world.site)
    for one in range(51):
        for two in range(one + 1, 51):
            swapped = [*lines]
            swapped[one], swapped[two] = swapped[two], swapped[one]
            assert first(verify_log(put(tmp_path, b"".join(swapped)))) == one + 1


def test_lines_of_another_log_are_found(world, foreign, tmp_path):
    own, other = lines_of(world.site), lines_of(foreign.site)
    for place in range(1, 51):
        spliced = own[:place] + other[place:]
        (fault,) = verify_log(put(tmp_path, b"".join(spliced))).faults
        # Two lines of the other log speak against the last of this one.
        assert fault.line == (place if place < 50 else 51)
        assert place == 50 or f"the lines from {place + 1} on are of another log" in fault.what
        put_in = [*own[:place], other[place], *own[place + 1 :]]
        assert first(verify_log(put(tmp_path, b"".join(put_in)))) == place + 1
    appended = [*own, other[-1]]
    assert first(verify_log(put(tmp_path, b"".join(appended)))) == 52


def test_a_log_without_a_first_line_is_no_log(tmp_path):
    for data in (b"", b'{"half'):
        verdict = verify_log(put(tmp_path, data))
        assert (first(verdict), verdict.entries) == (1, 0)
    verdict = verify_log(put(tmp_path, b"{}\n"))
    assert [f.what for f in verdict.faults] == ["it is damaged"]


def test_a_cut_is_found_against_the_log_of_the_server_alone(world, tmp_path):
    lines = lines_of(world.site)
    arrived = [
        (number, entry["message"])
        for number, entry in enumerate(parsed(world.server), 1)
        if entry["type"] == "ingress" and entry["site"] == "A"
    ]
    for length in range(1, 52):
        kept = b"".join(lines[:length])
        alone = verify_log(put(tmp_path, kept))
        assert alone.whole
        assert not alone.warnings
        messages = {e["message"] for e in parsed(kept) if e["type"] == "egress"}
        lost = [number for number, message in arrived if message not in messages]
        verdict = world.verdict(tmp_path, kept)
        assert [f.line for f in verdict.faults] == lost
        assert all(f.file.endswith("server.jsonl") for f in verdict.faults)
        assert all("left there and was not logged" in f.what for f in verdict.faults)
        assert verdict.matched == 24 - len(lost)
    assert lost == []


def test_a_cut_at_the_end_of_both_logs_is_not_found(world, tmp_path):
    """The page says so."""
    site = lines_of(world.site)[:31]
    messages = {entry["message"] for entry in parsed(b"".join(site))[1:]}
    server = []
    for line in lines_of(world.server):
        if json.loads(line).get("site") == "A" and json.loads(line)["message"] not in messages:
            break
        server.append(line)
    verdict = world.verdict(tmp_path, b"".join(site), b"".join(server))
    assert verdict.whole
    assert not verdict.warnings


def test_a_chain_made_anew_is_not_found_without_the_other_log(world, tmp_path):
    """The page says so."""
    gone = where(world.site, "egress", round=5)

    def hide(found):
        return [e for e in found if e.get("message") != found[gone]["message"]]

    data = rewritten(world.site, hide)
    assert verify_log(put(tmp_path, data)).whole
    verdict = world.verdict(tmp_path, data)
    assert [f.line for f in verdict.faults] == [
        number
        for number, entry in enumerate(parsed(world.server), 1)
        if entry.get("message") == parsed(world.site)[gone]["message"]
    ]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"time_utc": "2099-11-28T10:00:00.000+00:00"}, False),
        ({"destination": "elsewhere"}, False),
        ({"tensors": [["x", [1], "fp32", 4]]}, False),
        ({"codec": {"numbers": "int4"}}, False),
        ({"bytes": 100, "payload_bytes": 100}, False),
        ({"bytes": -300, "payload_bytes": -300}, True),
        ({"bytes": 500, "payload_bytes": 500}, True),
        ({"message": "m"}, True),
        ({"kind": "evaluate"}, True),
        ({"round": 11}, True),
        ({"plan": "0" * 64}, True),
        ({"answer_sha256": "0" * 64}, True),
        ({"type": "dry_run"}, True),
    ],
)
def test_of_a_last_line_the_other_log_shows_what_arrived_alone(world, tmp_path, changes, found):
    """The page says so. Sizes are changed by so much."""
    place = where(world.site, "egress", kind="train", round=12)
    lines, last = lines_of(world.site)[:place], parsed(world.site)[place]
    arrived = where(world.server, "ingress", message=last["message"])
    server = b"".join(lines_of(world.server)[: arrived + 1])
    changed = {k: last[k] + v if k.endswith("bytes") else v for k, v in changes.items()}
    line = canonical(last | changed) + b"\n"
    verdict = world.verdict(tmp_path, b"".join([*lines, line]), server)
    assert (verdict.whole, verdict.matched) == (not found, verdict.matched if found else 23)
    assert found or not verdict.warnings


# What an entry says of itself.


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("numbers", {"num-examples": "8", "train-loss": "0.5", "steps": "4", "seconds": "1.25"}),
        ("numbers", {"num-examples": "7"}),
        ("texts", {"site": "A"}),
        ("payload_sha256", "0" * 64),
        ("payload_sha256", None),
        ("payload_bytes", 10),
        ("bytes", 10),
        ("step", {"stage": "keys", "attempt": 1, "length": 1, "bytes": 0, "sha256": "0" * 64}),
        ("step", "keys"),
        ("step", {"stage": "keys"}),
        ("answer_sha256", "0" * 64),
        ("answer_sha256", 7),
        ("numbers", {"num-examples": 7}),
        ("message", None),
        ("kind", 1),
        ("round", "5"),
        ("round", True),
        ("plan", None),
        ("destination", None),
        ("tensors", "many"),
        ("tensors", 3),
        ("payload_bytes", "many"),
    ],
)
def test_a_list_of_contents_that_is_not_the_answers_is_found(world, tmp_path, part, value):
    place = where(world.site, "egress", round=5, kind="train")

    def change(found):
        found[place][part] = value

    assert first(verify_log(put(tmp_path, rewritten(world.site, change)))) == place + 1


def test_a_truth_value_is_no_number(world, tmp_path):
    """In Python false equals 0."""
    place = where(world.site, "egress", kind="hello")

    def change(found):
        found[place]["round"] = False

    verdict = verify_log(put(tmp_path, rewritten(world.site, change)))
    assert [(f.line, "lacks" in f.what) for f in verdict.faults] == [(place + 1, True)]


def test_an_answer_to_no_question_is_found(world, tmp_path):
    place = where(world.site, "egress", round=5, kind="train")
    asked = where(world.site, "request", round=5, kind="train")

    def forget(found):
        return found[:asked] + found[asked + 1 :]

    verdict = verify_log(put(tmp_path, rewritten(world.site, forget)))
    assert [(f.line, "does not have" in f.what) for f in verdict.faults] == [(place, True)]

    def later(found):
        found[asked], found[place] = found[place], found[asked]

    assert first(verify_log(put(tmp_path, rewritten(world.site, later)))) == asked + 1

    for part, value in (("kind", "evaluate"), ("round", 6), ("plan", "0" * 64)):

        def other(found, part=part, value=value):
            found[asked][part] = value

        assert first(verify_log(put(tmp_path, rewritten(world.site, other)))) == place + 1


def test_a_message_answered_twice_is_a_fault_unless_the_answers_are_equal(world, tmp_path):
    place = where(world.site, "egress", round=5, kind="train")

    def again(found):
        return [*found[: place + 1], found[place], *found[place + 1 :]]

    same = world.verdict(tmp_path, rewritten(world.site, again))
    assert same.whole
    assert [w.line for w in same.warnings] == [place + 2]
    assert "never arrived" in same.warnings[0].what
    assert same.matched == 24

    def otherwise(found):
        found = again(found)
        changed = found[place + 1] | {"numbers": {"num-examples": "7"}}
        found[place + 1] = changed | {"answer_sha256": hash_of(changed)}
        return found

    verdict = verify_log(put(tmp_path, rewritten(world.site, otherwise)))
    assert first(verdict) == place + 2
    assert f"line {place + 1}, with something else" in verdict.faults[0].what

    def dry(found):
        found = otherwise(found)
        found[place]["type"] = "dry_run"
        return found

    assert verify_log(put(tmp_path, rewritten(world.site, dry))).whole


def test_what_has_harmless_reasons_too_is_told_and_is_no_fault(world, tmp_path):
    def change(found):
        found[3]["time_utc"] = "2026-11-27T10:00:00.000+00:00"
        found[4]["time_utc"] = "soon"
        found[5]["time_utc"] = "2026-11-26T10:00:00.000+00:00"
        found[6]["time_utc"] = "2026-11-26T10:00:00.000"
        return [
            *found, {"type": "surprise"}, {"type": 7}, {"type": "started"},
            {"type": "repair", "fragment_sha256": "0" * 64, "fragment_bytes": 12},
        ]  # fmt: skip

    verdict = verify_log(put(tmp_path, rewritten(world.site, change)))
    assert verdict.whole
    assert {w.line: w.what.split()[0:3] for w in verdict.warnings} == {
        4: ["the", "clock", "went"],
        5: ["its", "time", "cannot"],
        6: ["the", "clock", "went"],
        7: ["its", "time", "cannot"],
        52: ["entries", "of", "type"],
        53: ["entries", "of", "type"],
        55: ["a", "line", "that"],
    }


def test_nothing_in_a_log_writes_to_the_terminal_of_its_reader(world, tmp_path):
    def change(found):
        return [*found, {"type": "\x1b[2Jgone\ud800\n"}]

    (warning,) = verify_log(put(tmp_path, rewritten(world.site, change))).warnings
    assert warning.what.isprintable()
    assert "?[2Jgone??" in warning.what


# A site's log against the server's.


@pytest.mark.parametrize("signed", [True, False])
def test_logs_of_the_same_messages_match(tmp_path, signed):
    world = make_world(tmp_path, signed=signed)
    verdict = world.verdict(tmp_path / "..", key=signed or None)
    assert (verdict.faults, verdict.warnings) == ((), ())
    assert verdict.matched == len(verdict.left) == 24
    assert verdict.seals == ("given" if signed else "unchecked")


def test_what_was_sent_and_never_arrived_is_listed(world, tmp_path):
    lost = (where(world.site, "egress", round=5), where(world.site, "egress", round=7))
    messages = {parsed(world.site)[place]["message"] for place in lost}

    def drop(found):
        return [e for e in found if e.get("message") not in messages]

    verdict = world.verdict(tmp_path, server=rewritten(world.server, drop))
    assert verdict.whole
    assert [(w.file[-10:], w.line) for w in verdict.warnings] == [
        ("site.jsonl", place + 1) for place in lost
    ]
    assert all("sent and never arrived" in w.what for w in verdict.warnings)
    assert verdict.matched == 22


def test_what_left_unlogged_is_a_fault(world, tmp_path):
    """An insider takes an answer out of the site's log and makes its chain anew."""
    place = where(world.site, "egress", kind="evaluate", round=5)
    message = parsed(world.site)[place]["message"]
    arrived = where(world.server, "ingress", message=message)

    def hide(found):
        return [e for e in found if e is not found[place]]

    data = rewritten(world.site, hide)
    verdict = world.verdict(tmp_path, data)
    assert [(f.file[-12:], f.line) for f in verdict.faults] == [("server.jsonl", arrived + 1)]
    assert "carries the seal of A, so it left there" in verdict.faults[0].what
    assert "cannot be said" in world.verdict(tmp_path, data, key=None).faults[0].what


def test_an_answer_the_server_made_up_is_told_from_one_the_site_hides(world, foreign, tmp_path):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)

    def invent(found):
        made = found[arrived] | {"message": "made-up", "answer_sha256": "0" * 64}
        return [*found, made, made | {"seal": "not hexadecimal"}, made | {"seal": ""}]

    verdict = world.verdict(tmp_path, server=rewritten(world.server, invent))
    assert [f.line for f in verdict.faults] == [52, 53, 54]
    assert all("does not carry the seal" in f.what for f in verdict.faults)


def test_an_answer_of_a_dry_run_that_arrived_is_a_fault(world, tmp_path):
    place = where(world.site, "egress", kind="train", round=5)

    def dry(found):
        found[place]["type"] = "dry_run"

    verdict = world.verdict(tmp_path, rewritten(world.site, dry))
    assert "was kept in a dry run, and arrived" in verdict.faults[0].what
    assert len(verdict.left) == 23
    assert len(verdict.departures) == 24


@pytest.mark.parametrize("key", [True, None])
def test_an_answer_that_was_exchanged_on_the_way_is_a_fault(world, tmp_path, key):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)
    message = parsed(world.server)[arrived]["message"]
    place = where(world.site, "egress", message=message)

    def exchange(found):
        found[arrived]["answer_sha256"] = "0" * 64

    verdict = world.verdict(tmp_path, server=rewritten(world.server, exchange), key=key)
    assert [f.line for f in verdict.faults] == [arrived + 1]
    assert f"line {place + 1} of" in verdict.faults[0].what
    assert "another answer" in verdict.faults[0].what
    assert [w.line for w in verdict.warnings] == [place + 1]


@pytest.mark.parametrize(
    ("part", "value"), [("kind", "evaluate"), ("round", 6), ("plan", "0" * 64)]
)
def test_an_answer_to_another_question_is_a_fault(world, tmp_path, part, value):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)

    def change(found):
        found[arrived][part] = value

    verdict = world.verdict(tmp_path, server=rewritten(world.server, change), key=None)
    assert [f.line for f in verdict.faults] == [arrived + 1]
    assert "another question" in verdict.faults[0].what
    assert verdict.matched == 23
    sealed = world.verdict(tmp_path, server=rewritten(world.server, change)).faults
    assert len(sealed) == (1 if part == "round" else 2)  # the state that was sealed names the round


@pytest.mark.parametrize("more", [-1, -1000, 5000])
def test_a_message_that_is_larger_than_what_passed_the_gate_is_a_fault(world, tmp_path, more):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)
    place = where(world.site, "egress", message=parsed(world.server)[arrived]["message"])

    def change(found):
        found[arrived]["bytes"] = parsed(world.site)[place]["bytes"] + more

    verdict = world.verdict(tmp_path, server=rewritten(world.server, change))
    assert [f.line for f in verdict.faults] == [arrived + 1]
    assert "bytes arrived" in verdict.faults[0].what


def test_an_answer_that_arrived_twice_is_a_fault(world, tmp_path):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)

    def repeat(found):
        return [*found, found[arrived]]

    verdict = world.verdict(tmp_path, server=rewritten(world.server, repeat))
    assert [f.line for f in verdict.faults] == [52]
    assert "more often than it left" in verdict.faults[0].what
    assert verdict.matched == 24


def test_a_seal_that_is_wrong_is_a_fault(world, foreign, tmp_path):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)
    other = where(world.server, "ingress", site="A", kind="train", round=6)

    for seal in ("", "00" * 64, parsed(world.server)[other]["seal"], "xx"):

        def change(found, seal=seal):
            found[arrived]["seal"] = seal

        server = rewritten(world.server, change)
        verdict = world.verdict(tmp_path, server=server)
        assert [f.line for f in verdict.faults] == [arrived + 1]
        assert "does not carry the seal of A" in verdict.faults[0].what
        assert world.verdict(tmp_path, server=server, key=None).whole
    wrong = world.verdict(tmp_path, key=foreign.key.public)
    assert len(wrong.faults) == 24


def test_a_forged_answer_of_which_the_site_knows_nothing_is_a_fault(world, tmp_path):
    def forge(found):
        told = found[where(world.server, "ingress", site="A", kind="train", round=5)]
        return [*found, told | {"type": "forged", "answer_sha256": "0" * 64, "message": "m"}]

    verdict = world.verdict(tmp_path, server=rewritten(world.server, forge))
    assert [f.line for f in verdict.faults] == [52]
    assert "need not be from there" in verdict.faults[0].what


def test_a_server_that_calls_a_sealed_answer_forged_is_found(world, tmp_path):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)

    def call(found):
        found[arrived]["type"] = "forged"

    verdict = world.verdict(tmp_path, server=rewritten(world.server, call))
    assert [f.line for f in verdict.faults] == [arrived + 1]
    assert "calls it forged" in verdict.faults[0].what

    def strip(found):
        found[arrived] |= {"type": "forged", "seal": ""}

    verdict = world.verdict(tmp_path, server=rewritten(world.server, strip))
    assert verdict.whole
    assert [w.line for w in verdict.warnings] == [arrived + 1]
    assert verdict.matched == 23


def test_what_arrived_unreadable_left_there_or_is_a_fault(world, tmp_path):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)

    def spoil(found):
        told = {k: found[arrived][k] for k in ("site", "kind", "round", "plan", "message")}
        told |= {"type": "unreadable", "reason": "TypeError"}
        found[arrived] = told | {"time_utc": found[arrived]["time_utc"]}
        told["time_utc"] = found[-1]["time_utc"]
        return [*found, told | {"message": "m"}, told]

    verdict = world.verdict(tmp_path, server=rewritten(world.server, spoil))
    assert [w.line for w in verdict.warnings] == [arrived + 1]
    assert [f.line for f in verdict.faults] == [52, 53]


def test_an_error_of_which_the_site_knows_nothing_is_told(world, tmp_path):
    failed = where(world.server, "error", site="A")

    def fail(found):
        return [*found, found[failed] | {"message": "m", "time_utc": found[-1]["time_utc"]}]

    verdict = world.verdict(tmp_path, server=rewritten(world.server, fail))
    assert verdict.whole
    assert [w.line for w in verdict.warnings] == [52]


@pytest.mark.parametrize("kind", ["ingress", "forged", "unreadable", "error"])
@pytest.mark.parametrize("part", ["site", "message", "kind", "round", "plan", "answer_sha256"])
def test_an_entry_of_the_server_that_lacks_a_part_is_a_fault(world, tmp_path, kind, part):
    arrived = where(world.server, "ingress", site="A", kind="train", round=5)

    def change(found):
        found[arrived]["type"] = kind
        del found[arrived][part]

    verdict = world.verdict(tmp_path, server=rewritten(world.server, change))
    lacking = [f.line for f in verdict.faults if "lacks" in f.what]
    needed = part != "answer_sha256" or kind in ("ingress", "forged")
    assert lacking == ([arrived + 1] if needed else [])


def test_a_site_of_three_studies_is_held_against_the_logs_of_all(world, tmp_path):
    """A site has one log for all, the server one for each."""
    plans = ("1" * 64, "2" * 64, "3" * 64)
    site = put(tmp_path, three_studies(world.site, plans), "site")
    servers = [put(tmp_path, of_plan(world.server, plan), plan[0]) for plan in plans]
    verdict = match(site, servers)
    assert (verdict.faults, verdict.warnings, verdict.matched) == ((), (), 72)

    verdict = match(site, servers[1:2])
    assert (verdict.whole, verdict.matched) == (True, 24)
    assert [(w.file, w.line) for w in verdict.warnings] == [(str(site), 3), (str(site), 103)]
    for warning, plan, last in zip(verdict.warnings, "13", (51, 151), strict=True):
        told = f"24 answers of plan {plan * 16}, from here to line {last}, are not compared"
        assert told in warning.what

    lost = [e for e in parsed(servers[2].read_bytes()) if e.get("round") != 5]
    verdict = match(site, [servers[1], write_chain(servers[2], lost)])
    assert verdict.matched == 46
    assert [w.line > 102 and "never arrived" in w.what for w in verdict.warnings] == [
        False, True, True,
    ]  # fmt: skip

    more = put(tmp_path, rewritten(servers[0].read_bytes(), lambda found: [*found, found[1]]), "m")
    (fault,) = match(site, [servers[1], more]).faults
    assert (fault.file, fault.line) == (str(more), 52)
    damaged = put(tmp_path, more.read_bytes().replace(b'"round":5', b'"round":6', 1), "damaged")
    verdict = match(site, [*servers, damaged])
    assert [f.file for f in verdict.faults] == [str(damaged)]
    assert verdict.matched == 0
    with pytest.raises(AuditError, match="SAM-A104"):
        match(site, [*servers, site])


def test_a_copy_of_a_log_of_the_server_says_nothing_new(world, tmp_path):
    """Nor does an older one."""
    site, server = put(tmp_path, world.site, "site"), put(tmp_path, world.server, "server")
    older = put(tmp_path, b"".join(lines_of(world.server)[:20]), "older")
    for servers in ([server, server], [older, server], [server, older]):
        verdict = match(site, servers)
        assert (verdict.faults, verdict.warnings, verdict.matched) == ((), (), 24)


def test_a_single_answer_of_a_plan_that_no_log_has_is_told(world, tmp_path):
    last = where(world.site, "egress", kind="hello")
    site = put(tmp_path, b"".join(lines_of(world.site)[: last + 1]), "site")
    server = put(tmp_path, of_plan(world.server, "1" * 64), "server")
    warning = match(site, [server]).warnings[0]
    assert (warning.line, warning.what[:31]) == (last + 1, "1 answer of plan ffffffffffffff")
    assert "is not compared" in warning.what


@pytest.mark.parametrize(
    ("left", "at_server", "single"),
    [("", "", True), ("", None, True), ("", PLAN, False), (PLAN, None, False), (PLAN, PLAN, True)],
)
def test_answers_are_told_one_by_one_if_the_server_knows_their_plan(
    world, tmp_path, left, at_server, single
):
    """In a simulation no plan has a name; a log of the server without any answer is of all such."""
    site = put(tmp_path, of_plan(world.site, left), "site")
    others = [] if at_server is None else [e for e in parsed(world.server) if e.get("site") == "B"]
    found = [parsed(world.server)[0], *others]
    server = put(tmp_path, of_plan(chained(found), at_server), "server")
    verdict = match(site, [server])
    assert verdict.whole
    assert ["never arrived" in w.what for w in verdict.warnings] == [single] * (24 if single else 1)


def test_lines_about_other_sites_are_left_alone(world, tmp_path):
    def change(found):
        for entry in found:
            if entry.get("site") == "B" and entry["type"] == "ingress":
                entry["answer_sha256"] = "0" * 64

    verdict = world.verdict(tmp_path, server=rewritten(world.server, change))
    assert verdict.whole
    assert not verdict.warnings


def test_logs_that_are_not_whole_are_not_compared(world, tmp_path):
    damaged = world.site.replace(b'"round":5', b'"round":4', 1)
    verdict = world.verdict(tmp_path, damaged)
    assert len(verdict.faults) == 1
    assert verdict.matched == 0
    assert "not compared" in verdict.warnings[-1].what
    damaged = world.server.replace(b'"round":5', b'"round":4', 1)
    verdict = world.verdict(tmp_path, server=damaged)
    assert [f.file[-12:] for f in verdict.faults] == ["server.jsonl"]


def test_the_key_a_log_names_is_taken_and_compared(world, foreign, tmp_path):
    def name(key):
        def change(found):
            found[0]["key"] = key

        return rewritten(world.site, change)

    public, other = world.key.public.hex(), foreign.key.public.hex()
    named = world.verdict(tmp_path, name(public), key=None)
    assert (named.whole, named.seals) == (True, "named")
    given = world.verdict(tmp_path, name(public))
    assert (given.whole, given.seals) == (True, "given")
    lying = world.verdict(tmp_path, name(other))
    assert [f.line for f in lying.faults] == [1]
    assert "another key" in lying.faults[0].what
    assert len(world.verdict(tmp_path, name(other), key=None).faults) == 24
    broken = world.verdict(tmp_path, name("xx"), key=None)
    assert [f.line for f in broken.faults] == [1]


def test_faults_are_told_in_their_order(world, foreign, tmp_path):
    """Of the site's log first, by line, whatever was found first."""
    place = where(world.site, "egress", kind="train", round=5)

    def change(found):
        found[0]["key"] = foreign.key.public.hex()
        found[place]["bytes"] += 1
        return found[:-2]

    verdict = world.verdict(tmp_path, rewritten(world.site, change))
    assert [(f.file[-11:], f.line) for f in verdict.faults] == [
        ("/site.jsonl", 1), ("/site.jsonl", place + 1), ("erver.jsonl", 50),
    ]  # fmt: skip


def test_what_is_written_during_the_check_is_no_fault(world, tmp_path, monkeypatch):
    """An answer that leaves meanwhile arrives after it was written down."""
    read_bytes = Path.read_bytes

    def then_more(path):
        data = read_bytes(path)
        (tmp_path / "site.jsonl").write_bytes(world.site)
        (tmp_path / "server.jsonl").write_bytes(world.server)
        return data

    monkeypatch.setattr(Path, "read_bytes", then_more)
    site, server = lines_of(world.site)[:-2], lines_of(world.server)[:-2]
    verdict = world.verdict(tmp_path, b"".join(site), b"".join(server))
    assert verdict.whole
    assert [w.line for w in verdict.warnings] == [51]


def test_a_log_of_the_wrong_kind_is_refused(world, tmp_path):
    with pytest.raises(AuditError, match="SAM-A104"):
        world.verdict(tmp_path, site=world.server)
    with pytest.raises(AuditError, match="SAM-A104"):
        world.verdict(tmp_path, server=world.site)


def test_the_server_writes_down_what_came_and_lets_in_what_is_sealed(tmp_path):
    key, other = make_identity(tmp_path / "key"), make_identity(tmp_path / "other")
    ingress = Ingress(Log(tmp_path / "log.jsonl", {"server": "study"}), {"A": key.public})
    asked = Request("evaluate", PLAN, instruction=Instruction(5, 12, "", "", 60.0))
    answer = Answer(numbers={"dice": 0.5})
    message = Message(request_content(asked), message_type="evaluate", dst_node_id=1)
    message.metadata.__dict__["_message_id"] = "m"

    def seal(signer, site="A", **changes):
        signed = replace(asked, message_id="m", **changes)
        return replace(answer, seal=signer.sign(sealed(signed, site, answer)))

    def admitted(answer):
        reply = Message(answer_content(answer), reply_to=message)
        return ingress.admits("A", asked, reply)

    assert admitted(seal(key))
    for wrong in (
        answer,
        seal(other),
        seal(key, "B"),
        seal(key, plan_sha256="0" * 64),
        seal(key, kind="train"),
        replace(seal(key), numbers={"dice": 0.75}),
    ):
        assert not admitted(wrong)
    strange = answer_content(answer)
    strange["config"] = ConfigRecord({"site": 7})
    assert not ingress.admits("A", asked, Message(strange, reply_to=message))
    open_to_all = Ingress(ingress.log)
    assert open_to_all.admits("A", asked, Message(strange, reply_to=message))
    assert ingress.admits("A", asked, Message(Error(code=2, reason="a"), reply_to=message))
    found = read(tmp_path / "log.jsonl")
    assert [e["type"] for e in found] == [
        "genesis", "ingress", *["forged"] * 6, "unreadable", "unreadable", "error",
    ]  # fmt: skip
    for entry in found[1:]:
        told = (entry[k] for k in ("site", "kind", "round", "plan", "message"))
        assert tuple(told) == ("A", "evaluate", 5, PLAN, "m")
    assert found[1]["answer_sha256"] == answer.sha256
    assert found[1]["seal"] == seal(key).seal.hex()
    assert found[2]["seal"] == ""
    assert found[-1]["status"] == "failed: error 2"


def test_hash_and_seal_are_made_of_what_a_log_holds(world):
    for entry in parsed(world.site):
        if entry["type"] == "egress":
            assert hash_of(entry) == entry["answer_sha256"]
    for entry in parsed(world.server):
        if entry["type"] == "ingress" and entry["site"] == "A":
            signed = b"samaritan answer\n" + json.dumps(
                {
                    "answer": entry["answer_sha256"], "kind": entry["kind"],
                    "message": entry["message"], "plan": PLAN, "site": "A",
                },
                separators=(",", ":"),
            ).encode()  # fmt: skip
            fields = (PLAN, entry["message"], entry["kind"], "A", entry["answer_sha256"])
            assert sealed_fields(*fields) == signed
            assert world.key.sign(signed).hex() == entry["seal"]


def test_whoever_verifies_needs_neither_torch_nor_flower():
    code = (
        "import sys, samaritan.audit.verify, samaritan.cli.audit_log;"
        "sys.exit(bool({'torch', 'flwr', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=root).returncode == 0


# The command.


def test_the_command_says_that_a_log_is_whole(samaritan, world, tmp_path):
    site, server = put(tmp_path, world.site, "a"), put(tmp_path, world.server, "s")
    done = samaritan("audit", "log", "verify", site)
    assert (done.code, done.err) == (0, "")
    assert "51 entries, every line is as it was written" in done.out
    key = world.key.public.hex()
    done = samaritan("audit", "log", "verify", site, "--against", server, "--key", key)
    assert done.code == 0
    assert "24 answers left" in done.out
    assert "24 arrived as they left" in done.out
    assert "each carries the site's seal" in done.out
    done = samaritan("audit", "log", "verify", site, "--against", server)
    assert "not checked" in done.out


def test_the_command_names_file_and_line_of_the_first_fault(samaritan, world, tmp_path):
    server = put(tmp_path, world.server, "s")
    gone = where(world.site, "egress", round=7)
    short = put(tmp_path, b"".join(lines_of(world.site)[:gone]), "a")
    key = put(tmp_path, world.key.public.hex().encode() + b"\n", "key")
    done = samaritan("audit", "log", "verify", short, "--against", server, "--key", key)
    arrived = where(world.server, "ingress", message=parsed(world.site)[gone]["message"])
    assert done.code == 1
    assert re.match(rf"error: SAM-A103  {server}, line {arrived + 1}: .*\(\d+ more", done.err)
    assert "was written" not in done.out
    assert samaritan("audit", "log", "verify", short).code == 0


def test_the_command_gives_one_object(samaritan, world, tmp_path):
    site, server = put(tmp_path, world.site, "a"), put(tmp_path, world.server, "s")
    done = samaritan("audit", "log", "verify", site, "--against", server, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    size = sum(e["bytes"] for e in parsed(world.site) if e["type"] == "egress")
    assert found == {
        "log": str(site), "entries": 51, "whole": True, "faults": [], "warnings": [],
        "egress": 24, "bytes": size, "matched": 24, "seals": "unchecked",
    }  # fmt: skip
    put(tmp_path, world.site.replace(b'"hello"', b'"Hello"', 1), "a")
    done = samaritan("audit", "log", "verify", site, "--json")
    assert (done.code, done.err) == (1, "")
    found = json.loads(done.out)
    assert not found["whole"]
    assert [(f["file"], f["line"]) for f in found["faults"]] == [(str(site), 2)]
    assert found["entries"] == 1


def test_the_command_takes_a_log_of_the_server_for_each_study(samaritan, world, tmp_path):
    plans = ("1" * 64, "2" * 64, "3" * 64)
    site = put(tmp_path, three_studies(world.site, plans), "site")
    servers = [put(tmp_path, of_plan(world.server, plan), plan[0]) for plan in plans]
    words = [word for server in servers for word in ("--against", server)]
    done = samaritan("audit", "log", "verify", site, *words)
    assert (done.code, "warning" in done.out) == (0, False)
    assert "72 arrived as they left in " + ", ".join(map(str, servers)) in done.out
    done = samaritan("audit", "log", "verify", site, *words[:4])
    assert (done.code, done.out.count("warning")) == (0, 1)
    assert f"warning: {site}, line 103: 24 answers of plan 3333333333333333, from" in done.out
    found = json.loads(samaritan("audit", "log", "verify", site, *words, "--json").out)
    assert (found["matched"], found["egress"], found["warnings"]) == (72, 72, [])


def test_the_command_tells_warnings(samaritan, world, tmp_path):
    site = put(tmp_path, world.site + b'{"half', "a")
    done = samaritan("audit", "log", "verify", site)
    assert done.code == 0
    assert f"warning: {site}, line 52: the last line was cut short (6 bytes)" in done.out


def test_a_key_is_compared_with_a_log_that_names_another(samaritan, tmp_path):
    """Without a log of the server too."""
    own, other = (make_identity(tmp_path / f"{name}.key").public.hex() for name in "ab")
    log = Log(tmp_path / "log.jsonl", {"site": "A", "key": own})
    log.append("plan_approved", plan="a" * 64, role="site")
    done = samaritan("audit", "log", "verify", log.path, "--key", own)
    assert (done.code, "warning" in done.out) == (0, False)
    done = samaritan("audit", "log", "verify", log.path, "--key", other)
    assert done.code == 1
    assert "it names another key than the one that was given" in done.err


def test_every_type_of_line_that_is_written_is_known():
    """A log that its own version warns of would teach people to pass over warnings."""
    root = Path(__file__).resolve().parents[1]
    written = set()
    for folder in ("client", "server", "samaritan", "simulation"):
        for path in (root / folder).rglob("*.py"):
            calls = re.findall(r"[lL]og(?:\([^()]*\))?\.append\(\s*(\S[^,)]*)", path.read_text())
            written |= {word for call in calls for word in re.findall(r'"([a-z_]+)"', call)}
    assert written >= {"plan_approved", "study_loaded", "egress", "refused", "ingress", "forged"}
    assert written <= reading._KNOWN


@pytest.mark.parametrize("key", ["00", "missing.pub", "F" * 64])
def test_a_key_that_is_none_is_refused(samaritan, world, tmp_path, key):
    site = put(tmp_path, world.site, "a")
    done = samaritan("audit", "log", "verify", site, "--key", key)
    assert done.code == 1
    assert "SAM-A105" in done.err


def test_a_missing_log_is_told(samaritan, tmp_path):
    done = samaritan("audit", "log", "verify", tmp_path / "none.jsonl")
    assert done.code == 1
    assert done.err.startswith(f"error: SAM-S108  {tmp_path / 'none.jsonl'}")


def test_the_command_lists_what_left(samaritan, world, tmp_path):
    def dry(found):
        found[where(world.site, "egress", kind="train", round=5)]["type"] = "dry_run"

    site = put(tmp_path, rewritten(world.site, dry), "a")
    done = samaritan("audit", "log", "show", site)
    assert done.code == 0
    table = done.out.splitlines()
    assert table[0].split() == [
        "time", "(UTC)", "answer", "to", "round", "bytes", "tensors", "to", "numbers", "and",
        "texts",
    ]  # fmt: skip
    assert len(table) == 1 + 24 + 3
    sizes = [e["bytes"] for e in parsed(site.read_bytes()) if (e["type"], e.get("kind")) == TRAINED]
    assert table[-2:] == [
        f"train: 10 answers, {sum(sizes):,} bytes", "evaluate: 12 answers, 0 bytes"
    ]  # fmt: skip
    assert re.search(
        r"train +1 +\d+ +2 +server.example:9092 +num-examples 7, seconds 1.25, steps 4, "
        r"train-loss 0.5",
        done.out,
    )
    assert done.out.count("nobody (dry run)") == 1
    assert "config-sha256 000000000000..., samaritan 0.1.0, site A\n" in done.out
    told = json.loads(samaritan("audit", "log", "show", site, "--json").out)
    assert len(told["answers"]) == 24
    assert [a["left"] for a in told["answers"]].count(False) == 1
    assert told["totals"]["train"] == {"answers": 10, "bytes": sum(sizes)}
    row = next(a for a in told["answers"] if a["kind"] == "train")
    assert row["numbers"]["train-loss"] == "0.5"
    assert (row["round"], row["tensors"], row["bytes"]) == (1, 2, sizes[0])


def test_a_damaged_log_is_shown_up_to_the_damage(samaritan, world, tmp_path):
    site = put(tmp_path, world.site.replace(b'"round":5', b'"round":4', 1), "a")
    done = samaritan("audit", "log", "show", site)
    assert done.code == 1
    assert "SAM-A103" in done.err
    assert "train" in done.out


TRAINED = ("egress", "train")


def put(folder, data, name="log.jsonl"):
    (folder / name).write_bytes(data)
    return folder / name


def hash_of(entry):
    """Of the parts of an answer that an entry lists."""
    return answer_hash(entry.get("payload_sha256"), entry["numbers"], entry["texts"], None)
