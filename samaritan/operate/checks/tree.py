"""Processes of this machine: what they have started, and when they began."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path


def family_of(processes: Iterable[int]) -> list[int]:
    """Processes with all that they have started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                parent = int((entry / "stat").read_text("utf-8").rsplit(")", 1)[1].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = list(processes)
    for process in found:
        found += children.get(process, [])
    return found


def begun(process: int) -> datetime | None:
    """When a process was started; None where there is none, or it cannot be told."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        words = Path(f"/proc/{process}/stat").read_text("utf-8").rsplit(")", 1)[1].split()
        since_boot_s = int(words[19]) / os.sysconf("SC_CLK_TCK")
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - since_boot_s
        return datetime.now(UTC) - timedelta(seconds=age_s)
    return None
