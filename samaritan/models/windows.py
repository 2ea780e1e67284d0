"""Cutting a grid of tokens into square windows, and joining them again.

Legend: B batch, H W rows and columns of the grid, C channels.
"""

from __future__ import annotations

from torch import Tensor


def cut_windows(qkv: Tensor, window: int, bias: Tensor) -> Tensor:
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


def join_windows(windows: Tensor, window: int, h: int, w: int) -> Tensor:
    """The inverse of `cut_windows` for (B * windows, window, window, C), padding dropped."""
    rows, columns = -(-h // window), -(-w // window)
    grid = windows.reshape(-1, rows, columns, window, window, windows.shape[-1])
    return grid.transpose(2, 3).reshape(-1, rows * window, columns * window, windows.shape[-1])[
        :, :h, :w
    ]
