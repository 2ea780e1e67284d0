"""`samaritan data check` and `samaritan data describe`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from samaritan.cli.console import Progress, print_json

app = typer.Typer(no_args_is_help=True)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(help="Data folder.")], json: _Json = False
) -> None:
    """List every fault of a data folder; exit status 1 if there is an error among them."""
    from samaritan.data.checks import check_dataset

    progress = Progress()
    try:
        findings = check_dataset(
            directory, lambda n, of, case: progress.update(f"case {n} of {of}: {case}")
        )
    finally:
        progress.stop()
    errors = sum(f.severity == "error" for f in findings)
    if json:
        print_json({"errors": errors, "findings": [asdict(f) for f in findings]})
    else:
        for finding in findings:
            typer.echo(f"{finding.severity}: {finding.code}  {finding.message}")
            typer.echo(f"  hint: {finding.hint}")
        typer.echo(f"{errors} errors, {len(findings) - errors} warnings")
    if errors:
        raise typer.Exit(1)


@app.command()
def describe(
    directory: Annotated[Path, typer.Argument(help="Data folder.")], json: _Json = False
) -> None:
    """Sites, cases, patients, shapes and spacings of a data folder."""
    from samaritan.data.checks import describe_dataset
    from samaritan.data.datasets import read_dataset

    description = describe_dataset(read_dataset(directory))
    if json:
        print_json(description)
        return
    _print_tree(description)


def _print_tree(tree: dict[str, object], indent: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, dict):
            typer.echo(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        else:
            typer.echo(f"{indent}{key}: {value}")
