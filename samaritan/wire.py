"""Requests and answers as Flower messages, and the bytes they take on the wire.

The only core module that imports flwr. Records are typed; nothing is pickled. A payload is one byte
string (`samaritan.codecs`) in one Flower array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, fields

# Before flwr is imported: no telemetry, no look-up of newer versions.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import array_to_proto, recorddict_to_proto

from samaritan.messages import Answer, Instruction, Kind, MaskingStep, Request

ARRAYS, CONFIG, METRICS, MASKING, SEAL = "arrays", "config", "metrics", "masking", "seal"

MESSAGE_TYPES: dict[Kind, str] = {
    "hello": "query",
    "secure_sum": "query.secure_sum",
    "train": "train",
    "evaluate": "evaluate",
}
"""How Flower calls each kind of question."""

_PARTS = {ARRAYS, CONFIG, METRICS, MASKING, SEAL}
_PAYLOAD, _STYPE = "payload", "samaritan.codecs"
_PLAN, _KNOWN, _SIGNATURE = "plan-sha256", "known-answer", "signature"


def request_content(request: Request) -> RecordDict:
    """The content of a message that asks a site."""
    named = {_PLAN: request.plan_sha256, _KNOWN: request.known_answer}
    config = ConfigRecord({name: value for name, value in named.items() if value})
    if request.instruction is not None:
        values = asdict(request.instruction)
        values["timeout_s"] = float(request.instruction.timeout_s)
        for name, value in values.items():
            config[name.replace("_", "-")] = value
    return content(request.payload, config if config else None, masking=request.step)


def read_request(message: Message, kind: Kind, bundle_sha256: str = "") -> Request:
    """What a message asks.

    Args:
        message: From a server.
        kind: The kind it came as.
        bundle_sha256: Of the app bundle it came with.

    Raises:
        KeyError, TypeError, ValueError: When a part is missing or of another type.
    """
    config = message.content.config_records.get(CONFIG)
    named = (_PLAN, _KNOWN)
    plan, known = ("" if config is None else str(config.get(name, "")) for name in named)
    if kind == "hello":
        asked = message.metadata.message_id
        return Request(kind, plan, asked, bundle_sha256, known_answer=known)
    if config is None:
        raise KeyError(CONFIG)
    kinds = {"int": int, "float": float, "str": str}
    values = {
        field.name: kinds[str(field.type)](config[field.name.replace("_", "-")])
        for field in fields(Instruction)
    }
    return Request(
        kind,
        plan,
        message.metadata.message_id,
        bundle_sha256,
        Instruction(**values),
        payload_of(message),
        read_masking_step(message),
        known,
    )


def answer_content(answer: Answer) -> RecordDict:
    """The content of a message that answers."""
    texts = ConfigRecord(dict(answer.texts)) if answer.texts else None
    records = content(answer.payload, texts, answer.numbers or None, answer.step)
    if answer.seal:
        records[SEAL] = ConfigRecord({_SIGNATURE: answer.seal})
    return records


def read_answer(message: Message) -> Answer:
    """What a site answers, whatever it is.

    Raises:
        KeyError, TypeError, ValueError: When it holds anything but the parts of an answer.
    """
    if extra := message.content.keys() - _PARTS:
        raise ValueError(f"{len(extra)} records that are no part of an answer")
    numbers: dict[str, float | int] = {}
    for name, value in message.content.metric_records.get(METRICS, {}).items():
        if not isinstance(value, int | float):
            raise TypeError("a number of an answer is none")
        numbers[name] = value
    texts: dict[str, str] = {}
    for name, text in message.content.config_records.get(CONFIG, {}).items():
        if not isinstance(text, str):
            raise TypeError("a text of an answer is none")
        texts[name] = text
    sealing = message.content.config_records.get(SEAL)
    seal = b"" if sealing is None else sealing[_SIGNATURE]
    if not isinstance(seal, bytes) or (sealing and len(sealing) > 1):
        raise TypeError("a seal that is no signature")
    return Answer(payload_of(message), numbers, texts, read_masking_step(message), seal)


def read_masking_step(message: Message) -> MaskingStep | None:
    """The step of a message, if it has one.

    Raises:
        KeyError, TypeError: When a field is missing or of another type.
    """
    if MASKING not in message.content.config_records:
        return None
    record = message.content.config_records[MASKING]
    stage, attempt, length, data = (record[field.name] for field in fields(MaskingStep))
    if not (isinstance(stage, str) and isinstance(attempt, int) and isinstance(length, int)):
        raise TypeError("a step of a secure sum has other types")
    if not isinstance(data, bytes):
        raise TypeError("the data of a step are no bytes")
    return MaskingStep(stage, attempt, length, data)


def payload_of(message: Message) -> bytes | None:
    """The payload of a message, if it has one.

    Raises:
        ValueError: When the message holds arrays of another kind.
    """
    if ARRAYS not in message.content.array_records:
        return None
    record = message.content.array_records[ARRAYS]
    if list(record) != [_PAYLOAD] or record[_PAYLOAD].stype != _STYPE:
        raise ValueError("the arrays of a message are no payload")
    return record[_PAYLOAD].data


def content(
    payload: bytes | None = None,
    config: ConfigRecord | None = None,
    metrics: Mapping[str, float | int] | None = None,
    masking: MaskingStep | None = None,
) -> RecordDict:
    """The content of a message from those parts that are given."""
    records = RecordDict()
    if payload is not None:
        record = ArrayRecord()
        record[_PAYLOAD] = Array("uint8", (len(payload),), _STYPE, payload)
        records[ARRAYS] = record
    if config is not None:
        records[CONFIG] = config
    if metrics is not None:
        records[METRICS] = MetricRecord(dict(metrics))
    if masking is not None:
        records[MASKING] = ConfigRecord(asdict(masking))
    return records


def message_bytes(message: Message) -> int:
    """Size of the serialised content; 0 for an error.

    Protobuf copies what it writes many times over, so the tensors are added up and not written.
    """
    if not message.has_content():
        return 0
    arrays = message.content.array_records
    rest = {name: record for name, record in message.content.items() if name not in arrays}
    size = int(recorddict_to_proto(RecordDict(rest)).ByteSize())
    for name, record in arrays.items():
        items = (_key(key) + _field(_array_bytes(array)) for key, array in record.items())
        size += _field(_key(name) + _field(sum(map(_field, items))))
    return size


def _array_bytes(array: Array) -> int:
    empty = Array(array.dtype, array.shape, array.stype, b"")
    size = int(array_to_proto(empty).ByteSize())
    return size + _field(len(array.data)) if array.data else size


def _key(text: str) -> int:
    return _field(len(text.encode())) if text else 0


def _field(length: int) -> int:
    """Size of a protobuf field with content of that length: its tag, the length, the content."""
    return 1 + max(1, math.ceil(length.bit_length() / 7)) + length
