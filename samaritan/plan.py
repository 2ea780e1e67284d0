"""The plan of a study: all that will be done at a site, signed by the consortium, read by people.

A site acts on a plan that its people approved, and on nothing else. A plan names no code, no path.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from samaritan.config import Config, Section, config_sha256
from samaritan.errors import TrustError
from samaritan.files import write_atomically
from samaritan.keys import Identity, is_signed
from samaritan.lines import canonical

_PURPOSE = b"samaritan plan\n"

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PlannedSite(Section):
    """A hospital in a plan.

    Attributes:
        identity: Public Ed25519 key, hexadecimal: signs what the site sends.
        node: Public key of its Flower node, as OpenSSH writes it.
    """

    identity: Sha256
    node: str


class PlannedBase(Section):
    """The frozen model of a study.

    Attributes:
        name: As `samaritan models list` has it.
        sha256: Of its weights as they are loaded.
    """

    name: str
    sha256: Sha256


class Plan(Section):
    """A study.

    Attributes:
        study: Its name; of the run folder too.
        title, purpose: For the people who approve it.
        contacts, ethics: Who answers questions, and references of ethics votes.
        created, valid_until: Days; nothing happens after the last.
        samaritan: The version all parties run.
        bundle_sha256: Of the Flower app bundle; sites run their own code and refuse another bundle.
        config: Everything that decides the result.
        base: The frozen model.
        sites: By name.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    title: str = ""
    purpose: str = ""
    contacts: tuple[str, ...] = ()
    ethics: tuple[str, ...] = ()
    created: date
    valid_until: date
    samaritan: str
    bundle_sha256: Sha256
    config: Config
    base: PlannedBase
    sites: dict[str, PlannedSite] = Field(min_length=1)

    @model_validator(mode="after")
    def _whole(self) -> Plan:
        config = self.config
        faults = []
        if config.model.checkpoint is not None:
            faults.append("config.model.checkpoint is a path, which a plan must not name")
        if config.data.source != "folder" or config.data.partition != "manifest":
            faults.append("config.data must leave the cases to the sites (source: folder)")
        if config.data.classes is None:
            faults.append("config.data.classes must name the structures: sites cannot look around")
        if config.federation.min_sites is None:
            faults.append("config.federation.min_sites must say how many sites a round needs")
        if unknown := set(config.data.held_out_sites) - self.sites.keys():
            faults.append(f"config.data.held_out_sites names {', '.join(sorted(unknown))}")
        if len({site.identity for site in self.sites.values()}) < len(self.sites):
            faults.append("two sites have the same identity")
        # What stands behind the kind and the key is a comment.
        if len({tuple(site.node.split()[:2]) for site in self.sites.values()}) < len(self.sites):
            faults.append("two sites have the same node key")
        told = (self.title, self.purpose, *self.contacts, *self.ethics, *self.sites)
        if not "".join(told).replace("\n", "").isprintable():
            faults.append("a text for the people who approve it is not printable")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def sha256(self) -> str:
        """The plan's name: hash of all it says."""
        return hashlib.sha256(_content(self)).hexdigest()

    @property
    def config_sha256(self) -> str:
        """Hash of its configuration."""
        return config_sha256(self.config)

    @property
    def observers(self) -> tuple[str, ...]:
        """Sites that only score."""
        return tuple(s for s in sorted(self.sites) if s in self.config.data.held_out_sites)

    @property
    def training_sites(self) -> tuple[str, ...]:
        """Sites that train, by name."""
        return tuple(s for s in sorted(self.sites) if s not in self.config.data.held_out_sites)


@dataclass(frozen=True)
class SignedPlan:
    """A plan with the signature over it.

    Attributes:
        plan: What it says.
        signer: Public key, 32 bytes.
        signature: 64 bytes.
    """

    plan: Plan
    signer: bytes
    signature: bytes


def sign_plan(plan: Plan, key: Identity) -> SignedPlan:
    """Signs a plan with the consortium's key."""
    return SignedPlan(plan, key.public, key.sign(_PURPOSE + _content(plan)))


def write_plan(path: Path, signed: SignedPlan) -> None:
    """Writes a signed plan as JSON that people can read.

    Raises:
        StorageError: When it cannot be written.
    """
    tree = {
        "plan": signed.plan.model_dump(mode="json", by_alias=True),
        "signer": signed.signer.hex(),
        "signature": signed.signature.hex(),
    }
    write_atomically(path, (json.dumps(tree, indent=1, allow_nan=False) + "\n").encode())


def read_plan(path: Path, signer: bytes | None = None) -> SignedPlan:
    """Reads a plan and checks its signature.

    Args:
        path: From `write_plan`.
        signer: The only key whose plans count; None takes the one it names, for a look at it.

    Raises:
        TrustError: SAM-K301 when it is unreadable or incomplete, SAM-K302 when the signature is
            not that key's.
    """
    try:
        tree = json.loads(path.read_text("utf-8"))
        plan = Plan.model_validate(tree["plan"])
        key, signature = bytes.fromhex(tree["signer"]), bytes.fromhex(tree["signature"])
        # What was left out and filled in by default was not signed.
        whole = plan.model_dump(mode="json", by_alias=True) == tree["plan"]
    except ValidationError as error:
        raise _unreadable(path, _faults(error)) from error
    except OSError as error:
        raise _unreadable(path, str(error.strerror)) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(path, f"it is damaged ({type(error).__name__})") from error
    if not whole:
        raise _unreadable(path, "it is not written as this version writes plans")
    if signer not in (None, key) or not is_signed(key, _PURPOSE + _content(plan), signature):
        raise TrustError(
            "SAM-K302",
            f"the plan {path.name} is not signed with the key of this consortium",
            "Ask the coordinator for the plan itself. Approve no plan with a wrong signature.",
        )
    return SignedPlan(plan, key, signature)


def require_current(plan: Plan) -> None:
    """Refuses a plan whose last day is over.

    Raises:
        TrustError: SAM-K303.
    """
    if datetime.now(UTC).date() > plan.valid_until:
        raise TrustError(
            "SAM-K303",
            f"the plan of study {plan.study} was valid until {plan.valid_until}",
            "Ask the coordinator for a new plan; look at this machine's clock first.",
        )


def _content(plan: Plan) -> bytes:
    tree: dict[str, Any] = plan.model_dump(mode="json", by_alias=True)
    return canonical(tree)


def _faults(error: ValidationError) -> str:
    found = (
        f"{'.'.join(map(str, d['loc']))}: {d['msg'].removeprefix('Value error, ')}"
        for d in error.errors()
    )
    return "; ".join(text.removeprefix(": ") for text in found)


def _unreadable(path: Path, reason: str) -> TrustError:
    return TrustError(
        "SAM-K301",
        f"{path} is no whole plan: {reason}",
        "Take the file as the coordinator made it with `samaritan plan make`.",
    )
