"""Local training under differential privacy: DP-SGD whose record is a patient, or a slice.

Everything the steps do with data goes through `samaritan.privacy.mechanism`; the optimiser, the
learning rate and the pull of FedProx only see what the mechanism has released.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from samaritan.config import TrainingConfig
from samaritan.data.datasets import Case
from samaritan.data.slices import CaseCache, PreparedCase, cut_slice, draw_index
from samaritan.models.adapter import AdaptedModel
from samaritan.privacy.adaptive import AdaptiveClip
from samaritan.privacy.mechanism import Mechanism
from samaritan.privacy.randomness import SystemRandom
from samaritan.training.augment import augment
from samaritan.training.drift import correct_gradients
from samaritan.training.feed import Batch, joined
from samaritan.training.local import (
    Schedule,
    StepCallback,
    adamw,
    learning_rate,
    out_of_time,
    without_gradient,
)
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import batch_parts
from samaritan.training.prompts import draw_prompts
from samaritan.training.record_gradients import RecordGradient, patient_gradients
from samaritan.training.slice_gradients import slice_gradients


@dataclass(frozen=True)
class Slice:
    """A record of the slice unit."""

    case: Case
    index: int


Patient = tuple[Case, ...]
"""A record of the patient unit: all visits."""


def patients_of(cases: Sequence[Case]) -> list[Patient]:
    """The cases of each patient, patients in the order of their identifiers."""
    found: dict[str, list[Case]] = {}
    for case in cases:
        found.setdefault(case.subject_id, []).append(case)
    return [tuple(found[subject]) for subject in sorted(found)]


def train_privately(
    model: AdaptedModel,
    cache: CaseCache,
    cases: Sequence[Case],
    settings: TrainingConfig,
    mechanism: Mechanism,
    *,
    unit: str,
    steps: int,
    slices_per_patient: int,
    schedule: Schedule,
    timeout_s: float = math.inf,
    names: Collection[str] | None = None,
    adaptive: AdaptiveClip | None = None,
    on_step: StepCallback | None = None,
) -> None:
    """Trains the adapter that is on the model, in place.

    A step samples records by chance, takes the gradient of each record's own mean loss, and hands
    AdamW what the mechanism releases of them. All randomness, that of slices and augmentation
    included, is the system's: drawn from a published seed, a record's slices would tell who else is
    in the sample. A sample may be empty, and its noise counts as any other's.

    Args:
        model: Carries the adapter to start from, and afterwards the trained one.
        cache: Reads and prepares cases.
        cases: Labelled training cases; nothing depends on how many there are.
        settings: Learning rate, weight decay, augmentation, FedProx's mu; not its batch size.
        mechanism: Rate, noise, clipping norm and divisor.
        unit: "patient" or "slice".
        steps: Optimiser steps.
        slices_per_patient: Drawn of each patient in a sample.
        schedule: Position of this round in the cosine decay.
        timeout_s: Give up when a step ends later than this.
        names: What to train of the adapter; all of it by default.
        adaptive: Moves the clipping norm, and is moved.
        on_step: Told of every step and its mean loss, which must not leave the site; NaN for an
            empty sample.

    Raises:
        TrainingError: When time runs out.
        PrivacyError: When a trained tensor has no gradient for each slice.
    """
    random, begun = SystemRandom(), time.monotonic()
    records = patients_of(cases) if unit == "patient" else _slices_of(cases, cache)
    device = model.segmenter.device
    trained = {n: p for n, p in model.trained.items() if names is None or n in names}
    parameters = list(trained.values())
    received = {n: p.detach().clone() for n, p in trained.items()} if settings.proximal_mu else {}
    optimiser = adamw(parameters, settings)
    loss_of = SegmentationLoss(settings.dice_weight, cache.unlabelled(cases))
    size = sum(parameter.numel() for parameter in parameters)
    losses: list[float] = []
    model.segmenter.train()
    resting = [p for n, p in model.trained.items() if n not in trained]
    views = Views(cache, settings, random)
    by_slice = slice_gradients(
        model.segmenter, model.segmenter, loss_of, trained, settings.batch_size
    )

    def gradients(sample: list[Any]) -> Iterator[RecordGradient]:
        if unit == "patient":
            batches = (views.patient(p, slices_per_patient).to(device) for p in sample)
            return patient_gradients(model.segmenter, loss_of, batches, parameters, parts)
        return by_slice(views.slices(sample).to(device)) if sample else iter(())

    with without_gradient(resting), batch_parts(device, slices_per_patient) as parts:
        for step in range(1, steps + 1):
            found = gradients(mechanism.sample(records, random))
            losses.clear()
            vectors = _vectors(found, losses)
            if adaptive is None:
                mean = mechanism.release(vectors, size, random, device)
            else:
                public = adaptive.mechanism(mechanism)
                mean = public.release(adaptive.counted(vectors), size, random, device)
                adaptive.step(mechanism, random)
            _set_gradients(parameters, mean)
            correct_gradients(trained, {}, received, settings.proximal_mu)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, schedule, settings)
            optimiser.step()
            if time.monotonic() - begun > timeout_s and step < steps:
                raise out_of_time(timeout_s, step, steps, "privacy.steps_per_round")
            if on_step is not None:
                on_step(step, steps, sum(losses) / len(losses) if losses else math.nan)
    model.segmenter.eval()


def _set_gradients(parameters: Sequence[torch.nn.Parameter], mean: Tensor) -> None:
    start = 0
    for parameter in parameters:
        part = mean[start : start + parameter.numel()]
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
        start += parameter.numel()


def _vectors(found: Iterator[RecordGradient], losses: list[float]) -> Iterator[Tensor]:
    for vector, loss in found:
        losses.append(loss)
        yield vector


def _slices_of(cases: Sequence[Case], cache: CaseCache) -> list[Slice]:
    return [Slice(case, i) for case in cases for i in range(len(cache.get(case).image))]


@dataclass(frozen=True)
class Views:
    """Slices of records as a step sees them, drawn and augmented."""

    cache: CaseCache
    settings: TrainingConfig
    random: SystemRandom

    def patient(self, visits: Patient, count: int) -> Batch:
        """So many slices of a patient, of any visit, drawn by a generator of their own."""
        generator = self._generator()
        chosen = torch.randint(len(visits), (count,), generator=generator).tolist()
        prepared = [self.cache.get(visits[visit]) for visit in chosen]
        share = self.settings.foreground_fraction
        return self._batch([(p, draw_index(p, share, generator)) for p in prepared], generator)

    def slices(self, records: Sequence[Slice]) -> Batch:
        """Each of these slices once, and each by a generator of its own."""
        singles = [
            self._batch([(self.cache.get(record.case), record.index)], self._generator())
            for record in records
        ]
        return joined(singles)

    def _batch(
        self, found: Sequence[tuple[PreparedCase, int]], generator: torch.Generator
    ) -> Batch:
        share = self.settings.foreground_fraction
        pairs = [cut_slice(case, i, self.cache, share, generator) for case, i in found]
        images = torch.stack([image for image, _ in pairs]).float()
        labels = torch.stack([label for _, label in pairs]).long()
        axes = [case.grid.axis for case, _ in found]
        inputs, labels = augment(images, labels, axes, self.settings, generator)
        return Batch(inputs, labels, draw_prompts(labels, self.settings.prompts, generator))

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(int(self.random.words(1)[0] >> 1))
