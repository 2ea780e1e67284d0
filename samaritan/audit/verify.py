"""Verification of logs: one by itself, and a site's against the server's.

One log by itself shows whatever was changed, removed, added or swapped between its first line and
its last, a message that was answered twice, an answer to no question, and a list of contents that
is not that of the answer. Against the server's log it shows what left and was not written down,
what was written down and never arrived, what arrived as something else or larger than it left, and,
with the site's key, whether the site or the server is wrong about it.

What cannot be seen: lines cut off at the end of a log, or a change in its last line, without the
other log; the same lines cut off at the end of both; a chain that somebody who can write the file
has made anew, without the other log; what left past the agent for somebody else than this server;
what the texts of errors say, of which the logs hold the codes; what the numbers of an update mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from samaritan.audit.log import Entry, LineError, entries
from samaritan.errors import AuditError
from samaritan.keys import is_signed
from samaritan.messages import answer_hash, sealed_fields

_KNOWN = {
    "genesis", "repair", "started", "stopped", "plan_approved", "study_loaded", "request", "egress",
    "dry_run", "refused", "ingress", "forged", "unreadable", "error",
}  # fmt: skip
_QUESTION = {"message": str, "kind": str, "round": int, "plan": str}
_MANIFEST = _QUESTION | {
    "answer_sha256": str, "bytes": int, "numbers": dict, "texts": dict, "destination": str,
}  # fmt: skip
_ARRIVAL = _QUESTION | {"site": str, "answer_sha256": str, "bytes": int, "seal": str}
_STEP = {"stage": str, "attempt": int, "length": int, "bytes": int, "sha256": str}

_FRAME_BYTES = 256
"""What a message takes beside its update, step and the names and values it holds, at most."""
_FIELD_BYTES = 32
"""The same of one number or text."""


@dataclass(frozen=True)
class Finding:
    """Something about a line.

    Attributes:
        file: The log.
        line: From 1.
        what: As a sentence.
    """

    file: str
    line: int
    what: str


@dataclass(frozen=True)
class Departure:
    """One answer that left, or that a dry run kept.

    Attributes:
        line: In the log, from 1.
        time: As the site's clock said.
        left: False where it was kept.
        message: Flower's name of the question.
        kind, server_round, plan: Of the question.
        stage: Of a secure sum; empty where the answer is none of its steps.
        answer_sha256: Hash of all of it.
        size_bytes: Of the update, or of the step of a secure sum.
        tensors: How many.
        numbers, texts: By name, as they were written.
        destination: Who got it.
    """

    line: int
    time: str
    left: bool
    message: str
    kind: str
    server_round: int
    plan: str
    stage: str
    answer_sha256: str
    size_bytes: int
    tensors: int
    numbers: Mapping[str, str]
    texts: Mapping[str, str]
    destination: str

    @property
    def question(self) -> tuple[str, int, str]:
        """What it answers."""
        return self.kind, self.server_round, self.plan

    @property
    def told(self) -> str:
        """Question and message, for people."""
        return f"the answer to {self.kind}, round {self.server_round}, {self.message}"


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        log: The file.
        entries: Whole lines that follow from each other.
        departures: What left, and what a dry run kept.
        faults: What is not as it must be; those of the log first, each file by line.
        warnings: What has harmless reasons too, and must be known.
        matched: Answers that arrived as they left.
        seals: Whether they were checked, with the key that was given or that the log itself names.
    """

    log: str
    entries: int
    departures: tuple[Departure, ...]
    faults: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    matched: int = 0
    seals: Literal["unchecked", "given", "named"] = "unchecked"

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    @property
    def left(self) -> tuple[Departure, ...]:
        """What left."""
        return tuple(d for d in self.departures if d.left)


def verify_log(path: Path, public: bytes | None = None) -> Verdict:
    """Checks one log, of a site or a server.

    Args:
        path: Of the log.
        public: The key of the site whose log it must be; any when left out.

    Raises:
        OSError: When it cannot be read.
    """
    log = _read(path)
    _key(log, public)
    return Verdict(
        log.file, len(log.entries), tuple(log.departures), tuple(log.faults), tuple(log.warnings)
    )


def match(site_log: Path, server_log: Path, public: bytes | None = None) -> Verdict:
    """Checks a site's log, the server's, and one against the other.

    Args:
        site_log: Of the site.
        server_log: Of the server.
        public: The site's key, from the plan or another place that is not the site's log; the one
            that this log names when left out, and no seal is checked where it names none.

    Raises:
        OSError: When one of them cannot be read.
        AuditError: SAM-A104 when one of them is another kind of log.
    """
    # What is written meanwhile has left before it arrives.
    server = _read(server_log)
    site = _read(site_log)
    _require_kind(site, "site")
    _require_kind(server, "server")
    matched, key = 0, None
    if site.broken or server.broken:
        broken = site if site.broken else server
        broken.warn(len(broken.entries) + 1, "the logs are not compared: this one is not whole")
    else:
        key = _key(site, public)
        matched = _Comparison(site, server, key).run()
    for log in (site, server):
        log.sort()
    return Verdict(
        site.file,
        len(site.entries),
        tuple(site.departures),
        (*site.faults, *server.faults),
        (*site.warnings, *server.warnings),
        matched,
        "unchecked" if key is None else "named" if public is None else "given",
    )


@dataclass
class _Log:
    """A log as it was read, with what was found in it."""

    file: str
    entries: list[tuple[int, Entry]] = field(default_factory=list)
    departures: list[Departure] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    broken: bool = False

    @property
    def owner(self) -> Entry:
        return self.entries[0][1] if self.entries else {}

    def fault(self, line: int, what: str) -> None:
        self.faults.append(Finding(self.file, line, printable(what)))

    def warn(self, line: int, what: str) -> None:
        self.warnings.append(Finding(self.file, line, printable(what)))

    def sort(self) -> None:
        for found in (self.faults, self.warnings):
            found.sort(key=lambda finding: finding.line)


def _read(path: Path) -> _Log:
    """Reads a log and checks it by itself."""
    data = path.read_bytes()
    log = _Log(str(path))
    end = data.rfind(b"\n") + 1
    try:
        for entry, _ in entries(data[:end]):
            log.entries.append((len(log.entries) + 1, entry))
    except LineError as error:
        log.broken = True
        log.fault(error.number, error.reason)
    if not log.entries and not log.broken:
        log.broken = True
        log.fault(1, "there is no first line")
    elif data[end:]:
        log.warn(
            data[:end].count(b"\n") + 1,
            f"the last line was cut short ({len(data) - end} bytes): a crash, or the end was cut "
            "off; what it was to tell of has not left",
        )
    _check_types(log)
    _check_clock(log)
    _check_departures(log)
    log.sort()
    return log


def _check_types(log: _Log) -> None:
    for line, entry in log.entries:
        kind = entry["type"]
        if not isinstance(kind, str) or kind not in _KNOWN:
            log.warn(line, f"entries of type {kind} are unknown to this version")
        if kind == "repair":
            log.warn(
                line,
                f"a line that was cut short ({entry.get('fragment_bytes')} bytes) was set aside "
                "here: a crash, or a full disk",
            )


def _check_clock(log: _Log) -> None:
    latest: datetime | None = None
    for line, entry in log.entries:
        try:
            time = datetime.fromisoformat(entry["time_utc"])
            back = latest is not None and time < latest
        except (ValueError, TypeError):
            log.warn(line, "its time cannot be read")
            continue
        if back:
            log.warn(line, f"the clock went back, to {entry['time_utc']}")
        latest = time


def _check_departures(log: _Log) -> None:
    """Checks what each answer says of itself, and that it was asked for, once."""
    asked: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    answered: dict[str, Departure] = {}
    for line, entry in log.entries:
        kind = entry["type"]
        if kind == "request" and _has(entry, _QUESTION):
            asked[entry["message"]].add((entry["kind"], entry["round"], entry["plan"]))
        if kind not in ("egress", "dry_run"):
            continue
        departure = _departure(line, entry)
        if departure is None:
            log.fault(line, f"this entry of type {kind} lacks what it must have")
            continue
        log.departures.append(departure)
        if not _adds_up(entry):
            log.fault(line, "what it lists is not what its hash and its bytes say")
        if departure.question not in asked.get(departure.message, ()):
            log.fault(line, "it answers a question that the log does not have")
        if not departure.left:
            continue
        first = answered.setdefault(departure.message, departure)
        if first.answer_sha256 != departure.answer_sha256:
            log.fault(
                line,
                f"{departure.message} was answered before, in line {first.line}, with something "
                "else",
            )


def _departure(line: int, entry: Entry) -> Departure | None:
    if not _has(entry, _MANIFEST):
        return None
    values = (*entry["numbers"].values(), *entry["texts"].values())
    tensors, step = entry.get("tensors", []), entry.get("step")
    if not isinstance(tensors, list) or not all(isinstance(value, str) for value in values):
        return None
    return Departure(
        line,
        str(entry["time_utc"]),
        entry["type"] == "egress",
        entry["message"],
        entry["kind"],
        entry["round"],
        entry["plan"],
        str(step["stage"]) if isinstance(step, dict) and "stage" in step else "",
        entry["answer_sha256"],
        entry["bytes"],
        len(tensors),
        entry["numbers"],
        entry["texts"],
        entry["destination"],
    )


def _adds_up(entry: Entry) -> bool:
    """Whether hash and bytes of an answer are those of the parts that its entry lists."""
    step, payload = entry.get("step"), entry.get("payload_sha256")
    if payload is not None and not _has(entry, {"payload_sha256": str, "payload_bytes": int}):
        return False
    if step is not None and not (isinstance(step, dict) and _has(step, _STEP)):
        return False
    parts = None if step is None else (
        step["stage"], step["attempt"], step["length"], step["sha256"],
    )  # fmt: skip
    size = (entry["payload_bytes"] if payload else 0) + (step["bytes"] if step else 0)
    digest = answer_hash(payload, entry["numbers"], entry["texts"], parts)
    return bool(digest == entry["answer_sha256"] and size == entry["bytes"])


def _has(entry: Mapping[str, Any], fields: Mapping[str, type]) -> bool:
    return all(type(entry.get(name)) is kind for name, kind in fields.items())


def _require_kind(log: _Log, kind: Literal["site", "server"]) -> None:
    if log.entries and not isinstance(log.owner.get(kind), str):
        raise AuditError(
            "SAM-A104",
            f"{log.file} is not the log of a {kind}",
            "Name the site's log first, and the server's after --against.",
        )


def _key(site: _Log, public: bytes | None) -> bytes | None:
    """The key to check seals with."""
    named = site.owner.get("key")
    if public is not None and named not in (None, public.hex()):
        site.fault(1, "it names another key than the one that was given")
    if public is not None or not isinstance(named, str):
        return public
    try:
        return bytes.fromhex(named)
    except ValueError:
        site.fault(1, "the key it names is none")
        return None


class _Comparison:
    """What a site's log and the server's say of each other; findings go to both.

    Args:
        site: Whole.
        server: Whole.
        public: The site's key, None where no seal is checked.
    """

    def __init__(self, site: _Log, server: _Log, public: bytes | None) -> None:
        self.site, self.server, self.public = site, server, public
        self.name: str = site.owner["site"]
        self.left = [departure for departure in site.departures if departure.left]
        self.refused = {
            str(entry.get("message")) for _, entry in site.entries if entry["type"] == "refused"
        }
        self.waiting: dict[tuple[str, str], list[Departure]] = defaultdict(list)
        for departure in self.left:
            self.waiting[departure.message, departure.answer_sha256].append(departure)

    def run(self) -> int:
        """How many answers arrived as they left."""
        matched = 0
        for line, entry in self._arrivals():
            kind = entry["type"]
            if kind == "error":
                self._error(line, entry)
            elif kind == "unreadable":
                self._unreadable(line, entry)
            else:
                matched += self._arrival(line, entry)
        for departure in (d for waiting in self.waiting.values() for d in waiting):
            self.site.warn(
                departure.line,
                f"{departure.told}, was sent and never arrived: a crash, a lost connection, or the "
                "server's log lacks it",
            )
        return matched

    def _arrivals(self) -> Iterator[tuple[int, Entry]]:
        """What the server says came from this site."""
        for line, entry in self.server.entries:
            kind = entry["type"]
            if kind not in ("ingress", "forged", "unreadable", "error"):
                continue
            fields = _ARRIVAL if kind in ("ingress", "forged") else _QUESTION | {"site": str}
            if not _has(entry, fields):
                self.server.fault(line, f"this entry of type {kind} lacks what it must have")
            elif entry["site"] == self.name:
                yield line, entry

    def _arrival(self, line: int, entry: Entry) -> bool:
        waiting = self.waiting[entry["message"], entry["answer_sha256"]]
        sealed = self._is_sealed(entry)
        if not waiting:
            self.server.fault(line, f"{self._unlogged(entry)}; {self._blame(sealed)}")
            return False
        departure, forged = waiting.pop(0), entry["type"] == "forged"
        where = f"line {departure.line} of {self.site.file}"
        found = []
        if departure.question != (entry["kind"], entry["round"], entry["plan"]):
            found.append(f"it answers another question than {where} says")
        if not 0 <= entry["bytes"] - departure.size_bytes <= _most_beside(departure):
            found.append(
                f"{entry['bytes']} bytes arrived, which are not the {departure.size_bytes} of "
                f"{where} with their frame"
            )
        if forged and sealed:
            found.append(f"the server calls it forged, and it carries the seal of {self.name}")
        if sealed is False and not forged:
            found.append(f"it does not carry the seal of {self.name}")
        for what in found:
            self.server.fault(line, what)
        if forged and not sealed:
            self.server.warn(
                line, f"the server says that what {where} says has left came without its seal"
            )
        return not found and not forged

    def _unlogged(self, entry: Entry) -> str:
        """Why an answer that arrived has no line in the site's log, as far as that can be told."""
        message, answer = entry["message"], entry["answer_sha256"]
        same = [d for d in self.site.departures if d.message == message]
        for departure in same:
            if departure.answer_sha256 == answer:
                if departure.left:
                    return f"{departure.told}, arrived more often than it left"
                return f"{departure.told}, was kept in a dry run, and arrived"
        if same:
            return (
                f"line {same[0].line} of {self.site.file} has another answer to {message} than the "
                "one that arrived"
            )
        return (
            f"an answer to {entry['kind']}, round {entry['round']}, {message}, arrived that "
            f"{self.site.file} does not have"
        )

    def _blame(self, sealed: bool | None) -> str:
        if sealed is None:
            return "without the site's key it cannot be said which log is wrong"
        if sealed:
            return f"it carries the seal of {self.name}, so it left there and was not logged"
        return f"it does not carry the seal of {self.name}, so it need not be from there"

    def _is_sealed(self, entry: Entry) -> bool | None:
        if self.public is None:
            return None
        try:
            seal = bytes.fromhex(entry["seal"])
        except ValueError:
            return False
        signed = sealed_fields(
            entry["plan"], entry["message"], entry["kind"], self.name, entry["answer_sha256"]
        )
        return is_signed(self.public, signed, seal)

    def _unreadable(self, line: int, entry: Entry) -> None:
        for (message, _), waiting in self.waiting.items():
            if message == entry["message"] and waiting:
                where = f"line {waiting.pop(0).line} of {self.site.file}"
                self.server.warn(line, f"what {where} says has left arrived unreadable")
                return
        self.server.fault(line, f"something unreadable arrived that {self.site.file} does not have")

    def _error(self, line: int, entry: Entry) -> None:
        if entry["message"] not in self.refused:
            self.server.warn(
                line,
                f"an error arrived that {self.site.file} does not have: the courier, Flower or the "
                "connection made it",
            )


def _most_beside(departure: Departure) -> int:
    """Bytes that a message may take beside what its line counts."""
    told = [*departure.numbers.items(), *departure.texts.items()]
    return _FRAME_BYTES + sum(
        _FIELD_BYTES + len(name.encode(errors="replace")) + len(text.encode(errors="replace"))
        for name, text in told
    )


def printable(text: str) -> str:
    """Text of a log, with nothing that moves the cursor of whoever reads it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
