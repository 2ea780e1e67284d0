"""Which parts of a model a method trains. Presets are data: names of parts that a family knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from samaritan.errors import ConfigError


@dataclass(frozen=True)
class Insert:
    """Small modules that a method adds.

    Attributes:
        kind: "serial" acts on a layer's output, "parallel" from its input; "depth" attends and
            "before_attention" and "after_attention" convolve across the slices of a record;
            "factors" updates q and v; "tokens" are further tokens to attend to.
        part: The layers it is added to.
        size: Hidden channels, as a share of the layer's if at most 1; the number of tokens.
        scale: Factor on what is added.
    """

    kind: Literal[
        "serial", "parallel", "depth", "before_attention", "after_attention", "factors", "tokens"
    ]
    part: str
    size: float = 1
    scale: float = 1.0


@dataclass(frozen=True)
class Preset:
    """A way of adapting SAM.

    Attributes:
        source: Paper or code the method comes from.
        lora: Parts whose layers get a LoRA; on a fused qkv it acts on q and v alone.
        train: Parts trained in full.
        inserts: Modules added.
    """

    source: str
    lora: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    inserts: tuple[Insert, ...] = ()

    @property
    def volumetric(self) -> bool:
        """Whether the slices of a record are encoded as images of their own, and then exchange."""
        across = {"depth", "before_attention", "after_attention"}
        return any(insert.kind in across for insert in self.inserts)


_QV = ("encoder.qkv", "decoder.qv")
_HEADS = ("decoder.tokens", "decoder.upscaling", "decoder.hypernetworks")
_FLAP = "FLAP-SAM, arXiv 2407.21739"

PRESETS = {
    "flap-sam": Preset(_FLAP, lora=_QV, train=_HEADS),
    "samed": Preset(
        "SAMed, arXiv 2304.13785", lora=("encoder.qkv",), train=("decoder", "prompt_encoder")
    ),
    "samed-s": Preset(
        "SAMed_s, arXiv 2304.13785",
        lora=_QV,
        train=(*_HEADS, "decoder.quality", "prompt_encoder"),
    ),
    "lora-only": Preset(f"LoRA, arXiv 2106.09685; compared in {_FLAP}", lora=_QV),
    "lora-decoder": Preset(f"compared in {_FLAP}", lora=_QV, train=("decoder",)),
    "decoder-only": Preset(f"compared in {_FLAP}", train=("decoder",)),
    "partial-decoder": Preset(f"compared in {_FLAP}", train=_HEADS),
    "attention-only": Preset(
        f"compared in {_FLAP}", train=("encoder.attention", "decoder.attention", *_HEADS)
    ),
    "full": Preset(
        f"compared in {_FLAP}",
        train=("encoder.patch", "encoder.blocks", "encoder.neck", "decoder", "prompt_encoder"),
    ),
    "cheap-lunch": Preset(
        "Cheap Lunch, arXiv 2308.14133", lora=("encoder.qkv", "decoder.attention"), train=_HEADS
    ),
    "med-sa": Preset(
        "Med-SA, arXiv 2304.12620",
        inserts=(
            Insert("serial", "encoder.proj", 0.25),
            Insert("depth", "encoder.blocks", 0.25),
            Insert("parallel", "encoder.mlp_block", 0.25, scale=0.5),
            Insert("serial", "decoder.token_to_image", 0.25),
            Insert("parallel", "decoder.mlp_block", 0.25, scale=0.5),
            Insert("serial", "decoder.image_to_token", 0.25),
        ),
        train=_HEADS,
    ),
    "ma-sam": Preset(
        "MA-SAM, arXiv 2309.08842",
        inserts=(
            Insert("factors", "encoder.qkv"),
            Insert("before_attention", "encoder.blocks", 384),
            Insert("after_attention", "encoder.blocks", 384),
        ),
        train=("decoder", "prompt_encoder"),
    ),
    "prompt-tuning": Preset(
        "VPT-deep, arXiv 2203.12119",
        inserts=(Insert("tokens", "encoder.blocks", 10),),
        train=_HEADS,
    ),
    "norm-bias": Preset(
        "BitFit, arXiv 2106.10199, and norms, as in micro-sam, arXiv 2502.00418",
        train=("encoder.norm", "encoder.bias", "encoder.neck_norm", "decoder.norm", "decoder.bias",
               *_HEADS),
    ),
}  # fmt: skip


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
