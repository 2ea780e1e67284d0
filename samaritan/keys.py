"""A site's identity: an Ed25519 key pair of its own, whose public half the other sites know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from samaritan.errors import PrivacyError
from samaritan.files import write_atomically


@dataclass(frozen=True)
class Identity:
    """A key that signs.

    Attributes:
        private: Never leaves the site.
    """

    private: Ed25519PrivateKey

    @property
    def public(self) -> bytes:
        """The 32 bytes that others pin."""
        return self.private.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """A signature of 64 bytes; say in the message what it is for."""
        return self.private.sign(message)


def load_identity(path: Path) -> Identity:
    """The identity in a file.

    Raises:
        PrivacyError: SAM-P301 when it holds no key, or is not there.
        PermissionError: When this user may not read it.
    """
    try:
        return Identity(Ed25519PrivateKey.from_private_bytes(path.read_bytes()))
    except PermissionError:  # nothing is wrong with the key
        raise
    except (OSError, ValueError) as error:
        raise PrivacyError(
            "SAM-P301",
            f"{path} holds no readable key",
            "Restore it from the backup. A new key must be made known to all others.",
        ) from error


def make_identity(path: Path) -> Identity:
    """The identity in a file, made there at the first call; only its owner can read the file.

    Raises:
        PrivacyError: SAM-P301 when the file holds no key.
        StorageError: When it cannot be written.
    """
    if path.exists():
        return load_identity(path)
    made = Ed25519PrivateKey.generate()
    write_atomically(path, made.private_bytes_raw(), private=True)
    return Identity(made)


def is_signed(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether a signature of the message was made by the owner of a public key."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
