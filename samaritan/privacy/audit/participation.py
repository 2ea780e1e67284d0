"""Participation: Poisson, at a rate that is claimed and that no number of patients changes."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import binom, gamma

from samaritan.privacy.audit.canaries import BuildStep
from samaritan.privacy.audit.check import P_FAILS, Check, without_gradient
from samaritan.privacy.mechanism import Mechanism

_COUNTED_STEPS = 200


def participation_checks(
    build: BuildStep, mechanism: Mechanism, taken: np.ndarray, sizes: tuple[int, ...]
) -> list[Check]:
    """Every check of participation.

    Args:
        build: The implementation under audit.
        mechanism: As claimed.
        taken: (steps, patients) how often each was asked for its gradients in the experiment.
        sizes: Numbers of patients among which the rate must not change.
    """
    rate = mechanism.sampling_rate
    return [claimed_rate(taken, rate), poisson(taken, rate), public_rate(build, mechanism, sizes)]


def claimed_rate(taken: np.ndarray, rate: float) -> Check:
    """Patients take part as often as was accounted, and in no step twice."""
    return Check(
        "patients take part at the claimed rate, at most once in a step",
        _p_value(int(taken.sum()), taken.size, rate) >= P_FAILS and bool((taken <= 1).all()),
        f"rate {taken.mean():.5f}, claimed {rate:.5f}",
    )


def poisson(taken: np.ndarray, rate: float) -> Check:
    """Shuffling makes patients take part equally often, a fixed batch makes steps alike."""
    steps, patients = taken.shape
    over_patients, p_patients = _dispersion(taken.sum(axis=0), steps, rate)
    over_steps, p_steps = _dispersion(taken.sum(axis=1), patients, rate)
    return Check(
        "samples are Poisson, not shuffled and not of a fixed size",
        2 * min(p_patients, p_steps) >= P_FAILS,
        f"participations vary {over_patients:.3f} of the binomial variance over patients, "
        f"{over_steps:.3f} over steps",
    )


def public_rate(build: BuildStep, mechanism: Mechanism, sizes: tuple[int, ...]) -> Check:
    """The rate is the same with one patient more or fewer."""
    rates, p_values = [], []
    for patients in sizes:
        asked: list[int] = []
        step = build(mechanism)
        for _ in range(_COUNTED_STEPS):
            step(range(patients), without_gradient(1, asked.append), 1)
        rates.append(len(asked) / (_COUNTED_STEPS * patients))
        p_values.append(_p_value(len(asked), _COUNTED_STEPS * patients, mechanism.sampling_rate))
    return Check(
        "the rate is a public constant",
        len(sizes) * min(p_values) >= P_FAILS,
        ", ".join(
            f"{rate:.4f} with {patients}" for rate, patients in zip(rates, sizes, strict=True)
        ),
    )


def _dispersion(counts: np.ndarray, trials: int, rate: float) -> tuple[float, float]:
    """Variance of counts over that of Binomial(trials, rate), and a two-sided p-value.

    The ratio of binomial counts has mean 1, a variance that follows from their kurtosis, and
    nearly the skewness of the gamma distribution with these two.
    """
    variance = trials * rate * (1 - rate)
    if variance == 0:  # all take part, and a count that differs fails the check of the rate
        return 1.0, 1.0
    ratio = float(((counts - trials * rate) ** 2).mean()) / variance
    excess = (1 - 6 * rate * (1 - rate)) / variance
    spread = (2 + excess) / len(counts)
    below = float(gamma.cdf(ratio, 1 / spread, scale=spread))
    above = float(gamma.sf(ratio, 1 / spread, scale=spread))
    return ratio, 2 * min(below, above)


def _p_value(count: int, trials: int, rate: float) -> float:
    """Two-sided, of a binomial count."""
    below, above = float(binom.cdf(count, trials, rate)), float(binom.sf(count - 1, trials, rate))
    return min(1.0, 2 * min(below, above))


def telling_sizes(rate: float) -> tuple[int, int, int]:
    """N - 1, N and N + 1, whose products with the rate differ when rounded down, and rounded up."""
    expected = max(1, min(16, int(1000 * rate)))
    middle = max(2, math.ceil(expected / rate))
    return middle - 1, middle, middle + 1
