"""What the rounds so far say about the next: who rests, which round was best, when to stop.

Everything is read from the history that a checkpoint holds, so that a resumed run judges alike.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

BUDGET_SPENT = "failed: SAM-P101"
"""What a site answers that cannot afford another round."""

ROUND_OPENED = "failed: SAM-P206"
"""What a site answers that has opened its shares of a masked sum of this round before."""

_NOT_FINITE = ("failed: SAM-T102", "failed: SAM-F205")

History = Sequence[dict[str, Any]]
"""The entries of summary.json's `rounds`."""


def quarantined(history: History, site: str, rounds: int) -> bool:
    """Whether the site's last reply was refused, or not finite, so many rounds ago at most."""
    recent = history[-rounds:] if rounds else ()
    for entry in reversed(recent):
        if site in entry["sites"]:
            status: str = entry["sites"][site]["status"]
            return status.startswith("refused") or status in _NOT_FINITE
    return False


def left_sites(history: History) -> set[str]:
    """Sites that had spent their privacy budget: they train no more."""
    return {
        site
        for entry in history
        for site, told in entry["sites"].items()
        if told["status"] == BUDGET_SPENT
    }


def draw_sites(sites: Sequence[str], count: int | None, seed: int, server_round: int) -> list[str]:
    """The sites asked in a round: all, or so many drawn without replacement."""
    if count is None or count >= len(sites):
        return sorted(sites)
    draw = random.Random(f"{seed}/{server_round}/sites")  # noqa: S311
    return sorted(draw.sample(sorted(sites), count))


def best_round(history: History) -> tuple[int, float] | None:
    """Number and mean Dice of the first round with the highest; None where none was scored."""
    scored = [
        (int(e["round"]), float(e["dice_mean"])) for e in history if e["dice_mean"] is not None
    ]
    return max(scored, key=lambda pair: pair[1]) if scored else None


def on_plateau(history: History, patience: int | None) -> bool:
    """Whether the last so many scored rounds brought no better Dice."""
    scores: list[float] = [
        entry["dice_mean"] for entry in history if entry["dice_mean"] is not None
    ]
    if patience is None or len(scores) <= patience:
        return False
    return max(scores[-patience:]) <= max(scores[:-patience])


def has_fallen(history: History, drop: float | None) -> bool:
    """Whether the last round was scored further than `drop` below the best."""
    best = best_round(history)
    if drop is None or best is None or history[-1]["dice_mean"] is None:
        return False
    return bool(history[-1]["dice_mean"] < best[1] - drop)


def last_ledger(history: History, site: str) -> str:
    """Where a site's privacy ledger stood when it was last heard of; empty for never."""
    for entry in reversed(history):
        if found := entry["sites"].get(site, {}).get("ledger"):
            return str(found)
    return ""


def last_used(history: History, site: str) -> tuple[int, str]:
    """Round and hash of the last update of a site that was used; 0 and empty for none."""
    for entry in reversed(history):
        if found := entry["sites"].get(site, {}).get("update_sha256"):
            return int(entry["round"]), str(found)
    return 0, ""
