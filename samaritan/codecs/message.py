"""One update as one byte string: a safetensors file with a versioned header.

All numbers of all tensors, in the order of their names, make up one list; the file holds it as the
tensors `scales`, `numbers` (or `squeezed`) and `positions`, as far as the codec has them. Names and
shapes are the receiver's: the file has a digest of them, and the length of each part follows from
them and the codec; what is squeezed has that length at most. The header holds ``samaritan-wire``
(the version of this format), ``samaritan-codec`` (the codec as JSON), ``samaritan-names`` (the
digest), and what the caller adds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from samaritan.codecs.fault import WireError
from samaritan.codecs.low_rank import factor_shapes, factorise, product
from samaritan.codecs.numbers import number_parts, read_numbers, write_numbers
from samaritan.codecs.sparse import (
    largest,
    number_kept,
    position_bytes,
    read_positions,
    write_positions,
)
from samaritan.codecs.squeeze import squeeze, unsqueeze
from samaritan.config import CodecConfig

State = dict[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

VERSION = 1
_WIRE, _CODEC, _NAMES = "samaritan-wire", "samaritan-codec", "samaritan-names"
_INTEGERS = ("int8", "int4")
_HEADER_BYTES = 1 << 16
_TYPES = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8",
    torch.uint8: "U8",
}  # fmt: skip


def encode(
    state: Mapping[str, Tensor], codec: CodecConfig, *, header: Mapping[str, str], seed: int
) -> bytes:
    """Writes tensors as one message.

    Args:
        state: Any shapes; of any type, and written as float32 would be.
        codec: Low rank, then the largest numbers, then the number format.
        header: More text for the receiver, 64 KiB at most with our own.
        seed: Of the rounding; equal arguments give equal bytes.

    Raises:
        WireError: For a number that is not finite, naming its tensor, or a header that is too long
            or uses one of our keys.
    """
    tensors = {name: state[name].detach().cpu().float() for name in sorted(state)}
    _require_finite(tensors)
    values = _one_list(tensors.values(), codec.low_rank)
    size, count = len(values), number_kept(codec.top_k, len(values))
    parts: State = {}
    if count < size:
        positions = largest(values, count)
        parts["positions"] = write_positions(positions, size)
        values = values[positions]
    parts |= write_numbers(values, codec.numbers, seed)
    if codec.numbers in _INTEGERS:
        parts = squeeze(parts)
    own = {
        _WIRE: str(VERSION),
        _CODEC: codec.model_dump_json(),
        _NAMES: _digest({name: tuple(value.shape) for name, value in tensors.items()}),
    }
    if own.keys() & header.keys():
        raise WireError("the header uses a key of the wire format")
    return _file(parts, {**header, **own})


def decode(
    data: bytes, shapes: Shapes, codec: CodecConfig | None = None
) -> tuple[State, dict[str, str]]:
    """Reads a message of a sender that may be broken or hostile.

    Memory follows from `shapes`, whatever the message says. Decoding is exact arithmetic in a fixed
    order, so that all receivers get the same tensors to the bit.

    Args:
        data: The message.
        shapes: Of every tensor that the receiver expects.
        codec: The one that was agreed on; another is refused. Any, when left out.

    Returns:
        float32 tensors of `shapes`, all finite, and what the sender added to the header: text to
        distrust.

    Raises:
        WireError: For any fault.
    """
    parts, header = _read_file(data, 5 * sum(map(math.prod, shapes.values())))
    codec = _agreed_codec(header, shapes, codec)
    size = _list_size(shapes, codec.low_rank)
    count = number_kept(codec.top_k, size)
    if codec.numbers in _INTEGERS:
        parts = unsqueeze(parts, *number_parts(codec.numbers, count)["numbers"])
    _require_parts(parts, codec, count, size)
    values = read_numbers(parts, codec.numbers, count)
    if count < size:
        kept, values = values, torch.zeros(size)
        values[read_positions(parts["positions"], count, size)] = kept
    tensors = _tensors(values, shapes, codec.low_rank)
    _require_finite(tensors)
    return tensors, {k: v for k, v in header.items() if k not in (_WIRE, _CODEC, _NAMES)}


def _one_list(tensors: Iterable[Tensor], rank: int | None) -> Tensor:
    pieces = [torch.zeros(0)]  # torch cannot join nothing
    for tensor in tensors:
        wanted = factor_shapes(tuple(tensor.shape), rank)
        factors = factorise(tensor, wanted[0][1]) if len(wanted) == 2 else (tensor,)
        pieces += [factor.flatten() for factor in factors]
    return torch.cat(pieces)


def _list_size(shapes: Shapes, rank: int | None) -> int:
    return sum(math.prod(p) for shape in shapes.values() for p in factor_shapes(shape, rank))


def _tensors(values: Tensor, shapes: Shapes, rank: int | None) -> State:
    """The inverse of `_one_list`; in the order of `shapes`."""
    wanted = {name: factor_shapes(shape, rank) for name, shape in sorted(shapes.items())}
    pieces = iter(
        values.split_with_sizes([math.prod(p) for parts in wanted.values() for p in parts])
    )
    tensors = dict.fromkeys(shapes, values)
    for name, parts in wanted.items():
        factors = [next(pieces).view(part) for part in parts]
        tensors[name] = product(*factors) if len(factors) == 2 else factors[0].clone()
    return tensors


def _require_finite(tensors: Mapping[str, Tensor]) -> None:
    for name, value in tensors.items():
        # The extremes are not finite where any number is not: a third of the time of asking each.
        if value.numel() and not all(map(math.isfinite, torch.aminmax(value))):
            raise WireError(f"{name} is not finite")


def _digest(shapes: Shapes) -> str:
    """Of names and shapes; long enough to tell adapters apart, not a signature."""
    text = json.dumps(sorted((name, *shape) for name, shape in shapes.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _file(parts: State, header: Mapping[str, str]) -> bytes:
    """A safetensors file; the library's own `save` shuffles the header from call to call."""
    entries: dict[str, Any] = {"__metadata__": dict(sorted(header.items()))}
    payload, end = [], 0
    # The widest first, so that each begins where readers that map the file want it.
    for name, tensor in sorted(parts.items(), key=lambda part: (-part[1].itemsize, part[0])):
        piece = tensor.view(torch.uint8).numpy().tobytes()
        entries[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": [len(tensor)],
            "data_offsets": [end, end + len(piece)],
        }
        payload.append(piece)
        end += len(piece)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _HEADER_BYTES:
        raise WireError(f"the header has {len(text)} bytes, more than {_HEADER_BYTES}")
    return b"".join([len(text).to_bytes(8, "little"), text, *payload])


def _read_file(data: bytes, most: int) -> tuple[State, dict[str, str]]:
    length = int.from_bytes(data[:8], "little")
    if length > _HEADER_BYTES or len(data) > 8 + length + most + 64:
        raise WireError("the message is longer than these tensors need")
    try:
        parts = load(data)
        tree = json.loads(data[8 : 8 + length], object_pairs_hook=_without_repeats)
        return parts, dict(tree.get("__metadata__", {}))
    except Exception:  # safetensors raises many kinds, with the sender's text in them
        raise WireError("the message is no safetensors file") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise WireError("repeated key")
    return dict(pairs)


def _agreed_codec(
    header: Mapping[str, str], shapes: Shapes, agreed: CodecConfig | None
) -> CodecConfig:
    """The codec of a message in our version, about our tensors."""
    version = header.get(_WIRE, "")
    if version != str(VERSION):
        known = version.isascii() and version.isdigit() and len(version) < 7
        raise WireError(
            f"the message has wire format {int(version) if known else 'unknown'}, "
            f"this version reads {VERSION}"
        )
    if header.get(_NAMES) != _digest(shapes):
        raise WireError("the message is about tensors of other names or shapes")
    try:
        codec = CodecConfig.model_validate_json(header.get(_CODEC, ""))
    except ValueError:
        raise WireError("the codec of the message is unknown") from None
    if agreed not in (None, codec):
        raise WireError("the codec of the message is not the one agreed on")
    return codec


def _require_parts(parts: State, codec: CodecConfig, count: int, size: int) -> None:
    expected = number_parts(codec.numbers, count)
    if count < size:
        expected["positions"] = (torch.uint8, position_bytes(count, size))
    if parts.keys() != expected.keys():
        raise WireError("the message has other parts than its codec")
    for name, (dtype, length) in expected.items():
        if parts[name].dtype != dtype or tuple(parts[name].shape) != (length,):
            raise WireError(f"{name} is not {length} numbers of {_TYPES[dtype]}")
