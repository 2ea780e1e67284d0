"""Each site is sent as little as brings it to the state the server means."""

from __future__ import annotations

import pytest
import torch

from samaritan.codecs import decode
from samaritan.config import CodecConfig
from samaritan.messages import Instruction
from samaritan.models.bases import state_sha256
from server.delivery import Delivery, publish, publish_after

ASKED = Instruction(2, 9, "c" * 64, "b" * 64, 60.0)
COARSE = CodecConfig(numbers="int4")
SHAPES = {"a": (40,), "b": (2, 3)}


def state(seed):
    noise = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=noise) for name, shape in SHAPES.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def delivery(published, whole=None, sites=("x", "y")):
    first = publish(state(0))
    beginnings = {None: (whole or first.state, first.sha256)}
    return Delivery(dict.fromkeys(sites), {None: published}, beginnings)


def read(payload):
    return decode(payload, SHAPES)[0]


def test_a_lossless_codec_publishes_the_target_itself():
    made = publish_after(publish(state(0)), state(1), CodecConfig(), 5)
    assert equal(made.state, state(1))
    assert (made.before, made.change) == ("", None)
    assert made.sha256 == state_sha256(state(1))
    assert equal(read(made.whole), state(1))


def test_a_lossy_codec_publishes_what_the_change_leads_to():
    before = publish(state(0))
    made = publish_after(before, state(1), COARSE, 5)
    added, _ = decode(made.change, SHAPES, COARSE)
    assert equal(made.state, {n: before.state[n] + added[n] for n in SHAPES})
    assert not equal(made.state, state(1))
    assert (made.before, made.sha256) == (before.sha256, state_sha256(made.state))
    assert len(made.change) < len(made.whole)
    assert equal(read(made.whole), made.state)
    assert made.change == publish_after(before, state(1), COARSE, 5).change
    assert made.change != publish_after(before, state(1), COARSE, 6).change


def test_what_one_message_leaves_out_is_in_the_next():
    published, errors = publish(state(0)), []
    for seed in range(6):
        published = publish_after(published, state(1), COARSE, seed)
        errors.append((published.state["a"] - state(1)["a"]).abs().max().item())
    assert errors[-1] < 1e-3 * errors[0]


def test_a_site_starts_from_what_it_makes_for_itself():
    post = delivery(publish(state(0)))
    payload, asked = post.address("x", ASKED)
    assert payload is None
    assert (asked.state_sha256, asked.reference_sha256) == (state_sha256(state(0)), "")
    assert (asked.server_round, asked.config_sha256) == (2, "c" * 64)


def test_a_site_is_sent_the_change_from_what_it_holds_and_the_whole_from_anything_else():
    post, first = delivery(publish(state(0))), publish(state(0))
    second = publish_after(first, state(1), COARSE, 1)
    post.advance({None: second})
    payload, asked = post.address("x", ASKED)
    assert payload == second.change
    assert (asked.state_sha256, asked.reference_sha256) == (second.sha256, first.sha256)
    assert post.address("x", ASKED)[0] == second.change  # until it has answered
    post.arrived("x")
    payload, asked = post.address("x", ASKED)
    assert (payload, asked.state_sha256, asked.reference_sha256) == (None, second.sha256, "")
    third = publish_after(second, state(2), COARSE, 2)
    post.advance({None: third})
    assert post.address("x", ASKED)[0] == third.change
    payload, asked = post.address("y", ASKED)  # it still holds the first
    assert equal(read(payload), third.state)
    assert (asked.state_sha256, asked.reference_sha256) == (third.sha256, "")


def test_a_site_that_lost_its_state_is_sent_the_whole_even_of_the_beginning():
    post = delivery(publish(state(0)))
    post.lost(["x"])
    payload, asked = post.address("x", ASKED)
    assert equal(read(payload), state(0))
    assert asked.reference_sha256 == ""
    assert post.address("y", ASKED)[0] is None
    post.arrived("x")
    assert post.address("x", ASKED)[0] is None


def test_a_round_starts_from_what_was_sent_and_what_stays_as_it_was():
    whole = state(0) | {"kept": torch.ones(2)}
    post = delivery(publish(state(3) | {"control/a": torch.ones(40)}), whole)
    start = post.start("x")
    assert list(start) == list(whole)
    assert equal(start, state(3) | {"kept": torch.ones(2)})


def test_sites_of_another_rank_have_a_state_of_their_own():
    small, large = publish(state(0)), publish(state(1))
    beginnings = {rank: (p.state, p.sha256) for rank, p in ((4, small), (None, large))}
    post = Delivery({"x": 4, "y": None}, {4: small, None: large}, beginnings)
    assert post.state("x") is small
    assert post.address("y", ASKED)[1].state_sha256 == large.sha256
    assert equal(post.start("x"), small.state)
    post.advance({4: publish(state(5)), None: large})
    post.arrived("x")
    assert post.address("x", ASKED)[0] is None
    assert post.address("y", ASKED)[0] is None


@pytest.mark.parametrize("forgets", ["train", "evaluate"])
@pytest.mark.parametrize("again", [False, True])
def test_a_site_that_has_lost_its_state_is_sent_the_whole_in_the_same_round(
    fake_site, fake_federation, forgets, again
):
    from samaritan.config import parse_config
    from simulation.engines import run_in_process

    config = parse_config(
        {
            "rounds": 3,
            "data": {"source": "phantoms", "sites": 2},
            "wire": {"down": {"numbers": "int8"}},
            "federation": {"wait_s": 0.3, "retries": 0, "min_sites": 1},
        }
    )

    class Forgetful(fake_site):
        asked_for = 0

        def forget(self, kind, instruction):
            if kind == forgets and instruction.server_round == 2:
                self.asked_for += 1
                if again or self.asked_for == 1:
                    self.exchange.known.states.clear()

        def train(self, payload, instruction):
            self.forget("train", instruction)
            return super().train(payload, instruction)

        def evaluate(self, payload, instruction):
            self.forget("evaluate", instruction)
            return super().evaluate(payload, instruction)

    sites = [fake_site("a", config), Forgetful("b", config)]
    state = run_in_process(fake_federation(config, ["a", "b"]), sites)
    assert [entry["sites"]["b"]["status"] for entry in state.history] == ["ok"] * 3
    assert all(entry["sites"]["b"]["dice"] is not None for entry in state.history)
    assert sites[1].asked_for == 2
