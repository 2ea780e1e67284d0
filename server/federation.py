"""What a server knows of a run before its first round, and where the run stands on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from samaritan.config import Config, config_sha256
from samaritan.data.label_maps import labelled_classes
from samaritan.errors import ConfigError, StorageError
from samaritan.models.adapter import AdapterState
from samaritan.models.class_tensors import counts
from samaritan.privacy.budget import Budget
from samaritan.privacy.plan import privacy_plan
from server.checkpoints import Checkpoint, latest_checkpoint
from server.events import append_event
from strategies.robust import minimum_sites

_LEAST_IN_A_SUM = 3
"""Of a sum of two, each site knows the other's part."""

RoundCallback = Callable[[dict[str, Any]], None]
"""Called with each finished round as summary.json will hold it."""


@dataclass(frozen=True)
class Federation:
    """What a server needs to know of a run.

    Attributes:
        config: The run's configuration.
        base_sha256: Of the frozen base; a site with another refuses.
        initial: The adapter before the first round.
        sites: Names of the approved sites that train.
        run_dir: Receives `events.jsonl` and `checkpoints/`.
        observers: Names of the approved sites that only score.
        counts: Which tensors of a site's update say something, of sites that label some structures
            only (`strategies.update.Update.counts`).
        at_once: Sites that work at the same time; None for all of them.
        on_round: Told of each finished round.
        identities: Public key by site, for secure aggregation.
        plan_sha256: Of the plan that all sites approved; empty in a simulation.
        signers: Public key by site that must have sealed its answers; none in a simulation.
        node_keys: Key by site of the node that speaks for it; none in a simulation.
        budget: What the sites may give away where a site is the unit of privacy; else None.
    """

    config: Config
    base_sha256: str
    initial: AdapterState
    sites: Sequence[str]
    run_dir: Path
    observers: Sequence[str] = ()
    counts: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    at_once: int | None = None
    on_round: RoundCallback | None = None
    identities: Mapping[str, bytes] = field(default_factory=dict)
    budget: Budget | None = None
    plan_sha256: str = ""
    signers: Mapping[str, bytes] = field(default_factory=dict)
    node_keys: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def log(self) -> Path:
        """The log of what came in."""
        return self.run_dir / "server_log.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Where round checkpoints lie."""
        return self.run_dir / "checkpoints"

    @property
    def events(self) -> Path:
        """The event log."""
        return self.run_dir / "events.jsonl"

    def rank(self, site: str) -> int | None:
        """LoRA rank of a site; None where it is the server's own."""
        return self.config.peft.site_ranks.get(site)

    def note(self, event: str, **fields: Any) -> None:
        """Writes an event."""
        append_event(self.events, event, **fields)


def label_counts(config: Config, initial: AdapterState) -> dict[str, dict[str, Tensor]]:
    """`Federation.counts` of a run whose structures are named."""
    classes = config.data.classes or {}
    shapes = {name: tuple(value.shape) for name, value in initial.items()}
    return {
        site: counts(shapes, len(classes), labelled_classes(config.data, site, classes))
        for site in config.data.site_classes
    }


def shared_budget(config: Config, sites: Sequence[str], home: Path) -> Budget | None:
    """What all sites together may give away; None where a site is not the unit of privacy.

    Args:
        config: Of the run.
        sites: Those that train.
        home: Keeps the ledger.
    """
    if config.privacy.unit != "site":
        return None
    return Budget(config, privacy_plan(config, ""), home, tuple(sites))


def check_sites(config: Config, training: Sequence[str], observers: Sequence[str]) -> None:
    """Refuses keys that name sites wrongly, and a round that can never have enough replies.

    Raises:
        ConfigError: SAM-C226 or SAM-C228.
    """
    sites, everyone = set(training), {*training, *observers}
    weighting = config.federation.weighting
    weighted = set(weighting) if isinstance(weighting, dict) else sites
    faults = [
        f"{key} names {', '.join(sorted(names))}"
        for key, names in (
            ("federation.weighting", weighted - sites),
            ("peft.site_ranks", config.peft.site_ranks.keys() - everyone),
        )
        if names
    ]
    if sites - weighted:
        faults.append(f"federation.weighting leaves out {', '.join(sorted(sites - weighted))}")
    if faults:
        raise ConfigError(
            "SAM-C228", "; ".join(faults), f"The sites that train are: {', '.join(sorted(sites))}."
        )
    asked = min(len(sites), config.federation.sites_per_round or len(sites))
    needed = quorum(config, len(sites))
    if needed > asked:
        raise ConfigError(
            "SAM-C226",
            f"a round of strategy {config.strategy} needs {needed} usable replies, "
            f"but {asked} sites are asked",
            "Lower federation.min_sites or federation.byzantine_sites, raise "
            "federation.sites_per_round, or choose another strategy.",
        )


def resume_point(federation: Federation) -> Checkpoint:
    """The newest checkpoint of this run, or its beginning.

    Raises:
        StorageError: When the checkpoint was made by another configuration.
    """
    sha256 = config_sha256(federation.config)
    damaged: list[str] = []
    found = latest_checkpoint(federation.checkpoints, lambda path: damaged.append(path.name))
    if damaged:
        federation.note("checkpoints_damaged", files=damaged)
    if found is None:
        return Checkpoint(0, federation.initial, [], sha256)
    if found.config_sha256 != sha256:
        raise StorageError(
            "SAM-S104",
            f"the checkpoints in {federation.run_dir} were made by configuration "
            f"{found.config_sha256[:16]}, this one is {sha256[:16]}",
            "Resume with the same configuration, or choose another --out.",
        )
    return found


def quorum(config: Config, sites: int) -> int:
    """Usable answers a round needs: as configured or more than half, and what the rule needs."""
    asked = min(sites, config.federation.sites_per_round or sites)
    wanted = config.federation.min_sites or asked // 2 + 1
    secret = _LEAST_IN_A_SUM if config.federation.secure_aggregation else 1
    return max(wanted, secret, minimum_sites(config.strategy, config.federation.byzantine_sites))
