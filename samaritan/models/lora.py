"""LoRA through `peft`, with a registered layer for q and v of a fused qkv projection.

peft alone would adapt k too and share one A among the three; see LoRA (arXiv 2106.09685) and
SAMed (arXiv 2304.13785) for q and v only. Here B starts at zero, so that the adapted model equals
the base before the first step (FLAP-SAM's code does not do this).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samaritan.errors import ModelError


class QKVLinear(nn.Linear):
    """The fused projection by another name: peft finds custom layers by class."""


class LoraQKV(nn.Module, LoraLayer):  # type: ignore[misc]
    """Rank-r updates of the q and v rows of a fused qkv projection; the k rows stay untouched.

    Computes [q + s B_q A_q x, k, v + s B_v A_v x] with s = alpha / r, or alpha / sqrt(r) for
    rank-stabilised LoRA (arXiv 2312.03732). As DoRA (arXiv 2402.09353) the rows of q and v are also
    given lengths of their own.
    """

    # peft's attributes; it is untyped, and nn.Module would type them as tensors.
    base_layer: Any
    lora_A_q: Any
    lora_B_q: Any
    lora_A_v: Any
    lora_B_v: Any
    lora_magnitude_q: Any
    lora_magnitude_v: Any
    r: Any
    lora_alpha: Any
    scaling: Any
    merged: Any
    merged_adapters: Any
    active_adapters: Any
    disable_adapters: Any
    in_features: Any
    out_features: Any
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
        self.lora_magnitude_q, self.lora_magnitude_v = nn.ParameterDict(), nn.ParameterDict()
        self._active_adapter = adapter_name
        self._merged_deltas: list[Tensor] = []
        self.update_layer(adapter_name, r, lora_alpha, config=config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **_: Any
    ) -> None:
        """Adds one adapter of rank r; called by peft."""
        width, out = self.in_features, self.out_features // 3
        for part in ("q", "v"):
            a, b = nn.Linear(width, r, bias=False), nn.Linear(r, out, bias=False)
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            nn.init.zeros_(b.weight)
            getattr(self, f"lora_A_{part}")[adapter_name] = a
            getattr(self, f"lora_B_{part}")[adapter_name] = b
            if config.use_dora:
                lengths = self._rows(part).detach().norm(dim=1)
                getattr(self, f"lora_magnitude_{part}")[adapter_name] = nn.Parameter(lengths)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    @property
    def bias(self) -> Tensor | None:
        """The bias of the frozen projection; an adapter adds none."""
        bias: Tensor | None = self.get_base_layer().bias
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C)."""
        if self.disable_adapters or self.merged:
            unchanged: Tensor = self.base_layer(x)
            return unchanged
        if self._fusible(x):
            (name,) = self.active_adapters
            factors = (getattr(self, kind)[name].weight for kind in self.adapter_layer_names)
            weight, bias = self.base_layer.weight, self.base_layer.bias
            fused: Tensor = _FusedUpdate.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, *factors, self.scaling[name]
            )
            return fused
        y: Tensor = self.base_layer(x)
        q, k, v = torch.split(y, self.out_features // 3, -1)
        for name in self.active_adapters:
            q = self._updated(q, x, "q", name)
            v = self._updated(v, x, "v", name)
        return torch.cat([q, k, v], -1)

    def _fusible(self, x: Tensor) -> bool:
        """Whether the update is best added to the weight for the time of one product.

        It is in fp32, where bf16 would round small updates away (measured on vit_b: 1.00 to 1.06
        times faster). A frozen weight needs no gradient, which the fused form does not compute.
        Hooks on A or B, such as those of Opacus, see only what goes through these layers.
        """
        hooked = any(
            layer._forward_hooks
            for kind in self.adapter_layer_names
            for layer in getattr(self, kind).values()
        )
        return (
            not hooked
            and len(self.active_adapters) == 1
            and not self.lora_magnitude_q
            and x.dtype == self.base_layer.weight.dtype == torch.float32
            and not torch.is_autocast_enabled(x.device.type)
            and not self.base_layer.weight.requires_grad
        )

    def _updated(self, y: Tensor, x: Tensor, part: str, adapter: str) -> Tensor:
        """One third of the output with its update."""
        a, b = getattr(self, f"lora_A_{part}")[adapter], getattr(self, f"lora_B_{part}")[adapter]
        update: Tensor = b(a(x)) * self.scaling[adapter]
        ratio = self._row_ratio(part, adapter)
        if ratio is None:
            return y + update
        shift = 0 if self.bias is None else self.bias[self.rows_of(part)]
        # The bias is not part of the weight, and keeps its length.
        lengthened: Tensor = ratio * (y - shift + update) + shift
        return lengthened.to(y.dtype)  # lengths are fp32, and attention shall not be

    def _row_ratio(self, part: str, adapter: str) -> Tensor | None:
        """DoRA's factor on each row: the trained length over the length of the updated row."""
        magnitudes = getattr(self, f"lora_magnitude_{part}")
        if adapter not in magnitudes:
            return None
        # Held constant in the backward pass, as section 4.3 of the paper has it.
        rows = (self._rows(part).float() + self._low_rank(part, adapter)).detach()
        ratio: Tensor = magnitudes[adapter] / rows.norm(dim=1)
        return ratio

    def _low_rank(self, part: str, adapter: str) -> Tensor:
        a, b = getattr(self, f"lora_A_{part}")[adapter], getattr(self, f"lora_B_{part}")[adapter]
        update: Tensor = b.weight @ a.weight * self.scaling[adapter]
        return update

    def rows_of(self, part: str) -> slice:
        """The rows of the frozen projection that part "q" or "v" updates."""
        third = self.out_features // 3
        return slice(0, third) if part == "q" else slice(2 * third, 3 * third)

    def _rows(self, part: str) -> Tensor:
        rows: Tensor = self.base_layer.weight[self.rows_of(part)]
        return rows

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The merged update, (3C, C), exactly zero in the k rows."""
        deltas = []
        for part in ("q", "v"):
            delta, ratio = self._low_rank(part, adapter), self._row_ratio(part, adapter)
            if ratio is not None:
                rows = self._rows(part)
                delta = ratio[:, None] * (rows + delta) - rows
            deltas.append(delta)
        return torch.cat([deltas[0], torch.zeros_like(deltas[0]), deltas[1]])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the updates to the frozen weight in place."""
        for name in adapter_names or self.active_adapters:
            delta = self.get_delta_weight(name).detach()
            self.base_layer.weight.data += delta
            self.merged_adapters.append(name)
            self._merged_deltas.append(delta)

    def unmerge(self) -> None:
        """Takes the merged updates out again."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.base_layer.weight.data -= self._merged_deltas.pop()


class _FusedUpdate(torch.autograd.Function):
    """x (W + s [B_q A_q; 0; B_v A_v])' + bias in one product, and low-rank gradients.

    Forward and backward pass the large matrix once each, as without an adapter; the updated matrix
    is made anew for both, which costs little beside the product and keeps no copy.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a_q: Tensor, b_q: Tensor,
        a_v: Tensor, b_v: Tensor, scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, a_q, b_q, a_v, b_v)
        ctx.scale = scale
        return F.linear(x, _updated_weight(weight, a_q, b_q, a_v, b_v, scale), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        x, weight, a_q, b_q, a_v, b_v = ctx.saved_tensors
        scale, third = ctx.scale, weight.shape[0] // 3
        grad, rows = gradients[0].flatten(0, -2), x.flatten(0, -2)
        grad_q, grad_v = grad[:, :third], grad[:, 2 * third :]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _updated_weight(weight, a_q, b_q, a_v, b_v, scale)).view(x.shape)
        low_q, low_v = (rows @ torch.cat([a_q, a_v]).T).split([len(a_q), len(a_v)], -1)
        back = torch.cat([grad_q @ b_q, grad_v @ b_v], -1)
        grad_a_q, grad_a_v = (back.T @ rows * scale).split([len(a_q), len(a_v)])
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        grad_b_q, grad_b_v = grad_q.T @ low_q * scale, grad_v.T @ low_v * scale
        return grad_x, None, grad_bias, grad_a_q, grad_b_q, grad_a_v, grad_b_v, None


def _updated_weight(
    weight: Tensor, a_q: Tensor, b_q: Tensor, a_v: Tensor, b_v: Tensor, scale: float
) -> Tensor:
    third = weight.shape[0] // 3
    updated = weight.detach().clone()
    updated[:third].addmm_(b_q, a_q, alpha=scale)
    updated[2 * third :].addmm_(b_v, a_v, alpha=scale)
    return updated


def inject_lora(
    model: Any,
    patterns: tuple[str, ...],
    fused: str,
    *,
    rank: int,
    ranks: Mapping[str, int],
    alpha: float | None,
    variant: str,
    seed: int,
) -> LoraConfig | None:
    """Freezes a model and gives the layers that match a LoRA.

    Args:
        model: Changed in place.
        patterns: Expressions for whole module names.
        fused: The expression for fused qkv projections, of which q and v are adapted.
        rank: LoRA rank.
        ranks: Other ranks, by expression for whole module names.
        alpha: LoRA scale times rank; the rank itself when None.
        variant: "lora", "rslora" or "dora".
        seed: Seeds A.

    Returns:
        What peft was told; None where no layer matches.

    Raises:
        ModelError: When a rank exceeds a layer's width.
    """
    target = "|".join(f"(?:{pattern})" for pattern in patterns)
    if not any(re.fullmatch(target, name) for name, _ in model.named_modules()):
        return None
    for name, module in model.named_modules():
        if re.fullmatch(fused, name) and isinstance(module, nn.Linear):
            module.__class__ = QKVLinear
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or rank,
        rank_pattern=dict(ranks),
        alpha_pattern={} if alpha else dict(ranks),
        target_modules=target,
        lora_dropout=0.0,
        bias="none",
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
    )
    config._register_custom_module({QKVLinear: LoraQKV})
    _require_width(model, config, ranks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    return config


def _require_width(model: Any, config: LoraConfig, ranks: Mapping[str, int]) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not re.fullmatch(config.target_modules, name):
            continue
        rank = next((r for p, r in ranks.items() if re.fullmatch(p, name)), config.r)
        require_rank(rank, name, min(module.in_features, module.out_features))


def require_rank(rank: int, name: str, width: int) -> None:
    """Refuses a rank that is larger than a layer.

    Raises:
        ModelError: With the layer.
    """
    if rank > width:
        raise ModelError(
            "SAM-M301",
            f"rank {rank} is larger than layer {name} ({width} wide)",
            "Choose a smaller peft.rank, or one for this group of layers in peft.ranks.",
        )


def official_name(name: str) -> str:
    """A parameter's name without what peft's wrappers add to it."""
    name = name.replace(".base_layer.", ".")
    return name.replace(".default", "") if "lora_" in name else name


@dataclass(frozen=True)
class Pair:
    """The names of the two factors of one LoRA product B A in an adapter.

    Attributes:
        a, b: (rank, in) and (out, rank).
        folded: (out, in): what a strategy has added to the frozen weight, in units of B A, that is
            before LoRA's scale.
    """

    a: str
    b: str
    folded: str


def lora_pairs(names: Iterable[str]) -> list[Pair]:
    """The LoRA products among the tensors of an adapter, sorted; of names whose partner is there.

    A fused qkv projection has two, for q and for v.
    """
    known = set(names)
    pairs = [
        Pair(name, name.replace(".lora_A", ".lora_B"), name.replace(".lora_A", ".folded"))
        for name in sorted(known)
        if ".lora_A" in name
    ]
    return [pair for pair in pairs if pair.b in known]
