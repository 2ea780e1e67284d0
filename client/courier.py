"""`flwr-clientapp` of a site: Flower's program, with this site's own code in place of the bundle's.

It is started for every message. It neither unpacks nor runs what the server ships: it notes the
hash of the bundle, which the agent compares with the approved plan, and carries the message to the
agent's socket. The private names of Flower it needs live here; flwr is pinned for them.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flwr.supernode.runtime.run_clientapp as runtime
from flwr.clientapp import ClientApp

from client.app import make_client_app
from client.home import SOCKET_VARIABLE
from client.socket import AgentSocket

_register_signal_handlers: Callable[..., None] = vars(runtime)["register_signal_handlers"]


class _Bundle:
    """What came with the message: its hash, and nothing else of it."""

    sha256 = ""

    def note(self, content: bytes, *_: Any, **__: Any) -> None:
        self.sha256 = hashlib.sha256(content).hexdigest()

    def app_loader(self, *_: Any, **__: Any) -> Callable[..., ClientApp]:
        agent = AgentSocket(Path(os.environ[SOCKET_VARIABLE]))
        return lambda *_: make_client_app(lambda context: agent, self.sha256)


def _end_at_once(*arguments: Any, **named: Any) -> None:
    """Flower's handlers for a normal end, and none for signals.

    A courier that Flower ends gently reports a task that failed and sends no answer, for which the
    node then waits for ever. One that is simply gone is noticed within a minute.
    """
    _register_signal_handlers(*arguments, **named)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def carry(node: str, token: str) -> None:
    """Answers one message.

    Args:
        node: Address of the site's node, on this machine.
        token: Of the message, from the node.
    """
    bundle = _Bundle()
    vars(runtime).update(
        install_from_fab=bundle.note,
        get_load_client_app_fn=bundle.app_loader,
        register_signal_handlers=_end_at_once,
    )
    runtime.run_clientapp(node, token, insecure=True, runtime_dependency_install=False)
