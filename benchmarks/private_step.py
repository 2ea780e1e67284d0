"""What clipping each record costs: a private step against an ordinary one on the same slices.

    python -m benchmarks.private_step [--vit-b]

A private step is the gradient of each record, clipping, the sum and its noise; an ordinary one is
the mean gradient of the batch. Both are timed in turn, in one process, on the same cores; the ratio
of processor seconds, all threads together, is the result. `--vit-b` adds SAM ViT-B at 224 pixels,
with random weights.
"""

from __future__ import annotations

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from samaritan.config import parse_config
from samaritan.errors import PrivacyError
from samaritan.models.adapter import AdaptedModel, build_adapted, image_size
from samaritan.models.bases import BASES
from samaritan.models.sam import construct
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.randomness import SystemRandom
from samaritan.training.feed import Batch
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import batch_gradients, batch_parts
from samaritan.training.record_gradients import RecordGradient, patient_gradients, some_of
from samaritan.training.slice_gradients import slice_gradients

_CPU = torch.device("cpu")
_ORDINARY = "ordinary step"


def main() -> None:
    """Prints milliseconds per step and, for each private step, the ratio to the ordinary one."""
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for preset in ("flap-sam", "decoder-only"):
        config = parse_config({"peft": {"rank": 16, "preset": preset}})
        tiny = build_adapted(config, 2, _CPU)
        _compare(f"tiny, {preset}", tiny, image_size(config), slices=16, repeats=5)
    if "--vit-b" in sys.argv[1:]:
        _compare("vit_b, flap-sam", _vit_b(), (224, 224), slices=8, repeats=2)


def _vit_b() -> AdaptedModel:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "vit_b.safetensors"
        save_file(construct(BASES["vit_b"].shape, 3).state_dict(), file)
        model: dict[str, Any] = {"base": "vit_b", "checkpoint": str(file), "image_size": 224}
        sections = {"model": model, "peft": {"rank": 32}, "training": {"precision": "fp32"}}
        return build_adapted(parse_config(sections), 2, _CPU)


def _compare(
    name: str, model: AdaptedModel, size: tuple[int, int], slices: int, repeats: int
) -> None:
    model.segmenter.train()
    batch = Batch(torch.rand(slices, 3, *size), torch.randint(0, 3, (slices, *size)))
    trained, loss_of = list(model.trained.values()), SegmentationLoss(0.8)
    numbers, random = model.parameters(), SystemRandom()
    by_slice = slice_gradients(model.segmenter, model.segmenter, loss_of, model.trained, 8)

    def released(gradients: Iterable[RecordGradient], records: int) -> Tensor:
        mechanism = Mechanism(0.1, 1.0, 1.0, records)
        return mechanism.release((vector for vector, _ in gradients), numbers, random)

    with batch_parts(_CPU, slices) as parts:

        def ordinary() -> None:
            inputs, labels = batch.inputs, batch.labels
            batch_gradients(model.segmenter, loss_of, inputs, labels, trained, parts)

        def patients(count: int) -> Callable[[], object]:
            each = slices // count
            records = [some_of(batch, slice(i, i + each)) for i in range(0, slices, each)]
            return lambda: released(
                patient_gradients(model.segmenter, loss_of, records, trained, parts), count
            )

        ways: dict[str, Callable[[], object]] = {_ORDINARY: ordinary}
        for count in (2, 4, slices):
            ways[f"{count} patients x {slices // count}"] = patients(count)
        try:
            next(by_slice(batch))
            ways[f"{slices} slices, Opacus"] = lambda: released(by_slice(batch), slices)
        except PrivacyError as refusal:
            print(f"{name}: {refusal.code}, Opacus cannot do this method")
        times: dict[str, list[float]] = {way: [] for way in ways}
        for repeat in range(repeats + 1):
            for way, step in ways.items():
                begun = time.process_time()
                step()
                if repeat:  # the first of each warms up
                    times[way].append(time.process_time() - begun)
    print(f"{name}, {slices} slices, {numbers} numbers, {parts.count} parts")
    for way, values in times.items():
        ratios = [a / b for a, b in zip(values, times[_ORDINARY], strict=True)]
        print(
            f"  {way}: median {statistics.median(values) * 1e3:.0f} ms, "
            f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
