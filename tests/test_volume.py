"""Reading volumes and writing label maps: what is accepted, refused, and where voxels land."""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from samaritan.data.volume import (
    NativeGrid,
    forms_shift_mm,
    read_image,
    read_label,
    same_grid,
    to_native,
    write_label_map,
)
from samaritan.errors import DataError, StorageError

SAMPLES = (
    "msd_spleen2_crop", "unf01_T1w", "unf01_T2star", "sct_t1", "sct_t2", "sct_t2s_cord",
    "sct_t2s_grey", "totalseg_ct_sm", "totalseg_mr_sm",
)  # fmt: skip


def affine_of(codes: str, spacing: tuple[float, float, float] = (1, 1, 1)) -> np.ndarray:
    """Axis-aligned affine of stored axes such as ``PSR``, with spacing along the stored axes."""
    start = nib.orientations.axcodes2ornt("RAS")
    ornt = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt(codes), start)
    affine = np.eye(4)
    for stored, (canonical, flip) in enumerate(ornt):
        affine[:3, stored] = 0
        affine[int(canonical), stored] = flip * spacing[stored]
    affine[:3, 3] = (-11.5, 22.25, 3.75)
    return affine


def save(path: Path, array: Any, affine: Any = None, **header: Any) -> Path:
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def refused(code: str, reader: Any = read_image, *args: Any) -> str:
    with pytest.raises(DataError) as caught:
        reader(*args)
    assert caught.value.code == code, str(caught.value)
    assert "case17" in caught.value.message
    assert caught.value.hint
    return caught.value.message


# Reading images.


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "PSR", "SPL", "AIR"])
def test_a_landmark_is_found_at_the_same_place_in_space(tmp_path: Path, codes: str) -> None:
    array = np.zeros((5, 6, 7), np.float32)
    array[1, 2, 3] = 9
    affine = affine_of(codes, (0.5, 2, 3))
    volume = read_image(save(tmp_path / "a.nii.gz", array, affine), "case17")

    voxel = np.argwhere(volume.array == 9)[0]
    assert np.allclose(volume.affine @ [*voxel, 1], affine @ [1, 2, 3, 1])
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert np.all(np.diag(volume.affine)[:3] > 0)
    assert np.allclose(np.diag(volume.affine)[:3], volume.spacing_mm)
    assert volume.native.axis_codes == codes
    assert volume.native.shape == (5, 6, 7)
    assert volume.array.dtype == np.float32
    assert volume.array.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_stored_types_become_float32(tmp_path: Path, dtype: str) -> None:
    array = np.arange(60).reshape(3, 4, 5).astype(dtype)
    volume = read_image(save(tmp_path / "a.nii.gz", array), "case17")
    assert volume.array.dtype == np.float32
    assert np.array_equal(volume.array, array)


def test_scaling_of_the_header_is_applied(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.int16).reshape(2, 3, 4), np.eye(4))
    image.header.set_slope_inter(2, -1024)
    nib.save(image, tmp_path / "a.nii")
    volume = read_image(tmp_path / "a.nii", "case17")
    assert volume.array.ravel()[:3] == pytest.approx([-1024, -1022, -1020])


def test_uncompressed_big_endian_and_nifti2_are_read(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    big = nib.Nifti1Image(array, np.eye(4), nib.Nifti1Header(endianness=">"))
    nib.save(big, tmp_path / "big.nii")
    nib.save(nib.Nifti2Image(array, np.eye(4)), tmp_path / "two.nii.gz")
    for name in ("big.nii", "two.nii.gz"):
        assert np.array_equal(read_image(tmp_path / name, "case17").array, array)


def test_gzip_is_known_by_its_content(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.ones((2, 3, 4), np.float32))
    assert read_image(path.rename(tmp_path / "a.nii"), "case17").array.shape == (2, 3, 4)


def test_a_trailing_axis_of_one_is_dropped(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.ones((2, 3, 4, 1), np.float32))
    assert read_image(path, "case17").array.shape == (2, 3, 4)


def test_qform_alone_is_used_where_the_sform_is_missing(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((2, 3, 4), np.float32), None)
    image.set_qform(affine_of("LPS", (1, 2, 3)), 1)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_image(tmp_path / "a.nii.gz", "case17")
    assert volume.native.axis_codes == "LPS"
    assert np.allclose(volume.native.affine, affine_of("LPS", (1, 2, 3)), atol=1e-5)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    message = refused("SAM-D101", read_image, tmp_path / "no.nii.gz", "case17")
    assert "no.nii.gz" in message
    assert str(tmp_path) not in message
    refused("SAM-D101", read_image, tmp_path, "case17")


@pytest.mark.parametrize("content", [b"", b"not an image" * 99, gzip.compress(b"text" * 999)])
def test_not_nifti(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert f"{len(content)} bytes" in refused(
        "SAM-D103", read_image, tmp_path / "a.nii.gz", "case17"
    )


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.98])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii"])
def test_truncated_file(tmp_path: Path, ending: str, kept: float) -> None:
    noise = np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32)
    path = save(tmp_path / f"a{ending}", noise)
    content = path.read_bytes()
    path.write_bytes(content[: max(400, int(len(content) * kept))])
    refused("SAM-D104", read_image, path, "case17")


@pytest.mark.parametrize("place", [0.5, 1.0])
def test_one_flipped_bit_fails_the_checksum(tmp_path: Path, place: float) -> None:
    noise = np.random.default_rng(0).normal(size=(12, 12, 12)).astype(np.float32)
    path = save(tmp_path / "a.nii", noise)
    # Stored without compression, so that nothing but the checksum can notice.
    content = bytearray(gzip.compress(path.read_bytes(), compresslevel=0))
    content[int((len(content) - 5) * place)] ^= 0x10
    path.write_bytes(bytes(content))
    refused("SAM-D104", read_image, path, "case17")


def test_four_axes_two_axes_and_colour(tmp_path: Path) -> None:
    four = save(tmp_path / "4.nii.gz", np.ones((4, 4, 4, 2), np.float32))
    assert "4 x 4 x 4 x 2" in refused("SAM-D105", read_image, four, "case17")
    two = save(tmp_path / "2.nii.gz", np.ones((4, 4), np.float32))
    refused("SAM-D105", read_image, two, "case17")
    colour = np.zeros((3, 3, 3), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    refused("SAM-D108", read_image, save(tmp_path / "c.nii.gz", colour), "case17")
    wave = save(tmp_path / "w.nii.gz", np.ones((3, 3, 3), np.complex64))
    refused("SAM-D108", read_image, wave, "case17")


def test_nan_and_inf_are_counted(tmp_path: Path) -> None:
    array = np.ones((4, 4, 4), np.float64)
    array[0, 0, :3] = (np.nan, np.inf, -np.inf)
    array[1, 1, 1] = 1e300  # beyond float32
    path = save(tmp_path / "a.nii.gz", array)
    assert "4 of 64" in refused("SAM-D106", read_image, path, "case17")


@pytest.mark.parametrize("row", [(0, 0, 0, 5), (1, 0, 0, 0), (np.nan, 0, 1, 0)])
def test_affine_that_cannot_be_inverted(tmp_path: Path, row: tuple[float, ...]) -> None:
    image = nib.Nifti1Image(np.ones((3, 3, 3), np.float32), np.eye(4))
    image.header["srow_z"] = row
    (tmp_path / "a.nii").write_bytes(image.to_bytes())
    path = tmp_path / "a.nii"
    content = bytearray(path.read_bytes())
    content[312:328] = np.asarray(row, "<f4").tobytes()  # srow_z
    path.write_bytes(bytes(content))
    refused("SAM-D107", read_image, path, "case17")


def test_flipped_axes_of_length_one_still_fit_torch(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.ones((1, 4, 1), np.float32), affine_of("LAI"))
    assert torch.from_numpy(read_image(path, "case17").array).shape == (1, 4, 1)


# Reading labels.


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int64", "float32", "float64"])
def test_label_types(tmp_path: Path, dtype: str) -> None:
    array = (np.arange(60).reshape(3, 4, 5) % 3).astype(dtype)
    image = nib.Nifti1Image(array, np.eye(4), dtype=dtype)
    nib.save(image, tmp_path / "a.nii.gz")
    label = read_label(tmp_path / "a.nii.gz", "case17", None)
    assert label.array.dtype == np.uint8
    assert np.array_equal(label.array, array)


def test_large_label_values_need_int16(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.full((2, 2, 2), 300, np.int32))
    label = read_label(path, "case17", None)
    assert label.array.dtype == np.int16
    assert label.array.max() == 300


@pytest.mark.parametrize("value", [0.5, 1.01, -1.0, np.nan, np.inf, 40000.0])
def test_label_values_refused(tmp_path: Path, value: float) -> None:
    array = np.zeros((3, 3, 3), np.float32)
    array[1, 1, 1] = value
    path = save(tmp_path / "a.nii.gz", array)
    message = refused("SAM-D109", read_label, path, "case17", None)
    assert not np.isfinite(value) or f"{value:g}" in message


def test_rounding_of_scaled_labels_is_forgiven(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.full((2, 2, 2), 1.9999999, np.float64))
    assert read_label(path, "case17", None).array.max() == 2


def test_label_on_another_grid(tmp_path: Path) -> None:
    affine = affine_of("LAS", (0.5, 0.5, 3))
    image = read_image(
        save(tmp_path / "i.nii.gz", np.ones((4, 5, 6), np.float32), affine), "case17"
    )
    cut = save(tmp_path / "cut.nii.gz", np.ones((4, 5, 5), np.uint8), affine)
    message = refused("SAM-D102", read_label, cut, "case17", image.native)
    assert "4 x 5 x 6" in message
    assert "4 x 5 x 5" in message
    moved = affine.copy()
    moved[1, 3] += 0.25
    path = save(tmp_path / "moved.nii.gz", np.ones((4, 5, 6), np.uint8), moved)
    message = refused("SAM-D102", read_label, path, "case17", image.native)
    assert "0.25 mm" in message
    assert "22.25" in message
    assert "22.5" in message
    mirrored = save(tmp_path / "f.nii.gz", np.ones((4, 5, 6), np.uint8), affine_of("RAS"))
    refused("SAM-D102", read_label, mirrored, "case17", image.native)


def test_rounding_of_the_affine_is_forgiven(tmp_path: Path) -> None:
    affine = affine_of("LAS", (0.5, 0.5, 3))
    image = read_image(
        save(tmp_path / "i.nii.gz", np.ones((4, 5, 6), np.float32), affine), "case17"
    )
    close = affine + np.array([[1e-5], [1e-5], [1e-5], [0]])
    path = save(tmp_path / "l.nii.gz", np.ones((4, 5, 6), np.uint8), close)
    assert same_grid(image.native, read_label(path, "case17", image.native).native)


def test_a_small_turn_counts_by_where_it_puts_the_corners() -> None:
    turned = np.eye(4)
    turned[0, 1] = 5e-4
    assert same_grid(NativeGrid((9, 9, 9), np.eye(4)), NativeGrid((9, 9, 9), turned))
    assert not same_grid(NativeGrid((9, 512, 9), np.eye(4)), NativeGrid((9, 512, 9), turned))


# Writing.


@pytest.mark.parametrize("codes", ["RAS", "LAS", "LPS", "PSR", "SPL", "AIR"])
def test_written_labels_lie_on_the_stored_voxels(tmp_path: Path, codes: str) -> None:
    stored = np.random.default_rng(1).integers(0, 4, (5, 6, 7)).astype(np.uint8)
    affine = affine_of(codes, (0.5, 2, 3))
    label = read_label(save(tmp_path / "a.nii.gz", stored, affine), "case17", None)
    write_label_map(tmp_path / "b.nii.gz", label.array, label.native)
    written = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), stored)
    assert np.array_equal(written.affine, nib.load(tmp_path / "a.nii.gz").affine)
    assert written.get_data_dtype() == np.uint8


@pytest.mark.parametrize(("qform_code", "sform_code"), [(1, 1), (0, 2), (2, 1), (1, 0), (0, 0)])
def test_both_forms_are_kept_bit_for_bit(tmp_path: Path, qform_code: int, sform_code: int) -> None:
    turn = nib.eulerangles.euler2mat(0.1, 0.2, 0.3)
    affine = nib.affines.from_matvec(turn @ np.diag([-0.7, 0.7, 2.5]), (10, 20, 30))
    image = nib.Nifti1Image(np.ones((3, 4, 5), np.int16), affine)
    image.set_sform(affine, sform_code)
    image.set_qform(affine_of("LPS", (0.7, 0.7, 2.5)), qform_code)
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_image(tmp_path / "a.nii.gz", "case17")
    write_label_map(tmp_path / "b.nii.gz", np.ones(volume.array.shape, np.uint8), volume.native)
    before = nib.load(tmp_path / "a.nii.gz")
    after = nib.load(tmp_path / "b.nii.gz")
    assert np.array_equal(before.affine, after.affine)
    for form in ("get_qform", "get_sform"):
        (old, old_code), (new, new_code) = (
            getattr(each, form)(coded=True) for each in (before, after)
        )
        assert old_code == new_code
        assert (old is None) == (new is None)
        assert old is None or np.array_equal(old, new)
    assert (forms_shift_mm(volume.native) > 1) == (qform_code > 0 and sform_code > 0)


def test_no_text_of_the_input_is_written(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.ones((3, 4, 5), np.int16), np.eye(4))
    for name, text in (("descrip", b"Doe^Jane 1970"), ("aux_file", b"Doe"), ("db_name", b"Doe")):
        image.header[name] = text
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"Doe^Jane"))
    nib.save(image, tmp_path / "a.nii.gz")
    volume = read_image(tmp_path / "a.nii.gz", "case17")
    write_label_map(tmp_path / "b.nii.gz", np.ones((3, 4, 5), np.uint8), volume.native)
    content = (tmp_path / "b.nii.gz").read_bytes()
    assert b"Doe" not in gzip.decompress(content)
    assert b"b.nii" not in content


def test_a_grid_without_file_is_written_too(tmp_path: Path) -> None:
    grid = NativeGrid((3, 4, 5), affine_of("LPS", (1, 2, 3)))
    write_label_map(tmp_path / "b.nii", np.full((3, 4, 5), 300), grid)
    written = nib.load(tmp_path / "b.nii")
    assert np.allclose(written.affine, grid.affine)
    assert written.get_data_dtype() == np.uint16


def test_arrays_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    grid = NativeGrid((3, 4, 5), affine_of("PSR"))
    with pytest.raises(DataError, match="SAM-D110"):
        to_native(np.zeros((3, 4, 5)), grid)
    assert to_native(np.zeros((5, 3, 4)), grid).shape == (3, 4, 5)
    for wrong in (np.full((5, 3, 4), -1), np.full((5, 3, 4), 70000), np.zeros((5, 3, 4))):
        with pytest.raises(DataError, match="SAM-D110"):
            write_label_map(tmp_path / "b.nii.gz", wrong, grid)
    with pytest.raises(DataError, match="SAM-D110"):
        write_label_map(tmp_path / "b.png", np.zeros((5, 3, 4), np.uint8), grid)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = NativeGrid((3, 4, 5), np.eye(4))
    path = tmp_path / "b.nii.gz"
    write_label_map(path, np.zeros((3, 4, 5), np.uint8), grid)
    before = path.read_bytes()

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="No space left"):
        write_label_map(path, np.ones((3, 4, 5), np.uint8), grid)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="SAM-S101"):
        write_label_map(tmp_path / "file" / "b.nii.gz", np.ones((3, 4, 5), np.uint8), grid)


# Real files.


@pytest.mark.data
@pytest.mark.parametrize("name", SAMPLES)
def test_odd_real_files_round_trip_exactly(shared_data: Path, tmp_path: Path, name: str) -> None:
    folder = shared_data / "small_3d_samples"
    image = read_image(folder / "images" / f"{name}.nii.gz", name)
    label = read_label(folder / "labels" / f"{name}.nii.gz", name, image.native)
    write_label_map(tmp_path / "out.nii.gz", label.array, image.native)

    written = nib.load(tmp_path / "out.nii.gz")
    source = nib.load(folder / "images" / f"{name}.nii.gz")
    truth = nib.load(folder / "labels" / f"{name}.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), np.asanyarray(truth.dataobj))
    assert np.array_equal(written.affine, source.affine)
    assert np.array_equal(to_native(image.array, image.native), source.get_fdata(dtype=np.float32))
    for field in ("qform_code", "sform_code"):
        assert written.header[field] == source.header[field]
