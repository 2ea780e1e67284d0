"""Adapters as messages, and the Grid that carries them inside one process."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from samaritan.wire import content, from_arrays, message_bytes, to_arrays
from simulation.grid import InProcessGrid, nodes_of, partition_id

InProcessGrid(ClientApp(), 0)  # sets who this process is; Flower makes no Message before


def echo_app(log=None):
    app = ClientApp()

    @app.query()
    def query(message, context):
        if log is not None:
            log.append(partition_id(context))
        if message.content.config_records["config"].get("fail"):
            raise ValueError("told to")
        reply = content(config=ConfigRecord({"from": partition_id(context)}))
        return Message(reply, reply_to=message)

    return app


def ask(node, **config):
    return Message(content(config=ConfigRecord(config)), message_type="query", dst_node_id=node)


def test_tensors_survive_the_wire_bit_for_bit():
    state = {
        "z": torch.randn(3, 4),
        "a": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(4, 3).T,
        "odd": torch.tensor([float("nan"), float("-inf"), -0.0, 1e-45]),
    }
    record = to_arrays(state)
    proto = recorddict_to_proto(content(record)).SerializeToString()
    parsed = recorddict_from_proto(type(recorddict_to_proto(content(record))).FromString(proto))
    back = from_arrays(parsed.array_records["arrays"])
    assert list(back) == sorted(state)
    for name, value in state.items():
        assert back[name].shape == value.shape
        assert back[name].numpy().tobytes() == value.contiguous().numpy().tobytes()


def test_flower_reads_our_arrays_and_we_read_flowers():
    values = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    ours = to_arrays({"a": torch.from_numpy(values)})
    assert np.array_equal(ours["a"].numpy(), values)
    assert np.array_equal(from_arrays(ArrayRecord({"a": Array(values)}))["a"].numpy(), values)
    fortran = ArrayRecord({"a": Array(np.asfortranarray(values))})
    assert np.array_equal(from_arrays(fortran)["a"].numpy(), values)


def test_received_tensors_share_no_memory_with_the_message():
    record = to_arrays({"a": torch.zeros(3)})
    from_arrays(record)["a"].fill_(7)
    assert from_arrays(record)["a"].sum() == 0


def pickled() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return file.getvalue()


def cut() -> bytes:
    return to_arrays({"a": torch.zeros(4)})["a"].data[:-1]


@pytest.mark.parametrize(
    "array",
    [
        Array(np.zeros(3, np.float64)),
        Array(np.zeros(3, np.int32)),
        Array("float32", (4,), "numpy.ndarray", cut()),
        Array("float32", (4,), "numpy.ndarray", cut() + b"00000"),
        Array("float32", (10**12,), "numpy.ndarray", b"short"),
        Array("float32", (1,), "numpy.ndarray", pickled()),
        Array("float32", (1,), "pickle", pickled()),
        Array("float32", (), "numpy.ndarray", b""),
    ],
    ids=["float64", "int32", "short", "long", "huge", "pickle", "stype", "nothing"],
)
def test_an_array_that_is_not_float32_is_refused(array):
    with pytest.raises((ValueError, TypeError, EOFError)):
        from_arrays(ArrayRecord({"a": array}))


def test_message_bytes_are_those_of_the_serialised_content():
    records = content(to_arrays({"a": torch.zeros(100)}), ConfigRecord({"k": "v"}), {"dice": 0.5})
    message = Message(records, message_type="train", dst_node_id=1)
    assert message_bytes(message) == len(recorddict_to_proto(records).SerializeToString())
    assert message_bytes(message) > 400


def test_each_node_answers_as_its_partition():
    grid = InProcessGrid(echo_app(), 3)
    assert set(nodes_of(["a", "b", "c"])) == set(grid.get_node_ids())
    replies = grid.send_and_receive([ask(node) for node in grid.get_node_ids()])
    found = {r.metadata.src_node_id: r.content.config_records["config"]["from"] for r in replies}
    assert found == {node: index for index, node in enumerate(grid.get_node_ids())}


def test_an_exception_of_one_node_is_an_error_reply_and_the_next_still_answers():
    grid = InProcessGrid(echo_app(), 2)
    first, second = grid.get_node_ids()
    bad, good = grid.send_and_receive([ask(first, fail=True), ask(second)])
    assert bad.has_error()
    assert bad.metadata.src_node_id == first
    assert not good.has_error()


def test_a_message_is_delivered_only_when_its_answer_is_asked_for():
    log: list[int] = []
    grid = InProcessGrid(echo_app(log), 3)
    replies = iter(grid.send_and_receive([ask(node) for node in grid.get_node_ids()]))
    assert log == []
    next(replies)
    assert log == [0]


def test_an_answer_is_handed_out_once():
    grid = InProcessGrid(echo_app(), 1)
    ids = list(grid.push_messages([ask(1000)]))
    assert len(list(grid.pull_messages(ids))) == 1
    assert list(grid.pull_messages(ids)) == []


def test_an_interrupt_at_a_site_is_not_swallowed():
    app = ClientApp()

    @app.query()
    def query(message, context):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(InProcessGrid(app, 1).send_and_receive([ask(1000)]))


def test_empty_content_has_no_records():
    assert dict(content()) == dict(RecordDict())
