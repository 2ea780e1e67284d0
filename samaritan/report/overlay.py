"""A case in three planes: its image, its label and its prediction.

Legend: X to the patient's right, Y to the front, Z to the head (RAS), in voxels.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from samaritan.errors import StorageError
from samaritan.files import write_atomically
from samaritan.report import units

Volume = NDArray[Any]

COLOURS = ("#56b4e9", "#e69f00", "#2fd1a2", "#f0a0cf", "#f0e442", "#ff8a4c", "#8fb3ff", "#d0d0d0")
MAX_LEGEND_CLASSES = 10
MIN_MARGIN_MM = 8.0
RELATIVE_MARGIN = 0.5
GREY_ROOM = 0.25

_PAPER, _INK, _QUIET = "#0d0f11", "#f2f2ee", "#a9adb2"
_WIDTH_IN, _ABOVE_IN = 9.6, 0.55
_DASHES = (0.0, (3.2, 2.2))
_SCALE_STEPS_MM = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Plane:
    """One of the three orthogonal planes, in the radiological convention.

    Attributes:
        name: For people.
        across: Array axis that runs from right to left of the picture.
        upward: Array axis that runs from bottom to top of the picture.
        through: Array axis that the plane cuts.
        letters: Directions at the left, right, top and bottom edge.
    """

    name: str
    across: int
    upward: int
    through: int
    letters: tuple[str, str, str, str]


PLANES = (
    Plane("Axial", across=0, upward=1, through=2, letters=("R", "L", "A", "P")),
    Plane("Coronal", across=0, upward=2, through=1, letters=("R", "L", "S", "I")),
    Plane("Sagittal", across=1, upward=2, through=0, letters=("A", "P", "S", "I")),
)


def draw_overlay(
    path: Path,
    image: Volume,
    label: Volume,
    prediction: Volume,
    spacing_mm: Sequence[float],
    classes: Mapping[str, int],
    title: str,
) -> Path:
    """Draw three planes through the label's centre of mass and save them as a PNG.

    Label contours are solid and prediction contours dashed, one colour per class. Pictures follow
    the radiological convention (the patient's right is on the left) and carry letters and a scale
    bar. Without any label the planes go through the prediction, and without either through the
    middle of the volume.

    Args:
        path: Where the PNG goes; its folder is made if need be.
        image: (X, Y, Z) intensities, RAS.
        label: (X, Y, Z) integers, the true classes.
        prediction: (X, Y, Z) integers, the predicted classes.
        spacing_mm: Size of a voxel along X, Y and Z.
        classes: Value of each class in label and prediction; background may be left out.
        title: Printed above the planes.

    Returns:
        The path written.

    Raises:
        StorageError: If the shapes differ or the file cannot be written.
    """
    _check(image, label, prediction, spacing_mm)
    foreground = {name: value for name, value in classes.items() if value != 0}
    centre = _centre(label, prediction, list(foreground.values()))
    window = _window(label, prediction, spacing_mm)
    grey = _grey_range(image, label, prediction)
    entries = _legend_entries(foreground, label, prediction)
    figure = _figure(window, spacing_mm, legend_rows=-(-len(entries) // _legend_columns(entries)))
    for axes, plane in zip(figure.axes, PLANES, strict=True):
        _draw_plane(axes, plane, image, grey, centre, window, spacing_mm)
        for colour, value in zip(_cycle(len(foreground)), foreground.values(), strict=True):
            _contour(axes, plane, label == value, centre, spacing_mm, colour, "solid")
            _contour(axes, plane, prediction == value, centre, spacing_mm, colour, "dashed")
        _letters(axes, plane)
    _scale_bar(figure.axes[0])
    _legend(figure, entries)
    figure.suptitle(units.shorten(" ".join(title.split()), 90), color=_INK, fontsize=10.5, x=0.012,
                    ha="left", parse_math=False)  # fmt: skip
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A script that Matplotlib's own font lacks shows as boxes; the page's caption has it right.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=140, facecolor=_PAPER)
    write_atomically(path, buffer.getvalue())
    return path


def _check(image: Volume, label: Volume, prediction: Volume, spacing_mm: Sequence[float]) -> None:
    shapes = {image.shape, label.shape, prediction.shape}
    if len(shapes) != 1 or image.ndim != 3 or len(spacing_mm) != 3:
        raise StorageError(
            "SAM-S304",
            f"an overlay needs one (X, Y, Z) grid; image {image.shape}, label {label.shape}, "
            f"prediction {prediction.shape}, spacing of {len(spacing_mm)} axes",
            "Bring all three to the native grid of the label first.",
        )


def _cycle(number: int) -> list[str]:
    return [COLOURS[position % len(COLOURS)] for position in range(number)]


def _centre(label: Volume, prediction: Volume, values: Sequence[int]) -> tuple[int, int, int]:
    """The label's centre of mass, moved per axis to the nearest slice that holds label."""
    for volume in (label, prediction):
        voxels = np.argwhere(np.isin(volume, list(values)))
        if len(voxels):
            x, y, z = (_nearest(column, column.mean()) for column in voxels.T)
            return x, y, z
    x, y, z = (size // 2 for size in label.shape)
    return x, y, z


def _nearest(indices: Volume, target: float) -> int:
    occupied = np.unique(indices)
    return int(occupied[np.abs(occupied - target).argmin()])


def _window(
    label: Volume, prediction: Volume, spacing_mm: Sequence[float]
) -> list[tuple[int, int]]:
    """Per axis the first and last voxel to show: both structures with their surroundings."""
    voxels = np.argwhere((label != 0) | (prediction != 0))
    if not len(voxels):
        return [(0, size - 1) for size in label.shape]
    window = []
    for axis, size in enumerate(label.shape):
        low, high = int(voxels[:, axis].min()), int(voxels[:, axis].max())
        extent_mm = (high - low + 1) * spacing_mm[axis]
        margin_mm = max(MIN_MARGIN_MM, RELATIVE_MARGIN * extent_mm)
        margin = round(margin_mm / spacing_mm[axis])
        window.append((max(0, low - margin), min(size - 1, high + margin)))
    return window


def _grey_range(image: Volume, label: Volume, prediction: Volume) -> tuple[float, float]:
    """Intensities from black to white, chosen in the box around the structures with some room.

    Air around a patient would otherwise take most of the range of a CT.
    """
    voxels = np.argwhere((label != 0) | (prediction != 0))
    box = image
    if len(voxels):
        low, high = voxels.min(axis=0), voxels.max(axis=0) + 1
        box = image[low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    finite = box[np.isfinite(box)].astype(np.float64)
    if not finite.size:
        return 0.0, 1.0
    dark, bright = (float(value) for value in np.percentile(finite, (1, 99)))
    room = GREY_ROOM * (bright - dark) if len(voxels) else 0.0
    return dark - room, max(bright + room, dark + 1e-6)


def _extent_mm(window: Sequence[tuple[int, int]], spacing_mm: Sequence[float], axis: int) -> float:
    low, high = window[axis]
    return (high - low + 1) * spacing_mm[axis]


def _figure(
    window: Sequence[tuple[int, int]], spacing_mm: Sequence[float], legend_rows: int
) -> Any:
    """Three panels side by side, each as wide as its plane in millimetres."""
    widths = [_extent_mm(window, spacing_mm, plane.across) for plane in PLANES]
    heights = [_extent_mm(window, spacing_mm, plane.upward) for plane in PLANES]
    below_in = 0.18 + 0.22 * legend_rows
    planes_in = min(max(0.88 * _WIDTH_IN * max(heights) / sum(widths), 1.6), 6.0)
    height_in = planes_in + below_in + _ABOVE_IN
    figure = Figure(figsize=(_WIDTH_IN, height_in), facecolor=_PAPER)
    FigureCanvasAgg(figure)
    figure.subplots(
        1, 3, width_ratios=widths,
        gridspec_kw={
            "left": 0.03, "right": 0.97, "wspace": 0.12,
            "top": 1 - _ABOVE_IN / height_in, "bottom": below_in / height_in,
        },
    )  # fmt: skip
    return figure


def _slice(volume: Volume, plane: Plane, centre: tuple[int, int, int]) -> Volume:
    """The plane as (row, column) = (upward, across), both in the order of the array."""
    flat: Volume = np.take(volume, centre[plane.through], axis=plane.through)
    return flat.T


def _draw_plane(
    axes: Any,
    plane: Plane,
    image: Volume,
    grey: tuple[float, float],
    centre: tuple[int, int, int],
    window: Sequence[tuple[int, int]],
    spacing_mm: Sequence[float],
) -> None:
    flat = _slice(image, plane, centre).astype(np.float64)
    (left, right), (low, high) = window[plane.across], window[plane.upward]
    shown = flat[low : high + 1, left : right + 1]
    dx, dy = spacing_mm[plane.across], spacing_mm[plane.upward]
    axes.imshow(
        shown, cmap="gray", vmin=grey[0], vmax=grey[1], origin="lower",
        interpolation="nearest", aspect="equal",
        extent=((left - 0.5) * dx, (right + 0.5) * dx, (low - 0.5) * dy, (high + 0.5) * dy),
    )  # fmt: skip
    axes.set_xlim((right + 0.5) * dx, (left - 0.5) * dx)
    axes.set_ylim((low - 0.5) * dy, (high + 0.5) * dy)
    axes.set_axis_off()


def _contour(
    axes: Any,
    plane: Plane,
    mask: Volume,
    centre: tuple[int, int, int],
    spacing_mm: Sequence[float],
    colour: str,
    style: str,
) -> None:
    flat = np.pad(_slice(mask, plane, centre), 1).astype(np.float64)
    if not flat.any():
        return
    xs = (np.arange(flat.shape[1]) - 1) * spacing_mm[plane.across]
    ys = (np.arange(flat.shape[0]) - 1) * spacing_mm[plane.upward]
    dashed = style == "dashed"
    drawn = axes.contour(
        xs, ys, flat, levels=[0.5], colors=[_lighter(colour) if dashed else colour],
        linewidths=1.1 if dashed else 1.7,
        linestyles=[_DASHES if dashed else "solid"],
    )  # fmt: skip
    outline = patheffects.withStroke(linewidth=2.1 if dashed else 2.7, foreground="#00000088")
    drawn.set_path_effects([outline])


def _lighter(colour: str) -> tuple[float, ...]:
    """The colour mixed with white, so that a dash shows on a solid line of the same class."""
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return tuple(0.45 * channel + 0.55 for channel in channels)


def _letters(axes: Any, plane: Plane) -> None:
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"),
              (0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))  # fmt: skip
    outline = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    for letter, (x, y, across, upward) in zip(plane.letters, places, strict=True):
        axes.text(
            x, y, letter, transform=axes.transAxes, ha=across, va=upward, color=_INK,
            fontsize=10, fontweight="bold", path_effects=outline,
        )  # fmt: skip
    axes.set_title(plane.name, color=_QUIET, fontsize=8.5, loc="left", pad=3)


def _scale_bar(axes: Any) -> None:
    """A bar of a round length, at most a third of the axial picture wide."""
    (right, left), (low, high) = axes.get_xlim(), axes.get_ylim()
    width_mm = right - left
    fitting = [step for step in _SCALE_STEPS_MM if step <= width_mm / 3]
    if not fitting:
        return
    start, height = left + 0.04 * width_mm + fitting[-1], low + 0.06 * (high - low)
    outline = [patheffects.withStroke(linewidth=3.5, foreground="black")]
    axes.plot([start, start - fitting[-1]], [height] * 2, color=_INK, linewidth=1.8,
              path_effects=outline, solid_capstyle="butt")  # fmt: skip
    axes.annotate(
        f"{fitting[-1]} mm", (start - fitting[-1] / 2, height), xytext=(0, 3), ha="center",
        textcoords="offset points", color=_INK, fontsize=8,
        path_effects=[patheffects.withStroke(linewidth=2.2, foreground="black")],
    )  # fmt: skip


def _legend_entries(
    classes: Mapping[str, int], label: Volume, prediction: Volume
) -> list[tuple[str, Line2D]]:
    """The two line styles, then every class that this case holds or was given."""
    present = set(np.unique(label).tolist()) | set(np.unique(prediction).tolist())
    shown = [
        (units.shorten(" ".join(name.split()), 28), Line2D([], [], color=colour, linewidth=3))
        for (name, value), colour in zip(classes.items(), _cycle(len(classes)), strict=True)
        if value in present
    ]
    if len(shown) > MAX_LEGEND_CLASSES:
        more = f"+ {len(shown) - MAX_LEGEND_CLASSES} more"
        shown[MAX_LEGEND_CLASSES:] = [(more, Line2D([], [], linewidth=0))]
    return [
        ("label", Line2D([], [], color=_INK, linewidth=1.7)),
        ("prediction", Line2D([], [], color=_INK, linewidth=1.1, linestyle=_DASHES)),
        *shown,
    ]


def _legend_columns(entries: Sequence[tuple[str, Line2D]]) -> int:
    """How many columns fit beside each other, judged by the longest name."""
    longest = max(len(name) for name, _ in entries)
    return max(1, int((_WIDTH_IN - 0.3) / (0.55 + 0.075 * longest)))


def _legend(figure: Any, entries: Sequence[tuple[str, Line2D]]) -> None:
    # Matplotlib drops names with a leading underscore; names are set afterwards, as plain text.
    legend = figure.legend(
        [line for _, line in entries], ["x"] * len(entries), loc="lower left",
        bbox_to_anchor=(0.012, 0.0), ncols=_legend_columns(entries), frameon=False,
        fontsize=8.5, labelcolor=_INK, handlelength=2.2, columnspacing=1.4,
    )  # fmt: skip
    for text, (name, _) in zip(legend.get_texts(), entries, strict=True):
        text.set_parse_math(False)
        text.set_text(name)
