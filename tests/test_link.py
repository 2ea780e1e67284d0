"""The lock on Flower's SuperLink: its real app over TLS, asked by those who should get nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import http.client
import importlib
import inspect
import io
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flwr
import httpx
import pytest
import uvicorn
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from fastapi.routing import iter_route_contexts
from flwr.proto.control_pb2 import RegisterNodeRequest, StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    ActivateNodeResponse,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, AcquireTaskResponse
from flwr.supercore.auth import create_superexec_auth_metadata, derive_auth_secret
from flwr.supercore.primitives.asymmetric import sign_message

from samaritan.errors import DeploymentError
from samaritan.operate.flower import flower_environment
from samaritan.provision.kit import Kit, load_kit
from samaritan.provision.kits import provision
from server import bundle as bundle_module
from server import link as link_module
from server.bundle import PLAN_KEY, build_bundle, bundle_sha256
from server.control import Control, connect
from server.home import CONTROL_HEADER, SECRET_VARIABLE
from server.nodes import der_of, key_of
from server.processes import server_programs
from server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[1]
SITES = ("Northside", "Southside")
STUDY = "5a" * 32
BUNDLE = build_bundle()
PROTOBUF = {"content-type": "application/protobuf"}
OPEN_TO_NODES = {
    "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages",
    "get-run", "get-fab", "push-object", "pull-object", "confirm-message-received",
}  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """What came back: status, headers without the date, body."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass
class Link:
    """A SuperLink as `server.link` starts it, serving on loopback."""

    kit: Kit
    settings: ServerSettings
    app: Any
    port: int

    @property
    def state(self) -> Any:
        return self.app.state.linkstate_factory.state()

    @property
    def secret(self) -> bytes:
        return self.kit.path("control.secret").read_bytes()

    def contents(self) -> tuple[Any, ...]:
        """What an intruder would have changed."""
        runs = [(run.run_id, run.status.status) for run in self.state.get_run_info()]
        nodes = [(node.node_id, node.status) for node in self.state.get_node_info()]
        return sorted(runs), sorted(nodes)

    def ask(self, method: str, target: str, headers: Any = (), body: bytes = b"") -> Reply:
        """One request, its target sent as it is written here."""
        trusted = ssl.create_default_context(cafile=str(self.kit.path("ca.crt")))
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, context=trusted, timeout=20
        )
        with contextlib.closing(connection):
            connection.putrequest(method, target, skip_accept_encoding=True)
            given = list(headers.items()) if isinstance(headers, dict) else list(headers)
            for name, value in given:
                connection.putheader(name, value)
            connection.putheader("content-length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            told = sorted((k.lower(), v) for k, v in answer.getheaders() if k.lower() != "date")
            return Reply(answer.status, tuple(told), answer.read())

    def control(self) -> contextlib.AbstractContextManager[Control]:
        return connect(self.kit, self.settings)

    def site_key(self, site: str) -> ec.EllipticCurvePrivateKey:
        path = self.kit.folder.parent / "sites" / site / "node.key"
        try:
            found = load_ssh_private_key(path.read_bytes(), None)
        except ValueError:
            found = load_pem_private_key(path.read_bytes(), None)
        assert isinstance(found, ec.EllipticCurvePrivateKey)
        return found

    def node_keys(self) -> dict[str, str]:
        folder = self.kit.folder.parent / "sites"
        return {site: (folder / site / "node.pub").read_text().strip() for site in SITES}


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Link]:
    """The app that `server.link` gives uvicorn, with the options of the server's own processes."""
    folder = tmp_path_factory.mktemp("link")
    project = {
        "project": "trial",
        "title": "Trial",
        "server": {"hosts": ["localhost"], "port": 9443},
        "sites": [{"name": site} for site in SITES],
        "keys": "shipped",
    }
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    provision(folder / "project.yaml", folder / "kits")
    kit = load_kit(folder / "kits/server", "server")
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(64)
        port = int(listening.getsockname()[1])
        settings = ServerSettings(link_port=port)
        given: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "samaritan.operate.proxy.shutil.which", lambda *_, **__: "/usr/sbin/nginx"
            )
            program = server_programs(kit, settings)[0]
            assert program.command[1:3] == ("-m", "server.link")
            for name, value in program.environment.items():
                patch.setenv(name, value)
            patch.setattr("flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED", "0")
            patch.setattr(sys, "argv", list(program.command[2:]))
            patch.setattr(uvicorn, "run", lambda **options: given.update(options))
            # `main` puts its own in this place; this puts Flower's back.
            patch.setattr("flwr.superlink.extensions.get_middleware", lambda: ())
            link_module.main()
        assert (given["host"], given["port"]) == ("127.0.0.1", port)
        server = uvicorn.Server(
            uvicorn.Config(
                given["app"],
                ssl_keyfile=given["ssl_keyfile"],
                ssl_certfile=given["ssl_certfile"],
                log_config=None,
                access_log=False,
            )
        )
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while not server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        yield Link(kit, settings, given["app"], port)
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def admitted(link: Link) -> Iterator[dict[str, int]]:
    """Node ids of both sites, which may connect; after the test nothing runs."""
    with link.control() as control:
        control.admit(link.node_keys())
        ids = {node.name: node.node_id for node in control.nodes()}
    yield {site: ids[site] for site in SITES}
    with link.control() as control:
        for run in control.unfinished():
            control.stop(run.run_id)


def routes(link: Link) -> list[tuple[str, str]]:
    """Every method and path the app answers to."""
    found = []
    for context in iter_route_contexts(link.app.routes):
        path, methods = context.route.path, context.route.methods or set()
        found += [(method, path) for method in sorted(methods)]
    return sorted(set(found))


def locked_routes(link: Link) -> list[tuple[str, str]]:
    """All but what nodes and the ServerApp need, which have checks of their own."""
    free = {"/health", *(f"/v1/fleet/{name}" for name in OPEN_TO_NODES)}
    return [
        (method, path)
        for method, path in routes(link)
        if path not in free and not path.startswith("/v1/runtime/")
    ]


def harmful_body(path: str) -> bytes:
    """A body with which the request would do what it is for."""
    pem = public_pem(ec.generate_private_key(ec.SECP256R1()))
    if path.endswith("start-run"):
        content = BUNDLE
        fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
        return StartRunRequest(fab=fab).SerializeToString()
    if path.endswith("fleet/register-node"):
        return RegisterNodeFleetRequest(public_key=pem).SerializeToString()
    if path.endswith("register-node"):
        return RegisterNodeRequest(public_key=pem, name="intruder").SerializeToString()
    return b""


def public_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def signed_by(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers with which a Flower node shows that it owns a key."""
    timestamp = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    return PROTOBUF | {
        "flwr-public-key": base64.b64encode(public_pem(key)).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": base64.b64encode(sign_message(key, timestamp.encode())).decode(),
    }


# Without the secret.


def test_there_is_much_to_lock(link: Link) -> None:
    locked = locked_routes(link)
    paths = {path for _, path in locked}
    assert {
        "/docs",
        "/openapi.json",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
    } < paths
    assert sum(path.startswith("/v1/control/") for path in paths) > 40
    fleet = {path for _, path in routes(link) if path.startswith("/v1/fleet/")}
    names = {path.removeprefix("/v1/fleet/") for path in fleet}
    assert names == OPEN_TO_NODES | {"register-node", "unregister-node"}


def test_without_the_secret_no_locked_route_answers_or_does_anything(link: Link) -> None:
    before = link.contents()
    seen = {
        link.ask(method, path, PROTOBUF, harmful_body(path)) for method, path in locked_routes(link)
    }
    assert {(reply.status, reply.body) for reply in seen} == {(401, b"")}
    assert len(seen) == 1  # always the same answer: it tells nothing of what is behind
    assert link.contents() == before


def shown(link: Link) -> dict[str, list[tuple[str, str]]]:
    right = link.secret.decode()
    other = base64.b64encode(bytes(48)).decode()
    header = CONTROL_HEADER
    return {
        "none": [],
        "empty": [(header, "")],
        "blank": [(header, " ")],
        "wrong": [(header, other)],
        "start": [(header, right[:-1])],
        "longer": [(header, right + "A")],
        "other case": [(header, right.swapcase())],
        "two in one": [(header, f"{right}, {right}")],
        "the right one first": [(header, right), (header, other)],
        "quoted": [(header, f'"{right}"')],
        "bearer": [("authorization", f"Bearer {right}")],
        "cookie": [("cookie", f"{header}={right}")],
        "not text": [(header, "\xff\xfe")],
        "superexec": [(header, link.kit.path("superexec.secret").read_text())],
    }


@pytest.mark.parametrize(
    "name",
    [
        "none", "empty", "blank", "wrong", "start", "longer", "other case", "two in one",
        "the right one first", "quoted", "bearer", "cookie", "not text", "superexec",
    ],
)  # fmt: skip
def test_a_wrong_secret_opens_nothing_and_is_answered_like_none(link: Link, name: str) -> None:
    before = link.contents()
    nothing = link.ask("POST", "/v1/control/start-run", PROTOBUF, harmful_body("start-run"))
    for path in ("/v1/control/start-run", "/v1/control/register-node", "/docs"):
        method = "GET" if path == "/docs" else "POST"
        headers = [*PROTOBUF.items(), *shown(link)[name]]
        assert link.ask(method, path, headers, harmful_body(path)) == nothing
    assert nothing.status == 401
    assert link.contents() == before


def test_secrets_are_compared_in_constant_time(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return False

    monkeypatch.setattr(link_module.hmac, "compare_digest", compare)
    assert link.ask("GET", "/docs", {CONTROL_HEADER: "something"}).status == 401
    assert compared == [(b"something", link.secret)]


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "GET", "PUT", "DELETE", "TRACE", "PATCH"])
def test_no_other_method_gets_past(link: Link, method: str) -> None:
    for path in ("/v1/control/list-runs", "/docs", "/openapi.json", "/v1/fleet/register-node"):
        assert link.ask(method, path).status == 401


TRICKS = [
    "//v1/control/list-runs",
    "/v1//control/list-runs",
    "/v1/control//list-runs",
    "/v1/control/list-runs/",
    "/v1/control/list-runs?x=/v1/fleet/",
    "/v1/control/list-runs#/v1/fleet/",
    "/V1/CONTROL/LIST-RUNS",
    "/v1/Control/list-runs",
    "/v1/%63ontrol/list-runs",
    "/%76%31/control/list-runs",
    "/v1%2Fcontrol%2Flist-runs",
    "/v1/control%2flist-runs",
    "/v1/fleet/../control/list-runs",
    "/v1/fleet/%2e%2e/control/list-runs",
    "/v1/fleet/..%2fcontrol/list-runs",
    "/v1/fleet/%2e%2e%2fcontrol%2flist-runs",
    "/v1/fleet/..\\control\\list-runs",
    "/v1/fleet/;/../../control/list-runs",
    "/v1/runtime/../control/list-runs",
    "/health/../v1/control/list-runs",
    "/health/%2e%2e/docs",
    "/healthy",
    "/v1/fleet/%00/../control/list-runs",
    "/v1/fleet/../../docs",
    "/v1/fleet/%0d%0aX:y",
    "/./v1/control/list-runs",
    "/v1/./control/list-runs",
    "/v1/fleet/./register-node",
    "/v1/fleet//register-node",
    "/v1/fleet/register-node/",
    "/v1/fleet/register-node%2f",
    "/v1/fleet/%72egister-node",
    "/v1/fleet/Register-Node",
    "/v1/fleet/register%2dnode",
    "/v1/fleet/x/../register-node",
    "http://localhost/v1/control/list-runs",
    "https://localhost/v1/control/list-runs",
    "http://localhost/v1/fleet/../control/list-runs",
    "/v1/fleet/http://localhost/v1/control/list-runs",
    "v1/control/list-runs",
    "*",
]


@pytest.mark.parametrize("target", TRICKS)
def test_no_trick_with_the_path_gets_past(link: Link, target: str) -> None:
    before = link.contents()
    for method in ("POST", "GET"):
        body = harmful_body("fleet/register-node" if "egister" in target else "start-run")
        reply = link.ask(method, target, PROTOBUF, body)
        # Either the lock answers, or Flower finds nothing there; never a route behind the lock.
        assert reply.status in (400, 401, 404, 405), (method, target)
        assert b"run" not in reply.body.lower()
    assert link.contents() == before


@pytest.mark.parametrize(
    ("path", "passes"),
    [
        ("/v1/fleet/pull-messages", True),
        ("/v1/runtime/acquire-task", True),
        ("/health", True),
        ("/v1/fleet/register-node", False),
        ("/v1/fleet/unregister-node/", False),
        ("/v1/fleet", False),
        ("/v1/fleets/x", False),
        ("/V1/fleet/x", False),
        ("/v1/control/v1/fleet/x", False),
        ("/v1/control/health", False),
        (" /v1/fleet/x", False),
        ("", False),
    ],
)
def test_a_path_passes_by_its_beginning(path: str, passes: bool) -> None:
    passed: list[Any] = []

    async def app(*given: Any) -> None:
        passed.append(given)

    async def send(message: Any) -> None:
        assert message.get("status", 401) == 401

    for kind in ("http", "websocket"):
        scope = {"type": kind, "path": path, "headers": []}
        asyncio.run(link_module.Locked(app, b"secret")(scope, None, send))  # type: ignore[arg-type]
    assert len(passed) == (2 if passes else 0)


@pytest.mark.parametrize(
    "headers",
    [
        {"x-forwarded-prefix": "/v1/fleet"},
        {"x-original-url": "/v1/control/list-runs"},
        {"x-rewrite-url": "/v1/control/list-runs"},
        {"x-http-method-override": "POST"},
        {"forwarded": "for=127.0.0.1;host=localhost"},
    ],
    ids=lambda headers: next(iter(headers)),
)
def test_no_header_moves_a_request(link: Link, headers: dict[str, str]) -> None:
    assert link.ask("POST", "/v1/control/list-runs", PROTOBUF | headers).status == 401
    reply = link.ask("POST", "/v1/fleet/nothing", PROTOBUF | headers)
    assert reply.status in (401, 404)


def test_a_host_that_looks_like_a_path_does_not_hide_a_node_from_its_check(link: Link) -> None:
    """Flower chooses its checks by the address of a request, of which the host is a part."""
    body = PullMessagesRequest(node=Node(node_id=1)).SerializeToString()
    for host in ("x/v1/runtime/pull-object?", "x/health?", "x#", "x\\v1\\runtime"):
        for name in sorted(OPEN_TO_NODES - {"activate-node", "push-messages"}):
            headers = [*PROTOBUF.items(), ("Host", host)]
            assert raw(link, f"/v1/fleet/{name}", headers, body) in (400, 401), (host, name)


def raw(link: Link, target: str, headers: list[tuple[str, str]], body: bytes) -> int:
    """The status of a request with a Host of its own."""
    lines = [f"POST {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    lines += [f"content-length: {len(body)}", "connection: close", "", ""]
    trusted = ssl.create_default_context(cafile=str(link.kit.path("ca.crt")))
    with (
        socket.create_connection(("127.0.0.1", link.port), 20) as plain,
        trusted.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall("\r\n".join(lines).encode() + body)
        return int(secure.recv(64).split()[1])


def test_a_websocket_gets_nothing(link: Link) -> None:
    headers = {
        "connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
        "sec-websocket-key": base64.b64encode(bytes(16)).decode(),
    }  # fmt: skip
    for path in ("/v1/control/stream-logs", "/docs"):
        assert link.ask("GET", path, headers).status in (400, 401, 403)


def test_plain_text_gets_nothing(link: Link) -> None:
    with socket.create_connection(("127.0.0.1", link.port), 20) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        plain.settimeout(20)
        with contextlib.suppress(ConnectionError):
            assert b"HTTP" not in plain.recv(1000)


def test_health_is_open(link: Link) -> None:
    assert link.ask("GET", "/health").status == 200


# With the secret.


def test_who_has_the_secret_starts_finds_and_stops_runs(link: Link) -> None:
    with link.control() as control:
        known = {run.run_id for run in control.runs()}
        run_id = control.start(STUDY)
        assert run_id not in known
        (run,) = control.unfinished()
        assert (run.run_id, run.fab_hash) == (run_id, bundle_sha256())
        assert run.override_config[PLAN_KEY].string == STUDY
        assert control.run(run_id).status.status == "pending"
        assert link.state.get_fab(bundle_sha256()).content == build_bundle()
        control.stop(run_id)
        assert control.unfinished() == []
        ended = control.run(run_id).status
        assert (ended.status, ended.sub_status) == ("finished", "stopped")
        assert {run.run_id for run in control.runs()} == known | {run_id}


def new_key() -> tuple[ec.EllipticCurvePrivateKey, str]:
    """A key, and its public half as OpenSSH writes it."""
    key = ec.generate_private_key(ec.SECP256R1())
    ssh = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return key, ssh.decode()


def test_sites_of_a_plan_are_admitted_and_come_back_in_a_later_one(link: Link) -> None:
    (_, west), (_, east), (_, other) = new_key(), new_key(), new_key()

    def there(control: Control) -> dict[str, bytes]:
        return {
            node.name: der_of(node.public_key)
            for node in control.nodes()
            if node.status != "unregistered" and node.name not in SITES
        }

    with link.control() as control:
        assert control.admit({"west": west}) == ["west may connect"]
        assert there(control) == {"west": key_of(west)}
        assert control.admit({"west": west + " a comment"}) == []
        # Another study with another site, and the first one again: nobody has lost anything.
        assert control.admit({"east": east}) == ["east may connect"]
        assert control.admit({"west": west, "east": east}) == []
        assert there(control) == {"west": key_of(west), "east": key_of(east)}
        # A site that has another key now; Flower does not take the older one back.
        assert control.admit({"west": other}) == [
            "west may no longer connect with an older key", "west may connect"
        ]  # fmt: skip
        assert there(control) == {"west": key_of(other), "east": key_of(east)}
        changes = control.admit({"west": west, "east": east})
        assert changes[1:] == ["west may not connect: its key was sent away, it needs a new one"]
        assert there(control) == {"east": key_of(east)}
        _, newest = new_key()
        assert control.admit({"west": newest}) == ["west may connect"]


def test_docs_are_there_for_who_shows_the_secret(link: Link) -> None:
    headers = {CONTROL_HEADER: link.secret.decode()}
    assert link.ask("GET", "/openapi.json", headers).status == 200


# What is open has its own checks.


def sealed_acquisition(secret: bytes, request: AcquireTaskRequest) -> dict[str, str]:
    metadata = create_superexec_auth_metadata(
        auth_secret=derive_auth_secret(secret),
        method="/flwr.proto.Runtime/AcquireTask",
        request=request,
    )
    return {name: str(value) for name, value in dict(metadata).items()}


def test_a_task_is_only_given_to_who_has_the_secret_of_the_starter(link: Link) -> None:
    from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

    version = dict(RuntimeVersionMetadata.from_local_component("SuperExec").as_metadata())
    request = AcquireTaskRequest(supported_task_types=["flwr-serverapp"])
    secret = link.kit.path("superexec.secret").read_bytes()
    with link.control() as control:
        run_id = control.start(STUDY)
    others = {
        "none": {},
        "another": sealed_acquisition(b"another", request),
        "control": sealed_acquisition(link.secret, request),
        "control header": {CONTROL_HEADER: link.secret.decode()},
    }
    try:
        for name, headers in others.items():
            reply = link.ask(
                "POST", "/v1/runtime/acquire-task", PROTOBUF | version | headers,
                request.SerializeToString(),
            )  # fmt: skip
            assert reply.status == 401, name
            assert STUDY.encode() not in reply.body
        headers = PROTOBUF | version | sealed_acquisition(secret, request)
        reply = link.ask("POST", "/v1/runtime/acquire-task", headers, request.SerializeToString())
        assert reply.status == 200
        assert AcquireTaskResponse.FromString(reply.body).task.run_id == run_id
        again = link.ask("POST", "/v1/runtime/acquire-task", headers, request.SerializeToString())
        assert again.status == 401  # a request that was overheard is not worth anything
    finally:
        with link.control() as control:
            control.stop(run_id)


def test_every_other_runtime_route_asks_for_a_token(link: Link) -> None:
    from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

    version = dict(RuntimeVersionMetadata.from_local_component("SuperExec").as_metadata())
    paths = [path for _, path in routes(link) if path.startswith("/v1/runtime/")]
    assert len(paths) > 15
    for path in paths:
        assert link.ask("POST", path, PROTOBUF | version).status == 401, path


def pull(node_id: int) -> bytes:
    return PullMessagesRequest(node=Node(node_id=node_id)).SerializeToString()


def test_a_node_with_an_unknown_key_learns_nothing(link: Link, admitted: dict[str, int]) -> None:
    with link.control() as control:
        control.start(STUDY)
    stranger = ec.generate_private_key(ec.SECP384R1())
    before = link.contents()
    body = ActivateNodeRequest(
        public_key=public_pem(stranger), heartbeat_interval=30
    ).SerializeToString()
    refused = link.ask("POST", "/v1/fleet/activate-node", signed_by(stranger), body)
    assert 400 <= refused.status < 500
    # Whether there is such a node, it is not told.
    replies = {
        link.ask("POST", "/v1/fleet/pull-messages", signed_by(stranger), pull(node))
        for node in (*admitted.values(), 0, 1, 12345)
    }
    assert len(replies) == 1
    (unanswered,) = replies
    assert unanswered.status == 401
    for name in sorted(OPEN_TO_NODES - {"activate-node"}):
        reply = link.ask("POST", f"/v1/fleet/{name}", signed_by(stranger))
        assert reply.status == 401, name
    told = refused.body + unanswered.body + repr(refused.headers + unanswered.headers).encode()
    for secret in (*SITES, STUDY, bundle_sha256(), *map(str, admitted.values())):
        assert secret.encode() not in told
    assert link.contents() == before


def test_a_node_speaks_for_itself_only(link: Link, admitted: dict[str, int]) -> None:
    one, two = SITES
    key = link.site_key(one)
    body = ActivateNodeRequest(public_key=public_pem(key), heartbeat_interval=30)
    reply = link.ask("POST", "/v1/fleet/activate-node", signed_by(key), body.SerializeToString())
    assert reply.status == 200
    assert ActivateNodeResponse.FromString(reply.body).node_id == admitted[one]
    ask = ("POST", "/v1/fleet/pull-messages", signed_by(key))
    assert link.ask(*ask, pull(admitted[one])).status == 200
    assert link.ask(*ask, pull(admitted[two])).status == 401
    other = signed_by(ec.generate_private_key(ec.SECP384R1()))
    stolen = signed_by(key) | {"flwr-signature": other["flwr-signature"]}
    assert link.ask("POST", "/v1/fleet/pull-messages", stolen, pull(admitted[one])).status == 401
    register = RegisterNodeFleetRequest(public_key=public_pem(key)).SerializeToString()
    assert link.ask("POST", "/v1/fleet/register-node", signed_by(key), register).status == 401


def test_a_site_with_another_key_is_turned_away_with_the_older_one(link: Link) -> None:
    (older, public), (_, newer) = new_key(), new_key()
    with link.control() as control:
        control.admit({"north": public})
        (node,) = [node.node_id for node in control.nodes() if node.name == "north"]
        ask = ("POST", "/v1/fleet/pull-messages", signed_by(older))
        assert link.ask(*ask, pull(node)).status == 200
        control.admit({"north": newer})
        assert link.ask(*ask, pull(node)).status == 401


# Connecting.


def error_of(kit: Kit, settings: ServerSettings, timeout_s: float = 5.0) -> DeploymentError:
    with pytest.raises(DeploymentError) as caught, connect(kit, settings, timeout_s) as control:
        control.runs()
    return caught.value


def changed(link: Link, folder: Path, **files: bytes) -> Kit:
    """The server's kit with other files."""
    for name in ("control.secret", "ca.crt"):
        content = files.get(name.replace(".", "_"), link.kit.path(name).read_bytes())
        (folder / name).write_bytes(content)
    return Kit(folder, link.kit.card)


def test_a_wrong_secret_is_a_refusal(link: Link, tmp_path: Path) -> None:
    kit = changed(link, tmp_path, control_secret=b"x" * 64)
    assert error_of(kit, link.settings).code == "SAM-N302"


def test_a_secret_with_a_line_end_behind_it_is_the_same(link: Link, tmp_path: Path) -> None:
    kit = changed(link, tmp_path, control_secret=link.secret + b"\n")
    with connect(kit, link.settings) as control:
        control.runs()


def test_the_secret_is_shown_to_nobody_with_another_certificate(link: Link, tmp_path: Path) -> None:
    project = link.kit.folder.parent.parent / "project.yaml"
    provision(project, tmp_path / "other")
    other = (tmp_path / "other/authority/ca.crt").read_bytes()
    kit = changed(link, tmp_path, ca_crt=other)
    error = error_of(kit, link.settings)
    assert error.code == "SAM-N301"
    assert "ConnectError" in error.message


def test_a_superlink_that_is_not_there_or_silent_is_told_so(link: Link) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        settings = ServerSettings(link_port=port)
        assert error_of(link.kit, settings).code == "SAM-N301"  # nobody listens
        listening.listen()
        begun = time.monotonic()
        assert error_of(link.kit, settings, 0.3).code == "SAM-N301"  # nobody answers
        assert time.monotonic() - begun < 5


@pytest.fixture
def hospital_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment with a proxy, as hospitals have them, which nobody can reach here."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        for spelt in (name, name.upper()):
            monkeypatch.setenv(spelt, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")  # for what is changed below to be taken back
    monkeypatch.setenv("no_proxy", "intranet.example")


@pytest.mark.usefixtures("hospital_proxy")
def test_a_proxy_in_the_environment_is_not_between_programs_of_one_machine(link: Link) -> None:
    with link.control() as control:
        control.runs()
    home = flower_environment(Path("/home"))
    for name in ("NO_PROXY", "no_proxy"):
        assert home[name] == os.environ[name] == "intranet.example,127.0.0.1,localhost"


def test_faults_of_flower_are_refusals_with_its_words(link: Link) -> None:
    with pytest.raises(DeploymentError) as caught, link.control() as control:
        control.stop(12345)
    assert caught.value.code == "SAM-N302"
    assert "404 Run ID not found" in caught.value.message


# Starting.


@pytest.mark.parametrize("secret", [b"", b"\n", b"x" * 31, b" " * 40])
def test_a_superlink_does_not_start_with_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secret: bytes
) -> None:
    (tmp_path / "secret").write_bytes(secret)
    monkeypatch.setenv(SECRET_VARIABLE, str(tmp_path / "secret"))
    started: list[int] = []
    monkeypatch.setattr(link_module, "flower_superlink", lambda: started.append(1))
    monkeypatch.setattr("flwr.superlink.extensions.get_middleware", lambda: ())
    with pytest.raises(SystemExit, match="control secret"):
        link_module.main()
    assert started == []


def test_the_options_of_the_superlink_are_those_that_make_it_safe(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samaritan.operate.proxy.shutil.which", lambda *_, **__: "nginx")
    found, proxy, apps, *_ = server_programs(link.kit, link.settings)
    options = " ".join(found.command)
    for option in (
        "--enable-supernode-auth", "--isolation process", "--superexec-auth-secret-file",
        "--host 127.0.0.1", "--ssl-certfile", "--ssl-keyfile",
        "--disable-runtime-dependency-installation", "--database",
    ):  # fmt: skip
        assert option in options
    assert "--insecure" not in options
    assert "--insecure" not in " ".join(apps.command)
    # No secret stands where `ps` shows it.
    texts = [*found.command, *apps.command, *found.environment.values(), *apps.environment.values()]
    for secret in (link.secret, link.kit.path("superexec.secret").read_bytes()):
        assert all(secret.decode() not in text for text in texts)
    assert found.before < proxy.before < apps.before


# What Flower must have, and the bundle.

PRIVATE = {
    "server/link.py": ["flwr.superlink.extensions:get_middleware"],
    "server/control.py": [
        "flwr.supercore.control:ControlHttpClient.StartRun",
        "flwr.supercore.control:ControlHttpClient.StopRun",
        "flwr.supercore.control:ControlHttpClient.ListRuns",
        "flwr.supercore.control:ControlHttpClient.ListNodes",
        "flwr.supercore.control:ControlHttpClient.RegisterNode",
        "flwr.supercore.control:ControlHttpClient.UnregisterNode",
        "flwr.supercore.protobuf.client:ProtobufRequestContext",
        "flwr.common.serde:user_config_to_proto",
    ],
    "server/grid.py": [
        "flwr.superlink.grid:HttpGrid.get_nodes",
        "flwr.superlink.grid:HttpGrid.push_messages",
        "flwr.superlink.grid:HttpGrid.pull_messages",
    ],
    "server/bundle.py": ["flwr.cli.build:build_fab_from_files"],
    "client/courier.py": [
        "flwr.supernode.runtime.run_clientapp:install_from_fab",
        "flwr.supernode.runtime.run_clientapp:get_load_client_app_fn",
        "flwr.supernode.runtime.run_clientapp:register_signal_handlers",
        "flwr.supernode.runtime.run_clientapp:run_clientapp",
    ],
    "client/starter.py": [
        "flwr.supercore.superexec.run_superexec:get_executor",
        "flwr.supercore.superexec.executor:SubprocessExecutor.get_eligible_capacity",
        "flwr.supercore.superexec.executor:SubprocessExecutor.launch",
        "flwr.supercore.cli.flower_superexec:flower_superexec",
    ],
    "client/node.py": [
        "flwr.supernode.fleet_http_connection:FleetHttpClient.from_server_address",
        "flwr.supernode.start_client_internal:time.sleep",
        "flwr.supernode.cli.flower_supernode:flower_supernode",
    ],
}
"""Private names of Flower by the file that stands or falls with them."""


def lookup(name: str) -> Any:
    module, _, attributes = name.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    return found


def test_the_pinned_flower_is_the_one_that_was_read() -> None:
    assert flwr.__version__ == "1.41.0", f"read {', '.join(PRIVATE)} against Flower's new code"


@pytest.mark.parametrize(("file", "name"), [(f, n) for f, names in PRIVATE.items() for n in names])
def test_private_names_of_flower_are_still_there(file: str, name: str) -> None:
    assert (ROOT / file).is_file()
    try:
        lookup(name)
    except (ImportError, AttributeError):
        pytest.fail(f"{file} patches or calls {name}, which Flower {flwr.__version__} has not")


def test_flower_still_uses_what_is_put_in_place_of_its_own() -> None:
    """A name that is there and not looked up when it is called would be patched for nothing."""
    from flwr.supercore.protobuf.client import ProtobufClient
    from flwr.supercore.superexec import run_superexec
    from flwr.superlink import main
    from flwr.supernode import fleet_http_connection, start_client_internal
    from flwr.supernode.runtime import run_clientapp

    used = {
        "server/link.py": (main, "*extensions.get_middleware(),\n"),
        "client/courier.py": (run_clientapp, "install_from_fab("),
        "client/courier.py, too": (run_clientapp, "get_load_client_app_fn("),
        "client/courier.py, ends": (run_clientapp, "    register_signal_handlers("),
        "client/starter.py": (run_superexec, "executor = get_executor("),
        "client/node.py": (fleet_http_connection, "FleetHttpClient.from_server_address("),
        "client/node.py, too": (start_client_internal, "time.sleep("),
    }
    for file, (module, call) in used.items():
        assert call in inspect.getsource(module), f"{file}: {module.__name__} calls no {call}"
    told = set(inspect.signature(ProtobufClient.__init__).parameters)
    assert {"base_url", "interceptors", "verify", "timeout"} <= told, "server/control.py"
    middleware = inspect.getsource(main._get_middleware)
    first = middleware.index("extensions.get_middleware()")
    assert first < middleware.index("Middleware("), "server/link.py: the lock is not outermost"


def files_in(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_bundle_is_the_same_at_each_call_and_in_another_process() -> None:
    code = "import sys; from server.bundle import build_bundle as b; sys.stdout.buffer.write(b())"
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "12345", "TZ": "Asia/Tokyo"},
        capture_output=True,
        check=True,
    ).stdout
    assert build_bundle() == build_bundle() == other
    assert bundle_sha256() == hashlib.sha256(other).hexdigest()


def test_the_bundle_holds_the_listed_files_and_no_code_of_ours() -> None:
    found = files_in(build_bundle())
    listed = {"pyproject.toml", "samaritan_run_server.py", "samaritan_run_client.py"}
    assert set(found) == listed | {".info/CONTENT"}
    assert found["samaritan_run_client.py"].endswith(b"app = None\n")
    assert sum(map(len, found.values())) < 2000
    for name in listed - {"pyproject.toml"}:
        compile(found[name], name, "exec")


def test_another_byte_in_the_bundle_is_another_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {bundle_sha256()}
    for name, text in dict(bundle_module._FILES).items():
        monkeypatch.setitem(bundle_module._FILES, name, text.replace("run", "rUn", 1))
        hashes.add(bundle_sha256())
        monkeypatch.setitem(bundle_module._FILES, name, text)
    assert len(hashes) == 1 + len(bundle_module._FILES)


def test_the_client_of_control_sends_the_secret_to_no_other_address(link: Link) -> None:
    """Flower's client follows redirects; the secret goes with the request object to one host."""
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(str(request.url))
        assert request.headers[CONTROL_HEADER] == link.secret.decode()
        return httpx.Response(200, content=b"")

    with link.control() as control:
        control._client._client = httpx.Client(transport=httpx.MockTransport(answer))
        control.runs()
    assert seen == [f"https://127.0.0.1:{link.port}/v1/control/list-runs"]


def test_keys_are_compared_as_keys() -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    ssh = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    assert key_of(ssh) == key_of(ssh + " a comment") == der_of(public_pem(key))
    assert key_of(ssh) != der_of(public_pem(ec.generate_private_key(ec.SECP384R1())))
    assert der_of(b"") == der_of(b"no key") == b""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert der_of(private) == b""
    with pytest.raises(ValueError, match=r"."):
        key_of("no key")
