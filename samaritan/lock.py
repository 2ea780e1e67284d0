"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from samaritan.errors import StorageError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes out of a folder, and takes away what a killed one left half written.

    The folder itself is locked, so nothing is left in it; the system lets go of the lock however
    the process ends. A file system that knows no locks, such as some of a network, keeps nobody
    out.

    Raises:
        StorageError: When another process holds the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(
                "SAM-S110",
                f"another process works in {folder}",
                "Wait until it has ended, or stop it.",
            ) from error
        except OSError:
            pass
        for path in folder.rglob(".*.partial"):
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
