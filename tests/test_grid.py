"""Adapters as messages, and the Grid that carries them inside one process."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto

from samaritan.messages import Answer, Instruction, MaskingStep, Request
from samaritan.wire import (
    answer_content,
    content,
    message_bytes,
    payload_of,
    read_answer,
    read_request,
    request_content,
)
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


def test_a_payload_survives_the_wire():
    payload = bytes(range(256)) * 3
    records = content(payload)
    proto = recorddict_to_proto(records).SerializeToString()
    parsed = recorddict_from_proto(type(recorddict_to_proto(records)).FromString(proto))
    assert payload_of(Message(parsed, message_type="train", dst_node_id=1)) == payload
    assert payload_of(Message(content(), message_type="train", dst_node_id=1)) is None


def sent(records):
    """The content as it comes out of Flower's serialisation."""
    proto = recorddict_to_proto(records).SerializeToString()
    parsed = recorddict_from_proto(type(recorddict_to_proto(records)).FromString(proto))
    return Message(parsed, message_type="train", dst_node_id=1)


INSTRUCTION = Instruction(2, 7, "c" * 64, "b" * 64, 1.5, "s" * 64, "r" * 64, 1, "d" * 64)
STEP = MaskingStep("masked", 3, 17, b"\x00\xff")


def test_a_request_survives_the_wire():
    asked = Request("train", "f" * 64, "", "e" * 64, INSTRUCTION, b"state", STEP)
    assert read_request(sent(request_content(asked)), "train", "e" * 64) == asked
    hello = Request("hello", "f" * 64)
    assert read_request(sent(request_content(hello)), "hello") == hello
    with pytest.raises(KeyError):
        read_request(sent(request_content(hello)), "train")


def test_an_answer_survives_the_wire_and_so_does_its_hash():
    numbers = {"dice": 0.1 + 0.2, "steps": 4}
    given = Answer(b"update", numbers, {"ledger": "d" * 64}, STEP, b"sealed")
    assert read_answer(sent(answer_content(given))) == given
    assert read_answer(sent(answer_content(given))).sha256 == given.sha256
    assert read_answer(sent(answer_content(Answer()))) == Answer()


def test_the_hash_of_an_answer_depends_on_every_part_but_the_seal():
    given = Answer(b"update", {"dice": 0.5}, {"a": "b"}, STEP)
    others = [
        Answer(b"updatf", {"dice": 0.5}, {"a": "b"}, STEP),
        Answer(None, {"dice": 0.5}, {"a": "b"}, STEP),
        Answer(b"update", {"dice": 0.25}, {"a": "b"}, STEP),
        Answer(b"update", {"nsd": 0.5}, {"a": "b"}, STEP),
        Answer(b"update", {"dice": 0.5}, {"a": "c"}, STEP),
        Answer(b"update", {"dice": 0.5}, {"a": "b"}),
        Answer(b"update", {"dice": 0.5}, {"a": "b"}, MaskingStep("masked", 3, 17, b"\x00\xfe")),
        Answer(b"update", {"dice": 0.5}, {"a": "b"}, MaskingStep("masked", 4, 17, b"\x00\xff")),
    ]
    assert len({answer.sha256 for answer in [given, *others]}) == 9
    assert Answer(b"update", {"dice": 0.5}, {"a": "b"}, STEP, b"seal").sha256 == given.sha256


@pytest.mark.parametrize(
    "record",
    [
        ArrayRecord({"payload": Array(np.zeros(3, np.uint8))}),
        ArrayRecord({"other": Array("uint8", (3,), "samaritan.codecs", b"abc")}),
        ArrayRecord({}),
        ArrayRecord(
            {n: Array("uint8", (3,), "samaritan.codecs", b"abc") for n in ("payload", "more")}
        ),
    ],
    ids=["flower's own array", "another name", "nothing", "two"],
)
def test_arrays_that_are_no_payload_are_refused(record):
    records = RecordDict({"arrays": record})
    with pytest.raises(ValueError, match="no payload"):
        payload_of(Message(records, message_type="train", dst_node_id=1))


def test_message_bytes_are_those_of_the_serialised_content():
    records = content(bytes(400), ConfigRecord({"k": "v"}), {"dice": 0.5})
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
