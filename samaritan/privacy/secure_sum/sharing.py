"""Seeds in shares (Shamir 1979), sealed for their holders and hashed for whoever checks them."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from samaritan.errors import PrivacyError
from samaritan.privacy.secure_sum.agreement import shared_key
from samaritan.privacy.secure_sum.messages import Envelope
from samaritan.privacy.secure_sum.roster import Members
from samaritan.privacy.secure_sum.terms import bind

SEED_BYTES = 16
MASKING_SEED, OWN_MASK = range(2)
"""The place of a share in an envelope."""

_NONCE = bytes(12)  # each key seals one envelope


def seal_shares(
    masking_seed: bytes,
    own_seed: bytes,
    dealer: str,
    private: X25519PrivateKey,
    members: Members,
) -> dict[str, Envelope]:
    """Both seeds of a member in shares, one envelope for each holder.

    Args:
        masking_seed: 16 bytes, behind the dealer's masking key.
        own_seed: 16 bytes, behind the dealer's own mask.
        dealer: Whose seeds they are.
        private: The dealer's sealing key.
        members: Who gets a share; a threshold of them can rebuild a seed.

    Raises:
        PrivacyError: SAM-P219 for a degenerate key of a holder.
    """
    split = [
        Shamir.split(members.threshold, len(members.keys), seed, ssss=False)
        for seed in (masking_seed, own_seed)
    ]
    envelopes = {}
    for place, (holder, keys) in enumerate(members.keys.items()):
        shares = [of_seed[place][1] for of_seed in split]
        route = _route(members, dealer, holder)
        cipher = ChaCha20Poly1305(shared_key(private, keys.sealing, route))
        hashes = (
            hash_share(shares[MASKING_SEED], MASKING_SEED, dealer, holder, members),
            hash_share(shares[OWN_MASK], OWN_MASK, dealer, holder, members),
        )
        sealed = cipher.encrypt(_NONCE, b"".join(shares), route)
        envelopes[holder] = Envelope(sealed=sealed, hashes=hashes)
    return envelopes


def unseal_shares(
    envelope: Envelope, dealer: str, holder: str, private: X25519PrivateKey, members: Members
) -> tuple[bytes, bytes]:
    """The two shares in an envelope: of the masking seed, of the own mask's seed.

    Args:
        envelope: As delivered.
        dealer: Whose seeds are shared.
        holder: For whom.
        private: The holder's sealing key.
        members: Of this attempt.

    Raises:
        PrivacyError: SAM-P213 when it was sealed by or for another, in another attempt or round,
            or holds something else than its hashes say.
    """
    route = _route(members, dealer, holder)
    cipher = ChaCha20Poly1305(shared_key(private, members.keys[dealer].sealing, route))
    try:
        both = cipher.decrypt(_NONCE, envelope.sealed, route)
    except InvalidTag:
        both = b""
    shares = both[:SEED_BYTES], both[SEED_BYTES:]
    hashes = [hash_share(share, i, dealer, holder, members) for i, share in enumerate(shares)]
    if hashes != list(envelope.hashes):
        raise PrivacyError(
            "SAM-P213",
            f"what {dealer} sealed for {holder} cannot be opened or is not what was announced",
            "The server has shown the members different rosters, or that site is faulty; "
            "try again without it.",
        )
    return shares


def hash_share(share: bytes, kind: int, dealer: str, holder: str, members: Members) -> bytes:
    """What the server compares an opened share with; a share has 128 bits nobody can guess."""
    names = dealer.encode(), holder.encode()
    return sha256(bind("share", members.digest, bytes([kind]), *names, share)).digest()


def rebuild_seed(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """A seed of 16 bytes from a threshold of its shares.

    Args:
        shares: By number of the holder; at least a threshold.
        threshold: How many are needed.
    """
    return Shamir.combine(list(shares.items())[:threshold], ssss=False)


def commit(seed: bytes, site: str) -> bytes:
    """Hash of the seed of a member's own mask, which hides its 128 bits."""
    return sha256(bind("own mask seed", site.encode(), seed)).digest()


def _route(members: Members, dealer: str, holder: str) -> bytes:
    return bind("envelope", members.digest, dealer.encode(), holder.encode())
