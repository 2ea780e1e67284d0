"""The server's side of a secure sum: it relays, adds, and removes the masks from the sum."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from samaritan.errors import PrivacyError
from samaritan.keys import is_signed
from samaritan.privacy.secure_sum.agreement import masking_key
from samaritan.privacy.secure_sum.fixed_point import decode
from samaritan.privacy.secure_sum.masks import add_mask, own_mask_key, pair_mask_key
from samaritan.privacy.secure_sum.messages import (
    Agreement,
    Delivery,
    Keys,
    Opening,
    Request,
    Roster,
    Shares,
    Survivors,
)
from samaritan.privacy.secure_sum.roster import Members, check_keys, read_roster
from samaritan.privacy.secure_sum.sharing import (
    MASKING_SEED,
    OWN_MASK,
    commit,
    hash_share,
    rebuild_seed,
)
from samaritan.privacy.secure_sum.terms import FEWEST, Terms, least_threshold

_DIGEST_BYTES = 32
_T = TypeVar("_T")


class Coordinator:
    """One attempt, as the server sees it; the methods are called once each, in their order.

    Every method takes pairs of a site and its answer, one at a time, from a transport that knows
    who sent what. A site whose answer is missing or faulty has dropped out; the rest goes on while
    it reaches the threshold.

    Args:
        terms: Of this attempt.
        identities: Public half by site.

    Attributes:
        faults: Why an answer was refused, by site.
        survivors: Whose updates are in the sum, once `ask_agreement` was called.
    """

    def __init__(self, terms: Terms, identities: Mapping[str, bytes]) -> None:
        self.faults: dict[str, PrivacyError] = {}
        self.survivors: tuple[str, ...] = ()
        self._terms = terms
        self._identities = identities
        self._members = Members({}, FEWEST, b"")
        self._dealt: dict[str, Shares] = {}
        self._sum = np.zeros(terms.length, dtype="<u4")

    def call_roster(self, answers: Iterable[tuple[str, bytes]]) -> bytes:
        """From the members' keys the roster, the same for all.

        Raises:
            PrivacyError: SAM-P220 when too few sites are left, here and in the other methods.
        """

        def read(site: str, data: bytes) -> Keys:
            keys = Keys.unpack(data)
            _expect(keys.site == site, site, "keys")
            check_keys(keys, self._terms, self._identities)
            return keys

        keys = self._gather("keys", answers, self._identities, read)
        members = tuple(keys[site] for site in sorted(keys))
        roster = Roster(
            threshold=least_threshold(len(keys), self._terms.fewest), members=members
        ).pack()
        self._members = read_roster(roster, self._terms, self._identities)
        return roster

    def deliver(self, answers: Iterable[tuple[str, bytes]]) -> dict[str, bytes]:
        """From the members' shares what each member gets, by site."""

        def read(site: str, data: bytes) -> Shares:
            shares = Shares.unpack(data)
            _expect(shares.envelopes.keys() == self._members.keys.keys(), site, "shares")
            return shares

        self._dealt = self._gather("shares", answers, self._members.keys, read)
        return {
            holder: Delivery(
                envelopes={d: self._dealt[d].envelopes[holder] for d in sorted(self._dealt)}
            ).pack()
            for holder in self._dealt
        }

    def ask_agreement(self, answers: Iterable[tuple[str, bytes]]) -> bytes:
        """Adds up masked inputs as they come; returns who sent one, the same for all survivors."""

        def read(site: str, data: bytes) -> None:
            length = _DIGEST_BYTES + 4 * self._terms.length
            digest = self._members.digest
            _expect(len(data) == length and data[:_DIGEST_BYTES] == digest, site, "masked input")
            vector = np.frombuffer(data, dtype="<u4", offset=_DIGEST_BYTES)
            np.add(self._sum, vector, out=self._sum)

        self.survivors = tuple(sorted(self._gather("masked input", answers, self._dealt, read)))
        return Survivors(survivors=self.survivors).pack()

    def ask_opening(self, answers: Iterable[tuple[str, bytes]]) -> bytes:
        """From the members' signatures the request to open, for those who signed."""
        statement = self._members.statement(self._dealt, self.survivors)

        def read(site: str, data: bytes) -> bytes:
            signature = Agreement.unpack(data).signature
            _expect(is_signed(self._identities[site], statement, signature), site, "signature")
            return signature

        signatures = self._gather("signatures", answers, self.survivors, read)
        return Request(
            survivors=self.survivors, dropped=self._dropped(), signatures=signatures
        ).pack()

    def total(self, answers: Iterable[tuple[str, bytes]]) -> NDArray[np.float64]:
        """From the opened shares the sum of the survivors' updates, exact in fixed point.

        Returns:
            (length,) float64.

        Raises:
            PrivacyError: SAM-P220 when too few shares are right, SAM-P223 when a member has dealt
                shares of another seed than it masked with.
        """
        openings = self._gather("shares opened", answers, self.survivors, self._read_opening)
        for site in self.survivors:
            seed = self._rebuild(site, {h: o.own_masks[site] for h, o in openings.items()})
            self._expect_dealt(commit(seed, site) == self._members.keys[site].commitment, site)
            add_mask(self._sum, own_mask_key(seed, self._members.digest, site), -1)
        for site in self._dropped():
            seed = self._rebuild(site, {h: o.masking_seeds[site] for h, o in openings.items()})
            self._remove_pair_masks(site, seed)
        return decode(self._sum, self._terms.clip, len(self._members.keys))

    def _dropped(self) -> tuple[str, ...]:
        """Those for whom the survivors masked, and who sent nothing."""
        return tuple(sorted(self._dealt.keys() - set(self.survivors)))

    def _read_opening(self, site: str, data: bytes) -> Opening:
        opening = Opening.unpack(data)
        named = tuple(sorted(opening.own_masks)), tuple(sorted(opening.masking_seeds))
        _expect(named == (self.survivors, self._dropped()), site, "opening")
        for kind, shares in (
            (OWN_MASK, opening.own_masks),
            (MASKING_SEED, opening.masking_seeds),
        ):
            for dealer, share in shares.items():
                announced = self._dealt[dealer].envelopes[site].hashes[kind]
                if hash_share(share, kind, dealer, site, self._members) != announced:
                    raise PrivacyError(
                        "SAM-P222",
                        f"{site} opened a wrong share of a seed of {dealer}",
                        f"The sum does without it. Ask {site} what runs there.",
                    )
        return opening

    def _rebuild(self, dealer: str, shares: Mapping[str, bytes]) -> bytes:
        by_number = {self._members.index(holder): share for holder, share in shares.items()}
        return rebuild_seed(by_number, self._members.threshold)

    def _expect_dealt(self, right: bool, dealer: str) -> None:
        """Shares that holders opened as dealt, but of another seed, are the dealer's doing."""
        if not right:
            raise PrivacyError(
                "SAM-P223",
                f"{dealer} has dealt shares of another seed than it announced; "
                "its masks cannot be removed from the sum",
                f"Go on with the next round without {dealer}.",
            )

    def _remove_pair_masks(self, dropped: str, seed: bytes) -> None:
        """Takes out what the survivors added for a member that dropped out."""
        private = masking_key(seed)
        keys = self._members.keys
        own_public = private.public_key().public_bytes_raw()
        self._expect_dealt(own_public == keys[dropped].masking, dropped)
        for site in self.survivors:
            pair = site, dropped
            key = pair_mask_key(private, keys[site].masking, self._members.digest, pair)
            add_mask(self._sum, key, -1 if site < dropped else 1)

    def _gather(
        self,
        stage: str,
        answers: Iterable[tuple[str, bytes]],
        allowed: Collection[str],
        read: Callable[[str, bytes], _T],
    ) -> dict[str, _T]:
        """The first good answer of each site that may give one."""
        gathered: dict[str, _T] = {}
        for site, data in answers:
            try:
                _expect(site in allowed and site not in gathered, site, stage)
                gathered[site] = read(site, data)
            except PrivacyError as error:
                self.faults[site] = error
        if len(gathered) < self._members.threshold:
            refused = "; ".join(f"{site}: {error.code}" for site, error in self.faults.items())
            raise PrivacyError(
                "SAM-P220",
                f"secure aggregation stopped at stage '{stage}': {len(gathered)} of "
                f"{len(allowed)} sites answered, {self._members.threshold} are needed"
                + (f" (refused: {refused})" if refused else ""),
                "Try the round again under the next number of attempt; after shares were opened, "
                "go on with the next round.",
            )
        return gathered


def _expect(right: bool, site: str, stage: str) -> None:
    if not right:
        raise PrivacyError(
            "SAM-P221",
            f"{site} sent something that does not belong here in stage '{stage}'",
            "It came twice, late, from a site that is not asked, or for another attempt.",
        )
