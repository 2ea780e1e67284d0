"""The log of what came in and went out: one canonical line per event, each holding the last's hash.

Whoever changes, removes, adds or swaps a line breaks the chain behind it. Lines cut off at the end
are missed by a check against somebody else's log only. Format 1; other formats are refused.

A change that the line itself does not show is seen in the lines behind it. The line that was
changed is named if two untouched lines follow it: the first holds another hash of it, the second
vouches for the first. A change of the last line but one is told at the last line, as one of the
two; a change of the last line is not seen.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from samaritan.errors import AuditError, StorageError
from samaritan.files import write_atomically
from samaritan.lines import append_line, canonical, line_hash

Entry = dict[str, Any]

SCHEMA = 1
START = "0" * 64
"""What the first line holds in place of a hash."""

_ALWAYS = {"schema", "seq", "prev", "time_utc", "type"}
_log = logging.getLogger("samaritan.site")


class LineError(ValueError):
    """A line that is not as it was written.

    Args:
        number: From 1.
        reason: Why, as the end of a sentence.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number}: {reason}")
        self.number = number
        self.reason = reason


class Log:
    """A log that the processes of one owner add to in turn.

    A last line that a crash left unfinished is kept beside the log and noted in it.

    Args:
        path: Made at the first entry.
        owner: Whose log it is, in its first line.

    Raises:
        AuditError: SAM-A101 when a line is not as it was written, or the log is another's; SAM-A102
            when it cannot be read or written.
    """

    def __init__(self, path: Path, owner: Mapping[str, str]) -> None:
        self.path, self._owner = path, dict(owner)
        self._size, self._seq, self._prev = 0, 0, START
        with self._open() as file:
            self._catch_up(file)
            if not self._seq:
                self._write(file, "genesis", self._owner)

    def append(self, kind: str, /, **fields: Any) -> str:
        """Writes an entry; it is on the disk when this returns.

        Args:
            kind: Of the entry.
            fields: JSON without fractions: numbers that have one are given as texts.

        Returns:
            The hash of its line.

        Raises:
            AuditError: As the class. What the entry was to tell of must not be done then.
        """
        with self._open() as file:
            self._catch_up(file)
            return self._write(file, kind, fields)

    def holds_answer(self, sha256: str) -> bool:
        """Whether an answer of that hash stands in this log, or in a file beside it.

        Raises:
            AuditError: SAM-A102 when a file cannot be read.
        """
        line = f'"answer_sha256":"{sha256}"'.encode()
        try:
            files = sorted(path for path in self.path.parent.iterdir() if path.is_file())
            return any(line in path.read_bytes() for path in files)
        except OSError as error:
            raise _unwritable(self.path, error.strerror or str(error)) from error

    @contextlib.contextmanager
    def _open(self) -> Iterator[BinaryIO]:
        """The file, for this process alone."""
        try:
            self.path.parent.mkdir(0o700, parents=True, exist_ok=True)
            self.path.touch(0o600)
            with self.path.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                yield file
        except OSError as error:
            raise _unwritable(self.path, error.strerror or str(error)) from error
        except StorageError as error:  # from setting a fragment aside
            raise _unwritable(self.path, error.message) from error

    def _catch_up(self, file: BinaryIO) -> None:
        """Reads and checks what other processes have written since."""
        size = os.fstat(file.fileno()).st_size
        if size == self._size:
            return
        file.seek(self._size)
        data = file.read()
        whole, fragment = data[: data.rfind(b"\n") + 1], data[data.rfind(b"\n") + 1 :]
        try:
            if size < self._size:
                raise LineError(self._seq, "it is gone")
            for entry, digest in entries(whole, self._seq, self._prev):
                if entry["seq"] == 0 and self._owner != {k: entry.get(k) for k in self._owner}:
                    raise LineError(1, "the log is another's")
                self._seq, self._prev = entry["seq"] + 1, digest
        except LineError as error:
            raise AuditError(
                "SAM-A101",
                f"line {error.number} of {self.path} is not as it was written: {error.reason}",
                "Nothing leaves this site until the log is whole. Keep the file for the inquiry, "
                "move it away, and start anew: the new log begins with a first line of its own.",
            ) from error
        self._size += len(whole)
        if fragment:
            self._set_aside(file, fragment)

    def _set_aside(self, file: BinaryIO, fragment: bytes) -> None:
        digest = hashlib.sha256(fragment).hexdigest()
        write_atomically(self.path.with_suffix(f".{digest[:16]}.fragment"), fragment, private=True)
        file.truncate(self._size)
        _log.warning("the last line of %s was cut short; it is kept beside the log", self.path.name)
        if self._seq:
            fields = {"fragment_sha256": digest, "fragment_bytes": len(fragment)}
            self._write(file, "repair", fields)

    def _write(self, file: BinaryIO, kind: str, fields: Mapping[str, Any]) -> str:
        entry = {
            **fields,
            "schema": SCHEMA,
            "seq": self._seq,
            "prev": self._prev,
            "time_utc": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "type": kind,
        }
        line = canonical(entry) + b"\n"
        try:
            append_line(self.path, line)
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(self._size)
            raise
        self._size, self._seq, self._prev = self._size + len(line), self._seq + 1, line_hash(line)
        return self._prev


def entries(data: bytes, seq: int = 0, previous: str = START) -> Iterator[tuple[Entry, str]]:
    """Every entry with the hash of its line, checked from the first on.

    Args:
        data: Whole lines of a log.
        seq: Number of the first of them, from 0.
        previous: Hash of the line before it.

    Raises:
        LineError: For the first line that is not as it was written; the one before the data, where
            two lines of the data say that it was changed.
    """
    lines = data.splitlines(keepends=True)
    if seq and _is_denied(previous, seq - 1, lines[:2]):
        raise LineError(
            seq,
            f"line {seq + 1} holds another hash of it than it had when it was read before: it was "
            f"changed, or the lines from {seq + 1} on are of another log",
        )
    for due, line in enumerate(lines, start=seq):
        entry, digest = _placed(line, due), line_hash(line)
        if entry["prev"] != previous:
            raise LineError(
                due + 1,
                "it does not follow the line before: one of the two was changed, or a line between "
                "them is gone"
                if due
                else "it names a line before it, and there is none",
            )
        if _is_denied(digest, due, lines[due - seq + 1 : due - seq + 3]):
            raise LineError(
                due + 1,
                f"it was changed after line {due + 2} was written, which holds another hash of it, "
                f"or the lines from {due + 2} on are of another log",
            )
        yield entry, digest
        previous = digest


def _is_denied(digest: str, due: int, after: list[bytes]) -> bool:
    """Whether the two lines after a line are as they were written, and hold another hash of it.

    Args:
        digest: Hash of the line.
        due: Its number, from 0.
        after: The lines after it, two where there are as many.
    """
    # Lines that hold the hash need not be read twice.
    if len(after) < 2 or f'"prev":"{digest}"'.encode() in after[0]:
        return False
    try:
        denies = _placed(after[0], due + 1)["prev"] != digest
        return denies and bool(_placed(after[1], due + 2)["prev"] == line_hash(after[0]))
    except LineError:
        return False


def _placed(line: bytes, due: int) -> Entry:
    """A line that says that it stands where it is."""
    entry = _parsed(line, due + 1)
    if (entry["type"] == "genesis") != (due == 0):
        raise LineError(due + 1, f"an entry of type {entry['type']} stands in the wrong place")
    if entry["seq"] != due:
        raise LineError(due + 1, f"it has number {entry['seq']} where {due} is due")
    return entry


def _parsed(line: bytes, number: int) -> Entry:
    try:
        entry: Entry = json.loads(line)
        whole = line == canonical(entry) + b"\n"
        known = entry["schema"] == SCHEMA and entry.keys() >= _ALWAYS
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LineError(number, "it is damaged") from None
    if not (whole and known):
        raise LineError(number, "it is damaged, or of another format")
    return entry


def _unwritable(path: Path, reason: str) -> AuditError:
    return AuditError(
        "SAM-A102",
        f"the log {path} cannot be read or written: {reason}",
        "Free space or mend the permissions. Nothing left this site that is not in the log.",
    )
