"""3-D scores against hand-made truths."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage
from scipy.spatial.distance import cdist

from samaritan.training.metrics import Scores, case_mean, mean, score_case

SPACING = (0.7, 1.5, 3.0)


def cube(*corner: int, side: int = 8, shape: tuple[int, int, int] = (24, 22, 20)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(c, c + side) for c in corner)] = 1
    return mask


def score(prediction: np.ndarray, label: np.ndarray, tolerance: float = 1.0) -> Scores:
    return score_case(prediction, label, SPACING, ["one"], tolerance)["one"]


def blob(seed: int, shape: tuple[int, int, int] = (17, 13, 11)) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=shape)
    return (ndimage.gaussian_filter(noise, 1.5) > 0.05).astype(np.uint8)


def surface_mm(mask: np.ndarray) -> np.ndarray:
    """Points of the voxels with a face to the outside."""
    return np.argwhere(mask.astype(bool) & ~ndimage.binary_erosion(mask)) * SPACING


@pytest.mark.parametrize(("axis", "hd95_mm"), [(0, 1.4), (1, 3.0), (2, 6.0)])
def test_a_shifted_cube(axis: int, hd95_mm: float) -> None:
    corner = [6, 6, 6]
    corner[axis] += 2
    scores = score(cube(*corner), cube(6, 6, 6))
    assert scores.dice == 0.75
    assert scores.hd95_mm == pytest.approx(hd95_mm)
    back = score(cube(6, 6, 6), cube(*corner))
    assert (back.dice, back.hd95_mm, back.nsd) == (scores.dice, scores.hd95_mm, scores.nsd)


def test_nsd_counts_what_lies_within_the_tolerance() -> None:
    shifted, true = cube(8, 6, 6), cube(6, 6, 6)
    # 296 surface voxels each; those in place: two ends of the overlap less, the side faces stay.
    distances = cdist(surface_mm(shifted), surface_mm(true))
    assert distances.shape == (296, 296)
    for tolerance in (0.01, 0.71, 1.39, 1.41):
        near = [int((distances.min(i) <= tolerance).sum()) for i in (0, 1)]
        assert score(shifted, true, tolerance).nsd == pytest.approx(sum(near) / 592)
    assert score(shifted, true, 1.41).nsd == 1
    assert score(shifted, true, 1.39).nsd < 1


@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_brute_force(seed: int) -> None:
    prediction, true = blob(seed), blob(seed + 10)
    scores = score(prediction, true, 1.6)
    distances = cdist(surface_mm(prediction), surface_mm(true))
    to_true, to_prediction = distances.min(1), distances.min(0)
    assert scores.dice == pytest.approx(
        2 * (prediction & true).sum() / (prediction.sum() + true.sum())
    )
    assert scores.hd95_mm == pytest.approx(
        max(np.percentile(to_true, 95), np.percentile(to_prediction, 95)), rel=1e-5
    )
    near = (to_true <= 1.6).sum() + (to_prediction <= 1.6).sum()
    assert scores.nsd == pytest.approx(near / sum(distances.shape), rel=1e-5)


def test_a_perfect_prediction() -> None:
    assert score(cube(0, 0, 0), cube(0, 0, 0)) == Scores(1.0, 0.0, 1.0)


@pytest.mark.parametrize("corners", [((6, 7, 5), (8, 6, 7)), ((0, 0, 0), (2, 1, 0)),
                                     ((16, 14, 12), (0, 1, 12))])  # fmt: skip
def test_cropping_does_not_change_values(corners: tuple[tuple[int, ...], ...]) -> None:
    prediction, true = (cube(*c) for c in corners)
    scores = score(prediction, true, 1.2)
    pair = [torch.from_numpy(m).float()[None, None] for m in (prediction, true)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        hd95 = compute_hausdorff_distance(*pair, percentile=95, spacing=SPACING)
        nsd = compute_surface_dice(*pair, [1.2], spacing=SPACING)
    assert scores.hd95_mm == float(hd95)
    assert scores.nsd == float(nsd)


def test_scores_do_not_depend_on_the_field_of_view() -> None:
    one, other = cube(1, 1, 1, shape=(12, 12, 12)), cube(2, 1, 1, shape=(12, 12, 12))
    wide = [np.pad(mask, ((9, 30), (0, 17), (21, 4))) for mask in (one, other)]
    assert score(one, other) == score(wide[0], wide[1])


def test_absent_from_both_is_undefined() -> None:
    empty = np.zeros((4, 5, 6), np.uint8)
    assert all(math.isnan(v) for v in vars(score(empty, empty)).values())


def test_absent_from_one_is_the_worst() -> None:
    true = cube(6, 6, 6)
    diagonal = math.hypot(24 * 0.7, 22 * 1.5, 20 * 3.0)
    for pair in ((true, 0 * true), (0 * true, true)):
        assert score(*pair) == Scores(0.0, pytest.approx(diagonal), 0.0)


def test_without_surfaces_only_dice_is_computed() -> None:
    true = cube(6, 6, 6)
    for prediction, dice in ((cube(8, 6, 6), 0.75), (0 * true, 0.0)):
        scores = score_case(prediction, true, SPACING, ["one"], 1.0, surfaces=False)["one"]
        assert scores.dice == dice
        assert math.isnan(scores.hd95_mm)
        assert math.isnan(scores.nsd)


def test_classes_are_scored_apart_by_their_index() -> None:
    label = cube(2, 2, 2) + 3 * cube(12, 12, 11)
    prediction = cube(2, 2, 2) + 3 * cube(12, 14, 11)
    scores = score_case(prediction, label, SPACING, ["a", "b", "c"], 1.0)
    assert list(scores) == ["a", "b", "c"]
    assert (scores["a"].dice, scores["c"].dice) == (1.0, 0.75)
    assert math.isnan(scores["b"].dice)
    assert case_mean(scores, "dice") == 0.875


def test_means_leave_out_what_is_undefined() -> None:
    assert mean([1.0, math.nan, 0.0]) == 0.5
    assert mean([math.nan]) is None
    assert mean([]) is None
    undefined = Scores(math.nan, math.nan, math.nan)
    assert math.isnan(case_mean({"a": undefined}, "dice"))
