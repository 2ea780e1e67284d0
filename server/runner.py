"""`samaritan run`: a plan run to its end, through dead processes and pauses, truthfully."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from samaritan.errors import DeploymentError, FederationError
from samaritan.plan import SignedPlan, require_current, write_plan
from samaritan.provision.kit import Kit
from server.bundle import PLAN_KEY
from server.control import SILENT, Control, connect
from server.home import FAILED, plan_file, run_folder
from server.settings import ServerSettings

_POLL_S = 1.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 10.0, 600.0
_SETTLED_S = 60.0
"""How long a SuperLink that does not answer may take to be started anew by its supervisor."""

Event = dict[str, Any]
_T = TypeVar("_T")
Tell = Callable[[Event], None]
"""Told of each event of the run, and of what happens to its processes."""


@dataclass
class _Events:
    """Events of a run as they come."""

    path: Path
    size: int = 0
    rounds: int = 0
    last: Event = field(default_factory=dict)

    def new(self) -> Iterator[Event]:
        """Those that came since the last call."""
        if not self.path.is_file():
            return
        with self.path.open("rb") as file:
            file.seek(self.size)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.size += len(whole)
        for line in whole.splitlines():
            event: Event = json.loads(line)
            self.rounds += event["event"] == "round_finished"
            self.last = event
            yield event


def run_plan(
    kit: Kit, settings: ServerSettings, signed: SignedPlan, patience_s: float, tell: Tell
) -> Path:
    """Runs a plan, or goes on with it, until it has finished; returns its run folder.

    A run whose process died, or that paused for want of sites, is resumed after a while that grows
    from 10 s to 10 minutes, for as long as `patience_s` without a finished round allows.

    Args:
        kit: Of the server.
        settings: Of the server.
        signed: The plan.
        patience_s: How long nothing may come of it.
        tell: Told of events.

    Raises:
        FederationError: SAM-F111 when patience is at its end, with what the run said last; SAM-F112
            for an error that waiting does not mend.
        DeploymentError: When the SuperLink does not answer, or another plan is on.
        TrustError: SAM-K303 when the plan is over and has not finished.
    """
    plan = signed.plan
    write_plan(plan_file(kit, plan.sha256), signed)
    folder = run_folder(kit, plan)
    events = _Events(folder / "events.jsonl")
    for _ in events.new():  # of earlier calls
        pass
    if events.last.get("event") == "summary_written":
        return folder
    require_current(plan)
    events.last = {}  # what ended an earlier call is not what ends this one
    # Before anybody is let in for this plan: the sites of another that is on must stay.
    _asked(kit, settings, tell, lambda control: _on(control, plan.sha256))
    _admit(kit, settings, signed, tell)
    still_since, wait_s = time.monotonic(), _FIRST_WAIT_S
    while True:
        done = events.rounds
        run_id = _asked(
            kit,
            settings,
            tell,
            lambda control: _on(control, plan.sha256) or control.start(plan.sha256),
        )
        tell({"event": "run_watched", "run": run_id})
        status = _follow(kit, settings, run_id, events, tell)
        last = events.last.get("event", "")
        if status == "completed" and last == "summary_written":
            return folder
        if status == "stopped":
            raise FederationError(
                "SAM-F113",
                f"the run was stopped after {events.rounds} rounds",
                "Run the plan again to go on.",
            )
        if last == FAILED:
            raise FederationError(
                "SAM-F112",
                f"{events.last.get('code')}: {events.last.get('message')}",
                "Mend it and run the plan again; finished rounds are kept.",
            )
        if events.rounds > done:
            still_since, wait_s = time.monotonic(), _FIRST_WAIT_S
        if time.monotonic() - still_since > patience_s:
            said = events.last.get("message") or "its process ended without a word"
            raise FederationError(
                "SAM-F111",
                f"no round was finished for {patience_s / 3600:.3g} hours: {said}",
                "Mend the sites named above and run the plan again; finished rounds are kept.",
            )
        tell({"event": "run_resumes", "in_s": wait_s, "after": last or "nothing"})
        time.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _admit(kit: Kit, settings: ServerSettings, signed: SignedPlan, tell: Tell) -> None:
    """Lets the nodes of a plan's sites connect, and tells of changes."""
    nodes = {name: site.node for name, site in signed.plan.sites.items()}
    for change in _asked(kit, settings, tell, lambda control: control.admit(nodes)):
        tell({"event": "node_change", "what": change})


def _on(control: Control, plan_sha256: str) -> int | None:
    """The run of a plan that is waiting or running, if there is one.

    Raises:
        DeploymentError: SAM-N303 when another plan is running: sites work on one at a time.
    """
    for run in control.unfinished():
        if dict(run.override_config)[PLAN_KEY].string != plan_sha256:
            raise DeploymentError(
                "SAM-N303",
                f"run {run.run_id} of another plan is on",
                "Wait for its end, or stop it with `samaritan server stop-run`.",
            )
        return int(run.run_id)
    return None


def _follow(kit: Kit, settings: ServerSettings, run_id: int, events: _Events, tell: Tell) -> str:
    """Watches a run to its end and returns how it ended: completed, failed or stopped."""
    while True:
        for event in events.new():
            tell(event)
        if status := _asked(kit, settings, tell, lambda control: _status(control, run_id)):
            for event in events.new():
                tell(event)
            return status
        time.sleep(_POLL_S)


def _status(control: Control, run_id: int) -> str:
    """How a run ended; empty while it is on."""
    status = control.run(run_id).status
    return str(status.sub_status) if status.status == "finished" else ""


def _asked(kit: Kit, settings: ServerSettings, tell: Tell, ask: Callable[[Control], _T]) -> _T:
    """What the SuperLink says; one that does not answer may just be started anew.

    Raises:
        DeploymentError: When it refuses, or does not answer for a minute.
    """
    end, is_told = time.monotonic() + _SETTLED_S, False
    while True:
        try:
            with connect(kit, settings) as control:
                return ask(control)
        except DeploymentError as error:
            if error.code != SILENT or time.monotonic() > end:
                raise
            if not is_told:
                tell({"event": "link_silent", "for_s": _SETTLED_S})
                is_told = True
            time.sleep(_POLL_S)
