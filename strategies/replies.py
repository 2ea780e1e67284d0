"""Replies of sites: read with suspicion, one by one, so that no site can stop the others."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from flwr.app import Message

from samaritan.codecs import WireError, decode
from samaritan.config import CodecConfig
from samaritan.messages import Answer
from samaritan.models.adapter import AdapterState
from samaritan.models.bases import state_sha256
from samaritan.wire import message_bytes, read_answer

_MOST = 1e9
_RANGES = {
    "num-examples": (sys.float_info.min, _MOST),
    "train-loss": (-_MOST, _MOST),
    "steps": (0.0, _MOST),
    "num-cases": (0.0, _MOST),
    "dice": (0.0, 1.0),
    "hd95-mm": (0.0, _MOST),
    "nsd": (0.0, 1.0),
    "seconds": (0.0, _MOST),
}
"""Every metric the server reads, with the lowest and highest value it believes."""

_LARGEST = 1e6
"""No weight of a network moves this far; larger numbers would overflow in what follows."""


_FLOWER_ERRORS = {
    3: "the question was lost on the way",
    4: "the answer was lost on the way",
    5: "the site went offline",
    7: "the app bundle was refused",
    8: "its courier died",
}
"""What Flower's error codes mean here."""

LOST = frozenset(f"failed: {_FLOWER_ERRORS[code]}" for code in (3, 4))
"""Statuses of sites that are well: a line broke while a message was on it."""

_LEDGER = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Reply:
    """One site's answer.

    Attributes:
        status: "ok", or what is wrong with the answer; never free text of the site. It begins with
            "failed" where the site could not answer, with "refused" where the answer is wrong, and
            with "late" where there is none, or one of another round.
        metrics: Numbers the site sent, where the answer is usable.
        size_bytes: Serialised size.
        update_sha256: Hash of the update, where it is usable.
        ledger: Where the site's privacy ledger stands, if it says so.
    """

    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    size_bytes: int = 0
    update_sha256: str = ""
    ledger: str = ""

    @property
    def ok(self) -> bool:
        """Whether the answer can be used."""
        return self.status == "ok"


@dataclass(frozen=True)
class Expected:
    """What an update must be.

    Attributes:
        server_round: The round it answers.
        state_sha256: The state it is to be added to.
        shapes: Shape of every tensor by name.
        codec: How it is to be written.
        former_sha256: Hash of the site's former update; the same again is a replay.
        metrics: Numbers that must be with it.
    """

    server_round: int
    state_sha256: str
    shapes: Mapping[str, tuple[int, ...]]
    codec: CodecConfig
    former_sha256: str = ""
    metrics: tuple[str, ...] = ("num-examples", "train-loss")


def read_train_reply(message: Message, expected: Expected) -> tuple[Reply, AdapterState | None]:
    """Checks an answer to a training message: round, names, shapes, values and its weight.

    Returns:
        What there is to note of the answer, and its update if it is usable.
    """
    size = message_bytes(message)
    if message.has_error():
        return Reply(error_status(message)), None
    try:
        answer = read_answer(message)
        if answer.payload is None:
            return Reply("refused: no update", size_bytes=size), None
        update, header = decode(answer.payload, expected.shapes, expected.codec)
        metrics = _numbers(answer)
        fault = _unlike(update, header, expected) or _out_of_range(metrics, expected.metrics)
    except WireError as error:
        return Reply(f"refused: {error}", size_bytes=size), None
    except Exception as error:  # whatever a site sends, the round goes on
        return Reply(f"refused: unreadable ({type(error).__name__})", size_bytes=size), None
    sha256 = state_sha256(update)
    if not fault and sha256 == expected.former_sha256:
        fault = "refused: the site's former update again"
    if fault:
        return Reply(fault, size_bytes=size), None
    return Reply("ok", metrics, size, sha256, ledger_of(answer)), update


def read_masked_reply(message: Message) -> tuple[Reply, bytes]:
    """Checks what comes beside a masked update; the update itself cannot be looked at.

    Returns:
        What there is to note of the answer, and the masked update; empty bytes where there is none.
    """
    if message.has_error():
        return Reply(error_status(message)), b""
    size = message_bytes(message)
    try:
        answer = read_answer(message)
        payload, metrics = answer.payload, _numbers(answer)
    except Exception as error:
        return Reply(f"refused: unreadable ({type(error).__name__})", size_bytes=size), b""
    if not payload:
        return Reply("refused: no update", size_bytes=size), b""
    if fault := _out_of_range(metrics, ("num-examples",)):
        return Reply(fault, size_bytes=size), b""
    sha256 = hashlib.sha256(payload).hexdigest()
    return Reply("ok", metrics, size, sha256, ledger_of(answer)), payload


def read_evaluate_reply(message: Message) -> Reply:
    """Checks an answer to an evaluation message: scores between 0 and 1, a count of cases."""
    size = message_bytes(message)
    if message.has_error():
        return Reply(error_status(message))
    try:
        metrics = _numbers(read_answer(message))
    except Exception as error:
        return Reply(f"refused: unreadable ({type(error).__name__})", size_bytes=size)
    fault = _out_of_range(metrics, ("num-cases",))
    return replace(Reply(fault or "ok", size_bytes=size), metrics={} if fault else metrics)


def ledger_of(answer: Answer) -> str:
    """Where a site says its privacy ledger stands; empty if it does not say so."""
    text = answer.texts.get("ledger", "")
    return text if _LEDGER.fullmatch(text) else ""


def _numbers(answer: Answer) -> dict[str, float]:
    """The metrics the server has a use for; a name a site made up goes nowhere."""
    return {name: float(answer.numbers[name]) for name in _RANGES if name in answer.numbers}


def _out_of_range(metrics: Mapping[str, float], needed: Sequence[str]) -> str | None:
    for name in needed:
        if name not in metrics:
            return f"refused: {name} is missing"
    for name, value in metrics.items():
        low, high = _RANGES[name]
        if not low <= value <= high:  # NaN is nowhere
            return f"refused: {name} is {value:g}"
    return None


def _unlike(update: AdapterState, header: Mapping[str, str], expected: Expected) -> str | None:
    """The first thing wrong with an update."""
    if header.get("round") != str(expected.server_round):
        return "late: an update of another round"
    if header.get("state") != expected.state_sha256:
        return "refused: trained from another adapter"
    for name, value in update.items():
        largest = value.abs().max().item() if value.numel() else 0.0
        if largest > _LARGEST:
            return f"refused: {name} moves by {largest:.0e}"
    return None


def error_reference(message: Message) -> str:
    """Under what a site's own log has the whole text of its error; empty where it names none."""
    found = re.search(r"reference ([0-9a-f]{8})\b", message.error.reason or "")
    return found[1] if found else ""


def error_status(message: Message) -> str:
    """The error code in a site's answer, or what Flower says of the site; no other text of it."""
    code = re.search(r"SAM-[A-Z]\d{3}", message.error.reason or "")
    number = message.error.code
    return f"failed: {code[0] if code else _FLOWER_ERRORS.get(number, f'error {number}')}"
