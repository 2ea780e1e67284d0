"""A run on the server: rounds from wherever it stands to the last, each kept before the next."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp import Grid
from torch import Tensor

from samaritan import __version__
from samaritan.config import Config, config_sha256
from samaritan.errors import FederationError, StorageError
from samaritan.models.adapter import AdapterState
from samaritan.shares import CONTROL, public_state, shares
from samaritan.training.drift import server_control
from samaritan.training.local import round_seed
from samaritan.training.metrics import mean
from samaritan.wire import Instruction
from server.asking import Asking, Post
from server.checkpoints import Checkpoint, latest_checkpoint, read_round, save_checkpoint
from server.delivery import Delivery, Published, publish, publish_after
from server.events import append_event
from server.judgement import best_round, draw_sites, has_fallen, on_plateau, quarantined
from server.rollcall import RollCall, roll_call
from strategies.clipping import clipped
from strategies.meter import ProductMeter
from strategies.optimisers import server_step
from strategies.ranks import view
from strategies.replies import Reply
from strategies.robust import minimum_sites
from strategies.rules import get_rule
from strategies.update import Situation, Update

RoundCallback = Callable[[dict[str, Any]], None]
"""Called with each finished round as summary.json will hold it."""

_SENT, _CONTROL = "sent/", "control"


@dataclass(frozen=True)
class Federation:
    """What a server needs to know of a run.

    Attributes:
        config: The run's configuration.
        base_sha256: Of the frozen base; a site with another refuses.
        initial: The adapter before the first round.
        sites: Names of the approved sites that train.
        run_dir: Receives `events.jsonl` and `checkpoints/`.
        observers: Names of the approved sites that only score.
        counts: Which tensors of a site's update say something, of sites that label some structures
            only (`strategies.update.Update.counts`).
        at_once: Sites that work at the same time; None for all of them.
        on_round: Told of each finished round.
    """

    config: Config
    base_sha256: str
    initial: AdapterState
    sites: Sequence[str]
    run_dir: Path
    observers: Sequence[str] = ()
    counts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    at_once: int | None = None
    on_round: RoundCallback | None = None

    @property
    def checkpoints(self) -> Path:
        """Where round checkpoints lie."""
        return self.run_dir / "checkpoints"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.run_dir / "events.jsonl"

    def rank(self, site: str) -> int | None:
        """LoRA rank of a site; None where it is the server's own."""
        return self.config.peft.site_ranks.get(site)

    def note(self, event: str, **fields: Any) -> None:
        """Writes an event."""
        append_event(self.events, event, **fields)


def run_rounds(grid: Grid, federation: Federation) -> Checkpoint:
    """Runs every round that is not done yet and returns the state of the chosen round.

    Each round is checkpointed and logged before the next begins, so that a run that ends for any
    reason goes on from its last round with the same result as one that never stopped.

    Raises:
        FederationError: When a round finds too few sites or too few usable answers; the run is
            then paused, and can be resumed.
        StorageError: When a checkpoint or event cannot be written, or belongs to another run.
    """
    config = federation.config
    state = resume_point(federation)
    federation.note(
        "run_started", first_round=state.server_round + 1, rounds=config.rounds,
        sites=list(federation.sites), config_sha256=state.config_sha256,
    )  # fmt: skip
    logging.getLogger("flwr").setLevel(logging.ERROR)  # the run writes its own events
    try:
        if not _is_over(config, state):
            roll = _roll_call(grid, federation)
            delivery = _delivery(federation, state)
            nodes = {site: node for node, site in roll.present.items()}
            post = Post(
                grid, nodes, delivery, config, federation.counts, federation.at_once,
                federation.note,
            )  # fmt: skip
            while not _is_over(config, state):
                state = _next_round(federation, post, state)
    except FederationError as error:
        federation.note(
            "run_paused", code=error.code, rounds_done=state.server_round, message=error.message
        )
        raise
    if state.server_round < config.rounds:
        federation.note("stopped_early", round=state.server_round, best=best_round(state.history))
    state = _chosen(federation, state)
    federation.note("run_finished", rounds=len(state.history), adapter_of_round=state.server_round)
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
        federation.note("checkpoints_damaged", files=damaged)
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


def quorum(config: Config, sites: int) -> int:
    """Usable answers a round needs: as configured or more than half, and what the rule needs."""
    asked = min(sites, config.federation.sites_per_round or sites)
    wanted = config.federation.min_sites or asked // 2 + 1
    return max(wanted, minimum_sites(config.strategy, config.federation.byzantine_sites))


def _is_over(config: Config, state: Checkpoint) -> bool:
    done = state.server_round >= config.rounds
    return done or on_plateau(state.history, config.selection.patience)


def _chosen(federation: Federation, state: Checkpoint) -> Checkpoint:
    """The last round, or the one with the best score."""
    best = best_round(state.history)
    if federation.config.selection.keep == "last" or best is None:
        return state
    chosen = read_round(federation.checkpoints, best[0])
    return replace(chosen, history=state.history)


def _roll_call(grid: Grid, federation: Federation) -> RollCall:
    config = federation.config
    common = {
        "samaritan": __version__,
        "config-sha256": config_sha256(config),
        "base-sha256": federation.base_sha256,
    }
    sites = [*federation.sites, *federation.observers]
    beginnings = _published_beginning(federation)
    expected = {
        site: common | {"adapter-sha256": beginnings[federation.rank(site)].sha256}
        for site in sites
    }
    needed = quorum(config, len(federation.sites))
    roll = roll_call(grid, expected, needed, config.federation.wait_s)
    federation.note("roll_call", present=sorted(roll.present.values()), refused=roll.refused)
    return roll


def _next_round(federation: Federation, post: Post, state: Checkpoint) -> Checkpoint:
    """Trains, combines, scores, keeps."""
    begun = time.monotonic()
    config, number = federation.config, state.server_round + 1
    asking = Asking(
        post,
        Instruction(
            number, config.rounds, state.config_sha256, federation.base_sha256,
            config.federation.round_timeout_s,
        ),
        state.history,
    )  # fmt: skip
    needed = quorum(config, len(federation.sites))
    sites, reserve = _sites_to_ask(federation, post, state, needed)
    federation.note("round_started", round=number, sites=sites, resting=reserve)
    adapter, slots, error, seconds = _train(
        federation, asking, state, asking.updates(sites, needed, reserve), needed
    )
    _publish(federation, post.delivery, adapter, slots, number)
    if number % config.evaluation.every_rounds == 0 or number == config.rounds:
        asking.score([*asking.trained, *post.online(federation.observers)])
    entry = round_entry(number, asking, config.evaluation.prompts, time.monotonic() - begun)
    entry |= {"aggregation_error": error, "aggregation_seconds": round(seconds, 4)}
    state = Checkpoint(number, adapter, [*state.history, entry], state.config_sha256, slots)
    state = _rolled_back(federation, post.delivery, state)
    save_checkpoint(federation.checkpoints, state)
    federation.note("round_finished", **entry)
    if federation.on_round is not None:
        federation.on_round(entry)
    return state


def _sites_to_ask(
    federation: Federation, post: Post, state: Checkpoint, needed: int
) -> tuple[list[str], list[str]]:
    """This round's draw of the sites that are online, and those that rest after a wrong reply."""
    config = federation.config
    number, rest = state.server_round + 1, config.federation.quarantine_rounds
    known = [site for site in federation.sites if site in post.nodes]
    there = post.wait_for(known, needed)
    resting = [site for site in there if quarantined(state.history, site, rest)]
    if len(there) - len(resting) < needed:
        resting = []
    awake = [site for site in there if site not in resting]
    return draw_sites(awake, config.federation.sites_per_round, config.seed, number), resting


def _train(
    federation: Federation,
    asking: Asking,
    state: Checkpoint,
    updates: Iterator[Update],
    needed: int,
) -> tuple[AdapterState, dict[str, AdapterState], float | None, float]:
    """The adapter after a round, what goes with it, the error of aggregation and its seconds.

    Raises:
        FederationError: When there are fewer usable answers than the round needs.
    """
    config, number = federation.config, state.server_round + 1
    begun = time.monotonic()
    meter = ProductMeter(state.adapter, shares(config, state.adapter, number).personal)
    changes: list[AdapterState] = []

    def without_control() -> Iterator[Update]:
        for update in updates:
            control = {n: v for n, v in update.delta.items() if n.startswith(CONTROL)}
            changes.append({n.removeprefix(CONTROL): v for n, v in control.items()})
            delta = {n: v for n, v in update.delta.items() if n not in control}
            yield replace(update, delta=delta)

    def measured() -> Iterator[Update]:
        for update in clipped(without_control(), config.federation.clip_norm, asking.norms):
            meter.add(update)
            yield update

    situation = Situation(state.adapter, number, config)
    try:
        change = get_rule(config.strategy)(measured(), situation)
    except FederationError:  # a rule that has too few updates does not know why
        _require_quorum(asking, number, needed)
        raise
    _require_quorum(asking, number, needed)
    step, slots = server_step(change, _optimiser_slots(state), config.server_optimiser)
    adapter = {n: v + step[n] if n in step else v for n, v in state.adapter.items()}
    if broken := [n for n, v in adapter.items() if not torch.isfinite(v).all()]:
        raise FederationError(
            "SAM-F106",
            f"round {number}: the combined adapter is not finite in {len(broken)} tensors, first "
            f"{broken[0]}; the adapter of the round before is kept",
            "Look at `update_norm` of each site in the rounds before; set federation.clip_norm or "
            "choose a robust strategy.",
        )
    if config.training.scaffold:
        everyone = len(federation.sites)
        slots[_CONTROL] = server_control(state.slots.get(_CONTROL, {}), changes, everyone)
    error = meter.error(adapter)
    return adapter, slots, error, time.monotonic() - begun - asking.waiting_s


def _require_quorum(asking: Asking, server_round: int, needed: int) -> None:
    if asking.usable < needed:
        faults = "; ".join(f"{s} {r.status}" for s, r in asking.trained.items() if not r.ok)
        raise FederationError(
            "SAM-F102",
            f"round {server_round}: {asking.usable} usable answers, {needed} needed ({faults})",
            "Mend the sites named above and resume; rounds before this one are kept.",
        )


def _optimiser_slots(state: Checkpoint) -> dict[str, AdapterState]:
    return {
        name: tensors
        for name, tensors in state.slots.items()
        if name != _CONTROL and not name.startswith(_SENT)
    }


def _views(
    federation: Federation, adapter: AdapterState, control: AdapterState | None
) -> dict[int | None, AdapterState]:
    """What sites of each rank should hold."""
    ranks = {federation.rank(site) for site in (*federation.sites, *federation.observers)}
    return {rank: public_state(federation.config, view(adapter, rank), control) for rank in ranks}


def _published_beginning(federation: Federation) -> dict[int | None, Published]:
    views = _views(federation, federation.initial, None)
    return {rank: publish(state) for rank, state in views.items()}


def _delivery(federation: Federation, state: Checkpoint) -> Delivery:
    """What sites hold when a run begins or goes on: at least what they make for themselves."""
    beginnings = _published_beginning(federation)
    published = dict(beginnings)
    if state.server_round:
        views = _views(federation, state.adapter, state.slots.get(_CONTROL))
        published = {
            rank: publish(state.slots.get(f"{_SENT}{rank}", wanted))
            for rank, wanted in views.items()
        }
    sites = (*federation.sites, *federation.observers)
    return Delivery(
        {site: federation.rank(site) for site in sites},
        published,
        {
            rank: (view(federation.initial, rank), beginning.sha256)
            for rank, beginning in beginnings.items()
        },
    )


def _publish(
    federation: Federation,
    delivery: Delivery,
    adapter: AdapterState,
    slots: dict[str, AdapterState],
    server_round: int,
) -> None:
    """Brings what sites hold to a new adapter; where that is not the same, `slots` remembers it."""
    config = federation.config
    seed = round_seed(config.seed, server_round, "down")
    published = {
        rank: publish_after(delivery.published[rank], target, config.wire.down, seed)
        for rank, target in _views(federation, adapter, slots.get(_CONTROL)).items()
    }
    delivery.advance(published)
    for rank, state in published.items():
        slots.pop(f"{_SENT}{rank}", None)
        if state.change is not None:
            slots[f"{_SENT}{rank}"] = state.state


def _rolled_back(federation: Federation, delivery: Delivery, state: Checkpoint) -> Checkpoint:
    """The state itself, or one with the best round's adapter where the score has fallen."""
    best = best_round(state.history)
    if best is None or not has_fallen(state.history, federation.config.selection.rollback_drop):
        return state
    good = read_round(federation.checkpoints, best[0])
    federation.note(
        "rolled_back", round=state.server_round, to_round=best[0],
        dice_mean=state.history[-1]["dice_mean"], best=best[1],
    )  # fmt: skip
    state.history[-1]["rolled_back_to"] = best[0]
    # The optimiser begins anew: its moments lead to where the score fell.
    slots = {k: v for k, v in state.slots.items() if k == _CONTROL or k.startswith(_SENT)}
    _publish(federation, delivery, good.adapter, slots, state.server_round)
    return replace(state, adapter=good.adapter, slots=slots)


def round_entry(
    server_round: int, asking: Asking, oracle_prompts: str, seconds: float
) -> dict[str, Any]:
    """A round as summary.json holds it."""
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
        "num_examples": training.get("num-examples"),
        "steps": training.get("steps"),
        "update_sha256": trained.update_sha256 if trained else "",
        "seconds": round(sum(reply.metrics.get("seconds", 0.0) for reply in replies), 3),
        "status": faults[0] if faults else "ok",
    }


def overhead_seconds(history: list[dict[str, Any]]) -> float | None:
    """Mean time of a round that no site accounts for: Flower, checks, aggregation, checkpoint."""
    return mean([r["seconds"] - sum(s["seconds"] for s in r["sites"].values()) for r in history])
