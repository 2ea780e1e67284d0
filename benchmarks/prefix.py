"""One training step with frozen blocks: all blocks anew, against the last ones from kept tokens.

    python -m benchmarks.prefix

ViT-B with random weights at 224 pixels, 5 slices a step, FLAP-SAM at rank 32 with its decoder;
forward, backward and AdamW, with 12, 6 and 3 adapted blocks, in turns in one process.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from samaritan.config import Config, parse_config
from samaritan.data.datasets import read_dataset
from samaritan.data.phantoms import CLASSES, write_phantoms
from samaritan.data.slices import CaseCache
from samaritan.models.adapter import AdaptedModel, build_adapted
from samaritan.models.bases import BASES
from samaritan.models.sam import construct
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import batch_gradients, batch_parts
from samaritan.training.prefix import PrefixCache, View

_REPEATS, _SLICES = 3, 5
_BLOCKS = (12, 6, 3)
_CPU = torch.device("cpu")


def main() -> None:
    """Prints seconds, ratios and bytes."""
    print(f"{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        os.environ["SAMARITAN_CACHE"] = name
        folder = Path(name)
        cases = CaseCache(_config(folder, None).data, CLASSES, (224, 224))
        case = cases.get(read_dataset(write_phantoms(folder / "data", 1, 2, seed=0)).cases[0])
        views = [View(case, int(index), 0) for index in case.foreground[:_SLICES]]
        steps: dict[str, Callable[[], float]] = {}
        for blocks in _BLOCKS:
            config = _config(folder, blocks)
            model = _model(folder, config)
            steps[f"{blocks} blocks, computed"] = _step(model, config, cases, views, kept=False)
            if model.frozen_blocks:
                steps[f"{blocks} blocks, kept"] = _step(model, config, cases, views, kept=True)
        times: dict[str, list[float]] = {title: [] for title in steps}
        for turn in range(_REPEATS + 1):
            for title, step in steps.items():
                seconds = step()
                if turn:  # the first makes the entries and warms up
                    times[title].append(seconds)
        entries = list((folder / "prefix").rglob("*.safetensors"))
        size = statistics.mean(entry.stat().st_size for entry in entries)
    whole = times[f"{_BLOCKS[0]} blocks, computed"]
    for title, values in times.items():
        ratios = [a / b for a, b in zip(whole, values, strict=True)]
        print(
            f"{title}: median {statistics.median(values):.2f} s per step of {_SLICES}, "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) times as "
            "fast as 12 computed"
        )
    print(f"{size:.0f} bytes per view on disk, tokens and label")


def _config(folder: Path, blocks: int | None) -> Config:
    return parse_config(
        {
            "model": {
                "base": "vit_b", "checkpoint": str(folder / "vit_b.safetensors"), "image_size": 224,
                "decoder": "reference",
            },
            "peft": {"rank": 32, "blocks": blocks},
            "data": {"slice_axis": "axial"},
            "training": {"precision": "fp32", "batch_size": _SLICES},
        }
    )  # fmt: skip


def _model(folder: Path, config: Config) -> AdaptedModel:
    path = folder / "vit_b.safetensors"
    if not path.exists():
        torch.manual_seed(0)
        save_file(construct(BASES["vit_b"].shape, 3).state_dict(), path)
    return build_adapted(config, len(CLASSES), _CPU)


def _step(
    model: AdaptedModel, config: Config, cases: CaseCache, views: list[View], *, kept: bool
) -> Callable[[], float]:
    """A function that takes one step and says how many seconds it took."""
    settings = config.training.model_copy(update={"prefix_cache_mb": 100})
    trained = list(model.trained.values())
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    loss_of = SegmentationLoss(settings.dice_weight)
    cache = PrefixCache(model, cases, settings)
    images = torch.stack([cache.picture(view)[0] for view in views])
    labels = torch.stack([cache.picture(view)[1] for view in views])

    def step() -> float:
        with batch_parts(_CPU, _SLICES) as parts:
            begun = time.perf_counter()
            inputs, forward = images, model.segmenter
            if kept:
                inputs = torch.stack([entry.tokens for entry in cache.entries(views, parts)])
                forward = cache.forward
            batch_gradients(forward, loss_of, inputs, labels, trained, parts)
            optimiser.step()
            return time.perf_counter() - begun

    return step


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
