"""The way of a site's keys: made at the site, requested, signed by the authority, taken back.

Private keys stay at the site. A request is signed with the site's identity over all it says, so
comparing one fingerprint by telephone says whether all of it came from the site.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import Field, ValidationError

from samaritan.config import Section
from samaritan.errors import TrustError
from samaritan.files import write_atomically
from samaritan.keys import Identity, is_signed, load_identity, make_identity
from samaritan.lines import canonical
from samaritan.provision import certificates
from samaritan.provision.authority import open_authority
from samaritan.provision.kit import Kit

_PURPOSE = b"samaritan certificate request\n"


class Request(Section):
    """The content of request.json: what a site asks the authority to certify."""

    format: Literal[1] = 1
    project: str
    site: str
    csr: str
    """PEM; signed with the key of the node."""
    node_key: str
    """Public, in OpenSSH's form."""
    identity: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")] = "0" * 128
    """By the identity, over all the rest."""

    def message(self) -> bytes:
        """What is signed."""
        return _PURPOSE + canonical(self.model_dump(mode="json", exclude={"signature"}))


@dataclass(frozen=True)
class Signed:
    """What came of a request.

    Attributes:
        site: Its name.
        certificate: The file that goes back to the site.
        serial: Of the certificate, hexadecimal.
        not_after: When it ends.
        fingerprint: Of the identity, for comparing it with what the site reads out.
    """

    site: str
    certificate: Path
    serial: str
    not_after: datetime
    fingerprint: str


def fingerprint(public_bytes: bytes) -> str:
    """A name of a public key or certificate that people can compare by telephone.

    The first half of its SHA-256, in eight groups of four digits: what `openssl x509 -fingerprint
    -sha256` begins with, and too much for anyone to find another key with the same.
    """
    digits = hashlib.sha256(public_bytes).hexdigest()[:32]
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def kit_fingerprints(kit: Kit) -> dict[str, str]:
    """What a site and the coordinator compare by telephone, read from the files that are used.

    Args:
        kit: Of a site or of the server.

    Returns:
        Fingerprints of `authority` (ca.crt) and `plan_signer`, and of the `identity` where the kit
        has one.

    Raises:
        TrustError: SAM-K121 when ca.crt cannot be read.
        PrivacyError: SAM-P301 when the identity cannot be read.
    """
    prints = {
        "authority": certificate_fingerprint(kit.path("ca.crt")),
        "plan_signer": fingerprint(bytes.fromhex(kit.card.plan_signer)),
    }
    if kit.path("identity.key").is_file():
        prints["identity"] = fingerprint(load_identity(kit.path("identity.key")).public)
    return prints


def certificate_fingerprint(path: Path) -> str:
    """The fingerprint of a certificate in a file.

    Raises:
        TrustError: SAM-K121 when it cannot be read.
    """
    return fingerprint(certificates.read_certificate(path).public_bytes(Encoding.DER))


def site_keys(folder: Path) -> tuple[ec.EllipticCurvePrivateKey, Identity]:
    """A site's two keys; files that are missing are made, those that are there never change.

    Args:
        folder: The kit of the site; holds site.key (for TLS) and node.key (for Flower), which are
            one key, node.pub and identity.key.

    Raises:
        TrustError: SAM-K122 when a key cannot be read, SAM-K125 when it is of another kind,
            SAM-K145 when the files hold different keys.
        PrivacyError: SAM-P301 when the identity cannot be read.
        StorageError: When a file cannot be written.
    """
    site, node, public = (folder / name for name in ("site.key", "node.key", "node.pub"))
    there = [certificates.read_private(path) for path in (site, node) if path.exists()]
    key = there[0] if there else ec.generate_private_key(ec.SECP384R1())
    certificates.require_node_key(key.public_key())
    text = certificates.node_key(key.public_key())
    numbers = {found.private_numbers().private_value for found in there}
    # People may have put a comment after the public key.
    if len(numbers) > 1 or (public.exists() and public.read_text().split()[:2] != text.split()):
        raise TrustError(
            "SAM-K145",
            f"site.key, node.key and node.pub in {folder} do not belong together",
            "Restore them from the backup. If the site has no certificate yet, move all three "
            "away and make a new request.",
        )
    for path, content in ((site, certificates.pkcs8), (node, certificates.openssh)):
        if not path.exists():
            write_atomically(path, content(key), private=True)
    if not public.exists():
        write_atomically(public, f"{text}\n".encode())
    return key, make_identity(folder / "identity.key")


def make_request(kit: Kit) -> Path:
    """At a site: makes the keys that are missing and the request for a certificate.

    Args:
        kit: Of the site.

    Returns:
        request.json in the kit; it holds no secret.

    Raises:
        TrustError: SAM-K122, SAM-K125 or SAM-K145 when keys are there that cannot be used.
        PrivacyError: SAM-P301 when the identity cannot be read.
        StorageError: When a file cannot be written.
    """
    key, identity = site_keys(kit.folder)
    request = Request(
        project=kit.card.project,
        site=kit.card.name,
        csr=certificates.make_request(key, kit.card.project, kit.card.name),
        node_key=certificates.node_key(key.public_key()),
        identity=identity.public.hex(),
    )
    tree = request.model_dump(mode="json")
    tree["signature"] = identity.sign(request.message()).hex()
    path = kit.path("request.json")
    write_atomically(path, json.dumps(tree, indent=1).encode() + b"\n")
    return path


def sign_request(authority: Path, path: Path) -> Signed:
    """At the authority: checks a request and issues the certificate it asks for.

    Whether the request came from the site only its people can say: compare the fingerprint with
    them before the certificate is sent.

    Args:
        authority: The folder.
        path: request.json of the site.

    Raises:
        TrustError: SAM-K141 when the request is unreadable, SAM-K142 when it is for another
            project, SAM-K143 when it is not signed by the identity in it, SAM-K123 to SAM-K125 for
            the request for a certificate in it, SAM-K144 when that is for another key than the
            node's, and what `open_authority` and `Authority.issue_site` raise.
        StorageError: When it cannot be written, or another process works in the folder.
    """
    request = _read_request(path)
    with open_authority(authority) as opened:
        if request.project != opened.project.project:
            raise TrustError(
                "SAM-K142",
                f"{path.name} is for project {request.project}, and this is the authority of "
                f"{opened.project.project}",
                "Name the authority of that project, or ask the site for its request.",
            )
        key = certificates.check_request(request.csr, request.site)
        if certificates.node_key(key) != request.node_key:
            raise TrustError(
                "SAM-K144",
                f"the request of {request.site} asks for a certificate of another key than its "
                "node's",
                "Ask the site for a new request; nothing was signed.",
            )
        issued = opened.issue_site(request.site, key, request.identity)
        return Signed(
            request.site,
            opened.certificate(request.site),
            certificates.serial(issued),
            issued.not_valid_after_utc,
            fingerprint(bytes.fromhex(request.identity)),
        )


def accept_certificate(kit: Kit, path: Path) -> datetime:
    """At a site: puts a certificate in place as site.crt, if it is the one for this site.

    Args:
        kit: Of the site.
        path: What came from the coordinator.

    Returns:
        When the certificate ends.

    Raises:
        TrustError: SAM-K121 when a certificate cannot be read, SAM-K122 when the site's key
            cannot, SAM-K146 when it is not from the authority of the kit, SAM-K147 when it is of
            another site or key, SAM-K148 when it is not good at this time.
        StorageError: When it cannot be written.
    """
    certificate = certificates.read_certificate(path)
    try:
        certificate.verify_directly_issued_by(certificates.read_certificate(kit.path("ca.crt")))
    except (ValueError, TypeError, InvalidSignature) as error:
        raise TrustError(
            "SAM-K146",
            f"{path.name} is not from the authority of this kit",
            "Ask the coordinator by telephone; compare the fingerprint of ca.crt too.",
        ) from error
    if not kit.path("site.key").exists():
        raise TrustError(
            "SAM-K149",
            f"{kit.folder} holds no site.key",
            "Take the kit in which `samaritan site request` was run; a certificate is for its key.",
        )
    key = certificates.read_private(kit.path("site.key"))
    own = certificates.common_names(certificate.subject) == [kit.card.name]
    if not own or certificate.public_key() != key.public_key():
        raise TrustError(
            "SAM-K147",
            f"{path.name} is not for the key of {kit.card.name} in this kit",
            "Send the request.json of this kit to the coordinator, and take what comes back.",
        )
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if not begin <= certificates.now() < end:
        raise TrustError(
            "SAM-K148",
            f"{path.name} is good from {begin:%Y-%m-%d %H:%M} to {end:%Y-%m-%d %H:%M} UTC, "
            "which is not now",
            "Look at this machine's clock; else ask the coordinator for a new certificate.",
        )
    write_atomically(kit.path("site.crt"), certificates.pem(certificate))
    return end


def _read_request(path: Path) -> Request:
    """A request that its identity has signed."""
    try:
        tree: Any = json.loads(path.read_bytes())
        request = Request.model_validate(tree)
        whole = request.model_dump(mode="json") == tree
    except (OSError, ValueError, ValidationError) as error:
        raise _unreadable(path) from error
    if not whole:
        raise _unreadable(path)
    public, signature = bytes.fromhex(request.identity), bytes.fromhex(request.signature)
    if not is_signed(public, request.message(), signature):
        raise TrustError(
            "SAM-K143",
            f"{path.name} is not signed by the identity it names",
            "It was changed on the way, or damaged. Ask the site for it again; nothing was signed.",
        )
    return request


def _unreadable(path: Path) -> TrustError:
    return TrustError(
        "SAM-K141",
        f"{path} is no request of a site",
        "Take request.json from the kit of the site; the same version of Samaritan reads it.",
    )
