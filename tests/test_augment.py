"""Augmentation: body axes, alignment of image and label, strengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from samaritan.config import TrainingConfig
from samaritan.data.slices import with_context
from samaritan.data.transforms import slice_grid, to_stack
from samaritan.training.augment import BODY_AXES, augment

STILL: dict[str, Any] = {
    "flip": (), "rotate_degrees": 0, "scale_fraction": 0, "shift_fraction": 0,
    "intensity_fraction": 0,
}  # fmt: skip
PLANES = {"sagittal": 0, "coronal": 1, "axial": 2}


def settings(**strengths: Any) -> TrainingConfig:
    return TrainingConfig(**{**STILL, **strengths})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sliced(volume: np.ndarray, plane: Any, index: int) -> tuple[Tensor, Tensor]:
    """One slice with its neighbours, (3, h, w), and its label, as training would see them."""
    grid = slice_grid(volume.shape, (1.0, 1.0, 1.0), plane, 1.0, (64, 64))
    image = with_context(to_stack(volume, grid, "image"), torch.tensor([index]), 3)[0]
    return image, to_stack((volume * 4).astype(np.uint8), grid, "label")[index].long()


@pytest.mark.parametrize("axis", BODY_AXES)
@pytest.mark.parametrize("plane", PLANES)
def test_a_flip_is_a_slice_of_the_mirrored_body(plane: str, axis: str) -> None:
    volume = np.random.default_rng(3).random((6, 7, 8), dtype=np.float32)
    body, along = BODY_AXES[axis], PLANES[plane]
    image, label = sliced(volume, plane, 2)
    index = volume.shape[along] - 1 - 2 if body == along else 2
    mirrored = sliced(np.flip(volume, body).copy(), plane, index)
    assert not torch.equal(mirrored[0], image)
    images, labels = augment(
        image.repeat(16, 1, 1, 1), label.repeat(16, 1, 1), [along] * 16,
        settings(flip=(axis,)), generator(),
    )  # fmt: skip
    flipped = torch.tensor([torch.equal(i, mirrored[0]) for i in images])
    for i, t, is_flipped in zip(images, labels, flipped, strict=True):
        wanted = mirrored if is_flipped else (image, label)
        assert torch.equal(i, wanted[0])
        assert torch.equal(t, wanted[1])
    assert 2 < flipped.sum() < 14


def test_records_cut_differently_are_mirrored_along_the_same_body_axis() -> None:
    volume = np.random.default_rng(4).random((6, 6, 6), dtype=np.float32)
    axes = [2, 1] * 12
    pairs = [sliced(volume, ("coronal", "axial")[axis - 1], 2) for axis in axes]
    images, labels = (torch.stack(part) for part in zip(*pairs, strict=True))
    moved, _ = augment(images, labels, axes, settings(flip=("superior-inferior",)), generator())
    for before, after, axis in zip(images, moved, axes, strict=True):
        dim = 0 if axis == 2 else 1  # context of an axial slice, rows of a coronal one
        assert torch.equal(after, before) or torch.equal(after, before.flip(dim))
    changed = [
        axis for a, b, axis in zip(images, moved, axes, strict=True) if not torch.equal(a, b)
    ]
    assert set(changed) == {1, 2}


def test_flips_are_drawn_apart() -> None:
    image = torch.rand((1, 3, 8, 8), generator=generator(1)).repeat(64, 1, 1, 1)
    both = settings(flip=("left-right", "anterior-posterior"))
    images, _ = augment(image, torch.zeros(64, 8, 8).long(), [2] * 64, both, generator())
    assert len({i.numpy().tobytes() for i in images}) == 4


def spread(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where a label is and what is within a pixel of its outline."""
    marked = labels[:, None].float()
    grown = F.max_pool2d(marked, 3, 1, 1)
    shrunk = -F.max_pool2d(-marked, 3, 1, 1)
    return marked[:, 0] > 0, (grown - shrunk)[:, 0] > 0


@pytest.mark.parametrize("size", [(48, 48), (32, 64)])
@pytest.mark.parametrize(
    "strength",
    [{"rotate_degrees": 40}, {"scale_fraction": 0.4}, {"shift_fraction": 0.2},
     {"rotate_degrees": 20, "scale_fraction": 0.2, "shift_fraction": 0.1}],
    ids=lambda s: "+".join(s),
)  # fmt: skip
def test_label_and_image_move_together(size: tuple[int, int], strength: dict[str, float]) -> None:
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    # A smooth off-centre ellipse, half bright on its outline.
    height = ((rows - size[0] * 0.4) / 9) ** 2 + ((columns - size[1] * 0.55) / 5) ** 2
    image = torch.sigmoid(3 * (1 - height)).expand(12, 3, *size)
    label = (height < 1).long().expand(12, *size)
    images, labels = augment(image, label, [2] * 12, settings(**strength), generator())
    marked, outline = spread(labels)
    assert not ((images[:, 1] > 0.5) ^ marked)[~outline].any()
    assert all(t.any() for t in labels)
    assert sum(not torch.equal(t, label[0]) for t in labels) >= 10
    assert labels.dtype == torch.int64
    assert set(labels.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("size", [(48, 48), (32, 64), (64, 32)])
def test_a_rotation_keeps_a_disc_round(size: tuple[int, int]) -> None:
    rows, columns = torch.meshgrid(*(torch.arange(n) + 0.5 for n in size), indexing="ij")
    disc = ((rows - size[0] / 2) ** 2 + (columns - size[1] / 2) ** 2 < 12**2).long()
    turned = settings(rotate_degrees=90)
    image = disc.float().expand(10, 1, *size)
    _, labels = augment(image, disc.expand(10, *size), [2] * 10, turned, generator())
    for label in labels:
        assert abs(int(label.any(1).sum()) - 24) <= 2
        assert abs(int(label.any(0).sum()) - 24) <= 2


def test_a_shift_is_a_share_of_the_side() -> None:
    label = torch.zeros(200, 40, 80, dtype=torch.int64)
    label[:, 20, 40] = 1
    label[:, 19:22, 39:42] = 1
    moved = augment(
        label[:, None].float(), label, [2] * 200, settings(shift_fraction=0.25), generator()
    )[1]
    centres = torch.stack([t.nonzero().float().mean(0) for t in moved])
    reach = (centres - torch.tensor([20.0, 40.0])).abs().amax(0)
    assert 9 <= reach[0] <= 10.5
    assert 18 <= reach[1] <= 20.5


def test_without_strength_nothing_changes() -> None:
    images = torch.rand((4, 3, 9, 9), generator=generator(2))
    labels = (images[:, 1] > 0.5).long()
    same = augment(images, labels, [2] * 4, settings(), generator())
    assert torch.equal(same[0], images)
    assert torch.equal(same[1], labels)


def test_intensity_changes_leave_the_label_alone() -> None:
    images = torch.rand((6, 3, 16, 16), generator=generator(5))
    labels = (images[:, 1] > 0.5).long()
    kept = images.clone()
    changed, same = augment(images, labels, [2] * 6, settings(intensity_fraction=0.2), generator())
    assert torch.equal(same, labels)
    assert torch.equal(images, kept), "the prepared case itself must not change"
    assert 0.01 < (changed - images).abs().mean() < 0.2
    for before, after in zip(images, changed, strict=True):
        assert np.corrcoef(before.flatten(), after.flatten())[0, 1] > 0.95


def test_the_generator_decides() -> None:
    images, strong = (
        torch.rand((4, 3, 16, 16), generator=generator(6)),
        TrainingConfig(flip=("left-right",)),
    )
    labels = (images[:, 1] > 0.5).long()
    one, same, other = (
        augment(images, labels, [2] * 4, strong, generator(s))[0] for s in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
