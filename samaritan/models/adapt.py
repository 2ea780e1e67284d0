"""A method put on a base: what is frozen, what is trained, and what is added."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from samaritan.config import PeftConfig
from samaritan.errors import ConfigError
from samaritan.models.bases import FAMILIES, Base
from samaritan.models.family import Family, belongs, last_blocks
from samaritan.models.inserts import attach_inserts
from samaritan.models.lora import inject_lora, official_name
from samaritan.models.presets import Preset, get_preset


def adapt(
    model: Any,
    base: Base,
    settings: PeftConfig,
    *,
    input_size: tuple[int, int],
    depth: int,
    seed: int,
) -> tuple[LoraConfig | None, dict[str, nn.Parameter]]:
    """Freezes a base and attaches a method to it.

    Args:
        model: The module of the base; changed in place.
        base: What it was built from.
        settings: Preset, ranks, variant, and how many encoder blocks to adapt.
        input_size: (rows, columns) of the model input; trained position tables are fitted to it.
        depth: Slices of a record that are encoded as images of their own.
        seed: Seeds what is added.

    Returns:
        peft's configuration where the preset uses LoRA, and the trained parameters by their
        official names.

    Raises:
        ConfigError: For an unknown preset or group of layers, or one that the base does not have.
        ModelError: When a rank exceeds a layer's width.
    """
    preset, family = get_preset(settings.preset), FAMILIES[base.family]
    extra_lora, extra_train = (base.extra_lora, base.extra_train) if preset.lora else ((), ())
    blocks = family.num_blocks(model)
    _check(preset, settings, family, blocks, base)

    def pattern(part: str) -> str:
        return last_blocks(family.parts[part], blocks, settings.blocks)

    model.requires_grad_(False)
    config = None
    if preset.lora:
        lora = (*preset.lora, *extra_lora)
        config = inject_lora(
            model,
            tuple(pattern(part) for part in lora),
            family.parts["encoder.qkv"],
            rank=settings.rank,
            ranks={
                pattern(part): settings.ranks[group]
                for group in sorted(settings.ranks)  # a part comes after the group it is in
                for part in lora
                if _within(part, group)
            },
            alpha=settings.alpha,
            variant=settings.variant,
            seed=seed,
        )
    inserts = tuple((insert, pattern(insert.part)) for insert in preset.inserts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attach_inserts(model, inserts, settings.rank, depth)
    # What comes before the last blocks stays frozen, or its activations could not be kept.
    whole = [
        pattern(part)
        for part in (*preset.train, *extra_train)
        if settings.blocks is None or part != "encoder.patch"
    ]
    for name, parameter in model.named_parameters():
        if belongs(official_name(name), whole):
            parameter.requires_grad_(True)
    family.resize_tables(model, input_size)
    trained = {official_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    return config, trained


def _within(part: str, group: str) -> bool:
    return part == group or part.startswith(f"{group}.")


def _check(preset: Preset, settings: PeftConfig, family: Family, blocks: int, base: Base) -> None:
    """Refuses what the base or the preset does not have.

    Raises:
        ConfigError: With the choices.
    """
    used = {*preset.lora, *preset.train, *(insert.part for insert in preset.inserts)}
    lacking = sorted(used - family.parts.keys())
    lacking += sorted(
        {f"inserts of the kind {i.kind}" for i in preset.inserts if i.kind not in family.inserts}
    )
    if lacking:
        raise ConfigError(
            "SAM-C206",
            f"peft.preset {settings.preset} needs {', '.join(lacking)}, "
            f"which models of the family {base.family} do not have",
            "Choose another preset or another base.",
        )
    groups = {*preset.lora, *(base.extra_lora if preset.lora else ())}
    for group in settings.ranks:
        if not any(_within(part, group) for part in groups):
            raise ConfigError(
                "SAM-C207",
                f"peft.ranks names {group!r}, where preset {settings.preset} puts no LoRA",
                f"It has LoRA in: {', '.join(sorted(groups)) or 'nothing'}.",
            )
    if not preset.lora and (settings.variant != "lora" or settings.alpha is not None):
        raise ConfigError(
            "SAM-C213",
            f"peft.variant and peft.alpha are for LoRA, and preset {settings.preset} has none",
            "Leave them out, or choose a preset with LoRA.",
        )
    if settings.blocks is not None and settings.blocks > blocks:
        raise ConfigError(
            "SAM-C208",
            f"peft.blocks is {settings.blocks}, but the encoder has {blocks} blocks",
            "Leave it out to adapt them all.",
        )
