"""The app bundle Flower ships with a run: two lines that name what every party has installed.

Sites do not even unpack it. Its hash stands in the plan, so that another bundle is refused.
"""

from __future__ import annotations

import hashlib

from flwr.cli.build import build_fab_from_files

from samaritan import __version__

PLAN_KEY = "plan"
"""Of the run configuration: the hash of the plan to run."""

_FILES = {
    "pyproject.toml": f"""\
[project]
name = "samaritan-run"
version = "{__version__}"
dependencies = []

[tool.flwr.app]
publisher = "samaritan"
fab-include = ["samaritan_run_server.py", "samaritan_run_client.py"]

[tool.flwr.app.components]
serverapp = "samaritan_run_server:app"
clientapp = "samaritan_run_client:app"

[tool.flwr.app.config]
{PLAN_KEY} = ""
""",
    "samaritan_run_server.py": (
        '"""The server runs what it has installed."""\n\nfrom server.deployed import app\n'
    ),
    "samaritan_run_client.py": (
        '"""A site runs what it has installed; without the courier of a site nothing runs."""\n\n'
        "app = None\n"
    ),
}


def build_bundle() -> bytes:
    """The bundle; the same bytes at every call."""
    return build_fab_from_files({name: text.encode() for name, text in _FILES.items()})[0]


def bundle_sha256() -> str:
    """Its hash, as the plan names it."""
    return hashlib.sha256(build_bundle()).hexdigest()
