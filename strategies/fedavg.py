"""FedAvg: the weighted mean of updates (McMahan et al., arXiv 1602.05629)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from samaritan.models.adapter import AdapterState


def fedavg(updates: Sequence[AdapterState], weights: Sequence[float]) -> AdapterState:
    """Averages each tensor by itself; for LoRA that is A and B apart, not their product.

    Args:
        updates: One delta per site, equal names and shapes.
        weights: Positive, one per site; need not sum to one.

    Returns:
        The mean update, float32, summed in float64.
    """
    total = float(sum(weights))
    mean: AdapterState = {}
    for name, first in updates[0].items():
        summed = torch.zeros(first.shape, dtype=torch.float64)
        for update, weight in zip(updates, weights, strict=True):
            summed += update[name].double() * (weight / total)
        mean[name] = summed.float()
    return mean
