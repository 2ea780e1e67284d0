"""What travels between the server and one site in a round: full fine-tuning against FLAP-SAM.

    OMP_NUM_THREADS=1 python -m benchmarks.communication

The paper's setting (arXiv 2407.21739): `vit_b`, 224 px, rank 32, two classes, FLAP-SAM's decoder.
Real rounds of the real server and the site's real end of the wire; in place of training, a site
draws an update at random: normal numbers, and Student's t with 3 degrees of freedom, whose few
large numbers leave the integers of the others small and easy to squeeze. What training makes is
neither; bytes of real updates are in the summary of a run. Every message is weighed as it is
serialised, with its headers, hashes and metrics. In the first round a site has the adapter already
and is sent none, so that means are those of the later rounds.

A round trip is the request to train, with what changed, and the update that answers it. Scoring is
asked for after the last round; where it is asked for in every round, the change travels with that
request, and the next request to train is bare: the sum grows by two bare messages.
"""

from __future__ import annotations

import platform
import resource
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import torch
from flwr.app import Message, MessageType
from torch import Tensor

from client.agent import SiteAgent
from client.app import make_client_app
from client.exchange import Exchange, KnownStates
from client.site import ask_agent
from samaritan import __version__
from samaritan.config import Config, config_sha256, parse_config
from samaritan.messages import Answer, Instruction, Request
from samaritan.models.adapt import adapt
from samaritan.models.bases import FAMILIES, get_base
from samaritan.shares import public_state
from samaritan.wire import message_bytes, read_request
from server.federation import Federation
from server.rounds import run_rounds
from simulation.grid import InProcessGrid

_SITE, _BASE = "site", "0" * 64
_ROUNDS, _SIDE, _CLASSES, _RANK = 4, 224, 2, 32

CODECS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8 both ways": {"up": {"numbers": "int8"}, "down": {"numbers": "int8"}},
    "low rank 8, int8 both ways": {
        "up": {"low_rank": 8, "numbers": "int8"},
        "down": {"low_rank": 8, "numbers": "int8"},
    },
    "int4 both ways": {"up": {"numbers": "int4"}, "down": {"numbers": "int4"}},
    "up top 0.2 int4, down int4": {
        "up": {"top_k": 0.2, "numbers": "int4"},
        "down": {"numbers": "int4"},
    },
    "up top 0.05 int4, down int4": {
        "up": {"top_k": 0.05, "numbers": "int4"},
        "down": {"numbers": "int4"},
    },
    "up top 0.05 int4, down top 0.2 int4": {
        "up": {"top_k": 0.05, "numbers": "int4"},
        "down": {"top_k": 0.2, "numbers": "int4"},
    },
}
"""The `wire` sections that are compared."""

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def _student(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    squares = torch.randn((3, *shape), generator=generator).square_().mean(0)
    return _normal(shape, generator) / squares.sqrt_()


DRAWS: dict[str, Draw] = {"normal": _normal, "student": _student}


@dataclass(frozen=True)
class Exchanged:
    """A request and its answer.

    Attributes:
        kind: "train" or "evaluate".
        server_round: 1 and up.
        down, up: Bytes of the request and of the answer.
    """

    kind: str
    server_round: int
    down: int
    up: int

    @property
    def both(self) -> int:
        """Bytes of the two together."""
        return self.down + self.up


def main() -> None:
    """Prints a row for full fine-tuning and one for each codec."""
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}; {_ROUNDS} rounds, bytes")
    print(
        f"{'':43} {'update':8} {'up':>11} {'down':>11} {'round trip':>11} {'factor':>7}   "
        f"{'scoring: down, up':>18}   round trips one by one"
    )
    whole = _print_row("full fine-tuning, fp32", "normal", measure("full", {}), None)
    for name, wire in CODECS.items():
        for draw in DRAWS:
            _print_row(f"flap-sam, {name}", draw, measure("flap-sam", wire, draw), whole)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def _print_row(name: str, draw: str, exchanged: list[Exchanged], whole: float | None) -> float:
    trips, scoring = trained(exchanged), [e for e in exchanged if e.kind == MessageType.EVALUATE]
    later = trips[1:]
    up, down = fmean(trip.up for trip in later), fmean(trip.down for trip in later)
    factor = (whole or up + down) / (up + down)
    print(
        f"{name:43} {draw:8} {up:11.0f} {down:11.0f} {up + down:11.0f} {factor:7.1f}   "
        f"{scoring[-1].down:12d}, {scoring[-1].up:4d}   {' '.join(str(t.both) for t in trips)}",
        flush=True,
    )
    return up + down


def trained(exchanged: Iterable[Exchanged]) -> list[Exchanged]:
    """The requests to train and their answers, in the order of the rounds."""
    return [e for e in exchanged if e.kind == MessageType.TRAIN]


def measure(
    preset: str, wire: Mapping[str, Any], draw: str = "normal", rounds: int = _ROUNDS
) -> list[Exchanged]:
    """What the server and one site send each other in a run, from the first round to the last.

    Args:
        preset: What is trained.
        wire: Section `wire` of the configuration.
        draw: How updates are drawn, a key of `DRAWS`.
        rounds: Length of the run; only the last round is scored.
    """
    config = parse_config(
        {
            "strategy": "fedavg" if preset == "full" else "svd",
            "rounds": rounds,
            "model": {"base": "vit_b", "image_size": _SIDE, "decoder": "reference"},
            "peft": {"preset": preset, "rank": _RANK},
            "wire": dict(wire),
            "evaluation": {"every_rounds": rounds},
        }
    )
    initial = _beginning(trained_shapes(preset))
    site = _Site(config, initial, DRAWS[draw])
    grid = _Scales(site)
    with tempfile.TemporaryDirectory() as folder:
        run_rounds(grid, Federation(config, _BASE, initial, [_SITE], Path(folder)))
    return grid.exchanged


def trained_shapes(preset: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a preset trains, without the memory of a model."""
    base = get_base("vit_b")
    with torch.device("meta"):
        model = FAMILIES[base.family].construct(
            base.shape, _CLASSES, base.channels or 3, "reference"
        )
        peft = parse_config({"peft": {"preset": preset, "rank": _RANK}}).peft
        _, tensors = adapt(model, base, peft, input_size=(_SIDE, _SIDE), depth=1, seed=0)
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _beginning(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * (0.0 if ".lora_B" in name else 0.02)
        for name, shape in shapes.items()
    }


class _Site:
    """A site agent that draws its updates."""

    def __init__(self, config: Config, initial: dict[str, Tensor], draw: Draw) -> None:
        self.config, self.draw = config, draw
        self.exchange = Exchange(_SITE, config, public_state(config, initial), KnownStates(2))
        self.left_out: dict[str, Tensor] = {}

    def hello(self) -> dict[str, str]:
        return {
            "site": _SITE,
            "samaritan": __version__,
            "config-sha256": config_sha256(self.config),
            "base-sha256": _BASE,
            "adapter-sha256": self.exchange.beginning_sha256,
        }

    def answer(self, request: Request) -> Answer:
        return ask_agent(cast(SiteAgent, self), request)

    def train(self, payload: bytes | None, instruction: Instruction) -> tuple[bytes, Any]:
        state = self.exchange.receive(payload, instruction)
        generator = torch.Generator().manual_seed(instruction.server_round)
        update = {name: self.draw(value.shape, generator) * 1e-3 for name, value in state.items()}
        data, self.left_out = self.exchange.send(update, self.left_out, instruction)
        return data, {"num-examples": 8, "train-loss": 0.5, "steps": 8, "seconds": 1.0}

    def evaluate(self, payload: bytes | None, instruction: Instruction) -> dict[str, float]:
        self.exchange.receive(payload, instruction)
        return {"dice": 0.5, "num-cases": 2, "seconds": 1.0}


class _Scales(InProcessGrid):
    """A Grid of one site that weighs what passes."""

    def __init__(self, site: _Site) -> None:
        super().__init__(make_client_app(lambda context: site), 1)
        self.exchanged: list[Exchanged] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        for message in messages:
            for reply in super().send_and_receive([message], timeout=timeout):
                kind = message.metadata.message_type
                if kind in (MessageType.TRAIN, MessageType.EVALUATE):
                    number = read_request(message, "train").server_round
                    self.exchanged.append(
                        Exchanged(kind, number, message_bytes(message), message_bytes(reply))
                    )
                yield reply


if __name__ == "__main__":
    main()
