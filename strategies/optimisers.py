"""What the server makes of the combined update: momentum, Adam, Yogi.

FedAvgM (Hsu et al., arXiv 1909.06335), FedAdam and FedYogi (Reddi et al., arXiv 2003.00295,
algorithm 2). Flower's FedAdam differs: it corrects the bias of both moments, and begins with
squared updates of 0 instead of tau squared, as its FedYogi does too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from samaritan.config import Config, ServerOptimiserConfig
from samaritan.errors import ConfigError
from samaritan.models.adapter import AdapterState

_EXACT = ("flora", "fedex")
"""Strategies whose result is exact: it goes with a correction of the frozen layers."""


def server_step(
    change: AdapterState, slots: dict[str, AdapterState], settings: ServerOptimiserConfig
) -> tuple[AdapterState, dict[str, AdapterState]]:
    """One step of the server; its arguments stay as they are.

    With D the combined update, b1 = `momentum`, b2 = `beta2` and lr = `learning_rate`::

        none       step = lr D
        momentum   m = b1 m + D                step = lr m
        adam       m = b1 m + (1 - b1) D       step = lr m / (sqrt(v) + tau)
                   v = b2 v + (1 - b2) D^2
        yogi       m as adam                   step as adam
                   v = v - (1 - b2) D^2 sign(v - D^2)

    m begins at 0, v at tau^2, and neither is corrected for its bias. So `adam` and `yogi` move a
    number by about lr whatever the size of D; they want a learning rate far below 1.

    Args:
        change: What a rule returned. `.folded` tensors are corrections of frozen layers, no
            gradients, and are added as they are. Tensors that are absent rest, and so do their
            moments.
        slots: Moments so far, "momentum" (m) and "second" (v), by tensor; empty at the beginning.
        settings: Of the run.

    Returns:
        What to add to the adapter, and the moments for the next step; all float32.
    """
    step: AdapterState = {}
    rate = _rate(settings)
    new = {slot: dict(tensors) for slot, tensors in slots.items()}
    for name, value in change.items():
        if ".folded" in name:
            step[name] = value
            continue
        moments = {
            slot: tensors[name].double() for slot, tensors in slots.items() if name in tensors
        }
        move, moments = _move(value.double(), moments, settings)
        step[name] = (rate * move).float()
        for slot, moment in moments.items():
            new.setdefault(slot, {})[name] = moment.float()
    return step, new


def _move(
    delta: Tensor, moments: dict[str, Tensor], settings: ServerOptimiserConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """One tensor's step before the learning rate, and its moments; float64."""
    if settings.name == "none":
        return delta, moments
    first = settings.momentum * moments.get("momentum", torch.zeros_like(delta))
    if settings.name == "momentum":
        return first + delta, {"momentum": first + delta}
    first = first + (1 - settings.momentum) * delta
    second = moments.get("second", torch.full_like(delta, settings.tau**2))
    square, share = delta.square(), 1 - settings.beta2
    if settings.name == "adam":
        second = settings.beta2 * second + share * square
    else:
        second = second - share * square * torch.sign(second - square)
    return first / (second.sqrt() + settings.tau), {"momentum": first, "second": second}


def _rate(settings: ServerOptimiserConfig) -> float:
    if settings.learning_rate is not None:
        return settings.learning_rate
    return 0.01 if settings.name in ("adam", "yogi") else 1.0


def check_optimiser(config: Config) -> None:
    """Refuses a server optimiser where the result of the strategy is exact as it is.

    Raises:
        ConfigError: When the step would not be the combined update.
    """
    optimiser = config.server_optimiser
    rate = _rate(optimiser)
    plain = optimiser.name == "none" and rate == 1
    if config.strategy in _EXACT and not plain:
        raise ConfigError(
            "SAM-C222",
            f"server_optimiser is {optimiser.name} with learning rate {rate:g}, "
            f"but strategy {config.strategy} adds a correction to the frozen layers that is right "
            "for the plain step only",
            "Leave server_optimiser out, or choose another strategy.",
        )
