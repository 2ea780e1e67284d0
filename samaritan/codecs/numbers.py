"""Number formats: floats of several widths, and integers with a scale for each block of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Numbers = Literal["fp32", "fp16", "bf16", "int8", "int4"]

BLOCK = 64
"""Numbers that share a bf16 scale, a quarter of a bit each. The squared error of int4 then stays
below the squared norm whatever the numbers are, as error feedback needs; from 392 on it may not."""

_LEVELS = {"int8": 127, "int4": 7}
_MOST = 3e38
"""Narrow formats hold no more; a larger number is written as this one."""
_LEAST = torch.finfo(torch.bfloat16).tiny


def number_parts(numbers: Numbers, count: int) -> dict[str, tuple[torch.dtype, int]]:
    """Type and length of the tensors that hold `count` numbers."""
    blocks = math.ceil(count / BLOCK)
    parts: dict[Numbers, dict[str, tuple[torch.dtype, int]]] = {
        "fp32": {"numbers": (torch.float32, count)},
        "fp16": {"scales": (torch.bfloat16, 1), "numbers": (torch.float16, count)},
        "bf16": {"numbers": (torch.bfloat16, count)},
        "int8": {"scales": (torch.bfloat16, blocks), "numbers": (torch.int8, count)},
        "int4": {"scales": (torch.bfloat16, blocks), "numbers": (torch.uint8, (count + 1) // 2)},
    }
    return parts[numbers]


def write_numbers(values: Tensor, numbers: Numbers, seed: int) -> dict[str, Tensor]:
    """Numbers as tensors of `number_parts`.

    fp16 gets one scale, a power of two that brings the largest number to its upper end: nothing
    overflows, and small updates keep their precision. int8 and int4 round to one of the two
    neighbouring levels at random so that the mean is right (QSGD, arXiv 1610.02132).

    Args:
        values: (count,) float32, finite.
        numbers: The format.
        seed: Of the rounding; torch's own generator is left alone.
    """
    if numbers == "fp32":
        return {"numbers": values}
    values = values.clamp(-_MOST, _MOST)
    if numbers == "bf16":
        return {"numbers": values.bfloat16()}
    if numbers == "fp16":
        scale = _power_of_two(float(values.abs().max()) if len(values) else 0.0)
        return {
            "scales": torch.tensor([scale], dtype=torch.bfloat16),
            "numbers": (values / scale).half(),
        }
    levels = _LEVELS[numbers]
    blocks = F.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
    # bf16 may round down by one part in 256, and no number shall go beyond the last level.
    scales = (blocks.abs().amax(1) * ((1 + 2**-7) / levels)).clamp_min(_LEAST).bfloat16()
    noise = torch.rand(blocks.shape, generator=torch.Generator().manual_seed(seed))
    whole = (blocks / scales.float()[:, None]).add_(noise).floor_().to(torch.int8)
    whole = whole.flatten()[: len(values)]
    return {"scales": scales, "numbers": _pack(whole) if numbers == "int4" else whole}


def read_numbers(parts: Mapping[str, Tensor], numbers: Numbers, count: int) -> Tensor:
    """The (count,) float32 numbers that tensors of `number_parts` hold."""
    values = parts["numbers"]
    if numbers == "int4":
        values = _unpack(values)[:count]
    if numbers in ("fp32", "bf16"):
        return values.float()
    scales = parts["scales"].float()
    if numbers == "fp16":
        return values.float() * scales
    return values.float().mul_(scales.repeat_interleave(BLOCK)[:count])


def _power_of_two(largest: float) -> float:
    """The scale at which the largest number is between 2^14 and 2^15."""
    return max(2.0 ** (math.frexp(largest)[1] - 15), _LEAST)


def _pack(whole: Tensor) -> Tensor:
    """-8 to 7, two per byte, the first in the lower half."""
    pairs = (F.pad(whole, (0, len(whole) % 2)) + 8).to(torch.uint8).view(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], 1).flatten().to(torch.int8) - 8
