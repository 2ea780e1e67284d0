"""How a federation stands, as numbers for Prometheus; what is not known is left out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from samaritan.watch import words
from samaritan.watch.follow import Json
from samaritan.watch.metrics import Metric


def metrics(tree: Json) -> Sequence[Metric]:
    """Every metric of the server."""
    sites, runs = tree["sites"], tree["runs"]

    def by_site(key: str) -> list[tuple[tuple[str, ...], float | None]]:
        return [((name,), site[key]) for name, site in sites.items()]

    def by_run(key: str) -> list[tuple[tuple[str, ...], float | None]]:
        return [((run["name"], run["plan"]), run[key]) for run in runs]

    study, site = ("study", "plan"), ("site",)
    budgets = [((n,), s["budget"]["left"]) for n, s in sites.items() if s["budget"]]
    certificates = tree["certificates"]
    ends = [
        (("server",), certificates["server_days"]), (("crl",), certificates["list_days"]),
    ]  # fmt: skip
    return [
        Metric("samaritan_up", "1 if all processes run and the SuperLink answers", (),
               [((), float(not tree["problems"]))]),
        Metric("samaritan_process_up", "1 if the process runs", ("process",),
               [((n,), float(p["state"] == "running")) for n, p in tree["processes"].items()]),
        Metric("samaritan_process_uptime_seconds", "how long the process has run", ("process",),
               [((n,), float(p["seconds"])) for n, p in tree["processes"].items()]),
        Metric("samaritan_run_state", "1 for the state in which the study is", (*study, "state"),
               [((run["name"], run["plan"], run["state"]), 1.0) for run in runs]),
        Metric("samaritan_rounds_done", "rounds that are done", study, by_run("round")),
        Metric("samaritan_rounds_planned", "rounds of the plan", study, by_run("rounds")),
        Metric("samaritan_dice_mean", "mean Dice of the last round that was scored", study,
               [((r["name"], r["plan"]), _last(r["history"], "dice")) for r in runs]),
        Metric("samaritan_round_seconds", "how long the last round took", study,
               [((r["name"], r["plan"]), _last(r["history"], "seconds")) for r in runs]),
        Metric("samaritan_last_round_timestamp_seconds", "when the last round was done", study,
               [((r["name"], r["plan"]), _moment(_last(r["history"], "time"))) for r in runs]),
        Metric("samaritan_site_connected", "1 if the site is connected", site,
               [((n,), None if s["status"] == "unknown" else float(s["status"] == "online"))
                for n, s in sites.items()]),
        Metric("samaritan_site_last_seen_timestamp_seconds", "when the site was there last", site,
               [((n,), _seen(s, tree["time"])) for n, s in sites.items()]),
        Metric("samaritan_site_dice", "the last Dice that the site told", site, by_site("dice")),
        Metric("samaritan_site_sent_bytes", "bytes from the site in rounds that are done", site,
               by_site("bytes_up"), counter=True),
        Metric("samaritan_site_received_bytes", "bytes to the site in rounds that are done", site,
               by_site("bytes_down"), counter=True),
        Metric("samaritan_site_epsilon_left", "privacy budget left by the plan", site, budgets),
        Metric("samaritan_certificate_days_left", "whole days until it ends", ("of",),
               [*ends, *(((n,), s["certificate_days"]) for n, s in sites.items())]),
    ]  # fmt: skip


def _last(history: Sequence[Json], key: str) -> Any:
    """The newest value that is known."""
    return next((entry[key] for entry in reversed(history) if entry[key] is not None), None)


def _moment(text: object) -> float | None:
    moment = words.parse_time(text)
    return None if moment is None else moment.timestamp()


def _seen(site: Json, now: str) -> float | None:
    return _moment(now if site["last_seen"] == "now" else site["last_seen"])
