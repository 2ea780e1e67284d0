"""The task-specific reference: a plain 3-D U-Net from MONAI on the pooled data."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from monai.networks.nets import UNet
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from samaritan.config import EvaluationConfig
from samaritan.data.datasets import Case
from samaritan.data.slices import CaseCache
from samaritan.data.transforms import normalise_intensity
from samaritan.data.volume import read_image
from samaritan.training.augment import BODY_AXES
from samaritan.training.evaluate import CaseScores, score_prediction, true_indices
from samaritan.training.losses import SegmentationLoss

_DIVISOR, _LARGEST = 8, 64
_BATCH = 2
_LEARNING_RATE = 2e-3


def train_unet(
    cache: CaseCache,
    train: Sequence[Case],
    validation: Sequence[Case],
    settings: EvaluationConfig,
    *,
    flip: Sequence[str],
    seconds: float,
    seed: int,
) -> tuple[list[CaseScores], int, int]:
    """Trains for a given wall time and scores.

    Args:
        cache: Knows the classes.
        train: Labelled training cases.
        validation: Labelled cases to score.
        settings: Tolerance of the surface Dice.
        flip: Body axes mirrored at random, as for the adapter.
        seconds: Wall time of the training.
        seed: Of weights and patches; the number of steps depends on the machine.

    Returns:
        Scores, number of parameters, optimiser steps taken.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    volumes = [_load(case, cache) for case in train]
    patch = _patch_size([image.shape for image, _ in volumes])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=len(cache.classes) + 1,
            channels=(16, 32, 64, 128),
            strides=(2, 2, 2),
            num_res_units=2,
            norm="INSTANCE",
        ).to(device)
    loss_of = SegmentationLoss(0.5, cache.unlabelled(train))
    optimiser = torch.optim.AdamW(network.parameters(), lr=_LEARNING_RATE, weight_decay=1e-5)
    begun, steps = time.monotonic(), 0
    axes = [BODY_AXES[name] for name in flip]
    for images, labels in _patches(volumes, patch, axes, torch.Generator().manual_seed(seed)):
        share = min(1.0, (time.monotonic() - begun) / seconds)
        if share >= 1 and steps:
            break
        for group in optimiser.param_groups:
            group["lr"] = _LEARNING_RATE * max(0.01, 1 - share) ** 0.9
        loss = loss_of(network(images.to(device)), labels.to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        steps += 1
    parameters = sum(p.numel() for p in network.parameters())
    network.eval()
    scores = [_score(network, case, cache, patch, settings) for case in validation]
    return scores, parameters, steps


def _load(case: Case, cache: CaseCache) -> tuple[Tensor, Tensor]:
    image = normalise_intensity(read_image(case.image, case.case_id).array)
    label = true_indices(cache.get(case), cache)
    return torch.from_numpy(image).half(), torch.from_numpy(np.ascontiguousarray(label))


def _patch_size(shapes: Sequence[Sequence[int]]) -> tuple[int, int, int]:
    """The largest volume, in steps the U-Net can halve three times, up to a bound."""
    largest = np.max(np.array(shapes), axis=0)
    sizes = np.minimum(-(-largest // _DIVISOR) * _DIVISOR, _LARGEST).tolist()
    return sizes[0], sizes[1], sizes[2]


def _patches(
    volumes: Sequence[tuple[Tensor, Tensor]],
    patch: tuple[int, int, int],
    flip: Sequence[int],
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches: images (B, 1, X, Y, Z) float32 and labels (B, X, Y, Z) int64."""
    while True:
        order = torch.randperm(len(volumes), generator=generator).tolist()
        for start in range(0, len(order), _BATCH):
            chosen = [volumes[i] for i in order[start : start + _BATCH]]
            pairs = [_crop(image, label, patch, flip, generator) for image, label in chosen]
            images = torch.stack([p[0] for p in pairs])[:, None].float()
            yield images, torch.stack([p[1] for p in pairs]).long()


def _crop(
    image: Tensor,
    label: Tensor,
    patch: tuple[int, int, int],
    flip: Sequence[int],
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    short = [max(p - n, 0) for p, n in zip(patch, image.shape, strict=True)]
    padding = [v for s in reversed(short) for v in (s // 2, s - s // 2)]
    image, label = F.pad(image, padding), F.pad(label, padding)
    corner = [
        int(torch.randint(n - p + 1, (), generator=generator))
        for p, n in zip(patch, image.shape, strict=True)
    ]
    window = tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True))
    mirrored = [axis for axis in flip if torch.rand((), generator=generator) < 0.5]
    return image[window].flip(mirrored), label[window].flip(mirrored)


@torch.no_grad()
def _score(
    network: nn.Module,
    case: Case,
    cache: CaseCache,
    patch: tuple[int, int, int],
    settings: EvaluationConfig,
) -> CaseScores:
    volume = read_image(case.image, case.case_id)
    image = torch.from_numpy(normalise_intensity(volume.array))[None, None]
    device = next(network.parameters()).device
    logits = sliding_window_inference(
        image.to(device), patch, 1, network, overlap=0.5, mode="gaussian"
    )
    prediction: NDArray[np.uint8] = logits.argmax(1)[0].cpu().numpy().astype(np.uint8)
    return score_prediction(prediction, cache.get(case), cache, settings, surfaces=False)
