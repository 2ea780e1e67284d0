"""The family of SAM 2 on single images, through `transformers`: SAM 2, SAM 2.1 and MedSAM2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samaritan.errors import ConfigError
from samaritan.models.family import Family, Prompts
from samaritan.models.hiera import encode_hiera
from samaritan.models.sam import fit_tokens, whole_table
from samaritan.models.sam2_names import image_state

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sam2Shape:
    """Hyper-parameters of a SAM 2.

    Attributes:
        width, heads: Of the first stage of the Hiera backbone; each further stage has twice both.
        stages: Blocks of each stage.
        global_blocks: Indices of blocks that attend over the whole image.
        windows: Side of the attention windows of each stage, in tokens.
        position_grid: Side of the table of positions that is stretched over the image.
        mlp_ratio: Of the backbone.
        image_size: Side in pixels the published model takes.
        decoder_width, decoder_mlp, decoder_heads, iou_width: Of the mask decoder.
    """

    width: int
    heads: int
    stages: tuple[int, ...]
    global_blocks: tuple[int, ...]
    windows: tuple[int, ...] = (8, 4, 14, 7)
    position_grid: int = 7
    mlp_ratio: float = 4.0
    image_size: int = 1024
    decoder_width: int = 256
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    iou_width: int = 256


def construct(
    shape: Sam2Shape, num_classes: int, channels: int = 3, decoder: str = "official"
) -> Any:
    """A `Sam2Model` with one mask token per class and background.

    Args:
        shape: Hyper-parameters.
        num_classes: Structures to segment, background not counted.
        channels: Input channels.
        decoder: "official", the only one there is.

    Raises:
        ConfigError: For any other decoder.
    """
    if decoder != "official":
        raise ConfigError(
            "SAM-C209",
            f"model.decoder is {decoder!r}, but SAM 2 has its own decoder alone",
            "Set model.decoder: official, or choose a base of the first SAM.",
        )
    from transformers import Sam2Model

    model = Sam2Model(_configuration(shape, num_classes, channels))
    for name, values in (("pixel_mean", _IMAGENET_MEAN), ("pixel_std", _IMAGENET_STD)):
        # Real numbers on any device: no checkpoint holds them.
        statistic = 255.0 * torch.tensor(values, device="cpu").view(-1, 1, 1)
        if channels != len(values):
            statistic = statistic.mean().expand(channels, 1, 1).clone()
        model.register_buffer(name, statistic, persistent=False)
    model.train(False)
    return model


def _configuration(shape: Sam2Shape, num_classes: int, channels: int) -> Any:
    from transformers import (
        Sam2Config,
        Sam2HieraDetConfig,
        Sam2MaskDecoderConfig,
        Sam2PromptEncoderConfig,
        Sam2VisionConfig,
    )

    widths, heads = (
        [first * 2**stage for stage in range(len(shape.stages))]
        for first in (shape.width, shape.heads)
    )
    backbone = Sam2HieraDetConfig(
        hidden_size=shape.width,
        num_attention_heads=shape.heads,
        num_channels=channels,
        image_size=[shape.image_size] * 2,
        window_positional_embedding_background_size=[shape.position_grid] * 2,
        num_query_pool_stages=len(shape.stages) - 1,
        blocks_per_stage=list(shape.stages),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=heads,
        window_size_per_stage=list(shape.windows),
        global_attention_blocks=list(shape.global_blocks),
        mlp_ratio=shape.mlp_ratio,
    )
    return Sam2Config(
        vision_config=Sam2VisionConfig(
            backbone_config=backbone,
            backbone_channel_list=widths[::-1],
            backbone_feature_sizes=[[shape.image_size // side] * 2 for side in (4, 8, 16)],
            fpn_hidden_size=shape.decoder_width,
        ),
        prompt_encoder_config=Sam2PromptEncoderConfig(
            hidden_size=shape.decoder_width, image_size=shape.image_size
        ),
        mask_decoder_config=Sam2MaskDecoderConfig(
            hidden_size=shape.decoder_width,
            mlp_dim=shape.decoder_mlp,
            num_attention_heads=shape.decoder_heads,
            num_multimask_outputs=num_classes,
            iou_head_hidden_dim=shape.iou_width,
        ),
    )


def _encode(
    model: Any, x: Tensor, blocks: slice = slice(None), recompute: bool = False
) -> Tensor | tuple[Tensor, ...]:
    features = encode_hiera(model.vision_encoder, x, blocks, recompute)
    if isinstance(features, Tensor):
        return features
    # SAM 2 treats an image as the first frame of a video, which nothing is remembered of.
    return (features[0] + model.no_memory_embedding.reshape(1, -1, 1, 1), *features[1:])


def _decode(
    model: Any, features: tuple[Tensor, ...], prompts: Prompts | None, input_size: tuple[int, int]
) -> Tensor:
    """Feature maps (B, C, h, w) at 1/16, 1/8 and 1/4 -> (B, classes + 1, 4h, 4w) mask logits.

    The whole batch is decoded at once, and every trained tensor sees one row per record.
    """
    decoder, (image, middle, fine) = model.mask_decoder, features
    b, c, h, w = image.shape
    tables = (decoder.obj_score_token, decoder.iou_token, decoder.mask_tokens)
    tokens = torch.cat([whole_table(table, b) for table in tables], 1)
    tokens = torch.cat([tokens, _prompt_tokens(model, prompts, b, input_size)], 1)
    no_mask = whole_table(model.prompt_encoder.no_mask_embed, b).reshape(b, c, 1, 1)
    hidden, image = decoder.transformer(
        point_embeddings=tokens[:, None],  # transformers has a dimension for several objects here
        image_embeddings=image + no_mask,
        image_positional_embeddings=_image_positions(model, h, w).expand(b, -1, -1, -1),
        attention_similarity=None,
    )
    image = image[:, 0].transpose(1, 2).reshape(b, c, h, w)
    upscaled = decoder.upscale_layer_norm(decoder.upscale_conv1(image) + decoder.conv_s1(middle))
    upscaled = decoder.upscale_conv2(decoder.activation(upscaled)) + decoder.conv_s0(fine)
    networks = enumerate(decoder.output_hypernetworks_mlps)
    weights = torch.stack([network(hidden[:, 0, 2 + i]) for i, network in networks], dim=1)
    return torch.einsum("bnc,bchw->bnhw", weights, decoder.activation(upscaled))


def _image_positions(model: Any, h: int, w: int) -> Tensor:
    """(1, C, h, w): codes of the centres of the image tokens."""
    embedding = model.shared_image_embedding
    like = embedding.positional_embedding
    y, x = ((torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n for n in (h, w))
    places = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1)
    codes: Tensor = embedding(places)
    return codes.permute(2, 0, 1)[None]


def _prompt_tokens(
    model: Any, prompts: Prompts | None, batch: int, input_size: tuple[int, int]
) -> Tensor:
    """(B, N + 1, C) sparse embeddings, as `Sam2PromptEncoder` makes them.

    SAM 2 always adds one point that is none, and two where it is given no prompt.
    """
    encoder = model.prompt_encoder
    nothing: Tensor = encoder.not_a_point_embed.weight.expand(batch, 1, -1)
    if prompts is None:
        return nothing.expand(-1, 2, -1)
    labels = prompts.labels[..., None]
    # The official coder takes (B, objects, N, 2).
    codes = encoder.shared_embedding((prompts.points + 0.5)[:, None], input_size)[:, 0]
    codes = codes + encoder.point_embed.weight[prompts.labels.clamp(min=0)]
    codes = torch.where(labels < 0, encoder.not_a_point_embed.weight, codes)
    return torch.cat([codes, nothing], 1)


_PER_TOKEN = (
    "mask_decoder.mask_tokens.weight",
    "mask_decoder.iou_prediction_head.proj_out.weight",
    "mask_decoder.iou_prediction_head.proj_out.bias",
)


def _fit(state: dict[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fits a published state dict, of an image or a video model, to the tokens a task needs."""
    return fit_tokens(image_state(state), wanted, _PER_TOKEN)


_BLOCK, _TRANSFORMER = r"vision_encoder\.backbone\.blocks\.\d+", r"mask_decoder\.transformer\..*"

FAMILY = Family(
    construct=construct,
    encode=_encode,
    decode=_decode,
    num_blocks=lambda model: len(model.vision_encoder.backbone.blocks),
    resize_tables=lambda model, size: None,  # one table serves all sizes, also while it is trained
    fit=_fit,
    parts={
        "encoder.patch": r"vision_encoder\.backbone\.(patch_embed|pos_embed|pos_embed_window)",
        "encoder.blocks": _BLOCK,
        "encoder.attention": rf"{_BLOCK}\.attn",
        "encoder.qkv": rf"{_BLOCK}\.attn\.qkv",
        "encoder.proj": rf"{_BLOCK}\.attn\.proj",
        "encoder.shortcut": rf"{_BLOCK}\.proj",
        "encoder.mlp": rf"{_BLOCK}\.mlp\.proj_(in|out)",
        "encoder.mlp_block": rf"{_BLOCK}\.mlp",
        "encoder.norm": rf"{_BLOCK}\.layer_norm\d",
        "encoder.bias": rf"{_BLOCK}\..*\.bias",
        "encoder.neck": r"vision_encoder\.neck|no_memory_embedding",
        "encoder.neck_norm": r"(?!)",  # it has none
        "decoder": r"mask_decoder",
        "decoder.transformer": r"mask_decoder\.transformer",
        "decoder.attention": rf"{_TRANSFORMER}\.(q|k|v|o)_proj",
        "decoder.qv": rf"{_TRANSFORMER}\.(q|v)_proj",
        "decoder.ko": rf"{_TRANSFORMER}\.(k|o)_proj",
        "decoder.mlp": rf"{_TRANSFORMER}\.mlp\.proj_(in|out)",
        "decoder.mlp_block": rf"{_TRANSFORMER}\.mlp",
        "decoder.token_to_image": rf"{_TRANSFORMER}_token_to_image\.o_proj",
        "decoder.image_to_token": rf"{_TRANSFORMER}_image_to_token\.o_proj",
        "decoder.norm": r"mask_decoder\.transformer\.(.*\.)?layer_norm[^.]*",
        "decoder.bias": rf"{_TRANSFORMER}\.bias",
        "decoder.tokens": r"mask_decoder\.mask_tokens",
        "decoder.upscaling": r"mask_decoder\.(upscale_conv[12]|upscale_layer_norm|conv_s[01])",
        "decoder.hypernetworks": r"mask_decoder\.output_hypernetworks_mlps",
        "decoder.quality": (
            r"mask_decoder\.(iou_token|iou_prediction_head|obj_score_token|pred_obj_score_head)"
        ),
        "prompt_encoder": r"prompt_encoder",
        "prompt_encoder.no_mask": r"prompt_encoder\.no_mask_embed",
    },
)
