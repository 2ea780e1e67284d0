"""One round's questions and answers: who was asked, what came back, and when to ask again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flwr.app import Message
from flwr.serverapp import Grid
from torch import Tensor

from samaritan.config import Config
from samaritan.errors import FederationError
from samaritan.messages import Instruction, Kind, MaskingStep, Request
from samaritan.shares import CONTROL, noisy_sites, shares
from samaritan.wire import MESSAGE_TYPES, message_bytes, request_content
from server.delivery import Delivery
from server.ingress import Ingress
from server.judgement import BUDGET_SPENT, History, last_ledger, last_used
from strategies.replies import (
    LOST,
    Expected,
    Reply,
    error_status,
    read_evaluate_reply,
    read_train_reply,
)
from strategies.update import Update

_POLL_S = 0.2
_NO_STATE = "failed: SAM-F203"

Event = Callable[..., None]
"""Writes an event with its fields."""


@dataclass(frozen=True)
class Post:
    """How the server reaches its sites.

    Attributes:
        grid: Flower's.
        nodes: Node id by site, of every site that has answered a roll call.
        delivery: What each site holds.
        config: Of the run.
        counts: `Update.counts` of the sites that label some structures only.
        at_once: Sites that work at the same time; the others wait their turn. None for all.
        event: Writes an event.
        ingress: Writes down what comes in.
        plan_sha256: Of the plan that all sites approved; empty in a simulation.
    """

    grid: Grid
    nodes: dict[str, int]
    delivery: Delivery
    config: Config
    counts: Mapping[str, Mapping[str, Tensor]]
    at_once: int | None
    event: Event
    ingress: Ingress
    plan_sha256: str

    def online(self, sites: Sequence[str]) -> list[str]:
        """Those of the sites that are there now."""
        present = set(self.grid.get_node_ids())
        return [site for site in sites if self.nodes.get(site) in present]

    def wait_for(self, sites: Sequence[str], needed: int) -> list[str]:
        """Those of the sites that are online, once enough of them are.

        Raises:
            FederationError: SAM-F101 when too few come in time.
        """
        wait_s = self.config.federation.wait_s
        end = time.monotonic() + wait_s
        while len(there := self.online(sites)) < needed:
            if time.monotonic() > end:
                raise FederationError(
                    "SAM-F101",
                    f"{len(there)} sites are online after {wait_s:g} s, {needed} needed",
                    "Start the missing sites and resume.",
                )
            time.sleep(_POLL_S)
        return there


class Asking:
    """What is asked and answered in one round.

    Args:
        post: The way to the sites.
        instruction: Of this round, without the hashes of the state.
        history: Of the rounds before.

    Attributes:
        trained, scored: The last answer of each site that was asked to train or to score.
        bytes_up, bytes_down: Of all messages, by site.
        norms: Length of each usable update, before it was clipped.
        waiting_s: Time that passed until answers were there.
        lost: Whether the round can come to nothing any more, and the next one is to begin.
        forged: Sites for which somebody else has answered.
    """

    def __init__(self, post: Post, instruction: Instruction, history: History) -> None:
        self.post, self.instruction, self.history = post, instruction, history
        self.trained: dict[str, Reply] = {}
        self.scored: dict[str, Reply] = {}
        self.bytes_up: dict[str, int] = {}
        self.bytes_down: dict[str, int] = {}
        self.norms: dict[str, float] = {}
        self.waiting_s = 0.0
        self.lost = False
        self.forged: set[str] = set()

    @property
    def left(self) -> list[str]:
        """Sites that have spent their privacy budget: they train no more."""
        return [site for site, reply in self.trained.items() if reply.status == BUDGET_SPENT]

    @property
    def usable(self) -> int:
        """Sites whose update can be used."""
        return sum(reply.ok for reply in self.trained.values())

    def updates(
        self, sites: Sequence[str], needed: int, reserve: Sequence[str] = ()
    ) -> Iterator[Update]:
        """Usable updates, one at a time; too few of them, and the others are asked again.

        Args:
            sites: Asked first.
            needed: Usable updates that are enough.
            reserve: Sites that rest, and are asked where the others are not enough.
        """
        settings = self.post.config.federation
        missing = list(sites)
        for attempt in range(settings.retries + 1):
            if attempt:
                wait_s = settings.retry_wait_s * 2 ** (attempt - 1)
                self.post.event(
                    "round_retried", round=self.instruction.server_round, attempt=attempt,
                    sites=missing, wait_s=wait_s,
                )  # fmt: skip
                time.sleep(wait_s)
            yield from self._train_all(missing)
            if self.usable < needed and reserve:
                self.post.event(
                    "sites_recalled", round=self.instruction.server_round, sites=list(reserve)
                )
                sites, recalled, reserve = [*sites, *reserve], reserve, ()
                yield from self._train_all(recalled)
            # A wrong answer would be as wrong again.
            missing = [
                site
                for site in sites
                if self.trained[site].status.startswith(("failed", "late"))
                and self.trained[site].status != BUDGET_SPENT
            ]
            if self.usable >= needed or not missing:
                return

    def score(self, sites: Sequence[str]) -> None:
        """Asks for the score of the present state."""
        self._score(sites)
        lost = [site for site in sites if self.scored[site].status in LOST]
        if again := [*self._stale(sites, self.scored), *lost]:
            self._score(again)

    def _stale(self, sites: Sequence[str], replies: Mapping[str, Reply]) -> list[str]:
        """Sites that do not hold what they should; they are sent the whole state the next time."""
        stale = [site for site in sites if replies[site].status == _NO_STATE]
        self.post.delivery.lost(stale)
        return stale

    def _score(self, sites: Sequence[str]) -> None:
        for site, message in self._ask(sites, "evaluate"):
            self.scored[site] = read_evaluate_reply(message)
            self._arrived(site, message)
        for site in sites:
            self.scored.setdefault(site, self._silence(site, len(sites)))

    def _train_all(self, sites: Sequence[str]) -> Iterator[Update]:
        yield from self._train(sites)
        if stale := self._stale(sites, self.trained):
            yield from self._train(stale)

    def _train(self, sites: Sequence[str]) -> Iterator[Update]:
        open_sites = set(sites)
        for site, message in self._ask(sites, "train"):
            expected = self.expected(site)
            reply, delta = read_train_reply(message, expected)
            late = reply.status.startswith("late")
            self._arrived(site, message, not late)
            if late:
                self.post.event(
                    "late_reply", round=self.instruction.server_round, site=site,
                    status=reply.status,
                )  # fmt: skip
                continue
            if site not in open_sites:
                continue  # answered before
            open_sites.remove(site)
            if delta is None:
                self.trained[site] = reply
                self.post.event(
                    "reply_refused" if reply.status.startswith("refused") else "site_failed",
                    round=self.instruction.server_round, site=site, status=reply.status,
                )  # fmt: skip
                continue
            self.trained[site] = reply
            yield Update(
                site,
                self.post.delivery.start(site),
                delta,
                self._weight(site, reply),
                self.post.counts.get(site, {}),
            )
        for site in sorted(open_sites):
            self.trained[site] = self._silence(site, len(sites))
            self.post.event(
                "site_late", round=self.instruction.server_round, site=site,
                status=self.trained[site].status,
            )  # fmt: skip

    def _ask(
        self, sites: Sequence[str], kind: Kind, steps: Mapping[str, MaskingStep] | None = None
    ) -> Iterator[tuple[str, Message]]:
        """Answers to a question about a state, with a step of a secure sum where there is one."""
        requests = {}
        for site in sites:
            payload, instruction = self.post.delivery.address(site, self.instruction)
            instruction = replace(
                instruction,
                used_round=self._used_round(site),
                ledger=last_ledger(self.history, site),
            )
            step = (steps or {}).get(site)
            requests[site] = self._request(kind, instruction, payload, step)
        return self._send(requests)

    def _request(
        self,
        kind: Kind,
        instruction: Instruction,
        payload: bytes | None = None,
        step: MaskingStep | None = None,
    ) -> Request:
        plan = self.post.plan_sha256
        return Request(kind, plan, instruction=instruction, payload=payload, step=step)

    def query(self, steps: Mapping[str, MaskingStep]) -> Iterator[tuple[str, Message]]:
        """Answers to steps of a secure sum, which name the state and do not bring it."""
        requests = {}
        for site, step in steps.items():
            state = self.post.delivery.state(site).sha256
            instruction = replace(self.instruction, state_sha256=state)
            requests[site] = self._request("secure_sum", instruction, step=step)
        for site, message in self._send(requests):
            self.bytes_up[site] = self.bytes_up.get(site, 0) + message_bytes(message)
            yield site, message

    def train_masked(self, steps: Mapping[str, MaskingStep]) -> Iterator[tuple[str, Message]]:
        """Answers to a question for masked updates; sites without the state are asked again."""
        stale = dict(steps)
        for _ in range(2):
            lost = []
            for site, message in self._ask(list(stale), "train", stale):
                self._arrived(site, message)
                if message.has_error() and error_status(message) == _NO_STATE:
                    lost.append(site)
                else:
                    yield site, message
            self.post.delivery.lost(lost)
            stale = {site: steps[site] for site in lost}
            if not stale:
                return

    def _send(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, Message]]:
        """Answers with the site they come from; of nodes that were not asked there are none."""
        post = self.post
        names = {post.nodes[site]: site for site in requests}
        messages = []
        for site, request in requests.items():
            message = Message(
                request_content(post.ingress.addressed(request, site)),
                message_type=MESSAGE_TYPES[request.kind],
                dst_node_id=post.nodes[site],
            )
            size = message_bytes(message)
            self.bytes_down[site] = self.bytes_down.get(site, 0) + size
            messages.append(message)
        timeout_s = self._timeout_s(len(messages))
        replies = iter(post.grid.send_and_receive(messages, timeout=timeout_s))
        while True:
            begun = time.monotonic()
            reply = next(replies, None)
            self.waiting_s += time.monotonic() - begun
            if reply is None:
                return
            if reply.metadata.src_node_id not in names:
                continue
            site = names[reply.metadata.src_node_id]
            if post.ingress.admits(site, requests[site], reply):
                yield site, reply
            else:
                self.forged.add(site)
                post.event("reply_forged", round=self.instruction.server_round, site=site)

    def _arrived(self, site: str, message: Message, of_this_round: bool = True) -> None:
        self.bytes_up[site] = self.bytes_up.get(site, 0) + message_bytes(message)
        if of_this_round and not message.has_error():
            self.post.delivery.arrived(site)

    def _timeout_s(self, sites: int) -> float:
        """A site stops by itself when its time is over; the rest is for the way and for queues."""
        turns = math.ceil(sites / (self.post.at_once or sites or 1))
        return (self.instruction.timeout_s * 1.1 + 1) * turns

    def _silence(self, site: str, sites: int) -> Reply:
        if site in self.forged:
            return Reply("refused: the answer is not sealed by this site")
        return Reply(f"late: no answer in {self._timeout_s(sites):.0f} s")

    def expected(self, site: str) -> Expected:
        """What an update of a site must be."""
        number, config = self.instruction.server_round, self.post.config
        state = self.post.delivery.state(site)
        adapter = [name for name in state.state if not name.startswith(CONTROL)]
        sent = shares(config, adapter, number).sent
        names = sent | {CONTROL + name for name in sent if config.training.scaffold}
        return Expected(
            number,
            state.sha256,
            {name: tuple(state.state[name].shape) for name in sorted(names)},
            config.wire.up,
            last_used(self.history, site)[1] if names else "",  # of nothing there is only one
            ("num-examples",) if noisy_sites(config) else ("num-examples", "train-loss"),
        )

    def _used_round(self, site: str) -> int:
        if site in self.trained and self.trained[site].ok:
            return self.instruction.server_round
        return last_used(self.history, site)[0]

    def _weight(self, site: str, reply: Reply) -> float:
        weighting = self.post.config.federation.weighting
        if isinstance(weighting, dict):
            return weighting[site]
        return reply.metrics["num-examples"] if weighting == "examples" else 1.0
