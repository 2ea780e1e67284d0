"""Cohorts: which patients a ledger charges, known by pseudonyms that only their site can make."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence


def pseudonyms(patient_ids: Iterable[str], secret: bytes) -> list[str]:
    """The patients' names in a ledger: HMAC-SHA256 of their ids, sorted, each once.

    Whoever has the secret can test whether a patient is meant, so neither it nor the pseudonyms
    leave the site. A patient whose id is spelt in another way is another patient.

    Args:
        patient_ids: In any order.
        secret: 32 bytes.

    Returns:
        64 hexadecimal digits for each patient.
    """
    return sorted(
        {hmac.new(secret, name.encode(), hashlib.sha256).hexdigest() for name in patient_ids}
    )


def cohort_root(sorted_pseudonyms: Sequence[str]) -> str:
    """The Merkle root of a cohort, in hexadecimal: equal for equal sets of patients only.

    A leaf is SHA-256 of 0x00 and the pseudonym's 32 bytes, a node SHA-256 of 0x01 and its children,
    in the tree of RFC 6962, section 2.1.
    """
    level = [_sha256(b"\x00" + bytes.fromhex(entry)) for entry in sorted_pseudonyms]
    while len(level) > 1:
        pairs = [
            _sha256(b"\x01" + left + right)
            for left, right in zip(level[::2], level[1::2], strict=False)
        ]
        level = pairs + level[len(pairs) * 2 :]  # the last of an odd number moves up as it is
    return (level[0] if level else _sha256(b"")).hex()


def _sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()
