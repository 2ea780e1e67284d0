"""Prompts made from labels: jittered for training, exact ones (an oracle) for evaluation.

Mask i of the model is class i, so prompts say where structures are and not which they are.
Legend: B records, H W model input. Points are (x, y) in pixels, whole numbers at pixel centres.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from samaritan.models.family import Prompts

_NOISE_FRACTION, _MOST_NOISE_PX = 0.1, 20.0
"""Noise on each coordinate of a training box: its standard deviation as a share of the box's side,
and its bound. From the training of SAM (arXiv 2304.02643, appendix A)."""

_NOTHING, _INSIDE, _TOP_LEFT, _BOTTOM_RIGHT = -1, 1, 2, 3
"""SAM's labels of points."""


def draw_prompts(labels: Tensor, kind: str, generator: torch.Generator) -> Prompts | None:
    """Prompts as a hurried reader would give them, for training.

    Args:
        labels: (B, H, W) int64, after augmentation.
        kind: "none"; "box", one around all structures of a record, with noise; "point", one drawn
            uniformly in each structure; "mixed", for each record one of these three.
        generator: Decides everything random; "none" takes nothing from it.

    Returns:
        Prompts, nothing for a record without structures; None for the kind "none".
    """
    if kind == "none":
        return None
    if kind == "box":
        return _jittered(_boxes(labels), labels.shape, generator)
    if kind == "point":
        return _random_points(labels, generator)
    choice = torch.randint(3, (len(labels),), generator=generator)
    boxes = _jittered(_boxes(labels), labels.shape, generator)
    points = _random_points(labels, generator)
    return _joined(_only(boxes, choice == 1), _only(points, choice == 2))


def oracle_prompts(labels: Tensor, kind: str) -> Prompts:
    """The best prompts there could be, for evaluation: they come from the true label.

    Args:
        labels: (B, H, W) class indices.
        kind: "box", tight around all structures; "point", in each structure the pixel farthest
            from its border.
    """
    prompts = _boxes(labels) if kind == "box" else _deepest_points(labels.cpu())
    return prompts.to(labels.device)


def with_oracle(
    model: Callable[[Tensor, Prompts], Tensor], kind: str
) -> Callable[[Tensor], Tensor]:
    """A model that takes its prompts from the label in the last channel of its input.

    The label travels with the image, so that windows and mirrored views show the same part of both.
    """

    def forward(images: Tensor) -> Tensor:
        return model(images[:, :-1], oracle_prompts(images[:, -1].long(), kind))

    return forward


def _boxes(labels: Tensor) -> Prompts:
    """(B, 2) corners of the tight box around everything labelled; the last pixel is inside."""
    marked = labels > 0
    (left, right), (top, bottom) = _ends(marked.any(1)), _ends(marked.any(2))
    points = torch.stack([left, top, right, bottom], 1).view(-1, 2, 2).float()
    kinds = torch.tensor([_TOP_LEFT, _BOTTOM_RIGHT], device=labels.device).expand(len(labels), 2)
    return _only(Prompts(points, kinds), marked.flatten(1).any(1))


def _ends(marked: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N) -> the first and the last index that is marked, (B,) each."""
    counts = marked.int()  # argmax of equal values is the first
    return counts.argmax(1), marked.shape[1] - 1 - counts.flip(1).argmax(1)


def _jittered(boxes: Prompts, shape: torch.Size, generator: torch.Generator) -> Prompts:
    """Boxes with SAM's noise, kept inside the image."""
    sides = boxes.points[:, 1:] - boxes.points[:, :1] + 1
    noise = torch.randn(boxes.points.shape, generator=generator) * _NOISE_FRACTION * sides
    moved = boxes.points + noise.clamp(-_MOST_NOISE_PX, _MOST_NOISE_PX)
    last = torch.tensor([shape[2] - 1, shape[1] - 1])
    # Noise may turn a box of a few pixels inside out.
    return Prompts(moved.clamp(min=0).minimum(last).sort(1).values, boxes.labels)


def _random_points(labels: Tensor, generator: torch.Generator) -> Prompts:
    """(B, N) one point in each structure, uniform over its pixels; column n - 1 is for class n."""
    prompts = _no_points(labels)
    for column in range(prompts.labels.shape[1]):
        pixels = (labels == column + 1).nonzero()  # (record, row, column), in the order of records
        sizes = pixels[:, 0].bincount(minlength=len(labels))
        drawn = torch.rand(len(labels), generator=generator, dtype=torch.float64) * sizes
        found = sizes > 0
        chosen = (sizes.cumsum(0) - sizes + drawn.long())[found]
        prompts.points[found, column] = pixels[chosen][:, [2, 1]].float()
        prompts.labels[found, column] = _INSIDE
    return prompts


def _deepest_points(labels: Tensor) -> Prompts:
    """(B, N) in each structure the pixel farthest from its border and from the image's edge."""
    prompts = _no_points(labels)
    for record, plane in enumerate(labels.numpy()):
        for column, box in enumerate(ndimage.find_objects(plane)):
            if box is None:
                continue
            depth = ndimage.distance_transform_edt(np.pad(plane[box] == column + 1, 1))
            row_in_box, column_in_box = np.unravel_index(depth.argmax(), depth.shape)
            x, y = box[1].start + column_in_box - 1, box[0].start + row_in_box - 1
            prompts.points[record, column] = torch.tensor((x, y))
            prompts.labels[record, column] = _INSIDE
    return prompts


def _no_points(labels: Tensor) -> Prompts:
    """Room for one point in each class that occurs, or could."""
    shape = (len(labels), int(labels.max()))
    return Prompts(torch.zeros(*shape, 2), torch.full(shape, _NOTHING))


def _only(prompts: Prompts, records: Tensor) -> Prompts:
    """The prompts of records (B,) alone; the others get none."""
    return Prompts(prompts.points, prompts.labels.where(records[:, None], _NOTHING))


def _joined(*prompts: Prompts) -> Prompts:
    """All prompts of each record."""
    return Prompts(
        torch.cat([p.points for p in prompts], 1), torch.cat([p.labels for p in prompts], 1)
    )
