"""The gradient of one record: a patient's mean loss over its slices, by ordinary backward passes.

Right for every method, since nothing is taken apart: see `slice_gradients` for what that costs.

Legend: P numbers in all trained tensors together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from samaritan.training.feed import Batch
from samaritan.training.parallel import Parts

Forward = Callable[..., Tensor]
"""Images (or kept tokens), with or without prompts, to logits."""

RecordGradient = tuple[Tensor, float]
"""(P,) float32 on the device of the parameters, zero where the loss does not use one; the loss."""


def patient_gradients(
    model: Forward,
    loss_of: nn.Module,
    records: Iterable[Batch],
    parameters: Sequence[nn.Parameter],
    parts: Parts,
    slices_at_once: int | None = None,
) -> Iterator[RecordGradient]:
    """The gradient of each patient's mean loss, by ordinary backward passes.

    Threads take pieces of patients in turn. Where a patient is cut does not depend on how many
    threads there are, and so neither do the sums. A patient whose loss is not finite has a vector
    that is not, and changes no other.

    Args:
        model: Images, or images and prompts, to logits.
        loss_of: Logits and labels to the mean of the slices' losses.
        records: All slices of one patient each; read as the gradients are asked for.
        parameters: What to differentiate by.
        parts: Threads, from `parallel.batch_parts`.
        slices_at_once: Most slices in one backward pass, which bounds its memory; all of a
            patient's by default. Fewer share out few patients more evenly.

    Yields:
        Gradients in the order of the patients. Besides the one that was given last, there is one
        vector in memory for each thread, and one more while a patient in pieces is summed.
    """

    def gradient(piece: _Piece) -> RecordGradient:
        loss = loss_on(model, loss_of, piece.slices) * piece.share
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return flat_gradient(found, parameters), float(loss.detach())

    def pieces() -> Iterator[_Piece]:
        for record in records:
            count = len(record.inputs)
            size = slices_at_once or count
            for start in range(0, count, size):
                slices = some_of(record, slice(start, start + size))
                yield _Piece(slices, len(slices.inputs) / count, start + size >= count)

    total, losses = None, 0.0
    for piece, (vector, loss) in _in_turn(gradient, pieces(), parts):
        total = vector if total is None else total.add_(vector)
        losses += loss
        if piece.last:
            yield total, losses
            total, losses = None, 0.0


@dataclass(frozen=True)
class _Piece:
    """Some of a patient's slices, their share of all of them, and whether they are the last."""

    slices: Batch
    share: float
    last: bool


def _in_turn(
    function: Callable[[_Piece], RecordGradient], items: Iterable[_Piece], parts: Parts
) -> Iterator[tuple[_Piece, RecordGradient]]:
    """Items with their results, in order; every thread has work while the caller uses a result."""
    if parts.pool is None:
        yield from ((item, function(item)) for item in items)
        return
    running: deque[tuple[_Piece, Future[RecordGradient]]] = deque()
    try:
        for item in items:
            running.append((item, parts.pool.submit(function, item)))
            if len(running) > parts.count:
                first, future = running.popleft()
                yield first, future.result()
        while running:
            first, future = running.popleft()
            yield first, future.result()
    finally:  # no thread goes on with parameters that the caller is about to change
        for _, future in running:
            future.cancel()
        wait([future for _, future in running])


def some_of(batch: Batch, slices: slice) -> Batch:
    """Some of the slices of a batch."""
    prompts = None if batch.prompts is None else batch.prompts[slices]
    return Batch(batch.inputs[slices], batch.labels[slices], prompts)


def loss_on(model: Forward, loss_of: nn.Module, batch: Batch) -> Tensor:
    """The mean loss of a batch."""
    hints = () if batch.prompts is None else (batch.prompts,)
    loss: Tensor = loss_of(model(batch.inputs, *hints), batch.labels)
    return loss


def flat_gradient(found: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """(P,) float32: gradients one after the other, zeros for those that are None."""
    pairs = zip(found, parameters, strict=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten().float() for g, p in pairs]
    )
