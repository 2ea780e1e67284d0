"""The final scores of a run: every validation case on its native grid, and pictures of three."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from samaritan.data.datasets import VALIDATION
from samaritan.data.slices import CaseCache, PreparedCase
from samaritan.data.transforms import normalise_intensity
from samaritan.data.volume import read_image
from samaritan.models.adapter import AdaptedModel, AdapterState
from samaritan.report.facts import oracle_mark
from samaritan.report.overlay import draw_overlay
from samaritan.report.summary import case_entries
from samaritan.training.evaluate import CaseScores, evaluate_cases, true_indices
from simulation.outcome import write_json
from simulation.study import Study


def score_run(
    study: Study,
    model: AdaptedModel,
    cache: CaseCache,
    adapters: Mapping[str, AdapterState],
    run_dir: Path,
) -> list[CaseScores]:
    """Scores every validation case; writes cases.json and overlays of worst, median and best.

    Args:
        study: Sites and cases.
        model: Takes the adapters.
        cache: Reads cases.
        adapters: By site; they differ where sites keep a part for themselves.
        run_dir: Receives the files.
    """
    kept: dict[str, tuple[PreparedCase, NDArray[np.uint8]]] = {}

    def keep(prepared: PreparedCase, prediction: NDArray[np.uint8], scores: CaseScores) -> None:
        kept[prepared.case.case_id] = (prepared, prediction)

    results: list[CaseScores] = []
    for site, adapter in adapters.items():
        model.load(adapter)
        results += evaluate_cases(
            model.segmenter,
            cache,
            study.cases(VALIDATION, site),
            study.config.evaluation,
            surfaces=True,
            on_case=keep,
        )
    prompts = study.config.evaluation.prompts
    write_json(run_dir / "cases.json", case_entries(results, prompts))
    ranked = sorted((r for r in results if r.dice == r.dice), key=lambda r: r.dice)
    chosen: dict[str, CaseScores] = {}
    if ranked:
        chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    entries = []
    for rank, result in chosen.items():
        path = run_dir / "overlays" / f"{rank}.png"
        path.parent.mkdir(exist_ok=True)
        title = f"{rank.capitalize()} case{oracle_mark(prompts)}"
        _draw(path, *kept[result.case.case_id], cache, title)
        entries.append(
            {
                "file": f"overlays/{rank}.png",
                "title": title,
                "case_id": result.case.case_id,
                "site": result.case.site,
                "dice": result.dice,
            }
        )
    write_json(run_dir / "overlays.json", entries)
    return results


def _draw(
    path: Path,
    prepared: PreparedCase,
    prediction: NDArray[np.uint8],
    cache: CaseCache,
    title: str,
) -> None:
    case = prepared.case
    image = normalise_intensity(read_image(case.image, case.case_id).array)
    classes = {name: index for index, name in enumerate(cache.classes, 1)}
    draw_overlay(
        path,
        image,
        true_indices(prepared, cache),
        prediction,
        prepared.grid.spacing_mm,
        classes,
        title,
    )
