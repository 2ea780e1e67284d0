"""Codecs: what arrives, what it costs, and what a hostile sender can do."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from samaritan.codecs.fault import WireError
from samaritan.codecs.feedback import is_lossless, with_feedback
from samaritan.codecs.low_rank import factor_shapes, factorise, product
from samaritan.codecs.message import decode, encode
from samaritan.codecs.numbers import BLOCK
from samaritan.codecs.sparse import (
    largest,
    number_kept,
    position_bytes,
    read_positions,
    write_positions,
)
from samaritan.config import CodecConfig

_SHAPES: dict[str, tuple[int, ...]] = {
    "decoder.bias": (37,),
    "decoder.conv": (6, 5, 2, 2),
    "encoder.lora_A": (4, 96),
    "encoder.lora_B": (80, 4),
    "scale": (),
    "token": (1, 33),
    "unused": (0, 3),
}
_FORMATS = ("fp32", "fp16", "bf16", "int8", "int4")
_CODECS = [
    CodecConfig(low_rank=rank, top_k=share, numbers=numbers)
    for rank, share, numbers in itertools.product((None, 2), (None, 0.3), _FORMATS)
]


def _update(seed: int = 0, size: float = 1e-3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * size for n, s in _SHAPES.items()}


def _sent(state: dict[str, Tensor], codec: CodecConfig, seed: int = 0) -> dict[str, Tensor]:
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return decode(encode(state, codec, header={}, seed=seed), shapes)[0]


def _flat(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([torch.zeros(0), *(state[name].flatten() for name in sorted(state))])


def _relative(decoded: dict[str, Tensor], state: dict[str, Tensor]) -> float:
    wanted = _flat(state).double()
    return float((_flat(decoded) - wanted).norm() / wanted.norm())


# What arrives


@pytest.mark.parametrize("codec", _CODECS, ids=str)
def test_every_codec_returns_names_shapes_and_header(codec: CodecConfig) -> None:
    header = {"round": "3", "reference": "ab" * 32, "quote": 'é "\\ \n'}
    decoded, received = decode(encode(_update(), codec, header=header, seed=1), _SHAPES)
    assert received == header
    assert {name: tuple(value.shape) for name, value in decoded.items()} == _SHAPES
    assert {value.dtype for value in decoded.values()} == {torch.float32}


def test_fp32_is_exact_to_the_bit() -> None:
    update = _update() | {"scale": torch.tensor(-0.0), "token": torch.full((1, 33), 3.4e38)}
    decoded = _sent(update, CodecConfig())
    for name, value in update.items():
        assert torch.equal(decoded[name].view(torch.int32), value.view(torch.int32))


@pytest.mark.parametrize(
    ("numbers", "most"), [("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.011), ("int4", 0.19)]
)
def test_number_formats_keep_their_accuracy(numbers: Any, most: float) -> None:
    assert _relative(_sent(_update(), CodecConfig(numbers=numbers)), _update()) < most


@pytest.mark.parametrize("size", [1e-12, 1e-7, 1e30])
@pytest.mark.parametrize("numbers", _FORMATS)
def test_accuracy_does_not_depend_on_the_size_of_the_update(size: float, numbers: Any) -> None:
    # fp16 alone has only 2^-25 of absolute precision, and nothing above 65504.
    codec = CodecConfig(numbers=numbers)
    here = _relative(_sent(_update(size=size), codec), _update(size=size))
    assert here < 1.05 * _relative(_sent(_update(), codec), _update()) + 1e-9


@pytest.mark.parametrize("numbers", _FORMATS)
@pytest.mark.parametrize("share", [None, 0.4])
def test_the_largest_and_smallest_floats_stay_finite(numbers: Any, share: float | None) -> None:
    most, least = torch.finfo(torch.float32).max, 1.4e-45
    values = torch.tensor([most, -most, 1e38, 0.0, least, -least, 70000.0])
    decoded = _sent({"a": values}, CodecConfig(top_k=share, numbers=numbers))["a"]
    assert torch.allclose(decoded[:2], values[:2], rtol=0.15)
    assert decoded[4].abs() < 1e30
    tiny = _sent({"a": torch.full((70,), least)}, CodecConfig(numbers=numbers))["a"]
    assert (tiny.abs() < 1e-37).all()


def test_fp16_does_not_overflow_above_65504() -> None:
    values = torch.tensor([70000.0, -3e9, 1.0])
    decoded = _sent({"a": values}, CodecConfig(numbers="fp16"))["a"]
    assert torch.allclose(decoded[:2], values[:2], rtol=2**-11)


@pytest.mark.parametrize("numbers", _FORMATS)
def test_zeros_stay_zero(numbers: Any) -> None:
    state = {"a": torch.zeros(2 * BLOCK + 3), "b": torch.ones(3)}
    decoded = _sent(state, CodecConfig(numbers=numbers))
    assert not decoded["a"][: 2 * BLOCK].any()
    assert not _sent({"a": torch.zeros(5)}, CodecConfig(numbers=numbers))["a"].any()


@pytest.mark.parametrize(("numbers", "levels"), [("int8", 127), ("int4", 7)])
def test_integers_are_right_on_average_and_within_one_step(numbers: Any, levels: int) -> None:
    values = torch.randn(5 * BLOCK + 7, generator=torch.Generator().manual_seed(5))
    values[3] = 9.0  # one block with an outlier
    steps = torch.cat([b.abs().max().expand(len(b)) / levels * 1.012 for b in values.split(BLOCK)])
    rounds, codec = 400, CodecConfig(numbers=numbers)
    draws = torch.stack([_sent({"a": values}, codec, seed)["a"] for seed in range(rounds)])
    assert ((draws - values).abs() <= steps).all()
    # Rounding to one of two neighbours deviates by at most half a step.
    wrong = (draws.double().mean(0) - values) / (0.5 * steps / math.sqrt(rounds))
    assert wrong.abs().max() < 4.5
    assert abs(float(wrong.mean())) < 4 / math.sqrt(len(values))


def test_int4_loses_less_than_there_is_whatever_the_numbers_are() -> None:
    # The worst block has one outlier and the others at a fixed share of a step.
    for share in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
        values = torch.full((50 * BLOCK,), share / 7)
        values[::BLOCK] = 1.0
        assert _relative(_sent({"a": values}, CodecConfig(numbers="int4")), {"a": values}) < 0.6


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_rounding() -> None:
    for codec in _CODECS:
        one, same, other = (
            encode(_update(), codec, header={"b": "1", "a": "2", "c": "3"}, seed=seed)
            for seed in (7, 7, 8)
        )
        assert one == same
        assert (one == other) == (codec.numbers not in ("int8", "int4"))


def test_bytes_do_not_change_with_the_order_of_the_tensors() -> None:
    turned = dict(reversed(_update().items()))
    codec = CodecConfig(low_rank=2, top_k=0.3, numbers="int4")
    expected = encode(_update(), codec, header={"a": "1", "b": "2"}, seed=1)
    assert encode(turned, codec, header={"b": "2", "a": "1"}, seed=1) == expected
    decoded = decode(expected, dict(reversed(_SHAPES.items())))[0]
    assert list(decoded) == list(reversed(_SHAPES))
    assert torch.equal(_flat(decoded), _flat(decode(expected, _SHAPES)[0]))


def test_torch_keeps_its_own_randomness() -> None:
    before = torch.get_rng_state()
    with_feedback(_update(), {}, CodecConfig(low_rank=2, numbers="int4"), header={}, seed=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("codec", _CODECS, ids=str)
def test_an_empty_state_travels(codec: CodecConfig) -> None:
    assert decode(encode({}, codec, header={"round": "1"}, seed=0), {}) == ({}, {"round": "1"})
    assert _sent({"a": torch.zeros(0, 4)}, codec)["a"].shape == (0, 4)


def test_other_dtypes_layouts_and_gradients_travel_as_float32() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    state = {"a": matrix.T, "b": matrix.bfloat16(), "c": matrix.double().requires_grad_()}
    decoded = _sent(state, CodecConfig())
    assert torch.equal(decoded["a"], matrix.T)
    assert torch.equal(decoded["b"], matrix)
    assert torch.equal(decoded["c"], matrix)
    assert _sent({"c": state["c"]}, CodecConfig(top_k=0.5, low_rank=1))["c"].any()


def test_decoded_tensors_share_no_memory() -> None:
    decoded = _sent(_update(), CodecConfig())
    pointers = [v.untyped_storage().data_ptr() for v in decoded.values() if v.numel()]
    assert len(set(pointers)) == len(pointers)
    assert all(v.untyped_storage().nbytes() == 4 * v.numel() for v in decoded.values())


# Top-k


@pytest.mark.parametrize("share", [0.003, 0.05, 0.3, 0.6, 0.999])
def test_top_k_keeps_exactly_the_largest_of_all_tensors_together(share: float) -> None:
    update = _update()
    update["token"] *= 100  # a tensor that matters more gets more
    decoded, values = _flat(_sent(update, CodecConfig(top_k=share))), _flat(update)
    kept = decoded != 0
    assert int(kept.sum()) == max(1, round(share * len(values)))
    assert torch.equal(decoded[kept], values[kept])
    assert values[kept].abs().min() > values[~kept].abs().max()


def test_top_k_of_equal_numbers_keeps_as_many_as_it_says() -> None:
    decoded = _sent({"a": torch.ones(1000)}, CodecConfig(top_k=0.25))["a"]
    assert int(decoded.sum()) == 250


def test_a_share_of_one_is_dense() -> None:
    everything, dense = (
        encode(_update(), CodecConfig(top_k=share), header={}, seed=0) for share in (1.0, None)
    )
    assert load(everything).keys() == load(dense).keys() == {"numbers"}


@given(st.integers(2, 5000), st.floats(0, 1), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_positions_return_in_as_many_bytes_as_said(size: int, share: float, seed: int) -> None:
    count = min(max(1, round(share * size)), size - 1)
    places = sorted(np.random.default_rng(seed).choice(size, count, replace=False).tolist())
    written = write_positions(torch.tensor(places), size)
    assert len(written) == position_bytes(count, size) <= math.ceil(size / 8) + 2
    assert read_positions(written, count, size).tolist() == places


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.03, 0.05, 0.1, 0.2, 0.5, 0.8])
def test_positions_cost_little_more_than_their_entropy(share: float) -> None:
    size = 1_000_000
    count = round(size * share)
    entropy = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) / share
    bits = position_bytes(count, size) * 8 / count
    assert bits < min(1 / share + 0.1, entropy + 0.65)


@pytest.mark.parametrize("last", [[999, 1000], [998, 1023], [990, 990], [991, 990]])
def test_positions_beyond_the_last_number_or_not_increasing_are_refused(last: list[int]) -> None:
    places = torch.tensor([0, 100, 200, 300, 400, 500, 600, 700, *last])
    data = write_positions(places, 1000)
    with pytest.raises(WireError, match="increase"):
        read_positions(data, len(places), 1000)


@pytest.mark.parametrize(("count", "size"), [(10, 1000), (9, 16)])
@pytest.mark.parametrize("byte", [0, 255])
def test_more_or_fewer_positions_than_numbers_are_refused(count: int, size: int, byte: int) -> None:
    data = torch.full((position_bytes(count, size),), byte, dtype=torch.uint8)
    with pytest.raises(WireError, match="as many"):
        read_positions(data, count, size)


# Low rank


def test_a_matrix_of_that_rank_arrives_whole_and_others_as_their_best_approximation() -> None:
    generator = torch.Generator().manual_seed(2)
    for rows, columns in ((90, 40), (40, 90), (60, 60)):
        thin = (
            torch.randn(rows, 3, generator=generator),
            torch.randn(3, columns, generator=generator),
        )
        exact = thin[0] @ thin[1]
        assert torch.allclose(_sent({"a": exact}, CodecConfig(low_rank=3))["a"], exact, atol=1e-5)
        noisy = exact + torch.randn(rows, columns, generator=generator)
        u, s, v = torch.linalg.svd(noisy.double(), full_matrices=False)
        best = (u[:, :3] * s[:3]) @ v[:3]
        sent = _sent({"a": noisy}, CodecConfig(low_rank=3))["a"]
        assert torch.allclose(sent.double(), best, atol=1e-5)


def test_directions_ten_thousand_times_shorter_are_not_lost() -> None:
    generator = torch.Generator().manual_seed(6)
    rows, columns = (torch.linalg.qr(torch.randn(60, 2, generator=generator))[0] for _ in "ab")
    matrix = rows * torch.tensor([1.0, 1e-4]) @ columns.T
    decoded = _sent({"a": matrix}, CodecConfig(low_rank=2))
    assert _relative(decoded, {"a": matrix}) < 1e-6


def test_factors_are_balanced_and_their_product_is_that_of_matrices() -> None:
    matrix = torch.randn(50, 20, generator=torch.Generator().manual_seed(3))
    for left, right in (factorise(matrix, 4), factorise(matrix.T, 4)):
        assert torch.allclose(left.norm(dim=0), right.norm(dim=1), rtol=1e-5)
        assert torch.allclose(product(left, right), left @ right, atol=1e-5)


def test_a_matrix_of_lower_rank_and_zeros_have_no_fault() -> None:
    one = torch.ones(30, 40)
    decoded = _sent({"a": one, "b": torch.zeros(30, 40)}, CodecConfig(low_rank=5))
    assert torch.allclose(decoded["a"], one, atol=1e-6)
    assert not decoded["b"].any()


def test_only_matrices_that_shrink_are_factorised() -> None:
    assert factor_shapes((80, 4), 2) == [(80, 2), (2, 4)]
    for shape in ((80, 4), (80,), (6, 5, 2, 2), (0, 3), (4, 4), ()):
        assert factor_shapes(shape, 4) == [shape]
    for shape in ((4, 4), (64, 64, 2, 2)):  # as many numbers either way, and no matrix
        assert factor_shapes(shape, 2) == [shape]
    update = _update()
    decoded = _sent(update, CodecConfig(low_rank=2))
    for name in set(_SHAPES) - {"encoder.lora_A", "encoder.lora_B"}:
        assert torch.equal(decoded[name], update[name])
    assert torch.linalg.matrix_rank(decoded["encoder.lora_B"]) == 2


def test_parts_compose_low_rank_first_then_the_largest_then_the_format() -> None:
    update = _update()
    factors = {
        f"{name}{i}": factor
        for name, value in update.items()
        for i, factor in enumerate(
            factorise(value, 2) if len(factor_shapes(_SHAPES[name], 2)) == 2 else [value]
        )
    }
    sparse = _sent(factors, CodecConfig(top_k=0.3, numbers="int4"), seed=9)
    decoded = _sent(update, CodecConfig(low_rank=2, top_k=0.3, numbers="int4"), seed=9)
    for name, value in decoded.items():
        if f"{name}1" in sparse:
            assert torch.allclose(value, sparse[f"{name}0"] @ sparse[f"{name}1"], atol=1e-9)
        else:
            assert torch.equal(value, sparse[f"{name}0"])


# Sizes


def test_sizes_are_those_promised() -> None:
    generator = torch.Generator().manual_seed(4)
    state = {
        f"image_encoder.blocks.{i}.lora": torch.randn(768, 32, generator=generator)
        for i in range(75)
    }
    count = 75 * 768 * 32

    def bits(**codec: Any) -> float:
        data = encode(state, CodecConfig(**codec), header={"round": "12"}, seed=0)
        return len(data) * 8 / count

    assert len(encode(state, CodecConfig(), header={}, seed=0)) < 4 * count + 512
    assert bits(numbers="int4") < 4.26
    assert bits(numbers="int8") < 8.26
    assert bits(numbers="fp16") < 16.01
    assert bits(top_k=0.05, numbers="int4") < 0.05 * (4.25 + 6.3) + 0.003
    assert bits(top_k=0.01, numbers="int4") < 0.01 * (4.25 + 8.7) + 0.003
    assert bits(low_rank=8, numbers="int4") < 4.26 * 8 * 800 / (768 * 32) + 0.003


def test_any_safetensors_reader_opens_a_message() -> None:
    data = encode(_update(), CodecConfig(top_k=0.3, numbers="int8"), header={}, seed=0)
    assert int.from_bytes(data[:8], "little") % 8 == 0  # as readers that map the file want it
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header) == ["__metadata__", "scales", "numbers", "positions"]
    parts = load(data)
    assert {name: part.dtype for name, part in parts.items()} == {
        "scales": torch.bfloat16, "numbers": torch.int8, "positions": torch.uint8,
    }  # fmt: skip


# Error feedback


def _rounds(codec: CodecConfig, feedback: bool, rounds: int = 60) -> tuple[float, float]:
    """What is missing from the sum of all messages, and how long the sum of all updates is."""
    left_out: dict[str, Tensor] = {}
    wanted, sent = torch.zeros(804), torch.zeros(804)
    drift = torch.randn(804, generator=torch.Generator().manual_seed(99)) * 0.1
    for number in range(rounds):
        noise = torch.randn(804, generator=torch.Generator().manual_seed(number))
        update = {"a": (noise + drift).view(67, 12)}
        data, kept = with_feedback(update, left_out, codec, header={}, seed=number)
        left_out = kept if feedback else {}
        wanted += _flat(update)
        sent += _flat(decode(data, {"a": (67, 12)})[0])
        if feedback:
            assert torch.allclose(wanted - sent, _flat(left_out), atol=1e-4)
    return float((wanted - sent).norm()), float(wanted.norm())


@pytest.mark.parametrize(
    "codec",
    [
        CodecConfig(top_k=0.1),
        CodecConfig(numbers="int4"),
        CodecConfig(top_k=0.1, numbers="int4"),
        CodecConfig(low_rank=3, numbers="int8"),
    ],
    ids=str,
)
def test_with_feedback_what_is_missing_stops_growing(codec: CodecConfig) -> None:
    early, late = _rounds(codec, True, 50)[0], _rounds(codec, True, 150)[0]
    assert late < 1.5 * early


def test_without_feedback_top_k_loses_small_numbers_for_good() -> None:
    codec, small = CodecConfig(top_k=0.5), torch.tensor([1.0, 0.1])
    left_out: dict[str, Tensor] = {}
    bare, fed = torch.zeros(2), torch.zeros(2)
    for _ in range(100):
        bare += _sent({"a": small}, codec)["a"]
        data, left_out = with_feedback({"a": small}, left_out, codec, header={}, seed=0)
        fed += decode(data, {"a": (2,)})[0]["a"]
    assert bare.tolist() == [100.0, 0.0]
    assert fed == pytest.approx(torch.tensor([100.0, 10.0]), abs=1.2)
    assert _rounds(CodecConfig(top_k=0.1), False)[0] > 2 * _rounds(CodecConfig(top_k=0.1), True)[0]


def test_a_lossless_codec_leaves_nothing_and_pays_old_debts() -> None:
    update, debt = _update(), {"scale": torch.tensor(0.5)}
    data, left_out = with_feedback(update, debt, CodecConfig(), header={"round": "2"}, seed=0)
    decoded, header = decode(data, _SHAPES)
    assert left_out == {}
    assert header == {"round": "2"}
    assert torch.equal(decoded["scale"], update["scale"] + 0.5)
    assert torch.equal(decoded["token"], update["token"])


@pytest.mark.parametrize("codec", [CodecConfig(), CodecConfig(top_k=0.5)], ids=str)
def test_what_is_left_of_tensors_that_rest_this_round_is_kept(codec: CodecConfig) -> None:
    resting = torch.ones(3)
    _, left_out = with_feedback({"a": torch.ones(4)}, {"b": resting}, codec, header={}, seed=0)
    assert torch.equal(left_out["b"], resting)


def test_the_first_message_with_feedback_is_the_one_without() -> None:
    codec = CodecConfig(numbers="int4")
    data, _ = with_feedback(_update(), {}, codec, header={"round": "1"}, seed=5)
    assert data == encode(_update(), codec, header={"round": "1"}, seed=5)


def test_only_plain_fp32_is_lossless() -> None:
    lossless = [c for c in [*_CODECS, CodecConfig(top_k=1)] if is_lossless(c)]
    assert lossless == [CodecConfig(), CodecConfig(top_k=1)]


# What is refused


@pytest.mark.parametrize("codec", _CODECS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_not_sent(codec: CodecConfig, value: float) -> None:
    update = _update()
    update["encoder.lora_A"][2, 5] = value
    with pytest.raises(WireError, match=r"^encoder.lora_A is not finite$"):
        encode(update, codec, header={}, seed=0)


def test_a_header_that_is_long_or_uses_our_keys_is_not_sent() -> None:
    for header in ({"samaritan-wire": "1"}, {"samaritan-names": ""}, {"note": "x" * 70000}):
        with pytest.raises(WireError, match="header"):
            encode(_update(), CodecConfig(), header=header, seed=0)


def _refused(data: bytes, shapes: dict[str, tuple[int, ...]] = _SHAPES) -> str:
    with pytest.raises(WireError) as caught:
        decode(data, shapes)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def _taken_apart(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    return load(data), json.loads(data[8 : 8 + length])["__metadata__"]


_MESSAGE = encode(_update(), CodecConfig(top_k=0.3, numbers="int8"), header={"a": "b"}, seed=0)


def _changed(
    change: Callable[[dict[str, Any], dict[str, str]], None], data: bytes = _MESSAGE
) -> bytes:
    parts, header = _taken_apart(data)
    change(parts, header)
    return save(parts, header)


def test_what_is_put_together_again_is_read() -> None:
    decoded, _ = decode(_changed(lambda parts, header: None), _SHAPES)
    assert torch.equal(_flat(decoded), _flat(decode(_MESSAGE, _SHAPES)[0]))


def test_another_version_is_refused_with_both_versions() -> None:
    reason = _refused(_changed(lambda _, header: header.update({"samaritan-wire": "2"})))
    assert reason == "the message has wire format 2, this version reads 1"
    for strange in ("<script>", "9" * 50, "², ", "-1", ""):
        reason = _refused(
            _changed(lambda _, header, s=strange: header.update({"samaritan-wire": s}))
        )
        assert reason == "the message has wire format unknown, this version reads 1"
    assert "unknown" in _refused(save({"numbers": torch.zeros(3)}))


@pytest.mark.parametrize(
    "shapes",
    [
        _SHAPES | {"token": (33, 1)},
        {name.replace("token", "tokens"): shape for name, shape in _SHAPES.items()},
        _SHAPES | {"more": (1,)},
        {name: shape for name, shape in _SHAPES.items() if name != "unused"},
    ],
)
def test_other_names_or_shapes_are_refused(shapes: dict[str, tuple[int, ...]]) -> None:
    assert "names or shapes" in _refused(_MESSAGE, shapes)


def test_the_digest_is_that_of_sorted_names_and_shapes() -> None:
    text = json.dumps([[name, *shape] for name, shape in sorted(_SHAPES.items())])
    digest = _taken_apart(_MESSAGE)[1]["samaritan-names"]
    assert digest == hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "codec",
    ["", "{", "[]", '{"numbers": "int2"}', '{"top_k": 0}', '{"top_k": NaN}', '{"low_rank": -1}',
     '{"numbers": "fp32", "path": "/etc/passwd"}', "[" * 60000],
)  # fmt: skip
def test_an_unknown_codec_is_refused(codec: str) -> None:
    reason = _refused(_changed(lambda _, header: header.update({"samaritan-codec": codec})))
    assert reason == "the codec of the message is unknown"


def test_parts_that_are_missing_unknown_or_of_another_kind_are_refused() -> None:
    for name in ("scales", "numbers", "positions"):
        assert "other parts" in _refused(_changed(lambda parts, _, n=name: parts.pop(n)))
        shorter = _changed(lambda parts, _, n=name: parts.update({n: parts[n][:-1].clone()}))
        assert _refused(shorter).startswith(f"{name} is not ")
        two = _changed(lambda parts, _, n=name: parts.update({n: parts[n][None].clone()}))
        assert _refused(two).startswith(f"{name} is not ")
        kind = _changed(lambda parts, _, n=name: parts.update({n: parts[n].to(torch.int16)}))
        assert _refused(kind).startswith(f"{name} is not ")
    assert "other parts" in _refused(
        _changed(lambda parts, _: parts.update({"evil": torch.zeros(1, dtype=torch.int8)}))
    )


def test_a_codec_other_than_that_of_the_parts_is_refused() -> None:
    for codec in (
        "{}",
        '{"top_k": 0.3}',
        '{"top_k": 0.31, "numbers": "int8"}',
        '{"top_k": 0.3, "numbers": "int4"}',
    ):
        _refused(_changed(lambda _, header, c=codec: header.update({"samaritan-codec": c})))


@pytest.mark.parametrize("numbers", _FORMATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rank", [None, 2])
def test_numbers_and_scales_that_are_not_finite_are_refused_with_the_tensor(
    numbers: Any, value: float, rank: int | None
) -> None:
    codec = CodecConfig(low_rank=rank, numbers=numbers)
    data = encode(_update(), codec, header={}, seed=0)
    part = "scales" if numbers in ("int8", "int4") else "numbers"

    def spoil(parts: dict[str, Any], _: dict[str, str]) -> None:
        parts[part][0] = value

    assert _refused(_changed(spoil, data)) == "decoder.bias is not finite"

    def spoil_last(parts: dict[str, Any], _: dict[str, str]) -> None:
        parts[part][-1] = value

    assert _refused(_changed(spoil_last, data)).endswith("is not finite")
    if numbers == "fp16":
        spoiled = _changed(lambda parts, _: parts["scales"].fill_(value), data)
        assert _refused(spoiled) == "decoder.bias is not finite"


def test_numbers_that_become_infinite_on_the_way_are_refused() -> None:
    data = encode({"a": torch.ones(9, 9)}, CodecConfig(low_rank=2), header={}, seed=0)
    huge = _changed(lambda parts, _: parts["numbers"].fill_(1e30), data)
    assert _refused(huge, {"a": (9, 9)}) == "a is not finite"
    data = encode({"a": torch.ones(9)}, CodecConfig(numbers="int8"), header={}, seed=0)
    huge = _changed(lambda parts, _: parts["scales"].fill_(1e38), data)
    assert _refused(huge, {"a": (9,)}) == "a is not finite"


def test_bytes_before_between_and_after_are_refused() -> None:
    for data in (_MESSAGE + b"\0", _MESSAGE[:-1], b"\0" + _MESSAGE, _MESSAGE[:7], b"", b"\0" * 8):
        _refused(data)


def _with_header(text: str | bytes, payload: bytes = b"") -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + payload


def test_repeated_keys_are_refused() -> None:
    data = encode({"a": torch.ones(2)}, CodecConfig(), header={}, seed=0)
    length = int.from_bytes(data[:8], "little")
    text = data[8 : 8 + length].decode().rstrip()
    assert "no safetensors" not in str(decode(_with_header(text, data[8 + length :]), {"a": (2,)}))
    again = text[:-1] + ',"numbers":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert "no safetensors" in _refused(_with_header(again, data[8 + length :]), {"a": (2,)})
    wire = text.replace('"samaritan-wire":"1"', '"samaritan-wire":"2","samaritan-wire":"1"')
    assert "no safetensors" in _refused(_with_header(wire, data[8 + length :]), {"a": (2,)})


def test_messages_longer_than_the_tensors_need_are_refused_unread() -> None:
    data = encode({"a": torch.ones(1000)}, CodecConfig(), header={}, seed=0)
    text, payload = data[8:-4000], data[-4000:]
    assert "longer" in _refused(_with_header(text, payload + bytes(2000)), {"a": (1000,)})
    assert decode(_with_header(text + b" " * 60000, payload), {"a": (1000,)})
    assert "longer" in _refused(_with_header(text + b" " * 70000, payload), {"a": (1000,)})


def test_headers_that_lie_about_their_contents_are_refused_without_memory() -> None:
    shapes = {"a": (1000,)}
    good = _taken_apart(encode({"a": torch.ones(1000)}, CodecConfig(), header={}, seed=0))[1]

    def entry(shape: list[int], end: int) -> str:
        numbers = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
        return json.dumps({"__metadata__": good, "numbers": numbers})

    bombs = [
        _with_header(entry([1 << 40], 1 << 42), bytes(4000)),
        _with_header(entry([1 << 62, 4], 0)),
        _with_header(entry([0, 1 << 62], 0)),
        _with_header(entry([1000], 4000), bytes(10_000_000)),
        _with_header(entry([10_000_000], 40_000_000), bytes(40_000_000)),
        (1 << 63).to_bytes(8, "little") + bytes(100),
        _with_header("[" * 60000),
        _with_header('{"a":' * 10000),
        _with_header("{" + " " * 70000 + "}"),
        _with_header('{"__metadata__": 3}'),
        _with_header("1" * 5000),
    ]
    for data in bombs:
        tracemalloc.start()
        try:
            reason = _refused(data, shapes)
            assert tracemalloc.get_traced_memory()[1] < 3_000_000
        finally:
            tracemalloc.stop()
        assert len(reason) < 100


def _read_or_refused(data: bytes) -> None:
    with contextlib.suppress(WireError):
        decoded, _ = decode(data, _SHAPES)
        assert {name: tuple(value.shape) for name, value in decoded.items()} == _SHAPES
        assert all(torch.isfinite(value).all() for value in decoded.values())


_BASES = [encode(_update(), codec, header={"round": "1"}, seed=0) for codec in _CODECS]


@given(st.sampled_from(_BASES), st.data())
@settings(max_examples=250, deadline=None)
def test_mutated_messages_are_read_or_refused_and_nothing_else(
    base: bytes, data: st.DataObject
) -> None:
    mutated = bytearray(base)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.one_of(st.integers(0, 450), st.integers(0, len(base) - 1)))
        where = min(where, len(mutated) - 1)
        kind = data.draw(st.sampled_from(["set", "cut", "insert", "repeat"]))
        if kind == "set":
            mutated[where] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del mutated[where : where + data.draw(st.integers(1, 40))]
        elif kind == "insert":
            mutated[where:where] = data.draw(st.binary(min_size=1, max_size=40))
        else:
            mutated[where:where] = mutated[where : where + data.draw(st.integers(1, 400))]
        if not mutated:
            break
    _read_or_refused(bytes(mutated))


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused(data: bytes, framed: bool) -> None:
    _refused(_with_header(data) if framed else data)


@given(
    rank=st.none() | st.integers(1, 10**30),
    share=st.none() | st.floats(0, 1, exclude_min=True),
    numbers=st.sampled_from(_FORMATS),
    lengths=st.tuples(*[st.integers(0, 900)] * 3),
)
@settings(max_examples=200, deadline=None)
def test_a_codec_of_the_senders_choice_is_read_or_refused(
    rank: int | None, share: float | None, numbers: str, lengths: tuple[int, int, int]
) -> None:
    codec = json.dumps({"low_rank": rank, "top_k": share, "numbers": numbers})
    _, header = _taken_apart(_MESSAGE)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
             "int8": torch.int8, "int4": torch.uint8}[numbers]  # fmt: skip
    parts = {
        "numbers": torch.ones(lengths[0], dtype=dtype),
        "scales": torch.ones(lengths[1], dtype=torch.bfloat16),
        "positions": torch.ones(lengths[2], dtype=torch.uint8),
    }
    _read_or_refused(save(parts, header | {"samaritan-codec": codec}))


def test_number_kept_is_at_least_one_and_never_more_than_there_are() -> None:
    assert [number_kept(share, 10) for share in (None, 1.0, 0.25, 1e-9)] == [10, 10, 2, 1]
    assert number_kept(0.5, 0) == 0
    assert largest(torch.tensor([1.0, -3.0, 2.0]), 2).tolist() == [1, 2]
