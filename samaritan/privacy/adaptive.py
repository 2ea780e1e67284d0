"""A clipping norm that follows the records' own, at a price that is part of the accounting.

Andrew et al. (arXiv 1905.03871): beside the noisy sum each step releases, with noise of its own,
how many records were not clipped, and moves the norm towards the quantile that was asked for. Both
releases together cost exactly what one with the given noise multiplier costs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.randomness import SystemRandom

_RATE = 0.2
"""How far the logarithm of the norm moves in a step whose every record was on the wrong side."""

_COUNT_SHARE = 0.1
"""The most of 1 / noise multiplier squared that the count may take from the sum."""


@dataclass
class AdaptiveClip:
    """The clipping norm of a run of steps.

    Attributes:
        quantile: Share of records that is not to be clipped.
        clip_norm: As it stands.
    """

    quantile: float
    clip_norm: float
    _balance: int = field(default=0, init=False)

    def mechanism(self, planned: Mechanism) -> Mechanism:
        """A step's mechanism for the sum: more noise, which pays for the count."""
        count = count_noise(planned)
        noise = (planned.noise_multiplier**-2 - (2 * count) ** -2) ** -0.5
        return replace(planned, noise_multiplier=noise, clip_norm=self.clip_norm)

    def counted(self, vectors: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same vectors; counts each that is not clipped as 1, each other as -1."""
        self._balance = 0
        for vector in vectors:
            norm = torch.linalg.vector_norm(vector.double())
            # A vector that is not finite becomes zero, and zero is not clipped.
            self._balance += -1 if torch.isfinite(norm) and norm > self.clip_norm else 1
            yield vector

    def step(self, planned: Mechanism, random: SystemRandom) -> None:
        """Moves the norm after a step, by the noisy count alone."""
        noise = round(float(random.gaussian(1)[0]) * 2 * count_noise(planned))
        unclipped = 0.5 + (self._balance + noise) / 2 / planned.expected_records
        share = min(max(unclipped, 0.0), 1.0)
        self.clip_norm *= math.exp(-_RATE * (share - self.quantile))


def count_noise(planned: Mechanism) -> float:
    """Standard deviation of the noise on the count, in records.

    A record moves the count, taken from a half, by a half. A twentieth of the expected sample, as
    in the paper, where that is cheap enough.
    """
    cheapest = planned.noise_multiplier / math.sqrt(_COUNT_SHARE) / 2
    return max(planned.expected_records / 20, cheapest)
