"""Sites that fail, hang, lie or come too late, and rounds that are retried, undone or ended early.

Fake sites, real Flower messages; `test_kill.py` kills a real run.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from client.app import make_client_app
from client.memory import Memory
from samaritan.codecs import encode
from samaritan.config import CodecConfig, parse_config
from samaritan.errors import DataError, FederationError, StorageError
from server.checkpoints import latest_checkpoint
from server.judgement import draw_sites, quarantined
from server.rounds import run_rounds
from simulation.deadline import DeadlineError, deadline
from simulation.engines import run_in_process
from simulation.grid import InProcessGrid, partition_id

SITES = ["a", "b", "c", "d", "e"]


def config_of(rounds=3, federation=None, **keys):
    quick = {"wait_s": 0.3, "retries": 0, "retry_wait_s": 0.01, "quarantine_rounds": 0}
    tree = {"rounds": rounds, "federation": quick | (federation or {})}
    return parse_config(tree | {"data": {"source": "phantoms", "sites": 5}} | keys)


def events(federation, *kinds):
    lines = [json.loads(line) for line in federation.events.read_text().splitlines()]
    return [line for line in lines if not kinds or line["event"] in kinds]


def statuses(state, site):
    return [entry["sites"].get(site, {}).get("status") for entry in state.history]


def level(state):
    """The value of the adapter; fake sites move all its numbers alike."""
    return state.adapter["a"].mean().item()


def numbers(update, header, change):
    """A payload of an update with its numbers changed in place, as `encode` would not write it."""
    data = bytearray(encode(update, CodecConfig(), header=header, seed=0))
    flat = torch.cat([update[name].flatten() for name in sorted(update)])
    change(flat)
    data[-4 * len(flat) :] = flat.numpy().tobytes()
    return bytes(data)


@pytest.fixture
def run(fake_site, fake_federation):
    """Runs five sites of which "c" may misbehave: ``run(config, site_c)``."""

    def go(config, bad, folder="run", **more):
        sites = [fake_site(name, config) for name in SITES if name != "c"]
        sites.insert(2, bad)
        federation = fake_federation(config, SITES, folder, **more)
        return federation, run_in_process(federation, sites)

    return go


# One site does wrong in round 2, and the run goes on without it.


def raises(adapter):
    raise RuntimeError("no space on /secret/patient_007")


def hangs(adapter):
    time.sleep(60)


def no_examples(adapter):
    return {n: torch.ones_like(v) for n, v in adapter.items()}, {
        "num-examples": 0, "train-loss": 0.1
    }  # fmt: skip


def other_rank(adapter):
    return {"a": torch.ones(1, 3), "b": torch.ones(4)}, {"num-examples": 1, "train-loss": 0.1}


def missing(adapter):
    return {"a": torch.ones(2, 3)}, {"num-examples": 1, "train-loss": 0.1}


def huge(adapter):
    update = {n: torch.full_like(v, 1e30) for n, v in adapter.items()}
    return update, {"num-examples": 1, "train-loss": 0.1}


WRONG = {
    "raises": (raises, "failed: SAM-F299", "site_failed"),
    "hangs": (hangs, "late: no answer in ", "site_late"),
    "no examples": (no_examples, "refused: num-examples is 0", "reply_refused"),
    "another rank": (other_rank, "refused: the message is about tensors of", "reply_refused"),
    "missing tensor": (missing, "refused: the message is about tensors of", "reply_refused"),
    "1e30": (huge, "refused: a moves by 1e+30", "reply_refused"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_site_is_left_out_for_a_round_with_an_event(run, fake_site, fault):
    what, status, kind = WRONG[fault]
    config = config_of(federation={"round_timeout_s": 0.2 if fault == "hangs" else 60})
    bad = fake_site("c", config, 7.0, instead={2: what})
    federation, state = run(config, bad)
    assert statuses(state, "c")[1].startswith(status)
    assert statuses(state, "c")[::2] == ["ok", "ok"]
    assert level(state) == pytest.approx(11 / 5 + 1 + 11 / 5, rel=1e-5)
    (event,) = events(federation, kind)
    assert (event["round"], event["site"]) == (2, "c")
    assert "secret" not in federation.events.read_text()


def test_a_site_that_sends_nan_is_refused_and_rests(run, fake_site):
    class Poisoned(fake_site):
        def train(self, payload, instruction):
            data, metrics = super().train(payload, instruction)
            if instruction.server_round != 2:
                return data, metrics
            update = {"a": torch.ones(2, 3), "b": torch.ones(4)}
            header = {"round": "2", "state": instruction.state_sha256}
            return numbers(update, header, lambda flat: flat[3].fill_(float("nan"))), metrics

    config = config_of(5, {"quarantine_rounds": 2})
    bad = Poisoned("c", config, 7.0)
    federation, state = run(config, bad)
    assert statuses(state, "c") == ["ok", "refused: a is not finite", None, None, "ok"]
    assert bad.asked == [1, 2, 5]
    resting = [e["resting"] for e in events(federation, "round_started")]
    assert resting == [[], [], ["c"], ["c"], []]


def test_a_resting_site_is_asked_where_the_others_are_too_few(fake_site, fake_federation):
    config = config_of(3, {"quarantine_rounds": 9, "min_sites": 4})
    sites = [fake_site(name, config) for name in SITES]
    sites[1].instead, sites[2].instead = {2: huge}, {1: huge}
    federation = fake_federation(config, SITES)
    run_in_process(federation, sites)
    assert [(e["round"], e["sites"]) for e in events(federation, "sites_recalled")] == [(2, ["c"])]
    assert sites[1].asked == [1, 2]
    assert sites[2].asked == [1, 2, 3]  # recalled in round 2, and right again since


class Replaying:
    """Answers with the message of an earlier round, in its own envelope or in a new one."""

    def __init__(self, site, renewed):
        self.site, self.renewed, self.sent = site, renewed, {}

    def __getattr__(self, name):
        return getattr(self.site, name)

    def answer(self, request):
        return type(self.site).answer(self, request)

    def train(self, payload, instruction):
        update, metrics = self.site.learn(
            self.site.exchange.receive(payload, instruction), instruction
        )
        number = instruction.server_round
        if number == 2:
            update = self.sent["update"]
        self.sent.setdefault("update", update)
        data, _ = self.site.exchange.send(update, {}, instruction)
        if number == 2 and not self.renewed:
            data = self.sent["data"]
        self.sent.setdefault("data", data)
        return data, metrics


def test_last_rounds_message_again_is_late_and_not_counted(run, fake_site):
    config = config_of()
    federation, state = run(config, Replaying(fake_site("c", config, 7.0), renewed=False))
    assert statuses(state, "c")[1].startswith("late: no answer")
    assert [e["status"] for e in events(federation, "late_reply")] == [
        "late: an update of another round"
    ]
    assert level(state) == pytest.approx(11 / 5 + 1 + 11 / 5, rel=1e-5)


def test_last_rounds_update_under_a_new_header_is_refused(run, fake_site):
    config = config_of()
    _, state = run(config, Replaying(fake_site("c", config, 7.0), renewed=True))
    assert statuses(state, "c")[1] == "refused: the site's former update again"
    assert level(state) == pytest.approx(11 / 5 + 1 + 11 / 5, rel=1e-5)


@pytest.mark.parametrize("defence", ["median", "trimmed-mean", "krum", "multi-krum", "clipping"])
def test_an_update_scaled_by_1000_is_held_and_can_be_seen(run, fake_site, defence):
    keys = {"strategy": defence} if defence != "clipping" else {}
    config = config_of(federation={"clip_norm": None if keys else "median"}, **keys)
    _, state = run(config, fake_site("c", config, 1000.0))
    assert level(state) == pytest.approx(3.0, rel=1e-4)
    assert set(statuses(state, "c")) == {"ok"}
    norms = {site: entry["update_norm"] for site, entry in state.history[0]["sites"].items()}
    assert norms["c"] == pytest.approx(1000 * norms["a"], rel=1e-3)


def test_without_a_defence_the_same_update_moves_the_adapter_far(run, fake_site):
    config = config_of()
    _, state = run(config, fake_site("c", config, 1000.0))
    assert level(state) > 100


# All sites, retries, pauses.


def test_when_every_site_fails_the_run_pauses_and_goes_on_later(fake_site, fake_federation):
    config = config_of(federation={"retries": 1})
    federation = fake_federation(config, SITES)
    dead = [fake_site(n, config, instead={2: DataError("SAM-D102", "x")}) for n in SITES]
    with pytest.raises(FederationError) as caught:
        run_in_process(federation, dead)
    assert caught.value.code == "SAM-F102"
    assert "round 2: 0 usable answers, 3 needed (a failed: SAM-D102; b" in caught.value.message
    assert "resume" in caught.value.hint
    (paused,) = events(federation, "run_paused")
    assert (paused["code"], paused["rounds_done"]) == ("SAM-F102", 1)
    assert dead[0].asked == [1, 2, 2]
    assert latest_checkpoint(federation.checkpoints).server_round == 1
    sites = [fake_site(name, config) for name in SITES]
    straight = fake_federation(config, SITES, "straight")
    resumed = run_in_process(federation, sites)
    unbroken = run_in_process(straight, [fake_site(n, config) for n in SITES])
    assert sites[0].asked == [2, 3]
    assert all(torch.equal(resumed.adapter[n], unbroken.adapter[n]) for n in "ab")


def failing(times):
    """Fails so often, then answers as ever."""
    left = [times]

    def answer(adapter):
        if left[0]:
            left[0] -= 1
            raise OSError("the line is down")
        return {n: torch.full_like(v, 1.5) for n, v in adapter.items()}, {
            "num-examples": 1, "train-loss": 0.1
        }  # fmt: skip

    return answer


def test_a_round_without_a_quorum_asks_the_missing_sites_again(fake_site, fake_federation):
    config = config_of(federation={"retries": 2, "min_sites": 5, "retry_wait_s": 0.05})
    sites = [fake_site(name, config, 1.5) for name in SITES]
    sites[1].instead = {2: failing(2)}
    sites[3].instead = {2: failing(1)}
    federation = fake_federation(config, SITES)
    state = run_in_process(federation, sites)
    assert level(state) == pytest.approx(4.5)
    assert sites[0].asked == [1, 2, 3]
    assert sites[1].asked == [1, 2, 2, 2, 3]
    assert sites[3].asked == [1, 2, 2, 3]
    retried = events(federation, "round_retried")
    assert [(e["attempt"], e["sites"], e["wait_s"]) for e in retried] == [
        (1, ["b", "d"], 0.05), (2, ["b"], 0.1)
    ]  # fmt: skip


def test_with_a_quorum_nobody_is_asked_twice(run, fake_site):
    config = config_of(federation={"retries": 5})
    bad = fake_site("c", config, instead={2: failing(1)})
    federation, _ = run(config, bad)
    assert bad.asked == [1, 2, 3]
    assert not events(federation, "round_retried")


def test_a_wrong_answer_is_not_asked_for_again(fake_site, fake_federation):
    config = config_of(federation={"retries": 5, "min_sites": 5})
    sites = [fake_site(name, config) for name in SITES]
    sites[2].instead = {2: huge}
    with pytest.raises(FederationError, match="c refused: a moves by"):
        run_in_process(fake_federation(config, SITES), sites)
    assert sites[2].asked == [1, 2]


def test_a_rule_that_needs_five_sites_pauses_with_four(run, fake_site):
    config = config_of(strategy="krum")
    with pytest.raises(FederationError, match="round 2: 4 usable answers, 5 needed"):
        run(config, fake_site("c", config, instead={2: raises}))


# Which sites are asked.


def test_sites_are_drawn_anew_each_round_and_alike_after_a_stop():
    names = [f"site_{n:03d}" for n in range(100)]
    draws = [draw_sites(names, 10, 0, number) for number in range(1, 31)]
    assert all(len(set(draw)) == 10 for draw in draws)
    assert draws[0] != draws[1]
    assert draws == [draw_sites(list(reversed(names)), 10, 0, n) for n in range(1, 31)]
    assert len(set().union(*draws)) > 85
    assert draw_sites(names, 10, 1, 1) != draws[0]
    assert draw_sites(names[:4], 10, 0, 1) == names[:4]


def test_a_hundred_sites_cost_what_the_ten_that_are_asked_cost(
    fake_site, fake_federation, monkeypatch
):
    asked = []
    answer = InProcessGrid._answer

    def spy(grid, message):
        asked.append((message.metadata.message_type, message.metadata.dst_node_id))
        return answer(grid, message)

    monkeypatch.setattr(InProcessGrid, "_answer", spy)
    names = [f"site_{n:03d}" for n in range(100)]
    keys = {"data": {"source": "phantoms", "sites": 100}}
    config = config_of(4, {"sites_per_round": 10}, **keys)
    federation = fake_federation(config, names)
    state = run_in_process(federation, [fake_site(name, config) for name in names])
    kinds = [kind for kind, _ in asked]
    assert (kinds.count("query"), kinds.count("train"), kinds.count("evaluate")) == (100, 40, 40)
    assert level(state) == pytest.approx(4.0, rel=1e-5)
    assert all(len(entry["sites"]) == 10 for entry in state.history)


# What goes down.


def test_sites_are_sent_what_changed_and_hold_what_the_server_believes(fake_site, fake_federation):
    down = {"wire": {"down": {"numbers": "int8"}}}
    config = config_of(4, **down)
    sites = [fake_site(name, config, 0.37) for name in SITES]
    state = run_in_process(fake_federation(config, SITES), sites)
    held = list(sites[0].exchange.known.states.values())[-1]
    assert all(torch.equal(held[n], state.slots["sent/None"][n]) for n in "ab")
    # What one message left out is in the next: the distance does not grow.
    assert all(torch.allclose(held[n], state.adapter[n], atol=0.01) for n in "ab")
    assert not torch.equal(held["a"], state.adapter["a"])


def test_a_site_that_has_lost_its_state_is_sent_the_whole_in_the_same_round(
    fake_site, fake_federation
):
    config = config_of(4, wire={"down": {"numbers": "int8"}})

    class Forgetful(fake_site):
        def train(self, payload, instruction):
            if instruction.server_round == 3:
                self.exchange.known.states.clear()
            return super().train(payload, instruction)

    sites = [fake_site(name, config) for name in SITES]
    sites[2] = Forgetful("c", config)
    state = run_in_process(fake_federation(config, SITES), sites)
    # Cleared twice: the second time after the whole state had been asked for, which it then keeps.
    assert statuses(state, "c") == ["ok"] * 4


def test_a_state_the_site_holds_is_not_sent_again(fake_site, fake_federation):
    config = config_of(2)
    state = run_in_process(fake_federation(config, ["a"]), [fake_site("a", config)])
    first, second = (entry["sites"]["a"]["bytes_down"] for entry in state.history)
    config = config_of(2, evaluation={"every_rounds": 9})
    folder = fake_federation(config, ["a"], "unscored")
    unscored = run_in_process(folder, [fake_site("a", config)]).history
    # Round 1 starts from what the site has, and round 2 from what it was scored on after round 1.
    assert unscored[0]["sites"]["a"]["bytes_down"] < first
    assert abs(first - second) < 40


@pytest.mark.parametrize(
    "keys",
    [
        {"wire": {"up": {"top_k": 0.3, "numbers": "int4"}, "down": {"numbers": "int4"}}},
        {"server_optimiser": {"name": "adam", "learning_rate": 0.1}},
        {"strategy": "trimmed-mean", "server_optimiser": {"name": "momentum"}},
        {"selection": {"keep": "best", "rollback_drop": 0.001}},
    ],
)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_stopped_run_goes_on_alike_whatever_the_server_remembers(
    fake_site, fake_federation, keys, after
):
    class Stop(Exception):
        pass

    def stop(entry):
        if entry["round"] == after:
            raise Stop

    config = config_of(4, **keys)

    class Varied(fake_site):
        def learn(self, adapter, instruction):
            update, metrics = super().learn(adapter, instruction)
            seed = 100 * instruction.server_round + SITES.index(self.site)
            noise = torch.Generator().manual_seed(seed)
            return {
                n: v + torch.randn(v.shape, generator=noise) for n, v in update.items()
            }, metrics

    def sites():
        made = [Varied(name, config, 0.1 * (1 + i)) for i, name in enumerate(SITES)]
        made[0].instead = {3: falls}
        return made

    straight = run_in_process(fake_federation(config, SITES, "straight"), sites())
    with pytest.raises(Stop):
        run_in_process(fake_federation(config, SITES, "stopped", on_round=stop), sites())
    resumed = run_in_process(fake_federation(config, SITES, "stopped"), sites())
    assert all(torch.equal(straight.adapter[n], resumed.adapter[n]) for n in "ab")
    assert straight.slots.keys() == resumed.slots.keys()
    for name, slot in straight.slots.items():
        assert all(torch.equal(slot[n], resumed.slots[name][n]) for n in slot)


def falls(adapter):
    return {n: torch.full_like(v, -2.0) for n, v in adapter.items()}, {
        "num-examples": 1, "train-loss": 0.1
    }  # fmt: skip


# Which round is kept. The Dice of fake sites is the value of the adapter in hundredths.


def alone(fake_site, fake_federation, steps, **keys):
    config = config_of(len(steps), **keys)

    def step(by):
        return lambda adapter: (
            {n: torch.full_like(v, by) for n, v in adapter.items()},
            {"num-examples": 1, "train-loss": 0.1},
        )

    site = fake_site("a", config, instead={n: step(by) for n, by in enumerate(steps, 1)})
    federation = fake_federation(config, ["a"])
    return federation, run_in_process(federation, [site]), site


def test_the_best_round_is_chosen_and_the_history_kept(fake_site, fake_federation):
    federation, state, _ = alone(
        fake_site, fake_federation, [10, 20, -5, -6], selection={"keep": "best"}
    )
    assert (state.server_round, level(state)) == (2, 30.0)
    assert len(state.history) == 4
    assert events(federation, "run_finished")[0]["adapter_of_round"] == 2


def test_the_last_round_is_kept_by_default(fake_site, fake_federation):
    _, state, _ = alone(fake_site, fake_federation, [10, 20, -5, -6])
    assert (state.server_round, level(state)) == (4, 19.0)


def test_a_plateau_ends_the_run(fake_site, fake_federation):
    federation, state, site = alone(
        fake_site, fake_federation, [10, 20, -5, 1, 2, 40], selection={"patience": 2}
    )
    assert site.asked == [1, 2, 3, 4]
    assert state.server_round == 4
    (event,) = events(federation, "stopped_early")
    assert (event["round"], event["best"]) == (4, [2, 0.3])
    again = run_rounds(InProcessGrid(make_client_app(lambda context: site), 1), federation)
    assert site.asked == [1, 2, 3, 4]
    assert level(again) == level(state)


def test_a_fall_is_undone(fake_site, fake_federation):
    federation, state, _ = alone(
        fake_site, fake_federation, [30, -25, 7], selection={"rollback_drop": 0.2}
    )
    assert level(state) == 37.0
    (event,) = events(federation, "rolled_back")
    assert (event["round"], event["to_round"]) == (2, 1)
    assert state.history[1]["rolled_back_to"] == 1
    assert [entry["dice_mean"] for entry in state.history] == pytest.approx([0.3, 0.05, 0.37])


def test_a_smaller_fall_is_not(fake_site, fake_federation):
    federation, state, _ = alone(
        fake_site, fake_federation, [30, -15, 7], selection={"rollback_drop": 0.2}
    )
    assert level(state) == 22.0
    assert not events(federation, "rolled_back")


def test_weights_may_be_constants(fake_site, fake_federation):
    config = config_of(1, {"weighting": {"a": 3.0, "b": 1.0}})
    sites = [fake_site("a", config, 2.0, examples=1), fake_site("b", config, 10.0, examples=99)]
    state = run_in_process(fake_federation(config, ["a", "b"]), sites)
    assert level(state) == pytest.approx(4.0)
    assert replace(state, history=[]).adapter.keys() == {"a", "b"}


def test_an_adapter_that_is_no_longer_finite_pauses_the_run_at_the_round_before(
    fake_site, fake_federation
):
    config = config_of(3, server_optimiser={"name": "momentum", "learning_rate": 1e38})
    federation = fake_federation(config, ["a"])
    with pytest.raises(FederationError) as caught:
        run_in_process(federation, [fake_site("a", config, 100.0)])
    assert caught.value.code == "SAM-F106"
    assert events(federation, "run_paused")[0]["rounds_done"] == 0


# Fewer sites than there were.


def test_a_resting_site_is_asked_where_the_others_are_away(fake_site, fake_federation):
    config = config_of(3, {"quarantine_rounds": 9})
    sites = [fake_site(name, config) for name in SITES]
    sites[0].instead = {1: huge}
    grid = InProcessGrid(make_client_app(lambda c: sites[partition_id(c)]), 5)

    def two_leave(entry):
        for node in (1003, 1004):
            grid._contexts.pop(node, None)

    federation = fake_federation(config, SITES, on_round=two_leave)
    run_rounds(grid, federation)
    assert sites[0].asked == [1, 2, 3]
    assert sites[3].asked == [1]


def test_all_sites_in_quarantine_are_asked_all_the_same(fake_site, fake_federation):
    config = config_of(2, {"quarantine_rounds": 9})
    sites = [fake_site(name, config) for name in SITES]
    for site in sites:
        site.evaluate = lambda payload, instruction: {"dice": 7.0, "num-cases": 2}
    federation = fake_federation(config, SITES)
    state = run_in_process(federation, sites)
    assert all(statuses(state, name) == ["refused: dice is 7"] * 2 for name in SITES)
    assert all(quarantined(state.history, name, 9) for name in SITES)
    assert level(state) == pytest.approx(2.0)
    assert [e["resting"] for e in events(federation, "round_started")] == [[], []]


def test_a_recalled_site_without_the_state_is_sent_the_whole(fake_site, fake_federation):
    down = {"wire": {"down": {"numbers": "int8"}}}
    config = config_of(2, {"quarantine_rounds": 9, "min_sites": 4}, **down)

    class Restarted(fake_site):
        forgot = False

        def train(self, payload, instruction):
            if instruction.server_round == 2 and not self.forgot:
                self.forgot = True
                self.exchange.known.states.clear()
            return super().train(payload, instruction)

    sites = [fake_site(name, config) for name in SITES]
    sites[1].instead = {2: raises}
    sites[2] = Restarted("c", config, instead={1: huge})
    state = run_in_process(fake_federation(config, SITES), sites)
    assert sites[2].forgot
    assert statuses(state, "c") == ["refused: a moves by 1e+30", "ok"]


def test_a_recalled_site_that_fails_is_asked_again_with_the_others(fake_site, fake_federation):
    config = config_of(2, {"quarantine_rounds": 9, "min_sites": 4, "retries": 1})
    sites = [fake_site(name, config) for name in SITES]
    sites[1].instead = {2: raises}
    sites[2].instead = {1: huge, 2: failing(1)}
    federation = fake_federation(config, SITES)
    run_in_process(federation, sites)
    assert sites[2].asked == [1, 2, 2]
    assert [e["sites"] for e in events(federation, "round_retried")] == [["b", "c"]]


def test_an_observer_that_fails_or_hangs_stops_nobody(fake_site, fake_federation):
    config = config_of(2, {"round_timeout_s": 0.2})
    sites = [fake_site(name, config) for name in ("a", "b", "seen", "broken", "stuck")]
    sites[3].evaluate = lambda payload, instruction: raises(None)
    sites[4].evaluate = lambda payload, instruction: hangs(None)
    federation = fake_federation(config, ["a", "b"], observers=["seen", "broken", "stuck"])
    state = run_in_process(federation, sites)
    assert level(state) == pytest.approx(2.0)
    assert [site.asked for site in sites] == [[1, 2], [1, 2], [], [], []]
    assert statuses(state, "seen") == ["ok", "ok"]
    assert statuses(state, "broken") == ["failed: SAM-F299"] * 2
    assert all(status.startswith("late: no answer") for status in statuses(state, "stuck"))
    assert state.history[1]["sites"]["seen"]["dice"] == pytest.approx(0.02)
    assert state.history[1]["sites"]["stuck"]["dice"] is None
    assert state.history[1]["dice_mean"] == pytest.approx(0.02)


def test_a_site_that_hangs_in_the_roll_call_is_left_out(fake_site, fake_federation):
    config = config_of(1)
    sites = [fake_site(name, config) for name in SITES]
    sites[1].hello = lambda: hangs(None)
    federation = fake_federation(config, SITES)
    begun = time.monotonic()
    state = run_in_process(federation, sites)
    assert time.monotonic() - begun < 20
    assert statuses(state, "b") == [None]
    assert events(federation, "roll_call")[0]["present"] == ["a", "c", "d", "e"]


def test_a_score_that_is_refused_counts_for_nothing_and_rests_the_site(fake_site, fake_federation):
    config = config_of(2, {"quarantine_rounds": 1})
    sites = [fake_site(name, config) for name in SITES]
    sites[4].evaluate = lambda payload, instruction: {"dice": 7.0, "num-cases": 2}
    state = run_in_process(fake_federation(config, SITES), sites)
    assert statuses(state, "e") == ["refused: dice is 7", None]
    assert state.history[0]["dice_mean"] == pytest.approx(0.01)


def test_answers_that_come_twice_or_from_a_stranger_count_for_nothing(fake_site, fake_federation):
    class Noisy(InProcessGrid):
        def send_and_receive(self, messages, *, timeout=None):
            for reply in super().send_and_receive(messages, timeout=timeout):
                stranger = copy.deepcopy(reply)
                stranger.metadata.__dict__["_src_node_id"] = 4242
                yield from (stranger, reply, reply)

    config = config_of(2)
    sites = [fake_site(name, config, add) for name, add in (("a", 1.0), ("b", 4.0))]
    grid = Noisy(make_client_app(lambda c: sites[partition_id(c)]), 2)
    grid.send_and_receive = functools.partial(first_plain, grid)
    state = run_rounds(grid, fake_federation(config, ["a", "b"]))
    assert level(state) == pytest.approx(5.0)
    assert statuses(state, "a") == ["ok", "ok"]
    assert state.history[0]["sites"].keys() == {"a", "b"}


def first_plain(grid, messages, *, timeout=None):
    """The roll call as it is; a second node of one name is another test."""
    del grid.send_and_receive
    return InProcessGrid.send_and_receive(grid, messages, timeout=timeout)


def test_a_site_that_failed_is_not_believed_to_hold_what_it_was_sent(fake_site, fake_federation):
    config = config_of(3, wire={"down": {"numbers": "int8"}}, evaluation={"every_rounds": 9})

    class Broken(fake_site):
        payloads = ()

        def train(self, payload, instruction):
            self.payloads = (*self.payloads, payload)
            if instruction.server_round == 2:
                raise OSError("gone before the payload was read")
            return super().train(payload, instruction)

    bad = Broken("c", config)
    sites = [bad if name == "c" else fake_site(name, config) for name in SITES]
    state = run_in_process(fake_federation(config, SITES), sites)
    assert statuses(state, "c") == ["ok", "failed: SAM-F299", "ok"]
    assert len(bad.payloads) == 3  # the whole state at once, and no answer that it is missing


# Disks.


def test_a_full_disk_at_one_site_stops_that_site_alone_with_its_code(run, fake_site, tmp_path):
    (tmp_path / "full").write_text("a folder cannot be made in a file")
    memory = Memory(tmp_path / "full" / "site")

    class Full(fake_site):
        def train(self, payload, instruction):
            answer = super().train(payload, instruction)
            if instruction.server_round == 2:
                memory.remember(2, {"left_out": {"a": torch.ones(1)}}, 1)
            return answer

    config = config_of()
    federation, state = run(config, Full("c", config))
    assert statuses(state, "c") == ["ok", "failed: SAM-S101", "ok"]
    assert str(tmp_path) not in federation.events.read_text()


@pytest.mark.parametrize("selection", [{"keep": "best"}, {"rollback_drop": 0.2}])
def test_a_damaged_best_round_says_how_to_make_it_again(fake_site, fake_federation, selection):
    config = config_of(3, selection=selection)
    steps = {1: 30.0, 2: -25.0, 3: 7.0}

    def site():
        made = fake_site("a", config)
        made.learn = lambda adapter, asked: (
            {n: torch.full_like(v, steps[asked.server_round]) for n, v in adapter.items()},
            {"num-examples": 1, "train-loss": 0.1},
        )
        return made

    straight = run_in_process(fake_federation(config, ["a"], "straight"), [site()])
    federation = fake_federation(config, ["a"])
    best = federation.checkpoints / "round_00001.safetensors"

    def damage(entry):
        if entry["round"] == 1:
            best.write_bytes(best.read_bytes()[:-1])

    with pytest.raises(StorageError) as caught:
        run_in_process(replace(federation, on_round=damage), [site()])
    assert caught.value.code == "SAM-S109"
    assert "round 1" in caught.value.message
    assert "Delete the checkpoints of that round and after it, and resume" in caught.value.hint
    for path in federation.checkpoints.iterdir():
        path.unlink()
    again = run_in_process(federation, [site()])
    assert again.server_round == straight.server_round
    assert all(torch.equal(again.adapter[n], straight.adapter[n]) for n in "ab")


# Deadlines.


def wait_for_signals(seconds=0.3):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.01)


def test_a_deadline_ends_a_block_and_nothing_after_it():
    begun = time.monotonic()
    with pytest.raises(DeadlineError), deadline(0.1):
        time.sleep(30)
    assert time.monotonic() - begun < 10
    with deadline(0.1):
        pass
    wait_for_signals()
    with deadline(None):
        wait_for_signals()


def test_a_block_inside_another_does_not_disarm_it():
    def after_another():
        with deadline(30):
            pass
        time.sleep(30)

    with pytest.raises(DeadlineError), deadline(0.2):
        after_another()
    with deadline(30):
        with pytest.raises(DeadlineError), deadline(0.1):
            time.sleep(30)
        wait_for_signals(0.1)
    with pytest.raises(DeadlineError), deadline(0.1), deadline(30):
        time.sleep(30)


def test_a_signal_that_others_send_is_no_deadline():
    with deadline(30):
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR1)


def test_ctrl_c_at_the_moment_of_the_deadline_is_not_lost():
    def both_at_once():
        both = {signal.SIGUSR1, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        time.sleep(1)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), contextlib.suppress(DeadlineError), deadline(0.1):
            both_at_once()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_deadline_in_a_thread_bounds_nothing_and_hurts_nobody():
    done = []

    def work():
        with deadline(0.05):
            time.sleep(0.2)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def test_sites_that_keep_everything_for_themselves_send_nothing_and_go_on(
    fake_site, fake_federation
):
    config = config_of(personal={"parts": ["encoder", "decoder"]})

    class Private(fake_site):
        def begin(self, adapter):
            super().begin({})

        def evaluate(self, payload, instruction):
            return {"dice": 0.5, "num-cases": 2}

        def learn(self, adapter, instruction):
            return {}, {"num-examples": 1, "train-loss": 0.1}

    state = run_in_process(fake_federation(config, SITES), [Private(n, config) for n in SITES])
    assert all(statuses(state, name) == ["ok"] * 3 for name in SITES)
    assert level(state) == 0.0


def test_a_site_is_told_which_of_its_rounds_was_used(run, fake_site):
    told = []

    class Told(fake_site):
        def train(self, payload, instruction):
            told.append(("train", instruction.server_round, instruction.used_round))
            return super().train(payload, instruction)

        def evaluate(self, payload, instruction):
            told.append(("evaluate", instruction.server_round, instruction.used_round))
            return super().evaluate(payload, instruction)

    config = config_of(3)
    run(config, Told("c", config, instead={2: huge}))
    assert told == [
        ("train", 1, 0), ("evaluate", 1, 1),
        ("train", 2, 1), ("evaluate", 2, 1),  # refused: what it noted in round 2 leads nowhere
        ("train", 3, 1), ("evaluate", 3, 3),
    ]  # fmt: skip
