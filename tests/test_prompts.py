"""Prompts: as SAM reads them, as training draws them, and as evaluation takes them from labels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from samaritan.config import DataConfig, EvaluationConfig
from samaritan.data.datasets import Case, read_dataset
from samaritan.data.phantoms import CLASSES, write_phantoms
from samaritan.data.slices import CaseCache
from samaritan.errors import DataError
from samaritan.models.bases import build_base
from samaritan.models.family import Prompts
from samaritan.models.official import modeling
from samaritan.models.sam import FAMILY, _prompt_tokens
from samaritan.models.segmenter import Segmenter
from samaritan.report import facts
from samaritan.report.html import write_report
from samaritan.training import local
from samaritan.training.augment import BODY_AXES
from samaritan.training.evaluate import evaluate_cases, mean_dice, predict_indices
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import Parts, batch_gradients
from samaritan.training.prompts import draw_prompts, oracle_prompts

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("local_only", "centralised", "unet")

Build = Callable[..., Any]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed))


def lumps(count: int, rows: int, columns: int, classes: int = 3, seed: int = 0) -> Tensor:
    """(count, rows, columns) labels of several lumps each, without any symmetry."""
    noise = np.random.default_rng(seed).normal(size=(count, rows, columns))
    smooth = ndimage.gaussian_filter(noise, (0, 2, 2))
    edges = np.quantile(smooth, np.linspace(0.6, 1, classes + 1)[:-1])
    return torch.from_numpy(np.digitize(smooth, edges))


def some_prompts() -> Prompts:
    """Three points, one point, none, and a box, for a 24 by 40 input."""
    points = torch.tensor(
        [[[3, 5], [31, 20], [17, 2]], [[38, 1], [0, 0], [0, 0]], [[0, 0], [0, 0], [0, 0]],
         [[4, 6], [0, 0], [30, 21]]]
    ).float()  # fmt: skip
    return Prompts(points, torch.tensor([[1, 0, 1], [1, -1, -1], [-1, -1, -1], [2, -1, 3]]))


# As SAM reads them.


def test_tokens_equal_those_of_the_official_prompt_encoder() -> None:
    torch.manual_seed(1)
    encoder = modeling().PromptEncoder(32, (6, 10), (24, 40), 16)
    points, labels = 24 * draws(4, 3, 2), torch.tensor([[1, 0, 1]] * 4)
    corners = 24 * draws(4, 2, 2, seed=1)
    box_labels = torch.tensor([[2, 3]] * 4)
    with torch.no_grad():
        ours = _prompt_tokens(encoder, Prompts(points, labels), (24, 40))
        theirs, _ = encoder((points, labels), None, None)
        assert torch.equal(ours, theirs)
        assert ours.shape == (4, 4, 32)  # points that come without a box are padded
        ours = _prompt_tokens(encoder, Prompts(corners, box_labels), (24, 40))
        assert torch.equal(ours, encoder._embed_boxes(corners.flatten(1)))
        both = Prompts(torch.cat([points, corners], 1), torch.cat([labels, box_labels], 1))
        theirs, _ = encoder((points, labels), corners.flatten(1), None)
        assert torch.equal(_prompt_tokens(encoder, both, (24, 40)), theirs)


def test_a_box_is_decoded_as_the_official_decoder_does(mini: Any, mini_file: Path) -> None:
    sam = build_base("mini", 2, checkpoint=mini_file).model
    images, size, box = draws(1, 3, 24, 40), (24, 40), torch.tensor([[[4.0, 6.0], [30.0, 21.0]]])
    sam.prompt_encoder.image_embedding_size = (6, 10)
    sam.prompt_encoder.input_image_size = size
    model = Segmenter(sam, FAMILY, 4)
    with torch.no_grad():
        sparse, dense = sam.prompt_encoder(None, box.flatten(1), None)
        theirs, _ = sam.mask_decoder.predict_masks(
            image_embeddings=FAMILY.encode(sam, model.to_tokens(images, 0)),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        ours = model(images, Prompts(box, torch.tensor([[2, 3]])))
        assert torch.allclose(ours, theirs, atol=1e-4), "mini's logits come at the input's size"
        assert not torch.allclose(model(images), theirs, atol=1e-2)


def test_records_do_not_feel_each_others_prompts(adapted_mini: Build) -> None:
    model, images = adapted_mini(stir=0.1).segmenter, draws(4, 3, 24, 40)
    prompts = some_prompts()
    real = prompts.labels >= 0
    with torch.no_grad():
        together = model(images, prompts)
        for i, logits in enumerate(together):
            own = Prompts(prompts.points[i, real[i]][None], prompts.labels[i, real[i]][None])
            alone = model(images[i : i + 1], own if real[i].any() else None)
            assert torch.allclose(logits, alone[0], atol=1e-5), f"record {i}"
        changes = (together - model(images)).abs().amax((1, 2, 3))
    assert [c > 1e-3 for c in changes.tolist()] == [True, True, False, True]


def test_the_order_of_padding_does_not_matter(adapted_mini: Build) -> None:
    model, images, prompts = adapted_mini().segmenter, draws(4, 3, 24, 40), some_prompts()
    turned = Prompts(prompts.points.roll(1, 1), prompts.labels.roll(1, 1))
    with torch.no_grad():
        assert torch.allclose(model(images, prompts), model(images, turned), atol=1e-5)


# As training draws them.


def without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samaritan.training.prompts._NOISE_FRACTION", 0.0)


def test_a_box_without_noise_holds_the_structures_tightly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_noise(monkeypatch)
    labels = lumps(6, 17, 29)
    labels[2] = 0
    labels[2, 3, 20] = 2  # a box of one pixel
    labels[3] = 0
    prompts = draw_prompts(labels, "box", seeded())
    assert prompts is not None
    for record in (0, 1, 2, 4, 5):
        rows, columns = np.nonzero(labels[record].numpy())
        expected = [[columns.min(), rows.min()], [columns.max(), rows.max()]]
        assert prompts.points[record].tolist() == expected
        assert prompts.labels[record].tolist() == [2, 3]
    assert prompts.labels[3].tolist() == [-1, -1]
    exact = oracle_prompts(labels, "box")
    assert torch.equal(exact.points, prompts.points)
    assert torch.equal(exact.labels, prompts.labels)


def test_coordinates_are_x_and_y() -> None:
    labels = torch.zeros(1, 20, 50, dtype=torch.long)
    labels[0, 2:5, 30:44] = 1
    for prompts in (oracle_prompts(labels, "box"), draw_prompts(labels, "point", seeded())):
        assert prompts is not None
        x, y = prompts.points[0].unbind(-1)
        assert ((x >= 30) & (x <= 43) & (y >= 2) & (y <= 4)).all()
    assert oracle_prompts(labels, "point").points.tolist() == [[[31, 3]]]


def test_the_noise_of_boxes_is_that_of_sam() -> None:
    labels = torch.zeros(1, 100, 200, dtype=torch.long)
    labels[0, 30:70, 50:150] = 1
    boxes = draw_prompts(labels.expand(2000, -1, -1), "box", seeded())
    assert boxes is not None
    noise = boxes.points - torch.tensor([[50.0, 30.0], [149.0, 69.0]])
    assert noise.std(0).flatten().tolist() == pytest.approx([10, 4, 10, 4], rel=0.1)
    assert noise.mean(0).abs().max() < 1
    correlation = torch.corrcoef(noise.flatten(1).T) - torch.eye(4)
    assert correlation.abs().max() < 0.1, "coordinates move independently"
    assert noise.abs().max() == 20


def test_noisy_boxes_stay_inside_the_image_and_right_way_round() -> None:
    labels = torch.zeros(400, 12, 30, dtype=torch.long)
    labels[:200, 0, 0] = labels[:200, 11, 29] = 1
    labels[200:, 6, 20] = 1
    boxes = draw_prompts(labels, "box", seeded())
    assert boxes is not None
    top_left, bottom_right = boxes.points.unbind(1)
    assert (top_left <= bottom_right).all()
    assert (top_left >= 0).all()
    assert (bottom_right <= torch.tensor([29, 11])).all()
    assert (bottom_right[:200].min(0).values < torch.tensor([29, 11])).all()


def test_points_lie_in_their_structures() -> None:
    labels = lumps(40, 17, 29)
    labels[1] = 0
    labels[2][labels[2] == 2] = 0
    for prompts in (draw_prompts(labels, "point", seeded()), oracle_prompts(labels, "point")):
        assert prompts is not None
        assert prompts.points.shape == (40, 3, 2)
        for record, plane in enumerate(labels):
            for column in range(3):
                x, y = prompts.points[record, column].int().tolist()
                present = bool((plane == column + 1).any())
                assert prompts.labels[record, column] == (1 if present else -1)
                assert not present or plane[y, x] == column + 1


def test_points_are_drawn_uniformly() -> None:
    plane = torch.zeros(9, 7, dtype=torch.long)
    plane[0, 0] = plane[5, 2:6] = plane[8, 6] = 2
    labels = plane.expand(6000, -1, -1)
    prompts = draw_prompts(labels, "point", seeded())
    assert prompts is not None
    assert (prompts.labels == torch.tensor([-1, 1])).all()
    found, counts = prompts.points[:, 1].unique(dim=0, return_counts=True)
    assert {tuple(p) for p in found.int().tolist()} == {
        (0, 0), (2, 5), (3, 5), (4, 5), (5, 5), (6, 8)
    }  # fmt: skip
    assert counts.tolist() == pytest.approx([1000] * 6, abs=120)


def test_the_oracle_point_is_the_deepest_and_the_edge_counts() -> None:
    labels = torch.zeros(1, 11, 23, dtype=torch.long)
    labels[0, 0:5, 0:5] = 1  # in the corner: not the corner itself
    labels[0, 2:9, 8:15] = 2
    labels[0, 10, :] = 2  # longer, and thin
    labels[0, 4, 20] = 3
    points = oracle_prompts(labels, "point").points
    assert points.tolist() == [[[2, 2], [11, 5], [20, 4]]]


def test_mixed_records_draw_one_kind_each() -> None:
    labels = lumps(1, 17, 29).expand(3000, -1, -1)
    prompts = draw_prompts(labels, "mixed", seeded())
    assert prompts is not None
    kinds, counts = prompts.labels.unique(dim=0, return_counts=True)
    assert kinds.tolist() == [[-1, -1, -1, -1, -1], [-1, -1, 1, 1, 1], [2, 3, -1, -1, -1]]
    assert counts.tolist() == pytest.approx([1000] * 3, abs=100)


@pytest.mark.parametrize("kind", ["box", "point", "mixed"])
def test_draws_come_from_the_generator_alone(kind: str) -> None:
    labels = lumps(5, 17, 29)
    first, again, other = (draw_prompts(labels, kind, seeded(s)) for s in (3, 3, 4))
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first.points, again.points)
    assert torch.equal(first.labels, again.labels)
    assert not torch.equal(first.points, other.points)


def test_no_prompts_take_nothing_from_the_generator() -> None:
    generator = seeded()
    before = generator.get_state()
    assert draw_prompts(lumps(2, 9, 9), "none", generator) is None
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("kind", ["box", "point", "mixed"])
def test_a_batch_without_structures_has_no_prompts(kind: str, adapted_mini: Build) -> None:
    labels, images = torch.zeros(2, 24, 40, dtype=torch.long), draws(2, 3, 24, 40)
    prompts = draw_prompts(labels, kind, seeded())
    assert prompts is not None
    assert (prompts.labels == -1).all()
    model = adapted_mini().segmenter
    with torch.no_grad():
        assert torch.allclose(model(images, prompts), model(images), atol=1e-5)


# In training.


def test_parts_of_a_batch_take_their_own_prompts(adapted_mini: Build) -> None:
    model = adapted_mini(2, stir=0.1)
    images, labels = draws(5, 3, 24, 40), lumps(5, 24, 40, 2)
    prompts = draw_prompts(labels, "mixed", seeded())
    assert prompts is not None
    assert len({tuple(kinds) for kinds in prompts.labels.tolist()}) == 3
    trained, loss_of = list(model.trained.values()), SegmentationLoss(0.5)
    model.segmenter.eval()
    batch = (model.segmenter, loss_of, images, labels, trained)
    whole = batch_gradients(*batch, Parts(1, None), prompts)
    expected = [p.grad.clone() for p in trained]
    loss = batch_gradients(*batch, Parts(2, None), prompts)
    assert torch.allclose(loss, whole, rtol=1e-5)
    for parameter, gradient in zip(trained, expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = write_phantoms(tmp_path_factory.mktemp("phantoms"), 1, 2, seed=1)
    return list(read_dataset(folder).cases)


@pytest.fixture
def run(mini_config: Build, phantoms: list[Case]) -> Callable[..., None]:
    def train(model: Any, steps: int = 2, **training: Any) -> None:
        config = mini_config(
            training={"batch_size": 4, "weight_decay": 0, **training}, data={"slice_axis": "axial"}
        )
        cache = CaseCache(config.data, CLASSES, (32, 40))
        local.train_locally(
            model, cache, phantoms, config.training, schedule=local.Schedule(0, 1), seed=7,
            steps=steps,
        )  # fmt: skip

    return train


def test_training_takes_prompts_from_the_augmented_labels(
    adapted_mini: Build, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Prompts]] = []

    def watch(
        model: Any, loss_of: Any, images: Tensor, labels: Tensor, *rest: Any
    ) -> Tensor:  # fmt: skip
        seen.append((labels, rest[-1]))
        return batch_gradients(model, loss_of, images, labels, *rest)

    monkeypatch.setattr(local, "batch_gradients", watch)
    run(adapted_mini(3), 4, prompts="point", flip=["left-right"], rotate_degrees=90)
    assert len(seen) == 4
    total = 0
    for labels, prompts in seen:
        record, column = (prompts.labels == 1).nonzero(as_tuple=True)
        x, y = prompts.points[record, column].long().unbind(-1)
        assert torch.equal(labels[record, y, x], column + 1)
        total += len(record)
    assert total > 10


def test_a_preset_that_trains_the_prompt_encoder_learns_its_points(
    adapted_mini: Build, run: Callable[..., None]
) -> None:
    moved = {}
    for kind in ("none", "box", "point"):
        model = adapted_mini(3, peft={"preset": "samed"})
        before = model.state()
        run(model, prompts=kind, foreground_fraction=1)
        after = model.state()
        moved[kind] = [
            not torch.equal(before[name], after[name])
            for name in (f"prompt_encoder.point_embeddings.{i}.weight" for i in range(4))
        ]
    assert moved == {
        "none": [False] * 4,
        "box": [False, False, True, True],
        "point": [False, True, False, False],
    }


def test_a_frozen_prompt_encoder_stays(adapted_mini: Build, run: Callable[..., None]) -> None:
    model = adapted_mini(3)
    encoder = model.base.model.prompt_encoder
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    run(model, prompts="mixed")
    assert all(torch.equal(value, before[n]) for n, value in encoder.state_dict().items())


@pytest.mark.parametrize("kind", ["box", "point", "mixed"])
def test_equal_seeds_give_equal_adapters(
    adapted_mini: Build, run: Callable[..., None], kind: str
) -> None:
    states = []
    for _ in range(2):
        model = adapted_mini(3)
        run(model, prompts=kind)
        states.append(model.state())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# In evaluation.


class Watcher(nn.Module):
    """Keeps what it is shown: the middle channel of the images, and the prompts."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Prompts | None]] = []

    def forward(self, images: Tensor, prompts: Prompts | None = None) -> Tensor:
        middle = images[:, images.shape[1] // 2]
        self.seen.append((middle, prompts))
        return torch.stack([middle, 1 - middle, middle - 1], 1)


@pytest.fixture
def marked(write_pair: Callable[..., tuple[Path, Path]]) -> Case:
    """A case whose image shows its label: grey is class 1, white is class 2."""
    classes = lumps(24, 29, 20, 2).numpy().astype(np.uint8)
    image, label = write_pair("one", image=classes / np.float32(2), label=classes)
    return Case("one", image, label, "site", "one", "val")


def watched(case: Case, size: tuple[int, int], axis: str, **settings: Any) -> Watcher:
    data = DataConfig(pixel_mm=1.0, slice_axis=axis)
    cache = CaseCache(data, {"low": 1, "high": 2}, size)
    model: Any = Watcher()
    predict_indices(model, cache.get(case), cache, EvaluationConfig(**settings))
    return model


@pytest.mark.parametrize("flip", [(), tuple(BODY_AXES)], ids=["plain", "mirrored"])
@pytest.mark.parametrize("size", [(16, 12), (40, 36)], ids=["windows", "padded"])
@pytest.mark.parametrize("axis", ["sagittal", "coronal", "axial"])
@pytest.mark.parametrize("kind", ["box", "point"])
def test_each_window_and_view_has_the_prompts_of_what_it_shows(
    marked: Case, kind: str, axis: str, size: tuple[int, int], flip: tuple[Any, ...]
) -> None:
    model = watched(marked, size, axis, prompts=kind, flip=flip)
    total = 0
    for images, prompts in model.seen:
        assert prompts is not None
        for i, plane in enumerate((2 * images).round().long().numpy()):
            rows, columns = np.nonzero(plane)
            real = prompts.labels[i] >= 0
            points = prompts.points[i, real].int().tolist()
            if kind == "box":
                assert points == (
                    [[columns.min(), rows.min()], [columns.max(), rows.max()]] if len(rows) else []
                )
            else:
                assert [plane[y, x] for x, y in points] == sorted(set(plane.flat) - {0})
            total += len(points)
    assert total > 30


def test_without_prompts_the_model_sees_images_alone(marked: Case) -> None:
    model = watched(marked, (16, 12), "axial")
    assert model.seen
    assert all(prompts is None for _, prompts in model.seen)


def test_oracle_prompts_need_a_label(marked: Case) -> None:
    case = Case("blind", marked.image, None, "site", "blind", "val")
    with pytest.raises(DataError, match=r"evaluation\.prompts") as caught:
        watched(case, (16, 12), "axial", prompts="box")
    assert caught.value.code == "SAM-D116"


def test_a_model_trained_with_boxes_uses_them(
    write_pair: Callable[..., tuple[Path, Path]], adapted_mini: Build, mini_config: Build
) -> None:
    """The images say nothing; only a box can."""
    rng, cases = np.random.default_rng(0), []
    for i in range(12):
        label = np.zeros((16, 16, 4), np.uint8)
        x, y = 8 * rng.integers(0, 2, 2)
        label[x : x + 8, y : y + 8] = 1
        image = rng.random(label.shape, np.float32)
        cases.append(Case(f"c{i}", *write_pair(f"c{i}", image=image, label=label), "a", f"{i}", ""))
    sections = {
        "peft": {"preset": "samed"},
        "data": {"slice_axis": "axial"},
        "training": {
            "prompts": "box", "batch_size": 8, "learning_rate": 1e-2, "foreground_fraction": 1,
            "rotate_degrees": 0, "scale_fraction": 0, "shift_fraction": 0, "intensity_fraction": 0,
        },
    }  # fmt: skip
    config, model = mini_config(**sections), adapted_mini(1, **sections)
    cache = CaseCache(config.data, {"square": 1}, (16, 16))
    local.train_locally(
        model, cache, cases[:8], config.training, schedule=local.Schedule(0, 1), seed=7, steps=100
    )
    scores = {}
    for kind in ("none", "box"):
        found = evaluate_cases(model.segmenter, cache, cases[8:], EvaluationConfig(prompts=kind))
        scores[kind] = mean_dice(found) or 0.0
    assert scores["box"] > 0.7
    assert scores["none"] < 0.4


# What a reader sees.


@pytest.fixture(scope="module")
def oracle_run(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run trained with mixed prompts and scored with oracle boxes, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "oracle"
    overrides = ["rounds=1", "training.prompts=mixed", "evaluation.prompts=box"]
    command = [
        sys.executable, "-m", "samaritan.cli.main", "simulate", small_config, "--out", folder,
        "--baselines", *(text for item in overrides for text in ("--set", item)),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout
    return folder, done.stdout


MARK = "(oracle prompts: boxes from the true labels)"


def test_a_run_marks_every_score_that_had_oracle_prompts(oracle_run: tuple[Path, str]) -> None:
    folder, printed = oracle_run
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["final"]["oracle_prompts"] == "box"
    assert [entry["oracle_prompts"] for entry in summary["rounds"]] == ["box"]
    found = {name: summary["baselines"][name]["oracle_prompts"] for name in METHODS}
    assert found == {"local_only": "box", "centralised": "box", "unet": "none"}
    assert "takes no prompts" in summary["baselines"]["unet"]["note"]
    cases = json.loads((folder / "cases.json").read_text("utf-8"))
    assert {entry["oracle_prompts"] for entry in cases} == {"box"}
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    scored = [event for event in events if "dice_mean" in event]
    assert {event["event"] for event in scored} == {"round_finished", "summary_written"}
    assert {event["oracle_prompts"] for event in scored} == {"box"}
    for line in printed.splitlines():
        marked = line.startswith(("Dice", "  local_only", "  centralised")) or "round 1/1" in line
        assert (MARK in line) == marked, line
    assert printed.count(MARK) >= 3


def test_the_report_says_that_scores_are_an_oracles(oracle_run: tuple[Path, str]) -> None:
    page = (oracle_run[0] / "report.html").read_text("utf-8")
    sentence = "Scores use oracle prompts: boxes taken from the true labels."
    assert page.count(sentence + " A clinic has no such boxes.") == 1
    assert page.index(sentence) < page.index('<dl class="figures">')
    assert "with oracle boxes" in page[: page.index(sentence)]
    captions = page[page.index("<h2>Examples</h2>") :]
    assert captions.count(f"<figcaption><bdi>Worst case {MARK}") == 1


def test_evaluate_marks_and_predict_refuses(
    oracle_run: tuple[Path, str], samaritan: Build, tmp_path: Path
) -> None:
    folder = oracle_run[0]
    arguments = ("evaluate", "--adapter", folder / "adapter", "--data", folder / "data")
    done = samaritan(*arguments, "--out", tmp_path / "scores")
    assert done.code == 0, done.err
    assert MARK in done.out.splitlines()[0]
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text("utf-8"))
    assert summary["oracle_prompts"] == "box"
    image = next((folder / "data").rglob("*.nii.gz"))
    done = samaritan(
        "predict", "--adapter", folder / "adapter", "--input", image, "--output", tmp_path / "o"
    )
    assert done.code == 1
    assert "SAM-C211" in done.err
    assert "none" in done.err
    assert not (tmp_path / "o").exists()


def test_nothing_is_said_where_no_prompts_were_used(finished_run: tuple[Path, Any]) -> None:
    folder, _ = finished_run
    summary = json.loads((folder / "summary.json").read_text("utf-8"))
    assert summary["final"]["oracle_prompts"] == "none"
    assert "oracle" not in (folder / "report.html").read_text("utf-8").lower()


def test_old_and_odd_summaries_are_reported_without_a_mark(
    finished_run: tuple[Path, Any], tmp_path: Path
) -> None:
    summary = json.loads((finished_run[0] / "summary.json").read_text("utf-8"))
    for value in (None, ["box"], {"box": 1}, "<b>"):
        summary["final"]["oracle_prompts"] = value
        (tmp_path / "summary.json").write_text(json.dumps(summary), "utf-8")
        assert facts.oracle_sentence(summary) == ""
        assert "oracle" not in write_report(tmp_path).read_text("utf-8").lower()
    summary["final"]["oracle_prompts"] = "point"
    (tmp_path / "summary.json").write_text(json.dumps(summary), "utf-8")
    assert "points taken from the true labels" in write_report(tmp_path).read_text("utf-8")
