"""summary.json and report.html of a deployment, from what the server knows: it saw no image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from samaritan import __version__
from samaritan.files import write_atomically
from samaritan.models.adapter import AdaptedModel, card_of
from samaritan.plan import Plan
from samaritan.privacy.accounting import epsilon_of
from samaritan.privacy.plan import PrivacyPlan, privacy_plan
from samaritan.privacy.statement import section
from samaritan.report.html import write_report
from samaritan.training.metrics import EMPTY_RULE
from server.checkpoints import Checkpoint
from server.history import published

ENGINE = "deployment"
"""What summary.json calls a run over real sites."""


def write_outcome(run_dir: Path, plan: Plan, model: AdaptedModel, state: Checkpoint) -> None:
    """Writes summary.json, then report.html.

    Raises:
        StorageError: When the disk is full.
    """
    text = json.dumps(summary(plan, model, state), indent=1, allow_nan=False) + "\n"
    write_atomically(run_dir / "summary.json", text.encode())
    write_report(run_dir)


def summary(plan: Plan, model: AdaptedModel, state: Checkpoint) -> dict[str, Any]:
    """What is known at the server.

    Scores are those that the sites told of the adapter that was kept; HD95 and NSD are told in the
    last round alone. Scores by structure and by case stay at the sites.
    """
    config = plan.config
    told = [entry for site in state.history for entry in site["sites"].values()]
    return {
        "samaritan": __version__,
        "name": config.name,
        "study": plan.study,
        "plan_sha256": plan.sha256,
        "config_sha256": plan.config_sha256,
        "seed": config.seed,
        "engine": ENGINE,
        "base": card_of(model.base),
        "peft": {
            "preset": config.peft.preset,
            "rank": config.peft.rank,
            "trainable_parameters": model.parameters(),
        },
        "strategy": config.strategy,
        "data": {
            "classes": config.data.classes,
            "pseudo_sites": config.data.pseudo_sites,
            "note": config.data.note,
        },
        "sites": {
            site: {"train_cases": _examples(state, site), "val_cases": None, "train_subjects": None}
            for site in sorted(plan.sites)
        },
        "rounds": [published(entry, config) for entry in state.history],
        "adapter_of_round": state.server_round,
        "final": _final(plan, state),
        "baselines": None,
        "gain": None,
        "personal": None,
        "cost": {
            "wall_seconds": round(sum(entry["seconds"] for entry in state.history), 1),
            "peak_rss_bytes": None,
            "bytes_up": sum(entry["bytes_up"] for entry in told),
            "bytes_down": sum(entry["bytes_down"] for entry in told),
            "frozen_base_copies": len(plan.sites),
            "steps": sum(entry["steps"] or 0 for entry in told),
        },
        "privacy": _privacy(plan, model, state),
    }


def _privacy(plan: Plan, model: AdaptedModel, state: Checkpoint) -> dict[str, Any] | None:
    """What the plan promises, and what the rounds cost by it at most; ledgers are at the sites."""
    config = plan.config
    plans: dict[str, PrivacyPlan] = {}
    rounds: dict[str, int] = {}
    if config.privacy.unit == "site":
        plans = {"all sites": privacy_plan(config, "")}
        rounds = {"all sites": len(state.history)}
    elif config.privacy.unit != "none":
        plans = {site: privacy_plan(config, site) for site in plan.training_sites}
        rounds = {s: sum(s in entry["sites"] for entry in state.history) for s in plans}
    spent = {
        site: epsilon_of([own.spending(rounds[site])], own.delta) if rounds[site] else None
        for site, own in plans.items()
    }
    return section(config, plans, spent, model.parameters())


def _examples(state: Checkpoint, site: str) -> int | None:
    """Training cases a site last told of; None where it told nothing, or a published number."""
    for entry in reversed(state.history):
        if found := entry["sites"].get(site, {}).get("num_examples"):
            return int(found)
    return None


def _final(plan: Plan, state: Checkpoint) -> dict[str, Any]:
    kept = [entry for entry in state.history if entry["round"] == state.server_round]
    sites = kept[-1]["sites"] if kept else {}
    cases = [int(told["num_cases"]) for told in sites.values() if told.get("num_cases")]
    return {
        "dice_mean": kept[-1]["dice_mean"] if kept else None,
        "dice_per_class": {},
        "hd95_mm_mean": _mean_over_cases(sites, "hd95_mm"),
        "nsd_mean": _mean_over_cases(sites, "nsd"),
        "dice_per_site": {
            site: told["dice"] for site, told in sites.items() if told["dice"] is not None
        },
        "cases": sum(cases) or None,
        "excluded_cases": None,
        "unlabelled": {},
        "empty_rule": EMPTY_RULE,
        "nsd_tolerance_mm": plan.config.evaluation.nsd_tolerance_mm,
        "oracle_prompts": plan.config.evaluation.prompts,
    }


def _mean_over_cases(sites: dict[str, Any], metric: str) -> float | None:
    told = [(site[metric], site["num_cases"]) for site in sites.values() if metric in site]
    cases = sum(count for _, count in told)
    return sum(value * count for value, count in told) / cases if cases else None
