"""Reading checkpoints: tensors only, verified before use."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from samaritan.errors import ModelError


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


def read_state(path: Path, expected_sha256: str | None = None) -> tuple[dict[str, Tensor], str]:
    """Tensors of a .pth or .safetensors file and its hash; nothing in the file is ever executed.

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
    return state, actual


def describe_faults(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    """How names and shapes of a state dict differ from those wanted, the first ones; else empty."""
    shapes = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(wanted[name].shape)}"
        for name in sorted(wanted.keys() & state.keys())
        if state[name].shape != wanted[name].shape
    ]
    found = (
        ("missing", sorted(wanted.keys() - state.keys())),
        ("unknown", sorted(state.keys() - wanted.keys())),
        ("shape", shapes),
    )
    return "; ".join(
        f"{kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        for kind, names in found
        if names
    )
