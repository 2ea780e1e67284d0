"""What travels: bytes are those of the serialised messages, and few against full fine-tuning."""

from __future__ import annotations

from math import prod

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_to_proto

from benchmarks.communication import CODECS, measure, trained, trained_shapes
from samaritan.wire import message_bytes
from simulation.grid import InProcessGrid


def parameters(preset: str) -> int:
    return sum(prod(shape) for shape in trained_shapes(preset).values())


def test_the_measured_setting_is_the_papers() -> None:
    assert parameters("full") == 90_532_927
    assert parameters("flap-sam") == 1_846_384


def test_a_round_trip_is_400_times_below_full_fine_tuning() -> None:
    trips = trained(measure("flap-sam", CODECS["up top 0.2 int4, down int4"], rounds=2))
    assert len(trips) == 2
    whole = 2 * 4 * parameters("full")  # numbers alone, without any header
    for trip in trips[1:]:
        assert min(trip.up, trip.down) > parameters("flap-sam") / 10  # something was sent
        assert whole / trip.both > 400


def test_without_a_codec_every_number_takes_four_bytes() -> None:
    (trip,) = trained(measure("flap-sam", CODECS["fp32"], rounds=2))[1:]
    for size in (trip.up, trip.down):
        assert 0 < size - 4 * parameters("flap-sam") < 1024


@pytest.mark.parametrize("length", [0, 1, 60, 127, 128, 129, 16_300, 16_384, 2_097_151, 2_097_152])
@pytest.mark.parametrize("arrays", [0, 1, 3])
def test_counted_bytes_are_those_of_the_serialised_message(length: int, arrays: int) -> None:
    InProcessGrid(ClientApp(), 0)  # Flower makes messages in a run only
    record = ArrayRecord()
    for number in range(arrays):
        name = "é" * number * 50  # one name is empty, one is long
        record[name] = Array("uint8", (length,), "a kind", b"x" * (length + number))
    content = RecordDict(
        {
            "arrays": record,
            "": ArrayRecord(),
            "numbers": MetricRecord({"loss": 0.5, "steps": 3}),
            "texts": ConfigRecord({"state": "f" * 64}),
        }
    )
    for records in (content, RecordDict()):
        message = Message(records, message_type="train", dst_node_id=1)
        assert message_bytes(message) == len(recorddict_to_proto(records).SerializeToString())
