"""From a canonical volume to a stack of 2-D slices and back; intensities in [0, 1].

Legend: S slices, h rows, w columns, C classes. Volumes are (X, Y, Z), stacks (S, h, w). Rows run
along the higher of the two remaining volume axes and columns along the lower one:

========  ==========  =======  ==========
plane     slice axis  row (h)  column (w)
========  ==========  =======  ==========
sagittal  x           z        y
coronal   y           z        x
axial     z           y        x
========  ==========  =======  ==========
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from samaritan.data.volume import FloatArray, Shape

Plane = Literal["auto", "sagittal", "coronal", "axial"]
Mode = Literal["image", "label"]

CLIP_PERCENTILES = (0.5, 99.5)
THICK_SLICE_RATIO = 1.2
"""Spacing must exceed the others by this factor to count as the slice direction."""

_PLANE_AXES = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass(frozen=True)
class SliceGrid:
    """How one canonical volume becomes a stack of 2-D slices, and back."""

    axis: int
    """Volume axis that counts the slices: 0 sagittal, 1 coronal, 2 axial."""

    shape: Shape
    """Voxels of the volume along x, y, z."""

    spacing_mm: tuple[float, float, float]
    """Voxel size of the volume along x, y, z."""

    plane: tuple[int, int]
    """(rows, columns) of one slice in model pixels."""

    @property
    def row_axis(self) -> int:
        """Volume axis that the rows run along."""
        return max(axis for axis in range(3) if axis != self.axis)

    @property
    def column_axis(self) -> int:
        """Volume axis that the columns run along."""
        return min(axis for axis in range(3) if axis != self.axis)

    @property
    def slices(self) -> int:
        """Number of slices."""
        return self.shape[self.axis]

    @property
    def native_plane(self) -> tuple[int, int]:
        """(rows, columns) of one slice in voxels."""
        return self.shape[self.row_axis], self.shape[self.column_axis]

    @property
    def extent_mm(self) -> tuple[float, float]:
        """(row, column) extent of one slice, from edge to edge."""
        rows, columns = self.native_plane
        return rows * self.spacing_mm[self.row_axis], columns * self.spacing_mm[self.column_axis]

    @property
    def pixel_mm(self) -> tuple[float, float]:
        """(row, column) size of a model pixel; whole pixels cover the whole extent."""
        rows_mm, columns_mm = self.extent_mm
        return rows_mm / self.plane[0], columns_mm / self.plane[1]


def slice_grid(
    shape: Shape,
    spacing_mm: tuple[float, float, float],
    axis: Plane,
    pixel_mm: float | None,
    image_size: tuple[int, int],
) -> SliceGrid:
    """Choose the slice direction and the size of the slices.

    Args:
        shape: Voxels along x, y, z.
        spacing_mm: Voxel size along x, y, z.
        axis: The plane to cut; ``auto`` cuts across the axis with clearly the thickest voxels,
            else axial.
        pixel_mm: Pixel size to resample to; planes may then be larger than ``image_size``. None
            fits the whole plane into ``image_size``, as SAM does.
        image_size: (rows, columns) of the model's input in pixels.

    Returns:
        The grid.
    """
    if min(shape) < 1 or not min(spacing_mm) > 0 or min(image_size) < 1:
        raise ValueError(f"shape {shape}, spacing {spacing_mm} mm, image size {image_size} px")
    if pixel_mm is not None and not pixel_mm > 0:
        raise ValueError(f"pixel size {pixel_mm} mm is not positive")
    native = SliceGrid(_slice_axis(spacing_mm, axis), shape, spacing_mm, plane=(1, 1))
    rows_mm, columns_mm = native.extent_mm
    pixel = pixel_mm or max(rows_mm / image_size[0], columns_mm / image_size[1])
    return replace(
        native, plane=(max(1, round(rows_mm / pixel)), max(1, round(columns_mm / pixel)))
    )


def to_stack(array: NDArray[Any], grid: SliceGrid, mode: Mode) -> torch.Tensor:
    """Cut a volume into slices at the model's pixel size.

    Args:
        array: (X, Y, Z) canonical.
        grid: The grid made for this volume.
        mode: ``image`` interpolates, antialiased when shrinking; ``label`` takes the nearest voxel.

    Returns:
        (S, h, w); float32 for images, the type of ``array`` for labels. Always a copy.
    """
    if array.shape != grid.shape:
        raise ValueError(f"array {array.shape} is not on the grid {grid.shape}")
    order = (grid.axis, grid.row_axis, grid.column_axis)
    stack = torch.from_numpy(np.array(array.transpose(order), order="C"))
    if mode == "label":
        return _resize(stack.float(), grid.plane, "nearest-exact").to(stack.dtype)
    return _resize(stack.float(), grid.plane, "bilinear")


def from_stack(stack: torch.Tensor, grid: SliceGrid) -> torch.Tensor:
    """Bring scores of slices back to the voxels of the volume.

    Args:
        stack: (C, S, h, w) probabilities or logits.
        grid: The grid that cut the volume.

    Returns:
        (C, X, Y, Z), type of ``stack``.
    """
    expected = (grid.slices, *grid.plane)
    if stack.ndim != 4 or tuple(stack.shape[1:]) != expected:
        raise ValueError(f"stack {tuple(stack.shape)} is not (C, S, h, w) with {expected}")
    planes = _resize(stack, grid.native_plane, "bilinear")
    order = (grid.axis, grid.row_axis, grid.column_axis)
    back = [order.index(axis) + 1 for axis in range(3)]
    return planes.permute(0, *back).contiguous()


def normalise_intensity(array: NDArray[Any]) -> FloatArray:
    """Scale an image to [0, 1] by its own percentiles.

    The result does not change when all values are multiplied by a positive number or shifted,
    so sites whose scanners use other scales look alike and no statistic has to be shared.

    Args:
        array: (X, Y, Z), any unit, finite.

    Returns:
        (X, Y, Z) float32; zeros when the image is constant.
    """
    values = array.astype(np.float64)
    low, high = np.percentile(values, CLIP_PERCENTILES)
    if not high > low:
        # A few bright voxels in an empty field: nearly all voxels are equal, the image is not.
        low, high = values.min(), values.max()
    if not high > low:
        return np.zeros(array.shape, dtype=np.float32)
    np.clip(values, low, high, out=values)
    values -= low
    values /= high - low
    return values.astype(np.float32)


def _slice_axis(spacing_mm: tuple[float, float, float], plane: Plane) -> int:
    if plane != "auto":
        return _PLANE_AXES[plane]
    thickest = max(range(3), key=lambda axis: spacing_mm[axis])
    others = max(spacing_mm[axis] for axis in range(3) if axis != thickest)
    clear = spacing_mm[thickest] >= THICK_SLICE_RATIO * others
    return thickest if clear else _PLANE_AXES["axial"]


def _resize(planes: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    """Resize the last two axes; pixel edges stay aligned (half-pixel centres)."""
    if tuple(planes.shape[-2:]) == size:
        return planes
    batch = planes if planes.ndim == 4 else planes[None]
    if mode == "nearest-exact":
        resized = functional.interpolate(batch, size=size, mode=mode)
    else:
        resized = functional.interpolate(
            batch, size=size, mode=mode, align_corners=False, antialias=True
        )
    return resized if planes.ndim == 4 else resized[0]
