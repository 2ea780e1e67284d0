"""`samaritan server` and `samaritan run`: start, status, stop, and a plan run to its end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from samaritan.cli.console import Progress, print_json
from samaritan.cli.kits import KitFolder, KitOption, kit_folder, states_table

app = typer.Typer(no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def start(kit: KitFolder = None) -> None:
    """Run the SuperLink and the proxy before it until told to stop."""
    from samaritan.operate.processes import run
    from samaritan.provision.kit import load_kit
    from server.processes import server_programs
    from server.settings import load_settings

    found = load_kit(kit_folder(kit), "server")
    run(found.folder, server_programs(found, load_settings(found.path("server.yaml"))))


@app.command()
def status(kit: KitFolder = None, as_json: AsJson = False) -> None:
    """Show processes, sites and runs, and what to do; exit status 1 if the server is not well."""
    from samaritan.provision.kit import load_kit
    from server.standing import standing

    told = standing(load_kit(kit_folder(kit), "server"))
    if as_json:
        print_json(told)
    else:
        typer.echo("\n".join(_standing_lines(told)))
    if told["problems"]:
        raise typer.Exit(1)


@app.command()
def stop(kit: KitFolder = None) -> None:
    """Stop the server's processes and wait until they are gone; a run can be resumed."""
    from samaritan.operate.processes import stop as end
    from samaritan.provision.kit import load_kit

    end(load_kit(kit_folder(kit), "server").folder)
    typer.echo("stopped")


@app.command()
def reload(kit: KitFolder = None) -> None:
    """Let the proxy read certificates and revocations anew; runs go on."""
    from samaritan.operate.processes import reload as read_anew
    from samaritan.provision.kit import load_kit

    read_anew(load_kit(kit_folder(kit), "server").folder, "proxy")
    typer.echo("the proxy has read its certificates and revocations anew")


@app.command("stop-run")
def stop_run(kit: KitFolder = None) -> None:
    """Stop the run that is on; finished rounds are kept, and the plan can be run again."""
    from samaritan.provision.kit import load_kit
    from server.control import connect
    from server.settings import load_settings

    found = load_kit(kit_folder(kit), "server")
    with connect(found, load_settings(found.path("server.yaml"))) as control:
        runs = list(control.unfinished())
        for run in runs:
            control.stop(run.run_id)
            typer.echo(f"run {run.run_id} is stopped")
    if not runs:
        typer.echo("no run is on; a `samaritan run` that waits to go on ends with Ctrl-C")


def run(
    plan: Annotated[Path, typer.Argument(help="Signed plan, from `samaritan plan make`.")],
    kit: KitOption = None,
    patience_hours: Annotated[
        float, typer.Option(min=0, help="Give up when no round was finished for so long.")
    ] = 24.0,
    as_json: AsJson = False,
) -> None:
    """Run a plan over real sites to its end, or go on with it; exit status 0 if it finished."""
    import json

    from samaritan.plan import read_plan
    from samaritan.provision.kit import load_kit
    from server.runner import run_plan
    from server.settings import load_settings

    found = load_kit(kit_folder(kit), "server")
    settings = load_settings(found.path("server.yaml"))
    signed = read_plan(plan, bytes.fromhex(found.card.plan_signer))
    progress = Progress()
    rounds = signed.plan.config.rounds

    def tell(event: dict[str, Any]) -> None:
        if line := _line(event, rounds):
            progress.line(line)

    try:
        folder = run_plan(found, settings, signed, patience_hours * 3600, tell)
    finally:
        progress.stop()
    if as_json:
        print_json(json.loads((folder / "summary.json").read_text("utf-8")))
    else:
        typer.echo(f"report: {folder / 'report.html'}")


def _standing_lines(told: dict[str, Any]) -> list[str]:
    """How a federation stands, for people; the most important first."""
    from datetime import datetime

    from samaritan.watch import words

    now = datetime.fromisoformat(told["time"])

    def when(text: str) -> str:
        moment = words.parse_time(text)
        return "never" if moment is None else f"{words.ago(moment, now)} ({words.utc(moment, now)})"

    state = told["state"]
    lines = [f"{state['state'].upper()}  {state['sentence']}"]
    if state["since"]:
        lines.append(f"  since: {when(state['since'])}")
    if state["advice"]:
        lines.append(f"  to do: {state['advice']}")
    lines += [f"  look:  {text}" for text in told["attention"]]
    lines += ["", states_table(told["processes"])]
    if not told["link"]["answers"]:
        lines += ["", f"sites unknown: {told['link']['fault']}"]
    elif told["sites"]:
        lines.append("")
    width, codes = max((len(name) for name in told["sites"]), default=0), list[str]()
    for name, site in told["sites"].items():
        seen = f"last seen {when(site['last_seen'])}" if site["status"] == "offline" else ""
        last = f"round {site['last_round']}: {site['last_status']}" if site["last_round"] else ""
        codes += words.codes_in([last])
        lines.append("  ".join(filter(None, (f"{name:<{width}}", site["status"], seen, last))))
    for code, found in ((code, words.meaning(code)) for code in dict.fromkeys(codes)):
        if found:
            lines.append(f"  {code}: {found[0]} {found[1]}")
    if told["runs"]:
        lines.append("")
    for run in told["runs"]:
        current = f", round {run['under_way']} under way" if run["under_way"] else ""
        lines.append(
            f"study {run['name']} ({run['plan'][:8]}): {run['state']}, {run['round']} of "
            f"{run['rounds']} rounds done{current}; last event {when(run['last_event'])}; "
            f"{run['folder']}"
        )
    return lines


def _line(event: dict[str, Any], rounds: int) -> str:
    """An event for people; empty for those that say nothing new."""
    from samaritan.cli.simulate import round_line

    match event["event"]:
        case "round_finished":
            return round_line(event, rounds)
        case "roll_call":
            refused = "".join(f"\n  {text}" for text in event["refused"])
            return f"sites: {', '.join(event['present']) or 'none'}{refused}"
        case "round_started":
            return f"round {event['round']}/{rounds} begins with {', '.join(event['sites'])}"
        case "run_paused" | "run_failed":
            return f"{event['code']}  {event['message']}"
        case "run_resumes":
            return f"  goes on in {event['in_s']:g} s"
        case "link_silent":
            return f"the SuperLink does not answer; trying for {event['for_s']:g} s"
        case "run_watched":
            return f"run {event['run']}"
        case "node_change":
            return str(event["what"])
        case "site_failed" | "site_late" | "reply_refused" | "reply_forged" | "site_left":
            reason = event.get("status") or event.get("reason") or "answer not sealed by this site"
            return f"  {event['site']}: {reason}"
        case _:
            return ""
