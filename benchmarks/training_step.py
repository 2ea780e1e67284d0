"""One training step of SAM ViT-B: the published way (`benchmarks/reference.py`) against ours.

    python -m benchmarks.training_step [--sizes 224 512] [--repeats 3] [--slices 5] [--bf16]

FLAP-SAM's setting (LoRA of rank 32, two classes) on random weights: forward pass, loss, backward
pass, clipping and optimiser on the same slices and from the same weights, each variant in turn in
one process. Ours is what `train_locally` does in a step. Ratios are to the reference in fp32 at the
same size and of the same round; below 1 is faster, or smaller. Peak memory is what one step adds in
a fresh process of its own. "cpu" is user and system time, which a shared machine disturbs less.
bf16 is measured where the machine has units for it, or with --bf16; without units it is several
times slower than fp32. "logits" is the largest difference to the reference in fp32, before
training, over the largest logit.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import gc
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.reference import Reference, copy_weights, reference_optimiser, reference_step
from samaritan.config import Config, parse_config
from samaritan.models.adapter import AdaptedModel, build_adapted
from samaritan.models.bases import BASES
from samaritan.models.sam import construct
from samaritan.models.segmenter import autocast_dtype
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import batch_gradients, batch_parts

_RANK, _CLASSES = 32, 2


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to make a step.

    Attributes:
        name: As printed.
        bf16: Autocast, else fp32.
        ours: Configuration sections that differ from ours by default; None is the reference.
    """

    name: str
    bf16: bool
    ours: Mapping[str, Mapping[str, Any]] | None = None


VARIANTS = (
    Variant("reference fp32", False),
    Variant("ours fp32", False, {}),
    Variant("ours fp32, recompute", False, {"training": {"recompute": True}}),
    Variant("reference bf16", True),
    Variant("ours bf16", True, {}),
    Variant("ours bf16, recompute", True, {"training": {"recompute": True}}),
)
"""The first is what the others are compared to."""


@dataclass(frozen=True)
class Trainer:
    """A built variant: images to logits, and a step on images and labels."""

    logits: Callable[[Tensor], Tensor]
    step: Callable[[Tensor, Tensor], float]


@dataclass
class Measured:
    """What was found of a variant; seconds and processor seconds of each round."""

    logits: float
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0


def main() -> None:
    """Prints the machine, then a table for each size."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = [1024] if device.type == "cuda" else [224, 512]
    parser.add_argument("--sizes", type=int, nargs="+", default=sizes)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slices", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    print(_machine(device))
    bf16 = options.bf16 or autocast_dtype("auto", device) is not None
    variants = [variant for variant in VARIANTS if bf16 or not variant.bf16]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "vit_b.safetensors"
        _write_random_base(checkpoint)
        for size in options.sizes:
            print(f"\n{size} px, {options.slices} slices")
            found = _measure_times(variants, checkpoint, device, size, options)
            _measure_memory(found, checkpoint, device, size, options.slices)
            _print_table(found)
    print(f"\nload at the end {_load()}")


def _machine(device: torch.device) -> str:
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in lines.splitlines() if "model name" in line]
    units = autocast_dtype("auto", torch.device("cpu")) is not None
    gpu = f"{torch.cuda.get_device_name()}, " if device.type == "cuda" else ""
    return (
        f"{gpu}{names[0] if names else platform.processor()}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads, bf16 units in the CPU: {'yes' if units else 'no'}, "
        f"torch {torch.__version__}, {datetime.date.today()}, load {_load()}"
    )


def _load() -> str:
    return " ".join(f"{value:.1f}" for value in os.getloadavg())


def _write_random_base(path: Path) -> None:
    """Position tables start at zero, where they would cost nothing to get wrong."""
    torch.manual_seed(0)
    sam = construct(BASES["vit_b"].shape, 3)
    with torch.no_grad():
        for name, parameter in sam.named_parameters():
            if "rel_pos" in name or "pos_embed" in name:
                parameter.normal_(0, 0.5)
    save_file(sam.state_dict(), path)


def _data(size: int, slices: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(slices, 1, size, size, generator=generator)
    labels = torch.randint(0, _CLASSES + 1, (slices, size, size), generator=generator)
    return images.to(device), labels.to(device)


def _build(variant: Variant, checkpoint: Path, device: torch.device, size: int) -> Trainer:
    sections: dict[str, dict[str, Any]] = {
        "model": {
            "base": "vit_b", "checkpoint": str(checkpoint), "decoder": "reference",
            "image_size": size,
        },
        "peft": {"preset": "flap-sam", "rank": _RANK},
        "training": {"precision": "bf16" if variant.bf16 else "fp32"},
    }  # fmt: skip
    for name, changes in (variant.ours or {}).items():
        sections[name] = {**sections.get(name, {}), **changes}
    config = parse_config(sections)
    model = build_adapted(config, _CLASSES, device)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # a fresh adapter is zero, and would hide a difference
        for parameter in model.trained.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
    if variant.ours is not None:
        return _our_trainer(model, config)
    return _reference_trainer(model, config, variant.bf16, size)


def _our_trainer(model: AdaptedModel, config: Config) -> Trainer:
    """The steps of `samaritan.training.local.train_locally`."""
    settings, trained = config.training, list(model.trained.values())
    loss_of = SegmentationLoss(settings.dice_weight)
    optimiser = torch.optim.AdamW(
        trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    model.segmenter.train()

    def step(images: Tensor, labels: Tensor) -> float:
        with batch_parts(images.device, len(images)) as parts:
            loss = batch_gradients(model.segmenter, loss_of, images, labels, trained, parts)
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimiser.step()
        return float(loss)

    return Trainer(model.segmenter, step)


def _reference_trainer(model: AdaptedModel, config: Config, bf16: bool, size: int) -> Trainer:
    reference = Reference(BASES["vit_b"].shape, size, _CLASSES, _RANK)
    copy_weights(model, reference)
    reference.to(model.segmenter.device).train()
    optimiser = reference_optimiser(reference)

    def logits(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            return reference(images)  # type: ignore[no-any-return]

    def step(images: Tensor, labels: Tensor) -> float:
        return reference_step(
            reference, optimiser, images, labels, bf16, config.training.clip_norm
        )  # fmt: skip

    return Trainer(logits, step)


def _measure_times(
    variants: list[Variant], checkpoint: Path, device: torch.device, size: int,
    options: argparse.Namespace,
) -> dict[Variant, Measured]:  # fmt: skip
    """Builds the variants and lets them step in turn."""
    images, labels = _data(size, options.slices, device)
    # A GPU's kernels are chosen by the size of the batch; elsewhere one slice will do.
    warm = slice(None if device.type == "cuda" else 1)
    trainers: dict[Variant, Trainer] = {}
    found: dict[Variant, Measured] = {}
    expected = torch.empty(0)
    for variant in variants:
        trainer = trainers[variant] = _build(variant, checkpoint, device, size)
        with torch.no_grad():
            logits = trainer.logits(images[:1]).float()
        expected = expected if found else logits
        difference = (logits - expected).abs().max() / expected.abs().max()
        found[variant] = Measured(float(difference))
        _timed(trainer, images[warm], labels[warm])
    for _ in range(options.repeats):
        for variant, trainer in trainers.items():
            wall, cpu = _timed(trainer, images, labels)
            found[variant].seconds.append(wall)
            found[variant].cpu_seconds.append(cpu)
    return found


def _timed(trainer: Trainer, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Seconds and processor seconds of a step; reading the loss waits for a GPU."""
    gc.collect()
    used, begun = _cpu_seconds(), time.perf_counter()
    trainer.step(images, labels)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, _cpu_seconds() - used


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _measure_memory(
    found: dict[Variant, Measured], checkpoint: Path, device: torch.device, size: int, slices: int
) -> None:
    context = multiprocessing.get_context("spawn")
    for variant, measured in found.items():
        with ProcessPoolExecutor(1, mp_context=context) as process:
            work = process.submit(_peak_bytes, variant, checkpoint, device.type, size, slices)
            measured.peak_bytes = work.result()


def _peak_bytes(variant: Variant, checkpoint: Path, device: str, size: int, slices: int) -> int:
    """What the first step adds to memory at its peak; to be run in a process of its own."""
    images, labels = _data(size, slices, torch.device(device))
    trainer = _build(variant, checkpoint, torch.device(device), size)
    with torch.no_grad():
        trainer.logits(images[:1])  # weights mapped from a file are read on first use
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        trainer.step(images, labels)
        return torch.cuda.max_memory_allocated() - held
    _forget_peak()
    held = _peak_resident_bytes()
    trainer.step(images, labels)
    return _peak_resident_bytes() - held


def _forget_peak() -> None:
    """Building takes more than is kept; on Linux the peak can be set back to what is in use."""
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def _peak_resident_bytes() -> int:
    if platform.system() == "Linux":  # where ru_maxrss is at least that of the parent process
        rows = Path("/proc/self/status").read_text().splitlines()
        status = dict(row.split(":", 1) for row in rows)
        return int(status["VmHWM"].split()[0]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _print_table(found: dict[Variant, Measured]) -> None:
    print(
        f"{'':22}{'seconds':>9}{'min':>8}{'cpu':>8}   {'seconds ratio (range)':24}"
        f"{'cpu ratio':>9}{'peak MiB':>10}{'ratio':>7}{'logits':>9}"
    )
    reference = found[VARIANTS[0]]
    for variant, measured in found.items():
        ratios = _ratios(measured.seconds, reference.seconds)
        cpu = statistics.median(_ratios(measured.cpu_seconds, reference.cpu_seconds))
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        share = measured.peak_bytes / reference.peak_bytes
        memory = f"{measured.peak_bytes / 2**20:10.0f}{share:7.2f}"
        print(
            f"{variant.name:22}{statistics.median(measured.seconds):9.2f}"
            f"{min(measured.seconds):8.2f}{statistics.median(measured.cpu_seconds):8.2f}   "
            f"{spread:24}{cpu:9.2f}{memory}{measured.logits:9.0e}"
        )


def _ratios(values: list[float], reference: list[float]) -> list[float]:
    """Round by round."""
    return [value / other for value, other in zip(values, reference, strict=True)]


if __name__ == "__main__":
    main()
