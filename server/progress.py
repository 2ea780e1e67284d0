"""What the events of a run come to, as they come: rounds, sites, bytes, trouble.

Events are read as anybody could have written them: what is missing or of another type is passed
over, and no text of a site decides more than what is shown of that site.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from samaritan.watch.follow import Json

_MOST_TROUBLES = 60

_OF_A_SITE = ("site_failed", "site_late", "reply_refused")
_STARTS, _ENDS = "run_started", ("run_paused", "run_finished", "run_failed", "summary_written")


@dataclass(frozen=True)
class Round:
    """A round that is done.

    Attributes:
        number: Of the round.
        time: When it was done.
        seconds: How long it took.
        dice: Mean over the validation cases of all sites that told theirs.
        answered, asked: Sites with a usable answer, and all that were asked.
    """

    number: int
    time: str
    seconds: float | None
    dice: float | None
    answered: int
    asked: int


@dataclass
class SiteProgress:
    """What the run knows of a site.

    Attributes:
        status: In the last round that ended for it; empty for none.
        status_round: That round.
        dice: The last it told.
        dice_round: When it did.
        bytes_up, bytes_down: Of messages in all rounds that were finished.
        examples: Training cases, as it told them.
        asked: Rounds in which it was asked to train.
        left: Whether its privacy budget is spent.
    """

    status: str = ""
    status_round: int = 0
    dice: float | None = None
    dice_round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    examples: float | None = None
    asked: set[int] = field(default_factory=set)
    left: bool = False


@dataclass
class Trouble:
    """The same thing at the same site, however often.

    Attributes:
        site: Empty for the run itself.
        what: Happened.
        times: How often.
        first_round, last_round: 0 outside of rounds.
        last: When it last happened.
    """

    site: str
    what: str
    times: int = 0
    first_round: int = 0
    last_round: int = 0
    last: str = ""


@dataclass
class Progress:
    """A run from its events.

    Attributes:
        rounds: Done, by number.
        sites: By name.
        last: Kind of the last event.
        last_time: When it was.
        code, message: Of a pause or failure, if that is the last that happened.
        round: Under way; 0 for none.
        round_since: When it began.
        asked: Sites that were asked in it.
        present: Sites at the last roll call, None before it.
        first_time: When the run first began.
        started: When it last began or went on.
        early: Why it ended before its last round; empty if it did not.
        troubles: The newest last.
    """

    rounds: dict[int, Round] = field(default_factory=dict)
    sites: dict[str, SiteProgress] = field(default_factory=dict)
    last: str = ""
    last_time: str = ""
    code: str = ""
    message: str = ""
    round: int = 0
    round_since: str = ""
    asked: list[str] = field(default_factory=list)
    present: list[str] | None = None
    first_time: str = ""
    started: str = ""
    early: str = ""
    troubles: OrderedDict[tuple[str, str], Trouble] = field(default_factory=OrderedDict)

    def take(self, event: Json) -> None:
        """Adds an event."""
        kind, time = _text(event, "event"), _text(event, "time")
        if not kind:
            return
        self.last, self.last_time = kind, time
        self.code, self.message = "", ""
        if kind == _STARTS:
            self._begin(event, time)
        elif kind == "roll_call":
            self.present = _texts(event, "present")
        elif kind == "round_started":
            self.round, self.round_since = _whole(event, "round"), time
            self.asked = _texts(event, "sites")
            self._ask(self.asked)
        elif kind == "sites_recalled":
            self._ask(_texts(event, "sites"))
        elif kind == "round_finished":
            self._finish(event, time)
        elif kind == "site_left":
            self._site(_text(event, "site")).left = True
        elif kind == "stopped_early":
            self.early = _text(event, "reason") or "no reason was written"
        elif kind in _ENDS:
            self.code, self.message = _text(event, "code"), _text(event, "message")
        elif kind in _OF_A_SITE:
            told = self._site(_text(event, "site"))
            told.status, told.status_round = _text(event, "status"), _whole(event, "round")
        for site, what in _troubles(kind, event):
            self._note(site, what, _whole(event, "round") or self.round, time)

    def _begin(self, event: Json, time: str) -> None:
        first = _whole(event, "first_round") or 1
        # What lies behind the checkpoint that the run goes on from is done again.
        self.rounds = {n: entry for n, entry in self.rounds.items() if n < first}
        self.first_time = self.first_time or time
        self.started, self.round, self.round_since = time, 0, ""
        self.asked, self.present, self.early = [], None, ""

    def _ask(self, sites: list[str]) -> None:
        for site in sites:
            self._site(site).asked.add(self.round)

    def _finish(self, event: Json, time: str) -> None:
        number = _whole(event, "round")
        told = event.get("sites")
        entries = {
            str(name): entry
            for name, entry in (told.items() if isinstance(told, dict) else ())
            if isinstance(entry, dict)
        }
        for name, entry in entries.items():
            self._tell(self._site(name), entry, number)
        answered = sum(_text(entry, "status") == "ok" for entry in entries.values())
        dice, seconds = number_of(event.get("dice_mean")), number_of(event.get("seconds"))
        self.rounds[number] = Round(number, time, seconds, dice, answered, len(entries))
        self.round, self.round_since, self.asked = 0, "", []

    def _tell(self, site: SiteProgress, entry: Json, number: int) -> None:
        site.status, site.status_round = _text(entry, "status"), number
        dice = number_of(entry.get("dice"))
        if dice is not None:
            site.dice, site.dice_round = dice, number
        site.examples = _either(number_of(entry.get("num_examples")), site.examples)
        site.bytes_up += int(number_of(entry.get("bytes_up")) or 0)
        site.bytes_down += int(number_of(entry.get("bytes_down")) or 0)

    def _site(self, name: str) -> SiteProgress:
        return self.sites.setdefault(name, SiteProgress())

    def _note(self, site: str, what: str, number: int, time: str) -> None:
        trouble = self.troubles.setdefault((site, what), Trouble(site, what, first_round=number))
        self.troubles.move_to_end((site, what))
        trouble.times += 1
        trouble.last_round, trouble.last = number, time
        if len(self.troubles) > _MOST_TROUBLES:
            self.troubles.popitem(last=False)

    @property
    def done(self) -> int:
        """The last round that is done; 0 for none."""
        return max(self.rounds, default=0)

    @property
    def pace_s(self) -> float | None:
        """Seconds of a round, by the median of the last five."""
        recent = [self.rounds[n].seconds for n in sorted(self.rounds)[-5:]]
        known = [seconds for seconds in recent if seconds is not None]
        return median(known) if known else None


def number_of(value: object) -> float | None:
    """A finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def _troubles(kind: str, event: Json) -> list[tuple[str, str]]:
    """What an event says went wrong, with the site it is about, empty for the run itself."""
    site, status, message = (_text(event, key) for key in ("site", "status", "message"))
    coded = " ".join(filter(None, (_text(event, "code"), message)))
    match kind:
        case "site_failed" | "site_late" | "reply_refused" | "late_reply":
            return [(site, status or "no status recorded")]
        case "reply_forged":
            return [(site, "an answer was not sealed by this site; it was thrown away")]
        case "site_left":
            return [(site, "left: its privacy budget is spent")]
        case "sites_recalled":
            return [(s, "asked although it rests: too few others") for s in _texts(event, "sites")]
        case "round_retried":
            return [("", f"asked again: {', '.join(_texts(event, 'sites'))}")]
        case "round_lost":
            return [("", f"the round was lost: {_text(event, 'reason')}")]
        case "secure_sum_failed":
            return [("", f"no masked sum: {coded}")]
        case "roll_call":
            return [("", f"refused at the roll call: {why}") for why in _texts(event, "refused")]
        case "checkpoints_damaged":
            return [("", f"damaged checkpoints passed over: {', '.join(_texts(event, 'files'))}")]
        case "rolled_back":
            back = _whole(event, "to_round")
            return [("", f"Dice fell; went back to the adapter of round {back}")]
        case "budget_spent":
            return [("", f"privacy budget spent: {message}")]
        case "stopped_early":
            return [("", f"stopped early: {_text(event, 'reason')}")]
        case "run_paused":
            return [("", f"paused: {coded}")]
        case "run_failed":
            return [("", f"failed: {coded}")]
        case _:
            return []


def _either(first: float | None, second: float | None) -> float | None:
    return second if first is None else first


def _text(event: Json, key: str) -> str:
    value: Any = event.get(key)
    return value if isinstance(value, str) else ""


def _whole(event: Json, key: str) -> int:
    return int(number_of(event.get(key)) or 0)


def _texts(event: Json, key: str) -> list[str]:
    found: Any = event.get(key)
    return [str(item) for item in found] if isinstance(found, list) else []
