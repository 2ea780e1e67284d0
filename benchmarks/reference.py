"""The published way to train a LoRA of SAM, written plainly, to measure and to check against.

It follows SAMed (arXiv 2304.13785) and FLAP-SAM (arXiv 2407.21739) on the official
`segment_anything` classes and their own forward passes: windows are cut before qkv, attention is
two matrix products around a softmax, LoRA is added into slices of the fused qkv, the decoder gets
no prompt and has four upscaling stages, and Dice is taken over the whole batch. Nothing of
Samaritan's model code runs in it.

Legend: B images, H and W pixels, t tokens per side, C channels.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samaritan.models.adapter import AdaptedModel
from samaritan.models.lora import official_name
from samaritan.models.official import modeling
from samaritan.models.sam import SamShape

_TRAINED = (
    "lora_",
    "mask_decoder.output_upscaling",
    "mask_decoder.output_hypernetworks_mlps",
    "mask_decoder.mask_tokens",
)


class LoraQKV(nn.Linear):
    """A fused qkv projection whose q and v thirds get a low-rank update each."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__(width, 3 * width)
        self.lora_A_q, self.lora_B_q = _low_rank(width, width, rank)
        self.lora_A_v, self.lora_B_v = _low_rank(width, width, rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C)."""
        qkv, width = super().forward(x), self.in_features
        qkv[..., :width] += self.lora_B_q(self.lora_A_q(x))
        qkv[..., -width:] += self.lora_B_v(self.lora_A_v(x))
        return qkv


class LoraLinear(nn.Linear):
    """A projection of the decoder with a low-rank update."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_A, self.lora_B = _low_rank(inputs, outputs, rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return super().forward(x) + self.lora_B(self.lora_A(x))


def _low_rank(inputs: int, outputs: int, rank: int) -> tuple[nn.Linear, nn.Linear]:
    return nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)


class Reference(nn.Module):
    """The model: an official SAM built for one image size, with LoRA and FLAP-SAM's decoder.

    Args:
        shape: Hyper-parameters of the base.
        size: Side of the images in pixels; the encoder takes no other.
        num_classes: Structures to segment, background not counted.
        rank: LoRA rank; the scale is 1.
    """

    def __init__(self, shape: SamShape, size: int, num_classes: int, rank: int) -> None:
        super().__init__()
        self.sam: Any = _official(shape, size, num_classes)
        _give_lora(self.sam, rank)
        _give_upscaling(self.sam.mask_decoder, shape.decoder_width)
        for name, parameter in self.sam.named_parameters():
            parameter.requires_grad_(any(part in name for part in _TRAINED))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 1, H, W), 0 to 1 -> (B, classes + 1, H, W) logits."""
        sam = self.sam
        features = sam.image_encoder(sam.preprocess(255.0 * images.repeat(1, 3, 1, 1)))
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        # `MaskDecoder.forward` would drop the first mask, which is the background here.
        logits, _ = sam.mask_decoder.predict_masks(
            image_embeddings=features,
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        if logits.shape[-2:] != images.shape[-2:]:  # only where patches are not 16 pixels wide
            logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
        return logits

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by official name."""
        return {name: p for name, p in self.sam.named_parameters() if p.requires_grad}


def _official(shape: SamShape, size: int, num_classes: int) -> Any:
    m, tokens = modeling(), size // shape.patch
    return m.Sam(
        image_encoder=m.ImageEncoderViT(
            img_size=size,
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=shape.mlp_ratio,
            out_chans=shape.decoder_width,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=shape.window,
            global_attn_indexes=shape.global_blocks,
        ),
        prompt_encoder=m.PromptEncoder(
            embed_dim=shape.decoder_width,
            image_embedding_size=(tokens, tokens),
            input_image_size=(size, size),
            mask_in_chans=16,
        ),
        mask_decoder=m.MaskDecoder(
            transformer_dim=shape.decoder_width,
            transformer=m.TwoWayTransformer(
                depth=2,
                embedding_dim=shape.decoder_width,
                num_heads=shape.decoder_heads,
                mlp_dim=shape.decoder_mlp,
            ),
            num_multimask_outputs=num_classes,
            iou_head_hidden_dim=shape.iou_width,
        ),
    )


def _give_lora(sam: Any, rank: int) -> None:
    for block in sam.image_encoder.blocks:
        block.attn.qkv = LoraQKV(block.attn.qkv.in_features, rank)
    transformer = sam.mask_decoder.transformer
    attentions = [transformer.final_attn_token_to_image]
    for layer in transformer.layers:
        attentions += [
            layer.self_attn, layer.cross_attn_token_to_image, layer.cross_attn_image_to_token
        ]  # fmt: skip
    for attention in attentions:
        for name in ("q_proj", "v_proj"):
            old = getattr(attention, name)
            setattr(attention, name, LoraLinear(old.in_features, old.out_features, rank))


def _give_upscaling(decoder: Any, width: int) -> None:
    """Sixteen times instead of four, and hypernetworks of as many channels as are left."""
    norm = type(decoder.output_upscaling[1])
    channels = [width, width // 4, width // 8, width // 16, width // 32]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.ConvTranspose2d(before, after, 2, stride=2), norm(after), nn.GELU()]
    del layers[-2]  # the last stage has no norm
    decoder.output_upscaling = nn.Sequential(*layers)
    for network in decoder.output_hypernetworks_mlps:
        network.layers[-1] = nn.Linear(width, channels[-1])


def copy_weights(model: AdaptedModel, reference: Reference) -> None:
    """Gives the reference the base and the adapter of one of our models.

    Args:
        model: Of the same shape, classes and rank, preset `flap-sam`, `model.decoder: reference`,
            LoRA scale 1.
        reference: Position tables are resized to its image size.
    """
    state = {official_name(n): v.float() for n, v in model.segmenter.model.state_dict().items()}
    for name, wanted in reference.sam.state_dict().items():
        if name == "image_encoder.pos_embed":
            state[name] = _bilinear(state[name].permute(0, 3, 1, 2), wanted.shape[1:3])
            state[name] = state[name].permute(0, 2, 3, 1)
        elif "rel_pos" in name:
            state[name] = _bilinear(state[name][None, None], wanted.shape)[0, 0]
    reference.sam.load_state_dict(state, strict=True)


def _bilinear(image: Tensor, size: Any) -> Tensor:
    return F.interpolate(image, tuple(size), mode="bilinear", align_corners=False)


def reference_optimiser(reference: Reference) -> torch.optim.Optimizer:
    """AdamW with FLAP-SAM's values, in whatever form torch takes by default."""
    return torch.optim.AdamW(reference.trained().values(), lr=8e-4, weight_decay=0.1)


def reference_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """0.2 cross-entropy + 0.8 Dice, every class summed over the whole batch.

    Args:
        logits: (B, classes + 1, H, W).
        labels: (B, H, W) int64.
    """
    shares = logits.softmax(1)
    dice = logits.new_zeros(())
    for index in range(logits.shape[1]):
        share, target = shares[:, index], (labels == index).float()
        common = (share * target).sum()
        total = (share * share).sum() + (target * target).sum()
        dice = dice + 1 - (2 * common + 1e-5) / (total + 1e-5)
    return 0.2 * F.cross_entropy(logits, labels) + 0.8 * dice / logits.shape[1]


def reference_step(
    reference: Reference, optimiser: torch.optim.Optimizer, images: Tensor, labels: Tensor,
    bf16: bool, clip_norm: float,
) -> float:  # fmt: skip
    """One training step; returns the loss.

    Args:
        reference: Trained in place.
        optimiser: From `reference_optimiser`.
        images: (B, 1, H, W), 0 to 1.
        labels: (B, H, W) int64.
        bf16: Autocast over forward pass and loss.
        clip_norm: The published code does not clip; done here so that both sides do equal work.
    """
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        loss = reference_loss(reference(images), labels)
    optimiser.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.trained().values(), clip_norm)
    optimiser.step()
    return loss.item()
