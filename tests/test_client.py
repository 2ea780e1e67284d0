"""The courier lets nothing but codes out, and the agent keeps to what its hospital agreed to."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ConfigRecord, Message

from client.agent import SiteAgent
from client.app import make_client_app
from client.exchange import Exchange, KnownStates
from client.memory import Memory
from samaritan import __version__
from samaritan.codecs import decode, encode
from samaritan.config import CodecConfig, config_sha256, parse_config
from samaritan.errors import DataError, FederationError, ModelError
from samaritan.messages import Instruction, Request
from samaritan.models.bases import state_sha256
from samaritan.wire import content, payload_of, request_content
from simulation.grid import InProcessGrid

CONFIG = parse_config({"rounds": 3})
PLANTED = "/secret/patient_007"


@pytest.fixture
def ask(bare):
    """The one answer of a courier whose agent this is."""

    def asked(agent, kind, payload=None, instruction=None):
        grid = InProcessGrid(make_client_app(lambda context: bare(agent)), 1)
        if isinstance(instruction, ConfigRecord):
            records = content(payload, instruction)
        else:
            records = request_content(Request("train", instruction=instruction, payload=payload))
        message = Message(records, message_type=kind, dst_node_id=1000)
        (reply,) = grid.send_and_receive([message])
        return reply

    return asked


def instruction(state=None, **changes):
    """Of round 1; about a state that is sent whole, or about the one before the first round."""
    sha256 = state_sha256({"a": torch.zeros(3)} if state is None else state)
    made = Instruction(1, 3, config_sha256(CONFIG), "b" * 64, 60.0, sha256)
    return replace(made, **changes)


def fake_instruction(server_round=1):
    """For a fake site, which trains two tensors."""
    return instruction(fake_adapter(), server_round=server_round)


def fake_adapter():
    return {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


def whole(state):
    return encode(state, CodecConfig(), header={}, seed=0)


class Model:
    """An adapter of one tensor and no network."""

    base = SimpleNamespace(sha256="b" * 64)

    def __init__(self):
        self.held = {"a": torch.zeros(3)}

    def state(self):
        return {k: v.clone() for k, v in self.held.items()}

    def load(self, adapter):
        if adapter.keys() != self.held.keys():
            raise ModelError("SAM-M302", f"the adapter does not fit: {PLANTED}")
        self.held = {k: v.clone() for k, v in adapter.items()}


@pytest.fixture
def agent(tmp_path):
    def make(config=CONFIG):
        beginning = {"a": torch.zeros(3)}
        exchange = Exchange("a", config, beginning, KnownStates(2))
        memory = Memory(tmp_path / "sites" / "a")
        return SiteAgent("a", config, Model(), beginning, exchange, memory, None, ("case",), ())

    return make


ONES = {"a": torch.ones(3)}


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(f"no file {PLANTED}"), "SAM-F299"),
        (DataError("SAM-D101", f"case {PLANTED}", f"look at {PLANTED}"), "SAM-D101"),
        (type("PatientSeven" + "Error", (Exception,), {})(PLANTED), "SAM-F299"),
    ],
)
def test_of_an_exception_only_its_code_leaves_the_site(ask, fake_site, caplog, kind, error, code):
    site = fake_site("a", CONFIG, instead={1: error})
    site.evaluate = site.train  # the courier treats both alike
    with caplog.at_level(logging.ERROR, "samaritan.site"):
        reply = ask(site, kind, None, fake_instruction())
    reason = reply.error.reason
    assert re.search(rf"{code} reference [0-9a-f]{{8}} in the site's log", reason)
    assert "secret" not in reason
    assert "patient" not in reason.lower()
    reference = re.search(r"reference ([0-9a-f]{8})", reason)[1]
    assert f"reference {reference}" in caplog.text
    assert PLANTED in caplog.text


def test_a_courier_without_an_agent_tells_nothing_of_why():
    def nobody(context):
        raise KeyError(PLANTED)

    grid = InProcessGrid(make_client_app(nobody), 1)
    message = Message(content(), message_type="query", dst_node_id=1000)
    (reply,) = grid.send_and_receive([message])
    assert reply.has_error()
    assert "secret" not in reply.error.reason


def test_the_update_travels_and_not_the_adapter(ask, fake_site):
    five = {name: value + 5 for name, value in fake_adapter().items()}
    reply = ask(fake_site("a", CONFIG, 0.25), "train", whole(five), instruction(five))
    shapes = {name: tuple(value.shape) for name, value in five.items()}
    update, header = decode(payload_of(reply), shapes)
    assert torch.equal(update["a"], torch.full((2, 3), 0.25))
    assert header == {"round": "1", "state": state_sha256(five)}
    assert set(reply.content.config_records) == set()


def test_the_roll_call_names_site_version_configuration_base_and_adapter(ask, agent):
    reply = ask(agent(), "query")
    assert dict(reply.content.config_records["config"]) == {
        "site": "a",
        "samaritan": __version__,
        "config-sha256": config_sha256(CONFIG),
        "base-sha256": "b" * 64,
        "adapter-sha256": state_sha256({"a": torch.zeros(3)}),
    }


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"config_sha256": "0" * 64}, "SAM-F201"),
        ({"base_sha256": "0" * 64}, "SAM-F201"),
        ({"rounds": 1000}, "SAM-F201"),
        ({"server_round": 0}, "SAM-F202"),
        ({"server_round": 4}, "SAM-F202"),
    ],
)
def test_an_instruction_that_was_not_agreed_to_is_refused(ask, agent, changes, code):
    made = agent()
    for task in (made.train, made.evaluate):
        with pytest.raises(FederationError) as caught:
            task(whole(ONES), instruction(ONES, **changes))
        assert caught.value.code == code
    assert made.model.held["a"].sum() == 0
    assert code in ask(made, "train", whole(ONES), instruction(ONES, **changes)).error.reason


BAD_PAYLOADS = {
    "other names": (lambda: whole({PLANTED: torch.ones(3)}), "SAM-F204"),
    "other shapes": (lambda: whole({"a": torch.ones(4)}), "SAM-F204"),
    "cut short": (lambda: whole(ONES)[:-1], "SAM-F204"),
    "nothing": (lambda: b"", "SAM-F204"),
    "another state": (lambda: whole({"a": torch.full((3,), 2.0)}), "SAM-F203"),
}


@pytest.mark.parametrize("case", BAD_PAYLOADS)
def test_a_payload_that_is_not_the_named_state_is_refused_before_training(ask, agent, case):
    make, code = BAD_PAYLOADS[case]
    made = agent()
    reason = ask(made, "train", make(), instruction(ONES)).error.reason
    assert code in reason
    assert "secret" not in reason
    assert made.model.held["a"].sum() == 0


def test_a_state_the_site_has_never_seen_is_asked_for_by_its_code(ask, agent):
    for payload, names in ((None, {}), (whole(ONES), {"reference_sha256": "f" * 64})):
        reply = ask(agent(), "train", payload, instruction(ONES, **names))
        assert "SAM-F203" in reply.error.reason


def test_an_instruction_with_fields_missing_is_an_error_and_no_crash(ask, agent):
    reply = ask(agent(), "train", whole(ONES), ConfigRecord({"server-round": 1}))
    assert "SAM-F299" in reply.error.reason


@pytest.fixture
def training(monkeypatch):
    """Training that adds 1, 2, 3 to the tensor of `Model`; what it was called with."""
    seen: dict[str, object] = {}

    def train(model, *arguments, **keys):
        seen.update(keys)
        model.held["a"] += torch.tensor([1.0, 2.0, 3.0])
        return SimpleNamespace(loss=0.5, steps=4, seconds=0.1, mean_gradient=None)

    monkeypatch.setattr("client.agent.train_locally", train)
    return seen


def test_the_agent_sends_trained_minus_received(agent, training):
    made, tens = agent(), {"a": torch.full((3,), 10.0)}
    payload, metrics = made.train(whole(tens), instruction(tens, timeout_s=1e9))
    update, _ = decode(payload, {"a": (3,)})
    assert update["a"].tolist() == [1.0, 2.0, 3.0]
    assert metrics["num-examples"] == 1
    assert metrics["steps"] == 4
    # The server cannot make a site train for longer than the site agreed to.
    assert training["timeout_s"] == CONFIG.federation.round_timeout_s
    first = training["seed"]
    made.train(None, instruction(tens, server_round=2))
    assert training["seed"] != first


def test_a_state_that_came_before_needs_no_payload_and_can_be_added_to(agent, training):
    made, tens = agent(), {"a": torch.full((3,), 10.0)}
    made.train(whole(tens), instruction(tens))
    made.train(None, instruction(tens))
    assert made.model.held["a"].tolist() == [11.0, 12.0, 13.0]
    elevens = {"a": torch.full((3,), 11.0)}
    change = whole({"a": torch.ones(3)})
    made.train(change, instruction(elevens, reference_sha256=state_sha256(tens)))
    assert made.model.held["a"].tolist() == [12.0, 13.0, 14.0]


def test_what_a_codec_leaves_out_is_sent_the_next_time(agent, training):
    config = parse_config({"rounds": 3, "wire": {"up": {"top_k": 0.3}}})
    made, sums = agent(config), torch.zeros(3)
    for number in (1, 2, 3):
        asked = instruction(
            config_sha256=config_sha256(config), server_round=number, used_round=number - 1
        )
        payload, _ = made.train(None, asked)
        update, _ = decode(payload, {"a": (3,)})
        assert update["a"].count_nonzero() == 1
        sums += update["a"]
    assert sums.tolist() == [0.0, 4.0, 9.0]  # of 3, 6 and 9: what was left of 2 came in round 2


def test_what_was_left_out_of_an_update_that_was_not_used_waits(agent, training):
    config = parse_config({"rounds": 3, "wire": {"up": {"top_k": 0.3}}})
    made, sha256, updates = agent(config), config_sha256(config), []
    for number, used in ((1, 0), (2, 1), (3, 1)):  # the update of round 2 does not arrive
        asked = instruction(config_sha256=sha256, server_round=number, used_round=used)
        updates.append(decode(made.train(None, asked)[0], {"a": (3,)})[0]["a"].tolist())
    assert updates == [[0.0, 0.0, 3.0], [0.0, 4.0, 0.0], [0.0, 4.0, 0.0]]


def test_a_round_asked_for_again_begins_from_the_same_notes(agent, training):
    config = parse_config({"rounds": 3, "wire": {"up": {"top_k": 0.3}}})
    made, sha256 = agent(config), config_sha256(config)
    made.train(None, instruction(config_sha256=sha256))
    second = [
        made.train(None, instruction(config_sha256=sha256, server_round=2, used_round=1))[0]
        for _ in range(2)
    ]
    assert second[0] == second[1]


def test_personal_tensors_stay_and_go_on(agent, training):
    config = parse_config({"rounds": 3, "personal": {"parts": ["decoder"]}})
    made, sha256 = agent(config), config_sha256(config)
    empty = replace(made, exchange=replace(made.exchange, beginning={}))
    for number in (1, 2):
        asked = instruction({}, config_sha256=sha256, server_round=number, used_round=number - 1)
        payload, _ = empty.train(None, asked)
        assert decode(payload, {})[0] == {}
    assert made.model.held["a"].tolist() == [2.0, 4.0, 6.0]


# What a site remembers.


def notes(value):
    return {"personal": {"a": torch.full((2,), float(value))}, "left_out": {"b": torch.ones(1)}}


def remember(memory, *rounds):
    """Notes of these rounds, each after the one before was used."""
    for used, number in zip((0, *rounds), rounds, strict=False):
        memory.remember(number, notes(number), used)


def recalled(memory, used):
    return memory.recall(used)["personal"]["a"].tolist()


def rounds_kept(memory):
    return sorted(int(path.stem[-5:]) for path in memory.folder.iterdir())


def test_notes_come_back_by_round(tmp_path):
    memory = Memory(tmp_path / "site")
    assert memory.recall(0) == {}
    remember(memory, 1, 2, 5, 6)
    assert recalled(memory, 6) == [6.0, 6.0]
    assert recalled(memory, 5) == [5.0, 5.0]
    assert recalled(memory, 4) == [2.0, 2.0]  # round 4 did not ask this site
    assert memory.recall(2)["left_out"]["b"].tolist() == [1.0]
    assert memory.recall(1) == {}
    assert rounds_kept(memory) == [2, 5, 6]  # the last, the one it follows, and one before


def test_a_round_the_server_lost_is_forgotten_when_it_is_done_again(tmp_path):
    memory = Memory(tmp_path)
    remember(memory, 3, 4, 5, 6)
    memory.remember(6, notes(60), used_round=4)
    assert recalled(memory, 6) == [60.0, 60.0]
    assert rounds_kept(memory) == [4, 6]


def test_notes_of_updates_that_were_not_used_lead_nowhere(tmp_path):
    memory = Memory(tmp_path)
    remember(memory, 1, 2)
    for number in (3, 4, 5):
        assert recalled(memory, 2) == [2.0, 2.0]
        memory.remember(number, notes(number), used_round=2)
        assert rounds_kept(memory) == [1, 2, number]


def test_all_notes_are_kept_where_a_former_round_may_be_chosen(tmp_path):
    memory = Memory(tmp_path, keep_all=True)
    remember(memory, 1, 2, 3, 4, 5)
    assert recalled(memory, 1) == [1.0, 1.0]


def test_damaged_notes_are_passed_over_and_said(tmp_path, caplog):
    memory = Memory(tmp_path)
    remember(memory, 1, 2)
    (tmp_path / "round_00002.safetensors").write_bytes(b"torn")
    with caplog.at_level(logging.WARNING, "samaritan.site"):
        assert recalled(memory, 2) == [1.0, 1.0]
    assert "damaged" in caplog.text
