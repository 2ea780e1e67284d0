"""Adapter states and scores as Flower records, and the bytes they take on the wire.

The only core module that imports flwr. Records are typed; nothing is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

# Before flwr is imported: no telemetry, no look-up of newer versions.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.serde import recorddict_to_proto
from torch import Tensor

from samaritan.models.adapter import AdapterState

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"


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
    return ArrayRecord(
        {
            name: Array(np.ascontiguousarray(state[name].detach().cpu().numpy(), np.float32))
            for name in sorted(state)
        }
    )


def from_arrays(record: ArrayRecord) -> AdapterState:
    """The tensors of a record; copies, so that nobody shares memory with a message."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


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
