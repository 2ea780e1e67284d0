"""Replies of sites: read with suspicion, one by one, so that no site can stop the others."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from flwr.app import Message

from samaritan.errors import SamaritanError
from samaritan.models.adapter import AdapterState, require_like
from samaritan.wire import ARRAYS, METRICS, from_arrays, message_bytes

_MOST_EXAMPLES = 1e9


@dataclass(frozen=True)
class Reply:
    """One site's answer.

    Attributes:
        node_id: Flower's id of the site's node.
        status: "ok", or what is wrong with the answer; never free text of the site.
        metrics: Numbers the site sent.
        size_bytes: Serialised size.
    """

    node_id: int
    status: str
    metrics: dict[str, float] = field(default_factory=dict)
    size_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether the answer can be used."""
        return self.status == "ok"


def read_train_reply(
    message: Message, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Reply, AdapterState | None]:
    """Checks an answer to a training message: names, shapes, finite values and its weight.

    Returns:
        What there is to note of the answer, and its update if it is usable.
    """
    node_id, size = message.metadata.src_node_id, message_bytes(message)
    if message.has_error():
        return Reply(node_id, _error_status(message)), None
    try:
        update = from_arrays(message.content.array_records[ARRAYS])
        metrics = _numbers(message)
        require_like(update, shapes)
    except SamaritanError as fault:
        return Reply(node_id, f"refused: {fault.message}", size_bytes=size), None
    except Exception as fault:  # whatever a site sends, the round goes on
        return Reply(node_id, f"refused: unreadable ({type(fault).__name__})", {}, size), None
    examples = metrics.get("num-examples", math.nan)
    if not 0 < examples < _MOST_EXAMPLES:
        return Reply(node_id, f"refused: num-examples is {examples}", metrics, size), None
    if not math.isfinite(metrics.get("train-loss", math.nan)):
        return Reply(node_id, "refused: train-loss is no finite number", metrics, size), None
    return Reply(node_id, "ok", metrics, size), update


def read_evaluate_reply(message: Message) -> Reply:
    """Checks an answer to an evaluation message: scores between 0 and 1, a count of cases."""
    node_id, size = message.metadata.src_node_id, message_bytes(message)
    if message.has_error():
        return Reply(node_id, _error_status(message))
    try:
        metrics = _numbers(message)
    except Exception as fault:
        return Reply(node_id, f"refused: unreadable ({type(fault).__name__})", size_bytes=size)
    cases, dice = metrics.get("num-cases", math.nan), metrics.get("dice", 0.0)
    if not 0 <= cases < _MOST_EXAMPLES or not 0 <= dice <= 1:
        return Reply(node_id, f"refused: dice {dice} over {cases} cases", metrics, size)
    return Reply(node_id, "ok", metrics, size)


def _numbers(message: Message) -> dict[str, float]:
    return {k: float(v) for k, v in message.content.metric_records[METRICS].items()}  # type: ignore[arg-type]


def _error_status(message: Message) -> str:
    """The error code in a site's answer, never the rest of the text."""
    code = re.search(r"SAM-[A-Z]\d{3}", message.error.reason or "")
    return f"failed: {code[0] if code else f'error {message.error.code}'}"
