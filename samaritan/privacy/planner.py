"""What a guarantee will cost, before anything is spent: noise, and what is left of the signal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from samaritan.config import Config
from samaritan.privacy.accounting import Epsilon, epsilon_of
from samaritan.privacy.caveats import noise_to_clip
from samaritan.privacy.plan import PrivacyPlan, privacy_plan

_EPSILONS = (1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Outlook:
    """What to expect of a plan. Both ratios are of noise to the longest possible signal.

    Attributes:
        plan: Of one site.
        noise_of_step: Norm of the noise on the mean gradient of a step, over the clipping norm.
        noise_of_run: The same of the sum of all steps, averaged over the sites: what is left of the
            noise if the gradients of all steps and sites point one way.
    """

    plan: PrivacyPlan
    noise_of_step: float
    noise_of_run: float

    def epsilon(self) -> Epsilon:
        """By both accountants, of all rounds."""
        return epsilon_of([self.plan.spending(self.plan.rounds)], self.plan.delta)


def outlook(config: Config, parameters: int, sites: int) -> Outlook:
    """What to expect of a configuration.

    Args:
        config: Its privacy section, with one number as `records`, and its rounds.
        parameters: Numbers that are trained, and get noise.
        sites: That are averaged; each adds noise of its own, unless the server adds it for all.

    Raises:
        PrivacyError: When no noise multiplier keeps the budget.
    """
    plan = privacy_plan(config, "each")
    step = noise_to_clip(plan, parameters)
    independent = plan.steps_per_round * plan.rounds * (1 if plan.unit == "site" else sites)
    return Outlook(plan, step, step / math.sqrt(independent))


def alternatives(config: Config, parameters: int, sites: int) -> Iterator[Outlook]:
    """The same with other budgets, with twice the rounds, and with twice the rate of sampling."""
    privacy = config.privacy
    others: list[dict[str, Any]] = [
        {"privacy": privacy.model_copy(update={"epsilon": epsilon})}
        for epsilon in _EPSILONS
        if epsilon != privacy.epsilon
    ]
    others.append({"rounds": 2 * config.rounds})
    if privacy.unit != "site" and privacy.sampling_rate <= 0.5:
        twice = {"sampling_rate": 2 * privacy.sampling_rate}
        others.append({"privacy": privacy.model_copy(update=twice)})
    for changed in others:
        yield outlook(config.model_copy(update=changed), parameters, sites)
