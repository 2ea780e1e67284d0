"""How a run combined its updates: the settings in words, the error, and updates out of line."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median_low

import yaml

from samaritan.report import facts, units
from samaritan.report.facts import Json
from samaritan.report.folder import clean

LONG_UPDATE = 10
"""An update this many times as long as the round's median is out of line."""

MAX_SENTENCES = 5

_EXACT = 1e-5
_RULES = {
    "fedavg": "mean of the factors A and B",
    "svd": "mean of the products BA, brought back to the rank by SVD",
    "ffa": "A is frozen and shared, mean of B",
    "fedsa": "mean of A; B stays at the site",
    "fedex": "mean of A and B; what the mean of the products is beyond that goes into the base",
    "flora": "the mean of the products goes into the base, and the adapters start anew",
    "rolora": "A and B are trained in turn, mean of the one that was",
    "median": "median of every number",
    "trimmed-mean": "mean of every number without its extremes",
    "krum": "the one update that is nearest to the others",
    "multi-krum": "mean of the updates that are nearest to the others",
}
_ROBUST = ("median", "trimmed-mean", "krum", "multi-krum")


@dataclass(frozen=True)
class LongUpdates:
    """The updates of one site that were out of line.

    Attributes:
        site: Its name.
        rounds: In which rounds.
        times: The longest of them, in medians of its round.
    """

    site: str
    rounds: tuple[int, ...]
    times: float


def read_settings(config_text: str | None) -> Json:
    """The resolved configuration as plain values; empty where it cannot be read."""
    try:
        tree = clean(yaml.safe_load(config_text or ""))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}


def strategy_rows(summary: Json, settings: Json) -> list[tuple[str, str]]:
    """The rule and the codecs, and what else of the strategy differs from the default."""
    rule = facts.text(summary, "strategy") or facts.text(settings, "strategy")
    federation = facts.section(settings, "federation")
    rows = [
        ("Rule", f"{rule}: {_RULES[rule]}" if rule in _RULES else rule),
        ("Wrong sites withstood", _text_if(rule in _ROBUST, federation, "byzantine_sites")),
        ("Clipping", _clipping(federation)),
        ("Weighting", _weighting(federation)),
        ("Server optimiser", _optimiser(facts.section(settings, "server_optimiser"))),
        ("Drift control", _drift(facts.section(settings, "training"))),
        ("Ranks", _ranks(settings)),
        ("Codec, up", _codec(settings, "up") + _feedback(settings)),
        ("Codec, down", _codec(settings, "down")),
        ("Sites asked", _sampling(summary, federation)),
        ("Personal parts", ", ".join(_items(settings, "personal", "parts"))),
        ("Kept adapter", _kept(summary, settings)),
    ]
    return [(label, value) for label, value in rows if value]


def personal_kinds(summary: Json, settings: Json) -> str:
    """The kinds of tensors that stay at the sites, as the configuration and the rule name them."""
    kinds = _items(settings, "personal", "parts")
    return ", ".join([*kinds, *(["lora_B"] if facts.text(summary, "strategy") == "fedsa" else [])])


def selection_sentence(summary: Json, settings: Json) -> str:
    """What choosing the best round does to the scores, or an empty text."""
    number = facts.number(summary, "adapter_of_round")
    if facts.text(settings, "selection", "keep") != "best" or number is None:
        return ""
    return (
        f"The adapter of round {number:.0f} was kept because its mean Dice on the validation "
        "cases is the best of all rounds. The final scores are over the same cases, so they "
        "flatter it."
    )


def update_norms(summary: Json) -> dict[str, tuple[list[int], list[float]]]:
    """The known lengths of each site's updates, as ``(rounds, norms)``."""
    found = {site: facts.series(summary, site, "update_norm") for site in facts.site_names(summary)}
    return {site: points for site, points in found.items() if points[0]}


def median_norms(summary: Json) -> dict[int, float]:
    """The median length of the updates of each round; of two middle ones the shorter."""
    norms: dict[int, list[float]] = {}
    for rounds, values in update_norms(summary).values():
        for number, value in zip(rounds, values, strict=True):
            norms.setdefault(number, []).append(value)
    return {number: median_low(values) for number, values in sorted(norms.items())}


def long_updates(summary: Json) -> list[LongUpdates]:
    """The sites that sent updates out of line, the worst first."""
    medians = median_norms(summary)
    found = []
    for site, (rounds, norms) in update_norms(summary).items():
        times = {
            number: norm / medians[number]
            for number, norm in zip(rounds, norms, strict=True)
            if norm > LONG_UPDATE * medians[number] > 0
        }
        if times:
            found.append(LongUpdates(site, tuple(times), max(times.values())))
    return sorted(found, key=lambda entry: entry.times, reverse=True)


def long_update_sentences(summary: Json) -> list[str]:
    """One sentence for each site that sent updates out of line; of many for the worst."""
    found = long_updates(summary)
    sentences = [
        f"{entry.site} sent updates up to {units.count(entry.times)} times as long as the "
        f"round’s median ({'round' if len(entry.rounds) == 1 else 'rounds'} "
        f"{units.ranges(entry.rounds)})."
        for entry in found[:MAX_SENTENCES]
    ]
    if len(found) > MAX_SENTENCES:
        sentences.append(f"So did {units.plural(len(found) - MAX_SENTENCES, 'more site')}.")
    return sentences


def errors(summary: Json) -> dict[int, float]:
    """The known aggregation errors by round."""
    return _by_round(summary, "aggregation_error")


def error_sentence(summary: Json, settings: Json) -> str:
    """The error of aggregation in words; empty where no round records one."""
    known = errors(summary)
    if not known:
        recorded = any("aggregation_error" in entry for entry in facts.training_rounds(summary))
        unknown = (
            "The aggregation error is not known: no product BA can be formed from what the sites "
            "send."
        )
        return unknown if recorded else ""
    meaning = (
        "The aggregation error is the relative distance of the new products BA from the ideal mean "
        "of the sites’ products."
    )
    worst = max(known, key=known.__getitem__)
    if is_exact(summary):
        return f"{meaning} It was at most {known[worst]:.2g}: exact up to rounding."
    mean = sum(known.values()) / len(known)
    found = f"It was {mean:.2g} on average and at most {known[worst]:.2g}, in round {worst}."
    return f"{meaning} {found}{_on_purpose(summary, settings)}"


def is_exact(summary: Json) -> bool:
    """Whether the error of every round is no more than rounding."""
    return all(error < _EXACT for error in errors(summary).values())


def seconds_sentence(summary: Json) -> str:
    """How long combining took, or an empty text."""
    known = list(_by_round(summary, "aggregation_seconds").values())
    if not known:
        return ""
    mean = units.duration(sum(known) / len(known))
    return f"Combining took {mean} per round on average and {units.duration(max(known))} at most."


def _by_round(summary: Json, key: str) -> dict[int, float]:
    found = {
        int(facts.number(entry, "round") or 0): facts.number(entry, key)
        for entry in facts.training_rounds(summary)
    }
    return {number: value for number, value in found.items() if value is not None}


def _on_purpose(summary: Json, settings: Json) -> str:
    robust = facts.text(summary, "strategy") in _ROBUST
    optimiser = facts.text(settings, "server_optimiser", "name") not in ("", "none")
    if not robust and not optimiser:
        return ""
    actor = "A robust rule" if robust else "A server optimiser"
    return f" {actor} departs from that mean on purpose."


def _text_if(condition: bool, value: Json, key: str) -> str:
    return facts.text(value, key) if condition else ""


def _items(value: Json, *keys: str) -> list[str]:
    found = facts.section(value, *keys[:-1]).get(keys[-1])
    return [str(item) for item in found] if isinstance(found, list) else []


def _clipping(federation: Json) -> str:
    norm = facts.text(federation, "clip_norm")
    if not norm:
        return ""
    return f"updates are shortened to {'the median norm' if norm == 'median' else f'norm {norm}'}"


def _weighting(federation: Json) -> str:
    constants = facts.numbers(facts.section(federation, "weighting"))
    if constants:
        return "constants: " + units.names([f"{site} {w:g}" for site, w in constants.items()])
    uniform = facts.text(federation, "weighting") == "uniform"
    return "all sites count alike" if uniform else ""


def _optimiser(section: Json) -> str:
    name, rate = facts.text(section, "name"), facts.text(section, "learning_rate")
    if name in ("", "none"):
        return ""
    return f"{name}, learning rate {rate}" if rate else name


def _drift(training: Json) -> str:
    mu = facts.number(training, "proximal_mu")
    parts = [
        f"FedProx, mu {mu:g}" if mu else "",
        "SCAFFOLD" if training.get("scaffold") is True else "",
    ]
    return ", ".join(part for part in parts if part)


def _ranks(settings: Json) -> str:
    ranks = facts.numbers(facts.section(settings, "peft", "site_ranks"))
    if not ranks:
        return ""
    own = units.names([f"{site} {rank:g}" for site, rank in ranks.items()])
    return f"{own}; every other site {facts.text(settings, 'peft', 'rank')}"


def _codec(settings: Json, way: str) -> str:
    codec = facts.section(settings, "wire", way)
    share = facts.number(codec, "top_k")
    parts = [
        f"rank {codec['low_rank']}" if facts.number(codec, "low_rank") else "",
        f"the largest {100 * share:g} %" if share else "",
        facts.text(codec, "numbers"),
    ]
    return ", ".join(part for part in parts if part)


def _feedback(settings: Json) -> str:
    if _codec(settings, "up") in ("", "fp32"):
        return ""
    kept = facts.section(settings, "wire").get("error_feedback") is True
    return ", with error feedback" if kept else ", without error feedback"


def _sampling(summary: Json, federation: Json) -> str:
    count = facts.number(federation, "sites_per_round")
    if count is None:
        return ""
    sites = len(facts.site_names(summary))
    return f"{units.count(count)} of {units.count(sites)} in each round, drawn anew"


def _kept(summary: Json, settings: Json) -> str:
    number = facts.number(summary, "adapter_of_round")
    best = facts.text(settings, "selection", "keep") == "best"
    last = max((facts.number(e, "round") or 0 for e in facts.training_rounds(summary)), default=0)
    if number is None or (number == last and not best):
        return ""
    return f"of round {number:.0f}{', the best mean Dice' if best else ''}"
