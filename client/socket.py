"""The local socket between courier and agent: who may use it, and how each side does."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from client.frames import pack_request, read_answer
from samaritan.errors import DeploymentError
from samaritan.messages import Answer, Request

_LONGEST = 100
"""Bytes of a socket's path that every system takes."""

_POLL_S = 0.5


@dataclass(frozen=True)
class AgentSocket:
    """The courier's way to the agent.

    Attributes:
        path: Of the socket.
        wait_s: How long to wait for an agent that is not there: it may just be starting.
    """

    path: Path
    wait_s: float = 120.0

    def answer(self, request: Request) -> Answer:
        """The site's answer; training may take hours, and nothing is sent meanwhile.

        Raises:
            RedactedError: The site's, for any fault of its own.
            DeploymentError: SAM-N202 when no agent is there, SAM-N203 when it ended before it
                answered.
        """
        with self._connected() as connection:
            try:
                connection.sendall(pack_request(request))
                with connection.makefile("rb") as stream:
                    return read_answer(stream)
            except (EOFError, OSError) as error:
                raise DeploymentError(
                    "SAM-N203",
                    f"the site agent ended before it answered ({type(error).__name__})",
                    "run/agent.log says why, or run/supervisord.log where it was killed. It is "
                    "started again by itself, and the server asks again.",
                ) from error

    def _connected(self) -> socket.socket:
        end = time.monotonic() + self.wait_s
        while True:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                with short(self.path) as address:
                    connection.connect(address)
            except OSError as error:
                connection.close()
                if isinstance(error, PermissionError) or time.monotonic() > end:
                    raise DeploymentError(
                        "SAM-N202",
                        f"no site agent answers at {self.path}: {error.strerror or error}",
                        "Start it (`samaritan site start KIT`), as the user that site.yaml names.",
                    ) from error
                time.sleep(_POLL_S)
            else:
                return connection


@contextlib.contextmanager
def short(path: Path) -> Iterator[str]:
    """An address of a socket that is not too long for the system, valid inside the block."""
    if len(os.fsencode(path)) <= _LONGEST:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


def peer_user(connection: socket.socket) -> int:
    """System user at the other end of a connection."""
    size = struct.calcsize("3i")
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    _, user, _ = struct.unpack("3i", data)
    return int(user)
