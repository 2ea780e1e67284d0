"""`samaritan privacy plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from samaritan.cli.console import print_json

if TYPE_CHECKING:
    from samaritan.config import Config
    from samaritan.privacy.planner import Outlook

app = typer.Typer(no_args_is_help=True)

_PARAMETERS = 150_000
"""About what SAM ViT-B trains with LoRA of a small rank, where nothing says it."""


@app.command()
def plan(
    patients: Annotated[
        int | None, typer.Option(min=1, help="Training patients of a site; taken in whole tens.")
    ] = None,
    epsilon: Annotated[float | None, typer.Option(help="Budget of all rounds together.")] = None,
    delta: Annotated[
        float | None, typer.Option(help="1 / (10 patients), at most 1e-5, by default.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="10 by default.")] = None,
    steps_per_round: Annotated[int | None, typer.Option(min=1, help="20 by default.")] = None,
    sampling_rate: Annotated[
        float | None, typer.Option(help="Chance of a patient to be in a step; 0.1 by default.")
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(min=1, help="Numbers trained; counted from --config by default.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML configuration for all that is not given here.")
    ] = None,
    sites: Annotated[
        int | None, typer.Option(min=1, help="Sites that are averaged; 1 by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """What a privacy guarantee will cost: noise, epsilon, and what is left of the signal."""
    from samaritan.config import Config, load_config
    from samaritan.privacy.caveats import warnings_for
    from samaritan.privacy.planner import alternatives, outlook
    from samaritan.privacy.statement import describe

    given = load_config(config) if config else Config()
    notes = []
    if patients is not None and (rounded := _whole_tens(patients)) != patients:
        notes.append(
            f"{patients} patients are taken as {rounded}: publish a rounded number, as the exact "
            "one tells whether somebody was there."
        )
    if parameters is None and config is None:
        notes.append(f"{_PARAMETERS:,} trained parameters are assumed; --config counts them.")
    asked = _asked(
        given, rounds,
        records=_whole_tens(patients) if patients else None, epsilon=epsilon, delta=delta,
        steps_per_round=steps_per_round, sampling_rate=sampling_rate,
    )  # fmt: skip
    numbers = parameters or (_trained_parameters(given) if config else _PARAMETERS)
    found = outlook(asked, numbers, sites or 1)
    others = list(alternatives(asked, numbers, sites or 1))
    warnings = warnings_for(asked, found.plan, numbers)
    snippet = _snippet(asked, found.plan.delta)
    both = found.epsilon()
    if as_json:
        print_json({
            "statement": describe(found.plan), **_row(found),
            "epsilon_by": {"pld": both.pld, "rdp": both.rdp},
            "delta": found.plan.delta, "unit": found.plan.unit, "records": found.plan.records,
            "parameters": numbers, "sites": sites or 1,
            "alternatives": [_row(other) for other in others],
            "warnings": warnings, "notes": notes, "yaml": snippet,
        })  # fmt: skip
        return
    typer.echo(f"{describe(found.plan)}\n")
    typer.echo(f"epsilon by loss distributions {both.pld:.3f}, by Renyi moments {both.rdp:.3f}")
    typer.echo(
        f"a step expects {found.plan.expected_records:g} {found.plan.unit}s; noise on their mean, "
        f"over {numbers:,} parameters, is {found.noise_of_step:.3g} times the clipping norm, which "
        "the mean itself never exceeds"
    )
    typer.echo(
        f"over all steps and {sites or 1} site{'s' if (sites or 1) > 1 else ''}, noise is "
        f"{found.noise_of_run:.3g} times the longest sum of gradients, which is reached only if "
        "all point one way"
    )
    typer.echo(_table([found, *others]))
    for text in (*warnings, *notes):
        typer.echo(f"note: {text}")
    typer.echo(f"\n{snippet}", nl=False)


def _whole_tens(patients: int) -> int:
    return patients - patients % 10 if patients >= 10 else patients


def _asked(given: Config, rounds: int | None, **options: Any) -> Config:
    """The guarantee that is asked for, on settings that a guarantee allows.

    Raises:
        ConfigError: For a value out of range, a budget or number of patients that is missing, or a
            delta that allows a patient to be published.
    """
    from samaritan.config import parse_config
    from samaritan.privacy.rules import check_privacy

    privacy = given.privacy.model_dump() | {k: v for k, v in options.items() if v is not None}
    if privacy["unit"] == "none":
        privacy["unit"] = "patient"
    if isinstance(privacy["records"], dict):
        privacy["records"] = min(privacy["records"].values(), default=None)
    privacy["noise_multiplier"] = None  # this is what is looked for
    asked = parse_config(
        {
            "rounds": rounds or given.rounds,
            "strategy": given.strategy,
            "data": {"source": "phantoms"},
            "federation": {"weighting": "uniform"},
            "privacy": privacy,
        },
        "the plan",
    )
    check_privacy(asked)
    return asked


def _trained_parameters(config: Config) -> int:
    """Numbers that get noise; no checkpoint is read, and no memory is needed."""
    import math

    from samaritan.models.count import trained_shapes
    from samaritan.shares import shares

    trained = trained_shapes(config)
    noisy = shares(config, trained, 1).trained  # ffa keeps one factor of each LoRA
    return sum(math.prod(trained[name]) for name in noisy)


def _row(found: Outlook) -> dict[str, float]:
    plan = found.plan
    return {
        "epsilon": plan.epsilon,
        "rounds": plan.rounds,
        "steps_per_round": plan.steps_per_round,
        "sampling_rate": plan.sampling_rate,
        "noise_multiplier": plan.noise_multiplier,
        "expected_per_step": plan.expected_records,
        "noise_of_step": found.noise_of_step,
        "noise_of_run": found.noise_of_run,
    }


def _table(outlooks: list[Outlook]) -> str:
    """What was asked for in the first line, alternatives below."""
    head = ("epsilon", "rounds", "steps", "rate", "noise", "per step", "of step", "of run")
    rows = [head, *(tuple(f"{v:.3g}" for v in _row(o).values()) for o in outlooks)]
    lines = ["  ".join(f"{cell:>8}" for cell in row) for row in rows]
    return "\n".join([lines[0], f"{lines[1]}  as asked", *lines[2:]])


def _snippet(asked: Config, delta: float) -> str:
    """The section to paste; the noise multiplier is fitted again when the run begins."""
    privacy = asked.privacy
    section = {
        "unit": privacy.unit,
        "epsilon": privacy.epsilon,
        "delta": delta,
        "records": privacy.records,
        "sampling_rate": privacy.sampling_rate,
        "steps_per_round": privacy.steps_per_round,
        "clip_norm": privacy.clip_norm,
    }
    head = (
        f"# Holds for rounds: {asked.rounds}. Set federation.weighting: uniform and name "
        "data.classes too.\n"
    )
    return head + yaml.safe_dump({"privacy": section}, sort_keys=False)
