"""The roll call: which node is which site, in the same study? Later ones are for late comers."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from flwr.app import Message
from flwr.serverapp import Grid

from samaritan.errors import FederationError
from samaritan.messages import Request
from samaritan.wire import MESSAGE_TYPES, read_answer, request_content
from server.ingress import Ingress
from server.nodes import online
from strategies.replies import error_status

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


@dataclass(frozen=True)
class Caller:
    """Who calls the roll.

    Attributes:
        grid: Flower's.
        expected: What each approved site must answer.
        request: The question.
        ingress: Writes answers down.
        node_keys: Key of each site's node; none in a simulation.
    """

    grid: Grid
    expected: Mapping[str, Mapping[str, str]]
    request: Request
    ingress: Ingress
    node_keys: Mapping[str, bytes]

    def call(self, min_sites: int, wait_s: float) -> RollCall:
        """Asks every node for its site, version, configuration, base and adapter.

        Args:
            min_sites: How many must be right.
            wait_s: How long to wait for them.

        Raises:
            FederationError: When too few sites are right after `wait_s` seconds.
        """
        end = time.monotonic() + wait_s
        present: dict[int, str] = {}
        while True:
            roll = self.ask(present, wait_s)
            present |= roll.present
            if len(present) == len(self.expected) or time.monotonic() > end:
                break
            if roll.refused and len(present) + len(roll.refused) >= len(self.expected):
                break  # everyone is here; waiting changes nothing
            time.sleep(_POLL_S)
        if len(present) < min_sites:
            waited = f"after {wait_s:g} s" if time.monotonic() > end else "and all have answered"
            faults = f" ({'; '.join(roll.refused)})" if roll.refused else ""
            raise FederationError(
                "SAM-F103",
                f"{len(present)} of {len(self.expected)} sites are ready {waited}, "
                f"{min_sites} needed{faults}",
                "Start the missing sites; where one is named with a code, mend that.",
            )
        return RollCall(present, roll.refused)

    def ask(self, known: Mapping[int, str], timeout_s: float) -> RollCall:
        """Asks the nodes that are online and not known yet; only they are in the result."""
        nodes = online(self.grid, self.node_keys)
        kind = MESSAGE_TYPES[self.request.kind]
        questions = [
            Message(
                request_content(self.ingress.addressed(self.request, nodes[node])),
                message_type=kind,
                dst_node_id=node,
            )
            for node in sorted(nodes)
            if node not in known
        ]
        present: dict[int, str] = {}
        refused: list[str] = []
        if not questions:
            return RollCall(present, refused)
        for reply in self.grid.send_and_receive(questions, timeout=timeout_s):
            node = reply.metadata.src_node_id
            if node not in nodes:
                continue  # nobody has asked it
            if reply.has_error():
                name = nodes[node]  # by its key, where nodes have keys
                if name is not None:
                    self.ingress.admits(name, self.request, reply)
                who = f"node {node}" if name is None else f"site {name}"
                refused.append(f"{who}: {error_status(reply)}")
                continue
            try:
                answer = read_answer(reply).texts
                site = answer["site"]
            except Exception as fault:  # an answer of any shape may come
                refused.append(f"node {node}: no readable answer ({type(fault).__name__})")
                continue
            right = self.expected.get(site, {})
            wrong = [k for k, v in right.items() if answer.get(k) != v]
            if site not in self.expected:
                refused.append(f"node {node}: not an approved site")
            elif nodes[node] not in (None, site):
                refused.append(f"node {node}: its key is that of site {nodes[node]}")
            elif not self.ingress.admits(site, self.request, reply):
                refused.append(f"site {site}: the answer is not sealed by this site")
            elif site in present.values() or site in known.values():
                refused.append(f"site {site}: a second node claims to be this site")
            elif wrong:
                pairs = ", ".join(
                    f"{k} {_plain(answer.get(k, ''))} not {right[k][:16]}" for k in wrong
                )
                refused.append(f"site {site}: {pairs}")
            else:
                present[node] = site
        return RollCall(present, refused)


def _plain(text: str) -> str:
    """The start of a hash or version; anything else a node sends is not repeated."""
    return text[:16] if re.fullmatch(r"[0-9a-f.]+", text) else "(unreadable)"
