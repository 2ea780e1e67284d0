"""The white-box experiment: made-up patients whose gradients nobody could miss.

Each canary patient owns one coordinate. All its slices point along it and are far longer than the
clipping norm, which is the worst a patient can do, and other patients leave no trace there. A coin
decides whether it is in the training set; then the real steps are taken, and what they release on
its coordinate, summed, is its score. The coins are committed to by a hash before the first step.

The audit drives a `Step`, the one a training takes over patients. `training_step` is that of
Samaritan; a test gives another one that is broken.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samaritan.errors import PrivacyError
from samaritan.privacy.audit.claim import Claim
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.randomness import SystemRandom

SliceGradients = Callable[[int], Tensor]
"""From a patient to the gradients of its slices, (slices, size); asked for once in each step that
the patient takes part in, as a training computes no other gradients."""

Step = Callable[[Sequence[int], SliceGradients, int], Tensor]
"""From the patients of the training set, their gradients and the size of these to what one step
releases, (size,)."""

BuildStep = Callable[[Mechanism], Step]
"""A training that starts anew and is about to take its first step."""

_LENGTH = 10.0
"""Of a canary's slices, in clipping norms."""

_NONCE_BYTES = 32


def mean_of_slices(gradients: Tensor) -> Tensor:
    """A patient's vector, (size,), from (slices, size): one vector, to be clipped as one."""
    return gradients.mean(dim=0)


def training_step(mechanism: Mechanism) -> Step:
    """The step that a training of Samaritan takes."""
    random = SystemRandom()

    def step(patients: Sequence[int], slice_gradients: SliceGradients, size: int) -> Tensor:
        sample = mechanism.sample(patients, random)
        vectors = (mean_of_slices(slice_gradients(patient)) for patient in sample)
        return mechanism.release(vectors, size, random)

    return step


@dataclass(frozen=True)
class Coins:
    """Who is in, and the promise not to change it.

    Attributes:
        inside: (repeats, canaries) bool.
        nonce: Hides the coins until it is told.
    """

    inside: np.ndarray
    nonce: bytes

    @property
    def packed(self) -> bytes:
        """Eight coins in a byte, the first in the highest bit."""
        return np.packbits(self.inside).tobytes()

    @property
    def commitment(self) -> str:
        """SHA-256 of the nonce and the packed coins, in hexadecimal digits."""
        return hashlib.sha256(self.nonce + self.packed).hexdigest()


def toss(repeats: int, canaries: int) -> Coins:
    """Fair coins that nobody can foresee."""
    words = SystemRandom().words(repeats * canaries)
    return Coins((words % 2 == 1).reshape(repeats, canaries), os.urandom(_NONCE_BYTES))


@dataclass(frozen=True)
class Observations:
    """What a run showed.

    Attributes:
        scores: (canaries,) summed releases, in clipping norms.
        taken: (steps, patients inside) how often each was asked for its gradients.
    """

    scores: np.ndarray
    taken: np.ndarray


def observe(claim: Claim, build: BuildStep, inside: np.ndarray) -> Observations:
    """Takes all the steps of a claim over canaries.

    Args:
        claim: For its mechanism, steps and slices.
        build: The implementation under audit.
        inside: (canaries,) bool.

    Raises:
        PrivacyError: SAM-P402 when a step releases something of another size, or not finite.
    """
    size, mechanism = len(inside), claim.mechanism
    members = np.flatnonzero(inside).tolist()
    taken = np.zeros((claim.steps, size), dtype=np.int64)
    total = torch.zeros(size, dtype=torch.float64)
    step = build(mechanism)
    for number in range(claim.steps):

        def slice_gradients(patient: int, asked: np.ndarray = taken[number]) -> Tensor:
            asked[patient] += 1
            gradients = torch.zeros(claim.slices, size)
            gradients[:, patient] = _LENGTH * mechanism.clip_norm
            return gradients

        released = step(members, slice_gradients, size)
        if released.shape != (size,) or not bool(torch.isfinite(released).all()):
            raise PrivacyError(
                "SAM-P402",
                f"step {number} released {tuple(released.shape)} numbers, {size} were expected, "
                "or some that are not finite",
                "The code under audit is broken; do not train with it.",
            )
        total += released.double()
    scale = mechanism.expected_records / mechanism.clip_norm
    return Observations((total * scale).numpy(), taken[:, members])
