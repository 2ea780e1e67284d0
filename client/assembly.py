"""The agent of a site, put together from what the site holds; for a simulation and a hospital."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.agent import SiteAgent
from client.exchange import Exchange, KnownStates
from client.masking import Masking
from client.memory import Memory
from samaritan.config import Config
from samaritan.data.datasets import TRAIN, VALIDATION, Case
from samaritan.data.slices import CaseCache
from samaritan.models.adapter import AdaptedModel, AdapterState
from samaritan.privacy.budget import Budget
from samaritan.privacy.plan import privacy_plan
from samaritan.shares import noisy_sites, public_state

Progress = Callable[[str, int, int, float], None]
"""Told of every training step: site, step, steps, loss."""


@dataclass(frozen=True)
class Homes:
    """Where a site keeps what is its own.

    Attributes:
        notes: Of one study: what goes on from round to round.
        ledger: Its key and its privacy ledger, which outlive studies.
        sums: Its key and what it answered in secure sums.
    """

    notes: Path
    ledger: Path
    sums: Path


def assemble(
    site: str,
    config: Config,
    model: AdaptedModel,
    initial: AdapterState,
    known: KnownStates,
    cache: CaseCache,
    cases: Sequence[Case],
    homes: Homes,
    identities: Mapping[str, bytes],
    progress: Progress | None = None,
) -> SiteAgent:
    """An agent.

    Args:
        site: Its name.
        config: That was agreed to.
        model: With the frozen base.
        initial: The adapter before the first round, of this site's rank.
        known: States that came in.
        cache: Reads the cases.
        cases: The site's own, each in a split.
        homes: Where it keeps things.
        identities: Public key of each site that trains; none without secure aggregation.
        progress: Told of every training step.
    """
    train, validation = (
        tuple(case for case in cases if case.split == split) for split in (TRAIN, VALIDATION)
    )
    keeps_all = config.selection.keep == "best" or config.selection.rollback_drop is not None
    observes = site in config.data.held_out_sites
    budget = None
    if noisy_sites(config) and not observes:
        patients = sorted({case.subject_id for case in train})
        budget = Budget(config, privacy_plan(config, site), homes.ledger, tuple(patients))
    masking = Masking(site, config, homes.sums, identities) if site in identities else None
    return SiteAgent(
        site,
        config,
        model,
        initial,
        Exchange(site, config, public_state(config, initial), known),
        Memory(homes.notes, keeps_all),
        cache,
        train,
        validation,
        progress,
        budget,
        masking,
    )
