"""`samaritan doctor`: is this machine ready, is a start-up kit, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samaritan.cli.console import Progress, print_json

if TYPE_CHECKING:
    from samaritan.operate.checks.checkpoint import Tell
    from samaritan.operate.checks.finding import Finding

_MARKS = {True: "ok     ", False: "MISSING", None: "note   "}


def doctor(
    kit: Annotated[
        Path | None,
        typer.Option(help="Look at this start-up kit too, before it is started.", readable=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check this machine; exit status 1 if something that is needed is missing."""
    from samaritan.operate.checks.machine import machine_findings

    progress, seen = Progress(), []
    try:
        for findings in (machine_findings(), _of_kit(kit, progress.update)):
            for finding in findings:
                seen.append(finding)
                if not as_json:
                    _show(finding)
    finally:
        progress.stop()
    ready = all(finding.ok is not False for finding in seen)
    if as_json:
        print_json({"ready": ready, "checks": list(map(asdict, seen))})
    else:
        what = "this machine is" if kit is None else "this machine and the kit are"
        typer.echo(f"{what} ready" if ready else "mend what is missing, then run this again")
    if not ready:
        raise typer.Exit(1)


def _of_kit(folder: Path | None, tell: Tell) -> Iterator[Finding]:
    if folder is None:
        return
    from samaritan.errors import DeploymentError
    from samaritan.provision.kit import load_kit

    try:
        kit = load_kit(folder, "site")
    except DeploymentError:  # that of a server, or none
        from server.doctor import server_findings

        yield from server_findings(load_kit(folder, "server"), tell)
    else:
        from client.doctor import site_findings

        yield from site_findings(kit, tell)


def _show(finding: Finding) -> None:
    code = f" {finding.code} " if finding.code else ""
    typer.echo(f"{_MARKS[finding.ok]} {finding.what}:{code} {finding.found}")
    if finding.hint and finding.ok is not True:
        typer.echo(f"          {finding.hint}")
