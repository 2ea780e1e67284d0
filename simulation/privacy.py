"""What a run promised its patients, and what it has spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samaritan.config import Config
from samaritan.errors import PrivacyError
from samaritan.privacy.accounting import Epsilon
from samaritan.privacy.budget import Budget
from samaritan.privacy.caveats import warnings_for
from samaritan.privacy.statement import describe
from server.judgement import last_ledger

SERVER = "all sites"
"""Whose budget it is where a site is the unit."""


def privacy_results(
    config: Config,
    budgets: Mapping[str, Budget],
    parameters: int,
    history: Sequence[dict[str, Any]] = (),
) -> dict[str, Any] | None:
    """The section `privacy` of summary.json.

    Args:
        config: Of the run.
        budgets: By site, or one for all sites where the site is the unit.
        parameters: Numbers that are trained.
        history: The rounds, which say where each ledger stood.

    Returns:
        None where the run had no privacy.
    """
    aggregation = {"secure_aggregation": config.federation.secure_aggregation}
    if not budgets:
        return aggregation if config.federation.secure_aggregation else None
    # The weakest of them: what it promises holds at every site.
    plan = max((b.plan for b in budgets.values()), key=lambda p: (p.delta, -p.noise_multiplier))
    return {
        "unit": plan.unit,
        "adjacency": "add or remove one " + plan.unit,
        "mechanism": "Gaussian",
        "sampling": "Poisson" if plan.sampling_rate < 1 else "none",
        "sites": {
            site: _entry(budget, last_ledger(history, site)) for site, budget in budgets.items()
        },
        "scores": config.privacy.scores,
        "statement": describe(plan),
        "warnings": warnings_for(config, plan, parameters),
        **aggregation,
    }


def _entry(budget: Budget, acknowledged: str) -> dict[str, Any]:
    plan = budget.plan
    try:
        spent: Epsilon | None = budget.spent(acknowledged)
    except PrivacyError:  # rolled back: whatever it says is too little
        spent = None
    return {
        "epsilon": spent and spent.pld,
        "epsilon_rdp": spent and spent.rdp,
        "budget": plan.epsilon,
        "delta": plan.delta,
        "records": plan.records,
        "sampling_rate": plan.sampling_rate,
        "noise_multiplier": plan.noise_multiplier,
        "steps_per_round": plan.steps_per_round,
    }
