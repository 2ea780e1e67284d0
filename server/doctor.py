"""Whether the server's kit is ready, looked at before anything starts; nothing is changed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Generator, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from samaritan import __version__
from samaritan.errors import SamaritanError
from samaritan.models.count import count_trained
from samaritan.models.memory import require_memory
from samaritan.operate import proxy
from samaritan.operate.checks import certificates, clock, files, ports, tree
from samaritan.operate.checks.checkpoint import Tell, checkpoint
from samaritan.operate.checks.finding import Finding, fault, fine, missing, note
from samaritan.operate.checks.plans import current_plan
from samaritan.operate.checks.users import User, owner_of
from samaritan.operate.places import RUN
from samaritan.operate.processes import states
from samaritan.plan import Plan
from samaritan.provision.certificates import now, read_certificate, read_private
from samaritan.provision.kit import Kit
from samaritan.provision.project import SERVER
from server.control import connect
from server.settings import ServerSettings, load_settings

_FILES = (
    "kit.yaml", "ca.crt", "plan.pub", "server.crt", "server.key", "crl.pem", "superexec.secret",
    "control.secret", "server.yaml",
)  # fmt: skip
_KEYS = ("server.key", "superexec.secret", "control.secret")
_PROXIED = ("ca.crt", "crl.pem", "server.crt", "server.key")
_WRITTEN = (RUN, "plans", "runs")
_SECRET_BYTES = 32
_RENEWAL = (
    "`samaritan authority renew DIR server`, then copy server.crt and crl.pem into this kit and "
    "start the server anew."
)

_States = Mapping[str, Mapping[str, Any]]


def server_findings(kit: Kit, tell: Tell) -> Iterator[Finding]:
    """Looks at a kit, and at the machine for it.

    Args:
        kit: Of the server.
        tell: Told of work that takes a while.
    """
    complete = files.complete(
        kit.folder, _FILES, "Unpack server.zip again, from the folder that was provisioned."
    )
    yield complete
    try:
        settings = load_settings(kit.path("server.yaml"))
    except SamaritanError as error:
        yield fault("server.yaml", error)
        return
    yield fine("server.yaml", "settings can be read")
    if complete.ok is False:
        return
    user = owner_of(kit.path("server.key"))
    yield from _keys(kit, user)
    yield from _certificates(kit)
    yield files.writable(kit.folder, _WRITTEN, user)
    yield files.disk(kit.folder)
    yield files.short_path(kit.folder)
    yield _proxy(kit, settings)
    running = _states(kit)
    yield from _reloaded(kit, running)
    yield from _ports(kit, settings, running)
    plans = yield from _plans(kit)
    wanted = {plan.study: (plan.base.name, plan.base.sha256) for plan in plans}
    path = Path(settings.checkpoint) if settings.checkpoint else None
    yield checkpoint(path, wanted, user, "server.yaml", tell)
    if "apps" not in running:
        yield from _memory(plans)
    if running:
        yield from _nodes(kit, settings)


def _keys(kit: Kit, user: User) -> Iterator[Finding]:
    for name in _KEYS:
        yield files.private(kit.path(name), user)
        if name.endswith(".secret"):
            yield files.secret(kit.path(name), _SECRET_BYTES)


def _certificates(kit: Kit) -> Iterator[Finding]:
    try:
        authority = read_certificate(kit.path("ca.crt"))
        own = read_certificate(kit.path("server.crt"))
        readable = os.access(kit.path("server.key"), os.R_OK)
        key = read_private(kit.path("server.key")).public_key() if readable else None
        revoked = x509.load_pem_x509_crl(kit.path("crl.pem").read_bytes())
    except SamaritanError as error:
        yield fault("certificates", error)
        return
    except ValueError:
        yield missing(
            "crl.pem", "SAM-N647", "cannot be read", "Copy it from the authority's folder again."
        )
        return
    moment = now()
    yield certificates.dates(
        "ca.crt", authority, moment, "Provision the consortium anew in another folder."
    )
    yield from certificates.certificate("server.crt", own, authority, key, SERVER, moment, _RENEWAL)
    yield certificates.revocations("crl.pem", revoked, authority, moment)
    yield clock.plausible(moment, max(map(certificates.made, (authority, own))))


def _proxy(kit: Kit, settings: ServerSettings) -> Finding:
    """Whether nginx is there and takes its configuration; a running one is not disturbed."""
    what = "proxy"
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder)
        for name in _PROXIED:
            (trial / name).symlink_to(kit.path(name))
        (trial / RUN).mkdir()
        try:
            program = proxy.proxy_program(trial, settings.listen, kit.card.port, settings.link_port)
        except SamaritanError as error:
            return fault(what, error)
        tested = _output(*program.command, "-t")
        version = _output(program.command[0], "-v")
    if "test is successful" in tested:
        return fine(what, f"{version.removeprefix('nginx version: ')} takes its configuration")
    said = next((line for line in tested.splitlines() if "[emerg]" in line), tested)
    return missing(
        what,
        "SAM-N644",
        f"nginx does not take its configuration: {said.replace(folder, str(kit.folder))[:300]}",
        f"It reads {', '.join(_PROXIED)} of this kit, must be 1.18 or newer, and must be able to "
        f"listen on {settings.listen}.",
    )


def _reloaded(kit: Kit, running: _States) -> Iterator[Finding]:
    """Whether the running proxy has read what lies in the kit: it reads files when told to."""
    process = running.get("proxy", {}).get("pid")
    _, *workers = tree.family_of([process]) if process else [0]
    moments = [moment for moment in map(tree.begun, workers) if moment is not None]
    if not moments:
        return
    newer = [
        name
        for name in _PROXIED
        if datetime.fromtimestamp(kit.path(name).stat().st_mtime, UTC) > max(moments)
    ]
    if newer:
        yield missing(
            "proxy and its files",
            "SAM-N648",
            f"the running proxy has not read the present {', '.join(newer)}; a site that was "
            "revoked may still come in",
            "samaritan server reload KIT; runs go on meanwhile.",
        )
    else:
        yield fine("proxy and its files", "has read the present ones")


def _output(*command: str) -> str:
    """What a program prints for people."""
    done = subprocess.run(  # noqa: S603  nginx, with a configuration of ours
        command, capture_output=True, text=True, check=False, timeout=30
    )
    return done.stderr.strip()


def _ports(kit: Kit, settings: ServerSettings, running: _States) -> Iterator[Finding]:
    own = tree.family_of(told["pid"] for told in running.values() if told["pid"])
    hint = "Choose another {} in server.yaml, or end what has this one."
    for name, number in (
        ("link_port", settings.link_port), ("status_port", settings.status_port)
    ):  # fmt: skip
        yield ports.port(name, number, "127.0.0.1", own, hint.format(name))
        # Sites must not come around the proxy.
        if (found := ports.local_only(f"{name} from outside", number)) is not None:
            yield found
    yield ports.port(
        "port for sites",
        kit.card.port,
        settings.listen,
        own,
        "End what has it; sites know this port from their kits. `listen` in server.yaml must be an "
        "address of this machine.",
    )


def _plans(kit: Kit) -> Generator[Finding, None, list[Plan]]:
    """The plans that were run here; returns those that can still run."""
    good, signer = [], bytes.fromhex(kit.card.plan_signer)
    for path in sorted(kit.path("plans").glob("*.json")):
        what = f"plan {path.stem[:16]}"
        plan = current_plan(what, path, signer)
        if isinstance(plan, Finding):
            yield plan
            continue
        if plan.samaritan != __version__:
            yield note(
                what,
                f"study {plan.study} needs Samaritan {plan.samaritan}, and {__version__} is "
                "installed",
                "Install the plan's version before that run goes on.",
                "SAM-N645",
            )
            continue
        yield fine(what, f"study {plan.study}, valid until {plan.valid_until}")
        good.append(plan)
    return good


def _memory(plans: list[Plan]) -> Iterator[Finding]:
    for plan in plans:
        what, config = f"memory for {plan.study}", plan.config
        try:
            count = count_trained(
                config.model.base, config.peft.preset, config.peft.rank,
                len(config.data.classes or {}),
            )  # fmt: skip
            require_memory(plan.base.name, count.parameters)
        except SamaritanError as error:
            yield fault(what, error)
        else:
            yield fine(what, f"base {plan.base.name} fits")


def _nodes(kit: Kit, settings: ServerSettings) -> Iterator[Finding]:
    """Nodes that may connect, as the running SuperLink has them."""
    try:
        with connect(kit, settings) as control:
            nodes = [node for node in control.nodes() if node.status != "unregistered"]
    except SamaritanError as error:
        yield fault("SuperLink", error)
        return
    except OSError as error:
        yield note("SuperLink", f"{error.filename}: {error.strerror}", "Look as its own user.")
        return
    yield fine("SuperLink", f"answers; {len(nodes)} nodes may connect")
    away = sorted(node.name or str(node.node_id) for node in nodes if node.status != "online")
    if away:
        yield note(
            "nodes",
            f"not connected: {', '.join(away)}",
            "Their people can look with `samaritan doctor --kit KIT` and `samaritan site status`.",
            "SAM-N646",
        )


def _states(kit: Kit) -> _States:
    with contextlib.suppress(SamaritanError, OSError):
        if kit.path(RUN).is_dir():
            return states(kit.folder)
    return {}
