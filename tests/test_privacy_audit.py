"""The self-audit: what it must flag, what it must leave alone, and its statistics by hand."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from scipy.stats import binom
from torch import Tensor
from typer.testing import CliRunner

from samaritan.cli import audit as audit_command
from samaritan.config import parse_config
from samaritan.errors import PrivacyError
from samaritan.privacy.accounting import Spending, epsilon_of
from samaritan.privacy.audit.canaries import (
    BuildStep,
    SliceGradients,
    Step,
    mean_of_slices,
    observe,
    toss,
    training_step,
)
from samaritan.privacy.audit.check import Check, noise_alone
from samaritan.privacy.audit.claim import Claim, claim_of_budget, claim_of_config
from samaritan.privacy.audit.contribution import contribution_checks
from samaritan.privacy.audit.noise import noise_checks, noise_spread
from samaritan.privacy.audit.participation import participation_checks, poisson, telling_sizes
from samaritan.privacy.audit.report import as_text, as_values
from samaritan.privacy.audit.statistics import (
    correct_guesses,
    gaussian_epsilon,
    gaussian_one_run_bound,
    one_run_bound,
    separation,
)
from samaritan.privacy.audit.verdict import DECIDING_ALPHA, Audit, Bound, audit_mechanism
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.randomness import SystemRandom

# Faults of implementations


def _without_noise(mechanism: Mechanism) -> Step:
    return training_step(replace(mechanism, noise_multiplier=0.0))


def _noise_of_root_batch(mechanism: Mechanism) -> Step:
    return training_step(replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 4))


def _noise_divided_again(mechanism: Mechanism) -> Step:
    return training_step(replace(mechanism, noise_multiplier=mechanism.noise_multiplier / 16))


def _stretched(mechanism: Mechanism, factor: float) -> Mechanism:
    """Contributions up to `factor` clipping norms, under noise of the size that was accounted."""
    return replace(
        mechanism,
        clip_norm=mechanism.clip_norm * factor,
        noise_multiplier=mechanism.noise_multiplier / factor,
        expected_records=mechanism.expected_records,
    )


def _without_clipping(mechanism: Mechanism) -> Step:
    return training_step(_stretched(mechanism, 1e4))


def _weighted_by_records(mechanism: Mechanism) -> Step:
    return training_step(_stretched(mechanism, 2.4))


def _clipped_by_slice(mechanism: Mechanism) -> Step:
    system = SystemRandom()

    def step(patients: Sequence[int], slice_gradients: SliceGradients, size: int) -> Tensor:
        sample = mechanism.sample(patients, system)
        rows = (row for patient in sample for row in slice_gradients(patient))
        return mechanism.release(rows, size, system)

    return step


def _noise_at_end_of_round(mechanism: Mechanism) -> Step:
    noisy, bare = training_step(mechanism), _without_noise(mechanism)
    numbers = itertools.count(1)
    return lambda *given: (noisy if next(numbers) % 20 == 0 else bare)(*given)


def _doubled_rate(mechanism: Mechanism) -> Step:
    return training_step(replace(mechanism, sampling_rate=2 * mechanism.sampling_rate))


_FAULTS: dict[str, BuildStep] = {
    "no noise": _without_noise,
    "noise too small by sqrt(B)": _noise_of_root_batch,
    "noise divided by B again": _noise_divided_again,
    "clipping of each slice": _clipped_by_slice,
    "no clipping": _without_clipping,
    "weighted by records": _weighted_by_records,
    "noise at end of round": _noise_at_end_of_round,
    "doubled rate": _doubled_rate,
}


def _with_noise(mechanism: Mechanism, draw: Callable[[int], Tensor]) -> Step:
    """The real step, its noise replaced."""
    bare, system = replace(mechanism, noise_multiplier=0.0), SystemRandom()
    unit = mechanism.noise_multiplier * mechanism.clip_norm / mechanism.expected_records

    def step(patients: Sequence[int], slice_gradients: SliceGradients, size: int) -> Tensor:
        sample = bare.sample(patients, system)
        vectors = (mean_of_slices(slice_gradients(patient)) for patient in sample)
        noise = draw(size) * unit if mechanism.noise_multiplier else torch.zeros(size)
        return bare.release(vectors, size, system) + noise

    return step


def _with_samples(mechanism: Mechanism, sample: Callable[[Sequence[int]], list[int]]) -> Step:
    """The real step, its sampling replaced."""
    system = SystemRandom()

    def step(patients: Sequence[int], slice_gradients: SliceGradients, size: int) -> Tensor:
        vectors = (mean_of_slices(slice_gradients(patient)) for patient in sample(patients))
        return mechanism.release(vectors, size, system)

    return step


def _noise_reused(mechanism: Mechanism) -> Step:
    kept: dict[int, Tensor] = {}
    return _with_noise(mechanism, lambda size: kept.setdefault(size, torch.randn(size)))


def _noise_restored_each_round(mechanism: Mechanism) -> Step:
    numbers = itertools.count()
    start = random.SystemRandom().randrange(2**40)

    def draw(size: int) -> Tensor:
        generator = torch.Generator().manual_seed(start + next(numbers) % 20)
        return torch.randn(size, generator=generator)

    return _with_noise(mechanism, draw)


def _noise_of_global_seed(mechanism: Mechanism) -> Step:
    return _with_noise(mechanism, torch.randn)


def _noise_of_numpy_seed(mechanism: Mechanism) -> Step:
    return _with_noise(mechanism, lambda size: torch.from_numpy(np.random.normal(size=size)))


def _samples_of_global_seed(mechanism: Mechanism) -> Step:
    def sample(patients: Sequence[int]) -> list[int]:
        return [p for p in patients if random.random() < mechanism.sampling_rate]  # noqa: S311

    return _with_samples(mechanism, sample)


def _shuffled(mechanism: Mechanism) -> Step:
    """Through all patients, then again in another order; batches as large as Poisson ones."""
    queue: list[int] = []
    system = random.SystemRandom()

    def sample(patients: Sequence[int]) -> list[int]:
        batch = len(mechanism.sample(patients, SystemRandom()))
        if len(queue) < batch:
            queue[:] = system.sample(list(patients), len(patients))
        taken, queue[:] = queue[:batch], queue[batch:]
        return taken

    return _with_samples(mechanism, sample)


def _twice_in_a_step(mechanism: Mechanism) -> Step:
    half = replace(mechanism, sampling_rate=mechanism.sampling_rate / 2)
    system = SystemRandom()
    return _with_samples(mechanism, lambda patients: 2 * half.sample(patients, system))


def _fixed_batch(mechanism: Mechanism) -> Step:
    system = random.SystemRandom()
    return _with_samples(
        mechanism,
        lambda patients: system.sample(
            list(patients), round(mechanism.sampling_rate * len(patients))
        ),
    )


def _constants_of_loader(mechanism: Mechanism) -> Step:
    """As Opacus: the rate is one over the number of batches, the divisor int(N * rate)."""

    def step(patients: Sequence[int], slice_gradients: SliceGradients, size: int) -> Tensor:
        if not patients:
            return training_step(mechanism)(patients, slice_gradients, size)
        batch = max(1, int(len(patients) * mechanism.sampling_rate))
        rate = 1 / -(-len(patients) // batch)
        scaled = int(len(patients) * rate) / (len(patients) * mechanism.sampling_rate)
        loader = replace(
            mechanism,
            sampling_rate=rate,
            expected_records=mechanism.expected_records * scaled,
        )
        return training_step(loader)(patients, slice_gradients, size)

    return step


def _divided_by_sample(mechanism: Mechanism) -> Step:
    def step(patients: Sequence[int], slice_gradients: SliceGradients, size: int) -> Tensor:
        system = SystemRandom()
        sample = mechanism.sample(patients, system)
        actual = replace(mechanism, expected_records=float(max(1, len(sample))))
        return actual.release((mean_of_slices(slice_gradients(p)) for p in sample), size, system)

    return step


def _noise_after_division(mechanism: Mechanism) -> Step:
    """The sum is divided by the sample's size, the noise by the public constant."""
    bare = _divided_by_sample(replace(mechanism, noise_multiplier=0.0))
    return lambda *given: bare(*given) + training_step(mechanism)([], given[1], given[2])


def _weaker_first_step(mechanism: Mechanism) -> Step:
    weaker = replace(mechanism, noise_multiplier=0.85 * mechanism.noise_multiplier)
    steps = itertools.chain([training_step(weaker)], itertools.repeat(training_step(mechanism)))
    return lambda *given: next(steps)(*given)


def _quiet_when_empty(mechanism: Mechanism) -> Step:
    system = SystemRandom()

    def step(patients: Sequence[int], slice_gradients: SliceGradients, size: int) -> Tensor:
        sample = mechanism.sample(patients, system)
        if not sample:
            return torch.zeros(size)
        vectors = (mean_of_slices(slice_gradients(patient)) for patient in sample)
        return mechanism.release(vectors, size, system)

    return step


def _passing_nan(mechanism: Mechanism) -> Step:
    """As a clip by min(1, limit / norm): what is not finite passes."""
    system = SystemRandom()

    def step(patients: Sequence[int], slice_gradients: SliceGradients, size: int) -> Tensor:
        vectors = [mean_of_slices(slice_gradients(p)) for p in mechanism.sample(patients, system)]
        released = mechanism.release(vectors, size, system)
        return released + sum((v * 0 for v in vectors if v.isnan().any()), torch.zeros(size))

    return step


_RATE = "patients take part at the claimed rate, at most once in a step"
_PUBLIC_RATE = "the rate is a public constant"
_POISSON = "samples are Poisson, not shuffled and not of a fixed size"
_CLIPPED = "one patient adds no more than the clipping norm, whatever its slices hold"
_DIVISOR = "the divisor is a public constant"
_NOISY = "noise of the claimed size is in every step, with an empty sample too"
_FRESH = "noise is new in every step"
_SEEDED = "no seed of Python, NumPy or torch decides noise or samples"

_UNSEEN_FAULTS: dict[str, tuple[BuildStep, str]] = {
    "noise reused in every step": (_noise_reused, _FRESH),
    "noise restored in every round": (_noise_restored_each_round, _FRESH),
    "noise of torch's seed": (_noise_of_global_seed, _SEEDED),
    "noise of NumPy's seed": (_noise_of_numpy_seed, _SEEDED),
    "samples of Python's seed": (_samples_of_global_seed, _SEEDED),
    "shuffled": (_shuffled, _POISSON),
    "patients twice in a step": (_twice_in_a_step, _RATE),
    "batches of a fixed size": (_fixed_batch, _POISSON),
    "rate and divisor from the loader": (_constants_of_loader, _DIVISOR),
    "rate of the loader": (_constants_of_loader, _PUBLIC_RATE),
    "divisor is the sample's size": (_divided_by_sample, _DIVISOR),
    "noise after division": (_noise_after_division, _DIVISOR),
    "first step with less noise": (_weaker_first_step, _NOISY),
    "no step with an empty sample": (_quiet_when_empty, _NOISY),
    "gradients that are not numbers pass": (_passing_nan, _CLIPPED),
    "weighted by records": (_weighted_by_records, _CLIPPED),
    "clipping of each slice": (_clipped_by_slice, _CLIPPED),
    "noise at end of round": (_noise_at_end_of_round, _NOISY),
    "doubled rate": (_doubled_rate, _RATE),
}


def _checks(group: str, build: BuildStep, claim: Claim) -> list[Check]:
    step = claim.mechanism
    sizes = telling_sizes(step.sampling_rate)
    if group == "contribution":
        return contribution_checks(build, step, claim.slices, sizes)
    if group == "noise":
        return noise_checks(build, step)
    taken = observe(claim, build, np.arange(1000) % 2 == 0).taken
    return participation_checks(build, step, taken, sizes)


@pytest.fixture(scope="module")
def short() -> Claim:
    """Epsilon 2 in 25 steps, as easy to contradict as 400 steps at a quarter of the rate."""
    return claim_of_budget(sampling_rate=0.2, steps=25)


@pytest.mark.parametrize("fault", _UNSEEN_FAULTS)
def test_what_no_sum_can_show_fails_its_check(fault: str, short: Claim) -> None:
    build, name = _UNSEEN_FAULTS[fault]
    groups = {
        _CLIPPED: "contribution", _DIVISOR: "contribution", _NOISY: "noise", _FRESH: "noise",
        _SEEDED: "noise", _RATE: "participation", _POISSON: "participation",
        _PUBLIC_RATE: "participation",
    }  # fmt: skip
    checks = _checks(groups[name], build, short)
    assert name in {check.name for check in checks if not check.passed}


@pytest.mark.parametrize(("rate", "steps"), [(0.05, 60), (0.002, 50), (0.4, 20), (1.0, 4)], ids=str)
def test_the_real_step_passes_every_check(rate: float, steps: int, short: Claim) -> None:
    claim = replace(
        short,
        steps=steps,
        mechanism=Mechanism(rate, 1.3, 0.25, 77.0),
    )
    for group in ("contribution", "noise", "participation"):
        assert [c for c in _checks(group, training_step, claim) if not c.passed] == []


@pytest.mark.parametrize(("rate", "steps"), [(0.002, 50), (0.2, 25), (0.05, 400)], ids=str)
def test_poisson_samples_are_not_taken_for_shuffled_ones(rate: float, steps: int) -> None:
    generator = np.random.default_rng(5)
    for _ in range(200):
        assert poisson(generator.random((steps, 300)) < rate, rate).passed


# What the experiment flags


def _flags(claim: Claim, build: BuildStep, trainings: int) -> list[tuple[bool, ...]]:
    """For each training: flagged by one run, by f-DP, by the indicator, by any of them."""
    flags = []
    for _ in range(trainings):
        inside = toss(1, 1000).inside[0]
        scores = observe(claim, build, inside).scores
        seen = len(inside), 200, correct_guesses(scores, inside, 200), claim.delta, DECIDING_ALPHA
        apart = separation(scores, inside)
        found = (
            one_run_bound(*seen) > claim.epsilon,
            gaussian_one_run_bound(*seen) > claim.epsilon,
            apart.normal_p >= 0.001 and apart.bound(claim.delta, DECIDING_ALPHA) > claim.epsilon,
        )
        flags.append((*found, any(found)))
    return flags


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")  # pytest -s shows it


def _matrix(claim: Claim, trainings: int) -> dict[str, int]:
    """How often each implementation is flagged; prints by which statistic."""
    flagged = {}
    _tell(f"\nepsilon {claim.epsilon:.2f}: {'one run':>28} {'f-DP':>7} {'Gauss':>7} {'any':>7}")
    for name, build in {"correct": training_step, **_FAULTS}.items():
        counts = np.sum(_flags(claim, build, trainings), axis=0)
        _tell(f"{name:34} " + " ".join(f"{count:>5}/{trainings}" for count in counts))
        flagged[name] = int(counts[-1])
    return flagged


def test_each_fault_is_flagged_and_the_real_step_is_not(short: Claim) -> None:
    flagged = _matrix(short, trainings=3)
    assert flagged.pop("correct") == 0
    assert flagged.pop("doubled rate") >= 2  # the check of the rate never misses it
    assert set(flagged.values()) == {3}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_trainings_of_each_fault_are_flagged_and_none_of_the_real_step() -> None:
    flagged = _matrix(claim_of_budget(), trainings=20)
    assert flagged.pop("correct") == 0
    assert flagged.pop("doubled rate") >= 18
    assert flagged == {name: 20 for name in _FAULTS if name != "doubled rate"}


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_audits_of_the_real_step_find_no_violation() -> None:
    claim = claim_of_budget()
    audits = [audit_mechanism(claim) for _ in range(20)]
    assert [audit.violations for audit in audits] == [[]] * 20


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_large_claims_are_contradicted_by_the_indicator() -> None:
    claim = claim_of_budget(epsilon=8.0)
    flagged = _matrix(claim, trainings=5)
    assert flagged.pop("correct") == 0
    flagged.pop("no noise")  # its scores are not normal; the check of noise is what finds it
    assert set(flagged.values()) == {5}
    assert not noise_spread(noise_alone(_without_noise, claim.mechanism, 40, 1000)).passed


# Statistics


@pytest.mark.parametrize(
    ("canaries", "means"),
    [
        (100, (0.85, 1.44, 2.67)),
        (300, (1.24, 2.08, 3.46)),
        (1000, (1.52, 2.44, 3.80)),
        (3000, (1.68, 2.56, 4.03)),
    ],
)
def test_bounds_of_gaussian_noise_are_those_of_the_calibration(
    canaries: int, means: tuple[float, float, float]
) -> None:
    generator = np.random.default_rng(0)
    bounds = []
    for _ in range(40):
        coins = generator.random(canaries) < 0.5
        scores = generator.normal(size=canaries) + coins
        guesses = canaries // 5
        seen = canaries, guesses, correct_guesses(scores, coins, guesses), 1e-5, 0.05
        bounds.append(
            (
                one_run_bound(*seen),
                gaussian_one_run_bound(*seen),
                separation(scores, coins).bound(1e-5, 0.05),
            )
        )
    assert np.allclose(np.mean(bounds, axis=0), means, atol=0.15)
    true_epsilon = gaussian_epsilon(1.0, 1e-5)
    assert (np.array(bounds) > true_epsilon).mean(axis=0).max() <= 0.1


def test_the_bound_of_f_dp_is_that_of_an_independent_implementation() -> None:
    published = {200: 8.03, 190: 4.34, 170: 2.52, 150: 1.48}
    found = {v: gaussian_one_run_bound(1000, 200, v, 1e-6, 0.05) for v in published}
    assert found == pytest.approx(published, abs=0.05)


def test_epsilon_of_a_gaussian_is_that_of_the_accountant() -> None:
    for mu in (0.3, 1.0, 3.0):
        accounted = epsilon_of([Spending(1.0, 1 / mu, 1)], 1e-5).pld
        assert gaussian_epsilon(mu, 1e-5) == pytest.approx(accounted, rel=2e-3)


def test_without_delta_all_guesses_right_show_what_the_formula_says() -> None:
    for guesses in (50, 200, 1000):
        expected = -np.log(0.05 ** (-1 / guesses) - 1)
        assert one_run_bound(10 * guesses, guesses, guesses, 0.0, 0.05) == pytest.approx(expected)


def test_the_p_value_at_a_bound_is_that_of_the_theorem() -> None:
    canaries, guesses, correct, delta, alpha = 1000, 60, 50, 1e-5, 0.01
    bound = one_run_bound(canaries, guesses, correct, delta, alpha)
    right = np.exp(bound) / (1 + np.exp(bound))
    chances = binom.pmf(np.arange(guesses + 1), guesses, right)
    extra = max(chances[correct - i : correct].sum() / i for i in range(1, correct + 1))
    assert chances[correct:].sum() + 2 * canaries * delta * extra == pytest.approx(alpha)


def test_the_error_of_the_indicator_is_the_spread_of_its_estimates() -> None:
    generator = np.random.default_rng(4)
    found = []
    for _ in range(400):
        coins = generator.random(300) < 0.5
        found.append(separation(generator.normal(size=300) + 3 * coins, coins))
    spread = np.std([one.mu for one in found])
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.1)
    assert np.mean([one.mu for one in found]) == pytest.approx(3, rel=0.02)


def test_randomised_response_is_bounded_from_below_its_epsilon() -> None:
    generator = np.random.default_rng(1)
    chance, epsilon, above = np.exp(2) / (1 + np.exp(2)), 2.0, 0
    for _ in range(100):
        coins = generator.random(1000) < 0.5
        answers = np.where(generator.random(1000) < chance, coins, ~coins)
        scores = answers + generator.random(1000) / 2
        above += one_run_bound(1000, 200, correct_guesses(scores, coins, 200), 0, 0.05) > epsilon
    assert above <= 10


def test_no_leakage_is_taken_for_some_in_at_most_one_case_of_twenty() -> None:
    for bound in (one_run_bound, gaussian_one_run_bound):
        least = next(v for v in range(201) if bound(1000, 200, v, 1e-5, 0.05) > 0)
        assert 0.005 < binom.sf(least - 1, 200, 0.5) <= 0.05


def test_four_hundred_runs_without_leakage_raise_few_alarms() -> None:
    @functools.cache
    def alarming(correct: int) -> tuple[bool, bool]:
        seen = 500, 100, correct, 1e-5, 0.05
        return one_run_bound(*seen) > 0, gaussian_one_run_bound(*seen) > 0

    generator = np.random.default_rng(2)
    alarms = np.zeros(3)
    for _ in range(400):
        coins, scores = generator.random(500) < 0.5, generator.normal(size=500)
        alarms += (
            *alarming(correct_guesses(scores, coins, 100)),
            separation(scores, coins).bound(1e-5, 0.05) > 0,
        )
    _tell(f"\nalarms of one run, f-DP, indicator in 400 runs without leakage: {alarms}")
    assert (alarms <= 0.05 * 400).all()


def test_guesses_are_the_highest_and_lowest_scores() -> None:
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    coins = np.array([True, False, True, False, True, False])
    assert correct_guesses(scores, coins, 2) == 2
    assert correct_guesses(scores, coins, 4) == 2
    assert correct_guesses(-scores, coins, 2) == 0


def test_scores_that_are_not_normal_leave_the_indicator_without_a_vote() -> None:
    generator = np.random.default_rng(3)
    coins = generator.random(1000) < 0.5
    assert separation(generator.normal(size=1000), coins).normal_p > 0.01
    assert separation(generator.standard_cauchy(1000), coins).normal_p < 0.001
    assert separation(coins * 1.0, coins).normal_p == 0


# The audit as a whole


@pytest.fixture(scope="module")
def audited(short: Claim) -> Audit:
    return audit_mechanism(short, canaries=400, repeats=2)


def test_the_claim_is_the_accountants_epsilon(short: Claim) -> None:
    step = short.mechanism
    accounted = epsilon_of([Spending(step.sampling_rate, step.noise_multiplier, 25)], 1e-5)
    assert short.epsilon == accounted.pld
    assert 1.9 < short.epsilon <= 2.0


def test_coins_are_committed_to_before_the_first_step(short: Claim) -> None:
    told: list[str] = []
    steps: list[int] = []

    def build(mechanism: Mechanism) -> Step:
        steps.append(len(told))
        return training_step(mechanism)

    audit = audit_mechanism(replace(short, steps=5), build, canaries=100, note=told.append)
    assert audit.commitment in told[0]
    assert min(steps) >= 1
    opened = hashlib.sha256(bytes.fromhex(audit.nonce) + bytes.fromhex(audit.coins))
    assert opened.hexdigest() == audit.commitment
    other = audit_mechanism(replace(short, steps=5), canaries=100)
    assert (other.coins, other.nonce) != (audit.coins, audit.nonce)


def test_repeats_are_judged_together(audited: Audit) -> None:
    assert (audited.canaries, audited.guesses) == (800, 160)
    assert audited.violations == []
    assert len(audited.checks) == 8


def _with_bound(audit: Audit, reported: float, deciding: float, votes: bool = True) -> Audit:
    largest = Bound("largest detectable", 9.0, 8.0)
    bound = Bound("one run", reported, deciding, votes)
    return replace(audit, bounds=(bound,), largest_detectable=largest)


def test_a_bound_above_the_claim_is_a_violation_only_if_it_may_decide(audited: Audit) -> None:
    assert _with_bound(audited, 1.0, 0.5).verdict == "CONSISTENT"
    assert _with_bound(audited, 3.0, 2.5).verdict == "VIOLATION"
    assert _with_bound(audited, 3.0, 2.5, votes=False).verdict == "CONSISTENT"
    assert _with_bound(audited, 2.5, 1.5).verdict == "INCONCLUSIVE"


def test_a_failed_check_is_a_violation(audited: Audit) -> None:
    failed = replace(audited.checks[0], passed=False)
    audit = replace(_with_bound(audited, 1.0, 0.5), checks=(failed, *audited.checks[1:]))
    assert audit.verdict == "VIOLATION"
    assert failed.name in audit.violations[0]


def test_a_claim_beyond_what_guesses_can_show_is_inconclusive(audited: Audit) -> None:
    few = replace(_with_bound(audited, 1.0, 0.5), largest_detectable=Bound("", 2.5, 1.9))
    assert few.verdict == "INCONCLUSIVE"
    assert "at most epsilon 1.90" in few.doubts[0]
    assert "INCONCLUSIVE" in as_text(few)


def test_every_report_tells_its_limits_and_never_calls_an_epsilon_verified(
    audited: Audit,
) -> None:
    text = as_text(audited)
    for phrase in ("cannot be tight", "saturates", "never verifies", "largest detectable"):
        assert phrase in text
    assert "was verified" not in text
    values = json.loads(json.dumps(as_values(audited), allow_nan=False))
    assert values["claimed"]["epsilon"] == audited.claim.epsilon
    assert values["claimed"]["adjacency"] == "add/remove one"
    assert [bound["method"] for bound in values["epsilon_at_least"]] == [
        "one run",
        "one run, f-DP",
        "Gaussian indicator",
    ]
    assert len(values["limits"]) >= 3


def test_seeding_for_the_checks_leaves_the_generators_of_others_alone(short: Claim) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = random.random(), np.random.random(), float(torch.rand(1))  # noqa: S311
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    noise_checks(training_step, short.mechanism)
    found = random.random(), np.random.random(), float(torch.rand(1))  # noqa: S311
    assert found == expected


# Numbers and commands


def _config(privacy: dict[str, object]) -> dict[str, object]:
    return {"rounds": 3, "privacy": privacy}


def test_a_configuration_names_the_claim_of_its_whole_run() -> None:
    privacy = {
        "unit": "patient",
        "epsilon": 4.0,
        "records": {"north": 120, "south": 60},
        "steps_per_round": 8,
        "sampling_rate": 0.2,
        "clip_norm": 0.5,
        "slices_per_patient": 3,
    }
    claim = claim_of_config(parse_config(_config(privacy)))
    assert (claim.steps, claim.slices, claim.unit) == (24, 3, "patient")
    assert claim.mechanism.clip_norm == 0.5
    assert claim.mechanism.expected_records == pytest.approx(24)
    assert 3.9 < claim.epsilon <= 4.0


@pytest.mark.parametrize(("unit", "rate", "steps"), [("slice", 0.2, 30), ("site", 1.0, 3)])
def test_a_record_that_is_no_patient_has_one_gradient(unit: str, rate: float, steps: int) -> None:
    privacy = {
        "unit": unit, "epsilon": 4.0, "records": 50, "steps_per_round": 10, "sampling_rate": 0.2,
    }  # fmt: skip
    claim = claim_of_config(parse_config(_config(privacy)))
    assert (claim.slices, claim.unit, claim.steps) == (1, unit, steps)
    assert claim.mechanism.sampling_rate == rate


def test_a_configuration_without_a_guarantee_is_refused() -> None:
    with pytest.raises(PrivacyError, match="SAM-P401"):
        claim_of_config(parse_config({}))


@pytest.mark.parametrize(
    ("canaries", "guesses", "repeats"), [(99, 20, 1), (100, 21, 1), (100, 102, 1), (100, 20, 0)]
)
def test_numbers_that_make_no_audit_are_refused(
    short: Claim, canaries: int, guesses: int, repeats: int
) -> None:
    with pytest.raises(PrivacyError, match="SAM-P403"):
        audit_mechanism(short, canaries=canaries, guesses=guesses, repeats=repeats)


def test_a_release_that_is_not_finite_ends_the_audit(short: Claim) -> None:
    with pytest.raises(PrivacyError, match="SAM-P402"):
        audit_mechanism(short, lambda _: lambda _p, _g, size: torch.full((size,), torch.nan))


def _run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.add_typer(audit_command.app, name="audit")
    result = CliRunner().invoke(app, ["audit", "privacy", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_the_command_audits_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(
        json.dumps(_config({"unit": "patient", "epsilon": 1.5, "records": 100})), encoding="utf-8"
    )
    status, text = _run("--config", str(path), "--canaries", "200", "--json")
    values = json.loads(text)
    assert status == 0
    assert values["verdict"] != "VIOLATION"
    assert values["claimed"]["epsilon"] <= 1.5
    assert values["claimed"]["steps"] == 60
    with pytest.raises(PrivacyError, match="SAM-P404"):
        _run("--config", str(path), "--steps", "3")


def test_the_command_ends_with_status_1_on_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    release = Mechanism.release

    def without_noise(self: Mechanism, *given: object, **named: object) -> Tensor:
        return release(replace(self, noise_multiplier=0.0), *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Mechanism, "release", without_noise)
    status, text = _run("--sampling-rate", "0.2", "--steps", "25", "--canaries", "400")
    assert status == 1
    assert "VIOLATION" in text
    assert f"FAILED  {_NOISY}" in text
