"""The ServerApp of a deployment: the plan that was asked for, run in the server's kit.

Flower starts it, through the bundle, in a process of its own. It goes on from the newest
checkpoint of the plan, so that any process may die at any time.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from samaritan.config import dump_config
from samaritan.errors import FederationError, SamaritanError
from samaritan.files import write_atomically
from samaritan.lock import locked
from samaritan.models.adapter import AdaptedModel, build_adapted, save_adapter
from samaritan.plan import Plan, read_plan, require_current
from samaritan.provision.kit import Kit, load_kit
from server.bundle import PLAN_KEY
from server.events import append_event
from server.federation import Federation, label_counts, shared_budget
from server.grid import DeployedGrid
from server.home import FAILED, KIT_VARIABLE, plan_file, run_folder
from server.nodes import key_of
from server.outcome import write_outcome
from server.rounds import run_rounds
from server.settings import ServerSettings, load_settings

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs one plan to its end, or to where it has to pause."""
    kit = load_kit(Path(os.environ[KIT_VARIABLE]), "server")
    settings = load_settings(kit.path("server.yaml"))
    sha256 = str(context.run_config[PLAN_KEY])
    plan = read_plan(plan_file(kit, sha256), bytes.fromhex(kit.card.plan_signer)).plan
    run_dir = run_folder(kit, plan)
    run_dir.mkdir(0o700, parents=True, exist_ok=True)
    with locked(run_dir):
        write_atomically(run_dir / "config.yaml", dump_config(plan.config).encode())
        federation: Federation | None = None
        try:
            require_current(plan)
            model = _model(plan, settings)
            federation = _federation(kit, plan, model, run_dir)
            state = run_rounds(DeployedGrid(grid), federation)
            model.load(state.adapter)
            classes = plan.config.data.classes or {}
            save_adapter(run_dir / "adapter", model, state.adapter, plan.config, classes)
            write_outcome(run_dir, plan, model, state)
            federation.note("summary_written")
        except SamaritanError as error:
            # Of its pauses the federation tells itself, and waiting may mend them.
            if federation is None or not isinstance(error, FederationError):
                fault = {"code": error.code, "message": error.message}
                append_event(run_dir / "events.jsonl", FAILED, **fault)
            raise


def _model(plan: Plan, settings: ServerSettings) -> AdaptedModel:
    """The base with the first adapter; it is never trained here."""
    config = plan.config
    own = config.model.model_copy(update={"checkpoint": settings.checkpoint})
    classes = len(config.data.classes or {})
    model = build_adapted(config.model_copy(update={"model": own}), classes, torch.device("cpu"))
    if model.base.sha256 != plan.base.sha256:
        raise FederationError(
            "SAM-F110",
            f"the base here is {model.base.sha256[:16]}, the plan has {plan.base.sha256[:16]}",
            "Give server.yaml the checkpoint the plan was made with.",
        )
    return model


def _federation(kit: Kit, plan: Plan, model: AdaptedModel, run_dir: Path) -> Federation:
    config, initial = plan.config, model.state()
    identities = {name: bytes.fromhex(site.identity) for name, site in plan.sites.items()}
    training = {name: identities[name] for name in plan.training_sites}
    return Federation(
        config,
        model.base.sha256,
        initial,
        plan.training_sites,
        run_dir,
        plan.observers,
        label_counts(config, initial),
        identities=training if config.federation.secure_aggregation else {},
        budget=shared_budget(config, plan.training_sites, kit.path("ledger")),
        plan_sha256=plan.sha256,
        signers=identities,
        node_keys={name: key_of(site.node) for name, site in plan.sites.items()},
    )
