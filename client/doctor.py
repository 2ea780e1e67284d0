"""Whether a site's kit is ready, looked at before anything starts; nothing is changed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import samaritan
from client.halves import COURIER, site_states
from client.permissions import PRIVATE, Users, unfinished
from client.readiness import data, memory, plans
from client.settings import SiteSettings, load_settings
from samaritan import __version__
from samaritan.errors import SamaritanError
from samaritan.operate.checks import certificates, clock, files, network, ports, tree
from samaritan.operate.checks.checkpoint import Tell, checkpoint
from samaritan.operate.checks.finding import Finding, fault, fine, missing, note
from samaritan.operate.checks.users import ENTER, READ, find_user, owner_of, this_user
from samaritan.operate.places import RUN
from samaritan.provision.certificates import node_key, now, read_certificate, read_private
from samaritan.provision.kit import Kit

_PROGRAM = (Path(sys.prefix), Path(sys.executable), Path(samaritan.__file__).parent)
"""What a user must come to, to run a half."""

_SENT = ("kit.yaml", "ca.crt", "plan.pub", "site.yaml")
_OWN = ("site.key", "node.key", "node.pub", "identity.key")
_WRITTEN = ("state", "log", "plans", "approvals", "ledger", "ledger_copy", RUN)
_RENEWAL = (
    "Ask the coordinator for a new one (`samaritan authority renew DIR NAME`), and put it into the "
    "kit with `samaritan site accept`."
)

_States = Mapping[str, Mapping[str, Any]]


def site_findings(kit: Kit, tell: Tell) -> Iterator[Finding]:
    """Looks at a kit, and at the machine for it.

    Args:
        kit: Of the site.
        tell: Told of work that takes a while.
    """
    yield _version(kit)
    sent = files.complete(
        kit.folder, _SENT, "Unpack the coordinator's archive again, and keep your site.yaml."
    )
    if sent.ok is False:
        yield sent
        return
    try:
        settings = load_settings(kit.path("site.yaml"))
    except SamaritanError as error:
        yield fault("site.yaml", error)
        return
    yield fine("site.yaml", "settings and policy can be read")
    yield files.complete(
        kit.folder,
        (*_SENT, *_OWN),
        "`samaritan site request KIT` makes the keys of this site. Where they were lost, restore "
        "them from the backup instead.",
    )
    users = yield from _users(kit, settings)
    states = _states(kit)
    yield from _keys(kit, users)
    yield from _server(kit, users)
    yield from _folders(kit, users)
    yield from _agent(kit, states)
    yield from _ports(settings, users, states)
    yield from data(settings, users)
    agreed = yield from plans(kit, settings)
    wanted = {plan.study: (plan.base.name, plan.base.sha256) for plan in agreed}
    path = Path(settings.checkpoint) if settings.checkpoint else None
    yield checkpoint(path, wanted, users.agent, "site.yaml", tell)
    if "agent" not in states:  # else its own model is in memory already
        for plan in agreed:
            yield from memory(plan)


def _version(kit: Kit) -> Finding:
    made = kit.card.samaritan
    text = f"of site {kit.card.name}, project {kit.card.project}; made by Samaritan {made}"
    if made == __version__:
        return fine("kit", text)
    return note("kit", f"{text}, and {__version__} is installed", "Plans name the version to use.")


def _users(kit: Kit, settings: SiteSettings) -> Generator[Finding, None, Users]:
    """Whose processes run here; the owner of the site's identity runs the agent."""
    agent = this_user()
    with contextlib.suppress(OSError):
        agent = owner_of(kit.path("identity.key"))
    if settings.courier_user is None:
        yield note(
            "users",
            f"agent and courier are both {agent.name}",
            "Name a user of its own in courier_user to keep the courier from the data; "
            "docs/hospital-it.md shows how.",
        )
        return Users(agent, agent)
    try:
        users = Users(agent, find_user(settings.courier_user))
    except KeyError:
        yield missing(
            "users",
            "SAM-N651",
            f"courier_user is {settings.courier_user!r}, and this machine has no such user",
            "Make the user (systemd/sysusers.d in the kit), or leave courier_user out.",
        )
        return Users(agent, agent)
    if users.are_two:
        yield fine("users", f"agent {agent.name}, courier {users.courier.name}")
        for user in (agent, users.courier):
            if not all(user.may(path, READ | ENTER) for path in _PROGRAM):
                yield missing(
                    f"program for {user.name}",
                    "SAM-N668",
                    f"{user.name} cannot run {sys.executable}",
                    "Install Samaritan where all users may read it, such as /opt/samaritan, with "
                    "a Python that they may run.",
                )
    else:
        yield note(
            "users",
            f"courier_user names {agent.name}, whom the keys belong to already",
            "`samaritan site permissions` gives each half its files.",
        )
    return users


def _keys(kit: Kit, users: Users) -> Iterator[Finding]:
    """Modes of the keys, and the certificate that belongs to them."""
    needed = {
        "site.key": users.courier, "node.key": users.courier, "identity.key": users.agent,
    }  # fmt: skip
    for name, user in needed.items():
        if kit.path(name).is_file():
            yield files.private(kit.path(name), user)
    try:
        authority = read_certificate(kit.path("ca.crt"))
    except SamaritanError as error:
        yield fault("ca.crt", error)
        return
    yield certificates.dates(
        "ca.crt", authority, now(), "The consortium has to be provisioned anew by its coordinator."
    )
    if not kit.path("site.crt").is_file():
        yield missing(
            "site.crt",
            "SAM-N610",
            "is not there yet",
            "Send request.json to the coordinator, and put what comes back into the kit with "
            "`samaritan site accept`.",
        )
        return
    try:
        own = read_certificate(kit.path("site.crt"))
        keys = {
            name: read_private(kit.path(name)).public_key()
            for name in ("site.key", "node.key")
            if os.access(kit.path(name), os.R_OK)
        }
    except SamaritanError as error:
        yield fault("site.crt", error)
        return
    yield from certificates.certificate(
        "site.crt", own, authority, keys.get("site.key"), kit.card.name, now(), _RENEWAL
    )
    node = keys.get("node.key")
    known = kit.path("node.pub").read_text("utf-8").split()[:2] if _there(kit, "node.pub") else []
    if node is not None and (
        node != own.public_key() or (known and known != node_key(node).split())
    ):
        yield missing(
            "node.key",
            "SAM-N620",
            "does not belong to site.crt and node.pub",
            "Restore site.key, node.key and node.pub from one backup.",
        )
    made = max(map(certificates.made, (authority, own)))
    yield clock.plausible(now(), made)


def _server(kit: Kit, users: Users) -> Iterator[Finding]:
    """The way to the server, with the site's own certificate where this user may use it."""
    shown = [kit.path("site.crt"), kit.path("site.key")]
    usable = all(os.access(path, os.R_OK) for path in shown)
    if usable:
        with contextlib.suppress(SamaritanError):
            own, key = read_certificate(shown[0]), read_private(shown[1])
            usable = own.public_key() == key.public_key()
    certificate, key_path = shown if usable else (None, None)
    dated: list[network.Dated] = []
    server = network.Server(kit.card.host, kit.card.port, kit.path("ca.crt"), certificate, key_path)
    yield from network.look(server, dated)
    differences = [clock.difference_s(d.date, d.sent, d.received) for d in dated]
    known = [value for value in differences if value is not None]
    if known:
        # Every answer narrows it down; the largest is the closest to the truth.
        yield clock.against_server(max(known, key=abs))


def _folders(kit: Kit, users: Users) -> Iterator[Finding]:
    yield files.writable(kit.folder, _WRITTEN, users.agent)
    yield files.disk(kit.folder)
    yield files.short_path(kit.folder / COURIER if users.are_two else kit.folder)
    if not users.are_two:
        return
    yield files.writable(kit.folder, (COURIER,), users.courier)
    if faults := unfinished(kit, users):
        yield missing(
            "files of two users",
            "SAM-N609",
            "; ".join(faults[:3]) + (f"; and {len(faults) - 3} more" if len(faults) > 3 else ""),
            f"As root: samaritan site permissions {kit.folder} --agent-user {users.agent.name} "
            f"--courier-user {users.courier.name}",
        )
    else:
        yield fine("files of two users", f"the courier cannot read {', '.join(PRIVATE)}")


def _agent(kit: Kit, states: _States) -> Iterator[Finding]:
    """Whether an agent holds the site's state."""
    state = kit.path("state")
    if not os.access(state, os.R_OK):
        seen = state.exists()
        told = "its state cannot be looked at by this user" if seen else "has not run here yet"
        yield note("agent", told, "Look as root." if seen else "")
        return
    descriptor = os.open(state, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        if states.get("agent", {}).get("state") == "running":
            yield fine("agent", "this kit's own is running")
        else:
            yield missing(
                "agent",
                "SAM-N657",
                "another agent of this site is running, and it was not started from here",
                "Find it (`ps -ef`, for client.service) and stop it: two would spend the privacy "
                "budget twice.",
            )
    except OSError:
        yield note("agent", "the file system of the kit knows no locks", "Use a local disk.")
    else:
        yield fine("agent", "no other is running")
    finally:
        os.close(descriptor)


def _ports(settings: SiteSettings, users: Users, states: _States) -> Iterator[Finding]:
    own = tree.family_of(told["pid"] for told in states.values() if told["pid"])
    # One half does not see the processes of the other.
    other = {users.agent.uid, users.courier.uid} - {os.geteuid()} if users.are_two else set()
    hidden = frozenset(other if os.geteuid() != 0 else ())
    for name, number in (("node_port", settings.node_port), ("status_port", settings.status_port)):
        if number is not None:
            hint = f"Choose another {name} in site.yaml, above 1024."
            yield ports.port(name, number, "127.0.0.1", own, hint, hidden)
    if users.are_two and settings.status_port is not None:
        yield note(
            "status page",
            "runs with the agent, which has no network under the kit's unit for systemd",
            "Leave status_port out there, and use `samaritan site status`.",
            "SAM-N659",
        )


def _states(kit: Kit) -> _States:
    with contextlib.suppress(SamaritanError, OSError):
        return site_states(kit)
    return {}


def _there(kit: Kit, name: str) -> bool:
    return kit.path(name).is_file()
