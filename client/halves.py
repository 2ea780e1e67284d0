"""A site as two halves of two system users: the agent, and the courier with the node.

The courier's half has a folder of its own in the kit, for what it writes and for its supervisor, so
that neither half can write where the other one reads.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from client.processes import agent_program, courier_programs, status_programs
from client.settings import SiteSettings
from samaritan.operate.places import RUN
from samaritan.operate.processes import Program, states, stop
from samaritan.provision.kit import Kit

Half = Literal["agent", "courier"]

COURIER = "courier"
"""Folder of the courier's half in a kit."""

_PROGRAMS: dict[Half, tuple[str, ...]] = {"agent": ("agent",), "courier": ("node", "courier")}


def half_folder(kit: Kit, half: Half) -> Path:
    """Where a half has its folder `run`."""
    return kit.path(COURIER) if half == "courier" else kit.folder


def half_programs(kit: Kit, settings: SiteSettings, half: Half) -> list[Program]:
    """What runs of one half.

    Raises:
        TrustError: SAM-K311 when the site has no certificate yet.
    """
    run = half_folder(kit, half) / RUN
    run.parent.mkdir(0o700, exist_ok=True)
    run.mkdir(0o755, exist_ok=True)
    if half == "agent":
        return [agent_program(kit), *status_programs(kit, settings)]
    return courier_programs(kit, settings, run)


def site_states(kit: Kit) -> dict[str, dict[str, Any]]:
    """The processes of a site, whether started as one or as two halves, as far as one may look."""
    found: dict[str, dict[str, Any]] = {}
    for folder in _folders(kit):
        found |= states(folder)
    return found


def site_processes(kit: Kit, settings: SiteSettings) -> dict[str, dict[str, Any]]:
    """The same with what should run and does not, of the halves that this user may look at.

    Nothing when nothing runs.
    """
    found = site_states(kit)
    for half, names in _PROGRAMS.items() if found else ():
        if settings.courier_user is None or _may_look(half_folder(kit, half) / RUN):
            for name in names:
                found.setdefault(name, {"state": "down", "seconds": 0, "pid": 0, "message": ""})
    return found


def stop_site(kit: Kit) -> None:
    """Stops the processes of a site, and waits until they are gone; the courier's half first.

    Raises:
        DeploymentError: SAM-N402 when nothing runs that this user may stop, SAM-N403 when they do
            not end.
    """
    running = [folder for folder in _folders(kit) if states(folder)]
    for folder in reversed(running or [kit.folder]):
        stop(folder)


def _may_look(folder: Path) -> bool:
    return os.geteuid() == 0 or os.access(folder, os.R_OK | os.X_OK)


def _folders(kit: Kit) -> Iterator[Path]:
    """Folders with a supervisor that this user may speak to."""
    for half in ("agent", "courier"):
        folder = half_folder(kit, half)
        with contextlib.suppress(PermissionError):
            if (folder / RUN).is_dir() and any((folder / RUN).glob("supervisor*")):
                yield folder
