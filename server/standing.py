"""How a federation stands: processes, sites, runs, bytes, budgets; for the command and the page.

Everything is read, nothing is changed, and nothing here waits long for a process that is dead.
"""

from __future__ import annotations

import xmlrpc.client
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.proto.node_pb2 import NodeInfo

from samaritan.errors import SamaritanError
from samaritan.operate.processes import states
from samaritan.plan import Plan, read_plan
from samaritan.provision.kit import Kit
from samaritan.report.folder import clean
from samaritan.watch.follow import Follower, Json
from samaritan.watch.words import faulty
from server.attention import ONLINE, attention, certificates_of
from server.bundle import PLAN_KEY
from server.control import connect
from server.home import run_folder
from server.nodes import der_of, key_of
from server.progress import Progress, SiteProgress
from server.settings import load_settings
from server.spending import EVERYBODY, Spending, Spent
from server.verdict import FlowerRun, Verdict, idle_verdict, verdict

_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class _Link:
    """What the SuperLink says.

    Attributes:
        fault: Why it says nothing; empty if it answers.
        nodes: That may connect.
        runs: The newest of each plan, by its hash.
    """

    fault: str = ""
    nodes: tuple[NodeInfo, ...] = ()
    runs: Mapping[str, FlowerRun] = field(default_factory=dict)


class Watch:
    """A server's kit, looked at again and again; what was read before is not read again.

    Args:
        kit: Of the server.
        clock: Tells the time.
        spending: Reckons budgets; None leaves them unknown.
    """

    def __init__(
        self,
        kit: Kit,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        spending: Spending | None = None,
    ) -> None:
        self._kit, self._clock, self._spending = kit, clock, spending
        self._runs: dict[str, Follower[Progress]] = {}
        self._plans: dict[str, Plan] = {}

    def look(self) -> Json:
        """Everything, as JSON without a text that could hurt a page."""
        now = self._clock()
        faults: list[str] = []
        processes = _processes(self._kit)
        link = _ask(self._kit)
        known = [(plan, self._progress(plan, faults)) for plan in self._read_plans(faults)]
        runs = [self._run(p, progress, link, processes, now) for p, progress in known]
        current = _current(known, link)
        if current is None:
            about = idle_verdict(processes, not link.fault)
            sites = _sites(None, Progress(), link, {})
        else:
            plan, progress = current
            about = self._verdict(plan, progress, link, processes, now)
            spent = self._spent(plan, progress)
            sites = _sites(plan, progress, link, spent)
        certificates = certificates_of(self._kit, now, faults)
        for name, site in sites.items():
            site["certificate_days"] = certificates["sites"].get(name)
        problems = _problems(processes, link)
        if processes:
            faults = [*problems, *faults]
        tree = {
            "time": _iso(now),
            "project": self._kit.card.project,
            "samaritan": self._kit.card.samaritan,
            "state": asdict(about),
            "problems": problems,
            "attention": attention(current and current[0], sites, certificates, about, now, faults),
            "processes": processes,
            "link": {"answers": not link.fault, "fault": link.fault},
            "sites": sites,
            "certificates": certificates,
            "run": None if current is None else current[0].sha256,
            "runs": runs,
        }
        cleaned: Json = clean(tree)
        return cleaned

    def _read_plans(self, faults: list[str]) -> list[Plan]:
        """Every plan that was ever run here, oldest first."""
        signer = bytes.fromhex(self._kit.card.plan_signer)
        found = []
        for path in sorted(self._kit.path("plans").glob("*.json"), key=_changed):
            if path.stem not in self._plans:
                try:
                    self._plans[path.stem] = read_plan(path, signer).plan
                except SamaritanError as error:
                    faults.append(f"{error.code} {error.message}")
                    continue
            found.append(self._plans[path.stem])
        return found

    def _progress(self, plan: Plan, faults: list[str]) -> Progress:
        follower = self._runs.get(plan.sha256)
        if follower is None:
            path = run_folder(self._kit, plan) / "events.jsonl"
            follower = self._runs[plan.sha256] = Follower(path, Progress, Progress.take)
        try:
            return follower.read()
        except OSError as error:
            faults.append(f"events.jsonl of {plan.study} cannot be read: {error.strerror}")
            return Progress()

    def _verdict(
        self,
        plan: Plan,
        progress: Progress,
        link: _Link,
        processes: Mapping[str, Any],
        now: datetime,
    ) -> Verdict:
        run, folder = link.runs.get(plan.sha256), _folder(self._kit, plan)
        return verdict(plan, progress, run, processes, not link.fault, folder, now)

    def _spent(self, plan: Plan, progress: Progress) -> dict[str, Spent]:
        if self._spending is None:
            return {}
        asked = {name: set[int]() for name in plan.training_sites}
        asked |= {n: s.asked for n, s in progress.sites.items() if n in plan.training_sites}
        return self._spending.spent(plan.sha256, plan.config, asked)

    def _run(
        self,
        plan: Plan,
        progress: Progress,
        link: _Link,
        processes: Mapping[str, Any],
        now: datetime,
    ) -> Json:
        about = self._verdict(plan, progress, link, processes, now)
        privacy = plan.config.privacy
        shared = self._spent(plan, progress).get(EVERYBODY) if privacy.unit == "site" else None
        return {
            "name": plan.study,
            "title": plan.title,
            "plan": plan.sha256,
            "created": str(plan.created),
            "valid_until": str(plan.valid_until),
            "is_valid": now.date() <= plan.valid_until,
            "min_sites": plan.config.federation.min_sites,
            "round": progress.done,
            "rounds": plan.config.rounds,
            "under_way": progress.round,
            "under_way_since": progress.round_since,
            "pace_s": progress.pace_s,
            "state": about.state,
            "sentence": about.sentence,
            "advice": about.advice,
            "since": about.since,
            "message": progress.message,
            "begun": progress.first_time,
            "last_event": progress.last_time,
            "privacy": None
            if privacy.unit == "none"
            else {
                "unit": privacy.unit,
                "epsilon": privacy.epsilon,
                "scores_told": privacy.scores == "declared",
                "shared": shared and _budget(shared),
            },
            "history": [asdict(progress.rounds[n]) for n in sorted(progress.rounds)],
            "troubles": [asdict(t) for t in reversed(progress.troubles.values())],
            "folder": _folder(self._kit, plan),
        }


def standing(kit: Kit) -> Json:
    """How the federation of a server's kit stands now; see `Watch`."""
    return Watch(kit).look()


def _folder(kit: Kit, plan: Plan) -> str:
    return run_folder(kit, plan).relative_to(kit.folder).as_posix()


def _processes(kit: Kit) -> dict[str, dict[str, Any]]:
    try:
        return states(kit.folder)
    except (OSError, xmlrpc.client.Error, SamaritanError):
        return {}


def _ask(kit: Kit) -> _Link:
    """Nodes and runs, or why there are none; takes seconds at most."""
    try:
        settings = load_settings(kit.path("server.yaml"))
        with connect(kit, settings, _TIMEOUT_S) as control:
            nodes = tuple(control.nodes())
            runs = control.runs()
    except (SamaritanError, OSError, ValueError) as error:
        return _Link(error.message if isinstance(error, SamaritanError) else str(error))
    newest: dict[str, FlowerRun] = {}
    for run in sorted(runs, key=lambda run: run.pending_at):
        plan = dict(run.override_config).get(PLAN_KEY)
        if plan is not None:
            told = run.status
            newest[plan.string] = FlowerRun(told.status, told.sub_status, run.finished_at)
    return _Link("", nodes, newest)


def _current(known: list[tuple[Plan, Progress]], link: _Link) -> tuple[Plan, Progress] | None:
    """The study that is on, else the one in which something happened last."""
    for plan, progress in known:
        run = link.runs.get(plan.sha256)
        if run is not None and run.is_on:
            return plan, progress
    return max(known, key=lambda pair: pair[1].last_time, default=None)


def _sites(
    plan: Plan | None, progress: Progress, link: _Link, spent: Mapping[str, Spent]
) -> dict[str, Json]:
    """Every site of the plan, and whatever else may connect."""
    names = {} if plan is None else {key_of(s.node): n for n, s in plan.sites.items()}
    nodes: dict[str, NodeInfo] = {}
    for node in link.nodes:
        if node.status != "unregistered":
            name = names.get(der_of(node.public_key)) or node.name or f"node {node.node_id}"
            nodes[name] = node
    planned = set() if plan is None else set(plan.sites)
    found = {
        name: _site(nodes.get(name), progress.sites.get(name), spent.get(name), not link.fault)
        | {"planned": name in planned, "asked_now": name in progress.asked}
        for name in sorted(planned | nodes.keys())
    }
    for name in () if plan is None else plan.observers:
        found[name]["trains"] = False
    return found


def _site(
    node: NodeInfo | None,
    progress: SiteProgress | None,
    spent: Spent | None,
    answers: bool = True,
) -> Json:
    told = progress or SiteProgress()
    if not answers:
        status, last_seen = "unknown", ""
    elif node is None:
        status, last_seen = "not admitted", ""
    else:
        status = node.status
        last_seen = "now" if status == ONLINE else node.last_deactivated_at
    return {
        "status": status,
        "last_seen": last_seen,
        "since": node.last_activated_at if node is not None and status == ONLINE else "",
        "planned": False,
        "trains": True,
        "asked_now": False,
        "last_round": told.status_round,
        "last_status": told.status,
        "dice": told.dice,
        "dice_round": told.dice_round,
        "bytes_up": told.bytes_up if progress else None,
        "bytes_down": told.bytes_down if progress else None,
        "examples": told.examples,
        "left": told.left,
        "budget": None if spent is None else _budget(spent),
        "certificate_days": None,
    }


def _budget(spent: Spent) -> Json:
    return asdict(spent) | {"left": spent.left, "by_the_plan": True}


def _problems(processes: Mapping[str, Any], link: _Link) -> list[str]:
    """What is wrong with the machinery; nothing when it is well."""
    if not processes:
        return ["No process of the server runs."]
    found = faulty(processes)
    return [*found, f"{link.fault[:1].upper()}{link.fault[1:]}."] if link.fault else found


def _changed(path: Path) -> float:
    return path.stat().st_mtime


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="seconds")
