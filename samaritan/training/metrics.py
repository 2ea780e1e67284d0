"""3-D scores of a label map on its native grid, through MONAI.

The empty-mask rule, for each case and class: absent from both label and prediction, the score is
undefined and left out of every mean (counted as excluded); absent from one of them, Dice and NSD
are 0 and HD95 is the diagonal of the volume.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

EMPTY_RULE = (
    "A class absent from both label and prediction of a case is left out of the means and counted "
    "as excluded; absent from one of them, Dice and NSD are 0 and HD95 is the volume's diagonal."
)

_MARGIN = 2
"""Voxels kept around the structures when cropping; distances do not change."""


@dataclass(frozen=True)
class Scores:
    """Scores of one class in one case; NaN where undefined.

    Attributes:
        dice: 2 |A and B| / (|A| + |B|), 0 to 1.
        hd95_mm: 95th percentile of the distances between the surfaces, both ways.
        nsd: Normalised surface Dice: share of the surfaces within the tolerance, 0 to 1.
    """

    dice: float
    hd95_mm: float
    nsd: float


_NO_SCORES = Scores(math.nan, math.nan, math.nan)


def score_case(
    prediction: NDArray[np.uint8],
    label: NDArray[np.uint8],
    spacing_mm: tuple[float, float, float],
    classes: Sequence[str],
    nsd_tolerance_mm: float,
    surfaces: bool = True,
    unlabelled: Collection[str] = (),
) -> dict[str, Scores]:
    """Scores every class of a case.

    Args:
        prediction: (X, Y, Z) class indices, the i-th name at i + 1.
        label: The same of the label.
        spacing_mm: Voxel size along X, Y, Z.
        classes: Names in the order of their indices.
        nsd_tolerance_mm: Distance at which surfaces still count as equal.
        surfaces: Also compute HD95 and NSD; NaN otherwise.
        unlabelled: Classes that nobody looked for in this label; they have no score.

    Returns:
        Class name -> scores.
    """
    return {
        name: _NO_SCORES
        if name in unlabelled
        else _score(prediction == i, label == i, spacing_mm, nsd_tolerance_mm, surfaces)
        for i, name in enumerate(classes, 1)
    }


def _score(
    predicted: NDArray[np.bool_],
    true: NDArray[np.bool_],
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float,
    surfaces: bool,
) -> Scores:
    if not predicted.any() and not true.any():
        return _NO_SCORES
    dice = 2.0 * float((predicted & true).sum()) / float(predicted.sum() + true.sum())
    if not surfaces:
        return Scores(dice, math.nan, math.nan)
    if not predicted.any() or not true.any():
        diagonal = math.dist((0, 0, 0), np.multiply(true.shape, spacing_mm))
        return Scores(dice, diagonal, 0.0)
    box = _box(predicted | true)
    pair = [torch.from_numpy(m[box].astype(np.float32))[None, None] for m in (predicted, true)]
    with warnings.catch_warnings():  # MONAI warns of its own deprecated call
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = compute_hausdorff_distance(*pair, percentile=95, spacing=spacing_mm)
        nsd = compute_surface_dice(*pair, [tolerance_mm], spacing=spacing_mm)
    return Scores(dice, float(hd95), float(nsd))


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    bounds = []
    for axis in range(mask.ndim):
        hits = np.flatnonzero(mask.any(tuple(a for a in range(mask.ndim) if a != axis)))
        bounds.append(slice(max(int(hits[0]) - _MARGIN, 0), int(hits[-1]) + 1 + _MARGIN))
    return tuple(bounds)


def mean(values: Sequence[float]) -> float | None:
    """Mean of the defined values; None when there are none."""
    defined = [v for v in values if not math.isnan(v)]
    return sum(defined) / len(defined) if defined else None


def case_mean(scores: Mapping[str, Scores], metric: str) -> float:
    """Mean of one metric over the classes of a case that are defined; NaN when none is."""
    value = mean([getattr(s, metric) for s in scores.values()])
    return math.nan if value is None else value
