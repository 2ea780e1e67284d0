"""Where running processes of a kit meet: a folder in it, and one with a short path for sockets."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from samaritan.errors import DeploymentError

RUN = "run"
"""Folder of logs, sockets and generated configurations, in a kit."""

LONGEST = 70
"""Bytes of a folder in which a socket still has a path that every system takes."""


def short_folder(kit: Path) -> Path:
    """A folder for sockets that only this user can enter; the kit's own where its path is short.

    Raises:
        DeploymentError: SAM-N404 when somebody else has made it.
    """
    own = kit / RUN
    if len(os.fsencode(own)) <= LONGEST:
        own.mkdir(0o755, exist_ok=True)
        return own
    digest = hashlib.sha256(os.fsencode(kit)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"samaritan-{os.geteuid()}-{digest}"
    folder.mkdir(0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.geteuid() or not folder.is_dir() or folder.is_symlink():
        raise DeploymentError(
            "SAM-N404",
            f"{folder} belongs to somebody else",
            "Remove it, or move the kit to a folder with a shorter path.",
        )
    folder.chmod(0o700)
    return folder
