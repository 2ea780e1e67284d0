"""Requests and answers as bytes, for the way between courier and agent and for the outbox.

A frame is a JSON header with its length before it, and behind it the payload and the data of a step
as they are. Nothing is pickled, and a reader knows how much comes before it reads it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, Protocol, get_args

from client.redaction import RedactedError
from samaritan.errors import DeploymentError
from samaritan.messages import Answer, Instruction, Kind, MaskingStep, Request

_MAGIC = b"SAM\x01"
_HEADER_BYTES = 1 << 20
_BODY_BYTES = 1 << 32


class Readable(Protocol):
    """A stream, or bytes like one."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, or fewer where it ends."""


def pack_request(request: Request) -> bytes:
    """A request as a frame."""
    step = request.step
    header = {
        "kind": request.kind,
        "plan": request.plan_sha256,
        "message": request.message_id,
        "bundle": request.bundle_sha256,
        "instruction": request.instruction and asdict(request.instruction),
        "step": step and [step.stage, step.attempt, step.length],
        "known": request.known_answer,
    }
    return _frame(header, request.payload, step.data if step else None)


def read_request(stream: Readable) -> Request:
    """A request from a stream.

    Raises:
        DeploymentError: SAM-N201 when it is none; EOFError when the stream has ended.
    """
    header, payload, data = _read(stream)
    try:
        texts = [header[name] for name in ("plan", "message", "bundle", "known")]
        if header["kind"] not in get_args(Kind) or not all(isinstance(t, str) for t in texts):
            raise TypeError("a text that is none, or another kind")
        plan, message, bundle, known = texts
        asked = _instruction(header["instruction"])
        step = _step(header["step"], data)
        return Request(header["kind"], plan, message, bundle, asked, payload, step, known)
    except (KeyError, TypeError, ValueError) as error:
        raise _bad_frame(error) from error


def pack_answer(answer: Answer) -> bytes:
    """An answer as a frame."""
    step = answer.step
    header = {
        "numbers": dict(answer.numbers),
        "texts": dict(answer.texts),
        "step": step and [step.stage, step.attempt, step.length],
        "seal": answer.seal.hex(),
    }
    return _frame(header, answer.payload, step.data if step else None)


def pack_fault(fault: RedactedError) -> bytes:
    """A fault as a frame: its code and its reference."""
    return _frame({"code": fault.code, "reference": fault.reference}, None, None)


def read_answer(stream: Readable) -> Answer:
    """An answer from a stream.

    Raises:
        RedactedError: When it is a fault.
        DeploymentError: SAM-N201 when it is neither; EOFError when the stream has ended.
    """
    header, payload, data = _read(stream)
    try:
        if "code" in header:
            raise RedactedError(str(header["code"]), str(header["reference"]))
        return Answer(
            payload,
            header["numbers"],
            header["texts"],
            _step(header["step"], data),
            bytes.fromhex(header["seal"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _bad_frame(error) from error


def _frame(header: dict[str, Any], payload: bytes | None, data: bytes | None) -> bytes:
    lengths = [None if part is None else len(part) for part in (payload, data)]
    text = json.dumps({**header, "lengths": lengths}, allow_nan=False).encode()
    return b"".join([_MAGIC, len(text).to_bytes(4, "little"), text, payload or b"", data or b""])


def _read(stream: Readable) -> tuple[dict[str, Any], bytes | None, bytes | None]:
    start = _exactly(stream, 8)
    length = int.from_bytes(start[4:], "little")
    if start[:4] != _MAGIC or length > _HEADER_BYTES:
        raise _bad_frame(ValueError("another beginning"))
    try:
        header = json.loads(_exactly(stream, length))
        payload, data = header["lengths"]
        sizes = [0 if size is None else size for size in (payload, data)]
        if any(not isinstance(n, int) or n < 0 for n in sizes) or sum(sizes) > _BODY_BYTES:
            raise ValueError("a body of another length")
    except (ValueError, KeyError, TypeError) as error:
        raise _bad_frame(error) from error
    parts = [None if size is None else _exactly(stream, size) for size in (payload, data)]
    return header, parts[0], parts[1]


def _exactly(stream: Readable, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes came")
    return data


def _instruction(given: dict[str, Any] | None) -> Instruction | None:
    """Of exactly these types: round 1.5 would be another round to all that count."""
    if given is None:
        return None
    kinds = {"int": int, "float": float, "str": str}
    for field in fields(Instruction):
        if type(given[field.name]) is not kinds[str(field.type)]:
            raise TypeError(f"{field.name} is of another type")
    return Instruction(**given)


def _step(given: list[Any] | None, data: bytes | None) -> MaskingStep | None:
    if given is None:
        return None
    stage, attempt, length = given
    if data is None:
        raise ValueError("a step without data")
    return MaskingStep(stage, attempt, length, data)


def _bad_frame(error: Exception) -> DeploymentError:
    return DeploymentError(
        "SAM-N201",
        f"what came over the local socket is no message of this version ({type(error).__name__})",
        "Give courier and agent the same version of Samaritan, and restart both.",
    )
