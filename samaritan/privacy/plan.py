"""What a configuration promises: the mechanism of a site, its steps and its budget, all public."""

from __future__ import annotations

import math
from dataclasses import dataclass

from samaritan.config import Config, PrivacyConfig
from samaritan.errors import ConfigError
from samaritan.privacy.accounting import Spending, noise_for
from samaritan.privacy.mechanism import Mechanism

_LARGEST_DELTA = 1e-5


@dataclass(frozen=True)
class PrivacyPlan:
    """The guarantee of one site, computed from public numbers alone.

    Attributes:
        unit: "patient", "slice" or "site".
        records: As published.
        epsilon: Budget.
        delta: Of the guarantee.
        sampling_rate: Poisson; 1 where nothing is sampled.
        noise_multiplier: Of a step.
        steps_per_round: At this site.
        rounds: Planned.
    """

    unit: str
    records: int
    epsilon: float
    delta: float
    sampling_rate: float
    noise_multiplier: float
    steps_per_round: int
    rounds: int

    @property
    def expected_records(self) -> float:
        """Divisor of a step's sum."""
        return self.sampling_rate * self.records

    def mechanism(self, clip_norm: float) -> Mechanism:
        """What a step does."""
        return Mechanism(
            self.sampling_rate, self.noise_multiplier, clip_norm, self.expected_records
        )

    def spending(self, rounds: int = 1) -> Spending:
        """What so many rounds cost."""
        return Spending(self.sampling_rate, self.noise_multiplier, self.steps_per_round * rounds)


def privacy_plan(config: Config, site: str) -> PrivacyPlan:
    """The guarantee a configuration gives the records of a site.

    Raises:
        ConfigError: SAM-C401 when the published number of records of the site is missing.
        PrivacyError: When no noise multiplier keeps the budget.
    """
    privacy = config.privacy
    records = records_of(privacy, site)
    delta = privacy.delta or standard_delta(records)
    rate, steps = privacy.sampling_rate, privacy.steps_per_round
    if privacy.unit == "site":
        rate, steps = 1.0, 1  # every round takes whoever is there: no amplification is claimed
    budget = privacy.epsilon or math.inf  # a configuration without a budget is refused before
    noise = privacy.noise_multiplier or noise_for(budget, delta, rate, steps * config.rounds)
    return PrivacyPlan(privacy.unit, records, budget, delta, rate, noise, steps, config.rounds)


def records_of(privacy: PrivacyConfig, site: str) -> int:
    """The published number of records of a site.

    Raises:
        ConfigError: SAM-C401 when there is none.
    """
    found = privacy.records.get(site) if isinstance(privacy.records, dict) else privacy.records
    if found is None:
        raise ConfigError(
            "SAM-C401",
            f"privacy.records has no number for site {site}",
            "Publish a rounded number of training patients for every site that trains.",
        )
    return found


def standard_delta(records: int) -> float:
    """A tenth of one record's share, and never more than 1e-5."""
    return min(_LARGEST_DELTA, 1 / (10 * records))
