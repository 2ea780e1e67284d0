"""Sampling, clipping, sum, noise: each rule of DP-SGD that a plain implementation gets wrong."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from samaritan.privacy.adaptive import AdaptiveClip, count_noise
from samaritan.privacy.mechanism import Mechanism, clipped_to_grid
from samaritan.privacy.plan import privacy_plan, standard_delta
from samaritan.privacy.randomness import SystemRandom

STEPS = 2**30
PUBLIC = Mechanism(
    sampling_rate=0.2, noise_multiplier=1.0, clip_norm=2.0, expected_records=10.0
)  # fmt: skip
ALMOST_SILENT = Mechanism(1.0, 1e-12, 2.0, 10.0)


def seed_everything():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# Randomness.


def test_nothing_that_is_seeded_reaches_the_noise_or_the_sample():
    draws = []
    for _ in range(2):
        seed_everything()
        source = SystemRandom()
        mean = PUBLIC.release([], 1000, source)
        draws.append((mean, PUBLIC.sample(range(1000), source), source.words(4).tolist()))
    assert not torch.equal(draws[0][0], draws[1][0])
    assert draws[0][1] != draws[1][1]
    assert draws[0][2] != draws[1][2]


def test_a_stream_never_gives_the_same_noise_again():
    source = SystemRandom()
    one, two = PUBLIC.release([], 4000, source), PUBLIC.release([], 4000, source)
    scale = PUBLIC.noise_multiplier * PUBLIC.clip_norm / PUBLIC.expected_records
    assert float((one - two).std()) == pytest.approx(math.sqrt(2) * scale, rel=0.1)


def test_normal_numbers_have_the_moments_and_tails_of_a_normal():
    values = SystemRandom().gaussian(1_000_001)
    assert values.shape == (1_000_001,)
    assert abs(values.mean()) < 5e-3
    assert values.std() == pytest.approx(1, abs=5e-3)
    assert (values**4).mean() == pytest.approx(3, abs=0.06)
    for limit, share in ((1, 0.3173), (2, 0.0455), (3, 0.0027)):
        assert (abs(values) > limit).mean() == pytest.approx(share, rel=0.1)
    halves = np.split(values[:-1], 2)  # the two halves of Box and Muller's pairs
    assert abs(np.corrcoef(*halves)[0, 1]) < 5e-3


def test_uniform_numbers_are_never_zero_and_fill_their_range():
    values = SystemRandom().uniform(100_000)
    assert values.min() > 0
    assert values.max() <= 1
    assert np.histogram(values, 10, (0, 1))[0] == pytest.approx(np.full(10, 10_000), rel=0.06)


# Sampling.


def test_records_are_sampled_each_by_itself_at_the_public_rate():
    """Rule 1: the size of a Poisson sample varies as a binomial does; a shuffled one's never."""
    source = SystemRandom()
    sizes = [len(PUBLIC.sample(range(100), source)) for _ in range(3000)]
    assert np.mean(sizes) == pytest.approx(20, abs=0.5)
    assert np.var(sizes) == pytest.approx(16, rel=0.15)
    taken = np.zeros(100)
    for _ in range(2000):
        taken[PUBLIC.sample(range(100), source)] += 1
    assert taken / 2000 == pytest.approx(np.full(100, 0.2), abs=0.05)


def test_rate_and_divisor_are_the_same_for_one_record_more():
    """Rule 2: with records in every step, the mean grows by what the record adds, no less."""
    vector = torch.tensor([1.0, 0.0, 0.0])
    source = SystemRandom()
    for count in (9, 10, 11, 304, 305):
        mean = ALMOST_SILENT.release([vector] * count, 3, source)
        assert mean.tolist() == pytest.approx([count / 10, 0, 0], abs=1e-6)
    rates = [
        len(PUBLIC.sample(range(count), source)) / count for count in (200_000, 200_001, 100_000)
    ]
    assert rates == pytest.approx([0.2] * 3, abs=0.006)


def test_an_empty_sample_is_noise_of_the_usual_size():
    mean = PUBLIC.release([], 100_000, SystemRandom())
    assert float(mean.std()) == pytest.approx(0.2, rel=0.02)  # 1.0 * 2.0 / 10


# Clipping.


def norm_of(steps):
    return math.sqrt(sum(int(value) ** 2 for value in steps.flatten()))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(1e-3, 1e3),
)
def test_no_record_is_longer_than_the_clipping_norm_in_exact_numbers(values, clip_norm):
    steps = clipped_to_grid(torch.tensor(values, dtype=torch.float32), clip_norm)
    assert norm_of(steps) <= STEPS


def test_a_short_record_is_left_as_it_is_and_a_long_one_keeps_its_direction():
    short = torch.tensor([0.3, -0.4])
    assert (clipped_to_grid(short, 1.0) / STEPS).tolist() == pytest.approx([0.3, -0.4], abs=1e-7)
    long = clipped_to_grid(30 * short, 1.0) / STEPS
    assert long.tolist() == pytest.approx([0.6, -0.8], abs=1e-7)


def test_a_record_is_clipped_as_one_vector_over_everything():
    """Not tensor by tensor: two halves of length 1 are one record of length 1.41."""
    both = clipped_to_grid(torch.tensor([1.0, 0.0, 0.0, 1.0]), 1.0)
    assert norm_of(both) / STEPS == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_record_that_is_not_finite_counts_as_zero_and_disturbs_no_other(bad):
    """Rule 6."""
    good, broken = torch.tensor([0.5, 0.0]), torch.tensor([bad, 1.0])
    with_it = ALMOST_SILENT.release([good, broken, good], 2, SystemRandom())
    assert with_it.tolist() == pytest.approx([0.1, 0], abs=1e-6)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_clipping_computes_wider_than_the_gradient(kind):
    """Rule 5: the norm of half-precision numbers overflows, and infinity times zero is NaN."""
    vector = torch.full((1000,), 60000.0 if kind == torch.float16 else 1e38).to(kind)
    steps = clipped_to_grid(vector, 1.0)
    assert norm_of(steps) / STEPS == pytest.approx(1, rel=1e-3)
    assert len(set(steps.tolist())) == 1


def test_sums_do_not_depend_on_the_order_of_records():
    vectors = [torch.randn(50) * 10.0 ** (7 * torch.rand(()) - 6) for _ in range(200)]
    sums = []
    for order in (vectors, vectors[::-1]):
        total = sum(clipped_to_grid(vector, 1.0) for vector in order)
        sums.append(total.tolist())
    assert sums[0] == sums[1]


# Noise.


def test_noise_and_sum_are_whole_numbers_of_grid_steps():
    """Rule 3: no low bit of a float tells what the noise was added to."""
    mechanism = Mechanism(1.0, 1e-8, 1.0, 1.0)  # few steps of noise, so that float32 holds them
    vector = torch.tensor([2.0**-10] * 1000)
    released = mechanism.release([vector], 1000, SystemRandom()).double() * STEPS
    assert torch.equal(released, released.round())
    assert len(set(released.tolist())) > 10


def test_the_noise_is_on_the_sum_and_goes_by_the_clipping_norm():
    for clip_norm, expected in ((1.0, 10.0), (4.0, 10.0), (1.0, 100.0)):
        mechanism = Mechanism(0.2, 1.5, clip_norm, expected)
        mean = mechanism.release([], 100_000, SystemRandom())
        assert float(mean.std()) == pytest.approx(1.5 * clip_norm / expected, rel=0.02)


def test_vectors_are_taken_one_at_a_time():
    alive = []

    def vectors():
        for _ in range(5):
            alive.append(1)
            yield torch.ones(3)
            alive.pop()

    ALMOST_SILENT.release(vectors(), 3, SystemRandom())
    assert alive == []


# Adaptive clipping.


def test_the_adaptive_norm_settles_at_its_quantile():
    clip = AdaptiveClip(quantile=0.5, clip_norm=50.0)
    planned = Mechanism(1.0, 0.5, 50.0, 400.0)
    source = SystemRandom()
    norms = np.linspace(0.5, 1.5, 400)  # median 1
    for _ in range(120):
        public = clip.mechanism(planned)
        assert public.clip_norm == clip.clip_norm
        for _vector in clip.counted(torch.tensor([norm]) for norm in norms):
            pass
        clip.step(planned, source)
    assert clip.clip_norm == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("noise", [0.4, 1.0, 8.0])
@pytest.mark.parametrize("expected", [2.0, 20.0, 1000.0])
def test_sum_and_count_together_cost_what_the_plan_says(noise, expected):
    """Rule 9: two Gaussians of multipliers a and b are one of 1 / sqrt(a^-2 + b^-2); the count
    moves by a half, so that its multiplier is twice its noise."""
    planned = Mechanism(0.1, noise, 1.0, expected)
    clip = AdaptiveClip(0.5, 1.0)
    of_the_sum, of_the_count = clip.mechanism(planned).noise_multiplier, 2 * count_noise(planned)
    assert 1 / math.sqrt(of_the_sum**-2 + of_the_count**-2) == pytest.approx(noise)
    assert of_the_sum < 1.06 * noise


def test_the_adaptive_norm_moves_by_a_noisy_count():
    moved = set()
    for _ in range(5):
        clip = AdaptiveClip(0.5, 1.0)
        for _vector in clip.counted([torch.ones(1) * 5]):
            pass
        clip.step(PUBLIC, SystemRandom())
        moved.add(clip.clip_norm)
    assert len(moved) > 1


def test_a_record_that_is_not_finite_counts_as_not_clipped():
    clip = AdaptiveClip(0.5, 1.0)
    vectors = [torch.tensor([math.nan]), torch.tensor([2.0]), torch.tensor([0.5])]
    assert len(list(clip.counted(vectors))) == 3
    assert clip._balance == 1


# What is public.


def test_delta_is_a_tenth_of_one_record_at_most():
    """Rule 17."""
    assert standard_delta(300) == 1e-5
    assert standard_delta(1_000_000) == pytest.approx(1e-7)
    for records in (3, 300, 10_000, 10**6):
        assert standard_delta(records) <= 1 / (10 * records)


def test_the_plan_of_a_site_is_made_of_published_numbers(mini_config):
    config = mini_config(
        privacy={"unit": "patient", "epsilon": 8, "records": {"a": 40, "b": 70},
                 "noise_multiplier": 1.0, "sampling_rate": 0.25, "steps_per_round": 4},
    )  # fmt: skip
    plans = {site: privacy_plan(config, site) for site in ("a", "b")}
    assert [plans[site].expected_records for site in "ab"] == [10.0, 17.5]
    assert plans["a"].spending(3).steps == 12
    mechanism = plans["b"].mechanism(0.5)
    assert mechanism == Mechanism(0.25, 1.0, 0.5, 17.5)
