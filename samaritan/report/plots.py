"""The figures of the report, as inline SVG that follows the page's colours.

Matplotlib draws with a few fixed colours; afterwards each of them becomes a CSS variable, so that
the same figure reads on a light page, on a dark one and in print. Text stays text: the reader's
fonts draw names in any script. Ids are made unique per figure, and nothing in the SVG refers to
anything outside it.

Series colours are those of Okabe and Ito without yellow, each with its own marker, so no figure
depends on colour alone. With more sites than colours, sites are drawn alike and only the mean and
the two extremes stand out.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from samaritan.report import aggregation, facts, units

Json = dict[str, Any]

INK, MUTED, RULE, PAPER = "#1a1c1e", "#6a6f75", "#d9d8d3", "#fefefc"
NOTE = "#8a5a00"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P")
MAX_NAMED_SITES = len(SERIES)
MAX_FACET_CLASSES = 6
MAX_FACET_SITES = 12
MAX_SITE_ROWS = 20
MAX_CLASS_ROWS = 64
MAX_POINTS = 2000
MIN_CASES_FOR_BOX = 5
MAX_RINGED_NAMES = 6

_VARIABLES = {INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper", NOTE: "--note"} | {
    colour: f"--series-{position}" for position, colour in enumerate(SERIES, start=1)
}
_WIDTH_IN = 5.2
_LABEL_LENGTH = 26
_WIDE_RANGE = 30
STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.5,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
}


@dataclass(frozen=True)
class Plot:
    """One drawn figure.

    Attributes:
        svg: An ``<svg>`` element, safe to place in a page.
        width_px: The width at which its text has the size of small print.
    """

    svg: str
    width_px: int


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend that the page draws itself.

    Attributes:
        label: The full name.
        variable: The CSS variable of its colour.
        marker: A Matplotlib marker name, or empty for a plain line.
        thick: Whether the line is drawn bold.
    """

    label: str
    variable: str
    marker: str = ""
    thick: bool = False


@dataclass(frozen=True)
class SiteStyle:
    """How one site is drawn in every figure."""

    colour: str
    marker: str
    width: float = 1.4
    opacity: float = 1.0
    order: float = 2.0


@dataclass(frozen=True)
class Row:
    """One row of a box or dot plot: a name, its values and a colour, or why there are none."""

    label: str
    values: tuple[float, ...]
    colour: str
    marker: str = "o"
    remark: str = ""


def site_styles(summary: Json) -> dict[str, SiteStyle]:
    """A style for every site: its own colour and marker while there are enough of them."""
    sites = facts.site_names(summary)
    if len(sites) <= MAX_NAMED_SITES:
        return {
            site: SiteStyle(colour, marker)
            for site, colour, marker in zip(sites, SERIES, MARKERS, strict=False)
        }
    styles = {site: SiteStyle(MUTED, "", width=0.8, opacity=0.45) for site in sites}
    for site, position in zip(_extremes(summary), (0, 1), strict=False):
        styles[site] = SiteStyle(SERIES[position], MARKERS[position], order=3.0)
    return styles


def site_legend(summary: Json) -> list[LegendEntry]:
    """The legend that belongs to `site_styles`."""
    sites = facts.site_names(summary)
    styles = site_styles(summary)
    if len(sites) <= MAX_NAMED_SITES:
        return [
            LegendEntry(site, _VARIABLES[styles[site].colour], styles[site].marker)
            for site in sites
        ]
    entries = [
        LegendEntry(f"{site} ({words})", _VARIABLES[styles[site].colour], styles[site].marker)
        for site, words in zip(
            _extremes(summary), ("highest final Dice", "lowest final Dice"), strict=False
        )
    ]
    others = len(sites) - len(entries)
    return [*entries, LegendEntry(f"the other {units.plural(others, 'site')}", "--muted")]


def _extremes(summary: Json) -> list[str]:
    per_site = facts.numbers(facts.section(summary, "final", "dice_per_site"))
    if len(per_site) < 2:
        return []
    return [max(per_site, key=per_site.__getitem__), min(per_site, key=per_site.__getitem__)]


def dice_curves(summary: Json) -> Plot | None:
    """Validation Dice over the rounds, per site and as the mean of the run."""
    site_points = {site: facts.series(summary, site, "dice") for site in facts.site_names(summary)}
    mean_points = facts.mean_series(summary)
    values = [*mean_points[1], *(value for _, ys in site_points.values() for value in ys)]
    if not values:
        return None
    with _figure("dice", 3.3) as (figure, axes):
        _draw_sites(axes, site_points, site_styles(summary))
        axes.plot(*mean_points, color=INK, linewidth=2.4, zorder=4, marker=_single(mean_points[0]))
        axes.set_ylim(*_dice_limits(values))
        axes.set_ylabel("Validation Dice (3-D)")
        _round_axis(axes)
        return _finish(figure, "dice", "Validation Dice over the rounds")


def loss_curves(summary: Json) -> Plot | None:
    """Training loss over the rounds, per site."""
    site_points = {
        site: facts.series(summary, site, "train_loss") for site in facts.site_names(summary)
    }
    values = [value for _, ys in site_points.values() for value in ys]
    if not values:
        return None
    with _figure("loss", 3.3) as (figure, axes):
        _draw_sites(axes, site_points, site_styles(summary))
        if min(values) >= 0:
            axes.set_ylim(bottom=0)
        axes.set_ylabel("Training loss")
        _round_axis(axes)
        return _finish(figure, "loss", "Training loss over the rounds")


def _draw_sites(
    axes: Any,
    site_points: Mapping[str, tuple[list[int], list[float]]],
    styles: Mapping[str, SiteStyle],
) -> None:
    rounds = {number for xs, _ in site_points.values() for number in xs}
    for site, (xs, ys) in site_points.items():
        style = styles[site]
        # A site that is asked now and then has points: a line would show rounds it never had.
        seldom = len(xs) < len(rounds) / 2
        axes.plot(
            xs, ys, color=style.colour, linewidth=style.width, alpha=style.opacity,
            marker=style.marker or ("o" if seldom else _single(xs)), zorder=style.order,
            linestyle="" if seldom else "-", markeredgewidth=0,
        )  # fmt: skip


def _single(points: Sequence[int]) -> str:
    """A lone point has no line, so it needs a marker."""
    return "o" if len(points) == 1 else ""


def _round_axis(axes: Any) -> None:
    axes.set_xlabel("Round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.grid(visible=False, axis="x")


def score_boxes(summary: Json, cases: Sequence[Json]) -> list[Plot]:
    """Final Dice of the cases: one panel per class by site, or pooled where that is too much."""
    sites = facts.site_names(summary)
    names = facts.class_names(summary, cases)
    if len(names) <= MAX_FACET_CLASSES and len(sites) <= MAX_FACET_SITES:
        panels = [(name, _class_rows(summary, cases, name)) for name in names]
    else:
        panels = [
            ("By site (mean over the classes of a case)", _site_rows(summary, cases)),
            ("By class (all sites)", _pooled_rows(names, cases)),
        ]
    drawn = [(title, rows) for title, rows in panels if any(row.values for row in rows)]
    limits = _dice_limits([value for _, rows in drawn for row in rows for value in row.values])
    return [
        _box_panel(f"box{position}", title, rows, limits)
        for position, (title, rows) in enumerate(drawn)
    ]


def _class_rows(summary: Json, cases: Sequence[Json], name: str) -> list[Row]:
    styles = site_styles(summary)
    unlabelled = facts.unlabelled(summary, name)
    return [
        Row(site, tuple(facts.class_values(facts.cases_of(cases, site), name)), style.colour,
            style.marker or "o", units.NOT_LABELLED if site in unlabelled else "")
        for site, style in styles.items()
    ]  # fmt: skip


def _site_rows(summary: Json, cases: Sequence[Json]) -> list[Row]:
    styles = site_styles(summary)
    rows = [
        Row(site, tuple(facts.case_values(facts.cases_of(cases, site))), style.colour,
            style.marker or "o")
        for site, style in styles.items()
    ]  # fmt: skip
    return _lowest(rows, MAX_SITE_ROWS)


def _pooled_rows(names: Sequence[str], cases: Sequence[Json]) -> list[Row]:
    rows = [Row(name, tuple(facts.class_values(cases, name)), SERIES[0]) for name in names]
    return _lowest(rows, MAX_CLASS_ROWS)


def _lowest(rows: Sequence[Row], most: int) -> list[Row]:
    """The rows with values, highest median first; of more than `most` the lowest."""
    known = [row for row in rows if row.values]
    ordered = sorted(known, key=lambda row: float(np.median(row.values)), reverse=True)
    return ordered[-most:]


def _box_panel(name: str, title: str, rows: Sequence[Row], limits: tuple[float, float]) -> Plot:
    height = 0.85 + (0.36 if len(rows) <= MAX_FACET_SITES else 0.2) * len(rows)
    points = sum(len(row.values) for row in rows) <= MAX_POINTS
    with _figure(name, height) as (figure, axes):
        for position, row in enumerate(rows):
            _draw_row(axes, position, row, points=points)
            if row.remark:
                axes.text(limits[0], position, f"  {row.remark}", va="center", fontsize=8.5,
                          color=MUTED)  # fmt: skip
        axes.set_xlim(*limits)
        axes.set_xlabel("Dice (3-D)")
        axes.set_title(units.shorten(title, 48))
        _name_rows(axes, [row.label for row in rows])
        return _finish(figure, name, f"Final Dice, {title}")


def _draw_row(axes: Any, position: int, row: Row, *, points: bool) -> None:
    if len(row.values) >= MIN_CASES_FOR_BOX:
        line = {"color": row.colour, "linewidth": 1.1}
        axes.boxplot(
            [row.values], positions=[position], orientation="horizontal", widths=0.56,
            showfliers=not points, boxprops=line, whiskerprops=line, capprops={"linewidth": 0},
            medianprops={"color": INK, "linewidth": 1.8}, manage_ticks=False,
            flierprops={"marker": ".", "markersize": 3, "markeredgecolor": row.colour},
        )  # fmt: skip
    elif row.values:
        axes.plot(
            [float(np.median(row.values))] * 2, [position - 0.28, position + 0.28],
            color=INK, linewidth=1.8, zorder=1.9,
        )  # fmt: skip
    if points:
        axes.plot(
            row.values, position + _jitter(len(row.values)), linestyle="", marker=row.marker,
            color=row.colour, markersize=3.8, alpha=0.7, markeredgewidth=0, zorder=3,
        )  # fmt: skip


def _jitter(number: int) -> NDArray[np.floating[Any]]:
    """Small vertical offsets, the same in every drawing, that keep points apart."""
    golden = (math.sqrt(5) - 1) / 2
    return ((np.arange(number) * golden) % 1.0 - 0.5) * 0.34


def _name_rows(axes: Any, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_label(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def method_dots(summary: Json) -> Plot | None:
    """Mean Dice of the federated run and each baseline, with their sites as small marks."""
    methods = [method for method in facts.methods(summary) if method.dice is not None]
    if len(methods) < 2:
        return None
    values = [method.dice for method in methods if method.dice is not None]
    values += [value for method in methods for value in method.per_site.values()]
    with _figure("methods", 0.85 + 0.4 * len(methods)) as (figure, axes):
        for position, method in enumerate(methods):
            colour = SERIES[0] if position == 0 else INK
            marks = list(method.per_site.values())
            axes.plot(
                marks, [position] * len(marks), linestyle="", marker="|", color=MUTED,
                markersize=10, markeredgewidth=1,
            )  # fmt: skip
            axes.plot([method.dice], [position], marker="o", color=colour, markersize=7.5)
        axes.axvline(values[0], color=SERIES[0], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xlim(*_dice_limits(values))
        axes.set_xlabel("Mean validation Dice (3-D)")
        axes.set_title("By method")
        _name_rows(axes, [method.name for method in methods])
        return _finish(figure, "methods", "Mean Dice by method")


def gain_by_site(summary: Json) -> Plot | None:
    """For every site, Dice after training alone and after federating."""
    federated = facts.numbers(facts.section(summary, "final", "dice_per_site"))
    alone = facts.numbers(facts.section(summary, "baselines", "local_only", "dice_per_site"))
    sites = [site for site in federated if site in alone]
    if not sites:
        return None
    sites = sorted(sites, key=lambda site: federated[site] - alone[site], reverse=True)
    sites = sites[-MAX_SITE_ROWS:]
    pitch = 0.36 if len(sites) <= MAX_FACET_SITES else 0.2
    with _figure("gain", 0.85 + pitch * len(sites)) as (figure, axes):
        for position, site in enumerate(sites):
            pair = [alone[site], federated[site]]
            axes.plot(pair, [position] * 2, color=MUTED, linewidth=1.1, zorder=1.9)
        rows = range(len(sites))
        axes.plot(
            [alone[site] for site in sites], rows, linestyle="", marker="o", markersize=6,
            markerfacecolor=PAPER, markeredgecolor=INK, markeredgewidth=1.2,
        )  # fmt: skip
        axes.plot(
            [federated[site] for site in sites], rows, linestyle="", marker="o", markersize=6.5,
            color=SERIES[0],
        )  # fmt: skip
        axes.set_xlim(*_dice_limits([*federated.values(), *alone.values()]))
        axes.set_xlabel("Mean validation Dice (3-D)")
        axes.set_title("By site: alone (open), federated (filled)")
        _name_rows(axes, sites)
        return _finish(figure, "gain", "Dice per site, alone and federated")


def norm_curves(summary: Json) -> Plot | None:
    """Length of each site's update by round, with a ring around those that are out of line."""
    site_points = aggregation.update_norms(summary)
    values = [value for _, ys in site_points.values() for value in ys if value > 0]
    if not values:
        return None
    medians = aggregation.median_norms(summary)
    with _figure("norms", 3.3) as (figure, axes):
        if max(values) > _WIDE_RANGE * min(values):
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.set_ylim(min(values) / 2, max(values) * 4)
        else:
            axes.set_ylim(0, 1.15 * max(values))
        _draw_sites(axes, site_points, site_styles(summary))
        axes.plot(list(medians), list(medians.values()), color=INK, linewidth=2.4, zorder=1.9,
                  marker=_single(list(medians)))  # fmt: skip
        _ring_long_updates(axes, summary, site_points)
        axes.set_ylabel("Length of the update")
        _round_axis(axes)
        return _finish(figure, "norms", "Length of the sites' updates over the rounds")


def _ring_long_updates(
    axes: Any, summary: Json, site_points: Mapping[str, tuple[list[int], list[float]]]
) -> None:
    for position, entry in enumerate(aggregation.long_updates(summary)):
        norms = dict(zip(*site_points[entry.site], strict=True))
        heights = [norms[number] for number in entry.rounds]
        axes.plot(
            entry.rounds, heights, linestyle="", marker="o", markersize=11, zorder=5,
            markerfacecolor="none", markeredgecolor=NOTE, markeredgewidth=1.8,
        )  # fmt: skip
        if position < MAX_RINGED_NAMES:
            axes.annotate(
                _label(entry.site), (entry.rounds[0], heights[0]), xytext=(0, 8), ha="left",
                textcoords="offset points", fontsize=9, fontweight="bold", color=NOTE,
            )  # fmt: skip


def error_curve(summary: Json) -> Plot | None:
    """Aggregation error by round; nothing where it is rounding."""
    errors = aggregation.errors(summary)
    if aggregation.is_exact(summary):
        return None
    with _figure("error", 3.3) as (figure, axes):
        axes.plot(
            list(errors), list(errors.values()), color=INK, linewidth=1.8, marker="o", markersize=4
        )
        axes.set_ylim(0, 1.15 * max(errors.values()))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
        axes.set_ylabel("Aggregation error (relative)")
        _round_axis(axes)
        return _finish(figure, "error", "Aggregation error over the rounds")


def traffic_bars(summary: Json) -> Plot | None:
    """Bytes per round, stacked by site: from the sites above zero, to the sites below."""
    up, down = facts.traffic(summary, "bytes_up"), facts.traffic(summary, "bytes_down")
    entries = facts.training_rounds(summary)
    totals = [_column_totals(direction) for direction in (up, down)]
    largest = max((value for column in totals for value in column), default=0.0)
    if largest <= 0:
        return None
    divisor, unit = units.size_unit(largest)
    numbers = [facts.number(entry, "round") or 0 for entry in entries]
    with _figure("traffic", 3.0, width=1.35 * _WIDTH_IN) as (figure, axes):
        for direction, sign in ((up, 1.0), (down, -1.0)):
            _stack(axes, numbers, direction, sign / divisor, site_styles(summary))
        axes.axhline(0, color=INK, linewidth=0.9)
        axes.set_xlim(numbers[0] - 0.6, numbers[-1] + 0.6)
        axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        axes.set_ylabel(f"{unit} per round")
        _round_axis(axes)
        for height, words in ((0.97, "up: from the sites"), (0.03, "down: to the sites")):
            axes.text(1.0, height, words, transform=axes.transAxes, ha="right", fontsize=8.5,
                      va="top" if height > 0.5 else "bottom", color=MUTED)  # fmt: skip
        axes.margins(y=0.18)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, -0.15 * high), max(high, -0.15 * low))
        return _finish(figure, "traffic", "Bytes per round")


def _column_totals(by_site: Mapping[str, list[float]]) -> list[float]:
    return [sum(column) for column in zip(*by_site.values(), strict=True)]


def _stack(
    axes: Any,
    rounds: Sequence[float],
    by_site: Mapping[str, list[float]],
    scale: float,
    styles: Mapping[str, SiteStyle],
) -> None:
    stacks = (
        {site: (styles[site].colour, values) for site, values in by_site.items()}
        if len(by_site) <= MAX_NAMED_SITES
        else {"all": (MUTED, _column_totals(by_site))}
    )
    width = 0.72 * min(1.0, len(rounds) / 6)
    bottom = np.zeros(len(rounds))
    for colour, values in stacks.values():
        heights = np.asarray(values) * scale
        axes.bar(rounds, heights, bottom=bottom, width=width, color=colour, edgecolor=PAPER,
                 linewidth=0.5)  # fmt: skip
        bottom = bottom + heights


def _dice_limits(values: Sequence[float]) -> tuple[float, float]:
    """From the tenth below the smallest value to one, with room for a marker at either end."""
    low = math.floor(min(values, default=0.0) * 10 - 0.2) / 10
    low = max(low, 0.0)
    margin = 0.02 * (1 - low)
    return low - margin, 1 + margin


def _label(name: str) -> str:
    return units.shorten(" ".join(name.split()), _LABEL_LENGTH)


@contextmanager
def _figure(name: str, height_in: float, width: float = _WIDTH_IN) -> Iterator[tuple[Any, Any]]:
    """One set of axes in the style of the report, without any global Matplotlib state left."""
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height_in), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, figure.subplots()


def _finish(figure: Any, name: str, description: str) -> Plot:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The page draws the text, so a script that Matplotlib's own font lacks is no fault.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    width_px = round(figure.get_size_inches()[0] * 96)
    return Plot(svg=_inline(buffer.getvalue(), name, description), width_px=width_px)


def _inline(svg: str, name: str, description: str) -> str:
    """Turn a stand-alone SVG into an element of a page: own ids, page colours, no metadata."""
    root = ElementTree.fromstring(svg)  # noqa: S314  written by Matplotlib a moment ago
    _strip(root)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {
            key.rpartition("}")[2]: _attribute(key, value, name)
            for key, value in element.attrib.items()
        }
        element.attrib.clear()
        element.attrib.update(attributes)
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    root.attrib.update({"role": "img", "aria-label": description})
    return ElementTree.tostring(root, encoding="unicode")


def _strip(parent: ElementTree.Element) -> None:
    for child in list(parent):
        if child.tag.rpartition("}")[2] in {"metadata", "style"}:
            parent.remove(child)
        else:
            _strip(child)


def _attribute(key: str, value: str, name: str) -> str:
    local = key.rpartition("}")[2]
    if local == "id":
        return f"{name}-{value}"
    if local == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if local == "style":
        value = re.sub(r"font-family:[^;]*;?\s*", "", value)
        value = re.sub(r"#[0-9a-f]{6}", _themed, value)
    return value.replace("url(#", f"url(#{name}-")


def _themed(match: re.Match[str]) -> str:
    colour = match.group()
    return f"var({_VARIABLES[colour]})" if colour in _VARIABLES else colour
