"""The site agent: the trusted side of a hospital. It owns the data and the frozen base.

The courier (`client.app`) hands it plain bytes and numbers, and nothing a server ships runs here.
In a simulation the agents of all sites share one model, since a site loads the adapter it was sent
before it does anything.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from client.exchange import Exchange
from client.likely import require_likely
from client.masking import Masking
from client.memory import Memory, Notes
from samaritan import __version__
from samaritan.config import Config, config_sha256
from samaritan.data.datasets import Case
from samaritan.data.slices import CaseCache
from samaritan.errors import FederationError, PrivacyError
from samaritan.messages import Instruction, MaskingStep
from samaritan.models.adapter import AdaptedModel, AdapterState, at_rank
from samaritan.privacy.adaptive import AdaptiveClip
from samaritan.privacy.budget import Budget
from samaritan.privacy.ledger import Question
from samaritan.shares import CONTROL, Shares, noisy_sites, shares, tells_scores
from samaritan.training.drift import control_change
from samaritan.training.evaluate import evaluate_cases, mean_dice
from samaritan.training.local import Schedule, StepCallback, round_seed, train_locally
from samaritan.training.metrics import case_mean, mean
from samaritan.training.private import train_privately

Metrics = dict[str, float | int | str]

_FINE_TUNING = 0.75
"""Where in the cosine decay fine-tuning begins: the adapter is good already."""


@dataclass(frozen=True)
class SiteAgent:
    """One hospital.

    Attributes:
        site: Its name.
        config: The configuration the hospital agreed to.
        model: The frozen base with room for one adapter.
        initial: The adapter before the first round, of this site's rank.
        exchange: Its end of the wire.
        memory: What it keeps between rounds.
        cache: Reads the hospital's cases.
        train_cases, val_cases: The hospital's own split.
        progress: Told of every training step: site, step, steps, loss.
        budget: What the site's patients may give away; None where no privacy is asked for.
        masking: Its part in secure sums; None where updates are sent as they are.
        plan_sha256: Of the plan it works on; empty in a simulation.
        cases_sha256: Over its cases, their persons and files; empty in a simulation.
    """

    site: str
    config: Config
    model: AdaptedModel
    initial: AdapterState
    exchange: Exchange
    memory: Memory
    cache: CaseCache
    train_cases: tuple[Case, ...]
    val_cases: tuple[Case, ...]
    progress: Callable[[str, int, int, float], None] | None = None
    budget: Budget | None = None
    masking: Masking | None = None
    plan_sha256: str = ""
    cases_sha256: str = ""

    def hello(self) -> dict[str, str]:
        """What the site tells a server before the first round."""
        plan = {"plan-sha256": self.plan_sha256} if self.plan_sha256 else {}
        return plan | {
            "site": self.site,
            "samaritan": __version__,
            "config-sha256": config_sha256(self.config),
            "base-sha256": self.model.base.sha256,
            "adapter-sha256": self.exchange.beginning_sha256,
        }

    def train(
        self, payload: bytes | None, instruction: Instruction, step: MaskingStep | None = None
    ) -> tuple[bytes, Metrics]:
        """Trains on the site's cases from the adapter the server means.

        Args:
            payload: Brings the site to the adapter, if it has another.
            instruction: From the server.
            step: What other sites have sent for the masks, where aggregation is to be secure.

        Returns:
            The update as a payload (trained minus received, of what the site sends), or under
            masks, and `num-examples`, `train-loss`, `steps`, `seconds`; under privacy
            `num-examples`, `steps` and `ledger`.

        Raises:
            SamaritanError: When the instruction or adapter does not fit, or training fails.
        """
        begun = time.monotonic()
        self._check(instruction)
        self._require_parts(step)
        received = self._received(payload, instruction)
        notes = self.memory.recall(instruction.used_round)
        if self.budget is not None:
            update, metrics = self._train_privately(self.budget, received, notes, instruction)
        else:
            update, metrics = self._train_openly(received, notes, instruction)
            metrics["seconds"] = time.monotonic() - begun
        if self.masking is None or step is None:
            return update, metrics
        names = shares(self.config, self.initial, instruction.server_round).sent
        shapes = {name: tuple(self.initial[name].shape) for name in names}
        return self.masking.mask(update, shapes, step, instruction), metrics

    def secure_sum(self, step: MaskingStep, instruction: Instruction) -> bytes:
        """The site's answer to a step of a secure sum.

        Raises:
            SamaritanError: When nothing like it was agreed to, or the protocol refuses it.
        """
        self._check(instruction)
        if self.masking is None:
            raise PrivacyError(
                "SAM-P307",
                f"site {self.site} has not agreed to secure aggregation",
                "Give server and sites the same configuration.",
            )
        return self.masking.step(step, instruction)

    def _require_parts(self, step: MaskingStep | None) -> None:
        """Refuses to train in the open where noise or masks were agreed to."""
        if self.config.federation.secure_aggregation and (step is None or self.masking is None):
            raise PrivacyError(
                "SAM-P306",
                f"site {self.site} was asked for an update without masks",
                "The server asks for more than was agreed to; look at its version.",
            )
        if noisy_sites(self.config) and self.budget is None:
            raise PrivacyError(
                "SAM-P311",
                f"site {self.site} has no privacy ledger, and noise was agreed to",
                "Start the site with its ledger.",
            )

    def _train_openly(
        self, received: AdapterState, notes: Notes, instruction: Instruction
    ) -> tuple[bytes, Metrics]:
        """As `train`, without noise."""
        start = self._adapter(received, notes.get("personal", {}))
        roles = shares(self.config, self.initial, instruction.server_round)
        own_control = notes.get("control", {})
        self.model.load(start)
        result = train_locally(
            self.model,
            self.cache,
            self.train_cases,
            self.config.training,
            schedule=_schedule(instruction),
            seed=round_seed(self.config.seed, instruction.server_round, self.site),
            timeout_s=self._timeout_s(instruction),
            names=roles.trained,
            control=self._control(received, own_control, roles),
            on_step=self._on_step(),
        )
        control: Notes = {}
        change: AdapterState = {}
        if result.mean_gradient is not None:
            gradient = self._own_rank(result.mean_gradient)
            control["control"], changed = control_change(gradient, own_control)
            change = {CONTROL + name: changed[name] for name in sorted(roles.sent)}
        update = self._pack(instruction, start, notes, roles, control, change)
        metrics: Metrics = {
            "num-examples": len(self.train_cases),
            "train-loss": result.loss,
            "steps": result.steps,
        }
        return update, metrics

    def _train_privately(
        self, budget: Budget, received: AdapterState, notes: Notes, instruction: Instruction
    ) -> tuple[bytes, Metrics]:
        """As `train`, under differential privacy: what is told of the site is public already."""
        privacy, plan = self.config.privacy, budget.plan
        clip_norm = float(notes["clip"]["norm"]) if "clip" in notes else privacy.clip_norm
        adaptive = AdaptiveClip(privacy.clip_quantile, clip_norm) if privacy.clip_quantile else None
        start = self._adapter(received, notes.get("personal", {}))
        roles = shares(self.config, self.initial, instruction.server_round)

        def work() -> bytes:
            self.model.load(start)
            train_privately(
                self.model,
                self.cache,
                self.train_cases,
                self.config.training,
                plan.mechanism(clip_norm),
                unit=plan.unit,
                steps=plan.steps_per_round,
                slices_per_patient=privacy.slices_per_patient,
                schedule=_schedule(instruction),
                timeout_s=self._timeout_s(instruction),
                names=roles.trained,
                adaptive=adaptive,
                on_step=self._on_step(),
            )
            norm = {"clip": {"norm": torch.tensor([adaptive.clip_norm])}} if adaptive else {}
            return self._pack(instruction, start, notes, roles, norm, {})

        # What the site starts from is the server's state and its own notes.
        start_hash = hashlib.sha256(
            f"{instruction.state_sha256}/{self.memory.identifier}/{instruction.used_round}".encode()
        ).hexdigest()
        question = Question(instruction.config_sha256, instruction.server_round, start_hash)
        update, ledger = budget.answer(question, clip_norm, work, instruction.ledger)
        told: Metrics = {"num-examples": plan.records, "steps": plan.steps_per_round}
        return update, told | {"ledger": ledger}

    def _pack(
        self,
        instruction: Instruction,
        start: AdapterState,
        notes: Notes,
        roles: Shares,
        own: Notes,
        beside: AdapterState,
    ) -> bytes:
        """The payload of what was trained; remembers what stays at the site, and `own`."""
        trained = self._own_rank(self.model.state())
        delta = {name: trained[name] - start[name] for name in sorted(roles.sent)} | beside
        update, left_out = self.exchange.send(delta, notes.get("left_out", {}), instruction)
        kept = {"personal": {name: trained[name] for name in sorted(roles.personal)}}
        kept |= own | {"left_out": left_out}
        if kept := {k: v for k, v in kept.items() if v}:
            self.memory.remember(instruction.server_round, kept, instruction.used_round)
        return update

    def evaluate(self, payload: bytes | None, instruction: Instruction) -> Metrics:
        """Scores an adapter, with the site's personal part, on the site's validation cases.

        Returns:
            `dice` (mean over cases; left out where the site has none), `num-cases`, `seconds`; in
            the last round of a deployment, whose server sees no case, also `hd95-mm` and `nsd`.

        Raises:
            SamaritanError: When the instruction or adapter does not fit, or a case cannot be read.
        """
        begun = time.monotonic()
        self._check(instruction)
        if not tells_scores(self.config):
            raise PrivacyError(
                "SAM-P302",
                f"site {self.site} was asked for its score, and privacy.scores is withheld",
                "The server asks for more than was agreed to; look at its version.",
            )
        received = self._received(payload, instruction)
        self.model.load(self.personalised(received, instruction.used_round))
        last = bool(self.plan_sha256) and instruction.server_round == instruction.rounds
        results = evaluate_cases(
            self.model.segmenter, self.cache, self.val_cases, self.config.evaluation, surfaces=last
        )
        found = {"dice": mean_dice(results)}
        if last:
            found |= {
                name: mean([case_mean(r.scores, metric) for r in results])
                for name, metric in (("hd95-mm", "hd95_mm"), ("nsd", "nsd"))
            }
        metrics: Metrics = {
            "num-cases": len(results),
            "seconds": time.monotonic() - begun,
        }
        return metrics | {name: value for name, value in found.items() if value is not None}

    def personalised(self, adapter: AdapterState, used_round: int) -> AdapterState:
        """An adapter of the server with what the site kept for itself up to a round."""
        notes = self.memory.recall(used_round)
        return self._adapter(adapter, notes.get("personal", {}))

    def fine_tune(self, adapter: AdapterState, steps: int) -> AdapterState:
        """An adapter trained further on the site's cases, at the low end of the learning rate.

        Raises:
            TrainingError: When training fails.
        """
        self.model.load(adapter)
        train_locally(
            self.model,
            self.cache,
            self.train_cases,
            self.config.training.model_copy(update={"proximal_mu": 0.0}),
            schedule=Schedule(_FINE_TUNING, 1.0),
            seed=round_seed(self.config.seed, self.config.rounds + 1, self.site),
            steps=steps,
            on_step=self._on_step(),
        )
        return self._own_rank(self.model.state())

    def _timeout_s(self, instruction: Instruction) -> float:
        return min(instruction.timeout_s, self.config.federation.round_timeout_s)

    def _adapter(self, received: AdapterState, personal: AdapterState) -> AdapterState:
        state = self.initial | received | personal
        return {name: state[name] for name in self.initial}

    def _own_rank(self, state: AdapterState) -> AdapterState:
        return at_rank(state, self.config.peft.site_ranks.get(self.site))

    def _control(
        self, received: AdapterState, own: AdapterState, roles: Shares
    ) -> AdapterState | None:
        """What SCAFFOLD adds to gradients: everyone's control variate minus the site's own."""
        if not self.config.training.scaffold:
            return None
        return {
            name: received[CONTROL + name] - own[name] if name in own else received[CONTROL + name]
            for name in roles.sent
        }

    def _received(self, payload: bytes | None, instruction: Instruction) -> AdapterState:
        """The state that the server means, if it is one that training can have come to."""
        received = self.exchange.receive(payload, instruction)
        if self.plan_sha256:
            require_likely(self.site, received, self.initial)
        return received

    def _check(self, instruction: Instruction) -> None:
        """Checks what the server asks for against what the site agreed to."""
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
        number, timeout_s = instruction.server_round, instruction.timeout_s
        if not (1 <= number <= instruction.rounds and timeout_s > 0):  # nan is not
            raise FederationError(
                "SAM-F202",
                f"site {self.site}: round {number} of {instruction.rounds}, within {timeout_s:g} s",
                "The server asks for a round, or a time, that was not agreed to.",
            )

    def _on_step(self) -> StepCallback | None:
        if self.progress is None:
            return None
        progress, site = self.progress, self.site
        return lambda step, steps, loss: progress(site, step, steps, loss)


def _schedule(instruction: Instruction) -> Schedule:
    done, rounds = instruction.server_round, instruction.rounds
    return Schedule((done - 1) / rounds, done / rounds)
