"""The file of the base model: there, readable, and the one that the plans mean."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from samaritan.operate.checks.finding import Finding, fine, missing, note
from samaritan.operate.checks.users import READ, User

Tell = Callable[[str], None]
"""Told of work that takes a while."""

_LARGEST_HASHED = 2 * 10**9
_BLOCK = 1 << 24


def checkpoint(
    path: Path | None, wanted: Mapping[str, tuple[str, str]], user: User, settings: str, tell: Tell
) -> Finding:
    """Looks at the checkpoint that settings name.

    Args:
        path: Of the file; None where the settings name none.
        wanted: Name and hash of the base of each study that is to run.
        user: That loads it.
        settings: Name of the file of settings.
        tell: Told how far the hash is.
    """
    what = "checkpoint"
    if path is None:
        if needed := sorted({base for base, _ in wanted.values() if base != "tiny"}):
            return missing(
                what,
                "SAM-N655",
                f"{settings} names none, and a plan needs {', '.join(needed)}",
                f"Fetch it (`samaritan models fetch`) and set `checkpoint` in {settings}.",
            )
        return fine(what, "none is needed" if wanted else "none named; the base tiny needs none")
    if not path.is_file() or path.stat().st_size == 0:
        state = "is empty" if path.is_file() else "does not exist"
        return missing(what, "SAM-N655", f"{path} {state}", f"Mend `checkpoint` in {settings}.")
    if not user.may(path, READ):
        return missing(
            what,
            "SAM-N655",
            f"{path} cannot be read by {user.name}",
            f"Let {user.name} read it, and enter the folders on the way.",
        )
    size = path.stat().st_size
    text = f"{path.name}, {size / 1e6:,.0f} MB"
    if not wanted:
        return fine(what, text)
    if size > _LARGEST_HASHED:
        return note(what, f"{text}; not compared with the plan here, since that takes long")
    found = _sha256(path, size, tell)
    wrong = {study: sha256 for study, (_, sha256) in wanted.items() if sha256 != found}
    if wrong:
        study, sha256 = next(iter(wrong.items()))
        return missing(
            what,
            "SAM-N654",
            f"{path.name} is {found[:16]}, and study {study} has {sha256[:16]}",
            f"Give {settings} the file that the plan was made with.",
        )
    return fine(what, f"{text}, as planned ({found[:16]})")


def _sha256(path: Path, size: int, tell: Tell) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            done += len(block)
            tell(f"reading {path.name}: {done / size:.0%}")
    return digest.hexdigest()
