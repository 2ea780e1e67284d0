"""FedAvg: the weighted mean of updates (McMahan et al., arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from samaritan.models.adapter import AdapterState
from strategies.update import Situation, Update


def fedavg(updates: Iterable[Update], situation: Situation) -> AdapterState:
    """Averages each tensor by itself; for LoRA that is A and B apart, not their product.

    Updates are taken one at a time, so that memory does not grow with the number of sites. Where
    some sites have no say (`Update.counts`), the others' mean is taken; where nobody has, nothing
    changes.

    Args:
        updates: Of equal names and shapes.
        situation: Unused; every rule takes it.

    Returns:
        The mean update, float32, summed in float64; empty when there was no update.
    """
    sums: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}
    for update in updates:
        for name, value in update.delta.items():
            counts = update.counts.get(name)
            weight = update.weight if counts is None else update.weight * counts
            if name not in sums:
                sums[name] = torch.zeros(value.shape, dtype=torch.float64)
                totals[name] = torch.zeros((), dtype=torch.float64)
            sums[name].add_(value.double().mul_(weight))
            totals[name] = totals[name] + weight
    return {
        name: torch.where(totals[name] > 0, value / totals[name], 0.0).float()
        for name, value in sums.items()
    }
