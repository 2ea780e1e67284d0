"""The Flower SuperLink with a lock on its control interface, which open-source Flower leaves open.

Whoever reaches the SuperLink's port could otherwise start runs on all hospitals, or stop them. What
sites and the ServerApp need has its own checks (node keys, task tokens, the SuperExec secret) and
passes; everything else must show the secret. The private name of Flower that this needs lives here.
"""

from __future__ import annotations

import hmac
import os
from pathlib import Path

import flwr.superlink.extensions as extensions
from flwr.superlink.cli.flower_superlink import flower_superlink
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.home import CONTROL_HEADER, SECRET_VARIABLE

_OPEN = ("/v1/fleet/", "/v1/runtime/", "/health")
_NODES_REGISTER_THEMSELVES = ("/v1/fleet/register-node", "/v1/fleet/unregister-node")


class Locked:
    """Middleware that lets through what has its own checks, and whoever shows the secret.

    Args:
        app: What is locked.
        secret: To be shown.
    """

    def __init__(self, app: ASGIApp, secret: bytes) -> None:
        self._app, self._secret = app, secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 in place of the app where the secret is missing."""
        if scope["type"] == "lifespan" or self._may_pass(scope):
            await self._app(scope, receive, send)
        else:
            await Response(status_code=401)(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"]
        if path.startswith(_OPEN) and not path.startswith(_NODES_REGISTER_THEMSELVES):
            return True
        shown = dict(scope["headers"]).get(CONTROL_HEADER.encode(), b"")
        return hmac.compare_digest(shown, self._secret)


def main() -> None:
    """Runs the SuperLink until it is told to stop."""
    secret = Path(os.environ[SECRET_VARIABLE]).read_bytes().strip()
    if len(secret) < 32:
        raise SystemExit("error: the control secret is missing or too short")
    vars(extensions).update(get_middleware=lambda: (Middleware(Locked, secret=secret),))
    flower_superlink()


if __name__ == "__main__":
    main()
