"""Dataset folders as lists of cases, and splits by person.

Three layouts are read: a ``manifest.csv``, a Medical Segmentation Decathlon (or nnU-Net v1) folder,
and an nnU-Net v2 folder. All paths must stay inside the folder. The unit of every split is the
subject: one person may own several volumes, and all of them belong to one side.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from samaritan.data.volume import read_label
from samaritan.errors import DataError

MANIFEST = "manifest.csv"
REQUIRED_COLUMNS = ("case_id", "image", "label")
DEFAULT_SITE = "site"
TRAIN, VALIDATION = "train", "val"
"""Names of the splits that a run works on."""

_DATASET_JSON = "dataset.json"
_NIFTI_ENDINGS = (".nii.gz", ".nii")
_SPLIT_NAMES = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}
_NAMED = 5


@dataclass(frozen=True)
class Case:
    """One study: an image, perhaps its label, and the person it belongs to."""

    case_id: str
    image: Path
    label: Path | None
    site: str
    subject_id: str
    split: str
    """``train``, ``val``, ``test``, another name, or empty while undecided."""


@dataclass(frozen=True)
class Dataset:
    """The cases of one folder."""

    root: Path
    cases: tuple[Case, ...]
    classes: dict[str, int] | None
    """Label value of each foreground class, where the dataset declares them."""


CaseFault = tuple[str, DataError]
"""Case id and what is wrong with its entry."""


def read_dataset(directory: Path | str) -> Dataset:
    """Read the list of cases of a folder; no image is opened.

    Args:
        directory: A folder with ``manifest.csv``, or in the MSD, nnU-Net v1 or nnU-Net v2 layout.

    Returns:
        The cases in the order in which they are listed.

    Raises:
        DataError: No known layout, or any entry is wrong. The message shows the first fault and
            the number of others.
    """
    dataset, faults = scan_dataset(directory)
    if faults:
        first = faults[0][1]
        others = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise DataError(first.code, first.message + others, first.hint)
    return dataset


def scan_dataset(directory: Path | str) -> tuple[Dataset, list[CaseFault]]:
    """Read the list of cases and collect the entries at fault instead of stopping.

    Returns:
        The usable cases, and the case id and error of each of the others.

    Raises:
        DataError: The list itself cannot be read.
    """
    root = Path(directory)
    declared = _read_json(root / _DATASET_JSON) if (root / _DATASET_JSON).is_file() else None
    if (root / MANIFEST).is_file():
        entries = list(_manifest_entries(root / MANIFEST))
    elif declared is not None and "channel_names" in declared:
        entries = list(_nnunet_entries(root, declared))
    elif declared is not None and isinstance(declared.get("training"), list):
        entries = list(_msd_entries(root, declared))
    else:
        raise _unknown_layout(root)
    if not entries:
        raise DataError("SAM-D203", f"dataset {root.name!r} lists no case", "Add cases to it.")
    cases, faults = _usable(root, entries)
    classes = _declared_classes(declared) if declared is not None else None
    return Dataset(root, tuple(cases), classes), faults


def assign_splits(dataset: Dataset, val_fraction: float, seed: int) -> Dataset:
    """Give every case without a split one, ``train`` or ``val``, by person.

    A person with a case in a split keeps all cases there. At each site the share of validation
    subjects comes as close to ``val_fraction`` as whole people allow, with at least one person for
    validation where the site has two, and at least one for training.

    Args:
        dataset: Cases; existing splits are kept.
        val_fraction: Share of the subjects of a site, from 0 to below 1; 0 puts all in training.
        seed: Same seed, same split, whatever the order of the cases.

    Returns:
        The dataset with a split for every case.
    """
    if not 0 <= val_fraction < 1:
        raise DataError(
            "SAM-D303",
            f"validation fraction {val_fraction} is not from 0 to below 1",
            "Typical is 0.2.",
        )
    known = {case.subject_id: case.split for case in dataset.cases if case.split}
    for _, cases in sorted(by_site(dataset.cases).items()):
        people = {case.subject_id for case in cases}
        undecided = sorted(people - known.keys(), key=lambda person: _draw(seed, person))
        counts = Counter(known[person] for person in people & known.keys())
        wanted = _validation_subjects(len(undecided), counts, val_fraction)
        known |= dict.fromkeys(undecided[:wanted], "val")
        known |= dict.fromkeys(undecided[wanted:], "train")
    cases = [replace(case, split=case.split or known[case.subject_id]) for case in dataset.cases]
    return replace(dataset, cases=tuple(cases))


def require_disjoint(dataset: Dataset) -> None:
    """Refuse a dataset in which one person is on both sides of something.

    Raises:
        DataError: A subject is in two splits (SAM-D301) or at two sites (SAM-D302).
    """
    for error in shared_subjects(dataset.cases):
        raise error


def shared_subjects(cases: Sequence[Case]) -> list[DataError]:
    """Errors for subjects in two splits (SAM-D301) and at two sites (SAM-D302)."""
    errors = []
    splits = _in_several(cases, lambda case: case.split)
    if splits:
        errors.append(
            DataError(
                "SAM-D301",
                f"{_subjects(splits)} in more than one split: {_listing(splits)}",
                "Put all cases of a person into one split; scores are too good otherwise.",
            )
        )
    sites = _in_several(cases, lambda case: case.site)
    if sites:
        errors.append(
            DataError(
                "SAM-D302",
                f"{_subjects(sites)} at more than one site: {_listing(sites)}",
                "Put all cases of a person at one site. If they are different people, make the "
                "subject ids unique, for example with the site as prefix.",
            )
        )
    return errors


def by_site(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Cases grouped by site, sites in order of appearance."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.site].append(case)
    return dict(groups)


def label_values(case: Case) -> tuple[int, ...]:
    """Values that occur in the label of a case, background 0 included; empty without label."""
    if case.label is None:
        return ()
    return tuple(np.unique(read_label(case.label, case.case_id, None).array).tolist())


def discover_classes(dataset: Dataset) -> dict[str, int]:
    """Name the classes: as declared, else ``class_1`` and so on after the values in the labels."""
    if dataset.classes is not None:
        return dict(dataset.classes)
    values = {value for case in dataset.cases for value in label_values(case)}
    return {f"class_{value}": value for value in sorted(values - {0})}


# Layouts. Each yields the fields of one case; checks that all layouts share come afterwards.

_Entry = dict[str, str]


def _manifest_entries(path: Path) -> Iterator[_Entry]:
    text = _decode_text(path)
    header = text.partition("\n")[0]
    delimiter = max(",;\t", key=header.count)
    # Strict, so that an unclosed quote is an error and not one endless field.
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [(name or "").strip().lower() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        missing = [name for name in REQUIRED_COLUMNS if name not in columns]
        if missing:
            raise DataError(
                "SAM-D202",
                f"{MANIFEST} lacks the column {', '.join(missing)}; "
                f"it has {', '.join(name for name in columns if name) or 'none'}",
                "The first line names the columns: case_id,image,label,site,subject_id,split.",
            )
        for row in reader:
            # Cells beyond the header come under the key None and as a list.
            entry = {key: (row[key] or "").strip() for key in columns}
            if any(entry.values()) and not _is_mac_litter(entry["image"]):
                yield entry
    except csv.Error as error:
        raise DataError(
            "SAM-D202", f"{MANIFEST} line {reader.line_num}: {error}", "Mend the line."
        ) from error


def _msd_entries(root: Path, declared: dict[str, Any]) -> Iterator[_Entry]:
    channels = declared.get("modality")
    if isinstance(channels, dict) and len(channels) > 1:
        raise _several_channels(root.name, len(channels))
    for item in declared["training"]:
        if not isinstance(item, dict) or not isinstance(item.get("image"), str):
            raise _bad_json(f"training entry {item!r} is not {{'image': ..., 'label': ...}}")
        image = item["image"]
        if _is_mac_litter(image):
            continue
        case_id = _stem(image)
        if not (root / image).is_file():
            image = _first_channel(root, image)
        yield {"case_id": case_id, "image": image, "label": str(item.get("label") or "")}


def _nnunet_entries(root: Path, declared: dict[str, Any]) -> Iterator[_Entry]:
    channels = declared["channel_names"]
    if isinstance(channels, dict) and len(channels) > 1:
        raise _several_channels(root.name, len(channels))
    ending = str(declared.get("file_ending", ".nii.gz"))
    if ending not in _NIFTI_ENDINGS:
        raise _bad_json(f"file_ending {ending!r} is not .nii.gz or .nii")
    for image in sorted((root / "imagesTr").glob(f"*_0000{ending}")):
        if not _is_mac_litter(image.name):
            case_id = image.name.removesuffix(f"_0000{ending}")
            label = f"labelsTr/{case_id}{ending}"
            yield {"case_id": case_id, "image": f"imagesTr/{image.name}", "label": label}


def _first_channel(root: Path, image: str) -> str:
    """The ``_0000`` file that nnU-Net v1 means by ``image``, or ``image`` if there is none."""
    ending = next((end for end in _NIFTI_ENDINGS if image.endswith(end)), "")
    stem = image.removesuffix(ending)
    return f"{stem}_0000{ending}" if (root / f"{stem}_0000{ending}").is_file() else image


def _declared_classes(declared: dict[str, Any]) -> dict[str, int] | None:
    """Foreground classes of a ``dataset.json``, id -> name (MSD) or name -> id (nnU-Net v2)."""
    labels = declared.get("labels")
    if not isinstance(labels, dict):
        return None
    classes: dict[str, int] = {}
    for key, value in labels.items():
        name, number = (value, key) if str(key).isdigit() else (key, value)
        if isinstance(number, bool) or not str(number).isdigit():
            raise _bad_json(f"label {name!r} has the value {number!r}; regions are not supported")
        if str(name).lower() == "ignore":
            raise _bad_json("an 'ignore' label is declared, which is not supported")
        if int(number) and (str(name) in classes or int(number) in classes.values()):
            raise _bad_json(f"label {name!r} = {number} is declared twice")
        if int(number):
            classes[str(name)] = int(number)
    return dict(sorted(classes.items(), key=lambda item: item[1]))


# Checks shared by all layouts.


def _usable(root: Path, entries: list[_Entry]) -> tuple[list[Case], list[CaseFault]]:
    cases: list[Case] = []
    faults: list[CaseFault] = []
    seen: set[str] = set()
    for number, entry in enumerate(entries, start=1):
        case_id = entry["case_id"] or f"(entry {number})"
        try:
            _check_case_id(entry["case_id"], number, seen)
            seen.add(case_id)
            cases.append(_case(root, entry))
        except DataError as error:
            faults.append((case_id, error))
    return cases, faults


def _check_case_id(case_id: str, number: int, seen: set[str]) -> None:
    if (
        not case_id
        or case_id in {".", ".."}
        or not case_id.isprintable()
        or set(case_id) & {*"/\\"}
    ):
        raise DataError(
            "SAM-D207",
            f"entry {number}: {case_id!r} cannot be a case id",
            "Results are named after it: use letters, digits, '-' and '_'.",
        )
    if case_id in seen:
        raise DataError(
            "SAM-D204", f"case {case_id} is listed more than once", "Give every case its own id."
        )


def _case(root: Path, entry: _Entry) -> Case:
    case_id = entry["case_id"]
    split = entry.get("split", "").lower()
    label = entry["label"]
    return Case(
        case_id=case_id,
        image=_inside(root, entry["image"], f"case {case_id}: image"),
        label=_inside(root, label, f"case {case_id}: label") if label else None,
        site=entry.get("site") or DEFAULT_SITE,
        subject_id=entry.get("subject_id") or case_id,
        split=_SPLIT_NAMES.get(split, split),
    )


def _inside(root: Path, listed: str, what: str) -> Path:
    """The file, which must be named relative to the folder and exist.

    Links are followed: the site put them there. A name that climbs out is refused: a list
    may come from elsewhere.
    """
    relative = posixpath.normpath(listed.replace("\\", "/")) if listed else ""
    if relative.startswith(("/", "../")) or relative == ".." or Path(listed).is_absolute():
        raise DataError(
            "SAM-D205",
            f"{what} {listed!r} leaves the dataset folder",
            "Name files relative to the folder; move or link them into it.",
        )
    path = root / relative
    # A folder is fine here: a DICOM series is one.
    if not relative or not _exists(path):
        raise DataError(
            "SAM-D206",
            f"{what} {listed!r} does not exist",
            "Check the name and its ending, and that the copy is complete.",
        )
    return path


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long, a folder that may not be entered
        return False


def _unknown_layout(root: Path) -> DataError:
    if not root.is_dir():
        return DataError("SAM-D201", f"no dataset folder {root.name!r}", "Check the path.")
    found = ", ".join(sorted(path.name for path in root.iterdir())[:_NAMED]) or "nothing"
    return DataError(
        "SAM-D201",
        f"{root.name!r} is not a dataset; looked for {MANIFEST} and for {_DATASET_JSON} with "
        f"'training' (MSD, nnU-Net v1) or 'channel_names' (nnU-Net v2); found {found}",
        f"Write a {MANIFEST} with the columns case_id,image,label,site,subject_id,split.",
    )


def _several_channels(what: str, channels: int) -> DataError:
    return DataError(
        "SAM-D208",
        f"{what} has {channels} channels per case; one is supported",
        f"Choose one channel and list its files in a {MANIFEST}.",
    )


def _bad_json(found: str) -> DataError:
    return DataError("SAM-D202", f"{_DATASET_JSON}: {found}", f"Mend it or write a {MANIFEST}.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_decode_text(path))
    except json.JSONDecodeError as error:
        raise _bad_json(f"line {error.lineno}: {error.msg}") from error
    if not isinstance(content, dict):
        raise _bad_json("is not a JSON object")
    return content


def _decode_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(
            "SAM-D202", f"{path.name} cannot be read: {error}", "Save it as UTF-8 text."
        ) from error


def _is_mac_litter(name: str) -> bool:
    """AppleDouble files that archives made on a Mac leave beside each file."""
    return posixpath.basename(name.replace("\\", "/")).startswith("._")


def _stem(name: str) -> str:
    base = posixpath.basename(name)
    ending = next((end for end in _NIFTI_ENDINGS if base.endswith(end)), "")
    return base.removesuffix(ending)


# Subjects.


def _draw(seed: int, subject_id: str) -> bytes:
    """Position of a subject in the draw; new subjects do not reshuffle the old ones."""
    return hashlib.sha256(f"{seed}\0{subject_id}".encode()).digest()


def _validation_subjects(undecided: int, counts: Counter[str], val_fraction: float) -> int:
    """How many of the undecided subjects of a site validate."""
    if val_fraction == 0:
        return 0
    total = undecided + counts["train"] + counts["val"]
    wanted = max(round(val_fraction * total), min(1, total - 1)) - counts["val"]
    spare = undecided if counts["train"] else undecided - 1
    return max(0, min(wanted, spare))


def _in_several(cases: Iterable[Case], key: Callable[[Case], str]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        if key(case):
            found[case.subject_id].add(key(case))
    return {subject: sorted(keys) for subject, keys in found.items() if len(keys) > 1}


def _subjects(found: dict[str, list[str]]) -> str:
    return f"{len(found)} subject{'s' if len(found) > 1 else ''}"


def _listing(found: dict[str, list[str]]) -> str:
    shown = [f"{name} ({', '.join(keys)})" for name, keys in sorted(found.items())[:_NAMED]]
    return "; ".join(shown) + ("; ..." if len(found) > _NAMED else "")
