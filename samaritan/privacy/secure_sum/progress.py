"""What a member must know from one answer to the next."""

from __future__ import annotations

import secrets
from typing import Literal

from samaritan.privacy.secure_sum.messages import Bytes16, Bytes32, Message, Names

Answer = Literal["keys", "shares", "masked", "agreement", "opening", "nothing"]


class Progress(Message):
    """How far a member is, and its secrets of this attempt.

    Attributes:
        next: The answer that is due.
        sealing: Private key that opens envelopes.
        masking_seed: Behind the masking key.
        own_seed: Behind the own mask.
        keys: What this member has sent.
        roster: As received.
        delivery: As received.
        survivors: What this member has signed.
    """

    kind: Literal["progress"] = "progress"
    next: Answer = "keys"
    sealing: Bytes32
    masking_seed: Bytes16
    own_seed: Bytes16
    keys: bytes = b""
    roster: bytes = b""
    delivery: bytes = b""
    survivors: Names = ()


def begin() -> Progress:
    """Fresh secrets from the operating system."""
    return Progress(
        sealing=secrets.token_bytes(32),
        masking_seed=secrets.token_bytes(16),
        own_seed=secrets.token_bytes(16),
    )
