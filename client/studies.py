"""From a request to the agent that may answer it: an approved plan, loaded once."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from client.agent import SiteAgent
from client.approvals import Approvals, require_member, roles_of
from client.assembly import Homes, Progress, assemble
from client.exchange import KnownStates
from client.pinned import Files, known_persons, look, pin_cases, pinned_splits
from client.restraint import Restraint
from client.settings import SiteSettings
from samaritan import __version__
from samaritan.audit.log import Log
from samaritan.audit.policy import require_agreement
from samaritan.config import Config
from samaritan.data.checks import require_usable
from samaritan.data.datasets import (
    TRAIN,
    VALIDATION,
    Case,
    Dataset,
    assign_splits,
    read_dataset,
    require_disjoint,
)
from samaritan.data.slices import CaseCache
from samaritan.errors import AuditError, DataError, ModelError, TrustError
from samaritan.keys import Identity
from samaritan.messages import Request
from samaritan.models.adapter import AdaptedModel, at_rank, build_adapted, image_size
from samaritan.plan import Plan
from samaritan.provision.kit import Kit

_log = logging.getLogger("samaritan.site")


class Studies:
    """The studies a site takes part in; the model of one of them is in memory.

    Args:
        kit: Of the site.
        settings: From site.yaml.
        identity: Of the site.
        log: Of the site.
        progress: Told of every training step.
    """

    def __init__(
        self,
        kit: Kit,
        settings: SiteSettings,
        identity: Identity,
        log: Log,
        progress: Progress | None = None,
    ) -> None:
        self.kit, self.settings, self.identity = kit, settings, identity
        self.approvals = Approvals(kit, roles_of(settings.policy, identity))
        self._log, self._progress = log, progress
        self._hours = settings.policy.opening()
        self._loaded: tuple[str, SiteAgent, Files] | None = None

    def find(self, request: Request) -> SiteAgent:
        """The agent of the study a request is about.

        Raises:
            TrustError: Where no approved plan allows it: SAM-K305, SAM-K308 for another app bundle,
                SAM-K309 for another version.
            AuditError: SAM-A202 outside the hours of the policy, SAM-A201 where it forbids the
                plan.
            SamaritanError: When the data or the base model cannot be used.
        """
        plan = self.approvals.plan(request.plan_sha256)
        self._require_same_code(plan, request)
        if not self._hours.open_at(datetime.now()):
            raise AuditError(
                "SAM-A202",
                f"this site works for studies at {', '.join(self.settings.policy.hours)} only",
                "Nothing to do: it answers again when its hours begin.",
            )
        Restraint(self.kit.path("state", plan.sha256[:16], "asked.json")).note(
            request, plan.config.rounds
        )
        if self._loaded is None or not self._is_fresh(plan, *self._loaded):
            self._loaded = None  # two models need not fit into memory
            self._loaded = plan.sha256, *self.load(plan)
        return self._loaded[1]

    def _is_fresh(self, plan: Plan, sha256: str, agent: SiteAgent, files: Files) -> bool:
        """Whether what is in memory is the study, on cases that nobody has touched since."""
        cases = (*agent.train_cases, *agent.val_cases)
        return sha256 == plan.sha256 and files == look(Path(self.settings.data), cases)

    @property
    def loaded(self) -> str:
        """Hash of the plan whose model is in memory; empty for none."""
        return self._loaded[0] if self._loaded else ""

    def load(self, plan: Plan) -> tuple[SiteAgent, Files]:
        """Reads the site's cases and the base model for a plan.

        Returns:
            Who does the work, and how the files of the cases looked before they were read.

        Raises:
            SamaritanError: When policy, data or base model do not fit the plan.
        """
        begun = time.monotonic()
        site, config = self.kit.card.name, plan.config
        node_key = self.kit.path("node.pub").read_text("utf-8")
        require_member(plan, self.kit, self.identity, node_key)
        model = self._model(plan)
        initial = at_rank(model.state(), config.peft.site_ranks.get(site))
        require_agreement(self.settings.policy, plan, tuple(initial))
        state = self.kit.path("state", plan.sha256[:16])
        cases = self._cases(config, pinned_splits(state / "cases.json"))
        files = look(Path(self.settings.data), cases)
        cases_sha256, left = pin_cases(state / "cases.json", cases)
        homes = Homes(state, self.kit.folder, self.kit.folder)
        identities = {}
        if config.federation.secure_aggregation:
            identities = {s: bytes.fromhex(plan.sites[s].identity) for s in plan.training_sites}
        classes = config.data.classes or {}
        agent = assemble(
            site, config, model, initial, KnownStates(2),
            CaseCache(config.data, classes, image_size(config)), cases, homes, identities,
            self._progress,
        )  # fmt: skip
        agent = replace(agent, plan_sha256=plan.sha256, cases_sha256=cases_sha256)
        if agent.budget is not None:
            persons = known_persons(state / "cases.json", agent.train_cases)
            agent = replace(agent, budget=replace(agent.budget, members=persons))
        self._log.append(
            "study_loaded",
            plan=plan.sha256,
            base_sha256=model.base.sha256,
            base=plan.base.name,
            cases=len(cases),
            cases_left=left,
            cases_sha256=cases_sha256,
            milliseconds=int(1000 * (time.monotonic() - begun)),
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
        _log.info("study %s is loaded; base %s", plan.study, model.base.sha256[:16])
        return agent, files

    def _model(self, plan: Plan) -> AdaptedModel:
        config = plan.config
        own = config.model.model_copy(update={"checkpoint": self.settings.checkpoint})
        if config.model.base != "tiny" and self.settings.checkpoint is None:
            raise ModelError(
                "SAM-M501",
                f"the plan needs the base {config.model.base}, and site.yaml names no checkpoint",
                "Fetch it (`samaritan models fetch`) and set `checkpoint` in site.yaml.",
            )
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        model = build_adapted(
            config.model_copy(update={"model": own}), len(config.data.classes or {})
        )
        if model.base.sha256 != plan.base.sha256:
            raise ModelError(
                "SAM-M502",
                f"the base here is {model.base.sha256[:16]}, the plan has {plan.base.sha256[:16]}",
                "Give site.yaml the checkpoint the plan was made with.",
            )
        return model

    def _cases(self, config: Config, splits: Mapping[str, str]) -> Sequence[Case]:
        """The site's cases in their splits, every file read and checked once.

        Args:
            config: Of the study.
            splits: Those of the study's first day, where the list of cases names none.
        """
        site = self.kit.card.name
        dataset = read_dataset(self.settings.data)
        own = Dataset(
            dataset.root,
            tuple(
                replace(c, site=site, split=c.split or splits.get(c.case_id, ""))
                for c in dataset.cases
            ),
            dataset.classes,
        )
        own = assign_splits(own, config.data.val_fraction, config.seed)
        if site in config.data.held_out_sites:
            own = replace(own, cases=tuple(replace(c, split=VALIDATION) for c in own.cases))
        require_disjoint(own)
        used = tuple(case for case in own.cases if case.split in (TRAIN, VALIDATION))
        if site not in config.data.held_out_sites and all(c.split != TRAIN for c in used):
            raise DataError(
                "SAM-D310",
                f"site {site} has no training case",
                "Mark cases `train` in the manifest's split column, or leave the column out.",
            )
        classes = config.data.classes or {}
        require_usable(replace(own, cases=used, classes=classes), None, config.data.site_classes)
        return used

    def _require_same_code(self, plan: Plan, request: Request) -> None:
        if request.bundle_sha256 != plan.bundle_sha256:
            raise TrustError(
                "SAM-K308",
                f"the message came with the app bundle {request.bundle_sha256[:16]}, the plan has "
                f"{plan.bundle_sha256[:16]}",
                "Nothing of it was unpacked. Tell the coordinator: somebody has changed it.",
            )
        if plan.samaritan != __version__:
            raise TrustError(
                "SAM-K309",
                f"this site runs Samaritan {__version__}, the plan asks for {plan.samaritan}",
                "Install the plan's version, or ask for a plan for this one.",
            )
