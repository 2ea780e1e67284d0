"""A run on the server: rounds from wherever it stands to the last, each kept before the next."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from samaritan.config import Config, config_sha256
from samaritan.errors import FederationError, StorageError
from samaritan.models.adapter import AdapterState
from samaritan.training.metrics import mean
from samaritan.wire import Instruction, to_arrays
from server.checkpoints import Checkpoint, latest_checkpoint, save_checkpoint
from server.events import append_event
from server.rollcall import roll_call
from strategies.replies import Reply
from strategies.rules import get_rule
from strategies.site_strategy import RoundOutcome, RoundPolicy, SiteStrategy, default_quorum

RoundCallback = Callable[[dict[str, Any]], None]
"""Called with each finished round as summary.json will hold it."""


@dataclass(frozen=True)
class Federation:
    """What a server needs to know of a run.

    Attributes:
        config: The run's configuration.
        base_sha256: Of the frozen base; a site with another refuses.
        initial: The adapter before the first round.
        sites: Names of the approved sites that train.
        observers: Names of the approved sites that only score.
        run_dir: Receives `events.jsonl` and `checkpoints/`.
        on_round: Told of each finished round.
    """

    config: Config
    base_sha256: str
    initial: AdapterState
    sites: Sequence[str]
    run_dir: Path
    observers: Sequence[str] = ()
    on_round: RoundCallback | None = None

    @property
    def checkpoints(self) -> Path:
        """Where round checkpoints lie."""
        return self.run_dir / "checkpoints"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.run_dir / "events.jsonl"


def run_rounds(grid: Grid, federation: Federation) -> Checkpoint:
    """Runs every round that is not done yet and returns the last state.

    Each round is checkpointed and logged before the next begins, so that a run that ends for any
    reason goes on from its last round with the same result as one that never stopped.

    Raises:
        FederationError: When a round finds too few sites or too few usable answers.
        StorageError: When a checkpoint or event cannot be written, or belongs to another run.
    """
    config = federation.config
    state = resume_point(federation)
    append_event(
        federation.events, "run_started", first_round=state.server_round + 1, rounds=config.rounds,
        sites=list(federation.sites), config_sha256=state.config_sha256,
    )  # fmt: skip
    left = config.rounds - state.server_round
    if left > 0:
        policy = _policy(federation)
        roll = roll_call(
            grid,
            [*federation.sites, *federation.observers],
            state.config_sha256,
            federation.base_sha256,
            policy.min_sites,
            policy.wait_s,
        )
        append_event(
            federation.events,
            "roll_call",
            present=sorted(roll.present.values()),
            refused=roll.refused,
        )
        progress = _Progress(federation, state, roll.present)
        strategy = SiteStrategy(
            roll.present,
            [node for node, site in roll.present.items() if site in federation.observers],
            get_rule(config.strategy),
            config,
            policy,
            Instruction(
                0, config.rounds, state.config_sha256, federation.base_sha256,
                config.federation.round_timeout_s,
            ),
            state.adapter,
            state.server_round + 1,
            progress.close_round,
        )  # fmt: skip
        logging.getLogger("flwr").setLevel(logging.ERROR)  # the run writes its own events
        # Every site may take its time one after the other, as they do in one process.
        timeout = config.federation.round_timeout_s * len(roll.present)
        try:
            strategy.start(grid, to_arrays(state.adapter), num_rounds=left, timeout=timeout)
        except FederationError as error:
            append_event(federation.events, "run_failed", code=error.code)
            raise
        state = progress.state
    append_event(federation.events, "run_finished", rounds=state.server_round)
    return state


def resume_point(federation: Federation) -> Checkpoint:
    """The newest checkpoint of this run, or its beginning.

    Raises:
        StorageError: When the checkpoint was made by another configuration.
    """
    sha256 = config_sha256(federation.config)
    damaged: list[str] = []
    found = latest_checkpoint(federation.checkpoints, lambda path: damaged.append(path.name))
    if damaged:
        append_event(federation.events, "checkpoints_damaged", files=damaged)
    if found is None:
        return Checkpoint(0, federation.initial, [], sha256)
    if found.config_sha256 != sha256:
        raise StorageError(
            "SAM-S104",
            f"the checkpoints in {federation.run_dir} were made by configuration "
            f"{found.config_sha256[:16]}, this one is {sha256[:16]}",
            "Resume with the same configuration, or choose another --out.",
        )
    return found


def _policy(federation: Federation) -> RoundPolicy:
    settings = federation.config.federation
    return RoundPolicy(
        min_sites=settings.min_sites or default_quorum(len(federation.sites)),
        wait_s=settings.wait_s,
        example_weights=settings.weighting == "examples",
        evaluate_every=federation.config.evaluation.every_rounds,
    )


class _Progress:
    """The state of the run, moved on by each finished round."""

    def __init__(self, federation: Federation, state: Checkpoint, nodes: Mapping[int, str]) -> None:
        self.federation, self.state, self.nodes = federation, state, nodes

    def close_round(self, outcome: RoundOutcome) -> None:
        entry = round_entry(outcome, self.nodes, self.federation.config.evaluation.prompts)
        self.state = Checkpoint(
            outcome.server_round,
            outcome.adapter,
            [*self.state.history, entry],
            self.state.config_sha256,
        )
        save_checkpoint(self.federation.checkpoints, self.state)
        append_event(self.federation.events, "round_finished", **entry)
        if self.federation.on_round is not None:
            self.federation.on_round(entry)


def round_entry(
    outcome: RoundOutcome, sites: Mapping[int, str], oracle_prompts: str
) -> dict[str, Any]:
    """A round as summary.json holds it."""
    trained = {r.node_id: r for r in outcome.train}
    scored = {r.node_id: r for r in outcome.evaluate}
    entries = {
        sites[node]: _site_entry(trained.get(node), scored.get(node), outcome.bytes_down[node])
        for node in trained.keys() | scored.keys()
    }
    dice = functools.reduce(
        _add_weighted, (r.metrics for r in outcome.evaluate if r.ok), (0.0, 0.0)
    )
    return {
        "round": outcome.server_round,
        "seconds": round(outcome.seconds, 3),
        "dice_mean": dice[0] / dice[1] if dice[1] else None,
        "oracle_prompts": oracle_prompts,
        "sites": dict(sorted(entries.items())),
    }


def _add_weighted(total: tuple[float, float], metrics: dict[str, float]) -> tuple[float, float]:
    if "dice" not in metrics:
        return total
    return total[0] + metrics["dice"] * metrics["num-cases"], total[1] + metrics["num-cases"]


def _site_entry(trained: Reply | None, scored: Reply | None, bytes_down: int) -> dict[str, Any]:
    replies = [reply for reply in (trained, scored) if reply is not None]
    faults = [reply.status for reply in replies if not reply.ok]
    training = trained.metrics if trained and trained.ok else {}
    scoring = scored.metrics if scored and scored.ok else {}
    return {
        "train_loss": training.get("train-loss"),
        "dice": scoring.get("dice"),
        "num_examples": training.get("num-examples"),
        "steps": training.get("steps"),
        "bytes_up": sum(reply.size_bytes for reply in replies),
        "bytes_down": bytes_down,
        "seconds": round(sum(reply.metrics.get("seconds", 0.0) for reply in replies), 3),
        "status": faults[0] if faults else "ok",
    }


def overhead_seconds(history: list[dict[str, Any]]) -> float | None:
    """Mean time of a round that no site accounts for: Flower, checks, aggregation, checkpoint."""
    return mean([r["seconds"] - sum(s["seconds"] for s in r["sites"].values()) for r in history])
