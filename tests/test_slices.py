"""Prepared cases, the cache, draws and windows: what training sees of a volume."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference
from torch import Tensor

from samaritan.config import DataConfig
from samaritan.data import slices as slices_module
from samaritan.data.datasets import Case
from samaritan.data.slices import (
    CaseCache,
    _pad,
    batches,
    class_indices,
    draw_order,
    num_steps,
    prepare_case,
    with_context,
)
from samaritan.errors import DataError

MakeCase = Callable[..., Case]
CLASSES = {"box": 1}


@pytest.fixture
def make_case(write_pair: Callable[..., tuple[Path, Path]]) -> MakeCase:
    """A case on disk; the keywords are those of ``write_pair``."""

    def make(name: str = "case", **volume: Any) -> Case:
        image, label = write_pair(name, **volume)
        return Case(name, image, label, "site", name, "train")

    return make


def make_cache(size: tuple[int, int] = (16, 16), **data: Any) -> CaseCache:
    section = DataConfig(**{"slice_axis": "axial", "pixel_mm": 1.0, **data})
    return CaseCache(section, CLASSES, size)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(
    cache: CaseCache, cases: Sequence[Case], *, steps: int = 1, size: int = 8,
    foreground: float = 0.5, seed: int = 0,
) -> list[tuple[Tensor, Tensor, list[int]]]:  # fmt: skip
    return list(
        batches(
            cache, cases, steps=steps, batch_size=size, foreground_fraction=foreground,
            generator=generator(seed),
        )
    )  # fmt: skip


# Labels.


def test_label_values_become_indices_in_the_order_of_the_classes() -> None:
    values = np.array([[0, 7], [300, 2]], dtype=np.int16)
    indices = class_indices(values, {"b": 300, "a": 2, "c": 7}, "one")
    assert indices.tolist() == [[0, 3], [1, 2]]
    assert indices.dtype == np.uint8


@pytest.mark.parametrize("unknown", [3, 255, -1])
def test_a_value_of_no_class_is_refused(unknown: int) -> None:
    with pytest.raises(DataError, match=r"one.*1.*2") as caught:
        class_indices(np.array([0, 1, unknown]), {"a": 1, "b": 2}, "one")
    assert caught.value.code == "SAM-D114"
    assert str(unknown) in caught.value.message


# Preparing.


def test_a_prepared_case(make_case: MakeCase) -> None:
    case = make_case(shape=(10, 12, 7))
    prepared = prepare_case(case, make_cache().data, CLASSES, (16, 16))
    assert prepared.image.shape == prepared.label.shape == (7, 12, 10)
    assert (prepared.image.dtype, prepared.label.dtype) == (torch.float16, torch.uint8)
    assert (float(prepared.image.min()), float(prepared.image.max())) == (0, 1)
    assert prepared.foreground.tolist() == [2, 3]
    assert prepared.size_bytes == sum(
        t.numel() * t.element_size() for t in (prepared.image, prepared.label)
    )


def test_a_case_without_a_label_is_prepared_but_not_trained_on(make_case: MakeCase) -> None:
    case = replace(make_case(), label=None)
    cache = make_cache()
    assert cache.get(case).label is None
    with pytest.raises(DataError) as caught:
        draw(cache, [case])
    assert caught.value.code == "SAM-D116"


# The cache.


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the cases that were read, in order."""
    reads: list[str] = []

    def prepare(case: Case, *rest: Any) -> Any:
        reads.append(case.case_id)
        return prepare_case(case, *rest)

    monkeypatch.setattr(slices_module, "prepare_case", prepare)
    return reads


def test_the_cache_reads_a_case_once(make_case: MakeCase, counted: list[str]) -> None:
    cache, cases = make_cache(), [make_case(name) for name in "abc"]
    for case in cases * 3:
        assert cache.get(case).case == case
    assert counted == list("abc")


def test_the_cache_stays_within_its_budget(make_case: MakeCase, counted: list[str]) -> None:
    cache, cases = make_cache(), [make_case(name) for name in "abcd"]
    one = prepare_case(cases[0], cache.data, CLASSES, (16, 16)).size_bytes
    cache.budget_bytes = 2 * one + 1
    first = cache.get(cases[0])
    for case in (cases[1], cases[0], cases[2], cases[0], cases[3], cases[1]):
        cache.get(case)
        assert cache._bytes == sum(p.size_bytes for p in cache._held.values())
        assert cache._bytes <= cache.budget_bytes
    assert counted == ["a", "b", "c", "d", "b"], "the longest unused goes first"
    assert torch.equal(cache.get(cases[0]).image, first.image)


def test_a_case_larger_than_the_budget_is_still_held(
    make_case: MakeCase, counted: list[str]
) -> None:
    cache, cases = make_cache(), [make_case(name) for name in "ab"]
    cache.budget_bytes = 1
    for case in (cases[0], cases[0], cases[1], cases[1]):
        cache.get(case)
        assert len(cache._held) == 1
    assert counted == ["a", "b"]
    assert cache.group_size(cases) == 1


def test_two_labels_of_one_image_are_two_cases(make_case: MakeCase) -> None:
    one = make_case("a")
    empty = make_case("b", label=np.zeros((8, 9, 7), np.uint8))
    other = replace(one, case_id="second rater", label=empty.label)
    cache = make_cache()
    assert cache.get(one).label.any()
    assert not cache.get(other).label.any()


def test_a_group_fits_in_half_the_budget(make_case: MakeCase) -> None:
    cache, cases = make_cache(), [make_case(name) for name in "ab"]
    cache.budget_bytes = 6 * cache.get(cases[0]).size_bytes
    assert cache.group_size(cases) == 3
    assert cache.group_size([]) == 1


# The order of draws.


@given(st.integers(1, 30), st.integers(1, 100), st.integers(1, 40), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_case_is_drawn_equally_often_in_groups(
    cases: int, draws: int, group: int, seed: int
) -> None:
    order = draw_order(cases, draws, group, generator(seed))
    counts = Counter(order)
    assert len(order) == draws
    assert max(counts.values()) - min(counts[i] for i in range(cases)) <= 1
    # A group, once left, does not come back: its cases are read once.
    first = {case: order.index(case) for case in counts}
    last = {case: draws - 1 - order[::-1].index(case) for case in counts}
    by_first = sorted(counts, key=first.__getitem__)
    for start in range(0, len(by_first), group):
        members, later = by_first[start : start + group], by_first[start + group :]
        assert max(last[m] for m in members) < min((first[m] for m in later), default=draws)


def test_the_order_is_the_generators() -> None:
    orders = [tuple(draw_order(9, 20, 4, generator(seed))) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_who_is_drawn_once_more_changes() -> None:
    extra = {Counter(draw_order(5, 6, 2, generator(s))).most_common(1)[0][0] for s in range(40)}
    assert extra == set(range(5))


def test_steps_cover_the_slices_asked_for() -> None:
    assert num_steps(10, 8, 16) == 5
    assert num_steps(3, 1, 16) == 1
    assert num_steps(7, 3, 4) == 6
    assert num_steps(3, 0.1, 1) == 1


# Batches.


def test_batches_have_the_shape_they_promise(make_case: MakeCase) -> None:
    cache, cases = make_cache((16, 12), context_slices=5), [make_case(name) for name in "ab"]
    drawn = draw(cache, cases, steps=3, size=4)
    assert len(drawn) == 3
    for images, labels, axes in drawn:
        assert (images.shape, images.dtype) == ((4, 5, 16, 12), torch.float32)
        assert (labels.shape, labels.dtype) == ((4, 16, 12), torch.int64)
        assert axes == [2] * 4


def test_a_batch_says_which_way_each_record_was_cut(make_case: MakeCase) -> None:
    thick = [make_case(name, affine=np.diag(d)) for name, d in
             (("x", [4, 1, 1, 1]), ("z", [1, 1, 4, 1]))]  # fmt: skip
    cache = make_cache((40, 40), slice_axis="auto")
    (_, _, axes), *_ = draw(cache, thick, size=4)
    assert sorted(axes) == [0, 0, 2, 2]


def test_batches_are_the_generators(make_case: MakeCase) -> None:
    cases = [make_case(name, shape=(20, 21, 7)) for name in "abc"]
    one, same, other = (draw(make_cache(), cases, steps=3, seed=seed) for seed in (1, 1, 2))
    for a, b in zip(one, same, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    assert not all(torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


def test_the_middle_channel_is_the_labelled_slice(make_case: MakeCase) -> None:
    label = (np.random.default_rng(1).random((16, 16, 9)) > 0.5).astype(np.uint8)
    case = make_case(image=label.astype(np.float32), label=label)
    for context in (1, 3, 5):
        cache = make_cache(context_slices=context)
        ((images, labels, _),) = draw(cache, [case], size=40)
        assert torch.equal(images[:, context // 2], labels.float())
        if context > 1:
            assert not torch.equal(images[:, 0], labels.float())


def test_edge_slices_are_repeated_as_context() -> None:
    image = torch.arange(4.0)[:, None, None].expand(4, 2, 3)
    drawn = with_context(image, torch.tensor([0, 2, 3]), 5)
    assert drawn.shape == (3, 5, 2, 3)
    assert drawn[:, :, 0, 0].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 3], [1, 2, 3, 3, 3]]


@pytest.mark.parametrize(
    ("fraction", "low", "high"), [(1.0, 1, 1), (0.0, 0.1, 0.3), (0.5, 0.5, 0.7)]
)
def test_the_share_of_foreground_slices(
    make_case: MakeCase, fraction: float, low: float, high: float
) -> None:
    label = np.zeros((8, 9, 20), np.uint8)
    label[3:5, 3:5, 4:8] = 1  # a fifth of the slices
    case = make_case(shape=label.shape, label=label)
    ((_, labels, _),) = draw(make_cache(), [case], size=300, foreground=fraction)
    assert low <= labels.flatten(1).any(1).float().mean() <= high


def test_a_case_without_structures_is_drawn_too(make_case: MakeCase) -> None:
    case = make_case(label=np.zeros((8, 9, 7), np.uint8))
    ((_, labels, _),) = draw(make_cache(), [case], foreground=1.0)
    assert not labels.any()


@pytest.mark.parametrize("where", [(0, 0), (39, 29), (20, 3)])
@pytest.mark.parametrize("size", [(16, 16), (64, 8), (8, 64)])
def test_windows_of_larger_planes_hold_the_structure(
    make_case: MakeCase, where: tuple[int, int], size: tuple[int, int]
) -> None:
    label = np.zeros((40, 30, 4), np.uint8)
    label[(*where, slice(None))] = 1
    case = make_case(image=1 - label.astype(np.float32), label=label)
    cache = make_cache(size, context_slices=1)
    ((images, labels, _),) = draw(cache, [case], size=30, foreground=1.0)
    assert labels.shape == (30, *size)
    assert labels.flatten(1).sum(1).tolist() == [1] * 30
    assert not images[:, 0][labels == 1].any(), "image and label share the window"
    if where == (20, 3) and size == (16, 16):
        assert len({tuple(t.nonzero()[0].tolist()) for t in labels}) > 10, "anywhere in it"


def test_windows_reach_every_corner(make_case: MakeCase) -> None:
    ramp = np.arange(40 * 30, dtype=np.float32).reshape(40, 30)[..., None].repeat(2, 2)
    case = make_case(image=ramp, label=np.zeros(ramp.shape, np.uint8))
    cache = make_cache((28, 38), context_slices=1)  # rows are y
    whole = cache.get(case).image[0].float()
    ((images, _, _),) = draw(cache, [case], size=100)
    corners = {float(image[0, 0, 0]) for image in images}
    assert corners == {float(whole[row, column]) for row in range(3) for column in range(3)}


# Padding.


@pytest.mark.parametrize("plane", [(5, 7), (8, 7), (7, 10), (4, 9), (3, 12), (11, 2), (8, 10)])
def test_planes_are_padded_as_the_sliding_window_pads_them(plane: tuple[int, int]) -> None:
    """So that a structure lies at the same place of the input in training and in prediction."""
    size = (8, 10)
    image = torch.rand((1, 2, *plane), generator=generator())
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    run = functools.partial(sliding_window_inference, sw_batch_size=9, overlap=0.25)
    assert torch.equal(run(image, size, predictor=look), image)
    padded = _pad(image, size)
    if plane[0] <= size[0] and plane[1] <= size[1]:
        assert torch.equal(torch.cat(seen), padded)
    else:
        assert any(torch.equal(w, padded[0, :, : size[0], : size[1]]) for w in torch.cat(seen))
