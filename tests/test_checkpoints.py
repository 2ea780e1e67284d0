"""Checkpoint files: what is read, what is refused, and tokens for any number of classes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from samaritan.config import PeftConfig
from samaritan.errors import ModelError
from samaritan.models import memory
from samaritan.models.adapt import adapt
from samaritan.models.bases import BASES, build_base, fitting_base
from samaritan.models.checkpoints import file_sha256, read_state
from samaritan.models.sam import construct

HYPERNETWORKS = "mask_decoder.output_hypernetworks_mlps."
PATCHES = "image_encoder.patch_embed.proj.weight"

pytestmark = pytest.mark.usefixtures("mini")


@pytest.fixture
def state(mini_file: Path) -> dict[str, Tensor]:
    """The tensors of the small checkpoint, under official names."""
    return load_file(mini_file)


def refused(code: str, path: Path, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        build_base("mini", 3, checkpoint=path, **options)
    assert caught.value.code == code, str(caught.value)
    return caught.value.message


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is read.


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_is_loaded(
    tmp_path: Path, state: dict[str, Tensor], name: str, wrapped: bool
) -> None:
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "epoch": 3} if wrapped else state, path)
    built = build_base("mini", 3, checkpoint=path, expected_sha256=file_sha256(path))
    assert equal(built.model.state_dict(), state)
    assert built.sha256 == file_sha256(path)
    assert not built.model.training


def test_a_file_of_vit_b_loads_as_pth(vit_b_file: Path, tmp_path: Path) -> None:
    state = load_file(vit_b_file)
    torch.save(state, tmp_path / "sam_vit_b.pth")
    built = build_base("vit_b", 3, checkpoint=tmp_path / "sam_vit_b.pth")
    assert equal(built.model.state_dict(), state)
    assert fitting_base(state) == "vit_b"
    (tmp_path / "sam_vit_b.pth").unlink()


def test_half_precision_files_become_float32(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "half.pth")
    sam = build_base("mini", 3, checkpoint=tmp_path / "half.pth").model
    assert {t.dtype for t in sam.state_dict().values()} == {torch.float32}


# What is refused.


def test_an_altered_file_is_refused(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "a.pth")
    message = refused("SAM-M202", tmp_path / "a.pth", expected_sha256="0" * 64)
    assert file_sha256(tmp_path / "a.pth") in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop(PATCHES), ["missing", PATCHES]),
        (lambda s: s.update(extra=torch.ones(1)), ["unknown", "extra"]),
        (
            lambda s: s.update({PATCHES: torch.ones(48, 3, 4, 4)}),
            [PATCHES, "(48, 3, 4, 4)", "(32,"],
        ),
        (lambda s: s.clear(), ["missing", "..."]),
        (lambda s: s.update({"mask_decoder.mask_tokens.weight": torch.ones(0, 32)}), ["(0, 32)"]),
        (lambda s: s.update({"mask_decoder.mask_tokens.weight": torch.ones(9, 32)}), ["(4,"]),
        (lambda s: s.update({"mask_decoder.mask_tokens.weight": torch.ones(())}), ["()"]),
    ],
    ids=["missing", "unknown", "width", "empty", "no token", "nine tokens", "scalar"],
)
def test_a_file_for_another_base_is_refused_by_name(
    tmp_path: Path, state: dict[str, Tensor], change: Callable[[dict[str, Tensor]], Any],
    words: list[str],
) -> None:  # fmt: skip
    change(state)
    torch.save(state, tmp_path / "a.pth")
    message = refused("SAM-M204", tmp_path / "a.pth")
    for word in words:
        assert word in message


def test_a_vit_l_file_does_not_load_into_vit_b(tmp_path: Path) -> None:
    state = {
        "image_encoder.pos_embed": torch.zeros(1, 64, 64, 1024),
        PATCHES: torch.zeros(1024, 3, 16, 16),
        "image_encoder.blocks.23.norm1.weight": torch.zeros(1024),
    }
    save_file(state, tmp_path / "vit_l.safetensors")
    with pytest.raises(ModelError) as caught:
        build_base("vit_b", 3, checkpoint=tmp_path / "vit_l.safetensors")
    assert caught.value.code == "SAM-M204"
    assert "blocks.23" in caught.value.message
    assert f"{PATCHES} (1024, 3, 16, 16) instead of (768, 3, 16, 16)" in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "gone.pth" in refused("SAM-M201", tmp_path / "gone.pth")
    refused("SAM-M201", tmp_path)


def test_a_base_without_its_checkpoint() -> None:
    with pytest.raises(ModelError, match=r"sam_vit_b_01ec64\.pth") as caught:
        build_base("vit_b", 2)
    assert caught.value.code == "SAM-M103"


def test_the_embedded_base_refuses_a_checkpoint_of_another(mini_file: Path) -> None:
    with pytest.raises(ModelError) as caught:
        build_base("tiny", 2, checkpoint=mini_file)
    assert caught.value.code == "SAM-M204"


def test_the_embedded_base_may_have_been_trained_elsewhere(tmp_path: Path) -> None:
    """Then presets train no more of it than of any other base."""
    fresh = build_base("tiny", 2)
    state = {name: value + 0.01 for name, value in fresh.model.state_dict().items()}
    save_file(state, tmp_path / "own.safetensors")
    own = build_base("tiny", 2, checkpoint=tmp_path / "own.safetensors")
    assert own.sha256 != fresh.sha256
    assert all(torch.equal(v, state[name]) for name, v in own.model.state_dict().items())
    how = {"input_size": (48, 48), "depth": 1, "seed": 0}
    trained = [
        set(adapt(base.model, base.spec, PeftConfig(preset="lora-only"), **how)[1])  # type: ignore[arg-type]
        for base in (fresh, own)
    ]
    assert trained[1] < trained[0]
    assert all(".lora_" in name for name in trained[1])


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_never_run(
    tmp_path: Path, state: dict[str, Tensor], how: str
) -> None:
    path, mark = tmp_path / "bomb.pth", tmp_path / "exploded"
    loaded: Any = {**state, "bomb": Bomb(mark)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(loaded, protocol=2))
    else:
        torch.save(loaded, path, _use_new_zipfile_serialization=how == "torch")
    refused("SAM-M203", path)
    assert not mark.exists()
    if how == "torch":  # the bomb is live: without our care it goes off
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("keep", [0, 4, 1000, -1000])
def test_a_truncated_file_is_refused(
    tmp_path: Path, state: dict[str, Tensor], suffix: str, keep: int
) -> None:
    path = tmp_path / f"cut{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    assert path.name in refused("SAM-M203", path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"<html>404 Not Found</html>", b"hello world\n" * 9, b"\x80\x02"]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_bytes(content)
    refused("SAM-M203", path)


@pytest.mark.parametrize("content", [[1, 2], {"lr": 0.1}, {1: torch.ones(1)}, torch.ones(3)])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ModelError, match="no state dict") as caught:
        read_state(tmp_path / "a.pth")
    assert caught.value.code == "SAM-M203"


# Tokens.


@pytest.mark.parametrize("classes", [1, 2, 3, 5, 9])
def test_tokens_start_from_the_official_ones_modulo_four(
    mini_file: Path, state: dict[str, Tensor], classes: int
) -> None:
    fitted = build_base("mini", classes, checkpoint=mini_file).model.state_dict()
    for token in range(classes + 1):
        old = token % 4
        for name in ("mask_tokens.weight", "iou_prediction_head.layers.2.weight",
                     "iou_prediction_head.layers.2.bias"):  # fmt: skip
            ours, theirs = (s[f"mask_decoder.{name}"] for s in (fitted, state))
            assert ours.shape[0] == classes + 1
            assert torch.equal(ours[token], theirs[old])
        for layer in range(3):
            for part in ("weight", "bias"):
                rest = f"layers.{layer}.{part}"
                ours = fitted[f"{HYPERNETWORKS}{token}.{rest}"]
                assert torch.equal(ours, state[f"{HYPERNETWORKS}{old}.{rest}"])
    shared = [
        n for n in state if "mask_tokens" not in n and "iou_pred" not in n and "hyper" not in n
    ]
    assert all(torch.equal(fitted[name], state[name]) for name in shared)


def test_more_than_ten_hypernetworks_are_told_apart(
    tmp_path: Path, mini: Any, state: dict[str, Tensor]
) -> None:
    torch.manual_seed(1)
    wide = construct(mini.shape, 11).state_dict()
    torch.save(wide, tmp_path / "wide.pth")
    fitted = build_base("mini", 1, checkpoint=tmp_path / "wide.pth").model.state_dict()
    name = "layers.0.weight"
    assert torch.equal(fitted[f"{HYPERNETWORKS}1.{name}"], wide[f"{HYPERNETWORKS}1.{name}"])
    assert not torch.equal(fitted[f"{HYPERNETWORKS}1.{name}"], wide[f"{HYPERNETWORKS}10.{name}"])


def test_copied_hypernetworks_learn_apart(mini_file: Path) -> None:
    sam = build_base("mini", 5, checkpoint=mini_file).model
    networks = sam.mask_decoder.output_hypernetworks_mlps
    with torch.no_grad():
        networks[0].layers[0].weight.add_(1)
    assert not torch.equal(networks[0].layers[0].weight, networks[4].layers[0].weight)


# Which base a file is for.


@pytest.mark.parametrize("name", ["vit_b", "vit_l", "vit_h"])
@pytest.mark.parametrize("classes", [3, 9])
def test_the_base_of_a_file_is_told_by_its_shapes(name: str, classes: int) -> None:
    with torch.device("meta"):
        state = construct(BASES[name].shape, classes).state_dict()
    assert fitting_base(state) == name
    state.pop("image_encoder.neck.0.weight")
    with pytest.raises(ModelError):
        fitting_base(state)


@pytest.mark.parametrize("state", [{}, {PATCHES: torch.zeros(32, 3, 4, 4)}])
def test_a_file_of_no_known_base(state: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError) as caught:
        fitting_base(state)
    assert caught.value.code == "SAM-M205"


# Memory.


def test_a_base_that_does_not_fit_in_memory_is_refused_before_its_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 2**30)
    with pytest.raises(ModelError) as caught:
        build_base("vit_h", 3, checkpoint=tmp_path / "absent.pth")
    assert caught.value.code == "SAM-M104"
    assert "2.9 GiB" in caught.value.message
    assert "2.0 GiB" in caught.value.message
    with pytest.raises(ModelError) as caught:
        build_base("vit_b", 3, checkpoint=tmp_path / "absent.pth")
    assert caught.value.code == "SAM-M201"  # this one would fit


def test_memory_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/meminfo": ["MemTotal: 9000 kB", "MemAvailable: 8000 kB"],
        "/sys/fs/cgroup/memory.max": ["6000000"],
        "/sys/fs/cgroup/memory.current": ["3000000"],
        "/sys/fs/cgroup/memory.stat": ["anon 5", "inactive_file 1000000"],
    }
    monkeypatch.setattr(memory, "_lines", lambda path: files.get(path, []))
    assert memory.available_bytes() == 4_000_000
    files["/sys/fs/cgroup/memory.max"] = ["max"]
    assert memory.available_bytes() == 8_192_000
    files.clear()
    assert memory.available_bytes() is None
    memory.require_memory("vit_h", 10**12)  # unknown is not refused
