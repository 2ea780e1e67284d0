"""What stays at a site: personal parts, notes, and fine-tuned adapters, in whole simulations."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from samaritan.config import load_config
from samaritan.errors import ConfigError
from samaritan.models.adapter import load_adapted, read_adapter
from samaritan.training.evaluate import evaluate_cases, mean_dice
from simulation.run import simulate
from simulation.study import read_study


@pytest.fixture(scope="module")
def go(small_config, tmp_path_factory):
    """Runs a small simulation: ``go("name", "strategy=fedsa")`` -> run folder and summary."""

    def run(name, *overrides):
        folder = tmp_path_factory.mktemp("personal") / name
        return folder, simulate(load_config(small_config, ["rounds=2", *overrides]), folder)

    return run


@pytest.fixture(scope="module")
def fedsa(go):
    return go("fedsa", "strategy=fedsa", "personal.fine_tune_steps=3")


def own(folder, site):
    return read_adapter(folder / "sites" / site / "adapter").state


def test_fedsa_shares_a_and_every_site_has_a_b_of_its_own(fedsa):
    folder, summary = fedsa
    shared = read_adapter(folder / "adapter").state
    one, two = own(folder, "site_01"), own(folder, "site_02")
    names = [name for name in shared if "lora_B" in name]
    assert names
    for name in names:
        assert not shared[name].any()
        assert one[name].any()
        assert not torch.equal(one[name], two[name])
    assert summary["personal"]["parts"] == sorted(names)


def test_personal_tensors_are_in_no_checkpoint_of_the_server(fedsa):
    folder, _ = fedsa
    tensors = load_file(folder / "checkpoints" / "round_00002.safetensors")
    assert not any(value.any() for name, value in tensors.items() if "lora_B" in name)


def test_each_site_is_scored_with_its_own_adapter(fedsa, small_config):
    folder, summary = fedsa
    config = load_config(small_config, ["rounds=2", "strategy=fedsa"])
    study = read_study(config, folder / "data")
    found = {}
    for site in study.sites:
        model = load_adapted(read_adapter(folder / "sites" / site / "adapter"))
        results = evaluate_cases(
            model.segmenter, study.cache(), study.cases("val", site), config.evaluation
        )
        found[site] = mean_dice(results)
    assert found == pytest.approx(summary["personal"]["dice_per_site"])
    assert summary["personal"]["fine_tune_steps"] == 3


def test_fine_tuning_moves_the_adapter_of_each_site_and_not_the_shared_one(go):
    folder, summary = go("tuned", "personal.fine_tune_steps=2")
    plain, _ = go("plain")
    shared = read_adapter(folder / "adapter").state
    without = read_adapter(plain / "adapter").state
    assert all(torch.equal(shared[name], without[name]) for name in shared)
    tuned = [own(folder, site) for site in ("site_01", "site_02")]
    assert any(not torch.equal(tuned[0][name], shared[name]) for name in shared)
    assert any(not torch.equal(tuned[0][name], tuned[1][name]) for name in shared)
    assert summary["personal"]["parts"] == []


def test_a_run_without_personal_parts_keeps_nothing_at_its_sites(go):
    folder, summary = go("nothing")
    assert summary["personal"] is None
    assert {path.name for path in folder.glob("sites/*/*")} == {"log.jsonl"}


def test_a_personal_decoder_of_a_site_that_only_scores_stays_as_it_began(go):
    folder, _ = go("held", "personal.parts=[decoder]", "data.held_out_sites=[site_02]")
    shared, held = read_adapter(folder / "adapter").state, own(folder, "site_02")
    assert all(torch.equal(shared[name], held[name]) for name in shared)
    trained = own(folder, "site_01")
    decoder = [n for n in shared if n.startswith("mask_decoder.") and "lora_A" not in n]
    assert all(not torch.equal(trained[n], held[n]) for n in decoder if "lora_B" in n)


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (["strategy=krum"], "SAM-C226"),
        (["federation.sites_per_round=1", "federation.min_sites=2"], "SAM-C226"),
        (["federation.weighting={site_01: 1.0}"], "SAM-C228"),
        (["federation.weighting={site_01: 1, site_02: 1, else: 1}"], "SAM-C228"),
        (["strategy=svd", "peft.site_ranks={nowhere: 1}"], "SAM-C228"),
        (["peft.site_ranks={site_01: 1}"], "SAM-C218"),
        (["strategy=svd", "peft.site_ranks={site_01: 1}", "training.scaffold=true"], "SAM-C227"),
        (["federation.secure_aggregation=true"], "SAM-C402"),
        (["federation.secure_aggregation=true", "strategy=krum"], "SAM-C402"),
        (["strategy=flora", "server_optimiser.name=adam"], "SAM-C222"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run_folder_is_made(
    small_config, tmp_path, overrides, code
):
    with pytest.raises(ConfigError) as caught:
        simulate(load_config(small_config, overrides), tmp_path / "run")
    assert caught.value.code == code
    assert not (tmp_path / "run").exists()
