"""`samaritan provision`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samaritan.cli.console import print_json

if TYPE_CHECKING:
    from samaritan.provision.kits import Provisioned


def provision(
    project: Annotated[Path, typer.Argument(help="project.yaml; see docs/provisioning.md.")],
    out: Annotated[Path, typer.Option(help="Folder for the authority and the kits.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Make keys, certificates and one start-up kit per party; again, to add sites."""
    from samaritan.provision.kits import provision as make

    done = make(project, out)
    if as_json:
        print_json({"out": str(out), **dataclasses.asdict(done)})
        return
    made, changed = _by_kit(done.made), _by_kit(done.changed)
    for verb, kits in (("made", made), ("changed", changed)):
        for kit, names in kits.items():
            typer.echo(f"{verb:9} {kit}: {', '.join(names)}")
    if untouched := [kit for kit in _by_kit(done.unchanged) if kit not in made | changed]:
        typer.echo(f"unchanged {', '.join(untouched)}")
    if done.absent:
        typer.echo(f"not here  {', '.join(done.absent)}; kits with keys are made once")
    typer.echo(f"fingerprint of the authority (ca.crt):        {done.authority_fingerprint}")
    typer.echo(f"fingerprint of the signer of plans (plan.pub): {done.plan_fingerprint}")
    for line in _next(done, out):
        typer.echo(line)


def _next(done: Provisioned, out: Path) -> Iterable[str]:
    """What people do now."""
    if "server.zip" in (*done.made, *done.changed):
        yield f"next: bring {out / 'server.zip'} to the server; it holds its private key"
    for path in (*done.made, *done.changed):
        if path.startswith("sites/") and path.endswith(".zip"):
            secret = "" if done.keys == "at-site" else "; it holds private keys"
            yield f"next: send {out / path} to the site{secret}"
            if path in done.changed:
                yield "      which keeps its own site.yaml, and takes all other files from it"
    if done.awaiting:
        yield f"awaiting the requests of {', '.join(done.awaiting)}; then, for each of them:"
        yield f"  samaritan authority sign {out / 'authority'} request.json"
    yield f"keep {out / 'authority'} where only you can read it, with a backup"


def _by_kit(paths: Iterable[str]) -> dict[str, list[str]]:
    """File names by the folder of the authority, of the server or of a site."""
    kits: dict[str, list[str]] = {}
    for path in paths:
        parts = path.removesuffix(".zip").split("/")
        depth = 2 if parts[0] == "sites" else 1
        inside = "/".join(path.split("/")[depth:]) or path.rpartition("/")[2]
        kits.setdefault("/".join(parts[:depth]), []).append(inside)
    return kits
