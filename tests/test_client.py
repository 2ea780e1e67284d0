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
from samaritan import __version__
from samaritan.config import config_sha256, parse_config
from samaritan.errors import DataError, FederationError, ModelError
from samaritan.wire import Instruction, content, from_arrays, to_arrays
from simulation.grid import InProcessGrid

CONFIG = parse_config({"rounds": 3})
PLANTED = "/secret/patient_007"


def ask(agent, kind, arrays=None, instruction=None):
    """The one answer of a courier whose agent this is."""
    grid = InProcessGrid(make_client_app(lambda context: agent), 1)
    record = instruction.record() if isinstance(instruction, Instruction) else instruction
    message = Message(content(arrays, record), message_type=kind, dst_node_id=1000)
    (reply,) = grid.send_and_receive([message])
    return reply


def instruction(**changes):
    return replace(Instruction(1, 3, config_sha256(CONFIG), "b" * 64, 60.0), **changes)


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


def agent():
    return SiteAgent("a", CONFIG, Model(), None, ("case",), ())


ADAPTER = to_arrays({"a": torch.ones(3)})


@pytest.mark.parametrize("kind", ["train", "evaluate"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError(f"no file {PLANTED}"), "SAM-F299"),
        (DataError("SAM-D101", f"case {PLANTED}", f"look at {PLANTED}"), "SAM-D101"),
        (type("PatientSeven" + "Error", (Exception,), {})(PLANTED), "SAM-F299"),
    ],
)
def test_of_an_exception_only_its_code_leaves_the_site(fake_site, caplog, kind, error, code):
    site = fake_site("a", CONFIG, instead={1: error})
    site.evaluate = site.train
    with caplog.at_level(logging.ERROR, "samaritan.site"):
        reply = ask(site, kind, ADAPTER, instruction())
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


def test_the_update_travels_and_not_the_adapter(fake_site):
    reply = ask(fake_site("a", CONFIG, 0.25), "train", ADAPTER, instruction())
    update = from_arrays(reply.content.array_records["arrays"])
    assert torch.equal(update["a"], torch.full((3,), 0.25))
    assert set(reply.content.array_records) == {"arrays"}
    assert set(reply.content.config_records) == set()


def test_the_roll_call_names_site_version_configuration_and_base():
    reply = ask(agent(), "query")
    assert dict(reply.content.config_records["config"]) == {
        "site": "a",
        "samaritan": __version__,
        "config-sha256": config_sha256(CONFIG),
        "base-sha256": "b" * 64,
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
def test_an_instruction_that_was_not_agreed_to_is_refused(changes, code):
    made = agent()
    for task in (made.train, made.evaluate):
        with pytest.raises(FederationError) as caught:
            task({"a": torch.ones(3)}, instruction(**changes))
        assert caught.value.code == code
    assert made.model.held["a"].sum() == 0
    assert code in ask(made, "train", ADAPTER, instruction(**changes)).error.reason


def test_an_adapter_of_other_names_is_refused_before_training():
    reply = ask(agent(), "train", to_arrays({"b": torch.ones(3)}), instruction())
    assert "SAM-M302" in reply.error.reason
    assert "secret" not in reply.error.reason


def test_an_instruction_with_fields_missing_is_an_error_and_no_crash():
    reply = ask(agent(), "train", ADAPTER, ConfigRecord({"server-round": 1}))
    assert "SAM-F299" in reply.error.reason


def test_the_agent_sends_trained_minus_received(monkeypatch):
    made = agent()

    def train(model, *arguments, seed, timeout_s, **keys):
        seen.update(seed=seed, timeout_s=timeout_s)
        model.held["a"] += torch.tensor([1.0, 2.0, 3.0])
        return SimpleNamespace(loss=0.5, steps=4, seconds=0.1)

    seen: dict[str, float] = {}
    monkeypatch.setattr("client.agent.train_locally", train)
    update, metrics = made.train({"a": torch.full((3,), 10.0)}, instruction(timeout_s=1e9))
    assert update["a"].tolist() == [1.0, 2.0, 3.0]
    assert metrics["num-examples"] == 1
    assert metrics["steps"] == 4
    # The server cannot make a site train for longer than the site agreed to.
    assert seen["timeout_s"] == CONFIG.federation.round_timeout_s
    first = seen["seed"]
    made.train({"a": torch.zeros(3)}, instruction(server_round=2))
    assert seen["seed"] != first
