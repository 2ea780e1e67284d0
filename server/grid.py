"""Flower's Grid over the network, looked at more often and with an eye on nodes that came back.

Flower's own loop waits three seconds between two looks, hands out answers only when all are there,
and never learns that a node which was restarted has lost the message it was working on.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, cast

from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.superlink.grid import HttpGrid

_POLL_S = 0.25
_LOOK_S = 5.0
"""Between two looks at whether nodes are still those that were asked."""

_NODE_LOST = 5
"""Flower's code for a node that is not available."""


class DeployedGrid(Grid):
    """The Grid of a deployment, in front of Flower's.

    Args:
        grid: That Flower gives a ServerApp.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = cast(HttpGrid, grid)

    def set_run(self, run: Any) -> None:
        """As Flower's."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """As Flower's."""
        return self._grid.run

    def create_message(self, *_: Any, **__: Any) -> Message:
        """Part of Flower's interface that its Message API no longer uses."""
        raise NotImplementedError("create Message objects directly")

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are online."""
        return self._grid.get_node_ids()

    def get_nodes(self) -> list[NodeInfo]:
        """The same with their keys and when they last came."""
        return list(self._grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As Flower's."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """As Flower's."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterator[Message]:
        """Sends messages and yields answers in the order of the messages, as soon as that allows.

        The order makes sums come out the same to the last bit, whoever is fastest. A node that has
        been started anew since it was asked gives no answer any more; an error stands in for it.
        """
        asked = list(messages)
        since = self._since()
        waiting: dict[str, Message] = {}
        arrived: dict[str, Message] = {}
        ids = []
        for number, sent in enumerate(self._grid.push_messages(asked)):
            # Flower gives no name to a message whose node has just been sent away.
            ids.append(str(sent or number))
            if sent:
                waiting[ids[-1]] = asked[number]
            else:
                arrived[ids[-1]] = _lost(asked[number], "the node is not known any more")
        end = None if timeout is None else time.monotonic() + timeout
        look = time.monotonic() + _LOOK_S
        order = iter(ids)
        due = next(order, None)
        while due is not None:
            for reply in self._grid.pull_messages(list(waiting)):
                message = waiting.pop(reply.metadata.reply_to_message_id, None)
                if message is not None:
                    arrived[reply.metadata.reply_to_message_id] = _from_its_node(reply, message)
            if time.monotonic() > look:
                look = time.monotonic() + _LOOK_S
                arrived |= self._restarted(waiting, since)
            over = end is not None and time.monotonic() > end
            while due is not None and (due in arrived or over):
                if due in arrived:
                    yield arrived.pop(due)
                due = next(order, None)
            if due is not None and waiting:
                time.sleep(_POLL_S)

    def _since(self) -> dict[int, str]:
        return {node.node_id: node.last_activated_at for node in self._grid.get_nodes()}

    def _restarted(self, waiting: dict[str, Message], since: dict[int, str]) -> dict[str, Message]:
        """Errors for messages whose node was started anew; they are waited for no longer."""
        now = self._since()
        lost = {}
        for message_id, message in list(waiting.items()):
            node = message.metadata.dst_node_id
            if node in now and now[node] != since.get(node):
                waiting.pop(message_id)
                lost[message_id] = _lost(message, "the node was started anew")
        return lost


def _lost(message: Message, reason: str) -> Message:
    return Message(Error(_NODE_LOST, reason), reply_to=message)


def _from_its_node(reply: Message, message: Message) -> Message:
    """The reply itself, or the same error from the node that was asked.

    An error that the SuperLink makes for a node that is gone does not name that node.
    """
    node = message.metadata.dst_node_id
    if reply.has_error() and reply.metadata.src_node_id != node:
        return Message(Error(reply.error.code, ""), reply_to=message)
    return reply
