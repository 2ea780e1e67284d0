"""The embedded miniature of SAM: what it starts from, without a checkpoint."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_SEED = 20261122


def initialise(construct: Callable[[], Any]) -> Any:
    """A SAM without a checkpoint, the same whatever the number of threads.

    Linear layers of the two transformers are orthogonal, positions are sine waves, and each
    attention head starts by looking at one neighbouring token, as a convolution does (Cordonnier et
    al., arXiv 1911.03584): with few data, features that begin local learn faster.
    """
    # Sums round by how they are shared out, and the base is known by the hash of its bits.
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        sam = construct()
        for layer in [*sam.image_encoder.blocks.modules(), *sam.mask_decoder.transformer.modules()]:
            if isinstance(layer, nn.Linear):
                for part in torch.split(layer.weight.data, layer.in_features):
                    nn.init.orthogonal_(part)
                nn.init.zeros_(layer.bias)
        grid, width = sam.image_encoder.pos_embed.shape[1], sam.image_encoder.pos_embed.shape[-1]
        sam.image_encoder.pos_embed.data = 0.5 * _sine_positions(grid, width)
        for index, block in enumerate(sam.image_encoder.blocks):
            _look_at_neighbours(block.attn, index)
    return sam


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Lets torch compute on one thread for a while."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _sine_positions(grid: int, width: int) -> Tensor:
    """(1, grid, grid, width): sines and cosines of the row and of the column."""
    place = torch.arange(grid, dtype=torch.float32)
    rates = torch.exp(-math.log(100.0) * torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    waves = [f(p[..., None] * rates) for p in (rows, columns) for f in (torch.sin, torch.cos)]
    return torch.cat(waves, -1)[None]


_OFFSETS = (
    ((-1, 0), (1, 0), (0, -1), (0, 1)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((-2, 0), (2, 0), (0, -2), (0, 2)),
)
"""(row, column) offsets the heads begin with, one tuple per block in turn."""
_SHARPNESS, _BIAS, _CONTENT = 1.5, 4.0, 0.5


def _look_at_neighbours(attn: Any, index: int) -> None:
    """Makes each head of an attention prefer the token at one offset.

    With position tables -d^2 u + d v and a query bias u - 2 o v, the score of a key d tokens
    before the query is -(d + o)^2 up to a constant: highest for the key at offset o. Content is
    kept out of the three directions that carry positions.
    """
    heads, width = attn.num_heads, attn.proj.in_features
    d = width // heads
    square, down, right = torch.linalg.qr(torch.randn(d, d))[0].T[:3]
    distance = torch.arange(attn.rel_pos_h.shape[0], dtype=torch.float32)
    distance -= distance.mean()
    for table, direction in ((attn.rel_pos_h, down), (attn.rel_pos_w, right)):
        values = torch.outer(distance, direction) - torch.outer(distance**2, square)
        table.data = values * _SHARPNESS / _BIAS
    apart = torch.eye(d) - sum(torch.outer(v, v) for v in (square, down, right))
    weight, bias = attn.qkv.weight.data, attn.qkv.bias.data
    weight[:width] *= _CONTENT
    offsets = _OFFSETS[index % len(_OFFSETS)]
    for head in range(heads):
        row, column = offsets[head % len(offsets)]
        for start in (head * d, width + head * d):
            weight[start : start + d] = apart @ weight[start : start + d]
        bias[head * d : (head + 1) * d] = _BIAS * (square - 2 * (row * down + column * right))
