"""A privacy budget: every round is charged to a ledger before it touches a record."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import cryptography

from samaritan import __version__
from samaritan.config import Config
from samaritan.keys import make_identity
from samaritan.privacy.accounting import Epsilon
from samaritan.privacy.audit.gate import require_sound_mechanism
from samaritan.privacy.ledger import Charge, Ledger, Question, hash_of, open_ledger
from samaritan.privacy.plan import PrivacyPlan

_RANDOMNESS = {"kind": "ChaCha20", "library": "cryptography", "version": cryptography.__version__}


@dataclass(frozen=True)
class Budget:
    """What the patients of a site, or the sites of a federation, may still give away.

    Attributes:
        config: The configuration that was agreed to.
        plan: What it promises each record.
        home: Holds a key, the ledger and its second copy; outlives runs.
        members: Identifiers of the patients or sites; the ledger keeps pseudonyms.
    """

    config: Config
    plan: PrivacyPlan
    home: Path
    members: tuple[str, ...]

    def answer(
        self,
        question: Question,
        clip_norm: float,
        work: Callable[[], bytes],
        acknowledged: str = "",
    ) -> tuple[bytes, str]:
        """The answer to a question: the one given before, or a new one that is charged first.

        Args:
            question: Plan, round and adapter to start from.
            clip_norm: With which the round begins.
            work: Trains; returns what is released.
            acknowledged: Where somebody else says the ledger stood; empty for nobody.

        Returns:
            The answer, and the hash of the ledger's last entry, for somebody else to remember.

        Raises:
            PrivacyError: SAM-P101 when the budget does not allow the round, SAM-P405 when the
                self-audit contradicts the mechanism, and whatever else the ledger refuses; then
                nothing was computed.
        """
        plan = self.plan
        charge = Charge(
            question,
            run_id=self.config.name,
            budget=plan.epsilon,
            delta=plan.delta,
            noise_multiplier=plan.noise_multiplier,
            clip_norm=clip_norm,
            sampling_rate=plan.sampling_rate,
            steps=plan.steps_per_round,
            records_public=plan.records,
            slices_per_patient=self.config.privacy.slices_per_patient,
            unit=plan.unit,
            rng=_RANDOMNESS,
            code_hash=__version__,
        )
        with self._ledger() as ledger:
            if acknowledged:
                ledger.check_acknowledged(acknowledged)
            cohort = ledger.cohort(self.members)
            given = cohort.answered(question)
            if given is not None:
                return given, hash_of(cohort.head)
            require_sound_mechanism()
            reservation = cohort.reserve(charge)
            answer = work()
            cohort.commit(reservation, answer, plan.steps_per_round)
            return answer, hash_of(cohort.head)

    def spent(self, acknowledged: str = "") -> Epsilon:
        """What the members have spent so far, in this run and all others.

        Raises:
            PrivacyError: SAM-P103 when the ledger does not know an entry that somebody else does.
        """
        with self._ledger() as ledger:
            if acknowledged:
                ledger.check_acknowledged(acknowledged)
            return ledger.cohort(self.members).spent(self.plan.delta)

    def _ledger(self) -> AbstractContextManager[Ledger]:
        identity = make_identity(self.home / "identity.key")
        return open_ledger(self.home / "ledger", identity, self.home / "ledger_copy")
