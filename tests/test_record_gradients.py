"""Gradients of single patients and single slices are those of backward passes of their own."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from samaritan.config import parse_config
from samaritan.errors import PrivacyError
from samaritan.models.adapter import build_adapted
from samaritan.models.bases import BASES, Base
from samaritan.models.family import Prompts
from samaritan.models.presets import PRESETS
from samaritan.models.sam2 import Sam2Shape
from samaritan.privacy.mechanism import clipped_to_grid
from samaritan.training.feed import Batch
from samaritan.training.losses import SegmentationLoss
from samaritan.training.parallel import Parts
from samaritan.training.record_gradients import patient_gradients, some_of
from samaritan.training.slice_gradients import slice_gradients

Build = Callable[..., Any]

SIDE = 48
"""Of images: 12 x 12 tokens, which windows of 5 do not divide."""

IDLE = (
    "mask_decoder.iou_prediction_head.",
    "prompt_encoder.point_embeddings.",
    "prompt_encoder.not_a_point_embed.",
    "prompt_encoder.mask_downscaling.",
)
"""Trained by name in some published methods, and without any part in a mask without prompts."""

REFUSED = {
    "attention-only": "rel_pos_h",
    "full": "pos_embed",
    "med-sa": "adapter.down.weight",
    "ma-sam": "factors.q.weight",
    "prompt-tuning": "tokens",
    "norm-bias": "attn.qkv.bias",
}
"""Presets whose gradients per slice Opacus does not get right, and the first tensor at fault."""

LOSS = SegmentationLoss(0.5)


def made(count: int, seed: int = 1, side: int = SIDE, channels: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand((count, channels, side, side), generator=generator)
    return Batch(images, torch.randint(0, 3, (count, side, side), generator=generator))


def mixed_prompts(seed: int = 4) -> Prompts:
    """A box, nothing, two points, one point and a box again."""
    points = torch.rand((5, 2, 2), generator=torch.Generator().manual_seed(seed)) * SIDE
    return Prompts(points, torch.tensor([[2, 3], [-1, -1], [1, 0], [1, -1], [2, 3]]))


def backward(
    model: Callable[..., Tensor], trained: Mapping[str, nn.Parameter], batch: Batch
) -> tuple[Tensor, set[str]]:
    """The gradient by `Tensor.backward`, and the names that have none."""
    for parameter in trained.values():
        parameter.grad = None
    hints = () if batch.prompts is None else (batch.prompts,)
    LOSS(model(batch.inputs, *hints), batch.labels).backward()
    grads = {n: p.grad for n, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = None
    flat = [torch.zeros_like(p) if grads[n] is None else grads[n] for n, p in trained.items()]
    return torch.cat([g.flatten() for g in flat]), {n for n, g in grads.items() if g is None}


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def two_threads() -> Iterator[Parts]:
    with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield Parts(2, pool)


ALONE = Parts(1, None)


# Patients.


@pytest.mark.parametrize("preset", PRESETS)
def test_a_patient_has_the_gradient_of_a_backward_pass_of_its_own(
    adapted_mini: Build, two_threads: Parts, preset: str
) -> None:
    model = adapted_mini(stir=0.05, peft={"preset": preset})
    model.segmenter.train()
    patients = [made(count, seed) for seed, count in enumerate((2, 1), 1)]
    expected = [backward(model.segmenter, model.trained, patient) for patient in patients]
    parameters = list(model.trained.values())
    for parts in (ALONE, two_threads):
        found = list(patient_gradients(model.segmenter, LOSS, patients, parameters, parts))
        assert len(found) == 2
        for (vector, loss), (right, _), patient in zip(found, expected, patients, strict=True):
            assert off(vector, right) <= 1e-6
            hints = model.segmenter(patient.inputs)
            assert loss == pytest.approx(float(LOSS(hints, patient.labels).detach()), rel=1e-6)
        for vector, _ in found:
            pieces = vector.split([p.numel() for p in parameters])
            still = {
                n for n, piece in zip(model.trained, pieces, strict=True) if not piece.abs().sum()
            }
            assert still == {n for n in model.trained if n.startswith(IDLE)}
    assert all(idle == still for _, idle in expected)


def test_every_tensor_of_tiny_has_a_part_in_a_patients_gradient() -> None:
    model = build_adapted(parse_config({}), 2, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.trained.items():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    patient = made(3, side=48)
    parameters = list(model.trained.values())
    ((vector, _),) = patient_gradients(model.segmenter, LOSS, [patient], parameters, ALONE)
    assert off(vector, backward(model.segmenter, model.trained, patient)[0]) <= 1e-6
    pieces = vector.split([p.numel() for p in parameters])
    assert all(piece.abs().sum() > 0 for piece in pieces)


def test_prompts_go_with_their_patient(adapted_mini: Build, two_threads: Parts) -> None:
    model = adapted_mini(stir=0.05, peft={"preset": "samed"})
    whole = Batch(made(5).inputs, made(5).labels, mixed_prompts())
    patients = [some_of(whole, slice(0, 3)), some_of(whole, slice(3, 5))]
    parameters = list(model.trained.values())
    for at_once in (None, 2):
        found = patient_gradients(model.segmenter, LOSS, patients, parameters, two_threads, at_once)
        for (vector, _), patient in zip(found, patients, strict=True):
            assert off(vector, backward(model.segmenter, model.trained, patient)[0]) <= 2e-6


def test_neither_pieces_nor_threads_change_the_gradient(
    adapted_mini: Build, two_threads: Parts
) -> None:
    model = adapted_mini(stir=0.05)
    patients = [made(count, seed) for seed, count in enumerate((3, 1, 2), 1)]
    parameters = list(model.trained.values())

    def found(parts: Parts, at_once: int | None) -> list[tuple[Tensor, float]]:
        return list(patient_gradients(model.segmenter, LOSS, patients, parameters, parts, at_once))

    whole = found(ALONE, None)
    for at_once in (None, 2):
        alone, shared = found(ALONE, at_once), found(two_threads, at_once)
        for one, two, right in zip(alone, shared, whole, strict=True):
            assert torch.equal(one[0], two[0])
            assert one[1] == two[1] == pytest.approx(right[1], rel=1e-6)
            assert off(one[0], right[0]) <= 2e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_a_patient_that_is_not_finite_becomes_zero_and_changes_no_other(
    adapted_mini: Build, two_threads: Parts, value: float
) -> None:
    model = adapted_mini(stir=0.05)
    patients = [made(2, seed) for seed in (1, 2, 3)]
    parameters = list(model.trained.values())
    before = list(patient_gradients(model.segmenter, LOSS, patients, parameters, two_threads))
    patients[1].inputs[1, 0, 5, 5] = value
    after = list(patient_gradients(model.segmenter, LOSS, patients, parameters, two_threads))
    assert torch.equal(after[0][0], before[0][0])
    assert torch.equal(after[2][0], before[2][0])
    assert not torch.isfinite(after[1][0]).all()
    assert not clipped_to_grid(after[1][0], 1.0).any()


def test_patients_are_read_as_they_are_needed(adapted_mini: Build, two_threads: Parts) -> None:
    model = adapted_mini()
    read: list[int] = []

    def patients() -> Iterator[Batch]:
        for seed in range(8):
            read.append(seed)
            yield made(1, seed)

    parameters = list(model.trained.values())
    found = patient_gradients(model.segmenter, LOSS, patients(), parameters, two_threads)
    assert read == []
    for number in range(1, 4):
        next(found)
        assert len(read) == number + 2


def test_no_thread_goes_on_after_the_caller_has_stopped(two_threads: Parts) -> None:
    layer = nn.Conv2d(3, 3, 1)
    running, begun = [0], threading.Event()

    def slow(images: Tensor) -> Tensor:
        running[0] += 1
        if images[0, 0, 0, 0] > 0:
            begun.set()
            threading.Event().wait(0.3)
        running[0] -= 1
        logits: Tensor = layer(images)
        return logits

    fast, labels = torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    patients = [Batch(fast, labels), Batch(fast + 1, labels), Batch(fast + 1, labels)]
    found = patient_gradients(slow, LOSS, patients, list(layer.parameters()), two_threads)
    next(found)
    assert begun.wait(5)
    found.close()  # type: ignore[attr-defined]
    assert running == [0]


# Slices.


def check_slices(model: Any, batch: Batch, bound: float = 3e-6) -> None:
    model.segmenter.train()
    gradients = slice_gradients(model.segmenter, model.segmenter, LOSS, model.trained, 2)
    found = list(gradients(batch))
    order = range(len(batch.inputs))
    if batch.prompts is not None:
        order = [int(i) for records, _ in batch.prompts.groups() for i in records]  # type: ignore
    for (vector, loss), index in zip(found, order, strict=True):
        single = some_of(batch, slice(index, index + 1))
        assert off(vector, backward(model.segmenter, model.trained, single)[0]) <= bound
        hints = () if single.prompts is None else (single.prompts,)
        right = LOSS(model.segmenter(single.inputs, *hints), single.labels)
        assert loss == pytest.approx(float(right.detach()), rel=1e-5)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name not in REFUSED])
def test_a_slice_has_the_gradient_of_a_backward_pass_of_its_own(
    adapted_mini: Build, preset: str
) -> None:
    check_slices(adapted_mini(stir=0.05, peft={"preset": preset}), made(5))


@pytest.mark.parametrize("preset", ["flap-sam", "lora-decoder"])
def test_slices_with_other_prompts_keep_their_gradients(adapted_mini: Build, preset: str) -> None:
    model = adapted_mini(stir=0.05, peft={"preset": preset})
    check_slices(model, Batch(made(5).inputs, made(5).labels, mixed_prompts()))


def test_inserts_that_see_each_slice_by_itself_are_right(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.05, peft={"preset": "med-sa"}, data={"context_slices": 1})
    check_slices(model, made(3, channels=1))


def test_biases_are_right_where_windows_need_no_padding(adapted_mini: Build) -> None:
    check_slices(adapted_mini(stir=0.05, peft={"preset": "norm-bias"}), made(3, side=40))


def test_bf16_is_tried_and_passes(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.05, training={"precision": "bf16"})
    assert model.segmenter.autocast_dtype is torch.bfloat16
    check_slices(model, made(3), bound=0.1)


@pytest.mark.parametrize("preset", REFUSED)
def test_a_method_that_opacus_gets_wrong_is_refused(adapted_mini: Build, preset: str) -> None:
    model = adapted_mini(peft={"preset": preset})
    model.segmenter.train()
    gradients = slice_gradients(model.segmenter, model.segmenter, LOSS, model.trained, 2)
    with pytest.raises(PrivacyError) as refusal:
        next(gradients(made(3)))
    assert refusal.value.code == ("SAM-P503" if preset == "norm-bias" else "SAM-P501")
    assert f"{REFUSED[preset]} " in refusal.value.message


@pytest.mark.parametrize(
    ("sections", "code"),
    [
        ({"peft": {"variant": "dora"}}, "SAM-P502"),
        ({"peft": {"preset": "samed", "variant": "dora"}}, "SAM-P501"),
        ({"training": {"recompute": True}}, "SAM-P501"),
    ],
)
def test_a_setting_that_opacus_gets_wrong_is_refused(
    adapted_mini: Build, sections: dict[str, Any], code: str
) -> None:
    model = adapted_mini(**sections)
    model.segmenter.train()
    gradients = slice_gradients(model.segmenter, model.segmenter, LOSS, model.trained, 2)
    with pytest.raises(PrivacyError) as refusal:
        next(gradients(made(2)))
    assert refusal.value.code == code


class Planted(nn.Module):
    """A small network with one fault."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.middle = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)
        self.last = nn.Conv2d(4, 3, 1)
        self.norm = nn.BatchNorm2d(4) if fault == "batch norm" else nn.Identity()
        self.fault = fault

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.first(images)).movedim(1, -1)
        match self.fault:
            case "past the layer":
                x = F.linear(x, self.middle.weight, self.middle.bias)
            case "also past the layer":
                x = self.middle(x) + F.linear(x, self.middle.weight)
            case "windows":
                x = self.middle(x.reshape(-1, 4, 4, 4)).reshape(x.shape)
            case "batch mean":
                x = self.middle(x - x.mean(0, keepdim=True))
            case _:
                x = self.middle(x)
        logits: Tensor = self.last(x.movedim(-1, 1))
        return logits


@pytest.mark.parametrize(
    ("fault", "code", "named"),
    [
        ("past the layer", "SAM-P501", "middle.weight"),
        ("also past the layer", "SAM-P503", "middle.weight"),
        ("windows", "SAM-P501", "middle.weight"),
        ("batch mean", "SAM-P503", "first.weight"),
        ("batch norm", "SAM-P502", ""),
    ],
)
def test_a_planted_fault_is_refused(fault: str, code: str, named: str) -> None:
    network = Planted(fault)
    if fault == "also past the layer":  # which then gets no gradient yet, right or wrong
        nn.init.zeros_(network.last.weight)
    trained = dict(network.named_parameters())
    before = {name: p.detach().clone() for name, p in trained.items()}
    gradients = slice_gradients(network, network, LOSS, trained, 4)
    with pytest.raises(PrivacyError) as refusal:
        next(gradients(made(4, side=8)))
    assert refusal.value.code == code
    assert named in refusal.value.message
    assert all(torch.equal(p, before[name]) for name, p in trained.items())


def test_a_network_without_a_fault_is_not_refused() -> None:
    network = Planted("")
    trained = dict(network.named_parameters())
    batch = made(5, side=8)
    found = list(slice_gradients(network, network, LOSS, trained, 4)(batch))
    for index, (vector, _) in enumerate(found):
        right, _ = backward(network, trained, some_of(batch, slice(index, index + 1)))
        assert off(vector, right) <= 3e-6


def test_a_fault_after_the_trial_is_refused_too() -> None:
    network = Planted("")
    trained = dict(network.named_parameters())
    gradients = slice_gradients(network, network, LOSS, trained, 4)
    list(gradients(made(4, side=8)))
    network.fault = "windows"
    with pytest.raises(PrivacyError, match=r"SAM-P501.*middle.weight for 4 slices"):
        list(gradients(made(4, side=8)))


def test_a_slice_that_is_not_finite_changes_no_other(adapted_mini: Build) -> None:
    model = adapted_mini(stir=0.05)
    model.segmenter.train()
    gradients = slice_gradients(model.segmenter, model.segmenter, LOSS, model.trained, 4)
    batch = made(4)
    before = list(gradients(batch))
    batch.inputs[2, 0, 5, 5] = float("nan")
    after = list(gradients(batch))
    for index in (0, 1, 3):
        assert torch.equal(after[index][0], before[index][0])
    assert not clipped_to_grid(after[2][0], 1.0).any()


@pytest.mark.parametrize("preset", ["flap-sam", "full"])  # one is refused in the middle
def test_the_shared_base_is_left_as_it_was(adapted_mini: Build, preset: str) -> None:
    model = adapted_mini(stir=0.05, peft={"preset": preset})
    model.segmenter.train()

    def facts() -> dict[str, Any]:
        modules = dict(model.segmenter.named_modules())
        return {
            "keys": list(model.segmenter.state_dict()),
            "hooks": {
                n: (len(m._forward_hooks), len(m._backward_hooks)) for n, m in modules.items()
            },
            "of modules": {n: sorted(vars(m)) for n, m in modules.items()},
            "of tensors": {n: sorted(vars(p)) for n, p in model.segmenter.named_parameters()},
            "gradients": [p.grad for p in model.segmenter.parameters()],
        }

    before, values = copy.deepcopy(facts()), copy.deepcopy(model.segmenter.state_dict())
    logits = model.segmenter(made(2).inputs)
    gradients = slice_gradients(model.segmenter, model.segmenter, LOSS, model.trained, 2)
    if preset == "full":
        with pytest.raises(PrivacyError):
            next(gradients(made(3)))
        assert facts() == before
    else:
        for _ in gradients(made(3)):
            assert facts() == before  # also while the caller works with a gradient
    assert all(torch.equal(v, values[n]) for n, v in model.segmenter.state_dict().items())
    assert torch.equal(model.segmenter(made(2).inputs), logits)


# SAM 2.


@pytest.mark.parametrize("preset", ["flap-sam", "decoder-only"])
def test_sam2_has_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, preset: str, two_threads: Parts
) -> None:
    from safetensors.torch import save_file

    from samaritan.models import sam2

    shape = Sam2Shape(
        16, 1, (1, 1, 2, 1), (2,), windows=(4, 2, 3, 2), position_grid=4, image_size=64,
        decoder_width=32, decoder_mlp=32, decoder_heads=2, iou_width=32,
    )  # fmt: skip
    file = tmp_path / "mini2.safetensors"
    torch.manual_seed(1)
    state = {k: v.clone() for k, v in sam2.construct(shape, 3).state_dict().items()}
    save_file(state, file)
    base = Base(shape, 64, 32, "sam2", checkpoint=("mini2.safetensors", "0" * 64))
    monkeypatch.setitem(BASES, "mini2", base)
    sections = {
        "model": {"base": "mini2", "checkpoint": str(file)},
        "peft": {"preset": preset, "rank": 4},
        "training": {"precision": "fp32"},
    }
    model = build_adapted(parse_config(sections), 2, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch = made(3, side=64)
    found = patient_gradients(
        model.segmenter, LOSS, [batch], list(model.trained.values()), two_threads
    )
    right, _ = backward(model.segmenter, model.trained, batch)
    assert off(next(found)[0], right) <= 1e-6
    check_slices(model, batch)
