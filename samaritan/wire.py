"""Adapter states and scores as Flower records, and the bytes they take on the wire.

The only core module that imports flwr. Records are typed; nothing is pickled.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass

# Before flwr is imported: no telemetry, no look-up of newer versions.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import SType
from flwr.common.serde import recorddict_to_proto
from torch import Tensor

from samaritan.models.adapter import AdapterState

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"

_FLOAT32 = np.dtype("<f4")


@dataclass(frozen=True)
class Instruction:
    """What the server asks of a site in one message.

    Attributes:
        server_round: 1 to `rounds`.
        rounds: Rounds of the whole run.
        config_sha256: Of the configuration the server runs.
        base_sha256: Of the base model the adapter belongs to.
        timeout_s: How long local training may take.
    """

    server_round: int
    rounds: int
    config_sha256: str
    base_sha256: str
    timeout_s: float

    def record(self) -> ConfigRecord:
        """As a Flower record."""
        return ConfigRecord(
            {
                "server-round": self.server_round,
                "rounds": self.rounds,
                "config-sha256": self.config_sha256,
                "base-sha256": self.base_sha256,
                "timeout-s": float(self.timeout_s),
            }
        )


def read_instruction(message: Message) -> Instruction:
    """The instruction of a message.

    Raises:
        KeyError: When a field is missing.
    """
    record = message.content.config_records[CONFIG]
    return Instruction(
        int(record["server-round"]),  # type: ignore[arg-type]
        int(record["rounds"]),  # type: ignore[arg-type]
        str(record["config-sha256"]),
        str(record["base-sha256"]),
        float(record["timeout-s"]),  # type: ignore[arg-type]
    )


def to_arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    """Tensors as float32 arrays under their names, sorted."""
    record = ArrayRecord()
    for name in sorted(state):  # one by one: ArrayRecord copies what it is made from
        record[name] = _encode(state[name])
    return record


def from_arrays(record: ArrayRecord) -> AdapterState:
    """The tensors of a record; copies, so that nobody shares memory with a message.

    Raises:
        ValueError: When an array is not what `to_arrays` makes.
    """
    return {name: _decode(array) for name, array in record.items()}


def _encode(tensor: Tensor) -> Array:
    values = np.asarray(tensor.detach().cpu().numpy(), _FLOAT32)
    return Array("float32", values.shape, SType.NUMPY, _npy_header(values.shape) + values.tobytes())


def _decode(array: Array) -> Tensor:
    header = _npy_header(array.shape)
    if array.stype == SType.NUMPY and array.data.startswith(header):
        values = np.frombuffer(array.data, _FLOAT32, offset=len(header)).reshape(array.shape)
    else:  # the header of another NumPy release may be padded in another way
        values = array.numpy()
        if values.dtype != _FLOAT32:
            raise ValueError(f"an array is {values.dtype} instead of float32")
    return torch.from_numpy(values.copy())


@functools.lru_cache(maxsize=4096)
def _npy_header(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of float32 begins with. NumPy takes longer to read it than the numbers."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": _FLOAT32.str, "fortran_order": False, "shape": shape}
    )
    return file.getvalue()


def content(
    arrays: ArrayRecord | None = None,
    config: ConfigRecord | None = None,
    metrics: Mapping[str, float | int] | None = None,
) -> RecordDict:
    """The content of a message from those parts that are given."""
    records = RecordDict()
    if arrays is not None:
        records[ARRAYS] = arrays
    if config is not None:
        records[CONFIG] = config
    if metrics is not None:
        records[METRICS] = MetricRecord(dict(metrics))
    return records


def message_bytes(message: Message) -> int:
    """Size of the serialised content of a message; 0 for an error."""
    return int(recorddict_to_proto(message.content).ByteSize()) if message.has_content() else 0
