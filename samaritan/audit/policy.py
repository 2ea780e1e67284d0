"""A hospital's own rules, in its site.yaml: they always win over the server and over any plan."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field, field_validator

from samaritan.audit.hours import Hours
from samaritan.config import Config, Section
from samaritan.errors import AuditError
from samaritan.plan import Plan

Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SitePolicy(Section):
    """What a hospital allows. The defaults allow no plan of fewer than three hospitals."""

    strategies: tuple[str, ...] | None = None
    """Strategies that may combine this site's updates; any when left out."""
    min_cohort: int = Field(default=3, ge=1)
    """Least number of sites a plan must need in every round (its `federation.min_sites`)."""
    max_rounds: int | None = Field(default=None, ge=1)
    """Most rounds of a plan."""
    require_privacy: Literal["none", "patient", "slice"] = "none"
    """The unit of differential privacy a plan must have, at least."""
    max_epsilon: float | None = Field(default=None, gt=0)
    """Largest budget of a plan, where it has differential privacy."""
    require_secure_aggregation: bool = False
    """Whether the server must never see this site's update by itself."""
    max_message_mb: float = Field(default=64, gt=0)
    """Largest answer, in millions of bytes."""
    tensors: tuple[str, ...] = ("*",)
    """Names of tensors that may leave, with * and ?; the plan's adapter has no others anyway."""
    numbers: tuple[Literal["fp32", "fp16", "bf16", "int8", "int4"], ...] | None = None
    """Number formats in which updates may leave; any when left out."""
    metrics: tuple[str, ...] | None = None
    """Numbers that may leave beside an update, such as num-examples, train-loss or dice; those a
    plan needs when left out."""
    hours: tuple[str, ...] = ()
    """When the site works for a study, such as "Mon-Fri 19:00-06:00", in this machine's local time;
    always when left out."""
    dry_run: bool = False
    """Do all of the work and log what would leave, but let nothing out."""
    approvers: dict[str, Key] = Field(default_factory=dict)
    """Public key of each role that must approve a plan; the site's own key when left out."""

    @field_validator("hours")
    @classmethod
    def _readable(cls, hours: tuple[str, ...]) -> tuple[str, ...]:
        Hours(hours)
        return hours

    def opening(self) -> Hours:
        """The hours, read."""
        return Hours(self.hours)


_STRICTNESS = {"none": 0, "site": 0, "slice": 1, "patient": 2}
"""How well a unit protects a patient of one hospital against everybody else, the server too."""


def require_agreement(policy: SitePolicy, plan: Plan, tensors: tuple[str, ...]) -> None:
    """Refuses a plan that asks for more than a hospital allows; all reasons at once.

    Args:
        policy: Of the hospital.
        plan: Signed, of a study.
        tensors: Names of all that an update of the plan may hold.

    Raises:
        AuditError: SAM-A201.
    """
    config, privacy = plan.config, plan.config.privacy
    faults = []
    if policy.strategies is not None and config.strategy not in policy.strategies:
        faults.append(f"its strategy is {config.strategy}, policy.strategies has it not")
    needed = config.federation.min_sites or 1
    if needed < policy.min_cohort:
        faults.append(f"a round needs {needed} sites, policy.min_cohort is {policy.min_cohort}")
    if len(plan.training_sites) < policy.min_cohort:
        faults.append(
            f"{len(plan.training_sites)} sites train, policy.min_cohort is {policy.min_cohort}"
        )
    if policy.max_rounds is not None and config.rounds > policy.max_rounds:
        faults.append(f"it has {config.rounds} rounds, policy.max_rounds is {policy.max_rounds}")
    if _STRICTNESS[privacy.unit] < _STRICTNESS[policy.require_privacy]:
        faults.append(
            f"its privacy.unit is {privacy.unit}, policy.require_privacy is "
            f"{policy.require_privacy}"
        )
    if policy.max_epsilon is not None and privacy.unit != "none":
        # Without a budget of its own, a plan may spend any.
        asked = privacy.epsilon
        if asked is None or asked > policy.max_epsilon:
            faults.append(
                f"its privacy.epsilon is {asked}, policy.max_epsilon is {policy.max_epsilon:g}"
            )
    if policy.require_secure_aggregation and not config.federation.secure_aggregation:
        faults.append("it has no secure aggregation, which the policy requires")
    formats = config.wire.up.numbers
    if policy.numbers is not None and formats not in policy.numbers:
        faults.append(f"updates leave as {formats}, policy.numbers has it not")
    if barred := [name for name in tensors if not allows_tensor(policy, name)]:
        more = f" and {len(barred) - 1} more" if len(barred) > 1 else ""
        faults.append(f"it sends the tensor {barred[0]}{more}, policy.tensors has it not")
    if policy.metrics is not None:
        told = {name for kind in ("train", "evaluate") for name in numbers_told(config, kind)}
        if untold := sorted(told.difference(policy.metrics)):
            faults.append(f"its answers hold {', '.join(untold)}, policy.metrics has them not")
    if faults:
        raise AuditError(
            "SAM-A201",
            f"the policy of this site does not allow study {plan.study}:\n"
            + "\n".join(f"  - {fault}" for fault in faults),
            "Ask the coordinator for another plan, or change site.yaml if the hospital decides so.",
        )


def numbers_told(config: Config, kind: str) -> tuple[str, ...]:
    """Names of the numbers in an answer of a kind, by the configuration of a plan."""
    from samaritan.shares import noisy_sites, tells_scores  # torch, which settings do without

    if kind == "evaluate":
        told = ("dice", "num-cases", "seconds", "hd95-mm", "nsd")  # the last two of the last round
        return told if tells_scores(config) else ()
    if kind != "train":
        return ()
    if noisy_sites(config):
        return ("num-examples", "steps")
    return ("num-examples", "train-loss", "steps", "seconds")


def allows_tensor(policy: SitePolicy, name: str) -> bool:
    """Whether a tensor of that name may leave."""
    return any(fnmatchcase(name, pattern) for pattern in policy.tensors)
