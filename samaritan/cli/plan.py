"""`samaritan plan`: make and sign the plan of a study, and read one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samaritan.cli.console import print_json

if TYPE_CHECKING:
    from samaritan.plan import SignedPlan

app = typer.Typer(no_args_is_help=True)


@app.command()
def make(
    study: Annotated[Path, typer.Argument(help="YAML description of the study.")],
    authority: Annotated[
        Path, typer.Option(help="The authority folder that `samaritan provision` made.")
    ],
    out: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("plan.json"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the configuration.")
    ] = None,
) -> None:
    """Make a plan that all parties can read, and sign it for the consortium."""
    from datetime import UTC, datetime

    from samaritan.errors import TrustError
    from samaritan.plan import read_plan, write_plan
    from server.planning import make_plan

    old = None
    if out.exists():
        try:
            old = read_plan(out).plan
        except TrustError as error:
            raise TrustError(
                "SAM-K315", f"{out} exists and is no plan", "Name another file with --out."
            ) from error
    signed = make_plan(study, authority, overrides or [], datetime.now(UTC).date())
    write_plan(out, signed)
    if old is not None and old.sha256 != signed.plan.sha256:
        typer.echo(f"{out} held plan {old.sha256[:16]} of study {old.study}, and does no more")
    typer.echo(f"{out}: study {signed.plan.study}, plan {signed.plan.sha256}")
    typer.echo(f"sites: {', '.join(signed.plan.sites)}")
    typer.echo("next: send it to every site, which approves it with `samaritan site approve`")


@app.command()
def show(
    plan: Annotated[Path, typer.Argument(help="A signed plan.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a plan asks of a site, for the people who approve it."""
    from samaritan.plan import read_plan

    told = _told(read_plan(plan))
    if as_json:
        print_json(told)
        return
    for name, value in told.items():
        if isinstance(value, dict):
            typer.echo(f"{name}:")
            for key, entry in value.items():
                typer.echo(f"  {key}: {entry}")
        else:
            typer.echo(f"{name}: {value}")


def _told(signed: SignedPlan) -> dict[str, Any]:
    import math

    from samaritan.models.count import trained_shapes
    from samaritan.privacy.plan import privacy_plan
    from samaritan.privacy.statement import describe
    from samaritan.provision.requests import fingerprint
    from samaritan.shares import noisy_sites, shares

    plan, config = signed.plan, signed.plan.config
    shapes = trained_shapes(config)
    sent = shares(config, shapes, 1).sent
    numbers = sum(math.prod(shapes[name]) for name in sent)
    privacy = "none: see docs/privacy.md on what an update can reveal"
    if noisy_sites(config):
        privacy = describe(privacy_plan(config, plan.training_sites[0]))
    return {
        "study": plan.study,
        "title": plan.title,
        "purpose": plan.purpose,
        "plan": plan.sha256,
        "signed by": fingerprint(signed.signer),
        "valid": f"{plan.created} to {plan.valid_until}",
        "contacts": ", ".join(plan.contacts),
        "ethics": ", ".join(plan.ethics),
        "samaritan": plan.samaritan,
        "base model": f"{plan.base.name}, {plan.base.sha256}",
        "method": f"{config.peft.preset}, rank {config.peft.rank}, strategy {config.strategy}",
        "rounds": config.rounds,
        "sites a round needs": config.federation.min_sites,
        "leaves a site in a round": (
            f"{len(sent)} tensors, {numbers:,} numbers as {config.wire.up.numbers}, "
            f"{4 * numbers:,} bytes before the codec"
        ),
        "secure aggregation": "yes" if config.federation.secure_aggregation else "no",
        "differential privacy": privacy,
        "sites": {
            name: f"{fingerprint(bytes.fromhex(site.identity))} (key {site.identity})"
            + (" (only scores)" if name in plan.observers else "")
            for name, site in sorted(plan.sites.items())
        },
    }
