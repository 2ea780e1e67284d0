"""The coordinator's hand on the SuperLink: who may connect, which run is on, start and stop.

Flower's own command line cannot show the secret that `server.link` asks for, and takes seconds a
call. The private names of Flower that this needs live here; flwr is pinned for them.
"""

from __future__ import annotations

import hashlib
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
from samaritan.provision.kit import Kit
from server.bundle import PLAN_KEY, build_bundle
from server.home import CONTROL_HEADER
from server.nodes import der_of, key_of
from server.settings import ServerSettings

_FEDERATION = "@none/default"


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

    def unfinished(self) -> list[Run]:
        """Runs that are waiting or running."""
        runs = self._client.ListRuns(ListRunsRequest()).run_dict.values()
        return [run for run in runs if run.status.status != "finished"]

    def nodes(self) -> list[NodeInfo]:
        """Nodes that may connect, and when they were last there."""
        return list(self._client.ListNodes(ListNodesRequest()).nodes_info)

    def admit(self, node_keys: dict[str, str]) -> list[str]:
        """Lets exactly these sites connect; nodes of others are sent away.

        Args:
            node_keys: Key of the node by site, as OpenSSH writes it.

        Returns:
            Sites and nodes that changed, in words.
        """
        known = {der_of(node.public_key): node for node in self.nodes() if not _is_gone(node)}
        wanted = {key_of(key): site for site, key in node_keys.items()}
        changes = []
        for key, node in known.items():
            if key not in wanted:
                self._client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                changes.append(f"{node.name or node.node_id} may no longer connect")
        for key, site in wanted.items():
            if key not in known:
                pem = load_ssh_public_key(node_keys[site].encode()).public_bytes(
                    Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
                )
                self._client.RegisterNode(RegisterNodeRequest(public_key=pem, name=site))
                changes.append(f"{site} may connect")
        return changes


@contextmanager
def connect(kit: Kit, settings: ServerSettings) -> Iterator[Control]:
    """The control interface of this machine's SuperLink.

    Raises:
        DeploymentError: SAM-N301 when it does not answer, SAM-N302 when it refuses.
    """
    secret = kit.path("control.secret").read_bytes().strip()
    client = ControlHttpClient.from_server_address(
        f"127.0.0.1:{settings.link_port}",
        insecure=False,
        root_certificates=kit.path("ca.crt").read_bytes(),
        interceptors=[_ShowsSecret(secret)],
    )
    try:
        yield Control(client)
    except httpx.TransportError as error:
        raise DeploymentError(
            "SAM-N301",
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
        return str(response.json().get("message", ""))[:200]
    except ValueError:
        return ""
