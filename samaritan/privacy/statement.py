"""A guarantee in one sentence that leaves nothing out, the same wherever it is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from samaritan.config import Config
from samaritan.privacy.accounting import Epsilon
from samaritan.privacy.caveats import warnings_for
from samaritan.privacy.plan import PrivacyPlan

_ONE_RECORD = {
    "patient": "one patient of a site, with all slices and visits there",
    "slice": "one slice, and not all slices of a patient together",
    "site": "all that one site sends",
}


def describe(plan: PrivacyPlan) -> str:
    """Epsilon, delta, unit, adjacency, sampling and mechanism, which mean nothing apart.

    Args:
        plan: Of one site; the sentence says "at most" of its epsilon.
    """
    if plan.unit == "site":
        sampling, where = "no sampling of sites", "at the server, which must be trusted,"
    else:
        sampling = (
            f"Poisson sampling at rate {plan.sampling_rate:g} of {plan.records} published "
            f"{plan.unit}s"
        )
        where = "at the site"
    return (
        f"epsilon at most {plan.epsilon:g} at delta {plan.delta:g} for "
        f"{_ONE_RECORD[plan.unit]} (unit: {plan.unit}; adjacency: one {plan.unit} added or "
        f"removed), with {sampling} and the Gaussian mechanism {where} with noise multiplier "
        f"{plan.noise_multiplier:g} in {_count(plan.steps_per_round, 'step')} of each of "
        f"{_count(plan.rounds, 'round')}."
    )


def section(
    config: Config,
    plans: Mapping[str, PrivacyPlan],
    spent: Mapping[str, Epsilon | None],
    parameters: int,
) -> dict[str, Any] | None:
    """The part `privacy` of summary.json.

    Args:
        config: Of the run.
        plans: What is promised, by site, or once for all sites where the site is the unit.
        spent: Of the budgets, as far as it is known.
        parameters: Numbers that are trained.

    Returns:
        None where the run had no privacy.
    """
    aggregation = {"secure_aggregation": config.federation.secure_aggregation}
    if not plans:
        return aggregation if config.federation.secure_aggregation else None
    # The weakest of them: what it promises holds at every site.
    plan = max(plans.values(), key=lambda p: (p.delta, -p.noise_multiplier))
    return {
        "unit": plan.unit,
        "adjacency": "add or remove one " + plan.unit,
        "mechanism": "Gaussian",
        "sampling": "Poisson" if plan.sampling_rate < 1 else "none",
        "sites": {site: _entry(own, spent.get(site)) for site, own in plans.items()},
        "scores": config.privacy.scores,
        "statement": describe(plan),
        "warnings": warnings_for(config, plan, parameters),
        **aggregation,
    }


def _entry(plan: PrivacyPlan, spent: Epsilon | None) -> dict[str, Any]:
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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
