"""`samaritan audit log verify` and `show`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samaritan.cli.console import print_json

if TYPE_CHECKING:
    from samaritan.audit.reading import Departure, Finding
    from samaritan.audit.verify import Verdict

app = typer.Typer(no_args_is_help=True)

SiteLog = Annotated[Path, typer.Argument(help="Log of a site, or of a server.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_HASH = re.compile(r"[0-9a-f]{64}")


@app.command()
def verify(
    log: SiteLog,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="Log of the server: did the same arrive as left? Once for each study of the site."
        ),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help="The site's public key, or a file with it, for its seals.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every line of a log; exit status 1 if one is not as it was written."""
    from samaritan.audit.verify import match, verify_log

    public = None if key is None else _public(key)
    verdict = match(log, against, public) if against else verify_log(log, public)
    if as_json:
        print_json(_values(verdict))
    else:
        for warning in verdict.warnings:
            typer.echo(f"warning: {_told(warning)}")
        _require_whole(verdict)
        typer.echo("\n".join(_summary(verdict, against or [])))
    if not verdict.whole:
        raise typer.Exit(1)


@app.command()
def show(log: SiteLog, as_json: Json = False) -> None:
    """List what left a site: when, in answer to what, how much, and every number by name."""
    from samaritan.audit.verify import verify_log

    verdict = verify_log(log)
    totals = _totals(verdict)
    if as_json:
        answers = [_row(departure) for departure in verdict.departures]
        print_json({"log": verdict.log, "answers": answers, "totals": totals})
    else:
        for line in _table([_cells(departure) for departure in verdict.departures]):
            typer.echo(line)
        for kind, total in totals.items():
            typer.echo(f"{kind}: {_counted(total['answers'])}, {total['bytes']:,} bytes")
    _require_whole(verdict)


def _public(key: str) -> bytes:
    from samaritan.errors import AuditError

    text = key
    if not _HASH.fullmatch(key):
        try:
            text = Path(key).read_text("ascii").strip()
        except (OSError, ValueError):
            text = ""
    if not _HASH.fullmatch(text):
        raise AuditError(
            "SAM-A105",
            f"--key {key} is no public key, and no file with one",
            "Give the 64 hexadecimal digits of the site that `samaritan plan show PLAN` prints.",
        )
    return bytes.fromhex(text)


def _require_whole(verdict: Verdict) -> None:
    from samaritan.errors import AuditError

    if verdict.whole:
        return
    more = len(verdict.faults) - 1
    others = f" ({more} more fault{'s' if more > 1 else ''})" if more else ""
    raise AuditError(
        "SAM-A103",
        _told(verdict.faults[0]) + others,
        "Keep the files as they are, with their copies; --json lists every finding.",
    )


def _told(found: Finding) -> str:
    return f"{found.file}, line {found.line}: {found.what}"


def _summary(verdict: Verdict, against: list[Path]) -> list[str]:
    lines = [f"{verdict.log}: {verdict.entries} entries, every line is as it was written"]
    size = sum(departure.size_bytes for departure in verdict.left)
    left = f"{_counted(len(verdict.left))} left, {size:,} bytes of updates"
    if not against:
        return [*lines, left] if verdict.departures else lines
    seals = {
        "unchecked": "seals were not checked; give --key",
        "named": "seals were checked with the key that the site's log itself names; give --key",
        "given": "each carries the site's seal",
    }[verdict.seals]
    files = ", ".join(map(str, against))
    return [*lines, f"{left}; {verdict.matched} arrived as they left in {files}", seals]


def _values(verdict: Verdict) -> dict[str, object]:
    def listed(found: tuple[Finding, ...]) -> list[dict[str, object]]:
        return [{"file": f.file, "line": f.line, "what": f.what} for f in found]

    return {
        "log": verdict.log,
        "entries": verdict.entries,
        "whole": verdict.whole,
        "faults": listed(verdict.faults),
        "warnings": listed(verdict.warnings),
        "egress": len(verdict.left),
        "bytes": sum(departure.size_bytes for departure in verdict.left),
        "matched": verdict.matched,
        "seals": verdict.seals,
    }


def _totals(verdict: Verdict) -> dict[str, dict[str, int]]:
    totals: dict[str, dict[str, int]] = {}
    for departure in verdict.left:
        total = totals.setdefault(departure.kind, {"answers": 0, "bytes": 0})
        total["answers"] += 1
        total["bytes"] += departure.size_bytes
    return totals


def _row(departure: Departure) -> dict[str, object]:
    return {
        "line": departure.line,
        "time_utc": departure.time,
        "left": departure.left,
        "kind": departure.kind,
        "stage": departure.stage,
        "round": departure.server_round,
        "bytes": departure.size_bytes,
        "tensors": departure.tensors,
        "numbers": dict(departure.numbers),
        "texts": dict(departure.texts),
        "destination": departure.destination,
    }


def _cells(departure: Departure) -> tuple[str, ...]:
    told = [f"{name} {value}" for name, value in departure.numbers.items()]
    told += [f"{name} {_short(text)}" for name, text in departure.texts.items()]
    return (
        departure.time[:19].replace("T", " "),
        f"{departure.kind} {departure.stage}".rstrip(),
        str(departure.server_round or ""),
        f"{departure.size_bytes:,}",
        str(departure.tensors or ""),
        departure.destination if departure.left else "nobody (dry run)",
        ", ".join(told),
    )


def _short(text: str) -> str:
    return f"{text[:12]}..." if _HASH.fullmatch(text) else text


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    from samaritan.audit.reading import printable

    head = ("time (UTC)", "answer to", "round", "bytes", "tensors", "to", "numbers and texts")
    cells = [head, *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = {2, 3, 4}
    return [
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _counted(answers: int) -> str:
    return f"{answers} answer{'' if answers == 1 else 's'}"
