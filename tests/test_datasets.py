"""Folders as lists of cases, the three layouts, and splits that keep a person together."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from samaritan.data.datasets import (
    Case,
    Dataset,
    assign_splits,
    by_site,
    discover_classes,
    label_values,
    read_dataset,
    require_disjoint,
    scan_dataset,
)
from samaritan.errors import DataError

HEADER = "case_id,image,label,site,subject_id,split"


def manifest(folder: Path, *rows: str, header: str = HEADER, files: bool = True) -> Path:
    """A manifest and, for the default names, empty files that stand for images and labels."""
    (folder / "manifest.csv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    if files:
        for name in "abcd":
            (folder / f"{name}.nii.gz").touch()
            (folder / f"{name}_seg.nii.gz").touch()
    return folder


def refused(code: str, folder: Path, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        read_dataset(folder)
    assert caught.value.code == code, str(caught.value)
    assert caught.value.hint
    for word in words:
        assert word in caught.value.message
    assert str(folder) not in caught.value.message


# Manifests.


def test_a_manifest_with_all_columns(tmp_path: Path) -> None:
    manifest(tmp_path, "one,a.nii.gz,a_seg.nii.gz,North,anna,Training", "two,b.nii.gz,,South,ben,")
    dataset = read_dataset(tmp_path)
    assert dataset.cases == (
        Case("one", tmp_path / "a.nii.gz", tmp_path / "a_seg.nii.gz", "North", "anna", "train"),
        Case("two", tmp_path / "b.nii.gz", None, "South", "ben", ""),
    )
    assert dataset.classes is None
    assert dataset.root == tmp_path


def test_optional_columns_have_defaults_and_more_are_allowed(tmp_path: Path) -> None:
    manifest(tmp_path, "one,CT,a.nii.gz,a_seg.nii.gz", header="case_id,modality,image,label")
    (case,) = read_dataset(tmp_path).cases
    assert (case.site, case.subject_id, case.split) == ("site", "one", "")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_what_spreadsheets_write(tmp_path: Path, delimiter: str, newline: str) -> None:
    manifest(tmp_path)
    lines = [
        HEADER.replace("case_id", "Case_ID "),
        'one,a.nii.gz,a_seg.nii.gz,"A, ""B"" & C",x,val',
    ]
    if delimiter != ",":
        lines = [line.replace(",", delimiter) for line in lines]
    text = newline.join([*lines, delimiter * 5, ""])
    (tmp_path / "manifest.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (case,) = read_dataset(tmp_path).cases
    assert case.case_id == "one"
    assert case.split == "val"
    assert case.site == f'A{delimiter} "B" & C'


def test_windows_separators_spaces_and_links(tmp_path: Path) -> None:
    outside = tmp_path / "disk" / "x.nii.gz"
    folder = tmp_path / "data"
    (folder / "my images").mkdir(parents=True)
    outside.parent.mkdir()
    outside.touch()
    (folder / "my images" / "x.nii.gz").symlink_to(outside)
    manifest(folder, r"one,my images\x.nii.gz,,s,p,", "two,./my images/../a.nii.gz,,s,q,")
    cases = read_dataset(folder).cases
    assert cases[0].image.resolve() == outside
    assert cases[1].image == folder / "a.nii.gz"


def test_mac_litter_is_ignored(tmp_path: Path) -> None:
    manifest(tmp_path, "one,a.nii.gz,,s,p,", "._one,._a.nii.gz,,s,p,")
    assert [case.case_id for case in read_dataset(tmp_path).cases] == ["one"]


def test_missing_column_is_named(tmp_path: Path) -> None:
    refused("SAM-D202", manifest(tmp_path, "one,a.nii.gz", header="case_id,image"), "label")
    (tmp_path / "manifest.csv").write_text("")
    refused("SAM-D202", tmp_path, "case_id, image, label")


def test_empty_and_broken_manifests(tmp_path: Path) -> None:
    refused("SAM-D203", manifest(tmp_path))
    (tmp_path / "manifest.csv").write_bytes(HEADER.encode() + b"\none,M\xfcller.nii.gz,,s,p,\n")
    refused("SAM-D202", tmp_path, "manifest.csv")
    refused("SAM-D202", manifest(tmp_path, 'one,"a.nii.gz,,s,p,'), "line")


def test_duplicate_case_ids(tmp_path: Path) -> None:
    refused("SAM-D204", manifest(tmp_path, "one,a.nii.gz,,s,p,", "one,b.nii.gz,,s,q,"), "one")


@pytest.mark.parametrize("case_id", ["", "a/b", "..", "a\\b", "a\tb", "a\x00b"])
def test_case_ids_that_cannot_name_a_file(tmp_path: Path, case_id: str) -> None:
    refused("SAM-D207", manifest(tmp_path, f"{case_id},a.nii.gz,,s,p,"), "entry 1")


@pytest.mark.parametrize("path", ["../a.nii.gz", "/etc/passwd", "x/../../a.nii.gz", "..", "//x"])
@pytest.mark.parametrize("column", ["image", "label"])
def test_paths_that_leave_the_folder(tmp_path: Path, path: str, column: str) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "a.nii.gz").touch()
    row = f"one,{path},,s,p," if column == "image" else f"one,a.nii.gz,{path},s,p,"
    refused("SAM-D205", manifest(folder, row), "one", column)


@pytest.mark.parametrize("path", ["nowhere.nii.gz", "", "x" * 300 + ".nii.gz"])
def test_missing_files(tmp_path: Path, path: str) -> None:
    refused("SAM-D206", manifest(tmp_path, f"one,{path},,s,p,"), "one")


def test_the_first_fault_is_shown_and_the_others_counted(tmp_path: Path) -> None:
    manifest(tmp_path, "one,x.nii.gz,,s,p,", "two,../y,,s,q,", "three,a.nii.gz,,s,r,")
    refused("SAM-D206", tmp_path, "one", "1 more")
    dataset, faults = scan_dataset(tmp_path)
    assert [case.case_id for case in dataset.cases] == ["three"]
    assert [(case_id, error.code) for case_id, error in faults] == [
        ("one", "SAM-D206"),
        ("two", "SAM-D205"),
    ]


def test_unknown_layouts_say_what_was_looked_for(tmp_path: Path) -> None:
    refused("SAM-D201", tmp_path / "none", "none")
    (tmp_path / "scan.mha").touch()
    refused("SAM-D201", tmp_path, "manifest.csv", "dataset.json", "scan.mha")


# Decathlon and nnU-Net.


def tree(folder: Path, *files: str, **description: Any) -> Path:
    for name in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


MSD: dict[str, Any] = {
    "modality": {"0": "MRI"},
    "labels": {"0": "background", "2": "Posterior", "1": "Anterior"},
    "training": [
        {"image": "./imagesTr/h_001.nii.gz", "label": "./labelsTr/h_001.nii.gz"},
        {"image": "./imagesTr/._h_001.nii.gz", "label": "./labelsTr/._h_001.nii.gz"},
    ],
    "test": ["./imagesTs/h_002.nii.gz"],
}


def test_decathlon(tmp_path: Path) -> None:
    tree(tmp_path, "imagesTr/h_001.nii.gz", "labelsTr/h_001.nii.gz", **MSD)
    dataset = read_dataset(tmp_path)
    (case,) = dataset.cases
    assert case == Case(
        "h_001",
        tmp_path / "imagesTr/h_001.nii.gz",
        tmp_path / "labelsTr/h_001.nii.gz",
        "site",
        "h_001",
        "",
    )
    assert list((dataset.classes or {}).items()) == [("Anterior", 1), ("Posterior", 2)]


def test_nnunet_1_adds_the_channel_to_the_image(tmp_path: Path) -> None:
    tree(tmp_path, "imagesTr/h_001_0000.nii.gz", "labelsTr/h_001.nii.gz", **MSD)
    (case,) = read_dataset(tmp_path).cases
    assert case.case_id == "h_001"
    assert case.image.name == "h_001_0000.nii.gz"


NNUNET: dict[str, Any] = {
    "channel_names": {"0": "T2"},
    "labels": {"background": 0, "cord": 1, "grey": 2},
    "numTraining": 2,
    "file_ending": ".nii.gz",
}


def test_nnunet_2(tmp_path: Path) -> None:
    names = ("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz")
    files = [name.format(case) for case in ("b", "a_0000", "._a") for name in names]
    dataset = read_dataset(tree(tmp_path, *files, **NNUNET))
    assert [case.case_id for case in dataset.cases] == ["a_0000", "b"]
    assert dataset.cases[1].label == tmp_path / "labelsTr/b.nii.gz"
    assert dataset.classes == {"cord": 1, "grey": 2}


def test_nnunet_without_its_label(tmp_path: Path) -> None:
    refused("SAM-D206", tree(tmp_path, "imagesTr/a_0000.nii.gz", **NNUNET), "case a", "label")


@pytest.mark.parametrize(
    ("base", "change", "code"),
    [
        (MSD, {"modality": {"0": "T1", "1": "T2"}}, "SAM-D208"),
        (MSD, {"training": ["imagesTr/a.nii.gz"]}, "SAM-D202"),
        (MSD, {"training": []}, "SAM-D203"),
        (NNUNET, {"channel_names": {"0": "T1", "1": "T2"}}, "SAM-D208"),
        (NNUNET, {"file_ending": ".png"}, "SAM-D202"),
        (NNUNET, {"labels": {"background": 0, "whole": [1, 2]}}, "SAM-D202"),
        (NNUNET, {"labels": {"background": 0, "x": 1, "ignore": 2}}, "SAM-D202"),
        (NNUNET, {"labels": {"background": 0, "x": 1, "y": 1}}, "SAM-D202"),
        (NNUNET, {"labels": {"background": 0, "x": True}}, "SAM-D202"),
        (NNUNET, {"labels": {"background": 0, "x": -1}}, "SAM-D202"),
    ],
)
def test_unsupported_descriptions(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], code: str
) -> None:
    folder = tmp_path / "data"
    files = ("h_001.nii.gz", "a_0000.nii.gz", "a.nii.gz")
    folder.mkdir()
    tree(folder, *[f"{part}/{f}" for part in ("imagesTr", "labelsTr") for f in files],
         **(base | change))  # fmt: skip
    refused(code, folder)


@pytest.mark.parametrize("text", ["{", "[1]", "{'labels': 1}"])
def test_broken_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    refused("SAM-D202", tmp_path, "dataset.json")


def test_a_manifest_takes_its_classes_from_the_description(tmp_path: Path) -> None:
    tree(manifest(tmp_path, "one,a.nii.gz,,s,p,"), **NNUNET)
    assert read_dataset(tmp_path).classes == {"cord": 1, "grey": 2}


def test_classes_are_found_in_the_labels(
    tmp_path: Path, write_pair: Callable[..., tuple[Path, Path]]
) -> None:
    for name, values in (("a", (0, 3)), ("b", (0, 1))):
        write_pair(name, label=np.resize(np.array(values, np.uint8), (4, 4, 4)), shape=(4, 4, 4))
    rows = [f"{name},images/{name}.nii.gz,labels/{name}.nii.gz,s,{name}," for name in "ab"]
    dataset = read_dataset(manifest(tmp_path, *rows, "c,c.nii.gz,,s,c,"))
    assert [label_values(case) for case in dataset.cases] == [(0, 3), (0, 1), ()]
    assert discover_classes(dataset) == {"class_1": 1, "class_3": 3}
    assert discover_classes(replace(dataset, classes={"x": 1})) == {"x": 1}


# Splits.


def people(*entries: tuple[str, str, str]) -> Dataset:
    """A dataset from (site, subject, split)."""
    cases = [
        Case(f"case{number}", Path("x"), None, site, subject, split)
        for number, (site, subject, split) in enumerate(entries)
    ]
    return Dataset(Path(), tuple(cases), None)


def splits_of(dataset: Dataset) -> dict[str, set[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for case in dataset.cases:
        found[case.subject_id].add(case.split)
    return dict(found)


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(
    entries=st.lists(
        st.tuples(
            st.sampled_from("AB"), st.integers(0, 12), st.sampled_from(["", "", "train", "val"])
        ),
        min_size=1,
        max_size=30,
    ),
    fraction=st.sampled_from((0.1, 0.2, 0.5, 0.9)),
    seed=st.integers(0, 9),
)
def test_splits_go_by_person(
    entries: list[tuple[str, int, str]], fraction: float, seed: int
) -> None:
    given_split: dict[str, str] = {}
    tidy = []
    for site, number, split in entries:
        subject = f"{site}{number}"
        # A person has one split in the input, on some of the cases.
        split = split and given_split.setdefault(subject, split)
        tidy.append((site, subject, split))
    before = people(*tidy)
    after = assign_splits(before, fraction, seed)

    require_disjoint(after)
    assert all(case.split in {"train", "val"} for case in after.cases)
    for old, new in zip(before.cases, after.cases, strict=True):
        assert not old.split or old == new
        assert replace(new, split=old.split) == old
    backwards = replace(before, cases=before.cases[::-1])
    assert assign_splits(backwards, fraction, seed).cases == after.cases[::-1]
    for cases in by_site(after.cases).values():
        counts = Counter({case.subject_id: case.split for case in cases}.values())
        free = {case.subject_id for case in cases} - given_split.keys()
        if free and sum(counts.values()) >= 2:
            assert counts["val"] >= 1 or not counts["train"] - len(free)
            assert counts["train"] >= 1
        if not given_split:
            share = fraction * sum(counts.values())
            assert abs(counts["val"] - share) <= 1


def test_every_site_with_two_people_validates() -> None:
    dataset = people(
        *[(site, f"{site}{n}", "") for site in "ABC" for n in range(2)], ("D", "d", "")
    )
    after = assign_splits(dataset, 0.1, seed=3)
    for site, cases in by_site(after.cases).items():
        expected = ["train"] if site == "D" else ["train", "val"]
        assert sorted(case.split for case in cases) == expected


def test_the_seed_decides_and_zero_validates_nobody() -> None:
    dataset = people(*[("A", f"p{number}", "") for number in range(40)])
    first, again, other = (assign_splits(dataset, 0.25, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert Counter(case.split for case in first.cases) == {"train": 30, "val": 10}
    assert {case.split for case in assign_splits(dataset, 0, 1).cases} == {"train"}


def test_existing_splits_count_and_pull_the_rest_of_a_person() -> None:
    dataset = people(
        ("A", "anna", "val"), ("A", "anna", ""), ("A", "ben", ""), ("A", "cleo", ""),
        ("A", "dora", "test"), ("A", "dora", ""),
    )  # fmt: skip
    after = assign_splits(dataset, 0.3, seed=0)
    assert splits_of(after) == {
        "anna": {"val"}, "ben": {"train"}, "cleo": {"train"}, "dora": {"test"},
    }  # fmt: skip


@pytest.mark.parametrize("fraction", [-0.1, 1, 2, float("nan")])
def test_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(DataError, match="SAM-D303"):
        assign_splits(people(("A", "a", "")), fraction, 0)


def test_one_person_on_both_sides_is_refused() -> None:
    require_disjoint(people(("A", "anna", "train"), ("A", "anna", ""), ("B", "ben", "val")))
    with pytest.raises(DataError, match=r"SAM-D301 .*anna \(train, val\)"):
        require_disjoint(people(("A", "anna", "train"), ("A", "anna", "val")))
    with pytest.raises(DataError, match=r"SAM-D302 .*anna \(A, B\)"):
        require_disjoint(people(("A", "anna", "train"), ("B", "anna", "train")))
    many = [("A", f"p{n}", split) for n in range(9) for split in ("train", "val")]
    with pytest.raises(DataError, match="9 subjects") as caught:
        require_disjoint(people(*many))
    assert "p4" in caught.value.message
    assert "p5" not in caught.value.message


# Real files.


@pytest.mark.data
def test_nobody_is_in_two_splits_of_the_hippocampus_data(shared_data: Path) -> None:
    dataset = read_dataset(shared_data / "msd_hippocampus")
    require_disjoint(dataset)
    assert len(dataset.cases) == 209
    assert len({case.subject_id for case in dataset.cases}) == 136
    fresh = replace(dataset, cases=tuple(replace(case, split="") for case in dataset.cases))
    require_disjoint(assign_splits(fresh, 0.2, seed=0))
    by_file = replace(
        fresh,
        cases=tuple(
            replace(case, split=("train", "val")[number % 2])
            for number, case in enumerate(fresh.cases)
        ),
    )
    with pytest.raises(DataError, match="SAM-D301"):
        require_disjoint(by_file)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "cases", "sites"),
    [("gm_challenge_spinalcord", 6, 4), ("small_3d_samples", 10, 5), ("dicom_samples", 3, 3)],
)
def test_other_real_manifests_are_read(
    shared_data: Path, name: str, cases: int, sites: int
) -> None:
    dataset = read_dataset(shared_data / name)
    assert (len(dataset.cases), len(by_site(dataset.cases))) == (cases, sites)
