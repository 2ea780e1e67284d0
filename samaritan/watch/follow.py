"""Logs that grow by whole JSON lines, read on from where the last look ended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

Json = dict[str, Any]
_T = TypeVar("_T")

_BLOCK = 1 << 22


class Follower(Generic[_T]):
    """What a log comes to, kept up to date line by line.

    A line that is still being written is read once it is whole, and one that is no JSON object is
    passed over. A log that was replaced or has become shorter is read from its beginning.

    Args:
        path: Of the log; it may be missing yet.
        begin: Makes what an empty log comes to.
        take: Adds a line to it.
    """

    def __init__(
        self, path: Path, begin: Callable[[], _T], take: Callable[[_T, Json], None]
    ) -> None:
        self._path, self._begin, self._take = path, begin, take
        self._offset, self._file = 0, (0, 0)
        self._state = begin()

    def read(self) -> _T:
        """What the log comes to now.

        Raises:
            OSError: When it is there and cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                self._continue(file)
        except FileNotFoundError:
            self._offset, self._state = 0, self._begin()
        return self._state

    def _continue(self, file: BinaryIO) -> None:
        found = _stat(file)
        if found[:2] != self._file or found[2] < self._offset:
            self._file, self._offset, self._state = found[:2], 0, self._begin()
        file.seek(self._offset)
        rest = b""
        while block := file.read(_BLOCK):
            data = rest + block
            end = data.rfind(b"\n") + 1
            rest = data[end:]
            self._offset += end
            for line in data[:end].splitlines():
                entry = _parsed(line)
                if entry is not None:
                    self._take(self._state, entry)


def _stat(file: BinaryIO) -> tuple[int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size


def _parsed(line: bytes) -> Json | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
