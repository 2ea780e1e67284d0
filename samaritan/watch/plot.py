"""A line over rounds as SVG: a few dozen lines, no library, no text that anybody else wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

_WIDTH, _HEIGHT = 640, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 30
_MOST_POINTS = 320
_MARKED = 40
"""Up to so many points each get a mark."""


def line_plot(points: Sequence[tuple[int, float]], rounds: int, what: str) -> Markup:
    """A score over rounds.

    Args:
        points: Round and value, 0 to 1, by round.
        rounds: Planned; the axis ends there.
        what: Is plotted, for those who do not see it.
    """
    low, high, step = _range([value for _, value in points])
    last = max(rounds, points[-1][0])

    def x(server_round: float) -> float:
        share = (server_round - 1) / (last - 1) if last > 1 else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    shown = _thinned(points)
    path = " ".join(f"{x(r):.1f},{y(v):.1f}" for r, v in shown)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_described(points, what)}">'
    ]
    for value in _ticks(low, high, step):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" '
            f'y2="{y(value):.1f}"/><text x="{_LEFT - 7}" y="{y(value) + 4:.1f}" '
            f'text-anchor="end">{value:.2f}</text>'
        )
    for server_round in _round_ticks(last):
        parts.append(
            f'<text x="{x(server_round):.1f}" y="{_HEIGHT - 9}" text-anchor="middle">'
            f"{server_round}</text>"
        )
    parts.append(f'<polyline class="line" points="{path}"/>')
    marked = shown if len(shown) <= _MARKED else shown[-1:]
    parts += [f'<circle cx="{x(r):.1f}" cy="{y(v):.1f}" r="3.4"/>' for r, v in marked]
    parts.append("</svg>")
    return Markup("".join(parts))  # noqa: S704  numbers and words of our own


def _described(points: Sequence[tuple[int, float]], what: str) -> str:
    (first, begin), (last, end) = points[0], points[-1]
    best = max(points, key=lambda point: point[1])
    return (
        f"{what} by round: {begin:.3f} in round {first}, {end:.3f} in round {last}, "
        f"highest {best[1]:.3f} in round {best[0]}"
    )


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """Round numbers around all values, and the distance of the lines between them."""
    spread = max(max(values) - min(values), 0.04)
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if spread / s <= 5 or s == 1.0)
    low = math.floor(min(values) / step + 1e-9) * step
    high = math.ceil(max(values) / step - 1e-9) * step
    return (low, high, step) if high > low else (low, low + step, step)


def _ticks(low: float, high: float, step: float) -> list[float]:
    return [low + n * step for n in range(round((high - low) / step) + 1)]


def _round_ticks(last: int) -> list[int]:
    """About eight rounds, the first and the last among them."""
    nice = (1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000)
    step = next((s for s in nice if last / s <= 8), last)
    between = [n for n in range(step, last, step) if n > 1 and last - n >= 0.8 * step]
    return [*dict.fromkeys([1, *between, last])]


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """All points, or the lowest and the highest of each stretch where they are many."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    width = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return sorted({points[0], *kept, points[-1]})
