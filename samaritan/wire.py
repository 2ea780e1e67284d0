"""Instructions, payloads and scores as Flower records, and the bytes they take on the wire.

The only core module that imports flwr. Records are typed; nothing is pickled. A payload is one byte
string (`samaritan.codecs`) in one Flower array.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

# Before flwr is imported: no telemetry, no look-up of newer versions.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import array_to_proto, recorddict_to_proto

ARRAYS, CONFIG, METRICS, MASKING = "arrays", "config", "metrics", "masking"
SECURE_SUM = "query.secure_sum"
"""The type of messages that prepare and open a secure sum."""

_PAYLOAD, _STYPE = "payload", "samaritan.codecs"


@dataclass(frozen=True)
class Instruction:
    """What the server asks of a site in one message.

    Attributes:
        server_round: 1 to `rounds`.
        rounds: Rounds of the whole run.
        config_sha256: Of the configuration the server runs.
        base_sha256: Of the base model the adapter belongs to.
        timeout_s: How long local training may take.
        state_sha256: Of the state to work on, which the site has after reading the payload.
        reference_sha256: Of the state the payload is to be added to; empty where the payload is the
            whole state, or where there is none because the site has the state already.
        used_round: The last round in which an update of this site was used, 0 for none. The site
            goes on from what it noted then: an update that was lost or refused has taken nothing.
        ledger: Where the site's privacy ledger stood when the server last heard of it; empty where
            it never did. A site whose ledger does not know this entry has lost what it spent.
    """

    server_round: int
    rounds: int
    config_sha256: str
    base_sha256: str
    timeout_s: float
    state_sha256: str = ""
    reference_sha256: str = ""
    used_round: int = 0
    ledger: str = ""

    def record(self) -> ConfigRecord:
        """As a Flower record."""
        values = asdict(self) | {"timeout_s": float(self.timeout_s)}
        return ConfigRecord({name.replace("_", "-"): value for name, value in values.items()})


def read_instruction(message: Message) -> Instruction:
    """The instruction of a message.

    Raises:
        KeyError: When a field is missing.
    """
    record = message.content.config_records[CONFIG]
    kinds = {"int": int, "float": float, "str": str}
    values = {
        field.name: kinds[str(field.type)](record[field.name.replace("_", "-")])
        for field in fields(Instruction)
    }
    return Instruction(**values)


@dataclass(frozen=True)
class MaskingStep:
    """One step of a secure sum (`samaritan.privacy.secure_sum`), in either direction.

    Attributes:
        stage: "keys", "shares", "masked", "agreement" or "opening".
        attempt: 1 and up, in its round.
        length: Numbers in an update.
        data: What the other side made for this step.
    """

    stage: str
    attempt: int
    length: int
    data: bytes

    def record(self) -> ConfigRecord:
        """As a Flower record."""
        return ConfigRecord(asdict(self))


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
        records[MASKING] = masking.record()
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
