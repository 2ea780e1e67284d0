"""What a run promised its patients, what it spent of that, and what its server was shown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from samaritan.report import facts, units
from samaritan.report.facts import Json

BUDGET_SPENT, ROLLED_BACK = "failed: SAM-P101", "failed: SAM-P103"
"""Statuses of a site whose ledger allows no further round, and of one whose ledger is too old."""

_PLAN = ("budget", "delta", "records", "sampling_rate", "noise_multiplier", "steps_per_round")
_TINY = re.compile(r"\d(?:\.\d+)?e-\d{2,3}")
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class SpendingRow:
    """One line of the table of budgets, as text."""

    site: str
    epsilon: str
    budget: str
    share: str
    delta: str
    records: str
    noise: str
    rate: str
    steps: str


def unit(summary: Json) -> str:
    """Whose part in the training is hidden: "patient", "slice", "site"; empty for nobody's."""
    found = facts.text(summary, "privacy", "unit")
    return found if found in ("patient", "slice", "site") else ""


def is_masked(summary: Json) -> bool:
    """Whether the server saw sums of updates only."""
    return facts.section(summary, "privacy").get("secure_aggregation") is True


def statement(summary: Json) -> str:
    """The guarantee as one sentence: the weakest, where sites have different ones."""
    found = facts.text(summary, "privacy", "statement")
    if not found:
        return ""
    found = _TINY.sub(lambda match: _power_of_ten(float(match[0])), found)
    plans = facts.section(summary, "privacy", "sites")
    kinds = {tuple(facts.number(entry, key) for key in _PLAN) for entry in plans.values()}
    if len(kinds) < 2:
        return f"Guarantee: {found}"
    return f"Guarantee at the site where it is weakest, with the others in the table: {found}"


def overview(summary: Json) -> str:
    """What there was of differential privacy and secure aggregation, in plain words."""
    whose, masked = unit(summary), is_masked(summary)
    sums = (
        "each site sent its update under masks that cancel in the sum, so that the server saw sums "
        "only and no update of a single site"
    )
    if not whose and masked:
        return (
            f"This run used secure aggregation and no differential privacy: {sums}. Nothing bounds "
            "what the sums, and the adapter, reveal about single patients."
        )
    if not whose and facts.section(summary, "privacy"):
        return "The summary has an entry on privacy that this report cannot read."
    if not whose:
        return (
            "This run used no differential privacy and no secure aggregation: the server saw each "
            "site’s update as it was, and nothing bounds what the updates reveal about single "
            "patients."
        )
    if masked:
        return f"Secure aggregation was on: {sums}. The noise was added at the sites, before."
    if whose == "site":
        return (
            "Secure aggregation was off: the server saw each site’s update as it was and added the "
            "noise itself. The guarantee is about the adapter, and takes a server that is trusted."
        )
    return "Secure aggregation was off: the server saw each site’s update, with its noise."


def owners(summary: Json) -> str:
    """Whose budgets the table has."""
    if unit(summary) == "site":
        return "all sites together"
    return f"the {unit(summary) or 'record'}s of each site"


def spending_rows(summary: Json) -> list[SpendingRow]:
    """What each site has spent and by what mechanism."""
    return [
        SpendingRow(
            site,
            _upper_bound(facts.number(entry, "epsilon")),
            _plain(facts.number(entry, "budget")),
            units.percent(facts.number(entry, "epsilon"), facts.number(entry, "budget")),
            _power_of_ten(facts.number(entry, "delta")),
            units.count(facts.number(entry, "records")),
            _plain(facts.number(entry, "noise_multiplier")),
            _plain(facts.number(entry, "sampling_rate")),
            units.count(facts.number(entry, "steps_per_round")),
        )
        for site, entry in facts.section(summary, "privacy", "sites").items()
        if isinstance(entry, dict)
    ]


def remarks(summary: Json, simulated: bool) -> list[str]:
    """What the table does not say: sites that left, scores, and what the guarantee is not about."""
    return [*_about_ledgers(summary), *_about_scores(summary, simulated)]


def warnings(summary: Json) -> list[str]:
    """What the run was warned of."""
    found = facts.section(summary, "privacy").get("warnings")
    return [text for text in found if isinstance(text, str)] if isinstance(found, list) else []


def handed_over(summary: Json) -> list[str]:
    """What each site gave the server, as the items of a list."""
    whose, masked = unit(summary), is_masked(summary)
    noisy = whose in ("patient", "slice")
    items = [_update(summary, noisy, masked)]
    if masked:
        items.append("public keys, sealed shares of the masks’ seeds and signatures")
    if noisy:
        items.append("the published number of records and the planned steps; no count of its data")
        items.append("the number and hash of the last entry in its privacy ledger")
    else:
        items.append("counts of cases and training examples")
    items.append(_scores(noisy, _tells_scores(summary)))
    if whose:
        items.append("where something failed, the code of the error")
    return items


def bound(summary: Json) -> str:
    """What adapters can carry, and what bounds it."""
    shown = "Adapter tensors are computed from patients’ images all the same"
    whose = unit(summary)
    if not whose:
        return f"{shown}, and can carry information about them."
    return f"{shown}; how much they can carry about one {whose} is what the guarantee bounds."


def missing_dice(summary: Json) -> str:
    """Why there is no Dice by round."""
    if unit(summary) and not _tells_scores(summary):
        return "There is no Dice by round: the sites withheld their scores."
    return "No Dice was recorded by round."


def missing_loss(summary: Json) -> str:
    """Why there is no training loss."""
    if unit(summary):
        return "There is no training loss: under differential privacy no record of it is kept."
    return "No training loss was recorded."


def unknown_error(summary: Json) -> str:
    """Why no round has an aggregation error, where privacy is the reason; else empty."""
    if is_masked(summary):
        why = "it takes every site’s update, and the server saw sums only"
    elif unit(summary) == "site":
        why = "the noise does not cover it, so that no record of it is kept"
    else:
        return ""
    return f"The aggregation error is not known: {why}."


def _about_ledgers(summary: Json) -> Iterator[str]:
    if left := _sites_with(summary, BUDGET_SPENT):
        of = "their" if len(left) > 1 else "its"
        yield (
            f"{units.names(left)} left before the end: another round would have exceeded {of} "
            "budget."
        )
    if old := _sites_with(summary, ROLLED_BACK):
        of = "their ledgers were" if len(old) > 1 else "its ledger was"
        yield (
            f"{units.names(old)} did not train to the end: {of} older than what the server had "
            "seen. What was spent there can be more than the table says."
        )


def _about_scores(summary: Json, simulated: bool) -> Iterator[str]:
    if not unit(summary):
        return
    if _tells_scores(summary):
        yield (
            "The sites declared their validation scores to the server, without noise: the "
            "guarantee covers training patients only."
        )
    else:
        yield "The sites withheld their validation scores from the server."
    if simulated:
        yield (
            "The final scores, the counts of cases and the examples in this report were made by "
            "the simulation, which has all the data: they are outside the guarantee."
        )


def _update(summary: Json, noisy: bool, masked: bool) -> str:
    trained = facts.number(summary, "peft", "trainable_parameters")
    size = facts.mean_bytes(summary, "bytes_up")
    return "".join(
        (
            "the adapter’s tensors",
            "" if trained is None else f" ({units.count(trained)} trained numbers)",
            ", trained on noisy gradients alone" if noisy else "",
            ", under masks" if masked else "",
            "" if size is None else f", in messages of {units.size(size)} on average",
        )
    )


def _scores(noisy: bool, told: bool) -> str:
    if noisy and told:
        return "validation scores and the number of validation cases; no training loss"
    if noisy:
        return "no training loss and no validation score"
    if told:
        return "scores: training loss and validation metrics"
    return "the training loss; no validation score"


def _tells_scores(summary: Json) -> bool:
    return not unit(summary) or facts.text(summary, "privacy", "scores") == "declared"


def _sites_with(summary: Json, status: str) -> list[str]:
    return [
        site
        for site in facts.site_names(summary)
        if any(
            facts.text(entry, "sites", site, "status") == status
            for entry in facts.training_rounds(summary)
        )
    ]


def _upper_bound(value: float | None) -> str:
    """Rounded up: a bound that is rounded down is none."""
    return units.MISSING if value is None else f"{math.ceil(value * 100 - 1e-9) / 100:.2f}"


def _plain(value: float | None) -> str:
    return units.MISSING if value is None else f"{value:.4g}"


def _power_of_ten(value: float | None) -> str:
    """``1 × 10⁻⁵``, which no line break tears apart."""
    if value is None or value <= 0:
        return units.MISSING
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{float(digits):g}\u00a0×\u00a010{str(int(power)).translate(_SUPERSCRIPTS)}"
