"""What did not go as planned in a run: sites that failed, and rounds that were undone or resumed.

Statuses in summary.json say how each site ended a round; events.jsonl says what happened on the
way there. Older run folders may lack events.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from samaritan.report import facts, privacy, units
from samaritan.report.facts import Json
from samaritan.report.folder import clean

_RUN = "the run"
_OF_A_SITE = ("site_failed", "site_late", "late_reply", "reply_refused")
_MESSAGE_LENGTH = 160
_NO_BUDGET = "ended: no privacy budget for another round"
_IN_WORDS = {
    privacy.BUDGET_SPENT: "left: privacy budget spent",
    privacy.ROLLED_BACK: "refused to train: its privacy ledger was rolled back (SAM-P103)",
}
"""Statuses that a site's privacy ledger brings about."""

_Happening = tuple[int | None, str, str]
"""The round if there is one, the site or `_RUN`, and what happened."""


@dataclass(frozen=True)
class Trouble:
    """One row of the table: the same thing at some sites in some rounds."""

    rounds: str
    sites: str
    what: str


def read_events(path: Path) -> list[Json]:
    """The events of a run in their order; a line that is no event is passed over."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = (clean(_parsed(line)) for line in lines)
    return [event for event in found if isinstance(event, dict)]


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def troubles(summary: Json, events: Sequence[Json]) -> list[Trouble]:
    """Everything out of the ordinary, by the round in which it first happened."""
    rounds: dict[tuple[str, str], set[int]] = {}
    for number, site, what in (*_from_summary(summary), *_from_events(events)):
        rounds.setdefault((site, what), set()).update([] if number is None else [number])
    sites: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for (site, what), numbers in rounds.items():
        sites.setdefault((tuple(sorted(numbers)), what), []).append(site)
    return [
        Trouble(units.ranges(numbers) or units.MISSING, units.names(names), what)
        for (numbers, what), names in sorted(sites.items(), key=lambda item: item[0][0][:1])
    ]


def silent_entries(summary: Json) -> int:
    """How many pairs of site and round carry no entry: the site was not asked."""
    sites = facts.site_names(summary)
    return sum(
        site not in facts.section(entry, "sites")
        for entry in facts.training_rounds(summary)
        for site in sites
    )


def _from_summary(summary: Json) -> Iterator[_Happening]:
    for entry in facts.training_rounds(summary):
        number = _round(entry, "round")
        for site in facts.section(entry, "sites"):
            status = facts.text(entry, "sites", site, "status") or "no status recorded"
            if status != "ok":
                yield number, site, _IN_WORDS.get(status, status)
        back = facts.number(entry, "rolled_back_to")
        if back is not None:
            dice = units.score(facts.number(entry, "dice_mean"))
            what = f"rolled back to the adapter of round {back:.0f}: Dice fell to {dice}"
            yield number, _RUN, what


def _from_events(events: Sequence[Json]) -> Iterator[_Happening]:
    begun, former = False, ""
    start: int | None = None
    expected: list[str] = []
    left: set[str] = set()
    for event in events:
        kind, number = facts.text(event, "event"), _round(event, "round")
        if kind in _OF_A_SITE:
            status = facts.text(event, "status")
            yield number, facts.text(event, "site"), _IN_WORDS.get(status, status)
        elif kind == "round_started":
            yield from _each(event, "resting", number, "not asked: it rests after a wrong answer")
        elif kind == "sites_recalled":
            yield from _each(event, "sites", number, "asked although it rests: too few others")
        elif kind == "round_retried":
            yield from _each(event, "sites", number, "asked again: too few usable answers")
        elif kind == "secure_sum_failed":
            code = facts.text(event, "code")
            message = units.shorten(facts.text(event, "message"), _MESSAGE_LENGTH)
            yield number, _RUN, f"no secure sum: {code}, {message}"
        elif kind == "round_lost":
            yield number, _RUN, f"lost: {facts.text(event, 'reason')}"
        elif kind == "site_left":
            left.add(facts.text(event, "site"))
        elif kind == "budget_spent":
            left.update(expected)
        elif kind == "stopped_early":
            spent = left >= set(expected) > set()
            yield number, _RUN, _NO_BUDGET if spent else f"stopped early{_best(event)}"
        elif kind == "checkpoints_damaged":
            files = units.names(_strings(event, "files"))
            yield None, _RUN, f"damaged checkpoints passed over: {files}"
        elif kind == "run_started":
            start, expected = _round(event, "first_round"), _strings(event, "sites")
            if begun and former != "run_finished":
                paused = former == "run_paused"
                yield start, _RUN, "resumed" if paused else "resumed after an interruption"
            begun = True
        elif kind == "roll_call":
            yield from _roll_call(event, start, expected)
        elif kind == "run_paused":
            done = facts.number(event, "rounds_done")
            message = units.shorten(facts.text(event, "message"), _MESSAGE_LENGTH)
            code = facts.text(event, "code")
            yield None if done is None else int(done) + 1, _RUN, f"paused: {code}, {message}"
        if kind.startswith("run_"):
            former = kind


def _roll_call(event: Json, start: int | None, expected: Sequence[str]) -> Iterator[_Happening]:
    refused, present = _strings(event, "refused"), _strings(event, "present")
    for fault in refused:
        yield start, _RUN, f"refused at the roll call: {fault}"
    for site in expected:
        if site not in present and not any(f.startswith(f"site {site}:") for f in refused):
            yield start, site, "absent at the roll call"


def _each(event: Json, key: str, number: int | None, what: str) -> Iterator[_Happening]:
    for site in _strings(event, key):
        yield number, site, what


def _best(event: Json) -> str:
    best = event.get("best")
    if not isinstance(best, list) or len(best) != 2:
        return ""
    pair = facts.number({"of": best[0]}, "of"), facts.number({"of": best[1]}, "of")
    if pair[0] is None:
        return ""
    return f": no better Dice than {units.score(pair[1])} of round {pair[0]:.0f}"


def _round(value: Json, key: str) -> int | None:
    number = facts.number(value, key)
    return None if number is None else int(number)


def _strings(event: Json, key: str) -> list[str]:
    found = event.get(key)
    return [str(item) for item in found] if isinstance(found, list) else []
