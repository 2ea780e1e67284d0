"""Which tensors are trained, sent and kept, by strategy and round."""

from __future__ import annotations

import pytest

from samaritan.config import parse_config
from samaritan.errors import ConfigError
from samaritan.shares import SHARING, shares
from strategies.rules import RULES

A, B = "image_encoder.blocks.0.attn.qkv.lora_A_q.weight", "mask_decoder.x.lora_B.weight"
TOKENS, NECK = "mask_decoder.mask_tokens.weight", "image_encoder.neck.0.weight"
FOLDED = "image_encoder.blocks.0.attn.qkv.folded_q.weight"
NAMES = [A, B, TOKENS, NECK, FOLDED]


def of(strategy, server_round=1, **more):
    return shares(parse_config({"strategy": strategy, **more}), NAMES, server_round)


def test_every_rule_says_what_it_asks_of_the_sites():
    assert RULES.keys() == SHARING.keys()


def test_by_default_everything_trained_is_sent_and_folded_tensors_only_come_down():
    found = of("fedavg")
    assert found.trained == found.sent == {A, B, TOKENS, NECK}
    assert found.received == set(NAMES)
    assert not found.personal


def test_ffa_neither_trains_nor_sends_nor_receives_a():
    found = of("ffa")
    assert found.trained == found.sent == {B, TOKENS, NECK}
    assert A not in found.received


def test_fedsa_keeps_b_at_the_site():
    found = of("fedsa")
    assert B in found.trained
    assert found.personal == {B}
    assert B not in found.sent | found.received


def test_rolora_takes_turns_beginning_with_b():
    assert [A in of("rolora", n).trained for n in (1, 2, 3)] == [False, True, False]
    assert [B in of("rolora", n).sent for n in (1, 2, 3)] == [True, False, True]
    assert {A, B} <= of("rolora", 2).received


@pytest.mark.parametrize(
    ("part", "kept"),
    [("decoder", {B, TOKENS}), ("encoder", {A, NECK}), ("lora_B", {B}), ("lora_A", {A})],
)
def test_personal_parts_stay(part, kept):
    found = of("fedavg", personal={"parts": [part]})
    assert found.personal == kept
    assert found.sent == {A, B, TOKENS, NECK} - kept
    assert found.trained == {A, B, TOKENS, NECK}


def test_an_unknown_strategy_lists_the_strategies():
    with pytest.raises(ConfigError) as caught:
        of("magic")
    assert "rolora" in caught.value.hint
