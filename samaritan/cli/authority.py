"""`samaritan authority list`, `sign`, `renew` and `revoke`."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samaritan.cli.console import print_json

if TYPE_CHECKING:
    from samaritan.provision.authority import Entry

app = typer.Typer(no_args_is_help=True)

_Folder = Annotated[
    Path, typer.Argument(help="`authority` in what `samaritan provision` wrote.", metavar="DIR")
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_certificates(folder: _Folder, as_json: _Json = False) -> None:
    """The certificates of the server and of every site, and when they end."""
    from samaritan.provision.authority import authority_entry, entries

    own, found = authority_entry(folder), entries(folder)
    if as_json:
        rows = [_plain(dataclasses.asdict(entry)) for entry in found]
        print_json({"authority": _plain(dataclasses.asdict(own)), "certificates": rows})
        return
    width = max(len(entry.name) for entry in (own, *found))
    for entry in (*found, own):
        typer.echo(_row(entry, width))


@app.command()
def sign(
    folder: _Folder,
    request: Annotated[Path, typer.Argument(help="request.json of a site.", metavar="REQUEST")],
    as_json: _Json = False,
) -> None:
    """Check the request of a site and issue the certificate it asks for."""
    from samaritan.provision.requests import sign_request

    signed = sign_request(folder, request)
    _finish(folder, dataclasses.asdict(signed), as_json)
    if not as_json:
        typer.echo(
            f"before you send it, telephone {signed.site} and compare the fingerprint of its "
            f"identity:\n  {signed.fingerprint}\nif the site reads out another one, run "
            "`samaritan authority revoke`"
        )


@app.command()
def renew(
    folder: _Folder,
    name: Annotated[str, typer.Argument(help="Of a site, or `server`.", metavar="NAME")],
    as_json: _Json = False,
) -> None:
    """Issue a new certificate for the same key."""
    from samaritan.provision.authority import open_authority
    from samaritan.provision.certificates import serial

    with open_authority(folder) as authority:
        issued = authority.renew(name)
        path = authority.certificate(name)
    end = issued.not_valid_after_utc
    facts = {"site": name, "certificate": path, "serial": serial(issued), "not_after": end}
    _finish(folder, facts, as_json)


@app.command()
def revoke(
    folder: _Folder,
    name: Annotated[str, typer.Argument(help="Of a site.", metavar="NAME")],
    as_json: _Json = False,
) -> None:
    """Declare all certificates of a site void and write the list of void ones anew."""
    from samaritan.provision.authority import open_authority

    with open_authority(folder) as authority:
        date = authority.revoke(name)
    _finish(folder, {"site": name, "revoked": date}, as_json)


def _finish(folder: Path, facts: dict[str, Any], as_json: bool) -> None:
    """Brings the kits beside the authority up to date and says what the running machines need."""
    from samaritan.provision.kits import refresh_kits

    # Before the kits, which may not be writable: what was done was done.
    if not as_json:
        typer.echo(
            f"{facts['site']}: new certificate until {facts['not_after']:%Y-%m-%d}"
            if "certificate" in facts
            else f"{facts['site']}: revoked on {facts['revoked']:%Y-%m-%d}"
        )
    changed = refresh_kits(folder)
    copies: dict[str, list[str]] = {}
    if "certificate" in facts:
        copies[facts["site"]] = [str(facts["certificate"])]
    # An old list lets in whom it does not name, and after its end nobody.
    copies.setdefault("server", []).append(str(folder / "crl.pem"))
    if as_json:
        print_json({**_plain(facts), "changed": changed, "copy": copies})
        return
    if changed:
        typer.echo(f"brought up to date beside the authority: {', '.join(changed)}")
    for name, paths in copies.items():
        typer.echo(f"copy into the kit on the machine of {name}: {', '.join(paths)}")


def _row(entry: Entry, width: int) -> str:
    text = f"{entry.name:{width}}  {entry.state:16}"
    if entry.not_after is not None:
        text += f"  until {entry.not_after:%Y-%m-%d} ({entry.days_left} days)  {entry.serial}"
    return text.rstrip()


def _plain(facts: dict[str, Any]) -> dict[str, Any]:
    """Dates as JSON has them everywhere else."""
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in facts.items()}
