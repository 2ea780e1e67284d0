"""Replies of sites: read with suspicion, one by one, so that no site can stop the others."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Message

from samaritan.models.adapter import AdapterState
from samaritan.wire import ARRAYS, METRICS, from_arrays, message_bytes

_MOST = 1e9
_RANGES = {
    "num-examples": (sys.float_info.min, _MOST),
    "train-loss": (-_MOST, _MOST),
    "steps": (0.0, _MOST),
    "num-cases": (0.0, _MOST),
    "dice": (0.0, 1.0),
    "seconds": (0.0, _MOST),
}
"""Every metric the server reads, with the lowest and highest value it believes."""


@dataclass(frozen=True)
class Reply:
    """One site's answer.

    Attributes:
        node_id: Flower's id of the site's node.
        status: "ok", or what is wrong with the answer; never free text of the site.
        metrics: Numbers the site sent, where the answer is usable.
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
        fault = _unlike(update, shapes) or _out_of_range(metrics, ("num-examples", "train-loss"))
    except Exception as error:  # whatever a site sends, the round goes on
        return Reply(node_id, f"refused: unreadable ({type(error).__name__})", {}, size), None
    if fault:
        return Reply(node_id, f"refused: {fault}", {}, size), None
    return Reply(node_id, "ok", metrics, size), update


def read_evaluate_reply(message: Message) -> Reply:
    """Checks an answer to an evaluation message: scores between 0 and 1, a count of cases."""
    node_id, size = message.metadata.src_node_id, message_bytes(message)
    if message.has_error():
        return Reply(node_id, _error_status(message))
    try:
        metrics = _numbers(message)
    except Exception as error:
        return Reply(node_id, f"refused: unreadable ({type(error).__name__})", size_bytes=size)
    fault = _out_of_range(metrics, ("num-cases",))
    if fault:
        return Reply(node_id, f"refused: {fault}", size_bytes=size)
    return Reply(node_id, "ok", metrics, size)


def _numbers(message: Message) -> dict[str, float]:
    """The metrics the server has a use for; a name a site made up goes nowhere."""
    record = message.content.metric_records[METRICS]
    return {name: float(record[name]) for name in _RANGES if name in record}  # type: ignore[arg-type]


def _out_of_range(metrics: Mapping[str, float], needed: Sequence[str]) -> str | None:
    for name in needed:
        if name not in metrics:
            return f"{name} is missing"
    for name, value in metrics.items():
        low, high = _RANGES[name]
        if not low <= value <= high:  # NaN is nowhere
            return f"{name} is {value:g}"
    return None


def _unlike(update: AdapterState, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first thing wrong with an update; the names of unknown tensors are the site's words."""
    if unknown := len(update.keys() - shapes.keys()):
        return f"{unknown} unknown tensors"
    for name, shape in shapes.items():
        if name not in update:
            return f"missing {name}"
        if tuple(update[name].shape) != shape:
            return f"{name} is {tuple(update[name].shape)} instead of {shape}"
        if not torch.isfinite(update[name]).all():
            return f"{name} is not finite"
    return None


def _error_status(message: Message) -> str:
    """The error code in a site's answer, never the rest of the text."""
    code = re.search(r"SAM-[A-Z]\d{3}", message.error.reason or "")
    return f"failed: {code[0] if code else f'error {message.error.code}'}"
