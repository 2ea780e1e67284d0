"""The Flower ClientApp: a courier. It carries a message to the site agent and the answer back.

It never touches data, and it lets nothing of an error out but its code: exception texts may hold
paths and names.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from dataclasses import replace

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from client.agent import Metrics, SiteAgent
from samaritan.errors import SamaritanError
from samaritan.wire import content, payload_of, read_instruction, read_masking_step

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

    @app.query("secure_sum")
    def secure_sum(message: Message, context: Context) -> Message:
        return _carry(message, context, find_agent, _secure_sum)

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


def _secure_sum(message: Message, agent: SiteAgent) -> Message:
    step = read_masking_step(message)
    if step is None:
        raise ValueError("a message about a secure sum without a step")
    answer = agent.secure_sum(step, read_instruction(message))
    return Message(content(masking=replace(step, data=answer)), reply_to=message)


def _train(message: Message, agent: SiteAgent) -> Message:
    step = () if (found := read_masking_step(message)) is None else (found,)
    update, told = agent.train(payload_of(message), read_instruction(message), *step)
    texts = {name: value for name, value in told.items() if isinstance(value, str)}
    config = ConfigRecord(dict(texts)) if texts else None
    return Message(content(update, config, _numbers(told)), reply_to=message)


def _evaluate(message: Message, agent: SiteAgent) -> Message:
    told = agent.evaluate(payload_of(message), read_instruction(message))
    return Message(content(metrics=_numbers(told)), reply_to=message)


def _numbers(told: Metrics) -> dict[str, float | int]:
    return {name: value for name, value in told.items() if not isinstance(value, str)}
