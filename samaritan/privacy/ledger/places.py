"""Files that only one process writes, line by line, on one disk or two."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from samaritan.errors import PrivacyError
from samaritan.lines import append_line


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes a folder that only its owner can read, and keeps other processes out of it.

    Raises:
        PrivacyError: SAM-P102 when another process is in it; SAM-P105 when it cannot be written.
    """
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise unwritable(folder, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {_boot_id()}".encode(), 0)
    except BlockingIOError as error:
        pid, _, boot = os.pread(descriptor, 100, 0).decode(errors="replace").partition(" ")
        os.close(descriptor)
        where = "" if boot == _boot_id() else " of another machine, or of a start before the last"
        raise PrivacyError(
            "SAM-P102",
            f"process {pid or 'unknown'}{where} works with the privacy ledger in {folder}",
            "Wait until it has ended, or stop it. Give every site a ledger folder of its own.",
        ) from error
    except OSError as error:
        os.close(descriptor)
        raise unwritable(folder, error) from error
    try:
        yield
    finally:
        os.close(descriptor)


def append(places: Sequence[Path], name: str, line: bytes, size_bytes: int) -> None:
    """Adds a line to a file in every place, all or none; it is on the disks when this returns.

    Args:
        places: Folders, in order.
        name: Of the file.
        line: With its end.
        size_bytes: Of the file before, in every place.

    Raises:
        PrivacyError: SAM-P105 when the disk is full or the file is not what this process left.
    """
    paths = [place / name for place in places]
    begun = []
    try:
        for path in paths:
            if _size(path) != size_bytes:
                raise OSError(0, "the file was changed by somebody else; open the ledger again")
        for path in paths:
            begun.append(path)
            append_line(path, line)
    except BaseException as error:
        for path in begun:  # nothing has been done on the strength of this line
            with contextlib.suppress(OSError):
                os.truncate(path, size_bytes)
        if isinstance(error, OSError):
            raise unwritable(places[len(begun) - 1] if begun else places[0], error) from error
        raise


def read(path: Path) -> bytes:
    """What a file holds; nothing when there is none.

    Raises:
        PrivacyError: SAM-P105 when it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise unwritable(path.parent, error) from error


def unwritable(place: Path, error: OSError) -> PrivacyError:
    """The error for a disk that is full or out of reach."""
    return PrivacyError(
        "SAM-P105",
        f"the privacy ledger in {place} cannot be written: {error.strerror or error}",
        "Free space or mend the permissions. Nothing was computed that is not charged.",
    )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
