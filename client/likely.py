"""Whether an adapter from the server can have come from training."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from samaritan.errors import FederationError
from samaritan.models.adapter import AdapterState

_GROWTH, _SMALLEST = 10.0, 0.1
"""How many times as large as at the beginning; a LoRA begins with zeros, so that has a least."""


def require_likely(site: str, received: AdapterState, initial: AdapterState) -> None:
    """Refuses an adapter whose numbers are far larger than those training comes to.

    A server can make an adapter so that the update of a site tells more than it should, and nobody
    can see that in its numbers. This keeps out those that give themselves away.

    Args:
        site: Its name.
        received: From the server.
        initial: The adapter before the first round.

    Raises:
        FederationError: SAM-F209.
    """
    names = [name for name in received if name in initial]
    size = _root_mean_square([received[name] for name in names])
    allowed = _GROWTH * max(_SMALLEST, _root_mean_square([initial[name] for name in names]))
    if not size <= allowed:
        raise FederationError(
            "SAM-F209",
            f"site {site}: the numbers of the adapter are {size:.3g} on average (root mean "
            f"square), and {allowed:.3g} is the most this site works on",
            "The server sends something else than a trained adapter, or training has diverged: "
            "lower training.learning_rate in a new plan, or ask the coordinator.",
        )


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    count = sum(tensor.numel() for tensor in tensors)
    squares = sum(float(tensor.double().square().sum()) for tensor in tensors)
    return float((squares / max(1, count)) ** 0.5)
