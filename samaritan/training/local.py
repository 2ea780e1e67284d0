"""Local training: one round of AdamW on one site's cases."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samaritan.config import TrainingConfig
from samaritan.data.datasets import Case
from samaritan.data.slices import CaseCache, batches, num_steps
from samaritan.errors import TrainingError
from samaritan.models.adapter import AdaptedModel
from samaritan.training.augment import augment
from samaritan.training.drift import correct_gradients, record_gradients
from samaritan.training.feed import Batch, on_device
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import Parts, batch_gradients, batch_parts
from samaritan.training.prefix import PrefixCache
from samaritan.training.prompts import draw_prompts

StepCallback = Callable[[int, int, float], None]
"""Called after each step with its number, the number of steps and the loss."""


_BETAS = (0.9, 0.99)
"""A shorter memory of squared gradients than AdamW's usual 0.999: a round has few steps."""


@dataclass(frozen=True)
class TrainingResult:
    """What one round of local training did.

    Attributes:
        loss: Mean over all steps.
        steps: Optimiser steps taken.
        seconds: Wall time.
        mean_gradient: Of the loss alone, over all steps, by name; float32 on the CPU. None unless
            there was a control.
    """

    loss: float
    steps: int
    seconds: float
    mean_gradient: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Schedule:
    """Where a round lies in the whole training, for the learning rate.

    Attributes:
        start, stop: Shares of the whole training done before and after the round, 0 to 1.
    """

    start: float
    stop: float


def train_locally(
    model: AdaptedModel,
    cache: CaseCache,
    cases: Sequence[Case],
    settings: TrainingConfig,
    *,
    schedule: Schedule,
    seed: int,
    timeout_s: float = math.inf,
    steps: int | None = None,
    names: Collection[str] | None = None,
    control: Mapping[str, Tensor] | None = None,
    on_step: StepCallback | None = None,
) -> TrainingResult:
    """Trains the adapter that is on the model, in place.

    The optimiser starts anew each round, since the adapter it would remember is not the one that
    came back from the server; a short warm-up makes up for it.

    A step takes the gradient of the loss, adds `control` and FedProx's pull (see `drift`), clips
    the sum and hands it to AdamW. The loss that is told and returned is without the pull.

    Args:
        model: Carries the adapter to start from, and afterwards the trained one.
        cache: Reads and prepares cases.
        cases: Labelled training cases.
        settings: Batch size, learning rate, augmentation, FedProx's mu.
        schedule: Position of this round in the cosine decay.
        seed: Decides draws and augmentation; equal seeds give equal adapters.
        timeout_s: Give up when a step ends later than this.
        steps: Optimiser steps; by default as many as `slices_per_case` asks for.
        names: What to train of the adapter, as FFA (arXiv 2403.12313) and RoLoRA (arXiv 2502.01755)
            need it; all of it by default.
        control: SCAFFOLD's c - c_i by name, added to every gradient. A name that is missing counts
            as zero: an empty mapping only asks for the mean gradient.
        on_step: Told of every step.

    Raises:
        TrainingError: When there are no cases, the loss is not finite, or time runs out.
    """
    if not cases:
        raise TrainingError(
            "SAM-T101", "there are no training cases", "Check the manifest's split."
        )
    generator = torch.Generator().manual_seed(seed)
    begun = time.monotonic()
    total = steps or num_steps(len(cases), settings.slices_per_case, settings.batch_size)
    device = model.segmenter.device
    trained = {n: p for n, p in model.trained.items() if names is None or n in names}
    parameters = list(trained.values())
    received = {n: p.detach().clone() for n, p in trained.items()} if settings.proximal_mu else {}
    shift = {n: t.to(device) for n, t in (control or {}).items()}
    totals = {} if control is None else {n: torch.zeros_like(p) for n, p in trained.items()}
    optimiser = adamw(parameters, settings)
    loss_of = SegmentationLoss(settings.dice_weight, cache.unlabelled(cases))
    losses: list[float] = []
    model.segmenter.train()
    resting = [p for n, p in model.trained.items() if n not in trained]
    with without_gradient(resting), batch_parts(device, settings.batch_size) as parts:
        forward, feed = _forward_and_feed(model, cache, cases, settings, total, generator, parts)
        for step, batch in enumerate(on_device(feed, device), 1):
            rate = learning_rate(step, total, schedule, settings)
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss = batch_gradients(
                forward, loss_of, batch.inputs, batch.labels, parameters, parts, batch.prompts
            )
            record_gradients(totals, trained)
            correct_gradients(trained, shift, received, settings.proximal_mu)
            norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            losses.append(float(loss))
            if not math.isfinite(losses[-1]) or not math.isfinite(float(norm)):
                raise TrainingError(
                    "SAM-T102",
                    f"step {step} of {total}: loss {losses[-1]}, gradient norm {float(norm)}",
                    "Lower training.learning_rate, or run `samaritan data check`.",
                )
            optimiser.step()
            if time.monotonic() - begun > timeout_s and step < total:
                raise out_of_time(timeout_s, step, total, "training.slices_per_case")
            if on_step is not None:
                on_step(step, total, losses[-1])
    model.segmenter.eval()
    taken = len(losses)
    mean = {n: (t / taken).float().cpu() for n, t in totals.items()}
    return TrainingResult(sum(losses) / taken, taken, time.monotonic() - begun, mean or None)


def adamw(parameters: Sequence[torch.nn.Parameter], settings: TrainingConfig) -> torch.optim.AdamW:
    """The optimiser of a round."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.learning_rate,
        betas=_BETAS,
        weight_decay=settings.weight_decay,
        fused=True,
    )


def out_of_time(timeout_s: float, step: int, steps: int, key: str) -> TrainingError:
    """The error of a round that takes too long; `key` makes it shorter."""
    return TrainingError(
        "SAM-T103",
        f"the round's {timeout_s:.0f} s ran out after step {step} of {steps}",
        f"Raise federation.round_timeout_s or lower {key}.",
    )


@contextlib.contextmanager
def without_gradient(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Spares the backward pass what only these need, until the end of the block."""
    switched = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in switched:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)


def _forward_and_feed(
    model: AdaptedModel,
    cache: CaseCache,
    cases: Sequence[Case],
    settings: TrainingConfig,
    steps: int,
    generator: torch.Generator,
    parts: Parts,
) -> tuple[Callable[..., Tensor], Iterator[Batch]]:
    """What is trained, and batches for it: of images, or of tokens that are kept."""

    def batch(inputs: Tensor, labels: Tensor) -> Batch:
        return Batch(inputs, labels, draw_prompts(labels, settings.prompts, generator))

    if settings.prefix_cache_mb:
        prefix = PrefixCache(model, cache, settings)
        kept = prefix.batches(cases, steps=steps, generator=generator, parts=parts)
        return prefix.forward, (batch(*pair) for pair in kept)
    drawn = batches(
        cache,
        cases,
        steps=steps,
        batch_size=settings.batch_size,
        foreground_fraction=settings.foreground_fraction,
        generator=generator,
    )
    return model.segmenter, (batch(*augment(*view, settings, generator)) for view in drawn)


def learning_rate(step: int, steps: int, schedule: Schedule, settings: TrainingConfig) -> float:
    """Cosine decay over the whole training, with a linear warm-up at the start of each round.

    Args:
        step: 1 to `steps`, within the round.
        steps: Optimiser steps of the round.
        schedule: Position of the round.
        settings: Peak rate, final share and warm-up.
    """
    done = schedule.start + (schedule.stop - schedule.start) * (step - 1) / steps
    floor = settings.final_lr_fraction
    share = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    warmup = min(1.0, step / (settings.warmup_steps + 1))
    return settings.learning_rate * share * warmup


def round_seed(seed: int, server_round: int, site: str) -> int:
    """A seed for one round at one site, independent of the order in which sites train."""
    digest = hashlib.sha256(f"{seed}/{server_round}/{site}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
