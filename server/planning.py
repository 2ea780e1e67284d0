"""From a description of a study to its signed plan."""

from __future__ import annotations

from datetime import date, timedelta
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from samaritan import __version__
from samaritan.config import (
    Config,
    Section,
    describe_faults,
    load_config,
    parse_config,
    read_tree,
    set_key,
)
from samaritan.errors import ConfigError, TrustError
from samaritan.keys import load_identity
from samaritan.models.adapter import build_adapted
from samaritan.models.bases import get_base
from samaritan.models.presets import get_preset
from samaritan.plan import Plan, PlannedBase, PlannedSite, SignedPlan, sign_plan
from samaritan.privacy.rules import check_privacy
from samaritan.provision.authority import Member, members, open_authority
from samaritan.provision.certificates import now
from samaritan.provision.project import load_project
from samaritan.shares import get_sharing
from server.bundle import bundle_sha256
from server.federation import check_sites
from strategies.optimisers import check_optimiser


class Study(Section):
    """A study as its description has it.

    Attributes:
        study: Name.
        title, purpose, contacts, ethics: For the people who approve it.
        valid_days: From today.
        sites: Names; all hospitals of the consortium when left out.
        config: File with the configuration of the run, from the folder of the description.
    """

    study: str
    title: str = ""
    purpose: str = ""
    contacts: tuple[str, ...] = ()
    ethics: tuple[str, ...] = ()
    valid_days: int = Field(default=365, ge=1, le=3650)
    sites: tuple[str, ...] | None = None
    config: str


def make_plan(description: Path, authority: Path, overrides: list[str], today: date) -> SignedPlan:
    """Makes and signs a plan. Base model and bundle are looked at here, and named by hash.

    Args:
        description: YAML, see `Study`.
        authority: Folder of the consortium's authority.
        overrides: Items such as "rounds=3", for the configuration.
        today: From which the plan is valid.

    Raises:
        ConfigError: For faults of description or configuration.
        TrustError: SAM-K312 for a site without a valid certificate; SAM-K313 for a plan that
            cannot be.
        ModelError: When the base model cannot be read.
    """
    study = _read(description)
    config = load_config(description.parent / study.config, overrides)
    known = members(authority)
    all_sites = tuple(sorted(load_project(authority / "project.yaml").names()))
    names = all_sites if study.sites is None else study.sites
    for name in names:
        _require_valid(known, name)
    _check(config, names)
    model = build_adapted(config, len(config.data.classes or {}))
    tree = config.model_dump(mode="json")
    # Paths are each party's own; the hash below says which file is meant.
    for key in ("model.checkpoint", "model.checkpoint_sha256"):
        set_key(tree, key, None)
    try:
        plan = Plan(
            schema=1,
            study=study.study,
            title=study.title,
            purpose=study.purpose,
            contacts=study.contacts,
            ethics=study.ethics,
            created=today,
            valid_until=today + timedelta(days=study.valid_days),
            samaritan=__version__,
            bundle_sha256=bundle_sha256(),
            config=parse_config(tree),
            base=PlannedBase(name=config.model.base, sha256=model.base.sha256),
            sites={
                name: PlannedSite(identity=known[name].identity, node=known[name].node_key)
                for name in names
            },
        )
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, d['loc']))} {d['msg'].removeprefix('Value error, ')}".strip()
            for d in error.errors()
        )
        raise TrustError(
            "SAM-K313", f"{description} makes no plan: {faults}", "Mend the configuration."
        ) from error
    with open_authority(authority):  # which looks whether its keys belong together
        return sign_plan(plan, load_identity(authority / "plan.key"))


def _read(path: Path) -> Study:
    tree: dict[str, Any] = read_tree(path)
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(
            "SAM-C309",
            f"{path} has {describe_faults(error, Study)}",
            "Mend each key; docs/deployment.md has an example.",
        ) from error


def _check(config: Config, names: tuple[str, ...]) -> None:
    get_base(config.model.base)
    get_preset(config.peft.preset)
    get_sharing(config.strategy)
    check_optimiser(config)
    check_privacy(config)
    observers = [name for name in names if name in config.data.held_out_sites]
    check_sites(config, [name for name in names if name not in observers], observers)


def _require_valid(known: dict[str, Member], name: str) -> None:
    member = known.get(name)
    if member is None or member.revoked or member.not_after <= now():
        state = "has no certificate yet"
        if member is not None:
            state = "was revoked" if member.revoked else f"had one until {member.not_after:%F}"
        raise TrustError(
            "SAM-K312",
            f"site {name} {state}",
            "`samaritan authority list` shows every site; leave this one out, or sign its request.",
        )
