"""The coordinator's status page: `python -m server.status KIT`, on this machine alone.

It goes on when everything else is dead, and then says so.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from starlette.applications import Starlette

from samaritan import __version__
from samaritan.provision.kit import Kit, load_kit
from samaritan.report import units
from samaritan.watch import words
from samaritan.watch.follow import Json
from samaritan.watch.pages import Pages, application, explained, process_rows, serve
from samaritan.watch.plot import line_plot
from samaritan.watch.words import UNKNOWN
from server.numbers import metrics
from server.settings import load_settings
from server.spending import Spending
from server.standing import Watch

_ROUNDS_SHOWN, _TROUBLES_SHOWN = 12, 15

_PROCESSES = {
    "link": "Flower's SuperLink: keeps messages and runs",
    "proxy": "nginx: the one door for sites",
    "apps": "starts the process of a run",
    "status": "this page",
}
_CONNECTIONS = {
    "online": ("connected", "good"),
    "offline": ("not connected", "bad"),
    "registered": ("never connected", "bad"),
    "not admitted": ("not admitted yet", "warn"),
}


def status_app(kit: Kit, watch: Watch | None = None) -> Starlette:
    """The web server of a server's kit."""
    look = (watch or Watch(kit, spending=Spending())).look
    return application(Pages(look, Path(__file__).with_name("status.html"), context, metrics))


def context(tree: Json) -> Json:
    """What the page shows, from how everything stands."""
    now = datetime.fromisoformat(tree["time"])
    study = next((run for run in tree["runs"] if run["plan"] == tree["run"]), None)
    since = words.parse_time(tree["state"]["since"])
    sites = [_site_row(name, site, study, now) for name, site in tree["sites"].items()]
    troubles = study["troubles"][:_TROUBLES_SHOWN] if study else []
    others = [run for run in reversed(tree["runs"]) if run is not study]
    said = [
        tree["state"]["sentence"], tree["state"]["advice"], *tree["attention"],
        *(row["status"] for row in sites), *(t["what"] for t in troubles),
        *(run["sentence"] for run in others),
    ]  # fmt: skip
    return {
        "version": __version__,
        "as_of": f"{now.day} {now:%B %Y, %H:%M:%S} UTC",
        "study": study,
        "since": since and f"{words.utc(since, now)}, {words.ago(since, now)}",
        "figures": _figures(tree, study, now) if study else [],
        "site_rows": sites,
        "no_sites": "The SuperLink does not answer, so nothing is known of sites."
        if tree["link"]["fault"]
        else "No site is admitted yet: the first `samaritan run` admits those of its plan.",
        "has_budgets": any(site["budget"] for site in tree["sites"].values()),
        "has_certificates": any(
            site["certificate_days"] is not None for site in tree["sites"].values()
        ),
        **(_rounds(study, now) if study else {"plot": "", "best": "", "round_rows": []}),
        "trouble_rows": [_trouble_row(trouble, now) for trouble in troubles],
        "process_rows": process_rows(tree["processes"], _PROCESSES),
        "others": others,
        "codes": explained(said),
    }


def _figures(tree: Json, study: Json, now: datetime) -> list[tuple[str, str, str]]:
    """The row of numbers: label, value, remark."""
    sites = [site for site in tree["sites"].values() if site["planned"]]
    here = sum(site["status"] == "online" for site in sites)
    connected = UNKNOWN if tree["link"]["fault"] else f"{here} of {len(sites)}"
    history = study["history"]
    scored = [entry for entry in history if entry["dice"] is not None]
    dice = units.score(scored[-1]["dice"]) if scored else _no_dice(study, bool(history))
    found = [
        ("Rounds done", f"{study['round']} of {study['rounds']}", _remaining(study)),
        ("Mean Dice", dice, _dice_remark(study, scored)),
        ("Sites connected", connected, f"a round needs {study['min_sites']}"),
    ]
    if study["privacy"] and study["privacy"]["shared"]:
        budget = _budget(study["privacy"]["shared"])
        found.append(("Privacy left, all sites together", budget, "epsilon, by the plan"))
    elif history:
        last = words.parse_time(history[-1]["time"])
        found.append(("Last round done", words.ago(last, now), words.utc(last, now)))
    return found


def _remaining(study: Json) -> str:
    left, pace_s = study["rounds"] - study["round"], study["pace_s"]
    if study["state"] != "running" or not left or not pace_s:
        return ""
    return f"about {words.lasting(left * pace_s)} more at the pace of the last ones"


def _dice_remark(study: Json, scored: list[Json]) -> str:
    if scored:
        return f"round {scored[-1]['number']}"
    privacy = study["privacy"]
    return "the plan keeps scores at the sites" if privacy and not privacy["scores_told"] else ""


def _no_dice(study: Json, begun: bool) -> str:
    privacy = study["privacy"]
    if privacy and not privacy["scores_told"]:
        return "not told"
    return UNKNOWN if begun else "none yet"


def _site_row(name: str, site: Json, study: Json | None, now: datetime) -> Json:
    connection, tone = _CONNECTIONS.get(site["status"], (UNKNOWN, "warn"))
    moment = words.parse_time(site["last_seen"])
    seen = ""
    if moment is not None:
        seen = f"last seen {words.ago(moment, now)}, {words.utc(moment, now)}"
    elif since := words.parse_time(site["since"]):
        seen = f"since {words.utc(since, now)}"
    remarks = ["scores only"] if not site["trains"] else []
    if not site["planned"]:
        remarks.append("not in this study")
    begun = bool(study and study["history"])
    number = site["last_round"]
    status = site["last_status"] or ("not asked yet" if begun else "none yet")
    if site["left"]:
        status = f"has left: its privacy budget is spent ({status})"
    return {
        "name": name,
        "remark": ", ".join(remarks),
        "connection": connection,
        "tone": tone,
        "seen": seen,
        "status": status,
        "status_tone": "" if site["last_status"] in ("", "ok") else "warn",
        "status_round": f"round {number}" if number else "",
        "asked": f"at work on round {study['under_way']}"
        if study
        and study["state"] == "running"
        and site["asked_now"]
        and not site["left"]
        and number != study["under_way"]
        else "",
        "dice": units.score(site["dice"])
        if site["dice"] is not None
        else _no_dice(study, bool(number))
        if study
        else UNKNOWN,
        "dice_round": f"round {site['dice_round']}"
        if site["dice_round"] and site["dice_round"] != number
        else "",
        "up": _bytes(site["bytes_up"], begun),
        "down": _bytes(site["bytes_down"], begun),
        "examples": units.count(site["examples"]) if site["examples"] is not None else UNKNOWN,
        "budget": "spent, it says"
        if site["left"]
        else _budget(site["budget"])
        if site["budget"]
        else UNKNOWN,
        "certificate": words.days(site["certificate_days"]),
    }


def _bytes(size_bytes: int | None, begun: bool) -> str:
    if size_bytes is None:
        return UNKNOWN if begun else "nothing yet"
    return units.size(size_bytes)


def _budget(budget: Json) -> str:
    if budget["epsilon"] is None:
        return UNKNOWN if budget["spent"] is None else f"{budget['spent']:.2f} spent"
    left = UNKNOWN if budget["left"] is None else f"{budget['left']:.2f}"
    return f"{left} of {budget['epsilon']:g}"


def _rounds(study: Json, now: datetime) -> Json:
    history = study["history"]
    points = [(entry["number"], entry["dice"]) for entry in history if entry["dice"] is not None]
    best = max(points, key=lambda point: point[1], default=None)
    return {
        "plot": line_plot(points, study["rounds"], "mean Dice") if len(points) > 1 else "",
        "best": f"{units.score(best[1])} in round {best[0]}" if best else "",
        "round_rows": [
            {
                "number": entry["number"],
                "done": words.utc(words.parse_time(entry["time"]), now).removesuffix(" UTC"),
                "took": UNKNOWN if entry["seconds"] is None else units.duration(entry["seconds"]),
                "dice": _no_dice(study, True)
                if entry["dice"] is None
                else units.score(entry["dice"]),
                "sites": f"{entry['answered']} of {entry['asked']}",
                "short": entry["answered"] < entry["asked"],
            }
            for entry in reversed(history[-_ROUNDS_SHOWN:])
        ],
    }


def _trouble_row(trouble: Json, now: datetime) -> Json:
    first, last = trouble["first_round"], trouble["last_round"]
    rounds = units.MISSING if not last else str(last) if first == last else f"{first} to {last}"
    times = f" ({trouble['times']} times)" if trouble["times"] > 1 else ""
    moment = words.parse_time(trouble["last"])
    return {
        "what": trouble["what"],
        "site": trouble["site"] or "the run",
        "rounds": rounds + times,
        "last": f"{words.ago(moment, now)}, {words.utc(moment, now)}" if moment else UNKNOWN,
    }


def main(folder: Path) -> None:
    """Serves the page of a kit until it is told to stop.

    Raises:
        SamaritanError: When the kit or server.yaml cannot be read, or the port is taken.
    """
    kit = load_kit(folder, "server")
    port = load_settings(kit.path("server.yaml")).status_port
    serve(status_app(kit), port)


if __name__ == "__main__":
    import sys

    from samaritan.errors import SamaritanError

    try:
        main(Path(sys.argv[1]))
    except SamaritanError as fault:
        sys.exit(f"error: {fault}")
