"""One training step of `tiny`: a batch cut into parts, against threads within each operation.

    python -m benchmarks.step

Both do the same arithmetic on the same cores, in turn, in one process; the ratio is the result.
"""

from __future__ import annotations

import platform
import statistics
import time

import torch

from samaritan.config import parse_config
from samaritan.models.adapter import build_adapted, image_size
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import Parts, batch_gradients, batch_parts

_REPEATS, _STEPS, _BATCH = 5, 10, 8


def main() -> None:
    """Prints milliseconds per step and the ratio."""
    config = parse_config({"data": {"context_slices": 7}, "peft": {"rank": 16}})
    model = build_adapted(config, 2, torch.device("cpu"))
    images = torch.rand(_BATCH, 7, *image_size(config))
    labels = torch.randint(0, 3, (_BATCH, *image_size(config)))
    loss_of, trained = SegmentationLoss(0.5), list(model.trained.values())

    def seconds(parts: Parts) -> float:
        begun = time.perf_counter()
        for _ in range(_STEPS):
            batch_gradients(model.segmenter, loss_of, images, labels, trained, parts)
        return (time.perf_counter() - begun) / _STEPS

    times: dict[str, list[float]] = {"threads in operations": [], "parts of the batch": []}
    for _ in range(_REPEATS):
        times["threads in operations"].append(seconds(Parts(1, None)))
        with batch_parts(torch.device("cpu"), _BATCH) as parts:
            times["parts of the batch"].append(seconds(parts))
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values) * 1e3:.0f} ms per step of {_BATCH}")
    ratios = [a / b for a, b in zip(*times.values(), strict=True)]
    print(f"ratio: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
