"""Which Flower node is which site: by the key a node proves to have, where the plan names one."""

from __future__ import annotations

from collections.abc import Mapping

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_public_key,
    load_ssh_public_key,
)
from flwr.serverapp import Grid


def online(grid: Grid, keys: Mapping[str, bytes]) -> dict[int, str | None]:
    """Nodes that are online, with the site each one must be.

    Args:
        grid: Flower's.
        keys: Node key by site, from `key_of`; none in a simulation, where any node may be any site.

    Returns:
        The site by node id, None where the node may be any. Of nodes whose key no site has there is
        nothing: they belong to other studies, or to nobody.
    """
    if not keys:
        return dict.fromkeys(grid.get_node_ids())
    sites = {key: site for site, key in keys.items()}
    found = {node.node_id: sites.get(der_of(node.public_key)) for node in grid.get_nodes()}
    return {node: site for node, site in found.items() if site is not None}


def key_of(node_key: str) -> bytes:
    """A node's public key as bytes to compare, from the text OpenSSH writes.

    Raises:
        ValueError: When it is no such key.
    """
    try:
        key = load_ssh_public_key(node_key.encode())
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def der_of(pem: bytes) -> bytes:
    """A node's public key as bytes to compare, from what Flower has; empty for none."""
    try:
        key = load_pem_public_key(pem)
    except ValueError:
        return b""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
