"""A site's side of a secure sum: five answers, each given once and only in their order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from samaritan.errors import PrivacyError
from samaritan.keys import Identity
from samaritan.privacy.secure_sum.agreement import masking_key
from samaritan.privacy.secure_sum.demands import (
    demand_lists,
    demand_quorum,
    demand_signatures,
)
from samaritan.privacy.secure_sum.fixed_point import encode
from samaritan.privacy.secure_sum.masks import add_mask, own_mask_key, pair_mask_key
from samaritan.privacy.secure_sum.messages import (
    Agreement,
    Delivery,
    Keys,
    Opening,
    Request,
    Shares,
    Survivors,
)
from samaritan.privacy.secure_sum.progress import Answer, Progress, begin
from samaritan.privacy.secure_sum.record import Record
from samaritan.privacy.secure_sum.roster import Members, read_roster, sign_keys
from samaritan.privacy.secure_sum.sharing import (
    MASKING_SEED,
    OWN_MASK,
    commit,
    seal_shares,
    unseal_shares,
)
from samaritan.privacy.secure_sum.terms import Terms


class Member:
    """One site in one attempt.

    An answer that is refused ends the attempt for this site; the others go on without it.

    Args:
        site: Its name.
        identity: Its signing key.
        identities: The public half of every site that may take part, itself among them. From the
            site's own files, never from the server.
        terms: Of this attempt.
        record: What this site has taken part in; lives longer than this object.
        progress: From `save`, to go on in another process.

    Raises:
        PrivacyError: SAM-P202 when the progress is unreadable.
    """

    def __init__(
        self,
        site: str,
        identity: Identity,
        identities: Mapping[str, bytes],
        terms: Terms,
        record: Record,
        progress: bytes | None = None,
    ) -> None:
        self._site = site
        self._identity = identity
        self._identities = identities
        self._terms = terms
        self._record = record
        self._now = begin() if progress is None else Progress.unpack(progress)

    @property
    def terms(self) -> Terms:
        """Of this attempt."""
        return self._terms

    def save(self) -> bytes:
        """Secrets and progress, under 100 kB; only the site may read them. Write before sending.

        Delete them after the opening. An old copy gives no second answer: the record knows the
        first.
        """
        return self._now.pack()

    def keys(self) -> bytes:
        """Two fresh public keys, signed.

        Raises:
            PrivacyError: Here and below SAM-P205 or SAM-P206 when the record knows such an answer,
                SAM-P208 when another is due, SAM-P202 for an unreadable message.
        """
        self._enter("keys")
        private = masking_key(self._now.masking_seed)
        unsigned = Keys(
            site=self._site,
            sealing=self._sealing.public_key().public_bytes_raw(),
            masking=private.public_key().public_bytes_raw(),
            commitment=commit(self._now.own_seed, self._site),
            signature=bytes(64),
        )
        keys = sign_keys(unsigned, self._terms, self._identity).pack()
        self._leave("keys", "shares", keys=keys)
        return keys

    def shares(self, roster: bytes) -> bytes:
        """Shares of this site's seeds for every member.

        Raises:
            PrivacyError: As `read_roster`; SAM-P214 when the roster changes or lacks this site;
                SAM-P219 for a degenerate key.
        """
        self._enter("shares")
        members = read_roster(roster, self._terms, self._identities)
        own = members.keys.get(self._site)
        if own is None or own.pack() != self._now.keys:
            raise PrivacyError(
                "SAM-P214",
                f"the roster does not hold what {self._site} has sent",
                "The server, or something on the way to it, changes messages.",
            )
        seeds = self._now.masking_seed, self._now.own_seed
        envelopes = seal_shares(*seeds, self._site, self._sealing, members)
        self._leave("shares", "masked", roster=roster)
        return Shares(envelopes=envelopes).pack()

    def masked(self, delivery: bytes, values: NDArray[Any]) -> bytes:
        """The update under masks: 32 bytes of digest, then little-endian uint32.

        Args:
            delivery: Envelopes of everyone for whom to mask.
            values: (length,) floats, none larger than the clip.

        Raises:
            PrivacyError: SAM-P203 for values out of range, SAM-P204 for another shape, SAM-P213
                for a bad envelope, SAM-P215 for too few.
        """
        self._enter("masked")
        if values.shape != (self._terms.length,):
            raise PrivacyError(
                "SAM-P204",
                f"the update has the shape {values.shape}, the sum {(self._terms.length,)}",
                "All sites must train the same parameters.",
            )
        members = self._members()
        names = sorted(self._unsealed(delivery, members))
        vector = encode(values, self._terms.clip, len(members.keys))
        add_mask(vector, own_mask_key(self._now.own_seed, members.digest, self._site), 1)
        private = masking_key(self._now.masking_seed)
        for other in names:
            if other != self._site:
                pair = self._site, other
                key = pair_mask_key(private, members.keys[other].masking, members.digest, pair)
                add_mask(vector, key, 1 if self._site < other else -1)
        self._leave("masked", "agreement", delivery=delivery)
        return members.digest + vector.tobytes()

    def agreement(self, survivors: bytes) -> bytes:
        """A signature of who survived; a site signs one list.

        Raises:
            PrivacyError: SAM-P215 for too few survivors or one for whom it did not mask.
        """
        self._enter("agreement")
        members = self._members()
        masked = Delivery.unpack(self._now.delivery).envelopes
        names = Survivors.unpack(survivors).survivors
        demand_quorum("masked input", names, masked, self._site, members)
        signature = self._identity.sign(members.statement(masked, names))
        self._leave("agreement", "opening", survivors=names)
        return Agreement(signature=signature).pack()

    def opening(self, request: bytes) -> bytes:
        """For every member one share: of a survivor's own mask, of a dropped one's masking seed.

        Raises:
            PrivacyError: SAM-P216 when a member is in both lists, SAM-P217 when the lists are not
                what this site signed, SAM-P218 for too few signatures.
        """
        self._enter("opening")
        members = self._members()
        asked = Request.unpack(request)
        shares = self._unsealed(self._now.delivery, members)
        demand_lists(asked, self._now.survivors, shares)
        demand_signatures(asked, shares, members, self._identities)
        opening = Opening(
            own_masks={name: shares[name][OWN_MASK] for name in asked.survivors},
            masking_seeds={name: shares[name][MASKING_SEED] for name in asked.dropped},
        )
        self._now = begin()  # forgets the secrets
        self._leave("opening", "nothing")
        return opening.pack()

    def _enter(self, answer: Answer) -> None:
        """Refuses an answer that is not due; until `_leave` none is."""
        due = self._now.next
        if answer != due:
            raise PrivacyError(
                "SAM-P208",
                f"the server asks for {answer} where {due} is due",
                "A request came twice, or the attempt was aborted; start another attempt.",
            )
        self._now = self._now.model_copy(update={"next": "nothing"})

    def _leave(self, answer: Answer, due: Answer, **learnt: bytes | tuple[str, ...]) -> None:
        """Notes an answer before it is given, and what comes after it."""
        self._record.note(answer, self._terms)
        self._now = self._now.model_copy(update={"next": due, **learnt})

    @property
    def _sealing(self) -> X25519PrivateKey:
        return X25519PrivateKey.from_private_bytes(self._now.sealing)

    def _members(self) -> Members:
        return read_roster(self._now.roster, self._terms, self._identities)

    def _unsealed(self, delivery: bytes, members: Members) -> dict[str, tuple[bytes, bytes]]:
        """By dealer the two shares that this member holds."""
        envelopes = Delivery.unpack(delivery).envelopes
        demand_quorum("shares", sorted(envelopes), members.keys, self._site, members)
        return {
            dealer: unseal_shares(envelope, dealer, self._site, self._sealing, members)
            for dealer, envelope in envelopes.items()
        }
