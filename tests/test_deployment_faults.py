"""A federation that is hurt while it trains: processes killed, lines cut, disks full, keys revoked.

Very slow (about forty minutes on two cores). A run whose rounds all had all sites must end with the
adapter that a simulation has, whatever happened on the way; see docs/faults.md for the whole list.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from samaritan.data.phantoms import write_phantoms
from samaritan.operate.processes import states
from tests.federations import (
    ENVIRONMENT,
    SAMARITAN,
    SMALL,
    Consortium,
    children,
    free_port,
    logs_of,
    split_by_site,
    wait_for,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed"),
]

SITES = ("Ahus", "Bern", "Chur")
BUSY = {
    **SMALL,
    "training": {**SMALL["training"], "slices_per_case": 60},
    "federation": {"min_sites": 3, "wait_s": 180, "retry_wait_s": 2, "retries": 8},
}
"""Rounds of several seconds, all of which need all three sites."""

TWO = {"min_sites": 2, "wait_s": 60, "retries": 0}
"""Rounds that two sites can make."""


class Line:
    """A line between one site and the server that can be cut: a small TCP relay."""

    def __init__(self, target: int) -> None:
        self.target, self.whole = target, threading.Event()
        self.whole.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            if not self.whole.is_set():
                near.close()
                continue
            with contextlib.suppress(OSError):
                far = socket.create_connection(("127.0.0.1", self.target))
                self.pairs += [near, far]
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(one, other), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                self.whole.wait()  # what was on its way is late, not lost: a half-open connection
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Nothing passes, and nobody is told."""
        self.whole.clear()

    def mend(self) -> None:
        self.whole.set()

    def reset(self) -> None:
        """Every connection breaks at once."""
        for end in self.pairs:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.pairs.clear()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three hospitals that train and one that is in no plan; the line of the first can be cut."""
    folder = tmp_path_factory.mktemp("world")
    write_phantoms(folder / "phantoms", 4, 4, 0)
    names = {f"site_{n:02d}": name for n, name in enumerate((*SITES, "Davos"), start=1)}
    split_by_site(folder / "phantoms", folder / "data", names)
    (folder / "c").mkdir()
    data = {name: folder / "data" / name for name in names.values()}
    consortium = Consortium(folder / "c", data, {"policy": {"min_cohort": 2}})
    consortium.sites = list(SITES)
    line = Line(consortium.port)
    card = yaml.safe_load((consortium.site("Ahus") / "kit.yaml").read_text())
    consortium.write("kits/sites/Ahus/kit.yaml", {**card, "port": line.port})
    small_disk(consortium.site("Ahus") / "log")
    try:
        consortium.start_all()
        yield consortium, line
    finally:
        line.mend()
        consortium.stop()
        subprocess.run(
            ["umount", consortium.site("Ahus") / "log"], check=False, capture_output=True
        )


def small_disk(folder):
    """A disk of 16 MB of its own, where this user may mount one."""
    folder.mkdir(mode=0o700)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "samaritan", folder],
        check=False, capture_output=True,
    )  # fmt: skip


def plan_of(consortium, study, config):
    consortium.write(f"{study}-config.yaml", {"name": "faults", **config})
    consortium.write(
        f"{study}.yaml", {"study": study, "config": f"{study}-config.yaml", "sites": list(SITES)}
    )
    path = consortium.folder / f"{study}.json"
    consortium.do("plan", "make", f"{study}.yaml", "--authority", "kits/authority", "--out", path)
    for name in SITES:
        consortium.do("site", "approve", path, "--kit", consortium.site(name))
    return path


@pytest.fixture(scope="module")
def unhurt(world, tmp_path_factory):
    """The adapter of a simulation of the same configuration."""
    consortium, _ = world
    folder = tmp_path_factory.mktemp("unhurt")
    data = consortium.folder.parent / "data"
    for name in SITES:
        for path in (data / name).rglob("*.nii.gz"):
            target = folder / "data" / path.relative_to(data / name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    rows = [(data / n / "manifest.csv").read_text().splitlines() for n in SITES]
    lines = [rows[0][0], *(line for own in rows for line in own[1:])]
    (folder / "data/manifest.csv").write_text("\n".join(lines) + "\n")
    (folder / "config.yaml").write_text(yaml.safe_dump({"name": "faults", **BUSY}))
    subprocess.run(
        [SAMARITAN, "simulate", folder / "config.yaml", "--data", folder / "data",
         "--out", folder / "run"],
        env=ENVIRONMENT, check=True, capture_output=True,
    )  # fmt: skip
    return load_file(folder / "run/adapter/adapter_model.safetensors")


def in_training(consortium, study, server_round, site="Ahus"):
    """Waits until a site is at work in a round of a study."""
    tree = json.loads((consortium.folder / f"{study}.json").read_text())
    from samaritan.plan import Plan

    plan = Plan.model_validate(tree["plan"]).sha256

    def working():
        return [
            e
            for e in consortium.log(site, "request")
            if (e["plan"], e["kind"], e["round"]) == (plan, "train", server_round)
        ]

    wait_for(working, 300, f"round {server_round} of {study}")
    time.sleep(1.5)


def ends_well(consortium, process, study, unhurt):
    """The run finishes, with the adapter of a run that nothing happened to, and whole logs."""
    assert process.wait(900) == 0, said(consortium, study)
    rounds = consortium.events(study, "round_finished")
    assert [entry["round"] for entry in rounds] == [1, 2, 3]
    for entry in rounds:
        assert {s["status"] for s in entry["sites"].values()} == {"ok"}, entry
    run_dir = consortium.run_dir(study)
    found = load_file(run_dir / "adapter/adapter_model.safetensors")
    assert all(torch.equal(found[name], unhurt[name]) for name in unhurt)
    logs_agree(consortium, study)


def logs_agree(consortium, study, sites=SITES):
    run_dir = consortium.run_dir(study)
    for site in sites:
        consortium.do(
            "audit", "log", "verify", consortium.site(site) / "log/site.jsonl",
            "--against", run_dir / "server_log.jsonl",
        )  # fmt: skip


def said(consortium, study):
    return (consortium.folder / f"run-{study}.json.out").read_text()


def statuses(consortium, study, site):
    return [
        e["sites"].get(site, {}).get("status") for e in consortium.events(study, "round_finished")
    ]


def kill_agent(consortium):
    consortium.kill(consortium.site("Ahus"), "agent")


def kill_courier(consortium):
    """The copy of the process that has imported everything."""
    (original,) = children(consortium.pid(consortium.site("Ahus"), "courier"), "client.courier")
    (courier,) = children(original)
    os.kill(courier, signal.SIGKILL)


def kill_node(consortium):
    consortium.kill(consortium.site("Ahus"), "node")


def kill_starter(consortium):
    consortium.kill(consortium.site("Ahus"), "courier")


def kill_server_app(consortium):
    (app,) = children(consortium.pid(consortium.server, "apps"), "flwr-serverapp")
    os.kill(app, signal.SIGKILL)


def kill_link(consortium):
    consortium.kill(consortium.server, "link")


def kill_apps(consortium):
    consortium.kill(consortium.server, "apps")


def kill_proxy(consortium):
    consortium.kill(consortium.server, "proxy")


@pytest.mark.parametrize(
    "kill",
    [kill_agent, kill_courier, kill_node, kill_starter, kill_server_app, kill_link, kill_apps,
     kill_proxy],
)  # fmt: skip
def test_any_process_may_be_killed_in_the_middle_of_a_round(world, unhurt, kill):
    consortium, _ = world
    study = kill.__name__.replace("_", "-")
    plan = plan_of(consortium, study, BUSY)
    process = consortium.start_run(plan)
    in_training(consortium, study, 2)
    kill(consortium)
    ends_well(consortium, process, study, unhurt)


def test_the_machine_of_the_server_may_lose_its_power(world, unhurt):
    """All of the server's processes and the command at once; started again, the plan goes on."""
    consortium, _ = world
    plan = plan_of(consortium, "power", BUSY)
    process = consortium.start_run(plan)
    in_training(consortium, "power", 2)
    process.kill()
    supervisor = next(children(1, str(consortium.server / "run/supervisord.conf")), None)
    pids = [entry["pid"] for entry in states(consortium.server).values()]
    os.kill(supervisor or consortium.started[0].pid, signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{p}").exists() for p in pids), 20, "their end")
    consortium.start("server", "start", consortium.server)
    ends_well(consortium, consortium.start_run(plan), "power", unhurt)
    assert [e["first_round"] for e in consortium.events("power", "run_started")] == [1, 2]


def test_everything_stopped_gently_ends_soon_and_goes_on_later(world, unhurt):
    consortium, _ = world
    plan = plan_of(consortium, "gentle", BUSY)
    process = consortium.start_run(plan)
    in_training(consortium, "gentle", 2)
    process.terminate()
    assert process.wait(20) != 0
    begun = time.monotonic()
    for name in SITES:
        consortium.do("site", "stop", consortium.site(name))
    consortium.do("server", "stop", consortium.server)
    assert time.monotonic() - begun < 60
    consortium.start_all()
    ends_well(consortium, consortium.start_run(plan), "gentle", unhurt)


def test_a_line_that_breaks_again_and_again_delays_and_loses_nothing(world, unhurt):
    consortium, line = world
    plan = plan_of(consortium, "flapping", BUSY)
    process = consortium.start_run(plan)
    in_training(consortium, "flapping", 1)
    for _ in range(10):
        line.cut()
        time.sleep(2)
        line.mend()
        line.reset()
        time.sleep(3)
    ends_well(consortium, process, "flapping", unhurt)


def test_a_site_cut_off_for_five_minutes_is_left_out_and_comes_back(world):
    consortium, line = world
    config = {**SMALL, "rounds": 100, "federation": TWO}  # of about five seconds
    plan = plan_of(consortium, "partition", config)
    process = consortium.start_run(plan)
    wait_for(lambda: len(consortium.events("partition", "round_finished")) >= 2, 200, "two rounds")
    line.cut()
    time.sleep(300)
    line.mend()
    line.reset()
    assert process.wait(1000) == 0, said(consortium, "partition")
    found = statuses(consortium, "partition", "Ahus")
    assert len(found) == 100
    assert found[0] == "ok"
    assert "failed: the site went offline" in found
    assert found[-3:] == ["ok"] * 3
    assert set(statuses(consortium, "partition", "Bern")) == {"ok"}
    logs_agree(consortium, "partition")


def test_a_site_that_is_too_slow_is_left_out_and_its_late_answer_is_not_used(world):
    consortium, _ = world
    config = {**SMALL, "rounds": 8, "federation": {**TWO, "round_timeout_s": 15}}
    plan = plan_of(consortium, "slow", config)
    process = consortium.start_run(plan)
    in_training(consortium, "slow", 2)
    agent = consortium.pid(consortium.site("Ahus"), "agent")
    os.kill(agent, signal.SIGSTOP)
    try:
        wait_for(lambda: len(consortium.events("slow", "round_finished")) >= 4, 300, "four rounds")
    finally:
        os.kill(agent, signal.SIGCONT)
    assert process.wait(600) == 0, said(consortium, "slow")
    found = statuses(consortium, "slow", "Ahus")
    assert any(str(status).startswith("late: no answer in") for status in found), found
    assert found[-1] == "ok"
    assert set(statuses(consortium, "slow", "Bern")) == {"ok"}
    logs_agree(consortium, "slow")


def test_a_full_disk_at_one_site_stops_that_site_and_nothing_leaves_unlogged(world):
    consortium, _ = world
    log = consortium.site("Ahus") / "log"
    if not os.path.ismount(log):
        pytest.skip("needs root, to mount a small disk")
    config = {**SMALL, "rounds": 12, "federation": TWO}
    plan = plan_of(consortium, "full", config)
    process = consortium.start_run(plan)
    wait_for(lambda: len(consortium.events("full", "round_finished")) >= 2, 200, "two rounds")
    filler = log / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(bytes(4096))
    wait_for(lambda: "failed: SAM-A102" in statuses(consortium, "full", "Ahus"), 200, "a refusal")
    before = len(consortium.log("Ahus", "egress"))
    wait_for(lambda: len(consortium.events("full", "round_finished")) >= 7, 300, "more rounds")
    assert len(consortium.log("Ahus", "egress")) == before
    filler.unlink()
    assert process.wait(600) == 0, said(consortium, "full")
    assert statuses(consortium, "full", "Ahus")[-1] == "ok"
    assert set(statuses(consortium, "full", "Bern")) == {"ok"}
    logs_agree(consortium, "full")


def test_a_copy_of_a_site_on_another_machine_gets_nothing(world, unhurt):
    """The same keys in a second place: one of the two is there, the other is turned away."""
    consortium, _ = world
    copy = consortium.folder / "kits/sites/Copy"
    shutil.copytree(
        consortium.site("Bern"), copy, ignore=shutil.ignore_patterns("run", "state", "log")
    )
    settings = yaml.safe_load((copy / "site.yaml").read_text())
    consortium.write("kits/sites/Copy/site.yaml", {**settings, "node_port": free_port()})
    again = consortium.start("site", "start", consortium.site("Bern"))
    assert again.wait(30) == 1
    assert "SAM-N401" in (consortium.folder / "site-start-Bern.out").read_text()
    plan = plan_of(consortium, "copy", BUSY)
    process = consortium.start_run(plan)
    in_training(consortium, "copy", 1)
    consortium.start("site", "start", copy)
    try:
        ends_well(consortium, process, "copy", unhurt)
        assert "could not be activated" in logs_of(consortium.server, "link")
        kinds = [json.loads(x)["type"] for x in (copy / "log/site.jsonl").read_bytes().splitlines()]
        assert set(kinds) <= {"genesis", "started", "stopped"}
    finally:
        consortium.do("site", "stop", copy)


def test_a_copy_of_a_site_that_takes_its_place_is_refused_and_the_site_comes_back(world):
    """What the copy lacks is the log of what the site has answered since."""
    consortium, _ = world
    copy = consortium.folder / "kits/sites/Twin"
    shutil.copytree(
        consortium.site("Bern"), copy, ignore=shutil.ignore_patterns("run", "state", "log")
    )
    plan = plan_of(consortium, "twin", {**SMALL, "rounds": 40, "federation": TWO})
    for folder in ("plans", "approvals"):
        shutil.copytree(consortium.site("Bern") / folder, copy / folder, dirs_exist_ok=True)
    process = consortium.start_run(plan)
    wait_for(lambda: consortium.events("twin", "round_finished"), 200, "a round")
    consortium.do("site", "stop", consortium.site("Bern"))
    consortium.start("site", "start", copy)
    try:
        wait_for(lambda: "failed: SAM-A209" in statuses(consortium, "twin", "Bern"), 300, "refused")
    finally:
        consortium.do("site", "stop", copy)
        consortium.start("site", "start", consortium.site("Bern"))
    assert process.wait(900) == 0, said(consortium, "twin")
    assert statuses(consortium, "twin", "Bern")[-1] == "ok"
    assert set(statuses(consortium, "twin", "Chur")) == {"ok"}
    logs_agree(consortium, "twin")
    entries = [json.loads(x) for x in (copy / "log/site.jsonl").read_bytes().splitlines()]
    assert not [entry for entry in entries if entry["type"] == "egress"]


def test_a_hospital_that_is_in_no_plan_is_asked_nothing(world, unhurt):
    """Its certificate is good, so that it comes through the proxy; no plan names its node."""
    consortium, _ = world
    consortium.start("site", "start", consortium.site("Davos"))
    try:
        plan = plan_of(consortium, "davos", BUSY)
        ends_well(consortium, consortium.start_run(plan), "davos", unhurt)
        assert "No SuperNode found with the given public key" in logs_of(consortium.server, "link")
        kinds = {entry["type"] for entry in consortium.log("Davos")}
        assert kinds == {"genesis", "started"}
    finally:
        consortium.do("site", "stop", consortium.site("Davos"))


@pytest.mark.skipif(shutil.which("faketime") is None, reason="faketime is not installed")
def test_a_clock_that_is_a_day_off_is_turned_away_and_the_others_go_on(world):
    consortium, _ = world
    consortium.do("site", "stop", consortium.site("Ahus"))
    out = (consortium.folder / "faketime.out").open("wb")
    ahead = subprocess.Popen(
        ["faketime", "-f", "+1d", SAMARITAN, "site", "start", consortium.site("Ahus")],
        env=ENVIRONMENT, stdout=out, stderr=out, start_new_session=True,
    )  # fmt: skip
    consortium.started.append(ahead)
    try:
        config = {**SMALL, "federation": {**TWO, "wait_s": 20}}
        consortium.run(plan_of(consortium, "clock", config))
        assert set(statuses(consortium, "clock", "Ahus")) == {None}
        assert set(statuses(consortium, "clock", "Bern")) == {"ok"}
        assert "401" in logs_of(consortium.server, "proxy")
    finally:
        consortium.do("site", "stop", consortium.site("Ahus"))
        consortium.start("site", "start", consortium.site("Ahus"))
        wait_for(lambda: states(consortium.site("Ahus")), 60, "Ahus")


def test_a_site_that_is_revoked_in_the_middle_is_out_at_once(world):
    """The last test: there is no way back for Chur."""
    consortium, _ = world
    config = {**SMALL, "rounds": 14, "federation": TWO}
    plan = plan_of(consortium, "revoked", config)
    process = consortium.start_run(plan)
    wait_for(lambda: len(consortium.events("revoked", "round_finished")) >= 2, 200, "two rounds")
    consortium.do("authority", "revoke", "kits/authority", "Chur")
    consortium.do("server", "reload", consortium.server)
    at = len(consortium.events("revoked", "round_finished"))
    assert process.wait(900) == 0, said(consortium, "revoked")
    found = statuses(consortium, "revoked", "Chur")
    assert found[0] == "ok"
    assert "ok" not in found[at + 2 :]
    assert set(statuses(consortium, "revoked", "Bern")) == {"ok"}
    proxy = logs_of(consortium.server, "proxy")
    assert "certificate revoked" in proxy
    logs_agree(consortium, "revoked", ("Ahus", "Bern"))
    said_no = consortium.do(
        "plan", "make", "revoked.yaml", "--authority", "kits/authority", "--out", "no.json", code=1
    )
    assert "SAM-K312" in said_no
