"""`samaritan compare`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samaritan.cli.console import Progress, fail, print_json
from samaritan.cli.simulate import run_folder

if TYPE_CHECKING:
    from samaritan.report.comparison import Failure


def compare(
    config: Annotated[Path, typer.Argument(help="YAML configuration with variants; see configs/.")],
    data: Annotated[Path | None, typer.Option(help="Data folder.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the runs; runs/NAME-TIME by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key: --set rounds=3")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished runs in --out, go on with the others.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print comparison.json.")] = False,
) -> None:
    """Run variants of a federation on the same data, split and seeds; write a table and a plot."""
    from samaritan.report.comparison import to_markdown
    from simulation.compare import compare as run
    from simulation.compare import failures, load_comparison
    from simulation.run import Watch

    comparison = load_comparison(config, overrides or [])
    folder = run_folder(out, comparison.name, resume)
    progress = Progress()
    watch = Watch(
        note=progress.line,
        case_checked=lambda n, of, case: progress.update(f"checking case {n} of {of}: {case}"),
        step=lambda site, n, of, loss: progress.update(
            f"{site}: step {n} of {of}, loss {loss:.3f}"
        ),
        round_done=lambda entry: progress.update(f"round {entry['round']} is done"),
    )
    try:
        table = run(
            comparison,
            folder,
            data_dir=data,
            resume=resume,
            command=_command(config, data, overrides or []),
            watch=watch,
            run_done=lambda *ended: progress.line(_run_line(*ended)),
        )
    finally:
        progress.stop()
    if as_json:
        print_json(table)
    else:
        typer.echo(to_markdown(table))
        typer.echo(f"table: {folder / 'comparison.md'}")
    failed = failures(table)
    if failed:
        runs = sum(len(row["seeds"]) for row in table["variants"])
        named = ", ".join(f"{variant} seed {seed} ({code})" for variant, seed, code in failed)
        fail(
            f"{len(failed)} of {runs} runs failed: {named}\n"
            f"  hint: {folder / 'comparison.md'} says why; mend it, then go on with --resume."
        )


def _command(config: Path, data: Path | None, overrides: list[str]) -> str:
    """The command that makes the same numbers, without where they go."""
    parts = ["samaritan", "compare", str(config)]
    parts += ["--data", str(data)] if data else []
    return shlex.join([*parts, *(part for item in overrides for part in ("--set", item))])


def _run_line(variant: str, seed: int, ended: dict[str, Any] | Failure) -> str:
    from samaritan.report import facts, units

    name = f"{variant}, seed {seed}"
    if not isinstance(ended, dict):
        return f"{name}: failed, {ended.code}  {ended.message}"
    dice = units.score(facts.number(ended, "final", "dice_mean"), 4)
    mark = facts.oracle_mark(facts.text(ended, "final", "oracle_prompts"))
    seconds = units.duration(facts.number(ended, "cost", "federated_seconds"))
    return f"{name}: Dice {dice}{mark}, {seconds}"
