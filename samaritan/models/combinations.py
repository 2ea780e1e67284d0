"""Strategies and methods that do not go together."""

from __future__ import annotations

from collections.abc import Iterable

from samaritan.config import Config
from samaritan.errors import ConfigError
from samaritan.models.lora import lora_pairs
from samaritan.shares import get_sharing

_PRODUCT_RULES = ("svd", "fedex", "flora")
_MIXED_RANK_RULES = ("svd", "flora")


def check_ranks(config: Config) -> None:
    """Refuses ranks of single sites that no rule or no scale allows.

    Raises:
        ConfigError: SAM-C217 to SAM-C219 and SAM-C227, naming the key.
    """
    peft = config.peft
    if not peft.site_ranks:
        return
    if config.strategy not in _MIXED_RANK_RULES:
        raise ConfigError(
            "SAM-C218",
            f"peft.site_ranks is set, but strategy {config.strategy} combines equal ranks only",
            f"Choose strategy {' or '.join(_MIXED_RANK_RULES)}, or leave peft.site_ranks out.",
        )
    if config.training.scaffold:
        raise ConfigError(
            "SAM-C227",
            "peft.site_ranks is set, but training.scaffold compares gradients of equal shape",
            "Leave one of the two out.",
        )
    if peft.alpha is not None or peft.variant != "lora":
        raise ConfigError(
            "SAM-C217",
            f"peft.site_ranks needs the same LoRA scale at every rank, but peft.alpha is "
            f"{peft.alpha} and peft.variant is {peft.variant}",
            "Leave peft.alpha and peft.variant out: the scale is then 1 at every site.",
        )
    above = sorted(site for site, rank in peft.site_ranks.items() if rank > peft.rank)
    if above or peft.ranks:
        fault = f"peft.ranks is {peft.ranks}"
        if above:
            site = above[0]
            fault = f"site {site} has {peft.site_ranks[site]}, above peft.rank {peft.rank}"
        raise ConfigError(
            "SAM-C219",
            f"peft.site_ranks are cut from one peft.rank, but {fault}",
            "Set peft.rank to the largest rank of all sites, and leave peft.ranks out.",
        )


def check_folding(config: Config) -> None:
    """Refuses a strategy that adds to frozen layers where these cannot take it in.

    Raises:
        ConfigError: SAM-C214 for bf16, SAM-C215 for DoRA.
    """
    if not get_sharing(config.strategy).folds:
        return
    if config.model.frozen_precision == "bf16":
        raise ConfigError(
            "SAM-C214",
            f"model.frozen_precision is bf16, which would round away what strategy "
            f"{config.strategy} adds to frozen layers",
            "Set model.frozen_precision to fp32.",
        )
    if config.peft.variant == "dora":
        raise ConfigError(
            "SAM-C215",
            f"strategy {config.strategy} adds to frozen layers, but with peft.variant dora trained "
            "lengths refer to their rows",
            "Choose peft.variant lora or rslora, or strategy svd.",
        )


def check_products(config: Config, trained: Iterable[str]) -> None:
    """Refuses a rule for LoRA products where there are none.

    Args:
        config: The run's strategy and preset.
        trained: Names of the adapter's tensors.

    Raises:
        ConfigError: SAM-C216.
    """
    if config.strategy in _PRODUCT_RULES and not lora_pairs(trained):
        raise ConfigError(
            "SAM-C216",
            f"strategy {config.strategy} combines LoRA products, and preset {config.peft.preset} "
            "trains none here",
            "Choose a preset with LoRA, or strategy fedavg.",
        )
