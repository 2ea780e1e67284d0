"""Which file of a site's kit belongs to which of two system users, the agent and the courier.

| Files | Owner | Group | Mode |
| --- | --- | --- | --- |
| the kit's folder | agent | courier | 0710: the courier enters it and sees no names |
| kit.yaml, site.yaml, certificates, what came in the archive | agent | courier | 0640 |
| site.key, node.key | courier | courier | 0600 |
| run/ | agent | courier | 2710: the agent's socket is made in it and gets its group |
| courier/ with all in it | courier | courier | 0700, 0600 |
| identity.key, state/, log/, ledgers and everything else | agent | agent | 0700, 0600 |
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from client.halves import COURIER, Half, site_states
from client.settings import SiteSettings, load_settings
from samaritan.errors import DeploymentError
from samaritan.operate.checks.users import ENTER, READ, WRITE, User, find_user, owner_of, this_user
from samaritan.operate.places import RUN
from samaritan.provision.kit import Kit

PRIVATE = ("identity.key", "state", "log", "ledger", "ledger_copy", "plans", "approvals")
"""What only the agent may read: its key, and all it knows of patients and studies."""

SHARED = ("kit.yaml", "site.yaml", "ca.crt", "site.crt", "node.pub", "plan.pub")
"""What both halves read."""

_SENT = (*SHARED, "README.md", "start.sh", "compose.yaml", "compose.cuda.yaml", "systemd", "docker")
_COURIERS = ("site.key", "node.key")
_MADE = ("state", "log", "plans", "approvals", RUN, COURIER, f"{COURIER}/{RUN}")


@dataclass(frozen=True)
class Users:
    """Whose processes a site runs.

    Attributes:
        agent: Owns the data.
        courier: Speaks with the server; the agent's own user where they are one.
    """

    agent: User
    courier: User

    @property
    def are_two(self) -> bool:
        """Whether the system keeps them apart."""
        return self.agent.uid != self.courier.uid


@dataclass(frozen=True)
class _Rule:
    owner: Half
    group: Half
    folder: int
    file: int


_SECRET = _Rule("agent", "agent", 0o700, 0o600)
_BOTH = _Rule("agent", "courier", 0o750, 0o640)
_COURIER = _Rule("courier", "courier", 0o700, 0o600)
_KIT = _Rule("agent", "courier", 0o710, 0)
_MEETING = _Rule("agent", "courier", 0o2710, 0)


def hand_over(kit: Kit, agent_user: str, courier_user: str) -> Users:
    """Gives every file of a kit to the half of a site that it belongs to; root does it.

    Args:
        kit: Of a site whose processes are stopped.
        agent_user: Name or number of the system user that owns the data.
        courier_user: Of the one that speaks with the server; site.yaml names it too.

    Raises:
        DeploymentError: SAM-N661 without root, SAM-N662 for users that do not exist or are one,
            SAM-N663 when site.yaml names another courier, SAM-N664 while processes run, SAM-N665
            when a user cannot come to the kit, SAM-N666 for a link in it.
        OSError: When the file system refuses.
    """
    if os.geteuid() != 0:
        raise DeploymentError(
            "SAM-N661",
            "only root can give files to other users",
            "Run it with sudo, once; the processes themselves never need root.",
        )
    users = Users(_user(agent_user), _user(courier_user))
    _require_possible(kit, users, courier_user)
    for name in _MADE:
        kit.path(name).mkdir(0o700, exist_ok=True)
    for folder, below, names, descriptor in os.fwalk(kit.folder, follow_symlinks=False):
        place = Path(folder).relative_to(kit.folder)
        _give(descriptor, rule(place), users)
        links = [name for name in below if Path(folder, name).is_symlink()]
        for name in (*names, *links):
            _give_file(descriptor, name, place / name, users)
    return users


def require_own_user(kit: Kit, settings: SiteSettings, half: Half | None) -> None:
    """Refuses to run what another user is to run: the system would keep nobody apart.

    Args:
        kit: Of the site.
        settings: Of the site.
        half: That is to run; None for both.

    Raises:
        DeploymentError: SAM-N667.
    """
    if settings.courier_user is None:
        return
    agent, courier = owner_of(kit.path("kit.yaml")), _number(settings.courier_user)
    whose: dict[Half | None, set[int | None]] = {
        "agent": {agent.uid}, "courier": {courier}, None: {agent.uid, courier}
    }  # fmt: skip
    if os.geteuid() == 0 or whose[half] - {os.geteuid(), None}:
        raise DeploymentError(
            "SAM-N667",
            f"courier_user in site.yaml is {settings.courier_user}, so that each half has a user "
            f"of its own, and {half or 'both'} would run as {this_user().name}",
            "Start the units of systemd or the containers in the kit, or each half by hand: "
            f"`runuser -u USER -- samaritan site start {kit.folder} --only agent`, and the same "
            "with `courier`. Files that root has left: `samaritan site permissions` gives them "
            "back.",
        )


def rule(place: Path) -> _Rule:
    """Whose a file is.

    Args:
        place: From the folder of the kit.
    """
    parts = place.parts
    if not parts:
        return _KIT
    if parts == (RUN,):
        return _MEETING
    if parts[0] == COURIER or place.as_posix() in _COURIERS:
        return _COURIER
    return _BOTH if parts[0] in _SENT else _SECRET


def unfinished(kit: Kit, users: Users) -> list[str]:
    """What keeps two users from working with a kit, or lets the courier see too much, in words."""
    agent, courier = users.agent, users.courier
    faults = [
        f"{courier.name} can read {name}"
        for name in PRIVATE
        if kit.path(name).exists() and courier.may(kit.path(name), READ)
    ]
    faults += [
        f"{courier.name} cannot read {name}"
        for name in SHARED
        if kit.path(name).exists() and not courier.may(kit.path(name), READ)
    ]
    run = kit.path(RUN)
    faults += [
        f"{courier.name} can write {place}"
        for place in (kit.folder, run, kit.path("site.yaml"))
        if courier.may(place, WRITE)
    ]
    if not courier.may(run, ENTER):
        faults.append(f"{courier.name} cannot enter {run}, where the agent's socket is")
    elif courier.gid not in agent.groups and not _hands_on_group(run, courier.gid):
        faults.append(f"a socket that {agent.name} makes in {run} is closed to {courier.name}")
    return faults


def _hands_on_group(folder: Path, gid: int) -> bool:
    """Whether what is made in a folder gets its group."""
    found = folder.stat()
    return found.st_gid == gid and bool(found.st_mode & stat.S_ISGID)


def _user(name: str) -> User:
    try:
        return find_user(name)
    except KeyError:
        raise DeploymentError(
            "SAM-N662",
            f"this machine has no user {name!r}",
            "Make both users first; systemd/sysusers.d in the kit does it.",
        ) from None


def _require_possible(kit: Kit, users: Users, courier_user: str) -> None:
    agent, courier = users.agent, users.courier
    if not users.are_two or 0 in (agent.uid, courier.uid):
        raise DeploymentError(
            "SAM-N662",
            f"agent and courier would run as {agent.name} and {courier.name}",
            "Name two different users, and root as neither.",
        )
    named = load_settings(kit.path("site.yaml")).courier_user
    # Numbers are for containers, which have names of their own for them.
    if named is None or not (courier_user.isdigit() or _number(named) == courier.uid):
        raise DeploymentError(
            "SAM-N663",
            f"courier_user in site.yaml is {named or 'not set'}",
            f"Set courier_user: {courier.name} there: the agent lets in that user alone.",
        )
    if site_states(kit):
        raise DeploymentError(
            "SAM-N664",
            f"processes of {kit.folder} are running",
            "Stop them with `samaritan site stop`, and start them again afterwards.",
        )
    for user in (agent, courier):
        if not user.may(kit.folder.parent, ENTER):
            raise DeploymentError(
                "SAM-N665",
                f"{user.name} cannot enter {kit.folder.parent}",
                "Move the kit, for example to /srv/samaritan, or open the folders above it.",
            )


def _number(name: str) -> int | None:
    try:
        return find_user(name).uid
    except KeyError:
        return None


def _give(descriptor: int, given: _Rule, users: Users) -> None:
    """Gives an open file or folder to its owner; its mode is set last, as chown clears bits."""
    found = os.fstat(descriptor)
    is_folder = stat.S_ISDIR(found.st_mode)
    mode = given.folder if is_folder else given.file
    if not is_folder and found.st_mode & stat.S_IXUSR:
        mode |= (mode & 0o444) >> 2  # whoever may read a program may run it
    owner = users.agent if given.owner == "agent" else users.courier
    group = users.agent if given.group == "agent" else users.courier
    os.fchown(descriptor, owner.uid, group.gid)
    os.fchmod(descriptor, mode)


def _give_file(folder: int, name: str, place: Path, users: Users) -> None:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISSOCK(found.st_mode):
        os.unlink(name, dir_fd=folder)  # nobody listens any more
        return
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        raise DeploymentError(
            "SAM-N666",
            f"{place} in the kit is a link, and would lead elsewhere",
            "Put the file itself into the kit.",
        )
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    try:
        _give(descriptor, rule(place), users)
    finally:
        os.close(descriptor)
