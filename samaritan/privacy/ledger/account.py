"""The account of one set of patients: reserve, work, commit."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from samaritan.errors import PrivacyError
from samaritan.files import write_atomically
from samaritan.privacy.accounting import Epsilon, Spending, epsilon_of
from samaritan.privacy.ledger.book import Book
from samaritan.privacy.ledger.charges import (
    Charge,
    Question,
    charge_fields,
    check_charge,
    external_fields,
    question_fields,
    spendings_of,
)
from samaritan.privacy.ledger.folder import OUTBOX
from samaritan.privacy.ledger.places import read
from samaritan.privacy.ledger.records import Chain, Record

_log = logging.getLogger("samaritan.site")


@dataclass(frozen=True)
class Reservation:
    """A round that is charged.

    Attributes:
        number: Of the record.
        instance_id: Random: two of one question betray a copy of the machine.
        charge: What was charged.
    """

    number: int
    instance_id: str
    charge: Charge


@dataclass(frozen=True)
class Cohort:
    """The account of one set of patients."""

    book: Book
    root: str

    @property
    def head(self) -> str:
        """The last record as "number:hash", for somebody else to keep."""
        return self._chain.head

    def spent(self, delta: float) -> Epsilon:
        """What these patients have spent so far, in all cohorts that share one of them."""
        return epsilon_of(self._spendings(), delta)

    def answered(self, question: Question) -> bytes | None:
        """The answer that was given to this question; sending it again costs nothing.

        None when there was none, and when its file is gone or damaged: then it is to be paid anew.
        """
        asked = question_fields(question)
        for record in reversed(self._chain.records):
            if record["type"] == "commit" and asked.items() <= record.items():
                answer = read(self.book.folder / OUTBOX / record["update_hash"])
                if hashlib.sha256(answer).hexdigest() == record["update_hash"]:
                    return answer
                _log.warning(
                    "the kept answer of round %d is gone or damaged; it will be paid for again",
                    question.server_round,
                )
                return None
        return None

    def reserve(self, charge: Charge) -> Reservation:
        """Charges a round, all its planned steps, before the first gradient of it is computed.

        Raises:
            PrivacyError: SAM-P101 when the budget does not allow it, SAM-P106 when it contradicts
                earlier charges, SAM-P108 when a value makes no sense, SAM-P110 when the cohort is
                closed, SAM-P105 when it cannot be written. Nothing is charged then.
        """
        check_charge(charge)
        self._require_open()
        earlier = [record for chain in self._sharing() for record in chain.records]
        _require_consistent(charge, [r for r in earlier if r["type"] == "reserve"])
        before = self.spent(charge.delta)
        after = epsilon_of([*self._spendings(), *charge.spendings], charge.delta)
        if not after.pld <= charge.budget:
            raise PrivacyError(
                "SAM-P101",
                f"privacy budget: round {charge.question.server_round} would bring epsilon from "
                f"{before.pld:.4f} to {after.pld:.4f}, the budget is {charge.budget:.4f} "
                f"(delta {charge.delta:g})",
                "This site trains no further on these patients. A larger privacy.epsilon is a "
                "decision of the data officer.",
            )
        question = question_fields(charge.question)
        tries = [
            record
            for record in self._chain.records
            if record["type"] == "reserve" and question.items() <= record.items()
        ]
        fields = {
            **charge_fields(charge, before, after),
            "instance_id": secrets.token_hex(16),
            "attempt": len(tries) + 1,
        }
        record = self._record("reserve", fields)
        return Reservation(record["seq"], record["instance_id"], charge)

    def commit(self, reservation: Reservation, answer: bytes, steps_done: int) -> None:
        """Keeps the outgoing bytes and notes their hash; only then may they be sent.

        Args:
            reservation: Of this cohort.
            answer: What leaves the site. The file in the outbox may be deleted later; the question
                then costs anew.
            steps_done: At most those that were charged.

        Raises:
            PrivacyError: SAM-P109 when the reservation is unknown or used, or more was done than
                charged; SAM-P105 when the record cannot be written. The answer must not be sent.
            StorageError: When the answer cannot be kept.
        """
        charge, records = reservation.charge, self._chain.records
        reserved = records[reservation.number] if reservation.number < len(records) else {}
        used = any(r["type"] == "commit" and r["reserve"] == reservation.number for r in records)
        known = reserved.get("instance_id") == reservation.instance_id
        if used or not known or steps_done > charge.steps:
            raise PrivacyError(
                "SAM-P109",
                f"round {charge.question.server_round} cannot be committed: {steps_done} of "
                f"{charge.steps} charged steps done, record {reservation.number} "
                f"{'has an answer already' if used else 'is its' if known else 'is not its'}",
                "Do not send this answer. Every try needs a reservation of its own.",
            )
        digest = hashlib.sha256(answer).hexdigest()
        write_atomically(self.book.folder / OUTBOX / digest, answer, private=True)
        self._record(
            "commit",
            {
                **question_fields(charge.question),
                "reserve": reservation.number,
                "instance_id": reservation.instance_id,
                "attempt": reserved["attempt"],
                "steps_done": steps_done,
                "update_hash": digest,
            },
        )

    def import_external(self, spendings: Sequence[Spending], *, stands_for: str) -> None:
        """Charges by hand what is known to be spent and is in no record here any more.

        Args:
            spendings: At least what the lost records charged.
            stands_for: The lost head, "number:hash", that somebody acknowledged; it counts as known
                from now on.

        Raises:
            PrivacyError: SAM-P108 when a value makes no sense; SAM-P105.
        """
        self._record("external", {**external_fields(spendings), "stands_for": [stands_for]})

    def close(self, reason: str) -> None:
        """Ends the account: nothing can be charged to this cohort again, and nothing is refunded.

        Raises:
            PrivacyError: SAM-P110 when it is closed; SAM-P105 when it cannot be written.
        """
        self._require_open()
        self._record("close", {"reason": reason})

    @property
    def _chain(self) -> Chain:
        return self.book.chains[self.root]

    def _sharing(self) -> list[Chain]:
        """This cohort's records, and those of all cohorts that have a patient of it."""
        own = set(self._chain.genesis["pseudonyms"])
        chains = self.book.chains.values()
        return [chain for chain in chains if not own.isdisjoint(chain.genesis["pseudonyms"])]

    def _spendings(self) -> list[Spending]:
        return [
            spent
            for chain in self._sharing()
            for record in chain.records
            for spent in spendings_of(record)
        ]

    def _record(self, kind: str, fields: Mapping[str, Any]) -> Record:
        return self.book.record(self.root, kind, fields)

    def _require_open(self) -> None:
        if any(record["type"] == "close" for record in self._chain.records):
            raise PrivacyError(
                "SAM-P110",
                "the account of these patients is closed",
                "Train on other patients. A closed account stays closed.",
            )


def _require_consistent(charge: Charge, reserves: Iterable[Record]) -> None:
    """A plan keeps its cap and the patients their unit; epsilons of two units cannot be added."""
    for record in reserves:
        same_plan = record["plan_hash"] == charge.question.plan_hash
        for what, now, then in (
            ("unit", charge.unit, record["unit"]),
            (
                "slices_per_patient",
                charge.slices_per_patient,
                record["max_windows_per_patient"] if same_plan else charge.slices_per_patient,
            ),
        ):
            if now != then:
                raise PrivacyError(
                    "SAM-P106",
                    f"{what} is {now}, but round {record['round']} was charged with {then}",
                    "Take back the change: what was charged holds for the whole plan"
                    + (", and for these patients." if what == "unit" else "."),
                )
