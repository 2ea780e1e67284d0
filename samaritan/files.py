"""Files that are whole or absent: written beside their name, synced, then renamed."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from samaritan.errors import StorageError


def write_atomically(
    path: Path, payload: bytes, *, durable: bool = True, private: bool = False
) -> None:
    """Writes a file so that a crash leaves the old one or the new one, never a part.

    Folders on the way are made; file and folder are on the disk when this returns.

    Args:
        path: The file.
        payload: What it holds.
        durable: Wait for the disk. Without, a crash of the whole machine may leave a file of the
            right name with other content.
        private: Only the owner can read the file and folders made for it.

    Raises:
        StorageError: When the system refuses; nothing of the new file is left behind.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        _make_folder(path.parent, 0o700 if private else 0o777)
        partial.touch(0o600 if private else 0o666, exist_ok=False)
        with partial.open("wb") as file:
            file.write(payload)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        partial.replace(path)
        if durable:
            sync_folder(path.parent)
    except OSError as error:
        raise StorageError(
            "SAM-S101",
            f"cannot write {path} ({len(payload)} bytes): {error.strerror or error}",
            "Free space or mend the permissions, then repeat it; a run goes on with --resume.",
        ) from error
    finally:  # after Ctrl-C too
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _make_folder(folder: Path, mode: int) -> None:
    """Makes a folder and, other than `mkdir`, its missing parents with the same mode."""
    if not folder.is_dir():
        _make_folder(folder.parent, mode)
        folder.mkdir(mode, exist_ok=True)


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk; until then a crash may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cache_dir() -> Path:
    """The user's folder for what can be fetched or made again; $SAMARITAN_CACHE names another."""
    if own := os.environ.get("SAMARITAN_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "samaritan"
