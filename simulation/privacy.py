"""What a run promised its patients, and what it has spent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samaritan.config import Config
from samaritan.privacy.budget import Budget
from samaritan.privacy.caveats import warnings_for
from samaritan.privacy.statement import describe

SERVER = "all sites"
"""Whose budget it is where a site is the unit."""


def privacy_results(
    config: Config, budgets: Mapping[str, Budget], parameters: int
) -> dict[str, Any] | None:
    """The section `privacy` of summary.json.

    Args:
        config: Of the run.
        budgets: By site, or one for all sites where the site is the unit.
        parameters: Numbers that are trained.

    Returns:
        None where the run had no privacy.
    """
    aggregation = {"secure_aggregation": config.federation.secure_aggregation}
    if not budgets:
        return aggregation if config.federation.secure_aggregation else None
    plan = next(iter(budgets.values())).plan
    return {
        "unit": plan.unit,
        "adjacency": "add or remove one " + plan.unit,
        "mechanism": "Gaussian",
        "sampling": "Poisson" if plan.sampling_rate < 1 else "none",
        "sites": {site: _entry(budget) for site, budget in budgets.items()},
        "scores": config.privacy.scores,
        "statement": describe(plan),
        "warnings": warnings_for(config, plan, parameters),
        **aggregation,
    }


def _entry(budget: Budget) -> dict[str, Any]:
    plan, spent = budget.plan, budget.spent()
    return {
        "epsilon": spent.pld,
        "epsilon_rdp": spent.rdp,
        "budget": plan.epsilon,
        "delta": plan.delta,
        "records": plan.records,
        "sampling_rate": plan.sampling_rate,
        "noise_multiplier": plan.noise_multiplier,
        "steps_per_round": plan.steps_per_round,
    }
