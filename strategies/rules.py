"""The aggregation rules by the names a configuration uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from samaritan.errors import ConfigError
from samaritan.models.adapter import AdapterState
from strategies.fedavg import fedavg

Rule = Callable[[Iterable[tuple[AdapterState, float]]], AdapterState]
"""Each site's update and weight, given one at a time -> one update; empty for no update."""

RULES: dict[str, Rule] = {"fedavg": fedavg}


def get_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ConfigError: When there is none, with the list.
    """
    if name not in RULES:
        raise ConfigError(
            "SAM-C205",
            f"strategy: there is no strategy {name!r}",
            f"Choose one of: {', '.join(RULES)}.",
        )
    return RULES[name]
