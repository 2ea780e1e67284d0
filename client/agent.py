"""The site agent: the trusted side of a hospital. It owns the data and the frozen base.

The courier (`client.app`) hands it plain tensors and numbers, and nothing a server ships runs here.
In a simulation the agents of all sites share one model, since a site loads the adapter it was sent
before it does anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from samaritan import __version__
from samaritan.config import Config, config_sha256
from samaritan.data.datasets import Case
from samaritan.data.slices import CaseCache
from samaritan.errors import FederationError
from samaritan.models.adapter import AdaptedModel, AdapterState
from samaritan.training.evaluate import evaluate_cases, mean_dice
from samaritan.training.local import Schedule, StepCallback, round_seed, train_locally
from samaritan.wire import Instruction

Metrics = dict[str, float | int]


@dataclass(frozen=True)
class SiteAgent:
    """One hospital.

    Attributes:
        site: Its name.
        config: The configuration the hospital agreed to.
        model: The frozen base with room for one adapter.
        cache: Reads the hospital's cases.
        train_cases, val_cases: The hospital's own split.
        progress: Told of every training step: site, step, steps, loss.
    """

    site: str
    config: Config
    model: AdaptedModel
    cache: CaseCache
    train_cases: tuple[Case, ...]
    val_cases: tuple[Case, ...]
    progress: Callable[[str, int, int, float], None] | None = None

    def hello(self) -> dict[str, str]:
        """What the site tells a server before the first round."""
        return {
            "site": self.site,
            "samaritan": __version__,
            "config-sha256": config_sha256(self.config),
            "base-sha256": self.model.base.sha256,
        }

    def train(
        self, adapter: AdapterState, instruction: Instruction
    ) -> tuple[AdapterState, Metrics]:
        """Trains on the site's cases from the given adapter.

        Returns:
            The update (trained minus received, by tensor) and `num-examples`, `train-loss`,
            `steps`, `seconds`.

        Raises:
            SamaritanError: When the instruction or adapter does not fit, or training fails.
        """
        begun = time.monotonic()
        received = self._accept(adapter, instruction)
        result = train_locally(
            self.model,
            self.cache,
            self.train_cases,
            self.config.training,
            schedule=Schedule(
                (instruction.server_round - 1) / instruction.rounds,
                instruction.server_round / instruction.rounds,
            ),
            seed=round_seed(self.config.seed, instruction.server_round, self.site),
            timeout_s=min(instruction.timeout_s, self.config.federation.round_timeout_s),
            on_step=self._on_step(),
        )
        update = {name: value - received[name] for name, value in self.model.state().items()}
        metrics: Metrics = {
            "num-examples": len(self.train_cases),
            "train-loss": result.loss,
            "steps": result.steps,
            "seconds": time.monotonic() - begun,
        }
        return update, metrics

    def evaluate(self, adapter: AdapterState, instruction: Instruction) -> Metrics:
        """Scores an adapter on the site's validation cases.

        Returns:
            `dice` (mean over cases; left out where the site has none), `num-cases`, `seconds`.

        Raises:
            SamaritanError: When the instruction or adapter does not fit, or a case cannot be read.
        """
        begun = time.monotonic()
        self._accept(adapter, instruction)
        results = evaluate_cases(
            self.model.segmenter, self.cache, self.val_cases, self.config.evaluation
        )
        dice = mean_dice(results)
        metrics: Metrics = {
            "num-cases": len(results),
            "seconds": time.monotonic() - begun,
        }
        return metrics if dice is None else metrics | {"dice": dice}

    def _accept(self, adapter: AdapterState, instruction: Instruction) -> AdapterState:
        """Checks what the server sent against what the site agreed to, and loads it."""
        for what, sent, agreed in (
            ("configuration", instruction.config_sha256, config_sha256(self.config)),
            ("base model", instruction.base_sha256, self.model.base.sha256),
            ("number of rounds", instruction.rounds, self.config.rounds),
        ):
            if sent != agreed:
                raise FederationError(
                    "SAM-F201",
                    f"site {self.site}: the server has {what} {sent}, this site agreed to {agreed}",
                    "Give server and sites the same configuration and base.",
                )
        if not 1 <= instruction.server_round <= instruction.rounds:
            raise FederationError(
                "SAM-F202",
                f"site {self.site}: round {instruction.server_round} of {instruction.rounds}",
                "The server asks for a round that was not agreed to.",
            )
        self.model.load(adapter)
        return self.model.state()

    def _on_step(self) -> StepCallback | None:
        if self.progress is None:
            return None
        progress, site = self.progress, self.site
        return lambda step, steps, loss: progress(site, step, steps, loss)
