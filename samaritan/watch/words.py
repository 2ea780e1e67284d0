"""Times and counts as a tired person reads them, and error codes with what they mean."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import samaritan
from samaritan.report import units

UNKNOWN = "unknown"
"""Of what cannot be known; never a number in its place."""

_CODE = re.compile(r"SAM-[A-Z]\d{3}")
_ROW = re.compile(r"^\| (SAM-[A-Z]\d{3}) \| (.+) \| (.+) \|$", re.MULTILINE)
_STATES = {
    "down": "does not run",
    "starting": "is starting",
    "backoff": "keeps ending and is started again and again",
    "stopping": "is being stopped",
    "stopped": "is stopped",
    "exited": "has ended",
    "fatal": "cannot be started",
}
_PAGES = (
    Path(samaritan.__file__).parents[1] / "docs" / "errors.md",
    Path(sys.prefix) / "share" / "samaritan" / "errors.md",
)
"""Where the page of error codes lies: in a checkout, and beside an installed package."""


def parse_time(text: object) -> datetime | None:
    """A moment from a log or from Flower; None where there is none."""
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def ago(moment: datetime | None, now: datetime) -> str:
    """`12 s ago`, `3 min ago`, `5 h ago`, `2 days ago`; `unknown` for no moment."""
    if moment is None:
        return UNKNOWN
    seconds = (now - moment).total_seconds()
    if seconds < -60:
        return "in the future; compare the clocks"
    return "just now" if seconds < 5 else f"{lasting(seconds)} ago"


def lasting(seconds: float) -> str:
    """A time without false precision: `12 s`, `3 min`, `5 h`, `2 days`."""
    for limit, divisor, unit in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{max(0, int(seconds / divisor))} {unit}"
    return units.plural(int(seconds / 86400), "day")


def utc(moment: datetime | None, now: datetime) -> str:
    """`02:56 UTC` today, `27 Nov, 02:56 UTC` this year; `unknown` for no moment."""
    if moment is None:
        return UNKNOWN
    moment = moment.astimezone(UTC)
    day = "" if moment.date() == now.date() else f"{moment.day} {moment:%b}, "
    if moment.year != now.year:
        day = f"{moment.day} {moment:%b %Y}, "
    return f"{day}{moment:%H:%M} UTC"


def days(count: int | None) -> str:
    """Days until something ends."""
    if count is None:
        return UNKNOWN
    return "ended" if count < 0 else units.plural(count, "day")


def faulty(processes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence for each process that does not run as it should."""
    return [
        f"Process {name} {_STATES.get(told['state'], told['state'])}; run/{name}.log says why."
        for name, told in processes.items()
        if told["state"] != "running"
    ]


def codes_in(texts: Iterable[str]) -> list[str]:
    """Every error code in some texts, each once, in their order."""
    return list(dict.fromkeys(code for text in texts for code in _CODE.findall(text)))


def meaning(code: str) -> tuple[str, str] | None:
    """What an error code means and what to do, by docs/errors.md; None where that is not known."""
    return _meanings().get(code)


@functools.cache
def _meanings() -> dict[str, tuple[str, str]]:
    for path in _PAGES:
        try:
            rows = _ROW.findall(path.read_text("utf-8"))
        except OSError:
            continue
        return _filled({code: (_plain(what), _plain(todo)) for code, what, todo in rows})
    return {}


def _filled(rows: dict[str, tuple[str, str]]) -> dict[str, tuple[str, str]]:
    """Rows that say "As above." say it themselves."""
    found: dict[str, tuple[str, str]] = {}
    above = ""
    for code, (what, todo) in rows.items():
        above = above if todo == "As above." else todo
        found[code] = (what, above)
    return found


def _plain(markdown: str) -> str:
    without_links = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    return without_links.replace("`", "").strip()
