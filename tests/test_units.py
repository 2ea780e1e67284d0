"""How administrators run a kit: units, containers, two system users that the kernel keeps apart."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from client import permissions
from client.halves import Half, half_folder, half_programs, site_states, stop_site
from client.home import SOCKET
from client.permissions import (
    PRIVATE,
    SHARED,
    Users,
    hand_over,
    require_own_user,
    rule,
    unfinished,
)
from client.redaction import RedactedError
from client.service import serve
from client.settings import SiteSettings, load_settings
from client.socket import AgentSocket
from samaritan.audit.policy import SitePolicy
from samaritan.cli.main import app
from samaritan.errors import DeploymentError
from samaritan.messages import Request
from samaritan.operate.checks.users import ENTER, READ, WRITE, User, find_user, has_acl
from samaritan.provision import kits
from samaritan.provision.kit import Kit, load_kit
from samaritan.provision.kits import provision
from samaritan.provision.project import folder_name
from server.planning import Study
from server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[1]
MARY = "St. Mary's / Köln 50%"
PROJECT: dict[str, Any] = {
    "project": "liver",
    "title": "Liver lesions",
    "server": {"hosts": ["fl.example.org"], "port": 9444},
    "sites": [{"name": MARY}],
    "keys": "shipped",
}
AGENT, COURIER, STRANGER = "daemon", "www-data", "nobody"

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes other users")
analyze = shutil.which("systemd-analyze")
with_systemd = pytest.mark.skipif(analyze is None, reason="no systemd-analyze here")


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samaritan.files.os.fsync", lambda descriptor: None)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(PROJECT))
    provision(tmp_path / "project.yaml", tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def server(out: Path) -> Path:
    return out / "server"


@pytest.fixture
def site(out: Path) -> Path:
    return out / "sites" / folder_name(MARY)


def units(folder: Path) -> list[Path]:
    return sorted(folder.glob("systemd/*.service"))


def directives(path: Path) -> dict[str, list[str]]:
    """The settings of a unit; one may stand there several times."""
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if line and not line.startswith(("#", "[")):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


# Units of systemd


def in_place(path: Path, folder: Path) -> Path:
    """A unit whose program exists on this machine."""
    copy = folder / path.name
    copy.write_text(path.read_text().replace("/opt/samaritan/bin/samaritan", "/bin/true"))
    return copy


def verified(unit: Path) -> str:
    """What systemd has to say of a unit."""
    done = subprocess.run(
        [str(analyze), "verify", unit], capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr


@with_systemd
def test_systemd_takes_the_units_as_they_are(server: Path, site: Path, tmp_path: Path) -> None:
    found = [*units(server), *units(site)]
    assert [path.name for path in found] == [
        "samaritan-server.service", "samaritan-agent.service", "samaritan-courier.service",
    ]  # fmt: skip
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for folder in (right, wrong):
        folder.mkdir()
    for path in found:
        assert verified(in_place(path, right)) == ""
        # A slip of the pen would be told of, and noticed above.
        unit = in_place(path, wrong)
        unit.write_text(unit.read_text() + "[Service]\nProtectSystme=strict\n")
        assert "ProtectSystme" in verified(unit)


@with_systemd
def test_systemd_finds_little_exposed(server: Path, site: Path, tmp_path: Path) -> None:
    for path in (*units(server), *units(site)):
        # The threshold is in tenths: 3.1.
        done = subprocess.run(
            [analyze, "security", "--offline=true", "--threshold=31", in_place(path, tmp_path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


def test_the_agent_has_no_network_and_the_courier_no_data(site: Path) -> None:
    agent = directives(site / "systemd/samaritan-agent.service")
    courier = directives(site / "systemd/samaritan-courier.service")
    assert agent["PrivateNetwork"] == ["yes"]
    assert agent["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert "PrivateNetwork" not in courier
    assert courier["RestrictAddressFamilies"] == ["AF_INET AF_INET6 AF_UNIX"]
    assert agent["User"] != courier["User"]
    home = "/srv/samaritan/liver/site"
    assert agent["ReadWritePaths"] == [home]
    assert courier["ReadWritePaths"] == [f"{home}/courier"]
    shut = " ".join(courier["InaccessiblePaths"]).split()
    assert set(shut) == {f"-{home}/{name}" for name in PRIVATE}
    assert agent["ExecStart"] == [f"/opt/samaritan/bin/samaritan site start {home} --only agent"]
    assert courier["ExecStart"] == [
        f"/opt/samaritan/bin/samaritan site start {home} --only courier"
    ]


def test_every_unit_is_confined(server: Path, site: Path) -> None:
    for path in (*units(server), *units(site)):
        found = directives(path)
        for key, value in {
            "NoNewPrivileges": "yes",
            "ProtectSystem": "strict",
            "ProtectHome": "yes",
            "PrivateTmp": "yes",
            "ProtectProc": "invisible",
            "CapabilityBoundingSet": "",
            "UMask": "0077",
        }.items():
            assert found[key] == [value], (path.name, key)
        # PyTorch makes machine code while it runs.
        assert "MemoryDenyWriteExecute" not in found
        assert found["User"] != ["root"]


@pytest.mark.skipif(shutil.which("systemd-sysusers") is None, reason="no systemd-sysusers here")
def test_the_users_of_the_units_are_made(server: Path, site: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for folder in (server, site):
        shutil.copytree(folder / "systemd/sysusers.d", root / "etc/sysusers.d", dirs_exist_ok=True)
    subprocess.run(["systemd-sysusers", f"--root={root}"], check=True, capture_output=True)
    made = {line.split(":")[0] for line in (root / "etc/passwd").read_text().splitlines()}
    needed = {directives(path)["User"][0] for path in (*units(server), *units(site))}
    assert needed == made == {"samaritan-agent", "samaritan-courier", "samaritan-server"}


def test_folders_of_tmpfiles_are_as_permissions_sets_them(site: Path, server: Path) -> None:
    home = "/srv/samaritan/liver/site"
    lines = (site / "systemd/tmpfiles.d/samaritan-site.conf").read_text().splitlines()
    rows = [line.split() for line in lines if not line.startswith("#")]
    found = {row[1]: row for row in rows}
    assert set(found) == {"/srv/samaritan", "/srv/samaritan/liver", home, f"{home}/run"}
    for path in (home, f"{home}/run"):
        given = rule(Path(path).relative_to(home))
        kind, _, mode, owner, group, age = found[path]
        assert (kind, age) == ("d", "-")
        assert int(mode, 8) == given.folder
        assert (owner, group) == (f"samaritan-{given.owner}", f"samaritan-{given.group}")
    assert (server / "systemd/tmpfiles.d/samaritan-server.conf").read_text().count("\nd ") == 3


@as_root
@pytest.mark.skipif(shutil.which("systemd-tmpfiles") is None, reason="no systemd-tmpfiles here")
def test_systemd_makes_the_folders(site: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(site / "systemd/tmpfiles.d", root / "etc/tmpfiles.d")
    (root / "etc/passwd").write_text(
        "root:x:0:0::/:\nsamaritan-agent:x:901:901::/:\nsamaritan-courier:x:902:902::/:\n"
    )
    (root / "etc/group").write_text("root:x:0:\nsamaritan-agent:x:901:\nsamaritan-courier:x:902:\n")
    subprocess.run(["systemd-tmpfiles", "--create", f"--root={root}"], check=True)
    made = (root / "srv/samaritan/liver/site/run").stat()
    assert (made.st_uid, made.st_gid, stat.S_IMODE(made.st_mode)) == (901, 902, 0o2710)


# Containers

_SERVICE = {
    "image", "user", "network_mode", "command", "environment", "tmpfs", "volumes", "restart",
    "read_only", "cap_drop", "security_opt", "pids_limit", "stop_grace_period", "ports", "deploy",
}  # fmt: skip
_MOUNT = {"type", "source", "target", "read_only"}
"""What of the compose specification is used, so that a slip of the pen is noticed."""


def services(path: Path) -> dict[str, dict[str, Any]]:
    tree = yaml.safe_load(path.read_text())
    assert set(tree) <= {"name", "services", "volumes"} | {k for k in tree if k.startswith("x-")}
    found: dict[str, dict[str, Any]] = tree["services"]
    for service in found.values():
        assert set(service) <= _SERVICE
        for mount in service.get("volumes", []):
            assert {"type", "source", "target"} <= set(mount) <= _MOUNT
    return found


def test_containers_are_confined(site: Path, server: Path) -> None:
    found = services(site / "compose.yaml") | services(server / "compose.yaml")
    assert set(found) == {"agent", "courier", "server"}
    users = set()
    for name, service in found.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        user, _, group = service["user"].partition(":")
        assert user == group
        assert int(user) > 10000
        users.add(user)
    assert len(users) == 3
    assert found["agent"]["network_mode"] == "none"
    assert "network_mode" not in found["courier"]
    assert not any("ports" in found[name] for name in ("agent", "courier"))
    assert found["server"]["ports"] == ["9444:9444"]


def test_the_couriers_container_sees_nothing_of_the_agents(site: Path) -> None:
    found = services(site / "compose.yaml")
    mounts = {m["source"]: m for m in found["courier"]["volumes"]}
    assert set(mounts) == {
        "./kit.yaml", "./site.yaml", "./ca.crt", "./site.crt", "./site.key", "./node.key", "./run",
        "./courier",
    }  # fmt: skip
    for source, mount in mounts.items():
        assert mount["target"] == f"/kit/{source[2:]}"
        assert mount.get("read_only", False) == (source != "./courier")
    own = {m["target"]: m for m in found["agent"]["volumes"]}
    assert own["/data"]["read_only"] is True
    assert own["/data"]["source"].startswith("${SAMARITAN_DATA:?")
    assert own["/kit"] == {"type": "bind", "source": ".", "target": "/kit"}


def test_the_gpu_is_an_addition_for_the_agent_alone(site: Path) -> None:
    plain, more = services(site / "compose.yaml"), services(site / "compose.cuda.yaml")
    assert set(more) == {"agent", "courier"}
    (device,) = more["agent"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}
    assert set(more["courier"]) == {"image"}
    assert more["agent"]["image"] == more["courier"]["image"] != plain["agent"]["image"]


def test_the_images_hold_the_users_of_the_containers(site: Path, server: Path) -> None:
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        text = (site / "docker" / name).read_text()
        users = dict(re.findall(r"useradd --uid (\d+) .* (samaritan-\w+)", text))
        agent, courier = services(site / "compose.yaml").values()
        assert users[agent["user"].partition(":")[0]] == "samaritan-agent"
        assert users[courier["user"].partition(":")[0]] == "samaritan-courier"
        assert text.rstrip().splitlines()[-1] == "USER 10001:10001"
        images = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
        # No registry: the engine's own is asked.
        assert all("." not in image.partition("/")[0].partition(":")[0] for image in images), images
    text = (server / "docker/Dockerfile.cpu").read_text()
    assert "--uid 10003 " in text
    assert "nginx" in text


def test_no_file_of_a_kit_names_a_registry(site: Path, server: Path) -> None:
    for folder in (site, server):
        for name in kits.UNITS["site" if folder == site else "server"]:
            text = (folder / name).read_text()
            assert not re.search(
                r"docker\.io|ghcr|quay|nvcr|gcr\.io|pypi|https?://(?!proxy\.)", text
            )


# Starting


def run_start(kit: Path, ready: bool, *arguments: str) -> tuple[int, str]:
    """Runs start.sh with a program that writes down how it is called."""
    program = kit.parent / "samaritan"
    program.write_text(f'#!/bin/sh\necho "$@"\n[ "$1" != doctor ] || exit {0 if ready else 1}\n')
    program.chmod(0o755)
    done = subprocess.run(
        [kit / "start.sh", *arguments],
        env={"PATH": os.environ["PATH"], "SAMARITAN": str(program)},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_start_looks_first(site: Path, server: Path) -> None:
    for kit, role in ((site, "site"), (server, "server")):
        code, said = run_start(kit, True)
        assert (code, said.splitlines()) == (0, [f"doctor --kit {kit}", f"{role} start {kit}"])
        assert run_start(kit, False) == (1, f"doctor --kit {kit}\n")
        assert run_start(kit, False, "--anyway") == (0, f"{role} start {kit}\n")
    assert run_start(site, True, "--anyway", "--only", "agent")[1].endswith(" --only agent\n")


def test_the_archive_keeps_folders_and_modes(site: Path) -> None:
    with zipfile.ZipFile(site.with_name(f"{site.name}.zip")) as archive:
        modes = {i.filename: i.external_attr >> 16 & 0o777 for i in archive.infolist()}
    for name in kits.UNITS["site"]:
        assert modes[f"{site.name}/{name}"] == (0o755 if name == "start.sh" else 0o644), name


def test_a_half_runs_its_own_programs(site: Path) -> None:
    (site / "site.yaml").write_text("data: /nowhere\nnode_port: 9311\n")
    kit = load_kit(site, "site")
    settings = load_settings(site / "site.yaml")
    assert [program.name for program in half_programs(kit, settings, "agent")] == ["agent"]
    assert not (site / "run/courier.secret").exists()
    found = {program.name: program for program in half_programs(kit, settings, "courier")}
    assert set(found) == {"node", "courier"}
    own = half_folder(kit, "courier") / "run"
    assert own == site / "courier/run"
    for program in found.values():
        # Nothing of the courier's is written where the agent's things lie.
        assert program.environment["FLWR_HOME"] == str(own / "flower")
        words = list(program.command)
        assert words[words.index("--superexec-auth-secret-file") + 1] == str(own / "courier.secret")
    assert found["courier"].environment["SAMARITAN_AGENT_SOCKET"] == str(site.joinpath(*SOCKET))
    assert stat.S_IMODE((own / "courier.secret").stat().st_mode) == 0o600


@pytest.mark.timeout(120)
def test_both_halves_are_seen_and_stopped_as_one(site: Path) -> None:
    (site / "site.yaml").write_text("data: /nowhere\nnode_port: 9312\nthreads: 1\n")
    kit = load_kit(site, "site")
    command = [str(Path(sys.executable).with_name("samaritan")), "site", "start", str(site)]
    started = [
        subprocess.Popen(
            [*command, "--only", half], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for half in ("agent", "courier")
    ]
    try:
        end = time.monotonic() + 60
        while set(site_states(kit)) != {"agent", "node", "courier"}:
            assert time.monotonic() < end
            time.sleep(0.2)
        pids = [told["pid"] for told in site_states(kit).values() if told["pid"]]
        assert pids
        stop_site(kit)
        # They are gone when it says so: what is started next finds ports and locks free.
        assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
        for process in started:
            process.wait(30)
        assert site_states(kit) == {}
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
            process.wait(30)
    with pytest.raises(DeploymentError) as caught:
        stop_site(kit)
    assert caught.value.code == "SAM-N402"


# Two users


@pytest.fixture
def open_site(tmp_path: Path) -> Iterator[Path]:
    """A site's kit, with data, in a folder that all users can come to."""
    with tempfile.TemporaryDirectory(prefix="samaritan-units-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        project = {**PROJECT, "sites": [{"name": "A"}]}
        (tmp_path / "project.yaml").write_text(yaml.safe_dump(project))
        provision(tmp_path / "project.yaml", tmp_path / "out")
        shutil.copytree(tmp_path / "out/sites/A", folder / "kit")
        (folder / "kit").chmod(0o700)
        data = folder / "data"
        data.mkdir()
        (data / "manifest.csv").write_text("case_id,image,label\n")
        if os.geteuid() == 0:
            for path in (data, data / "manifest.csv"):
                os.chown(path, find_user(AGENT).uid, -1)
                path.chmod(0o750 if path.is_dir() else 0o640)
        (folder / "kit/site.yaml").write_text(f"data: {data}\ncourier_user: {COURIER}\n")
        yield folder / "kit"


def as_user(name: str, work: Callable[[], Any]) -> Any:
    """What a function returns to another user; it runs in a child that never starts a program."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            become(name)
            told = {"value": work()}
        except BaseException:
            told = {"error": traceback.format_exc()}
        os.write(writer, json.dumps(told).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        told = json.loads(stream.read())
    os.waitpid(child, 0)
    assert "error" not in told, told["error"]
    return told["value"]


def become(name: str) -> None:
    entry = pwd.getpwnam(name)
    os.setgroups(os.getgrouplist(entry.pw_name, entry.pw_gid))
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def readable(*paths: Path) -> list[str]:
    """Which of some files and folders this process can read."""
    found = []
    for path in paths:
        with contextlib.suppress(PermissionError):
            list(path.iterdir()) if path.is_dir() else path.read_bytes()
            found.append(path.name)
    return found


def question(path: Path) -> str:
    """What becomes of a question to an agent: the code of its answer, or of the failure."""
    asked = Request("hello", "0" * 64, "message", "0" * 64)
    try:
        AgentSocket(path, wait_s=0).answer(asked)
    except (RedactedError, DeploymentError) as error:
        return error.code
    return "answered"


@contextlib.contextmanager
def agent_of(kit: Path) -> Iterator[None]:
    """The agent of a kit as its own user."""
    if (child := os.fork()) == 0:
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            become(AGENT)
            os.umask(0o077)
            serve(kit)
            code = 0
        except BaseException:
            traceback.print_exc()
        os._exit(code)
    try:
        end = time.monotonic() + 60
        while not kit.joinpath(*SOCKET).exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            assert time.monotonic() < end
            time.sleep(0.05)
        time.sleep(0.2)  # between the socket and its mode
        yield
    finally:
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@as_root
def test_the_kernel_keeps_the_halves_apart(open_site: Path) -> None:
    kit = load_kit(open_site, "site")
    hand_over(kit, AGENT, COURIER)
    path = kit.path(*SOCKET)
    data = open_site.parent / "data"
    private = [kit.path("identity.key"), kit.path("state"), kit.path("log"), kit.path("plans"),
               kit.path("approvals"), data, data / "manifest.csv"]  # fmt: skip
    with agent_of(open_site):
        log = kit.path("log", "site.jsonl")
        # The courier is heard: nobody has approved that plan.
        assert as_user(COURIER, lambda: question(path)) == "SAM-K305"
        assert as_user(COURIER, lambda: readable(*private, log, open_site, path.parent)) == []
        own = [kit.path(name) for name in (*SHARED, "site.key", "node.key")]
        assert as_user(COURIER, lambda: readable(*own)) == [path.name for path in own]
        # Nobody else gets as far as the socket, nor to any file.
        assert as_user(STRANGER, lambda: question(path)) == "SAM-N202"
        assert as_user(STRANGER, lambda: readable(*private, *own, log)) == []
        # Were the folders open, the agent would still ask the kernel who is there.
        for folder in (kit.folder, path.parent):
            folder.chmod(folder.stat().st_mode | 0o001)
        path.chmod(0o666)
        assert as_user(STRANGER, lambda: question(path)) == "SAM-N203"
        assert "SAM-K305" in log.read_text()
    # The agent reads its own, and not the key by which the courier connects.
    assert as_user(AGENT, lambda: readable(*private, log)) == [p.name for p in (*private, log)]
    assert as_user(AGENT, lambda: readable(kit.path("site.key"), kit.path("node.key"))) == []


@as_root
def test_neither_half_writes_where_the_other_reads(open_site: Path) -> None:
    kit = load_kit(open_site, "site")
    users = hand_over(kit, AGENT, COURIER)

    def written(*paths: Path) -> list[str]:
        found = []
        for path in paths:
            with contextlib.suppress(PermissionError):
                (path / "trial").write_text("x")
                (path / "trial").unlink()
                found.append(path.name)
        return found

    folders = [kit.folder, *(kit.path(n) for n in ("run", "state", "log", "courier"))]
    assert as_user(COURIER, lambda: written(*folders)) == ["courier"]
    assert as_user(AGENT, lambda: written(*folders)) == ["kit", "run", "state", "log"]
    programs = as_user(
        COURIER,
        lambda: [
            p.name for p in half_programs(kit, load_settings(kit.path("site.yaml")), "courier")
        ],
    )
    assert programs == ["node", "courier"]
    assert unfinished(kit, users) == []


@as_root
def test_a_half_runs_as_its_own_user_alone(
    open_site: Path, samaritan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samaritan.operate.processes.run", lambda *_: None)  # else it would start
    kit, settings = load_kit(open_site, "site"), load_settings(open_site / "site.yaml")
    # Root owns the kit still, and is nobody's user all the same.
    assert "SAM-N667" in samaritan("site", "start", open_site, "--only", "agent").err
    hand_over(kit, AGENT, COURIER)

    def code(half: Half | None) -> str:
        try:
            require_own_user(kit, settings, half)
        except DeploymentError as error:
            return error.code
        return ""

    halves: tuple[Half | None, ...] = (None, "agent", "courier")
    for user, own in ((AGENT, "agent"), (COURIER, "courier")):
        told = as_user(user, lambda: [code(half) for half in halves])
        assert told == ["" if half == own else "SAM-N667" for half in halves]
    for only in ((), ("--only", "agent"), ("--only", "courier")):  # as root
        done = samaritan("site", "start", open_site, *only)
        assert (done.code, "SAM-N667" in done.err) == (1, True)
    assert not any((open_site / "run").iterdir())  # root has left nothing
    one = settings.model_copy(update={"courier_user": None})
    require_own_user(kit, one, None)


@as_root
def test_every_file_gets_its_owner(open_site: Path) -> None:
    (open_site / "log").mkdir()
    (open_site / "log/site.jsonl").write_text("{}\n")
    (open_site / "secure_sums.jsonl").touch()
    (open_site / "note of somebody").touch()
    (open_site / "courier/run/flower").mkdir(parents=True)
    program = open_site / "courier/run/flower/program"
    program.touch(0o755)
    hand_over(load_kit(open_site, "site"), AGENT, COURIER)
    agent, courier = find_user(AGENT), find_user(COURIER)

    def told(name: str) -> tuple[int, int, int]:
        found = (open_site / name).stat()
        return found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)

    both = (agent.uid, courier.gid)
    assert told(".") == (*both, 0o710)
    assert told("run") == (*both, 0o2710)
    for name in (*SHARED, "README.md", "compose.yaml", "systemd/samaritan-agent.service"):
        assert told(name) == (*both, 0o640), name
    assert told("start.sh") == (*both, 0o750)
    for name in ("site.key", "node.key"):
        assert told(name) == (courier.uid, courier.gid, 0o600)
    for name in ("identity.key", "secure_sums.jsonl", "log/site.jsonl", "note of somebody"):
        assert told(name) == (agent.uid, agent.gid, 0o600), name
    for name in ("state", "log", "plans", "approvals"):
        assert told(name) == (agent.uid, agent.gid, 0o700), name
    for name in ("courier", "courier/run", "courier/run/flower"):
        assert told(name) == (courier.uid, courier.gid, 0o700), name
    assert told("courier/run/flower/program") == (courier.uid, courier.gid, 0o700)


@as_root
def test_every_file_that_provisioning_makes_has_a_known_owner(open_site: Path) -> None:
    for name in (*kits.SITE_FILES, *kits.SHIPPED_FILES):
        given = rule(Path(name))
        expected = {"identity.key": ("agent", "agent"), "site.key": ("courier", "courier"),
                    "node.key": ("courier", "courier")}  # fmt: skip
        assert (given.owner, given.group) == expected.get(name, ("agent", "courier")), name


SPOILERS: dict[str, tuple[Callable[[Kit], Any], str, str, str]] = {
    "no such user": (lambda kit: None, "nobody-of-this-name", COURIER, "SAM-N662"),
    "one user": (lambda kit: None, AGENT, AGENT, "SAM-N662"),
    "root": (lambda kit: None, "root", COURIER, "SAM-N662"),
    "another courier": (lambda kit: None, AGENT, STRANGER, "SAM-N663"),
    "no courier": (
        lambda kit: kit.path("site.yaml").write_text("data: x\n"), AGENT, COURIER, "SAM-N663"
    ),
    "a shut folder": (lambda kit: kit.folder.parent.chmod(0o700), AGENT, COURIER, "SAM-N665"),
    "a link": (lambda kit: kit.path("a").symlink_to("/etc/passwd"), AGENT, COURIER, "SAM-N666"),
    "a folder's link": (lambda kit: kit.path("a").symlink_to("/etc"), AGENT, COURIER, "SAM-N666"),
    "a hard link": (
        lambda kit: kit.path("a").hardlink_to(kit.path("ca.crt")), AGENT, COURIER, "SAM-N666"
    ),
}  # fmt: skip


@as_root
@pytest.mark.parametrize("what", SPOILERS)
def test_what_cannot_be_handed_over_is_refused(open_site: Path, what: str) -> None:
    kit = load_kit(open_site, "site")
    spoil, agent, courier, code = SPOILERS[what]
    spoil(kit)
    before = Path("/etc/passwd").stat()
    with pytest.raises(DeploymentError) as caught:
        hand_over(kit, agent, courier)
    assert caught.value.code == code
    after = Path("/etc/passwd").stat()
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)


@as_root
def test_running_processes_keep_their_files(
    open_site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(permissions, "site_states", lambda kit: {"agent": {}})
    with pytest.raises(DeploymentError) as caught:
        hand_over(load_kit(open_site, "site"), AGENT, COURIER)
    assert caught.value.code == "SAM-N664"


def test_root_alone_hands_over(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.permissions.os.geteuid", lambda: 1000)
    with pytest.raises(DeploymentError) as caught:
        hand_over(load_kit(site, "site"), AGENT, COURIER)
    assert caught.value.code == "SAM-N661"


@as_root
def test_numbers_name_users_that_only_a_container_knows(open_site: Path) -> None:
    settings = open_site / "site.yaml"
    settings.write_text(settings.read_text().replace(COURIER, "samaritan-courier"))
    users = hand_over(load_kit(open_site, "site"), "10001", "10002")
    assert (users.agent.uid, users.courier.uid) == (10001, 10002)
    assert (open_site / "site.key").stat().st_uid == 10002
    assert (open_site / "run").stat().st_gid == 10002


@as_root
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda kit: kit.path("log").chmod(0o755), "can read log"),
        (lambda kit: kit.path("identity.key").chmod(0o644), "can read identity.key"),
        (lambda kit: kit.path("site.crt").chmod(0o600), "cannot read site.crt"),
        (lambda kit: kit.path("run").chmod(0o2700), "cannot enter"),
        (lambda kit: kit.path("run").chmod(0o710), "is closed to"),
        (lambda kit: kit.folder.chmod(0o770), "can write"),
        (lambda kit: kit.path("site.yaml").chmod(0o660), "can write"),
    ],
)
def test_what_is_not_handed_over_is_noticed(
    open_site: Path, spoil: Callable[[Kit], None], words: str
) -> None:
    kit = load_kit(open_site, "site")
    users = hand_over(kit, AGENT, COURIER)
    spoil(kit)
    (fault,) = unfinished(kit, users)
    assert words in fault


# What users may do, told from bits


@as_root
def test_bits_say_what_the_kernel_does() -> None:
    """Modes for owner, group and others, against the kernel's own answer."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        paths = [folder / f"{mode:03o}" for mode in range(0, 0o1000, 0o11)]
        for path in paths:
            path.touch()
            os.chown(path, find_user(AGENT).uid, find_user(COURIER).gid)
            path.chmod(int(path.name, 8))
        for person in (AGENT, COURIER, STRANGER):
            asked = as_user(
                person,
                lambda: [os.access(p, bits) for p in paths for bits in (os.R_OK, os.W_OK, os.X_OK)],
            )
            user = find_user(person)
            told = [user.may(path, bits) for path in paths for bits in (READ, WRITE, ENTER)]
            assert told == asked
            assert 0 < sum(told) < len(told)


def test_a_folder_on_the_way_counts(tmp_path: Path) -> None:
    user = User("somebody", 54321, 54321, frozenset({54321}))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        path = folder / "file"
        path.touch(0o644)
        assert user.may(path, READ)
        assert not user.may(path, WRITE)
        folder.chmod(0o700)
        assert not user.may(path, READ)
        assert not user.may(folder / "none", READ)
        link = tmp_path / "link"
        link.symlink_to(path)
        folder.chmod(0o755)
        assert user.may(link, READ)  # links are followed: the way to the file itself counts


def test_users_are_found_by_name_and_number() -> None:
    assert find_user("daemon").uid == pwd.getpwnam("daemon").pw_uid
    assert find_user(str(pwd.getpwnam("daemon").pw_uid)).name == "daemon"
    assert find_user("54321") == User("54321", 54321, 54321, frozenset({54321}))
    with pytest.raises(KeyError):
        find_user("nobody-of-this-name")


def test_access_control_lists_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    assert not has_acl(path)
    # Version 2; a named user, and the mask that belongs to it.
    entries = ((1, 6, 0xFFFFFFFF), (2, 4, 1), (4, 4, 0xFFFFFFFF), (16, 4, 0xFFFFFFFF),
               (32, 0, 0xFFFFFFFF))  # fmt: skip
    packed = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little") + bits.to_bytes(2, "little") + who.to_bytes(4, "little")
        for tag, bits, who in entries
    )
    try:
        os.setxattr(path, "system.posix_acl_access", packed)
    except OSError:
        pytest.skip("this file system has no access control lists")
    assert has_acl(path)


def test_users_of_one_number_are_one() -> None:
    one = User("a", 5, 5)
    assert not Users(one, one).are_two
    assert Users(one, User("b", 6, 6)).are_two


def test_a_socket_that_nobody_serves_is_taken_away(open_site: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root becomes other users")
    (open_site / "run").mkdir()
    stale = open_site / "run/agent.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(stale))
    hand_over(load_kit(open_site, "site"), AGENT, COURIER)
    assert not stale.exists()


# Pages


def test_the_page_of_site_settings_is_the_generated_one() -> None:
    made = runpy.run_path(str(ROOT / "docs/make_site.py"))
    written = (ROOT / "docs/site.md").read_text("utf-8")
    assert written == made["page"](), "run .venv/bin/python docs/make_site.py"
    for key in made["keys"]():
        assert f"| `{key}` |" in written
    assert len(made["keys"]()) == len(SiteSettings.model_fields) - 1 + len(SitePolicy.model_fields)


def test_a_setting_without_a_meaning_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    made = runpy.run_path(str(ROOT / "docs/make_site.py"))
    names = made["page"].__globals__["_CONFIGURATION"]
    lines = names["_attribute_lines"]
    monkeypatch.setitem(
        names,
        "_attribute_lines",
        lambda model: {k: v for k, v in lines(model).items() if k != "hours"},
    )
    with pytest.raises(ValueError, match=r"policy\.hours: explain it"):
        made["page"]()


def test_settings_of_the_other_files_are_explained() -> None:
    page = (ROOT / "docs/deployment.md").read_text("utf-8")
    for model in (ServerSettings, Study):
        for key in model.model_fields:
            assert re.search(rf"^\|[^|]*`{key}`", page, re.MULTILINE), key
    defaults = re.findall(r"^\| `(link_port|status_port|listen)` \| `?([^ `]+)`? \|", page, re.M)
    for key, default in defaults:
        assert str(ServerSettings.model_fields[key].default) == default
    assert len(defaults) == 3


def test_the_page_for_it_tells_owners_as_they_are_set() -> None:
    page = (ROOT / "docs/hospital-it.md").read_text("utf-8")
    rows = re.findall(r"^\| (.+) \| (agent|courier) \| (agent|courier) \| (.+) \|$", page, re.M)
    named = {"the kit's folder": ".", "`courier/` and all in it": "courier"}
    seen = 0
    for files, owner, group, modes in rows:
        for name in re.findall(r"`([\w./]+?)/?`", files) or [named[files]]:
            given = rule(Path(named.get(files, name)))
            assert (given.owner, given.group) == (owner, group), name
            mode = given.file if "." in name[1:] or not given.folder else given.folder
            assert f"{mode:04o}" in modes, name
            seen += 1
    assert seen >= 9


def test_commands_of_containers_and_units_exist(site: Path, server: Path) -> None:
    command = typer.main.get_command(app)
    for path in (*units(server), *units(site)):
        words = directives(path)["ExecStart"][0].split()[1:]
        group = command.commands[words[0]]
        assert {o for p in group.commands[words[1]].params for o in p.opts} >= {
            word for word in words if word.startswith("--")
        }
    for folder in (site, server):
        for service in services(folder / "compose.yaml").values():
            assert service["command"][:2] in (["site", "start"], ["server", "start"])
