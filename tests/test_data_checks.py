"""``samaritan data check`` finds every fault in one pass; ``describe`` sums up a dataset."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from samaritan.data.checks import Finding, check_dataset, describe_dataset
from samaritan.data.datasets import read_dataset

WritePair = Callable[..., tuple[Path, Path]]
Row = tuple[str, str, str, str]


def manifest(folder: Path, *rows: Row) -> Path:
    """Manifest of (case, site, subject, split), the case naming its files."""
    lines = ["case_id,image,label,site,subject_id,split"]
    for case, *rest in rows:
        lines.append(",".join([case, f"images/{case}.nii.gz", f"labels/{case}.nii.gz", *rest]))
    (folder / "manifest.csv").write_text("\n".join(lines))
    return folder


def summary(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.severity, finding.code, finding.case_id) for finding in findings]


def check_one(folder: Path, **classes: int) -> list[tuple[str, str, str]]:
    """Findings of a dataset with the case at fault, ``a``, and a sound one, ``b``."""
    manifest(folder, ("a", "s", "anna", "train"), ("b", "s", "ben", "val"))
    if classes:
        (folder / "dataset.json").write_text(json.dumps({"labels": classes}))
    findings = check_dataset(folder)
    assert all(finding.message and finding.hint for finding in findings)
    assert all(finding.case_id in finding.message for finding in findings)
    assert not any(str(folder) in finding.message for finding in findings)
    return summary(findings)


def image_with(**changes: Any) -> np.ndarray:
    image = np.random.default_rng(5).normal(100, 20, (8, 9, 7)).astype(np.float32)
    image[0, 0, 0] = changes.get("voxel", image[0, 0, 0])
    return image


def label_with(value: float) -> np.ndarray:
    label = np.zeros((8, 9, 7), np.float32)
    label[2:5, 2:5, 2:5] = 1
    label[0, 0, 0] = value
    return label


SHEAR = np.eye(4)
SHEAR[0, 1] = 0.3
SHIFT = np.eye(4)
SHIFT[0, 3] = 1


@pytest.mark.parametrize(
    ("fault", "severity", "code"),
    [
        ({"image": np.ones((8, 9, 7, 2), np.float32)}, "error", "SAM-D105"),
        ({"image": image_with(voxel=np.nan)}, "error", "SAM-D106"),
        ({"label_affine": SHIFT}, "error", "SAM-D102"),
        ({"label": np.ones((8, 9, 6), np.uint8)}, "error", "SAM-D102"),
        ({"label": label_with(0.5)}, "error", "SAM-D109"),
        ({"label": label_with(-1)}, "error", "SAM-D109"),
        ({"label": label_with(7)}, "error", "SAM-D114"),
        ({"label": np.zeros((8, 9, 7), np.uint8)}, "warning", "SAM-D113"),
        ({"image": np.full((8, 9, 7), 3, np.int16)}, "warning", "SAM-D111"),
        ({"affine": np.diag([30, 30, 30, 1])}, "warning", "SAM-D112"),
        ({"affine": SHEAR}, "warning", "SAM-D112"),
    ],
)
def test_one_fault_one_finding(
    tmp_path: Path, write_pair: WritePair, fault: dict[str, Any], severity: str, code: str
) -> None:
    write_pair("b")
    write_pair("a", **fault)
    found = check_one(tmp_path, background=0, organ=1)
    assert (severity, code, "a") in found
    assert {case for _, _, case in found} == {"a"}
    assert {other for _, other, _ in found} <= {code, "SAM-D112"}


def test_a_sound_dataset_has_no_findings(tmp_path: Path, write_pair: WritePair) -> None:
    for name in "ab":
        write_pair(name)
    assert check_one(tmp_path, background=0, organ=1) == []


def test_damaged_and_missing_files(tmp_path: Path, write_pair: WritePair) -> None:
    for name in "abcd":
        write_pair(name)
    cut = tmp_path / "images" / "a.nii.gz"
    cut.write_bytes(cut.read_bytes()[:500])
    (tmp_path / "labels" / "b.nii.gz").write_bytes(b"")
    (tmp_path / "images" / "c.nii.gz").unlink()
    manifest(tmp_path, *[(name, "s", name * 2, "train") for name in "abcd"])
    found = summary(check_dataset(tmp_path))
    assert ("error", "SAM-D104", "a") in found
    assert ("error", "SAM-D103", "b") in found
    assert ("error", "SAM-D206", "c") in found
    assert ("warning", "SAM-D304", "") in found
    assert len(found) == 4
    assert [severity for severity, _, _ in found] == sorted(severity for severity, _, _ in found)


def test_a_label_may_be_wrong_twice(tmp_path: Path, write_pair: WritePair) -> None:
    write_pair("b")
    write_pair("a", label=label_with(7), label_affine=SHIFT)
    found = check_one(tmp_path, organ=1)
    assert found == [("error", "SAM-D102", "a"), ("error", "SAM-D114", "a")]


def test_a_label_is_checked_though_its_image_is_lost(tmp_path: Path, write_pair: WritePair) -> None:
    write_pair("b")
    write_pair("a", image=image_with(voxel=np.inf), label=label_with(0.5))
    assert {code for _, code, _ in check_one(tmp_path)} == {"SAM-D106", "SAM-D109"}


def test_a_folder_that_is_no_dataset_is_one_finding(tmp_path: Path) -> None:
    assert summary(check_dataset(tmp_path)) == [("error", "SAM-D201", "")]
    assert summary(check_dataset(str(tmp_path / "none"))) == [("error", "SAM-D201", "")]


@pytest.mark.parametrize(
    ("second", "severity"),
    [(("North", "ben", "train"), "warning"), (("North", "ben", "val"), "error"),
     (("South", "ben", "train"), "error")],
)  # fmt: skip
def test_the_same_image_twice(
    tmp_path: Path, write_pair: WritePair, second: tuple[str, str, str], severity: str
) -> None:
    image, _ = write_pair("a")
    write_pair("b")
    # The same voxels in other bytes: written again, not copied.
    nib.save(nib.load(image), tmp_path / "again.nii")
    shutil.move(tmp_path / "again.nii", tmp_path / "images" / "b.nii.gz")
    manifest(tmp_path, ("a", "North", "anna", "train"), ("b", *second))
    found = [each for each in check_dataset(tmp_path) if each.code == "SAM-D209"]
    assert [(each.severity, each.case_id) for each in found] == [(severity, "a")]
    assert "b" in found[0].message


def test_people_in_two_splits_and_at_two_sites(tmp_path: Path, write_pair: WritePair) -> None:
    for name in "abcd":
        write_pair(name)
    rows = [("a", "N", "anna", "train"), ("b", "N", "anna", "val"), ("c", "S", "ben", "train"),
            ("d", "N", "ben", "train")]  # fmt: skip
    findings = check_dataset(manifest(tmp_path, *rows))
    errors = {each.code: each.message for each in findings if each.severity == "error"}
    assert set(errors) == {"SAM-D301", "SAM-D302"}
    assert "anna" in errors["SAM-D301"]
    assert "ben" in errors["SAM-D302"]


@pytest.mark.parametrize(
    ("splits", "words"),
    [(("train", "train"), "validation"), (("val", "val"), "training"),
     (("test", "test"), "training or validation"), (("train", "val"), None), (("", ""), None),
     (("train", ""), None)],
)  # fmt: skip
def test_sites_without_training_or_validation(
    tmp_path: Path, write_pair: WritePair, splits: tuple[str, str], words: str | None
) -> None:
    for name in "ab":
        write_pair(name)
    rows = [(name, "s", name * 2, split) for name, split in zip("ab", splits, strict=True)]
    found = [each for each in check_dataset(manifest(tmp_path, *rows)) if each.code == "SAM-D304"]
    assert len(found) == (words is not None)
    assert not words or f"no case for {words}" in found[0].message


@pytest.mark.parametrize(
    ("ids", "alike"),
    [(("Case_01", "case-1"), True), (("p1", "P 001"), True), (("case_1_2", "case_12"), False),
     (("s1", "s10"), False), (("a100", "a10"), False), (("x-T1w", "x-T2w"), False)],
)  # fmt: skip
def test_case_ids_that_look_the_same(
    tmp_path: Path, write_pair: WritePair, ids: tuple[str, str], alike: bool
) -> None:
    for name in ids:
        write_pair(name)
    rows = [(name, "s", f"q{number}", "") for number, name in enumerate(ids)]
    findings = check_dataset(manifest(tmp_path, *rows))
    assert [each.code for each in findings] == ["SAM-D210"] * alike


def test_spacing_unlike_the_rest_of_the_site(tmp_path: Path, write_pair: WritePair) -> None:
    for name, size in zip("abcd", (1, 1, 1.5, 8), strict=True):
        write_pair(name, affine=np.diag([1, 1, size, 1]))
    rows = [(name, "s", f"q{name}", "") for name in "abcd"]
    findings = check_dataset(manifest(tmp_path, *rows))
    assert summary(findings) == [("warning", "SAM-D112", "d")]


def test_forms_that_disagree(tmp_path: Path, write_pair: WritePair) -> None:
    write_pair("b")
    path, _ = write_pair("a")
    image = nib.load(path)
    image.set_qform(np.diag([-1, 1, 1, 1]), 1)
    nib.save(nib.Nifti1Image(image_with(), None, image.header), path)
    assert ("warning", "SAM-D115", "a") in check_one(tmp_path)


def test_missing_subject_ids_are_pointed_out(tmp_path: Path, write_pair: WritePair) -> None:
    for name in "ab":
        write_pair(name)
    rows = [("a", "s", "", ""), ("b", "s", "", "")]
    assert summary(check_dataset(manifest(tmp_path, *rows))) == [("warning", "SAM-D211", "")]


def test_progress_is_reported_for_each_case(tmp_path: Path, write_pair: WritePair) -> None:
    for name in "ab":
        write_pair(name)
    manifest(tmp_path, ("a", "s", "anna", "train"), ("b", "t", "ben", "val"))
    seen: list[tuple[int, int, str]] = []
    check_dataset(tmp_path, lambda *step: seen.append(step))
    describe_dataset(read_dataset(tmp_path), lambda *step: seen.append(step))
    assert seen == [(1, 2, "a"), (2, 2, "b")] * 2


def test_description(tmp_path: Path, write_pair: WritePair) -> None:
    axes = np.array([[0, 0, 3.0, 0], [-1, 0, 0, 0], [0, 2, 0, 0], [0, 0, 0, 1]])  # PSR
    write_pair("a", shape=(8, 9, 7))
    write_pair("b", shape=(8, 9, 5), affine=axes)
    image, _ = write_pair("c")
    image.write_bytes(b"")
    rows = [("a", "s", "anna", "train"), ("b", "s", "anna", "train"), ("c", "t", "c", "")]
    described = describe_dataset(read_dataset(manifest(tmp_path, *rows)))
    assert json.loads(json.dumps(described)) == described
    assert (described["cases"], described["subjects"]) == (3, 2)
    site = described["sites"]["s"]
    assert (site["cases"], site["subjects"], site["labelled"]) == (2, 1, 2)
    assert site["splits"] == {"train": 2}
    assert site["axes"] == {"RAS": 1, "PSR": 1}
    assert site["shape"] == {"min": [5, 8, 7], "max": [8, 9, 9]}
    assert site["spacing_mm"]["max"] == pytest.approx([3, 1, 2])
    assert 90 < site["intensity_median"]["min"] <= site["intensity_median"]["max"] < 110
    assert described["sites"]["t"]["unreadable"] == 1
    assert described["sites"]["t"]["shape"] is None


@pytest.mark.data
def test_real_data_is_sound(shared_data: Path) -> None:
    assert check_dataset(shared_data / "msd_hippocampus") == []
    cord = check_dataset(shared_data / "gm_challenge_spinalcord")
    assert {each.code for each in cord} == {"SAM-D304"}
    samples = check_dataset(shared_data / "small_3d_samples")
    assert {each.code for each in samples if each.severity == "error"} == {"SAM-D302"}
