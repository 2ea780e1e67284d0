"""The round as Flower's Strategy sees it: who is asked, which answers count, how they combine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from samaritan.config import Config
from samaritan.errors import FederationError
from samaritan.models.adapter import AdapterState
from samaritan.wire import Instruction, content, message_bytes, to_arrays
from strategies.replies import Reply, read_evaluate_reply, read_train_reply
from strategies.update import Rule, Situation, Update

_POLL_S = 0.2


@dataclass(frozen=True)
class RoundPolicy:
    """What a round needs.

    Attributes:
        min_sites: Usable answers; fewer end the run, with everything done so far kept.
        wait_s: How long to wait for that many sites to be online.
        example_weights: Weight answers by their number of examples, else equally.
        evaluate_every: Score the adapter after every n-th round, and after the last.
    """

    min_sites: int
    wait_s: float
    example_weights: bool
    evaluate_every: int


@dataclass(frozen=True)
class RoundOutcome:
    """One finished round.

    Attributes:
        server_round: Its number, counted over resumptions.
        adapter: The adapter after it.
        train, evaluate: Answers of the sites; `evaluate` is empty where nothing was scored.
        bytes_down: Bytes sent to each node.
        seconds: Wall time, from the first message to the last answer.
    """

    server_round: int
    adapter: AdapterState
    train: tuple[Reply, ...]
    evaluate: tuple[Reply, ...]
    bytes_down: Mapping[int, int]
    seconds: float


class SiteStrategy(Strategy):
    """Asks every approved site, checks each answer, combines what is usable.

    Args:
        nodes: Approved sites by Flower node id.
        observers: Those of the nodes that score and do not train.
        rule: Combines updates.
        config: Of the run.
        policy: Quorum and waiting.
        instruction: Sent to every site, with the round filled in.
        initial: The adapter before the first of these rounds; fixes names and shapes.
        first_round: Number of the first of these rounds, above 1 after a resumption.
        on_round: Told of every finished round.
    """

    def __init__(
        self,
        nodes: Mapping[int, str],
        observers: Collection[int],
        rule: Rule,
        config: Config,
        policy: RoundPolicy,
        instruction: Instruction,
        initial: AdapterState,
        first_round: int,
        on_round: Callable[[RoundOutcome], None],
    ) -> None:
        self.nodes, self.observers = nodes, observers
        self.rule, self.policy, self.instruction = rule, policy, instruction
        self.config = config
        self.adapter = initial
        self.shapes = {name: tuple(value.shape) for name, value in initial.items()}
        self.offset = first_round - 1
        self.on_round = on_round
        self._train: list[Reply] = []
        self._bytes_down: dict[int, int] = {}
        self._begun = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Training messages for every training site online, once enough of them are.

        Raises:
            FederationError: When too few sites come online in time.
        """
        self._begun = time.monotonic()
        nodes = self._nodes(grid)
        self._bytes_down = dict.fromkeys(nodes, 0)
        return self._messages(server_round, arrays, nodes, MessageType.TRAIN)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new adapter from the usable answers.

        Raises:
            FederationError: When there are fewer of them than the round needs.
        """
        situation = Situation(self.adapter, server_round + self.offset, self.config)
        step = self.rule(self._usable(replies), situation)
        silent = self._bytes_down.keys() - {r.node_id for r in self._train}
        self._train += [Reply(node, "failed: no answer in time") for node in sorted(silent)]
        usable = sum(r.ok for r in self._train)
        if usable < self.policy.min_sites:
            faults = "; ".join(
                f"{self.nodes[r.node_id]} {r.status}" for r in self._train if not r.ok
            )
            raise FederationError(
                "SAM-F102",
                f"round {server_round + self.offset}: {usable} usable answers, "
                f"{self.policy.min_sites} needed ({faults})",
                "Mend the sites named above and resume; rounds before this one are kept.",
            )
        self.adapter = {name: value + step[name] for name, value in self.adapter.items()}
        return to_arrays(self.adapter), None

    def _usable(self, replies: Iterable[Message]) -> Iterator[Update]:
        """Updates of good answers, one at a time; every answer is noted, none kept."""
        self._train = []
        for message in replies:
            node = message.metadata.src_node_id
            if node not in self._bytes_down or any(r.node_id == node for r in self._train):
                continue  # not asked, or answered before
            reply, update = read_train_reply(message, self.shapes)
            self._train.append(reply)
            if update is not None:
                weight = reply.metrics["num-examples"] if self.policy.example_weights else 1.0
                yield Update(self.nodes[node], self.adapter, update, weight)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation messages for the sites that took part, and observers, where one is due."""
        number = server_round + self.offset
        if number % self.policy.evaluate_every and number != self.instruction.rounds:
            return []
        observing = sorted(set(self.observers) & set(grid.get_node_ids()))
        nodes = [r.node_id for r in self._train] + observing
        return self._messages(server_round, arrays, nodes, MessageType.EVALUATE)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Closes the round."""
        outcome = RoundOutcome(
            server_round=server_round + self.offset,
            adapter=self.adapter,
            train=tuple(self._train),
            evaluate=self._scored(replies),
            bytes_down=self._bytes_down,
            seconds=time.monotonic() - self._begun,
        )
        self.on_round(outcome)
        return None

    def _scored(self, replies: Iterable[Message]) -> tuple[Reply, ...]:
        asked = (m for m in replies if m.metadata.src_node_id in self._bytes_down)
        return tuple({r.node_id: r for r in map(read_evaluate_reply, asked)}.values())

    def summary(self) -> None:
        """Nothing: the run writes its own events."""

    def _nodes(self, grid: Grid) -> list[int]:
        end = time.monotonic() + self.policy.wait_s
        training = self.nodes.keys() - set(self.observers)
        while len(nodes := sorted(training & set(grid.get_node_ids()))) < self.policy.min_sites:
            if time.monotonic() > end:
                raise FederationError(
                    "SAM-F101",
                    f"{len(nodes)} sites are online after {self.policy.wait_s:g} s, "
                    f"{self.policy.min_sites} needed",
                    "Start the missing sites and resume, or lower federation.min_sites.",
                )
            time.sleep(_POLL_S)
        return nodes

    def _messages(
        self, server_round: int, arrays: ArrayRecord, nodes: list[int], kind: str
    ) -> list[Message]:
        instruction = replace(self.instruction, server_round=server_round + self.offset)
        records = content(arrays, instruction.record())
        messages = [Message(records, message_type=kind, dst_node_id=node) for node in nodes]
        size = message_bytes(messages[0]) if messages else 0
        for node in nodes:
            self._bytes_down[node] = self._bytes_down.get(node, 0) + size
        return messages


def default_quorum(sites: int) -> int:
    """More than half."""
    return math.floor(sites / 2) + 1
