"""The files of a kit: all there, keys for their user alone, room to write."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from samaritan.operate.checks.finding import Finding, fine, missing, note
from samaritan.operate.checks.users import READ, User, this_user
from samaritan.operate.places import LONGEST, RUN

_FREE_GB = 2.0


def complete(folder: Path, names: Sequence[str], hint: str) -> Finding:
    """Whether files are in a kit.

    Args:
        folder: Of the kit.
        names: Of the files.
        hint: Where they come from.
    """
    lacking = [name for name in names if not _is_there(folder / name)]
    if lacking:
        return missing("files of the kit", "SAM-N601", f"without {', '.join(lacking)}", hint)
    return fine("files of the kit", f"all {len(names)} there")


def private(path: Path, user: User) -> Finding:
    """Whether a key can be read by the user that needs it, and by nobody else.

    Args:
        path: Of a file that is there.
        user: That needs it.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return missing(
            path.name,
            "SAM-N602",
            f"can be used by others than its owner (mode {mode:04o})",
            f"chmod 600 {path}; if others have been on this machine, take the key for copied: tell "
            "the coordinator.",
        )
    if not user.may(path, READ):
        return missing(
            path.name,
            "SAM-N603",
            f"cannot be read by {user.name}, who needs it",
            f"Let it belong to {user.name}, with mode 0600. With two users at a site, `samaritan "
            "site permissions` sets all owners.",
        )
    return fine(path.name, f"for {user.name} alone (mode {mode:04o})")


def secret(path: Path, least: int) -> Finding:
    """Whether a shared secret is long enough to be one."""
    if not os.access(path, os.R_OK):
        return note(path.name, f"cannot be read by {this_user().name}; its length was not checked")
    size = len(path.read_bytes().strip())
    if size < least:
        return missing(
            path.name,
            "SAM-N606",
            f"is {size} bytes long, and must have {least}",
            "Restore it from the archive of the kit; stop and start the server after that.",
        )
    return fine(f"length of {path.name}", f"{size} bytes")


def writable(folder: Path, names: Iterable[str], user: User) -> Finding:
    """Whether a user can write into folders of a kit, or make those that are not there yet."""
    shut = [name for name in names if not _can_write(folder, folder / name, user)]
    if shut:
        return missing(
            "folders to write",
            "SAM-N604",
            f"{user.name} cannot write {', '.join(shut)} in {folder}",
            f"Let them belong to {user.name}.",
        )
    return fine("folders to write", f"can be written by {user.name}")


def disk(folder: Path) -> Finding:
    """Whether there is room where a kit lies."""
    free = shutil.disk_usage(folder).free / 2**30
    if free < _FREE_GB:
        return missing(
            "free disk of the kit",
            "SAM-N605",
            f"{free:.1f} GiB, and {_FREE_GB:g} GiB are needed",
            f"Free space on the file system of {folder}.",
        )
    return fine("free disk of the kit", f"{free:.1f} GiB")


def short_path(folder: Path) -> Finding:
    """Whether the sockets of a kit lie in the kit."""
    if len(os.fsencode(folder / RUN)) <= LONGEST:
        return fine("path of the kit", str(folder))
    return note(
        "path of the kit",
        f"{folder} is too long for sockets in it; they lie in the folder for temporary files",
        "systemd units with PrivateTmp hide them there. Move the kit to a shorter path.",
        "SAM-N608",
    )


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _can_write(kit: Path, folder: Path, user: User) -> bool:
    return user.may(folder if folder.is_dir() else kit, 3)
