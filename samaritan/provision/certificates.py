"""X.509 for one consortium: an authority, its server, its sites, and what was revoked.

Only `cryptography` touches keys. Dates are in UTC and in whole seconds, as certificates have them.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from samaritan.errors import TrustError
from samaritan.provision.project import SERVER

_AUTHORITY_DAYS = 3652
"""Ten years."""

_BACKDATED = timedelta(hours=1)
"""A certificate holds at once at a site whose clock is late."""

_UNREADABLE = (OSError, ValueError, TypeError, UnsupportedAlgorithm)


@dataclass(frozen=True)
class Signer:
    """The authority's key with the certificate that says so."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


def now() -> datetime:
    """This moment, as exactly as a certificate can say it."""
    return datetime.now(UTC).replace(microsecond=0)


def days_left(expires: datetime, moment: datetime) -> int:
    """Whole days until a certificate ends; negative after that."""
    return (expires - moment).days


def serial(certificate: x509.Certificate) -> str:
    """The serial number as people see it elsewhere: 40 hexadecimal digits."""
    return f"{certificate.serial_number:040x}"


def certify_authority(
    key: ec.EllipticCurvePrivateKey, project: str, moment: datetime
) -> x509.Certificate:
    """A certificate of an authority for itself; it signs certificates and lists, no authority."""
    name = _name(project, "authority")
    end = moment + timedelta(days=_AUTHORITY_DAYS)
    builder = _begin(name, name, key.public_key(), moment, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    return builder.sign(key, SHA384())


def certify_server(
    signer: Signer,
    key: ec.EllipticCurvePublicKey,
    project: str,
    hosts: Sequence[str],
    moment: datetime,
    days: int,
) -> x509.Certificate:
    """A certificate by which sites know the server.

    Args:
        signer: The authority.
        key: Public, of the server.
        project: Its short name.
        hosts: DNS names and IP addresses.
        moment: It holds from an hour before.
        days: And so long after, but no longer than the authority's own.
    """
    names = x509.SubjectAlternativeName(list(map(_host, hosts)))
    usage = ExtendedKeyUsageOID.SERVER_AUTH
    return _certify(signer, key, _name(project, SERVER), names, usage, moment, days)


def certify_site(
    signer: Signer,
    key: ec.EllipticCurvePublicKey,
    project: str,
    site: str,
    moment: datetime,
    days: int,
) -> x509.Certificate:
    """A certificate by which the server knows a site; nothing in it is the site's choice but a key.

    Args:
        signer: The authority.
        key: Public, of the site.
        project: Its short name.
        site: Its name.
        moment: It holds from an hour before.
        days: And so long after, but no longer than the authority's own.
    """
    # The text of a URI is ASCII.
    uri = f"urn:samaritan:{project}:site:{quote(site, safe='')}"
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    usage = ExtendedKeyUsageOID.CLIENT_AUTH
    return _certify(signer, key, _name(project, site), names, usage, moment, days)


def server_hosts(certificate: x509.Certificate) -> set[str]:
    """The hosts in a server's certificate."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    return {*names.get_values_for_type(x509.DNSName), *addresses}


def revocation_list(
    signer: Signer, revoked: Mapping[int, datetime], moment: datetime, next_update: datetime
) -> x509.CertificateRevocationList:
    """The signed list of certificates that count no more.

    Args:
        signer: The authority.
        revoked: When, by serial number.
        moment: Now.
        next_update: Who checks a list refuses everybody after this.
    """
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(signer.certificate.subject)
        .last_update(moment - _BACKDATED)
        .next_update(next_update)
        .add_extension(x509.CRLNumber(int(moment.timestamp())), critical=False)
        .add_extension(_signed_by(signer.key.public_key()), critical=False)
    )
    for serial, date in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(date)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(signer.key, SHA384())


def make_request(key: ec.EllipticCurvePrivateKey, project: str, site: str) -> str:
    """A request for a certificate as PEM, signed with the key it is for."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(project, site))
    request = builder.sign(key, SHA384())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def check_request(request: str, site: str) -> ec.EllipticCurvePublicKey:
    """The key of a request for a certificate.

    Args:
        request: As PEM, from anyone.
        site: Whose it claims to be.

    Raises:
        TrustError: SAM-K123 when it is unreadable or not signed with its own key, SAM-K124 when it
            names somebody else, SAM-K125 for another kind of key.
    """
    try:
        read = x509.load_pem_x509_csr(request.encode())
        whole = read.is_signature_valid
        names = common_names(read.subject)
        key = read.public_key()
    except _UNREADABLE as error:
        raise _bad_request("cannot be read") from error
    if not whole:
        raise _bad_request("is not signed with its own key")
    if names != [site]:
        raise TrustError(
            "SAM-K124",
            f"the request of {site} asks for a certificate of {', '.join(names) or 'nobody'}",
            "Ask the site for a new request; nothing was signed.",
        )
    return require_node_key(key)


def require_node_key(key: object) -> ec.EllipticCurvePublicKey:
    """The same key, where it is one that sites use.

    Raises:
        TrustError: SAM-K125 for any other kind.
    """
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1):
        return key
    raise TrustError(
        "SAM-K125",
        "the key of the site is not on the curve P-384",
        "Let Samaritan make the key of the site.",
    )


def read_certificate(path: Path) -> x509.Certificate:
    """A certificate in a PEM file.

    Raises:
        TrustError: SAM-K121 when there is none.
    """
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except _UNREADABLE as error:
        raise TrustError(
            "SAM-K121",
            f"{path} holds no readable certificate",
            "Copy it again from where it was made; it begins with BEGIN CERTIFICATE.",
        ) from error


def read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key in a PEM file, be it PKCS8 or OpenSSH's.

    Raises:
        TrustError: SAM-K122 when there is none.
    """
    try:
        content = path.read_bytes()
        is_openssh = content.startswith(b"-----BEGIN OPENSSH")
        load = serialization.load_ssh_private_key if is_openssh else _load_pem
        key = load(content, None)
        if isinstance(key, ec.EllipticCurvePrivateKey):
            return key
        reason: Exception = TypeError("another kind of key")
    except _UNREADABLE as error:
        reason = error
    raise TrustError(
        "SAM-K122",
        f"{path} holds no readable key",
        "Restore it from the backup; never copy another key over it.",
    ) from reason


def read_node_key(text: str) -> ec.EllipticCurvePublicKey:
    """A public key in OpenSSH's form.

    Raises:
        TrustError: SAM-K125 when it is none that sites use.
    """
    try:
        return require_node_key(serialization.load_ssh_public_key(text.encode()))
    except _UNREADABLE:
        return require_node_key(None)


def common_names(name: x509.Name) -> list[str]:
    """Whom a certificate or request is for; one, where Samaritan made it."""
    return [str(part.value) for part in name.get_attributes_for_oid(NameOID.COMMON_NAME)]


def pkcs8(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as TLS libraries read it; not encrypted."""
    return _private(key, serialization.PrivateFormat.PKCS8)


def openssh(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as Flower reads it; not encrypted."""
    return _private(key, serialization.PrivateFormat.OpenSSH)


def node_key(key: ec.EllipticCurvePublicKey) -> str:
    """A public key in OpenSSH's form, without a comment: equal keys are equal texts."""
    form = serialization.PublicFormat.OpenSSH
    return key.public_bytes(serialization.Encoding.OpenSSH, form).decode()


def pem(signed: x509.Certificate | x509.CertificateRevocationList) -> bytes:
    """A certificate or list as PEM."""
    return signed.public_bytes(serialization.Encoding.PEM)


_load_pem = serialization.load_pem_private_key


def _certify(
    signer: Signer,
    key: ec.EllipticCurvePublicKey,
    subject: x509.Name,
    names: x509.SubjectAlternativeName,
    usage: x509.ObjectIdentifier,
    moment: datetime,
    days: int,
) -> x509.Certificate:
    end = min(moment + timedelta(days=days), signer.certificate.not_valid_after_utc)
    builder = _begin(subject, signer.certificate.subject, key, moment, end)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
    builder = builder.add_extension(_usage(signs_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    builder = builder.add_extension(names, critical=False)
    builder = builder.add_extension(_signed_by(signer.key.public_key()), critical=False)
    return builder.sign(signer.key, SHA384())


def _begin(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    moment: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - _BACKDATED)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _name(project: str, name: str) -> x509.Name:
    return x509.Name([
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, project),
        x509.NameAttribute(NameOID.COMMON_NAME, name),
    ])  # fmt: skip


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _signed_by(key: ec.EllipticCurvePublicKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)


def _private(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _bad_request(what: str) -> TrustError:
    return TrustError(
        "SAM-K123",
        f"the request for a certificate {what}",
        "Ask the site for a new request; nothing was signed.",
    )
