"""events.jsonl: one JSON object per event, on the disk before the run goes on."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from samaritan.errors import StorageError


def append_event(path: Path, event: str, **fields: Any) -> None:
    """Appends an event with its time.

    Raises:
        StorageError: When the disk is full or not writable.
    """
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            "SAM-S102",
            f"cannot write {path}: {error.strerror or error}",
            "Free space or mend the permissions, then continue with --resume.",
        ) from error
