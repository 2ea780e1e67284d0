"""Flower's Grid in one process: every message is handed to the ClientApp and answered at once.

One frozen base serves any number of sites, nothing is started and nothing listens on a port. The
private names of Flower that this needs live here and nowhere else; flwr is pinned for them.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from simulation.deadline import DeadlineError, deadline

_FIRST_NODE = 1000
_RUN = 1
_CLIENT_ERROR = 2  # as a real node words an exception of its ClientApp


class InProcessGrid(Grid):
    """A Grid whose nodes are calls of one ClientApp; nodes answer one after the other.

    Args:
        app: Answers every message.
        nodes: Number of nodes; each learns its `partition-id`, 0 and up.
    """

    def __init__(self, app: ClientApp, nodes: int) -> None:
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = _RUN
        self._app = app
        # Ids of another process, such as that of a run which is resumed, are other ids.
        self._name = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _FIRST_NODE + index: Context(
                run_id=_RUN,
                node_id=_FIRST_NODE + index,
                node_config={"partition-id": index, "num-partitions": nodes},
                state=RecordDict(),
                run_config={},
            )
            for index in range(nodes)
        }
        self._run: Any = None

    def set_run(self, run: Any) -> None:
        """Remembers the run Flower sets."""
        self._run = run

    @property
    def run(self) -> Any:
        """The run Flower set, if it did."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """All nodes; they are always online."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Delivers messages and keeps the answers."""
        ids = []
        for message in messages:
            message_id = f"{self._name}-{next(self._numbers)}"
            message.metadata.__dict__.update(
                _message_id=message_id, _run_id=_RUN, _src_node_id=_RUN
            )
            self._replies[message_id] = self._answer(message)
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers to these messages that were not fetched before."""
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Delivers each message when its answer is asked for; sites take their turns.

        One answer is in memory at a time, whatever the number of sites. A site that takes longer
        than `timeout` is interrupted and gives no answer.
        """
        for message in messages:
            replies: list[Message] = []
            with contextlib.suppress(DeadlineError), deadline(timeout):
                replies += self.pull_messages(self.push_messages([message]))
            yield from replies

    def create_message(self, *_: Any, **__: Any) -> Message:
        """Part of Flower's interface that its Message API no longer uses."""
        raise NotImplementedError("create Message objects directly")

    def _answer(self, message: Message) -> Message:
        try:
            return self._app(message=message, context=self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            return Message(
                Error(code=_CLIENT_ERROR, reason=f"{type(error)}:<'{error}'>"), reply_to=message
            )


def partition_id(context: Context) -> int:
    """Which simulated site a ClientApp stands for, in this Grid and in Flower's own simulation."""
    return int(context.node_config["partition-id"])


def nodes_of(names: Sequence[str]) -> dict[int, str]:
    """Node id by site, in the order of the sites."""
    return {_FIRST_NODE + index: name for index, name in enumerate(names)}
