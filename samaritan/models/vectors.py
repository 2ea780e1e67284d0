"""An adapter as one vector, and back: all tensors behind each other, in the order of names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from samaritan.models.adapter import AdapterState


def flat(state: AdapterState) -> Tensor:
    """(length,) float64; empty for an adapter without tensors."""
    parts = [state[name].double().flatten() for name in sorted(state)]
    return torch.cat([torch.zeros(0, dtype=torch.float64), *parts])


def unflat(vector: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> AdapterState:
    """The float32 tensors of a vector.

    Args:
        vector: (length,), as `flat` makes it.
        shapes: Of all tensors by name.
    """
    names = sorted(shapes)
    parts = torch.split(vector, [torch.Size(shapes[name]).numel() for name in names])
    return {
        name: part.reshape(shapes[name]).float() for name, part in zip(names, parts, strict=True)
    }


def length(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Numbers in all tensors together."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())
