"""The roll call before the first round: which node is which site, in the same study?"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from samaritan.errors import FederationError
from samaritan.wire import CONFIG, content

_POLL_S = 0.2


@dataclass(frozen=True)
class RollCall:
    """Who answered.

    Attributes:
        present: Site name by node id, of the sites that run the same study.
        refused: What is wrong with each other node.
    """

    present: dict[int, str]
    refused: list[str]


def roll_call(
    grid: Grid,
    expected: Mapping[str, Mapping[str, str]],
    min_sites: int,
    wait_s: float,
) -> RollCall:
    """Asks every node for its site, version, configuration, base and adapter.

    Args:
        grid: Flower's.
        expected: What each approved site must answer.
        min_sites: How many must be right.
        wait_s: How long to wait for them.

    Raises:
        FederationError: When too few sites are right after `wait_s` seconds.
    """
    approved = list(expected)
    end = time.monotonic() + wait_s
    while True:
        roll = _ask(grid, expected, wait_s)
        if len(roll.present) == len(approved):
            return roll
        if time.monotonic() > end:
            break
        if roll.refused and len(roll.present) + len(roll.refused) >= len(approved):
            break  # everyone is here; waiting changes nothing
        time.sleep(_POLL_S)
    if len(roll.present) < min_sites:
        faults = f" ({'; '.join(roll.refused)})" if roll.refused else ""
        raise FederationError(
            "SAM-F103",
            f"{len(roll.present)} of {len(approved)} sites are ready after {wait_s:g} s, "
            f"{min_sites} needed{faults}",
            "Start the missing sites, or lower federation.min_sites.",
        )
    return roll


def _ask(grid: Grid, expected: Mapping[str, Mapping[str, str]], timeout_s: float) -> RollCall:
    questions = [
        Message(content(), message_type=MessageType.QUERY, dst_node_id=node)
        for node in sorted(grid.get_node_ids())
    ]
    present: dict[int, str] = {}
    refused: list[str] = []
    for reply in grid.send_and_receive(questions, timeout=timeout_s):
        node = reply.metadata.src_node_id
        try:
            answer = {k: str(v) for k, v in reply.content.config_records[CONFIG].items()}
            site = answer["site"]
        except Exception as fault:  # an answer of any shape may come
            refused.append(f"node {node}: no readable answer ({type(fault).__name__})")
            continue
        right = expected.get(site, {})
        wrong = [k for k, v in right.items() if answer.get(k) != v]
        if site not in expected:
            refused.append(f"node {node}: not an approved site")
        elif site in present.values():
            refused.append(f"site {site}: a second node claims to be this site")
        elif wrong:
            pairs = ", ".join(f"{k} {_plain(answer.get(k, ''))} not {right[k][:16]}" for k in wrong)
            refused.append(f"site {site}: {pairs}")
        else:
            present[node] = site
    return RollCall(present, refused)


def _plain(text: str) -> str:
    """The start of a hash or version; anything else a node sends is not repeated."""
    return text[:16] if re.fullmatch(r"[0-9a-f.]+", text) else "(unreadable)"
