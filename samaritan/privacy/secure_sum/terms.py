"""What all members of one secure sum agree on, and the labels that bind every value to it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from samaritan.errors import PrivacyError

FEWEST = 3
"""Of two members, each would learn the other's update from the sum."""

_PROTOCOL = b"samaritan secure sum 1"


@dataclass(frozen=True)
class Terms:
    """One attempt at one sum.

    Attributes:
        run: Identifier of the run.
        round: 1 and up.
        attempt: 1 and up; a round that was aborted is tried again under the next number.
        length: Numbers in an update.
        clip: No number of an update is larger than this (the L2 norm that updates are clipped to).
        state: Hash of what all members start from. A server that gave all but one a start from
            which nothing is learned would read that one's update in the sum.
        fewest: Members that were agreed to be in a sum at least; never less than three.

    Raises:
        PrivacyError: SAM-P201 when a value cannot be used.
    """

    run: str
    round: int
    attempt: int
    length: int
    clip: float
    state: str = ""
    fewest: int = FEWEST

    def __post_init__(self) -> None:
        counts = self.round, self.attempt, self.length
        if (
            not 1 <= len(self.run) <= 200
            or not FEWEST <= self.fewest <= 2**31
            or not all(1 <= count < 2**31 for count in counts)
            or not 1e-30 <= self.clip <= 1e30
        ):
            raise PrivacyError(
                "SAM-P201",
                f"a sum cannot have the terms {self}",
                "Round, attempt and length are at least 1, the clip is a positive number.",
            )

    def encode(self) -> bytes:
        """One form for equal terms, to be signed."""
        return json.dumps(asdict(self) | {"clip": float(self.clip).hex()}, sort_keys=True).encode()


def bind(purpose: str, *parts: bytes) -> bytes:
    """One byte string for a purpose and parts: no other purpose or parts give the same."""
    return b"".join(
        len(part).to_bytes(8, "big") + part for part in (_PROTOCOL, purpose.encode(), *parts)
    )


def least_threshold(members: int, fewest: int = FEWEST) -> int:
    """How many of the members must at least agree and open shares: more than two thirds, and 3.

    With a threshold t of n, seeds stay hidden from a server and t - 1 members that give it all
    they know but keep to the protocol. A server that tells members different survivors needs t
    signatures twice, that is 2t - n members who sign both; more than two thirds keeps that out of
    reach of n / 3 (Bonawitz et al., theorem 6.5). The price: fewer than a third may drop out.
    """
    return max(fewest, 2 * members // 3 + 1)
