"""SAM's attention: within windows of a grid of tokens, with decomposed relative positions, exact.

The score of a query and a key gains one term for the distance of their rows and one for that of
their columns, and both depend on the query. As an additive mask that needs gradients this would
push torch's fused kernel onto its slow path, so there are two other forms:

* on a GPU the positions become extra channels of the fused kernel;
* on a processor, where those channels would double the arithmetic, blocks of scores are computed,
  used and dropped while they are in cache, and computed again in the backward pass, as
  FlashAttention does (arXiv 2205.14135). Nothing is kept but the tokens and the result, windows are
  neither cut nor joined, and queries that only fill up a window are left out.

Legend: B batch, H W rows and columns of the grid, h w of a window, C channels, heads, d channels of
a head, n queries of a window, m its keys, P tokens without a place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from samaritan.models.windows import cut_windows, join_windows

_BLOCK_SCORES = 2**19
"""Scores computed at once: 2 MiB in fp32, about the second-level cache of a core. Measured: 2^17 to
2^20 differ by less than a fifth."""


def attend(
    qkv: Tensor,
    padding: Tensor,
    tables: tuple[Tensor, Tensor],
    *,
    heads: int,
    scale: float,
    window: int,
    tokens: Tensor | None = None,
) -> Tensor:
    """Multi-head attention within each window of a grid.

    Args:
        qkv: (B, H, W, 3C).
        padding: (3C,) what a window at the border holds beyond the grid.
        tables: (2h - 1, d) and (2w - 1, d), position scores by distance of rows and of columns.
        heads: Attention heads.
        scale: Of the products of queries and keys alone.
        window: Side of a window; 0 for one window over the whole grid.
        tokens: (P, 3C) without a place, the same for every window; looked at, never looking.

    Returns:
        (B, H, W, C).
    """
    tokens = qkv.new_empty(0, qkv.shape[-1]) if tokens is None else tokens
    positions = torch.cat(tables).to(qkv.dtype)
    side = (window, window) if window else (qkv.shape[1], qkv.shape[2])
    form = blocked_attention if qkv.device.type == "cpu" else fused_attention
    return form(qkv, padding, positions, tokens, heads, scale, side)


def fused_attention(
    qkv: Tensor, padding: Tensor, positions: Tensor, tokens: Tensor, heads: int, scale: float,
    side: tuple[int, int],
) -> Tensor:  # fmt: skip
    """`attend` on torch's fused kernel, with the tables one after the other in `positions`.

    q.k + rel_h[row] + rel_w[column] equals [q, rel_h, rel_w] . [k, onehot(row), onehot(column)].
    """
    _, h, w, channels = qkv.shape
    (rows, columns), n = side, side[0] * side[1]
    cut = side != (h, w)
    windows = cut_windows(qkv, side[0], padding) if cut else qkv
    windows = torch.cat([windows.flatten(1, 2), tokens.expand(len(windows), -1, -1)], 1)
    split = windows.reshape(*windows.shape[:2], 3, heads, -1)
    q, k, v = split.permute(2, 0, 3, 1, 4)
    q = q[..., :n, :]
    scores = _position_scores(q, positions, _distances(side, side, q.device))
    places = torch.eye(rows, dtype=q.dtype, device=q.device).repeat_interleave(columns, 0)
    where = torch.cat(
        [places, torch.eye(columns, dtype=q.dtype, device=q.device).repeat(rows, 1)], -1
    )
    where = F.pad(where, (0, 0, 0, len(tokens))).expand(*k.shape[:-1], -1)
    out = F.scaled_dot_product_attention(
        torch.cat([q * scale, scores], -1),
        torch.cat([k, where], -1),
        F.pad(v, (0, rows + columns)),
        scale=1.0,
    )
    grids = out[..., : k.shape[-1]].transpose(1, 2).reshape(-1, *side, channels // 3)
    return join_windows(grids, side[0], h, w) if cut else grids


def blocked_attention(
    qkv: Tensor, padding: Tensor, positions: Tensor, tokens: Tensor, heads: int, scale: float,
    side: tuple[int, int],
) -> Tensor:  # fmt: skip
    """`attend` in blocks of scores, with the tables one after the other in `positions`."""
    shape = _Shape(heads, scale, side)
    out: Tensor = _Blocked.apply(  # type: ignore[no-untyped-call]
        qkv, padding.to(qkv.dtype), positions, tokens, shape
    )
    return out


def _distances(queries: tuple[int, int], side: tuple[int, int], device: torch.device) -> Tensor:
    """(n, h + w): where the tables hold the distance of each query to each row and column of keys.

    A table's entry for the distance i - j is at i - j + size - 1; the second follows the first.
    """
    h, w = side
    row, column = torch.meshgrid(
        *(torch.arange(size, device=device) for size in queries), indexing="ij"
    )
    rows = row.reshape(-1, 1) - torch.arange(h, device=device) + h - 1
    columns = column.reshape(-1, 1) - torch.arange(w, device=device) + w - 1 + 2 * h - 1
    return torch.cat([rows, columns], -1)


def _position_scores(q: Tensor, positions: Tensor, distances: Tensor) -> Tensor:
    """(..., n, d) queries -> (..., n, h + w): each meets all distances, and picks its keys'."""
    scores = q @ positions.T
    return scores.gather(-1, distances.expand(*scores.shape[:-1], -1))


@dataclass(frozen=True)
class _Shape:
    heads: int
    scale: float
    side: tuple[int, int]


@dataclass(frozen=True)
class _Window:
    """One window of every image: its place, its queries and keys with batch and heads in one axis.

    Attributes:
        rows, columns: What it covers of the grid.
        q: (B * heads, n, d), of the grid alone.
        k, v: (B * heads, m, d), filled up to the whole window, and tokens after it.
        distances: (n, h + w) into the position tables.
    """

    rows: slice
    columns: slice
    q: Tensor
    k: Tensor
    v: Tensor
    distances: Tensor

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Slices of the first two axes whose scores are computed at once."""
        pairs, queries, keys = self.q.shape[0], self.q.shape[1], self.k.shape[1]
        rows = min(queries, max(1, _BLOCK_SCORES // keys))
        step = max(1, _BLOCK_SCORES // (rows * keys))
        for pair in range(0, pairs, step):
            for row in range(0, queries, rows):
                yield slice(pair, pair + step), slice(row, row + rows)

    def weights(self, at: tuple[slice, slice], positions: Tensor, shape: _Shape) -> Tensor:
        """The softmax of one block of scores."""
        scores = _position_scores(self.q[at], positions, self.distances[at[1]])
        by_row, by_column = scores.split(shape.side, -1)  # type: ignore[no-untyped-call]
        bias = (by_row[..., :, None] + by_column[..., None, :]).flatten(-2)
        k = self.k[at[0]]
        bias = F.pad(bias, (0, k.shape[1] - bias.shape[-1]))
        scores = torch.baddbmm(bias, self.q[at], k.transpose(1, 2), alpha=shape.scale)
        return scores.softmax(-1, dtype=torch.float32).to(k.dtype)


def _windows(qkv: Tensor, padding: Tensor, tokens: Tensor, shape: _Shape) -> Iterator[_Window]:
    b, h, w, _ = qkv.shape
    (rows, columns), third = shape.side, qkv.shape[-1] // 3
    for top in range(0, h, rows):
        for left in range(0, w, columns):
            at = (slice(top, min(top + rows, h)), slice(left, min(left + columns, w)))
            grid = qkv[:, at[0], at[1]]
            extent = (grid.shape[1], grid.shape[2])
            q = _split_heads(grid[..., :third].flatten(1, 2), shape.heads)
            keys = grid[..., third:]
            if extent != shape.side:
                filled = padding[third:].expand(b, rows, columns, -1).clone()
                filled[:, : extent[0], : extent[1]] = keys
                keys = filled
            keys = keys.flatten(1, 2)
            if len(tokens):
                keys = torch.cat([keys, tokens[:, third:].expand(b, -1, -1)], 1)
            k, v = (_split_heads(x, shape.heads) for x in keys.split(third, -1))  # type: ignore[no-untyped-call]
            yield _Window(*at, q, k, v, _distances(extent, shape.side, qkv.device))


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, n, C) -> (B * heads, n, d)."""
    b, n, c = x.shape
    return x.reshape(b, n, heads, c // heads).transpose(1, 2).reshape(b * heads, n, c // heads)


def _join_heads(x: Tensor, heads: int) -> Tensor:
    """(B * heads, n, d) -> (B, n, C)."""
    pairs, n, d = x.shape
    return x.view(pairs // heads, heads, n, d).transpose(1, 2).reshape(-1, n, heads * d)


class _Blocked(torch.autograd.Function):
    """The forward and backward pass of `blocked_attention`."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, padding: Tensor, positions: Tensor, tokens: Tensor, shape: _Shape
    ) -> Tensor:
        b, h, w, channels = qkv.shape
        out = qkv.new_empty(b, h, w, channels // 3)
        for window in _windows(qkv, padding, tokens, shape):
            mixed = torch.empty_like(window.q)
            for at in window.blocks():
                mixed[at] = window.weights(at, positions, shape) @ window.v[at[0]]
            target = out[:, window.rows, window.columns]
            target.copy_(_join_heads(mixed, shape.heads).view(target.shape))
        ctx.save_for_backward(qkv, padding, positions, tokens, out)
        ctx.shape = shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:
        qkv, padding, positions, tokens, out = ctx.saved_tensors
        shape: _Shape = ctx.shape
        third, heads = out.shape[-1], shape.heads
        grad_qkv = torch.empty_like(qkv)
        grad_padding, grad_tokens = torch.zeros_like(padding), torch.zeros_like(tokens)
        grad_positions = torch.zeros_like(positions)
        for window in _windows(qkv, padding, tokens, shape):
            place = (slice(None), window.rows, window.columns)
            grad = _split_heads(gradients[0][place].flatten(1, 2), heads)
            mixed = _split_heads(out[place].flatten(1, 2), heads)
            grads = _window_gradients(window, grad, mixed, positions, shape)
            target = grad_qkv[place]
            target[..., :third] = _join_heads(grads.q, heads).view(*target.shape[:-1], -1)
            keys = torch.cat([_join_heads(x, heads) for x in (grads.k, grads.v)], -1)
            cells = shape.side[0] * shape.side[1]
            filled = keys[:, :cells].view(len(keys), *shape.side, -1)
            inside = filled[:, : target.shape[1], : target.shape[2]]
            target[..., third:] = inside
            if ctx.needs_input_grad[1]:
                grad_padding[third:] += filled.sum((0, 1, 2)) - inside.sum((0, 1, 2))
            grad_tokens[:, third:] += keys[:, cells:].sum(0)
            grad_positions += grads.positions
        return grad_qkv, grad_padding, grad_positions, grad_tokens, None


@dataclass(frozen=True)
class _WindowGradients:
    q: Tensor
    k: Tensor
    v: Tensor
    positions: Tensor


def _window_gradients(
    window: _Window, grad: Tensor, mixed: Tensor, positions: Tensor, shape: _Shape
) -> _WindowGradients:
    """Gradients of one window, given those of its result, both (B * heads, n, d)."""
    q, k, v = window.q, window.k, window.v
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    grad_positions = torch.zeros_like(positions)
    for at in window.blocks():
        pairs, rows = at
        weights = window.weights(at, positions, shape)
        grad_v[pairs] += weights.transpose(1, 2) @ grad[at]
        scores = grad[at] @ v[pairs].transpose(1, 2)
        scores -= (grad[at] * mixed[at]).sum(-1, keepdim=True)
        scores *= weights
        h, w = shape.side
        placed = scores[..., : h * w].reshape(*scores.shape[:-1], h, w)
        by_distance = scores.new_zeros(*scores.shape[:-1], len(positions))
        distances = window.distances[rows].expand(scores.shape[0], -1, -1)
        by_distance.scatter_(-1, distances, torch.cat([placed.sum(-1), placed.sum(-2)], -1))
        grad_positions += by_distance.flatten(0, 1).T @ q[at].flatten(0, 1)
        torch.baddbmm(by_distance @ positions, scores, k[pairs], alpha=shape.scale, out=grad_q[at])
        grad_k[pairs] += scores.transpose(1, 2) @ q[at] * shape.scale
    return _WindowGradients(grad_q, grad_k, grad_v, grad_positions)
