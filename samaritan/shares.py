"""Which tensors of an adapter a site trains, sends and keeps; server and site read one table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from samaritan.config import Config
from samaritan.errors import ConfigError


@dataclass(frozen=True)
class Sharing:
    """What a strategy asks of the sites. Kinds are "lora_A", "lora_B", "encoder" and "decoder".

    Attributes:
        frozen: Kinds that stay as they began.
        personal: Kinds that are trained and never leave the site.
        alternating: Kinds of which one is trained in each round, in turn.
        folds: Whether the server also changes the frozen layers under a LoRA; the adapter then
            holds a tensor for each (`samaritan.models.lora.Pair.folded`).
    """

    frozen: tuple[str, ...] = ()
    personal: tuple[str, ...] = ()
    alternating: tuple[str, ...] = ()
    folds: bool = False


SHARING = {
    "fedavg": Sharing(),
    "svd": Sharing(),
    "ffa": Sharing(frozen=("lora_A",)),
    "fedsa": Sharing(personal=("lora_B",)),
    "fedex": Sharing(folds=True),
    "flora": Sharing(folds=True),
    "rolora": Sharing(alternating=("lora_B", "lora_A")),  # A learns nothing while B is zero
    "median": Sharing(),
    "trimmed-mean": Sharing(),
    "krum": Sharing(),
    "multi-krum": Sharing(),
}
"""Every strategy; how each combines updates is in `strategies/rules.py`."""


CONTROL = "control/"
"""Before the name of a tensor: its control variate, which SCAFFOLD sends beside it."""


@dataclass(frozen=True)
class Shares:
    """The names of an adapter's tensors in one round.

    Attributes:
        trained: Those a site changes.
        sent: Those of them that it sends.
        personal: Those it keeps for itself.
        received: Those the server may have changed since the beginning.
    """

    trained: frozenset[str]
    sent: frozenset[str]
    personal: frozenset[str]
    received: frozenset[str]


def get_sharing(strategy: str) -> Sharing:
    """What a strategy asks of the sites.

    Raises:
        ConfigError: When there is no such strategy, with the list.
    """
    if strategy not in SHARING:
        raise ConfigError(
            "SAM-C205",
            f"strategy: there is no strategy {strategy!r}",
            f"Choose one of: {', '.join(SHARING)}.",
        )
    return SHARING[strategy]


def shares(config: Config, names: Iterable[str], server_round: int) -> Shares:
    """Who does what with each tensor in a round.

    Args:
        config: The run's strategy and personal parts.
        names: Official names of all tensors of the adapter.
        server_round: 1 and up.
    """
    sharing, everything = get_sharing(config.strategy), frozenset(names)
    frozen = _of(everything, sharing.frozen) | {n for n in everything if ".folded" in n}
    personal = _of(everything, (*sharing.personal, *config.personal.parts)) - frozen
    resting: frozenset[str] = frozenset()
    if sharing.alternating:
        turn = sharing.alternating[(server_round - 1) % len(sharing.alternating)]
        resting = _of(everything, sharing.alternating) - _of(everything, (turn,))
    trained = everything - frozen - resting
    received = everything - personal - _of(everything, sharing.frozen)
    return Shares(trained, trained - personal, personal, received)


def noisy_sites(config: Config) -> bool:
    """Whether sites add noise themselves; their losses and counts then stay at home."""
    return config.privacy.unit in ("patient", "slice")


def tells_scores(config: Config) -> bool:
    """Whether sites tell the server how an adapter does on their validation cases."""
    return config.privacy.unit == "none" or config.privacy.scores == "declared"


def public_state(
    config: Config, adapter: Mapping[str, Tensor], control: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What the server sends: of the adapter what it may have changed, and control variates.

    Args:
        config: The run's strategy, personal parts and drift control.
        adapter: All tensors, of the server or of a site before the first round.
        control: Control variates by the tensor's name; zero where left out.
    """
    received = shares(config, adapter, 1).received
    state = {name: value for name, value in adapter.items() if name in received}
    if config.training.scaffold:
        for name in sorted(controlled(config, adapter)):
            zero = torch.zeros_like(adapter[name])
            state[CONTROL + name] = zero if control is None else control.get(name, zero)
    return state


def controlled(config: Config, names: Iterable[str]) -> frozenset[str]:
    """The tensors that have a control variate: those that are sent in some round."""
    everything = frozenset(names)
    turns = max(1, len(get_sharing(config.strategy).alternating))
    return frozenset().union(*(shares(config, everything, n + 1).sent for n in range(turns)))


def _of(names: frozenset[str], kinds: Iterable[str]) -> frozenset[str]:
    wanted = tuple(kinds)
    return frozenset(n for n in names if any(_is(n, kind) for kind in wanted))


def _is(name: str, kind: str) -> bool:
    if kind.startswith("lora_"):
        return f".{kind}" in name
    return name.startswith("image_encoder.") == (kind == "encoder")
