"""Names of tensors in SAM 2 checkpoints: those of facebookresearch/sam2 into those of transformers.

MedSAM2 publishes files under the former. What only tracks through a video is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_VIDEO = re.compile(
    r"memory_|mask_downsample\.|object_pointer_proj\.|temporal_positional_encoding|"
    r"no_memory_positional_encoding|no_object_pointer|occlusion_spatial_embedding|"
    r"maskmem_tpos_enc|no_mem_pos_enc|no_obj_ptr|no_obj_embed_spatial|obj_ptr_(?:tpos_)?proj\."
)
"""Starts of names, of both kinds."""

_RENAMES = (
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"^sam_(prompt_encoder|mask_decoder)\.", r"\1."),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.mlp\.layers\.0\.", ".mlp.proj_in."),
    (r"\.mlp\.layers\.1\.", ".mlp.proj_out."),
    (r"(_mlps\.\d+|_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(_mlps\.\d+|_head)\.layers\.1\.", r"\1.layers.0."),
    (r"(_mlps\.\d+|_head)\.layers\.2\.", r"\1.proj_out."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (
        r"\.pe_layer\.positional_encoding_gaussian_matrix$",
        ".shared_embedding.positional_embedding",
    ),
)
"""Expression -> replacement, all applied in this order."""

_OFFICIAL = "sam_mask_decoder.mask_tokens.weight"
_POINT_KINDS = tuple(f"prompt_encoder.point_embeddings.{i}.weight" for i in range(4))


def image_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a SAM 2 checkpoint holds for single images, under the names of `Sam2Model`.

    Args:
        state: Of either kind, of an image or a video model.
    """
    kept = {name: value for name, value in state.items() if not _VIDEO.match(name)}
    if _OFFICIAL not in state:
        return kept
    renamed = {_renamed(name): value for name, value in kept.items()}
    if all(name in renamed for name in _POINT_KINDS):
        kinds = [renamed.pop(name) for name in _POINT_KINDS]
        renamed["prompt_encoder.point_embed.weight"] = torch.cat(kinds)
    # transformers holds the random frequencies of positions twice.
    frequencies = renamed.get("prompt_encoder.shared_embedding.positional_embedding")
    if frequencies is not None:
        renamed["shared_image_embedding.positional_embedding"] = frequencies.clone()
    return renamed


def _renamed(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
