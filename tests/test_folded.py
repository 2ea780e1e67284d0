"""Frozen layers that take in what a strategy adds, and LoRA of a smaller rank than the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from samaritan.errors import ConfigError, ModelError
from samaritan.models.adapter import (
    at_rank,
    load_adapted,
    merged_state,
    read_adapter,
    save_adapter,
)
from samaritan.models.lora import lora_pairs
from samaritan.models.sam import FAMILY, construct
from samaritan.models.segmenter import Segmenter
from samaritan.training.losses import SegmentationLoss

Build = Callable[..., Any]
CLASSES = {"anterior": 1, "posterior": 2}
SCALES = [({"alpha": 6.0}, 1.5), ({"alpha": 6.0, "variant": "rslora"}, 3.0), ({}, 1.0)]


@pytest.fixture
def images() -> Tensor:
    return torch.rand((2, 3, 44, 44), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: Any, images: Tensor) -> Tensor:
    return model.segmenter(images.to(model.segmenter.device)).cpu()


def stirred(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """The state of a federation that has folded something everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + 0.05 * torch.randn(value.shape, generator=generator)
        for name, value in state.items()
    }


def frozen(model: Any) -> dict[str, Tensor]:
    return {n: p.clone() for n, p in model.base.model.named_parameters() if not p.requires_grad}


# Folded tensors.


def test_a_folding_strategy_has_a_tensor_for_each_product(adapted_mini: Build) -> None:
    plain, model = adapted_mini(), adapted_mini(strategy="fedex")
    state, pairs = model.state(), lora_pairs(plain.state())
    assert state.keys() - plain.state().keys() == {pair.folded for pair in pairs}
    for pair in pairs:
        assert state[pair.folded].shape == (len(state[pair.b]), state[pair.a].shape[1])
        assert not state[pair.folded].any()
    assert model.parameters() == plain.parameters()
    assert model.trained.keys() == plain.trained.keys()
    assert model.base.sha256 == plain.base.sha256


@pytest.mark.parametrize(("peft", "scale"), SCALES)
def test_folding_equals_weights_set_by_hand(
    adapted_mini: Build, images: Tensor, peft: dict[str, Any], scale: float
) -> None:
    folding, by_hand = adapted_mini(strategy="fedex", peft=peft), adapted_mini(peft=peft)
    before = logits(folding, images)
    state = stirred(folding.state())
    by_hand.load({n: t for n, t in state.items() if ".folded" not in n})
    weights = dict(by_hand.base.model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            layer = name.partition(".folded")[0]
            rows = slice(None)
            if name.endswith((".folded_q.weight", ".folded_v.weight")):
                third = len(value)
                rows = slice(0, third) if "folded_q" in name else slice(2 * third, 3 * third)
            if ".folded" in name:
                weights[f"{layer}.base_layer.weight"][rows] += scale * value
    folding.load(state)
    assert torch.equal(logits(folding, images), logits(by_hand, images))
    assert not torch.allclose(logits(folding, images), before, atol=1e-2)
    assert all(torch.equal(value, state[name]) for name, value in folding.state().items())


def test_folding_a_product_equals_carrying_it(adapted_mini: Build, images: Tensor) -> None:
    model = adapted_mini(strategy="flora", peft={"alpha": 6.0}, stir=0.1)
    state = model.state()
    expected = logits(model, images)
    for pair in lora_pairs(state):
        state[pair.folded] = state[pair.b] @ state[pair.a]
        state[pair.b] = torch.zeros_like(state[pair.b])
    model.load(state)
    assert (logits(model, images) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_next_adapter_leaves_nothing_of_the_last(adapted_mini: Build, images: Tensor) -> None:
    model = adapted_mini(strategy="fedex")
    fresh, weights, expected = model.state(), frozen(model), logits(model, images)
    for seed in range(20):
        model.load({n: 100 * t for n, t in stirred(fresh, seed).items()})
    assert any(not torch.equal(weight, weights[n]) for n, weight in frozen(model).items())
    model.load(fresh)
    assert all(torch.equal(weight, weights[n]) for n, weight in frozen(model).items())
    assert torch.equal(logits(model, images), expected)


def test_a_state_holds_copies(adapted_mini: Build) -> None:
    model = adapted_mini(strategy="fedex")
    given = stirred(model.state())
    model.load(given)
    name = lora_pairs(given)[0].folded
    kept = given[name].clone()
    given[name].add_(1)
    model.state()[name].add_(1)
    assert torch.equal(model.state()[name], kept)


def test_a_merged_adapter_takes_in_what_was_folded(
    adapted_mini: Build, mini: Any, images: Tensor
) -> None:
    model = adapted_mini(strategy="fedex", peft={"alpha": 6.0})
    model.load(stirred(model.state()))
    before, expected = model.state(), logits(model, images)
    sam = construct(mini.shape, 2)
    sam.load_state_dict(merged_state(model), strict=True)
    with torch.no_grad():
        merged = Segmenter(sam, FAMILY, 4)(images)
    assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(logits(model, images), expected)
    assert all(torch.equal(t, before[name]) for name, t in model.state().items())


def test_a_saved_adapter_predicts_the_same(
    adapted_mini: Build, mini_config: Build, images: Tensor, tmp_path: Path
) -> None:
    model, config = adapted_mini(strategy="fedex"), mini_config(strategy="fedex")
    model.load(stirred(model.state()))
    save_adapter(tmp_path / "a", model, model.state(), config, CLASSES)
    loaded = load_adapted(read_adapter(tmp_path / "a"))
    assert torch.equal(logits(loaded, images), logits(model, images))
    plain = adapted_mini()
    save_adapter(tmp_path / "b", plain, plain.state(), mini_config(), CLASSES)
    assert not [n for n in load_file(tmp_path / "b" / "adapter_model.safetensors") if "fold" in n]


@pytest.mark.parametrize("strategies", [("fedavg", "fedex"), ("fedex", "fedavg")])
def test_a_state_of_the_other_kind_is_refused(
    adapted_mini: Build, strategies: tuple[str, str]
) -> None:
    one, other = (adapted_mini(strategy=name) for name in strategies)
    with pytest.raises(ModelError, match="folded") as caught:
        one.load(other.state())
    assert caught.value.code == "SAM-M302"


def test_training_leaves_what_was_folded(adapted_mini: Build) -> None:
    model = adapted_mini(strategy="fedex")
    state = stirred(model.state())
    model.load(state)
    weights = frozen(model)
    step(model)
    assert all(torch.equal(weight, weights[n]) for n, weight in frozen(model).items())
    after = model.state()
    assert all(torch.equal(after[n], t) == (".folded" in n) for n, t in state.items())


# Smaller ranks.


def step(model: Any, steps: int = 3) -> None:
    """AdamW, with weight decay, on random images."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand((2, 3, 32, 32), generator=generator)
    labels = torch.randint(0, 3, (2, 32, 32), generator=generator)
    optimiser = torch.optim.AdamW(model.trained.values(), lr=0.01, weight_decay=0.1)
    for _ in range(steps):
        optimiser.zero_grad()
        SegmentationLoss(0.5)(model.segmenter(images), labels).backward()
        optimiser.step()


def test_a_smaller_rank_trains_in_a_larger_model_as_in_its_own(
    adapted_mini: Build, images: Tensor
) -> None:
    small, large = adapted_mini(stir=0.1, peft={"rank": 2}), adapted_mini(peft={"rank": 8})
    large.load(small.state())
    assert torch.allclose(logits(large, images), logits(small, images), rtol=1e-4, atol=1e-5)
    step(small)
    step(large)
    wide, cut = large.state(), at_rank(large.state(), 2)
    for pair in lora_pairs(wide):
        assert not wide[pair.a][2:].any()
        assert not wide[pair.b][:, 2:].any()
        assert cut[pair.b].is_contiguous()
    assert cut.keys() == small.state().keys()
    for name, value in small.state().items():
        torch.testing.assert_close(cut[name], value, rtol=1e-3, atol=1e-4)
    large.load(adapted_mini(peft={"rank": 8}, stir=0.2).state())
    large.load(cut)
    assert all(torch.equal(large.state()[n], t) for n, t in wide.items())


@pytest.mark.parametrize("rank", [None, 4, 9])
def test_a_state_of_no_larger_rank_is_not_cut(adapted_mini: Build, rank: int | None) -> None:
    state = adapted_mini(stir=0.1).state()
    cut = at_rank(state, rank)
    assert cut.keys() == state.keys()
    assert all(torch.equal(cut[name], value) for name, value in state.items())


def test_factors_that_do_not_meet_or_are_too_large_are_refused(adapted_mini: Build) -> None:
    model = adapted_mini()
    pair = lora_pairs(model.trained)[0]
    state = model.state()
    for spoilt in (
        state | {pair.a: state[pair.a][:2]},
        state | {pair.a: state[pair.a][:2], pair.b: state[pair.b][:, :3]},
        state | {pair.a: state[pair.a][0], pair.b: state[pair.b][:, 0]},
        state | {pair.a: state[pair.a][:2, :5], pair.b: state[pair.b][:, :2]},
        adapted_mini(peft={"rank": 5}).state(),
    ):
        with pytest.raises(ModelError) as caught:
            model.load(spoilt)
        assert caught.value.code == "SAM-M302"


# Combinations that are refused.


@pytest.mark.parametrize(
    ("code", "sections"),
    [
        ("SAM-C214", {"strategy": "fedex", "model": {"frozen_precision": "bf16"}}),
        ("SAM-C214", {"strategy": "flora", "model": {"frozen_precision": "bf16"}}),
        ("SAM-C215", {"strategy": "fedex", "peft": {"variant": "dora"}}),
        ("SAM-C215", {"strategy": "flora", "peft": {"variant": "dora"}}),
        ("SAM-C229", {"strategy": "fedex", "peft": {"preset": "lora-decoder"}}),
        ("SAM-C216", {"strategy": "svd", "peft": {"preset": "partial-decoder"}}),
        ("SAM-C216", {"strategy": "fedex", "peft": {"preset": "decoder-only"}}),
        ("SAM-C216", {"strategy": "flora", "peft": {"preset": "samed", "blocks": 0}}),
        ("SAM-C217", {"strategy": "svd", "peft": {"site_ranks": {"a": 2}, "alpha": 8}}),
        ("SAM-C217", {"strategy": "svd", "peft": {"site_ranks": {"a": 2}, "variant": "rslora"}}),
        ("SAM-C217", {"strategy": "svd", "peft": {"site_ranks": {"a": 2}, "variant": "dora"}}),
        ("SAM-C218", {"strategy": "fedavg", "peft": {"site_ranks": {"a": 2}}}),
        ("SAM-C218", {"strategy": "fedex", "peft": {"site_ranks": {"a": 2}}}),
        ("SAM-C219", {"strategy": "svd", "peft": {"site_ranks": {"a": 5, "b": 2}}}),
        (
            "SAM-C219",
            {"strategy": "flora", "peft": {"site_ranks": {"a": 2}, "ranks": {"decoder": 4}}},
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    adapted_mini: Build, code: str, sections: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted_mini(**sections)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "sections",
    [
        {"strategy": "svd", "peft": {"variant": "dora"}},
        {"strategy": "svd", "peft": {"preset": "lora-decoder"}},
        {"strategy": "svd", "peft": {"site_ranks": {"a": 4, "b": 1}}},
        {"strategy": "flora", "peft": {"site_ranks": {"a": 4, "b": 1}}},
        {"strategy": "fedex", "peft": {"variant": "rslora", "ranks": {"decoder": 2}}},
        {"strategy": "fedavg", "peft": {"preset": "partial-decoder"}},
    ],
)
def test_what_goes_together_is_built(adapted_mini: Build, sections: dict[str, Any]) -> None:
    assert adapted_mini(**sections).parameters()
