"""Keys from secrets: HKDF-SHA256, and X25519 between two members."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from samaritan.errors import PrivacyError
from samaritan.privacy.secure_sum.terms import bind


def derive(secret: bytes, label: bytes) -> bytes:
    """A key of 32 bytes from a secret of full entropy, for the purpose that the label names."""
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=label).derive(secret)


def shared_key(private: X25519PrivateKey, other_public: bytes, label: bytes) -> bytes:
    """The key of 32 bytes that two members have for the purpose that the label names.

    Raises:
        PrivacyError: SAM-P219 for a public key of small order, which would fix the key.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(other_public))
    except ValueError:
        raise PrivacyError(
            "SAM-P219",
            f"the public key {other_public.hex()} of a member is degenerate",
            "A working site does not send such a key. Find out whose it is before the next round.",
        ) from None
    return derive(secret, label)


def masking_key(seed: bytes) -> X25519PrivateKey:
    """The private masking key that a seed of 16 bytes stands for."""
    return X25519PrivateKey.from_private_bytes(derive(seed, bind("masking key")))
