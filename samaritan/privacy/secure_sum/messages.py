"""What members and coordinator send each other: JSON with bytes in hex, one form for each value."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from samaritan.errors import PrivacyError

_LARGEST_BYTES = 2**20

Name = Annotated[str, StringConstraints(min_length=1, max_length=100)]
Names = tuple[Name, ...]
Bytes16 = Annotated[bytes, Field(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Field(min_length=32, max_length=32)]
Bytes48 = Annotated[bytes, Field(min_length=48, max_length=48)]
Bytes64 = Annotated[bytes, Field(min_length=64, max_length=64)]


class Message(BaseModel):
    """A message of version 1; `kind` tells messages of equal fields apart."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, val_json_bytes="hex", ser_json_bytes="hex"
    )

    version: Literal[1] = 1

    def pack(self) -> bytes:
        """The message as it travels."""
        return self.model_dump_json().encode()

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Reads what `pack` wrote, and nothing else.

        Raises:
            PrivacyError: SAM-P202 for anything that `pack` would not have written.
        """
        try:
            if not isinstance(data, bytes) or len(data) > _LARGEST_BYTES:
                raise ValueError
            message = cls.model_validate_json(data)
            if message.pack() != data:
                raise ValueError
        except ValueError:
            raise PrivacyError(
                "SAM-P202",
                f"a message of secure aggregation is not readable as {cls.__name__}",
                "The sender runs another version, or something on the way changed the message.",
            ) from None
        return message


class Keys(Message):
    """A member's public keys for one attempt, signed with its identity.

    Attributes:
        sealing: X25519, to seal shares for this member.
        masking: X25519, from which pairs derive their masks; its private half is derived from a
            seed that the member shares among all.
        commitment: Hash of the seed of the member's own mask.
    """

    kind: Literal["keys"] = "keys"
    site: Name
    sealing: Bytes32
    masking: Bytes32
    commitment: Bytes32
    signature: Bytes64


class Roster(Message):
    """The members in the order of their names."""

    kind: Literal["roster"] = "roster"
    threshold: int
    members: tuple[Keys, ...]


class Envelope(Message):
    """Two shares for one holder.

    Attributes:
        sealed: Share of the masking seed and of the own mask's seed, encrypted.
        hashes: Of the two shares, so that whoever opens a wrong one is found.
    """

    kind: Literal["envelope"] = "envelope"
    sealed: Bytes48
    hashes: tuple[Bytes32, Bytes32]


class Shares(Message):
    """From one member: an envelope by holder, itself among them."""

    kind: Literal["shares"] = "shares"
    envelopes: dict[Name, Envelope]


class Delivery(Message):
    """To one member: an envelope by dealer, itself among them."""

    kind: Literal["delivery"] = "delivery"
    envelopes: dict[Name, Envelope]


class Survivors(Message):
    """Whose masked inputs arrived, in the order of their names."""

    kind: Literal["survivors"] = "survivors"
    survivors: Names


class Agreement(Message):
    """A member's signature of the survivors."""

    kind: Literal["agreement"] = "agreement"
    signature: Bytes64


class Request(Message):
    """What to open, and who agreed to it.

    Attributes:
        survivors: Their own masks are opened.
        dropped: Their masking seeds are opened.
        signatures: Of the survivors, by member.
    """

    kind: Literal["request"] = "request"
    survivors: Names
    dropped: Names
    signatures: dict[Name, Bytes64]


class Opening(Message):
    """A member's shares: of the own masks of survivors, of the masking seeds of dropped members."""

    kind: Literal["opening"] = "opening"
    own_masks: dict[Name, Bytes16]
    masking_seeds: dict[Name, Bytes16]
