"""``samaritan data check`` and ``data describe``: faults that sites really have, all at once.

A check never stops at the first fault and never changes a file. Findings name cases and show
values, so they stay at the site.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from samaritan.data.datasets import Case, Dataset, by_site, scan_dataset, shared_subjects
from samaritan.data.volume import (
    GRID_TOLERANCE_MM,
    Array,
    NativeGrid,
    Volume,
    axes_volume,
    forms_shift_mm,
    read_image,
    read_label,
)
from samaritan.errors import DataError

Severity = Literal["error", "warning"]
Progress = Callable[[int, int, str], None]
"""Called after each case with the number done, the number of all, and the case id."""

USUAL_SPACING_MM = (0.05, 20.0)
SITE_SPACING_RATIO = 5.0
"""A voxel size this many times off the median of its site is more likely a wrong header."""

_PERPENDICULAR = 0.999
_NAMED = 5


@dataclass(frozen=True)
class Finding:
    """One fault of a dataset."""

    severity: Severity
    """An ``error`` must be mended before training; a ``warning`` wants a look."""

    code: str
    case_id: str
    """The case, or empty when the finding is about the dataset as a whole."""

    message: str
    hint: str


@dataclass(frozen=True)
class _Print:
    """What is kept of an image to compare cases with each other."""

    case: Case
    digest: str
    """Hash of the voxels: finds a copy under another name or compression."""

    spacing_mm: tuple[float, float, float]


def check_dataset(
    dataset: Dataset | Path | str,
    progress: Progress | None = None,
    site_classes: Mapping[str, dict[str, int]] | None = None,
) -> list[Finding]:
    """Look for every fault in a dataset.

    Args:
        dataset: A folder, or a dataset already read.
        progress: Told after each case.
        site_classes: Label maps of sites that do not use the dataset's own.

    Returns:
        The findings, errors first; empty when all is well.
    """
    findings: list[Finding] = []
    if not isinstance(dataset, Dataset):
        try:
            dataset, faults = scan_dataset(dataset)
        except DataError as error:
            return [_from_error(error)]
        findings += [_from_error(error, case_id) for case_id, error in faults]
    prints: list[_Print] = []
    for number, case in enumerate(dataset.cases, start=1):
        image, found = _check_image_file(case)
        grid = image.native if image else None
        classes = (site_classes or {}).get(case.site, dataset.classes)
        findings += found + _check_label_file(case, grid, classes)
        prints += [_Print(case, _digest(image.array), image.spacing_mm)] if image else []
        if progress is not None:
            progress(number, len(dataset.cases), case.case_id)
    findings += _check_list(dataset.cases)
    findings += _check_copies(prints) + _check_spacings(prints)
    return sorted(findings, key=lambda finding: finding.severity)


def require_usable(
    dataset: Dataset,
    progress: Progress | None = None,
    site_classes: Mapping[str, dict[str, int]] | None = None,
) -> None:
    """Reads every case once and refuses the data set if any cannot be used.

    Args:
        dataset: As for `check_dataset`.
        progress: As for `check_dataset`.
        site_classes: As for `check_dataset`.

    Raises:
        DataError: With the first fault and the number of others.
    """
    errors = [
        finding
        for finding in check_dataset(dataset, progress, site_classes)
        if finding.severity == "error"
    ]
    if errors:
        first = errors[0]
        more = f" (and {len(errors) - 1} more faults)" if len(errors) > 1 else ""
        raise DataError(
            first.code,
            first.message + more,
            f"{first.hint} `samaritan data check` lists every fault of the files.",
        )


def describe_dataset(dataset: Dataset, progress: Progress | None = None) -> dict[str, Any]:
    """Summarise a dataset per site; every image is read.

    Args:
        dataset: The cases.
        progress: Told after each case.

    Returns:
        Plain values for JSON. Per site: counts of cases, subjects, labels and splits; lowest
        and highest shape (voxels), spacing (mm) and median intensity; stored axes; and the number
        of unreadable images. Shape and spacing are in canonical x, y, z order.
    """
    done = 0
    sites: dict[str, Any] = {}
    for site, cases in by_site(dataset.cases).items():
        volumes: list[tuple[Volume, float]] = []
        for case in cases:
            volumes += _image_and_median(case)
            done += 1
            if progress is not None:
                progress(done, len(dataset.cases), case.case_id)
        sites[site] = _describe_site(cases, volumes)
    subjects = {case.subject_id for case in dataset.cases}
    return {
        "cases": len(dataset.cases),
        "subjects": len(subjects),
        "classes": dataset.classes,
        "sites": sites,
    }


# One case.


def _check_image_file(case: Case) -> tuple[Volume | None, list[Finding]]:
    try:
        image = read_image(case.image, case.case_id)
    except DataError as error:
        return None, [_from_error(error, case.case_id)]
    return image, _check_image(case, image)


def _check_label_file(
    case: Case, grid: NativeGrid | None, classes: dict[str, int] | None
) -> list[Finding]:
    if case.label is None:
        return []
    findings = []
    label: Volume | None = None
    try:
        label = read_label(case.label, case.case_id, grid)
    except DataError as error:
        findings.append(_from_error(error, case.case_id))
        if error.code == "SAM-D102":
            # Its values may be wrong as well.
            with contextlib.suppress(DataError):
                label = read_label(case.label, case.case_id, None)
    return findings + (_check_label(case, label, classes) if label is not None else [])


def _check_image(case: Case, image: Volume) -> list[Finding]:
    findings = []
    low, high = float(image.array.min()), float(image.array.max())
    if low == high:
        findings.append(
            _warning(
                "SAM-D111",
                case.case_id,
                f"image has the value {low:g} everywhere",
                "Check the export; nothing can be learned from it.",
            )
        )
    least, most = USUAL_SPACING_MM
    if not all(least <= size <= most for size in image.spacing_mm):
        findings.append(
            _warning(
                "SAM-D112",
                case.case_id,
                f"voxel size {_mm(image.spacing_mm)} is outside {least:g}-{most:g} mm",
                "Check the unit of the header; distances are reported in mm.",
            )
        )
    if axes_volume(image.affine) < _PERPENDICULAR:
        findings.append(
            _warning(
                "SAM-D112",
                case.case_id,
                "axes are not perpendicular",
                "Resample tilted (gantry) or sheared images to a regular grid.",
            )
        )
    shift = forms_shift_mm(image.native)
    if shift > max(GRID_TOLERANCE_MM, 0.1 * min(image.spacing_mm)):
        findings.append(
            _warning(
                "SAM-D115",
                case.case_id,
                f"qform and sform of the image differ by up to {shift:.3g} mm",
                "Programs disagree about where this image lies; Samaritan uses the sform.",
            )
        )
    return findings


def _check_label(case: Case, label: Volume, classes: dict[str, int] | None) -> list[Finding]:
    values = set(np.unique(label.array).tolist()) - {0}
    if not values:
        return [
            _warning(
                "SAM-D113",
                case.case_id,
                "label is empty",
                "Fine for an image without the structure; leave the label cell of the manifest "
                "empty for an image that nobody has labelled.",
            )
        ]
    unknown = sorted(values - set(classes.values())) if classes is not None else []
    if not unknown:
        return []
    declared = ", ".join(f"{name}={value}" for name, value in (classes or {}).items())
    return [
        Finding(
            "error",
            "SAM-D114",
            case.case_id,
            f"case {case.case_id}: label has the values {_some(unknown)}, which are not declared "
            f"({declared or 'no class is'})",
            "Declare them under 'labels' in dataset.json (in a study: in data.classes or "
            "data.site_classes), or map them to declared classes.",
        )
    ]


def _digest(array: Array) -> str:
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(array.data)
    return digest.hexdigest()


# Cases against each other.


def _check_list(cases: Sequence[Case]) -> list[Finding]:
    findings = [_from_error(error) for error in shared_subjects(cases)]
    findings += _look_alikes(cases)
    for site, members in by_site(cases).items():
        findings += _check_site(site, members)
    if len(cases) > 1 and all(case.subject_id == case.case_id for case in cases):
        findings.append(
            _warning(
                "SAM-D211",
                "",
                "no subject ids are given: every case counts as a person of its own",
                "Where a person has several images, list subject_id in manifest.csv: splits and "
                "privacy counts go by person.",
            )
        )
    return findings


def _check_site(site: str, cases: Sequence[Case]) -> list[Finding]:
    splits = Counter(case.split for case in cases)
    undecided = {case.subject_id for case in cases if not case.split}
    lacking = []
    if not splits["train"] and not undecided:
        lacking.append("training")
    if not splits["val"] and len(undecided) < (1 if splits["train"] else 2):
        lacking.append("validation")
    if not lacking:
        return []
    found = ", ".join(f"{count} {name or 'undecided'}" for name, count in splits.items() if count)
    return [
        _warning(
            "SAM-D304",
            "",
            f"site {site} has no case for {' or '.join(lacking)}: {found}",
            "Fine for a site that only tests. Otherwise leave the split column out to split by "
            "person; a site needs two people for that.",
        )
    ]


def _look_alikes(cases: Iterable[Case]) -> list[Finding]:
    groups: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        groups[_spoken(case.case_id)].append(case.case_id)
    return [
        _warning(
            "SAM-D210",
            ids[0],
            f"case ids look the same: {_some(ids)}",
            "Make sure these are different cases, and rename them.",
        )
        for ids in groups.values()
        if len(ids) > 1
    ]


def _spoken(case_id: str) -> str:
    """A case id without what people overlook: case, leading zeros, separators."""
    plain = unicodedata.normalize("NFKC", case_id).casefold()
    words = re.findall(r"[^\W\d_]+|\d+", plain)
    return " ".join(str(int(word)) if word.isdecimal() else word for word in words) or plain


def _check_copies(prints: Iterable[_Print]) -> list[Finding]:
    groups: dict[str, list[Case]] = defaultdict(list)
    for entry in prints:
        groups[entry.digest].append(entry.case)
    return [_duplicate(cases) for cases in groups.values() if len(cases) > 1]


def _check_spacings(prints: Iterable[_Print]) -> list[Finding]:
    groups: dict[str, list[_Print]] = defaultdict(list)
    for entry in prints:
        groups[entry.case.site].append(entry)
    findings = []
    for site, entries in groups.items():
        if len(entries) < 3:  # of two, neither is the odd one
            continue
        median = np.median([entry.spacing_mm for entry in entries], axis=0)
        for entry in entries:
            ratio = np.asarray(entry.spacing_mm) / median
            if max(ratio.max(), 1 / ratio.min()) > SITE_SPACING_RATIO:
                findings.append(
                    _warning(
                        "SAM-D112",
                        entry.case.case_id,
                        f"voxel size {_mm(entry.spacing_mm)} is far from the median of site "
                        f"{site}, {_mm(median)}",
                        "Check whether it is another protocol or a wrong header.",
                    )
                )
    return findings


def _duplicate(cases: Sequence[Case]) -> Finding:
    """Copies inside one split of one site only weigh double; elsewhere they leak."""
    leaks = len({(case.split, case.site) for case in cases}) > 1
    places = [f"{case.case_id} ({case.split or 'no split'}, {case.site})" for case in cases]
    return Finding(
        "error" if leaks else "warning",
        "SAM-D209",
        cases[0].case_id,
        f"the same image is listed as {_some(places)}",
        "Keep one of them, or correct the path in the manifest.",
    )


# Description.


def _image_and_median(case: Case) -> list[tuple[Volume, float]]:
    """Grid and median of an image without its voxels; empty when unreadable."""
    try:
        image = read_image(case.image, case.case_id)
    except DataError:
        return []
    empty = Volume(np.empty(0), image.affine, image.spacing_mm, image.native)
    return [(empty, float(np.median(image.array)))]


def _describe_site(cases: Sequence[Case], volumes: list[tuple[Volume, float]]) -> dict[str, Any]:
    return {
        "cases": len(cases),
        "subjects": len({case.subject_id for case in cases}),
        "labelled": sum(case.label is not None for case in cases),
        "splits": dict(sorted(Counter(case.split for case in cases).items())),
        "unreadable": len(cases) - len(volumes),
        "axes": dict(Counter(volume.native.axis_codes for volume, _ in volumes)),
        "shape": _range([_canonical_shape(volume.native) for volume, _ in volumes]),
        "spacing_mm": _range([volume.spacing_mm for volume, _ in volumes]),
        "intensity_median": _range([median for _, median in volumes]),
    }


def _canonical_shape(grid: NativeGrid) -> list[int]:
    axes = grid.orientation[:, 0].astype(int)
    return [grid.shape[int(np.flatnonzero(axes == axis)[0])] for axis in range(3)]


def _range(values: Sequence[Any]) -> dict[str, Any] | None:
    """Lowest and highest per axis."""
    if not values:
        return None
    array = np.asarray(values)
    return {"min": array.min(axis=0).tolist(), "max": array.max(axis=0).tolist()}


# Wording.


def _from_error(error: DataError, case_id: str = "") -> Finding:
    return Finding("error", error.code, case_id, error.message, error.hint)


def _warning(code: str, case_id: str, message: str, hint: str) -> Finding:
    where = f"case {case_id}: " if case_id else ""
    return Finding("warning", code, case_id, where + message, hint)


def _mm(spacing_mm: Iterable[float]) -> str:
    return " x ".join(f"{size:.3g}" for size in spacing_mm) + " mm"


def _some(items: Sequence[Any]) -> str:
    shown = ", ".join(str(item) for item in items[:_NAMED])
    return shown + (f" and {len(items) - _NAMED} more" if len(items) > _NAMED else "")
