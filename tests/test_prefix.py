"""What frozen blocks made of slices is kept: the same gradients, fewer computations, bounded."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

from samaritan.config import TrainingConfig
from samaritan.data.datasets import Case, read_dataset
from samaritan.data.phantoms import CLASSES, write_phantoms
from samaritan.data.slices import CaseCache
from samaritan.errors import ConfigError, StorageError
from samaritan.models.adapter import build_adapted
from samaritan.models.segmenter import Segmenter
from samaritan.training.local import Schedule, TrainingResult, train_locally
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import Parts, batch_gradients, batch_parts
from samaritan.training.prefix import Entry, PrefixCache, Shelf, View, prefix_key

ALONE = Parts(1, None)
SETTINGS: dict[str, Any] = {
    "batch_size": 4, "learning_rate": 0.01, "warmup_steps": 1, "precision": "fp32",
    "prefix_cache_mb": 100, "cached_views": 2, "flip": ("left-right",),
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries are kept in a test."""
    monkeypatch.setenv("SAMARITAN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prefix"


@pytest.fixture
def cases(tmp_path: Path) -> list[Case]:
    return list(read_dataset(write_phantoms(tmp_path / "data", 1, 3, seed=1)).cases)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each call of the frozen blocks."""
    calls: list[int] = []
    to_tokens = Segmenter.to_tokens

    def count(self: Segmenter, images: Tensor, blocks: int) -> Tensor:
        if blocks:
            calls.append(len(images))
        return to_tokens(self, images, blocks)

    monkeypatch.setattr(Segmenter, "to_tokens", count)
    return calls


@pytest.fixture
def build(adapted_mini: Callable[..., Any]) -> Callable[..., Any]:
    """Models of which the last of three blocks is adapted."""

    def make(stir: float = 0.0, **sections: Any) -> Any:
        return adapted_mini(3, stir, **{"peft": {"blocks": 1}, **sections})

    return make


def reader(model: Any, size: tuple[int, int] = (32, 32), **data: Any) -> CaseCache:
    from samaritan.config import DataConfig

    return CaseCache(DataConfig(**{"slice_axis": "axial", **data}), CLASSES, size)


def prefix(model: Any, cache: CaseCache | None = None, **settings: Any) -> PrefixCache:
    return PrefixCache(model, cache or reader(model), TrainingConfig(**{**SETTINGS, **settings}))


def some_views(cache: CaseCache, cases: Sequence[Case]) -> list[View]:
    return [View(cache.get(case), 3 + i, i % 2) for i, case in enumerate(cases)]


def train(model: Any, cases: list[Case], **options: Any) -> TrainingResult:
    settings = TrainingConfig(**{**SETTINGS, **options.pop("training", {})})
    cache = reader(model, **options.pop("data", {}))
    options = {"schedule": Schedule(0.0, 1.0), "seed": 7, "steps": 6, **options}
    return train_locally(model, cache, cases, settings, **options)


def gradients(model: Any, forward: Any, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    trained = list(model.trained.values())
    batch_gradients(forward, SegmentationLoss(0.8), inputs, labels.long(), trained, ALONE)
    return [parameter.grad.clone() for parameter in trained if parameter.grad is not None]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# The same step.


@pytest.mark.parametrize(
    ("sections", "frozen"),
    [
        ({}, 2),
        ({"peft": {"blocks": 2}}, 1),
        ({"peft": {"blocks": 0}}, 3),
        ({"peft": {"preset": "decoder-only"}}, 3),
        ({"peft": {"preset": "norm-bias", "blocks": 0}}, 3),  # trains the neck
        ({"peft": {"preset": "ma-sam", "blocks": 1}}, 2),  # three slices a record
        ({"peft": {"preset": "med-sa", "blocks": 1}}, 2),
    ],
)
def test_a_kept_view_gives_the_gradient_of_the_view(
    build: Callable[..., Any], cases: list[Case], computed: list[int], sections: Any, frozen: int
) -> None:
    model = build(0.02, **sections)
    assert model.frozen_blocks == frozen
    cache = reader(model)
    for view in some_views(cache, cases):
        kept = prefix(model, cache)
        image, label = kept.picture(view)
        expected = gradients(model, model.segmenter, image[None], label[None])
        assert sum(float(g.abs().sum()) for g in expected) > 0
        for _ in ("made", "read"):
            (entry,) = kept.entries([view], ALONE)
            found = gradients(model, kept.forward, entry.tokens[None], entry.label[None])
            assert equal(found, expected)
    assert computed == [1] * len(cases)


def test_a_batch_is_the_batch_of_its_views(build: Callable[..., Any], cases: list[Case]) -> None:
    model = build(0.02)
    cache = reader(model)
    kept = prefix(model, cache)
    views = some_views(cache, cases)
    pictures = [kept.picture(view) for view in views]
    images, labels = (torch.stack(part) for part in zip(*pictures, strict=True))
    kept.entries(views[1:2], ALONE)
    with batch_parts(torch.device("cpu"), 3) as parts:
        entries = kept.entries(views, parts)
    for entry, label in zip(entries, labels, strict=True):
        assert torch.equal(entry.label, label), "each in its place, whether read or made"
    found = gradients(
        model, kept.forward, torch.stack([e.tokens for e in entries]),
        torch.stack([e.label for e in entries]),
    )  # fmt: skip
    expected = gradients(model, model.segmenter, images, labels)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-7)


def test_bf16_is_kept_in_half_the_bytes(build: Callable[..., Any], cases: list[Case]) -> None:
    model = build()
    cache = reader(model)
    view = some_views(cache, cases)[0]
    (exact,) = prefix(model, cache).entries([view], ALONE)
    model.segmenter.autocast_dtype = torch.bfloat16
    kept = prefix(model, cache)
    (made,), (read,) = kept.entries([view], ALONE), kept.entries([view], ALONE)
    assert (exact.tokens.dtype, made.tokens.dtype) == (torch.float32, torch.bfloat16)
    assert equal([made.tokens, made.label], [read.tokens, read.label])
    assert torch.allclose(made.tokens.float(), exact.tokens, rtol=0.1, atol=0.2)
    generator = torch.Generator().manual_seed(0)
    tokens, _ = next(kept.batches(cases, steps=1, generator=generator, parts=ALONE))
    assert tokens.dtype == torch.float32, "the blocks that are trained add up in float32"


# Views.


def test_views_differ_and_stay(build: Callable[..., Any], cases: list[Case]) -> None:
    model = build()
    cache = reader(model)
    kept, case = prefix(model, cache), cache.get(cases[0])
    views = [View(case, 5, 0), View(case, 5, 1), View(case, 6, 0), View(cache.get(cases[1]), 5, 0)]
    pictures = [kept.picture(view)[0] for view in views]
    assert len({view.name for view in views}) == 4
    assert all(not torch.equal(pictures[0], other) for other in pictures[1:])
    torch.manual_seed(1)  # the global generator must not matter
    again = prefix(model, reader(model))
    assert all(
        torch.equal(again.picture(view)[0], image)
        for view, image in zip(views, pictures, strict=True)
    )


def test_the_window_belongs_to_the_view(build: Callable[..., Any], cases: list[Case]) -> None:
    model = build()
    cache = reader(model, size=(16, 16), pixel_mm=1.0)
    plain = {"rotate_degrees": 0, "scale_fraction": 0, "shift_fraction": 0, "flip": (),
             "intensity_fraction": 0}  # fmt: skip
    kept, case = prefix(model, cache, **plain), cache.get(cases[0])
    assert max(case.image.shape[1:]) > 16
    middle = int(case.foreground[len(case.foreground) // 2])
    corners = {kept.picture(View(case, middle, number))[0].numpy().tobytes() for number in range(8)}
    assert len(corners) > 2
    image, label = kept.picture(View(case, middle, 0))
    assert torch.equal(image, kept.picture(View(case, middle, 0))[0])
    assert (image.shape, label.shape) == ((3, 16, 16), (16, 16))


def test_training_draws_among_all_views(build: Callable[..., Any], cases: list[Case]) -> None:
    model = build()
    kept = prefix(model, cached_views=3, batch_size=8)
    seen: list[View] = []
    entries = kept.entries

    def watch(views: list[View], parts: Parts) -> list[Entry]:
        seen.extend(views)
        return entries(views, parts)

    kept.entries = watch  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(0)
    batches = list(kept.batches(cases, steps=12, generator=generator, parts=ALONE))
    assert len(seen) == 96
    assert all(tokens.shape == (8, 1, 8, 8, 32) for tokens, _ in batches)
    assert {view.number for view in seen} == {0, 1, 2}
    assert {view.prepared.case for view in seen} == set(cases)
    marked = sum(view.index in view.prepared.foreground for view in seen)
    assert marked / 96 > 0.7, "foreground_fraction is 0.8"


# Nothing is computed twice.


def test_a_second_round_computes_nothing(
    build: Callable[..., Any], cases: list[Case], computed: list[int]
) -> None:
    train(build(), cases)
    assert 0 < sum(computed) <= 24
    computed.clear()
    train(build(0.1), cases)  # another adapter, the same base
    assert computed == []


def test_once_all_views_are_there_no_draw_computes(
    build: Callable[..., Any], cases: list[Case], computed: list[int]
) -> None:
    model = build()
    cache = reader(model)
    kept = prefix(model, cache)
    held = [cache.get(case) for case in cases]
    views = [View(case, i, v) for case in held for i in range(len(case.image)) for v in (0, 1)]
    kept.entries(views, ALONE)
    assert len(computed) == len(views)
    computed.clear()
    train(model, cases, seed=99)
    assert computed == []


def test_what_decides_an_entry_is_in_the_key(build: Callable[..., Any]) -> None:
    model, settings = build(), TrainingConfig(**SETTINGS)
    other = build(0.5, peft={"blocks": 1, "rank": 2})
    assert prefix_key(other, reader(other), settings) == prefix_key(model, reader(model), settings)

    keys = [prefix_key(model, reader(model), settings)]
    keys.append(
        prefix_key(
            replace(model, base=replace(model.base, sha256="0" * 64)), reader(model), settings
        )
    )
    keys.append(prefix_key(replace(model, frozen_blocks=1), reader(model), settings))
    keys.append(prefix_key(model, reader(model, size=(32, 48)), settings))
    keys.append(prefix_key(model, reader(model, context_slices=1), settings))
    model.segmenter.autocast_dtype = torch.bfloat16
    keys.append(prefix_key(model, reader(model), settings))
    model.segmenter.autocast_dtype = None
    model.segmenter.depth = 3
    keys.append(prefix_key(model, reader(model), settings))
    model.segmenter.depth = 1
    model.base.model.image_encoder.blocks[0].mlp.bfloat16()  # weights held in half the bytes
    keys.append(prefix_key(model, reader(model), settings))
    assert len(set(keys)) == len(keys)


CHANGED: dict[str, Any] = {
    "foreground_fraction": 0.5, "flip": (), "rotate_degrees": 5.0, "scale_fraction": 0.2,
    "shift_fraction": 0.0, "intensity_fraction": 0.1,
}  # fmt: skip
HARMLESS: dict[str, Any] = {
    "slices_per_case": 3, "batch_size": 2, "learning_rate": 0.1, "weight_decay": 0.5,
    "warmup_steps": 0, "final_lr_fraction": 0.5, "dice_weight": 0.1, "clip_norm": 2.0,
    "prompts": "box", "precision": "auto", "recompute": True, "prefix_cache_mb": 7,
    "cached_views": 9, "proximal_mu": 0.1, "scaffold": True,
}  # fmt: skip


def test_every_training_setting_is_in_the_key_or_known_not_to_matter(
    build: Callable[..., Any],
) -> None:
    assert CHANGED.keys() | HARMLESS.keys() == TrainingConfig.model_fields.keys()
    model = build()
    cache = reader(model)
    key = prefix_key(model, cache, TrainingConfig(**SETTINGS))
    for name, value in (CHANGED | HARMLESS).items():
        assert getattr(TrainingConfig(**SETTINGS), name) != value
        other = prefix_key(model, cache, TrainingConfig(**{**SETTINGS, name: value}))
        assert (other != key) == (name in CHANGED), name


def test_another_base_or_augmentation_is_computed_anew(
    build: Callable[..., Any], cases: list[Case], computed: list[int]
) -> None:
    model = build()
    train(model, cases)
    first = sum(computed)
    for other, settings in (
        (replace(model, base=replace(model.base, sha256="0" * 64)), {}),
        (model, {"rotate_degrees": 20.0}),
    ):
        computed.clear()
        train(other, cases, training=settings)
        assert sum(computed) == first


@pytest.mark.parametrize("which", ["image", "label"])
def test_a_changed_file_is_computed_anew_and_a_copied_one_is_not(
    build: Callable[..., Any], cases: list[Case], computed: list[int], which: str
) -> None:
    model = build()
    (before,) = prefix(model).entries(some_views(reader(model), cases[:1]), ALONE)
    moved = replace(cases[0], case_id="other", image=cases[0].image.rename(
        cases[0].image.with_name("moved.nii.gz")))  # fmt: skip
    os.utime(moved.image, (1, 1))
    (copied,) = prefix(model).entries(some_views(reader(model), [moved]), ALONE)
    assert computed == [1]
    assert torch.equal(copied.tokens, before.tokens)
    path = getattr(moved, which)
    status, volume = path.stat(), nib.load(path)
    array = np.asanyarray(volume.dataobj).copy()
    array[array == array.max()] = array.min()
    nib.save(nib.Nifti1Image(array, volume.affine), path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # content counts, not its time
    prefix(model).entries(some_views(reader(model), [moved]), ALONE)
    assert computed == [1, 1]


# Training.


def test_training_lowers_the_loss(
    build: Callable[..., Any], cases: list[Case], computed: list[int]
) -> None:
    losses: list[float] = []
    train(build(), cases, steps=50, on_step=lambda *told: losses.append(told[2]))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert sum(computed) < 200 * 0.75, "draws meet again"


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_seeds_give_equal_adapters_cold_and_warm(
    build: Callable[..., Any], cases: list[Case], computed: list[int], folder: Path,
    batch_size: int,
) -> None:  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(min(batch_size, 2))
    states, losses, counts = [], [], []
    for turn in ("cold", "warm", "half warm", "another seed"):
        torch.manual_seed(len(states))  # the global generator must not matter
        if turn == "half warm":
            for path in files(folder)[::2]:
                path.unlink()
        model = build()
        seed = 8 if turn == "another seed" else 7
        settings = {"batch_size": batch_size}
        losses.append(train(model, cases, seed=seed, steps=3, training=settings).loss)
        states.append(list(model.state().values()))
        counts.append(len(computed))
    torch.set_num_threads(threads)
    assert counts[0] > 0
    assert counts[1] == counts[0] < counts[2]
    assert losses[0] == losses[1] == losses[2] != losses[3]
    assert equal(states[0], states[1])
    assert equal(states[0], states[2])
    assert not equal(states[0], states[3])


@pytest.mark.parametrize(
    "sections",
    [{"training": {"prompts": "mixed"}}, {"training": {"prompts": "box", "recompute": True}}],
)
def test_training_with_prompts(
    build: Callable[..., Any], cases: list[Case], computed: list[int], sections: Any
) -> None:
    cold = train(build(**sections), cases, training=sections["training"]).loss
    count = sum(computed)
    warm = train(build(**sections), cases, training=sections["training"]).loss
    assert sum(computed) == count > 0, "prompts are drawn beside what is kept"
    assert cold == warm != train(build(), cases).loss


def test_volumetric_presets_train(
    build: Callable[..., Any], cases: list[Case], computed: list[int]
) -> None:
    sections = {"peft": {"preset": "ma-sam", "blocks": 1}}
    models = [build(**sections) for _ in "ab"]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # records must not be torn apart where a batch is cut
    losses = [train(model, cases, steps=2, training={"batch_size": 3}).loss for model in models]
    torch.set_num_threads(threads)
    assert losses[0] == losses[1]
    assert equal(*(list(model.state().values()) for model in models))
    assert 0 < sum(computed) <= 6


def test_nothing_is_kept_unless_asked(
    build: Callable[..., Any], cases: list[Case], computed: list[int], folder: Path
) -> None:
    train(build(), cases, training={"prefix_cache_mb": 0})
    assert computed == []
    assert not folder.exists()


# Where nothing is frozen.


@pytest.mark.parametrize("peft", [{}, {"blocks": 3}, {"preset": "full"}])
def test_a_cache_without_frozen_blocks_is_refused_before_training(
    mini_config: Callable[..., Any], peft: Any
) -> None:
    for size in (0, 50):
        config = mini_config(peft=peft, training={"prefix_cache_mb": size})
        if not size:
            assert build_adapted(config, 2).frozen_blocks == 0
            continue
        with pytest.raises(ConfigError, match=r"prefix_cache_mb is 50.*peft\.blocks") as caught:
            build_adapted(config, 2)
        assert caught.value.code == "SAM-C212"
        assert "peft.blocks" in caught.value.hint


@pytest.mark.parametrize("peft", [{"blocks": 2}, {"preset": "full", "blocks": 1}])
def test_a_cache_with_frozen_blocks_is_not_refused(
    mini_config: Callable[..., Any], peft: Any
) -> None:
    config = mini_config(peft=peft, training={"prefix_cache_mb": 50})
    assert build_adapted(config, 2).frozen_blocks == 3 - peft["blocks"]


# On the disk.


def entry(seed: int = 0, kilobytes: int = 10) -> Entry:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(1, 2, kilobytes, 128, generator=generator)
    return Entry(tokens, torch.randint(0, 3, (4, 4), generator=generator).to(torch.uint8))


def same(a: Entry | None, b: Entry) -> bool:
    return a is not None and equal([a.tokens, a.label], [b.tokens, b.label])


def age(shelf: Shelf, name: str, seconds: int) -> None:
    os.utime(shelf._path(name), ns=(10**18 - seconds * 10**9,) * 2)


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def test_the_bytes_stay_within_the_budget(folder: Path) -> None:
    shelf = Shelf(folder, "key", "site", 100_000)
    for i in range(40):
        shelf.write(str(i), entry(i, kilobytes=5 + i % 7))
        assert total(folder) <= 100_000
        assert total(folder) == shelf._bytes
        assert same(shelf.read(str(i)), entry(i, kilobytes=5 + i % 7))
    assert total(folder) > 80_000
    assert shelf.read("0") is None


def test_the_budget_holds_in_training(
    build: Callable[..., Any], cases: list[Case], folder: Path
) -> None:
    sizes: list[int] = []
    model = build(0, model={"image_size": 64})
    cache = reader(model, size=(64, 64))
    settings = TrainingConfig(**{**SETTINGS, "prefix_cache_mb": 1})
    train_locally(
        model, cache, cases, settings, schedule=Schedule(0.0, 1.0), seed=7, steps=20,
        on_step=lambda *_: sizes.append(total(folder)),
    )  # fmt: skip
    assert max(sizes) <= 2**20
    assert sizes[-1] > 0.9 * 2**20, "it was needed"


def test_the_longest_unused_goes_first(folder: Path) -> None:
    shelf = Shelf(folder, "key", "site", 35_000)
    for name in "abc":
        shelf.write(name, entry())
    assert shelf.read("a") is not None
    shelf.write("d", entry())
    assert [name for name in "abcd" if shelf.read(name)] == ["a", "c", "d"]


def test_a_new_process_goes_on_where_the_last_one_ended(folder: Path) -> None:
    shelf = Shelf(folder, "key", "site", 35_000)
    for seconds, name in enumerate("abc"):
        shelf.write(name, entry())
        age(shelf, name, 100 - seconds)
    assert shelf.read("a") is not None  # and is young again
    later = Shelf(folder, "key", "site", 35_000)
    later.write("d", entry())
    assert [name for name in "abcd" if later.read(name)] == ["a", "c", "d"]


def test_entries_of_other_settings_count_and_go_first(folder: Path) -> None:
    old, other = (
        Shelf(folder, "before", "site", 35_000), Shelf(folder, "before", "neighbour", 35_000)
    )  # fmt: skip
    for name in "abc":
        for shelf in (old, other):
            shelf.write(name, entry())
            age(shelf, name, 100)
    new = Shelf(folder, "now", "site", 35_000)
    for name in "ab":
        new.write(name, entry())
    assert [name for name in "abc" if old.read(name)] != []
    new.write("c", entry())
    assert [name for name in "abc" if old.read(name)] == []
    assert all(new.read(name) for name in "abc")
    assert all(other.read(name) for name in "abc"), "each site has a budget of its own"


def test_what_a_crash_left_half_written_counts_and_goes(folder: Path) -> None:
    shelf = Shelf(folder, "key", "site", 35_000)
    shelf.write("a", entry())
    left = shelf._folder / ".b.safetensors.0a1b2c3d.partial"
    left.write_bytes(bytes(20_000))
    os.utime(left, (1, 1))
    later = Shelf(folder, "key", "site", 35_000)
    later.write("c", entry())
    assert not left.exists()
    assert later.read("a") is not None


def test_files_that_another_process_deletes_do_not_disturb(folder: Path) -> None:
    shelf = Shelf(folder, "key", "site", 35_000)
    for name in "abc":
        shelf.write(name, entry())
    for path in files(folder)[:2]:
        path.unlink()
    assert shelf.read("a") is None
    shelf.write("d", entry())
    assert same(shelf.read("d"), entry())
    for path in files(folder):
        path.unlink()
    shelf._folder.rmdir()
    shelf.write("e", entry())
    assert same(shelf.read("e"), entry())
    (folder / "no-folder").write_bytes(b"")
    Shelf(folder, "other", "site", 35_000).write("f", entry())


def test_two_processes_may_write_the_same(folder: Path) -> None:
    one, two = (Shelf(folder, "key", "site", 35_000) for _ in "ab")
    one.write("a", entry(1))
    two.write("a", entry(1))
    one.write("b", entry(2))
    assert same(two.read("b"), entry(2))
    two.write("b", entry(2))
    assert two._bytes == total(folder)


def test_an_entry_over_the_budget_is_not_kept(folder: Path) -> None:
    shelf = Shelf(folder, "key", "site", 15_000)
    shelf.write("a", entry())
    shelf.write("b", entry(kilobytes=20))
    assert shelf.read("b") is None
    assert shelf.read("a") is not None, "nothing is deleted for it"


def damaged(whole: bytes, kind: str) -> bytes:
    at = whole.index(b"}}") + 200  # within the tensors
    match kind:
        case "flipped":
            return whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
        case "last":
            return whole[:-1] + bytes([whole[-1] ^ 1])
        case "zeros":
            return bytes(len(whole))
        case "half":
            return whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2)
        case "another file":
            from safetensors.torch import save

            return save({"tokens": torch.zeros(2)})
    return whole[: int(kind)]


@pytest.mark.parametrize(
    "kind", ["0", "1", "7", "100", "-1", "-200", "flipped", "last", "zeros", "half", "another file"]
)
def test_a_damaged_entry_is_made_again(
    build: Callable[..., Any], cases: list[Case], computed: list[int], folder: Path, kind: str
) -> None:
    model = build()
    views = some_views(reader(model), cases[:1])
    (before,) = prefix(model).entries(views, ALONE)
    (path,) = files(folder)
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, kind))
    assert path.read_bytes() != whole
    (again,) = prefix(model).entries(views, ALONE)
    assert same(again, before)
    assert len(computed) == 2
    assert path.read_bytes() == whole


def test_no_damage_breaks_the_reading(folder: Path) -> None:
    shelf = Shelf(folder, "key", "site", 35_000)
    shelf.write("a", entry())
    path, whole = shelf._path("a"), shelf._path("a").read_bytes()
    draw = random.Random(0)  # noqa: S311
    for _ in range(300):
        broken = bytearray(whole)
        for _ in range(draw.choice([1, 3, 50])):
            # Mostly in the header, where it hurts most.
            broken[draw.randrange(draw.choice([8, 300, len(whole)]))] = draw.randrange(256)
        path.write_bytes(broken)
        found = shelf.read("a")
        assert found is None or same(found, entry())


def test_only_the_owner_can_read(
    build: Callable[..., Any], cases: list[Case], folder: Path
) -> None:
    before = os.umask(0)
    try:
        train(build(), cases)
    finally:
        os.umask(before)
    paths = list(folder.rglob("*"))
    assert len(paths) > 4
    for path in [folder, *paths]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    text = " ".join(str(path.relative_to(folder)) for path in paths)
    names = {text for case in cases for text in (case.case_id, case.subject_id)}
    assert not any(name in text for name in names)


def test_a_disk_that_refuses_is_one_clear_error(
    build: Callable[..., Any], cases: list[Case], folder: Path
) -> None:
    folder.parent.mkdir()
    folder.write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        train(build(), cases)
    assert caught.value.code == "SAM-S101"
