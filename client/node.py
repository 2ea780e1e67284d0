"""The site's Flower SuperNode: with a client certificate, and a shorter wait between two looks.

The certificate lets the server's proxy turn away whoever is not of this consortium before Flower
sees them. The private names of Flower that this needs live here; flwr is pinned for them.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Sequence
from typing import Any, Self

import flwr.supernode.fleet_http_connection as fleet
import flwr.supernode.start_client_internal as worker
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.supernode.cli.flower_supernode import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.home import CERTIFICATE_VARIABLE, KEY_VARIABLE

_LOOK_S, _LOOK_INSIDE_S = 0.5, 0.1
"""Between two looks for messages of the server, and for an answer of the courier."""

_AGAIN_S = 10
"""Between a node that could not start and the next try."""


class _CertifiedClient(FleetHttpClient):
    """Flower's client of the server, which shows a certificate."""

    @classmethod
    def from_server_address(
        cls,
        server_address: str,
        insecure: bool,
        root_certificates: bytes | str | None,
        interceptors: Sequence[Any],
        *,
        retry_invoker: Any = None,
    ) -> Self:
        """As Flower's; never without TLS."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if isinstance(root_certificates, bytes):
            context.load_verify_locations(cadata=root_certificates.decode("ascii"))
        else:
            context.load_verify_locations(cafile=root_certificates)
        context.load_cert_chain(os.environ[CERTIFICATE_VARIABLE], os.environ[KEY_VARIABLE])
        return cls(
            f"https://{server_address}",
            interceptors=interceptors,
            verify=context,
            retry_invoker=retry_invoker,
        )

    def PushMessages(self, request: PushMessagesRequest) -> PushMessagesResponse:
        """As Flower's, without how long the site worked: that tells how many cases it has."""
        request.clientapp_runtime_list[:] = [0.0] * len(request.clientapp_runtime_list)
        return super().PushMessages(request)


class _Clock:
    """In place of the module `time`, of which the worker loop uses one function."""

    @staticmethod
    def sleep(seconds: float) -> None:
        """Between two looks at the server three seconds, at this machine's courier half of one."""
        time.sleep(_LOOK_S if seconds > 1 else _LOOK_INSIDE_S)


def main() -> None:
    """Runs the node until it is told to stop."""
    vars(fleet).update(FleetHttpClient=_CertifiedClient)
    vars(worker).update(time=_Clock)
    try:
        flower_supernode()
    except SystemExit as end:
        if not end.code:  # it was told to stop
            return
    # A node that the server does not know yet, or cannot reach, is started again by its supervisor,
    # and starting costs a second of processor time. Flower ends its process by force soon after
    # this; another program in its place is left alone. Where a line broke while TLS was being
    # agreed on, Flower returns, and its other threads would keep a process alive that does nothing.
    os.execvp("sleep", ["sleep", str(_AGAIN_S)])  # noqa: S606, S607


if __name__ == "__main__":
    main()
