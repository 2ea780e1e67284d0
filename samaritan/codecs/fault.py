"""The one exception of this package."""

from __future__ import annotations


class WireError(ValueError):
    """A message that cannot be written or read, with a short reason.

    The reason never holds text of the sender; names in it are those of the receiver.
    """
