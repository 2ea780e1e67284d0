"""A site's status page: `python -m client.status KIT`, on this machine alone, where it is wanted.

It loads no model and reads no case, and goes on when the agent is dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

from starlette.applications import Starlette

from client.settings import load_settings
from client.standing import KINDS, Watch
from samaritan import __version__
from samaritan.errors import DeploymentError
from samaritan.provision.kit import Kit, load_kit
from samaritan.report import units
from samaritan.watch import words
from samaritan.watch.follow import Json
from samaritan.watch.metrics import Metric
from samaritan.watch.pages import Pages, application, explained, process_rows, serve
from samaritan.watch.words import UNKNOWN

_PROCESSES = {
    "agent": "reads the cases, trains, and decides what leaves",
    "node": "Flower's connection to the server",
    "courier": "carries messages between both",
    "status": "this page",
}


def status_app(kit: Kit, watch: Watch | None = None) -> Starlette:
    """The web server of a site's kit."""
    look = (watch or Watch(kit)).look
    return application(Pages(look, Path(__file__).with_name("status.html"), context, metrics))


def context(tree: Json) -> Json:
    """What the page shows, from how everything stands."""
    now = datetime.fromisoformat(tree["time"])
    since = words.parse_time(tree["state"]["since"])
    log, names = tree["log"], {plan["plan"]: plan["study"] for plan in tree["plans"]}
    refusals = [_refusal_row(refusal, now) for refusal in log["refusals"]]
    said = [tree["state"]["sentence"], *tree["attention"], *(r["code"] for r in refusals)]
    return {
        "version": __version__,
        "as_of": f"{now.day} {now:%B %Y, %H:%M:%S} UTC",
        "since": since and f"{words.utc(since, now)}, {words.ago(since, now)}",
        "figures": _figures(tree, now),
        "plan_rows": [_plan_row(plan, log["by_plan"], now) for plan in tree["plans"]],
        "log_rows": _log_rows(log, names, now),
        "refusal_rows": refusals,
        "policy_rows": _policy_rows(tree["policy"]),
        "process_rows": process_rows(tree["processes"], _PROCESSES),
        "codes": explained(said),
    }


def _figures(tree: Json, now: datetime) -> list[tuple[str, str, str]]:
    log, days = tree["log"], tree["certificate_days"]
    left = log["left"]
    last = words.parse_time(left["time"]) if left else None
    return [
        ("Tensors that left, in total", units.size(log["total"]["bytes"]),
         f"in {units.plural(log['total']['answers'], 'answer')}"),
        ("Last answer that left", words.ago(last, now) if left else "none",
         _content(left) if left else ""),
        ("Certificate", words.days(days), "until it ends" if days is not None else ""),
        ("Hours", _open_word(tree["policy"]), ""),
    ]  # fmt: skip


def _open_word(policy: Json | None) -> str:
    if policy is None:
        return UNKNOWN
    return "open now" if policy["open_now"] else "closed now"


def _plan_row(plan: Json, by_plan: Mapping[str, Json], now: datetime) -> Json:
    epsilon = "" if plan["epsilon"] is None else f", epsilon {plan['epsilon']:g}"
    privacy = "none" if plan["privacy"] == "none" else f"by {plan['privacy']}{epsilon}"
    left = by_plan.get(plan["plan"])
    return {
        "study": plan["study"],
        "plan": plan["plan"][:16],
        "is_valid": plan["days"] >= 0,
        "valid_until": plan["valid_until"],
        "approved": [
            f"{said['role']}, {_day(words.parse_time(said['time']))}" for said in plan["approved"]
        ],
        "missing": ", ".join(plan["missing"]),
        "privacy": privacy,
        "left": _sum(left) if left else "nothing yet",
    }


def _day(moment: datetime | None) -> str:
    return UNKNOWN if moment is None else f"{moment:%Y-%m-%d}"


def _log_rows(log: Json, names: Mapping[str, str], now: datetime) -> list[tuple[str, str]]:
    rows = [("Last request", _event(log["asked"], names, now))]
    left = _event(log["left"], names, now)
    if log["left"]:
        left = f"{left}: {_content(log['left'])}"
    rows.append(("Last thing that left", left))
    rows += [
        (f"All of {KINDS.get(kind, kind)}", _sum(told))
        for kind, told in sorted(log["by_kind"].items())
    ]
    if log["held"]:
        rows.append(("Kept by a dry run", units.plural(log["held"], "answer")))
    return rows


def _event(event: Json | None, names: Mapping[str, str], now: datetime) -> str:
    if event is None:
        return "none"
    moment = words.parse_time(event["time"])
    study = names.get(event["plan"], "a plan that is not approved here")
    when = f"{words.ago(moment, now)}, {words.utc(moment, now)}" if moment else UNKNOWN
    return f"{_kind(event)}, round {event['round']} of {study}, {when}"


def _content(left: Json) -> str:
    """What an answer held: bytes of tensors, and the names of numbers and texts."""
    parts = []
    if left["tensors"]:
        parts.append(f"{units.size(left['bytes'])} in {units.plural(left['tensors'], 'tensor')}")
    elif left["bytes"]:
        parts.append(units.size(left["bytes"]))
    parts += [", ".join(left["names"])] if left["names"] else []
    return "; ".join(parts) or "an empty answer"


def _sum(told: Json) -> str:
    answers = units.plural(told["answers"], "answer")
    return f"{units.size(told['bytes'])} in {answers}" if told["bytes"] else f"{answers}, no tensor"


def _kind(event: Json) -> str:
    return KINDS.get(event["kind"], event["kind"] or UNKNOWN)


def _refusal_row(refusal: Json, now: datetime) -> Json:
    moment = words.parse_time(refusal["last"])
    return {
        "code": refusal["code"] or UNKNOWN,
        "request": f"{_kind(refusal)}, round {refusal['round']}",
        "times": units.count(refusal["times"]),
        "last": f"{words.ago(moment, now)}, {words.utc(moment, now)}" if moment else UNKNOWN,
        "reference": refusal["reference"],
    }


def _policy_rows(policy: Json | None) -> list[tuple[str, str]]:
    if policy is None:
        return []
    hours = ", ".join(policy["hours"]) or "always"
    return [
        ("Dry run", "on: nothing leaves" if policy["dry_run"] else "off"),
        ("Hours", f"{hours}; {_open_word(policy)} (here it is {policy['local_time']})"),
        ("Least sites in a round", str(policy["min_cohort"])),
        ("Required privacy", policy["require_privacy"]),
    ]


def metrics(tree: Json) -> Sequence[Metric]:
    """The same as numbers; what is not known is left out."""
    log, policy = tree["log"], tree["policy"]
    by_kind = log["by_kind"].items()
    left = words.parse_time(log["left"]["time"]) if log["left"] else None
    asked = words.parse_time(log["asked"]["time"]) if log["asked"] else None
    return [
        Metric("samaritan_up", "1 if all processes run and the agent answers", (),
               [((), float(not tree["problems"]))]),
        Metric("samaritan_process_up", "1 if the process runs", ("process",),
               [((n,), float(p["state"] == "running")) for n, p in tree["processes"].items()]),
        Metric("samaritan_process_uptime_seconds", "how long the process has run", ("process",),
               [((n,), float(p["seconds"])) for n, p in tree["processes"].items()]),
        Metric("samaritan_agent_up", "1 if the agent answers on its socket", (),
               [((), float(tree["agent"]["answers"]))]),
        Metric("samaritan_working", "1 while a request is worked on", (),
               [((), float(log["open"]))]),
        Metric("samaritan_egress_answers", "answers that left", ("kind",),
               [((kind,), told["answers"]) for kind, told in by_kind], counter=True),
        Metric("samaritan_egress_bytes", "bytes that left", ("kind",),
               [((kind,), told["bytes"]) for kind, told in by_kind], counter=True),
        Metric("samaritan_refused_requests", "requests that were refused", ("code", "kind"),
               [((r["code"], r["kind"]), r["times"]) for r in log["refusals"]], counter=True),
        Metric("samaritan_last_egress_timestamp_seconds", "when something left last", (),
               [((), left.timestamp() if left else None)]),
        Metric("samaritan_last_request_timestamp_seconds", "when the server asked last", (),
               [((), asked.timestamp() if asked else None)]),
        Metric("samaritan_plan_approved", "1 if all who must have approved", ("study", "plan"),
               [((p["study"], p["plan"]), float(not p["missing"])) for p in tree["plans"]]),
        Metric("samaritan_plan_days_left", "days until the plan ends", ("study", "plan"),
               [((p["study"], p["plan"]), p["days"]) for p in tree["plans"]]),
        Metric("samaritan_certificate_days_left", "whole days until it ends", ("of",),
               [(("site",), tree["certificate_days"])]),
        Metric("samaritan_dry_run", "1 if nothing leaves, by site.yaml", (),
               [((), float(policy["dry_run"]) if policy else None)]),
        Metric("samaritan_hours_open", "1 inside the hours of site.yaml", (),
               [((), float(policy["open_now"]) if policy else None)]),
    ]  # fmt: skip


def main(folder: Path) -> None:
    """Serves the page of a kit until it is told to stop.

    Raises:
        SamaritanError: When the kit or site.yaml cannot be read, or the port is taken; SAM-N503
            where site.yaml names no port.
    """
    kit = load_kit(folder, "site")
    port = load_settings(kit.path("site.yaml")).status_port
    if port is None:
        raise DeploymentError(
            "SAM-N503", "site.yaml names no status_port", "Set it, such as status_port: 8081."
        )
    serve(status_app(kit), port)


if __name__ == "__main__":
    import sys

    from samaritan.errors import SamaritanError

    try:
        main(Path(sys.argv[1]))
    except SamaritanError as fault:
        sys.exit(f"error: {fault}")
