"""The Flower ClientApp: a courier. It carries a message to the site agent and the answer back.

It never touches data, and it lets nothing of an error out but its code: exception texts may hold
paths and names.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from client.agent import SiteAgent
from samaritan.errors import SamaritanError
from samaritan.wire import content, payload_of, read_instruction

FindAgent = Callable[[Context], SiteAgent]
"""The agent of the site that a message was delivered to."""

_log = logging.getLogger("samaritan.site")


class RedactedError(Exception):
    """All that a server learns of a fault at a site: a code and a reference to the site's log."""

    def __str__(self) -> str:
        return " ".join(str(part) for part in self.args)


def make_client_app(find_agent: FindAgent) -> ClientApp:
    """A ClientApp in front of the agents that `find_agent` knows."""
    app = ClientApp()

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return _carry(message, context, find_agent, _hello)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return _carry(message, context, find_agent, _train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return _carry(message, context, find_agent, _evaluate)

    return app


def _carry(
    message: Message,
    context: Context,
    find_agent: FindAgent,
    task: Callable[[Message, SiteAgent], Message],
) -> Message:
    try:
        return task(message, find_agent(context))
    except Exception as error:
        reference = uuid.uuid4().hex[:8]
        _log.error("reference %s", reference, exc_info=error)
        code = error.redacted() if isinstance(error, SamaritanError) else "SAM-F299"
        raise RedactedError(code, f"reference {reference} in the site's log") from None


def _hello(message: Message, agent: SiteAgent) -> Message:
    return Message(content(config=ConfigRecord(dict(agent.hello()))), reply_to=message)


def _train(message: Message, agent: SiteAgent) -> Message:
    update, metrics = agent.train(payload_of(message), read_instruction(message))
    return Message(content(update, metrics=metrics), reply_to=message)


def _evaluate(message: Message, agent: SiteAgent) -> Message:
    metrics = agent.evaluate(payload_of(message), read_instruction(message))
    return Message(content(metrics=metrics), reply_to=message)
