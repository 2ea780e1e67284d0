"""What sites are sent: the state of the server, as little of it as brings each site up to date.

With a lossy codec the server remembers what its sites have come to hold and sends the difference,
so that what one message leaves out is in the next. Sites of one rank hold the same state.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from samaritan.codecs import decode, encode, is_lossless
from samaritan.config import CodecConfig
from samaritan.messages import Instruction
from samaritan.models.adapter import AdapterState
from samaritan.models.bases import state_sha256

_WHOLE = CodecConfig()


@dataclass(frozen=True)
class Published:
    """A state as sites hold it.

    Attributes:
        state: Its tensors.
        sha256: Its name.
        before: The state that `change` is to be added to; empty where there is none.
        change: Payload that leads from there to here.
    """

    state: AdapterState
    sha256: str
    before: str = ""
    change: bytes | None = None

    @functools.cached_property
    def whole(self) -> bytes:
        """Payload that needs no other state."""
        return encode(self.state, _WHOLE, header={}, seed=0)


def publish(state: AdapterState) -> Published:
    """A state that is sent whole, or that sites make for themselves."""
    return Published(state, state_sha256(state))


def publish_after(
    before: Published, target: AdapterState, codec: CodecConfig, seed: int
) -> Published:
    """The state that sites come to hold when they are to be brought from one state to another.

    Args:
        before: What they hold.
        target: Where they should be.
        codec: A lossy one comes near the target only.
        seed: For rounding at random.
    """
    if is_lossless(codec):
        return publish(target)
    difference = {name: value - before.state[name] for name, value in target.items()}
    change = encode(difference, codec, header={}, seed=seed)
    shapes = {name: tuple(value.shape) for name, value in target.items()}
    added, _ = decode(change, shapes)
    state = {name: before.state[name] + value for name, value in added.items()}
    return Published(state, state_sha256(state), before.sha256, change)


class Delivery:
    """Which site holds which state, and what to send it.

    Args:
        ranks: LoRA rank by site, None for the server's own.
        published: The present state by rank.
        beginnings: What every site makes for itself, by rank: the whole adapter, and the hash of
            the part that is sent.
    """

    def __init__(
        self,
        ranks: Mapping[str, int | None],
        published: Mapping[int | None, Published],
        beginnings: Mapping[int | None, tuple[AdapterState, str]],
    ) -> None:
        self.ranks, self.published = ranks, dict(published)
        self._beginnings = beginnings
        self._holds: dict[str, str] = {}

    def state(self, site: str) -> Published:
        """What a site of this name works on."""
        return self.published[self.ranks[site]]

    def start(self, site: str) -> AdapterState:
        """The adapter a site begins a round with, but for what it keeps for itself."""
        adapter, _ = self._beginnings[self.ranks[site]]
        state = self.state(site).state
        return {name: state.get(name, value) for name, value in adapter.items()}

    def advance(self, published: Mapping[int | None, Published]) -> None:
        """A new state takes the place of the old."""
        self.published = dict(published)

    def address(self, site: str, instruction: Instruction) -> tuple[bytes | None, Instruction]:
        """The payload for a site, None where it holds the state, and the instruction with it."""
        state = self.state(site)
        held = self._holds.get(site, self._beginnings[self.ranks[site]][1])
        instruction = replace(instruction, state_sha256=state.sha256, reference_sha256="")
        if held == state.sha256:
            return None, instruction
        if state.change is not None and held == state.before:
            return state.change, replace(instruction, reference_sha256=held)
        return state.whole, instruction

    def arrived(self, site: str) -> None:
        """The site has answered, so it holds the present state."""
        self._holds[site] = self.state(site).sha256

    def lost(self, sites: Iterable[str]) -> None:
        """These sites may hold nothing but their beginning."""
        for site in sites:
            self._holds[site] = ""
