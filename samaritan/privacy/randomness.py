"""Randomness for noise, sampling and masks: a ChaCha20 keystream under a key of the system's.

No seed of an experiment reaches it, nothing stores it, and no two streams are alike. What an
experiment is to repeat takes its randomness elsewhere.
"""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

_KEY_BYTES, _NONCE_BYTES, _WORD_BYTES = 32, 16, 8


class SystemRandom:
    """A stream of numbers that nobody can foresee or draw again."""

    def __init__(self) -> None:
        algorithm = ChaCha20(os.urandom(_KEY_BYTES), os.urandom(_NONCE_BYTES))
        self._stream = Cipher(algorithm, mode=None).encryptor()

    def words(self, count: int) -> np.ndarray:
        """(count,) uint64, each value equally likely."""
        return np.frombuffer(self._stream.update(bytes(_WORD_BYTES * count)), dtype=np.uint64)

    def uniform(self, count: int) -> np.ndarray:
        """(count,) float64 in (0, 1], as fine near 0 as floats are."""
        values: np.ndarray = (self.words(count).astype(np.float64) + 0.5) * 2.0**-64
        return values

    def gaussian(self, count: int) -> np.ndarray:
        """(count,) float64 standard normal numbers, by Box and Muller.

        With 64 random bits for each radius the tails end at 9.5, where a true normal number lies
        once in 10^20 draws.
        """
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(self.uniform(half)))
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
