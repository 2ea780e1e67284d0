"""Cases prepared for the model, a bounded cache of them, and batches of slices.

Legend: S slices, K context slices given as channels, h w plane on the model grid, H W model input.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from samaritan.config import DataConfig
from samaritan.data.datasets import Case
from samaritan.data.label_maps import label_map, labelled_classes
from samaritan.data.transforms import SliceGrid, normalise_intensity, slice_grid, to_stack
from samaritan.data.volume import NativeGrid, read_image, read_label
from samaritan.errors import ConfigError, DataError

_BYTES_PER_PIXEL = 3  # float16 image and uint8 label


@dataclass(frozen=True)
class PreparedCase:
    """One case on the model grid.

    Attributes:
        case: Where it comes from.
        image: (S, h, w) float16, 0 to 1.
        label: (S, h, w) uint8 class index, 0 background; None where the case has no label.
        foreground: Indices of slices that hold a structure.
        grid: The way back to the canonical volume.
        native: The way back to the file's own grid.
    """

    case: Case
    image: Tensor
    label: Tensor | None
    foreground: Tensor
    grid: SliceGrid
    native: NativeGrid

    @property
    def size_bytes(self) -> int:
        """Memory held by the tensors."""
        return self.image.numel() * _BYTES_PER_PIXEL

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of all that training sees of the case, whatever its file is called."""
        digest = hashlib.sha256(f"{self.grid.axis} {tuple(self.image.shape)}".encode())
        for tensor in (self.image, self.label):
            if tensor is not None:
                digest.update(tensor.contiguous().view(-1).numpy().data)
        return digest.hexdigest()


def prepare_case(
    case: Case, data: DataConfig, classes: Mapping[str, int], image_size: tuple[int, int]
) -> PreparedCase:
    """Reads a case and puts it on the model grid; its site decides what label values mean.

    Raises:
        DataError: When the image or label cannot be used, or a label value belongs to no class.
    """
    volume = read_image(case.image, case.case_id)
    grid = slice_grid(
        volume.array.shape, volume.spacing_mm, data.slice_axis, data.pixel_mm, image_size
    )
    image = to_stack(normalise_intensity(volume.array), grid, "image").half()
    label, foreground = None, torch.zeros(0, dtype=torch.long)
    if case.label is not None:
        values = read_label(case.label, case.case_id, volume.native).array
        own = label_map(data, case.site, classes)
        indices = class_indices(values, classes, case.case_id, own)
        label = to_stack(indices, grid, "label")
        foreground = label.flatten(1).any(1).nonzero().flatten()
    return PreparedCase(case, image, label, foreground, grid, volume.native)


def class_indices(
    values: np.ndarray,
    classes: Mapping[str, int],
    case_id: str,
    own: Mapping[str, int] | None = None,
) -> np.ndarray:
    """Label values to class indices 1, 2, ... in the order of `classes`; 0 stays background.

    Args:
        values: Of any shape.
        classes: The study's structures and label values.
        case_id: For the error.
        own: Structure name -> label value in this file; `classes` when left out.

    Raises:
        DataError: For a value that belongs to no class.
    """
    own = classes if own is None else own
    table = {0: 0} | {own[name]: index for index, name in enumerate(classes, 1) if name in own}
    found = np.unique(values).tolist()
    unknown = [value for value in found if value not in table]
    if unknown:
        raise DataError(
            "SAM-D114",
            f"case {case_id}: the label holds {unknown[:5]}, the classes are {dict(own)}",
            "Name every structure in data.classes and, where the site has a label map of its own, "
            "in data.site_classes; or clear the values that are none.",
        )
    lookup = np.zeros(max(table) + 1, dtype=np.uint8)
    lookup[list(table)] = list(table.values())
    indices: np.ndarray = lookup[values]
    return indices


class CaseCache:
    """Prepared cases, read when first needed, the longest unused dropped beyond a byte budget."""

    def __init__(
        self, data: DataConfig, classes: Mapping[str, int], image_size: tuple[int, int]
    ) -> None:
        self.data, self.classes, self.image_size = data, dict(classes), image_size
        self.budget_bytes = data.cache_mb * 2**20
        self._held: OrderedDict[Case, PreparedCase] = OrderedDict()
        self._bytes = 0

    def get(self, case: Case) -> PreparedCase:
        """The prepared case, from memory if it is still there."""
        if case in self._held:
            self._held.move_to_end(case)
            return self._held[case]
        prepared = prepare_case(case, self.data, self.classes, self.image_size)
        self._held[case] = prepared
        self._bytes += prepared.size_bytes
        while self._bytes > self.budget_bytes and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].size_bytes
        return prepared

    def labelled(self, case: Case) -> frozenset[int]:
        """Class indices that the case's site labels."""
        return labelled_classes(self.data, case.site, self.classes)

    def unlabelled(self, cases: Sequence[Case]) -> frozenset[int]:
        """Class indices that none of these cases, which must be alike in that, is labelled with.

        Raises:
            ConfigError: When their sites label different structures.
        """
        kinds = {self.labelled(case) for case in cases}
        if len(kinds) > 1:
            raise ConfigError(
                "SAM-C225",
                "sites that label different structures cannot be trained on as one",
                "Leave --baselines out: the pooled model and the U-Net need equal label sets.",
            )
        return frozenset(range(1, len(self.classes) + 1)).difference(*kinds)

    def group_size(self, cases: Sequence[Case]) -> int:
        """How many of these cases fit in memory together, judged by the first."""
        if not cases:
            return 1
        return max(1, self.budget_bytes // (2 * self.get(cases[0]).size_bytes))


def draw_order(cases: int, draws: int, group: int, generator: torch.Generator) -> list[int]:
    """Which case each drawn slice comes from.

    Every case is drawn equally often (where the draws do not divide, some once more), in shuffled
    passes over groups that fit in memory, so that a data set larger than the cache is read once per
    round and not once per slice.
    """
    order = torch.randperm(cases, generator=generator).tolist()
    passes, more = divmod(draws, cases)
    sequence: list[int] = []
    for start in range(0, cases, group):
        members = order[start : start + group]
        for turn in [members] * passes + [members[: max(0, more - start)]]:
            shuffled = torch.randperm(len(turn), generator=generator).tolist()
            sequence += [turn[i] for i in shuffled]
    return sequence


def batches(
    cache: CaseCache,
    cases: Sequence[Case],
    *,
    steps: int,
    batch_size: int,
    foreground_fraction: float,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """Batches for one round of local training.

    Args:
        cache: Reads and holds the cases.
        cases: Labelled training cases of a site.
        steps: Number of batches.
        batch_size: Slices per batch.
        foreground_fraction: Share of slices that touch a structure.
        generator: Decides everything random.

    Yields:
        Images (B, K, H, W) float32, labels (B, H, W) int64, and the volume axis that the slices of
        each record run along.
    """
    sequence = draw_order(len(cases), steps * batch_size, cache.group_size(cases), generator)
    for start in range(0, len(sequence), batch_size):
        held = [cache.get(cases[i]) for i in sequence[start : start + batch_size]]
        pairs = [
            cut_slice(
                case,
                draw_index(case, foreground_fraction, generator),
                cache,
                foreground_fraction,
                generator,
            )
            for case in held
        ]
        yield (
            torch.stack([image for image, _ in pairs]).float(),
            torch.stack([label for _, label in pairs]).long(),
            [case.grid.axis for case in held],
        )


def num_steps(cases: int, slices_per_case: float, batch_size: int) -> int:
    """Optimiser steps of one round at a site."""
    return max(1, math.ceil(cases * slices_per_case / batch_size))


def with_context(image: Tensor, slices: Tensor, context: int) -> Tensor:
    """Slices with their neighbours as channels, edge slices repeated.

    Args:
        image: (S, h, w).
        slices: (N,) indices.
        context: Odd number K of slices.

    Returns:
        (N, K, h, w).
    """
    offsets = torch.arange(context) - context // 2
    return image[(slices[:, None] + offsets).clamp(0, image.shape[0] - 1)]


def draw_index(
    prepared: PreparedCase, foreground_fraction: float, generator: torch.Generator
) -> int:
    """Draws a slice of a case, often one that touches a structure.

    Raises:
        DataError: When the case has no label.
    """
    label = _label(prepared)
    if len(prepared.foreground) and _uniform(generator) < foreground_fraction:
        return int(prepared.foreground[_integer(len(prepared.foreground), generator)])
    return _integer(label.shape[0], generator)


def cut_slice(
    prepared: PreparedCase,
    index: int,
    cache: CaseCache,
    foreground_fraction: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """A slice as training sees it, before augmentation.

    Args:
        prepared: Where it lies.
        index: Which of its slices.
        cache: Knows the model input and the number of context slices.
        foreground_fraction: Share of windows around a structure, where a plane is larger than the
            model input.
        generator: Places the window.

    Returns:
        Image (K, H, W) float16 and label (H, W) uint8.
    """
    size, where = cache.image_size, torch.tensor([index])
    image = _pad(with_context(prepared.image, where, cache.data.context_slices)[0], size)
    plane = _pad(_label(prepared)[where], size)
    top, left = _window(plane[0], size, foreground_fraction, generator)
    window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    return image[window], plane[window][0]


def _label(prepared: PreparedCase) -> Tensor:
    if prepared.label is None:
        raise DataError(
            "SAM-D116", f"training case {prepared.case.case_id} has no label", "Add it."
        )
    return prepared.label


def _pad(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """Pads the last two axes with zeros to at least the model input, content in the middle."""
    h, w = planes.shape[-2:]
    rows, columns = max(size[0] - h, 0), max(size[1] - w, 0)
    return F.pad(planes, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def _window(
    label: Tensor, size: tuple[int, int], foreground_fraction: float, generator: torch.Generator
) -> tuple[int, int]:
    """Top-left corner of a window, often around a labelled pixel."""
    free = (label.shape[0] - size[0], label.shape[1] - size[1])
    if free == (0, 0):
        return free
    marked = label.nonzero()
    if len(marked) and _uniform(generator) < foreground_fraction:
        row, column = marked[_integer(len(marked), generator)].tolist()
        top = row - _integer(size[0], generator)
        left = column - _integer(size[1], generator)
        return min(max(top, 0), free[0]), min(max(left, 0), free[1])
    return _integer(free[0] + 1, generator), _integer(free[1] + 1, generator)


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), generator=generator))


def _integer(below: int, generator: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=generator))
