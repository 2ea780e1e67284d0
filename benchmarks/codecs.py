"""What codecs cost and lose on an update of vit_b under the flap-sam preset.

    python -m benchmarks.codecs

The update is synthetic: heavy-tailed numbers, and matrices whose singular values fall as 1/i. Times
are those of one core, without what other processes take.
"""

from __future__ import annotations

import platform
import statistics
import time

import torch
from torch import Tensor

from samaritan.codecs.message import decode, encode
from samaritan.config import CodecConfig, PeftConfig
from samaritan.models.adapt import adapt
from samaritan.models.bases import FAMILIES, get_base

_REPEATS = 5
_CODECS = [
    CodecConfig(),
    CodecConfig(numbers="fp16"),
    CodecConfig(numbers="bf16"),
    CodecConfig(numbers="int8"),
    CodecConfig(numbers="int4"),
    CodecConfig(top_k=0.05, numbers="fp16"),
    CodecConfig(top_k=0.05, numbers="int4"),
    CodecConfig(low_rank=8, numbers="int8"),
    CodecConfig(low_rank=8, top_k=0.2, numbers="int4"),
]


def main() -> None:
    """Prints a row for each codec."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    update = {name: _heavy_tailed(shape) for name, shape in vit_b_shapes().items()}
    shapes = {name: tuple(value.shape) for name, value in update.items()}
    count = sum(value.numel() for value in update.values())
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}; {count} numbers")
    print(f"{'codec':32} {'bits':>6} {'error':>8} {'encode ms':>10} {'decode ms':>10}")
    for codec in _CODECS:
        encoding, decoding = [], []
        for seed in range(_REPEATS):
            begun = time.process_time()
            data = encode(update, codec, header={}, seed=seed)
            between = time.process_time()
            decoded, _ = decode(data, shapes)
            encoding.append((between - begun) * 1e3)
            decoding.append((time.process_time() - between) * 1e3)
        name = " ".join(f"{k}={v}" for k, v in codec.model_dump(exclude_unset=True).items())
        print(
            f"{name or 'fp32':32} {len(data) * 8 / count:6.2f} {_error(decoded, update):8.4f} "
            f"{statistics.median(encoding):10.1f} {statistics.median(decoding):10.1f}"
        )


def vit_b_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the adapter at rank 32, without the memory of a model."""
    base = get_base("vit_b")
    with torch.device("meta"):
        model = FAMILIES[base.family].construct(base.shape, 3, base.channels or 3, "reference")
        peft = PeftConfig(preset="flap-sam", rank=32)
        _, trained = adapt(model, base, peft, input_size=(1024, 1024), depth=1, seed=0)
    return {name: tuple(parameter.shape) for name, parameter in trained.items()}


def _heavy_tailed(shape: tuple[int, ...]) -> Tensor:
    """Student's t with 3 degrees of freedom, about 1e-3 large."""
    values = torch.distributions.StudentT(3.0).sample(shape) * 1e-3
    if len(shape) != 2:
        return values
    u, s, v = torch.linalg.svd(values, full_matrices=False)
    return (u * (s / torch.arange(1, len(s) + 1))) @ v


def _error(decoded: dict[str, Tensor], update: dict[str, Tensor]) -> float:
    """Length of the difference over length of the update."""
    lost = sum(float((decoded[name] - value).square().sum()) for name, value in update.items())
    total = sum(float(value.square().sum()) for value in update.values())
    return float((lost / total) ** 0.5)


if __name__ == "__main__":
    main()
