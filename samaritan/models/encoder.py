"""The forward pass of SAM's image encoder, on the official modules and weights.

Two things differ from `ImageEncoderViT.forward`, and neither changes the result:

* q, k and v are computed before the windows are cut, on (B, H, W, C). Fewer padded tokens are
  computed, and an adapter on qkv sees the batch dimension, which per-record gradients need.
* Position tables keep their official shape and are resized on the fly, so that any input size
  runs on an official state dict.

Legend: B batch, H W token rows and columns, C channels, h heads, d channels of a head, n tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_DIRECT_TOKENS = 256
"""Up to this many tokens the plain softmax is as fast as the fused kernel (notes: 14x14)."""


def encode_image(
    encoder: Any, x: Tensor, blocks: slice = slice(None), recompute: bool = False
) -> Tensor:
    """Image embeddings of an official `ImageEncoderViT`, or one stretch of the way to them.

    Args:
        encoder: The official module, with or without adapters.
        x: (B, channels, rows, columns), normalised; sides a multiple of the patch size. Where
            `blocks` begins after the first block, the (B, H, W, C) tokens that block takes.
        blocks: The blocks to run; all of them by default.
        recompute: Keep only each block's input for the backward pass, and run the block again.

    Returns:
        (B, out_chans, H, W) embeddings, or (B, H, W, C) tokens where `blocks` ends before the last.
    """
    first, last, _ = blocks.indices(len(encoder.blocks))
    if first == 0:
        x = encoder.patch_embed(x)
        if encoder.pos_embed is not None:
            x = x + resized_positions(encoder.pos_embed, (x.shape[1], x.shape[2]))
    for block in encoder.blocks[first:last]:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(_block, block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _block(block, x)
    if last < len(encoder.blocks):
        return x
    embedding: Tensor = encoder.neck(x.permute(0, 3, 1, 2))
    return embedding


def resized_positions(table: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, H0, W0, C) -> (1, H, W, C); bilinear, as SAMed and FLAP-SAM resize it."""
    if table.shape[1:3] == size:
        return table
    resized = F.interpolate(
        table.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False
    )
    return resized.permute(0, 2, 3, 1)


def _block(block: Any, x: Tensor) -> Tensor:
    """One transformer block with whatever a preset has added to it; x is (B, H, W, C)."""
    height, width = x.shape[1:3]
    attn = block.attn
    if hasattr(block, "before_attention"):
        x = block.before_attention(x)
    tokens = attn.qkv(block.norm1(block.tokens)) if hasattr(block, "tokens") else None
    qkv = attn.qkv(block.norm1(x))
    windows = _cut_windows(qkv, block.window_size, attn.qkv.bias) if block.window_size else qkv
    mixed = _attend(attn, windows, tokens)
    if block.window_size:
        mixed = _join_windows(mixed, block.window_size, height, width)
    attended = attn.proj(mixed)
    if hasattr(block, "depth_branch"):
        branch = block.depth_branch
        along = branch.unfold(_attend(attn, branch.fold(qkv), tokens), height, width)
        attended = attended + branch.bottleneck(attn.proj(along))
    x = x + attended
    if hasattr(block, "after_attention"):
        x = block.after_attention(x)
    return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]


def _attend(attn: Any, qkv: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Multi-head attention within each grid, and to tokens without a place on it.

    Args:
        attn: Gives heads, scale and position tables.
        qkv: (B, H, W, 3C).
        tokens: (P, 3C), the same for every grid; only looked at, never looking.

    Returns:
        (B, H, W, C).
    """
    b, h, w, channels = qkv.shape
    n, heads, d = h * w, attn.num_heads, channels // 3 // attn.num_heads
    q, k, v = qkv.reshape(b, n, 3, heads, d).permute(2, 0, 3, 1, 4)
    rel_h, rel_w = _relative_positions(attn, q, h, w)
    if tokens is not None:
        _, more_k, more_v = tokens.reshape(-1, 3, heads, d).permute(1, 2, 0, 3)
        k = torch.cat([k, more_k.expand(b, -1, -1, -1)], 2)
        v = torch.cat([v, more_v.expand(b, -1, -1, -1)], 2)
    if n > _DIRECT_TOKENS:
        out = _fused_attention(q * attn.scale, k, v, rel_h, rel_w)
    else:
        out = _direct_attention(q, k, v, rel_h, rel_w, scale=attn.scale)
    return out.transpose(1, 2).reshape(b, h, w, channels // 3)


def _relative_positions(attn: Any, q: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Decomposed relative position scores (B, heads, n, H) and (B, heads, n, W).

    Every query meets every distance in one product, and each picks the distances of its keys.
    """
    tables = torch.cat([resized_table(attn.rel_pos_h, h), resized_table(attn.rel_pos_w, w)])
    scores = q @ tables.T
    row, column = torch.meshgrid(
        torch.arange(h, device=q.device), torch.arange(w, device=q.device), indexing="ij"
    )
    # A table's entry for the distance i - j is at i - j + size - 1.
    rows = row.reshape(-1, 1) - row[:, :1].T + h - 1
    columns = column.reshape(-1, 1) - column[:1] + w - 1 + 2 * h - 1
    index = torch.cat([rows, columns], -1).expand(*scores.shape[:-1], h + w)
    rel_h, rel_w = scores.gather(-1, index).split([h, w], -1)  # type: ignore[no-untyped-call]
    return rel_h, rel_w


def resized_table(table: Tensor, size: int) -> Tensor:
    """(2 * size0 - 1, d) -> (2 * size - 1, d), as the official `get_rel_pos` resizes it."""
    if table.shape[0] == 2 * size - 1:
        return table
    return F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T


def _direct_attention(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor, scale: float
) -> Tensor:
    """The plain softmax, with the scores added to the bias as they are computed."""
    b, heads, n, d = q.shape
    bias = (rel_h[..., :, None] + rel_w[..., None, :]).reshape(b * heads, n, n)
    q, k, v = (x.reshape(b * heads, -1, d) for x in (q, k, v))
    if k.shape[1] > n:
        bias = F.pad(bias, (0, k.shape[1] - n))
    out = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1) @ v
    return out.view(b, heads, n, d)


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Exact attention with relative positions on the fused kernel, gradients included.

    q.k + rel_h[kh] + rel_w[kw] equals [q, rel_h, rel_w] . [k, onehot(kh), onehot(kw)], so the bias
    becomes extra channels; as an additive mask that needs gradients it would fall back to the slow
    kernel.
    """
    h, w, d = rel_h.shape[-1], rel_w.shape[-1], q.shape[-1]
    rows = torch.eye(h, dtype=q.dtype, device=q.device).repeat_interleave(w, 0)
    columns = torch.eye(w, dtype=q.dtype, device=q.device).repeat(h, 1)
    where = F.pad(torch.cat([rows, columns], -1), (0, 0, 0, k.shape[2] - h * w))
    out = F.scaled_dot_product_attention(
        torch.cat([q, rel_h.to(q.dtype), rel_w.to(q.dtype)], -1),
        torch.cat([k, where.expand(*k.shape[:-1], h + w)], -1),
        F.pad(v, (0, h + w)),
        scale=1.0,
    )
    return out[..., :d]


def _cut_windows(qkv: Tensor, window: int, bias: Tensor) -> Tensor:
    """(B, H, W, 3C) -> (B * windows, window, window, 3C); padded tokens hold the bias.

    The official order pads the input with zeros, and qkv(0) is the bias.
    """
    b, h, w, c = qkv.shape
    rows, columns = -(-h // window), -(-w // window)
    if (rows * window, columns * window) != (h, w):
        padded = bias.to(qkv.dtype).expand(b, rows * window, columns * window, c).clone()
        padded[:, :h, :w] = qkv
        qkv = padded
    grid = qkv.reshape(b, rows, window, columns, window, c)
    return grid.transpose(2, 3).reshape(-1, window, window, c)


def _join_windows(windows: Tensor, window: int, h: int, w: int) -> Tensor:
    """The inverse of `_cut_windows` for (B * windows, window, window, C), padding dropped."""
    rows, columns = -(-h // window), -(-w // window)
    grid = windows.reshape(-1, rows, columns, window, window, windows.shape[-1])
    return grid.transpose(2, 3).reshape(-1, rows * window, columns * window, windows.shape[-1])[
        :, :h, :w
    ]
