"""A round as summary.json tells of it."""

from __future__ import annotations

import functools
from typing import Any

from samaritan.config import Config
from samaritan.training.metrics import mean
from server.asking import Asking
from strategies.replies import Reply

_OF_THE_DATA: dict[str, Any] = {
    "train_loss": None, "num_examples": None, "steps": None, "update_norm": None,
    "update_sha256": "", "seconds": 0.0,
}  # fmt: skip
"""What an entry says of a site's update and cases, left out."""


def published(entry: dict[str, Any], config: Config) -> dict[str, Any]:
    """A round as events and summary.json tell of it.

    Where a site is the unit of privacy, what its update was like is left out: the noise covers the
    adapter alone.
    """
    if config.privacy.unit != "site":
        return entry
    return entry | {"sites": {site: told | _OF_THE_DATA for site, told in entry["sites"].items()}}


def round_entry(
    server_round: int, asking: Asking, oracle_prompts: str, seconds: float
) -> dict[str, Any]:
    """A round as a checkpoint holds it."""
    names = sorted(asking.trained.keys() | asking.scored.keys())
    dice = functools.reduce(
        _add_weighted, (r.metrics for r in asking.scored.values() if r.ok), (0.0, 0.0)
    )
    return {
        "round": server_round,
        "seconds": round(seconds, 3),
        "dice_mean": dice[0] / dice[1] if dice[1] else None,
        "oracle_prompts": oracle_prompts,
        "sites": {
            name: _site_entry(asking.trained.get(name), asking.scored.get(name))
            | {
                "bytes_up": asking.bytes_up.get(name, 0),
                "bytes_down": asking.bytes_down.get(name, 0),
                "update_norm": asking.norms.get(name),
            }
            for name in names
        },
    }


def _add_weighted(total: tuple[float, float], metrics: dict[str, float]) -> tuple[float, float]:
    if "dice" not in metrics:
        return total
    return total[0] + metrics["dice"] * metrics["num-cases"], total[1] + metrics["num-cases"]


def _site_entry(trained: Reply | None, scored: Reply | None) -> dict[str, Any]:
    replies = [reply for reply in (trained, scored) if reply is not None]
    faults = [reply.status for reply in replies if not reply.ok]
    training = trained.metrics if trained and trained.ok else {}
    scoring = scored.metrics if scored and scored.ok else {}
    return {
        "train_loss": training.get("train-loss"),
        "dice": scoring.get("dice"),
        **{
            name.replace("-", "_"): scoring[name]
            for name in ("num-cases", "hd95-mm", "nsd")
            if name in scoring
        },
        "num_examples": training.get("num-examples"),
        "steps": training.get("steps"),
        "update_sha256": trained.update_sha256 if trained else "",
        "ledger": trained.ledger if trained else "",
        "seconds": round(sum(reply.metrics.get("seconds", 0.0) for reply in replies), 3),
        "status": faults[0] if faults else "ok",
    }


def overhead_seconds(history: list[dict[str, Any]]) -> float | None:
    """Mean time of a round that no site accounts for: Flower, checks, aggregation, checkpoint."""
    return mean([r["seconds"] - sum(s["seconds"] for s in r["sites"].values()) for r in history])
