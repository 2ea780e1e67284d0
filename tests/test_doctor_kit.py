"""`samaritan doctor --kit`: every check, with what it is about made wrong."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

import client.doctor
import client.readiness
import server.doctor
from client.approvals import Approvals
from client.doctor import site_findings
from client.permissions import hand_over
from samaritan import __version__
from samaritan.cli.main import app
from samaritan.config import parse_config
from samaritan.errors import DeploymentError
from samaritan.keys import make_identity
from samaritan.models.bases import build_base
from samaritan.operate import proxy
from samaritan.operate.checks import checkpoint, clock, files, network, ports, tree
from samaritan.operate.checks.finding import Finding
from samaritan.operate.checks.users import User, find_user
from samaritan.plan import Plan, PlannedBase, PlannedSite, sign_plan, write_plan
from samaritan.provision import certificates
from samaritan.provision.authority import open_authority
from samaritan.provision.certificates import Signer
from samaritan.provision.kit import Kit, load_kit
from samaritan.provision.kits import provision
from server.doctor import server_findings

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to others")
nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
with_nginx = pytest.mark.skipif(nginx is None, reason="nginx is not installed")

AGENT, COURIER = "daemon", "www-data"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


# A consortium, and a server that says what it is told to


@dataclass
class Trial:
    """A consortium of one site, whose folder all users can come to.

    Attributes:
        folder: Holds the kits and data.
        port: On which the site looks for the server.
    """

    folder: Path
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.write("project.yaml", {
            "project": "trial", "title": "Trial", "keys": "shipped",
            "server": {"hosts": ["localhost"], "port": self.port}, "sites": [{"name": "A"}],
        })  # fmt: skip
        provision(self.folder / "project.yaml", self.folder / "kits")
        self.data.mkdir()
        lines = ["case_id,image,label,subject_id,split"]
        for case, patient, split in (("a", "p", "train"), ("b", "p", "train"), ("c", "q", "val")):
            for name in (f"{case}.nii.gz", f"{case}-label.nii.gz"):
                (self.data / name).write_bytes(b"")  # no image is opened
            lines.append(f"{case},{case}.nii.gz,{case}-label.nii.gz,{patient},{split}")
        (self.data / "manifest.csv").write_text("\n".join(lines) + "\n")
        self.settings()
        self.write("kits/server/server.yaml", {
            "listen": "127.0.0.1", "link_port": free_port(), "status_port": free_port(),
        })  # fmt: skip

    def write(self, name: str, tree: Any) -> None:
        (self.folder / name).write_text(yaml.safe_dump(tree))

    def settings(self, **changes: Any) -> None:
        """Writes site.yaml."""
        tree = {"data": str(self.data), "node_port": free_port(), "policy": {"min_cohort": 1}}
        self.write("kits/sites/A/site.yaml", tree | changes)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def kit(self) -> Kit:
        return load_kit(self.folder / "kits/sites/A", "site")

    @property
    def server(self) -> Kit:
        return load_kit(self.folder / "kits/server", "server")

    @property
    def authority(self) -> Path:
        return self.folder / "kits/authority"

    def signer(self) -> Signer:
        return Signer(
            certificates.read_private(self.authority / "ca.key"),
            certificates.read_certificate(self.authority / "ca.crt"),
        )

    def card(self, **changes: Any) -> None:
        """Changes kit.yaml of the site."""
        path = self.kit.path("kit.yaml")
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))

    def plan(self, **changes: Any) -> Plan:
        """A plan for this site."""
        config = parse_config({
            "rounds": 2, "federation": {"min_sites": 1}, "data": {"classes": {"liver": 1}},
        })  # fmt: skip
        identity = make_identity(self.kit.path("identity.key")).public.hex()
        site = PlannedSite(identity=identity, node=self.kit.path("node.pub").read_text().strip())
        today = datetime.now(UTC).date()
        facts: dict[str, Any] = {
            "schema": 1, "study": "liver", "created": today, "config": config,
            "valid_until": today + timedelta(days=9), "samaritan": __version__,
            "bundle_sha256": "0" * 64, "base": PlannedBase(name="tiny", sha256="1" * 64),
            "sites": {"A": site},
        }  # fmt: skip
        return Plan(**facts | changes)

    def approve(self, plan: Plan) -> Plan:
        """Lets the site approve a plan, and the server keep it."""
        signed = sign_plan(plan, make_identity(self.authority / "plan.key"))
        key = make_identity(self.kit.path("identity.key"))
        Approvals(self.kit, {"site": key.public}).approve(signed, "site", key)
        write_plan(self.server.path("plans", f"{plan.sha256}.json"), signed)
        return plan


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for disks, no proxy of this machine, and a clock that somebody keeps."""
    monkeypatch.setattr("samaritan.files.os.fsync", lambda descriptor: None)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(clock, "synchronised", lambda: True)


@pytest.fixture
def trial() -> Iterator[Trial]:
    with tempfile.TemporaryDirectory(prefix="samaritan-doctor-") as name:
        Path(name).chmod(0o755)
        yield Trial(Path(name))


@dataclass
class Behaviour:
    """How the server of a test answers.

    Attributes:
        status: By path; 404 for others.
        body: Of every answer.
        ahead_s: How far its clock is ahead.
    """

    status: dict[str, int] = field(default_factory=lambda: {network._FLEET: 405})
    body: bytes = b""
    ahead_s: float = 0


@contextlib.contextmanager
def serving(
    port: int, behaviour: Behaviour, certificate: Path | None, key: Path | None,
    clients: Path | None = None,
) -> Iterator[list[str]]:  # fmt: skip
    """A server on loopback; yields the paths it was asked for.

    Args:
        port: To listen at.
        behaviour: What it answers.
        certificate: Of the server; None speaks without TLS.
        key: Of the certificate.
        clients: Authority whose certificates clients must show.
    """
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(behaviour.status.get(self.path, 404))
            self.send_header("Content-Length", str(len(behaviour.body)))
            self.end_headers()
            self.wfile.write(behaviour.body)

        def date_time_string(self, timestamp: float | None = None) -> str:
            moment = datetime.now(UTC) + timedelta(seconds=behaviour.ahead_s)
            return format_datetime(moment, usegmt=True)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: Any, address: Any) -> None:
            with contextlib.suppress(OSError):
                if certificate is not None:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(certificate, key)
                    if clients is not None:
                        context.verify_mode = ssl.CERT_REQUIRED
                        context.load_verify_locations(clients)
                    request = context.wrap_socket(
                        request, server_side=True, do_handshake_on_connect=False
                    )
                    try:
                        request.do_handshake()
                    except ssl.SSLError:
                        time.sleep(0.5)  # else the reset that follows takes the alert back
                        raise
                super().finish_request(request, address)
                request.close()

    with Server(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield asked
        finally:
            server.shutdown()


@contextlib.contextmanager
def own_server(trial: Trial, **changes: Any) -> Iterator[list[str]]:
    """A server with the certificate of the consortium."""
    kit = trial.server
    with serving(
        trial.port, Behaviour(**changes), kit.path("server.crt"), kit.path("server.key")
    ) as asked:
        yield asked


def looked(trial: Trial) -> list[Finding]:
    return list(site_findings(trial.kit, lambda text: None))


def about(findings: list[Finding], what: str) -> Finding:
    """The one finding about a thing."""
    (found,) = [finding for finding in findings if finding.what == what]
    return found


def faulty(findings: list[Finding]) -> dict[str, Finding]:
    """What is missing, by code."""
    return {finding.code: finding for finding in findings if finding.ok is False}


def network_of(trial: Trial) -> list[Finding]:
    """The way to the server alone."""
    kit, dated = trial.kit, []
    shown = network.Server(
        kit.card.host, kit.card.port, kit.path("ca.crt"), kit.path("site.crt"), kit.path("site.key")
    )
    return list(network.look(shown, dated))


# A kit that is ready


def test_a_kit_that_is_ready(trial: Trial) -> None:
    base = build_base("tiny", 1)
    trial.approve(trial.plan(base=PlannedBase(name="tiny", sha256=base.sha256)))
    with own_server(trial) as asked:
        findings = looked(trial)
    assert faulty(findings) == {}
    notes = {finding.what for finding in findings if finding.ok is None}
    assert notes == {"users", "agent"}
    told = {finding.what for finding in findings}
    assert told >= {
        "kit", "site.yaml", "files of the kit", "site.key", "node.key", "identity.key", "ca.crt",
        "site.crt", "clock", "proxy", "name of the server", "port of the server",
        "certificate of the server", "certificate at the server", "interfaces of the server",
        "Flower's server", "clock and the server's", "folders to write", "free disk of the kit",
        "path of the kit", "agent", "node_port", "data", "checkpoint", "memory for liver",
    }  # fmt: skip
    assert about(findings, "data").found.startswith("3 cases of 2 patients, 2 marked for training")
    assert asked == ["/", *network.HIDDEN, network._FLEET]
    # Nothing of a healthy finding needs a hint, and every fault would have one.
    assert not any(finding.hint or finding.code for finding in findings if finding.ok)


def test_looking_changes_nothing(trial: Trial) -> None:
    trial.approve(trial.plan())
    trial.kit.path("state").mkdir()

    def state() -> dict[str, tuple[float, int, bytes]]:
        return {
            str(path): (path.stat().st_mtime, path.stat().st_mode, b"" if path.is_dir()
                        else path.read_bytes())
            for path in trial.folder.rglob("*")
        }  # fmt: skip

    before = state()
    looked(trial)
    list(server_findings(trial.server, lambda text: None))
    assert state() == before


def test_every_fault_says_what_to_do_and_has_its_code(trial: Trial) -> None:
    """The kit as it was unpacked, with nothing done for it."""
    trial.settings(data="/nowhere", checkpoint="/nowhere/else.pth")
    findings = looked(trial)
    wrong = [finding for finding in findings if finding.ok is False]
    assert {finding.code for finding in wrong} == {"SAM-N632", "SAM-N652", "SAM-N655"}
    assert all(finding.hint.endswith((".", ")")) for finding in wrong)


# Files and keys


@pytest.mark.parametrize("name", ["plan.pub", "site.key", "node.pub", "identity.key"])
def test_a_missing_file_is_named(trial: Trial, name: str) -> None:
    trial.kit.path(name).unlink()
    found = faulty(looked(trial))["SAM-N601"]
    assert name in found.found
    assert ("site request" in found.hint) == (name != "plan.pub")


def test_a_certificate_that_is_still_to_come(trial: Trial) -> None:
    trial.kit.path("site.crt").unlink()
    found = about(looked(trial), "site.crt")
    assert (found.ok, found.code) == (False, "SAM-N610")
    assert "site accept" in found.hint


@pytest.mark.parametrize("name", ["site.key", "node.key", "identity.key"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o610])
def test_a_key_that_others_can_use(trial: Trial, name: str, mode: int) -> None:
    trial.kit.path(name).chmod(mode)
    found = about(looked(trial), name)
    assert (found.ok, found.code) == (False, "SAM-N602")
    assert f"{mode:04o}" in found.found
    assert f"chmod 600 {trial.kit.path(name)}" in found.hint


@as_root
def test_a_key_of_another_user(trial: Trial) -> None:
    trial.settings(courier_user=COURIER)
    os.chown(trial.kit.path("identity.key"), find_user(AGENT).uid, -1)
    findings = looked(trial)
    for name in ("site.key", "node.key"):
        found = about(findings, name)
        assert (found.ok, found.code) == (False, "SAM-N603")
        assert f"cannot be read by {COURIER}" in found.found
    assert about(findings, "files of two users").code == "SAM-N609"
    assert about(findings, "users").found == f"agent {AGENT}, courier {COURIER}"


@as_root
def test_a_user_that_cannot_run_the_program(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.settings(courier_user=COURIER)
    os.chown(trial.kit.path("identity.key"), find_user(AGENT).uid, -1)
    home = trial.data.parent / "home"
    home.mkdir(0o700)
    os.chown(home, find_user(AGENT).uid, -1)
    for folder, found in ((Path("/usr"), []), (home, [f"program for {COURIER}"])):
        monkeypatch.setattr(client.doctor, "_PROGRAM", (folder,))
        assert [f.what for f in looked(trial) if f.code == "SAM-N668"] == found


def test_a_courier_that_does_not_exist(trial: Trial) -> None:
    trial.settings(courier_user="nobody-of-this-name")
    assert about(looked(trial), "users").code == "SAM-N651"


@as_root
def test_folders_that_the_agent_cannot_write(trial: Trial) -> None:
    os.chown(trial.kit.path("identity.key"), find_user(AGENT).uid, -1)
    found = about(looked(trial), "folders to write")
    assert (found.ok, found.code) == (False, "SAM-N604")
    assert f"{AGENT} cannot write state, log" in found.found


def test_a_disk_that_is_full(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10, 9, 2**30)  # type: ignore[attr-defined]
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    assert faulty(looked(trial))["SAM-N605"].found.startswith("1.0 GiB")


def test_a_path_that_is_too_long_for_sockets() -> None:
    fits = Path("/" + "x" * (files.LONGEST - 1 - len("/run")))
    assert files.short_path(fits).ok
    found = files.short_path(Path(f"{fits}x"))
    assert (found.ok, found.code) == (None, "SAM-N608")


def test_settings_that_cannot_be_read(trial: Trial) -> None:
    trial.settings(polcy={})
    found = about(looked(trial), "site.yaml")
    assert (found.ok, found.code) == (False, "SAM-N103")
    trial.settings(polcy={}, policy={"hours": ["late"], "min_cohort": 0})
    told = about(looked(trial), "site.yaml").found
    assert all(word in told for word in ("3 faults", "polcy", "'late'", "min_cohort"))


# Certificates


def put(trial: Trial, issued: x509.Certificate) -> None:
    trial.kit.path("site.crt").write_bytes(certificates.pem(issued))


def issue(
    trial: Trial, name: str = "A", key: ec.EllipticCurvePublicKey | None = None,
    moment: datetime | None = None, days: int = 100, signer: Signer | None = None,
) -> x509.Certificate:  # fmt: skip
    own = certificates.read_private(trial.kit.path("site.key")).public_key()
    return certificates.certify_site(
        signer or trial.signer(), key or own, "trial", name, moment or certificates.now(), days
    )


def other_signer() -> Signer:
    key = ec.generate_private_key(ec.SECP384R1())
    return Signer(key, certificates.certify_authority(key, "other", certificates.now()))


def test_a_certificate_of_another_authority(trial: Trial) -> None:
    put(trial, issue(trial, signer=other_signer()))
    found = about(looked(trial), "site.crt")
    assert (found.ok, found.code) == (False, "SAM-N611")
    assert "CN=authority,O=other" in found.found


def test_an_authority_of_the_same_name_is_another(trial: Trial) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    twin = Signer(key, certificates.certify_authority(key, "trial", certificates.now()))
    put(trial, issue(trial, signer=twin))
    assert about(looked(trial), "site.crt").code == "SAM-N611"


def test_a_certificate_for_another_key(trial: Trial) -> None:
    put(trial, issue(trial, key=ec.generate_private_key(ec.SECP384R1()).public_key()))
    findings = looked(trial)
    assert about(findings, "site.crt").code == "SAM-N612"


def test_a_certificate_of_another_site(trial: Trial) -> None:
    put(trial, issue(trial, name="B"))
    found = about(looked(trial), "site.crt")
    assert found.code == "SAM-N616"
    assert "is for B, and this kit is that of A" in found.found


def test_a_certificate_that_is_no_certificate(trial: Trial) -> None:
    trial.kit.path("site.crt").write_text("nothing")
    assert about(looked(trial), "site.crt").code == "SAM-K121"


def test_a_node_key_that_is_another(trial: Trial) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    trial.kit.path("node.key").write_bytes(certificates.openssh(key))
    for text in (None, certificates.node_key(key.public_key())):  # with its own public half too
        if text is not None:
            trial.kit.path("node.pub").write_text(text)
        found = [finding for finding in looked(trial) if finding.what == "node.key"]
        assert [finding.code for finding in found] == ["", "SAM-N620"]


def test_a_public_node_key_that_is_another(trial: Trial) -> None:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    trial.kit.path("node.pub").write_text(certificates.node_key(key))
    assert "SAM-N620" in faulty(looked(trial))


@pytest.mark.parametrize(
    ("days", "ok", "code"),
    [(-2, False, "SAM-N613"), (101, False, "SAM-N614"), (99, None, "SAM-N615"),
     (71, None, "SAM-N615"), (69, True, "")],
)  # fmt: skip
def test_dates_of_a_certificate(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, days: int, ok: bool | None, code: str
) -> None:
    put(trial, issue(trial, moment=certificates.now(), days=100))
    moment = certificates.now() + timedelta(days=days, minutes=1)
    monkeypatch.setattr(client.doctor, "now", lambda: moment)
    found = about(looked(trial), "site.crt")
    assert (found.ok, found.code) == (ok, code)
    if code in ("SAM-N614", "SAM-N615"):
        assert "samaritan authority renew" in found.hint
        assert "samaritan site accept" in found.hint


# The clock


def test_limits_are_flowers() -> None:
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    assert clock.NEWEST_S == SYSTEM_TIME_TOLERANCE
    assert clock.OLDEST_S == SYSTEM_TIME_TOLERANCE + TIMESTAMP_TOLERANCE


@pytest.mark.parametrize(
    ("ahead_s", "ok", "code", "words"),
    [
        (0, True, "", "agree"),
        (-10, False, "SAM-N623", "s ahead; the server refuses this site from 5 s on"),
        (-5.5, False, "SAM-N623", "s ahead"),
        (-3, True, "", "agree"),
        (60, None, "SAM-N624", "s behind"),
        (6, None, "SAM-N624", "s behind"),
        (3, True, "", "agree"),
        (400, False, "SAM-N623", "s behind; the server refuses this site from 305 s on"),
    ],
)
def test_a_clock_that_is_not_the_servers(
    trial: Trial, ahead_s: float, ok: bool | None, code: str, words: str
) -> None:
    with own_server(trial, ahead_s=ahead_s):
        found = about(looked(trial), "clock and the server's")
    assert (found.ok, found.code) == (ok, code)
    assert words in found.found


@pytest.mark.parametrize(
    ("kept", "words"),
    [(True, "likely the server's"), (False, "likely this one"), (None, "Compare")],
)
def test_which_clock_is_wrong(
    monkeypatch: pytest.MonkeyPatch, kept: bool | None, words: str
) -> None:
    monkeypatch.setattr(clock, "synchronised", lambda: kept)
    assert words in clock.against_server(20).hint
    assert words in clock.against_server(-20).hint


def test_the_difference_is_never_told_too_large() -> None:
    sent = datetime(2027, 3, 1, 12, 0, 0, 900_000, tzinfo=UTC)
    received = sent + timedelta(seconds=2)
    said = format_datetime(datetime(2027, 3, 1, 12, 0, 0, tzinfo=UTC), usegmt=True)
    # The server's clock was at 12:00:00 to 12:00:01 at some time in the two seconds.
    assert clock.difference_s(said, sent, received) == 0
    behind = sent - timedelta(seconds=30)
    assert clock.difference_s(said, behind, behind + timedelta(seconds=2)) == pytest.approx(-27.1)
    ahead = sent + timedelta(seconds=30)
    assert clock.difference_s(said, ahead, ahead + timedelta(seconds=2)) == pytest.approx(29.9)
    assert clock.difference_s("yesterday", sent, received) is None


def test_a_clock_that_cannot_be_right(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.doctor, "now", lambda: datetime(1970, 1, 2, tzinfo=UTC))
    findings = looked(trial)
    assert about(findings, "clock").code == "SAM-N621"
    found = about(findings, "site.crt")
    assert found.code == "SAM-N613"
    assert "this machine's clock is late" in found.hint


def test_a_clock_that_nobody_keeps(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "synchronised", lambda: False)
    found = about(looked(trial), "clock")
    assert (found.ok, found.code) == (None, "SAM-N622")


def test_the_kernel_is_asked_who_keeps_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert clock.synchronised() in (True, False, None)

    class Library:
        def __init__(self, state: int) -> None:
            self.adjtimex = lambda struct: state

    for state, kept in ((0, True), (5, False), (-1, None)):
        monkeypatch.setattr(clock.ctypes, "CDLL", lambda *_, state=state, **__: Library(state))
        assert clock.synchronised() is kept


# The way to the server


def test_a_name_without_an_address(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.card(host="fl.example.org")

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(network.socket, "getaddrinfo", unknown)
    found = about(network_of(trial), "name of the server")
    assert (found.ok, found.code) == (False, "SAM-N631")
    assert "fl.example.org" in found.found


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TimeoutError(), "A firewall swallows it"),
        (ConnectionRefusedError(), "The server is not running, or a firewall"),
        (OSError(113, "No route to host"), "Ask IT for a route"),
    ],
)
def test_a_port_that_cannot_be_reached(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, error: OSError, words: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(network.socket, "create_connection", fail)
    found = about(network_of(trial), "port of the server")
    assert (found.ok, found.code) == (False, "SAM-N632")
    assert words in found.hint
    assert f"127.0.0.1 port {trial.port}" in found.hint or "other sites" in found.hint


def test_the_second_address_is_tried(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_resolve", lambda host, port: ["127.0.0.2", "127.0.0.1"])
    with own_server(trial):
        assert about(network_of(trial), "port of the server").ok


def test_whoever_opens_tls_is_named(trial: Trial) -> None:
    signer = other_signer()
    key = ec.generate_private_key(ec.SECP256R1())
    issued = certificates.certify_server(
        signer, key.public_key(), "hospital firewall", ["localhost"], certificates.now(), 9
    )
    trial.folder.joinpath("other.crt").write_bytes(certificates.pem(issued))
    trial.folder.joinpath("other.key").write_bytes(certificates.pkcs8(key))
    with serving(
        trial.port, Behaviour(), trial.folder / "other.crt", trial.folder / "other.key"
    ) as asked:
        findings = network_of(trial)
    found = about(findings, "certificate of the server")
    assert (found.ok, found.code) == (False, "SAM-N633")
    assert "issuer CN=authority,O=other" in found.found
    assert "subject CN=server,O=hospital firewall" in found.found
    assert asked == []  # nothing was said to it
    assert findings[-1] is found


def server_certificate(trial: Trial, hosts: list[str], moment: datetime, days: int) -> Path:
    kit = trial.server
    key = certificates.read_private(kit.path("server.key")).public_key()
    issued = certificates.certify_server(trial.signer(), key, "trial", hosts, moment, days)
    path = trial.folder / "changed.crt"
    path.write_bytes(certificates.pem(issued))
    return path


def test_a_server_of_another_name(trial: Trial) -> None:
    path = server_certificate(trial, ["fl.example.org", "192.0.2.1"], certificates.now(), 9)
    with serving(trial.port, Behaviour(), path, trial.server.path("server.key")):
        found = about(network_of(trial), "certificate of the server")
    assert (found.ok, found.code) == (False, "SAM-N634")
    assert "is for fl.example.org, 192.0.2.1, and not for localhost" in found.found


@pytest.mark.parametrize("begun", [-20, 20])
def test_a_server_whose_certificate_is_out_of_date(trial: Trial, begun: int) -> None:
    moment = certificates.now() + timedelta(days=begun)
    path = server_certificate(trial, ["localhost"], moment, 9)
    with serving(trial.port, Behaviour(), path, trial.server.path("server.key")):
        found = about(network_of(trial), "certificate of the server")
    assert (found.ok, found.code) == (False, "SAM-N635")
    assert "clock" in found.hint


@pytest.mark.parametrize("status", [200, 302, 400])
def test_a_page_without_tls(trial: Trial, status: int) -> None:
    with serving(trial.port, Behaviour({"/": status}), None, None):
        found = about(network_of(trial), "certificate of the server")
    assert (found.ok, found.code) == (False, "SAM-N636")
    assert str(status) in found.found


def test_something_that_says_nothing(trial: Trial) -> None:
    with socket.create_server(("127.0.0.1", trial.port)) as listening:

        def close() -> None:
            with contextlib.suppress(OSError):
                while True:
                    listening.accept()[0].close()

        threading.Thread(target=close, daemon=True).start()
        found = about(network_of(trial), "certificate of the server")
        listening.shutdown(socket.SHUT_RDWR)
    assert (found.ok, found.code) == (False, "SAM-N637")


def test_a_server_that_refuses_by_an_alert(trial: Trial) -> None:
    other = trial.folder / "other.crt"
    other.write_bytes(certificates.pem(other_signer().certificate))
    kit = trial.server
    with serving(
        trial.port, Behaviour(), kit.path("server.crt"), kit.path("server.key"), clients=other
    ):
        found = network_of(trial)[-1]
    assert (found.ok, found.code) == (False, "SAM-N639")


def test_another_service_of_the_consortium(trial: Trial) -> None:
    with own_server(trial, status={"/": 200}):
        found = network_of(trial)[-1]
    assert (found.ok, found.code) == (False, "SAM-N638")


@pytest.mark.parametrize("path", network.HIDDEN)
@pytest.mark.parametrize("status", [200, 401, 405, 422])
def test_an_interface_that_must_not_be_seen(trial: Trial, path: str, status: int) -> None:
    with own_server(trial, status={path: status, network._FLEET: 405}):
        found = about(network_of(trial), "interfaces of the server")
    assert (found.ok, found.code) == (False, "SAM-N627")
    assert f"{path} (status {status})" in found.found


def test_a_proxy_whose_server_is_down(trial: Trial) -> None:
    with own_server(trial, status={network._FLEET: 502}):
        found = about(network_of(trial), "Flower's server")
    assert (found.ok, found.code) == (None, "SAM-N640")


@contextlib.contextmanager
def real_proxy(trial: Trial) -> Iterator[subprocess.Popen[bytes]]:
    """The server's own nginx, with nothing behind it."""
    kit = trial.server
    settings = yaml.safe_load(kit.path("server.yaml").read_text())
    kit.path("run").mkdir(exist_ok=True)
    program = proxy.proxy_program(kit.folder, "127.0.0.1", kit.card.port, settings["link_port"])
    process = subprocess.Popen(
        program.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        end = time.monotonic() + 10
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", trial.port)):
                break
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.wait(10)


@with_nginx
def test_the_real_proxy(trial: Trial) -> None:
    with real_proxy(trial):
        findings = network_of(trial)
        without = network.Server("localhost", trial.port, trial.kit.path("ca.crt"))
        unseen = list(network.look(without, []))[-1]
    assert about(findings, "certificate at the server").ok
    assert about(findings, "interfaces of the server").ok
    assert about(findings, "Flower's server").code == "SAM-N640"
    assert unseen.ok is None
    assert "was not shown" in unseen.found


@with_nginx
def test_the_real_proxy_passes_large_answers_to_slow_sites(trial: Trial) -> None:
    """The workers of a proxy that root started are nobody, who writes no file into the kit."""
    kit = trial.kit
    link_port = yaml.safe_load(trial.server.path("server.yaml").read_text())["link_port"]
    body = os.urandom(20_000_000)
    behind = Behaviour({network._FLEET: 200}, body)
    context = ssl.create_default_context(cafile=str(kit.path("ca.crt")))
    context.load_cert_chain(kit.path("site.crt"), kit.path("site.key"))
    server_kit = trial.server
    with (
        serving(link_port, behind, server_kit.path("server.crt"), server_kit.path("server.key")),
        real_proxy(trial),
        socket.create_connection(("localhost", trial.port)) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
    ):
        connection.sendall(f"GET {network._FLEET} HTTP/1.0\r\n\r\n".encode())
        time.sleep(1)
        answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    assert answer.endswith(body)


@with_nginx
def test_a_proxy_that_has_not_read_the_list(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revocation takes effect when the proxy reads it, not when it is copied."""
    what = "proxy and its files"
    with real_proxy(trial) as process:
        states = {"proxy": {"state": "running", "pid": process.pid}}
        monkeypatch.setattr(server.doctor, "states", lambda folder: states)
        assert about(served(trial), what).ok
        time.sleep(0.1)
        with open_authority(trial.authority) as authority:
            authority.revoke("A")
        shutil.copyfile(trial.authority / "crl.pem", trial.server.path("crl.pem"))
        assert about(network_of(trial), "certificate at the server").ok  # still comes in
        found = about(served(trial), what)
        assert (found.ok, found.code) == (False, "SAM-N648")
        assert "crl.pem" in found.found
        os.kill(process.pid, signal.SIGHUP)
        end = time.monotonic() + 10
        while network_of(trial)[-1].code != "SAM-N639":
            assert time.monotonic() < end
            time.sleep(0.1)
        assert about(served(trial), what).ok


@with_nginx
@pytest.mark.parametrize("why", ["revoked", "unknown", "list out of date"])
def test_a_certificate_that_the_real_proxy_refuses(trial: Trial, why: str) -> None:
    if why == "revoked":
        with open_authority(trial.authority) as authority:
            authority.revoke("A")
        shutil.copy(trial.authority / "crl.pem", trial.server.path("crl.pem"))
    elif why == "unknown":
        put(trial, issue(trial, signer=other_signer()))
    else:
        moment = certificates.now()
        old = certificates.revocation_list(
            trial.signer(), {}, moment - timedelta(days=9), moment - timedelta(days=1)
        )
        trial.server.path("crl.pem").write_bytes(certificates.pem(old))
    with real_proxy(trial):
        found = network_of(trial)[-1]
    assert (found.ok, found.code) == (False, "SAM-N639")
    assert "revoked" in found.hint


# Proxies on the way

PROXIES: list[dict[str, str]] = [
    {},
    {"HTTPS_PROXY": "http://proxy.example:3128"},
    {"https_proxy": "http://proxy.example:3128"},
    {"HTTP_PROXY": "http://proxy.example:3128"},
    {"ALL_PROXY": "http://proxy.example:3128"},
    {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "fl.example.org"},
    {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": ".example.org"},
    {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "example.org"},
    {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "other.org,localhost"},
    {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "*"},
    {"HTTPS_PROXY": "http://proxy.example:3128", "NO_PROXY": "192.0.2.0/24"},
]


@pytest.mark.parametrize("environment", PROXIES, ids=str)
@pytest.mark.parametrize("host", ["fl.example.org", "192.0.2.1", "::1"])
def test_the_proxy_is_the_one_that_flower_would_take(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], host: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    url = httpx.URL(f"https://[{host}]:9443" if ":" in host else f"https://{host}:9443")
    with httpx.Client() as flowers:
        goes_through = flowers._transport_for_url(url) is not flowers._transport
    assert (network.proxy_for(host, 9443) is not None) == goes_through


@contextlib.contextmanager
def forward_proxy(status: int, password: str = "") -> Iterator[tuple[int, list[str]]]:
    """A proxy of a hospital; yields its port and what it was asked."""
    asked: list[str] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += connection.recv(1)
            asked.append(head.decode())
            connection.sendall(f"HTTP/1.1 {status} As told\r\n\r\n".encode())
            if status != 200:
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as onward:
                back = threading.Thread(target=pump, args=(onward, connection), daemon=True)
                back.start()
                pump(connection, onward)
                back.join(5)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=accept, daemon=True).start()
        yield listening.getsockname()[1], asked
        listening.shutdown(socket.SHUT_RDWR)


def test_a_proxy_that_lets_through(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    with own_server(trial), forward_proxy(200) as (port, asked):
        monkeypatch.setenv("HTTPS_PROXY", f"http://somebody:hidden@127.0.0.1:{port}")
        findings = network_of(trial)
    found = about(findings, "proxy")
    assert (found.ok, found.code) == (None, "SAM-N629")
    assert "NO_PROXY=localhost" in found.hint
    assert not any("hidden" in finding.found + finding.hint for finding in findings)
    assert about(findings, "Flower's server").ok
    assert asked[0].startswith(f"CONNECT localhost:{trial.port} HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic c29tZWJvZHk6aGlkZGVu\r\n" in asked[0]


def test_a_proxy_that_opens_tls(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    signer, key = other_signer(), ec.generate_private_key(ec.SECP256R1())
    issued = certificates.certify_server(
        signer, key.public_key(), "firewall", ["localhost"], certificates.now(), 9
    )
    trial.folder.joinpath("other.crt").write_bytes(certificates.pem(issued))
    trial.folder.joinpath("other.key").write_bytes(certificates.pkcs8(key))
    shown = (trial.folder / "other.crt", trial.folder / "other.key")
    with serving(trial.port, Behaviour(), *shown), forward_proxy(200) as (port, _):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        found = network_of(trial)[-1]
    assert found.code == "SAM-N633"
    assert "O=other" in found.found


@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_that_does_not_let_through(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    with forward_proxy(status) as (port, _):
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{port}")
        found = network_of(trial)[-1]
    assert (found.ok, found.code) == (False, "SAM-N628")
    assert str(status) in found.found


def test_proxies_that_cannot_be_used(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    found = network_of(trial)[-1]
    assert (found.ok, found.code) == (False, "SAM-N630")
    monkeypatch.setenv("ALL_PROXY", "https://127.0.0.1:3128")
    found = network_of(trial)[-1]
    assert (found.ok, found.code) == (None, "SAM-N626")


# Processes and ports


def test_an_agent_that_runs_elsewhere(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trial.kit.path("state")
    state.mkdir()
    assert about(looked(trial), "agent").found == "no other is running"
    program = (
        "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDONLY); "
        "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, state], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        found = about(looked(trial), "agent")
        assert (found.ok, found.code) == (False, "SAM-N657")
        monkeypatch.setattr(
            client.doctor, "site_states", lambda kit: {"agent": {"state": "running", "pid": 1}}
        )
        assert about(looked(trial), "agent").ok
        holder.kill()
    # A look keeps no agent out afterwards.
    descriptor = os.open(state, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_a_port_in_use(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
        trial.settings(node_port=number, status_port=free_port())
        findings = looked(trial)
        found = about(findings, "node_port")
        assert (found.ok, found.code) == (False, "SAM-N641")
        assert str(number) in found.found
        assert "node_port in site.yaml" in found.hint
        assert about(findings, "status_port").found.endswith("is free")
        # The same port in the hands of a process of this kit.
        states = {"node": {"state": "running", "pid": os.getpid()}}
        monkeypatch.setattr(client.doctor, "site_states", lambda kit: states)
        found = about(looked(trial), "node_port")
        assert found.found == f"{number}, in use by this kit"


def test_a_port_of_a_process_that_this_kit_has_started() -> None:
    program = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); "
        "print(s.getsockname()[1], flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        ["sh", "-c", f'"{sys.executable}" -c "{program}"; true'],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as shell:  # fmt: skip
        assert shell.stdout is not None
        number = int(shell.stdout.readline())
        family = tree.family_of([shell.pid])
        assert len(family) == 2
        assert ports.port("port", number, "127.0.0.1", family, "").ok
        assert ports.port("port", number, "127.0.0.1", [shell.pid], "").ok is False
        assert shell.stdin is not None
        shell.stdin.close()


@as_root
def test_a_status_page_without_a_network(trial: Trial) -> None:
    trial.settings(courier_user=COURIER, status_port=free_port())
    os.chown(trial.kit.path("identity.key"), find_user(AGENT).uid, -1)
    assert about(looked(trial), "status page").code == "SAM-N659"


def test_a_half_counts_the_ports_of_the_other_as_its_kits() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
        assert ports.port("p", number, "127.0.0.1", [], "", frozenset({os.geteuid()})).ok
        assert ports.port("p", number, "127.0.0.1", [], "", frozenset({54321})).ok is False


@as_root
def test_a_look_by_the_couriers_user(
    trial: Trial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It sees its own half, and says of the rest that it cannot look."""
    monkeypatch.setattr(client.doctor, "_PROGRAM", (Path("/usr"),))
    trial.settings(courier_user=COURIER)
    kit = trial.kit
    hand_over(kit, AGENT, COURIER)
    trial.data.chmod(0o700)

    def look() -> list[list[Any]]:
        return [[f.what, f.ok, f.code] for f in site_findings(kit, lambda text: None)]

    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(find_user(COURIER).gid)
            os.setuid(find_user(COURIER).uid)
            os.write(writer, json.dumps(look()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        told = json.loads(stream.read())
    os.waitpid(child, 0)
    assert [what for what, ok, _ in told if ok is False] == ["port of the server"]
    assert {what for what, ok, _ in told if ok is None} == {"data", "agent", "plans"}
    assert ["site.key", True, ""] in told


def test_a_connection_is_no_listener() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        number = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", number)) as connection:
            assert len(ports.listeners(number)) == 1
            assert ports.listeners(connection.getsockname()[1]) == []


def test_an_address_that_this_machine_has_not() -> None:
    found = ports.port("listen", free_port(), "192.0.2.77", [], "hint")
    assert (found.ok, found.code) == (False, "SAM-N643")


@pytest.mark.parametrize("address", ["0.0.0.0", "::"])  # noqa: S104
def test_a_port_that_other_machines_reach(address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listening = socket.create_server((address, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no address of the kind of {address}, such as IPv6")
    with listening:
        number = listening.getsockname()[1]
        found = ports.local_only("link_port", number)
        assert found is not None
        assert (found.ok, found.code) == (False, "SAM-N642")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        found = ports.local_only("link_port", listening.getsockname()[1])
        assert found is not None
        assert found.ok
    assert ports.local_only("link_port", free_port()) is None


# Data


def test_data_that_are_not_there(trial: Trial) -> None:
    trial.settings(data=str(trial.folder / "none"))
    found = about(looked(trial), "data")
    assert (found.ok, found.code) == (False, "SAM-N652")
    assert found.found.endswith("does not exist")


def test_a_list_of_cases_with_faults(trial: Trial) -> None:
    (trial.data / "b.nii.gz").unlink()
    found = about(looked(trial), "data")
    assert (found.ok, found.code) == (False, "SAM-D206")
    assert found.found.startswith("1 entries are wrong")
    assert found.hint == f"samaritan data check {trial.data}"
    (trial.data / "manifest.csv").unlink()
    assert about(looked(trial), "data").ok is False


@as_root
def test_data_that_the_agent_cannot_read(trial: Trial) -> None:
    os.chown(trial.kit.path("identity.key"), find_user(AGENT).uid, -1)
    assert about(looked(trial), "data").ok
    (trial.data / "c.nii.gz").chmod(0o600)
    found = about(looked(trial), "data")
    assert (found.ok, found.code) == (False, "SAM-N652")
    assert found.found.startswith(f"1 of the files listed cannot be read by {AGENT}")
    trial.data.chmod(0o700)
    found = about(looked(trial), "data")
    assert found.found == f"{trial.data} cannot be read by {AGENT}, or does not exist"


@as_root
def test_data_that_the_courier_must_not_read(trial: Trial) -> None:
    trial.settings(courier_user=COURIER)
    for path in (trial.data, *trial.data.iterdir(), trial.kit.path("identity.key")):
        os.chown(path, find_user(AGENT).uid, find_user(AGENT).gid)
    what = "data and the courier"
    found = about(looked(trial), what)
    assert (found.ok, found.code) == (False, "SAM-N653")
    assert found.found == f"{COURIER} can read 7 files in {trial.data}"
    for path in trial.data.iterdir():
        path.chmod(0o640)
    found = about(looked(trial), what)
    assert found.found == f"{COURIER} can list {trial.data}"  # names can be those of patients
    trial.data.chmod(0o750)
    assert about(looked(trial), what).ok
    # A group is as good as the world.
    (trial.data / "a.nii.gz").chmod(0o640)
    os.chown(trial.data / "a.nii.gz", -1, find_user(COURIER).gid)
    assert about(looked(trial), what).ok  # it cannot come to the file
    trial.data.chmod(0o711)
    assert about(looked(trial), what).found == f"{COURIER} can read 1 files in {trial.data}"


@as_root
def test_data_with_an_access_control_list(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.settings(courier_user=COURIER)
    for path in (trial.data, *trial.data.iterdir(), trial.kit.path("identity.key")):
        os.chown(path, find_user(AGENT).uid, find_user(AGENT).gid)
        path.chmod(0o700)
    monkeypatch.setattr(client.readiness, "has_acl", lambda path: path == trial.data)
    assert about(looked(trial), "data and the courier").code == "SAM-N650"


# Checkpoint, plans, memory


def test_a_checkpoint_that_is_not_there(trial: Trial) -> None:
    trial.settings(checkpoint="none.pth")
    found = about(looked(trial), "checkpoint")
    assert (found.ok, found.code) == (False, "SAM-N655")
    assert found.found == f"{trial.kit.path('none.pth')} does not exist"
    trial.kit.path("none.pth").touch()
    assert about(looked(trial), "checkpoint").found.endswith("is empty")


def test_a_plan_that_needs_a_checkpoint(trial: Trial) -> None:
    plan = trial.plan(base=PlannedBase(name="vit_b", sha256="1" * 64))
    trial.approve(plan)
    found = about(looked(trial), "checkpoint")
    assert (found.ok, found.code) == (False, "SAM-N655")
    assert "vit_b" in found.found


def test_another_checkpoint_than_the_plans(trial: Trial) -> None:
    import hashlib

    content = os.urandom(40_000_000)
    trial.kit.path("base.pth").write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    trial.settings(checkpoint="base.pth")
    assert about(looked(trial), "checkpoint").found == "base.pth, 40 MB"
    trial.approve(trial.plan(base=PlannedBase(name="tiny", sha256=sha256)))
    told: list[str] = []
    findings = list(site_findings(trial.kit, told.append))
    assert about(findings, "checkpoint").found == f"base.pth, 40 MB, as planned ({sha256[:16]})"
    assert told == [f"reading base.pth: {share}" for share in ("42%", "84%", "100%")]
    trial.kit.path("base.pth").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = about(looked(trial), "checkpoint")
    assert (found.ok, found.code) == (False, "SAM-N654")
    assert f"study liver has {sha256[:16]}" in found.found


def test_a_large_checkpoint_is_not_read(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_LARGEST_HASHED", 9)
    path = trial.folder / "base.pth"
    path.write_bytes(b"0" * 10)
    wanted = {"liver": ("tiny", "1" * 64)}
    nobody = User("nobody", 54321, 54321)
    found = checkpoint.checkpoint(path, wanted, nobody, "site.yaml", lambda text: None)
    assert found.ok is None
    path.chmod(0o600)
    found = checkpoint.checkpoint(path, wanted, nobody, "site.yaml", lambda text: None)
    assert (found.ok, found.code) == (False, "SAM-N655")
    assert "cannot be read by nobody" in found.found


def test_a_plan_that_somebody_has_still_to_approve(trial: Trial) -> None:
    plan = trial.approve(trial.plan())
    key = make_identity(trial.folder / "officer.key").public.hex()
    trial.settings(policy={"min_cohort": 1, "approvers": {"officer": key}})
    found = about(looked(trial), f"plan {plan.sha256[:16]}")
    assert (found.ok, found.code) == (None, "SAM-N656")
    assert "officer" in found.found


@pytest.mark.parametrize(
    ("changes", "policy", "ok", "code"),
    [
        ({}, {}, True, ""),
        ({"samaritan": "9.9.9"}, {}, False, "SAM-N658"),
        ({"valid_until": date(2020, 1, 1)}, {}, None, "SAM-K303"),
        ({}, {"min_cohort": 2}, False, "SAM-A201"),
        ({}, {"max_rounds": 1}, False, "SAM-A201"),
    ],
)
def test_a_plan_that_cannot_be_worked_on(
    trial: Trial, changes: dict[str, Any], policy: dict[str, Any], ok: bool | None, code: str
) -> None:
    trial.settings(policy={"min_cohort": 1} | policy)
    plan = trial.approve(trial.plan(**changes))
    found = about(looked(trial), f"plan {plan.sha256[:16]}")
    assert (found.ok, found.code) == (ok, code)


def test_a_plan_for_other_keys(trial: Trial) -> None:
    plan = trial.plan()
    site = plan.sites["A"].model_copy(update={"identity": "2" * 64})
    plan = trial.approve(trial.plan(sites={"A": site}))
    assert about(looked(trial), f"plan {plan.sha256[:16]}").code == "SAM-K307"


def test_a_plan_that_was_changed(trial: Trial) -> None:
    plan = trial.approve(trial.plan())
    path = trial.kit.path("plans", f"{plan.sha256}.json")
    path.write_text(path.read_text().replace('"rounds": 2', '"rounds": 3'))
    assert about(looked(trial), f"plan {plan.sha256[:16]}").code == "SAM-K302"


def test_memory_that_is_too_small(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.approve(trial.plan())
    monkeypatch.setattr("samaritan.models.memory.available_bytes", lambda: 2**20)
    found = about(looked(trial), "memory for liver")
    assert (found.ok, found.code) == (False, "SAM-M104")
    # With the agent running, its model is in memory already.
    monkeypatch.setattr(
        client.doctor, "site_states", lambda kit: {"agent": {"state": "running", "pid": 0}}
    )
    assert "memory for liver" not in {finding.what for finding in looked(trial)}


@pytest.mark.parametrize(("free", "ok"), [(2**28, False), (2**33, True)])
def test_memory_of_a_gpu(
    trial: Trial, monkeypatch: pytest.MonkeyPatch, free: int, ok: bool
) -> None:
    cuda = client.readiness.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "mem_get_info", lambda: (free, 2**34))
    found = {finding.what: finding for finding in client.readiness.memory(trial.plan())}
    assert found["GPU memory for liver"].ok is ok
    assert found["GPU memory for liver"].code == ("" if ok else "SAM-N607")


def test_a_kit_of_another_version(trial: Trial) -> None:
    trial.card(samaritan="0.0.1")
    found = about(looked(trial), "kit")
    assert found.ok is None
    assert __version__ in found.found


# The server


def served(trial: Trial) -> list[Finding]:
    return list(server_findings(trial.server, lambda text: None))


@with_nginx
def test_a_server_that_is_ready(trial: Trial) -> None:
    base = build_base("tiny", 1)
    trial.approve(trial.plan(base=PlannedBase(name="tiny", sha256=base.sha256)))
    findings = served(trial)
    assert faulty(findings) == {}
    assert {finding.what for finding in findings} >= {
        "files of the kit", "server.yaml", "server.key", "superexec.secret", "control.secret",
        "length of superexec.secret", "ca.crt", "server.crt", "crl.pem", "clock",
        "folders to write", "free disk of the kit", "proxy", "link_port", "status_port",
        "port for sites", "checkpoint", "memory for liver",
    }  # fmt: skip
    assert "nginx/" in about(findings, "proxy").found
    # The kit's own files of the proxy are not touched.
    assert not trial.server.path("run").exists()


@pytest.mark.parametrize("name", ["server.key", "crl.pem", "control.secret"])
def test_a_missing_file_of_the_server(trial: Trial, name: str) -> None:
    trial.server.path(name).unlink()
    found = faulty(served(trial))
    assert set(found) == {"SAM-N601"}
    assert name in found["SAM-N601"].found


def test_secrets_of_the_server(trial: Trial) -> None:
    kit = trial.server
    kit.path("control.secret").chmod(0o644)
    kit.path("superexec.secret").write_text("short\n")
    findings = served(trial)
    assert about(findings, "control.secret").code == "SAM-N602"
    found = [finding for finding in findings if finding.code == "SAM-N606"]
    assert [finding.found for finding in found] == ["is 5 bytes long, and must have 32"]


def test_settings_of_the_server(trial: Trial) -> None:
    trial.write("kits/server/server.yaml", {"link": 1})
    assert about(served(trial), "server.yaml").code == "SAM-N104"


def test_certificates_of_the_server(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = trial.server
    key = ec.generate_private_key(ec.SECP256R1())
    kit.path("server.key").write_bytes(certificates.pkcs8(key))
    assert about(served(trial), "server.crt").code == "SAM-N612"
    moment = certificates.now() + timedelta(days=390)
    monkeypatch.setattr(server.doctor, "now", lambda: moment)
    shutil.copy(trial.authority / "issued/server/server.crt", kit.path("server.crt"))
    issued = certificates.certify_server(
        trial.signer(), key.public_key(), "trial", ["localhost"], certificates.now(), 397
    )
    kit.path("server.crt").write_bytes(certificates.pem(issued))
    found = about(served(trial), "server.crt")
    assert (found.ok, found.code) == (None, "SAM-N615")
    assert "authority renew DIR server" in found.hint


@pytest.mark.parametrize(
    ("what", "ok", "code"),
    [("foreign", False, "SAM-N617"), ("broken", False, "SAM-N647"), ("old", False, "SAM-N618"),
     ("ending", None, "SAM-N619")],
)  # fmt: skip
def test_the_list_of_revoked_certificates(
    trial: Trial, what: str, ok: bool | None, code: str
) -> None:
    moment = certificates.now()
    signer = other_signer() if what == "foreign" else trial.signer()
    end = {"old": -1, "ending": 29}.get(what, 99)
    made = certificates.revocation_list(
        signer, {}, moment - timedelta(days=2), moment + timedelta(days=end, minutes=1)
    )
    content = b"nothing" if what == "broken" else certificates.pem(made)
    trial.server.path("crl.pem").write_bytes(content)
    found = about(served(trial), "crl.pem")
    assert (found.ok, found.code) == (ok, code)


def test_a_server_without_nginx(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy.shutil, "which", lambda *_, **__: None)
    assert about(served(trial), "proxy").code == "SAM-N405"


@with_nginx
def test_a_configuration_that_nginx_refuses(trial: Trial) -> None:
    trial.write("kits/server/server.yaml", {"listen": "127.0.0.1 bogus"})
    found = about(served(trial), "proxy")
    assert (found.ok, found.code) == (False, "SAM-N644")
    assert "[emerg]" in found.found


def test_ports_of_the_server(trial: Trial) -> None:
    with (
        socket.create_server(("0.0.0.0", 0)) as link,  # noqa: S104
        socket.create_server(("127.0.0.1", trial.port)),
    ):
        number = link.getsockname()[1]
        trial.write("kits/server/server.yaml", {"link_port": number, "listen": "127.0.0.1"})
        findings = served(trial)
    assert about(findings, "link_port").code == "SAM-N641"
    assert about(findings, "link_port from outside").code == "SAM-N642"
    assert about(findings, "port for sites").code == "SAM-N641"


def test_plans_of_the_server(trial: Trial) -> None:
    good, other = trial.plan(), trial.plan(samaritan="9.9.9")
    old = trial.plan(valid_until=date(2020, 1, 1))
    for plan in (good, other, old):
        trial.approve(plan)
    (trial.server.path("plans") / f"{'0' * 64}.json").write_text("{}")
    codes = {f.what: (f.ok, f.code) for f in served(trial) if f.what.startswith("plan ")}
    assert codes == {
        f"plan {good.sha256[:16]}": (True, ""),
        f"plan {other.sha256[:16]}": (None, "SAM-N645"),
        f"plan {old.sha256[:16]}": (None, "SAM-K303"),
        f"plan {'0' * 16}": (False, "SAM-K301"),
    }


def test_nodes_of_a_running_server(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Node:
        name: str
        status: str
        node_id: int = 7

    class Control:
        def nodes(self) -> list[Node]:
            return [Node("A", "online"), Node("B", "offline"), Node("C", "unregistered")]

    @contextlib.contextmanager
    def connect(kit: Kit, settings: Any) -> Iterator[Control]:
        yield Control()

    @contextlib.contextmanager
    def silent(kit: Kit, settings: Any) -> Iterator[Control]:
        raise DeploymentError("SAM-N301", "the SuperLink does not answer", "Start it.")
        yield

    states = {name: {"state": "running", "pid": 0} for name in ("link", "proxy", "apps")}
    monkeypatch.setattr(server.doctor, "states", lambda folder: states)
    trial.server.path("run").mkdir()
    monkeypatch.setattr(server.doctor, "connect", connect)
    findings = served(trial)
    assert about(findings, "SuperLink").found == "answers; 2 nodes may connect"
    assert about(findings, "nodes").found == "not connected: B"
    assert about(findings, "nodes").code == "SAM-N646"
    monkeypatch.setattr(server.doctor, "connect", silent)
    assert about(served(trial), "SuperLink").code == "SAM-N301"


# The command


@pytest.fixture
def _bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "samaritan.operate.checks.machine.machine_findings", lambda: iter([Finding("x", True, "y")])
    )


@pytest.mark.usefixtures("_bare_machine")
def test_the_command_shows_lines(trial: Trial) -> None:
    done = CliRunner().invoke(app, ["doctor", "--kit", str(trial.kit.folder)])
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "ok      x: y"
    number = next(
        n for n, line in enumerate(lines) if line.startswith("MISSING port of the server")
    )
    assert lines[number].startswith("MISSING port of the server: SAM-N632  127.0.0.1 port")
    assert lines[number + 1].startswith("          The server is not running")
    assert lines[-1] == "mend what is missing, then run this again"
    with own_server(trial):
        done = CliRunner().invoke(app, ["doctor", "--kit", str(trial.kit.folder)])
    assert done.exit_code == 0
    assert done.stdout.splitlines()[-1] == "this machine and the kit are ready"


@pytest.mark.usefixtures("_bare_machine")
def test_the_command_prints_json(trial: Trial) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json", "--kit", str(trial.server.folder)])
    told = json.loads(done.stdout)
    assert told["ready"] == (done.exit_code == 0)
    assert {"what", "ok", "found", "hint", "code"} == set(told["checks"][0])
    assert "crl.pem" in {check["what"] for check in told["checks"]}


@pytest.mark.usefixtures("_bare_machine")
def test_a_folder_that_is_no_kit(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--kit", str(tmp_path)])
    assert isinstance(done.exception, DeploymentError)
    assert done.exception.code == "SAM-N101"


def test_a_machine_without_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from samaritan.operate.checks import machine

    monkeypatch.setattr(machine, "_NEEDED", ("no-such-package",))
    found = about(list(machine.machine_findings()), "no-such-package")
    assert (found.ok, found.code) == (False, "SAM-N692")
