"""The loss, the learning rate and one round of local training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from samaritan.config import TrainingConfig
from samaritan.data.datasets import Case, read_dataset
from samaritan.data.phantoms import CLASSES, write_phantoms
from samaritan.data.slices import CaseCache
from samaritan.errors import TrainingError
from samaritan.training.feed import Batch, on_device, one_ahead
from samaritan.training.local import (
    Schedule,
    TrainingResult,
    learning_rate,
    round_seed,
    train_locally,
)
from samaritan.training.losses import _SMOOTH, SegmentationLoss

WHOLE = Schedule(0.0, 1.0)
Run = Callable[..., TrainingResult]


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The loss.


def test_the_loss_is_dice_and_cross_entropy() -> None:
    logits = draws(1, 3, 6, 5)
    labels = draws(1, 6, 5, seed=1).mul(2).abs().long().clamp(max=2)
    shares = logits.softmax(1)[0]
    entropy = -shares.gather(0, labels).log().mean()
    dice = torch.stack(
        [
            1 - (2 * shares[c][labels[0] == c].sum() + _SMOOTH)
            / (shares[c].sum() + (labels == c).sum() + _SMOOTH)
            for c in (1, 2)
        ]
    ).mean()  # fmt: skip
    for weight in (0.0, 0.8, 1.0):
        expected = weight * dice + (1 - weight) * entropy
        assert SegmentationLoss(weight)(logits, labels).item() == pytest.approx(expected.item())


def test_the_loss_of_a_batch_is_the_mean_of_its_records() -> None:
    logits, labels = draws(3, 3, 8, 8), draws(3, 8, 8, seed=1).abs().long().clamp(max=2)
    labels[1] = 0
    labels[2, :7] = 1  # sizes differ, which a Dice over the batch would notice
    loss = SegmentationLoss(0.8)
    alone = torch.stack([loss(i[None], t[None]) for i, t in zip(logits, labels, strict=True)])
    assert loss(logits, labels).item() == pytest.approx(alone.mean().item(), rel=1e-6)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_slice_without_structures_gives_a_finite_gradient(scale: float) -> None:
    logits = (scale * draws(2, 4, 8, 8)).requires_grad_()
    SegmentationLoss(0.8)(logits, torch.zeros(2, 8, 8).long()).backward()
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0


def test_a_perfect_prediction_costs_nothing() -> None:
    labels = draws(2, 8, 8).abs().long().clamp(max=2)
    logits = 50 * torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2).float()
    assert SegmentationLoss(0.8)(logits, labels) < 1e-6
    assert SegmentationLoss(0.8)(logits.roll(1, 1), labels) > 5


# The learning rate.


def rates(schedule: Schedule, steps: int = 10, **settings: Any) -> list[float]:
    section = TrainingConfig(**{"learning_rate": 1.0, "warmup_steps": 0, **settings})
    return [learning_rate(step, steps, schedule, section) for step in range(1, steps + 1)]


def test_the_rate_falls_along_one_cosine_whatever_the_rounds() -> None:
    whole = rates(WHOLE, 40)
    parts = [r for i in range(4) for r in rates(Schedule(i / 4, (i + 1) / 4), 10)]
    assert parts == pytest.approx(whole)
    assert whole == sorted(whole, reverse=True)
    assert whole[0] == 1
    assert whole[20] == pytest.approx(0.05 + 0.95 / 2)
    assert rates(WHOLE, 10_000)[-1] == pytest.approx(0.05, abs=1e-4)


def test_rounds_of_different_lengths_join() -> None:
    section = TrainingConfig(warmup_steps=0)
    end = learning_rate(8, 7, Schedule(0.2, 0.4), section)
    assert end == pytest.approx(learning_rate(1, 30, Schedule(0.4, 0.6), section))


def test_each_round_warms_up() -> None:
    plain, warm = rates(Schedule(0.5, 0.6)), rates(Schedule(0.5, 0.6), warmup_steps=4)
    shares = [w / p for w, p in zip(warm, plain, strict=True)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8] + [1] * 6)


def test_round_seeds_differ_and_stay() -> None:
    seeds = {round_seed(s, r, site) for s in (0, 1) for r in (1, 2) for site in ("A", "B")}
    assert len(seeds) == 8
    assert round_seed(0, 1, "A") == round_seed(0, 1, "A")
    torch.Generator().manual_seed(max(seeds))


# Training.


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Three phantoms of one site."""
    folder = write_phantoms(tmp_path_factory.mktemp("phantoms"), 1, 3, seed=1)
    return list(read_dataset(folder).cases)


@pytest.fixture
def run(mini_config: Callable[..., Any], phantoms: list[Case]) -> Run:
    """Trains a model for a few steps on phantoms."""

    def train(model: Any, cases: list[Case] | None = None, **options: Any) -> TrainingResult:
        strengths = options.pop("training", {})
        config = mini_config(
            training={"batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1, **strengths},
            data={"slice_axis": "axial"},
        )
        cache = CaseCache(config.data, CLASSES, (32, 32))
        options = {"schedule": WHOLE, "seed": 7, "steps": 3, **options}
        cases = phantoms if cases is None else cases
        return train_locally(model, cache, cases, config.training, **options)

    return train


def test_training_lowers_the_loss(adapted_mini: Callable[..., Any], run: Run) -> None:
    model = adapted_mini(3)
    told: list[tuple[int, int, float]] = []
    result = run(model, steps=40, on_step=lambda *step: told.append(step))
    losses = [loss for _, _, loss in told]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    assert [step[:2] for step in told] == [(i, 40) for i in range(1, 41)]
    assert (result.steps, result.loss) == (40, pytest.approx(sum(losses) / 40))
    assert not model.segmenter.training


def test_the_frozen_base_does_not_move(adapted_mini: Callable[..., Any], run: Run) -> None:
    model = adapted_mini(3)
    frozen = {n: p for n, p in model.base.model.named_parameters() if not p.requires_grad}
    before = {n: p.clone() for n, p in frozen.items()}
    fresh = model.state()
    run(model)
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())
    assert all(not torch.equal(t, fresh[n]) for n, t in model.state().items())


def test_equal_seeds_give_equal_adapters(adapted_mini: Callable[..., Any], run: Run) -> None:
    states, losses = [], []
    for seed in (7, 7, 8):
        torch.manual_seed(len(states))  # the global generator must not matter
        model = adapted_mini(3)
        losses.append(run(model, seed=seed, training={"flip": ["left-right"]}).loss)
        states.append(model.state())
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(t, states[1][n]) for n, t in states[0].items())
    assert any(not torch.equal(t, states[2][n]) for n, t in states[0].items())


def test_slices_per_case_set_the_steps(
    adapted_mini: Callable[..., Any], run: Run, phantoms: list[Case]
) -> None:
    model = adapted_mini(3)
    assert run(model, steps=None, training={"slices_per_case": 3}).steps == 3
    # With 7 cases, 7 * (29 / 7) is a little more than 29 in floating point.
    seven = [*phantoms, *phantoms, phantoms[0]]
    assert run(model, seven, steps=29, training={"batch_size": 1}).steps == 29


def test_a_loss_that_is_no_number_stops_training(
    adapted_mini: Callable[..., Any], run: Run
) -> None:
    model = adapted_mini(3)
    with torch.no_grad():
        model.trained["mask_decoder.mask_tokens.weight"][0, 0] = torch.nan
    with pytest.raises(TrainingError, match=r"step 1 of 3: loss nan") as caught:
        run(model)
    assert caught.value.code == "SAM-T102"


def test_a_gradient_that_is_not_finite_stops_training_before_the_step(
    adapted_mini: Callable[..., Any], run: Run
) -> None:
    model = adapted_mini(3)
    before = model.state()
    model.trained["mask_decoder.mask_tokens.weight"].register_hook(lambda g: g * math.inf)
    with pytest.raises(TrainingError) as caught:
        run(model, steps=1)
    assert caught.value.code == "SAM-T102"
    assert all(torch.equal(t, before[n]) for n, t in model.state().items())


def test_a_round_that_takes_too_long_stops(adapted_mini: Callable[..., Any], run: Run) -> None:
    model = adapted_mini(3)
    with pytest.raises(TrainingError, match="after step 1 of 3") as caught:
        run(model, timeout_s=0)
    assert caught.value.code == "SAM-T103"
    assert run(model, timeout_s=0, steps=1).steps == 1, "a finished round is not thrown away"


def test_a_site_without_cases_says_so(adapted_mini: Callable[..., Any], run: Run) -> None:
    with pytest.raises(TrainingError) as caught:
        run(adapted_mini(3), [])
    assert caught.value.code == "SAM-T101"


def test_the_gradient_is_clipped(
    adapted_mini: Callable[..., Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def watch(self: Any, *rest: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    run(adapted_mini(3), training={"clip_norm": 1e-3})
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)


def test_the_rate_of_the_schedule_is_used(
    adapted_mini: Callable[..., Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    step = torch.optim.AdamW.step

    def watch(self: Any, *rest: Any) -> Any:
        used.append(self.param_groups[0]["lr"])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    late = Schedule(0.5, 0.75)
    run(adapted_mini(3), schedule=late)
    section = TrainingConfig(learning_rate=0.01, warmup_steps=1)
    assert used == [learning_rate(i, 3, late, section) for i in (1, 2, 3)]


# Batches on their way.


def numbered(count: int, made: list[int]) -> Iterator[Batch]:
    for number in range(count):
        made.append(number)
        yield Batch(torch.full((1,), float(number)), torch.zeros(1, dtype=torch.long))


def test_the_next_batch_is_made_while_one_is_in_use() -> None:
    made: list[int] = []
    seen = []
    for batch in one_ahead(numbered(4, made)):
        deadline = time.monotonic() + 5
        while len(made) < min(4, len(seen) + 2) and time.monotonic() < deadline:
            time.sleep(0.001)
        assert len(made) == min(4, len(seen) + 2)
        seen.append(int(batch.inputs))
    assert seen == [0, 1, 2, 3]


def test_a_fault_while_a_batch_is_made_ends_the_round() -> None:
    def broken() -> Iterator[Batch]:
        yield from numbered(1, [])
        raise ValueError("unreadable")

    feed = one_ahead(broken())
    assert int(next(feed).inputs) == 0
    with pytest.raises(ValueError, match="unreadable"):
        next(feed)


@pytest.mark.gpu
def test_batches_reach_the_gpu() -> None:
    device = torch.device("cuda")
    batches = list(on_device(numbered(3, []), device))
    assert [b.inputs.device.type for b in batches] == ["cuda"] * 3
    assert [int(b.inputs) for b in batches] == [0, 1, 2]
