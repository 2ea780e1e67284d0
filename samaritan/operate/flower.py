"""How Flower's own programs are called, and what keeps them from calling anybody."""

from __future__ import annotations

import sys
from pathlib import Path


def flower_program(name: str) -> tuple[str, ...]:
    """The command of a Flower program of this environment."""
    return (str(Path(sys.executable).with_name(name)),)


def flower_environment(home: Path) -> dict[str, str]:
    """No telemetry, no look-up of newer versions, nothing installed at run time.

    Args:
        home: Where Flower keeps its files.
    """
    return {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PYTHONUNBUFFERED": "1",
    }
