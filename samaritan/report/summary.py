"""Scores as the files of a run hold them: our summary.json and nnU-Net's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from samaritan.config import EvaluationConfig
from samaritan.training.evaluate import CaseScores
from samaritan.training.metrics import EMPTY_RULE, Scores, case_mean, mean

METRICS = ("dice", "hd95_mm", "nsd")


def final_scores(
    results: Sequence[CaseScores], classes: Sequence[str], settings: EvaluationConfig
) -> dict[str, Any]:
    """The `final` part of summary.json.

    Means run over cases of the mean over classes; `dice_per_class` over cases alone. A structure
    that a site does not label is in no mean, and does not make a case an excluded one.
    """
    sites = sorted({r.case.site for r in results})
    return {
        "dice_mean": mean([r.dice for r in results]),
        "dice_per_class": {c: mean([r.scores[c].dice for r in results]) for c in classes},
        "hd95_mm_mean": mean([case_mean(r.scores, "hd95_mm") for r in results]),
        "nsd_mean": mean([case_mean(r.scores, "nsd") for r in results]),
        "dice_per_site": {
            site: mean([r.dice for r in results if r.case.site == site]) for site in sites
        },
        "cases": len(results),
        "excluded_cases": sum(map(_lacks_a_score, results)),
        "unlabelled": {r.case.site: sorted(r.unlabelled) for r in results if r.unlabelled},
        "empty_rule": EMPTY_RULE,
        "nsd_tolerance_mm": settings.nsd_tolerance_mm,
        "oracle_prompts": settings.prompts,
    }


def case_entries(results: Sequence[CaseScores], oracle_prompts: str) -> list[dict[str, Any]]:
    """Every case with its scores, undefined ones as None."""
    return [
        {
            "case_id": r.case.case_id,
            "site": r.case.site,
            "subject_id": r.case.subject_id,
            "scores": {c: {m: _number(s, m) for m in METRICS} for c, s in r.scores.items()},
            "unlabelled": sorted(r.unlabelled),
            "dice_mean": None if math.isnan(r.dice) else r.dice,
            "oracle_prompts": oracle_prompts,
        }
        for r in results
    ]


def nnunet_summary(
    results: Sequence[CaseScores],
    classes: dict[str, int],
    predictions: dict[str, str],
    oracle_prompts: str,
) -> dict[str, Any]:
    """The keys of nnU-Net's summary.json, with HD95 (mm) and NSD beside Dice.

    Args:
        results: Scores of every case.
        classes: Structure name -> label value; nnU-Net names classes by value.
        predictions: Case id -> predicted file, where one was written.
        oracle_prompts: `evaluation.prompts` of the predictions.
    """
    named = {"Dice": "dice", "HD95": "hd95_mm", "NSD": "nsd"}
    per_class = {
        str(value): {
            title: mean([getattr(r.scores[name], m) for r in results]) for title, m in named.items()
        }
        for name, value in classes.items()
    }
    return {
        "metric_per_case": [
            {
                "case_id": r.case.case_id,
                "reference_file": str(r.case.label),
                "unlabelled": sorted(r.unlabelled),
                "prediction_file": predictions.get(r.case.case_id),
                "metrics": {
                    str(value): {title: _number(r.scores[name], m) for title, m in named.items()}
                    for name, value in classes.items()
                },
            }
            for r in results
        ],
        "mean": per_class,
        "foreground_mean": {
            title: mean([case_mean(r.scores, m) for r in results]) for title, m in named.items()
        },
        "classes": classes,
        "empty_rule": EMPTY_RULE,
        "oracle_prompts": oracle_prompts,
    }


def _lacks_a_score(result: CaseScores) -> bool:
    """Whether a structure that was looked for is neither in the label nor in the prediction."""
    return any(
        math.isnan(scores.dice)
        for name, scores in result.scores.items()
        if name not in result.unlabelled
    )


def _number(scores: Scores, metric: str) -> float | None:
    value: float = getattr(scores, metric)
    return None if math.isnan(value) else value
