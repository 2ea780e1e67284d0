"""SAM as a promptless multi-class segmenter: images in, one logit map per class out."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samaritan.models.encoder import encode_image


class Segmenter(nn.Module):
    """An official SAM without prompts; mask token 0 is the background, token i is class i.

    The whole batch is decoded at once: output tokens and the "no mask" embedding are expanded to
    the batch, so that every trained tensor sees one row per record.
    """

    sam: Any

    def __init__(self, sam: nn.Module) -> None:
        super().__init__()
        self.sam = sam
        self.autocast_dtype: torch.dtype | None = None
        """Encoder precision; None is fp32. The small decoder always runs in fp32."""

    @property
    def patch(self) -> int:
        """Input sides must be multiples of this many pixels."""
        return int(self.sam.image_encoder.patch_embed.proj.kernel_size[0])

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.sam.pixel_mean.device  # type: ignore[no-any-return]

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every class on the input grid.

        Args:
            images: (B, K, H, W) float, 0 to 1; K neighbouring slices, or one that is repeated.

        Returns:
            (B, classes + 1, H, W) float32 logits, background first.
        """
        mean, std = self.sam.pixel_mean, self.sam.pixel_std
        if images.shape[1] == 1:
            images = images.expand(-1, mean.shape[0], -1, -1)
        pixels = (images * 255.0 - mean) / std
        with self._autocast():
            embedding = encode_image(self.sam.image_encoder, pixels)
        logits = self._decode(embedding.float())
        if logits.shape[-2:] != images.shape[-2:]:
            logits = F.interpolate(
                logits, size=images.shape[-2:], mode="bilinear", align_corners=False
            )
        return logits

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.autocast_dtype)

    def _decode(self, embedding: Tensor) -> Tensor:
        """(B, C, h, w) image embeddings -> (B, tokens, 4h, 4w) mask logits."""
        decoder, prompts = self.sam.mask_decoder, self.sam.prompt_encoder
        b, c, h, w = embedding.shape
        tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = tokens.expand(b, -1, -1)
        no_mask = prompts.no_mask_embed.weight.reshape(1, c, 1, 1)
        position = prompts.pe_layer((h, w)).unsqueeze(0).expand(b, -1, -1, -1)
        hidden, image = decoder.transformer(embedding + no_mask, position, tokens)
        upscaled = decoder.output_upscaling(image.transpose(1, 2).reshape(b, c, h, w))
        weights = torch.stack(
            [
                network(hidden[:, 1 + i])
                for i, network in enumerate(decoder.output_hypernetworks_mlps)
            ],
            dim=1,
        )
        return torch.einsum("bnc,bchw->bnhw", weights, upscaled)


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
