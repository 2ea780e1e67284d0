"""The family of the official SAM: its shape, its parts, its decoder, without and with prompts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from samaritan.models.encoder import encode_image, resized_positions, resized_table
from samaritan.models.family import Family, Prompts
from samaritan.models.official import modeling

_SEED = 2407_21739


@dataclass(frozen=True)
class SamShape:
    """Hyper-parameters of a SAM.

    Attributes:
        width, depth, heads, patch, window, mlp_ratio: Of the image encoder.
        global_blocks: Indices of blocks that attend over the whole image.
        image_size: Side in pixels for which the position tables are made.
        decoder_width, decoder_mlp, decoder_heads, iou_width: Of the mask decoder.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    patch: int = 16
    window: int = 14
    mlp_ratio: float = 4.0
    image_size: int = 1024
    decoder_width: int = 256
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    iou_width: int = 256


def construct(
    shape: SamShape, num_classes: int, channels: int = 3, decoder: str = "official"
) -> Any:
    """An official `Sam` with one mask token per class and background.

    Args:
        shape: Hyper-parameters.
        num_classes: Structures to segment, background not counted.
        channels: Input channels.
        decoder: "official", or "reference" for FLAP-SAM's four upscaling stages.
    """
    m = modeling()
    grid = shape.image_size // shape.patch
    sam = m.Sam(
        image_encoder=m.ImageEncoderViT(
            img_size=shape.image_size,
            patch_size=shape.patch,
            in_chans=channels,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=shape.heads,
            mlp_ratio=shape.mlp_ratio,
            out_chans=shape.decoder_width,
            qkv_bias=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=shape.window,
            global_attn_indexes=shape.global_blocks,
        ),
        prompt_encoder=m.PromptEncoder(
            embed_dim=shape.decoder_width,
            image_embedding_size=(grid, grid),
            input_image_size=(shape.image_size, shape.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=m.MaskDecoder(
            num_multimask_outputs=num_classes,
            transformer=m.TwoWayTransformer(
                depth=2,
                embedding_dim=shape.decoder_width,
                mlp_dim=shape.decoder_mlp,
                num_heads=shape.decoder_heads,
            ),
            transformer_dim=shape.decoder_width,
            iou_head_depth=3,
            iou_head_hidden_dim=shape.iou_width,
        ),
        **_pixel_statistics(channels),
    )
    if decoder == "reference":
        _add_upscaling_stages(sam.mask_decoder, shape.decoder_width)
    sam.eval()
    return sam


def _pixel_statistics(channels: int) -> dict[str, list[float]]:
    if channels == 3:
        return {}  # Sam's own
    return {"pixel_mean": [116.0] * channels, "pixel_std": [57.0] * channels}


def _add_upscaling_stages(decoder: Any, width: int) -> None:
    """Four doublings instead of two, so that logits come out at the size of the input.

    The decoder of FLAP-SAM's code (arXiv 2407.21739): width / 4, / 8, / 16 and / 32 channels.
    """
    norm = type(decoder.output_upscaling[1])
    layers = list(decoder.output_upscaling[:4])
    # Real tensors from the same random numbers on every machine: no checkpoint holds them.
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        for level in (8, 16):
            wide, narrow = width // level, width // level // 2
            layers += [norm(wide), nn.GELU(), nn.ConvTranspose2d(wide, narrow, 2, stride=2)]
        decoder.output_upscaling = nn.Sequential(*layers, nn.GELU())
        for network in decoder.output_hypernetworks_mlps:
            network.layers[-1] = nn.Linear(width, width // 32)


def _encode(
    sam: Any, x: Tensor, blocks: slice = slice(None), recompute: bool = False
) -> Tensor:  # fmt: skip
    return encode_image(sam.image_encoder, x, blocks, recompute)


def _decode(
    sam: Any, embedding: Tensor, prompts: Prompts | None, input_size: tuple[int, int]
) -> Tensor:
    """(B, C, h, w) image embeddings -> (B, classes + 1, H, W) mask logits.

    The whole batch is decoded at once: output tokens and the "no mask" embedding are looked up for
    each record, so that every trained tensor sees one row per record.
    """
    decoder, encoder = sam.mask_decoder, sam.prompt_encoder
    b, c, h, w = embedding.shape
    tokens = torch.cat([whole_table(decoder.iou_token, b), whole_table(decoder.mask_tokens, b)], 1)
    if prompts is not None:
        tokens = torch.cat([tokens, _prompt_tokens(encoder, prompts, input_size)], 1)
    no_mask = whole_table(encoder.no_mask_embed, b).reshape(b, c, 1, 1)
    position = encoder.pe_layer((h, w)).unsqueeze(0).expand(b, -1, -1, -1)
    hidden, image = decoder.transformer(embedding + no_mask, position, tokens)
    upscaled = decoder.output_upscaling(image.transpose(1, 2).reshape(b, c, h, w))
    networks = enumerate(decoder.output_hypernetworks_mlps)
    weights = torch.stack([network(hidden[:, 1 + i]) for i, network in networks], dim=1)
    return torch.einsum("bnc,bchw->bnhw", weights, upscaled)


def whole_table(embedding: nn.Embedding, batch: int) -> Tensor:
    """(B, rows, C): all rows for each record, by the module, whose hooks then see each record."""
    rows = torch.arange(len(embedding.weight), device=embedding.weight.device)
    table: Tensor = embedding(rows.expand(batch, -1))
    return table


def _prompt_tokens(encoder: Any, prompts: Prompts, input_size: tuple[int, int]) -> Tensor:
    """(B, N, C) sparse embeddings, as the official prompt encoder makes them.

    Where there are points and no box it appends a token that says so: (B, N + 1, C).
    """
    labels = prompts.labels[..., None]
    tokens = encoder.pe_layer.forward_with_coords(prompts.points + 0.5, input_size)
    nothing = encoder.not_a_point_embed.weight
    tokens = torch.where(labels < 0, nothing, tokens)
    kinds = torch.cat([embedding.weight for embedding in encoder.point_embeddings])
    tokens = tokens + torch.where(labels < 0, 0.0, kinds[labels[..., 0].clamp(min=0)])
    if not (labels >= 2).any():
        tokens = torch.cat([tokens, nothing.expand(len(tokens), 1, -1)], 1)
    return tokens


def _resize_tables(sam: Any, size: tuple[int, int]) -> None:
    """Fits the position tables that a method trains to the input, once and for all.

    A frozen table keeps its official shape and is resized on the fly, to the same values.
    """
    encoder = sam.image_encoder
    patch = encoder.patch_embed.proj.kernel_size
    grid = (size[0] // patch[0], size[1] // patch[1])
    if encoder.pos_embed.requires_grad:
        encoder.pos_embed = nn.Parameter(resized_positions(encoder.pos_embed.detach(), grid))
    for block in encoder.blocks:
        extent = (block.window_size,) * 2 if block.window_size else grid
        for name, side in zip(("rel_pos_h", "rel_pos_w"), extent, strict=True):
            table = getattr(block.attn, name)
            if table.requires_grad:
                setattr(block.attn, name, nn.Parameter(resized_table(table.detach(), side)))


_PER_TOKEN = (
    "mask_decoder.mask_tokens.weight",
    "mask_decoder.iou_prediction_head.layers.2.weight",
    "mask_decoder.iou_prediction_head.layers.2.bias",
)
_HYPERNETWORKS = "mask_decoder.output_hypernetworks_mlps."


def fit_tokens(
    state: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    per_token: tuple[str, ...] = _PER_TOKEN,
) -> dict[str, Tensor]:
    """Fits a published state dict to the mask tokens and the decoder that a task needs.

    A task with another number of classes than SAM's three masks starts each of its tokens,
    hypernetworks and quality outputs from the official one of the same index modulo four. What the
    reference decoder has besides is left to its random start.

    Args:
        state: As published, under the names of `wanted`.
        wanted: The state dict of the model to fill.
        per_token: Tensors with a row for each mask token, the tokens first.
    """
    tokens = wanted[per_token[0]].shape[0]
    rows = {state[name].shape[:1] for name in per_token if name in state}
    held = next(iter(rows), None)
    if len(rows) != 1 or not held or held[0] == 0:
        return state
    source = [i % held[0] for i in range(tokens)]
    fitted = {k: v for k, v in state.items() if not k.startswith(_HYPERNETWORKS)}
    for name in per_token:
        if name in fitted:
            fitted[name] = fitted[name][source]
    for name, value in state.items():
        if name.startswith(_HYPERNETWORKS):
            index, _, rest = name.removeprefix(_HYPERNETWORKS).partition(".")
            for new, old in enumerate(source):
                if index == str(old):
                    fitted[f"{_HYPERNETWORKS}{new}.{rest}"] = value.clone()
    new_layers = {
        name: value
        for name, value in wanted.items()
        if not value.is_meta and (name not in fitted or fitted[name].shape != value.shape)
    }
    return fitted | new_layers


_BLOCK, _TRANSFORMER = r"image_encoder\.blocks\.\d+", r"mask_decoder\.transformer\..*"
_LAYERS = r"mask_decoder\.transformer\.layers\.\d+"

FAMILY = Family(
    construct=construct,
    encode=_encode,
    decode=_decode,
    num_blocks=lambda sam: len(sam.image_encoder.blocks),
    resize_tables=_resize_tables,
    fit=fit_tokens,
    inserts=frozenset({
        "serial", "parallel", "depth", "before_attention", "after_attention", "factors", "tokens",
    }),
    parts={
        "encoder.patch": r"image_encoder\.(patch_embed|pos_embed)",
        "encoder.blocks": _BLOCK,
        "encoder.attention": rf"{_BLOCK}\.attn",
        "encoder.qkv": rf"{_BLOCK}\.attn\.qkv",
        "encoder.proj": rf"{_BLOCK}\.attn\.proj",
        "encoder.positions": rf"{_BLOCK}\.attn\.rel_pos_[hw]",
        "encoder.mlp": rf"{_BLOCK}\.mlp\.lin[12]",
        "encoder.mlp_block": rf"{_BLOCK}\.mlp",
        "encoder.norm": rf"{_BLOCK}\.norm\d",
        "encoder.bias": rf"{_BLOCK}\..*\.bias",
        "encoder.neck": r"image_encoder\.neck",
        "encoder.neck_norm": r"image_encoder\.neck\.[13]",
        "decoder": r"mask_decoder",
        "decoder.transformer": r"mask_decoder\.transformer",
        "decoder.attention": rf"{_TRANSFORMER}\.(q|k|v|out)_proj",
        "decoder.qv": rf"{_TRANSFORMER}\.(q|v)_proj",
        "decoder.ko": rf"{_TRANSFORMER}\.(k|out)_proj",
        "decoder.mlp": rf"{_TRANSFORMER}\.mlp\.lin[12]",
        "decoder.mlp_block": rf"{_TRANSFORMER}\.mlp",
        "decoder.token_to_image": rf"{_LAYERS}\.cross_attn_token_to_image\.out_proj",
        "decoder.image_to_token": rf"{_LAYERS}\.cross_attn_image_to_token\.out_proj",
        "decoder.norm": r"mask_decoder\.transformer\.(.*\.)?norm[^.]*",
        "decoder.bias": rf"{_TRANSFORMER}\.bias",
        "decoder.tokens": r"mask_decoder\.mask_tokens",
        "decoder.upscaling": r"mask_decoder\.output_upscaling",
        "decoder.hypernetworks": r"mask_decoder\.output_hypernetworks_mlps",
        "decoder.quality": r"mask_decoder\.(iou_token|iou_prediction_head)",
        "prompt_encoder": r"prompt_encoder",
        "prompt_encoder.no_mask": r"prompt_encoder\.no_mask_embed",
    },
)  # fmt: skip
