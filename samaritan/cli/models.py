"""`samaritan models list`, `fetch`, `verify` and `count`."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from samaritan.cli.console import Progress, print_json

app = typer.Typer(no_args_is_help=True)


class _Decoder(enum.Enum):
    official = "official"
    reference = "reference"


_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command("list")
def list_models(json: _Json = False) -> None:
    """Base models and presets."""
    from samaritan.models.bases import BASES
    from samaritan.models.presets import PRESETS

    bases = {
        name: {
            "image_size": base.image_size,
            "checkpoint": base.checkpoint and base.checkpoint[0],
            "sha256": base.checkpoint and base.checkpoint[1],
            "note": base.note,
        }
        for name, base in BASES.items()
    }
    presets = {name: preset.source for name, preset in PRESETS.items()}
    if json:
        print_json({"bases": bases, "presets": presets})
        return
    for name, entry in bases.items():
        typer.echo(f"{name}: {entry['note']}")
        if entry["checkpoint"]:
            typer.echo(f"  checkpoint {entry['checkpoint']}, SHA-256 {entry['sha256']}")
    typer.echo(f"presets: {', '.join(f'{name} ({source})' for name, source in presets.items())}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Base model, such as vit_b.")],
    to: Annotated[Path | None, typer.Option(help="Folder; the user's cache by default.")] = None,
    json: _Json = False,
) -> None:
    """Download a published checkpoint and verify it; run again to go on after an interruption."""
    from samaritan.models.fetch import fetch as download

    with _transfer(name) as (note, progress):
        fetched = download(name, to, note=note, progress=progress)
    if json:
        print_json({
            "base": name, "file": str(fetched.path), "sha256": fetched.sha256,
            "bytes": fetched.size_bytes, "downloaded": fetched.downloaded,
            "resumed_from": fetched.resumed_from,
        })  # fmt: skip
        return
    how = "downloaded" if fetched.downloaded else "was there already, nothing downloaded"
    typer.echo(f"{fetched.path}: {how}; {fetched.size_bytes} bytes, the published file")
    typer.echo("set model.checkpoint to it")


@contextmanager
def _transfer(
    name: str,
) -> Iterator[tuple[Callable[[str], None], Callable[[int, int | None], None]]]:
    """Shows notes and the bytes of a transfer: a bar on a terminal, plain lines elsewhere."""
    from rich import progress as rich_progress

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        plain = Progress()
        yield plain.line, lambda have, total: plain.update(_amount(have, total))
        return
    with rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
        console=console,
    ) as bar:
        task = bar.add_task(name, total=None)
        yield (
            lambda text: console.print(text, markup=False, soft_wrap=True),
            lambda have, total: bar.update(task, completed=have, total=total),
        )


def _amount(have: int, total: int | None) -> str:
    return f"{have / 1e6:.1f} MB" + (f" of {total / 1e6:.1f} MB" if total else "")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(help="Checkpoint file.")], json: _Json = False
) -> None:
    """Tell which base a checkpoint fits, and whether it is the published file."""
    from samaritan.models.bases import BASES, fitting_base
    from samaritan.models.checkpoints import read_state

    state, sha256 = read_state(file)
    base = fitting_base(state)
    published = [n for n, b in BASES.items() if b.checkpoint and b.checkpoint[1] == sha256]
    result = {"file": file.name, "sha256": sha256, "base": base, "published": bool(published)}
    if json:
        print_json(result)
        return
    typer.echo(f"{file.name}: SHA-256 {sha256}")
    typer.echo(f"fits base {base}" + (", the published file" if published else ""))
    if not published:
        typer.echo("it is none of the published SAM files; pin it with model.checkpoint_sha256")


@app.command()
def count(
    base: Annotated[str, typer.Option(help="Base model.")] = "vit_b",
    preset: Annotated[str, typer.Option(help="What is trained.")] = "flap-sam",
    rank: Annotated[int, typer.Option(min=1, max=1024, help="LoRA rank.")] = 32,
    classes: Annotated[int, typer.Option(min=1, help="Structures, background not counted.")] = 2,
    image_size: Annotated[
        int | None, typer.Option(min=16, help="Side of the input; trained position tables fit it.")
    ] = None,
    slices: Annotated[
        int, typer.Option(min=1, max=15, help="Slices of a record, for presets across slices.")
    ] = 5,
    decoder: Annotated[
        _Decoder, typer.Option(help="SAM's own, or FLAP-SAM's.")
    ] = _Decoder.official,
    json: _Json = False,
) -> None:
    """Count the parameters of a base and those a preset trains; no checkpoint is needed."""
    from samaritan.models.count import count_trained

    counted = count_trained(base, preset, rank, classes, image_size, decoder.value, slices)
    result = {
        "base": base, "preset": preset, "rank": rank, "classes": classes,
        "decoder": decoder.value, "slices": slices,
        "image_size": counted.image_size, "parameters": counted.parameters,
        "trainable_parameters": counted.trained, "bytes_fp32": counted.trained * 4,
    }  # fmt: skip
    if json:
        print_json(result)
        return
    typer.echo(
        f"{base}: {counted.parameters:,} parameters; {preset} at rank {rank} trains "
        f"{counted.trained:,}"
    )
    typer.echo(f"one transfer of the adapter: {counted.trained * 4 / 2**20:.2f} MiB in fp32")
