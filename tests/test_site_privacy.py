"""A site as the unit: what one site can change, and what the server's noise is."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from samaritan.config import Config, parse_config
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.plan import privacy_plan
from samaritan.privacy.randomness import SystemRandom
from strategies.clipping import update_norm
from strategies.site_privacy import private_mean, private_rule
from strategies.update import Situation, Update

_SHAPES = {"b.lora_B": (4, 5), "a.bias": (7,), "c.scale": (), "d.unused": (0, 3)}
_CLIP, _SITES = 0.5, 10
_QUIET = Mechanism(1.0, 1e-9, _CLIP, _SITES)
"""So little noise that the sum is seen exactly."""
_LOUD = replace(_QUIET, noise_multiplier=1.0)


def _delta(seed: int, size: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    delta = {n: torch.randn(s, generator=generator) for n, s in _SHAPES.items()}
    return {n: v * (size / update_norm(delta)) for n, v in delta.items()}


def _update(seed: int, size: float = 3.0, weight: float = 1.0) -> Update:
    delta = _delta(seed, size)
    return Update(f"site {seed}", {n: torch.zeros_like(v) for n, v in delta.items()}, delta, weight)


def _mean(updates: list[Update], mechanism: Mechanism = _QUIET) -> dict[str, Tensor]:
    return private_mean(iter(updates), _SHAPES, mechanism, SystemRandom())


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return update_norm({name: one[name].double() - other[name].double() for name in one})


def test_the_mean_is_that_of_clipped_updates_over_the_published_number():
    updates = [_update(seed, size) for seed, size in enumerate((3.0, 0.2, 0.49, 100.0))]
    mean = _mean(updates)
    for name, shape in _SHAPES.items():
        wanted = sum(
            u.delta[name].double() * min(1.0, _CLIP / update_norm(u.delta)) for u in updates
        )
        assert mean[name].shape == shape
        assert mean[name].dtype == torch.float32
        torch.testing.assert_close(mean[name].double(), wanted / _SITES, rtol=1e-6, atol=1e-8)


def test_two_answers_of_ten_are_divided_by_ten():
    mean = _mean([_update(1, 0.3), replace(_update(1, 0.3), site="other")])
    assert _difference(mean, {n: v * 0.2 for n, v in _delta(1, 0.3).items()}) < 1e-7


@pytest.mark.parametrize("size", [0.1, 0.5, 3.0, 1e20])
def test_one_site_moves_the_sum_by_no_more_than_the_clipping_norm(size):
    others = [_update(seed) for seed in range(5)]
    for seed in range(20, 40):
        moved = _SITES * _difference(_mean([*others, _update(seed, size)]), _mean(others))
        assert moved <= _CLIP * (1 + 1e-6)
        assert moved == pytest.approx(min(size, _CLIP), rel=1e-5)


def test_the_clipping_norm_is_for_all_tensors_together():
    one = _update(3, 0.0)
    for name in ("a.bias", "b.lora_B", "c.scale"):
        one.delta[name].fill_(1.0)
    mean = _mean([one])
    assert update_norm(mean) * _SITES == pytest.approx(_CLIP, rel=1e-6)
    assert float(mean["c.scale"]) * _SITES == pytest.approx(_CLIP / math.sqrt(28), rel=1e-6)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_an_update_that_is_not_finite_is_zero_and_the_others_count(wrong):
    broken, good = _update(1), _update(2)
    broken.delta["a.bias"][3] = wrong
    assert _difference(_mean([broken, good]), _mean([good])) < 1e-8


def test_weights_and_order_change_nothing():
    updates = [_update(seed, 0.1 * seed, weight=10.0**seed) for seed in range(1, 6)]
    equal = [replace(update, weight=1.0) for update in reversed(updates)]
    assert _difference(_mean(updates), _mean(equal)) < 1e-8


def test_a_site_that_got_in_twice_counts_once():
    assert _difference(_mean([_update(1), _update(1)]), _mean([_update(1)])) < 1e-8


def test_where_a_site_has_no_say_it_says_zero():
    update = replace(_update(1, 0.3), counts={"b.lora_B": torch.tensor([[1.0], [0], [0], [1]])})
    mean = _mean([update])
    assert mean["b.lora_B"][1:3].abs().max() < 1e-8
    torch.testing.assert_close(mean["b.lora_B"][0] * _SITES, update.delta["b.lora_B"][0])


def test_one_update_is_in_memory_at_a_time():
    alive: list[weakref.ref[Tensor]] = []

    def stream():
        for seed in range(4):
            assert sum(kept() is not None for kept in alive) <= 1  # the one before
            update = _update(seed)
            alive.append(weakref.ref(update.delta["a.bias"]))
            yield update
            del update

    private_mean(stream(), _SHAPES, _LOUD, SystemRandom())
    assert len(alive) == 4


# Noise


def test_noise_differs_between_calls_and_under_equal_seeds():
    means = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        means.append(_mean([_update(1)], _LOUD))
    assert all(not torch.equal(means[0][n], means[1][n]) for n in ("a.bias", "b.lora_B", "c.scale"))


@pytest.mark.parametrize("answers", [0, 1, 10])
def test_noise_is_as_large_as_the_mechanism_says_whoever_answered(answers):
    """40,000 draws: the standard deviation is known to 0.35 %."""
    shapes = {"a": (100, 200), "b": (20_000,)}
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    updates = [Update(str(i), zeros, zeros, 1.0) for i in range(answers)]
    mechanism = replace(_LOUD, noise_multiplier=4.0)
    mean = private_mean(updates, shapes, mechanism, SystemRandom())
    noise = torch.cat([value.flatten() for value in mean.values()])
    assert float(noise.std()) == pytest.approx(4.0 * _CLIP / _SITES, rel=0.02)
    assert abs(float(noise.mean())) < 5 * 4.0 * _CLIP / _SITES / 200
    for value in mean.values():
        assert float(value.std()) == pytest.approx(4.0 * _CLIP / _SITES, rel=0.03)


# As a rule


def _config(**keys) -> Config:
    return parse_config({
        "privacy": {"unit": "site", "epsilon": 8, "records": _SITES, "clip_norm": _CLIP}, **keys,
    })  # fmt: skip


def _adapter() -> dict[str, Tensor]:
    return {
        "image_encoder.x.lora_A": torch.ones(2, 3),
        "image_encoder.x.lora_B": torch.ones(4, 2),
        "mask_decoder.y": torch.ones(5),
    }


@pytest.mark.parametrize(
    ("keys", "sent"),
    [
        ({}, {"image_encoder.x.lora_A", "image_encoder.x.lora_B", "mask_decoder.y"}),
        ({"strategy": "ffa"}, {"image_encoder.x.lora_B", "mask_decoder.y"}),
        (
            {"personal": {"parts": ["decoder"]}},
            {"image_encoder.x.lora_A", "image_encoder.x.lora_B"},
        ),
    ],
)
def test_the_rule_answers_for_every_tensor_that_is_sent_even_when_nobody_answers(keys, sent):
    config, adapter = _config(**keys), _adapter()
    plan = privacy_plan(config, "any")
    change = private_rule(plan, _CLIP, SystemRandom())(iter([]), Situation(adapter, 1, config))
    assert change.keys() == sent
    assert all(change[n].shape == adapter[n].shape for n in sent)
    assert all(bool((change[n] != 0).all()) for n in sent)


def test_the_rule_takes_noise_clip_and_divisor_from_the_plan():
    config, adapter = _config(), {"image_encoder.x": torch.zeros(40_000)}
    plan = privacy_plan(config, "any")
    assert (plan.sampling_rate, plan.steps_per_round, plan.expected_records) == (1.0, 1, _SITES)
    quiet = private_rule(replace(plan, noise_multiplier=1e-9), _CLIP, SystemRandom())
    long = Update("A", adapter, {"image_encoder.x": torch.ones(40_000)}, 5.0)
    change = quiet([long], Situation(adapter, 1, config))
    assert update_norm(change) == pytest.approx(_CLIP / _SITES, rel=1e-4)
    noisy = private_rule(plan, _CLIP, SystemRandom())([], Situation(adapter, 1, config))
    expected = plan.noise_multiplier * _CLIP / _SITES
    assert float(noisy["image_encoder.x"].std()) == pytest.approx(expected, rel=0.02)
