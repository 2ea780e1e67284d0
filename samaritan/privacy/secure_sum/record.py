"""What a site has taken part in, so that no server gets a second answer, after a restart neither.

A sum over all sites and a second sum over all but one would differ by that one's update. A site may
therefore mask its update in several attempts at a round, but opens shares in only one of them.
"""

from __future__ import annotations

import json
from pathlib import Path

from samaritan.errors import PrivacyError
from samaritan.files import write_atomically
from samaritan.privacy.secure_sum.terms import Terms

_Entry = tuple[str, str, int, int]  # answer, run, round, attempt


class Record:
    """Entries in memory and, line by line, in a file.

    Args:
        path: JSON lines, made at the first entry; without it the record ends with the process.

    Raises:
        PrivacyError: SAM-P207 when the file cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: list[_Entry] = []
        if path is not None and path.exists():
            self._entries = _read(path)

    def note(self, answer: str, terms: Terms) -> None:
        """Notes an answer that is about to be given.

        Raises:
            PrivacyError: SAM-P205 when it was given in this attempt, SAM-P206 when this round was
                opened in any.
            StorageError: When the file cannot be written; the answer must not be given.
        """
        if ("opening", terms.run, terms.round) in (entry[:3] for entry in self._entries):
            raise PrivacyError(
                "SAM-P206",
                f"this site has opened its shares of round {terms.round} before",
                "Two sums of one round could be subtracted. Go on with the next round.",
            )
        entry = (answer, terms.run, terms.round, terms.attempt)
        if entry in self._entries:
            raise PrivacyError(
                "SAM-P205",
                f"this site has given its {answer} in attempt {terms.attempt} of round "
                f"{terms.round} before",
                "Try the round again under the next number of attempt.",
            )
        lines = [json.dumps(known) + "\n" for known in (*self._entries, entry)]
        if self._path is not None:
            write_atomically(self._path, "".join(lines).encode(), private=True)
        self._entries.append(entry)


def _read(path: Path) -> list[_Entry]:
    try:
        entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if any([type(value) for value in entry] != [str, str, int, int] for entry in entries):
            raise ValueError
    except (OSError, ValueError, TypeError):
        raise PrivacyError(
            "SAM-P207",
            f"{path} is no readable record of secure aggregation",
            "Restore it from the backup. Without it the site could answer a round twice.",
        ) from None
    return [tuple(entry) for entry in entries]
