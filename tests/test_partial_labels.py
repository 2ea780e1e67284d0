"""Sites with label maps of their own, and with only some of the organs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from monai.losses import DiceLoss
from torch import Tensor
from torch.nn import functional as F

from samaritan.config import Config, DataConfig, EvaluationConfig, parse_config
from samaritan.data.checks import check_dataset
from samaritan.data.datasets import Case, read_dataset
from samaritan.data.label_maps import labelled_classes
from samaritan.data.phantoms import write_phantoms
from samaritan.data.slices import CaseCache, batches
from samaritan.errors import ConfigError, DataError
from samaritan.models.adapter import read_adapter
from samaritan.models.class_tensors import counts
from samaritan.models.sam2 import FAMILY as SAM2
from samaritan.models.sam2 import Sam2Shape
from samaritan.models.sam2 import construct as construct_sam2
from samaritan.models.segmenter import Segmenter
from samaritan.report.summary import case_entries, final_scores, nnunet_summary
from samaritan.training.evaluate import score_prediction, true_indices
from samaritan.training.local import Schedule, train_locally
from samaritan.training.losses import _SMOOTH, SegmentationLoss, marginal
from samaritan.training.prompts import draw_prompts
from simulation.run import simulate
from simulation.study import Study, check_study, read_study
from strategies.fedavg import fedavg
from strategies.update import Situation, Update

CLASSES = {"liver": 1, "kidney": 2}
MAPS = {"site_01": {"liver": 7}, "site_02": {"kidney": 1, "liver": 3}}
DATA: dict[str, Any] = {"classes": CLASSES, "site_classes": MAPS, "slice_axis": "axial"}
WRITTEN = {"site_01": [0, 7, 0, 0], "site_02": [0, 3, 1, 0]}
"""What each site's files hold where a phantom has background, liver, kidney and vessel."""


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantoms as they are made, with all structures."""
    return write_phantoms(tmp_path_factory.mktemp("whole"), 2, 3, seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same phantoms, labelled as the sites of `MAPS` would."""
    root = write_phantoms(tmp_path_factory.mktemp("partial"), 2, 3, seed=3)
    for case in read_dataset(root).cases:
        assert case.label is not None
        file = nib.load(case.label)
        values = np.array(WRITTEN[case.site], np.uint8)[np.asarray(file.dataobj)]
        nib.save(nib.Nifti1Image(values, file.affine), case.label)
    return root


@pytest.fixture
def cases(folder: Path) -> dict[str, list[Case]]:
    found = read_dataset(folder).cases
    return {site: [case for case in found if case.site == site] for site in MAPS}


def make_cache(size: tuple[int, int] = (32, 32), **data: Any) -> CaseCache:
    section = DataConfig(**{**DATA, **data})
    return CaseCache(section, section.classes or {}, size)


def draws(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# The loss.


def partial_labels(unlabelled: set[int], classes: int, *shape: int) -> Tensor:
    drawn = draws(*shape, seed=1).mul(2).abs().long().clamp(max=classes)
    for index in unlabelled:
        drawn[drawn == index] = 0
    return drawn


@pytest.mark.parametrize("unlabelled", [{2}, {1}, {1, 3}, {3}])
def test_the_loss_is_the_marginal_loss_written_out(unlabelled: set[int]) -> None:
    logits, labels = draws(2, 4, 6, 5), partial_labels(unlabelled, 3, 2, 6, 5)
    labelled = [c for c in (1, 2, 3) if c not in unlabelled]
    shares = logits.softmax(1)
    background = shares[:, [0, *unlabelled]].sum(1)
    of = {0: background} | {c: shares[:, c] for c in labelled}
    entropy = -torch.stack([(labels == c) * of[c].log() for c in of]).sum(0).mean()
    dice = torch.stack([
        1 - (2 * (of[c] * (labels == c)).sum((1, 2)) + _SMOOTH)
        / (of[c].sum((1, 2)) + (labels == c).sum((1, 2)) + _SMOOTH)
        for c in labelled
    ]).mean()  # fmt: skip
    for weight in (0.0, 0.8, 1.0):
        expected = weight * dice + (1 - weight) * entropy
        found = SegmentationLoss(weight, unlabelled)(logits, labels)
        assert found.item() == pytest.approx(expected.item(), rel=1e-9)


def test_the_gradient_is_that_of_finite_differences() -> None:
    logits, labels = draws(2, 4, 3, 3).requires_grad_(), partial_labels({1, 3}, 3, 2, 3, 3)
    loss = SegmentationLoss(0.8, {1, 3})
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), (logits,))


def test_background_shares_its_gradient_with_what_is_not_labelled() -> None:
    logits = draws(1, 4, 1, 1).requires_grad_()
    SegmentationLoss(0.0, {2})(logits, torch.zeros(1, 1, 1).long()).backward()
    shares = logits.detach().softmax(1)[0, :, 0, 0]
    among = torch.tensor([1.0, 0, 1, 0]) * shares / (shares[0] + shares[2])
    assert logits.grad is not None
    assert torch.allclose(logits.grad[0, :, 0, 0], shares - among)


def test_with_all_classes_labelled_nothing_changes() -> None:
    logits, labels = draws(3, 4, 8, 8).float(), partial_labels(set(), 3, 3, 8, 8)
    gradients = []
    for unlabelled in (None, frozenset[int]()):
        leaf = logits.clone().requires_grad_()
        if unlabelled is None:  # as it was before there were partial labels
            term = DiceLoss(include_background=False, to_onehot_y=True, softmax=True,
                            smooth_nr=_SMOOTH, smooth_dr=_SMOOTH)  # fmt: skip
            loss = 0.8 * term(leaf, labels[:, None]) + (1 - 0.8) * F.cross_entropy(leaf, labels)
        else:
            loss = SegmentationLoss(0.8, unlabelled)(leaf, labels)
        loss.backward()
        gradients += [loss.detach(), leaf.grad]
    assert torch.equal(gradients[0], gradients[2])
    assert torch.equal(gradients[1], gradients[3])


def test_each_record_counts_by_itself() -> None:
    logits, labels = draws(3, 4, 8, 8), partial_labels({2}, 3, 3, 8, 8)
    labels[1] = 0
    loss = SegmentationLoss(0.8, {2})
    alone = torch.stack([loss(i[None], t[None]) for i, t in zip(logits, labels, strict=True)])
    assert loss(logits, labels).item() == pytest.approx(alone.mean().item(), rel=1e-9)


def test_finding_what_nobody_labelled_costs_nothing() -> None:
    labels = torch.zeros(1, 8, 8).long()
    found = torch.zeros(1, 8, 8).long()
    found[:, :4] = 2
    logits = 60 * F.one_hot(found, 3).permute(0, 3, 1, 2).float()
    assert SegmentationLoss(0.8, {2})(logits, labels) < 1e-6
    assert SegmentationLoss(0.8)(logits, labels) > 3
    assert SegmentationLoss(0.8, {1})(logits, labels) > 3


def test_large_logits_stay_finite() -> None:
    logits = (1e4 * draws(1, 4, 4, 4).float()).requires_grad_()
    loss = SegmentationLoss(0.8, {1, 3})(logits, partial_labels({1, 3}, 3, 1, 4, 4))
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_merged_probabilities_sum_to_one() -> None:
    merged, labels = marginal(draws(1, 5, 2, 2), torch.tensor([[[0, 2], [4, 2]]]), {1, 3})
    assert merged.shape == (1, 3, 2, 2)
    assert torch.allclose(merged.exp().sum(1), draws(1, 5, 2, 2).exp().sum(1))
    assert labels.tolist() == [[[0, 1], [2, 1]]]


# Data.


def test_a_case_is_read_by_the_map_of_its_own_site(
    folder: Path, phantoms: Path, cases: dict[str, list[Case]]
) -> None:
    cache = make_cache()
    whole = CaseCache(DataConfig(slice_axis="axial"), {"a": 1, "b": 2, "c": 3}, (32, 32))
    originals = {case.case_id: case for case in read_dataset(phantoms).cases}
    meaning = {"site_01": [0, 1, 0, 0], "site_02": [0, 1, 2, 0]}
    for site, held in cases.items():
        for case in held:
            original = whole.get(originals[case.case_id])
            assert original.label is not None
            expected = torch.tensor(meaning[site], dtype=torch.uint8)[original.label.long()]
            prepared = cache.get(case)
            assert torch.equal(prepared.label, expected)  # type: ignore[arg-type]
            assert set(np.unique(expected)) == set(meaning[site])
            assert torch.equal(prepared.foreground, expected.flatten(1).any(1).nonzero()[:, 0])
            native = true_indices(prepared, cache)
            known = true_indices(whole.get(originals[case.case_id]), whole)
            assert np.array_equal(native, np.array(meaning[site], np.uint8)[known])


def test_one_file_means_two_things_at_two_sites(
    write_pair: Callable[..., tuple[Path, Path]],
) -> None:
    label = np.zeros((8, 9, 7), np.uint8)
    label[2:5, 2:6, 2:4] = 1
    image, path = write_pair("one", label=label)
    cache = make_cache(site_classes={"b": {"kidney": 1}})
    values = [
        int(cache.get(Case("one", image, path, site, "one", "train")).label.max())  # type: ignore[union-attr]
        for site in ("a", "b", "a")
    ]
    assert values == [1, 2, 1]


def test_batches_hold_indices_of_the_study(cases: dict[str, list[Case]]) -> None:
    for site, expected in (("site_01", {0, 1}), ("site_02", {0, 1, 2})):
        drawn = batches(
            make_cache(), cases[site], steps=4, batch_size=8, foreground_fraction=1.0,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert {v for _, labels, _ in drawn for v in np.unique(labels).tolist()} == expected


def study_of(folder: Path, **data: Any) -> Study:
    return read_study(parse_config({"data": {**DATA, **data}}), folder)


def test_a_value_that_the_site_does_not_name_is_a_fault_of_the_case(
    folder: Path, cases: dict[str, list[Case]]
) -> None:
    check_study(study_of(folder), folder)
    assert not [f for f in check_dataset(read_dataset(folder)) if f.severity == "error"]
    narrow = {**MAPS, "site_02": {"liver": 3}}
    study = study_of(folder, site_classes=narrow | {"site_01": {"liver": 7, "kidney": 1}})
    with pytest.raises(DataError) as caught:
        check_study(study, folder)
    assert caught.value.code == "SAM-D114"
    assert caught.value.message.startswith(f"case {cases['site_02'][0].case_id}: ")
    assert "values 1," in caught.value.message
    assert "liver=3)" in caught.value.message
    assert "2 more" in caught.value.message, "the cases of the other site are well"
    with pytest.raises(DataError) as caught:
        make_cache(site_classes=narrow).get(cases["site_02"][1])
    assert caught.value.code == "SAM-D114"
    assert cases["site_02"][1].case_id in caught.value.message
    assert "[1]" in caught.value.message
    assert "{'liver': 3}" in caught.value.message


def test_the_study_says_what_each_site_labels(folder: Path) -> None:
    study = study_of(folder)
    assert study.labelled("site_01") == {1}
    assert study.labelled("site_02") == {1, 2}
    assert labelled_classes(study.config.data, "another", study.classes) == {1, 2}
    late = {"a": 1, "b": 2, "c": 3}
    section = DataConfig(classes=late, site_classes={"x": {"c": 1, "b": 9}})
    assert labelled_classes(section, "x", late) == {2, 3}


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        ({"classes": None}, "SAM-C223", "data.classes is not"),
        ({"site_classes": {"site_09": {"liver": 1}}}, "SAM-C224", "site_09: there is no such site"),
        ({"site_classes": {**MAPS, "site_01": {}}}, "SAM-C224", "site_01: labels nothing"),
        (
            {"site_classes": {**MAPS, "site_01": {"lung": 1}}},
            "SAM-C224", "site_01: lung is not in data.classes",
        ),
        (
            {"site_classes": {**MAPS, "site_02": {"liver": 3, "kidney": 3}}},
            "SAM-C224", "site_02: one label value has two meanings",
        ),
        (
            {"site_classes": {**MAPS, "site_01": {"liver": 0}}},
            "SAM-C224", "site_01: liver has label value 0",
        ),
        (
            {"site_classes": {"site_01": {"liver": 7}, "site_02": {"liver": 3}}},
            "SAM-C224", "no site that trains labels kidney",
        ),
        ({"held_out_sites": ["site_02"]}, "SAM-C224", "no site that trains labels kidney"),
    ],
)  # fmt: skip
def test_maps_that_cannot_be_meant_are_refused(
    folder: Path, data: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        study_of(folder, **data)
    assert caught.value.code == code
    assert words in caught.value.message


def test_all_faults_of_the_maps_come_at_once(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        study_of(folder, site_classes={"site_01": {"lung": 1}, "nowhere": {"liver": 1}})
    assert "lung" in caught.value.message
    assert "nowhere" in caught.value.message


def test_a_held_out_site_may_have_a_map(folder: Path) -> None:
    study = study_of(folder, held_out_sites=["site_01"])
    assert study.observers == ("site_01",)
    check_study(study, folder)


def test_sites_that_label_different_structures_are_not_trained_on_as_one(
    cases: dict[str, list[Case]],
) -> None:
    cache, both = make_cache(), cases["site_01"] + cases["site_02"]
    assert cache.unlabelled(cases["site_01"]) == {2}
    assert cache.unlabelled(cases["site_02"]) == set()
    with pytest.raises(ConfigError) as caught:
        cache.unlabelled(both)
    assert caught.value.code == "SAM-C225"
    renamed = make_cache(site_classes={"site_01": {"liver": 7, "kidney": 9}})
    assert renamed.unlabelled(both) == set(), "other values alone do no harm"


# Prompts.


def test_a_structure_without_a_label_gives_no_prompt(cases: dict[str, list[Case]]) -> None:
    prompted = {}
    for site, held in cases.items():
        generator = torch.Generator().manual_seed(0)
        ((_, labels, _),) = batches(
            make_cache(), held, steps=1, batch_size=32, foreground_fraction=1.0,
            generator=generator,
        )  # fmt: skip
        prompts = draw_prompts(labels, "point", generator)
        assert prompts is not None
        prompted[site] = [bool((column == 1).any()) for column in prompts.labels.T]
    assert prompted == {"site_01": [True], "site_02": [True, True]}


# Scores.


@pytest.fixture
def scored(cases: dict[str, list[Case]]) -> tuple[CaseCache, list[Any]]:
    """Perfect predictions, but of every kidney at the site that does not label it.

    At the other site one prediction is empty.
    """
    cache, results = make_cache(), []
    for case in (cases["site_01"][0], *cases["site_02"][:2]):
        prepared = cache.get(case)
        prediction = true_indices(prepared, cache).copy()
        if case.site == "site_01":
            prediction[prediction == 0] = 2
        if case is cases["site_02"][1]:
            prediction[:] = 0
        results.append(score_prediction(prediction, prepared, cache, EvaluationConfig(), True))
    return cache, results


def test_only_labelled_structures_have_scores(scored: tuple[CaseCache, list[Any]]) -> None:
    _, results = scored
    liver, kidney = (results[0].scores[name] for name in CLASSES)
    assert (liver.dice, liver.hd95_mm, liver.nsd) == (1, 0, 1)
    assert all(math.isnan(v) for v in (kidney.dice, kidney.hd95_mm, kidney.nsd))
    assert results[0].dice == 1
    assert results[2].scores["kidney"].dice == 0, "missed, not unlabelled"
    final = final_scores(results, list(CLASSES), EvaluationConfig())
    assert final["dice_per_class"] == {"liver": pytest.approx(2 / 3), "kidney": 0.5}
    assert final["dice_mean"] == pytest.approx(2 / 3)
    assert final["dice_per_site"] == {"site_01": 1, "site_02": 0.5}
    assert final["nsd_mean"] == pytest.approx(2 / 3)
    assert (final["cases"], final["excluded_cases"]) == (3, 0)
    assert final["unlabelled"] == {"site_01": ["kidney"]}


def test_the_files_show_null_and_say_why(scored: tuple[CaseCache, list[Any]]) -> None:
    _, results = scored
    entries = case_entries(results, "none")
    summary = nnunet_summary(results, CLASSES, {}, "none")
    nothing = {"dice": None, "hd95_mm": None, "nsd": None}
    assert [e["scores"]["kidney"] == nothing for e in entries] == [True, False, False]
    assert [e["unlabelled"] for e in entries] == [["kidney"], [], []]
    assert entries[0]["dice_mean"] == 1
    per_case = [c["metrics"]["2"]["Dice"] for c in summary["metric_per_case"]]
    assert per_case == [None, 1, 0]
    assert [c["unlabelled"] for c in summary["metric_per_case"]] == [["kidney"], [], []]
    assert summary["mean"]["2"]["Dice"] == 0.5
    assert summary["foreground_mean"]["Dice"] == pytest.approx(2 / 3)
    json.dumps([entries, summary], allow_nan=False)


def test_a_case_is_excluded_for_what_is_absent_and_not_for_what_is_unlabelled(
    write_pair: Callable[..., tuple[Path, Path]],
) -> None:
    label = np.zeros((8, 9, 7), np.uint8)
    label[2:5, 2:6, 2:4] = 2
    case = Case("one", *write_pair("one", label=label), "b", "one", "val")
    excluded = {}
    for name, own in (("absent", {"liver": 1, "kidney": 2}), ("unlabelled", {"kidney": 2})):
        cache = make_cache(site_classes={"b": own})
        prepared = cache.get(case)
        truth = true_indices(prepared, cache)
        result = score_prediction(truth, prepared, cache, EvaluationConfig(), False)
        assert math.isnan(result.scores["liver"].dice)
        excluded[name] = final_scores([result], list(CLASSES), EvaluationConfig())["excluded_cases"]
    assert excluded == {"absent": 1, "unlabelled": 0}


# Training.

PLAIN = {"rotate_degrees": 0, "scale_fraction": 0, "shift_fraction": 0, "intensity_fraction": 0}


def trained(model: Any, cases: list[Case], steps: int, told: list[float], **strengths: Any) -> Any:
    config = parse_config({
        "data": DATA,
        "training": {"batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1} | strengths,
    })  # fmt: skip
    before = model.state()
    train_locally(
        model, make_cache(), cases, config.training, schedule=Schedule(0, 1), seed=7, steps=steps,
        on_step=lambda step, of, loss: told.append(loss),
    )  # fmt: skip
    return {name: value - before[name] for name, value in model.state().items()}


@pytest.mark.parametrize("site", list(MAPS))
def test_training_lowers_the_loss_at_either_site(
    adapted_mini: Callable[..., Any], cases: dict[str, list[Case]], site: str
) -> None:
    losses: list[float] = []
    easy = {**PLAIN, "foreground_fraction": 1, "learning_rate": 0.03}
    trained(adapted_mini(2), cases[site][:1], 25, losses, **easy)
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_local_training_takes_the_loss_of_what_the_site_labels(
    adapted_mini: Callable[..., Any], cases: dict[str, list[Case]]
) -> None:
    model = adapted_mini(2, stir=0.3)
    for site, held in cases.items():
        images, labels, _ = next(batches(
            make_cache(), held, steps=1, batch_size=4, foreground_fraction=0.8,
            generator=torch.Generator().manual_seed(7),
        ))  # fmt: skip
        with torch.no_grad():
            logits = model.segmenter(images)
        whole, partial = (SegmentationLoss(0.8, u)(logits, labels).item() for u in ((), {2}))
        told: list[float] = []
        trained(model, held, 1, told, **PLAIN)
        assert abs(whole - partial) > 0.01
        assert told == [pytest.approx(partial if site == "site_01" else whole, rel=1e-4)]


# Aggregation.


def sam2_segmenter() -> Segmenter:
    torch.manual_seed(7)
    shape = Sam2Shape(
        width=16, heads=1, stages=(1, 2, 3, 1), global_blocks=(4,), windows=(8, 4, 6, 3),
        position_grid=5, mlp_ratio=2.0, image_size=64, decoder_width=32, decoder_mlp=48,
        decoder_heads=2, iou_width=24,
    )  # fmt: skip
    model = construct_sam2(shape, 3)
    with torch.no_grad():
        for parameter in model.mask_decoder.parameters():  # transformers starts them near zero
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return Segmenter(model, SAM2, 32)


@pytest.mark.parametrize("decoder", ["official", "reference", "sam2"])
def test_swapping_the_tensors_of_two_classes_swaps_their_outputs(
    adapted_mini: Callable[..., Any], decoder: str
) -> None:
    if decoder == "sam2":
        segmenter: Segmenter = sam2_segmenter()
    else:
        segmenter = adapted_mini(3, model={"decoder": decoder}).segmenter
    segmenter.eval()
    tensors = dict(segmenter.model.named_parameters())
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    images = torch.rand((1, 3, 64, 64), generator=torch.Generator().manual_seed(3))
    one, two = (counts(shapes, 3, {1, 2, 3} - {index}) for index in (1, 3))
    assert len(one) == len(two) > 2
    with torch.no_grad():
        before = segmenter(images)
        held = {name: value.clone() for name, value in tensors.items()}
        for a, b in zip(sorted(one), sorted(two), strict=True):
            if a == b:  # rows of one tensor
                tensors[a][one[a][:, 0] == 0] = held[a][two[a][:, 0] == 0]
                tensors[a][two[a][:, 0] == 0] = held[a][one[a][:, 0] == 0]
            else:
                tensors[a].copy_(held[b])
                tensors[b].copy_(held[a])
        after = segmenter(images)
    assert not torch.allclose(before[:, 1], before[:, 3], atol=1e-3)
    assert torch.allclose(after, before[:, [0, 3, 2, 1]], rtol=1e-4, atol=1e-4)


def test_counts_name_what_the_site_does_not_label_and_nothing_else(
    adapted_mini: Callable[..., Any],
) -> None:
    shapes = {name: tuple(value.shape) for name, value in adapted_mini(3).state().items()}
    assert counts(shapes, 3, {1, 2, 3}) == {}
    found = counts(shapes, 3, {2})
    tokens = found.pop("mask_decoder.mask_tokens.weight")
    assert tokens.tolist() == [[1], [0], [1], [0]], "background counts everywhere"
    assert {name.split(".")[2] for name in found} == {"1", "3"}
    assert all(value.shape == () and value == 0 for value in found.values())
    networks = [name for name in shapes if "output_hypernetworks_mlps" in name]
    assert len(found) == len(networks) / 2, "two of four outputs"
    assert counts({"image_encoder.x": (2, 3)}, 3, {2}) == {}
    many = {f"mask_decoder.output_hypernetworks_mlps.{i}.a": (1,) for i in range(13)}
    assert list(counts(many, 12, set(range(1, 13)) - {1})) == [
        "mask_decoder.output_hypernetworks_mlps.1.a"
    ], "1 is not 10, 11 or 12"


def test_the_mean_takes_a_class_from_the_only_site_that_labels_it(
    adapted_mini: Callable[..., Any], cases: dict[str, list[Case]]
) -> None:
    model = adapted_mini(2)
    start = model.state()
    shapes = {name: tuple(value.shape) for name, value in start.items()}
    section, updates = DataConfig(**DATA), []
    for site, weight in (("site_01", 3.0), ("site_02", 1.0)):
        model.load(start)
        delta = trained(model, cases[site], 2, [])
        say = counts(shapes, 2, labelled_classes(section, site, CLASSES))
        updates.append(Update(site, start, delta, weight, say))
    step = fedavg(updates, Situation(start, 1, Config()))
    liver_only, both = (update.delta for update in updates)
    for name, value in step.items():
        mean = 0.75 * liver_only[name] + 0.25 * both[name]
        if ".output_hypernetworks_mlps.2." in name:
            assert liver_only[name].abs().sum() > 0, "it moves there, and that is left out"
            assert torch.allclose(value, both[name], atol=1e-9)
        elif name == "mask_decoder.mask_tokens.weight":
            assert torch.allclose(value[2], both[name][2], atol=1e-9)
            assert torch.allclose(value[:2], mean[:2], atol=1e-8)
            assert not torch.allclose(value[2], mean[2], atol=1e-5)
        else:
            assert torch.allclose(value, mean, atol=1e-8), name


# A federation.


@pytest.fixture
def config(small_config: Path) -> Config:
    tree = yaml.safe_load(small_config.read_text())
    return parse_config(tree | {"rounds": 1, "data": DATA})


def test_sites_with_different_labels_train_together(
    config: Config, folder: Path, tmp_path: Path
) -> None:
    summary = simulate(config, tmp_path / "run", data_dir=folder)
    assert all(
        site["status"] == "ok" for entry in summary["rounds"] for site in entry["sites"].values()
    )
    final = summary["final"]
    assert set(final["dice_per_class"]) == {"liver", "kidney"}
    assert final["dice_per_site"].keys() == MAPS.keys()
    assert final["unlabelled"] == {"site_01": ["kidney"]}
    entries = json.loads((tmp_path / "run" / "cases.json").read_text())
    for entry in entries:
        known = {name for name, score in entry["scores"].items() if score["dice"] is not None}
        assert known == MAPS[entry["site"]].keys()
        assert ("kidney" in entry["unlabelled"]) == (entry["site"] == "site_01")
    kidney = [e["scores"]["kidney"]["dice"] for e in entries if e["site"] == "site_02"]
    assert final["dice_per_class"]["kidney"] == pytest.approx(np.mean(kidney))
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000

    # Seeds depend on round and site, so that the site does the same when it trains alone.
    alone = config.data.model_copy(update={"held_out_sites": ("site_01",)})
    simulate(config.model_copy(update={"data": alone}), tmp_path / "alone", data_dir=folder)
    one, other = (read_adapter(tmp_path / run / "adapter").state for run in ("run", "alone"))
    tokens = one.pop("mask_decoder.mask_tokens.weight") - other["mask_decoder.mask_tokens.weight"]
    largest = tokens.abs().amax(1).tolist()
    for index in range(3):
        networks = [name for name in one if f".output_hypernetworks_mlps.{index}." in name]
        largest[index] += sum(float((one[n] - other[n]).abs().max()) for n in networks)
    assert largest[2] < 1e-6 < 1e-4 < min(largest[:2])


def test_baselines_on_pooled_data_are_refused_before_anything_is_done(
    config: Config, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        simulate(config, tmp_path / "run", data_dir=folder, baselines=True)
    assert caught.value.code == "SAM-C225"
    assert not (tmp_path / "run").exists()
