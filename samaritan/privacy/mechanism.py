"""The one mechanism by which data reach an adapter: sample, clip, sum, add noise, divide.

DP-SGD (Abadi et al., arXiv 1607.00133) over records that are patients, slices or sites. The rate of
sampling and the divisor are public numbers, so that nothing in a released mean depends on how many
records there are, other than through the noisy sum.

Sums are made of integers. A clipped vector is cut to a grid, towards zero, which never lengthens
it; sums of integers do not depend on their order. Noise is the rounding of a real Gaussian, and as
the sum is an integer, adding it is the same as rounding the sum plus the Gaussian: the analysis of
the real Gaussian holds, and the gaps between floating-point numbers, which betray what noise was
added to (Mironov, CCS 2012), lie far below the grid.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from samaritan.privacy.randomness import SystemRandom

Record = TypeVar("Record")

_STEPS_PER_NORM = 2**30
"""Grid steps in a clipping norm: finer than float32 is for vectors of a million numbers."""

_BELOW_ONE = 1 - 2.0**-40
"""Keeps a clipped norm under the limit whatever float64 rounds."""


@dataclass(frozen=True)
class Mechanism:
    """What is public about a step.

    Attributes:
        sampling_rate: Chance of each record, by itself, to take part in a step.
        noise_multiplier: Standard deviation of the noise on the sum, over the clipping norm.
        clip_norm: L2 norm that no record's vector exceeds.
        expected_records: Divisor of the sum.
    """

    sampling_rate: float
    noise_multiplier: float
    clip_norm: float
    expected_records: float

    def sample(self, records: Sequence[Record], random: SystemRandom) -> list[Record]:
        """A Poisson sample: every record by itself with the same chance; it may be empty."""
        chosen = random.uniform(len(records)) < self.sampling_rate
        return [record for record, taken in zip(records, chosen, strict=True) if taken]

    def release(
        self,
        vectors: Iterable[Tensor],
        size: int,
        random: SystemRandom,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The noisy mean of a sample's vectors; of an empty sample it is noise alone.

        Args:
            vectors: (size,) each, one for each record of the sample; one is in memory at a time.
            size: Numbers in each.
            random: For the noise.
            device: Where the vectors are.

        Returns:
            (size,) float32 on that device.
        """
        total = torch.zeros(size, dtype=torch.int64, device=device)
        for vector in vectors:
            total += clipped_to_grid(vector, self.clip_norm)
        noise = torch.from_numpy(random.gaussian(size)) * (self.noise_multiplier * _STEPS_PER_NORM)
        total += noise.round_().to(device=device, dtype=torch.int64)
        scale = self.clip_norm / (_STEPS_PER_NORM * self.expected_records)
        return (total.double() * scale).float()


def clipped_to_grid(vector: Tensor, clip_norm: float) -> Tensor:
    """A record's vector in grid steps, no longer than the clipping norm.

    Args:
        vector: Of any floating type and shape. One that is not finite becomes zero: leaving the
            record out is a function of that record alone.
        clip_norm: In the units of the vector.

    Returns:
        int64, shaped as the vector; its norm is at most as many steps as a clipping norm has.
    """
    exact = vector.double()
    norm = torch.linalg.vector_norm(exact)
    if not torch.isfinite(norm):
        return torch.zeros_like(exact, dtype=torch.int64)
    scale = _STEPS_PER_NORM / clip_norm * torch.clamp(clip_norm / norm, max=1.0) * _BELOW_ONE
    return torch.trunc(exact * torch.nan_to_num(scale, posinf=0.0)).long()
