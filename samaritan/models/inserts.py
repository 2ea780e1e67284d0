"""Small trained modules beside the frozen layers: bottlenecks, depth, shared factors, tokens.

They are submodules of the layers they serve, so that official names stay as they are. What a layer
computes is changed by a forward hook; `encoder.py` calls those that sit between layers. All of them
but the tokens start without any effect: their last projection is zero.

Legend: B batch, D slices of a record, H W token rows and columns, C channels, r rank.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samaritan.models.lora import require_rank
from samaritan.models.presets import Insert


class Bottleneck(nn.Module):
    """scale * up(GELU(down(x))), the adapter of Houlsby et al. (arXiv 1902.00751)."""

    def __init__(self, width: int, hidden: int, scale: float = 1.0) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        hidden: Tensor = self.up(F.gelu(self.down(x)))
        return hidden * self.scale


class DepthBranch(nn.Module):
    """Attention along the slices of a record, with the frozen weights of the attention beside it.

    The space-depth branch of Med-SA (arXiv 2304.12620).
    """

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.bottleneck, self.depth = Bottleneck(width, hidden), depth
        rows = next(r for r in range(math.isqrt(depth), 0, -1) if depth % r == 0)
        self.folded = (rows, depth // rows)
        """The slices as the most nearly square grid, which the position tables ask for."""

    def fold(self, x: Tensor) -> Tensor:
        """(B * D, H, W, C) -> (B * H * W, rows, columns, C)."""
        _, h, w, c = x.shape
        x = x.reshape(-1, self.depth, h * w, c).transpose(1, 2)
        return x.reshape(-1, *self.folded, c)

    def unfold(self, x: Tensor, h: int, w: int) -> Tensor:
        """The inverse of `fold`."""
        c = x.shape[-1]
        return x.reshape(-1, h * w, self.depth, c).transpose(1, 2).reshape(-1, h, w, c)


class VolumeAdapter(nn.Module):
    """x + up(GELU(conv(down(norm(x))))), the convolution across neighbouring slices.

    The 3-D adapter of MA-SAM (arXiv 2309.08842).
    """

    def __init__(self, width: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.down, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(hidden, width, False)
        self.conv = nn.Conv1d(hidden, hidden, kernel_size=3, padding=1)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B * D, H, W, C) -> the same."""
        n, h, w, _ = x.shape
        records = n // self.depth
        hidden = self.down(self.norm(x))
        # A kernel of 3 x 1 x 1 is a convolution along the slices of each place.
        lines = hidden.reshape(records, self.depth, h * w, -1).permute(0, 2, 3, 1)
        lines = F.gelu(self.conv(lines.flatten(0, 1))).reshape(records, h * w, -1, self.depth)
        y: Tensor = x + self.up(lines.permute(0, 3, 1, 2).reshape(n, h, w, -1))
        return y


class Factors(nn.Module):
    """Updates of q and v as U S V with U and V shared by all blocks, and S a block's own.

    FacT (arXiv 2212.03145), as MA-SAM uses it.
    """

    def __init__(self, u: nn.Linear, v: nn.Linear) -> None:
        super().__init__()
        rank = u.out_features
        self.q, self.v = nn.Linear(rank, rank, bias=False), nn.Linear(rank, rank, bias=False)
        self.shared = (u, v)  # a tuple, so that they are not registered once per block

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> what is added to (..., 3C): q, nothing for k, v."""
        u, v = self.shared
        low = u(x)
        q, value = v(self.q(low)), v(self.v(low))
        return torch.cat([q, torch.zeros_like(q), value], -1)

    def delta_weight(self) -> Tensor:
        """The merged update, (3C, C), exactly zero in the k rows."""
        u, v = (layer.weight for layer in self.shared)
        q, value = v @ self.q.weight @ u, v @ self.v.weight @ u
        return torch.cat([q, torch.zeros_like(q), value])


def attach_inserts(
    model: Any, inserts: tuple[tuple[Insert, str], ...], rank: int, depth: int
) -> None:
    """Adds a preset's inserts to a model.

    Args:
        model: Changed in place.
        inserts: Each with the expression for the modules it goes to.
        rank: Of shared factors.
        depth: Slices of a record that are encoded as images of their own.
    """
    factors: tuple[nn.Linear, nn.Linear] | None = None
    for insert, pattern in inserts:
        for name, module in [m for m in model.named_modules() if re.fullmatch(pattern, m[0])]:
            layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
            width = int(layers[-1].out_features)
            hidden = math.ceil(insert.size * width) if insert.size <= 1 else int(insert.size)
            hidden = min(hidden, width)
            match insert.kind:
                case "serial":
                    module.adapter = Bottleneck(width, hidden, insert.scale)
                    module.register_forward_hook(_after)
                case "parallel":
                    module.adapter = Bottleneck(width, hidden, insert.scale)
                    module.register_forward_hook(_beside)
                case "factors":
                    require_rank(rank, name, layers[0].in_features)
                    factors = factors or _shared_factors(model, layers[0].in_features, rank)
                    module.factors = Factors(*factors)
                    module.register_forward_hook(_plus_factors)
                case "depth" if depth > 1:
                    module.depth_branch = DepthBranch(width, hidden, depth)
                case "before_attention" | "after_attention":
                    module.add_module(insert.kind, VolumeAdapter(width, hidden, depth))
                case "tokens":
                    tokens = torch.empty(int(insert.size), width)
                    bound = math.sqrt(6 / (3 * 16**2 + width))  # VPT, for patches of 16 pixels
                    module.tokens = nn.Parameter(tokens.uniform_(-bound, bound))


def _shared_factors(model: Any, width: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    u, v = nn.Linear(width, rank, bias=False), nn.Linear(rank, width, bias=False)
    nn.init.zeros_(v.weight)
    model.image_encoder.factors = nn.ModuleDict({"u": u, "v": v})
    return u, v


def _after(module: Any, _: Any, output: Tensor) -> Tensor:
    return output + module.adapter(output)  # type: ignore[no-any-return]


def _beside(module: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    return output + module.adapter(arguments[0])  # type: ignore[no-any-return]


def _plus_factors(module: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
    return output + module.factors(arguments[0])  # type: ignore[no-any-return]
