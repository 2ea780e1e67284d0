"""The Flower ClientApp: a courier. It carries a request to the site and its answer back.

It never touches data, imports nothing that does, and lets nothing of an error out but its code:
exception texts may hold paths and names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.redaction import redact
from samaritan.messages import Answer, Kind, Request
from samaritan.wire import answer_content, read_request


class Answering(Protocol):
    """A site, or the way to one."""

    def answer(self, request: Request) -> Answer:
        """The site's answer; raises RedactedError for a fault."""


FindSite = Callable[[Context], Answering]
"""The site that a message was delivered to."""


def make_client_app(find_site: FindSite, bundle_sha256: str = "") -> ClientApp:
    """A ClientApp in front of the sites that `find_site` knows.

    Args:
        find_site: Leads to the site.
        bundle_sha256: Of the app bundle that came with the message; empty in a simulation.
    """
    app = ClientApp()

    def carry(message: Message, context: Context, kind: Kind) -> Message:
        try:
            request = read_request(message, kind, bundle_sha256)
            answer = find_site(context).answer(request)
            return Message(answer_content(answer), reply_to=message)
        except Exception as error:
            raise redact(error) from None

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return carry(message, context, "hello")

    @app.query("secure_sum")
    def secure_sum(message: Message, context: Context) -> Message:
        return carry(message, context, "secure_sum")

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return carry(message, context, "train")

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return carry(message, context, "evaluate")

    return app
