"""A run on the server: rounds from wherever it stands to the last, each kept before the next."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from flwr.serverapp import Grid
from safetensors.torch import load, save

from samaritan import __version__
from samaritan.audit.log import Log
from samaritan.config import Config, config_sha256
from samaritan.errors import FederationError, PrivacyError
from samaritan.messages import Instruction, Request
from samaritan.models.adapter import AdapterState
from samaritan.models.bases import state_sha256
from samaritan.privacy.ledger import Question
from samaritan.privacy.randomness import SystemRandom
from samaritan.shares import CONTROL, public_state, shares, tells_scores
from samaritan.training.drift import server_control
from samaritan.training.local import round_seed
from server.asking import Asking, Post
from server.checkpoints import Checkpoint, read_round, save_checkpoint
from server.delivery import Delivery, Published, publish, publish_after
from server.federation import Federation, quorum, resume_point
from server.history import published, round_entry
from server.ingress import Ingress
from server.judgement import (
    BUDGET_SPENT,
    best_round,
    draw_sites,
    has_fallen,
    left_sites,
    on_plateau,
    quarantined,
)
from server.rollcall import Caller, RollCall
from server.secure_sum import summed_update
from strategies.clipping import clipped
from strategies.meter import ProductMeter
from strategies.optimisers import server_step
from strategies.ranks import view
from strategies.rules import get_rule
from strategies.site_privacy import private_rule
from strategies.update import Situation, Update

_SENT, _CONTROL = "sent/", "control"

_GREETING_S = 60.0
"""How long a round waits for the answer of a site that has just come."""


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
            ingress = Ingress(Log(federation.log, {"server": config.name}), federation.signers)
            caller = _caller(grid, federation, ingress)
            roll = caller.call(quorum(config, len(federation.sites)), config.federation.wait_s)
            _note_roll(federation, roll)
            post = Post(
                grid, {site: node for node, site in roll.present.items()},
                _delivery(federation, state), config, federation.counts, federation.at_once,
                federation.note, ingress, federation.plan_sha256,
            )  # fmt: skip
            left = left_sites(state.history)
            while not _is_over(config, state) and _are_enough(federation, left):
                before = len(left)
                if federation.node_keys:
                    _greet(federation, caller, post)
                try:
                    state = _next_round(federation, post, state, left)
                except FederationError:
                    # Those that stay may be enough; what they have answered they answer again.
                    if len(left) == before:
                        raise
            _require_rounds(state)
    except PrivacyError as error:
        if f"failed: {error.code}" != BUDGET_SPENT or not state.server_round:
            raise
        federation.note("budget_spent", rounds_done=state.server_round, message=error.message)
    except FederationError as error:
        federation.note(
            "run_paused", code=error.code, rounds_done=state.server_round, message=error.message
        )
        raise
    if state.server_round < config.rounds:
        plateau = on_plateau(state.history, config.selection.patience)
        federation.note(
            "stopped_early", round=state.server_round, best=best_round(state.history),
            reason="no better Dice" if plateau else "privacy budgets spent",
        )  # fmt: skip
    state = _chosen(federation, state)
    federation.note("run_finished", rounds=len(state.history), adapter_of_round=state.server_round)
    return state


def _are_enough(federation: Federation, left: set[str]) -> bool:
    """Whether the sites that have not left can make a round."""
    staying = len(set(federation.sites) - left)
    return not left or staying >= quorum(federation.config, staying)


def _require_rounds(state: Checkpoint) -> None:
    if not state.server_round:
        raise FederationError(
            "SAM-F107",
            "too few sites can afford a single round within their privacy budgets",
            "Raise privacy.epsilon or privacy.noise_multiplier, or lower privacy.steps_per_round; "
            "`samaritan privacy plan` shows what fits.",
        )


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


def _caller(grid: Grid, federation: Federation, ingress: Ingress) -> Caller:
    common = {
        "samaritan": __version__,
        "config-sha256": config_sha256(federation.config),
        "base-sha256": federation.base_sha256,
    }
    if federation.plan_sha256:
        common["plan-sha256"] = federation.plan_sha256
    beginnings = _published_beginning(federation)
    expected = {
        site: common | {"adapter-sha256": beginnings[federation.rank(site)].sha256}
        for site in (*federation.sites, *federation.observers)
    }
    request = Request("hello", federation.plan_sha256)
    return Caller(grid, expected, request, ingress, federation.node_keys)


def _note_roll(federation: Federation, roll: RollCall) -> None:
    federation.note("roll_call", present=sorted(roll.present.values()), refused=roll.refused)


def _greet(federation: Federation, caller: Caller, post: Post) -> None:
    """Takes in sites that were not there at the roll call, or came back as another node."""
    roll = caller.ask({node: site for site, node in post.nodes.items()}, _GREETING_S)
    if roll.present or roll.refused:
        _note_roll(federation, roll)
    post.nodes.update({site: node for node, site in roll.present.items()})


def _next_round(
    federation: Federation, post: Post, state: Checkpoint, left: set[str]
) -> Checkpoint:
    """Trains, combines, scores, keeps; adds to `left` the sites that train no more."""
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
    staying = [site for site in federation.sites if site not in left]
    needed = quorum(config, len(staying))
    sites, reserve = _sites_to_ask(config, post, state, staying, needed)
    federation.note("round_started", round=number, sites=sites, resting=reserve)
    updates = (
        summed_update(asking, [*sites, *reserve], federation.identities, needed)
        if config.federation.secure_aggregation
        else asking.updates(sites, needed, reserve)
    )
    try:
        adapter, slots, error, seconds = _train(federation, asking, state, updates, needed)
    finally:
        for site in asking.left:
            federation.note("site_left", round=number, site=site, reason="privacy budget spent")
        left.update(asking.left)
    _publish(federation, post.delivery, adapter, slots, number)
    due = number % config.evaluation.every_rounds == 0 or number == config.rounds
    if due and tells_scores(config):
        asking.score([*asking.trained, *post.online(federation.observers)])
    entry = round_entry(number, asking, config.evaluation.prompts, time.monotonic() - begun)
    entry |= {"aggregation_error": error, "aggregation_seconds": round(seconds, 4)}
    state = Checkpoint(number, adapter, [*state.history, entry], state.config_sha256, slots)
    state = _rolled_back(federation, post.delivery, state)
    save_checkpoint(federation.checkpoints, state)
    told = published(entry, config)
    federation.note("round_finished", **told)
    if federation.on_round is not None:
        federation.on_round(told)
    return state


def _sites_to_ask(
    config: Config, post: Post, state: Checkpoint, sites: Sequence[str], needed: int
) -> tuple[list[str], list[str]]:
    """This round's draw of the sites that are online, and those that rest after a wrong reply."""
    number, rest = state.server_round + 1, config.federation.quarantine_rounds
    known = [site for site in sites if site in post.nodes]
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
        if not asking.lost:
            _require_quorum(asking, number, needed)  # before anything is made of too few

    situation = Situation(state.adapter, number, config)
    try:
        change = _combined(federation, measured(), situation)
    except FederationError:
        if not config.federation.secure_aggregation:
            _require_quorum(asking, number, needed)  # a rule with too few updates knows not why
        raise
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
    # Of a sum nobody knows what its parts had come to, and noise covers the adapter alone.
    hidden = config.federation.secure_aggregation or federation.budget is not None
    error = None if hidden else meter.error(adapter)
    return adapter, slots, error, time.monotonic() - begun - asking.waiting_s


def _combined(
    federation: Federation, updates: Iterator[Update], situation: Situation
) -> AdapterState:
    """What the rule makes of the updates; with noise, and charged first, where privacy asks for it.

    Raises:
        PrivacyError: SAM-P101 when the budget of the sites does not allow the round.
    """
    budget, config = federation.budget, federation.config
    if budget is None:
        return get_rule(config.strategy)(updates, situation)
    rule = private_rule(budget.plan, config.privacy.clip_norm, SystemRandom())
    start = state_sha256(situation.adapter)
    question = Question(config_sha256(config), situation.server_round, start)
    answer, _ = budget.answer(
        question, config.privacy.clip_norm, lambda: save(rule(updates, situation))
    )
    for _ in updates:  # an answer that was there before needs none of them; the sites are asked
        pass
    return load(answer)


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
