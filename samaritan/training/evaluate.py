"""From an adapter to label maps on the native grid, and to scores."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor

from samaritan.config import EvaluationConfig
from samaritan.data.datasets import Case
from samaritan.data.label_maps import label_map
from samaritan.data.slices import CaseCache, PreparedCase, class_indices, with_context
from samaritan.data.transforms import from_stack
from samaritan.data.volume import read_label
from samaritan.errors import DataError
from samaritan.models.segmenter import Segmenter
from samaritan.training.augment import BODY_AXES, mirror_dims
from samaritan.training.metrics import Scores, case_mean, mean, score_case
from samaritan.training.parallel import batch_parts, forward_in_parts
from samaritan.training.prompts import with_oracle

_SLICES_AT_ONCE = 32


@dataclass(frozen=True)
class CaseScores:
    """Scores of one case.

    Attributes:
        case: Which.
        scores: By class, for all classes of the study.
        unlabelled: Classes that the case's site does not label, and that have no score for that.
    """

    case: Case
    scores: dict[str, Scores]
    unlabelled: frozenset[str] = frozenset()

    @property
    def dice(self) -> float:
        """Mean Dice over the classes that are defined; NaN when none is."""
        return case_mean(self.scores, "dice")


@torch.no_grad()
def predict_indices(
    segmenter: Segmenter, prepared: PreparedCase, cache: CaseCache, settings: EvaluationConfig
) -> NDArray[np.uint8]:
    """Segments one case.

    Args:
        segmenter: The adapted model.
        prepared: The case on the model grid.
        cache: Knows the input size and the context.
        settings: Windows, test-time mirroring, oracle prompts.

    Returns:
        (X, Y, Z) uint8 class indices on the canonical grid of the volume.

    Raises:
        DataError: When prompts are to come from a label and the case has none.
    """
    segmenter.eval()
    grid = prepared.grid
    views = [0] + [mirror_dims(BODY_AXES[name], grid.axis) for name in settings.flip]
    labels = _oracle_labels(prepared, settings)
    model = segmenter if labels is None else with_oracle(segmenter, settings.prompts)
    pieces = []
    with batch_parts(segmenter.device, _SLICES_AT_ONCE) as parts:
        forward = forward_in_parts(model, parts)
        for start in range(0, grid.slices, _SLICES_AT_ONCE):
            index = torch.arange(start, min(start + _SLICES_AT_ONCE, grid.slices))
            images = with_context(prepared.image, index, cache.data.context_slices).float()
            planes = None if labels is None else labels[index, None].float()
            scores = _probabilities(
                forward, segmenter.device, images, planes, views, cache.image_size, settings
            )
            shape = list(grid.shape)
            shape[grid.axis] = len(index)
            chunk = replace(grid, shape=(shape[0], shape[1], shape[2]))
            pieces.append(from_stack(scores.transpose(0, 1), chunk).argmax(0).to(torch.uint8))
    return torch.cat(pieces, grid.axis).numpy()


def _oracle_labels(prepared: PreparedCase, settings: EvaluationConfig) -> Tensor | None:
    """(S, h, w) the label that prompts are taken from, if there are to be any."""
    if settings.prompts == "none":
        return None
    if prepared.label is None:
        raise DataError(
            "SAM-D116",
            f"case {prepared.case.case_id} has no label to take evaluation.prompts from",
            "Add it.",
        )
    return prepared.label


def _probabilities(
    forward: Callable[[Tensor], Tensor],
    device: torch.device,
    images: Tensor,
    labels: Tensor | None,
    views: Sequence[int],
    size: tuple[int, int],
    settings: EvaluationConfig,
) -> Tensor:
    """(N, K, h, w) slices of any size -> (N, C, h, w) probabilities, mirrored views averaged.

    Labels (N, 1, h, w), where given, travel as a last channel.
    """
    run = functools.partial(
        sliding_window_inference,
        roi_size=size,
        sw_batch_size=_SLICES_AT_ONCE,
        predictor=lambda x: forward(x).softmax(1),
        overlap=settings.window_overlap,
        mode="gaussian",
        sw_device=device,
        device=torch.device("cpu"),
    )
    planes = [images] if labels is None else [images, labels]
    total: Tensor | None = None
    for dim in views:
        scores: Tensor = run(torch.cat([p.flip(dim) if dim else p for p in planes], 1))
        if dim > 1:  # a mirrored context leaves the slice where it is
            scores = scores.flip(dim)
        total = scores if total is None else total + scores
    if total is None:
        raise ValueError("no view to predict")
    return total / len(views)


def evaluate_cases(
    segmenter: Segmenter,
    cache: CaseCache,
    cases: Sequence[Case],
    settings: EvaluationConfig,
    *,
    surfaces: bool = False,
    on_case: Callable[[PreparedCase, NDArray[np.uint8], CaseScores], None] | None = None,
) -> list[CaseScores]:
    """Segments and scores cases in 3-D on their native voxels, against the untouched label.

    The canonical and the stored grid hold the same voxels in another order, so that scores on one
    are scores on the other.

    Args:
        segmenter: The adapted model.
        cache: Reads and prepares cases.
        cases: With labels.
        settings: Windows, mirroring, oracle prompts, tolerance.
        surfaces: Also compute HD95 and NSD.
        on_case: Told of every case with its prediction.

    Raises:
        DataError: When a case has no label.
    """
    results = []
    for case in cases:
        prepared = cache.get(case)
        prediction = predict_indices(segmenter, prepared, cache, settings)
        results.append(score_prediction(prediction, prepared, cache, settings, surfaces))
        if on_case is not None:
            on_case(prepared, prediction, results[-1])
    return results


def score_prediction(
    prediction: NDArray[np.uint8],
    prepared: PreparedCase,
    cache: CaseCache,
    settings: EvaluationConfig,
    surfaces: bool,
) -> CaseScores:
    """Scores of one prediction, for the structures that the case's site labels.

    Args:
        prediction: (X, Y, Z) class indices on the canonical grid.
        prepared: The case.
        cache: Knows the classes and what the site labels.
        settings: Tolerance.
        surfaces: Also compute HD95 and NSD.

    Raises:
        DataError: When the case has no label.
    """
    labelled = label_map(cache.data, prepared.case.site, cache.classes)
    unlabelled = frozenset(cache.classes.keys() - labelled.keys())
    scores = score_case(
        prediction,
        true_indices(prepared, cache),
        prepared.grid.spacing_mm,
        list(cache.classes),
        settings.nsd_tolerance_mm,
        surfaces,
        unlabelled,
    )
    return CaseScores(prepared.case, scores, unlabelled)


def true_indices(prepared: PreparedCase, cache: CaseCache) -> NDArray[np.uint8]:
    """(X, Y, Z) class indices of a case's label, on the canonical grid, by its site's label map.

    Raises:
        DataError: When the case has no label.
    """
    case = prepared.case
    if case.label is None:
        raise DataError("SAM-D116", f"case {case.case_id} has no label to score against", "Add it.")
    volume = read_label(case.label, case.case_id, prepared.native)
    own = label_map(cache.data, case.site, cache.classes)
    return class_indices(volume.array, cache.classes, case.case_id, own)


def to_label_values(indices: NDArray[np.uint8], classes: Mapping[str, int]) -> NDArray[np.uint16]:
    """Class indices back to the label values of the dataset."""
    values: NDArray[np.uint16] = np.array([0, *classes.values()], dtype=np.uint16)[indices]
    return values


def mean_dice(results: Sequence[CaseScores]) -> float | None:
    """Mean over cases of the mean over classes; None when nothing is defined."""
    return mean([r.dice for r in results])
