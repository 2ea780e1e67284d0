"""A site's own things in its kit: key, log, socket, and how its processes learn of them."""

from __future__ import annotations

from samaritan.audit.log import Log
from samaritan.errors import TrustError
from samaritan.keys import Identity, load_identity
from samaritan.provision.kit import Kit

SOCKET = ("run", "agent.sock")
"""Where the agent listens, in the kit."""

SOCKET_VARIABLE = "SAMARITAN_AGENT_SOCKET"
"""Names the agent's socket in the environment of the courier."""

CERTIFICATE_VARIABLE, KEY_VARIABLE = "SAMARITAN_SITE_CERTIFICATE", "SAMARITAN_SITE_KEY"
"""Name the site's certificate and its key in the environment of the node."""


def site_log(kit: Kit, identity: Identity) -> Log:
    """The log of a site.

    Raises:
        AuditError: When it is not as it was written.
    """
    card = kit.card
    owner = {"site": card.name, "project": card.project, "key": identity.public.hex()}
    return Log(kit.path("log", "site.jsonl"), owner)


def site_identity(kit: Kit) -> Identity:
    """The key of a site, which must be there.

    Raises:
        TrustError: SAM-K310 when there is none yet.
    """
    path = kit.path("identity.key")
    if not path.is_file():
        raise TrustError(
            "SAM-K310",
            f"{kit.folder} holds no identity.key",
            "Make this site's keys with `samaritan site request KIT`.",
        )
    return load_identity(path)
