"""Rules that withstand wrong sites, and clipping; with Flower's strategies as the reference."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedMedian, FedTrimmedAvg, Krum, MultiKrum
from hypothesis import given, settings
from hypothesis import strategies as st

from samaritan.config import Config, parse_config
from samaritan.errors import FederationError
from samaritan.shares import SHARING
from simulation.grid import InProcessGrid
from strategies.clipping import clip, clipped, median_limit, update_norm
from strategies.fedavg import fedavg
from strategies.robust import (
    krum,
    median,
    minimum_sites,
    multi_krum,
    trimmed_mean,
)
from strategies.update import Situation, Update

InProcessGrid(ClientApp(), 0)  # sets who this process is; Flower makes no Message before

SHAPES = {"a": (2, 3), "b": (4,), "c": ()}
RULES = {"median": median, "trimmed-mean": trimmed_mean, "krum": krum, "multi-krum": multi_krum}
BY_NUMBER = ["median", "trimmed-mean"]
BY_SITE = ["krum", "multi-krum"]
SITES = range(5, 10)


def situation(byzantine=1):
    config = parse_config({"federation": {"byzantine_sites": byzantine}})
    return Situation({}, 3, config)


def near_one(seed):
    """What an honest site sends: ones, and noise."""
    rng = np.random.default_rng(seed)
    return {
        n: torch.tensor(rng.normal(1.0, 0.1, s), dtype=torch.float32) for n, s in SHAPES.items()
    }


def scaled(delta, factor):
    return {name: value * factor for name, value in delta.items()}


def filled(value):
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


def updates_of(deltas, weights=None, counts=None):
    """Updates of sites s00, s01, ... in this order."""
    weights, counts = weights or itertools.repeat(1.0), counts or itertools.repeat({})
    rows = zip(deltas, weights, counts, strict=False)
    return [Update(f"s{i:02}", {}, d, w, c) for i, (d, w, c) in enumerate(rows)]


def flat(delta):
    return torch.cat([delta[name].flatten() for name in SHAPES])


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in right)


# The rules against Flower, formulas and libraries.


def record(delta):
    return ArrayRecord({name: Array(value.numpy()) for name, value in delta.items()})


def flower(strategy, deltas):
    """What Flower's strategy makes of the deltas, all of equal weight."""
    question = Message(RecordDict(), message_type="train", dst_node_id=5)
    question.metadata.__dict__.update(_message_id="m", _run_id=1, _src_node_id=1)
    replies = [
        Message(
            RecordDict({"arrays": record(d), "metrics": MetricRecord({"num-examples": 1})}),
            reply_to=question,
        )
        for d in deltas
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in arrays.items()}


@pytest.mark.parametrize(("sites", "byzantine"), [(5, 1), (6, 1), (8, 2), (9, 3), (49, 1)])
def test_rules_equal_flowers_on_random_updates(sites, byzantine):
    deltas = [near_one(i) for i in range(sites)]
    # Flower cuts int(beta n) values; a quarter more than f / n, as int(1 / 49 * 49) is 0.
    references = {
        "median": FedMedian(),
        "trimmed-mean": FedTrimmedAvg(beta=(byzantine + 0.25) / sites),
        "krum": Krum(num_malicious_nodes=byzantine),
        "multi-krum": MultiKrum(
            num_malicious_nodes=byzantine, num_nodes_to_select=sites - byzantine
        ),
    }
    for name, rule in RULES.items():
        if sites >= minimum_sites(name, byzantine):
            ours, theirs = (
                rule(updates_of(deltas), situation(byzantine)),
                flower(references[name], deltas),
            )
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(ours[n], theirs[n], rtol=1e-6, atol=0) for n in ours)


def test_trimmed_mean_by_hand():
    deltas = [filled(value) for value in (5.0, -900.0, 1.0, 3.0, 2.0, 700.0)]
    assert equal(trimmed_mean(updates_of(deltas), situation(1)), filled(2.75))
    assert equal(trimmed_mean(updates_of(deltas), situation(2)), filled(2.5))


@pytest.mark.parametrize("sites", [3, 4, 7, 8])
def test_median_is_that_of_the_standard_library(sites):
    deltas = [near_one(i) for i in range(sites)]
    result = flat(median(updates_of(deltas), situation()))
    columns = torch.stack([flat(d) for d in deltas]).double().T.tolist()
    expected = torch.tensor([statistics.median(column) for column in columns])
    assert torch.equal(result, expected.float())


def scores_by_hand(deltas, byzantine):
    rows = [flat(d).double().numpy() for d in deltas]
    scores = []
    for i, row in enumerate(rows):
        squares = sorted(((row - other) ** 2).sum() for j, other in enumerate(rows) if j != i)
        scores.append(sum(squares[: len(rows) - byzantine - 2]))
    return np.array(scores)


def scattered(seed, size):
    """Nothing like the other sites' in size or direction; huge or tiny with `size`."""
    rng = np.random.default_rng(seed)
    spread = size * np.exp(rng.normal())
    return {
        n: torch.tensor(rng.normal(0, spread, s), dtype=torch.float32) for n, s in SHAPES.items()
    }


@pytest.mark.parametrize("size", [2.0**-80, 1.0, 2.0**80])  # float32 cannot hold their squares
@pytest.mark.parametrize(("sites", "byzantine"), [(5, 1), (8, 1), (9, 2), (9, 3)])
def test_krum_takes_the_update_with_the_best_score_and_multi_krum_the_mean_of_n_minus_f(
    sites, byzantine, size
):
    for draw in range(10):
        deltas = [scattered(100 * draw + i, size) for i in range(sites)]
        order = scores_by_hand(deltas, byzantine).argsort()
        assert equal(krum(updates_of(deltas), situation(byzantine)), deltas[order[0]])
        chosen = torch.stack([flat(deltas[i]).double() for i in order[: sites - byzantine]])
        result = flat(multi_krum(updates_of(deltas), situation(byzantine)))
        assert torch.allclose(result, chosen.mean(0).float(), rtol=1e-6, atol=1e-7 * size)


def test_krum_tells_updates_apart_that_differ_by_a_ten_thousandth_of_their_size():
    """A Gram matrix in float32 gives distances below zero here."""
    common = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    spread = [3e-4, 1e-5, 2e-4, 2.5e-4, 4e-4]
    deltas = [
        {"a": common + s * torch.randn(100_000, generator=torch.Generator().manual_seed(i))}
        for i, s in enumerate(spread, 1)
    ]
    assert torch.equal(krum(updates_of(deltas), situation())["a"], deltas[1]["a"])


# Wrong sites.


def flipped(honest):
    return scaled(honest, -1.0)


def thousandfold(honest):
    return scaled(honest, 1000.0)


def huge(honest):
    return {name: torch.full_like(value, 1e30) for name, value in honest.items()}


def largest(honest):
    return {name: torch.full_like(value, -3e38) for name, value in honest.items()}


def alternating(honest):
    """Huge in one number, honest elsewhere."""
    return honest | {"c": torch.tensor(1e30)}


ATTACKS = [flipped, thousandfold, huge, largest, alternating]


def within(result, honest):
    rows = torch.stack([flat(d) for d in honest])
    return bool(((flat(result) >= rows.amin(0)) & (flat(result) <= rows.amax(0))).all())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("sites", SITES)
def test_one_wrong_site_moves_the_mean_and_no_robust_rule_beyond_the_right_ones(sites, attack):
    honest = [near_one(i) for i in range(sites - 1)]
    wrong = attack(near_one(99))
    for position in (0, sites // 2, sites - 1):
        deltas = [*honest[:position], wrong, *honest[position:]]
        assert not within(fedavg(updates_of(deltas), situation()), honest)
        for rule in RULES.values():
            result = rule(updates_of(deltas), situation())
            assert within(result, honest), rule
            assert all(v.dtype == torch.float32 and v.isfinite().all() for v in result.values())


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("byzantine", [1, 2, 3])
def test_colluding_sites_are_withstood_at_the_minimum_number_of_sites(byzantine, name, attack):
    honest = [near_one(i) for i in range(minimum_sites(name, byzantine) - byzantine)]
    deltas = honest + [attack(near_one(99))] * byzantine
    assert within(RULES[name](updates_of(deltas), situation(byzantine)), honest)


@pytest.mark.parametrize("name", BY_NUMBER)
def test_more_wrong_sites_than_the_minimum_allows_do_move_a_rule_by_number(name):
    deltas = [near_one(i) for i in range(3)] + [filled(1e6)] * 2
    assert within(RULES[name](updates_of(deltas), situation(2)), deltas[:3])
    deltas = [near_one(i) for i in range(2)] + [filled(1e6)] * 3
    assert not within(RULES[name](updates_of(deltas), situation(2)), deltas[:2])


@pytest.mark.parametrize("name", RULES)
def test_the_weight_a_site_claims_changes_nothing(name):
    deltas = [near_one(i) for i in range(6)]
    fair = RULES[name](updates_of(deltas), situation())
    assert equal(fair, RULES[name](updates_of(deltas, [1e9, 1, 5, 1e-9, 3, 2]), situation()))


# What every rule keeps to.


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("sites", SITES)
def test_equal_updates_combine_to_themselves_and_stay_as_they_were(name, sites):
    delta = near_one(0)
    result = RULES[name](updates_of([delta] * sites), situation())
    assert equal(result, delta)
    assert equal(delta, near_one(0))


@settings(max_examples=30, deadline=None)
@given(
    order=st.permutations(range(7)),
    values=st.lists(st.integers(-3, 3), min_size=14, max_size=14),
    byzantine=st.integers(1, 2),
)
def test_the_order_of_answers_does_not_matter_even_with_ties(order, values, byzantine):
    deltas = [{"a": torch.tensor(values[2 * i : 2 * i + 2], dtype=torch.float32)} for i in range(7)]
    updates = updates_of(deltas)
    for rule in RULES.values():
        shuffled = rule((updates[i] for i in order), situation(byzantine))
        assert equal(rule(updates, situation(byzantine)), shuffled)


def test_ties_of_krum_fall_the_same_way_whoever_answers_first():
    tied = {krum: [-2.0, -1.0, 1.0, 2.0, 100.0], multi_krum: [-3.0, -1.0, 0.0, 1.0, 3.0]}
    for rule, values in tied.items():
        updates = updates_of([{"a": torch.tensor(value)} for value in values])
        assert equal(rule(updates, situation()), rule(updates[::-1], situation()))


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.integers(-50, 50), min_size=15, max_size=15, unique=True),
    factor=st.sampled_from([-4.0, -1.0, 0.5, 8.0]),
    shift=st.integers(-64, 64),
)
def test_scaling_and_shifting_all_updates_does_so_to_the_result(values, factor, shift):
    deltas = [{"a": torch.tensor(values[3 * i : 3 * i + 3], dtype=torch.float32)} for i in range(5)]
    moved = [{"a": d["a"] * factor + shift} for d in deltas]
    for rule in RULES.values():
        expected = rule(updates_of(deltas), situation())["a"] * factor + shift
        assert torch.allclose(rule(updates_of(moved), situation())["a"], expected, atol=1e-4)


@pytest.mark.parametrize("byzantine", [1, 2])
@pytest.mark.parametrize("name", RULES)
def test_too_few_updates_are_refused_with_both_numbers(name, byzantine):
    needed = {"median": 2, "trimmed-mean": 2, "krum": 2, "multi-krum": 2}[name] * byzantine + (
        1 if name in BY_NUMBER else 3
    )
    assert minimum_sites(name, byzantine) == needed
    deltas = [near_one(i) for i in range(needed)]
    assert RULES[name](updates_of(deltas), situation(byzantine)).keys() == SHAPES.keys()
    with pytest.raises(FederationError) as caught:
        RULES[name](updates_of(deltas[:-1]), situation(byzantine))
    assert caught.value.code == "SAM-F105"
    for text in ("round 3", f"{needed - 1} usable", f"needs {needed}", f"sites = {byzantine}"):
        assert text in caught.value.message


@pytest.mark.parametrize("name", RULES)
def test_no_update_combines_to_nothing(name):
    assert RULES[name](iter([]), situation()) == {}


def test_strategies_that_compare_nothing_need_one_site():
    others = SHARING.keys() - RULES.keys()
    assert others
    assert all(minimum_sites(name, 5) == 1 for name in others)


# Partial labels.


@pytest.mark.parametrize("name", BY_NUMBER)
def test_sites_without_a_say_are_left_out_number_by_number(name):
    """Each number of the result is what the rule makes of the sites with a say in it."""
    deltas = [near_one(i) for i in range(6)]
    rows = torch.tensor([[1.0], [0.0]])
    counts = [{}, {"a": rows}, {"b": torch.zeros(())}, {}, {"a": 1 - rows, "b": torch.ones(4)}, {}]
    result = RULES[name](updates_of(deltas, counts=counts), situation())
    rule = RULES[name]

    def of(sites):
        return rule(updates_of([deltas[i] for i in sites]), situation())

    assert torch.equal(result["a"][0], of([0, 1, 2, 3, 5])["a"][0])
    assert torch.equal(result["a"][1], of([0, 2, 3, 4, 5])["a"][1])
    assert torch.equal(result["b"], of([0, 1, 3, 4, 5])["b"])
    assert torch.equal(result["c"], of(range(6))["c"])


@pytest.mark.parametrize("name", BY_NUMBER)
def test_a_number_that_too_few_sites_label_is_refused_by_name(name):
    deltas = [near_one(i) for i in range(4)]
    silent = {"a": torch.tensor([[1.0], [0.0]])}
    kept = RULES[name](updates_of(deltas, counts=[{}, {}, {}, silent]), situation())
    assert kept.keys() == SHAPES.keys()
    with pytest.raises(FederationError, match=r"2 usable .* number of a") as caught:
        RULES[name](updates_of(deltas, counts=[{}, silent, silent, {}]), situation())
    assert caught.value.code == "SAM-F105"


@pytest.mark.parametrize("name", BY_SITE)
def test_krum_compares_only_sites_with_a_say_in_everything(name):
    deltas = [near_one(i) for i in range(5)]
    silent, nearest = {"a": torch.tensor([[1.0], [0.0]])}, filled(1.0)
    counts = [*[{}] * 4, {"b": torch.ones(4)}, silent]
    result = RULES[name](updates_of([*deltas, nearest], counts=counts), situation())
    assert equal(result, RULES[name](updates_of(deltas), situation()))
    with pytest.raises(FederationError, match="4 usable updates have a say in everything"):
        RULES[name](updates_of(deltas, counts=[*[{}] * 4, silent]), situation())
    with pytest.raises(FederationError, match="0 usable"):
        RULES[name](updates_of(deltas, counts=[silent] * 5), situation())


# Clipping.


def test_the_norm_is_that_of_all_tensors_together():
    assert update_norm({"a": torch.full((2, 2), 2.0), "b": torch.tensor(3.0)}) == 5.0
    assert update_norm({"a": torch.zeros(3)}) == 0.0
    assert update_norm({}) == 0.0
    assert math.isclose(update_norm({"a": torch.full((4,), 3e38)}), 6e38, rel_tol=1e-6)


@pytest.mark.parametrize("factor", [1.001, 1e3, 1e30, 1e38])
def test_a_long_update_keeps_its_direction_and_gets_the_norm(factor):
    delta = near_one(0)
    (update,) = updates_of([scaled(delta, factor)], [7.0], [{"a": torch.ones(())}])
    limit = update_norm(delta)
    short = clip(update, limit)
    assert math.isclose(update_norm(short.delta), limit, rel_tol=1e-6)
    assert all(torch.allclose(short.delta[n], delta[n], rtol=1e-5, atol=0) for n in SHAPES)
    assert all(v.dtype == torch.float32 for v in short.delta.values())
    assert (short.site, short.weight, short.counts) == (update.site, 7.0, update.counts)
    assert equal(update.delta, scaled(delta, factor))


def test_a_short_update_is_left_alone():
    (update,) = updates_of([near_one(0)])
    assert clip(update, update_norm(update.delta)) is update
    (nothing,) = updates_of([filled(0.0)])
    assert clip(nothing, 0.0) is nothing


@pytest.mark.parametrize("limit", [None, 2.0])
def test_a_fixed_limit_takes_one_update_at_a_time_and_reports_the_norm_as_it_came(limit):
    asked = []

    def arriving():
        for update in updates_of([filled(1.0), filled(1000.0), filled(0.1)]):
            asked.append(update.site)
            yield update

    norms = {}
    stream = clipped(arriving(), limit, norms)
    first = next(stream)
    assert asked == ["s00"]
    rest = list(stream)
    unit = math.sqrt(11)
    expected = {"s00": unit, "s01": 1000 * unit, "s02": 0.1 * unit}
    assert norms == pytest.approx(expected)
    lengths = [update_norm(u.delta) for u in (first, *rest)]
    wanted = list(expected.values()) if limit is None else [2.0, 2.0, 0.1 * unit]
    assert lengths == pytest.approx(wanted)


def test_the_median_norm_is_a_sites_own_and_the_lower_one_of_two():
    assert median_limit([4.0, 1.0, 9.0]) == 4.0
    assert median_limit([4.0, 1.0, 9.0, 2.0]) == 2.0
    assert median_limit([1.0, 1000.0]) == 1.0
    assert median_limit([]) == 0.0
    assert list(clipped([], "median", {})) == []


def test_a_thousandfold_update_counts_as_one_under_the_median_norm_and_shows_in_the_norms():
    deltas = [near_one(i) for i in range(4)] + [thousandfold(near_one(4))]
    norms = {}
    shortened = list(clipped(iter(updates_of(deltas)), "median", norms))
    assert [u.site for u in shortened] == list(norms)
    limit = statistics.median(norms.values())
    assert norms["s04"] > 500 * limit
    assert max(update_norm(u.delta) for u in shortened) <= limit * (1 + 1e-6)
    mean = fedavg(shortened, Situation({}, 1, Config()))
    assert all(torch.allclose(v, torch.ones_like(v), atol=0.3) for v in mean.values())
    assert float(flat(fedavg(updates_of(deltas), situation())).min()) > 100
