"""The forward pass of SAM's image encoder, on the official modules and weights.

Two things differ from `ImageEncoderViT.forward`, and neither changes the result:

* q, k and v are computed before the windows are cut, on (B, H, W, C). Fewer padded tokens are
  computed, and an adapter on qkv sees the batch dimension, which per-record gradients need.
* Position tables keep their official shape and are resized on the fly, so that any input size
  runs on an official state dict.

Legend: B batch, H W token rows and columns, C channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from samaritan.models.attention import attend


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
        (B, out_chans, H, W) embeddings, or (B, H, W, C) tokens where `blocks` says where to end.
    """
    first, last, _ = blocks.indices(len(encoder.blocks))
    if first == 0:
        # Sums round by the layout too, and tokens that were kept have this one.
        x = encoder.patch_embed(x).contiguous()
        if encoder.pos_embed is not None:
            x = x + resized_positions(encoder.pos_embed, (x.shape[1], x.shape[2]))
    for block in encoder.blocks[first:last]:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(_block, block, x, use_reentrant=False, preserve_rng_state=False)
        else:
            x = _block(block, x)
    if blocks.stop is not None:  # also after the last block, so that a trained neck is run anew
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
    attn = block.attn
    if hasattr(block, "before_attention"):
        x = block.before_attention(x)
    tokens = attn.qkv(block.norm1(block.tokens)) if hasattr(block, "tokens") else None
    qkv = attn.qkv(block.norm1(x))
    attended = attn.proj(_attend(attn, qkv, block.window_size, tokens))
    if hasattr(block, "depth_branch"):
        branch = block.depth_branch
        along = branch.unfold(_attend(attn, branch.fold(qkv), 0, tokens), *x.shape[1:3])
        # By the frozen weights alone: what is added to the projection is not meant for this branch.
        along = F.linear(along, attn.proj.weight, attn.proj.bias)
        attended = attended + branch.bottleneck(along)
    x = x + attended
    if hasattr(block, "after_attention"):
        x = block.after_attention(x)
    return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]


def _attend(attn: Any, qkv: Tensor, window: int, tokens: Tensor | None) -> Tensor:
    """(B, H, W, 3C) -> (B, H, W, C)."""
    rows, columns = (window, window) if window else qkv.shape[1:3]
    tables = (resized_table(attn.rel_pos_h, rows), resized_table(attn.rel_pos_w, columns))
    # The official order fills up windows with zeros before qkv, and qkv(0) is the bias.
    return attend(
        qkv, attn.qkv.bias, tables, heads=attn.num_heads, scale=attn.scale, window=window,
        tokens=tokens,
    )  # fmt: skip


def resized_table(table: Tensor, size: int) -> Tensor:
    """(2 * size0 - 1, d) -> (2 * size - 1, d), as the official `get_rel_pos` resizes it."""
    if table.shape[0] == 2 * size - 1:
        return table
    return F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
