"""What cannot go with a guarantee, refused before any data is read.

At a patient or slice as the unit, all that leaves a site is computed from noisy gradients, so that
no strategy of the server can reveal more. What is refused there are the ways around the noise:
counts, scores, settings found in the data. With a site as the unit the server itself adds the
noise, and every update must reach it alone, unscaled by any other.

Secure aggregation adds equally shaped vectors of whole numbers from a fixed range, of three sites
at least: of the sum of two, each knows the other's part.
"""

from __future__ import annotations

from collections.abc import Iterator

from samaritan.config import CodecConfig, Config
from samaritan.errors import ConfigError

_EQUAL_MEANS = ("fedavg", "ffa")
"""Strategies whose server needs the plain sum of whole updates."""

_FEWEST_SITES = 3


def check_privacy(config: Config) -> None:
    """Refuses what would break differential privacy or secure aggregation.

    Args:
        config: Of a run; without either it is not looked at further.

    Raises:
        ConfigError: SAM-C402 with every fault, why it is one, and what to set instead.
    """
    faults = [*_forgotten_unit(config)]
    if config.privacy.unit != "none":
        faults += [*_guarantee(config), *_ways_around_the_noise(config)]
    if config.privacy.unit in ("patient", "slice"):
        faults += _noise_at_the_site(config)
    if config.privacy.unit == "site":
        faults += _noise_at_the_server(config)
    if config.federation.secure_aggregation:
        faults += [*_sums_of_equals(config), *_enough_sites(config)]
    if faults:
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        raise ConfigError(
            "SAM-C402",
            f"privacy cannot be kept with this configuration, it has {count}:\n"
            + "\n".join(f"  - {fault}" for fault in faults),
            "Each line ends with what to set instead.",
        )


def _forgotten_unit(config: Config) -> Iterator[str]:
    given = config.privacy.model_fields_set
    if given and "unit" not in given:
        yield (
            f"privacy.unit: is left out while privacy.{sorted(given)[0]} is given, so that nothing "
            "would be hidden; set patient, or none to say so"
        )


def _guarantee(config: Config) -> Iterator[str]:
    """What every guarantee names."""
    privacy = config.privacy
    if privacy.epsilon is None:
        yield "privacy.epsilon: there is no guarantee without a budget; set a number, such as 8"
    if privacy.records is None:
        yield (
            "privacy.records: the divisor of a mean must be public, and is never counted in the "
            f"data; set the number of training {privacy.unit}s as published"
        )
    records = privacy.records if isinstance(privacy.records, dict) else {"": privacy.records}
    for site, number in records.items():
        if privacy.delta is not None and number is not None and privacy.delta >= 1 / number:
            of_site = f" of {site}" if site else ""
            yield (
                f"privacy.delta: at {privacy.delta:g} one of {number} records{of_site} may be "
                "published whole within the guarantee; leave it out for 1 / (10 records)"
            )


def _ways_around_the_noise(config: Config) -> Iterator[str]:
    privacy, selection = config.privacy, config.selection
    if config.federation.weighting == "examples":
        yield (
            "federation.weighting: examples tells the number of cases of each site, and one case "
            "more changes every weight; set uniform"
        )
    if config.data.classes is None and config.data.source != "phantoms":
        yield (
            "data.classes: read from the labels, one patient can change the model's outputs; name "
            "them"
        )
    if config.training.scaffold:
        yield (
            "training.scaffold: control variates leave the site without noise; set false, or use "
            "training.proximal_mu"
        )
    if privacy.scores == "withheld":
        chosen = {
            "keep": selection.keep == "best",
            "patience": selection.patience is not None,
            "rollback_drop": selection.rollback_drop is not None,
        }
        for key in (key for key, used in chosen.items() if used):
            yield (
                f"selection.{key}: needs validation scores, which sites withhold; leave it out, or "
                "set privacy.scores to declared"
            )


def _noise_at_the_site(config: Config) -> Iterator[str]:
    if config.privacy.unit == "slice" and config.data.context_slices > 1:
        yield (
            f"data.context_slices: with {config.data.context_slices}, each slice is part of as "
            "many records; set 1, or privacy.unit to patient"
        )
    if config.training.prefix_cache_mb:
        yield (
            "training.prefix_cache_mb: training with noise draws its own views and keeps nothing "
            "of them; set 0"
        )


def _noise_at_the_server(config: Config) -> Iterator[str]:
    federation, privacy = config.federation, config.privacy
    if federation.weighting not in ("examples", "uniform"):
        yield (
            "federation.weighting: a site of more weight than others has less noise beside it than "
            "its guarantee says; set uniform"
        )
    if config.strategy not in _EQUAL_MEANS:
        yield (
            f"strategy: {config.strategy} needs more than one noisy sum of clipped updates; set "
            "fedavg or ffa, or privacy.unit to patient"
        )
    if federation.clip_norm == "median":
        yield (
            "federation.clip_norm: median shortens every update by what other sites sent; leave it "
            "out, privacy.clip_norm clips"
        )
    if isinstance(privacy.records, dict):
        yield "privacy.records: sites are counted together; set one number, the sites that train"
    if privacy.clip_quantile is not None:
        yield "privacy.clip_quantile: is for gradients at a site; leave it out"


def _sums_of_equals(config: Config) -> Iterator[str]:
    federation = config.federation
    because = "with federation.secure_aggregation"
    if config.privacy.unit == "site":
        yield (f"privacy.unit: {because} the server cannot clip what a site sends; set patient")
    if config.strategy not in _EQUAL_MEANS:
        yield (
            f"strategy: {because} the server sees no single update, which {config.strategy} needs; "
            "set fedavg or ffa"
        )
    if federation.weighting != "uniform":
        yield f"federation.weighting: {because} all sites count alike; set uniform"
    if not isinstance(federation.clip_norm, float):
        yield (
            f"federation.clip_norm: {because} sites clip by a number known to all, which fixes the "
            "range of the sum; set a number"
        )
    if config.wire.up != CodecConfig():
        yield (
            f"wire.up: {because} updates travel as whole numbers under masks, which no codec can "
            "shorten; leave it out"
        )
    for key, used in {
        "peft.site_ranks": config.peft.site_ranks,
        "data.site_classes": config.data.site_classes,
    }.items():
        if used:
            yield f"{key}: {because} every site sends the same tensors in full; leave it out"
    if config.training.scaffold:
        yield f"training.scaffold: {because} only updates are summed; set false"


def _enough_sites(config: Config) -> Iterator[str]:
    federation, data = config.federation, config.data
    why = f"of the sum of two sites each knows the other's part; set {_FEWEST_SITES} or more"
    for key, number in {
        "federation.min_sites": federation.min_sites,
        "federation.sites_per_round": federation.sites_per_round,
    }.items():
        if number is not None and number < _FEWEST_SITES:
            yield f"{key}: is {number}, but {why}"
    training = data.sites - len(data.held_out_sites)
    if (data.source == "phantoms" or data.partition == "uniform") and training < _FEWEST_SITES:
        yield f"data.sites: {training} train, but {why}"
