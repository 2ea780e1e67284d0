"""`samaritan audit privacy`; `samaritan audit log` is in a file of its own."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from samaritan.cli import audit_log
from samaritan.cli.console import Progress, print_json

app = typer.Typer(no_args_is_help=True)
app.add_typer(audit_log.app, name="log", help="Read and check the log of what left a site.")


class Mode(StrEnum):
    """What is audited."""

    mechanism = "mechanism"


@app.callback()
def _audit() -> None:
    """Try to contradict what is claimed."""


@app.command()
def privacy(
    mode: Annotated[Mode, typer.Option(help="What is audited.")] = Mode.mechanism,
    config: Annotated[
        Path | None, typer.Option(help="Audit the mechanism of this configuration.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Claim; 2 by default.", min=0.01)] = None,
    sampling_rate: Annotated[
        float | None, typer.Option(help="Of patients; 0.05 by default.", min=1e-4, max=1)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="400 by default.", min=1)] = None,
    canaries: Annotated[int, typer.Option(help="Made-up patients in each repeat.")] = 1000,
    guesses: Annotated[
        int | None, typer.Option(help="In each repeat; a fifth of the canaries by default.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Trainings, judged together.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Try to contradict a claimed epsilon with made-up patients; exit status 1 if it succeeds."""
    from samaritan.config import load_config
    from samaritan.errors import PrivacyError
    from samaritan.privacy.audit.claim import claim_of_budget, claim_of_config
    from samaritan.privacy.audit.report import as_text, as_values
    from samaritan.privacy.audit.verdict import audit_mechanism

    given = {"epsilon": epsilon, "sampling_rate": sampling_rate, "steps": steps}
    numbers = {name: value for name, value in given.items() if value is not None}
    if config is not None and numbers:
        raise PrivacyError(
            "SAM-P404",
            f"--config says what is claimed, and so does --{next(iter(numbers)).replace('_', '-')}",
            "Give one or the other.",
        )
    claim = claim_of_config(load_config(config)) if config else claim_of_budget(**numbers)  # type: ignore[arg-type]
    progress = Progress()
    try:
        audit = audit_mechanism(
            claim, canaries=canaries, guesses=guesses, repeats=repeats, note=progress.line
        )
    finally:
        progress.stop()
    if as_json:
        print_json(as_values(audit))
    else:
        typer.echo(as_text(audit))
    if audit.verdict == "VIOLATION":
        raise typer.Exit(1)
