"""What is wrong with a ledger, for somebody who only reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from samaritan.privacy.cohort import cohort_root
from samaritan.privacy.ledger.folder import SECRET, secret_hash, whole_lines
from samaritan.privacy.ledger.places import read
from samaritan.privacy.ledger.records import Chain, LineError, read_chain


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        file: Its name in the folder.
        line: From 1; 0 for the file as a whole.
        what: As a sentence without its end.
    """

    file: str
    line: int
    what: str


def verify(folder: Path, public: bytes, copy: Path | None = None) -> list[Finding]:
    """Checks all that can be checked without changing anything; a site may be at work meanwhile.

    Args:
        folder: Of the ledger.
        public: The key of the site.
        copy: The second folder, to compare.

    Returns:
        Nothing when all is well. Only the first false line of a file is named, as nothing can be
        said of those after it.

    Raises:
        PrivacyError: SAM-P105 when a file cannot be read.
    """
    findings = []
    secret = read(folder / SECRET)
    paths = sorted(folder.glob("*.jsonl"))
    for path in paths:
        data = read(path)
        try:
            chain = read_chain(whole_lines(data), public, path.stem)
        except LineError as error:
            findings.append(Finding(path.name, error.number, error.reason))
            continue
        if len(whole_lines(data)) < len(data):
            findings.append(Finding(path.name, len(chain.records) + 1, "it has no end"))
        if chain.records:
            findings += [Finding(path.name, 1, what) for what in _genesis_faults(chain, secret)]
    if copy is not None:
        for path in sorted({*paths, *(folder / other.name for other in copy.glob("*.jsonl"))}):
            if read(path) != read(copy / path.name):
                findings.append(Finding(path.name, 0, "folder and copy differ"))
    return findings


def _genesis_faults(chain: Chain, secret: bytes) -> list[str]:
    faults = []
    if cohort_root(chain.genesis["pseudonyms"]) != chain.genesis["cohort_root"]:
        faults.append("the patients are not those of its root")
    if secret_hash(secret) != chain.genesis["secret_hash"]:
        faults.append("the secret is missing or another")
    return faults
