"""What a site keeps for itself between rounds: personal tensors, what a codec left out, and so on.

One file per round. A server that lost a round asks for it again, and the site then goes on from
what it knew before that round; the result is the same as if nothing had happened.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from samaritan.files import write_atomically
from samaritan.models.adapter import AdapterState
from samaritan.models.bases import state_sha256

Notes = dict[str, AdapterState]
"""Tensors by purpose: "personal", "left_out", "control"."""

_NAME = re.compile(r"round_(\d{5})\.safetensors")
_KEPT = 2
_log = logging.getLogger("samaritan.site")


@dataclass(frozen=True)
class Memory:
    """The site's notes on disk.

    Attributes:
        folder: Holds one file per round.
        keep_all: Keep every round's notes instead of the last two.
    """

    folder: Path
    keep_all: bool = False

    def recall(self, before: int) -> Notes:
        """The notes of the last round before the given one; empty when there are none."""
        for number, path in sorted(self._files().items(), reverse=True):
            if number < before:
                try:
                    return _unflatten(_read(path))
                except (OSError, ValueError, SafetensorError):
                    _log.warning("%s is damaged; the notes before it are used", path)
        return {}

    def remember(self, server_round: int, notes: Notes) -> None:
        """Writes the notes of a round, whole or not at all.

        Raises:
            StorageError: When the disk is full or not writable.
        """
        for number, path in self._files().items():
            if number > server_round:  # a round the server lost
                path.unlink(missing_ok=True)
        tensors = _flatten(notes)
        write_atomically(
            self.folder / f"round_{server_round:05d}.safetensors",
            save(tensors, {"sha256": state_sha256(tensors)}),
        )
        files = self._files()
        for number in () if self.keep_all else sorted(files)[:-_KEPT]:
            files[number].unlink(missing_ok=True)

    def _files(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        named = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir())
        return {int(match[1]): path for match, path in named if match}


def _read(path: Path) -> AdapterState:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sha256 = (file.metadata() or {}).get("sha256")
    if sha256 != state_sha256(tensors):
        raise ValueError("damaged")
    return tensors


def _flatten(notes: Notes) -> AdapterState:
    return {
        f"{purpose}/{name}": value.contiguous()
        for purpose, state in notes.items()
        for name, value in state.items()
    }


def _unflatten(tensors: AdapterState) -> Notes:
    notes: Notes = {}
    for key, value in tensors.items():
        purpose, _, name = key.partition("/")
        notes.setdefault(purpose, {})[name] = value
    return notes
