"""Who takes part in an attempt, by signatures of identities that the reader knows itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from samaritan.errors import PrivacyError
from samaritan.keys import Identity, is_signed
from samaritan.privacy.secure_sum.messages import Keys, Roster
from samaritan.privacy.secure_sum.terms import Terms, bind, least_threshold


@dataclass(frozen=True)
class Members:
    """The members of an attempt after all checks.

    Attributes:
        keys: Public keys by name, in the order of the names.
        threshold: How many must agree and open.
        digest: Of terms, threshold and keys. Everything later is bound to it, so that members who
            were shown different rosters understand nothing of each other.
    """

    keys: dict[str, Keys]
    threshold: int
    digest: bytes

    def index(self, name: str) -> int:
        """The number of a member's shares, 1 and up."""
        return list(self.keys).index(name) + 1

    def statement(self, masked: Iterable[str], survivors: Iterable[str]) -> bytes:
        """What members sign: for whom they masked, and who of those survived."""
        lists = (
            bind("names", *(n.encode() for n in sorted(names))) for names in (masked, survivors)
        )
        return bind("survivors", self.digest, *lists)


def sign_keys(keys: Keys, terms: Terms, identity: Identity) -> Keys:
    """The same keys with the signature of an identity."""
    return keys.model_copy(update={"signature": identity.sign(_keys_statement(keys, terms))})


def check_keys(keys: Keys, terms: Terms, identities: Mapping[str, bytes]) -> None:
    """Refuses keys that the named site has not signed for these terms.

    Args:
        keys: From anyone.
        terms: Of this attempt.
        identities: Public half by site, known beforehand.

    Raises:
        PrivacyError: SAM-P210 for a name that is not known, SAM-P211 for a signature by another
            key or for another round.
    """
    if keys.site not in identities:
        raise PrivacyError(
            "SAM-P210",
            f"{keys.site} takes part in the sum, but its identity is not known here",
            "Add the public key of that site to the known identities, or leave the site out.",
        )
    if not is_signed(identities[keys.site], _keys_statement(keys, terms), keys.signature):
        raise PrivacyError(
            "SAM-P211",
            f"the keys of {keys.site} are not signed by its known identity for {terms}",
            "Compare the identity and the settings with that site over another channel: "
            "somebody may have exchanged the keys.",
        )


def read_roster(data: bytes, terms: Terms, identities: Mapping[str, bytes]) -> Members:
    """Reads a roster and trusts nothing in it that the identities do not prove.

    Args:
        data: The message.
        terms: Of this attempt.
        identities: Public half by site, from the reader's own files.

    Raises:
        PrivacyError: SAM-P202 for another message, SAM-P209 for fewer than three members or a
            threshold outside its bounds, SAM-P210 to SAM-P212 for a member that is not who
            it should be.
    """
    roster = Roster.unpack(data)
    names = [keys.site for keys in roster.members]
    least = least_threshold(len(names), terms.fewest)
    if not least <= roster.threshold <= len(names):  # never so for fewer than three
        raise PrivacyError(
            "SAM-P209",
            f"a sum of {len(names)} members at a threshold of {roster.threshold} is refused; "
            f"at least {terms.fewest} members and {least} of {len(names)} are needed",
            "Wait for more sites. The threshold follows from their number.",
        )
    if names != sorted(set(names)):
        raise PrivacyError(
            "SAM-P212",
            f"the roster names a member twice or out of order: {', '.join(names)}",
            "Two sites must not use one name.",
        )
    for keys in roster.members:
        check_keys(keys, terms, identities)
    digest = sha256(bind("roster", terms.encode(), data)).digest()
    return Members(dict(zip(names, roster.members, strict=True)), roster.threshold, digest)


def _keys_statement(keys: Keys, terms: Terms) -> bytes:
    site = keys.site.encode()
    return bind("keys", terms.encode(), site, keys.sealing, keys.masking, keys.commitment)
