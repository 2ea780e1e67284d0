"""What a plan lets each site have spent of its privacy budget, reckoned beside everything else.

The server does not see the sites' ledgers. It knows the plan and in which rounds it asked whom, so
this is the most that those rounds cost by the plan; a site's own ledger decides, and may hold other
studies too. The accountants need seconds and torch, so a thread of its own does the work, and until
it is done nothing is known.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue

from samaritan.config import Config
from samaritan.errors import SamaritanError

EVERYBODY = ""
"""Stands for all sites where a site is the unit: they share one budget."""

_Question = tuple[str, str, int]


@dataclass(frozen=True)
class Spent:
    """A budget by the plan.

    Attributes:
        epsilon: Budget; None where the plan has none.
        spent: Of it, at most; None while it is reckoned, or if it cannot be.
        rounds: In which the site was asked.
    """

    epsilon: float | None
    spent: float | None
    rounds: int

    @property
    def left(self) -> float | None:
        """What is left, never below zero; None where it is not known."""
        if self.epsilon is None or self.spent is None:
            return None
        return max(0.0, self.epsilon - self.spent)


class Spending:
    """Answers at once with what was reckoned before, and reckons what was asked for."""

    def __init__(self) -> None:
        self._known: dict[_Question, float | None] = {}
        self._asked: set[_Question] = set()
        self._queue: SimpleQueue[tuple[_Question, Config]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def spent(
        self, plan_sha256: str, config: Config, asked: Mapping[str, Iterable[int]]
    ) -> dict[str, Spent]:
        """The budget of each site, or of `EVERYBODY`; none where the plan has no budgets.

        Args:
            plan_sha256: Of the plan.
            config: Of it.
            asked: Rounds in which each site was asked to train.
        """
        privacy = config.privacy
        if privacy.unit == "none":
            return {}
        rounds = {site: len(set(numbers)) for site, numbers in asked.items()}
        if privacy.unit == "site":
            rounds = {EVERYBODY: len({n for numbers in asked.values() for n in numbers})}
        return {
            site: Spent(privacy.epsilon, self._epsilon((plan_sha256, site, count), config), count)
            for site, count in rounds.items()
        }

    def _epsilon(self, question: _Question, config: Config) -> float | None:
        if not question[2]:
            return 0.0
        if question not in self._asked:
            self._asked.add(question)
            self._queue.put((question, config))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        return self._known.get(question)

    def _work(self) -> None:
        while True:
            question, config = self._queue.get()
            self._known[question] = reckon(config, question[1], question[2])


def reckon(config: Config, site: str, rounds: int) -> float | None:
    """Epsilon of so many rounds of a site by the plan; None when the accountants give none."""
    from samaritan.privacy.accounting import epsilon_of
    from samaritan.privacy.plan import privacy_plan

    try:
        plan = privacy_plan(config, site)
        return epsilon_of([plan.spending(rounds)], plan.delta).pld
    except SamaritanError:
        return None
