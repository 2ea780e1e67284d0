"""A certificate of a kit: by the authority of the kit, for the key beside it, good today."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.x509.oid import NameOID

from samaritan.operate.checks.finding import Finding, fine, missing, note

WARNING_DAYS = 30
"""From so many days before its end, a certificate should be renewed."""

_BACKDATED = timedelta(hours=1)
"""Certificates are made to hold from an hour before they are made."""


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether an authority has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def made(certificate: x509.Certificate) -> datetime:
    """When a certificate was made: no clock of its consortium can be earlier today."""
    return certificate.not_valid_before_utc + _BACKDATED


def certificate(
    what: str,
    found: x509.Certificate,
    authority: x509.Certificate,
    key: PublicKeyTypes | None,
    owner: str,
    moment: datetime,
    renewal: str,
) -> Iterator[Finding]:
    """Looks at a certificate; the first fault ends it.

    Args:
        what: Name of its file.
        found: The certificate.
        authority: That of the kit.
        key: The public half of the key it must belong to; None where nobody may look at the key.
        owner: Whom it must be for.
        moment: Now.
        renewal: How a new one is made.
    """
    names = [str(part.value) for part in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if not issued_by(found, authority):
        yield missing(
            what,
            "SAM-N611",
            f"is not by the authority in ca.crt but by {found.issuer.rfc4514_string()}",
            "Put the certificate of this consortium back, as the coordinator sent it; compare the "
            "fingerprint of ca.crt by telephone.",
        )
    elif key is not None and found.public_key() != key:
        yield missing(
            what,
            "SAM-N612",
            "is for another key than the one beside it",
            "Restore the key from the backup; where it is lost, ask for a new certificate.",
        )
    elif names != [owner]:
        yield missing(
            what,
            "SAM-N616",
            f"is for {', '.join(names) or 'nobody'}, and this kit is that of {owner}",
            "Take the certificate that was issued for this kit.",
        )
    else:
        yield dates(what, found, moment, renewal)


def dates(what: str, found: x509.Certificate, moment: datetime, renewal: str) -> Finding:
    """Whether a certificate is good at a moment, and for how long."""
    begin, end = found.not_valid_before_utc, found.not_valid_after_utc
    if moment < begin:
        return missing(
            what,
            "SAM-N613",
            f"is good from {begin:%Y-%m-%d %H:%M} UTC on; the clock of this machine says "
            f"{moment:%Y-%m-%d %H:%M}",
            "The certificate was made an hour after that, so this machine's clock is late: set it "
            "(timedatectl). If it is right, the clock of the coordinator was wrong.",
        )
    if moment >= end:
        return missing(
            what,
            "SAM-N614",
            f"has ended on {end:%Y-%m-%d %H:%M} UTC, {(moment - end).days} days ago by this "
            "machine's clock",
            renewal,
        )
    days = (end - moment).days
    text = f"good until {end:%Y-%m-%d} ({days} days)"
    if days < WARNING_DAYS:
        return note(what, text, renewal, "SAM-N615")
    return fine(what, text)


def revocations(
    what: str, found: x509.CertificateRevocationList, authority: x509.Certificate, moment: datetime
) -> Finding:
    """Whether a list of revoked certificates is the authority's, and not out of date."""
    key = authority.public_key()
    refresh = "Copy crl.pem from the authority's folder; every signing and renewal writes it anew."
    if not isinstance(key, ec.EllipticCurvePublicKey) or not found.is_signature_valid(key):
        return missing(what, "SAM-N617", "is not signed by the authority in ca.crt", refresh)
    end = found.next_update_utc
    if end is None or end <= moment:
        said = "never" if end is None else f"on {end:%Y-%m-%d}"
        return missing(
            what, "SAM-N618", f"was to be replaced {said}; the proxy lets nobody in", refresh
        )
    text = f"{len(list(found))} revoked, good until {end:%Y-%m-%d} ({(end - moment).days} days)"
    if (end - moment).days < WARNING_DAYS:
        return note(what, text, refresh, "SAM-N619")
    return fine(what, text)
