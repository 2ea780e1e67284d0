"""A base model as a multi-class segmenter: images in, one logit map per class out."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from samaritan.models.family import Family, Prompts


class Segmenter(nn.Module):
    """A model of any family; its mask 0 is the background, mask i is class i.

    Args:
        model: The module of the base.
        family: Runs it.
        patch: Input sides must be multiples of this many pixels.
        depth: Slices of a record that are encoded as images of their own; 1 gives neighbouring
            slices to the model as channels.
    """

    model: Any

    def __init__(self, model: nn.Module, family: Family, patch: int, depth: int = 1) -> None:
        super().__init__()
        self.model, self.family, self.patch, self.depth = model, family, patch, depth
        self.autocast_dtype: torch.dtype | None = None
        """Encoder precision; None is fp32. The small decoder always runs in fp32."""
        self.recompute = False
        """Whether the backward pass computes encoder blocks again instead of keeping them."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.pixel_mean.device  # type: ignore[no-any-return]

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Logits of every class on the input grid.

        Args:
            images: (B, K, H, W) float, 0 to 1; K neighbouring slices, or one that is repeated.
            prompts: Points and boxes, if the model is to be told where to look.

        Returns:
            (B, classes + 1, H, W) float32 logits, background first.
        """
        rows, columns = images.shape[-2:]
        return self.from_tokens(self.to_tokens(images, 0), 0, (rows, columns), prompts)

    def to_tokens(self, images: Tensor, blocks: int) -> Tensor:
        """What the first encoder blocks make of images; with 0 blocks, the normalised pixels.

        Args:
            images: (B, K, H, W) float, 0 to 1.
            blocks: How many blocks to run.
        """
        mean, std = self.model.pixel_mean, self.model.pixel_std
        if self.depth > 1:
            images = images.flatten(0, 1)[:, None]
        if images.shape[1] == 1:
            images = images.expand(-1, mean.shape[0], -1, -1)
        pixels: Tensor = (images * 255.0 - mean) / std
        if blocks == 0:
            return pixels
        with self._autocast():
            tokens: Tensor = self.family.encode(self.model, pixels, slice(blocks))
        return tokens

    def from_tokens(
        self, tokens: Tensor, blocks: int, size: tuple[int, int], prompts: Prompts | None = None
    ) -> Tensor:
        """Logits from what `to_tokens` returned.

        Args:
            tokens: From `to_tokens`.
            blocks: As it was given there.
            size: (rows, columns) of the images.
            prompts: As for `forward`.
        """
        with self._autocast():
            features = self.family.encode(self.model, tokens, slice(blocks, None), self.recompute)
        if self.depth > 1:  # the labelled slice is the middle one
            features = tree_map(self._middle, features)
        logits = self._decode(tree_map(Tensor.float, features), prompts, size)
        if logits.shape[-2:] != size:
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return logits

    def _middle(self, features: Tensor) -> Tensor:
        return features.view(-1, self.depth, *features.shape[1:])[:, self.depth // 2]

    def _decode(self, features: Any, prompts: Prompts | None, size: tuple[int, int]) -> Tensor:
        """Decodes records with equally many prompts together.

        Padding would be attended to, and a record's logits depend on the others in its batch.
        """
        if prompts is None:
            return self.family.decode(self.model, features, None, size)
        groups = prompts.groups()
        decoded = [
            self.family.decode(self.model, _pick(features, records), part, size)
            for records, part in groups
        ]
        return torch.cat(decoded)[torch.cat([records for records, _ in groups]).argsort()]

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)


def _pick(features: Any, records: Tensor) -> Any:
    return tree_map(lambda feature: feature[records], features)


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The encoder precision a machine profits from: bf16 where it has units for it, else fp32.

    Args:
        precision: "auto", "fp32" or "bf16".
        device: Where the model runs.
    """
    if precision == "fp32":
        return None
    if precision == "bf16" or _has_bf16_units(device):
        return torch.bfloat16
    return None


def _has_bf16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    flags = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16"))
