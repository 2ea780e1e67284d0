"""Volumes in one orientation, with the way back to the file they came from.

Arrays are (X, Y, Z) in the closest canonical frame: x grows to the right, y to the front, z to the
head (RAS). A ``NativeGrid`` keeps the stored axes and the affine, so that a prediction lands
on the voxels of its image. Axes are flipped and permuted only, never resampled.
"""

from __future__ import annotations

import gzip
import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from samaritan.errors import DataError
from samaritan.files import write_atomically

GRID_TOLERANCE_MM = 0.01
"""Two grids are the same when no corner voxel moves further than this."""

LABEL_TOLERANCE = 1e-4
"""Room for the rounding of scaled labels; a soft mask is far above it."""

_MIN_AXES_VOLUME = 1e-3
_GZIP_MAGIC = b"\x1f\x8b"
_LONGEST_HEADER_BYTES = 540
_CANONICAL = np.array([[0, 1], [1, 1], [2, 1]])

# Geometry only: descriptions, names and extensions may hold patient text and are never copied.
_GEOMETRY_FIELDS = (
    "pixdim", "xyzt_units", "qform_code", "sform_code",
    "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z",
)  # fmt: skip

Shape = tuple[int, int, int]
Array = NDArray[Any]
FloatArray = NDArray[np.float32]
Affine = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NativeGrid:
    """The voxel grid as stored in a file.

    Compare two grids with ``same_grid``; ``==`` is identity.
    """

    shape: Shape
    """Voxels along the stored axes."""

    affine: Affine
    """(4, 4), from stored voxel indices to millimetres in RAS."""

    header: Mapping[str, Array] = field(default_factory=dict, repr=False)
    """Geometry fields of the NIfTI header, kept to write them back bit for bit."""

    @property
    def orientation(self) -> Array:
        """(3, 2) nibabel orientation: canonical axis and direction of each stored axis."""
        return cast(Array, nib.io_orientation(self.affine))

    @property
    def axis_codes(self) -> str:
        """Stored axes in words of the patient, such as ``LAS`` or ``PSR``."""
        return "".join(nib.aff2axcodes(self.affine))


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or a label map in the closest canonical orientation."""

    array: Array
    """(X, Y, Z), x to the right, y to the front, z to the head; contiguous."""

    affine: Affine
    """(4, 4), from canonical voxel indices to millimetres in RAS."""

    spacing_mm: tuple[float, float, float]
    """Voxel size along x, y and z."""

    native: NativeGrid
    """Where the voxels came from."""


def read_image(path: Path, case_id: str) -> Volume:
    """Read a NIfTI image.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file with three axes (a trailing axis of length 1 is
            dropped).
        case_id: Names the case in messages.

    Returns:
        The volume, ``array`` (X, Y, Z) float32 in the stored unit, all values finite.

    Raises:
        DataError: The file is missing, damaged, not a 3-D scalar NIfTI image, or has NaN or Inf.
    """
    data, grid = _read(Path(path), f"case {case_id}: image")
    with np.errstate(over="ignore"):
        array = data.astype(np.float32)
    bad = int(array.size - np.count_nonzero(np.isfinite(array)))
    if bad:
        raise DataError(
            "SAM-D106",
            f"case {case_id}: image has {bad} of {array.size} voxels that are NaN or Inf",
            "Export the image again, or replace these voxels by the background value.",
        )
    return _canonical(array, grid)


def read_label(path: Path, case_id: str, image: NativeGrid | None) -> Volume:
    """Read a NIfTI label map and check it against its image.

    Args:
        path: A ``.nii`` or ``.nii.gz`` file; any stored type whose values are whole numbers.
        case_id: Names the case in messages.
        image: Grid of the image, or None to skip the comparison.

    Returns:
        The volume, ``array`` (X, Y, Z) uint8, or int16 where a value exceeds 255.

    Raises:
        DataError: As for ``read_image``; also a different grid (SAM-D102) or values that are not
            whole numbers from 0 to 32767 (SAM-D109).
    """
    data, grid = _read(Path(path), f"case {case_id}: label")
    if image is not None and not same_grid(image, grid):
        raise _grid_mismatch(case_id, image, grid)
    return _canonical(_whole_numbers(data, case_id), grid)


def same_grid(first: NativeGrid, second: NativeGrid) -> bool:
    """Whether two grids have the same shape and the same position in space."""
    return first.shape == second.shape and _largest_shift_mm(first, second) <= GRID_TOLERANCE_MM


def to_native(array_ras: Array, grid: NativeGrid) -> Array:
    """Put a canonical array back on the stored axes.

    Args:
        array_ras: (X, Y, Z) in the canonical frame of ``grid``.
        grid: The grid of the file.

    Returns:
        The same voxels with shape ``grid.shape``, contiguous.
    """
    back = nib.orientations.ornt_transform(_CANONICAL, grid.orientation)
    native = np.array(nib.apply_orientation(array_ras, back), order="C")
    if native.shape != grid.shape:
        raise DataError(
            "SAM-D110",
            f"array {_by(array_ras.shape)} does not fit the stored grid {_by(grid.shape)} "
            f"(axes {grid.axis_codes})",
            "Pass the array in canonical RAS orientation, at the resolution of the image.",
        )
    return native


def write_label_map(path: Path, array_ras: Array, grid: NativeGrid) -> None:
    """Write a label map on the grid of its image, in one step or not at all.

    The header is new: only geometry is taken from the input, no text.

    Args:
        path: Target, ``.nii.gz`` or ``.nii``; its folder must exist.
        array_ras: (X, Y, Z) whole numbers from 0 to 65535 in the canonical frame of ``grid``.
        grid: The grid of the image.
    """
    path = Path(path)
    if not path.name.endswith((".nii", ".nii.gz")):
        raise DataError("SAM-D110", f"cannot write {path.name!r}", "Name it .nii.gz or .nii.")
    native = _smallest_unsigned(to_native(array_ras, grid))
    payload = _nifti_image(native, grid).to_bytes()
    if path.name.endswith(".gz"):
        payload = gzip.compress(payload, compresslevel=6, mtime=0)
    write_atomically(path, payload)


def forms_shift_mm(grid: NativeGrid) -> float:
    """How far the qform and the sform of a file put the same voxel apart, in mm.

    Returns:
        The largest distance over the corner voxels; 0 where the file has only one of the two.
    """
    if not grid.header:
        return 0.0
    header = _nifti_header(grid)
    qform, sform = header.get_qform(coded=True)[0], header.get_sform(coded=True)[0]
    if qform is None or sform is None:
        return 0.0
    return _largest_shift_mm(NativeGrid(grid.shape, qform), NativeGrid(grid.shape, sform))


def axes_volume(affine: Affine) -> float:
    """Volume spanned by the three unit axes of an affine: 1 when perpendicular, 0 when flat."""
    spacing = voxel_sizes(affine)
    if not np.all(np.isfinite(affine)) or not np.all(spacing > 0):
        return 0.0
    return float(abs(np.linalg.det(affine[:3, :3] / spacing)))


def _read(path: Path, what: str) -> tuple[Array, NativeGrid]:
    """Data (X, Y, Z) on the stored axes, scaled as the header says, and its grid."""
    header, affine, data = _decode_or_explain(path, what)
    if data.dtype.kind not in "biuf":
        raise DataError(
            "SAM-D108",
            f"{what} has the data type {data.dtype}; only real numbers are supported",
            "Convert colour or complex images to one scalar channel.",
        )
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3 or 0 in data.shape:
        raise DataError(
            "SAM-D105",
            f"{what} has {data.ndim} axes ({_by(data.shape)}); three are needed",
            "Split channels or time points into one file each.",
        )
    if axes_volume(affine) < _MIN_AXES_VOLUME:
        raise DataError(
            "SAM-D107",
            f"{what} has an affine that cannot be inverted: {_rows(affine)}",
            "Export it again; both qform and sform must describe real axes.",
        )
    fields = {name: np.array(header[name]) for name in _GEOMETRY_FIELDS}
    return data, NativeGrid(cast(Shape, data.shape), affine, fields)


def _decode_or_explain(path: Path, what: str) -> tuple[Any, Affine, Array]:
    """Translate everything that can go wrong inside a file, once."""
    try:
        return _decode(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise DataError(
            "SAM-D101",
            f"{what} {path.name!r} cannot be opened: {error.strerror or 'no such file'}",
            "Check the path in the manifest and the file's permissions.",
        ) from error
    except (ImageFileError, HeaderDataError) as error:
        size = path.stat().st_size
        raise DataError(
            "SAM-D103",
            f"{what} {path.name!r} is not a NIfTI file ({size} bytes)",
            "Supply .nii or .nii.gz; convert other formats first.",
        ) from error
    except (OSError, EOFError, zlib.error, ValueError, TypeError, ArithmeticError,
            MemoryError) as error:  # fmt: skip
        raise DataError(
            "SAM-D104",
            f"{what} {path.name!r} is truncated or damaged ({path.stat().st_size} bytes)",
            "Copy or download it again and compare checksums.",
        ) from error


def _decode(path: Path) -> tuple[Any, Affine, Array]:
    with path.open("rb") as file:
        compressed = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        file.seek(0)
        stream = cast(IO[bytes], gzip.GzipFile(fileobj=file)) if compressed else file
        image = _image_class(stream).from_stream(stream)
        data = np.asanyarray(image.dataobj)
        # nibabel stops after the last voxel, but the checksum of a .gz stands behind it.
        while stream.read(1 << 20):
            pass
    return image.header, np.asarray(image.affine, dtype=np.float64), data


def _image_class(stream: IO[bytes]) -> Any:
    head = stream.read(_LONGEST_HEADER_BYTES)
    stream.seek(0)
    for image_class in (nib.Nifti1Image, nib.Nifti2Image):
        if image_class.header_class.may_contain_header(head):
            return image_class
    raise ImageFileError("no NIfTI header")


def _canonical(data: Array, grid: NativeGrid) -> Volume:
    # A copy, not ascontiguousarray: that leaves the negative stride of a flipped axis of length 1,
    # which torch refuses.
    array = np.array(nib.apply_orientation(data, grid.orientation), order="C")
    affine = grid.affine @ nib.orientations.inv_ornt_aff(grid.orientation, grid.shape)
    x, y, z = (float(size) for size in voxel_sizes(affine))
    return Volume(array, affine, (x, y, z), grid)


def _whole_numbers(data: Array, case_id: str) -> Array:
    """Data as uint8 or int16, or an error that shows the values at fault."""
    if data.dtype.kind == "b":
        return data.astype(np.uint8)
    if data.dtype.kind == "f":
        if not np.all(np.isfinite(data)):
            raise _bad_label(case_id, "NaN or Inf")
        rounded = np.rint(data)
        off = np.abs(data - rounded) > LABEL_TOLERANCE
        if np.any(off):
            raise _bad_label(case_id, f"fractions such as {_few(data[off])}")
        data = rounded
    if data.min() < 0:
        raise _bad_label(case_id, f"negative values such as {_few(data[data < 0])}")
    if data.max() > np.iinfo(np.int16).max:
        raise _bad_label(case_id, f"values up to {data.max():g}, above 32767")
    return data.astype(np.uint8 if data.max() <= np.iinfo(np.uint8).max else np.int16)


def _bad_label(case_id: str, found: str) -> DataError:
    return DataError(
        "SAM-D109",
        f"case {case_id}: label has {found}; only whole numbers from 0 to 32767 are classes",
        "Resample labels with nearest neighbour, threshold soft masks, and check that the image "
        "was not given as the label.",
    )


def _grid_mismatch(case_id: str, image: NativeGrid, label: NativeGrid) -> DataError:
    found = f"image {_by(image.shape)} {image.axis_codes}, label {_by(label.shape)} "
    found += label.axis_codes
    if image.shape == label.shape:
        found += f"; corners up to {_largest_shift_mm(image, label):.3g} mm apart"
    return DataError(
        "SAM-D102",
        f"case {case_id}: label does not lie on the grid of its image: {found}; "
        f"image affine {_rows(image.affine)}, label affine {_rows(label.affine)}",
        "Export the label again on the image grid, then run `samaritan data check`.",
    )


def _largest_shift_mm(first: NativeGrid, second: NativeGrid) -> float:
    """Distance between the same voxel of two grids; an affine is furthest off at a corner."""
    corners = np.array(list(itertools.product(*((0, size - 1) for size in first.shape))))
    shift = apply_affine(first.affine, corners) - apply_affine(second.affine, corners)
    return float(np.linalg.norm(shift, axis=1).max())


def _smallest_unsigned(array: Array) -> Array:
    if array.dtype.kind not in "biu" or array.min() < 0 or array.max() > np.iinfo(np.uint16).max:
        raise DataError(
            "SAM-D110",
            f"cannot write {array.dtype} values from {array.min()} to {array.max()} as labels",
            "Label maps hold whole numbers from 0 to 65535.",
        )
    return array.astype(np.uint8 if array.max() <= np.iinfo(np.uint8).max else np.uint16)


def _nifti_image(native: Array, grid: NativeGrid) -> Any:
    if not grid.header:
        return nib.Nifti1Image(native, grid.affine)
    header = _nifti_header(grid)
    header.set_data_dtype(native.dtype)
    return nib.Nifti1Image(native, grid.affine, header)


def _nifti_header(grid: NativeGrid) -> Any:
    header = nib.Nifti1Header()
    header.set_data_shape(grid.shape)
    for name, value in grid.header.items():
        header[name] = value
    # Step sizes of the axes that were dropped.
    header["pixdim"][4:] = 1
    return header


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def _rows(affine: Affine) -> str:
    return str(np.round(affine[:3], 4).tolist())


def _few(values: Array) -> str:
    return ", ".join(f"{value:g}" for value in np.unique(values)[:3])
