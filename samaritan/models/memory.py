"""Whether a model fits in this machine's memory, asked before it is loaded."""

from __future__ import annotations

from pathlib import Path

from samaritan.errors import ModelError

_BYTES_PER_PARAMETER = 4
_BESIDE = 512 * 2**20
"""What Python, torch and one batch of small slices take besides the weights."""


def require_memory(name: str, num_parameters: int) -> None:
    """Refuses a base whose weights cannot be held.

    Args:
        name: For the message.
        num_parameters: Of the base.

    Raises:
        ModelError: With the memory that is needed and the memory that is there.
    """
    needed, free = num_parameters * _BYTES_PER_PARAMETER + _BESIDE, available_bytes()
    if free is not None and free < needed:
        raise ModelError(
            "SAM-M104",
            f"base {name} needs {needed / 2**30:.1f} GiB of memory, "
            f"{free / 2**30:.1f} GiB are available",
            "Close other programs, choose a smaller base, or use a larger machine.",
        )


def available_bytes() -> int | None:
    """Memory that can still be taken, the smaller of the machine's and the container's."""
    found = []
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{kind}") for kind in ("max", "current"))
    if limit and used and limit[0].isdigit():
        statistics = dict(line.split() for line in _lines("/sys/fs/cgroup/memory.stat"))
        # Files that were read count as used until somebody needs the room.
        found.append(int(limit[0]) - int(used[0]) + int(statistics.get("inactive_file", 0)))
    return min(found, default=None)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
