"""What is claimed, and is to be contradicted: a mechanism, its steps, the accountant's epsilon."""

from __future__ import annotations

from dataclasses import dataclass

from samaritan.config import Config
from samaritan.errors import PrivacyError
from samaritan.privacy.accounting import Spending, epsilon_of, noise_for
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.plan import privacy_plan

_RECORDS = 1000
_SLICES = 8


@dataclass(frozen=True)
class Claim:
    """A guarantee as it is written in a report.

    Attributes:
        epsilon: Upper bound, of the accountant that is reported.
        delta: Of the guarantee.
        unit: "patient", "slice" or "site".
        slices: Of each record, mean of which its vector is; 1 unless the unit is the patient.
        steps: In all rounds together.
        mechanism: Of one step.
    """

    epsilon: float
    delta: float
    unit: str
    slices: int
    steps: int
    mechanism: Mechanism


def claim_of_budget(
    epsilon: float = 2.0, delta: float = 1e-5, sampling_rate: float = 0.05, steps: int = 400
) -> Claim:
    """The claim of patients under noise that is just enough for a budget.

    Raises:
        PrivacyError: When no noise is enough.
    """
    noise = noise_for(epsilon, delta, sampling_rate, steps)
    mechanism = Mechanism(sampling_rate, noise, 1.0, sampling_rate * _RECORDS)
    spent = epsilon_of([Spending(sampling_rate, noise, steps)], delta)
    return Claim(spent.pld, delta, "patient", _SLICES, steps, mechanism)


def claim_of_config(config: Config) -> Claim:
    """The claim of a configuration after all its rounds, at the site of the smallest delta.

    Raises:
        PrivacyError: SAM-P401 when it claims nothing.
    """
    privacy = config.privacy
    if privacy.unit == "none" or privacy.records is None:
        raise PrivacyError(
            "SAM-P401",
            f"there is nothing to audit: privacy.unit is {privacy.unit}, privacy.records "
            f"{'missing' if privacy.records is None else 'given'}",
            "Configure a unit and published records, or leave --config out.",
        )
    published = privacy.records if isinstance(privacy.records, dict) else {"": privacy.records}
    site = max(published, key=lambda name: published[name])
    plan = privacy_plan(config, site)
    spent = plan.spending(config.rounds)
    return Claim(
        epsilon_of([spent], plan.delta).pld,
        plan.delta,
        plan.unit,
        privacy.slices_per_patient if plan.unit == "patient" else 1,
        spent.steps,
        Mechanism(
            plan.sampling_rate, plan.noise_multiplier, privacy.clip_norm, plan.expected_records
        ),
    )
