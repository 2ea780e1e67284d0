"""What frozen encoder blocks make of slices, computed once and kept on this machine's disk.

A view is a slice with one draw of window and augmentation. Its generator is seeded from what the
slice shows, so that it is the same whenever and wherever it is made; training draws among a few
views of each slice instead of augmenting anew.

Entries are patient data: readable by their owner alone, and never sent anywhere.

Legend: B batch, K slices of a record that are encoded as images of their own (else 1), H W model
input, h w C tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from samaritan.config import TrainingConfig
from samaritan.data.datasets import Case
from samaritan.data.slices import CaseCache, PreparedCase, cut_slice, draw_index, draw_order
from samaritan.files import cache_dir, write_atomically
from samaritan.models.adapter import AdaptedModel
from samaritan.models.family import Prompts
from samaritan.training.augment import augment
from samaritan.training.parallel import Parts

_FORMAT = 1
"""Raise it when a change of code gives the same view another content."""

_NOT_IN_THE_KEY = {
    "slices_per_case", "batch_size", "learning_rate", "weight_decay", "warmup_steps",
    "final_lr_fraction", "dice_weight", "clip_norm", "prompts", "precision", "recompute",
    "prefix_cache_mb", "cached_views", "proximal_mu", "scaffold",
}  # fmt: skip
"""Settings that decide no view, or do so through the model's precision. A setting that is missing
here costs computing entries anew; one that is wrongly here would give entries that are wrong."""


@dataclass(frozen=True)
class Entry:
    """What is kept of a view.

    Attributes:
        tokens: (K, h, w, C), float32, or the type the encoder computes in.
        label: (H, W) uint8.
    """

    tokens: Tensor
    label: Tensor


@dataclass(frozen=True)
class View:
    """One way of seeing one slice."""

    prepared: PreparedCase
    index: int
    number: int

    @property
    def name(self) -> str:
        """Says what is seen, by content: names and times of files change when they are copied."""
        return f"{self.prepared.sha256}-{self.index}-{self.number}"

    def generator(self) -> torch.Generator:
        """Decides window and augmentation."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class PrefixCache:
    """The frozen beginning of a model, with a memory of what it made of each view.

    Args:
        model: With frozen blocks at the beginning.
        cases: Reads and prepares cases.
        settings: Augmentation, number of views and disk space.
    """

    def __init__(self, model: AdaptedModel, cases: CaseCache, settings: TrainingConfig) -> None:
        self._segmenter, self._blocks = model.segmenter, model.frozen_blocks
        self._cases, self._settings = cases, settings
        self._key = prefix_key(model, cases, settings)
        self._shelves: dict[str, Shelf] = {}

    def forward(self, tokens: Tensor, prompts: Prompts | None = None) -> Tensor:
        """(B, K, h, w, C) tokens to (B, classes + 1, H, W) logits, by the blocks that are left."""
        return self._segmenter.from_tokens(
            tokens.flatten(0, 1), self._blocks, self._cases.image_size, prompts
        )

    def batches(
        self, cases: Sequence[Case], *, steps: int, generator: torch.Generator, parts: Parts
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches for one round of local training.

        Args:
            cases: Labelled training cases.
            steps: Number of batches.
            generator: Draws cases, slices and views.
            parts: Share out what must be computed.

        Yields:
            Tokens (B, K, h, w, C) float32 and labels (B, H, W) int64.
        """
        size, share = self._settings.batch_size, self._settings.foreground_fraction
        group = self._cases.group_size(cases)
        sequence = draw_order(len(cases), steps * size, group, generator)
        for start in range(0, len(sequence), size):
            views = []
            for case in sequence[start : start + size]:
                prepared = self._cases.get(cases[case])
                index = draw_index(prepared, share, generator)
                number = torch.randint(self._settings.cached_views, (), generator=generator)
                views.append(View(prepared, index, int(number)))
            entries = self.entries(views, parts)
            yield (
                torch.stack([entry.tokens for entry in entries]).float(),
                torch.stack([entry.label for entry in entries]).long(),
            )

    def entries(self, views: Sequence[View], parts: Parts) -> list[Entry]:
        """What the frozen blocks make of views, from the disk where it is there."""
        found = [self._shelf(view).read(view.name) for view in views]
        missing = [view for view, entry in zip(views, found, strict=True) if entry is None]
        made = list((parts.pool.map if parts.pool else map)(self.make, missing))
        for view, entry in zip(missing, made, strict=True):
            self._shelf(view).write(view.name, entry)
        rest = iter(made)
        return [next(rest) if entry is None else entry for entry in found]

    @torch.no_grad()  # gradients are switched off per thread
    def make(self, view: View) -> Entry:
        """Computes an entry.

        Each view goes through the encoder alone: sums may round differently in a batch, and an
        entry must not depend on what else was missing.
        """
        image, label = self.picture(view)
        tokens = self._segmenter.to_tokens(image[None].to(self._segmenter.device), self._blocks)
        kind = self._segmenter.autocast_dtype or torch.float32
        return Entry(tokens.to("cpu", kind).contiguous(), label.to(torch.uint8))

    def picture(self, view: View) -> tuple[Tensor, Tensor]:
        """Image (K, H, W) float32 and label (H, W) int64 of a view, augmented."""
        generator = view.generator()
        image, label = cut_slice(
            view.prepared, view.index, self._cases, self._settings.foreground_fraction, generator
        )
        axes = [view.prepared.grid.axis]
        images, labels = augment(
            image[None].float(), label[None].long(), axes, self._settings, generator
        )
        return images[0], labels[0]

    def _shelf(self, view: View) -> Shelf:
        site = view.prepared.case.site
        if site not in self._shelves:
            budget = self._settings.prefix_cache_mb * 2**20
            self._shelves[site] = Shelf(cache_dir() / "prefix", self._key, site, budget)
        return self._shelves[site]


def prefix_key(model: AdaptedModel, cases: CaseCache, settings: TrainingConfig) -> str:
    """A name for everything, besides the case, that decides what an entry holds.

    What the data section decides is in the hash of the prepared case, save the context.
    """
    frozen = {str(p.dtype) for p in model.base.model.parameters() if not p.requires_grad}
    decides = {
        "format": _FORMAT,
        "torch": torch.__version__,
        "device": model.segmenter.device.type,
        "base": model.base.sha256,
        "blocks": model.frozen_blocks,
        "precision": [str(model.segmenter.autocast_dtype), *sorted(frozen)],
        "size": cases.image_size,
        "context": [cases.data.context_slices, model.segmenter.depth],
        "view": settings.model_dump(mode="json", exclude=_NOT_IN_THE_KEY),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:32]


class Shelf:
    """One site's entries on disk; the longest unused are deleted beyond a number of bytes.

    The bytes of all keys count, so that entries of earlier settings are the first to go. Other
    processes may use the same folders: a file that was seen may be gone, and while several write,
    the bytes may exceed the budget by what the others have written since this one looked.

    Args:
        root: Holds a folder for each key, and in it one for each site.
        key: From `prefix_key`.
        site: Name of the site.
        budget_bytes: The most this site may take.
    """

    def __init__(self, root: Path, key: str, site: str, budget_bytes: int) -> None:
        self._root, self.budget_bytes = root, budget_bytes
        # A site may be called anything, a folder may not.
        self._site = hashlib.sha256(site.encode()).hexdigest()[:16]
        self._folder = root / key / self._site
        self._held: OrderedDict[Path, int] | None = None
        self._bytes = 0

    def read(self, name: str) -> Entry | None:
        """The entry, or None where it is missing, damaged or cannot be read."""
        path = self._path(name)
        try:
            payload = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of last use; many systems do not keep it themselves
        if self._held is not None and path in self._held:
            self._held.move_to_end(path)
        return _unpack(payload)

    def write(self, name: str, entry: Entry) -> None:
        """Keeps an entry, unless it alone is over the budget.

        Raises:
            StorageError: When the system refuses.
        """
        path, payload = self._path(name), _pack(entry)
        if len(payload) > self.budget_bytes:
            return
        if self._held is None:
            self._look()
        self._forget(path)
        while self._held and self._bytes + len(payload) > self.budget_bytes:
            oldest = next(iter(self._held))
            oldest.unlink(missing_ok=True)
            self._forget(oldest)
        # Waiting for the disk takes several times as long (4 ms against 1), and the checksum finds
        # what a crash leaves.
        write_atomically(path, payload, durable=False, private=True)
        self._note(path, len(payload))

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def _look(self) -> None:
        """Lists what is there, the longest unused first; also what a crash left half written."""
        found = []
        for path in [p for key in _inside(self._root) for p in _inside(key / self._site)]:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime_ns, path, status.st_size))
        self._held, self._bytes = OrderedDict(), 0
        for _, path, size in sorted(found):
            self._note(path, size)

    def _note(self, path: Path, size: int) -> None:
        if self._held is not None:
            self._held[path] = size
            self._bytes += size

    def _forget(self, path: Path) -> None:
        if self._held is not None:
            self._bytes -= self._held.pop(path, 0)


def _inside(folder: Path) -> list[Path]:
    """What a folder holds; nothing if another process has deleted it."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _pack(entry: Entry) -> bytes:
    tensors = {"tokens": entry.tokens, "label": entry.label}
    payload: bytes = save({**tensors, "checksum": torch.tensor(_checksum(entry))})
    return payload


def _unpack(payload: bytes) -> Entry | None:
    try:
        tensors = load(payload)
        entry, checksum = Entry(tensors["tokens"], tensors["label"]), int(tensors["checksum"])
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    return entry if _checksum(entry) == checksum else None


def _checksum(entry: Entry) -> int:
    value = 0
    for tensor in (entry.tokens, entry.label):
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value
