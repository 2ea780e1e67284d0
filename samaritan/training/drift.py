"""Drift of sites whose data differ, held by FedProx and SCAFFOLD, on tensors by name.

FedProx (arXiv 1812.06127) adds mu/2 |w - w_received|^2 to the loss: a site is pulled back to the
adapter it was sent. SCAFFOLD (arXiv 1910.06378) adds c - c_i to each gradient, where the control
c_i estimates the site's gradient and c the mean of all sites': each then walks as all would.

The new c_i is the mean of the gradients of a round's steps, before anything is added to them or
clipped. Under SGD with a constant rate eta, K steps from x to y_i cover x - y_i = eta * (the sum of
the gradients + K (c - c_i)), so that the paper's option II, c_i - c + (x - y_i) / (K eta), is this
mean exactly. AdamW's steps are no multiples of gradients and (x - y_i) / (K eta) says nothing about
them; the mean is what a control must estimate under any optimiser.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def record_gradients(totals: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Adds gradients to their totals, in place; a parameter that the loss did not use has none."""
    for name, total in totals.items():
        gradient = parameters[name].grad
        if gradient is not None:
            total += gradient


def correct_gradients(
    parameters: Mapping[str, nn.Parameter],
    control: Mapping[str, Tensor],
    received: Mapping[str, Tensor],
    mu: float,
) -> None:
    """Adds to each gradient what SCAFFOLD and FedProx add, where they know the parameter.

    Args:
        parameters: With the gradients of the loss.
        control: c - c_i, shaped and placed as the parameters.
        received: The parameters as they came, likewise.
        mu: Strength of the pull towards them.
    """
    for name, parameter in parameters.items():
        terms = [control[name]] if name in control else []
        if name in received:
            terms.append(mu * (parameter.detach() - received[name]))
        for term in terms:
            # Never in place: autograd may give two parameters the same tensor, or an expanded one.
            before = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = before + term


def control_change(
    mean_gradient: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a site remembers and sends after a round of SCAFFOLD.

    Args:
        mean_gradient: From `TrainingResult`; of the tensors that were trained.
        own: The site's control c_i; a name that is missing counts as zero, as before its first
            round.

    Returns:
        The new c_i, unchanged where nothing was trained, and what changed, c_i+ - c_i.
    """
    change = {name: value - own.get(name, 0) for name, value in mean_gradient.items()}
    return {**own, **mean_gradient}, change


def server_control(
    control: Mapping[str, Tensor], changes: Iterable[Mapping[str, Tensor]], sites: int
) -> dict[str, Tensor]:
    """The server's control after a round of SCAFFOLD: c + the sum of changes / N.

    It stays the mean of the controls of all sites, those that were not asked included; summed in
    double precision, so that the order of the sites is lost in the rounding.

    Args:
        control: c, float32; a name that is missing counts as zero.
        changes: Of the sites that answered, in any order.
        sites: N, all sites that train in the federation.
    """
    total = {name: value.double() for name, value in control.items()}
    for change in changes:
        for name, value in change.items():
            total[name] = total.get(name, 0) + value.double() / sites
    return {name: value.float() for name, value in total.items()}
