"""What a run promised its patients, and what it has spent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from samaritan.config import Config
from samaritan.errors import PrivacyError
from samaritan.privacy.accounting import Epsilon
from samaritan.privacy.budget import Budget
from samaritan.privacy.statement import section
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
    plans = {site: budget.plan for site, budget in budgets.items()}
    spent = {site: _spent(budget, last_ledger(history, site)) for site, budget in budgets.items()}
    return section(config, plans, spent, parameters)


def _spent(budget: Budget, acknowledged: str) -> Epsilon | None:
    try:
        return budget.spent(acknowledged)
    except PrivacyError:  # rolled back: whatever it says is too little
        return None
