"""FedAvg: the weighted mean of updates (McMahan et al., arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from samaritan.models.adapter import AdapterState


def fedavg(updates: Iterable[tuple[AdapterState, float]]) -> AdapterState:
    """Averages each tensor by itself; for LoRA that is A and B apart, not their product.

    Updates are taken one at a time, so that memory does not grow with the number of sites.

    Args:
        updates: A delta and a positive weight per site; equal names and shapes. Weights need not
            sum to one.

    Returns:
        The mean update, float32, summed in float64; empty when there was no update.
    """
    sums: dict[str, Tensor] = {}
    total = 0.0
    for update, weight in updates:
        total += weight
        for name, value in update.items():
            if name not in sums:
                sums[name] = torch.zeros(value.shape, dtype=torch.float64)
            sums[name].add_(value.double(), alpha=weight)
    return {name: (value / total).float() for name, value in sums.items()}
