"""Whole federations on this machine: run folders, determinism, interruption, partitions, data."""

from __future__ import annotations

import csv
import functools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from flwr.app import Message
from safetensors.torch import load_file

from client.exchange import update_header
from samaritan.codecs import encode
from samaritan.config import config_sha256, load_config
from samaritan.data.phantoms import write_phantoms
from samaritan.errors import DataError, StorageError
from samaritan.messages import Answer, Instruction, Request
from samaritan.wire import answer_content, message_bytes, request_content
from simulation.grid import InProcessGrid
from simulation.run import Watch, simulate
from simulation.study import read_study

ROOT = Path(__file__).parents[1]
ADAPTER = Path("adapter") / "adapter_model.safetensors"
TIMES = {
    "seconds", "wall_seconds", "federated_seconds", "peak_rss_bytes", "overhead_seconds_per_round",
    "aggregation_seconds",
    "bytes_down",  # after a stop a site is sent the whole state again
}  # fmt: skip


def untimed(value):
    if isinstance(value, dict):
        return {k: untimed(v) for k, v in value.items() if k not in TIMES}
    return [untimed(v) for v in value] if isinstance(value, list) else value


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def events_of(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


# The run folder.


def test_a_run_folder_holds_every_file_of_the_contract(finished_run):
    folder, _ = finished_run
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "config.yaml", "events.jsonl", "summary.json", "report.html",
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors",
        "checkpoints/round_00001.safetensors", "checkpoints/round_00003.safetensors",
    } <= names  # fmt: skip
    assert not [name for name in names if "partial" in name or name.endswith(".tmp")]


def number(value):
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def test_the_summary_has_every_key_of_the_contract_with_its_type(finished_run, small_config):
    folder, _ = finished_run
    summary = summary_of(folder)
    config = load_config(small_config)
    assert summary["samaritan"].count(".") == 2
    assert summary["config_sha256"] == config_sha256(config)
    assert config_sha256(load_config(folder / "config.yaml")) == config_sha256(config)
    assert (summary["seed"], summary["engine"], summary["strategy"]) == (0, "inprocess", "fedavg")
    assert isinstance(summary["base"]["name"], str)
    assert len(summary["base"]["sha256"]) == 64
    assert summary["peft"]["preset"] == "flap-sam"
    assert summary["peft"]["rank"] == 2
    assert 0 < summary["peft"]["trainable_parameters"] < summary["base"]["parameters"]
    entry = {"train_cases": 1, "val_cases": 1, "train_subjects": 1}
    assert summary["sites"] == {"site_01": entry, "site_02": entry}
    assert [r["round"] for r in summary["rounds"]] == [1, 2, 3]
    for entry in summary["rounds"]:
        assert number(entry["seconds"])
        assert 0 <= entry["dice_mean"] <= 1
        assert set(entry["sites"]) == {"site_01", "site_02"}
        for site in entry["sites"].values():
            assert number(site["train_loss"])
            assert 0 <= site["dice"] <= 1
            assert isinstance(site["bytes_up"], int)
            assert isinstance(site["bytes_down"], int)
            assert number(site["seconds"])
            assert site["status"] == "ok"
    final = summary["final"]
    assert 0 <= final["dice_mean"] <= 1
    assert set(final["dice_per_class"]) == {"class_1", "class_2", "class_3"}
    assert set(final["dice_per_site"]) == {"site_01", "site_02"}
    assert number(final["hd95_mm_mean"])
    assert 0 <= final["nsd_mean"] <= 1
    assert (final["cases"], final["excluded_cases"]) == (2, 0)
    cost = summary["cost"]
    assert number(cost["wall_seconds"])
    assert cost["peak_rss_bytes"] > 10**8
    assert cost["frozen_base_copies"] == 1
    assert summary["baselines"] is None
    assert summary["privacy"] is None


def test_the_last_round_and_the_final_scores_agree(finished_run):
    summary = summary_of(finished_run[0])
    assert summary["rounds"][-1]["dice_mean"] == pytest.approx(summary["final"]["dice_mean"])


def test_bytes_are_those_of_the_serialised_messages(finished_run, small_config):
    folder, _ = finished_run
    summary, config = summary_of(folder), load_config(small_config)
    adapter = {
        name.removeprefix("base_model.model."): tensor
        for name, tensor in load_file(folder / ADAPTER).items()
    }
    whole = encode(adapter, config.wire.down, header={}, seed=0)
    update = encode(adapter, config.wire.up, header=update_header(1, "f" * 64), seed=0)
    InProcessGrid(None, 0)  # sets who this process is; Flower makes no Message before
    order = Instruction(
        1, config.rounds, config_sha256(config), summary["base"]["sha256"],
        config.federation.round_timeout_s, "f" * 64,
    )  # fmt: skip

    def size(records):
        return message_bytes(Message(records, 1, "train"))

    names = ("num-examples", "train-loss", "steps", "seconds")
    told = Answer(update, dict(zip(names, (1, 0.5, 1, 0.1), strict=True)))
    scored = Answer(None, {"num-cases": 1, "seconds": 0.1, "dice": 0.5})
    up = size(answer_content(told)) + size(answer_content(scored))
    # A site is scored on the whole state, and trains from what it was scored on.
    scoring = Request("evaluate", instruction=order, payload=whole)
    down = size(request_content(scoring))
    down += size(request_content(Request("train", instruction=order)))
    for entry in summary["rounds"]:
        for site in entry["sites"].values():
            assert (site["bytes_up"], site["bytes_down"]) == (up, down)
    assert summary["cost"]["bytes_up"] == 6 * up
    assert summary["cost"]["bytes_down"] == 6 * down


def test_events_are_one_object_per_line_in_order(finished_run):
    kinds = [event["event"] for event in events_of(finished_run[0])]
    assert kinds == [
        "run_started", "roll_call", *["round_started", "round_finished"] * 3, "run_finished",
        "summary_written",
    ]  # fmt: skip


def test_json_is_the_only_thing_on_stdout_and_progress_is_on_stderr(finished_run):
    folder, done = finished_run
    assert json.loads(done.stdout) == summary_of(folder)
    assert "round 3/3: Dice " in done.stderr
    assert "error:" not in done.stderr
    assert "INFO" not in done.stderr


# Determinism and interruption.


def test_two_runs_give_the_same_adapter_to_the_bit(finished_run, small_config, tmp_path):
    folder, rounds = finished_run[0], []
    simulate(load_config(small_config), tmp_path / "again", watch=Watch(round_done=rounds.append))
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (folder / ADAPTER).read_bytes()
    assert untimed(summary_of(tmp_path / "again")) == untimed(summary_of(folder))
    assert rounds == summary_of(tmp_path / "again")["rounds"]


def start_and_stop(config, folder, after_round, how, *extra):
    """Runs the command and sends a signal in the middle of the round after `after_round`."""
    command = [
        sys.executable, "-m", "samaritan.cli.main", "simulate", config, "--out", folder, *extra
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env=environment,
        # A shell lets what runs in its background ignore Ctrl-C, and children inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    ) as process:  # fmt: skip
        checkpoint = folder / "checkpoints" / f"round_{after_round:05d}.safetensors"
        end = time.monotonic() + 120
        while not checkpoint.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(how)
        out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def battered_run(small_config, tmp_path_factory):
    """A run that is interrupted in round 2, resumed, killed in round 3 and resumed to its end."""
    folder = tmp_path_factory.mktemp("battered") / "run"
    interrupted = start_and_stop(small_config, folder, 1, signal.SIGINT)
    rounds_then = len(list((folder / "checkpoints").glob("round_*")))
    killed = start_and_stop(small_config, folder, 2, signal.SIGKILL, "--resume")
    had_summary = (folder / "summary.json").exists()
    simulate(load_config(small_config), folder, resume=True)
    return folder, interrupted, rounds_then, killed, had_summary


def test_ctrl_c_ends_a_run_with_one_short_message(battered_run):
    _, (code, out, err), rounds_then, _, _ = battered_run
    assert code == 130
    assert err.splitlines()[-1] == (
        "interrupted; finished rounds of a run are kept, go on with --resume"
    )
    assert "Traceback" not in err
    assert out == ""
    assert 1 <= rounds_then < 3


def test_a_killed_and_resumed_run_equals_one_that_never_stopped(battered_run, finished_run):
    folder, _, _, (code, _, _), had_summary = battered_run
    assert code == -signal.SIGKILL
    assert not had_summary
    assert (folder / ADAPTER).read_bytes() == (finished_run[0] / ADAPTER).read_bytes()
    assert untimed(summary_of(folder)) == untimed(summary_of(finished_run[0]))


def test_the_events_tell_of_each_start(battered_run):
    events = events_of(battered_run[0])
    starts = [event["first_round"] for event in events if event["event"] == "run_started"]
    assert starts == [1, 2, 3]


@pytest.fixture
def copied_run(finished_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(finished_run[0], folder)
    return folder


def test_baselines_that_are_stopped_take_nothing_of_the_federation_with_them(
    small_config, copied_run, monkeypatch
):
    for name in ("summary.json", "report.html"):
        (copied_run / name).unlink()

    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("simulation.run.run_baselines", stopped)
    with pytest.raises(KeyboardInterrupt):
        simulate(load_config(small_config), copied_run, resume=True, baselines=True)
    summary = json.loads((copied_run / "summary.json").read_text())
    assert summary["final"]["cases"] > 0
    assert summary["baselines"] is None
    assert (copied_run / "report.html").is_file()


def test_resuming_a_finished_run_with_baselines_trains_no_round_again(
    copied_run, small_config, monkeypatch
):
    monkeypatch.setattr("client.agent.train_locally", None)  # a site that trains would fail
    before = summary_of(copied_run)
    (copied_run / "summary.json").unlink()
    summary = simulate(load_config(small_config), copied_run, resume=True, baselines=True)
    assert untimed(summary["rounds"]) == untimed(before["rounds"])
    assert untimed(summary["final"]) == untimed(before["final"])
    baselines = summary["baselines"]
    for name in ("local_only", "centralised", "unet"):
        assert 0 <= baselines[name]["dice_mean"] <= 1
    assert set(baselines["local_only"]["dice_per_site"]) == {"site_01", "site_02"}
    assert baselines["centralised"]["steps"] == sum(baselines["local_only"]["steps"].values())
    assert baselines["local_only"]["steps"] == {"site_01": 3, "site_02": 3}
    assert summary["gain"]["over_local"] == pytest.approx(
        summary["final"]["dice_mean"] - baselines["local_only"]["dice_mean"]
    )
    assert summary_of(copied_run) == json.loads(json.dumps(summary))


def test_a_folder_with_a_run_is_not_touched_without_resume(copied_run, small_config):
    before = {p: p.read_bytes() for p in copied_run.rglob("*") if p.is_file()}
    with pytest.raises(StorageError) as caught:
        simulate(load_config(small_config), copied_run)
    assert caught.value.code == "SAM-S106"
    assert {p: p.read_bytes() for p in copied_run.rglob("*") if p.is_file()} == before


# Splits and partitions.


def msd_folder(folder: Path, cases: int) -> Path:
    """Phantoms in the layout of the Medical Segmentation Decathlon, which knows no sites."""
    write_phantoms(folder, 1, cases, 0)
    (folder / "images").rename(folder / "imagesTr")
    (folder / "labels").rename(folder / "labelsTr")
    (folder / "manifest.csv").unlink()
    names = sorted(path.name for path in (folder / "imagesTr").iterdir())
    entries = [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in names]
    labels = {"0": "background", "1": "liver", "2": "kidney", "3": "vessel"}
    declared = {"labels": labels, "modality": {"0": "CT"}, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(declared))
    return folder


def test_a_run_on_an_msd_folder_dealt_out_to_three_pseudo_sites(samaritan, small_config, tmp_path):
    data, out = msd_folder(tmp_path / "msd", 6), tmp_path / "run"
    done = samaritan(
        "simulate", small_config, "--data", data, "--out", out, "--set", "rounds=1",
        "--set", "data.partition=uniform", "--set", "data.sites=3", "--set", "data.source=folder",
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = summary_of(out)
    assert list(summary["sites"]) == ["pseudo_001", "pseudo_002", "pseudo_003"]
    assert sum(s["train_cases"] + s["val_cases"] for s in summary["sites"].values()) == 6
    assert list(summary["final"]["dice_per_class"]) == ["liver", "kidney", "vessel"]
    assert summary["data"]["pseudo_sites"] is True
    assert done.out.splitlines()[0].startswith("Dice ")
    assert done.out.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert not (out / "data").exists()


def test_no_patient_is_at_two_pseudo_sites_or_in_two_splits(small_config, tmp_path):
    data = write_phantoms(tmp_path / "data", 2, 9, 0)  # persons 4 and 8 come twice
    config = load_config(
        small_config, ["data.partition=uniform", "data.sites=3", "data.source=folder"]
    )
    study = read_study(config, data)
    cases = [case for site in study.sites.values() for case in site]
    homes: dict[str, set[tuple[str, str]]] = {}
    for case in cases:
        homes.setdefault(case.subject_id, set()).add((case.site, case.split))
    assert len(cases) == 18
    assert len(homes) < 18
    assert all(len(places) == 1 for places in homes.values())
    people = [len({c.subject_id for c in study.cases("train", site)}) for site in study.sites]
    assert max(people) - min(people) <= 1


def test_the_partition_follows_the_seed_alone(small_config, tmp_path):
    data = write_phantoms(tmp_path / "data", 2, 6, 0)
    keys = ["data.partition=uniform", "data.sites=2", "data.source=folder"]

    def homes(seed):
        sites = read_study(load_config(small_config, [*keys, f"seed={seed}"]), data).sites
        return {case.case_id: site for site, cases in sites.items() for case in cases}

    assert homes(1) == homes(1)
    assert len({json.dumps(homes(seed), sort_keys=True) for seed in range(5)}) > 1


def test_more_pseudo_sites_than_patients_are_refused(small_config, tmp_path):
    data = write_phantoms(tmp_path / "data", 1, 3, 0)
    keys = ["data.partition=uniform", "data.sites=9", "data.source=folder"]
    with pytest.raises(DataError, match="9 sites asked for, 2 training patients"):
        read_study(load_config(small_config, keys), data)


# Real data.


def short_manifest(source: Path, target: Path, train: int, val: int) -> Path:
    """A data folder with links to the real files and the first few cases of each site."""
    target.mkdir()
    for folder in ("images", "labels"):
        (target / folder).symlink_to(source / folder)
    taken: dict[tuple[str, str], int] = {}
    kept = []
    with (source / "manifest.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        for row in reader:
            key = (row["site"], row["split"])
            taken[key] = taken.get(key, 0) + 1
            if taken[key] <= {"train": train, "val": val}.get(row["split"], 0):
                kept.append(row)
    with (target / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, reader.fieldnames or [])
        writer.writeheader()
        writer.writerows(kept)
    return target


HIPPOCAMPUS = ROOT / "configs" / "hippocampus.yaml"


@pytest.mark.data
def test_a_short_run_on_real_hippocampi_at_the_sites_of_the_manifest(
    shared_data, tmp_path, samaritan
):
    data = short_manifest(shared_data / "msd_hippocampus", tmp_path / "data", 2, 1)
    out = tmp_path / "run"
    done = samaritan(
        "simulate", HIPPOCAMPUS, "--data", data, "--out", out, "--json", "--set", "rounds=1",
        "--set", "model.image_size=32", "--set", "data.pixel_mm=2.0", "--set", "peft.rank=2",
        "--set", "training.slices_per_case=4", "--set", "evaluation.flip=[]",
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    with (data / "manifest.csv").open(newline="", encoding="utf-8") as file:
        assert set(summary["sites"]) == {row["site"] for row in csv.DictReader(file)}
    assert summary["rounds"][0]["sites"].keys() == summary["sites"].keys()
    assert list(summary["final"]["dice_per_class"]) == ["anterior", "posterior"]
    assert 0 <= summary["final"]["dice_mean"] <= 1


@pytest.mark.data
@pytest.mark.slow
def test_a_run_of_a_few_rounds_finds_real_hippocampi(shared_data, tmp_path):
    data = short_manifest(shared_data / "msd_hippocampus", tmp_path / "data", 3, 1)
    keys = [
        "rounds=3", "training.slices_per_case=64", "data.context_slices=3", "evaluation.flip=[]"
    ]  # fmt: skip
    summary = simulate(load_config(HIPPOCAMPUS, keys), tmp_path / "run", data_dir=data)
    assert summary["final"]["dice_mean"] > 0
    losses = [
        sum(site["train_loss"] for site in entry["sites"].values()) for entry in summary["rounds"]
    ]
    assert losses[-1] < losses[0]


@pytest.mark.data
def test_a_short_run_on_real_spinal_cords_at_sites_with_spaces(shared_data, tmp_path, samaritan):
    source = shared_data / "gm_challenge_spinalcord"
    if not source.is_dir():
        pytest.skip("no spinal cords in the shared data")
    config = tmp_path / "cord.yaml"
    settings = {
        "name": "cord",
        "rounds": 1,
        "model": {"image_size": 32},
        "peft": {"rank": 2},
        # One patient per hospital: a site that does not train scores for the others.
        "data": {"slice_axis": "axial", "held_out_sites": ["Milan"]},
        "training": {"slices_per_case": 2, "batch_size": 4},
        "federation": {"min_sites": 1},
    }
    config.write_text(yaml.safe_dump(settings))
    done = samaritan("simulate", config, "--data", source, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    names = {"CEITEC", "University College London", "Juntendo", "Milan"}
    assert set(summary["sites"]) == names
    assert set(summary["final"]["dice_per_site"]) == {"Milan"}
    assert all(name.startswith("class_") for name in summary["final"]["dice_per_class"])
    assert summary["final"]["cases"] == 2
    assert summary["rounds"][0]["sites"]["Milan"]["train_loss"] is None
    assert summary["rounds"][0]["sites"]["University College London"]["train_loss"] > 0
