"""The Grid of a deployment, who is who by key and by seal, and what the server writes down."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo

from client.app import make_client_app
from samaritan.audit.log import Log, entries
from samaritan.config import config_sha256, parse_config
from samaritan.errors import AuditError, FederationError
from samaritan.keys import Identity
from samaritan.messages import Answer, Request, sealed
from samaritan.wire import answer_content, content
from server import grid as grid_module
from server import rounds
from server.federation import Federation
from server.grid import DeployedGrid
from server.ingress import Ingress
from server.nodes import key_of, online
from server.rollcall import Caller, RollCall
from server.rounds import run_rounds
from simulation.grid import InProcessGrid, partition_id

InProcessGrid(ClientApp(), 0)  # sets who this process is; Flower makes no Message before

PLAN, OTHER_PLAN = "aa" * 32, "bb" * 32


# The Grid.


@dataclass
class Clock:
    """Time that passes when somebody sleeps."""

    now: float = 1000.0
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert len(self.slept) < 10000, "nobody waits so long"
        self.slept.append(seconds)
        self.now += seconds


@dataclass
class FakeHttpGrid:
    """As Flower's Grid on the network: answers are there after a while, to those who ask for them.

    Attributes:
        clock: Decides what is there.
        after_s: When the answer of a node is there; a node without never answers.
        restarted_s: When a node is started anew.
        unknown: Nodes for which Flower takes no message.
        refuse: What else comes with every look.
    """

    clock: Clock
    after_s: dict[int, float]
    restarted_s: dict[int, float] = field(default_factory=dict)
    unknown: set[int] = field(default_factory=set)
    stray: Callable[[list[str]], list[Message]] | None = None
    answer: Callable[[Message], Message] | None = None
    nodes: set[int] = field(default_factory=set)
    sent: dict[str, tuple[float, Message]] = field(default_factory=dict)
    looks: list[list[str]] = field(default_factory=list)

    def get_nodes(self) -> list[NodeInfo]:
        born = {
            node: "anew" if self.clock.now >= self.restarted_s.get(node, 1e9) else "first"
            for node in sorted(self.nodes)
        }
        return [NodeInfo(node_id=node, last_activated_at=when) for node, when in born.items()]

    def push_messages(self, messages: Any) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message_id = f"to-{node}"
            message.metadata.__dict__.update(_message_id=message_id, _run_id=1, _src_node_id=1)
            self.sent[message_id] = (self.clock.now, message)
            ids.append("" if node in self.unknown else message_id)
        return ids

    def pull_messages(self, message_ids: Any) -> list[Message]:
        asked = list(message_ids)
        self.looks.append(asked)
        found = []
        for message_id in asked:
            when, message = self.sent[message_id]
            node = message.metadata.dst_node_id
            if self.clock.now >= when + self.after_s.get(node, 1e9):
                make = self.answer or (lambda m: Message(RecordDict(), reply_to=m))
                found.append(make(message))
        return found + (self.stray(asked) if self.stray else [])


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(grid_module, "time", found)
    return found


def asked_of(*nodes: int) -> list[Message]:
    return [Message(content(), message_type="query", dst_node_id=node) for node in nodes]


def flower(clock: Clock, after_s: dict[int, float], **more: Any) -> FakeHttpGrid:
    return FakeHttpGrid(clock, after_s, nodes={1, 2, 3, 4, 5, *after_s}, **more)


def sources(replies: Any) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


def test_answers_come_in_the_order_of_the_messages_whoever_is_first(clock: Clock) -> None:
    times = {11: 3.0, 12: 1.0, 13: 0.0, 14: 2.0}
    for order in itertools.permutations(times):
        grid = DeployedGrid(flower(clock, times))
        assert sources(grid.send_and_receive(asked_of(*order))) == list(order)


def test_an_answer_is_handed_out_as_soon_as_the_order_allows(clock: Clock) -> None:
    grid = DeployedGrid(flower(clock, {11: 1.0, 12: 50.0}))
    replies = grid.send_and_receive(asked_of(11, 12))
    begun = clock.now
    assert next(replies).metadata.src_node_id == 11
    assert clock.now - begun < 2
    assert next(replies).metadata.src_node_id == 12
    assert 50 <= clock.now - begun < 51


def test_nobody_waits_after_the_last_answer(clock: Clock) -> None:
    fake = flower(clock, {11: 0.0, 12: 0.0})
    assert sources(DeployedGrid(fake).send_and_receive(asked_of(11, 12))) == [11, 12]
    assert clock.slept == []
    assert len(fake.looks) == 1
    assert list(DeployedGrid(flower(clock, {})).send_and_receive([])) == []
    assert clock.slept == []


def test_flower_is_asked_for_what_is_missing_only(clock: Clock) -> None:
    fake = flower(clock, {11: 1.0, 12: 0.0})
    list(DeployedGrid(fake).send_and_receive(asked_of(11, 12)))
    assert fake.looks[0] == ["to-11", "to-12"]
    assert all(look == ["to-11"] for look in fake.looks[1:])
    assert 3 < len(fake.looks) < 8  # four times a second


def test_after_the_time_out_there_is_what_has_come(clock: Clock) -> None:
    grid = DeployedGrid(flower(clock, {11: 99.0, 12: 1.0, 13: 99.0, 14: 4.0}))
    begun = clock.now
    assert sources(grid.send_and_receive(asked_of(11, 12, 13, 14), timeout=10)) == [12, 14]
    assert 10 <= clock.now - begun < 11


def test_who_takes_long_over_one_answer_still_gets_the_others(clock: Clock) -> None:
    replies = DeployedGrid(flower(clock, {11: 0.0, 12: 1.0})).send_and_receive(
        asked_of(11, 12), timeout=5
    )
    next(replies)
    clock.now += 100  # the server combines what it has
    assert sources(replies) == [12]


def test_with_no_time_out_there_is_none(clock: Clock) -> None:
    grid = DeployedGrid(flower(clock, {11: 2000.0}))
    assert sources(grid.send_and_receive(asked_of(11))) == [11]


def test_a_node_that_was_started_anew_gives_one_error_and_nothing_after_it(clock: Clock) -> None:
    fake = flower(clock, {11: 30.0, 12: 40.0, 13: 1.0}, restarted_s={11: clock.now + 7})
    replies = list(DeployedGrid(fake).send_and_receive(asked_of(11, 12, 13)))
    assert sources(replies) == [11, 12, 13]
    assert [reply.has_error() for reply in replies] == [True, False, False]
    assert (replies[0].error.code, replies[0].metadata.reply_to_message_id) == (5, "to-11")
    assert clock.now < 1045
    # Soon after the restart, and no later: the old answer is not waited for.
    last = max(number for number, look in enumerate(fake.looks) if "to-11" in look)
    assert last * 0.25 < 7 + 5 + 1


def test_a_node_that_is_offline_for_a_moment_is_waited_for(clock: Clock) -> None:
    fake = flower(clock, {11: 30.0})
    look = fake.get_nodes

    def gone_for_a_while() -> list[NodeInfo]:
        there = look()
        return [n for n in there if n.node_id != 11] if 1005 < clock.now < 1020 else there

    fake.get_nodes = gone_for_a_while  # type: ignore[method-assign]
    (reply,) = DeployedGrid(fake).send_and_receive(asked_of(11))
    assert not reply.has_error()


def test_an_error_of_flower_counts_for_the_node_that_was_asked(clock: Clock) -> None:
    def unavailable(message: Message) -> Message:
        if message.metadata.dst_node_id == 11:
            reply = Message(Error(5, "Node unavailable: 10.2.3.4"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # as the SuperLink says of itself
            return reply
        return Message(RecordDict(), reply_to=message)

    fake = flower(clock, {11: 0.0, 12: 0.0}, answer=unavailable)
    one, two = DeployedGrid(fake).send_and_receive(asked_of(11, 12))
    assert (one.metadata.src_node_id, one.error.code) == (11, 5)
    assert one.metadata.reply_to_message_id == "to-11"
    assert "10.2.3.4" not in (one.error.reason or "")
    assert two.metadata.src_node_id == 12
    assert not two.has_error()


def test_an_error_of_the_node_itself_stays_as_it_is(clock: Clock) -> None:
    fake = flower(clock, {11: 0.0}, answer=lambda m: Message(Error(2, "SAM-P101"), reply_to=m))
    (reply,) = DeployedGrid(fake).send_and_receive(asked_of(11))
    assert (reply.error.code, reply.error.reason) == (2, "SAM-P101")


def test_answers_to_what_was_not_asked_are_ignored(clock: Clock) -> None:
    (other,) = asked_of(99)
    other.metadata.__dict__.update(_message_id="to-99", _run_id=1, _src_node_id=1)

    def stray(waiting: list[str]) -> list[Message]:
        return [Message(RecordDict(), reply_to=other)]

    grid = DeployedGrid(flower(clock, {11: 1.0, 12: 0.0}, stray=stray))
    assert sources(grid.send_and_receive(asked_of(11, 12))) == [11, 12]


def test_the_same_answer_twice_is_one(clock: Clock) -> None:
    fake = flower(clock, {11: 0.0, 12: 1.0})

    def stray(waiting: list[str]) -> list[Message]:
        return [Message(RecordDict(), reply_to=fake.sent["to-11"][1])]

    fake.stray = stray
    assert sources(DeployedGrid(fake).send_and_receive(asked_of(11, 12))) == [11, 12]


@pytest.mark.parametrize("unknown", [{11}, {12}, {11, 12}, {11, 12, 13}], ids=str)
def test_a_message_that_flower_does_not_take_is_an_error_at_once(
    clock: Clock, unknown: set[int]
) -> None:
    """It has no name then; two of them are not one, and nobody is asked for them."""
    fake = flower(clock, {11: 0.5, 12: 0.5, 13: 0.5}, unknown=unknown)
    replies = list(DeployedGrid(fake).send_and_receive(asked_of(11, 12, 13), timeout=60))
    assert sources(replies) == [11, 12, 13]
    assert {r.metadata.src_node_id for r in replies if r.has_error()} == unknown
    assert all("" not in look for look in fake.looks)
    assert clock.now < 1002


def test_the_rest_is_flowers_own(clock: Clock) -> None:
    fake = flower(clock, {})
    grid = DeployedGrid(fake)
    assert grid.get_nodes() == fake.get_nodes()
    with pytest.raises(NotImplementedError):
        grid.create_message()


# Nodes and keys.


def node_key() -> tuple[str, bytes]:
    """A node's public key as a plan and as Flower write it."""
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    ssh = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    return ssh, public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


NODE_KEYS = {name: node_key() for name in ("a", "b", "c", "stranger")}
EXPECTED_KEYS = {name: key_of(NODE_KEYS[name][0]) for name in ("a", "b", "c")}
IDENTITIES = {name: Identity(Ed25519PrivateKey.generate()) for name in NODE_KEYS}
SIGNERS = {name: IDENTITIES[name].public for name in ("a", "b", "c")}


class NodesGrid(InProcessGrid):
    """An in-process Grid whose nodes have keys, and may be there or not.

    Args:
        app: Answers every message.
        keys: Of each node, as Flower has them; the first node is 1000.
    """

    def __init__(self, app: ClientApp, keys: list[bytes]) -> None:
        super().__init__(app, len(keys))
        self.keys = dict(zip(self._contexts, keys, strict=True))
        self.away: set[int] = set()
        self.asked: list[int] = []

    def get_node_ids(self) -> Any:
        return [node for node in self._contexts if node not in self.away]

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=node, public_key=self.keys[node]) for node in self.get_node_ids()]

    def _answer(self, message: Message) -> Message:
        self.asked.append(message.metadata.dst_node_id)
        return super()._answer(message)


def keys_of(*names: str) -> list[bytes]:
    return [NODE_KEYS[name][1] for name in names]


def test_a_node_is_the_site_that_has_its_key() -> None:
    grid = NodesGrid(ClientApp(), keys_of("b", "stranger", "a"))
    assert online(grid, EXPECTED_KEYS) == {1000: "b", 1002: "a"}
    grid.away = {1000}
    assert online(grid, EXPECTED_KEYS) == {1002: "a"}


def test_a_node_without_a_readable_key_is_nobody() -> None:
    grid = NodesGrid(ClientApp(), [b"", b"not a key", NODE_KEYS["a"][0].encode()])
    assert online(grid, EXPECTED_KEYS) == {}


def test_in_a_simulation_a_node_may_be_any_site() -> None:
    assert online(InProcessGrid(ClientApp(), 2), {}) == {1000: None, 1001: None}
    assert online(NodesGrid(ClientApp(), keys_of("a")), {}) == {1000: None}


def test_where_keys_are_due_a_grid_that_knows_none_is_no_way_around_them() -> None:
    assert online(InProcessGrid(ClientApp(), 2), EXPECTED_KEYS) == {}


# Sealed answers.

Tamper = Callable[[Request, str, Answer], Answer]


@dataclass
class Sealing:
    """A site that signs what it says.

    Attributes:
        name: That it signs with.
        site: What is asked.
        tamper: What is done to an answer, if anything.
    """

    name: str
    site: Any
    tamper: Tamper | None = None

    def answer(self, request: Request) -> Answer:
        answer = self.site.answer(request)
        if self.tamper is not None:
            return self.tamper(request, self.name, answer)
        return seal(request, self.name, answer)


def seal(request: Request, name: str, answer: Answer, by: str = "") -> Answer:
    return replace(answer, seal=IDENTITIES[by or name].sign(sealed(request, name, answer)))


def no_seal(request: Request, name: str, answer: Answer) -> Answer:
    return answer


def of_another_site(request: Request, name: str, answer: Answer) -> Answer:
    return seal(request, name, answer, by="b")


def as_another_site(request: Request, name: str, answer: Answer) -> Answer:
    return seal(request, "b", answer, by=name)


def of_another_question(request: Request, name: str, answer: Answer) -> Answer:
    return seal(replace(request, message_id=request.message_id + "0"), name, answer)


def of_another_kind(request: Request, name: str, answer: Answer) -> Answer:
    kind = "evaluate" if request.kind == "train" else "train"
    return seal(replace(request, kind=kind), name, answer)


def of_another_plan(request: Request, name: str, answer: Answer) -> Answer:
    return seal(replace(request, plan_sha256=OTHER_PLAN), name, answer)


def of_another_answer(request: Request, name: str, answer: Answer) -> Answer:
    return seal(request, name, replace(answer, texts={**answer.texts, "x": "y"})).__class__(
        answer.payload, answer.numbers, answer.texts, answer.step,
        seal(request, name, replace(answer, texts={**answer.texts, "x": "y"})).seal,
    )  # fmt: skip


def half_a_seal(request: Request, name: str, answer: Answer) -> Answer:
    return replace(answer, seal=seal(request, name, answer).seal[:32])


TAMPERS: list[Tamper] = [
    no_seal, of_another_site, as_another_site, of_another_question, of_another_kind,
    of_another_plan, of_another_answer, half_a_seal,
]  # fmt: skip


def config_of(**keys: Any) -> Any:
    federation = {"wait_s": 0.3, "retries": 0, "min_sites": 1} | keys.pop("federation", {})
    return parse_config(
        {"rounds": 2, "data": {"source": "phantoms"}, "federation": federation} | keys
    )


@pytest.fixture
def deploy(fake_site: Any, fake_federation: Any) -> Callable[..., Any]:
    """A federation of sealing sites by name: ``deploy(config, {"a": tamper})``."""

    def make(
        config: Any,
        tampers: dict[str, Tamper | None],
        names: dict[str, str] | None = None,
        keys: list[bytes] | None = None,
        **more: Any,
    ) -> tuple[NodesGrid, Federation]:
        federation: Federation = fake_federation(
            config, more.pop("sites", [name for name in tampers if name in SIGNERS]),
            plan_sha256=PLAN, signers=SIGNERS, node_keys=EXPECTED_KEYS, **more,
        )  # fmt: skip
        hello = {"plan-sha256": PLAN}
        sites = [
            Sealing(
                (names or {}).get(name, name),
                fake_site((names or {}).get(name, name), config, hello=hello),
                tamper,
            )
            for name, tamper in tampers.items()
        ]
        for sealing in sites:
            sealing.site.begin(federation.initial)
        app = make_client_app(lambda context: sites[partition_id(context)])
        return NodesGrid(app, keys or keys_of(*tampers)), federation

    return make


def logged(federation: Federation, *kinds: str) -> list[dict[str, Any]]:
    found = [entry for entry, _ in entries(federation.log.read_bytes())]
    return [entry for entry in found if entry["type"] in kinds]


def noted(federation: Federation, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in federation.events.read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def caller(federation: Federation, grid: Any) -> Caller:
    ingress = Ingress(Log(federation.log, {"server": federation.config.name}), federation.signers)
    return rounds._caller(grid, federation, ingress)


def test_a_federation_of_sealing_sites_runs_and_every_answer_is_in_the_log(deploy: Any) -> None:
    grid, federation = deploy(config_of(), {"a": None, "b": None, "c": None})
    assert run_rounds(grid, federation).server_round == 2
    lines = logged(federation, "ingress", "forged", "error", "unreadable")
    kinds = [(line["type"], line["kind"], line["site"]) for line in lines]
    expected = [("ingress", "hello", site) for site in "abc"]
    for _ in range(2):
        expected += [("ingress", kind, site) for kind in ("train", "evaluate") for site in "abc"]
    assert kinds == expected
    assert {line["plan"] for line in lines} == {PLAN}
    assert [line["round"] for line in lines] == [0] * 3 + [1] * 6 + [2] * 6
    assert len({line["message"] for line in lines}) == len(lines)
    assert all(len(bytes.fromhex(line["seal"])) == 64 for line in lines)
    assert all(line["bytes"] > 0 for line in lines)


@pytest.mark.parametrize("tamper", TAMPERS, ids=lambda tamper: tamper.__name__)
def test_at_the_roll_call_a_site_whose_answer_is_not_sealed_by_it_is_refused(
    deploy: Any, tamper: Tamper
) -> None:
    grid, federation = deploy(config_of(), {"a": tamper, "b": None})
    roll = caller(federation, grid).call(1, 0.3)
    assert roll == RollCall({1001: "b"}, ["site a: the answer is not sealed by this site"])
    (line,) = logged(federation, "forged")
    assert (line["site"], line["kind"], line["plan"]) == ("a", "hello", PLAN)
    assert [line["site"] for line in logged(federation, "ingress")] == ["b"]


def test_at_the_roll_call_a_site_that_fails_is_named_with_its_code(
    deploy: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """That an agent does not allow the plan is the first thing a coordinator must read."""

    def fails(request: Request, name: str, answer: Answer) -> Answer:
        raise AuditError("SAM-A201", "patient_007", "")

    grid, federation = deploy(config_of(), {"a": fails, "b": None})
    roll = caller(federation, grid).call(1, 0.3)
    assert roll == RollCall({1001: "b"}, ["site a: failed: SAM-A201"])
    (line,) = logged(federation, "error")
    assert (line["site"], line["kind"], line["status"]) == ("a", "hello", "failed: SAM-A201")
    assert f"reference {line['reference']}" in caplog.text  # where the site has the whole of it
    assert len(line["reference"]) == 8


def in_round(kind: str, tamper: Tamper) -> Tamper:
    """Tampers with answers of one kind alone."""

    def some(request: Request, name: str, answer: Answer) -> Answer:
        return (tamper if request.kind == kind else seal)(request, name, answer)

    return some


@pytest.mark.parametrize("tamper", TAMPERS, ids=lambda tamper: tamper.__name__)
def test_a_round_goes_on_without_an_update_that_is_not_sealed(deploy: Any, tamper: Tamper) -> None:
    config = config_of(rounds=1, federation={"retries": 1, "retry_wait_s": 0})
    grid, federation = deploy(config, {"a": in_round("train", tamper), "b": None, "c": None})
    entry = run_rounds(grid, federation).history[0]
    assert entry["sites"]["a"]["status"] == "refused: the answer is not sealed by this site"
    assert [entry["sites"][site]["status"] for site in "bc"] == ["ok", "ok"]
    (line,) = logged(federation, "forged")
    assert (line["site"], line["kind"], line["round"]) == ("a", "train", 1)
    assert [event["site"] for event in noted(federation, "reply_forged")] == ["a"]
    assert noted(federation, "round_retried") == []


def test_what_somebody_else_says_changes_nothing_in_the_adapter(
    deploy: Any, fake_site: Any
) -> None:
    def huge(request: Request, name: str, answer: Answer) -> Answer:
        numbers = {**answer.numbers, "num-examples": 1000}
        return replace(answer, numbers=numbers)

    results = []
    for folder, tampers in (
        ("with", {"a": in_round("train", huge), "b": None, "c": None}),
        ("without", {"b": None, "c": None}),
    ):
        grid, federation = deploy(config_of(rounds=1), tampers, folder=folder)
        results.append(run_rounds(grid, federation).adapter)
    assert all((results[0][name] == results[1][name]).all() for name in results[0])


def test_a_score_that_is_not_sealed_does_not_count(deploy: Any) -> None:
    config = config_of(rounds=1)
    grid, federation = deploy(config, {"a": in_round("evaluate", no_seal), "b": None})
    entry = run_rounds(grid, federation).history[0]
    assert entry["sites"]["a"]["dice"] is None
    assert entry["sites"]["b"]["dice"] is not None
    assert entry["sites"]["a"]["num_examples"] == 1  # its update was sealed


def test_a_site_is_told_which_of_its_answers_came_last(deploy: Any) -> None:
    """Only what was admitted counts, after a new start of the server too."""
    told: dict[str, list[tuple[str, str]]] = {"a": [], "b": []}
    came: dict[str, list[str]] = {"a": [], "b": []}

    def listen(request: Request, name: str, answer: Answer) -> Answer:
        told[name].append((request.kind, request.known_answer))
        spoiled = name == "b" and request.kind == "train"
        if not spoiled:
            came[name].append(answer.sha256)
        return answer if spoiled else seal(request, name, answer)

    grid, federation = deploy(config_of(rounds=1), {"a": listen, "b": listen})
    run_rounds(grid, federation)
    for name, kinds in (("a", ["hello", "train", "evaluate"]), ("b", ["hello", "evaluate"])):
        asked = [pair for pair in told[name] if pair[0] in kinds]
        assert asked == list(zip(kinds, ["", *came[name][:-1]], strict=True))
    last = {name: answers[-1] for name, answers in came.items()}
    roll = caller(federation, grid).call(2, 0.3)
    assert set(roll.present.values()) == {"a", "b"}
    assert {name: pairs[-1] for name, pairs in told.items()} == {
        name: ("hello", sha256) for name, sha256 in last.items()
    }


def test_a_replayed_answer_is_not_admitted_a_second_time(deploy: Any) -> None:
    kept: list[Answer] = []

    def replay(request: Request, name: str, answer: Answer) -> Answer:
        if request.kind != "train":
            return seal(request, name, answer)
        kept.append(seal(request, name, answer))
        return kept[0]

    grid, federation = deploy(config_of(), {"a": replay, "b": None})
    history = run_rounds(grid, federation).history
    assert history[0]["sites"]["a"]["status"] == "ok"
    assert history[1]["sites"]["a"]["status"].startswith("refused: the answer is not sealed")


def test_an_unreadable_answer_is_written_down_and_not_admitted(
    deploy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, federation = deploy(config_of(rounds=1), {"a": None, "b": None})
    answer = grid._answer

    def broken(message: Message) -> Message:
        if message.metadata.dst_node_id == 1000 and message.metadata.message_type == "train":
            records = RecordDict({"seal": ConfigRecord({"signature": "no bytes"})})
            return Message(records, reply_to=message)
        return answer(message)

    monkeypatch.setattr(grid, "_answer", broken)
    entry = run_rounds(grid, federation).history[0]
    assert entry["sites"]["a"]["status"].startswith("refused: the answer is not sealed")
    (line,) = logged(federation, "unreadable")
    assert (line["site"], line["reason"]) == ("a", "TypeError")


@pytest.mark.parametrize("code", [3, 4])
@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_message_that_was_lost_on_the_way_is_asked_again(
    deploy: Any, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    """Flower tells of it minutes later; the site is well."""
    config = config_of(rounds=1, federation={"retries": 1, "retry_wait_s": 0, "min_sites": 2})
    grid, federation = deploy(config, {"a": None, "b": None})
    answer, lost = grid._answer, []

    def once(message: Message) -> Message:
        asked = (message.metadata.dst_node_id, message.metadata.message_type)
        if asked == (1000, kind) and not lost:
            lost.append(message)
            return Message(Error(code, ""), reply_to=message)
        return answer(message)

    monkeypatch.setattr(grid, "_answer", once)
    entry = run_rounds(grid, federation).history[0]
    assert lost
    assert [entry["sites"][site]["status"] for site in "ab"] == ["ok", "ok"]
    assert entry["sites"]["a"]["dice"] is not None


def test_an_error_needs_no_seal_and_its_text_is_not_kept(deploy: Any) -> None:
    def fails(request: Request, name: str, answer: Answer) -> Answer:
        raise ValueError("patient_007")

    grid, federation = deploy(config_of(rounds=1), {"a": in_round("train", fails), "b": None})
    entry = run_rounds(grid, federation).history[0]
    assert entry["sites"]["a"]["status"].startswith("failed")
    (line,) = logged(federation, "error")
    assert (line["site"], line["kind"]) == ("a", "train")
    assert b"patient_007" not in federation.log.read_bytes() + federation.events.read_bytes()


def test_without_signers_nothing_is_asked_of_a_seal(tmp_path: Path) -> None:
    ingress = Ingress(Log(tmp_path / "log", {}))
    (question,) = asked_of(11)
    question.metadata.__dict__.update(_message_id="m", _run_id=1, _src_node_id=1)
    for answer in (Answer(texts={"site": "a"}), Answer(texts={"site": "a"}, seal=b"nonsense")):
        reply = Message(answer_content(answer), reply_to=question)
        assert ingress.admits("a", Request("hello"), reply)
    broken = Message(RecordDict({"seal": ConfigRecord({"signature": 1})}), reply_to=question)
    assert ingress.admits("a", Request("hello"), broken)
    found = [entry["type"] for entry, _ in entries((tmp_path / "log").read_bytes())]
    assert found == ["genesis", "ingress", "ingress", "unreadable"]


def test_the_log_is_written_before_an_answer_is_used(
    deploy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from samaritan.errors import AuditError

    grid, federation = deploy(config_of(), {"a": None, "b": None})
    append = Log.append

    def full(log: Log, kind: str, /, **fields: Any) -> str:
        if kind == "ingress" and fields["kind"] == "train":
            raise AuditError("SAM-A102", "the disk is full", "")
        return append(log, kind, **fields)

    monkeypatch.setattr(Log, "append", full)
    with pytest.raises(AuditError):
        run_rounds(grid, federation)
    assert noted(federation, "round_finished") == []


# The roll call.


def test_a_node_with_the_key_of_one_site_cannot_be_another(deploy: Any) -> None:
    """The server says whose key it was: that site is to be asked what happened."""
    grid, federation = deploy(config_of(), {"b": None}, names={"b": "a"}, sites=["a", "b"])
    roll = caller(federation, grid).ask({}, 1)
    assert roll == RollCall({}, ["node 1000: its key is that of site b"])
    assert logged(federation, "ingress", "forged") == []


def test_a_site_of_which_the_plan_knows_nothing_is_refused(deploy: Any) -> None:
    grid, federation = deploy(config_of(), {"a": no_seal}, names={"a": "zzz"}, sites=["a", "b"])
    expected = RollCall({}, ["node 1000: not an approved site"])
    assert caller(federation, grid).ask({}, 1) == expected
    # Nor where nodes have no keys and answers no seals.
    simulated = replace(federation, node_keys={}, signers={})
    assert caller(simulated, grid).ask({}, 1) == expected


def test_a_node_whose_key_no_site_has_is_asked_nothing(deploy: Any) -> None:
    tampers = {"stranger": None, "a": None}
    grid, federation = deploy(config_of(), tampers, names={"stranger": "b"}, sites=["a", "b"])
    roll = caller(federation, grid).call(1, 0.3)
    assert roll == RollCall({1001: "a"}, [])
    assert set(grid.asked) == {1001}
    run_rounds(grid, federation)
    assert set(grid.asked) == {1001}


def test_an_answer_of_a_node_that_was_not_asked_is_ignored(deploy: Any) -> None:
    grid, federation = deploy(config_of(), {"a": None, "b": None})
    grid.away = {1001}
    send = grid.send_and_receive

    def with_another(messages: Any, *, timeout: float | None = None) -> Iterator[Message]:
        for reply in send(messages, timeout=timeout):
            yield reply
            reply.metadata.__dict__["_src_node_id"] = 4711
            yield reply

    grid.send_and_receive = with_another
    assert caller(federation, grid).ask({}, 1) == RollCall({1000: "a"}, [])


def test_a_site_of_another_plan_or_version_is_refused_and_named(deploy: Any) -> None:
    grid, federation = deploy(config_of(), {"a": None, "b": None})
    federation = replace(federation, plan_sha256=OTHER_PLAN)
    roll = caller(federation, grid).ask({}, 1)
    assert roll.present == {}
    assert [text.split(":")[0] for text in roll.refused] == ["site a", "site b"]
    assert "plan-sha256 aaaaaaaaaaaaaaaa not bbbbbbbbbbbbbbbb" in roll.refused[0]


def test_who_is_here_in_whole_is_not_waited_for(
    deploy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("server.rollcall.time", clock)
    grid, federation = deploy(config_of(), {"a": no_seal, "b": None})
    assert caller(federation, grid).call(1, 500.0).present == {1001: "b"}
    with pytest.raises(FederationError, match="1 of 2 sites are ready and all have answered, 2"):
        caller(federation, grid).call(2, 500.0)
    assert clock.slept == []  # one is wrong, and will be as wrong later
    grid, federation = deploy(config_of(), {"a": None, "b": None}, folder="second")
    grid.away = {1000}
    assert caller(federation, grid).call(1, 5.0).present == {1001: "b"}
    assert 5 <= sum(clock.slept) < 6  # one is missing, and may come
    with pytest.raises(FederationError, match=r"1 of 2 sites are ready after 5 s, 2 needed") as e:
        caller(federation, grid).call(2, 5.0)
    assert e.value.code == "SAM-F103"


def test_who_is_known_is_not_asked_again_while_others_are_waited_for(
    deploy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.rollcall.time", Clock())
    grid, federation = deploy(config_of(), {"a": None, "b": None})
    grid.away = {1000}
    caller(federation, grid).call(1, 5.0)
    assert grid.asked == [1001]


def test_a_site_that_comes_later_is_greeted_before_the_next_round(deploy: Any) -> None:
    grid, federation = deploy(config_of(rounds=3), {"a": None, "b": None, "c": None})
    grid.away = {1002}

    def arrive(told: dict[str, Any]) -> None:
        grid.away = set()

    state = run_rounds(grid, replace(federation, on_round=arrive))
    assert [sorted(entry["sites"]) for entry in state.history] == [
        ["a", "b"], ["a", "b", "c"], ["a", "b", "c"]
    ]  # fmt: skip
    calls = [event["present"] for event in noted(federation, "roll_call")]
    assert calls == [["a", "b"], ["c"]]
    assert all(entry["sites"]["c"]["status"] == "ok" for entry in state.history[1:])


def test_a_late_comer_that_is_wrong_is_told_of_and_left_out(deploy: Any) -> None:
    grid, federation = deploy(config_of(), {"a": None, "b": None, "c": no_seal})
    grid.away = {1002}

    def arrive(told: dict[str, Any]) -> None:
        grid.away = set()

    state = run_rounds(grid, replace(federation, on_round=arrive))
    assert [sorted(entry["sites"]) for entry in state.history] == [["a", "b"], ["a", "b"]]
    assert noted(federation, "roll_call")[1]["refused"] == [
        "site c: the answer is not sealed by this site"
    ]


def test_in_a_simulation_nobody_is_greeted_twice(fake_site: Any, fake_federation: Any) -> None:
    config = config_of()
    federation = fake_federation(config, ["a", "b"])
    sites = [fake_site(name, config) for name in ("a", "b")]
    grid = NodesGrid(make_client_app(lambda context: sites[partition_id(context)]), [b"", b""])
    run_rounds(grid, federation)
    assert len(noted(federation, "roll_call")) == 1
    assert logged(federation, "forged") == []
    assert config_sha256(config)
