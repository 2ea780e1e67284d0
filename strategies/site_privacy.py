"""A site as the unit of differential privacy: the server clips whole updates and adds the noise.

DP-FedAvg with fixed weights and a fixed divisor (McMahan et al., arXiv 1710.06963). The server sees
every update and must be trusted; what it publishes hides each site. The mean is over the published
number of sites, so that a site that did not answer counts as an update of zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor

from samaritan.models.adapter import AdapterState
from samaritan.models.vectors import flat, length, unflat
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.plan import PrivacyPlan
from samaritan.privacy.randomness import SystemRandom
from samaritan.shares import shares
from strategies.update import Rule, Situation, Update


def private_rule(plan: PrivacyPlan, clip_norm: float, random: SystemRandom) -> Rule:
    """Takes the place of the rule of `fedavg` and `ffa`, which add no more than a mean.

    Unlike these it answers with noise alone when there was no update: that nobody answered must not
    show either.

    Args:
        plan: With unit "site"; its records are the sites that train.
        clip_norm: Longest update of a site, over all its tensors.
        random: For the noise.
    """
    mechanism = Mechanism(
        plan.sampling_rate, plan.noise_multiplier, clip_norm, plan.expected_records
    )

    def rule(updates: Iterable[Update], situation: Situation) -> AdapterState:
        sent = shares(situation.config, situation.adapter, situation.server_round).sent
        shapes = {name: tuple(situation.adapter[name].shape) for name in sent}
        return private_mean(updates, shapes, mechanism, random)

    return rule


def private_mean(
    updates: Iterable[Update],
    shapes: Mapping[str, tuple[int, ...]],
    mechanism: Mechanism,
    random: SystemRandom,
) -> AdapterState:
    """The noisy mean of the updates of a round, each clipped as one vector over all tensors.

    Args:
        updates: One is in memory at a time. All count alike, whatever their weights; where a site
            has no say (`Update.counts`) it says zero; one that is not finite is zero; of two
            updates under one name the first counts.
        shapes: Of every tensor that sites send, by name, whether or not anybody sent it.
        mechanism: Its `expected_records` is the divisor.
        random: For the noise.

    Returns:
        The mean, float32, with noise in every number.
    """
    mean = mechanism.release(map(_vector, _once_each(updates)), length(shapes), random)
    return unflat(mean, shapes)


def _once_each(updates: Iterable[Update]) -> Iterator[Update]:
    """A site that got in twice would be twice as visible as the noise allows."""
    seen: set[str] = set()
    for update in updates:
        if update.site not in seen:
            seen.add(update.site)
            yield update


def _vector(update: Update) -> Tensor:
    """(size,): all tensors of an update behind each other."""
    return flat({name: v * update.counts.get(name, 1) for name, v in update.delta.items()})
