"""One log, read and checked by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from samaritan.audit.log import Entry, LineError, entries
from samaritan.messages import answer_hash

_KNOWN = {
    "genesis", "repair", "started", "stopped", "plan_approved", "study_loaded", "request", "egress",
    "dry_run", "refused", "ingress", "forged", "unreadable", "error",
}  # fmt: skip
QUESTION = {"message": str, "kind": str, "round": int, "plan": str}
_MANIFEST = QUESTION | {
    "answer_sha256": str, "bytes": int, "numbers": dict, "texts": dict, "destination": str,
}  # fmt: skip
_STEP = {"stage": str, "attempt": int, "length": int, "bytes": int, "sha256": str}


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


@dataclass
class CheckedLog:
    """A log as it was read, with what was found in it.

    Attributes:
        file: Its path.
        entries: With their line, up to the first that is not as it was written.
        departures: What left, and what a dry run kept.
        faults, warnings: As in a verdict, each about a line of this log.
        broken: Whether a line is not as it was written, or there is none.
    """

    file: str
    entries: list[tuple[int, Entry]] = field(default_factory=list)
    departures: list[Departure] = field(default_factory=list)
    faults: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    broken: bool = False

    @property
    def owner(self) -> Entry:
        """What the first line says."""
        return self.entries[0][1] if self.entries else {}

    def fault(self, line: int, what: str) -> None:
        """Adds a fault."""
        self.faults.append(Finding(self.file, line, printable(what)))

    def warn(self, line: int, what: str) -> None:
        """Adds a warning."""
        self.warnings.append(Finding(self.file, line, printable(what)))

    def sort(self) -> None:
        """Puts the findings in the order of the lines."""
        for found in (self.faults, self.warnings):
            found.sort(key=lambda finding: finding.line)


def read_log(path: Path) -> CheckedLog:
    """Reads a log and checks it by itself.

    Raises:
        OSError: When it cannot be read.
    """
    data = path.read_bytes()
    log = CheckedLog(str(path))
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


def _check_types(log: CheckedLog) -> None:
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


def _check_clock(log: CheckedLog) -> None:
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


def _check_departures(log: CheckedLog) -> None:
    """Checks what each answer says of itself, and that it was asked for, once."""
    asked: dict[str, set[tuple[Any, ...]]] = defaultdict(set)
    answered: dict[str, Departure] = {}
    for line, entry in log.entries:
        kind = entry["type"]
        if kind == "request" and has(entry, QUESTION):
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
    if not has(entry, _MANIFEST):
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
    if payload is not None and not has(entry, {"payload_sha256": str, "payload_bytes": int}):
        return False
    if step is not None and not (isinstance(step, dict) and has(step, _STEP)):
        return False
    parts = None if step is None else (
        step["stage"], step["attempt"], step["length"], step["sha256"],
    )  # fmt: skip
    size = (entry["payload_bytes"] if payload else 0) + (step["bytes"] if step else 0)
    digest = answer_hash(payload, entry["numbers"], entry["texts"], parts)
    return bool(digest == entry["answer_sha256"] and size == entry["bytes"])


def has(entry: Mapping[str, Any], fields: Mapping[str, type]) -> bool:
    """Whether an entry has these fields, each of its type."""
    return all(type(entry.get(name)) is kind for name, kind in fields.items())


def printable(text: str) -> str:
    """Text of a log, with nothing that moves the cursor of whoever reads it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
