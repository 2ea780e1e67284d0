"""What a rule combines: the updates of a round, and where the round began."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from samaritan.config import Config
from samaritan.models.adapter import AdapterState


@dataclass(frozen=True)
class Update:
    """What one site learned in a round.

    Attributes:
        site: Its name.
        start: The adapter it was sent; its LoRA may have a smaller rank than the server's.
        delta: Trained minus start, for the tensors it sends; float32, shapes as in `start`.
        weight: Positive; weights of a round need not sum to one.
        counts: Where the site's labels have something to say: 1 or 0, of a shape that broadcasts
            to the tensor of that name. A name that is absent counts everywhere.
    """

    site: str
    start: AdapterState
    delta: AdapterState
    weight: float
    counts: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Situation:
    """Where a round began.

    Attributes:
        adapter: The server's adapter; with lossy codecs not quite what the sites were sent.
        server_round: 1 and up.
        config: The run's configuration.
    """

    adapter: AdapterState
    server_round: int
    config: Config


Rule = Callable[[Iterable[Update], Situation], AdapterState]
"""Updates, taken one at a time -> what to add to the adapter; empty when there was no update.
A tensor that no update speaks of may be left out."""
