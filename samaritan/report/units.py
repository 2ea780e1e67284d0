"""Numbers as a reader wants them: units, thousands, signs, and a dash for what is missing."""

from __future__ import annotations

from collections.abc import Sequence

MISSING = "–"
NOT_LABELLED = "not labelled"
MINUS = "−"
THIN_SPACE = "\u202f"

_WORDS = (
    "No", "One", "Two", "Three", "Four", "Five", "Six",
    "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve",
)  # fmt: skip


def score(value: float | None, digits: int = 3) -> str:
    """A score between 0 and 1, such as Dice or NSD."""
    return MISSING if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign; a true minus, so that columns line up."""
    if value is None:
        return MISSING
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return (MINUS if value < 0 else "+") + text


def millimetres(value: float | None) -> str:
    """A distance; the unit belongs to the heading or follows the number."""
    return MISSING if value is None else f"{value:.2f}"


def count(value: float | None) -> str:
    """A whole number with thin spaces between thousands."""
    return MISSING if value is None else f"{round(value):,}".replace(",", THIN_SPACE)


def number_word(value: int) -> str:
    """``Four`` for 4, figures above twelve."""
    return _WORDS[value] if 0 <= value < len(_WORDS) else count(value)


def plural(value: int, noun: str) -> str:
    """``1 site``, ``4 sites``."""
    return f"{count(value)} {noun}{'' if value == 1 else 's'}"


def percent(part: float | None, whole: float | None) -> str:
    """The share of part in whole, with two significant digits."""
    if part is None or not whole:
        return MISSING
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"


def size(size_bytes: float | None) -> str:
    """A number of bytes in binary units."""
    if size_bytes is None:
        return MISSING
    divisor, unit = size_unit(size_bytes)
    value = size_bytes / divisor
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def size_unit(largest_bytes: float) -> tuple[float, str]:
    """The binary unit that suits the largest of some sizes, as ``(divisor, name)``."""
    divisor = 1.0
    for unit in ("B", "KiB", "MiB", "GiB"):
        if largest_bytes < 1024 * divisor:
            return divisor, unit
        divisor *= 1024
    return divisor, "TiB"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``3 min 12 s``, ``5 h 02 min``."""
    if seconds is None:
        return MISSING
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def ranges(numbers: Sequence[int]) -> str:
    """``1–3, 7`` for 1, 2, 3, 7."""
    parts: list[str] = []
    ordered = sorted(set(numbers))
    start = 0
    for position in range(1, len(ordered) + 1):
        if position < len(ordered) and ordered[position] == ordered[position - 1] + 1:
            continue
        first, last = ordered[start], ordered[position - 1]
        parts.append(str(first) if first == last else f"{first}–{last}")
        start = position
    return ", ".join(parts)


def names(items: Sequence[str], most: int = 6) -> str:
    """``a, b, c``; of many the first ones and how many more there are."""
    if len(items) <= most:
        return ", ".join(items)
    return f"{', '.join(items[:most])} and {count(len(items) - most)} more"


def shorten(text: str, length: int) -> str:
    """Cut out the middle of a long name: its beginning and its end tell names apart."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head]}…{text[head - length + 1 :]}"
