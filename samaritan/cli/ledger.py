"""`samaritan privacy ledger verify` and `resync`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samaritan.cli.console import print_json

if TYPE_CHECKING:
    from samaritan.keys import Identity

app = typer.Typer(no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="The ledger of one site.")]
Key = Annotated[
    Path | None, typer.Option(help="The site's key; identity.key beside the ledger by default.")
]


@app.command()
def verify(
    folder: Folder,
    copy: Annotated[Path | None, typer.Option(help="Also compare with this copy.")] = None,
    key: Key = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check every line of a ledger: its chain, its signature, its likeness to a copy."""
    from samaritan.privacy.ledger import verify as check

    findings = check(folder, _identity(folder, key).public, copy)
    if as_json:
        print_json(
            {"findings": [{"file": f.file, "line": f.line, "what": f.what} for f in findings]}
        )
    else:
        for found in findings:
            typer.echo(f"{found.file}, line {found.line}: {found.what}")
        typer.echo("every line is as it was written" if not findings else f"{len(findings)} faults")
    if findings:
        raise typer.Exit(1)


@app.command()
def resync(
    folder: Folder,
    source: Annotated[Path, typer.Option("--from", help="A copy that knows more.")],
    key: Key = None,
) -> None:
    """Take over as spent what a copy knows; nothing is ever taken back."""
    from samaritan.privacy.ledger import resync as take_over

    gained = take_over(folder, source, _identity(folder, key))
    typer.echo(f"{gained} records taken over; what was replaced lies in {folder / 'aside'}")


def _identity(folder: Path, key: Path | None) -> Identity:
    """The key that signs a ledger, which must be there already."""
    from samaritan.errors import PrivacyError
    from samaritan.keys import load_identity

    path = key or folder.parent / "identity.key"
    if not path.is_file():
        raise PrivacyError(
            "SAM-P309", f"there is no key at {path}", "Name the site's key with --key."
        )
    return load_identity(path)
