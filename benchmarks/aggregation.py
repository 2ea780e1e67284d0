"""The server's time for one round of LoRA, by rule: `vit_b`, rank 32, six sites.

    OMP_NUM_THREADS=1 python -m benchmarks.aggregation

Beside the rules stands FLAP-SAM's way: the mean of the sites' (o, i) products, and a randomised SVD
of it with the steps and default settings of scikit-learn's `randomized_svd` (10 more columns, 7
power iterations or 4 for small matrices, LU between them). Factors are Gaussian, and nine tenths of
their variance is common to all sites. All run in turn in one process; ratios of the shortest
processor times are the result.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable

import numpy as np
import scipy.linalg
import torch

from samaritan.config import PeftConfig, parse_config
from samaritan.models.adapt import adapt
from samaritan.models.adapter import AdapterState
from samaritan.models.bases import FAMILIES, get_base
from samaritan.models.lora import Pair, lora_pairs
from strategies.meter import ProductMeter
from strategies.products import Products
from strategies.rules import get_rule
from strategies.update import Situation, Update

_REPEATS, _RANK = 5, 32
_WEIGHTS = (0.03, 0.18, 0.15, 0.10, 0.05, 0.49)
_SHARED = 0.9


def main() -> None:
    """Prints seconds, ratios and errors."""
    shapes = _shapes()
    pairs = lora_pairs(shapes)
    before, updates = _round(shapes)
    for pair in pairs:
        before[pair.folded] = torch.zeros(shapes[pair.b][0], shapes[pair.a][1])

    def rule(name: str) -> Callable[[], AdapterState]:
        config = parse_config({"strategy": name})
        return lambda: get_rule(name)(updates, Situation(before, 1, config))

    def randomised() -> AdapterState:
        return _randomised(before, updates, pairs)

    ways = {name: rule(name) for name in ("fedavg", "svd", "fedex", "flora")}
    ways["dense randomised SVD"] = randomised
    times: dict[str, list[float]] = {name: [] for name in ways}
    steps: dict[str, AdapterState] = {}
    for _ in range(_REPEATS):
        for name, way in ways.items():
            begun = time.process_time()
            steps[name] = way()
            times[name].append(time.process_time() - begun)

    meter = ProductMeter(before)
    for update in updates:
        meter.add(update)
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"{len(pairs)} products, {len(updates)} sites, shortest of {_REPEATS}"
    )
    slowest = min(times["dense randomised SVD"])
    for name, step in steps.items():
        begun = time.process_time()
        error = meter.error({n: t + step[n] if n in step else t for n, t in before.items()})
        metered = time.process_time() - begun
        best = min(times[name])
        print(
            f"{name}: {best:.3f} s, {slowest / best:.1f} times faster than the dense randomised "
            f"SVD, error {error:.2g} (metered in {metered:.2f} s)"
        )


def _shapes() -> dict[str, tuple[int, ...]]:
    """LoRA tensors of the base, without its weights."""
    base = get_base("vit_b")
    with torch.device("meta"):
        model = FAMILIES[base.family].construct(base.shape, 2, 3, "official")
        settings = PeftConfig(preset="lora-only", rank=_RANK)
        _, trained = adapt(model, base, settings, input_size=(224, 224), depth=1, seed=0)
    return {name: tuple(p.shape) for name, p in trained.items()}


def _round(shapes: dict[str, tuple[int, ...]]) -> tuple[AdapterState, list[Update]]:
    generator = torch.Generator().manual_seed(0)

    def draw(share: float) -> AdapterState:
        return {
            name: torch.randn(shape, generator=generator) * math.sqrt(share)
            for name, shape in shapes.items()
        }

    before = draw(_SHARED)
    return before, [
        Update(f"site {i}", dict(before), draw(1 - _SHARED), w) for i, w in enumerate(_WEIGHTS)
    ]


def _randomised(before: AdapterState, updates: list[Update], pairs: list[Pair]) -> AdapterState:
    """FLAP-SAM's aggregation (arXiv 2407.21739), with its way of splitting: B = U, A = S V."""
    products = Products(before)
    for update in updates:
        products.add(update)
    step: AdapterState = {}
    for pair, terms in products.ideal():
        mean = torch.zeros(len(terms[0].b), terms[0].a.shape[1])
        for term in terms:
            mean += term.weight * (term.b @ term.a)
        u, s, vh = map(torch.from_numpy, _randomized_svd(mean.numpy()))
        step[pair.b], step[pair.a] = u - before[pair.b], s[:, None] * vh - before[pair.a]
    return step


def _randomized_svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    columns = min(_RANK + 10, *matrix.shape)
    q = np.random.default_rng(0).normal(size=(matrix.shape[1], columns)).astype(matrix.dtype)
    for _ in range(7 if min(matrix.shape) > 10 * _RANK else 4):
        q, _ = scipy.linalg.lu(matrix @ q, permute_l=True, check_finite=False, overwrite_a=True)
        q, _ = scipy.linalg.lu(matrix.T @ q, permute_l=True, check_finite=False, overwrite_a=True)
    q, _ = scipy.linalg.qr(matrix @ q, mode="economic", check_finite=False, overwrite_a=True)
    u, s, vh = scipy.linalg.svd(q.T @ matrix, full_matrices=False, check_finite=False)
    return (q @ u)[:, :_RANK], s[:_RANK], vh[:_RANK]


if __name__ == "__main__":
    main()
