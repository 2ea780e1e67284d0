"""The audit as a whole: run the experiment, bound epsilon from below, judge.

Bounds are reported with 95 % confidence, but the verdict takes 99.9 %: an audit runs again and
again, at every site, by three statistics, and the true value of a right implementation lies close
under the claim, so that at 95 % a few right ones in a hundred would be accused. Implementations
that are wrong lie far beyond either.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from samaritan.errors import PrivacyError
from samaritan.privacy.audit.canaries import BuildStep, observe, toss, training_step
from samaritan.privacy.audit.check import Check
from samaritan.privacy.audit.claim import Claim
from samaritan.privacy.audit.contribution import contribution_checks
from samaritan.privacy.audit.noise import noise_checks
from samaritan.privacy.audit.participation import participation_checks, telling_sizes
from samaritan.privacy.audit.statistics import (
    Separation,
    correct_guesses,
    gaussian_one_run_bound,
    one_run_bound,
    separation,
)

Verdict = Literal["CONSISTENT", "VIOLATION", "INCONCLUSIVE"]

REPORTED_ALPHA, DECIDING_ALPHA = 0.05, 0.001
_P_NORMAL = 0.001
"""Scores less likely to be normal than this leave the Gaussian indicator without a vote."""

_FEWEST_CANARIES = 100


@dataclass(frozen=True)
class Bound:
    """A lower bound on epsilon.

    Attributes:
        method: Its statistic.
        reported: With 95 % confidence.
        deciding: With 99.9 %.
        votes: Whether its assumptions hold, so that it may contradict the claim.
    """

    method: str
    reported: float
    deciding: float
    votes: bool = True


@dataclass(frozen=True)
class Audit:
    """Claim, evidence and verdict.

    Attributes:
        claim: What was to be contradicted.
        canaries: In all repeats together.
        guesses: Fixed beforehand, in all repeats together.
        correct: Guesses that were right.
        commitment: Told before the first step.
        coins: As they were committed to, packed, in hexadecimal digits.
        nonce: Opens the commitment, likewise.
        bounds: From the experiment with canaries.
        separation: Behind the Gaussian indicator.
        largest_detectable: What the f-DP bound would be if every guess had been right.
        checks: Of what no final sum can show.
        seconds: It took.
    """

    claim: Claim
    canaries: int
    guesses: int
    correct: int
    commitment: str
    coins: str
    nonce: str
    bounds: tuple[Bound, ...]
    separation: Separation
    largest_detectable: Bound
    checks: tuple[Check, ...]
    seconds: float

    @property
    def violations(self) -> list[str]:
        """What contradicts the claim."""
        beyond = [
            f"{bound.method}: epsilon is at least {bound.deciding:.2f}, claimed "
            f"{self.claim.epsilon:.2f}"
            for bound in self.bounds
            if bound.votes and bound.deciding > self.claim.epsilon
        ]
        return beyond + [f"not so: {check.name}" for check in self.checks if not check.passed]

    @property
    def doubts(self) -> list[str]:
        """Why an audit without contradiction proves even less than it otherwise does."""
        found = []
        if self.largest_detectable.deciding < self.claim.epsilon:
            found.append(
                f"{self.guesses} guesses show at most epsilon "
                f"{self.largest_detectable.deciding:.2f} at 99.9 %, claimed is "
                f"{self.claim.epsilon:.2f}; raise --canaries, --guesses or --repeats, and audit "
                "the same code at epsilon 2, which is what it does without --config"
            )
        found += [
            f"{bound.method}: the bound at 95 % exceeds the claim, that at 99.9 % does not; run "
            "again with more --repeats"
            for bound in self.bounds
            if bound.votes and bound.deciding <= self.claim.epsilon < bound.reported
        ]
        return found

    @property
    def verdict(self) -> Verdict:
        """Violation where something contradicts the claim, else inconclusive where in doubt."""
        if self.violations:
            return "VIOLATION"
        return "INCONCLUSIVE" if self.doubts else "CONSISTENT"


def audit_mechanism(
    claim: Claim,
    build: BuildStep = training_step,
    canaries: int = 1000,
    guesses: int | None = None,
    repeats: int = 1,
    note: Callable[[str], None] = lambda _: None,
) -> Audit:
    """Audits an implementation against a claim.

    Repeats are independent trainings on canaries of their own. As each canary is in one of them
    alone, together they are one mechanism with the same guarantee, and their scores are judged as
    those of one run with more canaries.

    Args:
        claim: To be contradicted.
        build: The implementation.
        canaries: In each repeat.
        guesses: In each repeat; a fifth of the canaries by default.
        repeats: Trainings.
        note: Told the commitment before the first step, then of every repeat.

    Raises:
        PrivacyError: SAM-P403 for numbers no audit can be made with, SAM-P402 for releases that
            cannot be read.
    """
    start = time.monotonic()
    guesses = canaries // 10 * 2 if guesses is None else guesses
    _check_numbers(canaries, guesses, repeats)
    coins = toss(repeats, canaries)
    note(
        f"coins committed to, SHA-256 {coins.commitment}; {guesses * repeats} guesses will be made"
    )
    runs = []
    for number, inside in enumerate(coins.inside, start=1):
        note(f"repeat {number} of {repeats}: {claim.steps} steps over {inside.sum()} canaries")
        runs.append(observe(claim, build, inside))
    scores, inside = np.concatenate([run.scores for run in runs]), coins.inside.ravel()
    total, made = len(scores), guesses * repeats
    correct = correct_guesses(scores, inside, made)
    apart = separation(scores, inside)
    taken = np.concatenate([run.taken for run in runs], axis=1)
    return Audit(
        claim=claim,
        canaries=total,
        guesses=made,
        correct=correct,
        commitment=coins.commitment,
        coins=coins.packed.hex(),
        nonce=coins.nonce.hex(),
        bounds=_bounds(total, made, correct, apart, claim.delta),
        separation=apart,
        largest_detectable=_bound(
            "largest detectable", partial(gaussian_one_run_bound, total, made, made, claim.delta)
        ),
        checks=_checks(claim, build, taken),
        seconds=time.monotonic() - start,
    )


def _bounds(
    canaries: int, guesses: int, correct: int, apart: Separation, delta: float
) -> tuple[Bound, ...]:
    seen = canaries, guesses, correct, delta
    return (
        _bound("one run", partial(one_run_bound, *seen)),
        _bound("one run, f-DP", partial(gaussian_one_run_bound, *seen)),
        _bound("Gaussian indicator", partial(apart.bound, delta), apart.normal_p >= _P_NORMAL),
    )


def _bound(method: str, at: Callable[[float], float], votes: bool = True) -> Bound:
    return Bound(method, at(REPORTED_ALPHA), at(DECIDING_ALPHA), votes)


def _checks(claim: Claim, build: BuildStep, taken: np.ndarray) -> tuple[Check, ...]:
    step = claim.mechanism
    sizes = telling_sizes(step.sampling_rate)
    return (
        *contribution_checks(build, step, claim.slices, sizes),
        *noise_checks(build, step),
        *participation_checks(build, step, taken, sizes),
    )


def _check_numbers(canaries: int, guesses: int, repeats: int) -> None:
    if canaries >= _FEWEST_CANARIES and 2 <= guesses <= canaries and guesses % 2 == 0 < repeats:
        return
    raise PrivacyError(
        "SAM-P403",
        f"no audit can be made with {canaries} canaries, {guesses} guesses and {repeats} repeats",
        f"Take at least {_FEWEST_CANARIES} canaries, an even number of guesses from 2 up to the "
        "canaries, and one repeat or more.",
    )
