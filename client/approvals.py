"""Who at a hospital has approved which plan, by signatures that the agent checks each time.

An approval is a file of its own. Taking it away takes the approval back: the next request is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from samaritan.audit.policy import SitePolicy
from samaritan.errors import TrustError
from samaritan.files import write_atomically
from samaritan.keys import Identity, is_signed
from samaritan.lines import canonical
from samaritan.plan import Plan, SignedPlan, read_plan, require_current, write_plan
from samaritan.provision.kit import Kit

SITE_ROLE = "site"
"""The role of whoever may use the site's own key, where the policy names no other roles."""

_PURPOSE = b"samaritan approval\n"


@dataclass(frozen=True)
class Approvals:
    """The plans of a kit and what people at the site say of them.

    Attributes:
        kit: Of the site.
        roles: Public key of every role that must approve.
    """

    kit: Kit
    roles: Mapping[str, bytes]

    def approve(self, signed: SignedPlan, role: str, key: Identity) -> None:
        """Keeps a plan and one role's approval of it.

        Raises:
            TrustError: SAM-K304 for a role the policy does not name, or another key than its.
            StorageError: When it cannot be written.
        """
        self.require_role(role, key)
        plan = signed.plan
        said = {
            "plan": plan.sha256,
            "site": self.kit.card.name,
            "role": role,
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        tree = said | {"signature": key.sign(_PURPOSE + canonical(said)).hex()}
        write_plan(self._plan(plan.sha256), signed)
        text = json.dumps(tree, indent=1) + "\n"
        write_atomically(self._approval(plan.sha256, role), text.encode())

    def require_role(self, role: str, key: Identity) -> None:
        """Refuses a key that is not that of a role.

        Raises:
            TrustError: SAM-K304.
        """
        if self.roles.get(role) != key.public:
            known = ", ".join(sorted(self.roles))
            raise TrustError(
                "SAM-K304",
                f"the key given is not that of the role {role!r}; the roles here are: {known}",
                "Name your role with --role and its key with --key; site.yaml lists the public "
                "keys under policy.approvers.",
            )

    def missing(self, plan_sha256: str) -> list[str]:
        """Roles whose approval is not there, or not theirs."""
        return [r for r, key in sorted(self.roles.items()) if not self._holds(plan_sha256, r, key)]

    def plan(self, plan_sha256: str) -> Plan:
        """An approved plan.

        Raises:
            TrustError: SAM-K305 when nobody here has approved it, or not all who must; SAM-K301 to
                SAM-K303 when it is not whole, not the consortium's, or over.
        """
        path = self._plan(plan_sha256)
        if not path.is_file():
            raise _not_approved(f"no plan {plan_sha256[:16]} was approved here")
        plan = read_plan(path, bytes.fromhex(self.kit.card.plan_signer)).plan
        if plan.sha256 != plan_sha256:
            raise _not_approved(f"the file of plan {plan_sha256[:16]} holds another plan")
        if missing := self.missing(plan_sha256):
            raise _not_approved(f"plan {plan_sha256[:16]} lacks the approval of {missing[0]}")
        require_current(plan)
        return plan

    def known(self) -> list[str]:
        """Hashes of all plans that somebody has approved."""
        return sorted(path.stem for path in self.kit.path("plans").glob("*.json"))

    def _holds(self, plan_sha256: str, role: str, key: bytes) -> bool:
        try:
            tree = json.loads(self._approval(plan_sha256, role).read_text("utf-8"))
            signature = bytes.fromhex(tree.pop("signature"))
            said = (tree["plan"], tree["site"], tree["role"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        right = said == (plan_sha256, self.kit.card.name, role)
        return right and is_signed(key, _PURPOSE + canonical(tree), signature)

    def _plan(self, plan_sha256: str) -> Path:
        return self.kit.path("plans", f"{_name(plan_sha256)}.json")

    def _approval(self, plan_sha256: str, role: str) -> Path:
        return self.kit.path("approvals", _name(plan_sha256), f"{role}.json")


def roles_of(policy: SitePolicy, identity: Identity) -> dict[str, bytes]:
    """The roles that must approve a plan: those of the policy, or the owner of the site's key.

    Raises:
        TrustError: SAM-K306 when two roles have one key: two roles are two people.
    """
    roles = {role: bytes.fromhex(key) for role, key in policy.approvers.items()}
    if len(set(roles.values())) < len(roles):
        raise TrustError(
            "SAM-K306",
            "two roles under policy.approvers have the same key",
            "Make a key for each of them with `samaritan site key FILE`.",
        )
    return roles or {SITE_ROLE: identity.public}


def require_member(plan: Plan, kit: Kit, identity: Identity, node_key: str) -> None:
    """Refuses a plan that is not about this site and its keys.

    Raises:
        TrustError: SAM-K307.
    """
    name = kit.card.name
    planned = plan.sites.get(name)
    own = (identity.public.hex(), node_key.split()[:2])
    if planned is None or (planned.identity, planned.node.split()[:2]) != own:
        what = "does not name this site" if planned is None else "names other keys for this site"
        raise TrustError(
            "SAM-K307",
            f"the plan of study {plan.study} {what} ({name})",
            "Compare fingerprints with the coordinator by telephone; `samaritan plan show` prints "
            "them.",
        )


def _name(plan_sha256: str) -> str:
    """A hash as part of a path; nothing else."""
    if len(plan_sha256) != 64 or not set(plan_sha256) <= set("0123456789abcdef"):
        raise _not_approved("a plan was named by something else than its hash")
    return plan_sha256


def _not_approved(what: str) -> TrustError:
    return TrustError(
        "SAM-K305",
        what,
        "Read the plan (`samaritan plan show PLAN`) and approve it (`samaritan site approve PLAN`)."
        " Nothing that is not in an approved plan happens at this site.",
    )
