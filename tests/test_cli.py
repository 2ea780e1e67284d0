"""The command line: help, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import aff2axcodes

from samaritan import __version__
from samaritan.data.phantoms import write_phantoms

ROOT = Path(__file__).parents[1]

COMMANDS = [
    ("simulate",), ("compare",), ("evaluate",), ("predict",), ("doctor",), ("data",),
    ("data", "check"), ("data", "describe"), ("models",), ("models", "list"), ("models", "verify"),
    ("models", "count"), ("models", "fetch"), ("privacy",), ("privacy", "plan"),
    ("privacy", "ledger"), ("privacy", "ledger", "verify"), ("privacy", "ledger", "resync"),
    ("audit",), ("audit", "privacy"),
]  # fmt: skip

HELP = """
import contextlib, io, json, sys
import samaritan.cli.main as cli
ended = {}
for command in [[], *json.loads(sys.argv[1])]:
    sys.argv = ["samaritan", *command, "--help"]
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        try:
            cli.main()
        except SystemExit as end:
            ended[" ".join(command)] = [end.code, "Usage" in text.getvalue()]
heavy = {"torch", "flwr", "monai", "peft", "matplotlib", "numpy"} & set(sys.modules)
print(json.dumps({"ended": ended, "heavy": sorted(heavy)}))
"""


def test_every_help_answers_at_once_without_heavy_imports():
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(COMMANDS)],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert len(found["ended"]) == len(COMMANDS) + 1
    assert {name: end for name, end in found["ended"].items() if end != [0, True]} == {}
    assert found["heavy"] == []
    assert time.monotonic() - begun < 20


def test_the_installed_command_tells_its_version():
    command = [str(Path(sys.executable).with_name("samaritan")), "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == __version__
    assert done.stderr == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate",),
        ("simulated",),
        ("simulate", "a.yaml", "--bogus"),
        ("simulate", "a.yaml", "--engine", "magic"),
        ("evaluate", "--adapter", "x"),
        ("models", "count", "--rank", "0"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_nothing_on_stdout(samaritan, arguments):
    done = samaritan(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Usage" in done.err
    assert "Traceback" not in done.err


def test_a_failure_is_one_error_with_a_hint_and_status_1(samaritan, tmp_path):
    done = samaritan("simulate", tmp_path / "none.yaml")
    assert done.code == 1
    assert done.out == ""
    assert done.err.splitlines() == [
        f"error: SAM-C101  cannot read the configuration {tmp_path / 'none.yaml'}: "
        "No such file or directory",
        "  hint: Check the path.",
    ]


def test_a_fault_of_our_own_is_one_error_and_debug_shows_where(samaritan, monkeypatch, tmp_path):
    def broken(*arguments):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr("samaritan.config.load_config", broken)
    done = samaritan("simulate", "x.yaml")
    assert done.code == 1
    assert done.err.startswith("error: SAM-X999  ZeroDivisionError: by nothing\n")
    assert "Traceback" not in done.err
    monkeypatch.setenv("SAMARITAN_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        samaritan("simulate", "x.yaml")


def test_models_count_and_list_print_one_json_object(samaritan):
    counted = json.loads(samaritan("models", "count", "--base", "vit_b", "--json").out)
    assert counted["trainable_parameters"] * 4 == counted["bytes_fp32"]
    assert 0 < counted["trainable_parameters"] < counted["parameters"]
    listed = json.loads(samaritan("models", "list", "--json").out)
    assert {"vit_b", "vit_l", "vit_h", "tiny"} <= set(listed["bases"])
    assert "flap-sam" in listed["presets"]


@pytest.mark.parametrize(
    ("option", "value", "choices"),
    [("--base", "vit_x", "vit_b"), ("--preset", "magic", "flap-sam")],
)
def test_models_count_lists_the_choices(samaritan, option, value, choices):
    done = samaritan("models", "count", option, value)
    assert done.code == 1
    assert choices in done.err


def test_doctor_prints_one_json_object(samaritan):
    done = samaritan("doctor", "--json")
    assert done.code == (0 if json.loads(done.out)["ready"] else 1)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "data", 2, 2, 0)


def test_data_check_ends_with_status_1_only_when_there_is_an_error(samaritan, phantoms, tmp_path):
    good = samaritan("data", "check", phantoms, "--json")
    assert (good.code, json.loads(good.out)["errors"]) == (0, 0)
    bad = samaritan("data", "check", tmp_path, "--json")
    assert (bad.code, json.loads(bad.out)["errors"]) == (1, 1)


def test_data_describe_names_sites_and_cases(samaritan, phantoms):
    described = json.loads(samaritan("data", "describe", phantoms, "--json").out)
    assert described["cases"] == 4
    assert set(described["sites"]) == {"site_01", "site_02"}


# Evaluate and predict, with the adapter of a finished run.


def test_evaluate_reproduces_the_scores_of_the_run(samaritan, finished_run, tmp_path):
    folder, _ = finished_run
    final = json.loads((folder / "summary.json").read_text())["final"]
    out = tmp_path / "scores"
    done = samaritan(
        "evaluate", "--adapter", folder / "adapter", "--data", folder / "data", "--out", out,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert json.loads((out / "summary.json").read_text()) == summary
    assert summary["foreground_mean"]["Dice"] == pytest.approx(final["dice_mean"], abs=1e-6)
    assert summary["foreground_mean"]["HD95"] == pytest.approx(final["hd95_mm_mean"], abs=1e-6)
    assert summary["foreground_mean"]["NSD"] == pytest.approx(final["nsd_mean"], abs=1e-6)
    assert set(summary["mean"]) == {"1", "2", "3"}
    assert len(summary["metric_per_case"]) == final["cases"]
    for case in summary["metric_per_case"]:
        assert set(case) >= {"metrics", "reference_file", "prediction_file"}
        assert set(case["metrics"]["1"]) == {"Dice", "HD95", "NSD"}
        truth = np.asarray(nib.load(case["reference_file"]).dataobj)
        found = np.asarray(nib.load(out / case["prediction_file"]).dataobj)
        for value in (1, 2, 3):
            both = ((truth == value) & (found == value)).sum()
            dice = 2 * both / ((truth == value).sum() + (found == value).sum())
            assert case["metrics"][str(value)]["Dice"] == pytest.approx(dice, abs=1e-9)


def test_evaluate_of_a_split_that_is_not_there_names_those_that_are(samaritan, finished_run):
    folder, _ = finished_run
    done = samaritan(
        "evaluate", "--adapter", folder / "adapter", "--data", folder / "data", "--split", "tset"
    )
    assert done.code == 1
    assert "train, val" in done.err


def grid_of(path):
    image = nib.load(path)
    return image.shape, image.affine.tolist(), aff2axcodes(image.affine)


def test_predict_keeps_grid_axes_and_affine_of_each_image(samaritan, finished_run, tmp_path):
    folder, _ = finished_run
    images, out = folder / "data" / "images", tmp_path / "out"
    done = samaritan("predict", "--adapter", folder / "adapter", "--input", images, "--output", out)
    assert done.code == 0, done.err
    assert done.out.startswith("4 label maps in ")
    names = sorted(path.name for path in images.iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    assert {grid_of(out / name)[2] for name in names} == {("R", "A", "S"), ("L", "A", "S")}
    for name in names:
        assert grid_of(out / name) == grid_of(images / name)
        values = np.asarray(nib.load(out / name).dataobj)
        assert values.dtype.kind == "u"
        assert set(np.unique(values)) <= {0, 1, 2, 3}


def test_predict_of_one_file_writes_what_the_folder_would(samaritan, finished_run, tmp_path):
    folder, _ = finished_run
    image = folder / "data" / "images" / "phantom_02_001.nii.gz"
    adapter = ("predict", "--adapter", folder / "adapter", "--input", image)
    assert samaritan(*adapter, "--output", tmp_path / "a" / "label.nii.gz").code == 0
    assert samaritan(*adapter, "--output", tmp_path / "b").code == 0
    first = nib.load(tmp_path / "a" / "label.nii.gz")
    second = nib.load(tmp_path / "b" / "phantom_02_001.nii.gz")
    assert np.array_equal(np.asarray(first.dataobj), np.asarray(second.dataobj))
    assert grid_of(tmp_path / "a" / "label.nii.gz") == grid_of(image)


def test_predict_writes_the_label_values_of_the_dataset(
    samaritan, finished_run, tmp_path, monkeypatch
):
    folder, _ = finished_run
    monkeypatch.setattr(
        "samaritan.training.evaluate.predict_indices",
        lambda segmenter, prepared, cache, settings: np.full(prepared.grid.shape, 2, np.uint8),
    )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for path in (folder / "adapter").iterdir():
        (adapter / path.name).write_bytes(path.read_bytes())
    card = json.loads((adapter / "samaritan.json").read_text())
    card["classes"] = {"liver": 7, "kidney": 300, "vessel": 5}
    (adapter / "samaritan.json").write_text(json.dumps(card))
    image = folder / "data" / "images" / "phantom_01_001.nii.gz"
    out = tmp_path / "label.nii.gz"
    done = samaritan("predict", "--adapter", adapter, "--input", image, "--output", out)
    assert done.code == 0, done.err
    assert set(np.unique(np.asarray(nib.load(out).dataobj))) == {300}
    assert "300 kidney" in done.out


def test_predict_never_overwrites_its_input(samaritan, finished_run):
    folder, _ = finished_run
    images = folder / "data" / "images"
    done = samaritan(
        "predict", "--adapter", folder / "adapter", "--input", images, "--output", images
    )
    assert done.code == 1
    assert "overwrite its own input" in done.err
