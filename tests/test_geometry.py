"""Slices and back: a voxel comes home, whatever the axes, the tilt, the spacing and the size."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nibabel.eulerangles import euler2mat
from scipy import ndimage

from samaritan.data.transforms import (
    Plane,
    SliceGrid,
    from_stack,
    normalise_intensity,
    slice_grid,
    to_stack,
)
from samaritan.data.volume import Volume, read_image, read_label, to_native, write_label_map

PLANES: tuple[Plane, ...] = ("sagittal", "coronal", "axial")
ORIENTATIONS = [
    "".join(pair[flip] for pair, flip in zip(axes, flips, strict=True))
    for axes in itertools.permutations(("RL", "AP", "SI"))
    for flips in itertools.product((0, 1), repeat=3)
]
bounded = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@dataclass(frozen=True)
class Scan:
    """A made-up scanner setting."""

    shape: tuple[int, int, int]
    affine: np.ndarray
    plane: Plane
    pixel_mm: float | None
    seed: int


@st.composite
def scans(draw: st.DrawFn, smallest: int = 1, same_pixels: bool = False) -> Scan:
    shape = draw(st.tuples(*[st.integers(smallest, smallest + 15)] * 3))
    codes = draw(st.sampled_from(ORIENTATIONS))
    # Tilts of real gantries; beyond 45 degrees the closest axis would be another one.
    angles = draw(st.tuples(*[st.floats(-0.35, 0.35)] * 3))
    spacing = (1.0, 1.0, 1.0)
    if not same_pixels:
        spacing = draw(st.tuples(*[st.sampled_from((0.4, 0.7, 1.0, 1.3, 3.0, 7.5))] * 3))
    axes = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt(codes), nib.orientations.axcodes2ornt("RAS")
    )
    flip = np.zeros((3, 3))
    flip[axes[:, 0].astype(int), range(3)] = axes[:, 1]
    offset = draw(st.tuples(*[st.integers(-200, 200)] * 3))
    affine = nib.affines.from_matvec(euler2mat(*angles) @ flip @ np.diag(spacing), offset)
    pixel_mm = 1.0 if same_pixels else draw(st.sampled_from((None, 0.5, 1.0, 2.0)))
    return Scan(shape, affine, draw(st.sampled_from(PLANES)), pixel_mm, draw(st.integers(0, 999)))


def grid_of(scan: Scan, volume: Volume) -> SliceGrid:
    return slice_grid(volume.array.shape, volume.spacing_mm, scan.plane, scan.pixel_mm, (32, 32))


def store(folder: Path, array: np.ndarray, affine: np.ndarray) -> Path:
    path = folder / "volume.nii"
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def one_hot(stack: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(stack.long(), classes).movedim(-1, 0).float()


def round_trip(label: Volume, grid: SliceGrid, classes: int) -> np.ndarray:
    """Label -> slices at model pixels -> scores -> (X, Y, Z) label."""
    scores = one_hot(to_stack(label.array, grid, "label"), classes)
    return from_stack(scores, grid).argmax(0).numpy().astype(np.uint8)


def blobs(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """Two classes with smooth borders, as organs have."""
    noise = np.random.default_rng(seed).normal(size=shape)
    smooth = ndimage.gaussian_filter(noise, 2, mode="nearest")
    return np.digitize(smooth, np.percentile(smooth, (60, 85))).astype(np.uint8)


# The way there and back.


@bounded
@given(scan=scans(same_pixels=True))
def test_every_voxel_comes_home_when_pixels_are_voxels(
    tmp_path_factory: pytest.TempPathFactory, scan: Scan
) -> None:
    folder = tmp_path_factory.mktemp("same")
    stored = np.random.default_rng(scan.seed).integers(0, 4, scan.shape).astype(np.uint8)
    label = read_label(store(folder, stored, scan.affine), "case17", None)
    grid = grid_of(scan, label)
    assert grid.plane == grid.native_plane
    back = round_trip(label, grid, 4)
    assert np.array_equal(back, label.array)
    write_label_map(folder / "out.nii.gz", back, label.native)
    written = nib.load(folder / "out.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), stored)
    assert np.allclose(written.affine, scan.affine, atol=1e-4)


@bounded
@given(scan=scans(smallest=6))
def test_a_mask_comes_home_within_a_voxel(
    tmp_path_factory: pytest.TempPathFactory, scan: Scan
) -> None:
    stored = blobs(scan.shape, scan.seed)
    path = store(tmp_path_factory.mktemp("mask"), stored, scan.affine)
    label = read_label(path, "case17", None)
    grid = grid_of(scan, label)
    back = round_trip(label, grid, 3)
    # A voxel of the coarser of the two grids, in the plane; slices do not mix.
    reach = [1, 1, 1]
    reach[grid.axis] = 0
    for axis, pixel in ((grid.row_axis, grid.pixel_mm[0]), (grid.column_axis, grid.pixel_mm[1])):
        reach[axis] = max(1, int(np.ceil(pixel / label.spacing_mm[axis] - 1e-6)))
    box = np.ones([2 * size + 1 for size in reach], bool)
    for value in (1, 2):
        truth, found = label.array == value, back == value
        assert not np.any(found & ~ndimage.binary_dilation(truth, box))
        assert not np.any(ndimage.binary_erosion(truth, box, border_value=1) & ~found)
    native = to_native(back, label.native)
    assert native.shape == stored.shape
    if grid.plane == grid.native_plane:
        assert np.array_equal(native, stored)


@bounded
@given(scan=scans(smallest=6))
def test_pixels_know_where_they_are_in_space(
    tmp_path_factory: pytest.TempPathFactory, scan: Scan
) -> None:
    """Images that hold their own coordinates show any flip, swap or shift, however small."""
    folder = tmp_path_factory.mktemp("where")
    index = np.stack(np.meshgrid(*map(np.arange, scan.shape), indexing="ij"), axis=-1)
    world = nib.affines.apply_affine(scan.affine, index).astype(np.float32)
    for coordinate in range(3):
        path = store(folder, world[..., coordinate], scan.affine)
        volume = read_image(path, "case17")
        grid = grid_of(scan, volume)
        stack = to_stack(volume.array, grid, "image").numpy()
        position, inside = pixel_positions(grid)
        expected = nib.affines.apply_affine(volume.affine, position)[..., coordinate]
        # Antialiasing over a fraction of a voxel is not quite linear.
        tolerance = 0.12 * max(volume.spacing_mm) if shrinks(grid) else 2e-3
        assert np.abs(stack - expected)[inside].max(initial=0) < tolerance


@bounded
@given(scan=scans(smallest=6))
def test_scores_return_to_where_they_were_made(
    tmp_path_factory: pytest.TempPathFactory, scan: Scan
) -> None:
    path = store(tmp_path_factory.mktemp("back"), np.ones(scan.shape, np.float32), scan.affine)
    volume = read_image(path, "case17")
    grid = grid_of(scan, volume)
    position, _ = pixel_positions(grid)
    scores = torch.from_numpy(np.moveaxis(position, -1, 0)).float()
    found = from_stack(scores, grid).numpy()
    truth = np.stack(np.meshgrid(*map(np.arange, volume.array.shape), indexing="ij"))
    for axis, pixels in ((grid.row_axis, grid.plane[0]), (grid.column_axis, grid.plane[1])):
        step = volume.array.shape[axis] / pixels  # voxels per pixel
        edge = int(np.ceil(max(1, step)))
        keep = [slice(None)] * 3
        keep[grid.row_axis] = keep[grid.column_axis] = slice(edge, -edge)
        error = np.abs(found[axis] - truth[axis])[tuple(keep)]
        assert error.max(initial=0) < (0.12 if step < 1 else 2e-3)
    assert np.allclose(found[grid.axis], truth[grid.axis], atol=1e-4)


def pixel_positions(grid: SliceGrid) -> tuple[np.ndarray, np.ndarray]:
    """Voxel coordinates (S, h, w, 3) of pixel centres, and which lie clear of the border."""
    axes = (grid.axis, grid.row_axis, grid.column_axis)
    sizes = (grid.slices, *grid.plane)
    lines, clear = [], []
    for axis, size in zip(axes, sizes, strict=True):
        step = grid.shape[axis] / size
        line = (np.arange(size) + 0.5) * step - 0.5
        margin = max(1.0, step) if axis != grid.axis else 0
        lines.append(line)
        clear.append((line >= margin - 1) & (line <= grid.shape[axis] - margin))
    position = np.empty((*sizes, 3))
    for axis, values in zip(axes, np.meshgrid(*lines, indexing="ij"), strict=True):
        position[..., axis] = values
    inside = np.logical_and.reduce(np.meshgrid(*clear, indexing="ij"))
    return position, inside


def shrinks(grid: SliceGrid) -> bool:
    return any(n < m for n, m in zip(grid.plane, grid.native_plane, strict=True))


# Rows and columns.


@pytest.mark.parametrize(
    ("plane", "shape", "corner"),
    [("axial", (7, 6, 5), (4, 2, 3)), ("coronal", (6, 7, 5), (2, 4, 3)),
     ("sagittal", (5, 7, 6), (3, 4, 2))],
)  # fmt: skip
def test_rows_and_columns_follow_the_rule(
    plane: Plane, shape: tuple[int, int, int], corner: tuple[int, int, int]
) -> None:
    array = np.zeros((5, 6, 7), np.float32)
    array[3, 2, 4] = 1  # x, y, z
    grid = slice_grid((5, 6, 7), (1, 1, 1), plane, 1.0, (64, 64))
    stack = to_stack(array, grid, "image")
    assert stack.shape == shape
    assert stack[corner] == 1


@pytest.mark.parametrize(
    ("spacing", "axis"),
    [((0.5, 0.5, 7.5), 2), ((3.0, 0.5, 0.5), 0), ((1.0, 4.0, 1.0), 1), ((1.0, 1.0, 1.0), 2),
     ((1.1, 1.0, 1.0), 2), ((1.2, 1.0, 1.0), 0), ((3.0, 3.0, 1.0), 2)],
)  # fmt: skip
def test_auto_cuts_across_clearly_thick_slices(
    spacing: tuple[float, float, float], axis: int
) -> None:
    assert slice_grid((9, 9, 9), spacing, "auto", None, (64, 64)).axis == axis


def test_plane_sizes() -> None:
    fit = slice_grid((100, 50, 9), (1.0, 1.0, 3.0), "axial", None, (256, 256))
    assert fit.plane == (128, 256)
    assert fit.pixel_mm == pytest.approx((50 / 128, 100 / 256))
    fixed = slice_grid((100, 50, 9), (0.7, 0.7, 3.0), "axial", 0.5, (64, 64))
    assert fixed.plane == (70, 140)
    assert slice_grid((1, 500, 9), (0.1, 1.0, 3.0), "axial", None, (64, 64)).plane == (64, 1)
    for wrong in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="pixel size"):
            slice_grid((9, 9, 9), (1, 1, 1), "axial", wrong, (64, 64))


def test_stacks_are_copies_of_the_right_type() -> None:
    label = np.ones((3, 4, 5), np.int16)
    for pixel in (1.0, 0.5):
        grid = slice_grid((3, 4, 5), (1, 1, 1), "axial", pixel, (64, 64))
        assert to_stack(label, grid, "label").dtype == torch.int16
        assert to_stack(label, grid, "image").dtype == torch.float32
    image = np.ones((3, 4, 5), np.float32)
    grid = slice_grid((3, 4, 5), (1, 1, 1), "axial", 1.0, (64, 64))
    for array, mode in ((image, "image"), (label, "label")):
        to_stack(array, grid, mode).zero_()
        assert array.min() == 1


def test_other_volumes_and_stacks_are_refused() -> None:
    grid = slice_grid((3, 4, 5), (1, 1, 1), "axial", 1.0, (64, 64))
    with pytest.raises(ValueError, match="not on the grid"):
        to_stack(np.ones((4, 3, 5)), grid, "image")
    with pytest.raises(ValueError, match="is not"):
        from_stack(torch.ones(2, 5, 3, 4), grid)


def test_images_are_antialiased_when_shrunk() -> None:
    stripes = np.zeros((16, 16, 1), np.float32)
    stripes[::4] = 1
    stack = to_stack(stripes, slice_grid((16, 16, 1), (1, 1, 1), "axial", 4.0, (64, 64)), "image")
    assert stack[0, 1:-1, 1:-1].numpy() == pytest.approx(0.25, abs=0.05)


# Intensities.


@bounded
@given(gain=st.floats(1e-3, 1e5), offset=st.floats(-1e4, 1e4), seed=st.integers(0, 99))
def test_normalised_intensities_do_not_know_the_scale(
    gain: float, offset: float, seed: int
) -> None:
    image = np.random.default_rng(seed).gamma(2, 100, (9, 8, 7))
    scaled = normalise_intensity(gain * image + offset)
    assert scaled.dtype == np.float32
    assert scaled == pytest.approx(normalise_intensity(image), abs=1e-5)
    assert scaled.min() == 0
    assert scaled.max() == 1


def test_constant_and_nearly_empty_images() -> None:
    assert not normalise_intensity(np.full((4, 4, 4), -7.0)).any()
    lone = np.full((20, 20, 20), 5.0)
    lone[3, 3, 3] = 9
    assert normalise_intensity(lone)[3, 3, 3] == 1
    assert normalise_intensity(lone).sum() == 1


def test_one_hot_pixel_does_not_set_the_scale() -> None:
    image = np.random.default_rng(0).uniform(0, 100, (20, 20, 20))
    spoilt = image.copy()
    spoilt[0, 0, 0] = 1e6
    assert normalise_intensity(spoilt)[1:] == pytest.approx(
        normalise_intensity(image)[1:], abs=0.01
    )


# Real files.


@pytest.mark.data
def test_scales_of_pseudo_sites_vanish(shared_data: Path) -> None:
    folder = shared_data / "msd_hippocampus"
    raw: dict[str, list[float]] = {}
    normalised: dict[str, list[tuple[float, ...]]] = {}
    with (folder / "manifest.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            site = row["site"][0]
            if len(raw.setdefault(site, [])) < 20:
                image = read_image(folder / row["image"], row["case_id"]).array
                raw[site].append(float(np.median(image)))
                quartiles = np.percentile(normalise_intensity(image), (25, 50, 75))
                normalised.setdefault(site, []).append(tuple(quartiles))
    medians = {site: float(np.median(values)) for site, values in raw.items()}
    assert 350 < medians["D"] / np.mean([medians["A"], medians["B"]]) < 510
    means = {site: np.mean(values, axis=0) for site, values in normalised.items()}
    assert means["B"] == pytest.approx(means["A"], abs=0.03)
    assert means["D"] == pytest.approx(means["A"], abs=0.03)


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "name", "axis"),
    [("small_3d_samples", "sct_t2", 2), ("small_3d_samples", "sct_t2s_cord", 2),
     ("small_3d_samples", "totalseg_mr_sm", 2), ("gm_challenge_spinalcord", "sub-9709Ses1", 2),
     ("gm_challenge_spinalcord", "sub-9669", 2)],
)  # fmt: skip
def test_real_masks_survive_the_model_grid(
    shared_data: Path, folder: str, name: str, axis: int
) -> None:
    label = read_label(shared_data / folder / "labels" / f"{name}.nii.gz", name, None)
    grid = slice_grid(label.array.shape, label.spacing_mm, "auto", None, (512, 512))
    assert grid.axis == axis
    label = replace(label, array=np.minimum(label.array, 3))
    truth = to_native(label.array, label.native)
    back = to_native(round_trip(label, grid, 4), label.native)
    assert np.count_nonzero(truth != back) <= 0.02 * np.count_nonzero(truth)
