"""The forward pass of SAM 2's image encoder, Hiera and its feature pyramid.

It runs on the modules and weights of `transformers`.
One thing differs from `Sam2VisionModel.forward`, and it does not change the result: q, k and v are
computed before the windows are cut, on (B, H, W, C). Fewer padded tokens are computed, and an
adapter on qkv sees the batch dimension, which per-record gradients need.

Legend: B batch, H W token rows and columns, C channels, h heads, n tokens. Stage s of S has a grid
of side / (4 * 2^s) tokens; block outputs are (B, H, W, C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from samaritan.models.windows import cut_windows, join_windows


def encode_hiera(
    encoder: Any, x: Tensor, blocks: slice = slice(None), recompute: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """Feature maps of a `Sam2VisionModel`, or one stretch of the way to them.

    Args:
        encoder: The module, with or without adapters.
        x: (B, channels, rows, columns), normalised; sides a multiple of 32. Where `blocks` begins
            after the first block, what this function returned for the blocks before.
        blocks: The blocks to run; all of them by default.
        recompute: Keep only each block's input for the backward pass, and run the block again.

    Returns:
        (B, C, H, W) feature maps at 1/16, 1/8 and 1/4 of the input; where `blocks` has an end, one
        tensor (B, rows / 32, columns / 32, ...) of everything the blocks after it need.
    """
    backbone = encoder.backbone
    first, last, _ = blocks.indices(len(backbone.blocks))
    if first == 0:
        stages: list[Tensor] = []
        x = backbone.patch_embed(x)
        x = (x + _positions(backbone, x.shape[1], x.shape[2])).contiguous()
    else:
        stages, x = _unpack(backbone, x, first)
    for index in range(first, last):
        block = backbone.blocks[index]
        if recompute and torch.is_grad_enabled():
            x = checkpoint(_block, block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _block(block, x)
        if index in backbone.stage_ends:
            stages.append(x)
    if blocks.stop is None:
        return _pyramid(encoder, stages)
    if last - 1 not in backbone.stage_ends:
        stages.append(x)
    return _pack(backbone, stages)


def _positions(backbone: Any, height: int, width: int) -> Tensor:
    """(1, H, W, C): a coarse table stretched over the image, and one repeated in every window."""
    window = backbone.pos_embed_window
    coarse = F.interpolate(backbone.pos_embed, size=(height, width), mode="bicubic")
    fine = window.repeat(1, 1, height // window.shape[2], width // window.shape[3])
    table: Tensor = coarse + fine
    return table.permute(0, 2, 3, 1)


def _block(block: Any, x: Tensor) -> Tensor:
    """One block; the first of a stage halves the grid by pooling its queries and its shortcut."""
    attn, stride, window = block.attn, block.query_stride, block.window_size
    normed = block.layer_norm1(x)
    if block.dim != block.dim_out:
        # One type for all stages under autocast, so that they can be kept in one tensor.
        x = _pool(block.proj(normed), stride).to(x.dtype)
    qkv = attn.qkv(normed)
    mixed = _attend(attn, cut_windows(qkv, window, attn.qkv.bias) if window else qkv, stride)
    if window:
        side = window // stride[0] if stride else window
        # With gaps in its input a linear layer makes many small products instead of a large one.
        mixed = join_windows(mixed, side, x.shape[1], x.shape[2]).contiguous()
    x = x + attn.proj(mixed)
    return x + block.mlp(block.layer_norm2(x))  # type: ignore[no-any-return]


def _attend(attn: Any, qkv: Tensor, stride: list[int] | None) -> Tensor:
    """Multi-head attention within each grid: (B, H, W, 3C) -> (B, H, W, C), pooled by `stride`."""
    q, k, v = qkv.chunk(3, -1)
    q = _pool(q, stride)
    b, h, w, c = q.shape
    heads = attn.num_attention_heads
    q, k, v = (x.reshape(b, -1, heads, c // heads).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h, w, c)


def _pool(x: Tensor, stride: list[int] | None) -> Tensor:
    """(B, H, W, C) -> the largest of every `stride` places."""
    if not stride:
        return x
    return F.max_pool2d(x.permute(0, 3, 1, 2), stride, stride).permute(0, 2, 3, 1)


def _pyramid(encoder: Any, stages: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The neck: (B, C, H, W) maps from low to high resolution; the lowest only feeds the next."""
    neck, maps = encoder.neck, list[Tensor]()
    for conv, level in zip(neck.convs, reversed(range(len(stages))), strict=True):
        lateral: Tensor = conv(stages[level].permute(0, 3, 1, 2))
        if maps and level in neck.fpn_top_down_levels:
            above = F.interpolate(maps[-1].float(), scale_factor=2.0, mode="nearest")
            lateral = lateral + above.to(lateral.dtype)
        maps.append(lateral)
    return tuple(maps[-encoder.num_feature_levels :])


def _pack(backbone: Any, stages: Sequence[Tensor]) -> Tensor:
    """Outputs of stages as channels of the coarsest grid, without loss.

    A frozen beginning is kept, batched and split like any image this way, at any input size.
    """
    folded = []
    for x, side in zip(stages, _sides(backbone), strict=False):
        b, h, w, c = x.shape
        places = x.reshape(b, h // side, side, w // side, side, c).transpose(2, 3)
        folded.append(places.reshape(b, h // side, w // side, side * side * c))
    return torch.cat(folded, -1)


def _unpack(backbone: Any, packed: Tensor, first: int) -> tuple[list[Tensor], Tensor]:
    """The inverse of `_pack`: the stages ended before a block, and that block's input."""
    ended = [end for end in backbone.stage_ends if end < first]
    sources = ended if first - 1 in ended else [*ended, first - 1]
    widths = [backbone.blocks[index].dim_out for index in sources]
    sides = _sides(backbone)[: len(sources)]
    sizes = [side * side * c for side, c in zip(sides, widths, strict=True)]
    parts = torch.split(packed, sizes, -1)
    b, h, w, _ = packed.shape
    stages = [
        part.reshape(b, h, w, side, side, c).transpose(2, 3).reshape(b, h * side, w * side, c)
        for part, side, c in zip(parts, sides, widths, strict=True)
    ]
    return stages[: len(ended)], stages[-1]


def _sides(backbone: Any) -> list[int]:
    """Tokens of each stage along one side of a token of the last."""
    count = len(backbone.stage_ends)
    return [2 ** (count - 1 - stage) for stage in range(count)]
