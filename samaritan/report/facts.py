"""What the report states, computed from a run's summary and its cases.

Pure functions on JSON values that tolerate every missing key: a number is a number or ``None``.
Nothing here knows about HTML or plots.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any

from samaritan.report import units

Json = dict[str, Any]

METRICS = ("dice", "hd95_mm", "nsd")

_ORACLES = {"box": "boxes", "point": "points"}

_METHOD_NAMES = {
    "local_only": "Local only",
    "centralised": "Centralised",
    "unet": "U-Net",
}
_METHOD_MEANINGS = {
    "local_only": "each site trains alone on its own cases",
    "centralised": "one model on all cases in one place",
    "unet": "trained from scratch",
}


@dataclass(frozen=True)
class KeyFigure:
    """One number of the first row, with what it means."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Method:
    """The federated run or a baseline, as one row of the comparison.

    Attributes:
        name: For people.
        meaning: What was trained on what.
        dice: Mean Dice over the same validation cases.
        gain: Federated Dice minus this one; None for the federated run itself.
        per_site: Mean Dice by site, if known.
        steps: Optimiser steps, if known.
        seconds: Time it took, if known.
        parameters: Trained parameters, if known.
        note: A remark of the run, or empty.
    """

    name: str
    meaning: str
    dice: float | None
    gain: float | None
    per_site: Mapping[str, float]
    steps: float | None
    seconds: float | None
    parameters: float | None
    note: str


def section(value: Any, *keys: str) -> Json:
    """The object under a path of keys, or an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def number(value: Any, *keys: str) -> float | None:
    """The number under a path of keys, or None."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def numbers(value: Json) -> dict[str, float]:
    """The entries of an object that are numbers."""
    found = {key: number(entry) for key, entry in value.items()}
    return {key: entry for key, entry in found.items() if entry is not None}


def text(value: Any, *keys: str) -> str:
    """The text under a path of keys, or an empty one."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return "" if value is None or isinstance(value, dict | list) else str(value)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is known, or None."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def rounds(summary: Json) -> list[Json]:
    """All rounds in order, with round 0 (before training) if it was evaluated."""
    found = summary.get("rounds")
    entries = (
        [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    )
    return sorted(entries, key=lambda entry: number(entry, "round") or 0)


def training_rounds(summary: Json) -> list[Json]:
    """The rounds in which sites trained."""
    return [entry for entry in rounds(summary) if (number(entry, "round") or 0) >= 1]


def site_names(summary: Json) -> list[str]:
    """Every site that the run names, in the order of the summary."""
    names = dict.fromkeys(section(summary, "sites"))
    for entry in rounds(summary):
        names.update(dict.fromkeys(section(entry, "sites")))
    names.update(dict.fromkeys(section(summary, "final", "dice_per_site")))
    return list(names)


def class_names(summary: Json, cases: Sequence[Json]) -> list[str]:
    """Every scored class. Background carries no score and is left out."""
    scored = dict.fromkeys(section(summary, "final", "dice_per_class"))
    for case in cases:
        scored.update(dict.fromkeys(section(case, "scores")))
    declared = [name for name in section(summary, "data", "classes") if name in scored]
    return declared + [name for name in scored if name not in declared]


def series(summary: Json, site: str, key: str) -> tuple[list[int], list[float]]:
    """The known values of one site over the rounds, as ``(rounds, values)``."""
    return _points((entry, number(entry, "sites", site, key)) for entry in rounds(summary))


def mean_series(summary: Json) -> tuple[list[int], list[float]]:
    """The known mean Dice over the rounds, as ``(rounds, values)``."""
    return _points((entry, number(entry, "dice_mean")) for entry in rounds(summary))


def _points(pairs: Iterable[tuple[Json, float | None]]) -> tuple[list[int], list[float]]:
    known = [
        (int(number(entry, "round") or 0), value) for entry, value in pairs if value is not None
    ]
    return [point[0] for point in known], [point[1] for point in known]


def traffic(summary: Json, key: str) -> dict[str, list[float]]:
    """``bytes_up`` or ``bytes_down`` per training round by site; 0 where none is recorded."""
    entries = training_rounds(summary)
    return {
        site: [number(entry, "sites", site, key) or 0.0 for entry in entries]
        for site in site_names(summary)
    }


def case_metric(case: Json, metric: str) -> float | None:
    """One number for a case: the mean over its scored classes."""
    if metric == "dice" and number(case, "dice_mean") is not None:
        return number(case, "dice_mean")
    scores = section(case, "scores")
    return mean(number(scores, name, metric) for name in scores)


def cases_of(cases: Sequence[Json], site: str) -> list[Json]:
    """The cases of one site."""
    return [case for case in cases if text(case, "site") == site]


def class_values(cases: Sequence[Json], name: str, metric: str = "dice") -> list[float]:
    """The known scores of one class."""
    found = (number(case, "scores", name, metric) for case in cases)
    return [value for value in found if value is not None]


def case_values(cases: Sequence[Json], metric: str = "dice") -> list[float]:
    """The known means of cases."""
    found = (case_metric(case, metric) for case in cases)
    return [value for value in found if value is not None]


def headline(summary: Json) -> str:
    """The result in one sentence."""
    sites = len(site_names(summary))
    trained = len(training_rounds(summary))
    noun = "pseudo-site" if section(summary, "data").get("pseudo_sites") is True else "site"
    actors = f"{units.number_word(sites)} {noun}{'' if sites == 1 else 's'}"
    if not trained:
        return f"{actors} took part; no round of training is recorded."
    return f"{actors} trained one adapter for {units.plural(trained, 'round')}: {_result(summary)}."


def _result(summary: Json) -> str:
    dice = number(summary, "final", "dice_mean")
    cases = number(summary, "final", "cases")
    if dice is None:
        return "no validation case could be scored"
    over = "" if cases is None else f" over {units.plural(int(cases), 'validation volume')}"
    oracle = _ORACLES.get(text(summary, "final", "oracle_prompts"))
    aid = f", with oracle {oracle}" if oracle else ""
    return f"mean 3-D Dice {units.score(dice, 2)}{over}{aid}"


def oracle_mark(kind: str) -> str:
    """What stands behind a score that came from oracle prompts; nothing for the kind "none"."""
    oracle = _ORACLES.get(kind)
    return f" (oracle prompts: {oracle} from the true labels)" if oracle else ""


def oracle_sentence(summary: Json) -> str:
    """Where the prompts behind the scores came from, or an empty text."""
    oracle = _ORACLES.get(text(summary, "final", "oracle_prompts"))
    if not oracle:
        return ""
    return (
        f"Scores use oracle prompts: {oracle} taken from the true labels. "
        f"A clinic has no such {oracle}."
    )


def comparison_sentence(summary: Json) -> str:
    """How the federated adapter stands beside the baselines, or an empty text."""
    gains = {method.name: method.gain for method in methods(summary)}
    clauses = [
        f"{_standing(gains[name])} {words}"
        for name, words in (
            ("Local only", "sites training alone"),
            ("Centralised", "centralised training"),
            ("U-Net", "the U-Net"),
        )
        if gains.get(name) is not None
    ]
    if not clauses:
        return ""
    joined = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
    return f"In mean Dice this is {joined}."


def _standing(gain: float | None) -> str:
    size = f"{abs(gain or 0.0):.3f}"
    if float(size) == 0:
        return "level with"
    return f"{size} {'above' if (gain or 0) > 0 else 'below'}"


def key_figures(summary: Json, cases: Sequence[Json]) -> list[KeyFigure]:
    """The row of numbers under the headline."""
    final = section(summary, "final")
    trained = number(summary, "peft", "trainable_parameters")
    base = number(summary, "base", "parameters")
    tolerance = number(final, "nsd_tolerance_mm")
    up, down = mean_bytes(summary, "bytes_up"), mean_bytes(summary, "bytes_down")
    return [
        KeyFigure("Dice", units.score(number(final, "dice_mean")), _spread(cases, "dice", 3)),
        KeyFigure(
            "HD95", _with_unit(number(final, "hd95_mm_mean"), "mm"), _spread(cases, "hd95_mm", 1)
        ),
        KeyFigure(
            "NSD",
            units.score(number(final, "nsd_mean")),
            "" if tolerance is None else f"tolerance {tolerance:g} mm",
        ),
        KeyFigure(
            "Trained parameters",
            units.count(trained),
            "" if not base else f"{units.percent(trained, base)} of the base’s {units.count(base)}",
        ),
        KeyFigure("Sent", units.size(up), "per site and round"),
        KeyFigure("Received", units.size(down), "per site and round"),
        KeyFigure(
            "Wall time", units.duration(number(summary, "cost", "wall_seconds")), _pace(summary)
        ),
        KeyFigure(
            "Peak memory", units.size(number(summary, "cost", "peak_rss_bytes")), _bases(summary)
        ),
    ]


def _with_unit(value: float | None, unit: str) -> str:
    return units.MISSING if value is None else f"{units.millimetres(value)} {unit}"


def _spread(cases: Sequence[Json], metric: str, digits: int) -> str:
    values = case_values(cases, metric)
    if len(values) < 4:
        return ""
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"quartiles {low:.{digits}f} to {high:.{digits}f}"


def _pace(summary: Json) -> str:
    pace = mean(number(entry, "seconds") for entry in training_rounds(summary))
    return "" if pace is None else f"{units.duration(pace)} per round"


def _bases(summary: Json) -> str:
    copies = number(summary, "cost", "frozen_base_copies")
    if copies is None:
        return ""
    return f"{units.count(copies)} frozen base{'' if copies == 1 else 's'} in memory"


def mean_bytes(summary: Json, key: str) -> float | None:
    """Mean bytes of a site in a round that it trained in.

    A site that failed, or only scored, sent next to nothing and would hide what an update costs.
    Under privacy no loss is recorded, and with a site as the unit no hash of the update either.
    """
    unmarked = text(summary, "privacy", "unit") == "site"
    return mean(
        number(answer, key)
        for entry in training_rounds(summary)
        for answer in section(entry, "sites").values()
        if number(answer, "train_loss") is not None
        or text(answer, "update_sha256")
        or (unmarked and text(answer, "status") == "ok")
    )


def methods(summary: Json) -> list[Method]:
    """The federated run first, then each baseline that was trained."""
    federated = number(summary, "final", "dice_mean")
    own = Method(
        name="Federated",
        meaning="this run",
        dice=federated,
        gain=None,
        per_site=numbers(section(summary, "final", "dice_per_site")),
        steps=number(summary, "cost", "steps"),
        seconds=_training_seconds(summary),
        parameters=number(summary, "peft", "trainable_parameters"),
        note="",
    )
    baselines = section(summary, "baselines")
    return [
        own,
        *(
            _baseline(key, section(baselines, key), federated)
            for key in baselines
            if section(baselines, key)
        ),
    ]


def _baseline(key: str, entry: Json, federated: float | None) -> Method:
    dice = number(entry, "dice_mean")
    return Method(
        name=_METHOD_NAMES.get(key, key.replace("_", " ").capitalize()),
        meaning=_METHOD_MEANINGS.get(key, ""),
        dice=dice,
        gain=None if dice is None or federated is None else federated - dice,
        per_site=numbers(section(entry, "dice_per_site")),
        steps=number(entry, "steps"),
        seconds=number(entry, "seconds"),
        parameters=number(entry, "parameters"),
        note=text(entry, "note"),
    )


def _training_seconds(summary: Json) -> float | None:
    found = (number(entry, "seconds") for entry in training_rounds(summary))
    known = [value for value in found if value is not None]
    return sum(known) if known else None


def answers(summary: Json, site: str) -> tuple[int, int]:
    """How often a site answered, as ``(answered, asked)``."""
    asked = [entry for entry in training_rounds(summary) if site in section(entry, "sites")]
    good = sum(text(entry, "sites", site, "status") == "ok" for entry in asked)
    return good, len(asked)


def unlabelled(summary: Json, name: str) -> list[str]:
    """The sites that do not label a class."""
    by_site = section(summary, "final", "unlabelled")
    return [site for site, names in by_site.items() if isinstance(names, list) and name in names]


def labels_nothing(summary: Json, site: str) -> bool:
    """Whether a site labels none of the scored classes, so that it can have no score."""
    declared = section(summary, "final", "dice_per_class")
    return bool(declared) and all(site in unlabelled(summary, name) for name in declared)


def flatten(value: Json, prefix: str = "") -> list[tuple[str, str]]:
    """Nested objects as ``(path, text)`` rows."""
    rows: list[tuple[str, str]] = []
    for key, entry in value.items():
        name = f"{prefix}{key}"
        if isinstance(entry, dict):
            rows.extend(flatten(entry, f"{name}."))
        elif isinstance(entry, list):
            rows.append((name, ", ".join(str(item) for item in entry)))
        else:
            rows.append((name, units.MISSING if entry is None else str(entry)))
    return rows
