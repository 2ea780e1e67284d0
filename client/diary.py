"""What the log of a site comes to: what was asked, what left, what was refused.

The chain of its lines is checked elsewhere (`samaritan audit log verify`); here it is read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from typing import Any

from samaritan.watch.follow import Json

_MOST_REFUSALS = 30


@dataclass
class Sum:
    """Answers that left, of one kind or for one plan.

    Attributes:
        answers: How many.
        bytes: Of tensors and steps of masked sums in them; numbers and names come on top.
    """

    answers: int = 0
    bytes: int = 0


@dataclass
class Refusal:
    """Requests that were refused for the same reason.

    Attributes:
        code: Of the reason.
        kind: Of the request.
        times: How often.
        round: Of the last.
        last: When that was.
        reference: To the text in the agent's own output.
    """

    code: str
    kind: str
    times: int = 0
    round: int = 0
    last: str = ""
    reference: str = ""


@dataclass
class Diary:
    """A log, added up.

    Attributes:
        asked: The last request; None for none.
        open: Whether it is being worked on.
        left: The last answer that left; None for none.
        total: All answers that left.
        by_kind, by_plan: The same, by kind of request and by hash of the plan.
        held: Answers that a dry run kept here.
        refusals: The newest last.
        started: When the agent began; empty where it has ended since.
        loaded: Hash of the plan whose model the agent has loaded.
        last_time: Of the last line.
    """

    asked: Json | None = None
    open: bool = False
    left: Json | None = None
    total: Sum = field(default_factory=Sum)
    by_kind: dict[str, Sum] = field(default_factory=dict)
    by_plan: dict[str, Sum] = field(default_factory=dict)
    held: int = 0
    refusals: OrderedDict[tuple[str, str], Refusal] = field(default_factory=OrderedDict)
    started: str = ""
    loaded: str = ""
    last_time: str = ""

    def take(self, entry: Json) -> None:
        """Adds a line."""
        kind, self.last_time = _text(entry, "type"), _text(entry, "time_utc")
        if kind in ("started", "stopped"):
            self.started = self.last_time if kind == "started" else ""
            self.open, self.loaded = False, ""
        elif kind == "request":
            self.asked, self.open = _about(entry), True
        elif kind == "study_loaded":
            self.loaded = _text(entry, "plan")
        elif kind == "egress":
            self._close(entry)
            self.left = _about(entry) | {
                "bytes": _whole(entry, "bytes"),
                "tensors": len(_list(entry, "tensors")),
                "names": [*_list(entry, "numbers"), *_list(entry, "texts")],
            }
            for part in (
                self.total,
                self.by_kind.setdefault(_text(entry, "kind"), Sum()),
                self.by_plan.setdefault(_text(entry, "plan"), Sum()),
            ):
                part.answers += 1
                part.bytes += _whole(entry, "bytes")
        elif kind == "dry_run":
            self.held += 1
        elif kind == "refused":
            self._close(entry)
            self._refuse(entry)

    def _close(self, entry: Json) -> None:
        if self.asked is not None and self.asked["message"] == _text(entry, "message"):
            self.open = False

    def _refuse(self, entry: Json) -> None:
        key = _text(entry, "code"), _text(entry, "kind")
        refusal = self.refusals.setdefault(key, Refusal(*key))
        self.refusals.move_to_end(key)
        refusal.times += 1
        refusal.round, refusal.last = _whole(entry, "round"), self.last_time
        refusal.reference = _text(entry, "reference")
        if len(self.refusals) > _MOST_REFUSALS:
            self.refusals.popitem(last=False)

    def tree(self) -> Json:
        """As JSON."""
        found = asdict(self)
        found["refusals"] = [asdict(refusal) for refusal in reversed(self.refusals.values())]
        return found


def _about(entry: Json) -> Json:
    return {
        "kind": _text(entry, "kind"),
        "round": _whole(entry, "round"),
        "plan": _text(entry, "plan"),
        "message": _text(entry, "message"),
        "time": _text(entry, "time_utc"),
    }


def _text(entry: Json, key: str) -> str:
    value: Any = entry.get(key)
    return value if isinstance(value, str) else ""


def _list(entry: Json, key: str) -> list[Any]:
    value: Any = entry.get(key)
    return list(value) if isinstance(value, list | dict) else []


def _whole(entry: Json, key: str) -> int:
    value: Any = entry.get(key)
    return value if type(value) is int else 0
