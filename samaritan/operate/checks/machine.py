"""The machine itself: Python, packages, SAM's classes, processor, GPU and disk."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from samaritan.errors import SamaritanError
from samaritan.models.official import modeling
from samaritan.models.segmenter import autocast_dtype
from samaritan.operate.checks.finding import Finding, fine, missing, note

_NEEDED = ("flwr", "torch", "peft", "segment-anything", "monai", "nibabel", "safetensors")
_FREE_GB = 2.0


def machine_findings() -> Iterator[Finding]:
    """Looks at what every use of Samaritan needs."""
    yield _python()
    yield from map(_package, _NEEDED)
    yield _sam()
    yield from _compute()
    yield _disk()
    yield _writable()


def _python() -> Finding:
    return fine("python", sys.version.split()[0])  # an older one does not come this far


def _package(name: str) -> Finding:
    try:
        return fine(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return missing(name, "SAM-N692", "not installed", f"pip install -c constraints.txt {name}")


def _sam() -> Finding:
    """Whether SAM's classes load; a broken torchvision must not matter."""
    try:
        modeling()
    except (SamaritanError, ImportError, RuntimeError) as error:
        return missing("SAM classes", "SAM-N693", str(error), "Install segment-anything anew.")
    return fine("SAM classes", "load without torchvision")


def _compute() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = "none; training runs on the processor"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        gpu = f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    precision = autocast_dtype("auto", device) or torch.float32
    yield note("GPU", gpu)
    yield note("cores", str(cores))
    yield note("precision auto", str(precision).removeprefix("torch."))


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    text = f"{free:.1f} GiB"
    if free > _FREE_GB:
        return fine("free disk here", text)
    return missing("free disk here", "SAM-N694", text, f"{_FREE_GB:g} GiB are needed.")


def _writable() -> Finding:
    try:
        with tempfile.TemporaryFile(dir=Path.cwd()):
            return fine("folder writable", str(Path.cwd()))
    except OSError as error:
        return missing(
            "folder writable",
            "SAM-N695",
            f"{Path.cwd()}: {error.strerror}",
            "Change to a folder of yours; runs are written there.",
        )
