"""`samaritan doctor`: is this machine ready, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from samaritan.cli.console import print_json

_NEEDED = ("flwr", "torch", "peft", "segment-anything", "monai", "nibabel", "safetensors")
_FREE_GB = 2.0


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Check this machine; exit status 1 if something that is needed is missing."""
    checks = [_python(), *map(_package, _NEEDED), _sam(), *_compute(), _disk(), _writable()]
    ready = all(ok is not False for _, ok, _ in checks)
    if as_json:
        print_json(
            {"ready": ready, "checks": [{"what": w, "ok": o, "found": f} for w, o, f in checks]}
        )
    else:
        for what, ok, found in checks:
            mark = {True: "ok     ", False: "MISSING", None: "note   "}[ok]
            typer.echo(f"{mark} {what}: {found}")
        typer.echo(
            "this machine is ready" if ready else "mend what is missing, then run this again"
        )
    if not ready:
        raise typer.Exit(1)


_Check = tuple[str, bool | None, str]
"""What was looked at; True fine, False missing, None worth knowing; what was found."""


def _python() -> _Check:
    return "python", sys.version_info >= (3, 11), sys.version.split()[0]


def _package(name: str) -> _Check:
    try:
        return name, True, importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return name, False, f"not installed; pip install -c constraints.txt {name}"


def _sam() -> _Check:
    """Whether SAM's classes load; a broken torchvision must not matter."""
    from samaritan.errors import SamaritanError
    from samaritan.models.official import modeling

    try:
        modeling()
    except (SamaritanError, ImportError, RuntimeError) as error:
        return "SAM classes", False, str(error)
    return "SAM classes", True, "load without torchvision"


def _compute() -> list[_Check]:
    import torch

    from samaritan.models.segmenter import autocast_dtype

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = "none; training runs on the processor"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        gpu = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    precision = autocast_dtype("auto", device) or torch.float32
    return [
        ("GPU", None, gpu),
        ("cores", None, str(cores)),
        ("precision auto", None, str(precision).removeprefix("torch.")),
    ]


def _disk() -> _Check:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return "free disk here", free > _FREE_GB, f"{free:.1f} GiB"


def _writable() -> _Check:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            return "folder writable", True, str(Path.cwd())
    except OSError as error:
        return "folder writable", False, f"{Path.cwd()}: {error.strerror}"
