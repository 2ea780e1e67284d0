"""The coordinator's hand on the SuperLink: who may connect, which run is on, start and stop.

Flower's own command line cannot show the secret that `server.link` asks for, and takes seconds a
call. The private names of Flower that this needs live here; flwr is pinned for them.
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext

from samaritan.errors import DeploymentError
from samaritan.operate.flower import past_proxies
from samaritan.provision.kit import Kit
from server.bundle import PLAN_KEY, build_bundle
from server.home import CONTROL_HEADER
from server.nodes import der_of, key_of
from server.settings import ServerSettings

SILENT = "SAM-N301"
"""Of a SuperLink that does not answer."""


@dataclass(frozen=True)
class _ShowsSecret:
    secret: bytes

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        context.request.headers[CONTROL_HEADER] = self.secret.decode()
        return call_next(context)


class Control:
    """A connection to the control interface of a running SuperLink.

    Args:
        client: Of Flower.
    """

    def __init__(self, client: ControlHttpClient) -> None:
        self._client = client

    def start(self, plan_sha256: str) -> int:
        """Starts a run of a plan and returns its number."""
        bundle = build_bundle()
        request = StartRunRequest(
            fab=Fab(hash_str=hashlib.sha256(bundle).hexdigest(), content=bundle),
            override_config=user_config_to_proto({PLAN_KEY: plan_sha256}),
        )
        return int(self._client.StartRun(request).run_id)

    def stop(self, run_id: int) -> None:
        """Ends a run; it can be resumed by another."""
        self._client.StopRun(StopRunRequest(run_id=run_id))

    def run(self, run_id: int) -> Run:
        """What Flower knows of a run."""
        found: Run = self._client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id]
        return found

    def runs(self) -> list[Run]:
        """All runs that Flower remembers."""
        return list(self._client.ListRuns(ListRunsRequest()).run_dict.values())

    def unfinished(self) -> list[Run]:
        """Runs that are waiting or running."""
        return [run for run in self.runs() if run.status.status != "finished"]

    def nodes(self) -> list[NodeInfo]:
        """Nodes that may connect, and when they were last there."""
        return list(self._client.ListNodes(ListNodesRequest()).nodes_info)

    def admit(self, node_keys: dict[str, str]) -> list[str]:
        """Lets these sites connect. Nodes of other sites may stay; nobody asks them anything.

        Flower never takes back a key that it has sent away, so only one that its site has replaced
        is.

        Args:
            node_keys: Key of the node by site, as OpenSSH writes it.

        Returns:
            Sites that changed, in words.
        """
        known = {der_of(node.public_key): node for node in self.nodes()}
        wanted = {key_of(key): site for site, key in node_keys.items()}
        changes = []
        for key, node in known.items():
            if node.name in node_keys and key not in wanted and not _is_gone(node):
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                changes.append(f"{node.name} may no longer connect with an older key")
        for key, site in wanted.items():
            if key not in known:
                pem = load_ssh_public_key(node_keys[site].encode()).public_bytes(
                    Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
                )
                self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=site))
                changes.append(f"{site} may connect")
            elif _is_gone(known[key]):
                changes.append(f"{site} may not connect: its key was sent away, it needs a new one")
        return changes


@contextmanager
def connect(kit: Kit, settings: ServerSettings, timeout_s: float = 30.0) -> Iterator[Control]:
    """The control interface of this machine's SuperLink.

    Args:
        kit: Of the server.
        settings: Of the server.
        timeout_s: How long it may be silent.

    Raises:
        DeploymentError: SAM-N301 when it does not answer, SAM-N302 when it refuses.
    """
    secret = kit.path("control.secret").read_bytes().strip()
    trusted = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusted.load_verify_locations(cadata=kit.path("ca.crt").read_text())
    os.environ.update(past_proxies())  # which the client below reads
    client = ControlHttpClient(
        f"https://127.0.0.1:{settings.link_port}",
        interceptors=[_ShowsSecret(secret)],
        verify=trusted,
        timeout=timeout_s,
    )
    try:
        yield Control(client)
    except httpx.TransportError as error:
        raise DeploymentError(
            SILENT,
            f"the SuperLink does not answer on 127.0.0.1:{settings.link_port} "
            f"({type(error).__name__})",
            "Start it with `samaritan server start KIT`; `samaritan server status KIT` shows more.",
        ) from error
    except httpx.HTTPStatusError as error:
        raise DeploymentError(
            "SAM-N302",
            f"the SuperLink refuses: {error.response.status_code} {_reason(error.response)}",
            "Its log (`run/link.log` in the kit) says why.",
        ) from error
    finally:
        client.close()


def _is_gone(node: Any) -> bool:
    return bool(node.status == "unregistered")


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])[:200]
    except (ValueError, KeyError, TypeError):
        return ""
