"""The agents of a simulation: one for each site, all on one model and one cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from urllib.parse import quote

from client.agent import SiteAgent
from client.assembly import Homes, assemble
from client.exchange import KnownStates
from client.site import Site
from samaritan.audit.gate import Gate
from samaritan.audit.log import Log
from samaritan.audit.policy import SitePolicy
from samaritan.data.slices import CaseCache
from samaritan.keys import make_identity
from samaritan.messages import Request
from samaritan.models.adapter import AdaptedModel, AdapterState, at_rank
from simulation.study import Study

SITE_LOG = "log.jsonl"
"""What came in and went out, in the folder of each site."""

_UNLIMITED_MB = 1e6


def build_agents(
    study: Study,
    model: AdaptedModel,
    initial: AdapterState,
    cache: CaseCache,
    run_dir: Path,
    ledger_dir: Path | None = None,
    progress: Callable[[str, int, int, float], None] | None = None,
) -> list[SiteAgent]:
    """One agent per site; what a site keeps for itself lies in `sites/` of the run folder.

    Args:
        study: Sites and their cases.
        model: Shared by all.
        initial: The adapter before the first round.
        cache: Shared by all.
        run_dir: Run folder.
        ledger_dir: Keeps each site's key and privacy ledger from run to run; by default they lie in
            the run folder, and every run has a budget of its own.
        progress: Told of every training step.
    """
    config = study.config
    ranks = {site: config.peft.site_ranks.get(site) for site in study.sites}
    adapters = {rank: at_rank(initial, rank) for rank in set(ranks.values())}
    # A payload may be added to the state before the newest.
    known = KnownStates(2 * len(adapters))
    own = {site: run_dir / "sites" / _folder(site) for site in study.sites}
    identities = site_identities(study, own)
    return [
        assemble(
            site,
            config,
            model,
            adapters[rank],
            known,
            cache,
            study.sites[site],
            # Sums are of this run alone: what was opened in another says nothing of it.
            Homes(own[site], (ledger_dir or run_dir / "sites") / _folder(site), own[site]),
            identities,
            progress,
        )
        for site, rank in ranks.items()
    ]


def in_front_of(agents: Iterable[SiteAgent]) -> list[Site]:
    """The sites with these agents, each with its gate and a log in the run folder."""
    policy = SitePolicy(max_message_mb=_UNLIMITED_MB)
    return [
        Site(
            agent.site,
            functools.partial(_always, agent),
            Gate(Log(agent.memory.folder / SITE_LOG, {"site": agent.site}), policy),
        )
        for agent in agents
    ]


def site_identities(study: Study, homes: Mapping[str, Path]) -> dict[str, bytes]:
    """The public key of each site that trains; none without secure aggregation.

    In a federation the sites would hand them to each other, past the server.
    """
    if not study.config.federation.secure_aggregation:
        return {}
    return {
        site: make_identity(homes[site] / "identity.key").public for site in study.training_sites
    }


def _always(agent: SiteAgent, request: Request) -> SiteAgent:
    return agent


def _folder(site: str) -> str:
    """A name any file system takes; a site's name may hold anything."""
    return quote(site, safe="").replace(".", "%2E")
