"""The lines of a ledger: what each says, how it is signed, and what makes one false.

A line is one JSON object with sorted keys and without spaces, whose numbers with a fraction are
texts. It names the SHA-256 of the line before, and is signed with the key of the site: no line can
be changed, taken out or moved without all that follow being signed again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from samaritan.keys import Identity, is_signed
from samaritan.lines import canonical, line_hash

Record = dict[str, Any]

_SCHEMA = 1
_PURPOSE = b"samaritan privacy ledger\n"
_TYPES = ("genesis", "reserve", "commit", "external", "repair", "close")
_ALL = {"seq", "prev_hash", "ledger_id", "cohort_root", "time_utc"}
_SEEN: set[bytes] = set()
"""Digests of lines whose signature held: a site opens its ledger in every round."""


class LineError(ValueError):
    """A line that is not as it was written.

    Args:
        number: From 1.
        reason: Why, as the end of a sentence.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"line {number}: {reason}")
        self.number = number
        self.reason = reason


@dataclass
class Chain:
    """The records of one cohort so far.

    Attributes:
        records: In order; the first is the genesis.
        hashes: SHA-256 of each line, in hexadecimal.
        size_bytes: Of the file.
    """

    records: list[Record] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)
    size_bytes: int = 0

    @property
    def genesis(self) -> Record:
        """Names the cohort."""
        return self.records[0]

    @property
    def head(self) -> str:
        """Number and hash of the last record: whoever keeps it can tell an older ledger."""
        return f"{len(self.hashes) - 1}:{self.hashes[-1]}"

    def heads(self) -> set[str]:
        """Every head this chain has had, and those of lost records that were charged again."""
        own = {f"{number}:{value}" for number, value in enumerate(self.hashes)}
        return own.union(*(record.get("stands_for", []) for record in self.records))

    def write(self, kind: str, fields: Mapping[str, Any], identity: Identity) -> bytes:
        """The line that would come next, signed; the chain does not change."""
        first = not self.records
        record = {
            **fields,
            "schema": _SCHEMA,
            "type": kind,
            "ledger_id": fields["ledger_id"] if first else self.genesis["ledger_id"],
            "cohort_root": fields["cohort_root"] if first else self.genesis["cohort_root"],
            "seq": len(self.records),
            "prev_hash": self._previous(),
            "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "key_id": identity.public.hex(),
        }
        return canonical({**record, "signature": identity.sign(_signed(record)).hex()}) + b"\n"

    def add(self, line: bytes, public: bytes) -> None:
        """Takes a line up after checking it.

        Raises:
            ValueError: With the reason why it does not belong here.
        """
        record = read_record(line, public)
        kind = record["type"]
        if (kind == "genesis") != (not self.records):
            raise ValueError(f"a {kind} record stands in the wrong place")
        if record["seq"] != len(self.records):
            raise ValueError(f"it has number {record['seq']} where {len(self.records)} is due")
        if record["prev_hash"] != self._previous():
            raise ValueError("it does not follow the line before")
        self.records.append(record)
        self.hashes.append(line_hash(line))
        self.size_bytes += len(line)

    def _previous(self) -> str:
        return self.hashes[-1] if self.hashes else "0" * 64


def read_chain(data: bytes, public: bytes, root: str) -> Chain:
    """A chain from whole lines, which must be about the cohort of that root.

    Raises:
        LineError: For the first line that is not as it was written.
    """
    chain = Chain()
    for number, line in enumerate(data.splitlines(keepends=True), start=1):
        try:
            chain.add(line, public)
        except ValueError as error:
            raise LineError(number, str(error)) from error
    if chain.records and chain.genesis["cohort_root"] != root:
        raise LineError(1, "it is about other patients than the file's name says")
    return chain


def read_record(line: bytes, public: bytes | None) -> Record:
    """A record by itself, if it is signed.

    Args:
        line: With its end.
        public: The key it must be signed with; None for the one it names.

    Raises:
        ValueError: With the reason why it is none.
    """
    try:
        record: Record = json.loads(line)
        key, signature = bytes.fromhex(record["key_id"]), bytes.fromhex(record["signature"])
        known = record["schema"] == _SCHEMA and record["type"] in _TYPES and record.keys() >= _ALL
        whole = line == canonical(record) + b"\n"
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError("it is damaged") from None
    if not (known and whole):
        raise ValueError("it is damaged, or of another version")
    if public not in (None, key):
        raise ValueError("it is signed with another key than this site's")
    digest = hashlib.sha256(line).digest()
    if digest not in _SEEN:
        if not is_signed(key, _signed(record), signature):
            raise ValueError("its signature does not match")
        _SEEN.add(digest)
    return record


def _signed(record: Record) -> bytes:
    """The part of a record that its signature covers."""
    return _PURPOSE + canonical({k: v for k, v in record.items() if k != "signature"})


def hash_of(head: str) -> str:
    """A head without its number, which would tell whether its members were in a study before."""
    return head.rpartition(":")[2]
