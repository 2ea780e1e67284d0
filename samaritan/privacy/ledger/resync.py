"""The way out of a ledger that lost records: what others know was spent is charged again."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from samaritan.errors import PrivacyError
from samaritan.files import write_atomically
from samaritan.keys import Identity
from samaritan.lines import line_hash
from samaritan.privacy.cohort import cohort_root
from samaritan.privacy.ledger.book import genesis_fields
from samaritan.privacy.ledger.charges import external_fields, spendings_of
from samaritan.privacy.ledger.folder import ASIDE, load_secret
from samaritan.privacy.ledger.places import locked, read
from samaritan.privacy.ledger.records import Chain, Record, read_record

_Found = dict[str, Record]
"""Records by their head, "number:hash"."""


def resync(folder: Path, source: Path, identity: Identity) -> int:
    """Brings into a ledger what another one, its copy or a backup, knows beyond it.

    Where one of the two continues the other, the longer stands. Otherwise the folder's records
    stand, and every charge that only the other one has is added: a round may then be charged twice,
    none is left out. Of what follows a false line, each charge counts whose own signature holds.
    The source is given the result; what is replaced lies in the folder `aside`.

    Args:
        folder: The ledger.
        source: The other one.
        identity: The site's. Charges that an earlier key of it signed are taken over too.

    Returns:
        How many records the folder gained.

    Raises:
        PrivacyError: SAM-P102 when the ledger is open, SAM-P107 when the two have different
            secrets, SAM-P112 when a cohort cannot be read in either, SAM-P105.
        StorageError: When the disk is full.
    """
    gained = 0
    with locked(folder):
        names = sorted({path.name for place in (folder, source) for path in place.glob("*.jsonl")})
        files = {name: (read(folder / name), read(source / name)) for name in names}
        found = {name: _records(ours) | _records(theirs) for name, (ours, theirs) in files.items()}
        load_secret(
            folder,
            source,
            {
                record.get("secret_hash", "")
                for records in found.values()
                for record in records.values()
                if record["type"] == "genesis"
            },
        )
        for name, (ours, theirs) in files.items():
            joined = _joined(Path(name).stem, ours, theirs, found[name], identity)
            for place, old in ((folder, ours), (source, theirs)):
                if old and not joined.startswith(old):
                    digest = hashlib.sha256(old).hexdigest()[:16]
                    aside = folder / ASIDE / f"{Path(name).stem}-{digest}"
                    write_atomically(aside, old, private=True)
                write_atomically(place / name, joined, private=True)
            gained += joined.count(b"\n") - ours.count(b"\n")
    return gained


def _joined(root: str, ours: bytes, theirs: bytes, found: _Found, identity: Identity) -> bytes:
    """The sound part of the two, and after it whatever else they have."""
    sound, other = (_sound_part(data, identity.public) for data in (ours, theirs))
    content = ours[: sound.size_bytes]
    if theirs[: other.size_bytes].startswith(content):
        sound, content = other, theirs[: other.size_bytes]
    if not sound.records:
        if not found and not ours + theirs:
            return b""
        content = sound.write("genesis", _genesis_again(root, found), identity)
        sound.add(content, identity.public)
    for head, record in found.items():
        if head not in sound.heads():
            fields = {
                **external_fields(spendings_of(record)),
                "stands_for": [head, *record.get("stands_for", [])],
            }
            line = sound.write("external", fields, identity)
            sound.add(line, identity.public)
            content += line
    return content


def _sound_part(data: bytes, public: bytes) -> Chain:
    chain = Chain()
    with contextlib.suppress(ValueError):
        for line in data.splitlines(keepends=True):
            chain.add(line, public)
    return chain


def _records(data: bytes) -> _Found:
    """Every record whose own signature holds, whatever stands around it."""
    found = {}
    for line in data.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, PrivacyError):
            record = read_record(line + b"\n", None)
            external_fields(spendings_of(record))  # what another key signed may be nonsense
            found[f"{record['seq']}:{line_hash(line)}"] = record
    return found


def _genesis_again(root: str, found: _Found) -> Record:
    """A new first record for the patients of an old one."""
    for record in found.values():
        if record["type"] == "genesis" and cohort_root(record.get("pseudonyms", [])) == root:
            return genesis_fields(record["pseudonyms"], record["secret_hash"])
    raise PrivacyError(
        "SAM-P112",
        f"neither ledger says which patients {root}.jsonl is about",
        "Restore the file from another backup. Do not delete it: its patients would be charged as "
        "if they were new.",
    )
