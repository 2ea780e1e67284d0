"""The server's own things in its kit: plans and runs, and how its processes learn of them."""

from __future__ import annotations

from pathlib import Path

from samaritan.plan import Plan
from samaritan.provision.kit import Kit

KIT_VARIABLE = "SAMARITAN_KIT"
"""Names the server's kit in the environment of the ServerApp."""

SECRET_VARIABLE = "SAMARITAN_CONTROL_SECRET"  # noqa: S105  a name, no secret
"""Names the file of the control secret in the environment of the SuperLink."""

CONTROL_HEADER = "x-samaritan-control"
"""Of HTTP requests: shows the control secret."""

FAILED = "run_failed"
"""The event of a run that ended with an error that waiting does not mend."""


def plan_file(kit: Kit, plan_sha256: str) -> Path:
    """Where the server keeps a plan."""
    return kit.path("plans", f"{plan_sha256}.json")


def run_folder(kit: Kit, plan: Plan) -> Path:
    """Where the run of a plan lies."""
    return kit.path("runs", f"{plan.study}-{plan.sha256[:8]}")
