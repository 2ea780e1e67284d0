"""The processes of the server: SuperLink, proxy, the starter of ServerApps, the status page."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from samaritan.operate.flower import flower_environment, flower_program
from samaritan.operate.places import RUN
from samaritan.operate.processes import Program
from samaritan.operate.proxy import proxy_program
from samaritan.provision.kit import Kit
from server.home import KIT_VARIABLE, SECRET_VARIABLE
from server.settings import ServerSettings


def server_programs(kit: Kit, settings: ServerSettings) -> list[Program]:
    """What runs at the server.

    Raises:
        DeploymentError: When nginx is missing.
    """
    run = kit.path(RUN)
    run.mkdir(0o755, exist_ok=True)
    home = flower_environment(run / "flower")
    secret, authority = str(kit.path("superexec.secret")), str(kit.path("ca.crt"))
    link = (
        sys.executable, "-m", "server.link", "--ssl-ca-certfile", authority,
        "--ssl-certfile", str(kit.path("server.crt")), "--ssl-keyfile", str(kit.path("server.key")),
        "--enable-supernode-auth", "--disable-runtime-dependency-installation",
        "--database", str(kit.path("link.db")), "--isolation", "process",
        "--superexec-auth-secret-file", secret,
        "--host", "127.0.0.1", "--port", str(settings.link_port),
    )  # fmt: skip
    apps = (
        *flower_program("flower-superexec"), "--root-certificates", authority,
        "--runtime-api-address", f"127.0.0.1:{settings.link_port}",
        "--superexec-auth-secret-file", secret,
    )  # fmt: skip
    page = (sys.executable, "-m", "server.status", str(kit.folder))
    locked = {SECRET_VARIABLE: str(kit.path("control.secret"))}
    started = {
        KIT_VARIABLE: str(kit.folder),
        "PATH": f"{Path(sys.executable).parent}:{os.defpath}",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.5",
    }
    return [
        Program("link", link, home | locked, before=10),
        proxy_program(kit.folder, settings.listen, kit.card.port, settings.link_port),
        Program("apps", apps, home | started, before=30),
        Program("status", page, home, before=40),
    ]
