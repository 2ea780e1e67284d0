"""Rules that withstand some wrong sites: median, trimmed mean, Krum and multi-Krum.

They are written out here, and tested against Flower's, because Flower 1.41 takes Krum's distances
from a float32 Gram matrix (squared distances of updates that are much alike come out below zero)
and has no room for sites that do not label everything. All of them hold the updates of a round in
memory, and ignore the weights, which rest on what a site says of itself.

Shapes: N sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from samaritan.errors import FederationError
from samaritan.models.adapter import AdapterState
from strategies.fedavg import fedavg
from strategies.update import Situation, Update


def median(updates: Iterable[Update], situation: Situation) -> AdapterState:
    """The median of each number over the sites (Yin et al., arXiv 1803.01498).

    Sites without a say in a number are left out of it. Of an even number of sites the two in the
    middle are averaged.

    Args:
        updates: Of equal names and shapes; finite.
        situation: For `federation.byzantine_sites`.

    Returns:
        The median, float32; empty when there was no update.

    Raises:
        FederationError: When fewer than `minimum_sites` have a say in a number.
    """
    return _inner_means("median", updates, situation, lambda number: (number - 1) // 2)


def trimmed_mean(updates: Iterable[Update], situation: Situation) -> AdapterState:
    """The mean of each number without its extremes (Yin et al., arXiv 1803.01498).

    As many of the largest and of the smallest values are dropped as there may be wrong sites. Sites
    without a say in a number are left out of it.

    Args:
        updates: Of equal names and shapes; finite.
        situation: For `federation.byzantine_sites`.

    Returns:
        The mean, float32, summed in float64; empty when there was no update.

    Raises:
        FederationError: When fewer than `minimum_sites` have a say in a number.
    """
    wrong = situation.config.federation.byzantine_sites
    return _inner_means("trimmed-mean", updates, situation, lambda number: torch.tensor(wrong))


def krum(updates: Iterable[Update], situation: Situation) -> AdapterState:
    """The update of the one site that its neighbours agree with most (arXiv 1703.02757).

    Of n sites and f wrong ones, a site's score is the sum of squared distances to the n - f - 2
    updates nearest to its own; the lowest wins. Whole updates are compared, so that sites without
    a say somewhere are left out.

    Args:
        updates: Of equal names and shapes; finite.
        situation: For `federation.byzantine_sites`.

    Returns:
        That update as it came; empty when there was no update.

    Raises:
        FederationError: When fewer than `minimum_sites` have a say in everything.
    """
    best = _by_score("krum", updates, situation)[:1]
    return dict(best[0].delta) if best else {}


def multi_krum(updates: Iterable[Update], situation: Situation) -> AdapterState:
    """The plain mean of the n - f updates with the lowest scores of `krum` (arXiv 1703.02757).

    Args:
        updates: Of equal names and shapes; finite.
        situation: For `federation.byzantine_sites`.

    Returns:
        The mean, float32, summed in float64; empty when there was no update.

    Raises:
        FederationError: When fewer than `minimum_sites` have a say in everything.
    """
    ranked = _by_score("multi-krum", updates, situation)
    best = ranked[: len(ranked) - situation.config.federation.byzantine_sites]
    return fedavg((replace(update, weight=1.0) for update in best), situation)


def minimum_sites(strategy: str, byzantine: int) -> int:
    """How many updates a strategy needs where so many of them may be wrong.

    Median and trimmed mean need a majority of right sites (Yin et al., arXiv 1803.01498: a share of
    wrong ones below 1/2), Krum needs n > 2 f + 2 (Blanchard et al., arXiv 1703.02757, section 4).
    """
    if strategy in ("median", "trimmed-mean"):
        return 2 * byzantine + 1
    if strategy in ("krum", "multi-krum"):
        return 2 * byzantine + 3
    return 1


def _inner_means(
    strategy: str,
    updates: Iterable[Update],
    situation: Situation,
    cut: Callable[[Tensor], Tensor],
) -> AdapterState:
    """Each tensor by itself; `cut` says how many values to drop at either end, of how many."""
    everyone = list(updates)
    means: AdapterState = {}
    for name in everyone[0].delta if everyone else ():
        values = torch.stack([update.delta[name] for update in everyone])
        has_say = torch.stack([_has_say(update, name) for update in everyone])
        number = has_say.sum(0)
        _require_enough(strategy, int(number.min()), situation, f"a say in every number of {name}")
        means[name] = _inner_mean(values, has_say, cut(number))
    return means


def _inner_mean(values: Tensor, has_say: Tensor, cut: Tensor) -> Tensor:
    """The mean over sites without the `cut` smallest and largest values.

    Args:
        values: (N, ...) float32, finite.
        has_say: (N, ...) bool; False where a value is to be ignored.
        cut: (...) or scalar; less than half of the values with a say.

    Returns:
        (...) float32.
    """
    ordered = torch.where(has_say, values, torch.inf).sort(dim=0).values  # ignored ones come last
    place = torch.arange(len(values)).reshape(-1, *[1] * (values.dim() - 1))
    kept = (place >= cut) & (place < has_say.sum(0) - cut)
    return (torch.where(kept, ordered, 0).double().sum(0) / kept.sum(0)).float()


def _by_score(strategy: str, updates: Iterable[Update], situation: Situation) -> list[Update]:
    """Updates with a say in everything, best score first; ties by name, not by who came first."""
    everyone = sorted(updates, key=lambda update: update.site)
    whole = [u for u in everyone if all(_has_say(u, name).all() for name in u.delta)]
    if not everyone:
        return []
    _require_enough(strategy, len(whole), situation, "a say in everything")
    near = len(whole) - situation.config.federation.byzantine_sites - 2
    squares = _squared_distances([update.delta for update in whole]).fill_diagonal_(torch.inf)
    scores = squares.sort(dim=1).values[:, :near].sum(1)
    return [whole[i] for i in scores.argsort(stable=True)]


def _squared_distances(deltas: list[AdapterState]) -> Tensor:
    """(N, N) float64: between whole updates; from differences, as a Gram matrix cancels."""
    total = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for name in deltas[0]:
        flat = torch.stack([delta[name].flatten() for delta in deltas]).double()
        total += torch.stack([(flat - row).square().sum(1) for row in flat])
    return total


def _has_say(update: Update, name: str) -> Tensor:
    """Which numbers of a tensor count; bool, of the tensor's shape."""
    value = update.delta[name]
    return update.counts.get(name, torch.ones(())).bool().expand(value.shape)


def _require_enough(strategy: str, number: int, situation: Situation, what: str) -> None:
    byzantine = situation.config.federation.byzantine_sites
    needed = minimum_sites(strategy, byzantine)
    if number < needed:
        raise FederationError(
            "SAM-F105",
            f"round {situation.server_round}: {number} usable updates have {what}, but {strategy} "
            f"needs {needed} to withstand federation.byzantine_sites = {byzantine}",
            "Ask more sites, lower federation.byzantine_sites, or choose a strategy that needs "
            "fewer.",
        )
