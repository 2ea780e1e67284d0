"""The agents of a simulation: one for each site, all on one model and one cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from client.agent import SiteAgent
from client.exchange import Exchange, KnownStates
from client.memory import Memory
from samaritan.data.slices import CaseCache
from samaritan.models.adapter import AdaptedModel, AdapterState, at_rank
from samaritan.shares import public_state
from simulation.study import TRAIN, VALIDATION, Study


def build_agents(
    study: Study,
    model: AdaptedModel,
    initial: AdapterState,
    cache: CaseCache,
    run_dir: Path,
    progress: Callable[[str, int, int, float], None] | None = None,
) -> list[SiteAgent]:
    """One agent per site; what a site keeps for itself lies in `sites/` of the run folder.

    Args:
        study: Sites and their cases.
        model: Shared by all.
        initial: The adapter before the first round.
        cache: Shared by all.
        run_dir: Run folder.
        progress: Told of every training step.
    """
    config = study.config
    ranks = {site: config.peft.site_ranks.get(site) for site in study.sites}
    adapters = {rank: at_rank(initial, rank) for rank in set(ranks.values())}
    # A payload may be added to the state before the newest.
    known = KnownStates(2 * len(adapters))
    keeps_all = config.selection.keep == "best" or config.selection.rollback_drop is not None
    return [
        SiteAgent(
            site,
            config,
            model,
            adapters[rank],
            Exchange(site, config, public_state(config, adapters[rank]), known),
            Memory(run_dir / "sites" / _folder(site), keeps_all),
            cache,
            study.cases(TRAIN, site),
            study.cases(VALIDATION, site),
            progress,
        )
        for site, rank in ranks.items()
    ]


def _folder(site: str) -> str:
    """A name any file system takes; a site's name may hold anything."""
    return quote(site, safe="").replace(".", "%2E")
