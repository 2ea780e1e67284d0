"""The base models: official SAM by checkpoint file, and the embedded miniature `tiny`."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samaritan.errors import ConfigError, ModelError
from samaritan.models.checkpoints import file_sha256, load_checkpoint
from samaritan.models.official import modeling


@dataclass(frozen=True)
class Base:
    """Hyper-parameters of a SAM, and what a preset trains besides its own list.

    Attributes:
        width, depth, heads, patch, window, mlp_ratio: Of the image encoder.
        global_blocks: Indices of blocks that attend over the whole image.
        decoder_width, decoder_mlp, decoder_heads, iou_width: Of the mask decoder.
        image_size: Native side of the input in pixels.
        relative_positions: Whether attention has relative position tables.
        channels: Input channels; None takes as many as there are context slices.
        checkpoint: File name and SHA-256 of the published checkpoint, if there is one.
        extra_lora, extra_train: Added to every preset, for a base that was never trained.
        note: What a reader must know about the base.
    """

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, ...]
    patch: int = 16
    window: int = 14
    mlp_ratio: float = 4.0
    decoder_width: int = 256
    decoder_mlp: int = 2048
    decoder_heads: int = 8
    iou_width: int = 256
    image_size: int = 1024
    relative_positions: bool = True
    channels: int | None = 3
    checkpoint: tuple[str, str] | None = None
    extra_lora: tuple[str, ...] = ()
    extra_train: tuple[str, ...] = ()
    note: str = ""


BASES = {
    "vit_b": Base(
        768, 12, 12, (2, 5, 8, 11),
        checkpoint=(
            "sam_vit_b_01ec64.pth",
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        note="Segment Anything ViT-B (Meta AI, Apache-2.0).",
    ),
    "vit_l": Base(
        1024, 24, 16, (5, 11, 17, 23),
        checkpoint=(
            "sam_vit_l_0b3195.pth",
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        note="Segment Anything ViT-L (Meta AI, Apache-2.0).",
    ),
    "vit_h": Base(
        1280, 32, 16, (7, 15, 23, 31),
        checkpoint=(
            "sam_vit_h_4b8939.pth",
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
        note="Segment Anything ViT-H (Meta AI, Apache-2.0).",
    ),
    "tiny": Base(
        width=128, depth=3, heads=4, global_blocks=(0, 1, 2), patch=4, window=0, mlp_ratio=2.0,
        decoder_width=96, decoder_mlp=128, decoder_heads=4, iou_width=64,
        image_size=48, channels=None,
        extra_lora=(
            r"image_encoder\.blocks\.\d+\.(attn\.proj|mlp\.lin[12])",
            r"mask_decoder\.transformer\..*\.(k_proj|out_proj)",
        ),
        extra_train=(
            r"image_encoder\.(patch_embed|pos_embed|neck)",
            r"image_encoder\.blocks\.\d+\.(norm\d|attn\.rel_pos_[hw]|.*\.bias)",
            r"mask_decoder\.transformer\.(.*\.mlp\.|.*norm|.*\.bias)",
            r"prompt_encoder\.no_mask_embed",
        ),
        note=(
            "`tiny` is a randomly initialised miniature of SAM. It exercises the method on a "
            "laptop; it is no foundation model, and its scores say nothing about a pretrained SAM."
        ),
    ),
}  # fmt: skip

_TINY_SEED = 20261122


@dataclass(frozen=True)
class BuiltBase:
    """A base model ready to be adapted.

    Attributes:
        sam: Official `Sam` in evaluation mode, one mask token per class and background.
        spec: Its hyper-parameters.
        name: Its name in `BASES`.
        sha256: Hash of the checkpoint file, or of the tensors where there is no file.
        parameters: Number of parameters.
    """

    sam: Any = field(repr=False)
    spec: Base
    name: str
    sha256: str
    parameters: int


def get_base(name: str) -> Base:
    """The hyper-parameters of a base.

    Raises:
        ConfigError: When there is none of that name, with the list.
    """
    if name not in BASES:
        raise ConfigError(
            "SAM-C202",
            f"model.base: there is no base model {name!r}",
            f"Choose one of: {', '.join(BASES)}.",
        )
    return BASES[name]


def build_base(
    name: str,
    num_classes: int,
    channels: int = 3,
    checkpoint: Path | None = None,
    expected_sha256: str | None = None,
) -> BuiltBase:
    """Builds a base and loads its checkpoint.

    Args:
        name: A key of `BASES`.
        num_classes: Structures to segment, background not counted.
        channels: Input channels, for a base that leaves them open.
        checkpoint: Checkpoint file; needed by every base that has one published.
        expected_sha256: Refuse any other file.

    Raises:
        ModelError: When the checkpoint is missing, altered or of another shape.
    """
    spec = get_base(name)
    if spec.checkpoint is None:
        if checkpoint is not None:
            raise ModelError(
                "SAM-M102",
                f"base {name!r} takes no checkpoint, got {checkpoint.name}",
                "Leave model.checkpoint out, or choose vit_b, vit_l or vit_h.",
            )
        sam = initialise(spec, num_classes, channels)
        return BuiltBase(sam, spec, name, state_sha256(sam.state_dict()), count_parameters(sam))
    if checkpoint is None:
        raise ModelError(
            "SAM-M103",
            f"base {name!r} needs its checkpoint {spec.checkpoint[0]}",
            "Set model.checkpoint to the file (see `samaritan models list`).",
        )
    sam = construct(spec, num_classes, channels)
    load_checkpoint(sam, checkpoint, expected_sha256)
    return BuiltBase(sam, spec, name, file_sha256(checkpoint), count_parameters(sam))


def construct(spec: Base, num_classes: int, channels: int = 3) -> Any:
    """An official `Sam` of these hyper-parameters with one mask token per class and background."""
    m = modeling()
    channels = spec.channels or channels
    grid = spec.image_size // spec.patch
    sam = m.Sam(
        image_encoder=m.ImageEncoderViT(
            img_size=spec.image_size,
            patch_size=spec.patch,
            in_chans=channels,
            embed_dim=spec.width,
            depth=spec.depth,
            num_heads=spec.heads,
            mlp_ratio=spec.mlp_ratio,
            out_chans=spec.decoder_width,
            qkv_bias=True,
            norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=spec.relative_positions,
            window_size=spec.window,
            global_attn_indexes=spec.global_blocks,
        ),
        prompt_encoder=m.PromptEncoder(
            embed_dim=spec.decoder_width,
            image_embedding_size=(grid, grid),
            input_image_size=(spec.image_size, spec.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=m.MaskDecoder(
            num_multimask_outputs=num_classes,
            transformer=m.TwoWayTransformer(
                depth=2,
                embedding_dim=spec.decoder_width,
                mlp_dim=spec.decoder_mlp,
                num_heads=spec.decoder_heads,
            ),
            transformer_dim=spec.decoder_width,
            iou_head_depth=3,
            iou_head_hidden_dim=spec.iou_width,
        ),
        **_pixel_statistics(channels),
    )
    sam.eval()
    return sam


def _pixel_statistics(channels: int) -> dict[str, list[float]]:
    if channels == 3:
        return {}  # Sam's own
    return {"pixel_mean": [116.0] * channels, "pixel_std": [57.0] * channels}


def initialise(spec: Base, num_classes: int, channels: int = 3) -> Any:
    """A base without a checkpoint, from the same random numbers on every machine.

    Linear layers of the two transformers are orthogonal, positions are sine waves, and each
    attention head starts by looking at one neighbouring token, as a convolution does (Cordonnier et
    al., arXiv 1911.03584): with few data, features that begin local learn faster.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_TINY_SEED)
        sam = construct(spec, num_classes, channels)
        for layer in [*sam.image_encoder.blocks.modules(), *sam.mask_decoder.transformer.modules()]:
            if isinstance(layer, nn.Linear):
                for part in torch.split(layer.weight.data, layer.in_features):
                    nn.init.orthogonal_(part)
                nn.init.zeros_(layer.bias)
        grid = spec.image_size // spec.patch
        sam.image_encoder.pos_embed.data = 0.5 * _sine_positions(grid, spec.width)
        for index, block in enumerate(sam.image_encoder.blocks):
            _look_at_neighbours(block.attn, index)
    return sam


def _sine_positions(grid: int, width: int) -> Tensor:
    """(1, grid, grid, width): sines and cosines of the row and of the column."""
    place = torch.arange(grid, dtype=torch.float32)
    rates = torch.exp(-math.log(100.0) * torch.arange(width // 4) / (width // 4))
    rows, columns = torch.meshgrid(place, place, indexing="ij")
    waves = [f(p[..., None] * rates) for p in (rows, columns) for f in (torch.sin, torch.cos)]
    return torch.cat(waves, -1)[None]


_OFFSETS = (
    ((-1, 0), (1, 0), (0, -1), (0, 1)),
    ((-1, -1), (-1, 1), (1, -1), (1, 1)),
    ((-2, 0), (2, 0), (0, -2), (0, 2)),
)
"""(row, column) offsets the heads begin with, one tuple per block in turn."""
_SHARPNESS, _BIAS, _CONTENT = 1.5, 4.0, 0.5


def _look_at_neighbours(attn: Any, index: int) -> None:
    """Makes each head of an attention prefer the token at one offset.

    With position tables -d^2 u + d v and a query bias u - 2 o v, the score of a key d tokens
    before the query is -(d + o)^2 up to a constant: highest for the key at offset o. Content is
    kept out of the three directions that carry positions.
    """
    heads, width = attn.num_heads, attn.proj.in_features
    d = width // heads
    square, down, right = torch.linalg.qr(torch.randn(d, d))[0].T[:3]
    distance = torch.arange(attn.rel_pos_h.shape[0], dtype=torch.float32)
    distance -= distance.mean()
    for table, direction in ((attn.rel_pos_h, down), (attn.rel_pos_w, right)):
        values = torch.outer(distance, direction) - torch.outer(distance**2, square)
        table.data = values * _SHARPNESS / _BIAS
    apart = torch.eye(d) - sum(torch.outer(v, v) for v in (square, down, right))
    weight, bias = attn.qkv.weight.data, attn.qkv.bias.data
    weight[:width] *= _CONTENT
    offsets = _OFFSETS[index % len(_OFFSETS)]
    for head in range(heads):
        row, column = offsets[head % len(offsets)]
        for start in (head * d, width + head * d):
            weight[start : start + d] = apart @ weight[start : start + d]
        bias[head * d : (head + 1) * d] = _BIAS * (square - 2 * (row * down + column * right))


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a module."""
    return sum(p.numel() for p in module.parameters())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash over names, dtypes, shapes and values of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
