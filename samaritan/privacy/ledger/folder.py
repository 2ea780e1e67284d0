"""Where a ledger lies: one file per cohort in a locked folder, and the same files in a second one.

A line reaches the folder first and its copy next, and both disks before anything is done on its
strength. What a crash leaves behind is therefore a copy that lacks one line, or a last line that is
cut short; anything else is somebody's doing, or a broken disk, and is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Set
from pathlib import Path

from samaritan.errors import PrivacyError
from samaritan.files import write_atomically
from samaritan.keys import Identity
from samaritan.privacy.ledger.places import read
from samaritan.privacy.ledger.records import Chain, LineError, read_chain

OUTBOX, ASIDE, SECRET = "outbox", "aside", "secret"
_SECRET_BYTES = 32
_log = logging.getLogger("samaritan.site")


def load_chains(folder: Path, copy: Path | None, identity: Identity) -> dict[str, Chain]:
    """Every cohort's records, checked from the first to the last and compared with the copy.

    A copy that lacks lines is completed, and a last line that was cut short is moved aside and
    noted in a record.

    Returns:
        By the root of the cohort.

    Raises:
        PrivacyError: SAM-P104 for a line that is not as it was written, SAM-P103 when the copy has
            records that the folder lacks, SAM-P105 when a file cannot be read or written.
        StorageError: When the disk is full.
    """
    places = [place for place in (folder, copy) if place is not None]
    found = {}
    for path in sorted({path.name for place in places for path in place.glob("*.jsonl")}):
        ours, theirs = (read(place / path) for place in (folder, copy or folder))
        found[path] = _checked(folder / path, ours, identity.public), ours, theirs
        _require_newest(folder, copy, ours, theirs)
    chains = {}
    for name, (chain, ours, theirs) in found.items():
        whole = _mended(folder / name, chain, ours, identity)
        if copy is not None and whole != theirs:
            behind = whole.count(b"\n") - theirs.count(b"\n")
            _log.warning("the copy of ledger %s lacked %d lines; it has them now", name, behind)
            write_atomically(copy / name, whole, private=True)
        if chain.records:
            chains[chain.genesis["cohort_root"]] = chain
    return chains


def load_secret(folder: Path, copy: Path | None, expected: Set[str]) -> bytes:
    """The key of the pseudonyms, made with the first ledger and never changed.

    Args:
        folder: Of the ledger.
        copy: The second folder.
        expected: What the ledger says of it, once for each cohort.

    Raises:
        PrivacyError: SAM-P107 when it is missing or another than that of the ledger, or the copy's.
    """
    places = [place for place in (folder, copy) if place is not None]
    known = {secret for place in places if (secret := read(place / SECRET))}
    if not known:
        known = {os.urandom(_SECRET_BYTES)}
    if len(known) != 1 or not expected <= {secret_hash(secret) for secret in known}:
        raise PrivacyError(
            "SAM-P107",
            f"the file {SECRET} in {folder} or its copy is missing or belongs to another ledger",
            "Restore it from the backup: without it, patients would be charged as if they were "
            "new.",
        )
    (secret,) = known
    for place in places:
        if not (place / SECRET).exists():
            write_atomically(place / SECRET, secret, private=True)
    return secret


def secret_hash(secret: bytes) -> str:
    """What a genesis says of the secret."""
    return hashlib.sha256(secret).hexdigest()


def whole_lines(data: bytes) -> bytes:
    """Without a last line that has no end."""
    return data[: data.rfind(b"\n") + 1]


def rolled_back(what: str, folder: Path, copy: Path | None) -> PrivacyError:
    """The error for a ledger that is older than what others know of it."""
    return PrivacyError(
        "SAM-P103",
        f"LEDGER ROLLED BACK: {what}",
        "What was spent stays spent: run `samaritan privacy ledger resync "
        f"{folder} --from {copy or 'COPY_DIR'}`, which charges the missing records.",
    )


def _checked(path: Path, data: bytes, public: bytes) -> Chain:
    """The whole lines of a ledger, and the last too if it lacks nothing but its end."""
    whole = whole_lines(data)
    try:
        chain = read_chain(whole, public, path.stem)
    except LineError as error:
        raise PrivacyError(
            "SAM-P104",
            f"line {error.number} of {path} is not as it was written: {error.reason}",
            "Leave the file as it is and run `samaritan privacy ledger resync "
            f"{path.parent} --from COPY_DIR` with a copy or backup of the ledger.",
        ) from error
    if len(whole) < len(data):
        with contextlib.suppress(ValueError):
            chain.add(data[len(whole) :] + b"\n", public)
    return chain


def _require_newest(folder: Path, copy: Path | None, ours: bytes, theirs: bytes) -> None:
    ours, theirs = whole_lines(ours), whole_lines(theirs)
    if ours.startswith(theirs):
        return
    behind = theirs.count(b"\n") - ours.count(b"\n")
    if theirs.startswith(ours):
        raise rolled_back(f"{folder} lacks {behind} records that {copy} has", folder, copy)
    raise rolled_back(f"{folder} and {copy} hold different records", folder, copy)


def _mended(path: Path, chain: Chain, data: bytes, identity: Identity) -> bytes:
    """The file's content once its last line is whole; a fragment is kept beside it, never lost."""
    if len(data) == chain.size_bytes:
        return data
    whole, fragment = data[: chain.size_bytes], data[chain.size_bytes :]
    if not fragment:  # only the end of the last line was missing
        whole = data + b"\n"
        _log.warning("the last line of ledger %s had no end; it counts", path.name)
    else:
        digest = hashlib.sha256(fragment).hexdigest()
        aside = path.parent / ASIDE / f"{path.stem}-{digest[:16]}"
        write_atomically(aside, fragment, private=True)
        if chain.records:
            fields = {"fragment_sha256": digest, "fragment_bytes": len(fragment)}
            line = chain.write("repair", fields, identity)
            chain.add(line, identity.public)
            whole += line
        _log.warning("the last line of ledger %s was cut short; it is in %s", path.name, aside)
    write_atomically(path, whole, private=True)
    return whole
