"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

WritePair = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real MRI: $SAMARITAN_DATA, else ../shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SAMARITAN_DATA", default))
    if not (folder / "msd_hippocampus" / "manifest.csv").is_file():
        pytest.skip(f"no real data at {folder}; set SAMARITAN_DATA to run this test")
    return folder


@pytest.fixture
def write_pair(tmp_path: Path) -> WritePair:
    """Write an image and its label as NIfTI: ``write_pair("a", image=..., label=..., ...)``.

    Files land in ``images/`` and ``labels/`` of ``tmp_path``; the defaults are random numbers and a
    box, the same for the same name.
    """

    def write(
        name: str = "case",
        *,
        shape: tuple[int, ...] = (8, 9, 7),
        affine: Any = None,
        image: Any = None,
        label: Any = None,
        label_affine: Any = None,
    ) -> tuple[Path, Path]:
        rng = np.random.default_rng(list(name.encode()))
        affine = np.eye(4) if affine is None else affine
        image = rng.normal(100, 20, shape).astype(np.float32) if image is None else image
        if label is None:
            label = np.zeros(shape, np.uint8)
            label[2:5, 2:6, 2:4] = 1
        paths = []
        for folder, array, matrix in (
            ("images", image, affine),
            ("labels", label, affine if label_affine is None else label_affine),
        ):
            path = tmp_path / folder / f"{name}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, matrix), path)
            paths.append(path)
        return paths[0], paths[1]

    return write
