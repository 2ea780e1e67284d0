"""`samaritan simulate`."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from samaritan.cli.console import Progress, print_json


class Engine(StrEnum):
    """How sites run on one machine."""

    inprocess = "inprocess"
    ray = "ray"


def simulate(
    config: Annotated[Path, typer.Argument(help="YAML configuration; see configs/.")],
    data: Annotated[Path | None, typer.Option(help="Data folder.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME-TIME by default.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set rounds=3")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="inprocess, or ray for many GPUs.")] = (
        Engine.inprocess
    ),
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also train local-only, pooled and U-Net models.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out after its last round.")
    ] = False,
    ledger: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps the sites' privacy ledgers from run to run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json.")] = False,
) -> None:
    """Run a whole federation on this machine."""
    from samaritan.config import load_config
    from simulation.run import Watch
    from simulation.run import simulate as run

    settings = load_config(config, overrides or [])
    run_dir = run_folder(out, settings.name, resume)
    progress = Progress()
    try:
        watch = Watch(
            note=progress.line,
            case_checked=lambda n, of, case: progress.update(f"checking case {n} of {of}: {case}"),
            step=lambda site, n, of, loss: progress.update(
                f"{site}: step {n} of {of}, loss {loss:.3f}"
            ),
            round_done=lambda entry: progress.line(round_line(entry, settings.rounds)),
        )
        summary = run(
            settings,
            run_dir,
            data_dir=data,
            ledger_dir=ledger,
            engine=engine.value,
            baselines=baselines,
            resume=resume,
            watch=watch,
        )
    finally:
        progress.stop()
    if as_json:
        print_json(summary)
        return
    typer.echo(_result_line(summary, settings.selection.keep))
    typer.echo(f"report: {run_dir / 'report.html'}")


def run_folder(out: Path | None, name: str, resume: bool) -> Path:
    """Where a run goes: `out`, or a new folder of its own in runs/.

    Raises:
        ConfigError: When there is nothing to tell which run to resume.
    """
    from samaritan.errors import ConfigError

    if resume and out is None:
        raise ConfigError("SAM-C305", "--resume needs --out", "Name the run folder to go on with.")
    return out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def round_line(entry: dict[str, Any], rounds: int) -> str:
    """A finished round in one line, and what went wrong in it."""
    from samaritan.report.aggregation import long_update_sentences
    from samaritan.report.facts import oracle_mark

    mark = oracle_mark(entry.get("oracle_prompts", "none"))
    dice = "not scored" if entry["dice_mean"] is None else f"Dice {entry['dice_mean']:.4f}{mark}"
    faults = {k: s["status"] for k, s in entry["sites"].items() if s["status"] != "ok"}
    losses = [s["train_loss"] for s in entry["sites"].values() if s["train_loss"] is not None]
    error = entry["aggregation_error"]
    known = "" if error is None else f"aggregation error {error:.2g}, "
    loss = f"loss {sum(losses) / len(losses):.3f}, " if losses else ""  # withheld under privacy
    line = f"round {entry['round']}/{rounds}: {dice}, {loss}{known}{entry['seconds']:.1f} s"
    notes = [f"{site}: {status}" for site, status in faults.items()]
    notes += long_update_sentences({"rounds": [entry]})
    if "rolled_back_to" in entry:
        notes.append(f"rolled back to the adapter of round {entry['rolled_back_to']}")
    return "\n  ".join([line, *notes])


def _result_line(summary: dict[str, Any], keep: str) -> str:
    from samaritan.report.facts import oracle_mark

    final = summary["final"]
    if final["dice_mean"] is None:
        return "no structure occurs in any validation case"
    line = (
        f"Dice {final['dice_mean']:.4f}, HD95 {final['hd95_mm_mean']:.2f} mm, "
        f"NSD {final['nsd_mean']:.4f} over {final['cases']} validation cases"
        f"{oracle_mark(final['oracle_prompts'])}"
    )
    if keep == "best":
        line += f"\n  adapter of round {summary['adapter_of_round']}, chosen by these same cases"
    personal = summary["personal"] or {}
    if personal.get("dice_mean") is not None:
        mark = oracle_mark(personal["oracle_prompts"])
        line += f"\n  fine-tuned at each site: Dice {personal['dice_mean']:.4f}{mark}"
    for name, entry in (summary["baselines"] or {}).items():
        if isinstance(entry, dict) and entry["dice_mean"] is not None:
            mark = oracle_mark(entry["oracle_prompts"])
            line += f"\n  {name}: Dice {entry['dice_mean']:.4f}{mark}"
    return line
