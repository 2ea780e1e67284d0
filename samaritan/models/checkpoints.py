"""Reading SAM checkpoints: tensors only, verified before use, any number of mask tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from samaritan.errors import ModelError

_PER_TOKEN = (
    "mask_decoder.mask_tokens.weight",
    "mask_decoder.iou_prediction_head.layers.2.weight",
    "mask_decoder.iou_prediction_head.layers.2.bias",
)
_HYPERNETWORKS = "mask_decoder.output_hypernetworks_mlps."


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces.

    Raises:
        ModelError: When the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(
            "SAM-M201", f"cannot read the checkpoint {path}: {error.strerror}", "Check the path."
        ) from error


def read_state(path: Path, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """Tensors of a .pth or .safetensors file; nothing in the file is ever executed.

    Raises:
        ModelError: When the file is unreadable, altered, or holds anything but tensors.
    """
    actual = file_sha256(path)
    if expected_sha256 not in (None, actual):
        raise ModelError(
            "SAM-M202",
            f"checkpoint {path.name} has SHA-256 {actual}, expected {expected_sha256}",
            "Fetch the file again, or correct model.checkpoint_sha256.",
        )
    try:
        state: Any
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged and foreign files make torch's reader raise anything
        raise ModelError(
            "SAM-M203",
            f"checkpoint {path.name} is no plain file of tensors ({type(error).__name__})",
            "Files that need pickled code are refused; save the state dict alone.",
        ) from error
    # MedSAM and others wrap the state dict once.
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise ModelError(
            "SAM-M203", f"checkpoint {path.name} holds no state dict", "Save `sam.state_dict()`."
        )
    return state


def fitting_base(state: Mapping[str, Tensor]) -> str:
    """Name of the official base with these shapes, by the width of its patch embedding.

    Raises:
        ModelError: When there is none.
    """
    embedding = state.get("image_encoder.patch_embed.proj.weight")
    widths = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    if embedding is None or embedding.shape[0] not in widths:
        raise ModelError(
            "SAM-M205",
            "the file holds no SAM of a known size",
            "vit_b, vit_l and vit_h are known, under their official names.",
        )
    return widths[embedding.shape[0]]


def load_checkpoint(sam: Any, path: Path, expected_sha256: str | None = None) -> None:
    """Loads an official checkpoint into a SAM of as many mask tokens as the task needs.

    A task with another number of classes than SAM's three masks starts each of its tokens,
    hypernetworks and quality outputs from the official one of the same index modulo four.

    Raises:
        ModelError: When names or shapes differ, with the first ones.
    """
    state = _fit_tokens(read_state(path, expected_sha256), sam.mask_decoder.num_mask_tokens)
    wanted = sam.state_dict()
    missing = sorted(wanted.keys() - state.keys())
    extra = sorted(state.keys() - wanted.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    if missing or extra or shapes:
        faults = [
            f"{kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for kind, names in (("missing", missing), ("unknown", extra), ("shape", shapes))
            if names
        ]
        raise ModelError(
            "SAM-M204",
            f"checkpoint {path.name} does not fit this base; {'; '.join(faults)}",
            "Choose the base the file was made for (`samaritan models verify FILE` tells).",
        )
    sam.load_state_dict(state, strict=True)


def _fit_tokens(state: dict[str, Tensor], tokens: int) -> dict[str, Tensor]:
    rows = {state[name].shape[:1] for name in _PER_TOKEN if name in state}
    held = next(iter(rows), None)
    if len(rows) != 1 or not held or held[0] in (0, tokens):
        return state
    source = [i % held[0] for i in range(tokens)]
    fitted = {k: v for k, v in state.items() if not k.startswith(_HYPERNETWORKS)}
    for name in _PER_TOKEN:
        if name in fitted:
            fitted[name] = fitted[name][source]
    for name, value in state.items():
        if name.startswith(_HYPERNETWORKS):
            index, _, rest = name.removeprefix(_HYPERNETWORKS).partition(".")
            for new, old in enumerate(source):
                if index == str(old):
                    fitted[f"{_HYPERNETWORKS}{new}.{rest}"] = value.clone()
    return fitted
