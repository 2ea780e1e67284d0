"""The report of a run: one HTML file that needs nothing else.

`write_report` reads the run folder, computes what the page states (`facts`), draws it (`plots`) and
fills `template.html`. Styles, figures and pictures are inline, and the page's own content policy
forbids scripts and network access, so it opens offline, from a mail attachment or in an archive.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from samaritan.files import write_atomically
from samaritan.report import aggregation, facts, plots, privacy, trouble, units
from samaritan.report.folder import Overlay, RunFolder, read_run_folder

Json = dict[str, Any]

REPORT_NAME = "report.html"
LOWEST_CASES = 5
LOWEST_SITES = 10

_HERE = Path(__file__).parent
_EMPTY_RULE = (
    "A class that is absent from both label and prediction of a case carries no score and is left "
    "out of every mean; a class present in only one of them scores Dice 0."
)
_ENGINES = {
    "inprocess": "in-process simulation: all sites in one process on one machine",
    "ray": "Flower's simulation engine (Ray)",
}
_ENVIRONMENT = (
    ("Samaritan", "samaritan"),
    ("Configuration SHA-256", "config_sha256"),
    ("Seed", "seed"),
    ("Strategy", "strategy"),
    ("Base", "base.name"),
    ("Base SHA-256", "base.sha256"),
    ("Base note", "base.note"),
    ("Adapter preset", "peft.preset"),
    ("Adapter rank", "peft.rank"),
    ("Hardware", "cost.hardware"),
)


@dataclass(frozen=True)
class SiteRow:
    """One line of the table of sites; all but the name already as text."""

    name: str
    train_cases: str
    train_subjects: str
    val_cases: str
    dice: str
    hd95_mm: str
    nsd: str
    answered: str


@dataclass(frozen=True)
class ClassRow:
    """One line of the table of classes."""

    name: str
    scored_cases: str
    dice: str
    hd95_mm: str
    nsd: str
    unlabelled: str


@dataclass(frozen=True)
class PersonalRow:
    """One line of the table of fine-tuned adapters."""

    name: str
    federated: str
    fine_tuned: str
    gain: str


@dataclass(frozen=True)
class CaseRow:
    """One line of the table of the lowest cases."""

    case_id: str
    site: str
    dice: str
    hd95_mm: str
    nsd: str


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        run_dir: A folder with ``summary.json`` and, if the run has them, ``config.yaml``,
            ``events.jsonl``, ``cases.json``, ``overlays.json`` and ``overlays/``.

    Returns:
        The path of the report.

    Raises:
        StorageError: If there is no usable summary or the report cannot be written.
    """
    folder = read_run_folder(run_dir)
    page = _template().render(_context(folder, trouble.read_events(run_dir / "events.jsonl")))
    path = run_dir / REPORT_NAME
    write_atomically(path, page.encode("utf-8"))
    return path


@cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": units.score, "signed": units.signed, "count": units.count, "size": units.size,
        "duration": units.duration, "plural": units.plural, "whole": _keep_whole,
        "data_uri": _data_uri, "inline": _inline_plot,
    }  # fmt: skip
    return environment.get_template("template.html")


def _context(folder: RunFolder, events: Sequence[Json]) -> Json:
    summary, cases = folder.summary, folder.cases
    settings = aggregation.read_settings(folder.config_text)
    return {
        "style": Markup(_stylesheet()),  # noqa: S704  our own file
        "missing": units.MISSING,
        "name": folder.name,
        "finished": f"{folder.finished.day} {folder.finished:%B %Y, %H:%M} UTC",
        "problems": folder.problems,
        "byline": _byline(summary),
        **_result_context(summary, cases),
        **_figure_context(summary, cases),
        **_table_context(summary, cases),
        **_aggregation_context(summary, settings),
        **_personal_context(summary, settings),
        **_run_context(folder, events),
        **_privacy_context(summary),
        "overlays": folder.overlays,
        "overlay_captions": [_overlay_caption(overlay) for overlay in folder.overlays],
    }


def _result_context(summary: Json, cases: Sequence[Json]) -> Json:
    return {
        "headline": facts.headline(summary),
        "oracle": facts.oracle_sentence(summary),
        "comparison": facts.comparison_sentence(summary),
        "base": _base_statement(summary),
        "is_tiny": facts.text(summary, "base", "name") == "tiny",
        "key_figures": facts.key_figures(summary, cases),
        "nsd_tolerance": _tolerance(summary),
        "empty_rule": facts.text(summary, "final", "empty_rule") or _EMPTY_RULE,
        "excluded": facts.number(summary, "final", "excluded_cases"),
        "scored": facts.number(summary, "final", "cases"),
    }


def _figure_context(summary: Json, cases: Sequence[Json]) -> Json:
    return {
        "legend": plots.site_legend(summary),
        "median_legend": plots.LegendEntry("median of the round", "--ink", thick=True),
        "mean_legend": plots.LegendEntry("mean of the run", "--ink", thick=True),
        "dice_curves": plots.dice_curves(summary),
        "loss_curves": plots.loss_curves(summary),
        "score_boxes": plots.score_boxes(summary, cases),
        "method_dots": plots.method_dots(summary),
        "gain_by_site": plots.gain_by_site(summary),
        "traffic_bars": plots.traffic_bars(summary),
        "has_round_zero": len(facts.rounds(summary)) > len(facts.training_rounds(summary)),
        "many_sites": len(facts.site_names(summary)) > plots.MAX_NAMED_SITES,
        "is_cut": _is_cut(summary, cases),
        "max_class_rows": plots.MAX_CLASS_ROWS,
        "box_minimum": plots.MIN_CASES_FOR_BOX,
        "max_points": plots.MAX_POINTS,
        "crowded": len(cases) * max(1, len(facts.class_names(summary, cases))) > plots.MAX_POINTS,
    }


def _is_cut(summary: Json, cases: Sequence[Json]) -> bool:
    sites, names = facts.site_names(summary), facts.class_names(summary, cases)
    return len(sites) > plots.MAX_SITE_ROWS or len(names) > plots.MAX_CLASS_ROWS


def _table_context(summary: Json, cases: Sequence[Json]) -> Json:
    methods = facts.methods(summary)
    sites = facts.site_names(summary)
    return {
        "site_rows": [_site_row(summary, cases, site) for site in sites],
        "lowest_sites": [_site_row(summary, cases, site) for site in _lowest_sites(summary)],
        "max_site_rows": plots.MAX_SITE_ROWS,
        "partial_labels": bool(facts.section(summary, "final", "unlabelled")),
        "site_total": _total_row(summary),
        "class_rows": [
            _class_row(summary, cases, name) for name in facts.class_names(summary, cases)
        ],
        "lowest_cases": _lowest_cases(cases),
        "has_cases": bool(cases),
        "methods": methods,
        "has_steps": any(method.steps is not None for method in methods),
        "has_parameters": any(method.parameters is not None for method in methods[1:]),
        "bytes_up": facts.mean_bytes(summary, "bytes_up"),
        "bytes_down": facts.mean_bytes(summary, "bytes_down"),
        "total_up": facts.number(summary, "cost", "bytes_up"),
        "total_down": facts.number(summary, "cost", "bytes_down"),
        "overhead": facts.number(summary, "cost", "overhead_seconds_per_round"),
    }


def _aggregation_context(summary: Json, settings: Json) -> Json:
    return {
        "cautions": [
            sentence
            for sentence in (
                aggregation.selection_sentence(summary, settings),
                *aggregation.long_update_sentences(summary),
            )
            if sentence
        ],
        "strategy_rows": aggregation.strategy_rows(summary, settings),
        "norm_curves": plots.norm_curves(summary),
        "error_curve": plots.error_curve(summary),
        "error_sentence": privacy.unknown_error(summary)
        or aggregation.error_sentence(summary, settings),
        "seconds_sentence": aggregation.seconds_sentence(summary),
        "long_update": aggregation.LONG_UPDATE,
    }


def _personal_context(summary: Json, settings: Json) -> Json:
    personal = facts.section(summary, "personal")
    parts = personal.get("parts")
    return {
        "personal_tensors": len(parts) if isinstance(parts, list) else 0,
        "personal_kinds": aggregation.personal_kinds(summary, settings),
        "fine_tune_steps": facts.number(personal, "fine_tune_steps") or 0,
        "personal_rows": [
            _personal_row(summary, site) for site in facts.section(personal, "dice_per_site")
        ],
        "personal_total": PersonalRow(
            "All sites",
            *_beside(
                facts.number(summary, "final", "dice_mean"), facts.number(personal, "dice_mean")
            ),
        ),
    }


def _run_context(folder: RunFolder, events: Sequence[Json]) -> Json:
    summary = folder.summary
    return {
        "troubles": trouble.troubles(summary, events),
        "has_events": bool(events),
        "silent_entries": trouble.silent_entries(summary),
        "trained_rounds": len(facts.training_rounds(summary)),
        "config_text": folder.config_text,
        "environment": _environment(summary),
    }


def _privacy_context(summary: Json) -> Json:
    data = facts.section(summary, "data")
    simulated = facts.text(summary, "engine") in _ENGINES
    return {
        "simulated": simulated,
        "guarantee": privacy.statement(summary),
        "privacy_overview": privacy.overview(summary),
        "budget_owners": privacy.owners(summary),
        "spending_rows": privacy.spending_rows(summary),
        "privacy_remarks": privacy.remarks(summary, simulated),
        "privacy_warnings": privacy.warnings(summary),
        "handed_over": privacy.handed_over(summary),
        "privacy_bound": privacy.bound(summary),
        "missing_dice": privacy.missing_dice(summary),
        "missing_loss": privacy.missing_loss(summary),
        "pseudo_sites": data.get("pseudo_sites") is True,
        "data_name": facts.text(data, "name"),
        "data_note": facts.text(data, "note"),
    }


def _stylesheet() -> str:
    return (_HERE / "report.css").read_text(encoding="utf-8")


def _byline(summary: Json) -> list[str]:
    preset, rank = facts.text(summary, "peft", "preset"), facts.text(summary, "peft", "rank")
    seed = facts.text(summary, "seed")
    parts = (
        facts.text(summary, "data", "name"),
        f"adapter {preset}{f', rank {rank}' if rank else ''}" if preset else "",
        f"strategy {facts.text(summary, 'strategy')}" if summary.get("strategy") else "",
        f"seed {seed}" if seed else "",
    )
    return [part for part in parts if part]


def _base_statement(summary: Json) -> str:
    name = facts.text(summary, "base", "name")
    parameters = facts.number(summary, "base", "parameters")
    size = "" if parameters is None else f" ({units.count(parameters)} parameters)"
    if name == "tiny":
        return (
            f"The base of this run is “tiny”{size}: a randomly initialised miniature of SAM that "
            "exercises the method and is no foundation model. Its scores say nothing about what "
            "SAM reaches on these images."
        )
    if not name:
        return "The summary does not name the frozen base."
    return f"The frozen base is {name}{size}; only the adapter was trained and exchanged."


def _tolerance(summary: Json) -> str:
    tolerance = facts.number(summary, "final", "nsd_tolerance_mm")
    return "" if tolerance is None else f"{tolerance:g} mm"


def _site_row(summary: Json, cases: Sequence[Json], site: str) -> SiteRow:
    entry = facts.section(summary, "sites", site)
    own = facts.cases_of(cases, site)
    dice = facts.number(summary, "final", "dice_per_site", site)
    unscored = units.NOT_LABELLED if facts.labels_nothing(summary, site) else ""
    good, asked = facts.answers(summary, site)
    return SiteRow(
        name=site,
        train_cases=units.count(facts.number(entry, "train_cases")),
        train_subjects=units.count(facts.number(entry, "train_subjects")),
        val_cases=units.count(facts.number(entry, "val_cases")),
        dice=unscored or units.score(dice),
        hd95_mm=unscored or units.millimetres(facts.mean(facts.case_values(own, "hd95_mm"))),
        nsd=unscored or units.score(facts.mean(facts.case_values(own, "nsd"))),
        answered=f"{good} / {asked}" if asked else "not asked",
    )


def _lowest_sites(summary: Json) -> list[str]:
    """The sites with the lowest Dice, of more than a table holds; otherwise none."""
    dice = facts.numbers(facts.section(summary, "final", "dice_per_site"))
    if len(facts.site_names(summary)) <= plots.MAX_SITE_ROWS:
        return []
    return sorted(dice, key=dice.__getitem__)[:LOWEST_SITES]


def _personal_row(summary: Json, site: str) -> PersonalRow:
    if facts.labels_nothing(summary, site):
        return PersonalRow(site, units.NOT_LABELLED, units.NOT_LABELLED, "")
    return PersonalRow(
        site,
        *_beside(
            facts.number(summary, "final", "dice_per_site", site),
            facts.number(summary, "personal", "dice_per_site", site),
        ),
    )


def _beside(federated: float | None, fine_tuned: float | None) -> tuple[str, str, str]:
    gain = None if federated is None or fine_tuned is None else fine_tuned - federated
    return units.score(federated), units.score(fine_tuned), units.signed(gain)


def _total_row(summary: Json) -> SiteRow:
    final = facts.section(summary, "final")
    answers = [facts.answers(summary, site) for site in facts.site_names(summary)]
    good, asked = (sum(column) for column in zip(*answers, strict=True)) if answers else (0, 0)
    return SiteRow(
        name="All sites",
        train_cases=_site_sum(summary, "train_cases"),
        train_subjects=_site_sum(summary, "train_subjects"),
        val_cases=_site_sum(summary, "val_cases"),
        dice=units.score(facts.number(final, "dice_mean")),
        hd95_mm=units.millimetres(facts.number(final, "hd95_mm_mean")),
        nsd=units.score(facts.number(final, "nsd_mean")),
        answered=f"{good} / {asked}" if asked else units.MISSING,
    )


def _site_sum(summary: Json, key: str) -> str:
    sites = facts.section(summary, "sites")
    known = [facts.number(sites, site, key) for site in sites]
    counts = [value for value in known if value is not None]
    return units.count(sum(counts)) if counts else units.MISSING


def _class_row(summary: Json, cases: Sequence[Json], name: str) -> ClassRow:
    values = facts.class_values(cases, name)
    dice = facts.number(summary, "final", "dice_per_class", name)
    unlabelled = facts.unlabelled(summary, name)
    everywhere = set(unlabelled) >= set(facts.section(summary, "final", "dice_per_site"))
    unscored = units.NOT_LABELLED if unlabelled and everywhere else ""
    return ClassRow(
        name=name,
        scored_cases=units.count(len(values)) if cases else units.MISSING,
        dice=unscored or units.score(dice if dice is not None else facts.mean(values)),
        hd95_mm=unscored
        or units.millimetres(facts.mean(facts.class_values(cases, name, "hd95_mm"))),
        nsd=unscored or units.score(facts.mean(facts.class_values(cases, name, "nsd"))),
        unlabelled=units.names(unlabelled) or units.MISSING,
    )


def _lowest_cases(cases: Sequence[Json]) -> list[CaseRow]:
    scored = [
        (dice, case) for case in cases if (dice := facts.case_metric(case, "dice")) is not None
    ]
    ordered = sorted(scored, key=lambda entry: entry[0])[:LOWEST_CASES]
    return [
        CaseRow(
            case_id=facts.text(case, "case_id") or units.MISSING,
            site=facts.text(case, "site") or units.MISSING,
            dice=units.score(dice),
            hd95_mm=units.millimetres(facts.case_metric(case, "hd95_mm")),
            nsd=units.score(facts.case_metric(case, "nsd")),
        )
        for dice, case in ordered
    ]


def _environment(summary: Json) -> list[tuple[str, str]]:
    engine = facts.text(summary, "engine")
    rows = [("Engine", _ENGINES.get(engine, engine))]
    rows += [(label, facts.text(summary, *path.split("."))) for label, path in _ENVIRONMENT]
    rows += facts.flatten(facts.section(summary, "environment"))
    return [(label, value) for label, value in rows if value]


def _overlay_caption(overlay: Overlay) -> str:
    parts = [
        f"case {overlay.case_id}" if overlay.case_id else "",
        f"site {overlay.site}" if overlay.site else "",
        f"mean Dice {units.score(overlay.dice)}" if overlay.dice is not None else "",
    ]
    known = ", ".join(part for part in parts if part)
    return f"{overlay.title}: {known}." if known else f"{overlay.title}."


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _keep_whole(text: str) -> Markup:
    """Never break a line inside ``3-D``."""
    return escape(text).replace("3-D", Markup('<span class="nobr">3-D</span>'))


def _inline_plot(plot: plots.Plot) -> Markup:
    return Markup(plot.svg)  # noqa: S704  drawn by plots, which escapes every name
