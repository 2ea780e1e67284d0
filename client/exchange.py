"""The site's end of the wire: from a payload to the adapter it stands for, and back.

The server sends what changed since a state the site has, where that is shorter, and nothing where
the site has the state already. Every state is named by its hash, so that a site never trains from
another adapter than the one the server means.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from samaritan.codecs import WireError, decode, with_feedback
from samaritan.config import CodecConfig, Config
from samaritan.errors import FederationError
from samaritan.messages import Instruction
from samaritan.models.adapter import AdapterState
from samaritan.models.bases import state_sha256


@dataclass
class KnownStates:
    """The last states that came in, by hash; sites in one process share them.

    Attributes:
        limit: How many are kept; the one before the newest is what the next payload is added to.
    """

    limit: int
    states: OrderedDict[str, AdapterState] = field(default_factory=OrderedDict)

    def keep(self, sha256: str, state: AdapterState) -> None:
        """Remembers a state, and forgets the oldest beyond the limit."""
        self.states[sha256] = state
        self.states.move_to_end(sha256)
        while len(self.states) > self.limit:
            self.states.popitem(last=False)


@dataclass(frozen=True)
class Exchange:
    """Reads what the server sends and writes what the site answers.

    Attributes:
        site: Its name; decides how its numbers are rounded at random.
        config: The configuration the hospital agreed to; names the codecs.
        beginning: What the server may have changed, as it was before the first round; every site
            makes it for itself.
        known: States that came in.
    """

    site: str
    config: Config
    beginning: AdapterState
    known: KnownStates

    @functools.cached_property
    def beginning_sha256(self) -> str:
        """Hash of the state before the first round."""
        return state_sha256(self.beginning)

    def receive(self, payload: bytes | None, instruction: Instruction) -> AdapterState:
        """The state the server means.

        Raises:
            FederationError: SAM-F203 when the payload is to be added to a state the site does not
                have or does not come to the state that was named, SAM-F204 when it is unreadable.
        """
        wanted, reference = instruction.state_sha256, instruction.reference_sha256
        if payload is None:
            return self._known(wanted)
        shapes = {name: tuple(value.shape) for name, value in self.beginning.items()}
        try:
            codec = self.config.wire.down if reference else CodecConfig()
            state, _ = decode(payload, shapes, codec)
        except WireError as error:
            raise FederationError(
                "SAM-F204",
                f"site {self.site}: what the server sent cannot be read: {error}",
                "Give server and sites the same version of Samaritan.",
            ) from error
        if reference:
            known = self._known(reference)
            state = {name: known[name] + value for name, value in state.items()}
        if state_sha256(state) != wanted:
            raise self._unknown(wanted)
        self.known.keep(wanted, state)
        return state

    def send(
        self,
        delta: AdapterState,
        left_out: AdapterState,
        instruction: Instruction,
    ) -> tuple[bytes, AdapterState]:
        """The payload for an update, and what its codec left out for the next one.

        Args:
            delta: Trained minus received.
            left_out: What the codec left out last time.
            instruction: The one that is answered; the payload names its round and state.

        Raises:
            FederationError: When the update is not finite.
        """
        wire = self.config.wire
        digest = hashlib.sha256(
            f"{self.config.seed}/{instruction.server_round}/{self.site}/up".encode()
        ).digest()
        try:
            payload, rest = with_feedback(
                delta,
                left_out if wire.error_feedback else {},
                wire.up,
                header=update_header(instruction.server_round, instruction.state_sha256),
                seed=int.from_bytes(digest[:7], "big"),
            )
        except WireError as error:
            raise FederationError(
                "SAM-F205",
                f"site {self.site}: the update cannot be sent: {error}",
                "Lower training.learning_rate, or run `samaritan data check`.",
            ) from error
        return payload, rest if wire.error_feedback else {}

    def _known(self, sha256: str) -> AdapterState:
        if sha256 in self.known.states:
            return self.known.states[sha256]
        if sha256 == self.beginning_sha256:
            return self.beginning
        raise self._unknown(sha256)

    def _unknown(self, sha256: str) -> FederationError:
        return FederationError(
            "SAM-F203",
            f"site {self.site} has no state {sha256[:16]}",
            "Nothing to do: the server sends the whole state when it reads this code.",
        )


def update_header(server_round: int, state_sha256: str) -> Mapping[str, str]:
    """What an update says of itself: its round, and the state it is to be added to."""
    return {"round": str(server_round), "state": state_sha256}
