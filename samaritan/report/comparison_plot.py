"""The figure of a comparison: Dice against bytes, and Dice over the rounds.

Names stand beside what they name: in each crowd of points or ends of lines they form one column,
moved apart just so far that none covers another.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from scipy.optimize import isotonic_regression

from samaritan.files import write_atomically
from samaritan.report import units
from samaritan.report.plots import INK, MARKERS, PAPER, SERIES, STYLE

Json = dict[str, Any]

_SIZE_PT = 8.5
_LINE_PT = 11.0
_LETTER_PT = 5.0
_AWAY_PT = 14.0
_MARK_PT = 8.0
_LABEL_LENGTH = 18
_WIDTH_IN = 11.0
_MARGINS_IN = {"left": 0.85, "right": 1.45, "bottom": 0.55, "top": 0.35, "between": 2.25}


@dataclass(frozen=True)
class _Look:
    """How one variant is drawn in both panels: no two share colour, marker and dashes."""

    colour: str
    marker: str
    dashes: str


def write_plot(folder: Path, comparison: Json) -> list[Path]:
    """Writes comparison.svg and comparison.png.

    Args:
        folder: Where they go.
        comparison: As in comparison.json.

    Returns:
        The files; none when no variant has a Dice, and former ones are taken away.

    Raises:
        StorageError: When a file cannot be written.
    """
    paths = [folder / "comparison.svg", folder / "comparison.png"]
    looks = {row["variant"]: _look(n) for n, row in enumerate(comparison["variants"])}
    rows = [row for row in comparison["variants"] if row["dice"] is not None]
    if not rows:
        for path in paths:
            path.unlink(missing_ok=True)
        return []
    with mpl.rc_context({**STYLE, "svg.hashsalt": "comparison", "figure.facecolor": PAPER}):
        figure = _draw(rows, looks, f"Validation Dice (3-D){comparison['oracle_mark']}")
        for path in paths:
            buffer = io.BytesIO()
            kind = path.suffix[1:]
            figure.savefig(buffer, format=kind, dpi=160, metadata=_METADATA[kind])
            write_atomically(path, buffer.getvalue())
    return paths


_METADATA: Mapping[str, dict[str, Any]] = {"svg": {"Date": None}, "png": {"Software": None}}
"""Nothing that differs from one writing to the next."""


def _draw(rows: Sequence[Json], looks: Mapping[str, _Look], dice_label: str) -> Any:
    height = max(4.4, 1.0 + len(rows) * _LINE_PT * 1.3 / 72)
    figure = Figure(figsize=(_WIDTH_IN, height), dpi=72)  # so that a pixel is a point
    FigureCanvasAgg(figure)
    trade, curves = figure.subplots(1, 2)
    panel = (_WIDTH_IN - sum(_MARGINS_IN[side] for side in ("left", "right", "between"))) / 2
    figure.subplots_adjust(
        left=_MARGINS_IN["left"] / _WIDTH_IN,
        right=1 - _MARGINS_IN["right"] / _WIDTH_IN,
        bottom=_MARGINS_IN["bottom"] / height,
        top=1 - _MARGINS_IN["top"] / height,
        wspace=_MARGINS_IN["between"] / panel,
    )
    _draw_trade(trade, rows, looks)
    _draw_curves(curves, rows, looks)
    for axes in (trade, curves):
        axes.set_ylabel(dice_label)
    return figure


def _look(position: int) -> _Look:
    """The first variant, the reference, is black."""
    if position == 0:
        return _Look(INK, "o", "-")
    lap, place = divmod(position - 1, len(SERIES))
    marker = MARKERS[(place + lap + 1) % len(MARKERS)]
    return _Look(SERIES[place], marker, ("-", "--", ":", "-.")[lap % 4])


def _draw_trade(axes: Any, rows: Sequence[Json], looks: Mapping[str, _Look]) -> None:
    """Dice against the bytes of a round trip, with a bar from the lowest seed to the highest."""
    known = [row for row in rows if row["bytes_round_trip"]]
    axes.set_title("Dice against bytes")
    axes.set_xlabel("Bytes up and down, per site and round")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=5))
    axes.xaxis.set_major_formatter(lambda value, _: units.size(value))
    axes.minorticks_off()
    for row in known:
        look, place = looks[row["variant"]], (row["bytes_round_trip"], row["dice"])
        low, high = row["dice_range"]
        axes.plot([place[0]] * 2, [low, high], color=look.colour, linewidth=1.1, marker="_")
        axes.plot(*place, marker=look.marker, color=look.colour, markersize=6.5, zorder=3)
    if known:
        sizes = [row["bytes_round_trip"] for row in known]
        axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.3)
    axes.margins(y=0.12)
    ends = {row["variant"]: (row["bytes_round_trip"], row["dice"]) for row in known}
    _name(axes, ends, looks)


def _draw_curves(axes: Any, rows: Sequence[Json], looks: Mapping[str, _Look]) -> None:
    """Dice over the rounds, as the mean of the seeds."""
    axes.set_title("Dice over the rounds")
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")
    ends = {}
    for row in rows:
        look, points = looks[row["variant"]], mean_curve(row)
        if not points:
            continue
        axes.plot(
            *zip(*points, strict=True), color=look.colour, linestyle=look.dashes,
            linewidth=2.2 if look.colour == INK else 1.3,
        )  # fmt: skip
        axes.plot(*points[-1], marker=look.marker, color=look.colour, markersize=5, zorder=3,
                  clip_on=False)  # fmt: skip
        ends[row["variant"]] = points[-1]
    if ends:
        # All names in one column beyond the last round, also of runs that stopped early.
        axes.set_xlim(right=max(place[0] for place in ends.values()))
        _name(axes, ends, looks, together=True)


def mean_curve(row: Json) -> list[tuple[int, float]]:
    """Dice by round: the mean over the seeds that scored in that round."""
    found: dict[int, list[float]] = {}
    for entry in row["seeds"]:
        for server_round, dice in entry.get("dice_of_rounds", ()):
            found.setdefault(server_round, []).append(dice)
    return [(number, float(np.mean(found[number]))) for number in sorted(found)]


def _name(
    axes: Any,
    places: Mapping[str, tuple[float, float]],
    looks: Mapping[str, _Look],
    *,
    together: bool = False,
) -> None:
    """Writes each name to the right of its place, (x, y) in data, with a thin line to it."""
    axes.autoscale_view()
    at = {name: axes.transData.transform(place) for name, place in places.items()}
    low, high = axes.bbox.y0 + _LINE_PT / 2, axes.bbox.y1 - _LINE_PT / 2
    for crowd in [list(at)] if together else _crowds(at):
        crowd.sort(key=lambda name: float(at[name][1]))
        column = max(at[name][0] for name in crowd) + _AWAY_PT
        heights = spread([float(at[name][1]) for name in crowd], _LINE_PT, low, high)
        for name, height in zip(crowd, heights, strict=True):
            look = looks[name]
            axes.annotate(
                units.shorten(name, _LABEL_LENGTH), places[name],
                (column + _MARK_PT - at[name][0], height - at[name][1]),
                textcoords="offset points",
                fontsize=_SIZE_PT, color=INK, va="center", annotation_clip=False,
                arrowprops={
                    "arrowstyle": "-", "color": look.colour, "linewidth": 0.6, "alpha": 0.5,
                    "shrinkA": _MARK_PT, "shrinkB": 3, "relpos": (0, 0.5),
                },
            )  # fmt: skip
            # Again before the name: in a thicket of lines the marker tells which is which.
            x, y = axes.transAxes.inverted().transform((column + _MARK_PT / 2, height))
            axes.plot(
                x, y, marker=look.marker, color=look.colour, markersize=4.5, clip_on=False,
                transform=axes.transAxes,
            )  # fmt: skip


def _crowds(at: Mapping[str, Any]) -> list[list[str]]:
    """Names whose labels would run into the next point, from left to right; `at` in points."""
    crowds: list[list[str]] = []
    edge = -np.inf
    for name in sorted(at, key=lambda name: float(at[name][0])):
        if at[name][0] > edge:
            crowds.append([])
            edge = at[name][0]
        crowds[-1].append(name)
        width = max(min(len(member), _LABEL_LENGTH) for member in crowds[-1]) * _LETTER_PT
        edge = at[name][0] + _AWAY_PT + _MARK_PT + width
    return crowds


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves sorted heights apart, by the least squares, until each is `gap` above the one before.

    They stay between `low` and `high` where there is room for all.
    """
    steps = gap * np.arange(len(wanted))
    packed = isotonic_regression(np.asarray(wanted) - steps).x
    moved = np.maximum(np.minimum(packed, high - steps[-1]), low) + steps
    return [float(height) for height in moved]
