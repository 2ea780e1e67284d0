"""Adapters as named tensors, as files, and merged into official checkpoints."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from samaritan.config import parse_config
from samaritan.errors import ModelError, SamaritanError
from samaritan.models.adapter import (
    build_adapted,
    card_of,
    load_adapted,
    merged_state,
    read_adapter,
    save_adapter,
)
from samaritan.models.official import modeling
from samaritan.models.sam import FAMILY, construct
from samaritan.models.segmenter import Segmenter

CLASSES = {"anterior": 4, "posterior": 2}

Build = Callable[..., Any]


@pytest.fixture
def images() -> Tensor:
    return torch.rand((2, 3, 44, 44), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(adapted_mini: Build, mini_config: Build, tmp_path: Path) -> Path:
    """An adapter folder; its adapter is noise."""
    model = adapted_mini(stir=0.1)
    save_adapter(tmp_path / "adapter", model, model.state(), mini_config(), CLASSES)
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model: Any, images: Tensor) -> Tensor:
    return model.segmenter(images.to(model.segmenter.device)).cpu()


# States.


def test_a_state_carries_the_whole_adapter(adapted_mini: Build, images: Tensor) -> None:
    taught, fresh = adapted_mini(stir=0.1), adapted_mini()
    state = taught.state()
    assert sum(t.numel() for t in state.values()) == taught.parameters()
    assert not torch.equal(logits(fresh, images), logits(taught, images))
    fresh.load(state)
    assert torch.equal(logits(fresh, images), logits(taught, images))
    assert all(torch.equal(fresh.state()[name], state[name]) for name in state)


def test_a_state_is_a_copy_under_official_names(adapted_mini: Build) -> None:
    model = adapted_mini()
    state = model.state()
    kept = {name: t.clone() for name, t in state.items()}
    for tensor in state.values():
        tensor.add_(1)
    assert all(torch.equal(model.state()[name], kept[name]) for name in kept)
    assert "image_encoder.blocks.0.attn.qkv.lora_A_q.weight" in state
    assert "mask_decoder.transformer.layers.0.self_attn.q_proj.lora_B.weight" in state
    assert "mask_decoder.mask_tokens.weight" in state
    assert not [n for n in state if "base_model" in n or "default" in n or "base_layer" in n]


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("mask_decoder.mask_tokens.weight", lambda t: None, "missing mask_decoder.mask_tokens"),
        ("mask_decoder.mask_tokens.weight", lambda t: t[:2], "(2, 32) instead of (3, 32)"),
        ("mask_decoder.mask_tokens.weight", lambda t: t * torch.nan, "is not finite"),
        ("mask_decoder.mask_tokens.weight", lambda t: t + torch.inf, "is not finite"),
        ("mask_decoder.iou_token.weight", lambda t: torch.zeros(1, 32), "unknown mask_decoder.iou"),
    ],
    ids=["missing", "shape", "nan", "inf", "unknown"],
)
def test_a_state_that_does_not_fit_is_refused_whole(
    adapted_mini: Build, name: str, spoil: Callable[[Any], Any], words: str
) -> None:
    model = adapted_mini()
    before = model.state()
    state = {n: t + 1 for n, t in before.items()}
    state[name] = spoil(state.get(name))
    if state[name] is None:
        del state[name]
    with pytest.raises(ModelError) as caught:
        model.load(state)
    assert caught.value.code == "SAM-M302"
    assert words in caught.value.message
    assert all(torch.equal(t, before[n]) for n, t in model.state().items())


def test_many_faults_are_counted(adapted_mini: Build) -> None:
    model = adapted_mini()
    with pytest.raises(ModelError, match=f"and {len(model.trained) - 3} more"):
        model.load({})


# Folders.


def test_a_saved_adapter_predicts_the_same(
    adapted_mini: Build, folder: Path, images: Tensor
) -> None:
    saved = read_adapter(folder)
    assert saved.classes == CLASSES
    assert list(saved.classes) == list(CLASSES)
    assert torch.equal(logits(load_adapted(saved), images), logits(adapted_mini(stir=0.1), images))


def test_the_folder_holds_safetensors_and_a_peft_configuration(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.") for name in tensors)
    assert not list(folder.glob("*.partial"))
    config = peft.LoraConfig.from_pretrained(str(folder))
    assert (config.peft_type, config.r, config.lora_alpha) == (peft.PeftType.LORA, 4, 4)


def test_peft_itself_loads_the_tensors(adapted_mini: Build, folder: Path, images: Tensor) -> None:
    model = adapted_mini()
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
    outcome = peft.set_peft_model_state_dict(model.base.model, tensors)
    assert not outcome.unexpected_keys
    assert torch.equal(logits(model, images), logits(adapted_mini(stir=0.1), images))


def test_the_checkpoint_may_have_moved(
    folder: Path, mini_file: Path, tmp_path: Path, images: Tensor
) -> None:
    moved = tmp_path / "elsewhere.safetensors"
    moved.write_bytes(mini_file.read_bytes())
    saved = read_adapter(folder)
    section = saved.config.model.model_copy(update={"checkpoint": str(tmp_path / "gone.pth")})
    saved = replace(saved, config=saved.config.model_copy(update={"model": section}))
    with pytest.raises(ModelError, match="gone"):
        load_adapted(saved)
    assert logits(load_adapted(saved, moved), images).shape == (2, 3, 44, 44)


def test_another_base_is_refused(folder: Path, mini_file: Path, tmp_path: Path) -> None:
    state = load_file(mini_file)
    state["image_encoder.neck.0.weight"][0, 0] += 1e-3
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(ModelError) as caught:
        load_adapted(read_adapter(folder), tmp_path / "other.safetensors")
    assert caught.value.code == "SAM-M304"


def spoil_tensors(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_card(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "samaritan.json"
        path.write_text(json.dumps(change(json.loads(path.read_text()))))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "samaritan.json").unlink(),
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "samaritan.json").write_text("{"),
        lambda folder: (folder / "samaritan.json").write_bytes(b"\xff\xfe\x00"),
        spoil_tensors,
        spoil_card(lambda card: []),
        spoil_card(lambda card: card | {"classes": ["liver"]}),
        spoil_card(lambda card: card | {"classes": {"liver": "one"}}),
        spoil_card(lambda card: card | {"base": "vit_b"}),
        spoil_card(lambda card: {k: v for k, v in card.items() if k != "base"}),
    ],
    ids=[
        "no card",
        "no tensors",
        "json",
        "utf-8",
        "cut",
        "list",
        "classes",
        "value",
        "base",
        "key",
    ],
)
def test_a_damaged_folder_is_refused(folder: Path, spoil: Callable[[Path], Any]) -> None:
    spoil(folder)
    with pytest.raises(SamaritanError) as caught:
        read_adapter(folder)
    assert caught.value.code == "SAM-M303"


def test_the_card_of_a_base(adapted_mini: Build) -> None:
    model = adapted_mini()
    card = card_of(model.base)
    assert (card["name"], card["sha256"]) == ("mini", model.base.sha256)
    assert card["parameters"] == model.base.parameters
    assert json.loads(json.dumps(card))["hyper_parameters"]["shape"]["width"] == 32


# Merging.


def k_rows(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    return {n: t[width : 2 * width] for n, t in state.items() if ".attn.qkv." in n}


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_a_merged_adapter_is_a_sam(
    adapted_mini: Build, mini: Any, images: Tensor, classes: int
) -> None:
    model = adapted_mini(classes, stir=0.1, peft={"alpha": 6.0})
    before, expected = model.state(), logits(model, images)
    sam = construct(mini.shape, classes)
    sam.load_state_dict(merged_state(model), strict=True)
    with torch.no_grad():
        merged = Segmenter(sam, FAMILY, 4)(images)
    assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert torch.equal(logits(model, images), expected)
    assert all(torch.equal(t, before[name]) for name, t in model.state().items())


def test_three_classes_on_vit_b_give_an_official_checkpoint(vit_b_file: Path) -> None:
    config = parse_config(
        {
            "model": {"base": "vit_b", "checkpoint": str(vit_b_file)},
            "peft": {"rank": 4},
            "training": {"precision": "fp32"},
        }
    )
    model = build_adapted(config, 3, torch.device("cpu"))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    modeling()
    stock = importlib.import_module("samaritan._segment_anything.build_sam")
    official = stock.sam_model_registry["vit_b"]()
    merged = merged_state(model)
    assert list(merged) == list(official.state_dict())
    official.load_state_dict(merged, strict=True)
    before = load_file(vit_b_file)
    for name, rows in k_rows(merged, 768).items():
        assert torch.equal(rows, k_rows(before, 768)[name]), name
    changed = {name for name in merged if not torch.equal(merged[name], before[name])}
    assert len([n for n in changed if n.endswith("attn.qkv.weight")]) == 12
    assert len([n for n in changed if n.endswith(("q_proj.weight", "v_proj.weight"))]) == 14
    images = torch.rand((1, 3, 64, 64), generator=generator)
    with torch.no_grad():
        expected, ours = model.segmenter(images), Segmenter(official, FAMILY, 16)(images)
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
