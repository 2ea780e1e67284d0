"""Adapters: the trained part of a model as named tensors, as a file, and merged into the base.

An adapter state maps official parameter names to tensors, such as
``image_encoder.blocks.0.attn.qkv.lora_A_q.weight`` or ``mask_decoder.mask_tokens.weight``. It is
all that ever leaves a site.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from samaritan.config import Config, parse_config
from samaritan.errors import ConfigError, ModelError
from samaritan.files import write_atomically
from samaritan.models.adapt import adapt
from samaritan.models.bases import BuiltBase, build_base, get_base, require_multiple
from samaritan.models.combinations import check_folding, check_products, check_ranks
from samaritan.models.family import belongs
from samaritan.models.folded import Folded, folded_layers
from samaritan.models.inserts import Factors
from samaritan.models.lora import lora_pairs, official_name
from samaritan.models.presets import get_preset
from samaritan.models.segmenter import Segmenter, autocast_dtype
from samaritan.shares import get_sharing

AdapterState = dict[str, Tensor]
"""Official parameter name -> float32 tensor on the CPU."""

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class AdaptedModel:
    """A frozen base with one adapter on it, shared by every site of a process.

    Attributes:
        segmenter: Images to logits.
        base: What was frozen, with its hash.
        trained: Parameters of the adapter by official name.
        preset: Name of the method.
        lora: peft's configuration, where the preset uses LoRA.
        frozen_blocks: Encoder blocks at the beginning that nothing trained comes before or into.
        folded: Frozen rows that the strategy adds to, by official name; part of the adapter, and
            not trained.
    """

    segmenter: Segmenter
    base: BuiltBase
    trained: Mapping[str, torch.nn.Parameter]
    preset: str
    lora: LoraConfig | None
    frozen_blocks: int
    folded: Mapping[str, Folded] = field(default_factory=dict)

    def state(self) -> AdapterState:
        """A copy of the adapter."""
        trained = {k: p.detach().float().cpu().clone() for k, p in self.trained.items()}
        return trained | {k: f.value for k, f in self.folded.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Puts an adapter on the base; LoRA of a smaller rank is filled up with zeros.

        Raises:
            ModelError: When names or shapes differ.
        """
        shapes = {name: tuple(p.shape) for name, p in self.trained.items()}
        shapes |= {name: folded.shape for name, folded in self.folded.items()}
        state = _filled_up(state, shapes)
        require_like(state, shapes)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state[name])
        for name, folded in self.folded.items():
            folded.load(state[name])

    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.trained.values())


def build_adapted(
    config: Config, num_classes: int, device: torch.device | None = None
) -> AdaptedModel:
    """The model a configuration describes, with a fresh adapter.

    Args:
        config: Decides base, preset, rank and seed.
        num_classes: Structures to segment, background not counted.
        device: Where to put it; the GPU if there is one.

    Raises:
        ConfigError: For an unknown base or preset, an input size the base cannot take, or a
            strategy that does not go with them.
        ModelError: For a checkpoint that is missing or does not fit, or a rank out of range.
    """
    check_ranks(config)
    check_folding(config)
    preset = get_preset(config.peft.preset)
    context = config.data.context_slices
    depth = context if preset.volumetric else 1
    base = build_base(
        config.model.base,
        num_classes,
        context if context > 1 and depth == 1 else 3,
        Path(config.model.checkpoint) if config.model.checkpoint else None,
        config.model.checkpoint_sha256,
        config.model.decoder,
    )
    check_input(config, base, depth)
    lora, trained = adapt(
        base.model, base.spec, config.peft, input_size=image_size(config), depth=depth,
        seed=config.seed,
    )  # fmt: skip
    check_products(config, trained)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    segmenter = Segmenter(base.model, base.family, base.spec.patch, depth).to(device)
    segmenter.autocast_dtype = autocast_dtype(config.training.precision, device)
    segmenter.recompute = config.training.recompute
    if config.model.frozen_precision == "bf16":
        _halve_frozen(base, segmenter.autocast_dtype)
    frozen_blocks = _frozen_blocks(base, trained)
    _check_prefix(config, frozen_blocks)
    folded = folded_layers(base.model) if get_sharing(config.strategy).folds else {}
    return AdaptedModel(segmenter, base, trained, config.peft.preset, lora, frozen_blocks, folded)


def _check_prefix(config: Config, frozen_blocks: int) -> None:
    if config.training.prefix_cache_mb and not frozen_blocks:
        raise ConfigError(
            "SAM-C212",
            f"training.prefix_cache_mb is {config.training.prefix_cache_mb}, but with peft.preset "
            f"{config.peft.preset} and peft.blocks {config.peft.blocks} the first encoder block or "
            "what comes before it is trained, so that nothing can be kept",
            "Set peft.blocks to adapt only the last blocks, or training.prefix_cache_mb to 0.",
        )


def _halve_frozen(base: BuiltBase, autocast: torch.dtype | None) -> None:
    """Holds the frozen weights of linear encoder layers in bf16, in which they compute anyway.

    Raises:
        ConfigError: When the encoder computes in fp32.
    """
    if autocast is not torch.bfloat16:
        raise ConfigError(
            "SAM-C210",
            "model.frozen_precision is bf16, but the encoder computes in fp32",
            "Set training.precision to bf16, or leave model.frozen_precision at fp32.",
        )
    blocks = base.family.parts["encoder.blocks"]
    for name, module in base.model.named_modules():
        # Linear alone: norms and tables compute in fp32, and an insert's weights are not frozen.
        if isinstance(module, torch.nn.Linear) and belongs(official_name(name), [blocks]):
            for parameter in (module.weight, module.bias):
                if parameter is not None and not parameter.requires_grad:
                    parameter.data = parameter.data.bfloat16()


def _frozen_blocks(base: BuiltBase, trained: Iterable[str]) -> int:
    first = base.family.num_blocks(base.model)
    for name in trained:
        if belongs(name, [base.family.parts["encoder.patch"]]):
            return 0
        if belongs(name, [base.family.parts["encoder.blocks"]]):
            first = min(first, int(name.partition("blocks.")[2].partition(".")[0]))
    return first


def check_input(config: Config, base: BuiltBase, depth: int) -> None:
    """Refuses input sizes and channel counts the base cannot take.

    Raises:
        ConfigError: Naming the key and the values that fit.
    """
    size, patch = image_size(config), base.spec.patch
    for side in size:
        require_multiple(side, patch, base.name)
    context, fixed = config.data.context_slices, base.spec.channels
    if fixed is not None and depth == 1 and context not in (1, fixed):
        raise ConfigError(
            "SAM-C204",
            f"data.context_slices is {context}, but {base.name} has {fixed} input channels",
            f"Choose 1 or {fixed}.",
        )


def image_size(config: Config) -> tuple[int, int]:
    """(rows, columns) of the model input in pixels."""
    size = config.model.image_size or get_base(config.model.base).image_size
    return (size, size) if isinstance(size, int) else size


def require_like(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], code: str = "SAM-M302"
) -> None:
    """Refuses a state whose names, shapes or values are not those of an adapter.

    Raises:
        ModelError: With the first names at fault.
    """
    faults = [f"missing {n}" for n in shapes if n not in state]
    faults += [f"unknown {n}" for n in state if n not in shapes]
    faults += [
        f"{n} is {tuple(t.shape)} instead of {shapes[n]}"
        for n, t in state.items()
        if n in shapes and tuple(t.shape) != shapes[n]
    ]
    faults += [f"{n} is not finite" for n, t in state.items() if not torch.isfinite(t).all()]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ModelError(
            code,
            f"the adapter does not fit this model: {'; '.join(faults[:3])}{more}",
            "Use an adapter of the same base, preset, rank and classes.",
        )


def at_rank(state: Mapping[str, Tensor], rank: int | None) -> AdapterState:
    """A state whose LoRA was filled up with zeros, without them again.

    Args:
        state: An adapter, or a difference of two.
        rank: Rows of A and columns of B to keep, where there are more; None keeps all.
    """
    cut = dict(state)
    for pair in lora_pairs(state):
        cut[pair.a], cut[pair.b] = state[pair.a][:rank], state[pair.b][:, :rank].contiguous()
    return cut


def _filled_up(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> Mapping[str, Tensor]:
    """LoRA factors with rows of A and columns of B at zero up to the model's rank.

    Where both are zero, both gradients are, so that training leaves them there.
    """
    filled = dict(state)
    for pair in lora_pairs(shapes):
        a, b = state.get(pair.a), state.get(pair.b)
        if a is None or b is None or not a.ndim == b.ndim == 2 or len(a) != b.shape[1]:
            continue
        missing = shapes[pair.a][0] - len(a)
        if missing > 0:
            filled[pair.a], filled[pair.b] = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
    return filled


def save_adapter(
    directory: Path, model: AdaptedModel, state: Mapping[str, Tensor], config: Config,
    classes: Mapping[str, int],
) -> None:  # fmt: skip
    """Writes a peft adapter folder that also says how to use it.

    Files: ``adapter_model.safetensors`` and ``adapter_config.json`` as peft writes them, and
    ``samaritan.json`` with the base's hash, the classes and the resolved configuration.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {_PEFT_PREFIX + name: value.contiguous() for name, value in state.items()}
    (model.lora or LoraConfig(target_modules=[])).save_pretrained(str(directory))
    card = {
        "format": 1,
        "base": {"name": model.base.name, "sha256": model.base.sha256},
        "classes": dict(classes),
        "config": config.model_dump(mode="json"),
    }
    write_atomically(directory / "adapter_model.safetensors", save(tensors))
    write_atomically(directory / "samaritan.json", json.dumps(card, indent=1).encode())


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter folder in memory: tensors, the base they belong to, and how to use them."""

    state: AdapterState
    base_name: str
    base_sha256: str
    classes: dict[str, int]
    config: Config


def read_adapter(directory: Path) -> SavedAdapter:
    """Reads an adapter folder.

    Raises:
        ModelError: When a file is missing or unreadable.
    """
    try:
        card: dict[str, Any] = json.loads((directory / "samaritan.json").read_text("utf-8"))
        tensors = load_file(directory / "adapter_model.safetensors")
        state = {name.removeprefix(_PEFT_PREFIX): value for name, value in tensors.items()}
        config = parse_config(card["config"], f"{directory}/samaritan.json")
        base, classes = card["base"], {str(k): int(v) for k, v in card["classes"].items()}
        return SavedAdapter(state, base["name"], base["sha256"], classes, config)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError
    ) as error:  # fmt: skip
        raise ModelError(
            "SAM-M303",
            f"{directory} is no adapter folder ({type(error).__name__}: {error})",
            "Give the `adapter` folder of a run.",
        ) from error


def load_adapted(saved: SavedAdapter, checkpoint: Path | None = None) -> AdaptedModel:
    """The model of a saved adapter, with the adapter on it.

    Args:
        saved: From `read_adapter`.
        checkpoint: Where the base's checkpoint lies on this machine, if elsewhere than in training.

    Raises:
        ModelError: When the base is another than the adapter was trained on.
    """
    config = saved.config
    if checkpoint is not None:
        section = config.model.model_copy(update={"checkpoint": str(checkpoint)})
        config = config.model_copy(update={"model": section})
    model = build_adapted(config, len(saved.classes))
    if model.base.sha256 != saved.base_sha256:
        raise ModelError(
            "SAM-M304",
            f"the adapter was trained on {saved.base_name} {saved.base_sha256[:16]}, "
            f"this base is {model.base.sha256[:16]}",
            "Give the checkpoint the adapter was trained on.",
        )
    model.load(saved.state)
    return model


def merged_state(model: AdaptedModel) -> AdapterState:
    """The base with the adapter folded in, under official names.

    `segment_anything`'s classes load it with ``strict=True`` when built with as many mask tokens;
    for three classes that is the stock registry builder. The model itself is left as it was.

    Raises:
        ModelError: When the method adds modules that no official layer can take in.
    """
    inserts = get_preset(model.preset).inserts
    beside = sorted({insert.kind for insert in inserts} - {"factors"})
    if beside:
        raise ModelError(
            "SAM-M305",
            f"preset {model.preset} adds modules beside the layers ({', '.join(beside)}), "
            "which no official checkpoint can hold",
            "Use the adapter folder with Samaritan, or train a preset of LoRA alone.",
        )
    deltas: dict[str, Tensor] = {}
    for name, module in model.base.model.named_modules():
        if isinstance(module, LoraLayer):
            deltas[f"{official_name(name)}.weight"] = _merged_weight(module)
        elif isinstance(module, Factors):
            layer = model.base.model.get_submodule(name.removesuffix(".factors"))
            deltas[f"{name.removesuffix('.factors')}.weight"] = layer.weight + module.delta_weight()
    state: AdapterState = {}
    for name, value in model.base.model.state_dict().items():
        official = official_name(name)
        if official in model.base.names:
            state[official] = deltas.get(official, value).detach().float().cpu().clone()
    return state


def _merged_weight(layer: Any) -> Tensor:
    """The weight of a layer with its LoRA folded in; the layer is left as it was, to the bit."""
    parameter = layer.get_base_layer().weight
    held = parameter.data
    parameter.data = held.float().clone()  # frozen weights may be held in bf16
    layer.merge()  # in place, or for peft's DoRA into a new tensor
    merged: Tensor = parameter.data.clone()
    layer.unmerge()
    parameter.data = held  # adding and taking away leaves the last bits changed
    return merged


def card_of(base: BuiltBase) -> dict[str, Any]:
    """The base as summary.json names it."""
    return {
        "name": base.name,
        "sha256": base.sha256,
        "parameters": base.parameters,
        "note": base.spec.note,
        "hyper_parameters": asdict(base.spec),
    }
