"""From a model to label maps: windows, mirrored views, orientation."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from samaritan.config import DataConfig, EvaluationConfig
from samaritan.data.datasets import Case
from samaritan.data.slices import CaseCache, batches
from samaritan.errors import DataError
from samaritan.training.augment import BODY_AXES
from samaritan.training.evaluate import (
    evaluate_cases,
    mean_dice,
    predict_indices,
    to_label_values,
    true_indices,
)

CLASSES = {"low": 5, "high": 2}
PLANES = ("sagittal", "coronal", "axial")
FLIPS = tuple(BODY_AXES)


class Threshold(nn.Module):
    """Sees class 1 in grey and class 2 in white, on the middle of its channels."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(images)
        grey = images[:, images.shape[1] // 2]
        return 20 * torch.stack([0.25 - grey, 0.2 - (grey - 0.5).abs(), grey - 0.75], 1)


@pytest.fixture
def volume() -> np.ndarray:
    """(24, 29, 20) values 0, 0.5 and 1 in lumps without any symmetry."""
    noise = ndimage.gaussian_filter(np.random.default_rng(4).normal(size=(24, 29, 20)), 2)
    return (np.digitize(noise, np.quantile(noise, [0.5, 0.8])) / 2).astype(np.float32)


@pytest.fixture
def make_case(
    write_pair: Callable[..., tuple[Path, Path]], volume: np.ndarray
) -> Callable[..., Case]:
    """A case whose label is what `Threshold` should find."""

    def make(name: str = "one", **options: Any) -> Case:
        values = np.array([0, 5, 2], np.uint8)[(2 * volume).astype(int)]
        image, label = write_pair(name, image=volume, label=values, **options)
        return Case(name, image, label, "site", name, "val")

    return make


def make_cache(size: tuple[int, int] = (16, 12), **data: Any) -> CaseCache:
    return CaseCache(DataConfig(**{"pixel_mm": 1.0, **data}), CLASSES, size)


@pytest.mark.parametrize("flip", [(), FLIPS], ids=["plain", "mirrored"])
@pytest.mark.parametrize("size", [(16, 12), (12, 40), (40, 40)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("plane", PLANES)
def test_every_voxel_comes_back_to_its_place(
    make_case: Callable[..., Case], volume: np.ndarray, plane: str, size: tuple[int, int],
    flip: tuple[Any, ...],
) -> None:  # fmt: skip
    cache = make_cache(size, slice_axis=plane)
    prepared = cache.get(make_case())
    found = predict_indices(Threshold(), prepared, cache, EvaluationConfig(flip=flip))
    assert found.dtype == np.uint8
    assert np.array_equal(found, (2 * volume).astype(np.uint8))


def test_volumes_of_many_slices_are_put_together(
    write_pair: Callable[..., tuple[Path, Path]],
) -> None:
    image = (np.random.default_rng(1).random((9, 8, 65)) > 0.6).astype(np.float32)
    paths = write_pair("long", image=image, label=image.astype(np.uint8) * 2)
    cache = make_cache(slice_axis="axial")
    prepared = cache.get(Case("long", *paths, "site", "long", "val"))
    found = predict_indices(Threshold(), prepared, cache, EvaluationConfig())
    assert np.array_equal(found, image.astype(np.uint8) * 2)


def test_each_mirrored_view_is_seen_and_undone(make_case: Callable[..., Case]) -> None:
    cache = make_cache((40, 40), slice_axis="axial")
    model = Threshold()
    predict_indices(model, cache.get(make_case()), cache, EvaluationConfig(flip=FLIPS))
    plain, *mirrored = model.seen
    for view, dim in zip(mirrored, (3, 2, 1), strict=True):
        content = [t[..., 5:34, 8:32] for t in (plain, view)]  # as the input is padded
        assert content[0].sum() == pytest.approx(plain.sum())
        assert torch.equal(content[1], content[0].flip(dim))


def test_views_are_averaged(make_case: Callable[..., Case]) -> None:
    class LeftHalf(Threshold):
        def forward(self, images: Tensor) -> Tensor:
            left = (torch.arange(images.shape[-1]) < images.shape[-1] / 2).float()
            mark = 4 * left.expand(images.shape[0], *images.shape[-2:]) - 2.1
            return torch.stack([-mark, mark, 0 * mark - 9], 1)

    cache = make_cache((40, 40), slice_axis="axial")
    prepared = cache.get(make_case())
    plain = predict_indices(LeftHalf(), prepared, cache, EvaluationConfig())
    both = EvaluationConfig(flip=("left-right",))
    mirrored = predict_indices(LeftHalf(), prepared, cache, both)
    assert plain[:12].all()
    assert not plain[12:].any()
    assert not mirrored.any(), "sure of nothing on one side, a little less sure on the other"


def test_training_and_prediction_see_a_slice_at_the_same_place(
    make_case: Callable[..., Case],
) -> None:
    cache = make_cache((41, 50), slice_axis="coronal")
    case, model = make_case(), Threshold()
    predict_indices(model, cache.get(case), cache, EvaluationConfig())
    predicted = {image.numpy().tobytes() for image in torch.cat(model.seen)}
    drawn = batches(
        cache, [case], steps=5, batch_size=8, foreground_fraction=0.5,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    trained = {image.numpy().tobytes() for images, _, _ in drawn for image in images}
    assert len(trained) > 10
    assert trained <= predicted


# Scores.


@pytest.mark.parametrize("stored", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
@pytest.mark.parametrize("plane", PLANES)
def test_a_perfect_model_scores_one_however_the_file_is_stored(
    make_case: Callable[..., Case], plane: str, stored: tuple[int, int, int]
) -> None:
    case = make_case(affine=np.diag([*stored, 1.0]))
    cache = make_cache(slice_axis=plane)
    (result,) = evaluate_cases(Threshold(), cache, [case], EvaluationConfig(), surfaces=True)
    assert list(result.scores) == ["low", "high"]
    for scores in result.scores.values():
        assert (scores.dice, scores.hd95_mm, scores.nsd) == (1, 0, 1)
    assert mean_dice([result]) == result.dice == 1


def test_scores_use_the_spacing_of_the_volume(
    write_pair: Callable[..., tuple[Path, Path]],
) -> None:
    image, label = np.zeros((2, 20, 20, 12), np.float32)
    image[6:12, 5:11, 3:9] = 1
    label[6:12, 5:11, 5:11] = 2
    paths = write_pair("one", image=image, label=label.astype(np.uint8),
                       affine=np.diag([-1, 1, 2.5, 1.0]))  # fmt: skip
    cache = make_cache(slice_axis="axial")
    case = Case("one", *paths, "site", "one", "val")
    (result,) = evaluate_cases(Threshold(), cache, [case], EvaluationConfig(), surfaces=True)
    assert result.scores["high"].hd95_mm == pytest.approx(5.0)
    assert result.scores["high"].dice == pytest.approx(4 / 6)
    assert math.isnan(result.scores["low"].dice)
    assert result.dice == result.scores["high"].dice


def test_predictions_are_told_with_their_scores(make_case: Callable[..., Case]) -> None:
    cache, told = make_cache(), []
    cases = [make_case("one"), make_case("two")]
    results = evaluate_cases(
        Threshold(), cache, cases, EvaluationConfig(), on_case=lambda *args: told.append(args)
    )
    assert [scores for _, _, scores in told] == results
    assert [prepared.case for prepared, _, _ in told] == cases
    for prepared, prediction, _ in told:
        assert np.array_equal(prediction, true_indices(prepared, cache))


def test_a_case_without_a_label_cannot_be_scored(make_case: Callable[..., Case]) -> None:
    case = replace(make_case(), label=None)
    with pytest.raises(DataError) as caught:
        evaluate_cases(Threshold(), make_cache(), [case], EvaluationConfig())
    assert caught.value.code == "SAM-D116"


def test_indices_become_label_values_again() -> None:
    values = to_label_values(np.array([[0, 1], [2, 1]], np.uint8), CLASSES)
    assert values.tolist() == [[0, 5], [2, 5]]


def test_the_mean_over_nothing_is_none() -> None:
    assert mean_dice([]) is None
