"""What a guarantee does not give, and what it costs, in words for whoever relies on it."""

from __future__ import annotations

import math
from collections.abc import Iterator

from samaritan.config import Config
from samaritan.privacy.accounting import epsilon_of
from samaritan.privacy.plan import PrivacyPlan

_FORMAL_EPSILON = 8.0
"""Above it, membership inference has been seen to work (arXiv 2604.12737 at 200, not at 10)."""

_FEW_PATIENTS = 300
_SLICES = 40
"""Of a typical patient, for the example in a warning."""


def warnings_for(config: Config, plan: PrivacyPlan, parameters: int) -> list[str]:
    """What to tell before a run with a guarantee begins.

    Args:
        config: Of the run.
        plan: Of one of its sites.
        parameters: Numbers that are trained, and get noise.
    """
    return [*_promises(config, plan), *_noise(config, plan, parameters)]


def noise_to_clip(plan: PrivacyPlan, parameters: int) -> float:
    """Typical norm of the noise on the mean of a step, over the longest that mean can be."""
    return plan.noise_multiplier * math.sqrt(parameters) / plan.expected_records


def _promises(config: Config, plan: PrivacyPlan) -> Iterator[str]:
    if plan.epsilon > _FORMAL_EPSILON:
        yield (
            f"epsilon {plan.epsilon:g} is protection against reconstruction at best, not a "
            f"guarantee about membership; that takes {_FORMAL_EPSILON:g} or less."
        )
    if plan.unit == "slice":
        yield (
            f"The unit is a slice, which says little about patients: for one of {_SLICES} slices, "
            f"group privacy leaves epsilon {_SLICES * plan.epsilon:g}, at a larger delta."
        )
    if config.privacy.scores == "declared":
        yield (
            "Validation scores leave the sites without noise; the guarantee covers training "
            "patients only."
        )
    if config.personal.fine_tune_steps:
        yield (
            "personal.fine_tune_steps trains without noise; the guarantee covers the shared "
            "adapter, not the ones that sites keep."
        )


def _noise(config: Config, plan: PrivacyPlan, parameters: int) -> Iterator[str]:
    if plan.expected_records < 1:
        yield (
            f"A step expects {plan.expected_records:.2g} {plan.unit}s, so that many steps are "
            "noise alone; raise privacy.sampling_rate and take fewer steps."
        )
    if plan.unit == "site" and (ratio := noise_to_clip(plan, parameters)) > 1:
        yield (
            f"With {plan.records} sites, the noise of a round is {ratio:.3g} times as long as the "
            "longest mean update; a site as the unit needs hundreds of sites."
        )
    if plan.unit == "patient" and plan.records <= _FEW_PATIENTS and plan.epsilon <= _FORMAL_EPSILON:
        yield (
            f"With {plan.records} patients, expect a clear loss of Dice at epsilon "
            f"{plan.epsilon:g}; compare with a run without noise before relying on it."
        )
    if config.strategy != "ffa":
        yield (
            f"Strategy {config.strategy} puts noise on both factors of a LoRA, whose product "
            "multiplies it; ffa freezes one of them (arXiv 2403.12313)."
        )
    if config.privacy.noise_multiplier is None:
        return  # it was fitted to the budget
    if (rounds := affordable_rounds(plan)) < plan.rounds:
        yield (
            f"The budget is enough for {rounds} of {plan.rounds} rounds at noise multiplier "
            f"{plan.noise_multiplier:g}."
        )


def affordable_rounds(plan: PrivacyPlan) -> int:
    """How many of the planned rounds stay within the budget."""

    def within(rounds: int) -> bool:
        return epsilon_of([plan.spending(rounds)], plan.delta).pld <= plan.epsilon

    if within(plan.rounds):
        return plan.rounds
    low, high = 0, plan.rounds  # low is within, high is not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if within(middle) else (low, middle)
    return low
