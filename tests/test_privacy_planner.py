"""The accountants against dp-accounting itself, and what the planner makes of them."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import typer
import yaml
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant
from typer.testing import CliRunner, Result

from samaritan.cli import privacy
from samaritan.config import PrivacyConfig, load_config, parse_config
from samaritan.errors import PrivacyError, SamaritanError
from samaritan.models.adapter import build_adapted
from samaritan.privacy import accounting
from samaritan.privacy.accounting import Epsilon, Spending, epsilon_of, noise_for
from samaritan.privacy.planner import alternatives, outlook
from samaritan.privacy.rules import check_privacy

DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"

_SETTINGS = [
    # rate, noise, steps, delta
    (0.1, 1.0, 50, 1e-5),
    (0.1, 2.0, 200, 1e-5),
    (0.05, 1.0, 400, 1e-4),
    (0.02, 0.8, 500, 1e-5),
    (0.01, 1.5, 1000, 1e-6),
    (0.2, 3.0, 100, 1e-5),
    (0.5, 4.0, 60, 3e-4),
    (1.0, 4.0, 50, 1e-5),
    (1.0, 20.0, 10, 1e-3),
    (0.08, 1.2, 1, 1e-5),
]
"""From a single step to a thousand, from no sampling to one record in a hundred."""


@pytest.mark.parametrize(("rate", "noise", "steps", "delta"), _SETTINGS)
def test_both_accountants_agree_with_dp_accounting(rate, noise, steps, delta):
    """The loss distribution within a thousandth; Renyi moments within 4 %.

    Opacus and dp-accounting turn moments into epsilon on different grids of orders, and bound the
    moments of fractional orders differently.
    """
    found = epsilon_of([Spending(rate, noise, steps)], delta)
    losses = privacy_loss_distribution.from_gaussian_mechanism(noise, sampling_prob=rate)
    exact = losses.self_compose(steps).get_epsilon_for_delta(delta)
    moments = RdpAccountant()
    moments.compose(SelfComposedDpEvent(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps))
    assert found.pld == pytest.approx(exact, rel=1e-3)
    assert found.rdp == pytest.approx(moments.get_epsilon(delta), rel=0.04)
    assert found.rdp >= found.pld


@pytest.mark.parametrize(
    ("records", "batch", "noise", "epochs", "delta", "rdp", "pld"),
    [
        (100, 8, 1.0, 30, 1e-3, 9.10, 7.90),
        (300, 16, 1.0, 30, 1 / 3000, 7.70, 6.79),
        (300, 16, 2.0, 30, 1 / 3000, 2.51, 2.23),
        (1000, 32, 1.0, 30, 1e-5, 7.00, 6.36),
        (3000, 64, 0.8, 20, 1e-5, 7.47, 6.66),
    ],
)
def test_epsilon_is_that_of_the_published_table(records, batch, noise, epochs, delta, rdp, pld):
    """Steps are rounded in the table, so that the last digit may differ by one or two."""
    steps = round(epochs * records / batch)
    found = epsilon_of([Spending(batch / records, noise, steps)], delta)
    assert found.pld == pytest.approx(pld, abs=0.03)
    assert found.rdp == pytest.approx(rdp, rel=0.02)


def test_without_sampling_epsilon_is_that_of_one_gaussian_with_less_noise():
    """Composed Gaussians are one Gaussian, whose delta is known in closed form (1805.06530)."""
    noise, steps, delta = 4.0, 25, 1e-5
    found = epsilon_of([Spending(1.0, noise, steps)], delta).pld
    mu = math.sqrt(steps) / noise

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    spent = phi(mu / 2 - found / mu) - math.exp(found) * phi(-mu / 2 - found / mu)
    assert spent == pytest.approx(delta, rel=0.01)


def test_what_was_spent_in_parts_costs_as_much_as_at_once():
    parts = epsilon_of([Spending(0.1, 2.0, 30), Spending(0.1, 2.0, 70)], 1e-5)
    assert parts == epsilon_of([Spending(0.1, 2.0, 100)], 1e-5)
    assert epsilon_of([], 1e-5) == Epsilon(0.0, 0.0)


def test_two_mechanisms_cost_more_than_either():
    first, second = Spending(0.1, 2.0, 50), Spending(0.2, 3.0, 50)
    both = epsilon_of([first, second], 1e-5).pld
    assert both > max(epsilon_of([one], 1e-5).pld for one in (first, second))
    assert both < sum(epsilon_of([one], 1e-5).pld for one in (first, second))


@pytest.fixture
def _fresh():
    """Values of a planted accountant must not outlive it."""
    accounting._epsilon.cache_clear()
    yield
    accounting._epsilon.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_accountants_that_contradict_each_other_stop_everything(monkeypatch):
    true = accounting._by_moments
    monkeypatch.setattr(accounting, "_by_moments", lambda *spent: 0.8 * true(*spent))
    with pytest.raises(PrivacyError, match="contradict each other") as caught:
        epsilon_of([Spending(0.1, 2.0, 100)], 1e-5)
    assert caught.value.code == "SAM-P002"


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_an_accountant_without_a_number_stops_everything(monkeypatch, value):
    monkeypatch.setattr(accounting, "_by_loss_distribution", lambda *spent: value)
    with pytest.raises(PrivacyError) as caught:
        epsilon_of([Spending(0.1, 2.0, 100)], 1e-5)
    assert caught.value.code == "SAM-P001"


@pytest.mark.parametrize(
    ("epsilon", "rate", "steps"), [(4.0, 0.1, 100), (0.5, 1.0, 50), (2.0, 1.0, 10)]
)
def test_fitted_noise_is_within_the_budget_and_hardly_more_than_needed(epsilon, rate, steps):
    noise = noise_for(epsilon, 1e-5, rate, steps)
    assert epsilon_of([Spending(rate, noise, steps)], 1e-5).pld <= epsilon
    assert epsilon_of([Spending(rate, 0.99 * noise, steps)], 1e-5).pld > epsilon


def test_a_budget_that_no_noise_keeps_is_refused():
    with pytest.raises(PrivacyError) as caught:
        noise_for(1e-6, 1e-9, 1.0, 10_000)
    assert caught.value.code == "SAM-P003"


# The planner


def _asked(**privacy):
    settings = {"unit": "patient", "epsilon": 2, "records": 200, "steps_per_round": 10} | privacy
    return parse_config({"rounds": 5, "privacy": settings})


def test_the_noise_of_a_step_and_of_a_run_follow_from_the_plan():
    found = outlook(_asked(), 90_000, 4)
    assert found.plan.noise_multiplier == noise_for(2.0, 1e-5, 0.1, 50)
    assert found.noise_of_step == pytest.approx(found.plan.noise_multiplier * 300 / 20)
    # 50 steps at 4 sites: the signal adds up, the noise by its square.
    assert found.noise_of_run == pytest.approx(found.noise_of_step / math.sqrt(200))
    assert found.epsilon() == epsilon_of([found.plan.spending(5)], 1e-5)


def test_noise_that_the_server_adds_is_not_averaged_over_sites():
    config = _asked(unit="site", records=40)
    found = outlook(config, 90_000, 40)
    assert found.noise_of_step == pytest.approx(found.plan.noise_multiplier * 300 / 40)
    assert found.noise_of_run == pytest.approx(found.noise_of_step / math.sqrt(5))


def test_alternatives_have_other_budgets_and_twice_the_rounds_and_rate():
    config = _asked(noise_multiplier=2.0)  # given, so that none has to be fitted
    plans = [o.plan for o in alternatives(config, 90_000, 1)]
    assert [(p.epsilon, p.rounds, p.sampling_rate) for p in plans] == [
        (1, 5, 0.1), (4, 5, 0.1), (8, 5, 0.1), (2, 10, 0.1), (2, 5, 0.2)
    ]  # fmt: skip
    assert len(list(alternatives(_asked(noise_multiplier=2.0, sampling_rate=0.6), 1, 1))) == 4


def test_noise_is_fitted_to_each_alternative():
    config = _asked(unit="site", records=40)
    found = [o.plan.noise_multiplier for o in alternatives(config, 90_000, 1)]
    assert found == [noise_for(e, 1e-5, 1.0, r) for e, r in ((1, 5), (4, 5), (8, 5), (2, 10))]


@functools.cache
def _plan(*arguments: str) -> Result:
    app = typer.Typer()
    app.add_typer(privacy.app, name="privacy")
    return CliRunner().invoke(app, ["privacy", "plan", *arguments])


_SMALL = ("--patients", "304", "--epsilon", "2", "--rounds", "2", "--steps-per-round", "5",
          "--sampling-rate", "1")  # fmt: skip
"""Without sampling noise is fitted in no time."""


def test_the_plan_as_json_holds_all_that_is_told():
    result = json.loads(_plan(*_SMALL, "--parameters", "1000", "--json").stdout)
    assert result["records"] == 300
    assert result["delta"] == 1e-5
    assert result["epsilon_by"]["pld"] <= 2 == result["epsilon"]
    assert result["epsilon_by"]["rdp"] >= result["epsilon_by"]["pld"]
    assert result["noise_multiplier"] == noise_for(2.0, 1e-5, 1.0, 10)
    assert result["expected_per_step"] == 300
    assert result["parameters"] == 1000
    assert len(result["alternatives"]) == 4
    assert any("clear loss of Dice" in text for text in result["warnings"])
    assert any("304 patients are taken as 300" in text for text in result["notes"])
    for part in ("epsilon at most 2 ", "delta 1e-05", "unit: patient", "adjacency", "Poisson"):
        assert part in result["statement"]


def test_the_plan_as_text_tells_noise_alternatives_and_what_to_expect():
    result = _plan(*_SMALL)
    assert result.exit_code == 0
    for part in (
        "epsilon at most 2 ", "by loss distributions", "by Renyi moments", "expects 300 patients",
        "as asked", "expect a clear loss of Dice", "150,000 trained parameters are assumed",
        "privacy:\n  unit: patient",
    ):  # fmt: skip
        assert part in result.stdout


def test_the_section_to_paste_gives_the_same_plan():
    result = json.loads(_plan(*_SMALL, "--parameters", "1000", "--json").stdout)
    section = yaml.safe_load(result["yaml"])["privacy"]
    assert set(section) <= set(PrivacyConfig.model_fields)
    config = parse_config({
        "rounds": 2, "privacy": section, "federation": {"weighting": "uniform"},
        "data": {"classes": {"liver": 1}},
    })  # fmt: skip
    check_privacy(config)
    assert outlook(config, 1000, 1).plan.noise_multiplier == result["noise_multiplier"]


@pytest.mark.parametrize("strategy", ["fedavg", "ffa"])
def test_parameters_are_counted_from_a_configuration_as_its_model_has_them(tmp_path, strategy):
    path = tmp_path / "run.yaml"
    ranks = "peft: {rank: 4, ranks: {decoder: 2}}\n"
    path.write_text(f"{DEMO.read_text('utf-8')}strategy: {strategy}\n{ranks}", "utf-8")
    result = json.loads(_plan(*_SMALL, "--config", str(path), "--json").stdout)
    state = build_adapted(load_config(path), 3).state()
    frozen = ".lora_A" if strategy == "ffa" else "nothing"
    assert result["parameters"] == sum(v.numel() for n, v in state.items() if frozen not in n)


def test_options_go_before_the_configuration_and_its_own_values_remain(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "rounds: 2\nprivacy: {unit: patient, epsilon: 4, records: {A: 90, B: 40}, "
        "steps_per_round: 5, sampling_rate: 1, noise_multiplier: 9.0}\n",
        "utf-8",
    )
    result = json.loads(_plan("--config", str(path), "--epsilon", "2", "--json").stdout)
    assert (result["epsilon"], result["records"], result["rounds"]) == (2, 40, 2)
    assert result["noise_multiplier"] == noise_for(2.0, 1e-5, 1.0, 10)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--patients", "300"), "SAM-C402", "privacy.epsilon"),
        (("--epsilon", "8"), "SAM-C402", "privacy.records"),
        ((*_SMALL, "--delta", "0.01"), "SAM-C402", "privacy.delta"),
        (("--patients", "300", "--epsilon", "inf"), "SAM-C103", "finite"),
        ((*_SMALL, "--sampling-rate", "2"), "SAM-C103", "sampling_rate"),
    ],
)
def test_a_plan_without_a_guarantee_is_refused(arguments, code, says):
    error = _plan(*arguments).exception
    assert isinstance(error, SamaritanError)
    assert error.code == code
    assert says in error.message
