"""`samaritan models list`, `verify` and `count`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samaritan.cli.console import print_json

app = typer.Typer(no_args_is_help=True)

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
def verify(
    file: Annotated[Path, typer.Argument(help="Checkpoint file.")], json: _Json = False
) -> None:
    """Tell which base a checkpoint fits, and whether it is the published file."""
    from samaritan.models.bases import BASES
    from samaritan.models.checkpoints import file_sha256, fitting_base, read_state

    sha256 = file_sha256(file)
    base = fitting_base(read_state(file))
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
    rank: Annotated[int, typer.Option(min=1, help="LoRA rank.")] = 32,
    classes: Annotated[int, typer.Option(min=1, help="Structures, background not counted.")] = 2,
    image_size: Annotated[
        int | None, typer.Option(min=16, help="Side of the input; position tables keep their size.")
    ] = None,
    json: _Json = False,
) -> None:
    """Count the parameters of a base and those a preset trains; no checkpoint is needed."""
    import torch

    from samaritan.models.bases import construct, count_parameters, get_base
    from samaritan.models.lora import attach
    from samaritan.models.presets import extend, get_preset

    spec = get_base(base)
    method = extend(get_preset(preset), spec.extra_lora, spec.extra_train)
    with torch.device("meta"):
        sam = construct(spec, classes)
        total = count_parameters(sam)
        model = attach(sam, method, rank, None, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {
        "base": base, "preset": preset, "rank": rank, "classes": classes,
        "image_size": image_size or spec.image_size, "parameters": total,
        "trainable_parameters": trained, "bytes_fp32": trained * 4,
    }  # fmt: skip
    if json:
        print_json(result)
        return
    typer.echo(f"{base}: {total:,} parameters; {preset} at rank {rank} trains {trained:,}")
    typer.echo(f"one transfer of the adapter: {trained * 4 / 2**20:.2f} MiB in fp32")
