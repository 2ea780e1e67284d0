"""How much a method trains, counted on shapes alone: no checkpoint and no memory is needed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from samaritan.config import Config, PeftConfig
from samaritan.models.adapt import adapt
from samaritan.models.adapter import image_size
from samaritan.models.bases import FAMILIES, get_base, parameters, require_multiple
from samaritan.models.presets import get_preset


@dataclass(frozen=True)
class Count:
    """Sizes of a model and of what is trained of it.

    Attributes:
        parameters: Of the base.
        trained: That a preset trains, and a site sends.
        image_size: Side of the input in pixels for which they hold.
    """

    parameters: int
    trained: int
    image_size: int


def count_trained(
    base: str, preset: str, rank: int, classes: int, image_size: int | None = None,
    decoder: str = "official", depth: int = 5,
) -> Count:  # fmt: skip
    """Counts the parameters of a base and those a preset trains.

    Args:
        base: Name of the base.
        preset: Name of the preset.
        rank: LoRA rank.
        classes: Structures to segment, background not counted.
        image_size: Side of the input; the base's own when None.
        decoder: "official" or "reference".
        depth: Slices of a record, for presets that work across slices.

    Raises:
        ConfigError: For an unknown name, or a side the base cannot take.
        ModelError: When the rank exceeds a layer's width.
    """
    spec = get_base(base)
    side = image_size or spec.image_size
    require_multiple(side, spec.patch, base)
    with torch.device("meta"):
        model = FAMILIES[spec.family].construct(spec.shape, classes, spec.channels or 3, decoder)
        total = parameters(model)
        _, trained = adapt(
            model, spec, PeftConfig(preset=preset, rank=rank), input_size=(side, side),
            depth=depth if get_preset(preset).volumetric else 1, seed=0,
        )  # fmt: skip
    return Count(total, sum(p.numel() for p in trained.values()), side)


def trained_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a configuration's adapter with its shape.

    Args:
        config: With `data.classes`; where they are left to the labels, three are assumed, which
            hardly changes a count.

    Raises:
        ConfigError: For an unknown name.
        ModelError: When the rank exceeds a layer's width.
    """
    spec, preset = get_base(config.model.base), get_preset(config.peft.preset)
    context = config.data.context_slices
    channels = context if context > 1 and not preset.volumetric else 3
    with torch.device("meta"):
        model = FAMILIES[spec.family].construct(
            spec.shape, len(config.data.classes or range(3)), spec.channels or channels,
            config.model.decoder,
        )  # fmt: skip
        _, trained = adapt(
            model, spec, config.peft, input_size=image_size(config),
            depth=context if preset.volumetric else 1, seed=0,
        )  # fmt: skip
    return {name: tuple(parameter.shape) for name, parameter in trained.items()}
