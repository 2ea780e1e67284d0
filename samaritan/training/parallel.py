"""A batch whose records are shared out among processor cores.

The loss is a mean over records, so that the gradient of a batch is the sum of its parts' gradients.
On a processor one thread per part beats several threads per operation where operations are small:
see `benchmarks/step.py`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samaritan.models.family import Prompts

_MOST_PARTS = 4
"""Each part holds gradients of its own; more parts than this were not measured."""


@dataclass(frozen=True)
class Parts:
    """How many parts a batch is cut into, and the threads that take them."""

    count: int
    pool: Executor | None


@contextlib.contextmanager
def batch_parts(device: torch.device, batch_size: int) -> Iterator[Parts]:
    """One part per core, up to a bound; a single part on a GPU."""
    cores = torch.get_num_threads()
    count = min(cores, batch_size, _MOST_PARTS)
    if device.type != "cpu" or count < 2:
        yield Parts(1, None)
        return
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(cores // count,))
    try:
        with pool:
            yield Parts(count, pool)
    finally:
        torch.set_num_threads(cores)


def forward_in_parts(model: Callable[[Tensor], Tensor], parts: Parts) -> Callable[[Tensor], Tensor]:
    """The model without gradients, the records of a batch shared out among the parts."""

    @torch.no_grad()  # gradients are switched off per thread
    def forward(records: Tensor) -> Tensor:
        return model(records)

    def joined(images: Tensor) -> Tensor:
        if parts.pool is None:
            return forward(images)
        return torch.cat(list(parts.pool.map(forward, images.chunk(parts.count))))

    return joined


def batch_gradients(
    model: Callable[..., Tensor],
    loss_of: nn.Module,
    images: Tensor,
    labels: Tensor,
    parameters: Sequence[nn.Parameter],
    parts: Parts,
    prompts: Prompts | None = None,
) -> Tensor:
    """Sets the gradient of every parameter to that of the batch's mean loss.

    Args:
        model: Images, or images and prompts, to logits.
        loss_of: Logits and labels to the mean of the records' losses.
        images: (B, K, H, W).
        labels: (B, H, W).
        parameters: What to differentiate by.
        parts: From `batch_parts`.
        prompts: Of the records, if the model is to have any.

    Returns:
        The loss, a detached scalar.
    """

    def part(records: slice) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        hints = () if prompts is None else (prompts[records],)
        logits = model(images[records], *hints)
        loss: Tensor = loss_of(logits, labels[records]) * (len(logits) / len(images))
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    size = math.ceil(len(images) / parts.count)
    pieces = [slice(start, start + size) for start in range(0, len(images), size)]
    results = list((parts.pool.map if parts.pool else map)(part, pieces))
    # In the order of the parts, so that equal seeds give equal sums.
    for index, parameter in enumerate(parameters):
        found = [g[index] for _, g in results]
        given = [g for g in found if g is not None]
        parameter.grad = torch.stack(given).sum(0) if len(given) > 1 else next(iter(given), None)
    return torch.stack([loss for loss, _ in results]).sum()
