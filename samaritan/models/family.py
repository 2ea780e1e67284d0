"""What SAM and its relatives have in common: encode, decode, and names for groups of layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Points and box corners in SAM's own coding.

    Attributes:
        points: (B, N, 2) float, (x, y) in pixels of the model input.
        labels: (B, N) int64: 1 inside, 0 outside, 2 and 3 the top left and bottom right corner of
            a box, -1 nothing (where a record has fewer points than others).
    """

    points: Tensor
    labels: Tensor

    def __getitem__(self, records: slice) -> Prompts:
        """Prompts of some of the records."""
        return Prompts(self.points[records], self.labels[records])

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on a device."""
        return Prompts(self.points.to(device), self.labels.to(device))

    def groups(self) -> list[tuple[Tensor, Prompts | None]]:
        """Indices of records with equally many prompts of a kind, and these without padding."""
        real, boxed = self.labels >= 0, (self.labels >= 2).any(1)
        counts = real.sum(1)
        found: list[tuple[Tensor, Prompts | None]] = []
        for count, box in sorted(set(zip(counts.tolist(), boxed.tolist(), strict=True))):
            records = ((counts == count) & (boxed == box)).nonzero()[:, 0]
            kept, shape = real[records], (len(records), count)
            part = Prompts(
                self.points[records][kept].view(*shape, 2), self.labels[records][kept].view(shape)
            )
            found.append((records, part if count else None))
        return found


@dataclass(frozen=True)
class Family:
    """Functions on a model of the family, and the names of its layers.

    Attributes:
        construct: (shape, num_classes, channels, decoder) -> a module with random weights, buffers
            `pixel_mean` and `pixel_std` (channels, 1, 1), and one mask per class and background.
        encode: (model, pixels (B, channels, H, W), blocks, recompute) -> image features; `blocks`
            are the (first, last + 1) encoder blocks to run, so that a frozen beginning can be run
            once and kept, and `recompute` trades time for memory in the backward pass.
        decode: (model, features, prompts or None, input size) -> (B, classes + 1, h, w) logits.
        num_blocks: Encoder blocks of a model.
        resize_tables: (model, input size) fits position tables that are trained to the input.
        fit: Changes a published state dict to a number of classes.
        parts: Name of a group of layers -> expression for the start of its parameters' names.
        inserts: Kinds of `presets.Insert` it takes; hooks serve the first two on any layer.
    """

    construct: Callable[[Any, int, int, str], Any]
    encode: Callable[..., Any]
    decode: Callable[[Any, Any, Prompts | None, tuple[int, int]], Tensor]
    num_blocks: Callable[[Any], int]
    resize_tables: Callable[[Any, tuple[int, int]], None]
    fit: Callable[[dict[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
    parts: Mapping[str, str]
    inserts: frozenset[str] = frozenset({"serial", "parallel"})


def belongs(name: str, patterns: Iterable[str]) -> bool:
    """Whether a parameter is in one of the groups that the expressions describe."""
    return any(re.match(rf"(?:{pattern})(?:\.|$)", name) for pattern in patterns)


def last_blocks(pattern: str, depth: int, kept: int | None) -> str:
    r"""An expression over `blocks.\d+` narrowed to the last `kept` of `depth` encoder blocks."""
    if kept is None:
        return pattern
    indices = "|".join(str(i) for i in range(max(0, depth - kept), depth))
    return pattern.replace(r"blocks\.\d+", rf"blocks\.(?:{indices or '(?!)'})")
