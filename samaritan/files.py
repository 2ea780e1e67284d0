"""Files that are whole or absent: written beside their name, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from samaritan.errors import StorageError


def write_atomically(path: Path, payload: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part.

    Folders on the way are made; file and folder are on the disk when this returns.

    Raises:
        StorageError: When the system refuses; nothing of the new file is left behind.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StorageError(
            "SAM-S101",
            f"cannot write {path} ({len(payload)} bytes): {error.strerror or error}",
            "Free space or mend the permissions; a run goes on with --resume.",
        ) from error
