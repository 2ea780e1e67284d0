"""Which parts of SAM a method trains. Presets are data: regular expressions over official names."""

from __future__ import annotations

import re
from dataclasses import dataclass

from samaritan.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """A way of adapting SAM.

    Attributes:
        source: Paper or code the method comes from.
        lora: Expressions that match whole names of modules given a LoRA; on a fused qkv it acts
            on q and v alone.
        train: Expressions that match the start of names of parameters trained in full.
    """

    source: str
    lora: tuple[str, ...]
    train: tuple[str, ...]


PRESETS = {
    "flap-sam": Preset(
        source="FLAP-SAM, arXiv 2407.21739",
        lora=(
            r"image_encoder\.blocks\.\d+\.attn\.qkv",
            r"mask_decoder\.transformer\..*\.(q_proj|v_proj)",
        ),
        train=(
            r"mask_decoder\.mask_tokens\.",
            r"mask_decoder\.output_upscaling\.",
            r"mask_decoder\.output_hypernetworks_mlps\.",
        ),
    ),
}


def get_preset(name: str) -> Preset:
    """The preset of that name.

    Raises:
        ConfigError: When there is none, with the list.
    """
    if name not in PRESETS:
        raise ConfigError(
            "SAM-C201",
            f"peft.preset: there is no preset {name!r}",
            f"Choose one of: {', '.join(PRESETS)}.",
        )
    return PRESETS[name]


def extend(preset: Preset, lora: tuple[str, ...], train: tuple[str, ...]) -> Preset:
    """A preset with what a base asks for besides."""
    return Preset(preset.source, preset.lora + lora, preset.train + train)


def matches(patterns: tuple[str, ...], name: str) -> bool:
    """Whether a parameter name starts with one of the expressions."""
    return any(re.match(pattern, name) for pattern in patterns)
