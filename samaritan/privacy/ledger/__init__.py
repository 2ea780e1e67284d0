"""The ledger of what a site's patients have spent: charged before work, never refunded.

A round reserves its whole cost before the first gradient, works, and commits its answer. Whatever
crashes in between stays charged. A question that was answered gets the same bytes again for
nothing; any other try pays anew. The ledger outlives runs, and no model checkpoint holds any of it.

Budgets belong to patients. A cohort has spent what was charged to it and to every other cohort with
which it shares a patient, whatever the study was called: an upper bound for each of its patients.
Leaving patients out or adding some opens another account and gives nothing back.
"""

from samaritan.privacy.ledger.account import Cohort, Reservation
from samaritan.privacy.ledger.charges import Charge, Question
from samaritan.privacy.ledger.opening import Ledger, open_ledger
from samaritan.privacy.ledger.records import hash_of
from samaritan.privacy.ledger.resync import resync
from samaritan.privacy.ledger.verify import Finding, verify

__all__ = [
    "Charge",
    "Cohort",
    "Finding",
    "Ledger",
    "Question",
    "Reservation",
    "hash_of",
    "open_ledger",
    "resync",
    "verify",
]
