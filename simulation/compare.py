"""`samaritan compare`: variants of one run on the same data, split and seeds, side by side."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from samaritan import __version__
from samaritan.config import Config, Section, config_keys, parse_config, read_tree, set_key
from samaritan.errors import ConfigError
from samaritan.files import write_atomically
from samaritan.report.comparison import Failure, circumstances, compare_runs, to_markdown
from samaritan.report.comparison_plot import write_plot
from simulation.outcome import write_json
from simulation.run import Watch, check_run, simulate

Json = dict[str, Any]

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]

_ALIKE = (
    "data.source", "data.sites", "data.cases_per_site", "data.partition", "data.classes",
    "data.site_classes", "data.held_out_sites", "data.val_fraction",
)  # fmt: skip
"""Decide on which cases variants are scored, so that no variant may change them."""


class _Plan(Section):
    """The two keys that a comparison has on top of an ordinary configuration."""

    variants: Annotated[dict[_Name, dict[str, Any]], Field(min_length=1)]
    """Name -> dotted keys and values that differ from the rest of the file."""
    seeds: Annotated[tuple[_Seed, ...], Field(min_length=1)] = (0,)
    """Every variant runs once with each."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) < len(value):
            raise ValueError("holds a seed twice")
        return value


@dataclass(frozen=True)
class Comparison:
    """What is to be run.

    Attributes:
        name: Of the comparison.
        changes: What each variant sets, as written; the first is the reference.
        configs: The configuration of every run, by variant and seed.
    """

    name: str
    changes: Mapping[str, Mapping[str, Any]]
    configs: Mapping[str, Mapping[int, Config]]


def load_comparison(path: Path, overrides: list[str] | None = None) -> Comparison:
    """Reads a configuration with the keys `variants` and `seeds` on top.

    Args:
        path: The YAML file.
        overrides: Items such as ``rounds=3``, for all variants; a variant's own keys come after.

    Raises:
        ConfigError: With every fault of every variant in one message.
    """
    tree = read_tree(path, overrides or [])
    own = {key: tree.pop(key) for key in ("variants", "seeds") if key in tree}
    try:
        plan = _Plan.model_validate(own)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise _refusal(path, faults + _faults(tree)) from error
    configs: dict[str, dict[int, Config]] = {}
    found: dict[str, list[str]] = {}
    for name, changes in plan.variants.items():
        changed = _changed(tree, changes)
        for fault in _faults_of_keys(tree, changes) + _faults(changed):
            found.setdefault(fault, []).append(name)
        if not found:
            configs[name] = {seed: parse_config(changed | {"seed": seed}) for seed in plan.seeds}
    if found:
        every = len(plan.variants)
        raise _refusal(
            path,
            [
                f"{'every variant' if len(names) == every else ', '.join(names)}: {fault}"
                for fault, names in found.items()
            ],
        )
    name = next(iter(configs.values()))[plan.seeds[0]].name
    return Comparison(name, plan.variants, configs)


def _faults(tree: Json) -> list[str]:
    """What the ordinary parser has to say of a tree."""
    try:
        parse_config(tree)
    except ConfigError as error:
        return [line.removeprefix("  - ") for line in error.message.splitlines()[1:]]
    return []


def _changed(tree: Json, changes: Mapping[str, Any]) -> Json:
    changed = copy.deepcopy(tree)
    for key, value in changes.items():
        set_key(changed, key, copy.deepcopy(value))
    return changed


def _faults_of_keys(tree: Json, changes: Mapping[str, Any]) -> list[str]:
    """What is wrong with a variant's keys and what the ordinary parser cannot see."""
    known = config_keys()
    sections = {key[:end] for key in known for end, sign in enumerate(key) if sign == "."}
    faults = []
    if "seed" in {*tree, *changes}:
        faults.append("seed: a comparison has `seeds` instead")
    for key, value in changes.items():
        if key in sections:
            faults.append(f"{key}: is a section; set its keys one by one")
        elif any(f"{key}.".startswith(f"{fixed}.") for fixed in _ALIKE):
            faults.append(f"{key}: variants share their data and split")
        elif not set_key(copy.deepcopy(tree), key, value):
            faults.append(f"{key}: goes through a value that is no section")
    return faults


def _refusal(path: Path, faults: list[str]) -> ConfigError:
    count = f"{len(faults)} fault{'' if len(faults) == 1 else 's'}"
    return ConfigError(
        "SAM-C308",
        f"the comparison {path} has {count}:\n" + "\n".join(f"  - {fault}" for fault in faults),
        "Mend each; `variants` maps names to dotted keys and values, `seeds` is a list of numbers.",
    )


def compare(
    comparison: Comparison,
    out: Path,
    *,
    data_dir: Path | None = None,
    resume: bool = False,
    command: str = "",
    watch: Watch | None = None,
    run_done: Callable[[str, int, Json | Failure], None] | None = None,
) -> Json:
    """Runs every variant with every seed, each in an ordinary run folder, and compares them.

    A run that fails is a row of the table and stops no other. comparison.json, .md, .svg and .png
    are written anew after each run.

    Args:
        comparison: What to run.
        out: Receives ``<variant>/seed-<n>/`` and the comparison.
        data_dir: Data folder; phantoms are made where the configuration says so.
        resume: Keep runs in `out` that are finished, and go on with those that are not.
        command: What the user typed, for the table.
        watch: Told how each run goes.
        run_done: Told the variant, the seed and how the run ended.

    Returns:
        The content of comparison.json.

    Raises:
        SamaritanError: Before any run, when one of them would be refused.
    """
    watch = watch or Watch()
    runs = {
        (variant, seed): (config, out / variant / f"seed-{seed}")
        for variant, seeds in comparison.configs.items()
        for seed, config in seeds.items()
    }
    for config, folder in runs.values():
        check_run(config, folder, data_dir=data_dir, resume=resume and _begun(folder))
    results: dict[str, dict[int, Json | Failure]] = {}
    table: Json = {}
    for (variant, seed), (config, folder) in runs.items():
        watch.note(f"{variant}, seed {seed}")
        ended = _run(config, folder, data_dir, resume, watch)
        results.setdefault(variant, {})[seed] = ended
        if run_done is not None:
            run_done(variant, seed, ended)
        table = {
            "samaritan": __version__,
            "name": comparison.name,
            "command": command,
            "date": datetime.date.today().isoformat(),
            **circumstances(results),
            "changes": {name: dict(comparison.changes[name]) for name in results},
            "variants": compare_runs(results),
        }
        _write(out, table)
    return table


def _begun(folder: Path) -> bool:
    return (folder / "config.yaml").is_file()


def _finished(folder: Path) -> Json | None:
    """The summary of a run that went to its very end."""
    summary, events = folder / "summary.json", folder / "events.jsonl"
    if not (summary.is_file() and events.is_file()):
        return None
    lines = events.read_text("utf-8").splitlines()
    if not lines or '"event": "summary_written"' not in lines[-1]:
        return None
    found: Json = json.loads(summary.read_text("utf-8"))
    return found


def _run(
    config: Config, folder: Path, data_dir: Path | None, resume: bool, watch: Watch
) -> Json | Failure:
    resume = resume and _begun(folder)
    try:
        if resume and (summary := _finished(folder)):
            return summary
        return simulate(config, folder, data_dir=data_dir, resume=resume, watch=watch)
    except Exception as error:  # whatever it is, the other runs go on, and the table tells
        return Failure(getattr(error, "code", type(error).__name__), _message(error))


def _message(error: Exception) -> str:
    return str(getattr(error, "message", error))


def failures(table: Json) -> list[tuple[str, int, str]]:
    """Variant, seed and code of every run that failed."""
    return [
        (row["variant"], entry["seed"], entry["error"]["code"])
        for row in table["variants"]
        for entry in row["seeds"]
        if "error" in entry
    ]


def _write(out: Path, table: Json) -> None:
    write_json(out / "comparison.json", table)
    write_atomically(out / "comparison.md", to_markdown(table).encode())
    write_plot(out, table)
