"""A real federation on loopback: provisioned, started from its kits, run through proxy and TLS.

Slow: eight processes on the machine's cores. Real hippocampus MRI where it is there.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from samaritan.data.phantoms import write_phantoms
from tests.federations import ENVIRONMENT, SAMARITAN, SMALL, Consortium, split_by_site, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

PSEUDO_SITES = {"A_float_5e2_early": "Ahus", "C_uint8": "Bern", "D_float_2e5": "Chur"}
HIPPOCAMPUS = {
    "rounds": 3,
    "data": {
        "classes": {"anterior": 1, "posterior": 2}, "slice_axis": "sagittal", "pseudo_sites": True
    },
    "training": {"slices_per_case": 4, "precision": "fp32"},
    "federation": {"min_sites": 3, "wait_s": 120},
}  # fmt: skip

WARD = "WARD_7_PSYCHIATRY"
PATIENT = "JANE_DOE_19701231"


@pytest.fixture(scope="module")
def hippocampus(shared_data, tmp_path_factory):
    """Three pseudo-sites, each with its own folder, started; and the same cases in one folder."""
    folder = tmp_path_factory.mktemp("hippocampus")
    split_by_site(shared_data / "msd_hippocampus", folder / "data", PSEUDO_SITES, cases=6)
    (folder / "c").mkdir()
    data = {name: folder / "data" / name for name in PSEUDO_SITES.values()}
    consortium = Consortium(folder / "c", data)
    try:
        consortium.start_all()
        yield consortium, folder / "data/all"
    finally:
        consortium.stop()


def adapter(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


def test_the_federation_of_three_hospitals_equals_the_simulation_to_the_bit(hippocampus, tmp_path):
    consortium, everything = hippocampus
    plan = consortium.plan("hippo", HIPPOCAMPUS)
    said = consortium.run(plan)
    assert said.count("Dice") == 3
    run_dir = consortium.run_dir("hippo")
    subprocess.run(
        [SAMARITAN, "simulate", consortium.folder / "hippo-config.yaml", "--data", everything,
         "--out", tmp_path / "simulated"],
        env=ENVIRONMENT, check=True, capture_output=True,
    )  # fmt: skip
    deployed, simulated = adapter(run_dir), adapter(tmp_path / "simulated")
    assert deployed.keys() == simulated.keys()
    assert all(torch.equal(deployed[name], simulated[name]) for name in deployed)
    ours, theirs = (
        json.loads((f / "summary.json").read_text()) for f in (run_dir, tmp_path / "simulated")
    )
    assert ours["config_sha256"] == theirs["config_sha256"]
    assert ours["final"]["dice_mean"] == pytest.approx(theirs["final"]["dice_mean"], abs=1e-6)
    for mine, other in zip(ours["rounds"], theirs["rounds"], strict=True):
        for site in PSEUDO_SITES.values():
            assert mine["sites"][site]["status"] == "ok"
            for key in ("train_loss", "dice", "update_sha256", "num_examples", "steps"):
                assert mine["sites"][site][key] == other["sites"][site][key]
    assert "<html" in (run_dir / "report.html").read_text()
    # Another call finds it done, and starts nothing.
    assert "run " not in consortium.run(plan)
    # SAM was loaded once, and every byte that left is in both logs.
    for site in PSEUDO_SITES.values():
        assert len(consortium.log(site, "study_loaded")) == 1
        assert len(consortium.log(site, "started")) == 1
        log = consortium.site(site) / "log/site.jsonl"
        key = consortium.log(site)[0]["key"]
        report = consortium.do(
            "audit", "log", "verify", log, "--against", run_dir / "server_log.jsonl", "--key", key,
            "--json",
        )  # fmt: skip
        told = json.loads(report)
        assert told["whole"]
        assert told["matched"] == told["egress"] == 7  # a roll call and three rounds of two answers


def test_a_site_policy_that_forbids_the_plan_keeps_it_out(hippocampus):
    consortium, _ = hippocampus
    path = consortium.site("Ahus") / "site.yaml"
    log = consortium.site("Ahus") / "log/site.jsonl"
    wait_for(lambda: log.is_file() and b"started" in log.read_bytes(), 60, "the agent began")
    before = path.read_text()
    try:
        path.write_text(before + "policy: {max_rounds: 2, strategies: [svd]}\n")
        plan = consortium.plan("forbidden", HIPPOCAMPUS, approve=False)
        said = consortium.do("site", "approve", plan, "--kit", consortium.site("Ahus"), code=1)
        assert "SAM-A201" in said
        assert "max_rounds" in said
        assert "policy.strategies" in said
    finally:
        path.write_text(before)


def test_a_plan_that_not_all_have_approved_ends_truthfully(hippocampus):
    consortium, _ = hippocampus
    config = {**HIPPOCAMPUS, "seed": 7, "federation": {"min_sites": 3, "wait_s": 10}}
    plan = consortium.plan("halfway", config, approve=False)
    for site in ("Ahus", "Bern"):
        consortium.do("site", "approve", plan, "--kit", consortium.site(site))
    process = consortium.start_run(plan, "--patience-hours", "0")
    assert process.wait(300) == 1
    said = (consortium.folder / f"run-{plan.name}.out").read_text()
    assert "SAM-F111" in said
    assert "SAM-F103" in said
    assert consortium.log("Chur", "refused")[-1]["code"] == "SAM-K305"


def test_a_bundle_with_one_changed_byte_gets_nothing(hippocampus, monkeypatch):
    """The server ships other code under the same plan: no site unpacks it, none answers."""
    from samaritan.plan import read_plan, write_plan
    from samaritan.provision.kit import load_kit
    from server import bundle, control
    from server.home import plan_file
    from server.settings import load_settings

    consortium, _ = hippocampus
    config = {**HIPPOCAMPUS, "seed": 8, "federation": {"min_sites": 3, "wait_s": 10}}
    plan = consortium.plan("bundled", config)
    kit = load_kit(consortium.server, "server")
    signed = read_plan(plan)
    write_plan(plan_file(kit, signed.plan.sha256), signed)
    evil = dict(bundle._FILES)
    evil["samaritan_run_client.py"] += "#"
    monkeypatch.setattr(bundle, "_FILES", evil)
    with control.connect(kit, load_settings(kit.path("server.yaml"))) as link:
        link.admit({name: site.node for name, site in signed.plan.sites.items()})
        run_id = link.start(signed.plan.sha256)
        wait_for(lambda: link.run(run_id).status.status == "finished", 120, "the end of the run")
        assert link.run(run_id).status.sub_status == "failed"
    for site in PSEUDO_SITES.values():
        refused = [e for e in consortium.log(site, "refused") if e["plan"] == signed.plan.sha256]
        assert {entry["code"] for entry in refused} == {"SAM-K308"}
        leaving = [e for e in consortium.log(site, "egress") if e["plan"] == signed.plan.sha256]
        assert not leaving
        unpacked = list((consortium.site(site) / "run/flower").rglob("samaritan_run_client.py"))
        assert not unpacked


def test_differential_privacy_and_secure_aggregation_hold_over_real_sites(hippocampus):
    consortium, _ = hippocampus
    config = {
        **HIPPOCAMPUS, "rounds": 2, "seed": 9, "peft": {"preset": "decoder-only"},
        "federation": {
            "min_sites": 3, "wait_s": 120, "weighting": "uniform", "secure_aggregation": True,
            "clip_norm": 1.0,
        },
        "privacy": {
            "unit": "patient", "epsilon": 100, "delta": 1e-3, "records": 4, "sampling_rate": 0.5,
            "steps_per_round": 2, "slices_per_patient": 2,
        },
    }  # fmt: skip
    consortium.run(consortium.plan("private", config))
    rounds = consortium.events("private", "round_finished")
    assert [entry["round"] for entry in rounds] == [1, 2]
    for entry in rounds:
        assert {site["status"] for site in entry["sites"].values()} == {"ok"}
    for site in PSEUDO_SITES.values():
        ledgers = list((consortium.site(site) / "ledger").glob("*.jsonl"))
        (ledger,) = ledgers
        kinds = [json.loads(line)["type"] for line in ledger.read_bytes().splitlines()]
        assert kinds == ["genesis", "reserve", "commit", "reserve", "commit"]
        left = consortium.log(site, "egress")[-1]
        assert left["kind"] == "secure_sum"
        masked = [e for e in consortium.log(site, "egress") if e["kind"] == "train"][-1]
        assert masked["tensors"][0][2] == "uint32 under masks"
        assert set(masked["numbers"]) == {"num-examples", "steps"}
    summary = json.loads((consortium.run_dir("private") / "summary.json").read_text())
    assert summary["privacy"]["unit"] == "patient"


def test_nothing_that_reaches_the_server_names_a_path_a_file_or_a_patient(tmp_path):
    """Names are planted in folders, files, cases and people, and one site breaks on the way."""
    write_phantoms(tmp_path / "phantoms", 3, 4, 0)
    manifest = tmp_path / "phantoms/manifest.csv"
    text = manifest.read_text()
    for old in ("phantom_", "person_"):
        text = text.replace(old, f"{PATIENT}_{old}")
    manifest.write_text(text)
    for path in (tmp_path / "phantoms").rglob("phantom_*.nii.gz"):
        path.rename(path.with_name(f"{PATIENT}_{path.name}"))
    names = {"site_01": "Ahus", "site_02": "Bern", "site_03": "Chur"}
    split_by_site(tmp_path / "phantoms", tmp_path / WARD, names)
    (tmp_path / "c").mkdir()
    consortium = Consortium(tmp_path / "c", {n: tmp_path / WARD / n for n in names.values()})
    try:
        config = {**SMALL, "federation": {"min_sites": 2, "wait_s": 60}}
        plan = consortium.plan("planted", config, approve=False)
        for site in names.values():  # or policy.min_cohort would keep the plan out
            path = consortium.site(site) / "site.yaml"
            path.write_text(path.read_text() + "policy: {min_cohort: 2}\n")
            consortium.do("site", "approve", plan, "--kit", consortium.site(site))
        broken = sorted((tmp_path / WARD / "Chur/images").iterdir())[0]
        broken.write_bytes(broken.read_bytes()[:100])
        consortium.start_all()
        consortium.run(plan)
        assert any(e["code"].startswith("SAM-D") for e in consortium.log("Chur", "refused"))
        agent = (consortium.site("Chur") / "run/agent.log").read_text()
        assert PATIENT in agent  # the site itself can read what was wrong
    finally:
        consortium.stop()
    words = [WARD.encode(), PATIENT.encode(), b"/images/", b".nii.gz"]
    looked_at = 0
    for path in consortium.server.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            looked_at += len(data)
            found = [word for word in words if word in data]
            assert not found, f"{found} in {path}"
    assert looked_at > 1_000_000
    assert (consortium.server / "link.db").stat().st_size > 10_000
    for site in names.values():
        log = (consortium.site(site) / "log/site.jsonl").read_bytes()
        assert PATIENT.encode() not in log
        assert WARD.encode() not in log


def test_kits_hold_what_each_party_needs_and_no_key_of_another(hippocampus):
    consortium, _ = hippocampus
    for name in PSEUDO_SITES.values():
        with zipfile.ZipFile(consortium.folder / f"kits/sites/{name}.zip") as kit:
            names = {Path(entry).name for entry in kit.namelist()}
        assert not names & {"ca.key", "plan.key", "server.key", "control.secret"}
