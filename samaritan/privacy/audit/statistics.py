"""Lower bounds on epsilon from scores of canaries whose membership was decided by coins.

Of m canaries each is in or out by a fair coin. A score is given to each from what was released; the
highest are guessed to be in, the lowest out, r guesses whose number was fixed beforehand, and v of
them are right. Choosing r after looking makes a bound false: over a grid of choices it exceeds zero
without any leakage in two runs of five.

No bound from one run is tight, and each saturates: with all r guesses right it is still finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_ndtr, ndtr, ndtri
from scipy.stats import binom, normaltest

_HALVINGS = 50
_LARGEST = 64.0
"""No guessing shows more, be it epsilon or mu."""


def correct_guesses(scores: np.ndarray, coins: np.ndarray, guesses: int) -> int:
    """How many guesses are right: half of them "in", on the top scores, half "out", on the lowest.

    Args:
        scores: (m,) higher where membership is likelier.
        coins: (m,) bool, True where the canary was in.
        guesses: Even, at most m, fixed before the scores were seen.
    """
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(coins[order[len(order) - half :]].sum() + (~coins[order[:half]]).sum())


def one_run_bound(canaries: int, guesses: int, correct: int, delta: float, alpha: float) -> float:
    """Steinke, Nasr and Jagielski (arXiv 2305.08846, theorem 5.2): holds for any mechanism.

    Returns:
        The largest epsilon that so many right guesses contradict with confidence 1 - alpha; 0 when
        they contradict none.
    """
    fewer = np.arange(1, correct + 1)

    def contradicted(epsilon: float) -> bool:
        chance = float(expit(epsilon))
        at_least = float(binom.sf(correct - 1, guesses, chance))
        extra = binom.sf(correct - 1 - fewer, guesses, chance) - at_least
        slack = 2 * canaries * delta * float(np.max(extra / fewer, initial=0.0))
        return at_least + slack < alpha

    return _largest(contradicted)


def gaussian_one_run_bound(
    canaries: int, guesses: int, correct: int, delta: float, alpha: float
) -> float:
    """Mahloujifar, Melis and Chaudhuri (arXiv 2410.22235): the one-run audit of f-DP.

    Here f is the trade-off of Gaussian noise, to which many subsampled steps converge; a mechanism
    whose losses have lighter tails than Gaussian ones must not be judged by it.

    Returns:
        Epsilon at delta of the largest mu for which so many right guesses contradict mu-GDP with
        confidence 1 - alpha; 0 when they contradict none.
    """
    mu = _largest(lambda mu: _contradicts_gaussian(mu, canaries, guesses, correct, alpha))
    return gaussian_epsilon(mu, delta)


def _contradicts_gaussian(mu: float, m: int, r: int, v: int, alpha: float) -> bool:
    right, wrong = alpha * v / m, alpha * (r - v) / m
    for i in range(v - 1, -1, -1):
        shifted = float(ndtr(ndtri(min(right, 1.0)) - mu)) if right > 0 else 0.0
        least = max(wrong, shifted)
        right, wrong = right + i / (r - i) * (least - wrong), least
        if right + wrong > r / m:
            return True
    return False


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon at delta of mu-GDP (Dong, Roth and Su, arXiv 1905.02383, corollary 2.13)."""
    if mu <= 0:
        return 0.0

    def above_delta(epsilon: float) -> bool:
        left = float(ndtr(-epsilon / mu + mu / 2))
        right = math.exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)))
        return left - right > delta

    return _largest(above_delta, mu * mu / 2 + mu * math.sqrt(-2 * math.log(delta)) + 1)


@dataclass(frozen=True)
class Separation:
    """How far apart the scores of those in and those out lie.

    Attributes:
        mu: Distance of the means, in standard deviations.
        standard_error: Of mu.
        normal_p: p-value of the scores being normal in both groups; 0 where one is constant.
    """

    mu: float
    standard_error: float
    normal_p: float

    def bound(self, delta: float, alpha: float) -> float:
        """A lower bound on epsilon if scores are normal, with confidence 1 - alpha."""
        return gaussian_epsilon(self.mu + float(ndtri(alpha)) * self.standard_error, delta)


def separation(scores: np.ndarray, coins: np.ndarray) -> Separation:
    """The Gaussian indicator, after Andrew et al. (arXiv 2302.03098): parametric, not saturating.

    It reads every score rather than the r surest, and trusts that scores are normal, which is
    tested by skewness and kurtosis (D'Agostino and Pearson), the smaller p-value counting twice.

    Args:
        scores: (m,)
        coins: (m,) bool.
    """
    inside, outside = scores[coins], scores[~coins]
    count = len(scores)
    spread = math.sqrt(
        (inside.var(ddof=1) * (len(inside) - 1) + outside.var(ddof=1) * (len(outside) - 1))
        / (count - 2)
    )
    if inside.std() == 0 or outside.std() == 0:
        return Separation(0.0, 0.0, 0.0)
    mu = float(inside.mean() - outside.mean()) / spread
    error = math.sqrt(1 / len(inside) + 1 / len(outside) + mu * mu / (2 * count))
    p = min(float(normaltest(group).pvalue) for group in (inside, outside))
    return Separation(mu, error, min(1.0, 2 * p))


def _largest(holds: Callable[[float], bool], high: float = _LARGEST) -> float:
    """The end of the interval from 0 on which something holds; 0 where it holds nowhere."""
    low = 0.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low if low > 1e-9 else 0.0
