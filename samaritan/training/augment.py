"""Random views of a batch of slices: mirror, affine, intensity. One draw per slice."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from samaritan.config import TrainingConfig

BODY_AXES = {"left-right": 0, "anterior-posterior": 1, "superior-inferior": 2}
"""Canonical volume axis that each name mirrors."""


def augment(
    images: Tensor, labels: Tensor, slice_axes: Sequence[int], settings: TrainingConfig,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Augments a batch.

    Args:
        images: (B, K, H, W) float32, 0 to 1.
        labels: (B, H, W) int64.
        slice_axes: Volume axis that each record's slices run along; rows are the higher other axis.
        settings: Strengths.
        generator: Decides everything random.

    Returns:
        Images and labels of the same shapes.
    """
    b = images.shape[0]
    for name in settings.flip:
        chosen = torch.rand(b, generator=generator) < 0.5
        dims = torch.tensor([mirror_dims(BODY_AXES[name], axis) for axis in slice_axes])
        for dim in set(dims.tolist()):
            picked = chosen & (dims == dim)
            images = torch.where(picked[:, None, None, None], images.flip(dim), images)
            if dim != 1:  # mirroring the context does not move the labelled slice
                labels = torch.where(picked[:, None, None], labels.flip(dim - 1), labels)
    if settings.rotate_degrees or settings.scale_fraction or settings.shift_fraction:
        images, labels = _affine(images, labels, settings, generator)
    if settings.intensity_fraction:
        images = _intensity(images, settings.intensity_fraction, generator)
    return images, labels


def mirror_dims(body_axis: int, slice_axis: int) -> int:
    """Dimension of (B, K, H, W) that mirrors a body axis: 1 context, 2 rows, 3 columns."""
    if body_axis == slice_axis:
        return 1
    rows = max(axis for axis in range(3) if axis != slice_axis)
    return 2 if body_axis == rows else 3


def _affine(
    images: Tensor, labels: Tensor, settings: TrainingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    b, _, h, w = images.shape
    angle, grow, right, down = (2 * torch.rand(4, b, generator=generator) - 1).unbind()
    angle = angle * math.radians(settings.rotate_degrees)
    scale = torch.exp(grow * math.log1p(settings.scale_fraction))
    shift = torch.stack([right, down], 1) * 2 * settings.shift_fraction
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    # The grid's units are half sides, (x, y); the ratio keeps right angles on a rectangle.
    theta = torch.stack(
        [cos, -sin * h / w, shift[:, 0], sin * w / h, cos, shift[:, 1]], 1
    ).view(b, 2, 3)  # fmt: skip
    grid = F.affine_grid(theta, [b, 1, h, w], align_corners=False)
    images = F.grid_sample(images, grid, mode="bilinear", align_corners=False)
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", align_corners=False)
    return images, moved[:, 0].long()


def _intensity(images: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    """Gamma, contrast and brightness, each by up to the fraction; noise of a tenth of it."""
    b = images.shape[0]
    gamma, contrast, bright, level = torch.rand(4, b, 1, 1, 1, generator=generator).unbind()
    images = images.clamp(0, 1) ** torch.exp((2 * gamma - 1) * math.log1p(fraction))
    middle = images.mean((1, 2, 3), keepdim=True)
    images = middle + (images - middle) * (1 + fraction * (2 * contrast - 1))
    images = images + 0.5 * fraction * (2 * bright - 1)
    noise = torch.randn(images.shape, generator=generator)
    return images + 0.1 * fraction * level * noise
