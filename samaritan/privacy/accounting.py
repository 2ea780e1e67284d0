"""What a mechanism costs: epsilon of steps that were or will be taken.

Two accountants that share no code: privacy loss distributions of dp-accounting, whose value is
reported, and Renyi moments of Opacus, which bound the same quantity less tightly. A value of the
second below the first means that one of them is wrong, and nothing is released on a guess.

Adjacency is add/remove of one record, sampling is Poisson; epsilon (delta) is an upper bound.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from dp_accounting import (
    ComposedDpEvent,
    GaussianDpEvent,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
)
from dp_accounting.pld import PLDAccountant
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from samaritan.errors import PrivacyError

_SLACK = 1e-3
"""Share by which the looser bound may lie below the tighter: both round on grids of their own."""

_ORDERS = (
    *(1.5, 1.75, 2.25, 2.5, 2.75, 3.25, 3.5, 4.5),
    *range(2, 65), 80, 100, 128, 200, 256, 400, 512, 1024,
)  # fmt: skip
"""Orders of the Renyi moments: whole ones, which cost little, and others where they lie far apart;
large ones for a small epsilon."""

_FINE, _COARSE, _LARGE_EPSILON = 1e-4, 1e-3, 12.0
"""Grids of losses. Where epsilon is large, the fine one takes many seconds to say little more."""


@dataclass(frozen=True)
class Spending:
    """Steps of one mechanism.

    Attributes:
        sampling_rate: Poisson; 1 where nothing is sampled.
        noise_multiplier: Standard deviation of the noise over the clipping norm.
        steps: How many.
    """

    sampling_rate: float
    noise_multiplier: float
    steps: int


@dataclass(frozen=True)
class Epsilon:
    """An upper bound, from both accountants.

    Attributes:
        pld: Reported.
        rdp: The cross-check, not below it.
    """

    pld: float
    rdp: float


def epsilon_of(spent: Sequence[Spending], delta: float) -> Epsilon:
    """Epsilon of all these steps together, by both accountants.

    Raises:
        PrivacyError: SAM-P001 when an accountant gives no finite number, SAM-P002 when the two
            contradict each other; never is there an "unknown".
    """
    merged: dict[tuple[float, float], int] = {}
    for item in spent:
        key = item.sampling_rate, item.noise_multiplier
        merged[key] = merged.get(key, 0) + item.steps
    return _epsilon(tuple((*key, steps) for key, steps in sorted(merged.items()) if steps), delta)


@functools.lru_cache(maxsize=1024)
def _epsilon(merged: tuple[tuple[float, float, int], ...], delta: float) -> Epsilon:
    if not merged:
        return Epsilon(0.0, 0.0)
    try:
        moments = _by_moments(merged, delta)
        interval = _FINE if moments < _LARGE_EPSILON else _COARSE
        found = Epsilon(_by_loss_distribution(merged, delta, interval), moments)
    except Exception as error:  # two libraries, and any doubt ends the run
        raise PrivacyError(
            "SAM-P001",
            f"an accountant failed on {merged}, delta {delta}: {error}",
            "Raise privacy.noise_multiplier or lower the number of steps.",
        ) from error
    if not (math.isfinite(found.pld) and math.isfinite(found.rdp)):
        raise PrivacyError(
            "SAM-P001",
            f"epsilon of {merged}, delta {delta}, is {found.pld} and {found.rdp}",
            "Raise privacy.noise_multiplier or lower the number of steps.",
        )
    if found.rdp < found.pld * (1 - _SLACK):
        raise PrivacyError(
            "SAM-P002",
            f"the accountants contradict each other on {merged}, delta {delta}: epsilon "
            f"{found.pld:.4f} by loss distributions, {found.rdp:.4f} by Renyi moments",
            "Do not release anything; report these numbers to the makers of Samaritan.",
        )
    return found


def _by_loss_distribution(
    merged: Sequence[tuple[float, float, int]], delta: float, interval: float
) -> float:
    accountant = PLDAccountant(value_discretization_interval=interval)
    accountant.compose(
        ComposedDpEvent(
            [
                SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
                for rate, noise, steps in merged
            ]
        )
    )
    return float(accountant.get_epsilon(delta))


def _by_moments(merged: Sequence[tuple[float, float, int]], delta: float) -> float:
    moments = sum(
        compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=_ORDERS)
        for rate, noise, steps in merged
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the first or last: still a bound
        epsilon, _ = get_privacy_spent(orders=_ORDERS, rdp=moments, delta=delta)
    return float(epsilon)


@functools.lru_cache(maxsize=256)
def noise_for(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    """The least noise multiplier with which so many steps stay within a budget.

    Found by bisection to a thousandth, on the side of more noise.

    Raises:
        PrivacyError: SAM-P003 when no sensible amount of noise is enough.
    """

    # A coarse grid of losses costs a tenth of the time, and errs on the side of more noise.
    def within(noise: float) -> bool:
        return _by_loss_distribution([(sampling_rate, noise, steps)], delta, _COARSE) <= epsilon

    # Renyi moments cost nothing and give a multiplier that is enough, and little too large.
    def surely(noise: float) -> bool:
        return _by_moments([(sampling_rate, noise, steps)], delta) <= epsilon

    high = 0.3
    while not surely(high):
        high *= 1.25
        if high > _MOST_NOISE:
            raise PrivacyError(
                "SAM-P003",
                f"no noise multiplier up to {_MOST_NOISE:g} keeps {steps} steps at rate "
                f"{sampling_rate:g} within epsilon {epsilon:g}, delta {delta:g}",
                "Take fewer steps, a lower rate of sampling, or a larger budget.",
            )
    low = high / 1.6
    while low > _LEAST_NOISE and within(low):
        high, low = low, low / 1.6
    while high - low > high * 1e-3:
        middle = (low + high) / 2
        if within(middle):
            high = middle
        else:
            low = middle
    return math.ceil(high * 1e4) / 1e4


_LEAST_NOISE, _MOST_NOISE = 0.1, 1e4
