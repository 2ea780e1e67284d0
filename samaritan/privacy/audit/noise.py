"""Noise: as large as it was accounted, new in every step, and not to be foreseen."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from scipy.stats import chi2, norm

from samaritan.privacy.audit.canaries import BuildStep
from samaritan.privacy.audit.check import P_FAILS, Check, noise_alone, without_gradient
from samaritan.privacy.mechanism import Mechanism

_STEPS, _SIZE = 40, 4000
_EXPECTED_SAMPLE = 64


def noise_checks(build: BuildStep, mechanism: Mechanism) -> list[Check]:
    """Every check of noise; most on releases of an empty training set."""
    noise = noise_alone(build, mechanism, _STEPS, _SIZE)
    return [noise_spread(noise), fresh_noise(noise), unforeseeable(build, mechanism)]


def noise_spread(noise: np.ndarray) -> Check:
    """Noise is in every step, an empty sample's too, and as large as it was accounted.

    Args:
        noise: (steps, size) releases of nobody, in standard deviations as claimed.
    """
    steps, size = noise.shape
    squares = (noise**2).sum(axis=1)
    weakest, overall = math.sqrt(squares.min() / size), math.sqrt(squares.sum() / noise.size)
    p_weakest = steps * float(chi2.cdf(squares.min(), size))
    p_overall = float(chi2.cdf(squares.sum(), noise.size))
    return Check(
        "noise of the claimed size is in every step, with an empty sample too",
        2 * min(p_weakest, p_overall) >= P_FAILS,
        f"{overall:.3f} of the claimed deviation, {weakest:.3f} in the weakest step",
    )


def fresh_noise(noise: np.ndarray) -> Check:
    """No two steps share noise: variance of their difference over the sum of their variances.

    Args:
        noise: (steps, size) releases of nobody.
    """
    steps, size = noise.shape
    ratio = min(
        _freshness(noise[late], noise[early]) for late in range(steps) for early in range(late)
    )
    return Check(
        "noise is new in every step",
        _is_fresh(ratio, size, steps * (steps - 1) // 2),
        f"differences of steps vary {ratio:.3f} of what fresh noise gives, at least",
    )


def unforeseeable(build: BuildStep, mechanism: Mechanism) -> Check:
    """Two trainings under one seed of Python, NumPy and torch draw other noise, other samples."""
    patients = range(math.ceil(_EXPECTED_SAMPLE / min(mechanism.sampling_rate, 0.5)))
    runs = []
    for _ in range(2):
        with _Seeded():
            asked: list[int] = []
            step = build(mechanism)
            noise = step([], without_gradient(_SIZE), _SIZE).double().numpy()
            step(patients, without_gradient(1, asked.append), 1)
            runs.append((noise, asked))
    (noise, sample), (noise_again, sample_again) = runs
    ratio = _freshness(noise, noise_again)
    alike = sample == sample_again and mechanism.sampling_rate < 1
    return Check(
        "no seed of Python, NumPy or torch decides noise or samples",
        _is_fresh(ratio, _SIZE, 1) and not alike,
        f"noise differs by {ratio:.3f} of what fresh noise gives, samples are "
        f"{'alike' if alike else 'as they should be'}",
    )


def _freshness(one: np.ndarray, other: np.ndarray) -> float:
    """Variance of the difference over the sum of variances: 1 for fresh noise, 0 for the same."""
    whole = float((one**2).sum() + (other**2).sum())
    return float(((one - other) ** 2).sum()) / whole if whole else 0.0


def _is_fresh(ratio: float, size: int, pairs: int) -> bool:
    return (1 - ratio) * math.sqrt(size) < float(norm.isf(P_FAILS / pairs))


class _Seeded:
    """Seeds what programs seed, and puts it back."""

    def __enter__(self) -> None:
        self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def __exit__(self, *_: object) -> None:
        python, numpy, pytorch = self._states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
