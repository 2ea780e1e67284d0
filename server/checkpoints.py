"""Round checkpoints: one file per round, whole or absent, whatever happens while it is written."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from samaritan.errors import StorageError
from samaritan.files import write_atomically
from samaritan.models.adapter import AdapterState
from samaritan.models.bases import state_sha256

_NAME = re.compile(r"round_(\d{5})\.safetensors")
_FORMAT = "2"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a round.

    Attributes:
        server_round: Number of rounds done.
        adapter: The adapter after it.
        history: The entries of summary.json's `rounds` so far.
        config_sha256: Of the configuration that made it.
        slots: What else the server remembers, as tensors by purpose: "sent/RANK" for what its
            sites hold where a codec is lossy, "control", and the state of its optimiser.
    """

    server_round: int
    adapter: AdapterState
    history: list[dict[str, Any]]
    config_sha256: str
    slots: dict[str, AdapterState] = field(default_factory=dict)


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint so that a crash leaves the old files or the new one, never a part.

    Raises:
        StorageError: When the disk is full or not writable; nothing partial is left behind.
    """
    path = _path(directory, checkpoint.server_round)
    state = {"history": checkpoint.history, "config_sha256": checkpoint.config_sha256}
    groups = {"adapter": checkpoint.adapter} | checkpoint.slots
    tensors = {
        f"{group}:{name}": value.contiguous()
        for group, state in groups.items()
        for name, value in state.items()
    }
    text = json.dumps(state)
    metadata = {"format": _FORMAT, "state": text, "sha256": _digest(tensors, text)}
    write_atomically(path, save(tensors, metadata))
    return path


def read_round(directory: Path, server_round: int) -> Checkpoint:
    """The checkpoint of one round.

    Raises:
        StorageError: When it is missing or damaged.
    """
    path = _path(directory, server_round)
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StorageError(
            "SAM-S109",
            f"the checkpoint of round {server_round} in {directory} is missing or damaged",
            "Delete the checkpoints of that round and after it, and resume: they are made again.",
        ) from error


def latest_checkpoint(
    directory: Path, on_damaged: Callable[[Path], None] = lambda path: None
) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are passed over for the one before.

    Args:
        directory: Holds the checkpoints of one run.
        on_damaged: Told of each one that is passed over.

    Raises:
        StorageError: When there are checkpoints and every one is damaged.
    """
    found = sorted((p for p in directory.glob("*") if _NAME.fullmatch(p.name)), reverse=True)
    for path in found:
        try:
            return _read(path)
        except (OSError, ValueError, KeyError, SafetensorError):
            on_damaged(path)
    if found:
        raise StorageError(
            "SAM-S103",
            f"none of the {len(found)} checkpoints in {directory} is whole",
            "Start the run anew in another folder.",
        )
    return None


def _read(path: Path) -> Checkpoint:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata.get("format") != _FORMAT or metadata["sha256"] != _digest(
        tensors, metadata["state"]
    ):
        raise ValueError("damaged")
    state = json.loads(metadata["state"])
    number = int(_NAME.fullmatch(path.name)[1])  # type: ignore[index]
    groups: dict[str, AdapterState] = {}
    for key, value in tensors.items():
        group, _, name = key.partition(":")
        groups.setdefault(group, {})[name] = value
    adapter = groups.pop("adapter")
    return Checkpoint(number, adapter, state["history"], state["config_sha256"], groups)


def _path(directory: Path, server_round: int) -> Path:
    return directory / f"round_{server_round:05d}.safetensors"


def _digest(tensors: AdapterState, text: str) -> str:
    return hashlib.sha256(f"{state_sha256(tensors)} {text}".encode()).hexdigest()
