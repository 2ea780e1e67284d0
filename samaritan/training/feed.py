"""Batches on their way to the device: the next one is made while this one is worked on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from samaritan.models.family import Prompts


@dataclass(frozen=True)
class Batch:
    """What one step trains on.

    Attributes:
        inputs: (B, K, H, W) images, or tokens of a frozen beginning.
        labels: (B, H, W) int64.
        prompts: Where to look, if the model is told.
    """

    inputs: Tensor
    labels: Tensor
    prompts: Prompts | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; from pinned memory to a GPU, which need not be waited for."""
        if device.type == "cpu":
            return self
        inputs, labels = (
            tensor.pin_memory().to(device, non_blocking=True)
            if device.type == "cuda"
            else tensor.to(device)
            for tensor in (self.inputs, self.labels)
        )
        return Batch(inputs, labels, self.prompts and self.prompts.to(device))


def joined(batches: Sequence[Batch]) -> Batch:
    """One batch of several; records with fewer prompts than others are filled up with nothing."""
    inputs = torch.cat([batch.inputs for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    hints = [batch.prompts for batch in batches]
    most = max((hint.labels.shape[1] for hint in hints if hint is not None), default=0)
    if not most:
        return Batch(inputs, labels)
    points = torch.zeros((len(inputs), most, 2))
    kinds = torch.full((len(inputs), most), -1)
    start = 0
    for batch, hint in zip(batches, hints, strict=True):
        stop = start + len(batch.inputs)
        if hint is not None:
            points[start:stop, : hint.labels.shape[1]] = hint.points
            kinds[start:stop, : hint.labels.shape[1]] = hint.labels
        start = stop
    return Batch(inputs, labels, Prompts(points, kinds))


def on_device(feed: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Batches on a device, in their order; made one ahead where the processor would idle."""
    made = feed if device.type == "cpu" else one_ahead(feed)
    return (batch.to(device) for batch in made)


def one_ahead(feed: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches, each made by one other thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, feed, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, feed, None)
            yield batch
