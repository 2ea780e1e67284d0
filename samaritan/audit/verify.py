"""Verification of logs: one by itself, and a site's against the server's.

One log by itself shows whatever was changed, removed, added or swapped between its first line and
its last, a message that was answered twice, an answer to no question, and a list of contents that
is not that of the answer. A site has one log for all its studies, the server one for each; against
these it shows what left and was not written down, what was written down and never arrived, what
arrived as something else or larger than it left, and, with the site's key, whether the site or the
server is wrong about it. Answers of a plan that no log of the server has are told, not compared.

What cannot be seen without the other log: lines cut off at the end; a change in the last line, but
of what the hash of its answer covers; a chain that somebody who can write the file has made anew.
With it too, in that last line and in such a chain: what is told of no answer that arrived, and of
one that did its time, destination, codec and list of tensors, and its size by less than a frame.

What cannot be seen at all: the same lines cut off at the end of both; what left past the agent for
somebody else than this server; what the texts of errors say, of which the logs hold the codes; what
the numbers of an update mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from samaritan.audit.log import Entry
from samaritan.audit.reading import QUESTION, CheckedLog, Departure, Finding, has, read_log
from samaritan.errors import AuditError
from samaritan.keys import is_signed
from samaritan.lines import canonical
from samaritan.messages import sealed_fields

_ARRIVAL = QUESTION | {"site": str, "answer_sha256": str, "bytes": int, "seal": str}
_FRAME_BYTES = 256
"""What a message takes beside its update, step and the names and values it holds, at most."""
_FIELD_BYTES = 32
"""The same of one number or text."""


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
    log = read_log(path)
    _key(log, public)
    return Verdict(
        log.file, len(log.entries), tuple(log.departures), tuple(log.faults), tuple(log.warnings)
    )


def match(site_log: Path, server_logs: Sequence[Path], public: bytes | None = None) -> Verdict:
    """Checks a site's log, those of the server, and the one against the others.

    Args:
        site_log: Of the site.
        server_logs: Of the server, one for each study.
        public: The site's key, from the plan or another place that is not the site's log; the one
            that this log names when left out, and no seal is checked where it names none.

    Raises:
        OSError: When one of them cannot be read.
        AuditError: SAM-A104 when one of them is another kind of log.
    """
    # What is written meanwhile has left before it arrives.
    servers = [read_log(path) for path in server_logs]
    site = read_log(site_log)
    _require_kind(site, "site")
    for server in servers:
        _require_kind(server, "server")
    logs, matched, key = [site, *servers], 0, None
    broken = next((log for log in logs if log.broken), None)
    if broken is not None:
        broken.warn(len(broken.entries) + 1, "the logs are not compared: this one is not whole")
    else:
        key = _key(site, public)
        matched = _Comparison(site, servers, key).run()
    for log in logs:
        log.sort()
    return Verdict(
        site.file,
        len(site.entries),
        tuple(site.departures),
        tuple(fault for log in logs for fault in log.faults),
        tuple(warning for log in logs for warning in log.warnings),
        matched,
        "unchecked" if key is None else "named" if public is None else "given",
    )


def _require_kind(log: CheckedLog, kind: Literal["site", "server"]) -> None:
    if log.entries and not isinstance(log.owner.get(kind), str):
        raise AuditError(
            "SAM-A104",
            f"{log.file} is not the log of a {kind}",
            "Name the site's log first, and the server's after --against.",
        )


def _key(site: CheckedLog, public: bytes | None) -> bytes | None:
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
    """What a site's log and those of the server say of each other; findings go to all.

    Args:
        site: Whole.
        servers: Whole.
        public: The site's key, None where no seal is checked.
    """

    def __init__(
        self, site: CheckedLog, servers: Sequence[CheckedLog], public: bytes | None
    ) -> None:
        self.site, self.servers, self.public = site, servers, public
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
        for server, line, entry in self._arrivals():
            kind = entry["type"]
            if kind == "error":
                self._error(server, line, entry)
            elif kind == "unreadable":
                self._unreadable(server, line, entry)
            else:
                matched += self._arrival(server, line, entry)
        self._tell_waiting()
        return matched

    def _arrivals(self) -> Iterator[tuple[CheckedLog, int, Entry]]:
        """What the server says came from this site."""
        seen = set()
        for server in self.servers:
            for line, entry in server.entries:
                kind = entry["type"]
                if kind not in ("ingress", "forged", "unreadable", "error"):
                    continue
                fields = _ARRIVAL if kind in ("ingress", "forged") else QUESTION | {"site": str}
                if not has(entry, fields):
                    server.fault(line, f"this entry of type {kind} lacks what it must have")
                elif entry["site"] == self.name:
                    written = canonical(entry)
                    if written not in seen:  # no other log has this line, but a copy
                        seen.add(written)
                        yield server, line, entry

    def _tell_waiting(self) -> None:
        """Warns of what was sent and did not arrive: of a plan that the server's logs lack once."""
        entries = [entry for server in self.servers for _, entry in server.entries]
        plans = {entry["plan"] for entry in entries if has(entry, {"plan": str})} or {""}
        lacking = defaultdict(list)
        for departure in (d for waiting in self.waiting.values() for d in waiting):
            if departure.plan not in plans:
                lacking[departure.plan].append(departure.line)
                continue
            self.site.warn(
                departure.line,
                f"{departure.told}, was sent and never arrived: a crash, a lost connection, or the "
                "server's log lacks it",
            )
        for plan, lines in lacking.items():
            of = f"of plan {plan[:16]}" if plan else "without a plan"
            told = f"1 answer {of} is"
            if len(lines) > 1:
                told = f"{len(lines)} answers {of}, from here to line {max(lines)}, are"
            self.site.warn(
                min(lines),
                f"{told} not compared: no log of the server that was given has this plan",
            )

    def _arrival(self, server: CheckedLog, line: int, entry: Entry) -> bool:
        waiting = self.waiting[entry["message"], entry["answer_sha256"]]
        sealed = self._is_sealed(entry)
        if not waiting:
            server.fault(line, f"{self._unlogged(entry)}; {self._blame(sealed)}")
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
            server.fault(line, what)
        if forged and not sealed:
            server.warn(
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

    def _unreadable(self, server: CheckedLog, line: int, entry: Entry) -> None:
        for (message, _), waiting in self.waiting.items():
            if message == entry["message"] and waiting:
                where = f"line {waiting.pop(0).line} of {self.site.file}"
                server.warn(line, f"what {where} says has left arrived unreadable")
                return
        server.fault(line, f"something unreadable arrived that {self.site.file} does not have")

    def _error(self, server: CheckedLog, line: int, entry: Entry) -> None:
        if entry["message"] not in self.refused:
            server.warn(
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
