"""What a simulated federation works on: the cases of each pseudo-site, checked first.

A study is made from the configuration and a folder alone, so that every process of an engine can
make the same one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from samaritan.config import Config
from samaritan.data.checks import require_usable
from samaritan.data.datasets import (
    TRAIN,
    VALIDATION,
    Case,
    Dataset,
    assign_splits,
    by_site,
    discover_classes,
    read_dataset,
    require_disjoint,
)
from samaritan.data.label_maps import check_label_maps, labelled_classes
from samaritan.data.slices import CaseCache
from samaritan.errors import ConfigError, DataError
from samaritan.models.adapter import image_size


@dataclass(frozen=True)
class Study:
    """The sites of a simulation and what they hold.

    Attributes:
        config: The run's configuration.
        classes: Structure name -> label value.
        sites: Cases by site, sites sorted by name.
    """

    config: Config
    classes: dict[str, int]
    sites: dict[str, tuple[Case, ...]]

    @property
    def observers(self) -> tuple[str, ...]:
        """Sites that only score."""
        return tuple(site for site in self.sites if site in self.config.data.held_out_sites)

    @property
    def training_sites(self) -> tuple[str, ...]:
        """Sites that train."""
        return tuple(site for site in self.sites if site not in self.observers)

    def labelled(self, site: str) -> frozenset[int]:
        """Class indices (1 and up, in the order of `classes`) that a site labels."""
        return labelled_classes(self.config.data, site, self.classes)

    def cases(self, split: str, site: str | None = None) -> tuple[Case, ...]:
        """Cases of one split, at one site or at all."""
        chosen = self.sites if site is None else {site: self.sites[site]}
        return tuple(c for cases in chosen.values() for c in cases if c.split == split)

    def cache(self) -> CaseCache:
        """A cache for the study's cases."""
        return CaseCache(self.config.data, self.classes, image_size(self.config))


def read_study(config: Config, data_dir: Path) -> Study:
    """Reads a data folder as the sites of a simulation.

    Args:
        config: Says how to split and which structures to learn.
        data_dir: A folder `read_dataset` knows.

    Raises:
        ConfigError: When the configuration asks for sites or structures that are not there.
        DataError: When the folder, its splits or its sites cannot be used.
    """
    dataset = assign_splits(read_dataset(data_dir), config.data.val_fraction, config.seed)
    if config.data.partition == "uniform":
        dataset = deal_out(dataset, config.data.sites, config.seed)
    dataset = _hold_out(dataset, config.data.held_out_sites)
    require_disjoint(dataset)
    sites = {site: tuple(cases) for site, cases in sorted(by_site(dataset.cases).items())}
    training = [site for site in sites if site not in config.data.held_out_sites]
    check_label_maps(config.data, training, config.data.held_out_sites)
    study = Study(config, config.data.classes or discover_classes(dataset), sites)
    if not study.classes:
        raise DataError(
            "SAM-D308", "no label holds any structure", "Check the labels, or name data.classes."
        )
    for site in study.training_sites:
        if not study.cases(TRAIN, site):
            raise DataError(
                "SAM-D304",
                f"site {site} has no training case",
                "Mark cases `train` in the manifest's split column, or leave the column out.",
            )
    for case in study.cases(TRAIN) + study.cases(VALIDATION):
        if case.label is None:
            raise DataError(
                "SAM-D116",
                f"case {case.case_id} is in split {case.split} and has no label",
                "Add its label, or take the case out of the split.",
            )
    wanted = config.federation.min_sites or 1
    if wanted > len(study.training_sites):
        raise ConfigError(
            "SAM-C306",
            f"federation.min_sites is {wanted}, but {len(study.training_sites)} sites train",
            "Lower federation.min_sites.",
        )
    if not study.cases(VALIDATION):
        raise DataError(
            "SAM-D305",
            "there is no validation case at any site",
            "Mark cases `val` in the manifest's split column, or leave the column out.",
        )
    return study


def check_study(
    study: Study, data_dir: Path, progress: Callable[[int, int, str], None] | None = None
) -> None:
    """Reads every case once and refuses the study if any cannot be used.

    Raises:
        DataError: With the first fault and the number of others.
    """
    cases = tuple(case for cases in study.sites.values() for case in cases)
    dataset = Dataset(data_dir, cases, study.classes)
    require_usable(dataset, progress, study.config.data.site_classes)


def _hold_out(dataset: Dataset, held_out: Sequence[str]) -> Dataset:
    sites = sorted({case.site for case in dataset.cases})
    unknown = [site for site in held_out if site not in sites]
    if unknown or (held_out and len(held_out) == len(sites)):
        raise DataError(
            "SAM-D309",
            f"data.held_out_sites names {list(held_out)}, the sites are {sites}",
            "Name some of the sites, and leave one to train.",
        )
    cases = tuple(
        replace(case, split=VALIDATION) if case.site in held_out else case for case in dataset.cases
    )
    return replace(dataset, cases=cases)


def deal_out(dataset: Dataset, sites: int, seed: int) -> Dataset:
    """Pseudo-sites of nearly equal size, dealt out by patient within each split.

    Raises:
        DataError: When there are fewer training patients than sites.
    """
    home: dict[str, str] = {}
    for split in sorted({case.split for case in dataset.cases}):
        people = sorted({c.subject_id for c in dataset.cases if c.split == split})
        random.Random(f"{seed}/{split}").shuffle(people)  # noqa: S311
        if split == TRAIN and len(people) < sites:
            raise DataError(
                "SAM-D306",
                f"{sites} sites asked for, {len(people)} training patients in the data set",
                "Lower data.sites.",
            )
        for number, person in enumerate(people):
            home[person] = f"pseudo_{number % sites + 1:03d}"
    cases = tuple(replace(case, site=home[case.subject_id]) for case in dataset.cases)
    return replace(dataset, cases=cases)
