"""Files of lines that are only ever added to: one canonical JSON object a line.

Whoever hashes or signs a line takes these bytes: sorted keys, no spaces, nothing JSON has not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samaritan.files import sync_folder


def canonical(value: Mapping[str, Any]) -> bytes:
    """The bytes an object is hashed and signed as.

    Raises:
        ValueError: For a number that is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def line_hash(line: bytes) -> str:
    """What the next line calls this one: its SHA-256 without the end of the line."""
    return hashlib.sha256(line.rstrip(b"\n")).hexdigest()


def append_line(path: Path, line: bytes) -> None:
    """Adds a line to a file that only its owner can read; it is on the disk when this returns.

    Args:
        path: Made if it is missing; its folder is there.
        line: With its end.

    Raises:
        OSError: When the disk is full or not writable; a part of the line may stand there then.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_folder(path.parent)
