"""The processes of a site: the agent, Flower's node, the starter of couriers, a status page."""

from __future__ import annotations

import base64
import secrets
import sys
from pathlib import Path

from client.home import CERTIFICATE_VARIABLE, KEY_VARIABLE, SOCKET, SOCKET_VARIABLE
from client.settings import SiteSettings
from samaritan.errors import TrustError
from samaritan.files import write_atomically
from samaritan.operate.flower import flower_environment
from samaritan.operate.places import RUN
from samaritan.operate.processes import Program
from samaritan.provision.kit import Kit


def site_programs(kit: Kit, settings: SiteSettings) -> list[Program]:
    """What runs at a site under one user; secrets that only these share are drawn anew.

    Raises:
        TrustError: SAM-K311 when the site has no certificate yet.
    """
    courier = courier_programs(kit, settings, kit.path(RUN))
    return [agent_program(kit), *courier, *status_programs(kit, settings)]


def agent_program(kit: Kit) -> Program:
    """The half that owns the data."""
    return Program("agent", (sys.executable, "-m", "client.service", str(kit.folder)), before=10)


def status_programs(kit: Kit, settings: SiteSettings) -> list[Program]:
    """The status page, where site.yaml names a port for it; it reads what the agent's user may."""
    if settings.status_port is None:
        return []
    command = (sys.executable, "-m", "client.status", str(kit.folder))
    return [Program("status", command, before=40)]


def courier_programs(kit: Kit, settings: SiteSettings, run: Path) -> list[Program]:
    """The half that speaks with the server.

    Args:
        kit: Of the site.
        settings: Of the site.
        run: Folder for what these programs write; other users cannot read the secret in it.

    Raises:
        TrustError: SAM-K311 when the site has no certificate yet.
    """
    if not kit.path("site.crt").is_file():
        raise TrustError(
            "SAM-K311",
            f"{kit.folder} holds no site.crt",
            "Send request.json to the coordinator (`samaritan site request KIT` makes it) and put "
            "the certificate that comes back into the kit with `samaritan site accept`.",
        )
    run.mkdir(0o755, exist_ok=True)
    secret = run / "courier.secret"
    write_atomically(secret, base64.b64encode(secrets.token_bytes(48)), private=True)
    runtime = f"127.0.0.1:{settings.node_port}"
    home = flower_environment(run / "flower")
    certified = {
        CERTIFICATE_VARIABLE: str(kit.path("site.crt")),
        KEY_VARIABLE: str(kit.path("site.key")),
    }
    carried = {
        SOCKET_VARIABLE: str(kit.path(*SOCKET)),
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }
    node = (
        sys.executable, "-m", "client.node", "--superlink", f"{kit.card.host}:{kit.card.port}",
        "--root-certificates", str(kit.path("ca.crt")),
        "--auth-supernode-private-key", str(kit.path("node.key")),
        "--isolation", "process", "--superexec-auth-secret-file", str(secret),
        "--host", "127.0.0.1", "--port", str(settings.node_port),
    )  # fmt: skip
    courier = (
        sys.executable, "-m", "client.starter", "--insecure", "--runtime-api-address", runtime,
        "--superexec-auth-secret-file", str(secret),
    )  # fmt: skip
    return [
        Program("node", node, home | certified, before=20),
        Program("courier", courier, home | carried, before=30),
    ]
