"""The cases of a study stay those it began with: they are known by hash from the first day.

What was approved was a study on these data. A case may leave it (a person takes the consent back);
none may come, none may change unnoticed, and none moves to another split because others left.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from samaritan.data.datasets import Case
from samaritan.errors import DataError
from samaritan.files import write_atomically
from samaritan.lines import canonical, line_hash
from samaritan.models.checkpoints import file_sha256

Files = tuple[tuple[int, int, int] | None, ...]
"""Size, time of change and number of each file; None for one that is not there."""

_NAMED = 3


def pin_cases(path: Path, cases: Sequence[Case]) -> tuple[str, int]:
    """Compares a study's cases with those it began with; the first call is the beginning.

    Args:
        path: Keeps the person, the split and the hashes of each case through restarts.
        cases: That train and that score now; every file is read once.

    Returns:
        One hash over all cases as they are now, and how many of the first ones are not among them.

    Raises:
        DataError: SAM-D311 when a case has changed or was not there at the beginning, SAM-D312 when
            the file at `path` is damaged.
        StorageError: When it cannot be written.
    """
    now = {
        case.case_id: [
            case.subject_id,
            case.split,
            *(file_sha256(file) for file in (case.image, case.label) if file),
        ]
        for case in cases
    }
    first = _read(path)
    if first is None:
        write_atomically(path, canonical(now), private=True)
        first = now
    added = sorted(set(now) - set(first))
    changed = sorted(name for name in set(now) & set(first) if now[name] != first[name])
    if added or changed:
        told = [f"{len(added)} came ({_some(added)})"] if added else []
        told += [f"{len(changed)} changed ({_some(changed)})"] if changed else []
        raise DataError(
            "SAM-D311",
            f"the cases are not those the study began with: {', '.join(told)}",
            "Bring them back as they were, with their persons and splits, or ask for a new plan, "
            f"which is a new study. If the hospital decides that this one goes on, remove {path}.",
        )
    return line_hash(canonical(now)), len(set(first) - set(now))


def pinned_splits(path: Path) -> dict[str, str]:
    """The split of each case when the study began; nothing before it did.

    Raises:
        DataError: SAM-D312.
    """
    return {name: split for name, (_, split, *_) in (_read(path) or {}).items()}


def known_persons(path: Path, cases: Iterable[Case]) -> tuple[str, ...]:
    """The persons of cases under every name that any study here has known their images by.

    A budget belongs to a person. Whoever lists the same images under new names for a new study
    would otherwise begin with nothing spent. An image that was written anew is not recognized.

    Args:
        path: As for `pin_cases`, after it; other studies keep theirs in the folders beside.
        cases: Of the study.

    Raises:
        DataError: SAM-D312.
    """
    own = _read(path) or {}
    images = {own[case.case_id][2] for case in cases}
    studies = path.parent.parent.glob(f"*/{path.name}")
    kept = (entry for study in studies for entry in (_read(study) or {}).values())
    return tuple(sorted({person for person, _, image, *_ in kept if image in images}))


def look(folder: Path, cases: Iterable[Case]) -> Files:
    """What tells without reading whether a list of cases, or a file of theirs, was touched."""
    lists = [path for path in sorted(folder.glob("*.*")) if path.suffix in (".csv", ".json")]
    files = sorted(file for case in cases for file in (case.image, case.label) if file)
    return tuple(_looked(path) for path in [*lists, *files])


def _looked(path: Path) -> tuple[int, int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_size, found.st_mtime_ns, found.st_ino
    return None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


def _read(path: Path) -> dict[str, list[str]] | None:
    try:
        first: dict[str, list[str]] = json.loads(path.read_text("utf-8"))
        if not all(len(entry) > 2 for entry in first.values()):
            raise ValueError("a case without its parts")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(
            "SAM-D312",
            f"{path} is damaged; it holds the hashes of the cases that the study began with",
            "Compare the cases with a backup, then remove the file: the present ones are taken.",
        ) from error
    return first
