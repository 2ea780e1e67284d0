"""Shortens long updates, in front of any rule, so that no site moves the adapter far alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch

from samaritan.models.adapter import AdapterState
from strategies.update import Update


def clipped(
    updates: Iterable[Update], limit: Literal["median"] | float | None, norms: dict[str, float]
) -> Iterator[Update]:
    """Updates one at a time, none of them longer than the limit.

    Args:
        updates: Of a round; "median" collects them all before the first one is handed on.
        limit: A norm, "median" for the median norm of the round, or None to shorten nothing.
        norms: Receives the norm of each update as it came, by site.
    """
    if limit == "median":
        updates = list(updates)
        limit = median_limit([update_norm(update.delta) for update in updates])
    for update in updates:
        norms[update.site] = update_norm(update.delta)
        yield update if limit is None else clip(update, limit)


def clip(update: Update, limit: float) -> Update:
    """The update itself if its norm is within the limit, else one of that norm and direction."""
    norm = update_norm(update.delta)
    if norm <= limit:
        return update
    delta = {name: value * (limit / norm) for name, value in update.delta.items()}
    return replace(update, delta=delta)


def update_norm(delta: AdapterState) -> float:
    """The L2 norm over all tensors together, in float64."""
    lengths = (torch.linalg.vector_norm(value, dtype=torch.float64) for value in delta.values())
    return math.hypot(*map(float, lengths))


def median_limit(norms: Sequence[float]) -> float:
    """The median norm of a round; the lower one of two in the middle, so that one is a site's.

    It holds while more than half of the sites are right: of two sites, the shorter update decides.
    """
    return statistics.median_low(norms) if norms else 0.0
