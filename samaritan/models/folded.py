"""Frozen layers that take in what a strategy adds to them.

FedEx-LoRA and FLoRA change, besides the adapter, the frozen weight under each LoRA. The adapter
then holds one tensor more for each product B A: all that was ever added, in units of B A.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from samaritan.errors import ConfigError
from samaritan.models.lora import LoraQKV, official_name


class Folded:
    """Frozen rows with something added: weight[rows] = original + scale * value.

    Args:
        weight: Of the frozen layer.
        rows: Those of the LoRA: all, or a third of a fused qkv projection.
        scale: LoRA's.
    """

    def __init__(self, weight: nn.Parameter, rows: slice, scale: float) -> None:
        self._weight, self._rows, self._scale = weight, rows, scale
        self._original = weight.data[rows].clone()
        self._value = torch.zeros(self._original.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return tuple(self._value.shape)

    @property
    def value(self) -> Tensor:
        """A copy of what was added, (out, in), in units of B A; float32 on the CPU."""
        return self._value.clone()

    def load(self, value: Tensor) -> None:
        """Adds a value to the original rows, in place of what was added before."""
        self._value = value.detach().float().cpu().clone()
        # From the original each time: adding and taking away would leave rounding behind.
        change = self._scale * self._value.to(self._original.device)
        self._weight.data[self._rows] = self._original + change


def folded_layers(model: Any) -> dict[str, Folded]:
    """The frozen rows under every LoRA of a model, by the names of `Pair.folded`.

    Raises:
        ConfigError: When such a weight is trained itself.
    """
    found = {}
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        weight = module.get_base_layer().weight
        if weight.requires_grad:
            raise ConfigError(
                "SAM-C229",
                f"the strategy adds to frozen layers, but {official_name(name)} is trained itself",
                "Choose a peft.preset that trains no layer beside its LoRA, or strategy svd.",
            )
        (adapter,) = module.active_adapters
        fused = isinstance(module, LoraQKV)
        parts = {f"_{p}": module.rows_of(p) for p in "qv"} if fused else {"": slice(None)}
        for suffix, rows in parts.items():
            folded = Folded(weight, rows, module.scaling[adapter])
            found[f"{official_name(name)}.folded{suffix}.weight"] = folded
    return found
