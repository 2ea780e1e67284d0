"""The rules for LoRA products, on adapters that were trained, against dense float64 arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from samaritan.config import Config, parse_config
from samaritan.models.adapter import AdapterState, at_rank, build_adapted
from samaritan.models.lora import Pair, lora_pairs
from samaritan.training.losses import SegmentationLoss
from strategies.fedavg import fedavg
from strategies.meter import ProductMeter
from strategies.products import Term, factorised
from strategies.ranks import view
from strategies.rules import get_rule
from strategies.update import Situation, Update

RANK = 4
PRODUCT_RULES = ["svd", "fedex", "flora"]


def config_of(strategy: str, **more: Any) -> Config:
    return parse_config({
        "strategy": strategy, "model": {"image_size": 32}, "data": {"context_slices": 1},
        "peft": {"rank": RANK}, "training": {"precision": "fp32"}, **more,
    })  # fmt: skip


def train(model: Any, start: AdapterState, seed: int, steps: int) -> AdapterState:
    """What AdamW makes of an adapter on a site's images."""
    model.load(start)
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((2, 1, 32, 32), generator=generator)
    labels = torch.randint(0, 2, (2, 32, 32), generator=generator)
    optimiser = torch.optim.AdamW(model.trained.values(), lr=5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        SegmentationLoss(0.5)(model.segmenter(images), labels).backward()
        optimiser.step()
    return model.state()


@pytest.fixture(scope="module")
def model() -> Any:
    return build_adapted(config_of("fedavg"), 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def fresh(model: Any) -> AdapterState:
    return model.state()


@pytest.fixture(scope="module")
def before(model: Any, fresh: AdapterState) -> AdapterState:
    """A trained adapter, to which something was folded before."""
    state = train(model, fresh, 0, 3)
    generator = torch.Generator().manual_seed(1)
    for pair in lora_pairs(state):
        shape = len(state[pair.b]), state[pair.a].shape[1]
        state[pair.folded] = 0.01 * torch.randn(shape, generator=generator)
    return state


def trained_update(
    model: Any, start: AdapterState, seed: int, weight: float, steps: int = 2
) -> Update:
    plain = {name: value for name, value in start.items() if ".folded" not in name}
    rank = len(plain[lora_pairs(plain)[0].a])
    end = at_rank(train(model, plain, seed, steps), rank)
    return Update(f"{seed}", start, {n: end[n] - plain[n] for n in plain}, weight)


@pytest.fixture(scope="module")
def updates(model: Any, before: AdapterState) -> list[Update]:
    """What three sites made of one adapter."""
    return [trained_update(model, before, seed, w) for seed, w in ((2, 3.0), (3, 1.0), (4, 2.5))]


@pytest.fixture(scope="module")
def uneven(model: Any, before: AdapterState) -> list[Update]:
    """Updates of sites that were sent other adapters than the server's, two of smaller rank."""
    noisy = {n: v + 1e-3 * torch.randn_like(v) for n, v in before.items()}
    small = view(before, 2)
    return [
        trained_update(model, before, 5, 2.0), trained_update(model, noisy, 6, 1.0),
        trained_update(model, small, 7, 1.5), trained_update(model, small, 8, 0.5),
    ]  # fmt: skip


def apply(step: AdapterState, state: AdapterState) -> AdapterState:
    return {name: value + step[name] if name in step else value for name, value in state.items()}


def run(strategy: str, updates: list[Update], before: AdapterState, **more: Any) -> AdapterState:
    """The adapter after a round."""
    situation = Situation(before, 1, config_of(strategy, **more))
    return apply(get_rule(strategy)(iter(updates), situation), before)


def product(state: AdapterState, pair: Pair) -> Tensor:
    return state[pair.b].double() @ state[pair.a].double()


def ideal(updates: list[Update], before: AdapterState, pair: Pair) -> Tensor:
    """B A + sum w (B_i A_i - B0_i A0_i) / sum w, dense and in float64."""
    total = sum(u.weight for u in updates)
    result = product(before, pair)
    for update in updates:
        end = {n: update.start[n] + update.delta.get(n, 0) for n in (pair.a, pair.b)}
        result = result + update.weight / total * (product(end, pair) - product(update.start, pair))
    return result


def distance(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).norm() / other.double().norm()).item()


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


# Against dense arithmetic.


@pytest.mark.parametrize("sites", ["updates", "uneven"])
def test_svd_is_the_truncated_svd_of_the_ideal_product(
    request: pytest.FixtureRequest, before: AdapterState, sites: str
) -> None:
    updates = request.getfixturevalue(sites)
    after = run("svd", updates, before)
    for pair in lora_pairs(before):
        best = truncated(ideal(updates, before, pair), RANK)
        assert distance(product(after, pair), best) < 1e-5
        assert torch.equal(after[pair.folded], before[pair.folded])
        gram_a, gram_b = after[pair.a] @ after[pair.a].T, after[pair.b].T @ after[pair.b]
        assert distance(gram_a, gram_b) < 1e-4, "A and B are balanced"


@pytest.mark.parametrize(("strategy", "sites"), [
    ("fedex", "updates"), ("flora", "updates"), ("flora", "uneven"),
])  # fmt: skip
def test_folding_loses_nothing_of_the_ideal_product(
    request: pytest.FixtureRequest, before: AdapterState, strategy: str, sites: str
) -> None:
    updates = request.getfixturevalue(sites)
    after = run(strategy, updates, before)
    for pair in lora_pairs(before):
        wanted = ideal(updates, before, pair)
        folded = after[pair.folded].double() - before[pair.folded].double()
        assert distance(product(after, pair) + folded, wanted) < 1e-6
        if strategy == "flora":
            assert not after[pair.b].any()


def test_fedex_is_exact_where_sites_began_apart_from_the_server(
    before: AdapterState, uneven: list[Update]
) -> None:
    after = run("fedex", uneven[:2], before)
    for pair in lora_pairs(before):
        folded = after[pair.folded].double() - before[pair.folded].double()
        wanted = ideal(uneven[:2], before, pair)
        assert distance(product(after, pair) + folded, wanted) < 1e-6


def test_averaging_factors_is_not_averaging_products(
    before: AdapterState, updates: list[Update]
) -> None:
    after = run("fedavg", updates, before)
    gaps = [distance(product(after, p), ideal(updates, before, p)) for p in lora_pairs(before)]
    assert min(gaps) > 1e-4, "or these tests could not tell the rules apart"


@pytest.mark.parametrize("strategy", PRODUCT_RULES)
def test_other_tensors_are_averaged(
    before: AdapterState, updates: list[Update], strategy: str
) -> None:
    plain, after = run("fedavg", updates, before), run(strategy, updates, before)
    others = [n for n in before if "lora_" not in n and "folded" not in n]
    assert others
    assert all(torch.equal(after[n], plain[n]) for n in others)
    if strategy == "fedex":
        assert all(torch.equal(after[n], plain[n]) for n in before if "lora_" in n)


@pytest.mark.parametrize("strategy", PRODUCT_RULES)
def test_with_one_site_every_rule_is_fedavg(
    before: AdapterState, updates: list[Update], strategy: str
) -> None:
    plain, after = run("fedavg", updates[:1], before), run(strategy, updates[:1], before)
    for pair in lora_pairs(before):
        folded = after[pair.folded].double() - before[pair.folded].double()
        # As steps are added in float32, a balanced A' keeps the rounding of a larger former A.
        assert distance(product(after, pair) + folded, product(plain, pair)) < 3e-6
        if strategy == "fedex":
            assert not folded.any()


@pytest.mark.parametrize("strategy", PRODUCT_RULES)
def test_the_order_of_sites_does_not_matter(
    before: AdapterState, updates: list[Update], strategy: str
) -> None:
    one, other = run(strategy, updates, before), run(strategy, updates[::-1], before)
    assert all(torch.allclose(one[n], other[n], rtol=1e-4, atol=1e-6) for n in before)


@pytest.mark.parametrize("strategy", PRODUCT_RULES)
def test_without_an_update_nothing_changes(before: AdapterState, strategy: str) -> None:
    assert get_rule(strategy)([], Situation(before, 1, config_of(strategy))) == {}


@pytest.mark.parametrize("strategy", PRODUCT_RULES)
def test_a_personal_factor_leaves_the_other_to_fedavg(
    before: AdapterState, updates: list[Update], strategy: str
) -> None:
    sent = [
        replace(u, delta={n: t for n, t in u.delta.items() if "lora_B" not in n}) for u in updates
    ]
    after = run(strategy, sent, before, personal={"parts": ["lora_B"]})
    plain = run("fedavg", sent, before)
    assert all(torch.equal(after[n], plain[n]) for n in before)


# The first round, and products of a lower rank.


@pytest.mark.parametrize("strategy", ["svd", "flora"])
def test_the_first_round_learns_and_the_second_can(
    model: Any, fresh: AdapterState, strategy: str
) -> None:
    start = dict(fresh)
    for pair in lora_pairs(fresh):
        start[pair.folded] = torch.zeros(len(fresh[pair.b]), fresh[pair.a].shape[1])
    updates = [trained_update(model, start, seed, 1.0, steps=1) for seed in (2, 3)]
    after = run(strategy, updates, start)
    for pair in lora_pairs(fresh):
        wanted = ideal(updates, start, pair)
        expected = truncated(wanted, RANK) if strategy == "svd" else wanted
        assert distance(product(after, pair) + after[pair.folded].double(), expected) < 1e-5
        assert torch.linalg.matrix_rank(after[pair.a]) == RANK


def test_nothing_learned_leaves_a_fresh_adapter_as_it_was(fresh: AdapterState) -> None:
    nothing = Update("a", fresh, {n: torch.zeros_like(v) for n, v in fresh.items()}, 1.0)
    after = run("svd", [nothing, nothing], fresh)
    assert all(torch.equal(after[n], fresh[n]) for n in fresh)


@pytest.mark.parametrize("real", [0, 1, 3])
def test_directions_without_a_product_keep_the_former_a(real: int) -> None:
    generator = torch.Generator().manual_seed(real)
    b, a = torch.randn(9, 5, generator=generator), torch.randn(5, 7, generator=generator)
    thin_b = torch.randn(9, 3, generator=generator)
    thin_b[:, real:] = 0
    thin_a = torch.randn(3, 7, generator=generator)
    new_b, new_a = factorised([Term(0.5, thin_b, thin_a), Term(0.25, thin_b, thin_a)], 5, b, a)
    torch.testing.assert_close(new_b @ new_a, 0.75 * thin_b @ thin_a)
    assert torch.linalg.matrix_rank(new_b) == real
    idle = torch.linalg.svd(new_b).Vh[real:]  # directions of the rank where B is zero
    torch.testing.assert_close(idle @ new_a, idle @ a)


def test_numbers_beyond_float32_products_do_not_stop_the_round(
    before: AdapterState, updates: list[Update]
) -> None:
    wild = replace(updates[0], delta={n: torch.full_like(v, 1e30) for n, v in before.items()
                                      if "folded" not in n})  # fmt: skip
    after = run("svd", [*updates, wild], before)
    assert all(torch.isfinite(value).all() for value in after.values())


# Alignment.


def test_factors_stay_near_the_former_ones(before: AdapterState, updates: list[Update]) -> None:
    balanced = run("svd", updates[:1], before)
    again = Update("a", balanced, {}, 1.0)
    after = run("svd", [again], balanced)
    for pair in lora_pairs(before):
        for name in (pair.a, pair.b):
            assert distance(after[name], balanced[name]) < 1e-4


def test_no_other_turn_is_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(9, 3, generator=generator), torch.randn(3, 7, generator=generator)
    moved_b = b + 0.5 * torch.randn(9, 3, generator=generator)
    moved_a = a + 0.5 * torch.randn(3, 7, generator=generator)
    new_b, new_a = factorised([Term(0.5, b, a), Term(0.5, moved_b, moved_a)], 3, b, a)

    def gap(turn: Tensor) -> float:
        return ((turn @ new_a - a).norm() ** 2 + (new_b @ turn.T - b).norm() ** 2).item()

    for _ in range(200):
        skew = 0.1 * torch.randn(3, 3, generator=generator)
        assert gap(torch.linalg.matrix_exp(skew - skew.T)) > gap(torch.eye(3))


# FLoRA's new A.


def test_flora_draws_a_as_peft_does_from_seed_round_and_name(
    before: AdapterState, updates: list[Update]
) -> None:
    def drawn(seed: int, server_round: int) -> list[Tensor]:
        situation = Situation(before, server_round, config_of("flora", seed=seed))
        after = apply(get_rule("flora")(updates, situation), before)
        return [after[pair.a] for pair in lora_pairs(before)]

    state = torch.random.get_rng_state()
    first = drawn(0, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, first, drawn(0, 1)))
    for other in (drawn(0, 2), drawn(1, 1)):
        assert not any(map(torch.equal, first, other))
    assert len({a.sum().item() for a in first}) == len(first)
    for a in first:
        bound = 1 / math.sqrt(a.shape[1])
        assert 0.9 * bound < a.abs().max() <= 1.001 * bound


# Smaller ranks.


def test_a_view_is_the_best_adapter_of_its_rank(before: AdapterState) -> None:
    small = view(before, 2)
    for pair in lora_pairs(before):
        assert len(small[pair.a]) == small[pair.b].shape[1] == 2
        assert distance(product(small, pair), truncated(product(before, pair), 2)) < 1e-5
    assert all(small[n] is t for n, t in before.items() if "lora_" not in n)


def test_a_view_of_a_fresh_adapter_is_a_slice(fresh: AdapterState) -> None:
    small, cut = view(fresh, 2), at_rank(fresh, 2)
    assert small.keys() == cut.keys()
    for name, value in small.items():
        assert torch.equal(value, cut[name])
        assert "lora_" not in name or value.is_contiguous()


@pytest.mark.parametrize("rank", [None, RANK, RANK + 1])
def test_a_site_of_full_rank_sees_the_adapter_itself(
    before: AdapterState, rank: int | None
) -> None:
    assert view(before, rank) is before


# The meter.


def measured(updates: list[Update], before: AdapterState, after: AdapterState) -> float | None:
    meter = ProductMeter(before)
    for update in updates:
        meter.add(update)
    return meter.error(after)


@pytest.mark.parametrize("sites", ["updates", "uneven"])
@pytest.mark.parametrize("strategy", ["fedavg", *PRODUCT_RULES])
def test_the_meter_agrees_with_dense_arithmetic(
    request: pytest.FixtureRequest, before: AdapterState, strategy: str, sites: str
) -> None:
    updates = request.getfixturevalue(sites)
    if sites == "uneven" and strategy in ("fedavg", "fedex"):
        updates = updates[:2]
    after = run(strategy, updates, before)
    gaps = []
    for pair in lora_pairs(before):
        folded = after[pair.folded].double() - before[pair.folded].double()
        gaps.append(distance(product(after, pair) + folded, ideal(updates, before, pair)))
    error = measured(updates, before, after)
    assert error == pytest.approx(sum(gaps) / len(gaps), rel=1e-3, abs=1e-9)
    assert (error < 1e-6) == (strategy in ("fedex", "flora"))


@pytest.mark.parametrize(("shared", "plain", "best"), [
    (0.0, 0.693, 0.423), (0.5, 0.277, 0.236), (0.9, 0.041, 0.037),
])  # fmt: skip
def test_synthetic_factors_give_the_known_errors(shared: float, plain: float, best: float) -> None:
    # vit_b, rank 32, the six weights of Fed-KiTS; `shared` is the variance all sites have in common
    generator = torch.Generator().manual_seed(0)
    pair, shapes = Pair("x.lora_A", "x.lora_B", "x.folded"), ((32, 768), (768, 32))

    def draw(share: float) -> AdapterState:
        return {
            name: math.sqrt(share) * torch.randn(shape, generator=generator)
            for name, shape in zip((pair.a, pair.b), shapes, strict=True)
        }

    before = draw(shared)
    updates = [
        Update(f"{i}", before, draw(1 - shared), weight)
        for i, weight in enumerate((0.03, 0.18, 0.15, 0.10, 0.05, 0.49))
    ]
    for strategy, known in (("fedavg", plain), ("svd", best)):
        error = measured(updates, before, run(strategy, updates, before))
        assert error == pytest.approx(known, rel=0.07)  # known as a mean that has narrower layers


def test_the_meter_says_nothing_where_nothing_is_known(
    before: AdapterState, updates: list[Update]
) -> None:
    assert ProductMeter(before).error(before) is None
    tokens = {n: v for n, v in before.items() if "lora_" not in n and "folded" not in n}
    assert measured([Update("a", tokens, tokens, 1.0)], tokens, tokens) is None
    meter = ProductMeter(before, {n for n in before if "lora_B" in n})
    meter.add(updates[0])
    assert meter.error(before) is None


def test_a_round_without_change_has_no_error(before: AdapterState) -> None:
    zeros = {n: torch.zeros_like(v) for n, v in before.items() if "folded" not in n}
    idle = [Update(f"{weight}", before, zeros, weight) for weight in (0.3, 1.1, 2.7)]
    assert measured(idle, before, before) == 0.0


def test_averaging_one_factor_alone_is_exact(before: AdapterState, updates: list[Update]) -> None:
    for kept in ("lora_A", "lora_B"):  # FFA, and a turn of RoLoRA
        sent = [
            replace(u, delta={n: t for n, t in u.delta.items() if kept not in n}) for u in updates
        ]
        situation = Situation(before, 1, config_of("fedavg"))
        error = measured(sent, before, apply(fedavg(sent, situation), before))
        assert error is not None
        assert 0 < error < 1e-6
