"""Bad input to `samaritan simulate`: one clear error, status 1, and nothing left behind."""

from __future__ import annotations

import csv
import hashlib
import resource
import shutil
import signal
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from samaritan.data.phantoms import write_phantoms

ROWS = ("case_id", "image", "label", "site", "subject_id", "split")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_phantoms(tmp_path_factory.mktemp("phantoms") / "data", 2, 2, 0)


@pytest.fixture
def data(whole, tmp_path):
    """A good data folder, to be broken."""
    return Path(shutil.copytree(whole, tmp_path / "data"))


@pytest.fixture
def refused(samaritan, small_config, tmp_path):
    """Run a simulation that must be refused; its one error line."""

    def run(*arguments, data=None, out=None, config=None):
        out = out or tmp_path / "run"
        given = ["--data", data] if data is not None else []
        done = samaritan("simulate", config or small_config, *given, "--out", out, *arguments)
        assert done.code == 1, done.err
        assert done.out == ""
        assert done.err.count("error:") == 1, done.err
        assert "Traceback" not in done.err
        assert "SAM-X999" not in done.err
        assert not (tmp_path / "run").exists()
        return done.err[done.err.index("error: ") :]

    return run


def rows_of(data):
    with (data / "manifest.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(data, rows):
    with (data / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS)
        writer.writeheader()
        writer.writerows(rows)


def change(data, number, **cells):
    rows = rows_of(data)
    rows[number] |= cells
    write_rows(data, rows)


def rewrite(data, folder, edit, affine=None):
    path = data / folder / "phantom_01_001.nii.gz"
    image = nib.load(path)
    array = edit(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(array, image.affine if affine is None else affine), path)


def with_nan(array):
    array[3, 3, 3] = np.nan
    return array


def with_value_9(array):
    array[3, 3, 3] = 9
    return array


def cut(data):
    path = data / "images" / "phantom_01_001.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])


DATA_FAULTS = {
    "missing label file": (
        lambda d: (d / "labels" / "phantom_01_001.nii.gz").unlink(), "labels/phantom_01_001"
    ),
    "label on another grid": (
        lambda d: rewrite(d, "labels", lambda a: a[:-1]), "phantom_01_001"
    ),
    "label shifted": (
        lambda d: rewrite(d, "labels", lambda a: a, np.diag([3.0, 3, 5, 1])), "phantom_01_001"
    ),
    "4-D image": (
        lambda d: rewrite(d, "images", lambda a: np.stack([a, a], -1)), "phantom_01_001"
    ),
    "NaN voxels": (lambda d: rewrite(d, "images", with_nan), "phantom_01_001"),
    "empty manifest": (lambda d: write_rows(d, []), "lists no case"),
    "no manifest": (lambda d: (d / "manifest.csv").unlink(), "manifest.csv"),
    "person in two splits": (
        lambda d: change(d, 0, subject_id="person_01_002"), "in more than one split"
    ),
    "person at two sites": (
        lambda d: change(d, 0, subject_id="person_02_001"), "at more than one site"
    ),
    "truncated image": (cut, "phantom_01_001"),
    "no training case at a site": (lambda d: change(d, 0, split="val"), "site site_01 has no"),
    "no validation case": (
        lambda d: [change(d, n, split="train") for n in (1, 3)], "no validation case"
    ),
    "path out of the folder": (lambda d: change(d, 0, image="../x.nii.gz"), "leaves the dataset"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DATA_FAULTS)
def test_bad_data_is_refused(refused, data, fault):
    damage, named = DATA_FAULTS[fault]
    damage(data)
    error = refused(data=data)
    assert error.startswith("error: SAM-D")
    assert named in error
    assert "hint: " in error


def test_a_label_value_of_no_class_is_refused(refused, data):
    rewrite(data, "labels", with_value_9)
    classes = "data.classes={liver: 1, kidney: 2, vessel: 3}"
    error = refused("--set", classes, data=data)
    assert "phantom_01_001" in error
    assert "9" in error


def test_phantoms_that_do_not_fit_the_configuration_leave_no_folder(refused):
    error = refused("--set", "data.classes={liver: 1}")
    assert error.startswith("error: SAM-D")


def test_a_missing_data_folder_is_refused(refused, tmp_path):
    assert "SAM-D201" in refused(data=tmp_path / "nowhere")
    assert "SAM-C303" in refused("--set", "data.source=folder")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("trainin.flip=[]", "did you mean training"),
        ("peft.rank=0", "peft.rank"),
        ("strategy=magic", "fedavg"),
        ("peft.preset=magic", "flap-sam"),
        ("model.base=vit_x", "vit_b, vit_l, vit_h"),
        ("model.image_size=33", "model.image_size 33"),
        ("model.base=vit_b", "sam_vit_b_01ec64.pth"),
        ("model.checkpoint=sam.pth", "cannot read the checkpoint"),
        ("federation.min_sites=3", "min_sites"),
    ],
)
def test_a_bad_choice_is_refused_before_the_folder_is_made(refused, override, named):
    assert named in refused("--set", override)


@pytest.mark.parametrize("name", ["strategy=magic", "peft.preset=magic", "model.base=vit_x"])
def test_an_unknown_name_is_refused_before_any_work_is_done(refused, name, monkeypatch):
    monkeypatch.setattr("simulation.run.write_phantoms", None)
    assert "Choose one of: " in refused("--set", name)


def test_a_quorum_above_the_sites_of_the_data_is_refused(refused, data):
    keys = ("--set", "federation.min_sites=3", "--set", "data.source=folder")
    assert "federation.min_sites is 3, but 2 sites train" in refused(*keys, data=data)


def test_ray_is_refused_where_it_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "SAM-C301" in refused("--engine", "ray")


# Checkpoints of the base.


def test_a_base_checkpoint_with_another_hash_is_refused(refused, tmp_path):
    path = tmp_path / "sam.safetensors"
    save_file({"image_encoder.pos_embed": torch.zeros(3)}, path)
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    base = ("--set", "model.base=vit_b", "--set", f"model.checkpoint={path}")
    error = refused(*base, "--set", f"model.checkpoint_sha256={'a' * 64}")
    assert actual in error
    assert "a" * 64 in error


@pytest.mark.parametrize("kind", ["shapes", "garbage", "missing"])
def test_a_base_checkpoint_that_does_not_fit_is_refused(refused, tmp_path, kind):
    path = tmp_path / "sam.safetensors"
    if kind == "shapes":
        save_file({"image_encoder.pos_embed": torch.zeros(3)}, path)
    elif kind == "garbage":
        path.write_bytes(b"not tensors")
    base = ("--set", "model.base=vit_b", "--set", f"model.checkpoint={path}")
    error = refused(*base, "--set", "data.cases_per_site=2")
    assert error.startswith("error: SAM-M")
    assert "sam.safetensors" in error


# The run folder.


def test_out_that_is_a_file_is_refused(refused, tmp_path):
    out = tmp_path / "file"
    out.write_text("mine")
    assert "is a file" in refused(out=out)
    assert out.read_text() == "mine"


@pytest.mark.parametrize("with_data", [True, False])
def test_out_below_a_file_cannot_be_written(refused, tmp_path, data, with_data):
    (tmp_path / "file").write_text("mine")
    error = refused(out=tmp_path / "file" / "run", data=data if with_data else None)
    assert "SAM-S101" in error


def test_out_that_holds_something_is_left_alone(refused, tmp_path):
    out = tmp_path / "full"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "is not empty" in refused(out=out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_resume_without_a_run_is_refused(refused, tmp_path, samaritan, small_config):
    out = tmp_path / "empty"
    out.mkdir()
    assert "no run to resume" in refused("--resume", out=out)
    assert "no run to resume" in refused("--resume", out=tmp_path / "nowhere")
    assert list(out.iterdir()) == []
    assert "--resume needs --out" in samaritan("simulate", small_config, "--resume").err


def test_resume_with_another_configuration_names_the_keys(refused, finished_run, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(finished_run[0], out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error = refused("--resume", "--set", "seed=5", "--set", "peft.rank=3", out=out)
    assert "SAM-C302" in error
    assert "seed: 0 -> 5" in error
    assert "peft.rank: 2 -> 3" in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_disk_that_fills_up_ends_the_run_and_it_can_be_resumed(
    samaritan, small_config, finished_run, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(finished_run[0], out)
    for name in ("checkpoints/round_00003.safetensors", "summary.json"):
        (out / name).unlink()
    kept = {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()}
    size = max(len(content) for content in kept.values())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
        done = samaritan("simulate", small_config, "--out", out, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert done.code == 1
    assert done.err.count("error:") == 1
    assert "SAM-S101" in done.err
    assert "round_00003.safetensors" in done.err
    assert "Traceback" not in done.err
    assert {path.name: path.read_bytes() for path in (out / "checkpoints").iterdir()} == kept
    assert samaritan("simulate", small_config, "--out", out, "--resume").code == 0
    adapter = Path("adapter") / "adapter_model.safetensors"
    assert (out / adapter).read_bytes() == (finished_run[0] / adapter).read_bytes()


# Adapters.


@pytest.mark.parametrize("command", ["evaluate", "predict"])
@pytest.mark.parametrize("fault", ["missing", "no card", "cut tensors", "bad card", "other base"])
def test_a_bad_adapter_folder_is_refused(samaritan, finished_run, whole, tmp_path, command, fault):
    adapter = tmp_path / "adapter"
    if fault != "missing":
        shutil.copytree(finished_run[0] / "adapter", adapter)
    card, tensors = adapter / "samaritan.json", adapter / "adapter_model.safetensors"
    if fault == "no card":
        card.unlink()
    elif fault == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif fault == "bad card":
        card.write_text(card.read_text()[:-50])
    elif fault == "other base":
        sha256 = (finished_run[0] / "summary.json").read_text().split('"sha256": "')[1][:64]
        card.write_text(card.read_text().replace(sha256, "0" * 64))
    out = tmp_path / "out"
    rest = {
        "evaluate": ("--data", whole, "--out", out),
        "predict": ("--input", whole / "images", "--output", out),
    }
    done = samaritan(command, "--adapter", adapter, *rest[command])
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: SAM-M")
    assert "Traceback" not in done.err
    assert not out.exists()


@pytest.mark.parametrize("kind", ["missing", "empty folder", "truncated"])
def test_predict_of_a_bad_image_is_refused(samaritan, finished_run, whole, tmp_path, kind):
    source = tmp_path / "image.nii.gz"
    if kind == "empty folder":
        source = tmp_path / "images"
        source.mkdir()
    elif kind == "truncated":
        source.write_bytes((whole / "images" / "phantom_01_001.nii.gz").read_bytes()[:5000])
    done = samaritan(
        "predict", "--adapter", finished_run[0] / "adapter", "--input", source,
        "--output", tmp_path / "label.nii.gz",
    )  # fmt: skip
    assert done.code == 1
    assert done.err.count("error: SAM-D") == 1
    assert "Traceback" not in done.err
    assert not (tmp_path / "label.nii.gz").exists()


def test_evaluate_of_a_missing_data_folder_is_refused(samaritan, finished_run, tmp_path):
    done = samaritan(
        "evaluate", "--adapter", finished_run[0] / "adapter", "--data", tmp_path / "nowhere"
    )
    assert done.code == 1
    assert "SAM-D201" in done.err
