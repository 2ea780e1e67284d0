"""The site agent as a resident process: it owns the data and answers the courier on a socket.

One request at a time is worked on; a second one waits. Nothing but the socket leads in: the agent
listens on no network.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pwd
import signal
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import cast

from client.frames import pack_answer, pack_fault, read_request
from client.home import SOCKET, site_identity, site_log
from client.outbox import Outbox
from client.redaction import redact
from client.settings import SiteSettings, load_settings
from client.site import Site
from client.socket import peer_user, short
from client.studies import Studies
from samaritan import __version__
from samaritan.audit.gate import Gate
from samaritan.errors import DeploymentError, StorageError
from samaritan.lock import locked
from samaritan.messages import Answer, Request
from samaritan.provision.kit import Kit, load_kit

_log = logging.getLogger("samaritan.site")


def serve(folder: Path) -> None:
    """Runs the agent of a kit until it is told to stop (SIGTERM or SIGINT).

    Raises:
        SamaritanError: When the kit, its settings or its log cannot be used, or another agent of
            this site is running (SAM-N204).
    """
    kit = load_kit(folder, "site")
    settings = load_settings(kit.path("site.yaml"))
    identity = site_identity(kit)
    kit.path("state").mkdir(0o700, exist_ok=True)
    with _alone(kit.path("state")):
        log = site_log(kit, identity)
        log.append("started", samaritan=__version__)
        studies = Studies(kit, settings, identity, log)
        gate = Gate(log, settings.policy, f"{kit.card.host}:{kit.card.port}")
        outbox = Outbox(kit.path("state", "outbox"))
        site = Site(kit.card.name, studies.find, gate, identity, outbox)
        with _listening(kit, settings, site) as server:
            stop = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            threading.Thread(target=server.serve_forever, daemon=True).start()
            _log.info("the agent of %s is ready; %s", kit.card.name, __version__)
            stop.wait()
            server.shutdown()
        # Work that is under way ends with the process: nothing of it has left, and what was
        # charged for it stays charged.
        log.append("stopped", samaritan=__version__)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, site: Site, users: frozenset[int]) -> None:
        super().__init__(address, _Handler)
        self.site, self.users = site, users
        self.work = threading.Lock()


class _Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        server = cast(_Server, self.server)
        user = peer_user(cast(socket.socket, self.request))
        if user not in server.users:
            _log.warning("a connection of user %d was refused", user)
            return
        try:
            request = read_request(self.rfile)
        except EOFError:
            return  # somebody looked whether the agent is there
        except DeploymentError as error:
            self._send(pack_fault(redact(error)))
            return
        with server.work:
            try:
                answer = pack_answer(_answer(server.site, request))
            except Exception as error:
                answer = pack_fault(redact(error))
        self._send(answer)

    def _send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(data)  # a courier that died is asked again by the server


def _answer(site: Site, request: Request) -> Answer:
    _log.info("%s, round %d", request.kind, request.server_round)
    answer = site.answer(request)
    _log.info("%s, round %d: answered", request.kind, request.server_round)
    return answer


@contextlib.contextmanager
def _listening(kit: Kit, settings: SiteSettings, site: Site) -> Iterator[_Server]:
    path = kit.path(*SOCKET)
    path.parent.mkdir(0o755, exist_ok=True)
    path.unlink(missing_ok=True)
    courier = None if settings.courier_user is None else _user(settings.courier_user)
    users = {0, os.geteuid()} | ({courier.pw_uid} if courier else set())
    mask = os.umask(0o177)
    try:
        with short(path) as address:
            server = _Server(address, site, frozenset(users))
    finally:
        os.umask(mask)
    try:
        if courier is not None:
            os.chown(path, -1, courier.pw_gid)
            path.chmod(0o660)
        yield server
    finally:
        server.server_close()
        path.unlink(missing_ok=True)


def _user(name: str) -> pwd.struct_passwd:
    try:
        return pwd.getpwnam(name)
    except KeyError:
        raise DeploymentError(
            "SAM-N205",
            f"courier_user in site.yaml is {name!r}, and this machine has no such user",
            "Make the user, or leave courier_user out.",
        ) from None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except StorageError as error:
            raise DeploymentError(
                "SAM-N204",
                f"another agent of this site is running ({folder} is in use)",
                "Two agents of one site would spend its budget twice. Stop the other one first.",
            ) from error
        yield


if __name__ == "__main__":
    import sys

    from samaritan.errors import SamaritanError

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    try:
        serve(Path(sys.argv[1]))
    except SamaritanError as fault:
        sys.exit(f"error: {fault}")
