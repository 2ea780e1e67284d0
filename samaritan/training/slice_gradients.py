"""The gradient of each single slice, out of one backward pass over many, by Opacus.

Its hooks see what goes into a layer and what comes back to it. A tensor that is used past its layer
escapes them, and a layer that takes windows for records gives too many gradients; both would be
silent, and no bound on a record's part would hold. So a method is tried on made-up slices before it
sees real ones, and refused if it differs from ordinary backward passes.

Legend: B slices, P numbers in all trained tensors together.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn

from samaritan.errors import PrivacyError
from samaritan.models.family import Prompts
from samaritan.training.feed import Batch
from samaritan.training.record_gradients import (
    Forward,
    RecordGradient,
    flat_gradient,
    loss_on,
    some_of,
)

_STIR = 0.02
"""Noise on the parameters of a trial: a factor of zero would hide what the other one gets."""

_ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Largest difference of a trial, as a share of a tensor's largest gradient. A tensor that Opacus
sees in part is off by about the whole of it."""

_NEGLIGIBLE = 1e-4
"""Differences below this share of the largest gradient of all are left to rounding."""


def slice_gradients(
    network: nn.Module,
    model: Forward,
    loss_of: nn.Module,
    trained: Mapping[str, nn.Parameter],
    slices_at_once: int,
) -> Callable[[Batch], Iterator[RecordGradient]]:
    """A function from a batch to the gradient of each of its slices, by Opacus.

    Before the first batch of a kind (with so many prompts, say) the method is tried on two made-up
    slices, against an ordinary backward pass for each. Nothing of Opacus is on the network whenever
    the caller has its turn.

    Args:
        network: What the trained tensors are part of, in training mode.
        model: Images, or images and prompts, to logits; calls the network's layers.
        loss_of: Logits and labels to a mean loss.
        trained: What to differentiate by; all that is trained of the network, by name.
        slices_at_once: Most slices in one backward pass; it holds so many gradients of all tensors.

    Returns:
        The function. It gives every slice once; those with equally many prompts come together. It
        raises a PrivacyError when the method is none that Opacus gets right.
    """
    tried: set[tuple[object, ...]] = set()

    def gradients(batch: Batch) -> Iterator[RecordGradient]:
        for group in _groups(batch):
            if _kind(group) not in tried:
                _try(network, model, loss_of, trained, _made_up(group))
                tried.add(_kind(group))
            for start in range(0, len(group.inputs), slices_at_once):
                piece = some_of(group, slice(start, start + slices_at_once))
                by_tensor, losses = _hooked_gradients(network, model, loss_of, trained, piece)
                for row, loss in enumerate(losses):
                    found = [None if g is None else g[row] for g in by_tensor]
                    yield flat_gradient(found, list(trained.values())), loss

    return gradients


def _hooked_gradients(
    network: nn.Module,
    model: Forward,
    loss_of: nn.Module,
    trained: Mapping[str, nn.Parameter],
    batch: Batch,
) -> tuple[list[Tensor | None], list[float]]:
    """For each tensor (B, ...) gradients, or None where the loss does not use it; B losses."""
    count = len(batch.inputs)
    with _opacus(network):
        hints = () if batch.prompts is None else (batch.prompts,)
        logits = model(batch.inputs, *hints)
        for layer in network.modules():
            seen = vars(layer).get("activations", []) if isinstance(layer, nn.Conv2d) else []
            # Opacus 1.6 cuts patches as if rows followed each other in memory, silently wrong.
            seen[:] = [[x.contiguous() for x in inputs] for inputs in seen]
        # Each by itself and summed: a mean would be scaled by the batch that a layer believes in.
        each = [loss_of(logits[i : i + 1], batch.labels[i : i + 1]) for i in range(count)]
        losses = torch.stack(each)
        summed = torch.autograd.grad(losses.sum(), list(trained.values()), allow_unused=True)
        found: list[Tensor | None] = []
        for (name, parameter), used in zip(trained.items(), summed, strict=True):
            rows = getattr(parameter, "grad_sample", None)
            if used is None and rows is None:
                found.append(None)
                continue
            if not isinstance(rows, Tensor) or rows.shape != (count, *parameter.shape):
                shape = tuple(rows.shape) if isinstance(rows, Tensor) else "none"
                raise _refusal(
                    "SAM-P501",
                    f"of {name} for {count} slices Opacus has gradients of shape {shape}",
                )
            found.append(rows.float())
    return found, losses.tolist()


@contextlib.contextmanager
def _opacus(network: nn.Module) -> Iterator[None]:
    """Lets Opacus see every trained layer, and leaves the network as it was."""
    hooks = None
    try:
        hooks = GradSampleHooks(network, loss_reduction="sum")
        with warnings.catch_warnings():
            # Of layers whose input needs no gradient, such as the first; theirs are right.
            warnings.filterwarnings("ignore", "Full backward hook is firing")
            yield
    finally:
        if hooks is not None:
            hooks.cleanup()
        for module in network.modules():
            for name in ("activations", "max_batch_len"):  # of a pass that failed
                module.__dict__.pop(name, None)


def _try(
    network: nn.Module,
    model: Forward,
    loss_of: nn.Module,
    trained: Mapping[str, nn.Parameter],
    batch: Batch,
) -> None:
    """Compares Opacus with ordinary backward passes on made-up slices.

    Raises:
        PrivacyError: When it fails, or is wrong; no patient's data decides that.
    """
    parameters = list(trained.values())
    with _stirred(parameters):
        singles = [some_of(batch, slice(i, i + 1)) for i in range(len(batch.inputs))]
        expected = [
            torch.autograd.grad(loss_on(model, loss_of, s), parameters, allow_unused=True)
            for s in singles
        ]
        try:
            found, _ = _hooked_gradients(network, model, loss_of, trained, batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            raise _refusal("SAM-P502", f"Opacus fails with {type(error).__name__}") from error
    rounding = _ROUNDING[getattr(network, "autocast_dtype", None) or torch.float32]
    floor = _NEGLIGIBLE * max(
        float(g.abs().max()) for row in expected for g in row if g is not None
    )
    for index, name in enumerate(trained):
        given = found[index]
        for row, single in enumerate(expected):
            right = single[index]
            if right is None or given is None:
                continue
            off, most = float((given[row] - right).abs().max()), float(right.abs().max())
            if not off <= rounding * most + floor:
                raise _refusal(
                    "SAM-P503",
                    f"Opacus' gradient of {name} is off by {off:.2g}, at most {most:.2g} in size",
                )


def _refusal(code: str, what: str) -> PrivacyError:
    return PrivacyError(
        code,
        f"privacy.unit is slice, and {what}; its gradients per slice would be wrong",
        "Set privacy.unit: patient, which works with every method, or another peft.preset; "
        "training.recompute must be off.",
    )


@contextlib.contextmanager
def _stirred(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    kept = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(_STIR * noise.to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def _made_up(batch: Batch) -> Batch:
    """Two slices of the kind of a batch, and with nothing of its content."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand((2, *batch.inputs.shape[1:]), generator=generator).to(batch.inputs)
    labels = torch.randint(0, 2, (2, *batch.labels.shape[1:]), generator=generator)
    prompts = batch.prompts
    if prompts is not None:
        kinds = prompts.labels[:1].expand(2, -1)
        corner = torch.tensor(batch.labels.shape[:0:-1])  # (columns, rows)
        points = torch.rand((*kinds.shape, 2), generator=generator) * corner
        prompts = Prompts(points.to(prompts.points), kinds)
    return Batch(inputs, labels.to(batch.labels.device), prompts)


def _groups(batch: Batch) -> Iterator[Batch]:
    """Slices with equally many prompts: of two passes Opacus adds up the gradients by their row."""
    if batch.prompts is None:
        yield batch
        return
    for records, prompts in batch.prompts.groups():
        yield Batch(batch.inputs[records], batch.labels[records], prompts)


def _kind(batch: Batch) -> tuple[object, ...]:
    prompts = batch.prompts
    kinds = (
        None if prompts is None else (prompts.labels.shape[1], bool((prompts.labels >= 2).any()))
    )
    return batch.inputs.shape[1:], kinds
