"""Every way of adapting SAM: what it trains, what it changes, and that it survives a file."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from samaritan.errors import ConfigError, ModelError
from samaritan.models import attention
from samaritan.models.adapter import (
    build_adapted,
    load_adapted,
    merged_state,
    read_adapter,
    save_adapter,
)
from samaritan.models.bases import build_base
from samaritan.models.count import count_trained
from samaritan.models.encoder import _block, encode_image
from samaritan.models.lora import LoraQKV, official_name
from samaritan.models.presets import PRESETS
from samaritan.models.sam import FAMILY, construct
from samaritan.models.segmenter import Segmenter
from samaritan.training.losses import SegmentationLoss

Build = Callable[..., Any]

MERGEABLE = {n for n, p in PRESETS.items() if {i.kind for i in p.inserts} <= {"factors"}}

IDLE = (
    "mask_decoder.iou_prediction_head.",
    "prompt_encoder.point_embeddings.",
    "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.mask_downscaling.",
)
"""Trained by name in some published methods, and without any part in a promptless mask."""

PAPER = {
    "full": 90_532_927,
    "attention-only": 30_053_104,
    "decoder-only": 3_902_195,
    "partial-decoder": 478_320,
    "lora-only": 1_368_064,
    "lora-decoder": 5_270_259,
    "flap-sam": 1_846_384,
}


def images(seed: int = 1, count: int = 2) -> Tensor:
    return torch.rand((count, 3, 40, 40), generator=torch.Generator().manual_seed(seed))


def labels() -> Tensor:
    return torch.randint(0, 3, (2, 40, 40), generator=torch.Generator().manual_seed(2))


def logits(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.segmenter(x)
    return result


# Counts.


@pytest.mark.parametrize("preset", PAPER)
def test_counts_are_those_of_the_paper(preset: str) -> None:
    counted = count_trained("vit_b", preset, 32, 2, 224, "reference")
    assert counted.trained == PAPER[preset]


def test_the_papers_savings() -> None:
    ratios = {name: PAPER["full"] / count for name, count in PAPER.items()}
    for name, factor in (
        ("decoder-only", 23.2), ("partial-decoder", 189.3), ("lora-only", 66.2),
        ("lora-decoder", 17.2), ("flap-sam", 49.0),
    ):  # fmt: skip
        assert round(ratios[name], 1) == factor


def test_counts_of_the_official_decoder_and_of_larger_bases() -> None:
    # notes of the SAMed and FLAP-SAM settings: 4.212 M, 3.968 M, 6.066 M
    assert count_trained("vit_b", "samed", 4, 3).trained == 4_212_016
    assert round(count_trained("vit_l", "flap-sam", 32, 3).trained / 1e6, 3) == 3.968
    assert round(count_trained("vit_h", "flap-sam", 32, 3).trained / 1e6, 3) == 6.066
    assert count_trained("vit_b", "samed-s", 4, 3).trained == 944_304


def test_counts_of_added_modules() -> None:
    heads = count_trained("vit_b", "partial-decoder", 32, 2, 224).trained
    med_sa = count_trained("vit_b", "med-sa", 32, 2, 224).trained - heads
    decoder = 2 * 3 * (2 * 256 * 64 + 64 + 256)
    assert med_sa == 12 * 3 * 295_872 + decoder
    prompt_encoder = 6_220
    ma_sam = count_trained("vit_b", "ma-sam", 32, 2, 224).trained
    decoder_only = count_trained("vit_b", "decoder-only", 32, 2, 224).trained
    assert ma_sam - decoder_only - prompt_encoder == 12 * 2 * 1_034_112 + 73_728
    assert count_trained("vit_b", "prompt-tuning", 32, 2, 224).trained - heads == 12 * 10 * 768


def test_the_command_counts_as_the_paper_does(samaritan: Any) -> None:
    done = samaritan(
        "models", "count", "--base", "vit_b", "--preset", "flap-sam", "--rank", "32",
        "--classes", "2", "--image-size", "224", "--decoder", "reference", "--json",
    )  # fmt: skip
    assert json.loads(done.out)["trainable_parameters"] == 1_846_384


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("decoder", ["official", "reference"])
def test_what_is_counted_is_what_is_trained(adapted_mini: Build, preset: str, decoder: str) -> None:
    model = adapted_mini(peft={"preset": preset}, model={"decoder": decoder, "image_size": 40})
    assert count_trained("mini", preset, 4, 2, 40, decoder, depth=3).trained == model.parameters()


# What a preset trains and changes.


@pytest.mark.parametrize("preset", PRESETS)
def test_nothing_changes_before_the_first_step(
    adapted_mini: Build, mini_file: Path, preset: str
) -> None:
    model = adapted_mini(peft={"preset": preset})
    plain = Segmenter(build_base("mini", 2, checkpoint=mini_file).model, FAMILY, 4)
    seen = images() if model.segmenter.depth == 1 else images()[:, 1:2]
    with torch.no_grad():
        change = (model.segmenter(images()) - plain(seen)).abs().max()
    if preset == "prompt-tuning":
        assert change > 1e-3  # tokens to attend to take attention from the others
    else:
        assert change <= 1e-5


@pytest.mark.parametrize("preset", PRESETS)
def test_gradients_reach_what_is_trained_and_nothing_else(adapted_mini: Build, preset: str) -> None:
    model = adapted_mini(stir=0.05, peft={"preset": preset})
    SegmentationLoss(0.5)(model.segmenter(images()), labels()).backward()
    reached = {
        official_name(name): float(p.grad.abs().sum())
        for name, p in model.base.model.named_parameters()
        if p.grad is not None
    }
    assert set(reached) == {name for name in model.trained if not name.startswith(IDLE)}
    assert [name for name, size in reached.items() if size == 0] == []


def test_prompts_wake_the_tensors_that_encode_them(adapted_mini: Build) -> None:
    from samaritan.models.family import Prompts

    model = adapted_mini(stir=0.05, peft={"preset": "samed"})
    prompts = Prompts(
        torch.tensor([[[5.0, 6.0], [0.0, 0.0]], [[3.0, 4.0], [20.0, 30.0]]]),
        torch.tensor([[1, -1], [2, 3]]),
    )
    SegmentationLoss(0.5)(model.segmenter(images(), prompts), labels()).backward()
    idle = {n for n, p in model.trained.items() if p.grad is None or not p.grad.any()}
    assert {name.split(".")[1] for name in idle} == {
        "iou_prediction_head", "mask_downscaling", "point_embeddings"
    }  # fmt: skip
    # No negative point was given; a point without a box is followed by one that is none.
    assert {n for n in idle if "point_embeddings" in n} == {
        "prompt_encoder.point_embeddings.0.weight"
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_adapter_gives_identical_logits(
    adapted_mini: Build, mini_config: Build, tmp_path: Path, preset: str
) -> None:
    config = mini_config(peft={"preset": preset})
    model = adapted_mini(stir=0.05, peft={"preset": preset})
    save_adapter(tmp_path / "a", model, model.state(), config, {"a": 1, "b": 2})
    assert (tmp_path / "a" / "adapter_config.json").is_file()
    loaded = load_adapted(read_adapter(tmp_path / "a"))
    assert torch.equal(logits(loaded, images()), logits(model, images()))
    fresh = adapted_mini(peft={"preset": preset})
    assert not torch.equal(logits(fresh, images()), logits(model, images()))


@pytest.mark.parametrize("preset", sorted(MERGEABLE))
@pytest.mark.parametrize("decoder", ["official", "reference"])
def test_what_can_be_merged_is_merged(
    adapted_mini: Build, mini: Any, preset: str, decoder: str
) -> None:
    size = {"decoder": decoder, "image_size": 64}  # trained tables keep their shape
    scale = {"alpha": 6.0} if PRESETS[preset].lora else {}
    model = adapted_mini(stir=0.05, peft={"preset": preset, **scale}, model=size)
    before = logits(model, images())
    sam = construct(mini.shape, 2, decoder=decoder)
    sam.load_state_dict(merged_state(model), strict=True)
    with torch.no_grad():
        merged = Segmenter(sam, FAMILY, 4)(images())
    assert (merged - before).abs().max() <= 2e-5 * before.abs().max() + 1e-6
    assert torch.equal(logits(model, images()), before)


@pytest.mark.parametrize("preset", sorted(PRESETS.keys() - MERGEABLE))
def test_what_cannot_be_merged_says_so(adapted_mini: Build, preset: str) -> None:
    with pytest.raises(ModelError) as caught:
        merged_state(adapted_mini(peft={"preset": preset}))
    assert caught.value.code == "SAM-M305"


def test_trained_tables_have_the_size_of_the_input(adapted_mini: Build) -> None:
    tables = adapted_mini(peft={"preset": "full"}, model={"image_size": [40, 24]}).state()
    assert tables["image_encoder.pos_embed"].shape == (1, 10, 6, 32)
    assert tables["image_encoder.blocks.1.attn.rel_pos_h"].shape[0] == 19
    assert tables["image_encoder.blocks.1.attn.rel_pos_w"].shape[0] == 11
    assert tables["image_encoder.blocks.0.attn.rel_pos_h"].shape[0] == 9
    encoder = adapted_mini(model={"image_size": 40}).base.model.image_encoder
    assert encoder.pos_embed.shape == (1, 16, 16, 32)
    assert encoder.blocks[1].attn.rel_pos_h.shape[0] == 31


def test_factors_are_shared_by_all_blocks(adapted_mini: Build) -> None:
    names = [n for n in adapted_mini(peft={"preset": "ma-sam"}).trained if "factors" in n]
    assert len(names) == 2 + 3 * 2


def test_slices_of_a_record_exchange_in_volumetric_presets(adapted_mini: Build) -> None:
    for preset in ("ma-sam", "med-sa"):
        model = adapted_mini(stir=0.05, peft={"preset": preset})
        x = images()
        before = logits(model, x)
        other = x.clone()
        other[0, 0] = 1 - other[0, 0]  # a neighbour of the first record's labelled slice
        after = logits(model, other)
        assert not torch.allclose(after[0], before[0], atol=1e-5)
        assert torch.allclose(after[1], before[1], atol=1e-6)


# LoRA's variants, ranks and blocks.


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_start_without_effect_learn_and_merge(
    adapted_mini: Build, mini: Any, mini_file: Path, variant: str
) -> None:
    peft = {"variant": variant, "alpha": 3.0}
    plain = Segmenter(build_base("mini", 2, checkpoint=mini_file).model, FAMILY, 4)
    with torch.no_grad():
        change = (adapted_mini(peft=peft).segmenter(images()) - plain(images())).abs().max()
    assert change <= 1e-5
    model = adapted_mini(stir=0.05, peft=peft)
    SegmentationLoss(0.5)(model.segmenter(images()), labels()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.trained.values())
    magnitudes = [name for name in model.trained if "magnitude" in name]
    assert len(magnitudes) == (3 * 2 + 7 * 2 if variant == "dora" else 0)
    sam = construct(mini.shape, 2)
    sam.load_state_dict(merged_state(model), strict=True)
    before = logits(model, images())
    with torch.no_grad():
        merged = Segmenter(sam, FAMILY, 4)(images())
    assert (merged - before).abs().max() <= 2e-5 * before.abs().max()


def test_dora_gives_rows_their_trained_length(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.1, peft={"variant": "dora"})
    layer = model.base.model.image_encoder.blocks[0].attn.qkv
    weight = layer.base_layer.weight + layer.get_delta_weight("default")
    for part, rows in (("q", slice(0, 32)), ("v", slice(64, 96))):
        magnitude = getattr(layer, f"lora_magnitude_{part}")["default"]
        assert torch.allclose(weight[rows].norm(dim=1), magnitude.abs(), rtol=1e-4)
    assert torch.equal(weight[32:64], layer.base_layer.weight[32:64])


def test_rank_stabilised_lora_scales_by_the_root(adapted_mini: Build) -> None:
    layer = adapted_mini(peft={"variant": "rslora", "alpha": 6.0, "rank": 9})
    scale = layer.base.model.image_encoder.blocks[0].attn.qkv.scaling["default"]
    assert math.isclose(scale, 6.0 / 3)


@pytest.mark.parametrize(
    "ranks", [{"decoder": 2, "encoder.qkv": 8}, {"encoder.qkv": 8, "encoder": 3, "decoder": 2}]
)
def test_ranks_by_group(adapted_mini: Build, ranks: dict[str, int]) -> None:
    state = adapted_mini(peft={"rank": 4, "ranks": ranks}).state()
    ranks = {
        ("encoder" if name.startswith("image") else "decoder", t.shape[0])
        for name, t in state.items()
        if ".lora_A" in name
    }
    assert ranks == {("encoder", 8), ("decoder", 2)}


def test_the_last_blocks_alone(adapted_mini: Build) -> None:
    for kept, frozen in ((1, 2), (2, 1), (3, 0), (0, 3)):
        model = adapted_mini(peft={"blocks": kept})
        blocks = {n.split(".")[2] for n in model.trained if n.startswith("image_encoder.blocks")}
        assert blocks == {str(i) for i in range(3 - kept, 3)}
        assert model.frozen_blocks == frozen
    model = adapted_mini(peft={"blocks": 1, "preset": "full"})
    assert "image_encoder.pos_embed" not in model.trained
    assert model.frozen_blocks == 2
    assert adapted_mini(peft={"preset": "full"}).frozen_blocks == 0


def test_a_forward_pass_may_be_cut_in_two(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.05, peft={"blocks": 1})
    with torch.no_grad():
        tokens = model.segmenter.to_tokens(images(), 2)
        assert torch.equal(
            model.segmenter.from_tokens(tokens, 2, (40, 40)), model.segmenter(images())
        )


@pytest.mark.parametrize(
    ("peft", "code", "words"),
    [
        ({"ranks": {"encoder.mlp": 3}}, "SAM-C207", "encoder.qkv"),
        ({"preset": "decoder-only", "ranks": {"decoder": 3}}, "SAM-C207", "nothing"),
        ({"blocks": 4}, "SAM-C208", "all"),
    ],
)
def test_settings_a_preset_has_no_use_for_are_refused(
    adapted_mini: Build, peft: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted_mini(peft=peft)
    assert caught.value.code == code
    assert words in caught.value.hint


def test_a_rank_of_a_group_larger_than_its_layers_is_refused(adapted_mini: Build) -> None:
    with pytest.raises(ModelError, match="rank 17") as caught:
        adapted_mini(peft={"ranks": {"decoder": 17}})
    assert caught.value.code == "SAM-M301"


# The same result in less time or memory.


def test_the_fused_update_equals_the_plain_one(
    adapted_mini: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for fusible in (True, False):
        if not fusible:
            monkeypatch.setattr(LoraQKV, "_fusible", lambda self, x: False)
        model = adapted_mini(stir=0.1, peft={"alpha": 6.0})
        # As on `tiny`, where the bias beside a LoRA is trained too.
        biases = [b.attn.qkv.bias for b in model.base.model.image_encoder.blocks]
        for bias in biases:
            bias.requires_grad_(True)
        loss = SegmentationLoss(0.5)(model.segmenter(images()), labels())
        results.append(torch.autograd.grad(loss, [*model.trained.values(), *biases]))
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-9


@pytest.mark.parametrize("preset", ["flap-sam", "full", "ma-sam", "prompt-tuning"])
def test_recomputing_blocks_changes_no_gradient(adapted_mini: Build, preset: str) -> None:
    results = []
    for recompute in (False, True):
        training = {"precision": "fp32", "recompute": recompute}
        model = adapted_mini(stir=0.1, peft={"preset": preset}, training=training)
        trained = [p for n, p in model.trained.items() if not n.startswith(IDLE)]
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            loss = SegmentationLoss(0.5)(model.segmenter(images()), labels())
        results.append((torch.autograd.grad(loss, trained), sum(kept)))
    for one, other in zip(results[0][0], results[1][0], strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-9)
    assert results[1][1] < results[0][1]


def test_frozen_weights_in_bf16(adapted_mini: Build, mini: Any) -> None:
    sections = {"training": {"precision": "bf16"}}
    full = adapted_mini(stir=0.05, **sections)
    half = adapted_mini(stir=0.05, **sections, model={"frozen_precision": "bf16"})
    dtypes = {n: p.dtype for n, p in half.base.model.named_parameters()}
    assert all(
        (d == torch.bfloat16) == (".blocks." in n and (".attn.qkv.base" in n or ".mlp." in n
                                                       or ".attn.proj" in n))
        for n, d in dtypes.items()
    )  # fmt: skip
    assert {t.dtype for t in half.state().values()} == {torch.float32}
    one, other = logits(full, images()), logits(half, images())
    assert (one - other).abs().max() <= 1e-2 * one.abs().max()
    SegmentationLoss(0.5)(half.segmenter(images()), labels()).backward()
    assert all(p.grad is not None for p in half.trained.values())
    sam = construct(mini.shape, 2)
    sam.load_state_dict(merged_state(half), strict=True)
    delta = (
        sam.image_encoder.blocks[0].attn.qkv.weight
        - half.base.model.image_encoder.blocks[0].attn.qkv.base_layer.weight.float()
    )
    assert delta[:32].abs().max() > 0
    assert torch.equal(delta[32:64], torch.zeros(32, 32))


def test_bf16_weights_need_bf16_arithmetic(adapted_mini: Build) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted_mini(model={"frozen_precision": "bf16"})
    assert caught.value.code == "SAM-C210"


# A federation with each of them.


@pytest.mark.parametrize("preset", PRESETS)
def test_one_federated_round(
    samaritan: Any, small_config: Path, tmp_path: Path, preset: str
) -> None:
    done = samaritan(
        "simulate", small_config, "--out", tmp_path / "run", "--set", "rounds=1",
        "--set", f"peft.preset={preset}", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["peft"]["preset"] == preset
    assert {s["status"] for s in summary["rounds"][0]["sites"].values()} == {"ok"}
    trained = load_adapted(read_adapter(tmp_path / "run" / "adapter"))
    fresh = build_adapted(trained_config(tmp_path), len(summary["final"]["dice_per_class"]))
    moved = [name for name, t in trained.state().items() if not torch.equal(t, fresh.state()[name])]
    assert moved


def trained_config(folder: Path) -> Any:
    return read_adapter(folder / "run" / "adapter").config


# Against the formulas, written out.


def test_every_encoder_gradient_equals_the_official_one(
    mini: Any, monkeypatch: pytest.MonkeyPatch, randomise: Any
) -> None:
    for form in (attention.blocked_attention, attention.fused_attention):
        monkeypatch.setattr(attention, "blocked_attention", form)
        monkeypatch.setattr(attention, "_BLOCK_SCORES", 300)
        for rows, columns in ((44, 28), (12, 40)):
            torch.manual_seed(3)
            sam = construct(mini.shape, 2)
            randomise(sam, 3)
            FAMILY.resize_tables(sam, (rows, columns))
            encoder = sam.image_encoder
            x = torch.rand(2, 3, rows, columns)
            weights = torch.randn(2, 32, rows // 4, columns // 4)
            results = []
            for forward in (encode_image, lambda module, images: module(images)):
                total = (forward(encoder, x) * weights).sum()
                results.append(torch.autograd.grad(total, list(encoder.parameters())))
            for name, one, other in zip(
                dict(encoder.named_parameters()), *results, strict=True
            ):  # fmt: skip
                assert (one - other).abs().max() <= 1e-4 * other.abs().max() + 1e-7, name


@pytest.mark.parametrize(("rows", "columns", "side"), [(11, 16, 5), (3, 4, 5), (9, 2, 4)])
def test_tokens_without_a_place_in_both_forms(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, side: int
) -> None:
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 500)
    torch.manual_seed(1)
    heads, d = 2, 8
    qkv = torch.randn(2, rows, columns, 3 * heads * d)
    padding, tokens = torch.randn(3 * heads * d), torch.randn(3, 3 * heads * d)
    positions, weights = 0.3 * torch.randn(4 * side - 2, d), torch.randn(2, rows, columns, 16)
    results = []
    for form in (attention.blocked_attention, attention.fused_attention, plain_attention):
        inputs = [x.clone().requires_grad_() for x in (qkv, padding, positions, tokens)]
        out = form(*inputs, heads, d**-0.5, (side, side))
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    for ours in results[:2]:
        for one, other in zip(ours, results[2], strict=True):
            assert (one - other).abs().max() <= 2e-5 * other.abs().max()


def plain_attention(
    qkv: Tensor, padding: Tensor, positions: Tensor, tokens: Tensor, heads: int, scale: float,
    side: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Window by window and score by score, as the definition has it."""
    b, rows, columns, channels = qkv.shape
    size, third = side[0], channels // 3
    out = torch.zeros(b, rows, columns, third)
    table_h, table_w = positions.split(2 * size - 1)
    for top in range(0, rows, size):
        for left in range(0, columns, size):
            window = padding.expand(b, size, size, -1).clone()
            part = qkv[:, top : top + size, left : left + size]
            window[:, : part.shape[1], : part.shape[2]] = part
            keys = torch.cat([window.flatten(1, 2), tokens.expand(b, -1, -1)], 1)
            mixed = []
            for head in range(heads):
                d = third // heads
                q, k, v = (
                    x[..., i * third + head * d : i * third + (head + 1) * d]
                    for i, x in enumerate((window.flatten(1, 2), keys, keys))
                )
                scores = scale * q @ k.transpose(1, 2)
                place = torch.arange(size)
                far = place[:, None] - place + size - 1
                by_row = torch.einsum("brcd,rjd->brcj", q.view(b, size, size, d), table_h[far])
                by_column = torch.einsum("brcd,cjd->brcj", q.view(b, size, size, d), table_w[far])
                bias = (by_row[..., :, None] + by_column[..., None, :]).reshape(b, size**2, -1)
                scores = scores + torch.nn.functional.pad(bias, (0, len(tokens)))
                mixed.append(scores.softmax(-1) @ v)
            whole = torch.cat(mixed, -1).view(b, size, size, third)
            out = out.clone()
            inside = whole[:, : part.shape[1], : part.shape[2]]
            out[:, top : top + size, left : left + size] = inside
    return out


def test_a_block_of_med_sa(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.2, peft={"preset": "med-sa"})
    block = model.base.model.image_encoder.blocks[1]  # attends over the whole grid
    x = torch.rand(6, 4, 5, 32, generator=torch.Generator().manual_seed(4))

    def bottleneck(layer: Any, x: Tensor) -> Tensor:
        return layer.up(torch.nn.functional.gelu(layer.down(x)))  # type: ignore[no-any-return]

    def attention_of(x: Tensor) -> Tensor:  # the official module, without what was added
        hooks, block.attn.proj._forward_hooks = block.attn.proj._forward_hooks, OrderedDict()
        out: Tensor = block.attn(x)
        block.attn.proj._forward_hooks = hooks
        return out

    with torch.no_grad():
        normed = block.norm1(x)
        space = attention_of(normed)
        space = space + bottleneck(block.attn.proj.adapter, space)
        lines = normed.reshape(2, 3, 4, 5, 32).permute(0, 2, 3, 1, 4).reshape(40, 1, 3, 32)
        depth = bottleneck(block.depth_branch.bottleneck, attention_of(lines))
        depth = depth.reshape(2, 4, 5, 3, 32).permute(0, 3, 1, 2, 4).reshape(6, 4, 5, 32)
        y = x + space + depth
        normed = block.norm2(y)
        plain = block.mlp.lin2(block.mlp.act(block.mlp.lin1(normed)))
        expected = y + plain + 0.5 * bottleneck(block.mlp.adapter, normed)
        assert (_block(block, x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_block_of_ma_sam(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.2, peft={"preset": "ma-sam"})
    encoder = model.base.model.image_encoder
    block = encoder.blocks[1]
    x = torch.rand(6, 4, 5, 32, generator=torch.Generator().manual_seed(5))

    def volume(adapter: Any, x: Tensor) -> Tensor:
        hidden = adapter.down(adapter.norm(x)).reshape(2, 3, 4, 5, -1).permute(0, 4, 1, 2, 3)
        kernel = adapter.conv.weight[..., None, None]  # 3 x 1 x 1
        hidden = torch.nn.functional.conv3d(hidden, kernel, adapter.conv.bias, padding=(1, 0, 0))
        hidden = torch.nn.functional.gelu(hidden).permute(0, 2, 3, 4, 1).reshape(6, 4, 5, -1)
        return x + adapter.up(hidden)  # type: ignore[no-any-return]

    with torch.no_grad():
        y = volume(block.before_attention, x)
        qkv = block.attn.qkv
        low = block.norm1(y) @ encoder.factors.u.weight.T
        # U S V on the q and v rows of the weight, nothing on k.
        change = [
            encoder.factors.v.weight @ s.weight @ encoder.factors.u.weight
            for s in (qkv.factors.q, qkv.factors.v)
        ]
        assert low.shape[-1] == 4
        weight = qkv.weight.clone()
        hooks, qkv._forward_hooks = qkv._forward_hooks, OrderedDict()
        qkv.weight[:32] += change[0]
        qkv.weight[64:] += change[1]
        y = y + block.attn(block.norm1(y))
        qkv.weight.copy_(weight)
        qkv._forward_hooks = hooks
        y = volume(block.after_attention, y)
        expected = y + block.mlp(block.norm2(y))
        assert (_block(block, x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dora_equals_pefts_own_layer(adapted_mini: Build) -> None:
    layer = adapted_mini(stir=0.1, peft={"variant": "dora", "alpha": 6.0})
    ours = layer.base.model.image_encoder.blocks[0].attn.qkv
    x = torch.rand(7, 32, generator=torch.Generator().manual_seed(6))
    for part, rows in (("q", slice(0, 32)), ("v", slice(64, 96))):
        linear = torch.nn.Linear(32, 32)
        linear.weight.data = ours.base_layer.weight.data[rows].clone()
        linear.bias.data = ours.base_layer.bias.data[rows].clone()
        config = LoraConfig(r=4, lora_alpha=6.0, use_dora=True, target_modules=["0"])
        theirs = inject_adapter_in_model(config, torch.nn.Sequential(linear))[0]
        for factor in ("lora_A", "lora_B"):
            values = getattr(ours, f"{factor}_{part}")["default"].weight.data
            getattr(theirs, factor)["default"].weight.data = values
        magnitude = theirs.lora_magnitude_vector["default"].weight
        magnitude.data = getattr(ours, f"lora_magnitude_{part}")["default"].data.clone()
        expected = theirs(x)
        got = ours(x)[:, rows]
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
        a, b = getattr(ours, f"lora_A_{part}")["default"].weight, theirs.lora_A["default"].weight
        one = torch.autograd.grad(got.square().sum(), a)[0]
        other = torch.autograd.grad(expected.square().sum(), b)[0]
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()


def test_ranks_by_group_keep_the_scale(adapted_mini: Build) -> None:
    layer = adapted_mini(peft={"ranks": {"encoder": 2}}).base.model.image_encoder.blocks[0].attn.qkv
    assert layer.scaling["default"] == 1.0
    layer = adapted_mini(peft={"alpha": 4.0, "ranks": {"encoder": 2}})
    assert layer.base.model.image_encoder.blocks[0].attn.qkv.scaling["default"] == 2.0


def test_dora_leaves_bf16_as_it_is(adapted_mini: Build) -> None:
    model = adapted_mini(peft={"variant": "dora"}, training={"precision": "bf16"})
    layer = model.base.model.image_encoder.blocks[0].attn.qkv
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.rand(3, 32)).dtype == torch.bfloat16


@pytest.mark.parametrize("peft", [{"variant": "dora"}, {"alpha": 2.0}])
def test_settings_of_lora_need_lora(adapted_mini: Build, peft: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted_mini(peft={"preset": "decoder-only", **peft})
    assert caught.value.code == "SAM-C213"


def test_no_block_at_all(adapted_mini: Build) -> None:
    model = adapted_mini(peft={"preset": "samed", "blocks": 0})
    assert {name.split(".")[0] for name in model.trained} == {"mask_decoder", "prompt_encoder"}


def test_shared_factors_have_a_largest_rank(adapted_mini: Build) -> None:
    with pytest.raises(ModelError, match="rank 33"):
        adapted_mini(peft={"preset": "ma-sam", "rank": 33})


def test_counts_say_for_how_many_slices_and_refuse_half_patches(samaritan: Any) -> None:
    counted = [
        json.loads(samaritan("models", "count", "--preset", "med-sa", "--slices", n, "--json").out)
        for n in (1, 5)
    ]
    assert [c["slices"] for c in counted] == [1, 5]
    assert counted[1]["trainable_parameters"] - counted[0]["trainable_parameters"] == 12 * 295_872
    assert "SAM-C203" in samaritan("models", "count", "--image-size", "225").err
    assert samaritan("models", "count", "--rank", "5000").code == 2
