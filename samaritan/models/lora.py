"""LoRA through `peft`, with a registered layer for q and v of SAM's fused qkv projection.

peft alone would adapt k too and share one A among the three; see LoRA (arXiv 2106.09685) and
SAMed (arXiv 2304.13785) for q and v only. Here B starts at zero, so that the adapted model equals
the base before the first step (FLAP-SAM's code does not do this).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from samaritan.errors import ModelError
from samaritan.models.presets import Preset, matches


class QKVLinear(nn.Linear):
    """The fused projection by another name: peft finds custom layers by class."""


class LoraQKV(nn.Module, LoraLayer):  # type: ignore[misc]
    """Rank-r updates of the q and v rows of a fused qkv projection; the k rows stay untouched.

    Computes [q + s B_q A_q x, k, v + s B_v A_v x] with s = alpha / r.
    """

    # peft's attributes; it is untyped, and nn.Module would type them as tensors.
    base_layer: Any
    lora_A_q: Any
    lora_B_q: Any
    lora_A_v: Any
    lora_B_v: Any
    r: Any
    lora_alpha: Any
    scaling: Any
    merged: Any
    merged_adapters: Any
    active_adapters: Any
    disable_adapters: Any
    in_features: Any
    set_adapter: Any
    get_base_layer: Any
    _move_adapter_to_device_of_base_layer: Any

    adapter_layer_names = ("lora_A_q", "lora_B_q", "lora_A_v", "lora_B_v")

    def __init__(
        self,
        base_layer: nn.Linear,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **_: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, **_: Any) -> None:
        """Adds one adapter of rank r; called by peft."""
        width = self.in_features
        for part in ("q", "v"):
            a, b = nn.Linear(width, r, bias=False), nn.Linear(r, width, bias=False)
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
            getattr(self, f"lora_A_{part}")[adapter_name] = a
            getattr(self, f"lora_B_{part}")[adapter_name] = b
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / r
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the frozen projection; an adapter adds none."""
        bias: Tensor | None = self.get_base_layer().bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C)."""
        y: Tensor = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return y
        q, k, v = torch.split(y, self.in_features, -1)
        for name in self.active_adapters:
            q = q + self.lora_B_q[name](self.lora_A_q[name](x)) * self.scaling[name]
            v = v + self.lora_B_v[name](self.lora_A_v[name](x)) * self.scaling[name]
        return torch.cat([q, k, v], -1)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The merged update, (3C, C), exactly zero in the k rows."""
        scale = self.scaling[adapter]
        delta_q = self.lora_B_q[adapter].weight @ self.lora_A_q[adapter].weight * scale
        delta_v = self.lora_B_v[adapter].weight @ self.lora_A_v[adapter].weight * scale
        return torch.cat([delta_q, torch.zeros_like(delta_q), delta_v])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates to the frozen weight in place."""
        for name in adapter_names or self.active_adapters:
            self.base_layer.weight.data += self.get_delta_weight(name)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Takes the merged updates out again."""
        while self.merged_adapters:
            self.base_layer.weight.data -= self.get_delta_weight(self.merged_adapters.pop())


def lora_config(preset: Preset, rank: int, alpha: float | None) -> LoraConfig:
    """The peft configuration of a preset, with the qkv layer registered."""
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        target_modules="|".join(f"(?:{pattern})" for pattern in preset.lora),
        lora_dropout=0.0,
        bias="none",
    )
    config._register_custom_module({QKVLinear: LoraQKV})
    return config


def attach(sam: Any, preset: Preset, rank: int, alpha: float | None, seed: int) -> PeftModel:
    """Freezes a SAM, adds the preset's LoRA layers and makes its other parts trainable.

    Args:
        sam: Official `Sam`; changed in place.
        preset: What to adapt and train.
        rank: LoRA rank, at most the smallest width it meets.
        alpha: LoRA scale times rank; the rank itself when None.
        seed: Seeds A.

    Raises:
        ModelError: When the rank exceeds a layer's width.
    """
    for block in sam.image_encoder.blocks:
        block.attn.qkv.__class__ = QKVLinear
    config = lora_config(preset, rank, alpha)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PeftModel = get_peft_model(sam, config)
    for name, parameter in model.named_parameters():
        official = official_name(name)
        if matches(preset.train, official):
            parameter.requires_grad_(True)
        if ".lora_A" in name and rank > parameter.shape[1]:
            raise ModelError(
                "SAM-M301",
                f"peft.rank {rank} is larger than layer {official} ({parameter.shape[1]} wide)",
                "Choose a smaller rank.",
            )
    return model


def official_name(name: str) -> str:
    """A parameter's name without what peft's wrappers add to it."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
    return name.replace(".default", "") if "lora_" in name else name
