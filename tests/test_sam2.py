"""SAM 2 against transformers' own forward pass, its checkpoints under both names, and adapters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from samaritan.config import parse_config
from samaritan.errors import ConfigError, ModelError
from samaritan.models.adapter import (
    build_adapted,
    load_adapted,
    merged_state,
    read_adapter,
    save_adapter,
)
from samaritan.models.bases import BASES, Base, build_base, fitting_base
from samaritan.models.count import count_trained
from samaritan.models.family import Prompts, belongs
from samaritan.models.hiera import encode_hiera
from samaritan.models.presets import PRESETS, Insert, Preset
from samaritan.models.sam import FAMILY as SAM_FAMILY
from samaritan.models.sam2 import FAMILY, Sam2Shape, _prompt_tokens, construct
from samaritan.models.segmenter import Segmenter
from samaritan.training.losses import SegmentationLoss
from simulation.run import simulate

CPU = torch.device("cpu")
REAL = ("sam2_hiera_tiny", "sam2_hiera_small", "sam2_hiera_base_plus", "sam2_hiera_large")
REFUSED = {"med-sa", "ma-sam", "prompt-tuning"}

SHAPE = Sam2Shape(
    width=16, heads=1, stages=(1, 2, 3, 1), global_blocks=(4,), windows=(8, 4, 6, 3),
    position_grid=5, mlp_ratio=2.0, image_size=64, decoder_width=32, decoder_mlp=48,
    decoder_heads=2, iou_width=24,
)  # fmt: skip

Build = Callable[..., Any]


def pictures(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def stirred(module: Any, seed: int) -> Any:
    """Every parameter moved, those too that start at zero, so that each has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            wide = parameter.ndim > 1 and "embed" not in name and "token" not in name
            parameter.add_(noise / parameter[0].numel() ** 0.5 if wide else 0.3 * noise)
    return module


@pytest.fixture(scope="session")
def mini2_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small SAM 2 with SAM 2's own three masks, as transformers writes it."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("mini2") / "model.safetensors"
    save_file(stirred(construct(SHAPE, 3), 7).state_dict(), path)
    return path


@pytest.fixture
def mini2(monkeypatch: pytest.MonkeyPatch) -> Base:
    spec = Base(SHAPE, 64, 32, "sam2", checkpoint=("model.safetensors", "0" * 64))
    monkeypatch.setitem(BASES, "mini2", spec)
    return spec


@pytest.fixture
def adapted(mini2: Base, mini2_file: Path, config_on: Build) -> Build:
    """Adapted models on ``mini2``; ``stir`` moves what is trained."""

    def build(classes: int = 2, stir: float = 0.0, **sections: Any) -> Any:
        model = build_adapted(config_on("mini2", mini2_file, **sections), classes, CPU)
        generator = torch.Generator().manual_seed(17)
        with torch.no_grad():
            for parameter in model.trained.values():
                parameter.add_(stir * torch.randn(parameter.shape, generator=generator))
        return model

    return build


def official(model: Any, images: Tensor, **prompts: Tensor) -> Tensor:
    """(B, masks, h, w) all masks, by the forward pass of `Sam2Model`; prompts on squares alone."""
    rows, columns = images.shape[-2:]
    encoder = model.prompt_encoder
    encoder.image_embedding_size, encoder.input_image_size = (rows // 16, columns // 16), rows
    model.backbone_feature_sizes = [(rows // n, columns // n) for n in (4, 8, 16)]
    model.mask_decoder.dynamic_multimask_via_stability = False
    pixels = (images * 255 - model.pixel_mean) / model.pixel_std
    first, others = (
        model(pixel_values=pixels, multimask_output=many, **prompts).pred_masks[:, 0]
        for many in (False, True)
    )
    return torch.cat([first, others], 1)


SIZES = [(64, 64), (32, 32), (96, 64), (64, 160), (224, 224)]


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_feature_maps_equal_the_official_ones(
    mini2: Base, mini2_file: Path, size: tuple[int, int]
) -> None:
    encoder = build_base("mini2", 2, checkpoint=mini2_file).model.vision_encoder
    images = 2 * pictures(0, 2, 3, *size) - 1
    with torch.no_grad():
        expected = encoder(images).fpn_hidden_states[::-1]
        ours = encode_hiera(encoder, images)
        assert [m.shape[-2:] for m in ours] == [(size[0] // n, size[1] // n) for n in (16, 8, 4)]
        for a, b in zip(ours, expected, strict=True):
            assert distance(a, b) < 1e-5
        for name in ("pos_embed", "pos_embed_window"):  # a wrong table would be seen
            getattr(encoder.backbone, name).zero_()
            changed = encoder(images).fpn_hidden_states[::-1]
            assert all(distance(a, b) > 1e-3 for a, b in zip(changed, expected, strict=True))


@pytest.mark.parametrize("size", SIZES[:4], ids=lambda size: f"{size[0]}x{size[1]}")
def test_images_without_prompts_are_segmented_as_sam2_does(
    adapted: Build, size: tuple[int, int]
) -> None:
    segmenter = adapted(4, stir=0.1).segmenter
    images = pictures(1, 3, 3, *size)
    with torch.no_grad():
        ours, theirs = segmenter(images), official(segmenter.model, images)
    assert theirs.shape == (3, 5, size[0] // 4, size[1] // 4)
    assert ours.shape == (3, 5, *size)
    assert distance(ours, F.interpolate(theirs, size, mode="bilinear")) < 1e-5


def test_a_fresh_adapter_gives_the_logits_of_the_base(adapted: Build, mini2_file: Path) -> None:
    model = adapted()
    plain = build_base("mini2", 2, checkpoint=mini2_file).model
    images = pictures(2, 2, 3, 64, 64)
    with torch.no_grad():
        ours = model.segmenter(images)
        assert torch.equal(ours, Segmenter(plain, FAMILY, 32)(images))
        assert distance(ours, F.interpolate(official(plain, images), 64, mode="bilinear")) < 1e-5
        torch.nn.init.normal_(next(p for n, p in model.trained.items() if "lora_B_q" in n))
        assert not torch.equal(model.segmenter(images), ours)


POINTS = torch.tensor([[[3.0, 50.0], [40.25, 7.0]], [[63.0, 0.0], [20.0, 21.0]]])
BOXES = torch.tensor([[[5.0, 6.0, 40.0, 33.0]], [[0.0, 10.0, 63.0, 50.0]]])


def points_and_reference() -> Iterator[tuple[str, Prompts, dict[str, Tensor]]]:
    inside = torch.tensor([[1, 0], [0, 1]])
    corners = torch.tensor([[2, 3], [2, 3]])
    yield "points", Prompts(POINTS, inside), {
        "input_points": POINTS[:, None], "input_labels": inside[:, None],
    }  # fmt: skip
    yield "boxes", Prompts(BOXES.view(2, 2, 2), corners), {"input_boxes": BOXES}
    yield "a missing point", Prompts(POINTS, torch.tensor([[1, -1], [-1, 0]])), {
        "input_points": POINTS[:, None], "input_labels": torch.tensor([[[1, -1]], [[-1, 0]]]),
    }  # fmt: skip
    yield (
        "both",
        (Prompts(torch.cat([POINTS, BOXES.view(2, 2, 2)], 1), torch.cat([inside, corners], 1))),
        {"input_points": POINTS[:, None], "input_labels": inside[:, None], "input_boxes": BOXES},
    )


@pytest.mark.parametrize(("_", "prompts", "reference"), list(points_and_reference()))
def test_prompts_are_coded_as_sam2_does(
    mini2: Base, mini2_file: Path, _: str, prompts: Prompts, reference: dict[str, Tensor]
) -> None:
    model = build_base("mini2", 2, checkpoint=mini2_file).model
    model.prompt_encoder.input_image_size = 96  # not the model's own
    with torch.no_grad():
        ours = _prompt_tokens(model, prompts, 2, (96, 96))
        theirs, _dense = model.prompt_encoder(**{
            "input_points": None, "input_labels": None, "input_boxes": None, "input_masks": None,
            **reference,
        })  # fmt: skip
    assert distance(ours, theirs[:, 0]) < 1e-5


def test_without_prompts_sam2_is_shown_two_points_that_are_none(
    mini2: Base, mini2_file: Path
) -> None:
    model = build_base("mini2", 2, checkpoint=mini2_file).model
    nothing = Prompts(torch.zeros(3, 1, 2), torch.full((3, 1), -1))
    expected = _prompt_tokens(model, nothing, 3, (64, 64))
    assert expected.shape == (3, 2, 32)
    assert torch.equal(_prompt_tokens(model, None, 3, (64, 64)), expected)


def test_points_are_x_and_y_on_images_that_are_not_square(mini2: Base, mini2_file: Path) -> None:
    model = build_base("mini2", 2, checkpoint=mini2_file).model
    tall, square = (
        _prompt_tokens(model, Prompts(torch.tensor([[[x, y]]]), torch.ones(1, 1).long()), 1, size)
        for x, y, size in ((9.5, 19.5, (96, 32)), (19.5, 40 / 3 - 0.5, (64, 64)))
    )
    assert distance(tall, square) < 1e-5


def test_prompted_images_are_segmented_as_sam2_does(adapted: Build) -> None:
    segmenter = adapted(stir=0.1).segmenter
    images = pictures(3, 2, 3, 64, 64)
    without = segmenter(images).detach()
    for name, prompts, reference in points_and_reference():
        if name in ("points", "boxes"):
            with torch.no_grad():
                ours, theirs = (
                    segmenter(images, prompts),
                    official(segmenter.model, images, **reference),
                )
            assert distance(ours, F.interpolate(theirs, 64, mode="bilinear")) < 1e-5, name
            assert distance(ours, without) > 1e-3, name


def test_records_with_and_without_prompts_share_a_batch(adapted: Build) -> None:
    segmenter = adapted(stir=0.1).segmenter
    images = pictures(4, 3, 3, 64, 32)
    points = pictures(5, 3, 2, 2) * 30
    labels = torch.tensor([[1, 1], [-1, -1], [-1, 0]])
    with torch.no_grad():
        together = segmenter(images, Prompts(points, labels))
        alone = [
            segmenter(images[:1], Prompts(points[:1], labels[:1])),
            segmenter(images[1:2]),
            segmenter(images[2:], Prompts(points[2:, 1:], labels[2:, 1:])),
        ]
    assert distance(together, torch.cat(alone)) < 1e-5


# Gradients, stretches of blocks, precision.


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_equal_those_of_the_official_forward(adapted: Build, recompute: bool) -> None:
    model = adapted(stir=0.1)
    model.segmenter.recompute = recompute
    images, weights = pictures(6, 2, 3, 96, 64), pictures(7, 2, 3, 24, 16)
    trained = list(model.trained.values())
    low = F.interpolate(model.segmenter(images), (24, 16), mode="nearest-exact")
    theirs = F.interpolate(official(model.segmenter.model, images), (96, 64), mode="bilinear")
    theirs = F.interpolate(theirs, (24, 16), mode="nearest-exact")
    ours = torch.autograd.grad((low * weights).sum(), trained)
    expected = torch.autograd.grad((theirs * weights).sum(), trained)
    assert sum("lora" in name for name in model.trained) == 7 * 4 + 2 * 2 * 7
    for name, a, b in zip(model.trained, ours, expected, strict=True):
        assert distance(a, b) < 1e-3, name
        assert b.abs().max() > 1e-7, name


def test_recomputing_runs_every_block_twice(adapted: Build) -> None:
    model = adapted(stir=0.1)
    calls = []
    for block in model.segmenter.model.vision_encoder.backbone.blocks:
        block.attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    model.segmenter.recompute = True
    model.segmenter(pictures(8, 1, 3, 32, 32)).sum().backward()
    assert len(calls) == 14


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (32, 32)])
@pytest.mark.parametrize("blocks", range(8))
def test_a_frozen_beginning_can_be_run_once(
    adapted: Build, blocks: int, size: tuple[int, int]
) -> None:
    segmenter = adapted(stir=0.1).segmenter
    images = pictures(9, 3, 3, *size)
    with torch.no_grad():
        whole = segmenter(images)
        tokens = segmenter.to_tokens(images, blocks)
        if blocks:
            assert tokens.shape[:3] == (3, size[0] // 32, size[1] // 32)
        assert torch.equal(segmenter.from_tokens(tokens, blocks, size), whole)
        last = segmenter.from_tokens(tokens[2:].clone(), blocks, size)
    assert distance(last, whole[2:]) < 1e-5


def test_a_frozen_beginning_keeps_its_type_under_bf16(adapted: Build) -> None:
    segmenter = adapted().segmenter
    images = pictures(10, 1, 3, 64, 64)
    with torch.no_grad():
        exact = segmenter(images)
        segmenter.autocast_dtype = torch.bfloat16
        rough = segmenter(images)
        assert rough.dtype == torch.float32
        assert 0 < distance(rough, exact) < 0.2
        for blocks in range(1, 8):
            tokens = segmenter.to_tokens(images, blocks)
            assert tokens.dtype == torch.float32
            assert torch.equal(segmenter.from_tokens(tokens, blocks, (64, 64)), rough)


def test_records_do_not_see_each_other(adapted: Build) -> None:
    model = adapted(stir=0.1)
    images = pictures(11, 3, 3, 64, 32)
    labels = (pictures(12, 3, 64, 32) * 3).long()
    parameters, loss_of = list(model.trained.values()), SegmentationLoss(0.8)
    together = torch.autograd.grad(loss_of(model.segmenter(images), labels), parameters)
    alone = [
        torch.autograd.grad(loss_of(model.segmenter(i[None]), t[None]), parameters)
        for i, t in zip(images, labels, strict=True)
    ]
    for name, total, parts in zip(model.trained, together, zip(*alone, strict=True), strict=True):
        mean = torch.stack(parts).mean(0)
        assert (total - mean).norm() <= 1e-3 * mean.norm() + 1e-9, name


def test_adapters_see_one_row_per_record(adapted: Build) -> None:
    model = adapted()
    seen: dict[str, int] = {}
    for name, module in model.segmenter.model.named_modules():
        if name.endswith(("qkv", "q_proj", "v_proj")):
            module.register_forward_hook(
                lambda _, args, __, name=name: seen.__setitem__(name, len(args[0]))
            )
    model.segmenter(pictures(13, 3, 3, 64, 64))
    assert len(seen) == 7 + 14
    assert set(seen.values()) == {3}


# LoRA and presets.


def test_q_and_v_are_adapted_and_k_is_not(adapted: Build) -> None:
    model = adapted(stir=0.3)
    for index, block in enumerate(model.segmenter.model.vision_encoder.backbone.blocks):
        layer = block.attn.qkv
        assert layer.out_features == 3 * block.dim_out
        assert (layer.in_features != block.dim_out) == (index in (1, 3, 6))
        x = pictures(14, 2, 5, 5, layer.in_features)
        change = (layer(x) - layer.base_layer(x)).detach()
        q, k, v = change.split(block.dim_out, -1)
        assert min(q.abs().max(), v.abs().max()) > 1e-3
        assert torch.equal(k, torch.zeros_like(k))
        delta = layer.get_delta_weight("default").detach()
        assert torch.equal(
            delta[block.dim_out : 2 * block.dim_out], torch.zeros_like(delta[: block.dim_out])
        )
        assert distance(x @ delta.T, change) < 1e-4


def test_steps_move_what_is_trained_and_nothing_else(adapted: Build, check_steps: Any) -> None:
    model = adapted()
    check_steps(model, 64, rate=0.1)
    whole = {name for name in model.trained if "lora_" not in name}
    heads = ("mask_tokens.", "output_hyper", "upscale_", "conv_s")
    assert whole == {
        name for name, _ in construct(SHAPE, 2).named_parameters()
        if name.startswith(tuple(f"mask_decoder.{head}" for head in heads))
    }  # fmt: skip


def test_every_group_of_layers_is_there() -> None:
    model = construct(SHAPE, 2)
    names = [name for name, _ in model.named_parameters()]
    assert SAM_FAMILY.parts.keys() - FAMILY.parts.keys() == {"encoder.positions"}
    for part, pattern in FAMILY.parts.items():
        assert any(belongs(name, [pattern]) for name in names) == (part != "encoder.neck_norm"), (
            part
        )
    everything = [FAMILY.parts[part] for part in PRESETS["full"].train]
    assert all(belongs(name, everything) for name in names)
    decoder = [p for part, p in FAMILY.parts.items() if part.startswith("decoder.")]
    for name in names:
        assert belongs(name, decoder) == name.startswith("mask_decoder."), name


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - REFUSED))
def test_presets_that_sam2_takes(adapted: Build, preset: str) -> None:
    model = adapted(peft={"preset": preset})
    model.segmenter(pictures(18, 1, 3, 32, 64)).square().mean().backward()
    touched = {name for name, p in model.trained.items() if p.grad is not None}
    unused = (
        "mask_decoder.iou_prediction_head", "mask_decoder.pred_obj_score_head",
        "prompt_encoder.point_embed", "prompt_encoder.mask_embed",
    )  # fmt: skip
    assert {name for name in model.trained if not name.startswith(unused)} == touched


@pytest.mark.parametrize("preset", sorted(REFUSED))
def test_presets_that_sam2_lacks_the_layers_for(adapted: Build, preset: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted(peft={"preset": preset})
    assert caught.value.code == "SAM-C206"
    kinds = {insert.kind for insert in PRESETS[preset].inserts} - {"serial", "parallel"}
    assert all(f"inserts of the kind {kind}" in caught.value.message for kind in kinds)
    assert "serial" not in caught.value.message


def test_bottlenecks_through_hooks(adapted: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    inserts = (
        Insert("serial", "encoder.proj", 0.25), Insert("parallel", "encoder.mlp_block", 0.25),
        Insert("serial", "decoder.token_to_image", 0.25),
        Insert("serial", "decoder.image_to_token", 0.25),
        Insert("parallel", "decoder.mlp_block", 0.25),
    )  # fmt: skip
    monkeypatch.setitem(PRESETS, "bottlenecks", Preset("a test", inserts=inserts))
    images = pictures(19, 1, 3, 64, 64)
    with torch.no_grad():
        plain = adapted(peft={"preset": "lora-only"}).segmenter(images)
        fresh = adapted(peft={"preset": "bottlenecks"})
        assert torch.equal(fresh.segmenter(images), plain)
    model = adapted(stir=0.1, peft={"preset": "bottlenecks"})
    model.segmenter(images).sum().backward()
    assert len(model.trained) == 4 * (7 + 7 + 3 + 2 + 2)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trained.values())


def test_trained_position_tables_serve_any_size(adapted: Build) -> None:
    model = adapted(peft={"preset": "full"}, model={"image_size": [32, 96]})
    tables = [p for name, p in model.trained.items() if "pos_embed" in name]
    assert [tuple(p.shape) for p in tables] == [(1, 16, 5, 5), (1, 16, 8, 8)]
    assert model.segmenter(pictures(20, 1, 3, 64, 64)).shape == (1, 3, 64, 64)


def test_the_last_blocks_alone(adapted: Build) -> None:
    model = adapted(peft={"blocks": 2})
    assert model.frozen_blocks == 5
    blocks = {name.split("blocks.")[1][0] for name in model.trained if "blocks." in name}
    assert blocks == {"5", "6"}


def test_rank_variants(adapted: Build) -> None:
    images = pictures(21, 1, 3, 64, 64)
    with torch.no_grad():
        plain = adapted().segmenter(images)
        for variant in ("rslora", "dora"):
            assert distance(adapted(peft={"variant": variant}).segmenter(images), plain) < 1e-5
            model = adapted(stir=0.1, peft={"variant": variant})
            logits = model.segmenter(images)
            merged = construct(SHAPE, 2)
            merged.load_state_dict(merged_state(model))
            assert distance(logits, Segmenter(merged, FAMILY, 32)(images)) < 1e-4
            assert torch.equal(model.segmenter(images), logits)
    with pytest.raises(ModelError, match="rank 17") as caught:
        adapted(peft={"rank": 17})
    assert caught.value.code == "SAM-M301"


def test_an_adapter_is_saved_loaded_and_merged(
    adapted: Build, mini2_file: Path, tmp_path: Path
) -> None:
    model = adapted(stir=0.1)
    images = pictures(22, 2, 3, 64, 64)
    tree = {
        "model": {"base": "mini2", "checkpoint": str(mini2_file)},
        "peft": {"rank": 4},
        "training": {"precision": "fp32"},
    }
    save_adapter(tmp_path / "adapter", model, model.state(), parse_config(tree), {"a": 1, "b": 2})
    loaded = load_adapted(read_adapter(tmp_path / "adapter"))
    merged = construct(SHAPE, 2)
    merged.load_state_dict(merged_state(model), strict=True)
    plain = build_base("mini2", 2, checkpoint=mini2_file).model.state_dict()
    for name, value in merged.state_dict().items():
        changed = (value - plain[name]).abs().amax(tuple(range(1, value.ndim))) > 0
        if name.endswith("attn.qkv.weight"):
            assert [bool(third.any()) for third in changed.chunk(3)] == [True, False, True], name
        elif name.endswith(("attn.qkv.bias", "attn.proj.weight")):
            assert not changed.any(), name
    with torch.no_grad():
        logits = model.segmenter(images)
        assert torch.equal(loaded.segmenter.cpu()(images), logits)
        assert distance(Segmenter(merged, FAMILY, 32)(images), logits) < 1e-5


def test_what_the_family_does_not_take(adapted: Build) -> None:
    for section, code in (
        ({"model": {"decoder": "reference"}}, "SAM-C209"),
        ({"model": {"image_size": 48}}, "SAM-C203"),
        ({"model": {"image_size": [64, 80]}}, "SAM-C203"),
        ({"data": {"context_slices": 5}}, "SAM-C204"),
    ):
        with pytest.raises(ConfigError) as caught:
            adapted(**section)
        assert caught.value.code == code


def test_pixels_are_normalised_as_for_imagenet() -> None:
    model = construct(SHAPE, 1)
    assert model.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    assert model.pixel_std.flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])
    assert not {"pixel_mean", "pixel_std"} & model.state_dict().keys()
    assert construct(SHAPE, 1, channels=5).pixel_mean.shape == (5, 1, 1)


# Checkpoints.


def official_names(shape: Sam2Shape, tokens: int = 4) -> dict[str, str]:
    """Names in facebookresearch/sam2, written down from its modules -> those of transformers."""
    names: dict[str, str] = {"no_mem_embed": "no_memory_embedding"}

    def both(theirs: str, ours: str, kinds: tuple[str, ...] = ("weight", "bias")) -> None:
        names.update({f"{theirs}.{kind}": f"{ours}.{kind}" for kind in kinds})

    trunk, backbone = "image_encoder.trunk", "vision_encoder.backbone"
    for table in ("pos_embed", "pos_embed_window"):
        names[f"{trunk}.{table}"] = f"{backbone}.{table}"
    both(f"{trunk}.patch_embed.proj", f"{backbone}.patch_embed.projection")
    starts = {sum(shape.stages[:stage]) for stage in range(1, len(shape.stages))}
    for i in range(sum(shape.stages)):
        there, here = f"{trunk}.blocks.{i}", f"{backbone}.blocks.{i}"
        for a, b in (
            ("norm1", "layer_norm1"), ("norm2", "layer_norm2"), ("attn.qkv", "attn.qkv"),
            ("attn.proj", "attn.proj"), ("mlp.layers.0", "mlp.proj_in"),
            ("mlp.layers.1", "mlp.proj_out"), *([("proj", "proj")] if i in starts else []),
        ):  # fmt: skip
            both(f"{there}.{a}", f"{here}.{b}")
    for i in range(len(shape.stages)):
        both(f"image_encoder.neck.convs.{i}.conv", f"vision_encoder.neck.convs.{i}")
    prompts = "sam_prompt_encoder"
    names[f"{prompts}.pe_layer.positional_encoding_gaussian_matrix"] = (
        "prompt_encoder.shared_embedding.positional_embedding"
    )
    for embedding in ("not_a_point_embed", "no_mask_embed"):
        both(f"{prompts}.{embedding}", f"prompt_encoder.{embedding}", ("weight",))
    for i, layer in enumerate(
        ("conv1", "layer_norm1", None, "conv2", "layer_norm2", None, "conv3")
    ):
        if layer:
            both(f"{prompts}.mask_downscaling.{i}", f"prompt_encoder.mask_embed.{layer}")
    head = "sam_mask_decoder"
    for embedding in ("iou_token", "mask_tokens", "obj_score_token"):
        both(f"{head}.{embedding}", f"mask_decoder.{embedding}", ("weight",))
    attentions = ["final_attn_token_to_image"]
    for i in range(2):
        layer = f"transformer.layers.{i}"
        attentions += [
            f"layers.{i}.{a}"
            for a in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
        ]
        for n in range(1, 5):
            both(f"{head}.{layer}.norm{n}", f"mask_decoder.{layer}.layer_norm{n}")
        both(f"{head}.{layer}.mlp.layers.0", f"mask_decoder.{layer}.mlp.proj_in")
        both(f"{head}.{layer}.mlp.layers.1", f"mask_decoder.{layer}.mlp.proj_out")
    for attention in attentions:
        for a, b in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o")):
            both(
                f"{head}.transformer.{attention}.{a}_proj",
                f"mask_decoder.transformer.{attention}.{b}_proj",
            )
    both(f"{head}.transformer.norm_final_attn", "mask_decoder.transformer.layer_norm_final_attn")
    for i, layer in ((0, "upscale_conv1"), (1, "upscale_layer_norm"), (3, "upscale_conv2")):
        both(f"{head}.output_upscaling.{i}", f"mask_decoder.{layer}")
    for layer in ("conv_s0", "conv_s1"):
        both(f"{head}.{layer}", f"mask_decoder.{layer}")
    networks = [f"output_hypernetworks_mlps.{i}" for i in range(tokens)]
    for network in (*networks, "iou_prediction_head", "pred_obj_score_head"):
        for i, layer in enumerate(("proj_in", "layers.0", "proj_out")):
            both(f"{head}.{network}.layers.{i}", f"mask_decoder.{network}.{layer}")
    return names


VIDEO = (
    "maskmem_tpos_enc", "no_mem_pos_enc", "no_obj_ptr", "no_obj_embed_spatial",
    "mask_downsample.weight", "obj_ptr_proj.layers.0.weight", "obj_ptr_tpos_proj.bias",
    "memory_attention.layers.0.norm1.weight", "memory_encoder.fuser.layers.0.gamma",
)  # fmt: skip
HF_VIDEO = (
    "memory_temporal_positional_encoding", "no_memory_positional_encoding", "no_object_pointer",
    "occlusion_spatial_embedding_parameter", "mask_downsample.weight",
    "object_pointer_proj.proj_in.weight", "temporal_positional_encoding_projection_layer.bias",
    "memory_attention.layers.0.layer_norm1.weight", "memory_encoder.projection.weight",
)  # fmt: skip


def under_official_names(state: dict[str, Tensor], shape: Sam2Shape) -> dict[str, Tensor]:
    found = {theirs: state[ours] for theirs, ours in official_names(shape).items()}
    for i, row in enumerate(state["prompt_encoder.point_embed.weight"]):
        found[f"sam_prompt_encoder.point_embeddings.{i}.weight"] = row[None]
    return found


@pytest.mark.parametrize("wrapped", [True, False], ids=["as SAM 2.1", "as MedSAM2"])
def test_official_files_load(mini2: Base, mini2_file: Path, tmp_path: Path, wrapped: bool) -> None:
    torch.manual_seed(23)
    state = stirred(construct(SHAPE, 3), 23).state_dict()
    frequencies = "prompt_encoder.shared_embedding.positional_embedding"
    state["shared_image_embedding.positional_embedding"] = state[frequencies]
    theirs = under_official_names(state, SHAPE) | {name: torch.zeros(1) for name in VIDEO}
    assert len(theirs) == len(state) + 3 - 1 + len(VIDEO)  # four points for one, frequencies once
    torch.save({"model": theirs} if wrapped else theirs, tmp_path / "sam2.pt")
    built = build_base("mini2", 3, checkpoint=tmp_path / "sam2.pt").model.state_dict()
    assert built.keys() == state.keys()
    assert all(torch.equal(built[name], value) for name, value in state.items())


def test_files_of_transformers_video_models_load(
    mini2: Base, mini2_file: Path, tmp_path: Path
) -> None:
    state = build_base("mini2", 3, checkpoint=mini2_file).model.state_dict()
    video = state | {name: torch.zeros(1) for name in HF_VIDEO}
    save_file({k: v.clone() for k, v in video.items()}, tmp_path / "model.safetensors")
    built = build_base("mini2", 3, checkpoint=tmp_path / "model.safetensors").model.state_dict()
    assert built.keys() == state.keys()
    assert all(torch.equal(built[name], value) for name, value in state.items())


@pytest.mark.parametrize("spoil", ["missing", "unknown"])
def test_a_file_that_does_not_fit_is_refused(mini2: Base, tmp_path: Path, spoil: str) -> None:
    state = under_official_names(construct(SHAPE, 3).state_dict(), SHAPE)
    if spoil == "missing":
        state.pop("sam_prompt_encoder.point_embeddings.2.weight")
    else:
        state["image_encoder.trunk.extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "sam2.pt")
    with pytest.raises(ModelError) as caught:
        build_base("mini2", 3, checkpoint=tmp_path / "sam2.pt")
    assert caught.value.code == "SAM-M204"


@pytest.mark.parametrize("classes", [1, 3, 6])
def test_mask_tokens_come_from_those_of_the_file(
    mini2: Base, mini2_file: Path, classes: int
) -> None:
    four = build_base("mini2", 3, checkpoint=mini2_file).model.state_dict()
    built = build_base("mini2", classes, checkpoint=mini2_file).model.state_dict()
    decoder = "mask_decoder"
    for name in ("mask_tokens.weight", "iou_prediction_head.proj_out.weight"):
        rows = built[f"{decoder}.{name}"]
        assert len(rows) == classes + 1
        for i, row in enumerate(rows):
            assert torch.equal(row, four[f"{decoder}.{name}"][i % 4])
    for i in range(classes + 1):
        for layer in ("proj_in", "layers.0", "proj_out"):
            name = f"{decoder}.output_hypernetworks_mlps.{{}}.{layer}.weight"
            assert torch.equal(built[name.format(i)], four[name.format(i % 4)])


@pytest.mark.parametrize("name", REAL)
def test_the_base_of_a_file_is_told_under_both_names(name: str) -> None:
    with torch.device("meta"):
        state = construct(BASES[name].shape, 3).state_dict()
        official = under_official_names(state, BASES[name].shape)
        assert fitting_base(state | {n: torch.zeros(1) for n in HF_VIDEO}) == name
        assert fitting_base(official | {n: torch.zeros(1) for n in VIDEO}) == name


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Hiera small: 38,538,833 in a published list of 359 tensors under the official names, with
        # the 256 frequencies that are no parameters.
        ("sam2_hiera_small", 38_538_833 - 256),
        ("sam2_hiera_tiny", 31_440_721),
    ],
)
def test_the_published_sizes(name: str, parameters: int) -> None:
    counted = count_trained(name, "lora-only", 4, 3)
    assert counted.parameters == parameters
    shape = BASES[name].shape
    widths = [shape.width * 2**stage for stage in range(4)]
    lora = 0
    for stage, (width, blocks) in enumerate(zip(widths, shape.stages, strict=True)):
        for block in range(blocks):
            entering = widths[stage - 1] if stage and block == 0 else width
            lora += 2 * 4 * (entering + width)
    # Two self-attentions of 256 to 256, five cross-attentions of 256 to 128.
    lora += 2 * 4 * (2 * (256 + 256) + 5 * (256 + 128))
    assert counted.trained == lora
    if name == "sam2_hiera_small":
        assert len(official_names(shape)) + 4 == 359


def test_listing_bases_does_not_import_transformers_models() -> None:
    code = (
        "import sys, samaritan.models.bases; "
        "sys.exit('transformers.models.sam2.modeling_sam2' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# A federation.


def test_sites_train_sam2_together(mini2: Base, mini2_file: Path, tmp_path: Path) -> None:
    config = parse_config({
        "name": "sam2",
        "rounds": 2,
        "model": {"base": "mini2", "checkpoint": str(mini2_file), "image_size": 32},
        "peft": {"rank": 2},
        "data": {"source": "phantoms", "sites": 2, "cases_per_site": 2, "slice_axis": "axial"},
        "training": {"slices_per_case": 2, "batch_size": 4, "precision": "fp32"},
    })  # fmt: skip
    summary = simulate(config, tmp_path / "run")
    assert summary["base"]["name"] == "mini2"
    assert summary["peft"]["trainable_parameters"] > 0
    assert [r["round"] for r in summary["rounds"]] == [1, 2]
    for entry in summary["rounds"]:
        assert {site["status"] for site in entry["sites"].values()} == {"ok"}
    saved = load_adapted(read_adapter(tmp_path / "run" / "adapter"))
    assert any(p.abs().sum() > 0 for name, p in saved.trained.items() if "lora_B" in name)
