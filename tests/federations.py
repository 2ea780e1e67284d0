"""A whole consortium on loopback, from its own commands: provisioned, started, hurt, stopped."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from samaritan.operate.processes import states

SAMARITAN = str(Path(sys.executable).with_name("samaritan"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

SMALL: dict[str, Any] = {
    "rounds": 3,
    "model": {"image_size": 32},
    "peft": {"rank": 2},
    "data": {"classes": {"liver": 1, "kidney": 2, "vessel": 3}, "slice_axis": "axial"},
    "training": {"slices_per_case": 2, "batch_size": 4, "precision": "fp32"},
    "federation": {"min_sites": 3, "wait_s": 120},
}
"""A configuration whose rounds take seconds on phantoms."""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def split_by_site(source: Path, target: Path, names: Mapping[str, str], cases: int = 99) -> None:
    """One folder per hospital from a data set of several, with a manifest of its own.

    Args:
        source: Has a manifest.csv.
        target: Gets a folder for each value of `names`, and `all` with the same cases.
        names: What each site of the source is called here.
        cases: At most so many of each split.
    """
    with (source / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    chosen = []
    for site, name in names.items():
        for split in ("train", "val"):
            own = [row for row in rows if row["site"] == site and row["split"] == split]
            chosen += [row | {"site": name} for row in own[:cases]]
    for name in (*names.values(), "all"):
        folder = target / name
        own = [row for row in chosen if name in (row["site"], "all")]
        for row in own:
            for key in ("image", "label"):
                (folder / row[key]).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / row[key], folder / row[key])
        with (folder / "manifest.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, own[0].keys())
            writer.writeheader()
            writer.writerows(own)


class Consortium:
    """Kits and processes of one consortium.

    Args:
        folder: Empty; its path may be long.
        data: Data folder by site.
        settings: More for every site.yaml.
    """

    def __init__(
        self, folder: Path, data: Mapping[str, Path], settings: Mapping[str, Any] | None = None
    ) -> None:
        self.folder, self.sites = folder, list(data)
        self.port, self.link_port = free_port(), free_port()
        self.started: list[subprocess.Popen[bytes]] = []
        project = {
            "project": "trial",
            "title": "Trial",
            "server": {"hosts": ["localhost"], "port": self.port},
            "sites": [{"name": name} for name in self.sites],
            "keys": "shipped",
        }
        self.write("project.yaml", project)
        self.do("provision", "project.yaml", "--out", "kits")
        server = {
            "listen": "127.0.0.1", "link_port": self.link_port, "status_port": free_port()
        }  # fmt: skip
        self.write("kits/server/server.yaml", server)
        for name, where in data.items():
            own = {"data": str(where), "threads": 1, "node_port": free_port(), **(settings or {})}
            self.write(f"kits/sites/{name}/site.yaml", own)

    @property
    def server(self) -> Path:
        return self.folder / "kits/server"

    def site(self, name: str) -> Path:
        return self.folder / "kits/sites" / name

    def write(self, name: str, tree: Any) -> None:
        (self.folder / name).write_text(yaml.safe_dump(tree), "utf-8")

    def do(self, *arguments: Any, code: int = 0) -> str:
        """Runs a command to its end; returns all it printed."""
        done = subprocess.run(
            [SAMARITAN, *map(str, arguments)],
            cwd=self.folder,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        assert done.returncode == code, done.stdout
        return done.stdout

    def plan(self, study: str, config: Mapping[str, Any], approve: bool = True) -> Path:
        """Makes a plan, and lets every site approve it."""
        self.write(f"{study}-config.yaml", {"name": study, **config})
        self.write(f"{study}.yaml", {"study": study, "config": f"{study}-config.yaml"})
        path = self.folder / f"{study}.json"
        self.do("plan", "make", f"{study}.yaml", "--authority", "kits/authority", "--out", path)
        for name in self.sites if approve else ():
            self.do("site", "approve", path, "--kit", self.site(name))
        return path

    def start(self, *arguments: Any) -> subprocess.Popen[bytes]:
        """A command that goes on until it is stopped; what it prints is in a file of its name."""
        name = "-".join(str(a).rsplit("/", 1)[-1] for a in arguments if not str(a).startswith("--"))
        with (self.folder / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                [SAMARITAN, *map(str, arguments)],
                cwd=self.folder,
                env=ENVIRONMENT,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def start_all(self) -> None:
        self.start("server", "start", self.server)
        for name in self.sites:
            self.start("site", "start", self.site(name))
        for kit in (self.server, *map(self.site, self.sites)):
            wait_for(lambda kit=kit: states(kit), 60, f"the supervisor of {kit.name}")

    def run(self, plan: Path, *more: Any, timeout: float = 600) -> str:
        """Runs a plan to its end; returns what the command printed."""
        process = self.start_run(plan, *more)
        process.wait(timeout)
        said = (self.folder / f"run-{plan.name}.out").read_text()
        assert process.returncode == 0, said
        return said

    def start_run(self, plan: Path, *more: Any) -> subprocess.Popen[bytes]:
        with (self.folder / f"run-{plan.name}.out").open("wb") as out:
            process = subprocess.Popen(
                [SAMARITAN, "run", str(plan), "--kit", str(self.server), *map(str, more)],
                cwd=self.folder,
                env=ENVIRONMENT,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def run_dir(self, study: str) -> Path:
        (found,) = (self.server / "runs").glob(f"{study}-????????")
        return found

    def events(self, study: str, kind: str = "") -> list[dict[str, Any]]:
        found = list((self.server / "runs").glob(f"{study}-????????/events.jsonl"))
        if not found:
            return []
        lines = found[0].read_bytes().split(b"\n")[:-1]
        events = [json.loads(line) for line in lines]
        return [event for event in events if kind in ("", event["event"])]

    def log(self, site: str, kind: str = "") -> list[dict[str, Any]]:
        lines = (self.site(site) / "log/site.jsonl").read_bytes().splitlines()
        entries = [json.loads(line) for line in lines]
        return [entry for entry in entries if kind in ("", entry["type"])]

    def pid(self, kit: Path, program: str) -> int:
        return int(states(kit)[program]["pid"])

    def kill(self, kit: Path, program: str, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid(kit, program), number)

    def stop(self) -> None:
        """Stops everything that was started, gently and then not."""
        for kit in (self.server, *map(self.site, self.sites)):
            with contextlib.suppress(AssertionError):
                self.do("server" if kit == self.server else "site", "stop", kit)
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def children(parent: int, word: str = "") -> Iterator[int]:
    """Processes below another whose command line holds a word."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):
            status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if int(status[1]) == parent and status[0] != "Z":
                if word in line:
                    yield int(entry.name)
                else:
                    yield from children(int(entry.name), word)


def wait_for(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {timeout:g} s"
        time.sleep(0.1)
    return found


def logs_of(kit: Path, *programs: str) -> str:
    """What the programs of a kit have printed."""
    paths: Sequence[Path] = [kit / "run" / f"{name}.log" for name in programs]
    return "\n".join(path.read_text("utf-8", "replace") for path in paths if path.exists())
