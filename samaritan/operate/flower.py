"""How Flower's own programs are called, and what keeps them from calling anybody."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_THIS_MACHINE = ("127.0.0.1", "localhost")


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
        **past_proxies(),
    }


def past_proxies() -> dict[str, str]:
    """Settings with which a program finds others of its kit where the environment names a proxy.

    A hospital's proxy cannot reach what listens on this machine alone.
    """
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = dict.fromkeys([*filter(None, named.split(",")), *_THIS_MACHINE])
    return dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(hosts))
