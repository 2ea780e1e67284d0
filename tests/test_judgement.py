"""What the history of a run says of its next round."""

from __future__ import annotations

import pytest

from server.judgement import best_round, has_fallen, last_used, on_plateau, quarantined


def history(*statuses, site="a"):
    """One round for each status; None where the site was not asked."""
    return [{"sites": {} if status is None else {site: {"status": status}}} for status in statuses]


def scored(*dice):
    return [{"round": n, "dice_mean": value} for n, value in enumerate(dice, 1)]


@pytest.mark.parametrize(
    "status", ["refused: a moves by 1e+30", "failed: SAM-T102", "failed: SAM-F205"]
)
def test_a_wrong_or_infinite_answer_rests_a_site_for_so_many_rounds(status):
    rested = []
    rounds = [status]
    for _ in range(4):
        rested.append(quarantined(history(*rounds), "a", 2))
        rounds.append(None)
    assert rested == [True, True, False, False]
    assert not quarantined(history(status), "b", 2)
    assert not quarantined(history(status), "a", 0)


@pytest.mark.parametrize(
    "status", ["ok", "failed: SAM-F299", "failed: SAM-S101", "late: no answer"]
)
def test_a_site_that_is_right_broken_or_slow_does_not_rest(status):
    assert not quarantined(history(status), "a", 2)


def test_the_last_answer_decides():
    assert not quarantined(history("refused: x", "ok"), "a", 3)
    assert quarantined(history("ok", "refused: x"), "a", 3)
    assert quarantined(history("ok", "refused: x", None), "a", 3)


def test_the_best_round_is_the_first_with_the_highest_score():
    assert best_round(scored(0.1, 0.4, 0.4, 0.3)) == (2, 0.4)
    assert best_round(scored(None, 0.0)) == (2, 0.0)
    assert best_round(scored(None)) is None
    assert best_round([]) is None


@pytest.mark.parametrize(
    ("dice", "patience", "over"),
    [
        ([0.1, 0.2, 0.2], 1, True),
        ([0.1, 0.2, 0.2], 2, False),
        ([0.3, 0.2, 0.2], 2, True),
        ([0.3, 0.2, 0.4], 2, False),
        ([0.3, None, 0.2], 2, False),  # one round that was scored
        ([0.3, 0.2], 2, False),
        ([0.3, 0.2], None, False),
    ],
)
def test_a_plateau_is_so_many_scored_rounds_without_a_better_one(dice, patience, over):
    assert on_plateau(scored(*dice), patience) == over


@pytest.mark.parametrize(
    ("dice", "drop", "fallen"),
    [
        ([0.5, 0.2], 0.2, True),
        ([0.5, 0.4], 0.2, False),
        ([0.5, 0.25], 0.25, False),
        ([0.5, 0.1, None], 0.2, False),
        ([0.2, 0.5], 0.2, False),
        ([0.5, 0.0], None, False),
        ([None], 0.2, False),
    ],
)
def test_a_fall_is_measured_from_the_best_round(dice, drop, fallen):
    assert has_fallen(scored(*dice), drop) is fallen


def test_the_last_update_that_was_used_is_remembered():
    past = [
        {"round": 4, "sites": {"b": {"update_sha256": "9"}, "a": {"update_sha256": "1"}}},
        {"round": 5, "sites": {"a": {"update_sha256": "2"}}},
        {"round": 6, "sites": {"a": {"update_sha256": ""}}},
        {"round": 7, "sites": {}},
    ]
    assert last_used(past, "a") == (5, "2")
    assert last_used(past, "b") == (4, "9")
    assert last_used(past, "c") == last_used([], "a") == (0, "")
