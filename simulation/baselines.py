"""What federating is compared with: each site alone, and all data in one place.

Every baseline gets the optimiser steps the federation took at the same sites: a site alone its own,
the pooled model the sum. The U-Net gets the wall time of the pooled model instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from samaritan.config import Config
from samaritan.data.datasets import TRAIN, VALIDATION, Case
from samaritan.data.slices import CaseCache
from samaritan.models.adapter import AdaptedModel, AdapterState
from samaritan.training.evaluate import CaseScores, evaluate_cases, mean_dice
from samaritan.training.local import Schedule, round_seed, train_locally
from samaritan.training.metrics import mean
from simulation.study import Study
from simulation.unet import train_unet

Note = Callable[[str], None]


def run_baselines(
    study: Study,
    model: AdaptedModel,
    cache: CaseCache,
    initial: AdapterState,
    steps: Mapping[str, int],
    note: Note,
) -> dict[str, Any]:
    """Trains and scores every baseline.

    Args:
        study: Sites and cases.
        model: The shared model; its adapter is replaced.
        cache: The shared cache.
        initial: The adapter all start from.
        steps: Optimiser steps the federation took at each site.
        note: Told what is being done.

    Returns:
        `local_only`, `centralised` and `unet` as summary.json holds them.
    """
    local = _local_only(study, model, cache, initial, steps, note)
    total = sum(steps.values())
    note(f"baseline: local-only Dice {_text(local['dice_mean'])}")
    note(f"baseline: all sites pooled, {total} steps")
    begun = time.monotonic()
    scores = _train_and_score(study, model, cache, initial, study.cases(TRAIN), "pooled", total)
    seconds = time.monotonic() - begun
    prompts = study.config.evaluation.prompts
    pooled = _entry(scores, prompts) | {"steps": total, "seconds": round(seconds, 1)}
    note(f"baseline: pooled Dice {_text(pooled['dice_mean'])}; U-Net on all data, {seconds:.0f} s")
    unet, parameters, unet_steps = train_unet(
        cache,
        study.cases(TRAIN),
        study.cases(VALIDATION),
        study.config.evaluation,
        flip=study.config.training.flip,
        seconds=seconds,
        seed=study.config.seed,
    )
    return {
        "local_only": local,
        "centralised": pooled,
        "unet": _entry(unet, "none")
        | {
            "parameters": parameters,
            "steps": unet_steps,
            "seconds": round(seconds, 1),
            "note": "MONAI 3-D U-Net trained from scratch on all data, given the wall time of the "
            "pooled model" + _promptless(study.config),
        },
        "note": "Local-only and pooled models take the optimiser steps the federation took at the "
        "same sites. A local-only model is scored on its own site's validation cases; "
        "`dice_on_all_sites` is its score on everyone's.",
    }


def _local_only(
    study: Study,
    model: AdaptedModel,
    cache: CaseCache,
    initial: AdapterState,
    steps: Mapping[str, int],
    note: Note,
) -> dict[str, Any]:
    own: list[CaseScores] = []
    everywhere: dict[str, float | None] = {}
    begun = time.monotonic()
    for site in study.training_sites:
        note(f"baseline: {site} alone, {steps[site]} steps")
        scores = _train_and_score(
            study, model, cache, initial, study.cases(TRAIN, site), f"local/{site}", steps[site]
        )
        own += [s for s in scores if s.case.site == site]
        everywhere[site] = mean_dice(scores)
    return _entry(own, study.config.evaluation.prompts) | {
        "dice_on_all_sites": everywhere,
        "dice_on_all_sites_mean": mean([v for v in everywhere.values() if v is not None]),
        "steps": dict(steps),
        "seconds": round(time.monotonic() - begun, 1),
    }


def _train_and_score(
    study: Study,
    model: AdaptedModel,
    cache: CaseCache,
    initial: AdapterState,
    cases: Sequence[Case],
    name: str,
    steps: int,
) -> list[CaseScores]:
    model.load(initial)
    train_locally(
        model,
        cache,
        cases,
        # There is no adapter of others to stay near to.
        study.config.training.model_copy(update={"proximal_mu": 0.0}),
        schedule=Schedule(0.0, 1.0),
        seed=round_seed(study.config.seed, 0, name),
        steps=steps,
    )
    return evaluate_cases(model.segmenter, cache, study.cases(VALIDATION), study.config.evaluation)


def _promptless(config: Config) -> str:
    used = {config.training.prompts, config.evaluation.prompts} != {"none"}
    return "; it takes no prompts, neither in training nor for its scores" if used else ""


def _entry(scores: Sequence[CaseScores], oracle_prompts: str) -> dict[str, Any]:
    sites = sorted({s.case.site for s in scores})
    return {
        "dice_mean": mean_dice(scores),
        "oracle_prompts": oracle_prompts,
        "dice_per_site": {
            site: mean_dice([s for s in scores if s.case.site == site]) for site in sites
        },
    }


def _text(dice: float | None) -> str:
    return "undefined" if dice is None else f"{dice:.4f}"
