"""Top-k sparsity: the largest of many numbers, and their positions in few bits."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from samaritan.codecs.fault import WireError

_Bits = npt.NDArray[np.uint8]


def number_kept(share: float | None, size: int) -> int:
    """How many of `size` numbers are sent; at least one where there are any."""
    return size if share is None else min(size, max(1, round(share * size)))


def largest(values: Tensor, count: int) -> Tensor:
    """Positions, increasing, of the `count` numbers largest in magnitude.

    Args:
        values: (N,) float32.
        count: 0 to N.
    """
    order = np.argpartition(values.abs().numpy(), len(values) - count)
    return torch.from_numpy(np.sort(order[len(values) - count :]))


def position_bytes(count: int, size: int) -> int:
    """Length of `count` positions below `size`; both are at least 1, count is below size."""
    low = _low_bits(count, size)
    return (
        _bytes(size) if low is None else _bytes(count * low) + _bytes(_high_bits(count, size, low))
    )


def write_positions(positions: Tensor, size: int) -> Tensor:
    """Positions in the code of Elias and Fano, or as one bit per number where that is shorter.

    The lower bits of each position stand as they are. The rest is one bit string in which the i-th
    position p sets the bit (p >> lower bits) + i. That takes about half a bit per position more
    than the best code of random positions, and its length follows from `count` and `size` alone, so
    that a receiver knows it beforehand.

    Args:
        positions: (count,) int64, increasing.
        size: Of the list they point into.

    Returns:
        (position_bytes(count, size),) uint8.
    """
    places, low = positions.numpy(), _low_bits(len(positions), size)
    if low is None:
        return torch.from_numpy(np.packbits(_bits_at(places, size)))
    lower = (places[:, None] >> np.arange(low) & 1).astype(np.uint8)
    upper = (places >> low) + np.arange(len(places))
    bits = _bits_at(upper, _high_bits(len(places), size, low))
    return torch.from_numpy(np.concatenate([np.packbits(lower), np.packbits(bits)]))


def read_positions(data: Tensor, count: int, size: int) -> Tensor:
    """The inverse of `write_positions`.

    Args:
        data: (position_bytes(count, size),) uint8.
        count: Number of positions.
        size: What they are below.

    Raises:
        WireError: When they are not `count` increasing numbers below `size`.
    """
    low = _low_bits(count, size)
    split = 0 if low is None else _bytes(count * low)
    bits = size if low is None else _high_bits(count, size, low)
    places = np.flatnonzero(np.unpackbits(data.numpy()[split:], count=bits))
    if len(places) != count:
        raise WireError("there are not as many positions as numbers")
    if low is not None:
        lower = np.unpackbits(data.numpy()[:split], count=count * low).reshape(count, low)
        places = (places - np.arange(count) << low) + lower @ (1 << np.arange(low))
        if places[-1] >= size or (np.diff(places) <= 0).any():
            raise WireError("positions do not increase, or point beyond the last number")
    return torch.from_numpy(places)


def _low_bits(count: int, size: int) -> int | None:
    """How many bits of a position stand as they are; None for one bit per number."""
    low = (size // count).bit_length() - 1
    return low if count * low + _high_bits(count, size, low) < size else None


def _high_bits(count: int, size: int, low: int) -> int:
    return count + (size - 1 >> low)


def _bytes(bits: int) -> int:
    return math.ceil(bits / 8)


def _bits_at(places: npt.NDArray[np.int64], size: int) -> _Bits:
    bits = np.zeros(size, np.uint8)
    bits[places] = 1
    return bits
