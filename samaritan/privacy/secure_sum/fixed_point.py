"""Updates as integers modulo 2^32, whose sum is exact."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from samaritan.errors import PrivacyError

_ROUNDING = 1 + 2.0**-20
"""What clipping in float32 may leave above the clip."""


def step_size(clip: float, members: int) -> float:
    """The smallest power of two in which the sum of all members stays below 2^31 steps.

    Args:
        clip: Largest absolute value of a number.
        members: How many are summed at most.
    """
    steps = (2**31 - 1) / members - 1
    return 2.0 ** math.ceil(math.log2(clip * _ROUNDING / steps))


def encode(values: NDArray[Any], clip: float, members: int) -> NDArray[np.uint32]:
    """Rounds to whole steps, negative ones as two's complement.

    Args:
        values: (length,) floats, none larger than the clip.
        clip: Largest absolute value.
        members: How many are summed at most.

    Returns:
        (length,) little-endian uint32.

    Raises:
        PrivacyError: SAM-P203 when a value is not finite or larger than the clip.
    """
    lowest, highest = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if not max(-lowest, highest) <= clip * _ROUNDING:  # NaN compares false
        raise PrivacyError(
            "SAM-P203",
            f"numbers of the update range from {lowest:.6g} to {highest:.6g}; "
            f"secure aggregation takes up to {clip:.6g} either way",
            "Clip the update after noise was added, or raise the clip for all sites; "
            "nan or inf is a fault of the training.",
        )
    scaled = np.multiply(values, 1 / step_size(clip, members), dtype=np.float64)
    steps: NDArray[np.int32] = np.rint(scaled, out=scaled).astype("<i4")
    return steps.view("<u4")


def decode(total: NDArray[np.uint32], clip: float, members: int) -> NDArray[np.float64]:
    """The sum of at most that many encodings as numbers; (length,) float64, exact."""
    return total.view("<i4") * step_size(clip, members)
