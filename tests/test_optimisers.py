"""What the server makes of the combined update, by the papers' formulas and by Flower."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedYogi
from safetensors.torch import load, save

from samaritan.config import ServerOptimiserConfig, parse_config
from samaritan.errors import ConfigError
from samaritan.shares import SHARING
from simulation.grid import InProcessGrid
from strategies.optimisers import check_optimiser, server_step

InProcessGrid(ClientApp(), 0)  # sets who this process is; Flower makes no Message before

SHAPES = {"x.lora_A": (3, 2), "x.lora_B": (4,), "y": ()}
OPTIMISERS = ["none", "momentum", "adam", "yogi"]
ROUNDS = 12


def options(name, **values):
    # Odd numbers, so that none can stand in for another.
    numbers = {"learning_rate": 0.3, "momentum": 0.7, "beta2": 0.95, "tau": 0.02}
    return ServerOptimiserConfig(name=name, **numbers | values)


def changes(rounds=ROUNDS, seed=0):
    """Combined updates around and far from tau, so that Yogi's sign takes both values."""
    rng = np.random.default_rng(seed)
    return [
        {
            n: torch.tensor(
                rng.normal(0, 0.02 * 3.0 ** rng.integers(-2, 3), s), dtype=torch.float32
            )
            for n, s in SHAPES.items()
        }
        for _ in range(rounds)
    ]


def run(sequence, settings):
    slots, steps = {}, []
    for change in sequence:
        step, slots = server_step(change, slots, settings)
        steps.append(step)
    return steps, slots


def close(left, right, rtol=1e-5):
    assert left.keys() == right.keys()
    for name in right:
        assert left[name].dtype == torch.float32
        np.testing.assert_allclose(left[name].numpy(), right[name], rtol=rtol, atol=1e-9)


def paper(name, sequence):
    """Algorithm 2 of arXiv 2003.00295, and FedAvgM of arXiv 1909.06335, in numpy."""
    lr, b1, b2, tau = 0.3, 0.7, 0.95, 0.02
    steps = []
    m = {n: np.zeros(s) for n, s in SHAPES.items()}
    v = {n: np.full(s, tau * tau) for n, s in SHAPES.items()}
    for change in sequence:
        step = {}
        for n in SHAPES:
            d = change[n].numpy().astype(np.float64)
            if name == "none":
                step[n] = lr * d
                continue
            if name == "momentum":
                m[n] = b1 * m[n] + d
                step[n] = lr * m[n]
                continue
            m[n] = b1 * m[n] + (1 - b1) * d
            if name == "adam":
                v[n] = b2 * v[n] + (1 - b2) * d**2
            else:
                v[n] = v[n] - (1 - b2) * d**2 * np.sign(v[n] - d**2)
            step[n] = lr * m[n] / (np.sqrt(v[n]) + tau)
        steps.append(step)
    return steps, m, v


@pytest.mark.parametrize("name", OPTIMISERS)
def test_steps_and_moments_follow_the_paper(name):
    steps, slots = run(changes(), options(name))
    expected, m, v = paper(name, changes())
    for ours, theirs in zip(steps, expected, strict=True):
        close(ours, theirs)
    moments = {"none": {}, "momentum": {"momentum": m}}.get(name, {"momentum": m, "second": v})
    assert slots.keys() == moments.keys()
    for slot, values in moments.items():
        close(slots[slot], values)


def test_yogis_second_moment_goes_both_ways():
    _, slots = run([{"y": torch.tensor(1.0)}], options("yogi"))
    high = slots["second"]["y"]
    assert high > 0.02**2
    _, slots = server_step({"y": torch.tensor(0.001)}, slots, options("yogi"))
    assert slots["second"]["y"] < high


# Flower.


def flower_steps(strategy, sequence, etas=None):
    """What Flower's strategy adds in each round; it is handed adapter plus change."""
    question = Message(RecordDict(), message_type="train", dst_node_id=5)
    question.metadata.__dict__.update(_message_id="m", _run_id=1, _src_node_id=1)
    adapter = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    steps = []
    for number, change in enumerate(sequence, 1):
        start = {n: v.numpy().copy() for n, v in adapter.items()}
        if isinstance(strategy, FedAvgM):
            strategy.current_arrays = strategy.current_arrays or record(adapter)
        else:
            strategy.current_arrays = start
            strategy.eta = etas[number - 1] if etas else strategy.eta
        trained = {n: v + change[n].double() for n, v in adapter.items()}
        content = RecordDict({"a": record(trained), "m": MetricRecord({"num-examples": 1})})
        arrays, _ = strategy.aggregate_train(number, [Message(content, reply_to=question)])
        adapter = {n: torch.tensor(a.numpy(), dtype=torch.float64) for n, a in arrays.items()}
        steps.append({n: v.numpy() - start[n] for n, v in adapter.items()})
    return steps


def record(adapter):
    return ArrayRecord({name: Array(value.numpy()) for name, value in adapter.items()})


def test_momentum_equals_flowers():
    strategy = FedAvgM(server_learning_rate=0.3, server_momentum=0.7)
    steps, _ = run(changes(), options("momentum"))
    for ours, theirs in zip(steps, flower_steps(strategy, changes()), strict=True):
        close(ours, theirs)


def test_yogi_equals_flowers_once_that_begins_at_tau_squared():
    strategy = FedYogi(eta=0.3, beta_1=0.7, beta_2=0.95, tau=0.02)
    strategy.v_t = {n: np.full(s, 0.02**2) for n, s in SHAPES.items()}
    steps, _ = run(changes(), options("yogi"))
    for ours, theirs in zip(steps, flower_steps(strategy, changes()), strict=True):
        close(ours, theirs)


def test_adam_equals_flowers_once_that_begins_at_tau_squared_and_corrects_no_bias():
    strategy = FedAdam(eta=0.3, beta_1=0.7, beta_2=0.95, tau=0.02)
    strategy.v_t = {n: np.full(s, 0.02**2) for n, s in SHAPES.items()}
    t = np.arange(1, ROUNDS + 1)
    etas = list(0.3 * (1 - 0.7 ** (t + 1.0)) / np.sqrt(1 - 0.95 ** (t + 1.0)))
    steps, _ = run(changes(), options("adam"))
    for ours, theirs in zip(steps, flower_steps(strategy, changes(), etas), strict=True):
        close(ours, theirs)


# What a step keeps to.


@pytest.mark.parametrize("name", ["none", "momentum"])
def test_the_first_step_at_learning_rate_1_is_the_update(name):
    (change,) = changes(1)
    step, _ = server_step(change, {}, options(name, learning_rate=1))
    assert all(torch.equal(step[n], change[n]) for n in SHAPES)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_arguments_stay_as_they_were_and_moments_go_through_a_file(name):
    """Stopping between any two rounds gives the same steps to the bit."""
    straight, _ = run(changes(), options(name))
    slots = {}
    for change, expected in zip(changes(), straight, strict=True):
        slots = {slot: load(save(tensors)) for slot, tensors in slots.items()}
        copies = {s: {n: v.clone() for n, v in t.items()} for s, t in slots.items()}
        original = {n: v.clone() for n, v in change.items()}
        step, after = server_step(change, slots, options(name))
        assert all(torch.equal(step[n], expected[n]) for n in SHAPES)
        assert all(torch.equal(change[n], original[n]) for n in SHAPES)
        assert slots.keys() == copies.keys()
        for slot, tensors in copies.items():
            assert slots[slot].keys() == tensors.keys()
            assert all(torch.equal(slots[slot][n], v) for n, v in tensors.items())
        slots = after


@pytest.mark.parametrize("name", OPTIMISERS)
def test_an_absent_tensor_rests_with_its_moments(name):
    """Tensors given in turn, as rolora does, move as if the other rounds had not been."""
    sequence = changes()
    turns = [{n: c[n] for n in (["x.lora_A"] if i % 2 else ["x.lora_B", "y"])}
             for i, c in enumerate(sequence)]  # fmt: skip
    steps, slots = run(turns, options(name))
    for turn, step in zip(turns, steps, strict=True):
        assert step.keys() == turn.keys()
    for start, names in ((0, ["x.lora_B", "y"]), (1, ["x.lora_A"])):
        alone, alone_slots = run(
            [{n: c[n] for n in names} for c in sequence[start::2]], options(name)
        )
        for ours, theirs in zip(steps[start::2], alone, strict=True):
            assert all(torch.equal(ours[n], theirs[n]) for n in names)
        for slot, tensors in alone_slots.items():
            assert all(torch.equal(slots[slot][n], v) for n, v in tensors.items())


@pytest.mark.parametrize("name", OPTIMISERS)
def test_folded_tensors_are_added_plainly_and_have_no_moments(name):
    folded = "image_encoder.blocks.0.attn.qkv.folded_q.weight"
    slots = {}
    for change in changes(3):
        correction = torch.randn(2, 2)
        step, slots = server_step(change | {folded: correction}, slots, options(name))
        assert torch.equal(step[folded], correction)
        assert all(folded not in tensors for tensors in slots.values())


def test_adam_moves_by_about_the_learning_rate_whatever_the_size_of_the_updates():
    moves = []
    for size in (1.0, 1e3):
        steps, _ = run([{"y": torch.tensor(size)}] * 300, options("adam"))
        moves.append(float(steps[-1]["y"]))
    assert moves == pytest.approx([0.3, 0.3], rel=0.05)


# Settings.


@pytest.mark.parametrize("strategy", ["flora", "fedex"])
@pytest.mark.parametrize(
    "optimiser", [{"name": "momentum"}, {"name": "adam"}, {"name": "yogi"}, {"learning_rate": 0.5}]
)
def test_strategies_with_exact_results_take_no_optimiser(strategy, optimiser):
    config = parse_config({"strategy": strategy, "server_optimiser": optimiser})
    with pytest.raises(ConfigError) as caught:
        check_optimiser(config)
    assert caught.value.code == "SAM-C222"
    assert strategy in caught.value.message
    assert "server_optimiser" in caught.value.hint


@pytest.mark.parametrize("strategy", SHARING)
def test_every_strategy_takes_the_plain_step_and_the_others_take_any(strategy):
    check_optimiser(parse_config({"strategy": strategy}))
    if strategy not in ("flora", "fedex"):
        for name in OPTIMISERS:
            tree = {"name": name, "learning_rate": 0.1}
            check_optimiser(parse_config({"strategy": strategy, "server_optimiser": tree}))
