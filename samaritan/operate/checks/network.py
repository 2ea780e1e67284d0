"""The way from a site to the server, step by step: name, port, TLS, and what answers behind it.

Each step says what stopped it. The steps go the way that Flower's node goes, through a proxy where
its HTTP library would take one.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.util
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cryptography import x509
from httpx import URL

# Private names of httpx: which proxy its client takes for an address is not told in public.
from httpx._utils import URLPattern, get_environment_proxies

from samaritan.operate.checks.certificates import issued_by
from samaritan.operate.checks.finding import Finding, fine, missing, note

_WAIT_S = 10.0
_NOT_FOUND, _BAD_REQUEST = 404, 400
_SILENT = (502, 503, 504)

HIDDEN = ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/health")
"""Interfaces of Flower's server that nobody outside may see."""

_FLEET = "/v1/fleet/pull-messages"


@dataclass(frozen=True)
class Server:
    """Where a site connects to, and what it shows.

    Attributes:
        host: Of the server.
        port: Of it.
        authority: File of the consortium's authority.
        certificate: The site's; None where this user may not read it or its key.
        key: Of the certificate.
    """

    host: str
    port: int
    authority: Path
    certificate: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class Dated:
    """What an answer said of the time.

    Attributes:
        date: Header of the answer.
        sent: When the question left, by this machine's clock.
        received: When the answer had come.
    """

    date: str
    sent: datetime
    received: datetime


class _Stop(Exception):
    """Holds the finding after which no further step makes sense."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.found)
        self.finding = finding


def proxy_for(host: str, port: int) -> str | None:
    """The proxy that Flower's node would use, by the environment of this process."""
    proxies = {URLPattern(key): value for key, value in get_environment_proxies().items()}
    url = URL(f"https://{_bracketed(host)}:{port}")
    return next((value for key, value in sorted(proxies.items()) if key.matches(url)), None)


def look(server: Server, dated: list[Dated]) -> Iterator[Finding]:
    """Goes to the server as a node would, and tells of each step.

    Args:
        server: Where to.
        dated: Gets what the answers say of the time.
    """
    proxy = proxy_for(server.host, server.port)
    try:
        yield _tell_proxy(server, proxy)
        yield from _walk(server, proxy, dated)
    except _Stop as stop:
        yield stop.finding


def _walk(server: Server, proxy: str | None, dated: list[Dated]) -> Iterator[Finding]:
    place = f"{server.host}:{server.port}"
    host, port = (server.host, server.port) if proxy is None else _place(proxy)
    addresses = _resolve(host, port)
    yield fine("name of the server", f"{host} is {', '.join(addresses)}")
    with _connected(host, port, addresses) as connection:
        if proxy is not None:
            _tunnel(connection, server, proxy)
        yield fine("port of the server", f"{place} can be reached")
        with _greeted(connection, server, proxy) as encrypted:
            yield fine("certificate of the server", "is by the authority in ca.crt, for this host")
            yield from _question(encrypted, server, dated)


def _tell_proxy(server: Server, proxy: str | None) -> Finding:
    if proxy is None:
        return fine("proxy", "none in this environment; the node connects by itself")
    shown = urlsplit(proxy)
    place = f"{shown.scheme}://{shown.hostname}:{shown.port}"  # without a password
    way_out = f"Where there is a direct way, set NO_PROXY={server.host}."
    if shown.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise _Stop(
            missing(
                "proxy",
                "SAM-N630",
                f"{place} speaks SOCKS, which this installation does not",
                f"Name an HTTP proxy that lets CONNECT through in HTTPS_PROXY. {way_out}",
            )
        )
    if shown.scheme == "https":
        raise _Stop(
            note(
                "proxy",
                f"{place} speaks TLS itself; this check cannot go through it, the node can",
                way_out,
                "SAM-N626",
            )
        )
    return note(
        "proxy",
        f"the node goes through {place} (HTTPS_PROXY or ALL_PROXY of this environment)",
        f"It must let CONNECT to port {server.port} through and not open TLS. {way_out} A systemd "
        "unit has an environment of its own.",
        "SAM-N629",
    )


def _resolve(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise _Stop(
            missing(
                "name of the server",
                "SAM-N631",
                f"{host} has no address here ({error.strerror or error})",
                "Ask the hospital's IT to let this name be resolved, or put its address, which the "
                "coordinator knows, into /etc/hosts.",
            )
        ) from error
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


@contextlib.contextmanager
def _connected(host: str, port: int, addresses: list[str]) -> Iterator[socket.socket]:
    reasons = []
    for address in addresses:
        try:
            connection = socket.create_connection((address, port), _WAIT_S)
        except OSError as error:
            reasons.append((address, error))
            continue
        with connection:
            yield connection
        return
    address, reason = reasons[0]
    if isinstance(reason, TimeoutError):
        said = f"{address} port {port} does not answer in {_WAIT_S:g} s"
        hint = f"A firewall swallows it: ask IT to open outgoing TCP to {address} port {port}."
    elif isinstance(reason, ConnectionRefusedError):
        said = f"{address} port {port} refuses connections"
        hint = (
            "The server is not running, or a firewall rejects it. Ask the coordinator whether "
            f"other sites connect; if they do, ask IT for outgoing TCP to {address} port {port}."
        )
    else:
        said = f"{address} port {port} cannot be reached ({reason.strerror or reason})"
        hint = f"Ask IT for a route and outgoing TCP to {address} port {port}."
    raise _Stop(missing("port of the server", "SAM-N632", said, hint))


def _tunnel(connection: socket.socket, server: Server, proxy: str) -> None:
    """Asks a proxy for a way through."""
    place = f"{_bracketed(server.host)}:{server.port}"
    shown = urlsplit(proxy)
    known = ""
    if shown.username is not None:
        pair = f"{unquote(shown.username)}:{unquote(shown.password or '')}".encode()
        known = f"Proxy-Authorization: Basic {base64.b64encode(pair).decode()}\r\n"
    try:
        head = f"CONNECT {place} HTTP/1.1\r\nHost: {place}\r\n{known}\r\n"
        connection.sendall(head.encode())
        answer = http.client.HTTPResponse(connection, method="CONNECT")
        answer.begin()
        said = f"{answer.status} {answer.reason}"
        if answer.status == 200:
            return
    except (OSError, http.client.HTTPException) as error:
        said = type(error).__name__
    raise _Stop(
        missing(
            "port of the server",
            "SAM-N628",
            f"the proxy does not let CONNECT {place} through: {said}",
            f"Ask IT to allow it there, or for a direct way and NO_PROXY={server.host}.",
        )
    )


@contextlib.contextmanager
def _greeted(
    connection: socket.socket, server: Server, proxy: str | None
) -> Iterator[ssl.SSLSocket]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(server.authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if server.certificate is not None and server.key is not None:
        context.load_cert_chain(server.certificate, server.key)
    try:
        encrypted = context.wrap_socket(connection, server_hostname=server.host)
    except ssl.SSLCertVerificationError as error:
        raise _Stop(_unknown_server(server, proxy, error)) from error
    except OSError as error:
        raise _Stop(_no_tls(server, proxy, error)) from error
    with encrypted:
        yield encrypted


def _unknown_server(
    server: Server, proxy: str | None, error: ssl.SSLCertVerificationError
) -> Finding:
    """Why the certificate of whoever answered was not taken."""
    what = "certificate of the server"
    shown = _shown_certificate(server, proxy)
    authority = x509.load_pem_x509_certificate(server.authority.read_bytes())
    if shown is None:
        return missing(what, "SAM-N637", f"TLS failed: {error.verify_message}", _ASK_BOTH)
    if not issued_by(shown, authority):
        return missing(
            what,
            "SAM-N633",
            f"is not by the authority in ca.crt: subject {shown.subject.rfc4514_string()}, issuer "
            f"{shown.issuer.rfc4514_string()}",
            "If the issuer is your hospital or a firewall, it opens TLS: ask IT to let "
            f"{server.host} port {server.port} pass unopened. Else somebody stands in between, or "
            "the kit is of another consortium: telephone the coordinator. Nothing was sent.",
        )
    if error.verify_message.startswith(("Hostname mismatch", "IP address mismatch")):
        hosts = ", ".join(_hosts(shown))
        return missing(
            what,
            "SAM-N634",
            f"is for {hosts}, and not for {server.host}",
            "Tell the coordinator: server.hosts in project.yaml lacks this name.",
        )
    return missing(
        what,
        "SAM-N635",
        f"is good from {shown.not_valid_before_utc:%Y-%m-%d %H:%M} to "
        f"{shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M}",
        "Look at the clock of this machine; if it is right, the coordinator has to renew it: "
        "`samaritan authority renew DIR server`.",
    )


def _no_tls(server: Server, proxy: str | None, error: OSError) -> Finding:
    what = "certificate of the server"
    if said := _plain_answer(server, proxy):
        return missing(
            what,
            "SAM-N636",
            f"{server.host}:{server.port} does not speak TLS but plain HTTP ({said})",
            "A proxy or a login page answers in place of the server, or another program has its "
            "port. Ask IT; if there is no proxy, ask the coordinator.",
        )
    return missing(
        what,
        "SAM-N637",
        f"TLS ended before it began: {getattr(error, 'reason', None) or type(error).__name__}",
        _ASK_BOTH,
    )


_ASK_BOTH = (
    "Ask the hospital's IT whether a firewall looks into TLS, and the coordinator whether other "
    "sites connect."
)


def _question(encrypted: ssl.SSLSocket, server: Server, dated: list[Dated]) -> Iterator[Finding]:
    """Asks for what must be there, and for what must not."""
    try:
        status, body = _ask(encrypted, server, "/", dated)
        if status == _BAD_REQUEST and b"certificate" in body.lower():
            yield _refused(server, body)
            return
        if status != _NOT_FOUND:
            yield missing(
                "server",
                "SAM-N638",
                f"something else answers with this certificate (status {status})",
                "Ask the coordinator what runs at that port.",
            )
            return
        if server.certificate is not None:
            yield fine("certificate at the server", "the server takes it")
        seen = {path: _ask(encrypted, server, path, dated)[0] for path in HIDDEN}
        yield _tell_hidden({path: status for path, status in seen.items() if status != _NOT_FOUND})
        status, _ = _ask(encrypted, server, _FLEET, dated)
        if status in _SILENT:
            yield note(
                "Flower's server",
                f"does not answer behind the proxy (status {status})",
                "The coordinator can look with `samaritan server status`; this site can start, and "
                "waits for it.",
                "SAM-N640",
            )
        else:
            yield fine("Flower's server", "answers behind the proxy")
    except (OSError, http.client.HTTPException) as error:
        # A server may also refuse a certificate by an alert, which comes with the first answer.
        if "ALERT" in str(getattr(error, "reason", "")):
            yield _refused(server, str(error).encode())
        else:
            yield missing(
                "server",
                "SAM-N637",
                f"ended the connection without an answer ({type(error).__name__})",
                _ASK_BOTH,
            )


def _refused(server: Server, body: bytes) -> Finding:
    if server.certificate is None:
        return note(
            "certificate at the server",
            "was not shown: this user cannot read it and its key",
            "Run this check as root or as the courier's user.",
        )
    said = "asks for one and saw none" if b"No required" in body else "does not take it"
    return missing(
        "certificate at the server",
        "SAM-N639",
        f"the server {said}",
        "If its dates above are right, it was revoked, the server has another authority, or its "
        "list of revoked certificates is out of date: telephone the coordinator.",
    )


def _tell_hidden(seen: dict[str, int]) -> Finding:
    if not seen:
        return fine("interfaces of the server", "only that of nodes can be seen from here")
    told = ", ".join(f"{path} (status {status})" for path, status in seen.items())
    return missing(
        "interfaces of the server",
        "SAM-N627",
        f"can be seen from outside: {told}",
        "Tell the coordinator at once: whoever reaches these could start runs at all sites. The "
        "proxy that `samaritan server start` runs does not show them. Do not start this site.",
    )


def _ask(
    encrypted: ssl.SSLSocket, server: Server, path: str, dated: list[Dated]
) -> tuple[int, bytes]:
    sent = datetime.now(UTC)
    host = f"{_bracketed(server.host)}:{server.port}"
    encrypted.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    answer = http.client.HTTPResponse(encrypted, method="GET")
    answer.begin()
    received = datetime.now(UTC)
    if date := answer.getheader("Date"):
        dated.append(Dated(date, sent, received))
    return answer.status, answer.read()


def _shown_certificate(server: Server, proxy: str | None) -> x509.Certificate | None:
    """What answers shows as its certificate; nothing is sent to it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        contextlib.suppress(OSError, ValueError, _Stop),
        _again(server, proxy) as connection,
        context.wrap_socket(connection, server_hostname=server.host) as encrypted,
    ):
        if shown := encrypted.getpeercert(binary_form=True):
            return x509.load_der_x509_certificate(shown)
    return None


def _plain_answer(server: Server, proxy: str | None) -> str:
    """First line of an answer without TLS; empty when there is none."""
    with contextlib.suppress(OSError, _Stop), _again(server, proxy) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        answer = connection.recv(2000)
        # nginx says in plain HTTP that it speaks TLS.
        if answer.startswith(b"HTTP/") and b"sent to HTTPS port" not in answer:
            return answer.split(b"\r\n")[0].decode("latin-1")
    return ""


@contextlib.contextmanager
def _again(server: Server, proxy: str | None) -> Iterator[socket.socket]:
    host, port = (server.host, server.port) if proxy is None else _place(proxy)
    with _connected(host, port, _resolve(host, port)) as connection:
        if proxy is not None:
            _tunnel(connection, server, proxy)
        yield connection


def _hosts(certificate: x509.Certificate) -> list[str]:
    with contextlib.suppress(x509.ExtensionNotFound):
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        addresses = map(str, names.get_values_for_type(x509.IPAddress))
        return [*names.get_values_for_type(x509.DNSName), *addresses]
    return []


def _place(proxy: str) -> tuple[str, int]:
    parts = urlsplit(proxy)
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
