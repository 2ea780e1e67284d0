"""When a site works for a study: windows of the week in the machine's local time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY = timedelta(days=1)
_WINDOW = re.compile(
    r"(?:(?P<first>[a-z]{3})(?:-(?P<last>[a-z]{3}))? )?"
    r"(?P<begin>\d{2}:\d{2})-(?P<end>\d{2}:\d{2})"
)


class Hours:
    """Windows such as "Mon-Fri 19:00-06:00": the days name when a window begins.

    Args:
        windows: In no order; none means always.

    Raises:
        ValueError: For one that cannot be read.
    """

    def __init__(self, windows: Sequence[str]) -> None:
        self._windows = [_read(text) for text in windows]

    def open_at(self, when: datetime) -> bool:
        """Whether the site works at a local time."""
        if not self._windows:
            return True
        minute = when.hour * 60 + when.minute
        today, yesterday = when.weekday(), (when - _DAY).weekday()
        return any(
            begin <= minute < end and today in days
            if begin < end
            else (minute >= begin and today in days) or (minute < end and yesterday in days)
            for days, begin, end in self._windows
        )


def _read(text: str) -> tuple[frozenset[int], int, int]:
    """The days on which a window begins, Monday being 0, and the minutes of its begin and end."""
    found = _WINDOW.fullmatch(text.strip().lower())
    try:
        if found is None:
            raise ValueError
        days = frozenset(range(7))
        if found["first"]:
            first = _DAYS.index(found["first"])
            last = _DAYS.index(found["last"] or found["first"])
            days = frozenset((first + n) % 7 for n in range((last - first) % 7 + 1))
        begin = _minute(found["begin"])
        end = 24 * 60 if found["end"] == "24:00" else _minute(found["end"])
        if begin == end:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"{text!r} is no window such as "
            '"19:00-06:00", "Sat 00:00-24:00" or "Mon-Fri 19:00-06:00"'
        ) from None
    return days, begin, end


def _minute(text: str) -> int:
    hour, minute = int(text[:2]), int(text[3:])
    if hour > 23 or minute > 59:
        raise ValueError
    return hour * 60 + minute
