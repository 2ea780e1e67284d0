"""How a site stands: its processes, its plans, its policy, and what has left it.

Everything is read, nothing is changed. Neither the cases nor the model are looked at.
"""

from __future__ import annotations

import json
import socket
import xmlrpc.client
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.approvals import Approvals, roles_of
from client.diary import Diary
from client.halves import site_processes
from client.home import SOCKET, site_identity
from client.settings import SiteSettings, load_settings
from client.socket import short
from samaritan.errors import SamaritanError
from samaritan.plan import Plan, read_plan
from samaritan.provision.certificates import days_left, read_certificate
from samaritan.provision.kit import Kit
from samaritan.report import units
from samaritan.report.folder import clean
from samaritan.watch import words
from samaritan.watch.follow import Follower, Json

_TIMEOUT_S = 2.0
_CERTIFICATE_DAYS, _PLAN_DAYS = 30, 7

_STARTING_S = 60
"""How long an agent may take until it listens, on a machine that is busy."""

READY, STARTING, RUNNING, IDLE = "ready", "starting", "running", "idle"
CLOSED, DRY, DOWN, BROKEN = "closed", "dry run", "down", "failed"

KINDS = {
    "hello": "the roll call",
    "train": "training",
    "evaluate": "scoring",
    "secure_sum": "a step of a masked sum",
}
"""What people call the kinds of requests."""


class Watch:
    """A site's kit, looked at again and again; of its log only what is new is read.

    Args:
        kit: Of the site.
        clock: Tells the time, with the zone in which the policy's hours are meant.
    """

    def __init__(
        self, kit: Kit, clock: Callable[[], datetime] = lambda: datetime.now().astimezone()
    ) -> None:
        self._kit, self._clock = kit, clock
        self._log = Follower(kit.path("log", "site.jsonl"), Diary, Diary.take)

    def look(self) -> Json:
        """Everything, as JSON without a text that could hurt a page."""
        local = self._clock()
        now = local.astimezone(UTC)
        faults: list[str] = []
        settings = _settings(self._kit, faults)
        processes = _processes(self._kit, settings or SiteSettings(data=""))
        answers = agent_answers(self._kit.path(*SOCKET))
        diary = self._diary(faults)
        plans = [] if settings is None else _plans(self._kit, settings, now, faults)
        policy = None if settings is None else _policy(settings, local)
        certificate = _certificate_days(self._kit, now)
        problems = _problems(processes, answers)
        attention = [
            *(problems if answers else problems[:-1]),
            *faults,
            *_ends(certificate, plans),
            *_stale_settings(self._kit, diary),
        ]
        tree = {
            "time": now.isoformat(timespec="seconds"),
            "site": self._kit.card.name,
            "project": self._kit.card.project,
            "server": f"{self._kit.card.host}:{self._kit.card.port}",
            "state": _state(processes, answers, plans, policy, diary),
            "problems": problems,
            "attention": attention,
            "processes": processes,
            "unseen": _unseen(processes, settings),
            "agent": {"answers": answers},
            "plans": plans,
            "policy": policy,
            "certificate_days": certificate,
            "log": diary.tree(),
        }
        cleaned: Json = clean(tree)
        return cleaned

    def _diary(self, faults: list[str]) -> Diary:
        try:
            return self._log.read()
        except OSError as error:
            faults.append(f"log/site.jsonl cannot be read: {error.strerror or error}")
            return Diary()


def agent_answers(path: Path, timeout_s: float = _TIMEOUT_S) -> bool:
    """Whether the agent takes a connection, and ends it when it is asked nothing.

    Args:
        path: Of its socket.
        timeout_s: How long it may take, work or no work.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            with short(path) as address:
                connection.connect(address)
            connection.shutdown(socket.SHUT_WR)
            return connection.recv(1) == b""
        except OSError:
            return False


def _processes(kit: Kit, settings: SiteSettings) -> dict[str, dict[str, Any]]:
    try:
        return site_processes(kit, settings)
    except (OSError, xmlrpc.client.Error, SamaritanError):
        return {}


def _settings(kit: Kit, faults: list[str]) -> SiteSettings | None:
    try:
        return load_settings(kit.path("site.yaml"))
    except SamaritanError as error:
        faults.append(f"{error.code} {error.message}")
        return None


def _policy(settings: SiteSettings, local: datetime) -> Json:
    policy = settings.policy
    return {
        "dry_run": policy.dry_run,
        "hours": list(policy.hours),
        "open_now": policy.opening().open_at(local),
        "local_time": f"{local:%A %H:%M}",
        "require_privacy": policy.require_privacy,
        "min_cohort": policy.min_cohort,
    }


def _plans(kit: Kit, settings: SiteSettings, now: datetime, faults: list[str]) -> list[Json]:
    """Every plan that somebody here has approved, with who has and who has not."""
    try:
        approvals = Approvals(kit, roles_of(settings.policy, site_identity(kit)))
    except SamaritanError as error:
        faults.append(f"{error.code} {error.message}")
        return []
    signer = bytes.fromhex(kit.card.plan_signer)
    found = []
    for sha256 in approvals.known():
        try:
            plan = read_plan(kit.path("plans", f"{sha256}.json"), signer).plan
            missing = approvals.missing(sha256)
        except SamaritanError as error:
            faults.append(f"{error.code} {error.message}")
            continue
        approved = [role for role in sorted(approvals.roles) if role not in missing]
        found.append(_plan(kit, plan, approved, missing, now))
    return sorted(found, key=lambda entry: str(entry["created"]))


def _plan(
    kit: Kit, plan: Plan, approved: Sequence[str], missing: Sequence[str], now: datetime
) -> Json:
    return {
        "study": plan.study,
        "title": plan.title,
        "plan": plan.sha256,
        "rounds": plan.config.rounds,
        "created": str(plan.created),
        "valid_until": str(plan.valid_until),
        "days": (plan.valid_until - now.date()).days,
        "privacy": plan.config.privacy.unit,
        "epsilon": plan.config.privacy.epsilon,
        "approved": [{"role": r, "time": _approved_at(kit, plan.sha256, r)} for r in approved],
        "missing": list(missing),
    }


def _approved_at(kit: Kit, plan_sha256: str, role: str) -> str:
    """What an approval whose signature was right says of its time."""
    try:
        text = kit.path("approvals", plan_sha256, f"{role}.json").read_text("utf-8")
        return str(json.loads(text)["time_utc"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _certificate_days(kit: Kit, now: datetime) -> int | None:
    try:
        return days_left(read_certificate(kit.path("site.crt")).not_valid_after_utc, now)
    except SamaritanError:
        return None


def _problems(processes: Mapping[str, Any], answers: bool) -> list[str]:
    """What is wrong with the machinery, the agent last; nothing when it is well."""
    found = words.faulty(processes) if processes else ["No process of this site runs."]
    return found if answers else [*found, "The agent does not answer on its socket."]


def _unseen(processes: Mapping[str, Any], settings: SiteSettings | None) -> list[str]:
    """Processes of the courier's user, which this one may not look at."""
    if settings is None or settings.courier_user is None:
        return []
    return [name for name in ("node", "courier") if name not in processes]


def _ends(certificate: int | None, plans: Sequence[Json]) -> list[str]:
    found = []
    if certificate is None:
        found.append("site.crt is missing or unreadable: the server does not let this site in.")
    elif certificate < 0:
        found.append("The certificate of this site has ended: ask the coordinator for a new one.")
    elif certificate < _CERTIFICATE_DAYS:
        ends = units.plural(certificate, "day")
        found.append(f"The certificate of this site ends in {ends}: ask for a new one.")
    for plan in plans:
        if plan["missing"] and plan["days"] >= 0:
            found.append(f"Plan {plan['study']} waits for the approval of {_and(plan['missing'])}.")
        if 0 <= plan["days"] < _PLAN_DAYS:
            found.append(f"Plan {plan['study']} is valid until {plan['valid_until']} only.")
    return found


def _stale_settings(kit: Kit, diary: Diary) -> list[str]:
    """The agent reads site.yaml when it starts; this page reads it now."""
    started = words.parse_time(diary.started)
    try:
        changed = datetime.fromtimestamp(kit.path("site.yaml").stat().st_mtime, tz=UTC)
    except OSError:
        return []
    if started is None or changed <= started:
        return []
    return ["site.yaml was changed after the agent started; the agent still goes by the old one."]


def _state(
    processes: Mapping[str, Any],
    answers: bool,
    plans: Sequence[Json],
    policy: Json | None,
    diary: Diary,
) -> Json:
    """One word, a sentence, what to do, and since when."""

    def said(state: str, sentence: str, advice: str = "", since: str = "") -> Json:
        return {"state": state, "sentence": sentence, "advice": advice, "since": since}

    agent = processes.get("agent", {"state": "", "seconds": 0})
    is_new = agent["state"] in ("running", "starting") and agent["seconds"] < _STARTING_S
    if not answers and is_new:
        return said(STARTING, "The agent is starting; it answers in a minute at most.")
    if not answers:
        return said(
            DOWN,
            "The agent does not answer: this site takes part in nothing.",
            "Start it with `samaritan site start KIT`. Where it runs already, `run/agent.log` in "
            "the kit says what is wrong.",
        )
    if broken := [n for n, told in processes.items() if told["state"] != "running"]:
        return said(
            BROKEN,
            f"The agent is there, and {_and(broken)} is not as it should be: the server may not "
            "reach this site.",
            f"`run/{broken[0]}.log` in the kit says why; its supervisor starts it anew by itself.",
        )
    names = {plan["plan"]: plan["study"] for plan in plans}
    if diary.open and diary.asked is not None:
        what = _asked_words(diary.asked, names)
        return said(RUNNING, f"At work on {what}.", since=diary.asked["time"])
    if not any(not plan["missing"] and plan["days"] >= 0 for plan in plans):
        return said(
            IDLE,
            "Running, and no valid plan is approved here: every request is refused.",
            "`samaritan plan show PLAN` shows a plan, `samaritan site approve PLAN` approves it.",
        )
    if policy is not None and not policy["open_now"]:
        return said(
            CLOSED,
            f"Outside the hours of this site ({', '.join(policy['hours'])}): requests are refused "
            "until they begin.",
        )
    if policy is not None and policy["dry_run"]:
        return said(DRY, "Dry run: the work is done and logged, and nothing leaves.")
    return said(READY, "Ready: waiting for the server to ask.")


def _asked_words(asked: Json, names: Mapping[str, str]) -> str:
    study = names.get(asked["plan"], "a plan that is not approved here")
    kind = KINDS.get(asked["kind"], asked["kind"] or "a request")
    return f"{kind}, round {asked['round']} of {study}"


def _and(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
