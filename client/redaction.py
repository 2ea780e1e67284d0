"""What a server learns of a fault at a site: a code, and a reference to the site's own log."""

from __future__ import annotations

import logging
import uuid

from samaritan.errors import SamaritanError

UNKNOWN = "SAM-F299"
"""Of a fault that has no code."""

_log = logging.getLogger("samaritan.site")


class RedactedError(Exception):
    """A fault that may leave a site.

    Args:
        code: Of the fault.
        reference: Drawn at random; the site's log has it beside the whole text.
    """

    def __init__(self, code: str, reference: str) -> None:
        super().__init__(code, reference)
        self.code = code
        self.reference = reference

    def __str__(self) -> str:
        return f"{self.code} reference {self.reference} in the site's log"


def redact(error: Exception) -> RedactedError:
    """Writes a fault to the site's log and returns what may leave; that itself for one that may."""
    if isinstance(error, RedactedError):
        return error
    reference = uuid.uuid4().hex[:8]
    _log.error("reference %s", reference, exc_info=error)
    code = error.redacted() if isinstance(error, SamaritanError) else UNKNOWN
    return RedactedError(code, reference)
