"""A guarantee in one sentence that leaves nothing out, the same wherever it is told."""

from __future__ import annotations

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


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
