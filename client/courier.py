"""`flwr-clientapp` of a site: Flower's program, with this site's own code in place of the bundle's.

Flower starts it for every message. It neither unpacks nor runs what the server ships: it notes the
hash of the bundle, which the agent compares with the approved plan, and carries the message to the
agent's socket. The private names of Flower it needs live here; flwr is pinned for them.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import flwr.supernode.runtime.run_clientapp as runtime
from flwr.clientapp import ClientApp
from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

from client.app import make_client_app
from client.home import SOCKET_VARIABLE
from client.socket import AgentSocket


class _Bundle:
    """What came with the message: its hash, and nothing else of it."""

    sha256 = ""

    def note(self, content: bytes, *_: Any, **__: Any) -> None:
        self.sha256 = hashlib.sha256(content).hexdigest()

    def app_loader(self, *_: Any, **__: Any) -> Callable[..., ClientApp]:
        agent = AgentSocket(Path(os.environ[SOCKET_VARIABLE]))
        return lambda *_: make_client_app(lambda context: agent, self.sha256)


def main() -> NoReturn:
    """Answers one message."""
    bundle = _Bundle()
    vars(runtime).update(install_from_fab=bundle.note, get_load_client_app_fn=bundle.app_loader)
    flwr_clientapp()
    sys.exit(0)


if __name__ == "__main__":
    main()
