"""Attacks on privacy and secure aggregation as they are wired: sites as they are, servers that lie.

What one patient more may change, and what a server may learn of one site, where the parts meet.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from client.agent import SiteAgent
from client.exchange import update_header
from client.masking import Masking
from samaritan.codecs import encode
from samaritan.config import CodecConfig, config_sha256, parse_config
from samaritan.data.phantoms import write_phantoms
from samaritan.errors import (
    ConfigError,
    FederationError,
    PrivacyError,
    SamaritanError,
    TrainingError,
)
from samaritan.keys import make_identity
from samaritan.messages import Instruction, MaskingStep
from samaritan.models.adapter import build_adapted
from samaritan.models.bases import state_sha256
from samaritan.privacy.accounting import Spending, epsilon_of
from samaritan.privacy.adaptive import AdaptiveClip, count_noise
from samaritan.privacy.ledger import open_ledger
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.randomness import SystemRandom
from samaritan.privacy.rules import check_privacy
from samaritan.privacy.secure_sum import Coordinator, Terms
from server.checkpoints import read_round
from server.federation import shared_budget
from simulation.agents import build_agents
from simulation.privacy import privacy_results
from simulation.run import simulate
from simulation.study import read_study

SMALL = {
    "rounds": 2,
    "strategy": "ffa",
    "model": {"image_size": 32},
    "peft": {"rank": 2},
    "data": {"source": "phantoms", "sites": 3, "cases_per_site": 4, "slice_axis": "axial"},
    "training": {"precision": "fp32", "slices_per_case": 1, "batch_size": 4},
    "federation": {"weighting": "uniform", "retry_wait_s": 0, "wait_s": 5.0},
    "privacy": {
        "unit": "patient", "epsilon": 30, "records": 10, "sampling_rate": 0.5,
        "steps_per_round": 1, "slices_per_patient": 1, "noise_multiplier": 1.0,
    },
}  # fmt: skip
OPEN = {"privacy": {"unit": "none"}}
MASKED = {"secure_aggregation": True, "clip_norm": 5.0}
SITES = ["site_01", "site_02", "site_03"]


def settings(**sections):
    tree = {key: dict(v) if isinstance(v, dict) else v for key, v in SMALL.items()}
    for key, value in sections.items():
        if value == {"unit": "none"}:
            tree[key] = value
        else:
            tree[key] = tree[key] | value if isinstance(value, dict) and key in tree else value
    return parse_config(tree)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    write_phantoms(folder, 3, 4, 0)
    return folder


@pytest.fixture(scope="module")
def model(phantoms):
    config = settings()
    return build_adapted(config, len(read_study(config, phantoms).classes))


@pytest.fixture(scope="module")
def beginning(model):
    return model.state()


@pytest.fixture
def agents(phantoms, model, beginning, tmp_path):
    def make(folder="run", leave_out=0, ledgers=None, **sections):
        config = settings(**sections)
        study = read_study(config, phantoms)
        first = next(iter(study.sites))
        train = [case for case in study.sites[first] if case.split == "train"]
        kept = tuple(c for c in study.sites[first] if c not in train[:leave_out])
        study = replace(study, sites=study.sites | {first: kept})
        return build_agents(study, model, beginning, study.cache(), tmp_path / folder, ledgers)

    return make


def question(agent, server_round=1, **changes):
    state = agent.exchange.beginning
    asked = Instruction(
        server_round, agent.config.rounds, config_sha256(agent.config), agent.model.base.sha256,
        600.0, state_sha256(state),
    )  # fmt: skip
    return None, replace(asked, **changes)


def records(home):
    (path,) = (home / "ledger").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def events(folder, kind):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# A server that lies, under secure aggregation.


class Sums:
    """Sites with their real masks, and a server that asks what it likes."""

    def __init__(self, folder, count=3, **federation):
        names = [f"site_{number:02d}" for number in range(1, count + 1)]
        self.config = settings(**OPEN, data={"sites": count}, federation=MASKED | federation)
        homes = {name: folder / name for name in names}
        self.identities = {n: make_identity(homes[n] / "identity.key").public for n in names}
        self.sites = {n: Masking(n, self.config, homes[n], self.identities) for n in names}
        self.asked = Instruction(1, 2, config_sha256(self.config), "base", 60.0, "a" * 64)

    def round(self, members, states=None, attempt=1, answers=None):
        """A whole round; `states` is what each site is asked to start from."""
        asked = {n: replace(self.asked, state_sha256=(states or {}).get(n, "a" * 64))
                 for n in members}  # fmt: skip
        length = 4
        terms = Terms(self.asked.config_sha256, 1, attempt, length, 5.0)
        if "state" in Terms.__dataclass_fields__:  # where terms name it: what the server says
            terms = replace(terms, state="a" * 64)
        coordinator = Coordinator(terms, {n: self.identities[n] for n in members})

        def step(stage, data):
            def one(name):
                return MaskingStep(stage, attempt, length, data.get(name, b""))

            return [(n, self.sites[n].step(one(n), asked[n])) for n in data]

        roster = coordinator.call_roster(step("keys", dict.fromkeys(members, b"")))
        deliveries = coordinator.deliver(step("shares", dict.fromkeys(members, roster)))

        def masked():
            for number, (name, part) in enumerate(deliveries.items(), 1):
                update = encode(
                    {"w": torch.full((length,), float(number))}, CodecConfig(),
                    header=update_header(1, asked[name].state_sha256), seed=0,
                )  # fmt: skip
                wanted = MaskingStep("masked", attempt, length, part)
                yield name, self.sites[name].mask(update, {"w": (length,)}, wanted, asked[name])

        survivors = coordinator.ask_agreement(masked())
        signed = step("agreement", dict.fromkeys(coordinator.survivors, survivors))
        request = coordinator.ask_opening(signed)
        return coordinator.total(step("opening", dict.fromkeys(coordinator.survivors, request)))


def test_honest_masks_give_the_sum(tmp_path):
    total = Sums(tmp_path).round(SITES)
    shortened = sum(min(number, 2.5) for number in (1, 2, 3))  # 4 numbers to norm 5
    assert total.tolist() == pytest.approx([shortened] * 4, abs=1e-6)


def test_a_site_without_its_key_makes_no_new_one_for_its_masks(tmp_path):
    sums = Sums(tmp_path)
    (tmp_path / "site_01/identity.key").unlink()
    with pytest.raises(PrivacyError) as caught:
        sums.round(SITES)
    assert caught.value.code == "SAM-P301"
    assert not (tmp_path / "site_01/identity.key").exists()


def test_sites_that_start_from_different_states_do_not_mask_together(tmp_path):
    """Else a server gives all but one an adapter that learns nothing, and the sum is the one's."""
    states = {"site_02": "b" * 64, "site_03": "b" * 64}
    with pytest.raises(PrivacyError):
        Sums(tmp_path).round(SITES, states)


def test_a_site_masks_with_no_fewer_than_were_agreed_to(tmp_path):
    """Five must be in a sum: a server with two friends may not make one of three."""
    with pytest.raises(PrivacyError):
        Sums(tmp_path, 6, min_sites=5).round(SITES)


def test_a_question_without_masks_costs_the_patients_nothing(agents):
    one = agents(federation=MASKED)[0]
    with pytest.raises(PrivacyError) as caught:
        one.train(*question(one))
    assert caught.value.code == "SAM-P306"
    assert not list((one.budget.home / "ledger").glob("*.jsonl"))


def test_a_step_of_another_stage_is_no_mask(agents):
    one = agents(federation=MASKED, **OPEN)[0]
    with pytest.raises(PrivacyError) as caught:
        one.train(*question(one), MaskingStep("keys", 1, 4, b""))
    assert caught.value.code == "SAM-P310"


@pytest.mark.parametrize("stage", ["masked", "nothing", ""])
def test_a_step_that_is_none_before_or_after_the_update_is_refused(stage, tmp_path):
    sums = Sums(tmp_path)
    with pytest.raises(PrivacyError) as caught:
        sums.sites["site_01"].step(MaskingStep(stage, 1, 4, b""), sums.asked)
    assert caught.value.code in ("SAM-P303", "SAM-P304")


def test_a_round_is_opened_once_whatever_the_attempt(tmp_path):
    sums = Sums(tmp_path)
    sums.round(SITES)
    with pytest.raises(PrivacyError) as caught:
        sums.round(SITES, attempt=2)
    assert caught.value.code == "SAM-P206"


def test_a_site_that_lacks_its_part_gives_nothing_in_the_open(agents):
    """An agent put together without budget or masks must not fall back to plain updates."""
    private, masked = agents("a")[0], agents("b", federation=MASKED, **OPEN)[0]
    for one in (replace(private, budget=None), replace(masked, masking=None)):
        with pytest.raises(SamaritanError):
            one.train(*question(one))


# What leaves a site beside the update.


def test_the_ledger_head_does_not_tell_whether_the_patients_are_the_same_as_before(
    agents, tmp_path
):
    """One study over all patients, then another over all, or all but one."""
    heads = []
    for folder, left_out in (("same", 0), ("fewer", 1)):
        first = agents(f"{folder}/1", 0, tmp_path / folder)[0]
        first.train(*question(first))
        second = agents(f"{folder}/2", left_out, tmp_path / folder, seed=1)[0]
        _, told = second.train(*question(second))
        heads.append(told["ledger"])
    assert all(re.fullmatch("[0-9a-f]{64}", head) for head in heads)


def test_what_a_run_with_sites_as_the_unit_publishes_has_no_hash_or_time_of_an_update(tmp_path):
    config = settings(rounds=1, privacy={"unit": "site", "records": 3})
    summary = simulate(config, tmp_path / "run")
    for told in summary["rounds"][0]["sites"].values():
        assert not told["seconds"]
    known = {
        told["update_sha256"] for told in summary["rounds"][0]["sites"].values()
    } - {"", None}  # fmt: skip
    assert not known


def test_the_statement_of_a_run_holds_for_every_site(tmp_path, agents):
    numbers = {"site_01": 200_000, "site_02": 10, "site_03": 10}
    private = {"records": numbers, "delta": None}
    found = agents(privacy=private)
    budgets = {agent.site: agent.budget for agent in found}
    results = privacy_results(found[0].config, budgets, 1000)
    largest = max(site["delta"] for site in results["sites"].values())
    assert f"delta {largest:g}" in results["statement"]
    assert "200000 published" not in results["statement"]


def test_a_slice_with_its_neighbours_is_not_one_record():
    """With 3 slices in a view each slice is in three records, and the guarantee is for one."""
    config = settings(
        peft={"preset": "decoder-only"},
        data={"context_slices": 3}, privacy={"unit": "slice", "records": 50},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="context_slices"):
        check_privacy(config)


# Runs that are repeated, resumed, or left by a site.


def test_the_same_run_again_with_the_same_ledgers_is_no_row_of_lost_rounds(tmp_path):
    config = settings(rounds=1, **OPEN, federation=MASKED)
    first = simulate(config, tmp_path / "one", ledger_dir=tmp_path / "ledgers")
    assert {s["status"] for s in first["rounds"][0]["sites"].values()} == {"ok"}
    try:
        second = simulate(config, tmp_path / "two", ledger_dir=tmp_path / "ledgers")
    except SamaritanError:
        return  # a clear refusal will do; an untrained adapter that looks like a result will not
    assert {s["status"] for s in second["rounds"][0]["sites"].values()} == {"ok"}


def test_the_same_run_again_is_another_question_with_noise_and_personal_parts_of_its_own(
    phantoms, tmp_path
):
    config = settings(rounds=1, personal={"parts": ["decoder"]})
    own = []
    for folder in ("one", "two"):
        simulate(config, tmp_path / folder, data_dir=phantoms, ledger_dir=tmp_path / "ledgers")
        notes = tmp_path / folder / "sites" / "site_01"
        own.append(sorted(path.name for path in notes.glob("round_*.safetensors")))
    assert own[0] == own[1] == ["round_00001.safetensors"]
    one, two = (read_round(tmp_path / f / "checkpoints", 1).adapter for f in ("one", "two"))
    assert not same(one, two)


def spend(folder, site, config, phantoms, steps):
    home = folder / site
    patients = {
        c.subject_id for c in read_study(config, phantoms).sites[site] if c.split == "train"
    }
    identity = make_identity(home / "identity.key")
    with open_ledger(home / "ledger", identity, home / "ledger_copy") as ledger:
        cohort = ledger.cohort(sorted(patients))
        cohort.import_external([Spending(0.5, 1.0, steps)], stands_for="0:" + "a" * 64)


@pytest.mark.parametrize("federation", [{"min_sites": 3}, MASKED])
def test_a_run_ends_with_what_it_has_when_too_few_sites_have_budget(federation, phantoms, tmp_path):
    budget = epsilon_of([Spending(0.5, 1.0, 2)], 1e-5).pld * 1.001
    config = settings(privacy={"epsilon": budget}, federation=federation)
    spend(tmp_path / "ledgers", "site_02", config, phantoms, 1)
    folder = tmp_path / "run"
    summary = simulate(config, folder, data_dir=phantoms, ledger_dir=tmp_path / "ledgers")
    assert summary["adapter_of_round"] == 1
    assert [e["site"] for e in events(folder, "site_left")] == ["site_02"]
    assert not events(folder, "run_paused")


# Noise that the plan pays for, where it is made.


def moves(clip, planned, draws=1500):
    """How far the logarithm of the norm moves in a step, over many draws of the noise."""
    source, found = SystemRandom(), []
    for _ in range(draws):
        clip.clip_norm = 1.0
        clip.step(planned, source)
        found.append(math.log(clip.clip_norm))
    return np.array(found)


@pytest.mark.parametrize("unclipped", [0, 100])
def test_the_count_has_the_noise_that_the_plan_pays_for_over_the_published_number(unclipped):
    planned, clip = Mechanism(0.5, 1.0, 1.0, 1000.0), AdaptiveClip(0.5, 1.0)
    for _ in range(2):  # of the second time alone
        assert len(list(clip.counted([torch.zeros(1)] * unclipped))) == unclipped
    found = moves(clip, planned)
    rate = 0.2
    assert found.std() == pytest.approx(rate * count_noise(planned) / 1000, rel=0.12)
    assert found.mean() == pytest.approx(-rate * unclipped / 2 / 1000, abs=0.0015)


def test_noise_of_few_grid_steps_is_as_large_as_noise_of_many():
    """Rounded to the nearest step and not towards zero, which would take a third of it."""
    steps = 2**30
    mechanism = Mechanism(1.0, 1 / steps, 1.0, 1.0)
    noise = mechanism.release([], 40_000, SystemRandom()).double() * steps
    assert float(noise.std()) == pytest.approx(math.sqrt(1 + 1 / 12), rel=0.03)
    assert float((noise == 0).double().mean()) == pytest.approx(0.383, abs=0.02)


def test_a_step_with_an_adaptive_norm_has_the_noise_that_also_pays_for_the_count(
    agents, monkeypatch
):
    used, counted = [], []
    release, move = Mechanism.release, AdaptiveClip.step
    monkeypatch.setattr(
        Mechanism, "release", lambda self, *a, **k: (used.append(self), release(self, *a, **k))[1]
    )
    monkeypatch.setattr(
        AdaptiveClip, "step", lambda self, *a: (counted.append(a[0]), move(self, *a))[1]
    )
    one = agents(privacy={"clip_quantile": 0.5, "steps_per_round": 6})[0]
    one.train(*question(one))
    norms = [mechanism.clip_norm for mechanism in used[-6:]]
    assert len(set(norms)) > 1  # a noisy count may be just right
    for mechanism, planned in zip(used[-6:], counted[-6:], strict=True):
        assert planned.noise_multiplier == one.budget.plan.noise_multiplier
        both = mechanism.noise_multiplier**-2 + (2 * count_noise(planned)) ** -2
        assert both**-0.5 == pytest.approx(one.budget.plan.noise_multiplier)


def test_another_adapter_in_the_same_round_is_another_question_and_is_paid_for(agents):
    one = agents()[0]
    first, _ = one.train(*question(one))
    other = {name: value + 1e-3 for name, value in one.exchange.beginning.items()}
    payload = encode(other, CodecConfig(), header={}, seed=0)
    _, asked = question(one, state_sha256=state_sha256(other))
    second, _ = one.train(payload, asked)
    assert first != second
    kinds = [record["type"] for record in records(one.budget.home)]
    assert kinds == ["genesis", "reserve", "commit", "reserve", "commit"]


def test_the_ledger_is_about_patients_and_not_about_their_visits(phantoms, model, tmp_path):
    config = settings()
    study = read_study(config, phantoms)
    first = next(iter(study.sites))
    patient = study.cases("train", first)[0].subject_id
    visits = tuple(replace(case, subject_id=patient) for case in study.sites[first])
    study = replace(study, sites=study.sites | {first: visits})
    one = build_agents(study, model, model.state(), study.cache(), tmp_path / "visits")[0]
    assert len(one.train_cases) > 1
    assert one.budget.members == (patient,)


def test_all_sites_share_the_budget_where_a_site_is_the_unit(phantoms, tmp_path):
    study = read_study(settings(privacy={"unit": "site", "records": 3}), phantoms)
    assert shared_budget(study.config, study.training_sites, tmp_path).members == tuple(SITES)


def test_a_ledger_without_its_last_lines_is_told_by_its_copy_where_no_server_remembers(agents):
    one = agents()[0]
    one.train(*question(one))
    (path,) = (one.budget.home / "ledger").glob("*.jsonl")
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(PrivacyError, match="LEDGER ROLLED BACK"):
        one.train(*question(one, 2))


@pytest.fixture
def failing(monkeypatch):
    """One site of four fails whenever it is to train."""
    original = SiteAgent.train

    def train(self, payload, instruction, step=None):
        if self.site == "site_02":
            raise TrainingError("SAM-T102", "planted")
        return original(self, payload, instruction, step)

    monkeypatch.setattr(SiteAgent, "train", train)
    return {"rounds": 1, **OPEN, "data": {"sites": 4, "cases_per_site": 2}}


def test_a_sum_of_fewer_than_the_round_needs_stays_closed(failing, tmp_path):
    """Three of four are enough for the protocol, and not for this federation."""
    config = settings(**failing, federation=MASKED | {"min_sites": 4, "retries": 0})
    with pytest.raises(FederationError) as caught:
        simulate(config, tmp_path / "run")
    assert caught.value.code == "SAM-F108"
    (failed,) = events(tmp_path / "run", "secure_sum_failed")
    assert failed["code"] == "SAM-P220"
    record = (tmp_path / "run" / "sites" / "site_01" / "secure_sums.jsonl").read_text()
    assert "opening" not in record


def test_a_sum_is_divided_by_the_sites_that_are_in_it(failing, tmp_path):
    for folder, federation in (("open", {}), ("masked", MASKED)):
        simulate(settings(**failing, federation=federation), tmp_path / folder)
    one, two = (
        read_round(tmp_path / folder / "checkpoints", 1).adapter for folder in ("open", "masked")
    )
    for name, value in one.items():
        assert torch.allclose(value, two[name], atol=1e-6), name
