"""`samaritan run` against a SuperLink that is made up: resumed, given up, refused, told truly."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Context, RecordDict
from flwr.common.serde import user_config_to_proto
from flwr.proto.run_pb2 import Run, RunStatus

from samaritan import __version__
from samaritan.cli.server import _line
from samaritan.config import parse_config
from samaritan.errors import (
    DeploymentError,
    FederationError,
    ModelError,
    PrivacyError,
    SamaritanError,
    TrustError,
)
from samaritan.keys import Identity
from samaritan.plan import Plan, PlannedBase, PlannedSite, SignedPlan, read_plan, sign_plan
from samaritan.provision.kit import Card, Kit
from server import deployed, runner
from server.bundle import PLAN_KEY
from server.checkpoints import Checkpoint
from server.control import SILENT
from server.events import append_event
from server.home import FAILED, KIT_VARIABLE, plan_file, run_folder
from server.runner import run_plan
from server.settings import ServerSettings

HOUR = 3600.0
TODAY = datetime.now(UTC).date()


@dataclass
class Clock:
    """Time that passes when somebody sleeps."""

    now: float = 5000.0
    slept: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert len(self.slept) < 100_000, "nobody waits so long"
        self.slept.append(seconds)
        self.now += seconds


@dataclass(frozen=True)
class Attempt:
    """What a ServerApp does before it ends.

    Attributes:
        events: Written one at a time, one for each look at the run.
        status: How it ends.
        last_s: How long it lasts beyond its events.
    """

    events: list[dict[str, Any]]
    status: str = "failed"
    last_s: float = 0.0


def rounds(*numbers: int) -> list[dict[str, Any]]:
    return [{"event": "round_finished", "round": number} for number in numbers]


PAUSED = {"event": "run_paused", "code": "SAM-F101", "message": "1 sites are online, 3 needed"}
WHOLE = [*rounds(1, 2, 3), {"event": "run_finished"}, {"event": "summary_written"}]


class FakeLink:
    """A SuperLink with a script, and a Control for it.

    Args:
        clock: Everybody's.
        folder: Of the run.
        script: What each run that is started does.
    """

    def __init__(self, clock: Clock, folder: Path, script: list[Attempt]) -> None:
        self.clock, self.folder, self.script = clock, folder, script
        self.found: dict[int, Run] = {}
        self.left: dict[int, list[dict[str, Any]]] = {}
        self.ends: dict[int, float] = {}
        self.admitted: list[dict[str, str]] = []
        self.started: list[str] = []
        self.calls = 0
        self.silent_until = 0.0

    @contextlib.contextmanager
    def connect(self, kit: Kit, settings: ServerSettings) -> Iterator[FakeLink]:
        self.calls += 1
        if self.clock.now < self.silent_until:
            raise DeploymentError(SILENT, "the SuperLink does not answer", "")
        yield self

    def admit(self, node_keys: dict[str, str]) -> list[str]:
        self.admitted.append(node_keys)
        return ["a may connect"]

    def start(self, plan_sha256: str) -> int:
        self.started.append(plan_sha256)
        return self.begin(plan_sha256, self.script.pop(0))

    def begin(self, plan_sha256: str, attempt: Attempt) -> int:
        run_id = 100 + len(self.found)
        run = Run(run_id=run_id, status=RunStatus(status="running"))
        for key, value in user_config_to_proto({PLAN_KEY: plan_sha256}).items():
            run.override_config[key].CopyFrom(value)
        self.found[run_id] = run
        self.left[run_id] = [*attempt.events]
        self.ends[run_id] = self.clock.now + attempt.last_s
        run.status.details = attempt.status
        return run_id

    def unfinished(self) -> list[Run]:
        return [run for run in self.found.values() if run.status.status != "finished"]

    def run(self, run_id: int) -> Run:
        run, left = self.found[run_id], self.left[run_id]
        if left:
            event = dict(left.pop(0))
            self.folder.mkdir(parents=True, exist_ok=True)
            append_event(self.folder / "events.jsonl", event.pop("event"), **event)
        if not left and self.clock.now >= self.ends[run_id]:
            run.status.status, run.status.sub_status = "finished", run.status.details
        return run


@dataclass
class Trial:
    """One kit, one plan, one made-up SuperLink."""

    kit: Kit
    signed: SignedPlan
    clock: Clock
    link: FakeLink
    told: list[dict[str, Any]] = field(default_factory=list)

    def run(self, patience_s: float = 24 * HOUR) -> Path:
        return run_plan(self.kit, ServerSettings(), self.signed, patience_s, self.told.append)

    def error(self, patience_s: float = 24 * HOUR) -> SamaritanError:
        with pytest.raises(SamaritanError) as caught:
            self.run(patience_s)
        return caught.value

    @property
    def waits(self) -> list[float]:
        return [event["in_s"] for event in self.told if event["event"] == "run_resumes"]

    def kinds(self) -> list[str]:
        return [event["event"] for event in self.told]


def node_key() -> str:
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


SIGNER = Identity(Ed25519PrivateKey.generate())
SITES = {
    name: PlannedSite(identity=name * 64, node=node_key()) for name in ("a", "b", "c")
}  # fmt: skip
CONFIG = parse_config(
    {
        "rounds": 3,
        "model": {"image_size": 32},
        "peft": {"rank": 2},
        "data": {"source": "folder", "classes": {"liver": 1}},
        "federation": {"min_sites": 2},
    }
)


def plan_of(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "schema": 1,
        "study": "trial",
        "created": TODAY,
        "valid_until": TODAY + timedelta(days=9),
        "samaritan": __version__,
        "bundle_sha256": "b" * 64,
        "config": CONFIG,
        "base": PlannedBase(name="tiny", sha256="5" * 64),
        "sites": SITES,
    }
    return Plan(**(fields | changes))


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    folder = tmp_path / "server"
    folder.mkdir()
    card = Card(
        role="server", project="trial", name="server", host="localhost", port=9443,
        plan_signer=SIGNER.public.hex(), samaritan=__version__,
    )  # fmt: skip
    return Kit(folder, card)


@pytest.fixture
def trial(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Trial]:
    """A run of a plan: ``trial(attempt, attempt)``."""

    def make(*script: Attempt, **changes: Any) -> Trial:
        signed = sign_plan(plan_of(**changes), SIGNER)
        clock = Clock()
        link = FakeLink(clock, run_folder(kit, signed.plan), list(script))
        monkeypatch.setattr(runner, "time", clock)
        monkeypatch.setattr(runner, "connect", link.connect)
        return Trial(kit, signed, clock, link)

    return make


# Success.


def test_a_run_that_finishes_gives_its_folder(trial: Any) -> None:
    one = trial(Attempt(WHOLE, "completed"))
    assert one.run() == one.link.folder
    assert one.link.started == [one.signed.plan.sha256]
    assert one.link.admitted == [{name: site.node for name, site in SITES.items()}]
    assert one.kinds() == ["node_change", "run_watched", *(event["event"] for event in WHOLE)]
    # The ServerApp finds the plan where it looks for it.
    path = plan_file(one.kit, one.signed.plan.sha256)
    assert read_plan(path, SIGNER.public) == one.signed


def test_every_event_is_told_once_and_in_order(trial: Any) -> None:
    one = trial(Attempt(rounds(1)), Attempt([*rounds(2), PAUSED]), Attempt(WHOLE[2:], "completed"))
    one.run()
    told = [event["round"] for event in one.told if event["event"] == "round_finished"]
    assert told == [1, 2, 3]


def test_a_finished_run_is_not_run_again(trial: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial(Attempt(WHOLE, "completed"))
    one.run()
    calls = one.link.calls
    again = replace(one, told=[])
    assert again.run() == one.link.folder
    assert again.told == []
    assert one.link.calls == calls  # nobody was asked, nobody admitted
    # Nor when its time is over: there is nothing left to do.
    monkeypatch.setattr(runner, "require_current", lambda plan: pytest.fail("it has finished"))
    again.run()


def test_completed_without_a_summary_is_no_success(trial: Any) -> None:
    """Flower calls a ServerApp completed that returned early, whatever it wrote."""
    one = trial(
        Attempt([*rounds(1), {"event": "run_finished"}], "completed"),
        Attempt([], "completed"),
        Attempt(WHOLE[1:], "completed"),
    )
    assert one.run() == one.link.folder
    assert len(one.link.started) == 3


def test_a_summary_of_a_run_that_failed_is_no_success(trial: Any) -> None:
    one = trial(Attempt(WHOLE, "failed"), Attempt(WHOLE[-1:], "completed"))
    one.run()
    assert len(one.link.started) == 2


# Resumption.


def test_waits_grow_to_ten_minutes_and_begin_anew_after_a_round(trial: Any) -> None:
    one = trial(
        *[Attempt([PAUSED])] * 9,
        Attempt([*rounds(1), PAUSED]),
        *[Attempt([PAUSED])] * 2,
        Attempt(WHOLE[1:], "completed"),
    )
    one.run()
    growing = [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 600.0, 600.0, 600.0]
    assert one.waits == [*growing, 10.0, 20.0, 40.0]
    assert [seconds for seconds in one.clock.slept if seconds > 1.0] == one.waits
    after = {event["after"] for event in one.told if event["event"] == "run_resumes"}
    assert after == {"run_paused"}
    assert len(one.link.admitted) == 1


def test_a_process_that_dies_is_resumed(trial: Any) -> None:
    one = trial(Attempt([]), Attempt(rounds(1)), Attempt(WHOLE[1:], "completed"))
    one.run()
    resumed = [event["after"] for event in one.told if event["event"] == "run_resumes"]
    assert resumed == ["nothing", "round_finished"]
    assert one.waits == [10.0, 10.0]


def test_a_run_that_is_on_is_watched_and_not_started_twice(trial: Any) -> None:
    """As after the death of an earlier `samaritan run`."""
    one = trial()
    number = one.link.begin(one.signed.plan.sha256, Attempt(WHOLE, "completed"))
    one.run()
    assert one.link.started == []
    assert {"event": "run_watched", "run": number} in one.told


def test_patience_ends_with_what_the_run_said_last(trial: Any) -> None:
    one = trial(*[Attempt([PAUSED])] * 40)
    error = one.error(patience_s=2 * HOUR)
    assert error.code == "SAM-F111"
    assert "2 hours: 1 sites are online, 3 needed" in error.message
    assert 2 * HOUR < one.clock.now - 5000 < 2 * HOUR + 650
    assert isinstance(error, FederationError)


def test_patience_counts_from_the_last_round(trial: Any) -> None:
    slow = Attempt([*rounds(1)], last_s=0.9 * HOUR)
    one = trial(slow, Attempt(rounds(2), last_s=0.9 * HOUR), Attempt(WHOLE[2:], "completed"))
    one.run(patience_s=HOUR)
    assert one.clock.now - 5000 > 1.8 * HOUR


def test_without_patience_a_pause_ends_it(trial: Any) -> None:
    one = trial(Attempt([PAUSED], last_s=5))
    assert one.error(patience_s=0).code == "SAM-F111"
    assert one.waits == []


def test_a_process_without_a_word_is_told_so(trial: Any) -> None:
    one = trial(*[Attempt([])] * 20)
    assert "its process ended without a word" in one.error(patience_s=HOUR).message


# What waiting does not mend.


def test_a_failure_ends_it_at_once(trial: Any) -> None:
    failed = {"event": FAILED, "code": "SAM-P101", "message": "the budget is spent"}
    one = trial(Attempt([*rounds(1), failed]), Attempt(WHOLE, "completed"))
    error = one.error()
    assert error.code == "SAM-F112"
    assert "SAM-P101: the budget is spent" in error.message
    assert one.waits == []
    assert len(one.link.started) == 1


def test_a_failure_of_an_earlier_call_is_not_told_again(trial: Any) -> None:
    failed = {"event": FAILED, "code": "SAM-S104", "message": "another configuration"}
    one = trial(Attempt([failed]), Attempt([]), Attempt(WHOLE, "completed"))
    assert one.error().code == "SAM-F112"
    one.run()  # it was mended; the process that died once in between is another matter
    assert len(one.link.started) == 3


def test_a_run_that_was_stopped_is_not_resumed(trial: Any) -> None:
    one = trial(Attempt([*rounds(1, 2), PAUSED], "stopped"))
    error = one.error()
    assert error.code == "SAM-F113"
    assert "after 2 rounds" in error.message
    assert one.waits == []


def test_another_plan_that_is_on_is_left_alone(trial: Any) -> None:
    one = trial(Attempt(WHOLE, "completed"))
    number = one.link.begin("ee" * 32, Attempt([], last_s=HOUR))
    error = one.error()
    assert error.code == "SAM-N303"
    assert str(number) in error.message
    assert one.link.started == []
    assert one.link.admitted == []  # its sites keep their connection


def test_a_plan_that_is_over_is_not_begun(trial: Any) -> None:
    one = trial(Attempt(WHOLE, "completed"), valid_until=TODAY - timedelta(days=1))
    assert one.error().code == "SAM-K303"
    assert one.link.calls == 0


# A SuperLink that is silent.


@pytest.mark.parametrize("seconds", [1.0, 30.0, 59.0])
def test_a_superlink_that_is_started_anew_is_waited_for(trial: Any, seconds: float) -> None:
    one = trial(Attempt(WHOLE, "completed", last_s=200))
    one.link.silent_until = one.clock.now + seconds
    one.run()
    assert len(one.link.started) == 1
    (silent,) = [event for event in one.told if event["event"] == "link_silent"]
    assert _line(silent, 3) == "the SuperLink does not answer; trying for 60 s"  # once, at once


def test_a_superlink_may_be_silent_while_a_run_goes_on(trial: Any) -> None:
    one = trial(Attempt(WHOLE, "completed", last_s=200))

    def tell(event: dict[str, Any]) -> None:
        if event.get("round") in (1, 2):
            one.link.silent_until = one.clock.now + 50  # each time anew

    run_plan(one.kit, ServerSettings(), one.signed, HOUR, tell)
    assert len(one.link.started) == 1


def test_a_superlink_that_stays_silent_is_told_of(trial: Any) -> None:
    one = trial(Attempt(WHOLE, "completed"))
    one.link.silent_until = one.clock.now + 1e6
    assert one.error().code == "SAM-N301"
    assert 60 < one.clock.now - 5000 < 63


def test_a_superlink_that_refuses_is_not_asked_again(
    trial: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trial()

    def refuse(node_keys: dict[str, str]) -> list[str]:
        raise DeploymentError("SAM-N302", "the SuperLink refuses: 401", "")

    monkeypatch.setattr(one.link, "admit", refuse)
    assert one.error().code == "SAM-N302"
    assert one.clock.slept == []


def test_stopping_says_what_was_stopped(
    trial: Any, monkeypatch: pytest.MonkeyPatch, samaritan: Any
) -> None:
    one, stopped = trial(), list[int]()
    one.kit.folder.mkdir(exist_ok=True)
    one.kit.path("kit.yaml").write_text(yaml.safe_dump(one.kit.card.model_dump(mode="json")))
    one.kit.path("server.yaml").write_text("{}\n")
    monkeypatch.setattr(one.link, "stop", stopped.append, raising=False)
    monkeypatch.setattr("server.control.connect", one.link.connect)
    assert samaritan("server", "stop-run", one.kit.folder).out.startswith("no run is on; ")
    run_id = one.link.begin("a" * 64, Attempt([], "completed"))
    assert samaritan("server", "stop-run", one.kit.folder).out == f"run {run_id} is stopped\n"
    assert stopped == [run_id]


def test_what_is_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = runner._Events(path)
    assert list(events.new()) == []
    path.write_bytes(b'{"event": "round_finished"}\n{"event": "roun')
    assert [event["event"] for event in events.new()] == ["round_finished"]
    assert list(events.new()) == []
    with path.open("ab") as file:
        file.write(b'd_finished"}\n')
    assert [event["event"] for event in events.new()] == ["round_finished"]
    assert events.rounds == 2


# The ServerApp that Flower starts.


@dataclass
class App:
    """The ServerApp in this process, with rounds that are made up."""

    kit: Kit
    monkeypatch: pytest.MonkeyPatch

    def run(self, plan: Plan, signer: Identity = SIGNER) -> None:
        from samaritan.plan import write_plan

        write_plan(plan_file(self.kit, plan.sha256), sign_plan(plan, signer))
        context = Context(
            run_id=1, node_id=1, node_config={}, state=RecordDict(),
            run_config={PLAN_KEY: plan.sha256},
        )  # fmt: skip
        deployed.main(None, context)  # type: ignore[arg-type]

    def rounds(self, outcome: Callable[[Any], Checkpoint]) -> None:
        self.monkeypatch.setattr(
            deployed, "run_rounds", lambda grid, federation: outcome(federation)
        )

    def events(self, plan: Plan) -> list[dict[str, Any]]:
        lines = (run_folder(self.kit, plan) / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture
def app(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> App:
    (kit.folder / "kit.yaml").write_text(json.dumps(kit.card.model_dump(mode="json")))
    (kit.folder / "server.yaml").write_text("{}")
    monkeypatch.setenv(KIT_VARIABLE, str(kit.folder))
    return App(kit, monkeypatch)


@pytest.fixture(scope="module")
def tiny_sha256() -> str:
    from samaritan.models.adapter import build_adapted

    return build_adapted(CONFIG, 1).base.sha256


def test_rounds_are_given_what_the_plan_says_and_the_outcome_is_written_last(
    app: App, tiny_sha256: str
) -> None:
    plan = plan_of(base=PlannedBase(name="tiny", sha256=tiny_sha256))
    given = []

    def outcome(federation: Any) -> Checkpoint:
        given.append(federation)
        told = {"train_loss": 0.5, "dice": 0.75, "num_examples": 4, "steps": 2, "status": "ok"}
        told |= {"bytes_up": 10, "bytes_down": 20, "update_norm": 1.0, "seconds": 1.0}
        history = [
            {
                "round": number, "seconds": 1.5, "dice_mean": number / 4, "oracle_prompts": "none",
                "aggregation_error": None, "aggregation_seconds": 0.1,
                "sites": {"a": told, "b": told | dict.fromkeys(["dice", "num_examples", "steps"])},
            }
            for number in (1, 2)
        ]  # fmt: skip
        return Checkpoint(1, federation.initial, history, plan.config_sha256)

    app.rounds(outcome)
    app.run(plan)
    (federation,) = given
    assert federation.sites == ("a", "b", "c")
    assert federation.plan_sha256 == plan.sha256
    assert {name: key.hex() for name, key in federation.signers.items()} == {
        name: site.identity for name, site in SITES.items()
    }
    assert set(federation.node_keys) == set(SITES)
    assert federation.base_sha256 == tiny_sha256
    folder = run_folder(app.kit, plan)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [event["event"] for event in app.events(plan)] == ["summary_written"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["plan_sha256"] == plan.sha256
    assert summary["engine"] == "deployment"
    assert summary["adapter_of_round"] == 1
    # Of the round whose adapter was kept, not of the last.
    assert summary["final"]["dice_mean"] == 0.25
    assert summary["final"]["dice_per_site"] == {"a": 0.75}
    assert summary["cost"]["bytes_up"] == 40
    assert summary["cost"]["steps"] == 4
    assert summary["sites"]["a"]["train_cases"] == 4
    assert summary["sites"]["b"]["train_cases"] is None
    assert (folder / "report.html").is_file()
    assert (folder / "adapter").is_dir()


def test_a_pause_is_not_a_failure(app: App, tiny_sha256: str) -> None:
    plan = plan_of(base=PlannedBase(name="tiny", sha256=tiny_sha256))

    def paused(federation: Any) -> Checkpoint:
        federation.note("run_paused", code="SAM-F101", message="nobody is here")
        raise FederationError("SAM-F101", "nobody is here")

    app.rounds(paused)
    with pytest.raises(FederationError):
        app.run(plan)
    assert [event["event"] for event in app.events(plan)] == ["run_paused"]


def test_what_waiting_does_not_mend_is_written_down(app: App, tiny_sha256: str) -> None:
    plan = plan_of(base=PlannedBase(name="tiny", sha256=tiny_sha256))

    def broken(federation: Any) -> Checkpoint:
        raise PrivacyError("SAM-P101", "the budget is spent")

    app.rounds(broken)
    with pytest.raises(PrivacyError):
        app.run(plan)
    (event,) = app.events(plan)
    assert (event["event"], event["code"]) == (FAILED, "SAM-P101")


def test_a_plan_that_is_over_fails_and_says_so(app: App, tiny_sha256: str) -> None:
    base = PlannedBase(name="tiny", sha256=tiny_sha256)
    plan = plan_of(base=base, valid_until=TODAY - timedelta(days=1))
    with pytest.raises(TrustError):
        app.run(plan)
    (event,) = app.events(plan)
    assert (event["event"], event["code"]) == (FAILED, "SAM-K303")


def test_another_base_fails_and_says_so(app: App) -> None:
    plan = plan_of()
    with pytest.raises(FederationError):
        app.run(plan)
    (event,) = app.events(plan)
    assert (event["event"], event["code"]) == (FAILED, "SAM-F110")


def test_a_base_without_its_file_fails_and_says_so(app: App) -> None:
    config = parse_config(CONFIG.model_dump(mode="json") | {"model": {"base": "vit_b"}})
    plan = plan_of(config=config, base=PlannedBase(name="vit_b", sha256="5" * 64))
    with pytest.raises(ModelError):
        app.run(plan)
    assert [event["event"] for event in app.events(plan)] == [FAILED]


def test_a_plan_of_another_signer_is_not_run(app: App, tiny_sha256: str) -> None:
    plan = plan_of(base=PlannedBase(name="tiny", sha256=tiny_sha256))
    app.rounds(lambda federation: pytest.fail("it ran"))
    with pytest.raises(TrustError) as caught:
        app.run(plan, Identity(Ed25519PrivateKey.generate()))
    assert caught.value.code == "SAM-K302"
    assert not run_folder(app.kit, plan).exists()
