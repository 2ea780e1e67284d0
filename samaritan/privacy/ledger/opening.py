"""Opens the ledger of a site."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from samaritan.errors import PrivacyError
from samaritan.keys import Identity
from samaritan.privacy.cohort import cohort_root, pseudonyms
from samaritan.privacy.ledger.account import Cohort
from samaritan.privacy.ledger.book import Book, genesis_fields
from samaritan.privacy.ledger.folder import load_chains, load_secret, rolled_back, secret_hash
from samaritan.privacy.ledger.places import locked
from samaritan.privacy.ledger.records import hash_of


@contextlib.contextmanager
def open_ledger(folder: Path, identity: Identity, copy: Path | None = None) -> Iterator[Ledger]:
    """Opens the ledger of a site for this process alone, and makes it at the first call.

    Args:
        folder: The site's own; holds all its cohorts, a secret and past answers.
        identity: Signs every record; the same as ever.
        copy: A second folder, best on another disk. Every record goes to both, so that a folder
            restored from a backup is noticed.

    Raises:
        PrivacyError: SAM-P102 when another process has it, SAM-P103 ("LEDGER ROLLED BACK") when the
            copy knows more, SAM-P104 when a line is damaged, SAM-P105 when it cannot be written,
            SAM-P107 when the secret is missing.
    """
    with locked(folder):
        chains = load_chains(folder, copy, identity)
        secret = load_secret(
            folder, copy, {chain.genesis["secret_hash"] for chain in chains.values()}
        )
        yield Ledger(Book(folder, copy, identity, chains), secret)


@dataclass(frozen=True)
class Ledger:
    """All cohorts of one site; to be used inside `open_ledger` only."""

    book: Book
    secret: bytes

    def cohort(self, patient_ids: Iterable[str]) -> Cohort:
        """The account of exactly these patients, opened if there is none.

        Raises:
            PrivacyError: SAM-P111 without patients; SAM-P105 when it cannot be written.
        """
        names = pseudonyms(patient_ids, self.secret)
        if not names:
            raise PrivacyError(
                "SAM-P111", "a cohort without patients has no ledger", "Check the site's cases."
            )
        root = cohort_root(names)
        if root not in self.book.chains:
            self.book.record(root, "genesis", genesis_fields(names, secret_hash(self.secret)))
        return Cohort(self.book, root)

    def check_acknowledged(self, head: str) -> None:
        """Compares with the last head that somebody else was told, whichever cohort's it was.

        Its hash is enough; its number would tell whether these patients were in a study before.

        Raises:
            PrivacyError: SAM-P103 ("LEDGER ROLLED BACK") when this ledger never had it.
        """
        folder, copy = self.book.folder, self.book.copy
        heads = (known for chain in self.book.chains.values() for known in chain.heads())
        if hash_of(head) not in map(hash_of, heads):
            raise rolled_back(f"{folder} never had the acknowledged head {head}", folder, copy)
