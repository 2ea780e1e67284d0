"""Matrices as the product of two thin ones: the best of a rank, by truncated SVD."""

from __future__ import annotations

import torch
from torch import Tensor


def factor_shapes(shape: tuple[int, ...], rank: int | None) -> list[tuple[int, ...]]:
    """Shapes of the two factors of a matrix; the tensor's own where that is no larger."""
    if rank is None or len(shape) != 2 or rank * sum(shape) >= shape[0] * shape[1]:
        return [shape]
    return [(shape[0], rank), (rank, shape[1])]


def factorise(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of a matrix, of equal length in each of their `rank` directions.

    Args:
        matrix: (m, n) float32, finite.
        rank: Below m and n.

    Returns:
        (m, rank) and (rank, n) float32; their product is the nearest to the matrix of that rank.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, right = factorise(matrix.T, rank)
        return right.T, left.T
    # A LoRA factor is thin, and the eigenvectors of its small Gram matrix are far cheaper than an
    # SVD. In float64 squaring costs no digit that float32 has.
    wide = matrix.double()
    directions = torch.linalg.eigh(wide.T @ wide).eigenvectors[:, -rank:]
    left = wide @ directions
    root = left.norm(dim=0).sqrt()
    left = left / root.where(root > 0, torch.ones_like(root))
    return left.float(), (directions * root).T.float()


def product(left: Tensor, right: Tensor) -> Tensor:
    """The matrix of two factors, summed in a fixed order: the same to the bit on every machine.

    Args:
        left: (m, rank) float32.
        right: (rank, n) float32.
    """
    out = torch.zeros(left.shape[0], right.shape[1])
    for column, row in zip(left.T, right, strict=True):
        out += column[:, None] * row
    return out
