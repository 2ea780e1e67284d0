"""The reference that benchmarks measure against computes what our model computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.reference import Reference, copy_weights, reference_loss
from samaritan.config import parse_config
from samaritan.models.adapter import build_adapted
from samaritan.models.bases import BASES
from samaritan.models.encoder import encode_image
from samaritan.models.sam import construct
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import batch_gradients, batch_parts

CPU = torch.device("cpu")


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def records(count: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 1, size, size, generator=generator)
    return images, torch.randint(0, 3, (count, size, size), generator=generator)


@pytest.fixture
def adapted_vit_b(vit_b_file: Path) -> Callable[[int], Any]:
    """FLAP-SAM's setting on random ViT-B weights, no part of the adapter zero."""

    def build(size: int) -> Any:
        model = {"base": "vit_b", "checkpoint": str(vit_b_file), "decoder": "reference"}
        config = parse_config(
            {
                "model": model | {"image_size": size},
                "peft": {"preset": "flap-sam", "rank": 32},
                "training": {"precision": "fp32"},
            }
        )
        adapted = build_adapted(config, 2, CPU)
        generator = torch.Generator().manual_seed(17)
        with torch.no_grad():
            for parameter in adapted.trained.values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        return adapted

    return build


@pytest.fixture
def wide_mini(
    mini: Any, monkeypatch: pytest.MonkeyPatch, randomise: Any, tmp_path: Path
) -> tuple[Any, Path]:
    """`mini` with a wider decoder: of its own, the fourth stage would have a single channel.

    The norm before it would be over two channels, which makes tens of times more of every rounding
    error; both implementations then stray equally far from a computation in float64.
    """
    spec = replace(mini, shape=replace(mini.shape, decoder_width=128))
    monkeypatch.setitem(BASES, "mini", spec)
    torch.manual_seed(5)
    sam = construct(spec.shape, 3)
    randomise(sam, 5)
    save_file(sam.state_dict(), tmp_path / "mini.safetensors")
    return spec.shape, tmp_path / "mini.safetensors"


@pytest.mark.parametrize("size", [64, 44])
def test_logits_and_gradients_are_ours(
    wide_mini: tuple[Any, Path], adapted_mini: Any, size: int
) -> None:
    shape, file = wide_mini
    ours = adapted_mini(
        stir=0.1, model={"checkpoint": str(file), "decoder": "reference", "image_size": size}
    )
    reference = Reference(shape, size, 2, 4)
    copy_weights(ours, reference)
    trained = reference.trained()
    assert trained.keys() == ours.trained.keys()
    images, labels = records(3, size)
    logits = reference(images)
    assert distance(ours.segmenter(images), logits) < 1e-5
    loss_of = SegmentationLoss(0.8)
    theirs = torch.autograd.grad(loss_of(logits, labels), list(trained.values()))
    with batch_parts(CPU, len(images)) as parts:
        batch_gradients(
            ours.segmenter, loss_of, images, labels, list(ours.trained.values()), parts
        )  # fmt: skip
    scale = max(float(gradient.abs().max()) for gradient in theirs)
    for name, gradient in zip(trained, theirs, strict=True):
        assert gradient.abs().max() > 1e-4 * scale, name
        assert distance(ours.trained[name].grad, gradient) < 1e-4, name


def test_its_loss_is_the_formula() -> None:
    logits = torch.tensor([[[[0.0, 2.0]], [[1.0, 0.0]]]])
    labels = torch.tensor([[[1, 0]]])
    background, class_1 = logits.softmax(1)[0, :, 0]
    entropy = -(class_1[0].log() + background[1].log()) / 2
    dice = [2 * background[1] / (background.square().sum() + 1)]
    dice.append(2 * class_1[0] / (class_1.square().sum() + 1))
    expected = 0.2 * entropy + 0.8 * (1 - sum(dice) / 2)
    assert distance(reference_loss(logits, labels), expected) < 1e-4


@pytest.mark.parametrize(("size", "parameters"), [(224, 90_532_927), (512, 91_187_263)])
def test_it_has_the_published_number_of_parameters(size: int, parameters: int) -> None:
    """Counted from FLAP-SAM's own code, see the notes on peers."""
    with torch.device("meta"):
        reference = Reference(BASES["vit_b"].shape, size, 2, 32)
    lora = sum(p.numel() for name, p in reference.trained().items() if "lora_" in name)
    assert sum(p.numel() for p in reference.parameters()) == parameters + lora
    assert sum(p.numel() for p in reference.trained().values()) == 1_846_384


@pytest.mark.parametrize("size", [224, pytest.param(512, marks=pytest.mark.slow)])
def test_vit_b_logits_are_ours(adapted_vit_b: Callable[[int], Any], size: int) -> None:
    ours = adapted_vit_b(size)
    reference = Reference(BASES["vit_b"].shape, size, 2, 32)
    copy_weights(ours, reference)
    images, _ = records(1, size)
    with torch.no_grad():
        assert distance(ours.segmenter(images), reference(images)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("size", [512, 1024])
def test_the_vit_b_encoder_is_the_official_one(
    adapted_vit_b: Callable[[int], Any], size: int
) -> None:
    ours = adapted_vit_b(size)
    reference = Reference(BASES["vit_b"].shape, size, 2, 32)
    copy_weights(ours, reference)
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = reference.sam.image_encoder(pixels)
        assert distance(encode_image(ours.segmenter.model.image_encoder, pixels), expected) < 1e-5
