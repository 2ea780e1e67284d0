"""The encoder and the decoder against the official SAM, and LoRA on q and v alone."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samaritan.config import parse_config
from samaritan.errors import ConfigError, ModelError
from samaritan.models import attention
from samaritan.models.adapter import build_adapted
from samaritan.models.attention import blocked_attention, fused_attention
from samaritan.models.bases import BASES, build_base, state_sha256
from samaritan.models.encoder import encode_image
from samaritan.models.official import modeling
from samaritan.models.sam import FAMILY, construct
from samaritan.models.segmenter import Segmenter, autocast_dtype
from samaritan.training.losses import SegmentationLoss

CPU = torch.device("cpu")

Build = Callable[..., Any]


def pictures(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference relative to the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# Loading segment_anything.

STUB = """
    import sys
    from pathlib import Path

    def stub(folder, text):
        for name in ("", "transforms", "ops"):
            (folder / "torchvision" / name).mkdir(parents=True)
            (folder / "torchvision" / name / "__init__.py").write_text(text)
        (folder / "torchvision/transforms/functional.py").write_text("resize = to_pil_image = None")
        (folder / "torchvision/ops/boxes.py").write_text("batched_nms = box_area = None")
        return str(folder)

    here = Path(sys.argv[1])
    broken = stub(here / "broken", "raise RuntimeError('operator torchvision::nms does not exist')")
    working = stub(here / "working", "")
    sys.path.insert(0, broken)

    from samaritan.models.official import modeling
    ours = modeling()
    ours.TwoWayTransformer
    assert "torchvision" not in sys.modules and "segment_anything" not in sys.modules

    try:
        import segment_anything
    except RuntimeError as error:
        assert "nms" in str(error)
    else:
        raise AssertionError("the stub was not reached")

    for name in [n for n in sys.modules if n.startswith("segment_anything")]:
        del sys.modules[name]
    sys.path[0] = working
    from segment_anything import SamPredictor, sam_model_registry
    import segment_anything.modeling
    assert segment_anything.modeling.__name__ == "segment_anything.modeling"
    assert SamPredictor.__module__ == "segment_anything.predictor"
    assert modeling() is ours and ours.Sam is not segment_anything.modeling.Sam
    print("undisturbed")
"""


def test_a_broken_torchvision_does_not_matter_and_a_plain_import_stays_whole(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", textwrap.dedent(STUB), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "undisturbed", done.stderr


# The encoder.


def resize_positions(encoder: Any, rows: int, columns: int) -> None:
    """What an official encoder of that input size holds; its rel_pos tables resize themselves."""
    table = encoder.pos_embed.detach().permute(0, 3, 1, 2)
    table = F.interpolate(table, (rows, columns), mode="bilinear", align_corners=False)
    encoder.pos_embed = nn.Parameter(table.permute(0, 2, 3, 1))


def official_encoder(spec: Any, encoder: Any, rows: int, columns: int) -> Any:
    """An official encoder built anew, with the values of another."""
    same = construct(spec.shape, 3).image_encoder
    same.load_state_dict(encoder.state_dict())
    resize_positions(same, rows, columns)
    return same.eval()


@pytest.mark.parametrize("form", [fused_attention, blocked_attention])
@pytest.mark.parametrize(
    "size",
    [(64, 64), (40, 40), (44, 44), (76, 76), (20, 20), (40, 60), (36, 52)],
    ids=lambda size: f"{size[0]}x{size[1]}",
)
def test_the_encoder_equals_the_official_one(
    mini: Any, mini_file: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int],
    form: Any,
) -> None:  # fmt: skip
    monkeypatch.setattr(attention, "blocked_attention", form)  # the form of this machine
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 1000)  # several blocks of a window
    ours = build_base("mini", 2, checkpoint=mini_file).model.image_encoder
    theirs = official_encoder(mini, ours, size[0] // 4, size[1] // 4)
    images = 2 * pictures(0, 2, 3, *size) - 1
    with torch.no_grad():
        expected = theirs(images)
        assert distance(encode_image(ours, images), expected) < 1e-5
        # The comparison would see a wrong table: without positions the result is another.
        for block in theirs.blocks:
            block.attn.use_rel_pos = False
        assert distance(theirs(images), expected) > 1e-2


@pytest.mark.parametrize("form", [fused_attention, blocked_attention])
@pytest.mark.parametrize("size", [(40, 40), (44, 64)])
def test_adapter_gradients_equal_those_of_the_official_forward(
    adapted_mini: Build, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], form: Any
) -> None:
    monkeypatch.setattr(attention, "blocked_attention", form)  # the form of this machine
    monkeypatch.setattr(attention, "_BLOCK_SCORES", 1000)  # several blocks of a window
    model = adapted_mini(stir=0.1)
    encoder = model.segmenter.model.image_encoder
    lora = [p for name, p in model.trained.items() if ".attn.qkv.lora_" in name]
    assert len(lora) == 3 * 4
    images, weights = pictures(1, 2, 3, *size), pictures(2, 2, 32, size[0] // 4, size[1] // 4)
    ours = torch.autograd.grad((encode_image(encoder, images) * weights).sum(), lora)
    resize_positions(encoder, size[0] // 4, size[1] // 4)
    theirs = torch.autograd.grad((encoder(images) * weights).sum(), lora)
    for a, b in zip(ours, theirs, strict=True):
        assert distance(a, b) < 1e-4
        assert b.abs().max() > 1e-6


def test_vit_b_equals_the_official_encoder(vit_b_file: Path) -> None:
    sam = build_base("vit_b", 3, checkpoint=vit_b_file).model
    with torch.no_grad():
        for size in (224, 128):
            images = 2 * pictures(3, 1, 3, size, size) - 1
            ours = encode_image(sam.image_encoder, images)
            resize_positions(sam.image_encoder, size // 16, size // 16)
            assert distance(ours, sam.image_encoder(images)) < 1e-5


# The segmenter.


@pytest.mark.parametrize("size", [(64, 64), (32, 48)])
def test_one_image_is_decoded_as_the_official_decoder_does(
    mini: Any, mini_file: Path, size: tuple[int, int]
) -> None:
    sam = build_base("mini", 2, checkpoint=mini_file).model
    images = pictures(4, 1, 3, *size)
    grid = (size[0] // 4, size[1] // 4)
    sam.prompt_encoder.image_embedding_size = grid
    with torch.no_grad():
        ours = Segmenter(sam, FAMILY, 4)(images)
        pixels = (images * 255 - sam.pixel_mean) / sam.pixel_std
        sparse, dense = sam.prompt_encoder(points=None, boxes=None, masks=None)
        theirs, _ = sam.mask_decoder.predict_masks(
            image_embeddings=encode_image(sam.image_encoder, pixels),
            image_pe=sam.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
        )
        assert theirs.shape == (1, 3, 4 * grid[0], 4 * grid[1])
        assert ours.shape == (1, 3, *size)
        theirs = F.interpolate(theirs, size, mode="bilinear", align_corners=False)
        assert distance(ours, theirs) < 1e-5


def test_one_grey_slice_is_repeated(adapted_mini: Build) -> None:
    segmenter = adapted_mini().segmenter
    grey = pictures(6, 2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(segmenter(grey), segmenter(grey.repeat(1, 3, 1, 1)))


def test_the_logits_of_an_image_do_not_depend_on_its_batch(adapted_mini: Build) -> None:
    segmenter = adapted_mini(stir=0.1).segmenter
    images = pictures(7, 4, 3, 44, 44)
    with torch.no_grad():
        together = segmenter(images)
        alone = torch.cat([segmenter(image[None]) for image in images])
    assert distance(together, alone) < 1e-5
    assert distance(together[:1], together[1:2]) > 1e-3


def test_gradients_of_records_add_up(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.1)
    images = pictures(8, 3, 3, 44, 44)
    labels = (pictures(9, 3, 44, 44) * 3).long()
    labels[1] = 0  # a slice without a structure
    parameters = list(model.trained.values())
    loss_of = SegmentationLoss(0.8)
    together = torch.autograd.grad(loss_of(model.segmenter(images), labels), parameters)
    alone = [
        torch.autograd.grad(loss_of(model.segmenter(i[None]), t[None]), parameters)
        for i, t in zip(images, labels, strict=True)
    ]
    for name, total, parts in zip(model.trained, together, zip(*alone, strict=True), strict=True):
        mean = torch.stack(parts).mean(0)
        assert (total - mean).norm() <= 1e-5 * mean.norm() + 1e-9, name
    for word in ("mask_tokens", "output_upscaling", "output_hypernetworks", "lora_A", "lora_B"):
        touched = [g for name, g in zip(model.trained, together, strict=True) if word in name]
        assert touched
        assert all(g.norm() > 0 for g in touched)


def test_the_gradient_of_a_record_ignores_the_others(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.1)
    first = pictures(10, 1, 3, 44, 44)
    label = (pictures(11, 1, 44, 44) * 3).long()
    gradients = []
    for seed in (12, 13):
        images = torch.cat([first, pictures(seed, 2, 3, 44, 44)])
        loss = SegmentationLoss(0.8)(model.segmenter(images)[:1], label)
        gradients.append(torch.autograd.grad(loss, list(model.trained.values())))
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_bf16_is_for_the_encoder_alone(adapted_mini: Build) -> None:
    segmenter = adapted_mini().segmenter
    images = pictures(14, 1, 3, 44, 44)
    with torch.no_grad():
        exact = segmenter(images)
        segmenter.autocast_dtype = torch.bfloat16
        rough = segmenter(images)
    assert rough.dtype == torch.float32
    assert 0 < distance(rough, exact) < 0.2


def test_the_precision_asked_for_is_used() -> None:
    assert autocast_dtype("fp32", CPU) is None
    assert autocast_dtype("bf16", CPU) == torch.bfloat16


# LoRA.


def test_a_fresh_adapter_changes_nothing(adapted_mini: Build, mini_file: Path) -> None:
    model = adapted_mini()
    plain = Segmenter(build_base("mini", 2, checkpoint=mini_file).model, FAMILY, 4)
    images = pictures(15, 2, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(model.segmenter(images), plain(images))
        torch.nn.init.normal_(next(p for n, p in model.trained.items() if "lora_B_q" in n))
        assert not torch.equal(model.segmenter(images), plain(images))


def test_steps_move_what_is_trained_and_nothing_else(adapted_mini: Build, check_steps: Any) -> None:
    check_steps(adapted_mini(), 40, rate=1.0)


def test_q_and_v_are_adapted_and_k_is_not(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.3)
    layer = model.segmenter.model.image_encoder.blocks[0].attn.qkv
    x = pictures(18, 2, 5, 5, 32)
    q, k, v = (layer(x) - layer.base_layer(x)).detach().split(32, -1)
    assert (q.abs().max() > 1e-3, v.abs().max() > 1e-3) == (True, True)
    assert torch.equal(k, torch.zeros_like(k))
    delta = layer.get_delta_weight("default").detach()
    assert distance(x @ delta.T, torch.cat([q, k, v], -1)) < 1e-4
    assert {n.split("lora")[0] for n in model.trained if "transformer" in n and "lora" in n} == {
        name + "."
        for name, _ in model.segmenter.model.mask_decoder.named_modules(prefix="mask_decoder")
        if name.endswith(("q_proj", "v_proj"))
    }


def test_flap_sam_trains_its_list(adapted_mini: Build, mini: Any) -> None:
    whole = {name for name in adapted_mini().trained if "lora_" not in name}
    parts = ("mask_decoder.mask_tokens.", "mask_decoder.output_")
    assert whole == {
        n for n, _ in construct(mini.shape, 2).named_parameters() if n.startswith(parts)
    }


def test_merging_in_place_and_back(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.1)
    layer = model.segmenter.model.image_encoder.blocks[0].attn.qkv
    x = pictures(19, 2, 5, 5, 32)
    weight, adapted = layer.base_layer.weight.clone(), layer(x).detach()
    layer.merge()
    assert distance(layer(x).detach(), adapted) < 1e-5
    assert not torch.allclose(layer.base_layer.weight, weight)
    layer.unmerge()
    assert torch.allclose(layer.base_layer.weight, weight, atol=1e-6)
    assert distance(layer(x).detach(), adapted) < 1e-5


def test_alpha_scales_the_update(adapted_mini: Build) -> None:
    layers = [
        adapted_mini(stir=0.1, peft=peft).segmenter.model.image_encoder.blocks[0].attn.qkv
        for peft in ({}, {"alpha": 12.0})
    ]
    once, thrice = (layer.get_delta_weight("default").detach() for layer in layers)
    assert distance(thrice, 3 * once) < 1e-6


def test_flap_sam_on_vit_b_trains_the_published_number_of_parameters(vit_b_file: Path) -> None:
    config = parse_config(
        {"model": {"base": "vit_b", "checkpoint": str(vit_b_file)}, "peft": {"rank": 32}}
    )
    model = build_adapted(config, 2, CPU)
    with torch.no_grad():  # logits of 16-pixel patches come out at a quarter of the input
        assert model.segmenter(pictures(5, 1, 3, 64, 32)).shape == (1, 3, 64, 32)
    assert model.parameters() == 1_862_208
    assert sum(p.numel() for n, p in model.trained.items() if "lora" in n) == 1_368_064
    assert model.base.parameters == 93_735_472 - 256 - 139_808 - 257


def test_a_rank_larger_than_a_layer_is_refused(adapted_mini: Build) -> None:
    adapted_mini(peft={"rank": 16})
    with pytest.raises(ModelError, match="rank 17") as caught:
        adapted_mini(peft={"rank": 17})
    assert caught.value.code == "SAM-M301"


def test_the_seed_decides_a(adapted_mini: Build) -> None:
    torch.manual_seed(1)
    one = adapted_mini(seed=3).state()
    torch.manual_seed(2)
    same, other = adapted_mini(seed=3).state(), adapted_mini(seed=4).state()
    assert one.keys() == same.keys()
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


# Bases and inputs.


def test_the_embedded_base_does_not_depend_on_the_number_of_threads() -> None:
    command = (
        "import torch; from samaritan.models.bases import build_base; "
        "before = torch.get_num_threads(); "
        "print(build_base('tiny', 2, 3).sha256, before == torch.get_num_threads())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", command], capture_output=True, text=True, check=True,
            env=os.environ | {"OMP_NUM_THREADS": threads},
        ).stdout
        for threads in ("1", "2")
    }  # fmt: skip
    assert len(found) == 1
    assert found.pop().split()[1] == "True"  # the threads are given back


def test_the_embedded_base_ignores_the_random_state() -> None:
    torch.manual_seed(1)
    one = build_base("tiny", 2)
    torch.manual_seed(2)
    two = build_base("tiny", 2)
    assert one.sha256 == two.sha256 == state_sha256(one.model.state_dict())
    assert one.sha256 != build_base("tiny", 3).sha256
    assert one.parameters == sum(p.numel() for p in one.model.parameters())


@pytest.mark.parametrize("context", [1, 3, 5])
def test_the_embedded_base_takes_any_context(context: int) -> None:
    config = parse_config({"data": {"context_slices": context}, "training": {"precision": "fp32"}})
    model = build_adapted(config, 1, CPU)
    side = 4 * BASES["tiny"].patch
    assert model.segmenter(pictures(20, 2, context, side, side)).shape == (2, 2, side, side)


@pytest.mark.parametrize(
    ("section", "code", "words"),
    [
        ({"model": {"image_size": 66}}, "SAM-C203", "64 or 68"),
        ({"model": {"image_size": [64, 42]}}, "SAM-C203", "40 or 44"),
        ({"data": {"context_slices": 5}}, "SAM-C204", "1 or 3"),
        ({"peft": {"preset": "nothing"}}, "SAM-C201", "flap-sam"),
        ({"model": {"base": "vit_x", "checkpoint": None}}, "SAM-C202", "vit_b"),
    ],
)
def test_what_a_base_cannot_take_is_refused(
    adapted_mini: Build, section: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        adapted_mini(**section)
    assert caught.value.code == code
    assert words in caught.value.hint


def test_the_alias_holds_the_official_classes() -> None:
    assert modeling() is modeling()
    assert modeling().Sam.__module__ == "samaritan._segment_anything.modeling.sam"


def test_second_derivatives_are_refused_rather_than_wrong(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.1)
    parameters = [p for name, p in model.trained.items() if ".attn.qkv." in name]
    total = encode_image(model.base.model.image_encoder, pictures(30, 1, 3, 20, 20)).sum()
    first = torch.autograd.grad(total, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.stack([g.square().sum() for g in first]).sum().backward()
