"""The proxy before the SuperLink: a real nginx, and callers who should not get behind it."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supernode.fleet_http_client import FleetHttpClient

from samaritan.errors import DeploymentError
from samaritan.operate import child
from samaritan.operate import proxy as proxy_module
from samaritan.operate.proxy import configuration, proxy_program
from samaritan.provision import certificates
from samaritan.provision.authority import open_authority
from samaritan.provision.kits import provision, refresh_kits

ROOT = Path(__file__).resolve().parents[1]
needs_nginx = pytest.mark.skipif(
    shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin") is None,
    reason="nginx is not installed",
)
BIG = bytes(range(256)) * 24_000
"""Six million bytes: more than a piece of an adapter as Flower sends it."""

SECRET = b"what the SuperLink says"
FLEET = (
    "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages",
    "get-run", "get-fab", "push-object", "pull-object", "confirm-message-received",
)  # fmt: skip


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class Upstream:
    """A tiny SuperLink: it answers everything, and remembers what reached it."""

    certificate: Path
    key: Path
    seen: list[tuple[str, str, bytes, dict[str, str]]] = field(default_factory=list)

    def start(self) -> ThreadingHTTPServer:
        seen = self.seen

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("content-length", 0))
                body = self.rfile.read(length)
                if self.headers.get("transfer-encoding") == "chunked":
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                seen.append((self.command, self.path, body, dict(self.headers.items())))
                told = BIG if self.path.endswith("pull-object") else SECRET
                self.send_response(200)
                self.send_header("content-length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

            do_GET = do_POST = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = answer

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                pass  # callers that go away are part of the tests

        server = Server(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, self.key)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server


@dataclass(frozen=True)
class Caller:
    """Who shows which certificate."""

    certificate: Path | None = None
    key: Path | None = None


@dataclass
class Proxied:
    """A consortium's proxy, started, with callers of all kinds."""

    kits: Path
    port: int
    upstream: Upstream
    callers: dict[str, Caller]

    def context(self, caller: Caller) -> ssl.SSLContext:
        found = ssl.create_default_context(cafile=str(self.kits / "authority/ca.crt"))
        if caller.certificate is not None:
            found.load_cert_chain(caller.certificate, caller.key)
        return found

    def ask(
        self,
        method: str,
        target: str,
        body: Any = b"",
        who: str = "site",
        headers: dict[str, str] | None = None,
        port: int | None = None,
    ) -> tuple[int, bytes, dict[str, str]]:
        """One request, its target sent as it is written here."""
        connection = http.client.HTTPSConnection(
            "localhost", port or self.port, context=self.context(self.callers[who]), timeout=20
        )
        with contextlib.closing(connection):
            connection.putrequest(method, target, skip_accept_encoding=True)
            for name, value in (headers or {}).items():
                connection.putheader(name, value)
            if not any(name.lower() == "transfer-encoding" for name in headers or {}):
                connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())


@contextlib.contextmanager
def running(kit: Path, port: int, link_port: int) -> Iterator[None]:
    """Nginx for a kit, with the command that supervisord gets."""
    program = proxy_program(kit, "127.0.0.1", port, link_port)
    with (kit / "nginx.out").open("wb") as out:
        process = subprocess.Popen(program.command, stdout=out, stderr=out, cwd=kit)
    try:
        end = time.monotonic() + 20
        while True:
            assert process.poll() is None, (kit / "nginx.out").read_text()
            assert time.monotonic() < end
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(20)


def make_consortium(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    project = {
        "project": "trial",
        "title": "Trial",
        "server": {"hosts": ["localhost"], "port": 9443},
        "sites": [{"name": "Ahus"}, {"name": "Bern"}],
        "keys": "shipped",
    }
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    provision(folder / "project.yaml", folder / "kits")
    return folder / "kits"


def issued(kits: Path, folder: Path, **changes: Any) -> Caller:
    """A caller with a certificate of this authority made as `changes` say."""
    folder.mkdir()
    key = ec.generate_private_key(ec.SECP256R1())
    moment, days = changes.get("moment", certificates.now()), changes.get("days", 9)
    with open_authority(kits / "authority") as authority:
        made = certificates.certify_site(
            authority._signer, key.public_key(), "trial", "Ahus", moment, days
        )
    (folder / "crt").write_bytes(certificates.pem(made))
    (folder / "key").write_bytes(certificates.pkcs8(key))
    return Caller(folder / "crt", folder / "key")


def of_site(kits: Path, name: str) -> Caller:
    return Caller(kits / "sites" / name / "site.crt", kits / "sites" / name / "site.key")


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    folder = tmp_path_factory.mktemp("proxy")
    kits, other = make_consortium(folder / "own"), make_consortium(folder / "other")
    long_ago = certificates.now() - timedelta(days=30)
    callers = {
        "site": of_site(kits, "Ahus"),
        "nobody": Caller(),
        "stranger": of_site(other, "Ahus"),
        "expired": issued(kits, folder / "expired", moment=long_ago, days=9),
        "revoked": of_site(kits, "Bern"),
        "server": Caller(kits / "server/server.crt", kits / "server/server.key"),
        "authority": Caller(kits / "authority/ca.crt", kits / "authority/ca.key"),
    }
    with open_authority(kits / "authority") as authority:
        authority.revoke("Bern")
    refresh_kits(kits / "authority")
    upstream = Upstream(kits / "server/server.crt", kits / "server/server.key")
    server = upstream.start()
    port = free_port()
    with running(kits / "server", port, server.server_address[1]):
        yield Proxied(kits, port, upstream, callers)
    server.shutdown()
    server.server_close()


@pytest.fixture
def reached(proxied: Proxied) -> list[Any]:
    """What has reached the upstream in this test."""
    proxied.upstream.seen.clear()
    return proxied.upstream.seen


# Who belongs here.


@needs_nginx
@pytest.mark.parametrize("name", FLEET)
def test_what_a_node_asks_for_arrives_with_its_body(
    proxied: Proxied, reached: list[Any], name: str
) -> None:
    status, told, _ = proxied.ask("POST", f"/v1/fleet/{name}", b"body \x00\xff")
    assert (status, told) == (200, BIG if name == "pull-object" else SECRET)
    ((method, path, body, headers),) = reached
    assert (method, path, body) == ("POST", f"/v1/fleet/{name}", b"body \x00\xff")
    assert headers["Host"] == "localhost"


@needs_nginx
def test_headers_of_a_node_arrive(proxied: Proxied, reached: list[Any]) -> None:
    """A node proves who it is by headers of Flower's."""
    sent = {"flwr-public-key": "QQ==", "flwr-signature": "Qg==", "flwr-timestamp": "2027"}
    proxied.ask("POST", "/v1/fleet/pull-messages", headers=sent | {"Content-Type": "a/b"})
    assert sent.items() <= {k.lower(): v for k, v in reached[0][3].items()}.items()
    assert reached[0][3]["Content-Type"] == "a/b"


@needs_nginx
@pytest.mark.parametrize("chunked", [False, True])
def test_large_bodies_pass_in_both_directions(
    proxied: Proxied, reached: list[Any], chunked: bool
) -> None:
    if chunked:
        pieces = [f"{len(BIG):x}\r\n".encode(), BIG, b"\r\n0\r\n\r\n"]
        headers = {"Transfer-Encoding": "chunked"}
        status, _, _ = proxied.ask(
            "POST", "/v1/fleet/push-object", b"".join(pieces), headers=headers
        )
    else:
        status, _, _ = proxied.ask("POST", "/v1/fleet/push-object", BIG)
    assert status == 200
    assert reached[0][2] == BIG


@needs_nginx
def test_a_large_answer_reaches_a_slow_site(proxied: Proxied, reached: list[Any]) -> None:
    """It must not need a place on the disk, which nginx's workers may not have."""
    caller = proxied.context(proxied.callers["site"])
    with (
        socket.create_connection(("localhost", proxied.port), 20) as plain,
        caller.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(
            b"POST /v1/fleet/pull-object HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
            b"Connection: close\r\n\r\n"
        )
        time.sleep(0.4)
        data = b""
        while piece := secure.recv(1 << 16):
            data += piece
    assert data.endswith(BIG)
    assert "denied" not in (proxied.kits / "server/nginx.out").read_text()


@needs_nginx
def test_a_body_that_is_too_large_is_refused(proxied: Proxied, reached: list[Any]) -> None:
    head = {"Content-Length": str(100 << 20)}
    status, told, _ = proxied.ask(
        "POST", "/v1/fleet/push-object", b"", headers=head | {"Transfer-Encoding": "identity"}
    )
    assert status in (400, 413, 501)
    assert reached == []
    assert SECRET not in told


# What is not for them.

HIDDEN = [
    "/",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1",
    "/v1/",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/other",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/register-node/",
    "/v1/fleet/register-node?x=1",
    "/v1/fleet/register-node%2f",
    "/v1/fleet/register%2Dnode",
    "/v1/fleet/%72egister-node",
    "/v1/fleet/Register-Node",
    "/v1/fleet//register-node",
    "/v1/fleet/./register-node",
    "/v1/fleet/x/../register-node",
    "/v1/fleet/register-node;x",
    "/v1/fleet/register-node%00",
    "/v1/fleet/register-node%20",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages/../register-node",
    "/v1/fleet/pull-messages%2f..%2fregister-node",
    "/v1/fleet/pull-messagesx",
    "/v1/fleet/xpull-messages",
    "/v1/fleet/pull-messages%0a",
    "/v1/fleet/pull-messages%0d%0aX-Samaritan-Control:%20y",
    "/v1/control/list-runs",
    "//v1/control/list-runs",
    "/v1//control/list-runs",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol%2flist-runs",
    "/v1/fleet/%2e%2e%2fcontrol/list-runs",
    "/v1/fleet/..;/control/list-runs",
    "/v1/fleet/..\\control\\list-runs",
    "/v1/%63ontrol/list-runs",
    "/%76%31/control/list-runs",
    "/V1/CONTROL/list-runs",
    "/v1/runtime/acquire-task",
    "/v1/fleet/../runtime/acquire-task",
    "/v1/fleet/%2e%2e/%2e%2e/docs",
    "http://localhost/v1/control/list-runs",
    "https://localhost/v1/control/list-runs",
    "http://localhost/v1/fleet/../control/list-runs",
]


@needs_nginx
@pytest.mark.parametrize("target", HIDDEN)
def test_nothing_else_reaches_the_superlink(
    proxied: Proxied, reached: list[Any], target: str
) -> None:
    for method in ("POST", "GET", "OPTIONS"):
        status, told, _ = proxied.ask(method, target)
        assert status in (400, 403, 404, 405), (method, status)
        assert SECRET not in told
    assert reached == []


WAYS_ROUND = [
    "/v1/control/../fleet/pull-messages",
    "/v1/control/list-runs/../../fleet/pull-messages",
    "//v1/fleet/pull-messages",
    "/v1/./fleet//pull-messages",
    "/v1/%66leet/pull-messages",
    "/v1/fleet/pull%2Dmessages",
    "/v1/fleet/pull-messages?/../../control/list-runs",
    "/v1/fleet/pull-messages#/v1/control/list-runs",
    "/docs/../v1/fleet/pull-messages",
    "http://localhost/v1/fleet/pull-messages",
    "http://localhost/v1/control/../fleet/pull-messages",
    "/v1/control%2f..%2ffleet/pull-messages",
]


@needs_nginx
@pytest.mark.parametrize("target", WAYS_ROUND)
def test_what_reaches_the_superlink_is_what_was_looked_at(
    proxied: Proxied, reached: list[Any], target: str
) -> None:
    """Nginx decides by a path it has tidied up; the SuperLink must not see another."""
    proxied.ask("POST", target)
    assert {path for _, path, _, _ in reached} <= {"/v1/fleet/pull-messages"}


@needs_nginx
def test_two_requests_in_one_are_not_smuggled(proxied: Proxied, reached: list[Any]) -> None:
    hidden = b"GET /v1/control/list-runs HTTP/1.1\r\nHost: x\r\n\r\n"
    heads = [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Content-Length: 0\r\nContent-Length: 60\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n",
        b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAA\r\n",
    ]
    for head in heads:
        caller = proxied.context(proxied.callers["site"])
        with (
            socket.create_connection(("localhost", proxied.port), 5) as plain,
            caller.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            secure.settimeout(1)
            secure.sendall(
                b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\n"
                + head
                + b"\r\n0\r\n\r\n"
                + hidden
            )
            with contextlib.suppress(OSError):
                while secure.recv(1 << 16):
                    pass
    assert {path for _, path, _, _ in reached} <= {"/v1/fleet/pull-messages"}


# Who does not belong here.


@needs_nginx
@pytest.mark.parametrize("who", ["nobody", "stranger", "expired", "revoked", "server", "authority"])
def test_who_shows_no_good_certificate_gets_nothing(
    proxied: Proxied, reached: list[Any], who: str
) -> None:
    for target in ("/v1/fleet/pull-messages", "/v1/control/list-runs", "/docs", "/"):
        try:
            status, told, headers = proxied.ask("POST", target, who=who)
        except (ssl.SSLError, ConnectionError):
            continue
        assert status in (400, 403)
        text = told + repr(headers).encode()
        for word in (SECRET, b"fleet", b"flwr", b"uvicorn", b"127.0.0.1", b"trial", b"Ahus"):
            assert word not in text
    assert reached == []


@needs_nginx
def test_everybody_who_does_not_belong_here_is_told_as_much(proxied: Proxied) -> None:
    """What is where, nobody learns without a certificate: each path gets the same answer."""
    for who in ("nobody", "expired", "revoked"):
        replies = set()
        for target in ("/v1/fleet/pull-messages", "/v1/control/list-runs", "/nothing"):
            status, told, _ = proxied.ask("POST", target, who=who)
            replies.add((status, told))
        assert len(replies) == 1


@needs_nginx
def test_plain_http_gets_nothing(proxied: Proxied, reached: list[Any]) -> None:
    connection = http.client.HTTPConnection("localhost", proxied.port, timeout=20)
    with contextlib.closing(connection):
        connection.request("POST", "/v1/fleet/pull-messages", b"body")
        answer = connection.getresponse()
        told = answer.read()
    assert answer.status == 400
    assert SECRET not in told
    assert reached == []


@needs_nginx
@pytest.mark.filterwarnings("ignore:.*TLS.*:DeprecationWarning")
def test_old_tls_is_refused(proxied: Proxied) -> None:
    context = proxied.context(proxied.callers["site"])
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with (
        socket.create_connection(("localhost", proxied.port), 20) as plain,
        pytest.raises(ssl.SSLError, match=r"(?i)protocol.version") as caught,
    ):
        context.wrap_socket(plain, server_hostname="localhost")
    assert "ALERT" in str(caught.value)  # it is the server that says so


@needs_nginx
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_new_tls_is_taken(proxied: Proxied, version: str) -> None:
    context = proxied.context(proxied.callers["site"])
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with (
        socket.create_connection(("localhost", proxied.port), 20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        assert secure.version() == version.replace("_", ".")


@needs_nginx
def test_no_version_is_told(proxied: Proxied) -> None:
    for who in ("site", "nobody"):
        _, told, headers = proxied.ask("GET", "/nothing", who=who)
        assert headers["Server"] == "nginx"
        assert not re.search(rb"nginx/\d", told)


# What stands behind it.


@needs_nginx
def test_an_upstream_with_another_certificate_is_not_trusted(
    proxied: Proxied, tmp_path: Path
) -> None:
    other = make_consortium(tmp_path / "other")
    false = Upstream(other / "server/server.crt", other / "server/server.key")
    # One of this consortium, but for a site: it is not for localhost.
    site = Upstream(*(proxied.kits / "sites/Ahus" / name for name in ("site.crt", "site.key")))
    for upstream in (false, site):
        server = upstream.start()
        kit, port = tmp_path / f"kit{server.server_address[1]}", free_port()
        shutil.copytree(proxied.kits / "server", kit)
        with running(kit, port, server.server_address[1]):
            status, told, _ = proxied.ask("POST", "/v1/fleet/pull-messages", port=port)
            assert status == 502
            assert SECRET not in told
            assert upstream.seen == []
            assert proxied.ask("POST", "/v1/fleet/pull-messages", port=proxied.port)[0] == 200
        server.shutdown()
        server.server_close()


@needs_nginx
def test_a_superlink_that_is_down_is_a_bad_gateway(proxied: Proxied, tmp_path: Path) -> None:
    shutil.copytree(proxied.kits / "server", tmp_path / "kit")
    port, link_port = free_port(), free_port()
    with running(tmp_path / "kit", port, link_port):
        status, told, _ = proxied.ask("POST", "/v1/fleet/pull-messages", port=port)
    assert status == 502
    assert str(link_port).encode() not in told


def status_of(context: ssl.SSLContext, port: int, session: Any = None) -> tuple[int, Any, bool]:
    """The status of a node's question, the TLS session, and whether it was an earlier one."""
    with (
        socket.create_connection(("localhost", port), 20) as plain,
        context.wrap_socket(plain, server_hostname="localhost", session=session) as secure,
    ):
        secure.sendall(
            b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n"
            b"Connection: close\r\n\r\n"
        )
        data = b""
        while piece := secure.recv(1 << 16):
            data += piece
        return int(data.split()[1]), secure.session, bool(secure.session_reused)


def workers(master: int) -> set[str]:
    return set(Path(f"/proc/{master}/task/{master}/children").read_text().split())


@needs_nginx
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_site_that_is_revoked_is_turned_away_after_a_reload(tmp_path: Path, version: str) -> None:
    own = make_consortium(tmp_path / "own")
    upstream = Upstream(own / "server/server.crt", own / "server/server.key")
    server = upstream.start()
    port = free_port()
    site = of_site(own, "Ahus")
    context = Proxied(own, port, upstream, {}).context(site)
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with running(own / "server", port, server.server_address[1]):
        status, session, _ = status_of(context, port)
        assert status == 200
        with open_authority(own / "authority") as authority:
            authority.revoke("Ahus")
        refresh_kits(own / "authority")
        master = int((own / "server/run/nginx.pid").read_text())
        before = workers(master)
        subprocess.run(["kill", "-HUP", str(master)], check=True)
        end = time.monotonic() + 20
        while not workers(master) or workers(master) & before:
            assert time.monotonic() < end
            time.sleep(0.02)
        upstream.seen.clear()
        # An earlier session, in which nobody would look at the certificate again, counts no more.
        assert status_of(context, port, session)[::2] == (400, False)
        assert status_of(context, port)[0] == 400
        assert upstream.seen == []
    server.shutdown()
    server.server_close()


@needs_nginx
def test_workers_of_a_proxy_that_was_killed_do_not_go_on(proxied: Proxied, tmp_path: Path) -> None:
    """They would hold the port, and let in who was revoked since."""
    kit, port, old = tmp_path / "kit", free_port(), set[str]()
    shutil.copytree(proxied.kits / "server", kit)
    program = proxy_program(kit, "127.0.0.1", port, proxied.port)
    command = child.command(os.getpid(), kit / "run/proxy.group", {}, program.command)
    for _ in range(2):
        process = subprocess.Popen(
            command, cwd=kit, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            start_new_session=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        end = time.monotonic() + 20
        while not (now := workers(process.pid)) or b"operate" in cmdline(process.pid):
            assert time.monotonic() < end
            assert process.poll() is None
            time.sleep(0.02)
        assert not any(cmdline(int(worker)) for worker in old)
        assert proxied.ask("GET", "/", port=port)[0] == 404
        old = now
        process.kill()
        process.wait(20)
        assert all(cmdline(int(worker)) for worker in old)
    for worker in old:
        os.kill(int(worker), signal.SIGTERM)


def cmdline(process: int) -> bytes:
    """What a process runs; nothing where there is none."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except OSError:
        return b""


@needs_nginx
def test_the_log_says_who_came_and_holds_no_bodies(proxied: Proxied, reached: list[Any]) -> None:
    proxied.ask("POST", "/v1/fleet/pull-messages", b"patient_007", headers={"Cookie": "c=1"})
    proxied.ask("POST", "/v1/fleet/pull-messages", who="revoked")
    end = time.monotonic() + 20
    while "FAILED" not in (log := (proxied.kits / "server/nginx.out").read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)
    (line,) = [line for line in log.splitlines() if '"POST /v1/fleet/pull-messages HTTP' in line][
        -2:-1
    ]
    assert "CN=Ahus" in line
    assert "SUCCESS" in line
    assert "patient_007" not in log
    assert "c=1" not in log


# What nginx is told.


@needs_nginx
@pytest.mark.parametrize("name", ["with space", "100%", "it's", "a;b", "{x}", "#1", "Köln"])
def test_a_kit_may_have_an_odd_path(proxied: Proxied, tmp_path: Path, name: str) -> None:
    kit = tmp_path / name
    shutil.copytree(proxied.kits / "server", kit)
    nginx, *rest = proxy_program(kit, "127.0.0.1", free_port(), 1).command
    done = subprocess.run([nginx, "-t", *rest], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_without_nginx_there_is_no_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(proxy_module.shutil, "which", lambda *_, **__: None)
    with pytest.raises(DeploymentError) as caught:
        proxy_program(tmp_path, "127.0.0.1", 9443, 8000)
    assert caught.value.code == "SAM-N405"


def test_nginx_is_found_where_only_root_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def which(name: str, path: str | None = None) -> str | None:
        return "/usr/sbin/nginx" if path and "/usr/sbin" in path else None

    monkeypatch.setattr(proxy_module.shutil, "which", which)
    command = proxy_program(tmp_path, "127.0.0.1", 9443, 8000).command
    assert command[0] == "/usr/sbin/nginx"
    assert "daemon off;" in command


def test_as_root_the_workers_are_nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for user, line in ((0, "user nobody nogroup;"), (1000, "")):
        monkeypatch.setattr(proxy_module.os, "geteuid", lambda user=user: user)
        text = configuration(tmp_path, "127.0.0.1", 9443, 8000)
        assert text.startswith(line)
        assert ("user nobody" in text) == (user == 0)


def test_what_the_proxy_lets_through_is_what_flowers_node_asks_for() -> None:
    calls: list[str] = []

    class Recorded(FleetHttpClient):
        def _unary_unary(self, **given: Any) -> Any:
            calls.append(given["path"])

    client = Recorded("https://localhost", verify=False)
    for name in dir(FleetHttpClient):
        if name[0].isupper():
            call: Callable[[Any], Any] = getattr(client, name)
            call(None)
    needed = {path.removeprefix("/v1/fleet/") for path in calls}
    assert needed == {*FLEET, "register-node", "unregister-node"}
