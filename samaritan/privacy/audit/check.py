"""A property of an implementation that the sums of an experiment cannot show.

Each check drives the same step as the experiment. Statistical ones fail at a p-value that chance
gives once in 10^5 audits; the faults they look for lie far beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from samaritan.privacy.audit.canaries import BuildStep, SliceGradients
from samaritan.privacy.mechanism import Mechanism

P_FAILS = 1e-5


@dataclass(frozen=True)
class Check:
    """One property.

    Attributes:
        name: What holds if it passes.
        passed: Whether it does.
        measured: By what it was judged.
    """

    name: str
    passed: bool
    measured: str


def without_gradient(size: int, note: Callable[[int], None] = lambda _: None) -> SliceGradients:
    """Patients who add nothing; `note` is told who was asked."""
    gradients = torch.zeros(1, size)

    def slice_gradients(patient: int) -> Tensor:
        note(patient)
        return gradients

    return slice_gradients


def noise_alone(
    build: BuildStep, mechanism: Mechanism, steps: int, size: int, patients: int = 0
) -> np.ndarray:
    """(steps, size) releases over patients who add nothing, in standard deviations as claimed."""
    step = build(mechanism)
    gradients = without_gradient(size)
    releases = [step(range(patients), gradients, size).double().numpy() for _ in range(steps)]
    deviation = mechanism.noise_multiplier * mechanism.clip_norm / mechanism.expected_records
    return np.stack(releases) / deviation
