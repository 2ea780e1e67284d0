"""The authority of a consortium: a folder with its key, and what it issued and revoked.

One process at a time changes it. A certificate is in issued.json before it is in a file of its own,
so that every one that may be out there can be revoked.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import AwareDatetime, Field, ValidationError

from samaritan.config import Section
from samaritan.errors import TrustError
from samaritan.files import write_atomically
from samaritan.keys import load_identity, make_identity
from samaritan.lock import locked
from samaritan.provision import certificates
from samaritan.provision.certificates import Signer
from samaritan.provision.project import SERVER, Project, folder_name, load_project

EXPIRY_WARNING_DAYS = 30
"""From so many days before its end, a certificate is said to expire."""

State = Literal["valid", "expiring", "expired", "revoked", "awaiting request"]


class Grant(Section):
    """A certificate that was issued."""

    serial: Annotated[str, Field(pattern=r"^[0-9a-f]+$")]
    not_after: AwareDatetime
    revoked: AwareDatetime | None = None


class SiteGrant(Grant):
    """A certificate of a site, with the public keys that the site has made known."""

    node_key: str
    """Of TLS and of the Flower node, in OpenSSH's form."""
    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Ed25519; signs what the site sends."""


class Register(Section):
    """The content of issued.json: everything that was ever issued, the newest last."""

    format: Literal[1] = 1
    project: str
    keys: Literal["at-site", "shipped"]
    server: tuple[Grant, ...] = ()
    sites: dict[str, Annotated[tuple[SiteGrant, ...], Field(min_length=1)]] = Field(
        default_factory=dict
    )


@dataclass(frozen=True)
class Member:
    """A site that has a certificate.

    Attributes:
        name: Of the site.
        node_key: Public key of its Flower node, in OpenSSH's form.
        identity: Its public Ed25519 key, hexadecimal.
        not_after: When its certificate ends.
        revoked: Whether it counts no more.
    """

    name: str
    node_key: str
    identity: str
    not_after: datetime
    revoked: bool


@dataclass(frozen=True)
class Entry:
    """One line of the list of certificates; what a site without one has not is None."""

    name: str
    state: State
    serial: str | None = None
    not_after: datetime | None = None
    days_left: int | None = None


class Authority:
    """An authority that this process alone may change.

    Attributes:
        folder: Where it lies.
        project: What it is for.
        register: What it issued.
    """

    def __init__(self, folder: Path, project: Project, register: Register, signer: Signer) -> None:
        self.folder, self.project, self.register = folder, project, register
        self._signer = signer

    def certificate(self, name: str) -> Path:
        """Where the newest certificate of the server or a site lies."""
        return _certificate(self.folder, name)

    def issue_server(self, key: ec.EllipticCurvePublicKey) -> x509.Certificate:
        """Issues a certificate of the server for all its hosts.

        Raises:
            TrustError: SAM-K109 when the authority's own certificate has ended.
            StorageError: When it cannot be written.
        """
        self.require_valid()
        hosts, days = self.project.server.certified_hosts, self.project.days(SERVER)
        issued = certificates.certify_server(
            self._signer, key, self.project.project, hosts, certificates.now(), days
        )
        grant = Grant(serial=certificates.serial(issued), not_after=issued.not_valid_after_utc)
        grants = (*self.register.server, grant)
        self._record(self.register.model_copy(update={"server": grants}))
        self._hand_over(SERVER, issued)
        return issued

    def issue_site(
        self, name: str, key: ec.EllipticCurvePublicKey, identity: str
    ) -> x509.Certificate:
        """Issues a certificate of a site.

        Args:
            name: Of the site.
            key: Public, of its node.
            identity: Its public Ed25519 key, hexadecimal.

        Raises:
            TrustError: SAM-K103 for a site that the project has not, SAM-K106 when it has a
                certificate for other keys, SAM-K107 for a key that was revoked, SAM-K108 for one of
                another site, SAM-K109 when the authority's own certificate has ended.
            StorageError: When it cannot be written.
        """
        self._require_site(name)
        node_key = certificates.node_key(key)
        self._require_own_keys(name, node_key, identity)
        self.require_valid()
        days = self.project.days(name)
        issued = certificates.certify_site(
            self._signer, key, self.project.project, name, certificates.now(), days
        )
        grant = SiteGrant(
            serial=certificates.serial(issued),
            not_after=issued.not_valid_after_utc,
            node_key=node_key,
            identity=identity,
        )
        self._record_site(name, (*self.register.sites.get(name, ()), grant))
        self._hand_over(name, issued)
        return issued

    def renew(self, name: str) -> x509.Certificate:
        """Issues a new certificate for the same key; the old one stays good until its end.

        Args:
            name: Of a site, or `server`.

        Raises:
            TrustError: SAM-K121 when the server's certificate is missing, SAM-K103 for an unknown
                name, SAM-K104 for a site that has none yet, SAM-K105 for one that was revoked, and
                what `issue_site` raises.
            StorageError: When it cannot be written.
        """
        if name == SERVER:
            key = certificates.read_certificate(self.certificate(SERVER)).public_key()
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise _damaged(self.folder, "the server's certificate has a strange key")
            return self.issue_server(key)
        newest = self._grants(name)[-1]
        if newest.revoked:
            raise TrustError(
                "SAM-K105",
                f"the certificate of {name} was revoked on {newest.revoked:%Y-%m-%d}",
                "Let the site make new keys and send a new request, and sign that.",
            )
        return self.issue_site(name, certificates.read_node_key(newest.node_key), newest.identity)

    def revoke(self, name: str) -> datetime:
        """Revokes all certificates of a site and writes the list of them anew.

        Returns:
            When the site was revoked: now, or when that was done before.

        Raises:
            TrustError: SAM-K103 for an unknown name, SAM-K104 for a site that has none yet.
            StorageError: When it cannot be written.
        """
        moment = certificates.now()
        grants = self._grants(name)
        revoked = tuple(
            g if g.revoked else g.model_copy(update={"revoked": moment}) for g in grants
        )
        self._record_site(name, revoked)
        self.write_revocations()
        return revoked[-1].revoked or moment

    def write_revocations(self) -> None:
        """Brings crl.pem up to date; a list that already says the same stays as it is.

        Raises:
            StorageError: When it cannot be written.
        """
        grants = [*self.register.server, *itertools.chain(*self.register.sites.values())]
        revoked = {int(grant.serial, 16): grant.revoked for grant in grants if grant.revoked}
        moment = certificates.now()
        # Whoever checks a list refuses everybody once it is out of date. This one is good for as
        # long as any certificate, and every certificate that is issued brings a new one.
        end = max([moment + timedelta(days=1), *(grant.not_after for grant in grants)])
        path = self.folder / "crl.pem"
        with contextlib.suppress(OSError, ValueError):
            old = x509.load_pem_x509_crl(path.read_bytes())
            if old.next_update_utc == end and {r.serial_number for r in old} == revoked.keys():
                return
        written = certificates.revocation_list(self._signer, revoked, moment, end)
        write_atomically(path, certificates.pem(written))

    def require_valid(self) -> None:
        """Refuses to go on when the authority's own certificate has ended.

        Raises:
            TrustError: SAM-K109.
        """
        end = self._signer.certificate.not_valid_after_utc
        if end <= certificates.now():
            raise TrustError(
                "SAM-K109",
                f"the certificate of this authority ended on {end:%Y-%m-%d}",
                "Provision the consortium anew in another folder; all sites need new kits.",
            )

    def _grants(self, name: str) -> tuple[SiteGrant, ...]:
        """What a site was issued; at least one.

        A site that has left project.yaml is still known here.
        """
        if grants := self.register.sites.get(name):
            return grants
        self._require_site(name)
        raise TrustError(
            "SAM-K104",
            f"{name} has no certificate yet",
            "Ask the site for its request, and sign that with `samaritan authority sign`.",
        )

    def _require_site(self, name: str) -> None:
        if name not in self.project.names():
            raise TrustError(
                "SAM-K103",
                f"project.yaml has no site {name!r}",
                f"Its sites: {', '.join(self.project.names())}.",
            )

    def _require_own_keys(self, name: str, node_key: str, identity: str) -> None:
        for other, grants in self.register.sites.items():
            if other != name and any(
                g.node_key == node_key or g.identity == identity for g in grants
            ):
                raise TrustError(
                    "SAM-K108",
                    f"the keys of {name} are those of {other}",
                    "Find out who has copied whose folder; each site makes keys of its own.",
                )
        grants = self.register.sites.get(name, ())
        if any(grant.revoked and grant.node_key == node_key for grant in grants):
            raise TrustError(
                "SAM-K107",
                f"this key of {name} was revoked",
                "Let the site move its old keys away, make new ones and send a new request.",
            )
        # An identity may outlive a revoked certificate: the ledger of the site is signed with it.
        pinned = grants and not grants[-1].revoked
        if pinned and (grants[-1].node_key, grants[-1].identity) != (node_key, identity):
            raise TrustError(
                "SAM-K106",
                f"{name} has a certificate for other keys",
                "Ask the site by telephone. If its keys are lost, run "
                f"`samaritan authority revoke {self.folder} NAME` first.",
            )

    def _record_site(self, name: str, grants: tuple[SiteGrant, ...]) -> None:
        sites = {**self.register.sites, name: grants}
        self._record(self.register.model_copy(update={"sites": sites}))

    def _record(self, register: Register) -> None:
        _write_register(self.folder, register)
        self.register = register

    def _hand_over(self, name: str, issued: x509.Certificate) -> None:
        write_atomically(self.certificate(name), certificates.pem(issued))
        self.write_revocations()


@contextlib.contextmanager
def make_authority(folder: Path, project_file: Path) -> Iterator[Authority]:
    """Makes an authority, or brings an old one to a changed project.yaml; no key is ever replaced.

    Args:
        folder: Made if it is missing; only its owner can read it.
        project_file: The description, copied into the folder.

    Raises:
        ConfigError: When the description cannot be read.
        TrustError: SAM-K001 for faults in it, SAM-K002 for a change that cannot be made, SAM-K102
            when a file of the old authority is missing or does not fit the others.
        StorageError: SAM-S110 when another process works there.
    """
    project = load_project(project_file)
    description = project_file.read_bytes()
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(0o700, exist_ok=True)
    with locked(folder):
        if not any(folder.iterdir()):
            _write_register(folder, Register(project=project.project, keys=project.keys))
        register = read_register(folder)
        _require_possible(register, project)
        if _differs(folder / "project.yaml", description):
            write_atomically(folder / "project.yaml", description)
        if not register.server:  # else all of them are there, or the folder is damaged
            _make_keys(folder, project)
        yield _load(folder)


@contextlib.contextmanager
def open_authority(folder: Path) -> Iterator[Authority]:
    """An authority that is there.

    Args:
        folder: `authority` in what `samaritan provision` wrote.

    Raises:
        TrustError: SAM-K101 when it is no authority, SAM-K102 when a file is missing or does not
            fit the others.
        StorageError: SAM-S110 when another process works there.
    """
    _require_authority(folder)
    with locked(folder):
        yield _load(folder)


def members(folder: Path) -> dict[str, Member]:
    """The sites that have a certificate, with the keys they go by; revoked ones too.

    Args:
        folder: Of the authority.

    Raises:
        TrustError: SAM-K101 when it is no authority, SAM-K102 when issued.json is unreadable.
    """
    return {
        name: Member(name, last.node_key, last.identity, last.not_after, last.revoked is not None)
        for name, (*_, last) in read_register(folder).sites.items()
    }


def entries(folder: Path) -> list[Entry]:
    """The server and every site with what is to be known of its newest certificate.

    Args:
        folder: Of the authority.

    Raises:
        TrustError: SAM-K101 when it is no authority, SAM-K102 when issued.json is unreadable.
    """
    register = read_register(folder)
    project = load_project(folder / "project.yaml")
    names = dict.fromkeys([*project.names(), *register.sites])
    newest: dict[str, Grant | None] = {SERVER: next(reversed(register.server), None)}
    for name in names:
        newest[name] = next(reversed(register.sites.get(name, ())), None)
    moment = certificates.now()
    return [_entry(name, grant, moment) for name, grant in newest.items()]


def authority_entry(folder: Path) -> Entry:
    """The same of the authority's own certificate.

    Args:
        folder: Of the authority.

    Raises:
        TrustError: SAM-K101 when it is no authority, SAM-K121 when ca.crt is unreadable.
    """
    _require_authority(folder)
    own = certificates.read_certificate(folder / "ca.crt")
    grant = Grant(serial=certificates.serial(own), not_after=own.not_valid_after_utc)
    return _entry("the authority itself", grant, certificates.now())


def read_register(folder: Path) -> Register:
    """What an authority has issued.

    Raises:
        TrustError: SAM-K101 when the folder is no authority, SAM-K102 when issued.json is
            unreadable.
    """
    _require_authority(folder)
    try:
        return Register.model_validate_json((folder / "issued.json").read_bytes())
    except (OSError, ValidationError) as error:
        raise _damaged(folder, "issued.json is missing or unreadable") from error


def _entry(name: str, grant: Grant | None, moment: datetime) -> Entry:
    if grant is None:
        return Entry(name, "awaiting request")
    days = certificates.days_left(grant.not_after, moment)
    state: State = "valid"
    if grant.revoked:
        state = "revoked"
    elif grant.not_after <= moment:
        state = "expired"
    elif days < EXPIRY_WARNING_DAYS:
        state = "expiring"
    return Entry(name, state, grant.serial, grant.not_after, days)


def _require_authority(folder: Path) -> None:
    if not (folder / "issued.json").is_file() and not (folder / "ca.key").is_file():
        raise TrustError(
            "SAM-K101",
            f"{folder} is no authority",
            "Name the folder `authority` in what `samaritan provision` wrote.",
        )


def _require_possible(register: Register, project: Project) -> None:
    """Refuses what certificates that are out there contradict."""
    faults = [
        f"{key} was {old} and is {new}"
        for key, old, new in (
            ("project", register.project, project.project),
            ("keys", register.keys, project.keys),
        )
        if old != new
    ]
    for name, grants in register.sites.items():
        if name not in project.names() and not all(grant.revoked for grant in grants):
            faults.append(f"the site {name} is gone and has a certificate; revoke it first")
    if faults:
        raise TrustError(
            "SAM-K002",
            "project.yaml was changed in what stands in certificates: " + "; ".join(faults),
            "Take the change back, or provision anew in another folder.",
        )


def _make_keys(folder: Path, project: Project) -> None:
    """Makes what a new authority lacks. A public half without its key is damage, and stays."""
    key_path, certificate_path = folder / "ca.key", folder / "ca.crt"
    if not key_path.exists() and not certificate_path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        write_atomically(key_path, certificates.pkcs8(key), private=True)
    if key_path.exists() and not certificate_path.exists():
        key = certificates.read_private(key_path)
        made = certificates.certify_authority(key, project.project, certificates.now())
        write_atomically(certificate_path, certificates.pem(made))
    if not (folder / "plan.pub").exists():
        public = make_identity(folder / "plan.key").public
        write_atomically(folder / "plan.pub", f"{public.hex()}\n".encode())


def _load(folder: Path) -> Authority:
    register = read_register(folder)
    for name in ("project.yaml", "ca.key", "ca.crt", "plan.key", "plan.pub"):
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
    project = load_project(folder / "project.yaml")
    _require_possible(register, project)
    signer = Signer(
        certificates.read_private(folder / "ca.key"),
        certificates.read_certificate(folder / "ca.crt"),
    )
    if signer.key.public_key() != signer.certificate.public_key():
        raise _damaged(folder, "ca.key is not the key of ca.crt")
    if (folder / "plan.pub").read_text().strip() != load_identity(folder / "plan.key").public.hex():
        raise _damaged(folder, "plan.key is not the key of plan.pub")
    return Authority(folder, project, register, signer)


def _certificate(folder: Path, name: str) -> Path:
    kind = SERVER if name == SERVER else "site"
    return folder / "issued" / folder_name(name) / f"{kind}.crt"


def _write_register(folder: Path, register: Register) -> None:
    write_atomically(folder / "issued.json", register.model_dump_json(indent=1).encode() + b"\n")


def _differs(path: Path, content: bytes) -> bool:
    return not path.is_file() or path.read_bytes() != content


def _damaged(folder: Path, what: str) -> TrustError:
    return TrustError(
        "SAM-K102",
        f"the authority in {folder} is not whole: {what}",
        "Restore the folder from its backup; never make a key anew in it.",
    )
