"""A site does not train with a mechanism that its own audit contradicts."""

from __future__ import annotations

import functools
import logging

from samaritan.errors import PrivacyError
from samaritan.privacy.audit.claim import claim_of_budget
from samaritan.privacy.audit.verdict import audit_mechanism

_log = logging.getLogger("samaritan.site")


@functools.cache
def require_sound_mechanism() -> None:
    """Audits the installed mechanism, once in a process, with synthetic patients; in seconds.

    Raises:
        PrivacyError: SAM-P405 when the audit finds more leakage than is claimed.
    """
    audit = audit_mechanism(claim_of_budget())
    if audit.verdict == "VIOLATION":
        raise PrivacyError(
            "SAM-P405",
            f"the self-audit of the mechanism found a violation: {'; '.join(audit.violations)}",
            "Do not train with this installation. `samaritan audit privacy` shows all of it.",
        )
    _log.info("self-audit of the mechanism: %s", audit.verdict)
