"""The aggregation rules by the names a configuration uses."""

from __future__ import annotations

from samaritan.shares import get_sharing
from strategies.fedavg import fedavg
from strategies.fedex import fedex
from strategies.flora import flora
from strategies.robust import krum, median, multi_krum, trimmed_mean
from strategies.svd import svd
from strategies.update import Rule

RULES: dict[str, Rule] = {
    "fedavg": fedavg,
    "ffa": fedavg,  # A is not trained, so that the mean of B is exact (arXiv 2403.12313)
    "fedsa": fedavg,  # B stays at the sites (arXiv 2410.01463)
    "rolora": fedavg,  # A and B are trained in turn, each mean is exact (arXiv 2502.01755)
    "svd": svd,
    "fedex": fedex,
    "flora": flora,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
}
"""Every strategy of `samaritan.shares.SHARING`."""


def get_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ConfigError: When there is none, with the list.
    """
    get_sharing(name)
    return RULES[name]
