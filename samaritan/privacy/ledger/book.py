"""The chains of one site in memory, and how a record gets to the disk."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from samaritan.keys import Identity
from samaritan.privacy.cohort import cohort_root
from samaritan.privacy.ledger.places import append
from samaritan.privacy.ledger.records import Chain, Record


@dataclass(frozen=True)
class Book:
    """All that a site's ledger holds; to be used while the folder is locked.

    Attributes:
        folder: The site's.
        copy: The second folder, if there is one.
        identity: Signs.
        chains: By the root of the cohort.
    """

    folder: Path
    copy: Path | None
    identity: Identity
    chains: dict[str, Chain]

    def record(self, root: str, kind: str, fields: Mapping[str, Any]) -> Record:
        """Adds a record to a cohort; it is on the disk, and in the copy, when this returns.

        Raises:
            PrivacyError: SAM-P105 when it cannot be written; then nothing was added.
        """
        chain = self.chains.get(root, Chain())
        line = chain.write(kind, fields, self.identity)
        places = [place for place in (self.folder, self.copy) if place is not None]
        append(places, f"{root}.jsonl", line, chain.size_bytes)
        chain.add(line, self.identity.public)
        self.chains[root] = chain
        return chain.records[-1]


def genesis_fields(sorted_pseudonyms: Sequence[str], key_hash: str) -> Record:
    """What the first record of a cohort says."""
    return {
        "ledger_id": secrets.token_hex(16),
        "cohort_root": cohort_root(sorted_pseudonyms),
        "pseudonyms": list(sorted_pseudonyms),
        "secret_hash": key_hash,
    }
