"""How a federation stands: sites, runs, rounds, bytes, budgets; for the command and the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from samaritan.errors import SamaritanError
from samaritan.plan import Plan, read_plan
from samaritan.provision.kit import Kit
from server.control import connect
from server.home import run_folder
from server.settings import load_settings


def standing(kit: Kit) -> dict[str, Any]:
    """Sites with their nodes, and every run with its rounds; what cannot be known is left out."""
    return {"sites": sites(kit), "runs": [run_state(kit, plan) for plan in plans(kit)]}


def sites(kit: Kit) -> dict[str, dict[str, str]]:
    """Status and last sign of every node that may connect, by site."""
    settings = load_settings(kit.path("server.yaml"))
    try:
        with connect(kit, settings) as control:
            nodes = control.nodes()
    except SamaritanError as error:
        return {"(the SuperLink)": {"status": error.message, "last_seen": ""}}
    return {
        node.name or str(node.node_id): {
            "status": node.status,
            "last_seen": node.last_deactivated_at if node.status == "offline" else "now",
        }
        for node in nodes
    }


def plans(kit: Kit) -> list[Plan]:
    """Every plan that was ever run here, oldest first."""
    signer = bytes.fromhex(kit.card.plan_signer)
    files = sorted(kit.path("plans").glob("*.json"), key=lambda p: p.stat().st_mtime)
    return [read_plan(path, signer).plan for path in files]


def run_state(kit: Kit, plan: Plan) -> dict[str, Any]:
    """Where the run of a plan stands, from its events."""
    events = read_events(run_folder(kit, plan) / "events.jsonl")
    finished = [event for event in events if event["event"] == "round_finished"]
    last = events[-1] if events else {"event": "not begun", "time": ""}
    states = {
        "summary_written": "finished",
        "run_paused": "paused",
        "run_failed": "failed",
        "not begun": "not begun",
    }
    return {
        "name": plan.study,
        "plan": plan.sha256,
        "round": finished[-1]["round"] if finished else 0,
        "rounds": plan.config.rounds,
        "state": states.get(last["event"], "running"),
        "since": last["time"],
        "message": last.get("message", ""),
        "history": finished,
    }


def read_events(path: Path) -> list[dict[str, Any]]:
    """All whole lines of an event log; none when there is no log yet."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]
