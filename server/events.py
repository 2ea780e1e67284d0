"""events.jsonl: one JSON object per event, on the disk before the run goes on."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from samaritan.errors import StorageError

_BLOCK = 65536


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Appends an event with its time; a line that a crash left unfinished is dropped first.

    Raises:
        StorageError: When the disk is full or not writable.
    """
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
    try:
        with path.open("a+b") as file:
            _drop_unfinished(file)
            file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            "SAM-S102",
            f"cannot write {path}: {error.strerror or error}",
            "Free space or mend the permissions, then continue with --resume.",
        ) from error


def _drop_unfinished(file: BinaryIO) -> None:
    size = file.seek(0, os.SEEK_END)
    start = 0
    for end in range(size, 0, -_BLOCK):
        file.seek(max(0, end - _BLOCK))
        found = file.read(end - max(0, end - _BLOCK)).rfind(b"\n")
        if found >= 0:
            start = max(0, end - _BLOCK) + found + 1
            break
    if start < size:
        file.truncate(start)
