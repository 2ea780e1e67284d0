"""How a run stands in one plain sentence, since when, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from samaritan.plan import Plan
from samaritan.report import units
from samaritan.watch import words
from server.home import FAILED
from server.progress import Progress

STARTING, RUNNING, PAUSED, FINISHED = "starting", "running", "paused", "finished"
BROKEN, STOPPED, UNSEEN, IDLE, DOWN = "failed", "stopped", "unknown", "idle", "down"


@dataclass(frozen=True)
class Verdict:
    """What the page says first.

    Attributes:
        state: One word.
        sentence: For people.
        advice: What to do; empty for nothing.
        since: When this state began; empty where that is not known.
    """

    state: str
    sentence: str
    advice: str = ""
    since: str = ""


@dataclass(frozen=True)
class FlowerRun:
    """What the SuperLink knows of the newest run of a plan.

    Attributes:
        status: "pending", "starting", "running" or "finished".
        ended: "completed", "failed" or "stopped" where it is finished.
        ended_at: When; empty where it is not finished.
    """

    status: str
    ended: str = ""
    ended_at: str = ""

    @property
    def is_on(self) -> bool:
        """Whether it goes on."""
        return self.status != "finished"


def idle_verdict(processes: Mapping[str, Any], answers: bool) -> Verdict:
    """Of a server that was given no plan yet."""
    if not processes:
        return _down("No study has been run here.")
    if not answers:
        return Verdict(UNSEEN, "The SuperLink does not answer; no study has been run here.", _LINK)
    return Verdict(
        IDLE,
        "Ready. No study has been run here yet.",
        "Begin one with `samaritan run PLAN --kit KIT`.",
    )


def verdict(
    plan: Plan,
    progress: Progress,
    run: FlowerRun | None,
    processes: Mapping[str, Any],
    answers: bool,
    folder: str,
    now: datetime,
) -> Verdict:
    """Of the run of a plan.

    Args:
        plan: That was given.
        progress: Of its run.
        run: The newest of Flower; None where it has none of this plan.
        processes: Of the server; empty when nothing runs.
        answers: Whether the SuperLink does.
        folder: Of the run, in the kit.
        now: Moment of the look.
    """
    rounds = plan.config.rounds
    where = f"{progress.done} of {units.plural(rounds, 'round')} done"
    if progress.last == "summary_written":
        return _finished(progress, rounds, folder)
    if answers and run is not None and run.is_on:
        return _working(plan, progress, now)
    if progress.last == FAILED:
        return Verdict(
            BROKEN,
            f"Failed with {where}: {_because(progress)}",
            _advice(progress, "Mend it and run the plan again; finished rounds are kept."),
            progress.last_time,
        )
    if progress.last == "run_paused":
        down = "" if processes else "Nothing runs on the server. "
        again = (
            "Where `samaritan run` is still running it tries again by itself, at the latest after "
            "10 minutes; otherwise run the plan again. Finished rounds are kept."
        )
        return Verdict(
            PAUSED,
            f"{down}Paused with {where}: {_because(progress)}",
            _advice(progress, again),
            progress.last_time,
        )
    if not processes:
        return _down(f"Study {plan.study} has {where}.")
    if not answers:
        return Verdict(
            UNSEEN,
            f"The SuperLink does not answer, so nobody knows whether the run goes on; {where}.",
            _LINK,
        )
    if run is not None and run.ended == "stopped":
        return Verdict(
            STOPPED,
            f"Stopped by hand with {where}.",
            "Run the plan again to go on; finished rounds are kept.",
            run.ended_at,
        )
    if not progress.last and run is None:
        return Verdict(
            IDLE,
            f"Study {plan.study} is known here and has not begun.",
            "Begin with `samaritan run PLAN --kit KIT`.",
        )
    return Verdict(
        BROKEN,
        f"The process of the run ended without a word, with {where}.",
        "`run/apps.log` in the kit says why. Where `samaritan run` is still running it tries again "
        "by itself; otherwise run the plan again. Finished rounds are kept.",
        run.ended_at if run else "",
    )


_LINK = (
    "Its supervisor starts it anew by itself. If this stays, `run/link.log` in the kit says why."
)


def _down(what: str) -> Verdict:
    return Verdict(
        DOWN,
        f"Nothing runs on the server. {what}",
        "Start it with `samaritan server start KIT`, then `samaritan run PLAN`, which goes on "
        "where a run has ended.",
    )


def _finished(progress: Progress, rounds: int, folder: str) -> Verdict:
    last = progress.rounds.get(progress.done)
    dice = "" if last is None or last.dice is None else f", mean Dice {units.score(last.dice)}"
    if progress.early or progress.done < rounds:
        why = progress.early or "no reason was written"
        sentence = f"Finished early, with {progress.done} of {rounds} rounds: {why}{dice}."
    else:
        sentence = f"Finished: all {units.plural(rounds, 'round')} are done{dice}."
    advice = f"The report is `{folder}/report.html` in the kit."
    return Verdict(FINISHED, sentence, advice, progress.last_time)


def _working(plan: Plan, progress: Progress, now: datetime) -> Verdict:
    rounds = plan.config.rounds
    if progress.last in ("", "run_paused", FAILED):
        again = "again " if progress.last else ""
        return Verdict(
            STARTING,
            f"Starting {again}after {progress.done} of {units.plural(rounds, 'round')}: "
            "the server loads the model.",
            since=progress.last_time,
        )
    if progress.last == "run_started":
        return Verdict(
            STARTING,
            f"Waiting for the sites: the study has {len(plan.sites)}, and a round needs "
            f"{plan.config.federation.min_sites}.",
            "Sites that are not connected below must start (`samaritan site start KIT` there).",
            progress.started,
        )
    if progress.last in ("run_finished", "stopped_early", "budget_spent"):
        return Verdict(
            RUNNING, "All rounds are done; the server writes the result.", since=progress.last_time
        )
    if not progress.round:
        done = f"round {progress.done} of {rounds} is done, the next one begins"
        first = f"round 1 of {rounds} begins"
        return Verdict(
            RUNNING, f"Running: {done if progress.done else first}.", since=progress.last_time
        )
    late = _late(progress, now)
    return Verdict(
        RUNNING, f"Running round {progress.round} of {rounds}.{late}", since=progress.round_since
    )


def _late(progress: Progress, now: datetime) -> str:
    """A word about a round that takes much longer than those before it."""
    begun, pace_s = words.parse_time(progress.round_since), progress.pace_s
    if begun is None or not pace_s:
        return ""
    seconds = (now - begun).total_seconds()
    if seconds < max(3 * pace_s, 120):
        return ""
    return f" It takes longer than those before, which took about {units.duration(pace_s)} each."


def _because(progress: Progress) -> str:
    text = " ".join(filter(None, (progress.code, progress.message))) or "no reason was written"
    return text if text.endswith(".") else f"{text}."


def _advice(progress: Progress, more: str) -> str:
    """What docs/errors.md says to do about the code and those of sites, and what holds always."""
    codes = words.codes_in([progress.code, progress.message])
    found = (words.meaning(code) for code in codes)
    return " ".join([*dict.fromkeys(todo for _, todo in filter(None, found)), more])
