"""Masks: keystreams that two members share with opposite signs, or that one member adds alone."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from samaritan.privacy.secure_sum.agreement import derive, shared_key
from samaritan.privacy.secure_sum.terms import bind

_CHUNK = 2**14  # numbers; keystream and sum stay in the processor's cache
_ZEROS = bytes(4 * _CHUNK)


def own_mask_key(seed: bytes, digest: bytes, site: str) -> bytes:
    """Key of the mask that a member adds alone.

    Args:
        seed: 16 bytes.
        digest: Of the roster.
        site: The member.
    """
    return derive(seed, bind("own mask", digest, site.encode()))


def pair_mask_key(
    private: X25519PrivateKey, other_public: bytes, digest: bytes, pair: tuple[str, str]
) -> bytes:
    """Key of the mask of two members; both compute the same, in whichever order they are named.

    Args:
        private: Masking key of one.
        other_public: Masking key of the other.
        digest: Of the roster.
        pair: Their names.
    """
    label = bind("pair mask", digest, *(name.encode() for name in sorted(pair)))
    return shared_key(private, other_public, label)


def add_mask(vector: NDArray[np.uint32], key: bytes, sign: int) -> None:
    """Adds a keystream of ChaCha20 to a vector in place, modulo 2^32.

    Args:
        vector: (length,) little-endian uint32.
        key: 32 bytes, used for nothing else; the nonce is therefore 0.
        sign: 1 to add, -1 to subtract.
    """
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    buffer = bytearray(len(_ZEROS))
    keystream = np.frombuffer(buffer, dtype="<u4")
    combine = np.add if sign > 0 else np.subtract
    for start in range(0, len(vector), _CHUNK):
        part = vector[start : start + _CHUNK]
        stream.update_into(_ZEROS, buffer)
        combine(part, keystream[: len(part)], out=part)
