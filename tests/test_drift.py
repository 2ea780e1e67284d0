"""FedProx, SCAFFOLD and training a part of the adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from samaritan.data.datasets import Case, read_dataset
from samaritan.data.phantoms import CLASSES, write_phantoms
from samaritan.data.slices import CaseCache, batches
from samaritan.errors import TrainingError
from samaritan.training.augment import augment
from samaritan.training.drift import (
    control_change,
    correct_gradients,
    record_gradients,
    server_control,
)
from samaritan.training.local import Schedule, TrainingResult, train_locally
from samaritan.training.losses import SegmentationLoss

State = dict[str, Tensor]
Train = Callable[..., TrainingResult]

RATE, STEPS = 0.05, 3
TRAINING = {
    "batch_size": 4, "learning_rate": RATE, "warmup_steps": 0, "final_lr_fraction": 1,
    "weight_decay": 0, "clip_norm": 1e6,
}  # fmt: skip
"""Steps of one length that nothing is taken off, so that formulas are short."""


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = write_phantoms(tmp_path_factory.mktemp("phantoms"), 1, 3, seed=1)
    return list(read_dataset(folder).cases)


@pytest.fixture
def setting(mini_config: Callable[..., Any], phantoms: list[Case]) -> Callable[..., Any]:
    """What `train_locally` takes after the model, with some settings changed."""

    def make(**changes: Any) -> tuple[CaseCache, list[Case], Any]:
        config = mini_config(training=TRAINING | changes, data={"slice_axis": "axial"})
        return CaseCache(config.data, CLASSES, (32, 32)), phantoms, config.training

    return make


@pytest.fixture
def train(setting: Callable[..., Any]) -> Train:
    """Trains a model for three steps: ``train(model, proximal_mu=1, names=["a"])``."""

    def run(
        model: Any, *, names: Any = None, control: Any = None, steps: int = STEPS, **changes: Any
    ) -> TrainingResult:
        return train_locally(
            model, *setting(**changes), schedule=Schedule(0, 1), seed=7, steps=steps, names=names,
            control=control,
        )  # fmt: skip

    return run


@pytest.fixture
def sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain gradient steps in AdamW's place."""
    monkeypatch.setattr(torch.optim, "AdamW", lambda p, lr, **_: torch.optim.SGD(p, lr))


@pytest.fixture
def given() -> Iterator[list[list[Tensor | None]]]:
    """The gradients that optimisers are given, by step and parameter."""
    seen: list[list[Tensor | None]] = []

    def look(optimiser: Any, *_: Any) -> None:
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        seen.append([None if p.grad is None else p.grad.clone() for p in parameters])

    handle = register_optimizer_step_pre_hook(look)
    yield seen
    handle.remove()


def noise(model: Any, seed: int, size: float = 0.1) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {n: size * torch.randn(p.shape, generator=generator) for n, p in model.trained.items()}


def factors(model: Any, kind: str) -> list[str]:
    return [name for name in model.trained if f".{kind}" in name]


def assert_close(found: State, expected: State, scale: float = 1.0) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-5 * scale), name


def written_out(
    model: Any, setting: Any, *, control: State | None = None, mu: float = 0.0, clip: float = 1e6
) -> tuple[State, State]:
    """Gradient steps with nothing of ours but data and loss: the adapter, and the mean gradient."""
    cache, cases, settings = setting()
    generator = torch.Generator().manual_seed(7)
    drawn = batches(
        cache, cases, steps=STEPS, batch_size=4, foreground_fraction=0.8, generator=generator
    )
    received = model.state()
    mean = {name: torch.zeros_like(value) for name, value in received.items()}
    for view in drawn:
        images, labels = augment(*view, settings, generator)
        loss = SegmentationLoss(0.8)(model.segmenter(images), labels)
        gradients = torch.autograd.grad(loss, list(model.trained.values()), materialize_grads=True)
        raw = dict(zip(model.trained, gradients, strict=True))
        steps = {}
        for name, gradient in raw.items():
            mean[name] += gradient / STEPS
            pull = mu * (model.trained[name].detach() - received[name])
            steps[name] = gradient + (control[name] if control else 0) + pull
        norm = math.sqrt(sum(float(step.square().sum()) for step in steps.values()))
        with torch.no_grad():
            for name, parameter in model.trained.items():
                parameter -= RATE * min(1, clip / norm) * steps[name]
    return model.state(), mean


# A part of the adapter.


@pytest.mark.parametrize("kind", ["lora_A", "lora_B"])
def test_only_what_is_named_is_trained(
    adapted_mini: Callable[..., Any], train: Train, kind: str
) -> None:
    model = adapted_mini(3, stir=0.1)
    resting = factors(model, kind)
    names = model.trained.keys() - set(resting)
    before = model.state()
    train(model, names=names, weight_decay=0.5)
    after = model.state()
    assert {n for n in after if torch.equal(after[n], before[n])} == set(resting)
    assert resting
    assert all(p.requires_grad for p in model.trained.values())


def test_gradients_of_another_round_are_forgotten(
    adapted_mini: Callable[..., Any], train: Train
) -> None:
    """In RoLoRA what rests in one round was trained in the round before."""
    used, fresh = adapted_mini(3, stir=0.1), adapted_mini(3, stir=0.1)
    train(used, steps=1)
    used.load(fresh.state())
    for model in (used, fresh):
        train(model, names=factors(model, "lora_A"), clip_norm=1e-3, weight_decay=0.5, steps=1)
    other = fresh.state()
    assert all(torch.equal(value, other[name]) for name, value in used.state().items())


def test_what_is_named_takes_the_gradient_it_always_takes(
    adapted_mini: Callable[..., Any], train: Train
) -> None:
    whole, part = adapted_mini(3, stir=0.1), adapted_mini(3, stir=0.1)
    names = factors(part, "lora_B")
    everything = train(whole, steps=1, control={}).mean_gradient
    some = train(part, steps=1, control={}, names=names).mean_gradient
    assert everything is not None
    assert some is not None
    assert_close(some, {n: everything[n] for n in names}, 1e-2)


def test_naming_everything_is_naming_nothing(
    adapted_mini: Callable[..., Any], train: Train
) -> None:
    states = []
    for names in (None, lambda m: list(reversed(m.trained)), lambda m: {*m.trained, "another"}):
        model = adapted_mini(3)
        result = train(model, names=names and names(model))
        assert result.mean_gradient is None
        states.append(model.state())
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_resting_parameters_cost_no_gradient(
    adapted_mini: Callable[..., Any], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a trained tensor in the encoder, it keeps nothing for a backward pass."""
    model = adapted_mini(3)
    features: list[bool] = []
    decode = model.segmenter._decode

    def watch(given: Any, *rest: Any) -> Any:
        features.append(given.requires_grad)
        return decode(given, *rest)

    monkeypatch.setattr(model.segmenter, "_decode", watch)
    train(model, names=[n for n in model.trained if n.startswith("mask_decoder.")], steps=1)
    train(model, steps=1)
    assert features == [False, True]


def test_gradients_are_wanted_again_after_a_fault(
    adapted_mini: Callable[..., Any], train: Train
) -> None:
    model = adapted_mini(3)
    folded = nn.Parameter(torch.zeros(2), requires_grad=False)
    model = type(model)(**{**vars(model), "trained": {**model.trained, "folded": folded}})
    names = factors(model, "lora_B")
    with torch.no_grad():
        model.trained[names[0]].fill_(torch.nan)
    with pytest.raises(TrainingError):
        train(model, names=names)
    wanted = {name: p.requires_grad for name, p in model.trained.items()}
    assert wanted.pop("folded") is False, "what was frozen before stays so"
    assert all(wanted.values())


# FedProx.


@pytest.mark.usefixtures("sgd")
def test_the_pull_is_mu_times_the_distance(
    adapted_mini: Callable[..., Any], train: Train, setting: Any
) -> None:
    mine, reference = adapted_mini(3, stir=0.1), adapted_mini(3, stir=0.1)
    loss = train(mine, proximal_mu=5).loss
    expected, _ = written_out(reference, setting, mu=5)
    assert_close(mine.state(), expected)
    free = adapted_mini(3, stir=0.1)
    assert train(free).loss != loss
    assert any(
        not torch.allclose(v, expected[n], rtol=1e-3, atol=1e-4) for n, v in free.state().items()
    ), "the pull is large enough to be seen"


def test_a_pulled_site_stays_near(adapted_mini: Callable[..., Any], train: Train) -> None:
    moved = []
    for mu in (0, 1000):
        model = adapted_mini(3)
        before = model.state()
        train(model, proximal_mu=mu, steps=6, learning_rate=0.005, clip_norm=1)
        moves = (value - before[name] for name, value in model.state().items())
        moved.append(math.sqrt(sum(float(move.square().sum()) for move in moves)))
    assert moved[1] < 0.7 * moved[0]


# SCAFFOLD.


@pytest.mark.usefixtures("sgd")
def test_the_control_is_added_and_the_raw_gradient_reported(
    adapted_mini: Callable[..., Any], train: Train, setting: Any
) -> None:
    mine, reference = adapted_mini(3, stir=0.1), adapted_mini(3, stir=0.1)
    control = noise(mine, 1)
    kept = {name: value.clone() for name, value in control.items()}
    result = train(mine, control=control, proximal_mu=5, clip_norm=1)
    expected, mean = written_out(reference, setting, control=control, mu=5, clip=1)
    assert_close(mine.state(), expected)
    assert result.mean_gradient is not None
    assert_close(result.mean_gradient, mean)
    assert all(torch.equal(value, control[name]) for name, value in kept.items())
    assert {(v.dtype, v.device.type) for v in result.mean_gradient.values()} == {
        (torch.float32, "cpu")
    }


@pytest.mark.usefixtures("sgd")
def test_under_sgd_the_new_control_is_that_of_the_paper(
    adapted_mini: Callable[..., Any], train: Train
) -> None:
    """Option II of SCAFFOLD, by what a site moved: c_i - c + (x - y_i) / (K eta)."""
    model = adapted_mini(3, stir=0.1)
    everyones, own = noise(model, 1), noise(model, 2)
    start = model.state()
    result = train(model, control={n: everyones[n] - own[n] for n in own})
    assert result.mean_gradient is not None
    new, change = control_change(result.mean_gradient, own)
    end = model.state()
    paper = {n: own[n] - everyones[n] + (start[n] - end[n]) / (STEPS * RATE) for n in own}
    assert_close(new, paper, 10)
    assert_close(change, {n: paper[n] - own[n] for n in own}, 10)


def test_corrections_come_before_clipping(
    adapted_mini: Callable[..., Any], train: Train, given: list[list[Tensor | None]]
) -> None:
    model = adapted_mini(3)
    train(model, control=noise(model, 1, 100.0), proximal_mu=100, clip_norm=0.01)
    for gradients in given:
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)
    assert len(given) == STEPS


def test_a_control_of_zero_changes_nothing(adapted_mini: Callable[..., Any], train: Train) -> None:
    states = []
    for control in (None, lambda _: {}, lambda m: {n: 0 * p for n, p in m.state().items()}):
        model = adapted_mini(3)
        result = train(model, control=control and control(model))
        assert (result.mean_gradient is None) == (control is None)
        states.append(model.state())
    for other in states[1:]:
        assert all(torch.equal(value, other[name]) for name, value in states[0].items())


def test_a_control_of_what_rests_is_left_alone(
    adapted_mini: Callable[..., Any], train: Train
) -> None:
    model = adapted_mini(3, stir=0.1)
    names = factors(model, "lora_B")
    before = model.state()
    result = train(model, names=names, control=noise(model, 1))
    assert result.mean_gradient is not None
    assert result.mean_gradient.keys() == set(names)
    assert all(torch.equal(v, before[n]) for n, v in model.state().items() if n not in names)


def test_scaffold_reaches_the_common_minimum_where_averaging_does_not() -> None:
    """Two sites with f_i(w) = h_i/2 (w - m_i)^2; many local steps make plain averages drift."""
    curves, minima, rate, steps = (1.0, 10.0), (0.0, 1.0), 0.05, 10
    optimum = sum(h * m for h, m in zip(curves, minima, strict=True)) / sum(curves)
    reached = []
    for corrected in (False, True):
        shared, control = torch.zeros(1), {"w": torch.zeros(1)}
        own: list[State] = [{}, {}]
        for _ in range(200):
            ends, changes = [], []
            for site, (curve, minimum) in enumerate(zip(curves, minima, strict=True)):
                weight = {"w": nn.Parameter(shared.clone())}
                totals = {"w": torch.zeros(1)}
                shift = {"w": control["w"] - own[site].get("w", 0)} if corrected else {}
                for _ in range(steps):
                    weight["w"].grad = curve * (weight["w"].detach() - minimum)
                    record_gradients(totals, weight)
                    correct_gradients(weight, shift, {}, 0.0)
                    with torch.no_grad():
                        weight["w"].sub_(rate * weight["w"].grad)
                ends.append(weight["w"].detach())
                own[site], change = control_change({"w": totals["w"] / steps}, own[site])
                changes.append(change)
            shared = torch.stack(ends).mean(0)
            control = server_control(control, changes, 2)
        reached.append(float(shared))
    assert reached[1] == pytest.approx(optimum, abs=1e-4)
    assert abs(reached[0] - optimum) > 0.1


def test_what_the_loss_did_not_use_is_corrected_from_zero() -> None:
    unused = {"a": nn.Parameter(torch.tensor([3.0])), "b": nn.Parameter(torch.tensor([1.0]))}
    control, totals = {"a": torch.tensor([0.5])}, {"a": torch.zeros(1), "b": torch.zeros(1)}
    record_gradients(totals, unused)
    correct_gradients(unused, control, {"a": torch.tensor([1.0])}, 2.0)
    assert unused["a"].grad is not None
    assert unused["a"].grad.item() == 0.5 + 2 * (3 - 1)
    assert unused["b"].grad is None
    assert totals == {"a": torch.zeros(1), "b": torch.zeros(1)}
    correct_gradients({"b": unused["b"]}, {"b": control["a"]}, {}, 0.0)
    assert unused["b"].grad is not None
    unused["b"].grad.mul_(0)  # as clipping does
    assert control["a"].item() == 0.5


def test_two_parameters_with_one_gradient_are_corrected_once_each() -> None:
    """Autograd gives both terms of a sum the same tensor."""
    pair = {"a": nn.Parameter(torch.zeros(2)), "b": nn.Parameter(torch.zeros(2))}
    shared = torch.ones(2)
    for parameter in pair.values():
        parameter.grad = shared
    correct_gradients(pair, {n: torch.ones(2) for n in pair}, {}, 0.0)
    assert [p.grad.tolist() for p in pair.values() if p.grad is not None] == [[2, 2], [2, 2]]


# Controls.


def test_a_site_sends_what_changed_in_its_control() -> None:
    own = {"a": torch.tensor([1.0, 2.0]), "rests": torch.tensor([5.0])}
    mean = {"a": torch.tensor([4.0, 0.0]), "new": torch.tensor([7.0])}
    new, change = control_change(mean, own)
    assert {n: t.tolist() for n, t in new.items()} == {"a": [4, 0], "rests": [5], "new": [7]}
    assert {n: t.tolist() for n, t in change.items()} == {"a": [3, -2], "new": [7]}
    assert own["a"].tolist() == [1, 2]
    change["new"].zero_()
    assert new["new"].tolist() == [7], "what is sent may be changed on its way"


def test_the_server_keeps_the_mean_of_all_controls() -> None:
    """Four sites, of which some answer in a round; c must stay the mean of the four c_i."""
    generator = torch.Generator().manual_seed(3)
    own: list[State] = [{} for _ in range(4)]
    control: State = {}
    for answering in ([0, 1], [1, 3], [2], [], [0, 2, 3]):
        changes = []
        for site in answering:
            mean = {"w": torch.randn(5, generator=generator)}
            own[site], change = control_change(mean, own[site])
            changes.append(change)
        held = {name: value.clone() for name, value in control.items()}
        after = server_control(control, iter(changes), sites=4)
        assert all(torch.equal(value, control[name]) for name, value in held.items())
        control = after
        expected = sum((c.get("w", torch.zeros(5)) for c in own), torch.zeros(5)) / 4
        assert torch.allclose(control["w"], expected, atol=1e-6)
        assert control["w"].dtype == torch.float32


def test_the_order_of_the_sites_does_not_matter() -> None:
    generator = torch.Generator().manual_seed(4)
    changes = [{"w": torch.randn(1000, generator=generator) * 10.0**i} for i in range(6)]
    control = {"w": torch.randn(1000, generator=generator)}
    one, other = (server_control(control, order, 6) for order in (changes, changes[::-1]))
    assert torch.equal(one["w"], other["w"])


# Training further for one site.


def test_a_finished_adapter_is_trained_further(
    adapted_mini: Callable[..., Any], setting: Any
) -> None:
    model = adapted_mini(3)
    cache, cases, settings = setting(
        learning_rate=0.01, final_lr_fraction=0.05, warmup_steps=2, clip_norm=1
    )
    told: list[float] = []
    for schedule, steps in ((Schedule(0, 1), 20), (Schedule(1, 1), 20)):
        result = train_locally(
            model, cache, cases, settings, schedule=schedule, seed=len(told), steps=steps,
            on_step=lambda *step: told.append(step[2]),
        )  # fmt: skip
        assert result.steps == steps
    assert sum(told[-10:]) < sum(told[10:20])
