"""What a site keeps for itself between rounds: personal tensors, what a codec left out, and so on.

One file per round. The server names the last round of which it used the site's update, and the site
goes on from its notes of that round: after a round that the server lost, and after an update that
did not arrive or was refused, the result is as if it had never been made.
"""

from __future__ import annotations

import logging
import re
import secrets
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
        keep_all: Keep the notes of every round that was used, instead of the last two.
    """

    folder: Path
    keep_all: bool = False

    @property
    def identifier(self) -> str:
        """Drawn when it is first asked for: notes in another folder are other notes."""
        path = self.folder / "identifier"
        if not path.exists():
            write_atomically(path, secrets.token_hex(16).encode(), private=True)
        return path.read_text()

    def recall(self, used_round: int) -> Notes:
        """The notes of that round or the last before it; empty when there are none."""
        for number, path in sorted(self._files().items(), reverse=True):
            if number <= used_round:
                try:
                    return _unflatten(_read(path))
                except (OSError, ValueError, SafetensorError):
                    _log.warning("%s is damaged; the notes before it are used", path)
        return {}

    def remember(self, server_round: int, notes: Notes, used_round: int) -> None:
        """Writes the notes of a round, whole or not at all.

        Args:
            server_round: Its number.
            notes: What to keep.
            used_round: The round whose notes these follow; later ones led nowhere. The one before
                it is kept too, for a server that falls back to an older checkpoint.

        Raises:
            StorageError: When the disk is full or not writable.
        """
        files = self._files()
        for number in [number for number in files if number > used_round]:
            files.pop(number).unlink(missing_ok=True)
        tensors = _flatten(notes)
        write_atomically(
            self.folder / f"round_{server_round:05d}.safetensors",
            save(tensors, {"sha256": state_sha256(tensors)}),
        )
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
