"""`samaritan site`: keys, approvals, start, status and stop at a hospital."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from samaritan.cli.console import print_json
from samaritan.cli.kits import KitFolder, KitOption, kit_folder, states_table

if TYPE_CHECKING:
    from client.approvals import Approvals
    from samaritan.audit.policy import SitePolicy

app = typer.Typer(no_args_is_help=True)


class Half(StrEnum):
    """A part of a site that runs as a system user of its own."""

    agent = "agent"
    courier = "courier"


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def request(kit: KitFolder = None) -> None:
    """Make this site's keys and a request for its certificate."""
    from samaritan.provision.kit import load_kit
    from samaritan.provision.requests import kit_fingerprints, make_request

    found = load_kit(kit_folder(kit), "site")
    path = make_request(found)
    prints = kit_fingerprints(found)
    typer.echo(f"fingerprint of the authority (ca.crt):        {prints['authority']}")
    typer.echo(f"fingerprint of the signer of plans (plan.pub): {prints['plan_signer']}")
    typer.echo(f"fingerprint of this site's identity:          {prints['identity']}")
    typer.echo(f"send this file to the coordinator; it holds no secret: {path}")
    typer.echo("then telephone the coordinator and compare all three fingerprints")


@app.command()
def accept(
    certificate: Annotated[Path, typer.Argument(help="The certificate that came back.")],
    kit: KitOption = None,
) -> None:
    """Put the certificate into the kit, if it belongs to the keys made here."""
    from samaritan.provision.kit import load_kit
    from samaritan.provision.requests import accept_certificate

    accept_certificate(load_kit(kit_folder(kit), "site"), certificate)
    typer.echo("the certificate is in place")


@app.command()
def key(file: Annotated[Path, typer.Argument(help="Where to make it.")]) -> None:
    """Make the key of one role, for policy.approvers in site.yaml."""
    from samaritan.errors import TrustError
    from samaritan.keys import load_identity, make_identity

    if file.exists():
        raise TrustError(
            "SAM-K314",
            f"{file} exists; its public key is {load_identity(file).public.hex()}",
            "Use it, or name a new file; keys are not replaced.",
        )
    typer.echo(f"public key for site.yaml: {make_identity(file).public.hex()}")


@app.command()
def approve(
    plan: Annotated[Path, typer.Argument(help="Signed plan, from the coordinator.")],
    kit: KitOption = None,
    role: Annotated[
        str | None, typer.Option(help="Your role, where the policy names roles.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The key of that role.")] = None,
    as_json: AsJson = False,
) -> None:
    """Approve a plan: from then on this site does what it says, and nothing else."""
    from client.approvals import SITE_ROLE, Approvals, require_member, roles_of
    from client.home import site_identity, site_log
    from client.settings import load_settings
    from samaritan.audit.policy import require_agreement
    from samaritan.keys import load_identity
    from samaritan.models.count import trained_shapes
    from samaritan.plan import read_plan, require_current
    from samaritan.provision.kit import load_kit

    found = load_kit(kit_folder(kit), "site")
    settings = load_settings(found.path("site.yaml"))
    identity = site_identity(found)
    signed = read_plan(plan, bytes.fromhex(found.card.plan_signer))
    require_current(signed.plan)
    require_member(signed.plan, found, identity, found.path("node.pub").read_text("utf-8"))
    shapes = trained_shapes(signed.plan.config)
    require_agreement(settings.policy, signed.plan, tuple(shapes))
    approvals = Approvals(found, roles_of(settings.policy, identity))
    own = identity if key is None else load_identity(key)
    sha256 = signed.plan.sha256
    approvals.require_role(role or SITE_ROLE, own)
    # Before it counts: an approval that the log does not have must not be one.
    site_log(found, identity).append(
        "plan_approved", plan=sha256, study=signed.plan.study, role=role or SITE_ROLE,
        key=own.public.hex(), ethics=list(signed.plan.ethics),
    )  # fmt: skip
    approvals.approve(signed, role or SITE_ROLE, own)
    missing = approvals.missing(sha256)
    if as_json:
        print_json({"plan": sha256, "study": signed.plan.study, "missing": missing})
    elif missing:
        typer.echo(f"approved; still missing: {', '.join(missing)}")
    else:
        typer.echo(f"study {signed.plan.study} ({sha256[:16]}) is approved at this site")


@app.command()
def start(
    kit: KitFolder = None,
    only: Annotated[
        Half | None, typer.Option(help="Run one half; the courier's has the node with it.")
    ] = None,
) -> None:
    """Run the agent, the node and the courier until told to stop."""
    from client.halves import half_folder, half_programs
    from client.permissions import require_own_user
    from client.processes import site_programs
    from client.settings import load_settings
    from samaritan.operate.processes import run
    from samaritan.provision.kit import load_kit

    found = load_kit(kit_folder(kit), "site")
    settings = load_settings(found.path("site.yaml"))
    require_own_user(found, settings, None if only is None else only.value)
    if only is None:
        run(found.folder, site_programs(found, settings))
    else:
        run(half_folder(found, only.value), half_programs(found, settings, only.value))


@app.command()
def status(kit: KitFolder = None, as_json: AsJson = False) -> None:
    """Show this site's processes and studies; exit status 1 if a process is not up."""
    import os

    from client.approvals import Approvals, roles_of
    from client.halves import site_processes
    from client.home import site_identity
    from client.settings import load_settings
    from samaritan.provision.kit import load_kit

    found = load_kit(kit_folder(kit), "site")
    settings = load_settings(found.path("site.yaml"))
    processes, plans = site_processes(found, settings), {}
    if os.access(found.path("identity.key"), os.R_OK):  # the agent's alone, with two users
        approvals = Approvals(found, roles_of(settings.policy, site_identity(found)))
        plans = {sha: _standing(approvals, sha, settings.policy) for sha in approvals.known()}
    if as_json:
        print_json({"site": found.card.name, "processes": processes, "plans": plans})
    else:
        typer.echo(states_table(processes))
        unseen = [name for name in ("agent", "node", "courier") if name not in processes]
        if processes and unseen:
            typer.echo(f"{', '.join(unseen)}: another user's; root sees them all")
        for sha256, stands in plans.items():
            typer.echo(f"plan {sha256[:16]}: {stands}")
    if not processes or any(told["state"] != "running" for told in processes.values()):
        raise typer.Exit(1)


@app.command()
def stop(kit: KitFolder = None) -> None:
    """Stop this site's processes and wait until they are gone."""
    from client.halves import stop_site
    from samaritan.provision.kit import load_kit

    stop_site(load_kit(kit_folder(kit), "site"))
    typer.echo("stopped")


@app.command()
def permissions(
    agent_user: Annotated[
        str, typer.Option(help="System user that owns the data; name or number.")
    ],
    courier_user: Annotated[
        str, typer.Option(help="System user that speaks with the server; name or number.")
    ],
    kit: KitFolder = None,
) -> None:
    """Give each of two system users the files of its half of this site; run it as root, once."""
    from client.permissions import hand_over
    from samaritan.provision.kit import load_kit

    found = load_kit(kit_folder(kit), "site")
    users = hand_over(found, agent_user, courier_user)
    typer.echo(
        f"{found.folder}: the agent's files belong to {users.agent.name}, the courier's to "
        f"{users.courier.name}"
    )
    typer.echo(f"next: samaritan doctor --kit {found.folder}")


def _standing(approvals: Approvals, sha256: str, policy: SitePolicy) -> str:
    """How a plan stands that somebody here has approved; its tensors are left to the doctor."""
    from samaritan.audit.policy import require_agreement
    from samaritan.errors import AuditError, TrustError

    if missing := approvals.missing(sha256):
        return f"lacks the approval of {', '.join(missing)}"
    try:
        plan = approvals.plan(sha256)
        require_agreement(policy, plan, ())
    except (AuditError, TrustError) as error:
        return f"{error.code}  {error.message}"
    return f"study {plan.study}, approved, valid until {plan.valid_until}"
