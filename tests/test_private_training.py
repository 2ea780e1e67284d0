"""Training under differential privacy, with real agents, ledgers and runs on tiny phantoms.

The names of tests end with the rule of thumb they guard: what one patient more or less may change
in anything that leaves a site.
"""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml

from samaritan.codecs import decode, encode
from samaritan.config import CodecConfig, Config, config_sha256, parse_config
from samaritan.data.phantoms import write_phantoms
from samaritan.errors import ConfigError, PrivacyError, SamaritanError
from samaritan.messages import Instruction
from samaritan.models.adapter import build_adapted
from samaritan.models.bases import BASES, FAMILIES, state_sha256
from samaritan.models.family import Prompts
from samaritan.privacy.accounting import Spending, epsilon_of
from samaritan.privacy.adaptive import AdaptiveClip
from samaritan.privacy.audit.gate import require_sound_mechanism
from samaritan.privacy.ledger import open_ledger
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.plan import privacy_plan
from samaritan.privacy.rules import check_privacy
from samaritan.training.feed import Batch, joined
from samaritan.training.private import patients_of
from simulation.agents import build_agents
from simulation.run import simulate
from simulation.study import read_study

SMALL = {
    "rounds": 2,
    "strategy": "ffa",
    "model": {"image_size": 32},
    "peft": {"rank": 2},
    "data": {"source": "phantoms", "sites": 3, "cases_per_site": 4, "slice_axis": "axial"},
    "training": {"precision": "fp32"},
    "federation": {"weighting": "uniform", "retry_wait_s": 0},
    "privacy": {
        "unit": "patient", "epsilon": 30, "records": 10, "sampling_rate": 0.5,
        "steps_per_round": 2, "slices_per_patient": 2, "noise_multiplier": 1.0,
    },
}  # fmt: skip
ONE_ROUND, TWO_ROUNDS = (
    epsilon_of([Spending(0.5, 1.0, 2 * rounds)], 1e-5).pld for rounds in (1, 2)
)


def settings(**sections):
    tree = {key: dict(v) if isinstance(v, dict) else v for key, v in SMALL.items()}
    for key, value in sections.items():
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


class Site:
    """A real agent of the first site, and the way to ask it."""

    def __init__(self, config, phantoms, model, folder, leave_out=0):
        study = read_study(config, phantoms)
        if leave_out:
            site = next(iter(study.sites))
            train = [case for case in study.sites[site] if case.split == "train"]
            kept = tuple(c for c in study.sites[site] if c not in train[:leave_out])
            study = replace(study, sites=study.sites | {site: kept})
        self.config, self.model = config, model
        for name, value in model.trained.items():
            value.data.copy_(BEGINNING.setdefault(name, value.detach().clone()))
        self.initial = model.state()
        self.home = folder / "sites" / next(iter(study.sites))
        self.agent = build_agents(study, model, self.initial, study.cache(), folder)[0]
        self.state = self.agent.exchange.beginning

    def train(self, server_round=1, **changes):
        asked = Instruction(
            server_round, self.config.rounds, config_sha256(self.config), self.model.base.sha256,
            600.0, state_sha256(self.state),
        )  # fmt: skip
        payload = encode(self.state, CodecConfig(), header={}, seed=0)
        return self.agent.train(payload, replace(asked, **changes))

    def update(self, *arguments, **changes):
        answer, told = self.train(*arguments, **changes)
        shapes = {n: tuple(v.shape) for n, v in self.state.items() if ".lora_A" not in n}
        return decode(answer, shapes, CodecConfig())[0], told

    def records(self):
        (path,) = (self.home / "ledger").glob("*.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]


BEGINNING = {}


@pytest.fixture
def site(phantoms, model, tmp_path):
    def make(folder="run", leave_out=0, **sections):
        return Site(settings(**sections), phantoms, model, tmp_path / folder, leave_out)

    return make


def run(config, folder, **more):
    return simulate(config, folder, **more)


# What one patient more changes.


def test_a_patient_more_changes_no_number_but_the_update_itself(site):
    """Rules 2 and 11: rate, divisor, weights, counts and sizes are public."""
    most, fewer = site("most"), site("fewer", leave_out=1)
    assert len(most.agent.train_cases) == len(fewer.agent.train_cases) + 1
    (one, told), (other, told_less) = most.train(), fewer.train()
    for name, value in {"num-examples": 10, "steps": 2}.items():
        assert told[name] == told_less[name] == value
    assert len(one) == len(other)
    assert most.agent.budget.plan == fewer.agent.budget.plan
    public = ["sigma", "sampling", "clip_C", "delta", "n_patients_public", "steps_planned"]
    for key in public:
        assert most.records()[1][key] == fewer.records()[1][key], key
    assert most.agent.budget.plan.expected_records == 5.0


def test_neither_loss_nor_time_nor_score_leaves_the_site(site, tmp_path):
    """Rules 11, 12 and 14."""
    one = site()
    _, told = one.train()
    assert told.keys() == {"num-examples", "steps", "ledger"}
    with pytest.raises(PrivacyError, match=r"privacy\.scores is withheld") as caught:
        one.agent.evaluate(None, _instruction(one))
    assert caught.value.code == "SAM-P302"


def _instruction(one):
    return Instruction(
        1, one.config.rounds, config_sha256(one.config), one.model.base.sha256, 60.0,
        state_sha256(one.state),
    )  # fmt: skip


# Noise.


def seed_everything():
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)


def test_noise_differs_between_two_runs_with_one_seed(site):
    """Rule 3: of a sample that is empty for sure, the update is noise and nothing else."""
    found = []
    for folder in ("one", "two"):
        seed_everything()
        found.append(site(folder, privacy={"sampling_rate": 1e-12}).update()[0])
    assert any(not torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_empty_sample_takes_a_noisy_step(site):
    """Rule 1."""
    update, _ = site(privacy={"sampling_rate": 1e-12}).update()
    assert all(value.any() for value in update.values())


def test_what_ffa_freezes_gets_no_noise(site):
    """Rule 15."""
    one = site()
    before = {n: v.clone() for n, v in one.model.state().items()}
    one.train()
    after = one.model.state()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == (".lora_A" in name), name


def test_all_visits_of_a_patient_are_one_record(site):
    cases = site().agent.train_cases
    visits = [replace(cases[0], case_id="again"), *cases]
    assert [len(patient) for patient in patients_of(visits)] == [2, *[1] * (len(cases) - 1)]


def test_without_noise_to_speak_of_a_step_goes_the_way_the_patients_point(site, monkeypatch):
    """The mechanism does carry the gradient: with every patient in every step, the update agrees
    with that of another run whose noise is as small, and not with one of pure noise."""
    kinds = {"sampling_rate": 1.0, "noise_multiplier": 1e-6, "epsilon": 1e12, "records": 3,
             "slices_per_patient": 8, "steps_per_round": 3}  # fmt: skip
    monkeypatch.setattr("samaritan.privacy.ledger.account.epsilon_of", _free)
    one, two = (site(folder, privacy=kinds).update()[0] for folder in ("one", "two"))
    noise = site("noise", privacy=kinds | {"noise_multiplier": 1.0, "sampling_rate": 1e-9})
    other, _ = noise.update()
    assert _cosine(one, two) > 0.5
    assert abs(_cosine(one, other)) < 0.1


def _free(spent, delta):
    from samaritan.privacy.accounting import Epsilon

    return Epsilon(0.0, 0.0)


def _cosine(one, other):
    flat = [torch.cat([v.flatten() for v in state.values()]) for state in (one, other)]
    return float(torch.nn.functional.cosine_similarity(*flat, dim=0))


# The ledger at work.


def test_a_question_asked_again_gets_the_same_bytes_for_nothing(site):
    """Rules 4 and 18: no noise is drawn twice for one answer, and a lost answer stays paid."""
    one = site()
    first, _ = one.train()
    again, _ = one.train()
    assert first == again
    assert [r["type"] for r in one.records()] == ["genesis", "reserve", "commit"]
    other = site()  # after a restart, too
    assert other.train()[0] == first
    other.train(2)
    assert [r["type"] for r in one.records()][3:] == ["reserve", "commit"]


def test_a_round_that_fails_is_paid_for_and_its_next_try_has_noise_of_its_own(site, monkeypatch):
    """Rule 4."""
    one = site()

    def broken(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("client.agent.train_privately", broken)
        with pytest.raises(KeyboardInterrupt):
            one.train()
    assert [r["type"] for r in one.records()] == ["genesis", "reserve"]
    one.train()
    assert [r["type"] for r in one.records()] == ["genesis", "reserve", "reserve", "commit"]
    assert one.agent.budget.spent().pld == pytest.approx(TWO_ROUNDS)


def test_nothing_is_computed_that_the_budget_does_not_allow(site, monkeypatch):
    one = site(privacy={"epsilon": (ONE_ROUND + TWO_ROUNDS) / 2})
    one.train()
    monkeypatch.setattr("client.agent.train_privately", None)
    with pytest.raises(PrivacyError, match="privacy budget") as caught:
        one.train(2)
    assert caught.value.code == "SAM-P101"


def test_studies_on_the_same_patients_share_their_budget(phantoms, model, tmp_path):
    """Rules 13 and 20: another learning rate is another study, and leaving one patient out gives
    nothing back."""
    first = settings(rounds=1)
    second = settings(rounds=1, seed=1, training={"learning_rate": 1e-3})
    folder = tmp_path / "ledgers"
    run(first, tmp_path / "one", ledger_dir=folder)
    summary = run(second, tmp_path / "two", ledger_dir=folder)
    for site in summary["privacy"]["sites"].values():
        assert site["epsilon"] == pytest.approx(TWO_ROUNDS)
    study = read_study(first, phantoms)
    fewer = replace(study, sites={k: v[:-1] for k, v in study.sites.items()})
    agents = build_agents(fewer, model, model.state(), study.cache(), tmp_path / "x", folder)
    assert agents[0].budget.spent().pld == pytest.approx(TWO_ROUNDS)


def test_the_server_is_told_where_the_ledger_stands_and_an_older_one_is_refused(site):
    one = site()
    _, told = one.update()
    assert len(told["ledger"]) == 64
    kept = {path: path.read_bytes() for path in one.home.glob("ledger*/*.jsonl")}
    _, later = one.update(2)
    for path, content in kept.items():
        path.write_bytes(content)
    again = site()
    with pytest.raises(PrivacyError, match="LEDGER ROLLED BACK") as caught:
        again.train(2, ledger=later["ledger"])
    assert caught.value.code == "SAM-P103"
    assert "resync" in caught.value.hint


# Whole runs.


def test_a_run_names_its_guarantee_whole_and_tells_no_score(tmp_path):
    config = settings()
    summary = run(config, tmp_path / "run")
    privacy = summary["privacy"]
    plan = privacy_plan(config, "site_01")
    expected = epsilon_of([plan.spending(2)], plan.delta)
    assert {s["epsilon"] for s in privacy["sites"].values()} == {expected.pld}
    assert {s["epsilon_rdp"] for s in privacy["sites"].values()} == {expected.rdp}
    for word in ("epsilon", "delta 1e-05", "patient", "Poisson", "Gaussian", "added or removed"):
        assert word in privacy["statement"]
    assert [entry["dice_mean"] for entry in summary["rounds"]] == [None, None]
    for entry in summary["rounds"]:
        for told in entry["sites"].values():
            assert told["train_loss"] is told["dice"] is None
            assert told["num_examples"] == 10
    events = (tmp_path / "run" / "events.jsonl").read_text()
    assert '"train_loss": null' in events
    assert "site_left" not in events


def spend(folder, site, config, phantoms, steps):
    """As if the site's patients had been in another study."""
    from samaritan.keys import make_identity

    home = folder / site
    patients = {
        c.subject_id for c in read_study(config, phantoms).sites[site] if c.split == "train"
    }
    identity = make_identity(home / "identity.key")
    with open_ledger(home / "ledger", identity, home / "ledger_copy") as ledger:
        cohort = ledger.cohort(sorted(patients))
        cohort.import_external([Spending(0.5, 1.0, steps)], stands_for="0:" + "a" * 64)


def test_a_site_without_budget_leaves_and_the_others_go_on(phantoms, tmp_path):
    config = settings(privacy={"epsilon": TWO_ROUNDS * 1.001})
    spend(tmp_path / "ledgers", "site_02", config, phantoms, 2)
    summary = run(config, tmp_path / "run", data_dir=phantoms, ledger_dir=tmp_path / "ledgers")
    status = [{n: s["status"] for n, s in r["sites"].items()} for r in summary["rounds"]]
    assert status[0] == dict.fromkeys(("site_01", "site_02", "site_03"), "ok")
    assert status[1] == {"site_01": "ok", "site_02": "failed: SAM-P101", "site_03": "ok"}
    events = [json.loads(x) for x in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["round"], e["site"]) for e in events if e["event"] == "site_left"] == [
        (2, "site_02")
    ]
    assert not [e for e in events if e["event"] == "round_retried"]


def test_a_run_ends_well_when_no_site_can_afford_another_round(tmp_path):
    config = settings(rounds=5, privacy={"epsilon": TWO_ROUNDS * 1.001})
    summary = run(config, tmp_path / "run")
    assert len(summary["rounds"]) == 2
    assert summary["adapter_of_round"] == 2
    again = simulate(config, tmp_path / "run", resume=True)
    assert len(again["rounds"]) == 2


def test_a_run_that_cannot_afford_a_round_says_so(tmp_path):
    config = settings(privacy={"epsilon": ONE_ROUND / 2})
    with pytest.raises(SamaritanError, match="too few sites can afford") as caught:
        run(config, tmp_path / "run")
    assert caught.value.code == "SAM-F107"


@pytest.mark.parametrize("unit", ["slice", "site"])
def test_the_other_units_run_and_are_called_what_they_are(unit, tmp_path):
    peft = {"preset": "decoder-only"}  # Opacus does not see the position table that others train
    config = settings(
        data={"context_slices": 1},
        peft=peft,
        privacy={"unit": unit, "records": 3 if unit == "site" else 50, "sampling_rate": 0.05},
    )
    summary = run(config, tmp_path / "run")
    assert summary["privacy"]["unit"] == unit
    assert f"unit: {unit}" in summary["privacy"]["statement"]
    assert {s["status"] for r in summary["rounds"] for s in r["sites"].values()} == {"ok"}
    if unit == "site":
        spent = summary["privacy"]["sites"]["all sites"]["epsilon"]
        assert spent == pytest.approx(epsilon_of([Spending(1.0, 1.0, 2)], 1e-5).pld)
        assert any("hundreds of sites" in text for text in summary["privacy"]["warnings"])


def test_the_clipping_norm_of_one_round_is_where_the_next_begins(site, monkeypatch):
    def step(self, planned, random):
        """Without the noise, with which four steps may lead back to where they began."""
        self.clip_norm *= 0.5

    monkeypatch.setattr(AdaptiveClip, "step", step)
    one = site(privacy={"clip_quantile": 0.5, "clip_norm": 50.0, "steps_per_round": 4})
    one.train()
    assert float(one.records()[1]["clip_C"]) == 50.0
    one.train(2, used_round=1)
    assert float(one.records()[3]["clip_C"]) == 50.0 / 2**4


def test_without_privacy_nothing_of_it_is_there(tmp_path):
    tree = {k: v for k, v in SMALL.items() if k != "privacy"} | {"rounds": 1}
    tree["training"] = {"slices_per_case": 2, "batch_size": 4}
    summary = run(parse_config(tree), tmp_path / "run")
    assert summary["privacy"] is None
    kept = [path.name for path in (tmp_path / "run" / "sites").rglob("*") if path.is_file()]
    assert set(kept) == {"log.jsonl"}
    assert Config().privacy.unit == "none"
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["privacy"]["unit"] == (
        "none"
    )


def test_a_site_does_not_train_with_a_mechanism_that_fails_its_audit(site, monkeypatch):
    """The planted fault: noise is drawn and not added."""
    one = site()
    original = Mechanism.release

    def silent(self, vectors, size, random, device="cpu"):
        return original(replace(self, noise_multiplier=1e-9), vectors, size, random, device)

    monkeypatch.setattr(Mechanism, "release", silent)
    require_sound_mechanism.cache_clear()
    try:
        with pytest.raises(PrivacyError, match="found a violation") as caught:
            one.train()
    finally:
        require_sound_mechanism.cache_clear()
    assert caught.value.code == "SAM-P405"
    assert [r["type"] for r in one.records()] == ["genesis"]


# What must not tie records to each other.


@pytest.mark.parametrize("base", ["tiny", "vit_b", "sam2_hiera_tiny"])
def test_no_layer_of_a_base_looks_across_the_batch(base):
    """Rule 7."""
    spec = BASES[base]
    with torch.device("meta"):
        model = FAMILIES[spec.family].construct(spec.shape, 2, spec.channels or 3, "official")
    across = torch.nn.modules.batchnorm._BatchNorm
    assert not [name for name, m in model.named_modules() if isinstance(m, across)]


def test_what_training_sees_of_a_case_does_not_depend_on_the_others(phantoms):
    """Rule 8: intensities are scaled by the volume itself."""
    study = read_study(settings(), phantoms)
    cases = study.cases("train")
    alone = study.cache().get(cases[-1])
    cache = study.cache()
    together = [cache.get(case) for case in cases][-1]
    assert alone.sha256 == together.sha256


def test_structures_must_be_named_and_not_found_in_the_data():
    """Rule 8."""
    with pytest.raises(ConfigError, match=r"data\.classes"):
        check_privacy(settings(data={"source": "folder"}))


def test_batches_are_joined_with_prompts_of_unequal_number():
    def batch(count, prompts):
        hints = None
        if prompts:
            hints = Prompts(torch.full((count, prompts, 2), 3.0), torch.ones(count, prompts).long())
        return Batch(torch.rand(count, 1, 4, 4), torch.zeros(count, 4, 4).long(), hints)

    found = joined([batch(1, 2), batch(2, 0), batch(1, 1)])
    assert found.inputs.shape == (4, 1, 4, 4)
    assert found.prompts.labels.tolist() == [[1, 1], [-1, -1], [-1, -1], [1, -1]]
    assert joined([batch(1, 0), batch(1, 0)]).prompts is None
