"""This machine's clock: what it must be later than, who keeps it, and how far the server's is.

Flower signs every request of a site with the time, and the server refuses what is more than 305 s
old or more than 5 s from the future (flwr 1.41, superlink/routers/fleet/node_auth.py).
"""

from __future__ import annotations

import contextlib
import ctypes
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from samaritan.operate.checks.finding import Finding, fine, missing, note

OLDEST_S, NEWEST_S = 305.0, 5.0
"""How old a signature may be at the server, and how far ahead of the server's clock."""

_SLACK_S = 1.0
"""A difference as near as this to a limit counts as beyond it: clocks drift."""

_NOTABLE_S = 4.0
_TIME_ERROR = 5


def synchronised() -> bool | None:
    """Whether the kernel's clock is held by a time service; None where that cannot be told."""
    with contextlib.suppress(OSError, AttributeError):
        # The struct is read alone; its size is below this on every architecture.
        state = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.create_string_buffer(1024))
        if state >= 0:
            return int(state) != _TIME_ERROR
    return None


def plausible(moment: datetime, made: datetime) -> Finding:
    """Whether a clock is past what has happened, and kept by a service.

    Args:
        moment: What it says.
        made: When the newest certificate or list of the kit was made.
    """
    # Another machine's clock made those; it may have been a little ahead.
    if moment < made - timedelta(hours=1):
        return missing(
            "clock",
            "SAM-N621",
            f"says {moment:%Y-%m-%d %H:%M} UTC, and files of this kit were made on "
            f"{made:%Y-%m-%d %H:%M} UTC",
            "Set it: `timedatectl set-ntp true`, or ask IT for the hospital's time server.",
        )
    if synchronised() is False:
        return note(
            "clock",
            f"{moment:%Y-%m-%d %H:%M:%S} UTC, and no time service keeps it",
            "Turn one on (`timedatectl set-ntp true`): the server refuses a clock that is "
            f"{NEWEST_S:g} s ahead of its own.",
            "SAM-N622",
        )
    return fine("clock", f"{moment:%Y-%m-%d %H:%M:%S} UTC")


def difference_s(date: str, sent: datetime, received: datetime) -> float | None:
    """How far this clock is ahead of a server's; None for a date that cannot be read.

    Args:
        date: The header of its answer, in whole seconds.
        sent: By this clock.
        received: By this clock.

    Returns:
        The smallest difference that explains what was seen, negative where this clock is behind.
    """
    try:
        said = parsedate_to_datetime(date)
    except (ValueError, TypeError):
        return None
    if said.tzinfo is None:
        said = said.replace(tzinfo=UTC)
    # The server's clock stood between `said` and a second later, at some time in between.
    least = (sent - said).total_seconds() - 1.0
    most = (received - said).total_seconds()
    if least > 0:
        return least
    return min(most, 0.0)


def against_server(ahead_s: float) -> Finding:
    """Whether a difference of clocks lets this site's signatures pass.

    Args:
        ahead_s: How far this machine's clock is ahead of the server's.
    """
    what = "clock and the server's"
    text = f"this machine is {abs(ahead_s):.0f} s {'ahead' if ahead_s > 0 else 'behind'}"
    if ahead_s >= NEWEST_S - _SLACK_S or ahead_s <= -(OLDEST_S - _SLACK_S):
        limit = NEWEST_S if ahead_s > 0 else OLDEST_S
        return missing(
            what,
            "SAM-N623",
            f"{text}; the server refuses this site from {limit:g} s on",
            f"{_culprit()} Until then the node is turned away with 401.",
        )
    if abs(ahead_s) >= _NOTABLE_S:
        return note(what, f"{text}; {OLDEST_S:g} s are too much", _culprit(), "SAM-N624")
    return fine(what, "agree within seconds")


def _culprit() -> str:
    """Which of two clocks is wrong, as far as it can be told from here."""
    kept = synchronised()
    if kept is True:
        return (
            "A time service keeps the clock of this machine, so it is likely the server's that is "
            "wrong: tell the coordinator."
        )
    if kept is False:
        return (
            "No time service keeps the clock of this machine, so it is likely this one that is "
            "wrong: `timedatectl set-ntp true`."
        )
    return "Compare both with a watch, and set the one that is wrong."
