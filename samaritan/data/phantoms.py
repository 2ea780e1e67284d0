"""Procedural phantoms: several organs seen by several scanners, written as real NIfTI.

They make the demo and the tests run anywhere. Shapes vary between people; contrast, noise, bias
field, resolution and field of view vary between scanners, one scanner per site. A phantom score
says that the machinery works and nothing about medicine.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

CLASSES = {"liver": 1, "kidney": 2, "vessel": 3}

_ORGANS: tuple[tuple[int, tuple[float, float, float], tuple[float, float, float]], ...] = (
    # class, centre and radii in units of the body's half width, along x (right), y and z
    (1, (0.40, 0.12, 0.15), (0.40, 0.44, 0.55)),
    (2, (-0.46, -0.26, -0.05), (0.24, 0.22, 0.42)),
    (2, (0.44, -0.50, -0.45), (0.22, 0.20, 0.34)),
    (3, (-0.02, -0.24, 0.0), (0.15, 0.15, 2.00)),
)


@dataclass(frozen=True)
class Scanner:
    """How a site's machine renders the same anatomy.

    Attributes:
        gains: Mean intensity of air, body, liver, kidney and vessel.
        noise: Standard deviation of the noise, in units of the body's intensity.
        bias: Strength of the smooth field that brightens one side.
        spacing_mm: Voxel size along x, y, z.
        scale: Factor on all values, as raw units differ between vendors.
        flip_x: Whether voxels are stored from left to right (LAS) or right to left (RAS).
    """

    gains: tuple[float, float, float, float, float]
    noise: float
    bias: float
    spacing_mm: tuple[float, float, float]
    scale: float
    flip_x: bool


def make_scanner(index: int, seed: int) -> Scanner:
    """The scanner of one site; neighbouring sites differ in every respect."""
    rng = np.random.default_rng((seed, index, 1))
    liver, kidney, vessel = (rng.uniform(0.75, 1.25, 3) * (0.72, 0.45, 1.55)).tolist()
    return Scanner(
        gains=(0.05, 1.0, liver, kidney, vessel),
        noise=float(rng.uniform(0.04, 0.10)),
        bias=float(rng.uniform(0.0, 0.35)),
        spacing_mm=(s := float(rng.uniform(2.6, 3.4)), s, float(rng.uniform(4.0, 6.0))),
        scale=float(10 ** rng.uniform(1.5, 4.5)),
        flip_x=bool(index % 2),
    )


def write_phantoms(directory: Path, sites: int, cases_per_site: int, seed: int) -> Path:
    """Writes a data set of phantoms with a manifest.

    Every fourth person comes twice, as happens in real data. A fifth of each site's people are
    held out for validation.

    Args:
        directory: Created; files of the same names are overwritten.
        sites: Number of sites, each with a scanner of its own.
        cases_per_site: Volumes per site, at least two.
        seed: Decides every voxel.

    Returns:
        The directory, ready for `read_dataset`.
    """
    for folder in ("images", "labels"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for site in range(sites):
        scanner = make_scanner(site, seed)
        people = _people(cases_per_site)
        held_out = set(sorted(set(people))[-max(1, round(len(set(people)) / 5)) :])
        for number, person in enumerate(people):
            case_id = f"phantom_{site + 1:02d}_{number + 1:03d}"
            rng = np.random.default_rng((seed, site, person, number, 2))
            anatomy = np.random.default_rng((seed, site, person, 3))
            image, label, affine = make_phantom(scanner, anatomy, rng)
            for folder, array in (("images", image), ("labels", label)):
                nib.save(nib.Nifti1Image(array, affine), directory / folder / f"{case_id}.nii.gz")
            rows.append(
                {
                    "case_id": case_id,
                    "image": f"images/{case_id}.nii.gz",
                    "label": f"labels/{case_id}.nii.gz",
                    "site": f"site_{site + 1:02d}",
                    "subject_id": f"person_{site + 1:02d}_{person + 1:03d}",
                    "split": "val" if person in held_out else "train",
                }
            )
    with (directory / "manifest.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return directory


def make_phantom(
    scanner: Scanner, anatomy: np.random.Generator, noise: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64]]:
    """One volume, its label and its affine.

    Args:
        scanner: Renders the image.
        anatomy: Decides the person's shapes.
        noise: Decides pose and noise of this visit.

    Returns:
        Image (X, Y, Z) float32, label (X, Y, Z) uint8, affine (4, 4) in mm.
    """
    half_mm = anatomy.uniform(72, 88) * np.array([1.0, 0.8, 0.85])
    field_mm = half_mm * noise.uniform(1.08, 1.2, 3)
    shape = np.maximum(np.round(2 * field_mm / scanner.spacing_mm).astype(int), 8)
    axes = [
        (np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, scanner.spacing_mm, strict=True)
    ]
    grid = np.stack(np.meshgrid(*axes, indexing="ij")) / half_mm[:, None, None, None]
    grid += noise.uniform(-0.05, 0.05, 3)[:, None, None, None]
    body = (grid[:2] ** 2).sum(0) < 1
    label = np.zeros(shape, dtype=np.uint8)
    for value, centre, radii in _ORGANS:
        middle = np.array(centre) + anatomy.normal(0, 0.04, 3)
        size = np.array(radii) * anatomy.uniform(0.85, 1.15, 3)
        inside = (((grid - middle[:, None, None, None]) / size[:, None, None, None]) ** 2).sum(
            0
        ) < 1
        label[inside & body] = value
    tissue = np.where(body, label + 1, 0)
    image = np.array(scanner.gains)[tissue]
    image *= 1 + scanner.bias * grid[0] + 0.5 * scanner.bias * grid[1]
    image += ndimage.gaussian_filter(noise.normal(0, 0.6, shape), 1.5) * body
    image = ndimage.gaussian_filter(image, 0.5) + noise.normal(0, scanner.noise, shape)
    affine = np.diag([*scanner.spacing_mm, 1.0])
    affine[:3, 3] = -(shape - 1) / 2 * scanner.spacing_mm
    if scanner.flip_x:
        image, label = image[::-1], label[::-1]
        affine[0] *= -1
    return (image * scanner.scale).astype(np.float32), np.ascontiguousarray(label), affine


def _people(cases: int) -> list[int]:
    """Person of each case: every fourth person comes twice in a row."""
    people: list[int] = []
    person = 0
    while len(people) < cases:
        people += [person] * (2 if person % 4 == 3 else 1)
        person += 1
    return people[:cases]
