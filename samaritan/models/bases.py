"""The base models: official SAM by checkpoint file, its relatives, and the embedded `tiny`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from samaritan.errors import ConfigError, ModelError
from samaritan.models import sam as sam_family
from samaritan.models import sam2 as sam2_family
from samaritan.models.checkpoints import describe_faults, read_state
from samaritan.models.family import Family
from samaritan.models.memory import require_memory
from samaritan.models.sam import SamShape
from samaritan.models.sam2 import Sam2Shape
from samaritan.models.tiny import initialise


@dataclass(frozen=True)
class Base:
    """A base model.

    Attributes:
        shape: Hyper-parameters, as its family takes them.
        image_size: Native side of the input in pixels.
        patch: Input sides must be multiples of this many pixels.
        family: A key of `FAMILIES`.
        channels: Input channels; None takes as many as there are context slices.
        checkpoint: File name and SHA-256 of the published checkpoint, if there is one.
        extra_lora, extra_train: Parts added to every preset that uses LoRA, for a base that was
            never trained.
        note: What a reader must know about the base.
    """

    shape: Any
    image_size: int = 1024
    patch: int = 16
    family: str = "sam"
    channels: int | None = 3
    checkpoint: tuple[str, str] | None = None
    extra_lora: tuple[str, ...] = ()
    extra_train: tuple[str, ...] = ()
    note: str = ""


FAMILIES: dict[str, Family] = {"sam": sam_family.FAMILY, "sam2": sam2_family.FAMILY}

BASES = {
    "vit_b": Base(
        SamShape(768, 12, 12, (2, 5, 8, 11)),
        checkpoint=(
            "sam_vit_b_01ec64.pth",
            "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912",
        ),
        note="Segment Anything ViT-B (Meta AI, Apache-2.0).",
    ),
    "vit_l": Base(
        SamShape(1024, 24, 16, (5, 11, 17, 23)),
        checkpoint=(
            "sam_vit_l_0b3195.pth",
            "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622",
        ),
        note="Segment Anything ViT-L (Meta AI, Apache-2.0).",
    ),
    "vit_h": Base(
        SamShape(1280, 32, 16, (7, 15, 23, 31)),
        checkpoint=(
            "sam_vit_h_4b8939.pth",
            "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e",
        ),
        note="Segment Anything ViT-H (Meta AI, Apache-2.0).",
    ),
    "sam2_hiera_tiny": Base(
        Sam2Shape(96, 1, (1, 2, 7, 2), (5, 7, 9)),
        patch=32, family="sam2",
        checkpoint=(
            "sam2.1_hiera_tiny.pt",
            "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69",
        ),
        note="SAM 2.1 Hiera tiny (Meta AI, Apache-2.0); MedSAM2 has its shape.",
    ),
    "sam2_hiera_small": Base(
        Sam2Shape(96, 1, (1, 2, 11, 2), (7, 10, 13)),
        patch=32, family="sam2",
        checkpoint=(
            "sam2.1_hiera_small.pt",
            "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38",
        ),
        note="SAM 2.1 Hiera small (Meta AI, Apache-2.0).",
    ),
    "sam2_hiera_base_plus": Base(
        Sam2Shape(112, 2, (2, 3, 16, 3), (12, 16, 20), position_grid=14),
        patch=32, family="sam2",
        checkpoint=(
            "sam2.1_hiera_base_plus.pt",
            "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5",
        ),
        note="SAM 2.1 Hiera base plus (Meta AI, Apache-2.0).",
    ),
    "sam2_hiera_large": Base(
        Sam2Shape(144, 2, (2, 6, 36, 4), (23, 33, 43), windows=(8, 4, 16, 8)),
        patch=32, family="sam2",
        checkpoint=(
            "sam2.1_hiera_large.pt",
            "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318",
        ),
        note="SAM 2.1 Hiera large (Meta AI, Apache-2.0).",
    ),
    "tiny": Base(
        SamShape(
            width=128, depth=3, heads=4, global_blocks=(0, 1, 2), patch=4, window=0, mlp_ratio=2.0,
            image_size=48, decoder_width=96, decoder_mlp=128, decoder_heads=4, iou_width=64,
        ),
        image_size=48, patch=4, channels=None,
        extra_lora=("encoder.proj", "encoder.mlp", "decoder.ko"),
        extra_train=(
            "encoder.patch", "encoder.neck", "encoder.norm", "encoder.positions", "encoder.bias",
            "decoder.mlp", "decoder.norm", "decoder.bias", "prompt_encoder.no_mask",
        ),
        note=(
            "`tiny` is a randomly initialised miniature of SAM. It exercises the method on a "
            "laptop; it is no foundation model, and its scores say nothing about a pretrained SAM."
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class BuiltBase:
    """A base model ready to be adapted.

    Attributes:
        model: The module, in evaluation mode, one mask per class and background.
        spec: What it was built from.
        name: Its name in `BASES`.
        sha256: Hash of the checkpoint file, or of the tensors where there is no file.
        parameters: Number of parameters.
        names: Tensors of its state dict, before anything is attached.
    """

    model: Any = field(repr=False)
    spec: Base
    name: str
    sha256: str
    parameters: int
    names: frozenset[str] = field(repr=False)

    @property
    def family(self) -> Family:
        """The functions that run the model."""
        return FAMILIES[self.spec.family]


def get_base(name: str) -> Base:
    """The base of that name.

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
    decoder: str = "official",
) -> BuiltBase:
    """Builds a base and loads its checkpoint.

    Args:
        name: A key of `BASES`.
        num_classes: Structures to segment, background not counted.
        channels: Input channels, for a base that leaves them open.
        checkpoint: Checkpoint file; needed by every base that has one published. For `tiny`, one
            that was trained on public data, say; presets then train no more than on other bases.
        expected_sha256: Refuse any other file.
        decoder: "official" or "reference".

    Raises:
        ModelError: When the checkpoint is missing, altered or of another shape, or memory is short.
    """
    spec = get_base(name)
    build = functools.partial(
        FAMILIES[spec.family].construct, spec.shape, num_classes, spec.channels or channels, decoder
    )
    if spec.checkpoint is None and checkpoint is not None:
        # One that somebody has trained: what a random start needs besides is not needed any more.
        spec = replace(spec, extra_lora=(), extra_train=())
    elif spec.checkpoint is None:
        model = initialise(build)
        state = model.state_dict()
        return BuiltBase(
            model, spec, name, state_sha256(state), parameters(model), frozenset(state)
        )
    if checkpoint is None:
        published = spec.checkpoint[0] if spec.checkpoint else ""
        raise ModelError(
            "SAM-M103",
            f"base {name!r} needs its checkpoint {published}",
            "`samaritan models fetch` gets it; set model.checkpoint to the file.",
        )
    with torch.device("meta"):  # names and shapes alone, so that memory is needed only once
        model = build()
    require_memory(name, parameters(model))
    tensors, sha256 = read_state(checkpoint, expected_sha256)
    _load(model, FAMILIES[spec.family].fit(tensors, model.state_dict()), checkpoint.name)
    return BuiltBase(model, spec, name, sha256, parameters(model), frozenset(model.state_dict()))


def _load(model: nn.Module, state: Mapping[str, Tensor], file: str) -> None:
    faults = describe_faults(state, model.state_dict())
    if faults:
        raise ModelError(
            "SAM-M204",
            f"checkpoint {file} does not fit this base; {faults}",
            "Choose the base the file was made for (`samaritan models verify FILE` tells).",
        )
    state = {name: value.float() for name, value in state.items()}
    model.load_state_dict(state, strict=True, assign=True)


def fitting_base(state: Mapping[str, Tensor]) -> str:
    """Name of the base whose names and shapes a checkpoint has.

    Raises:
        ModelError: When there is none.
    """
    for name, spec in BASES.items():
        if spec.checkpoint is None:
            continue
        family = FAMILIES[spec.family]
        with torch.device("meta"):
            wanted = family.construct(spec.shape, 3, spec.channels or 3, "official").state_dict()
        if not describe_faults(family.fit(dict(state), wanted), wanted):
            return name
    known = [name for name, spec in BASES.items() if spec.checkpoint]
    raise ModelError(
        "SAM-M205",
        "the file holds no SAM of a known size",
        f"{', '.join(known)} are known, under their official names.",
    )


def require_multiple(side: int, patch: int, name: str) -> None:
    """Refuses an input side that is not made of whole patches.

    Raises:
        ConfigError: With the nearest sides that are.
    """
    if side % patch:
        near = [n * patch for n in (side // patch, side // patch + 1) if n]
        raise ConfigError(
            "SAM-C203",
            f"model.image_size {side} is no multiple of the patch size {patch} of {name}",
            f"Choose {' or '.join(map(str, near))}.",
        )


def parameters(module: nn.Module) -> int:
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
