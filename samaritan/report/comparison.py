"""Several runs side by side: their numbers, and the table that people read.

Pure functions on the summaries of runs; a number that a run lacks is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samaritan.report import facts, units

Json = dict[str, Any]


@dataclass(frozen=True)
class Failure:
    """A run that ended with an error.

    Attributes:
        code: Such as ``SAM-F204``; of an error that Samaritan does not know, its type.
        message: What happened.
    """

    code: str
    message: str


Results = Mapping[str, Mapping[int, Json | Failure]]
"""What became of each variant with each seed: a summary, or why there is none."""


def _mean_of_rounds(key: str) -> Callable[[Json], float | None]:
    return lambda summary: facts.mean(
        facts.number(entry, key) for entry in facts.training_rounds(summary)
    )


def _mean_of_sites(key: str) -> Callable[[Json], float | None]:
    """Over the sites that trained in a round and were not at fault, and over rounds."""
    return lambda summary: facts.mean(
        facts.number(answer, key)
        for entry in facts.training_rounds(summary)
        for answer in facts.section(entry, "sites").values()
        if facts.text(answer, "status") == "ok" and facts.number(answer, "train_loss") is not None
    )


MEASURES: dict[str, Callable[[Json], float | None]] = {
    "dice": lambda summary: facts.number(summary, "final", "dice_mean"),
    "hd95_mm": lambda summary: facts.number(summary, "final", "hd95_mm_mean"),
    "nsd": lambda summary: facts.number(summary, "final", "nsd_mean"),
    "aggregation_error": _mean_of_rounds("aggregation_error"),
    "bytes_up": _mean_of_sites("bytes_up"),
    "bytes_down": _mean_of_sites("bytes_down"),
    "federated_seconds": lambda summary: facts.number(summary, "cost", "federated_seconds"),
    "aggregation_seconds": _mean_of_rounds("aggregation_seconds"),
}
"""What is taken from the summary of each run. Bytes are per site and round."""

_BESIDE_REFERENCE = ("dice_difference", "round_trip_factor")


def compare_runs(results: Results) -> list[Json]:
    """One row per variant: the means over its seeds, and each seed on its own.

    The first variant is the reference. `dice_difference` is the mean over seeds of a variant's
    Dice minus the reference's with the same seed; `round_trip_factor` is how many times smaller
    its bytes up and down are, taken alike.
    """
    reference = next(iter(results.values()), {})
    return [_row(variant, runs, reference) for variant, runs in results.items()]


def _row(
    variant: str, runs: Mapping[int, Json | Failure], reference: Mapping[int, Json | Failure]
) -> Json:
    entries = [_entry(seed, run, reference.get(seed)) for seed, run in runs.items()]
    finished = [entry for entry in entries if "error" not in entry]
    measures = (*MEASURES, "bytes_round_trip", *_BESIDE_REFERENCE)
    dice = [entry["dice"] for entry in finished if entry["dice"] is not None]
    return {
        "variant": variant,
        **{measure: facts.mean(entry[measure] for entry in finished) for measure in measures},
        "dice_range": [min(dice), max(dice)] if dice else None,
        "seeds": entries,
    }


def _entry(seed: int, run: Json | Failure, reference: Json | Failure | None) -> Json:
    if isinstance(run, Failure):
        return {"seed": seed, "error": {"code": run.code, "message": run.message}}
    entry: Json = {"seed": seed} | _measures(run)
    beside = _measures(reference) if isinstance(reference, dict) else {}
    ours, theirs = entry["dice"], beside.get("dice")
    small, large = entry["bytes_round_trip"], beside.get("bytes_round_trip")
    entry["dice_difference"] = None if ours is None or theirs is None else ours - theirs
    entry["round_trip_factor"] = large / small if large and small else None
    entry["dice_of_rounds"] = [list(point) for point in zip(*facts.mean_series(run), strict=True)]
    return entry


def _measures(summary: Json) -> Json:
    found: Json = {name: measure(summary) for name, measure in MEASURES.items()}
    up, down = found["bytes_up"], found["bytes_down"]
    found["bytes_round_trip"] = None if up is None or down is None else up + down
    return found


def circumstances(results: Results) -> Json:
    """What a reader of the numbers asks next: on what data, with which seeds, on which machine."""
    runs = [run for seeds in results.values() for run in seeds.values() if isinstance(run, dict)]
    first = runs[0] if runs else {}
    return {
        "reference": next(iter(results), None),
        "seeds": sorted({seed for seeds in results.values() for seed in seeds}),
        "hardware": sorted({facts.text(run, "cost", "hardware") for run in runs}),
        "sites": len(facts.section(first, "sites")),
        "pseudo_sites": facts.section(first, "data").get("pseudo_sites") is True,
        "validation_cases": facts.number(first, "final", "cases"),
        "note": facts.text(first, "data", "note"),
        "oracle_mark": facts.oracle_mark(facts.text(first, "final", "oracle_prompts")),
    }


def to_markdown(comparison: Json) -> str:
    """The table of a comparison as `simulation.compare` builds it, with what it was made by."""
    rows = comparison["variants"]
    reference = comparison["reference"]
    heads = (
        "Variant", f"Dice{comparison['oracle_mark']}", f"Against {reference}", "HD95 (mm)",
        "Aggregation error", "Up", "Down", "Round trip", "Smaller by", "Federation", "Aggregation",
    )  # fmt: skip
    lines = [
        f"# {comparison['name']}: {units.plural(len(rows), 'variant')} compared",
        "",
        _table_line(heads),
        _table_line(["---", *["---:"] * (len(heads) - 1)]),
        *(_table_line(_cells(row)) for row in rows),
        "",
        *_legend(comparison),
        *_failures(rows),
    ]
    return "\n".join(lines) + "\n"


def _table_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Json) -> list[str]:
    factor = row["round_trip_factor"]
    return [
        row["variant"],
        _dice_cell(row),
        units.signed(row["dice_difference"], 4),
        units.millimetres(row["hd95_mm"]),
        _significant(row["aggregation_error"]),
        units.size(row["bytes_up"]),
        units.size(row["bytes_down"]),
        units.size(row["bytes_round_trip"]),
        units.MISSING if factor is None else f"{factor:.1f}×",
        units.duration(row["federated_seconds"]),
        _milliseconds(row["aggregation_seconds"]),
    ]


def _dice_cell(row: Json) -> str:
    failed = [entry["error"]["code"] for entry in row["seeds"] if "error" in entry]
    cell = units.score(row["dice"], 4)
    if row["dice_range"] and len(row["seeds"]) - len(failed) > 1:
        low, high = (units.score(value, 4) for value in row["dice_range"])
        cell += f" ({low}–{high})"
    if not failed:
        return cell
    reasons = f"failed: {', '.join(sorted(set(failed)))}"
    if len(failed) == len(row["seeds"]):
        return reasons
    return f"{cell}; {len(failed)} of {len(row['seeds'])} {reasons}"


def _significant(value: float | None) -> str:
    return units.MISSING if value is None else f"{value:.2g}"


def _milliseconds(seconds: float | None) -> str:
    return units.MISSING if seconds is None else f"{units.count(1000 * seconds)} ms"


def _legend(comparison: Json) -> list[str]:
    noun = "pseudo-site" if comparison["pseudo_sites"] else "site"
    cases = comparison["validation_cases"]
    seeds = ", ".join(str(seed) for seed in comparison["seeds"])
    several = len(comparison["seeds"]) > 1
    made = (
        f"Made by `{comparison['command']}` with Samaritan {comparison['samaritan']} on "
        f"{comparison['date']}: seed{'s' if several else ''} {seeds}, "
        f"{units.plural(comparison['sites'], noun)}, "
        f"{units.MISSING if cases is None else units.count(cases)} validation cases; "
        f"{'; '.join(comparison['hardware']) or 'hardware unknown'}."
    )
    spread = "the mean over seeds (lowest–highest)" if several else "of one seed"
    meaning = (
        f"Dice and HD95 are {spread}, on the native grid. Bytes are those of whole messages, per "
        "site and round, those for scoring included; a round trip is up and down. Aggregation "
        "error is the distance to the mean of the sites' products; it and the time of aggregation "
        "are means over rounds."
    )
    return [made, "", meaning, *(["", comparison["note"]] if comparison["note"] else [])]


def _failures(rows: Sequence[Json]) -> list[str]:
    failed = [
        f"- {row['variant']}, seed {entry['seed']}: {entry['error']['code']}, "
        f"{' '.join(entry['error']['message'].split())}"
        for row in rows
        for entry in row["seeds"]
        if "error" in entry
    ]
    return ["", "Failed:", "", *failed] if failed else []
