"""The file of a plan: signed, whole, and not over."""

from __future__ import annotations

from pathlib import Path

from samaritan.errors import SamaritanError
from samaritan.operate.checks.finding import Finding, fault, note
from samaritan.plan import Plan, read_plan, require_current


def current_plan(what: str, path: Path, signer: bytes) -> Plan | Finding:
    """A plan on which one may work today; else what is wrong with it.

    Args:
        what: Name of the check.
        path: Of the file.
        signer: Public key that signs plans.
    """
    try:
        plan = read_plan(path, signer).plan
    except SamaritanError as error:
        return fault(what, error)
    try:
        require_current(plan)
    except SamaritanError as error:  # it was a study, and is none any more
        return note(what, error.message, error.hint, error.code)
    return plan
