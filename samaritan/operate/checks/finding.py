"""What a check found, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from samaritan.errors import SamaritanError


@dataclass(frozen=True)
class Finding:
    """One line of `samaritan doctor`.

    Attributes:
        what: Was looked at.
        ok: True fine, False missing, None worth knowing.
        found: In words, with the value.
        hint: What to do; empty where nothing is to be done.
        code: Of the fault in docs/errors.md; empty where there is none.
    """

    what: str
    ok: bool | None
    found: str
    hint: str = ""
    code: str = ""


def fine(what: str, found: str) -> Finding:
    """Something that is as it must be."""
    return Finding(what, True, found)


def note(what: str, found: str, hint: str = "", code: str = "") -> Finding:
    """Something worth knowing that stops nothing."""
    return Finding(what, None, found, hint, code)


def missing(what: str, code: str, found: str, hint: str) -> Finding:
    """Something without which it cannot work, or must not."""
    return Finding(what, False, found, hint, code)


def fault(what: str, error: SamaritanError) -> Finding:
    """An error that would stop a process when it starts."""
    return missing(what, error.code, error.message, error.hint)
