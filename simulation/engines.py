"""The two ways to run the same ServerApp and ClientApp on one machine."""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from flwr.app import Context, RecordDict

from client.app import Answering, make_client_app
from client.site import Site
from samaritan.config import Config, load_config
from samaritan.errors import ConfigError, FederationError
from samaritan.models.adapter import build_adapted
from server.app import make_server_app
from server.checkpoints import Checkpoint
from server.federation import Federation
from simulation.agents import build_agents, in_front_of
from simulation.grid import InProcessGrid, partition_id
from simulation.study import read_study


def run_in_process(federation: Federation, sites: Sequence[Answering]) -> Checkpoint:
    """All sites in this process, one after the other, on one model.

    Raises:
        SamaritanError: As `run_rounds`.
    """
    finished: list[Checkpoint] = []
    grid = InProcessGrid(make_client_app(lambda context: sites[partition_id(context)]), len(sites))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    make_server_app(federation, finished.append)(grid, context)
    return finished[0]


def require_ray() -> None:
    """Refuses a machine without Flower's simulation engine.

    Raises:
        ConfigError: When the extra is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "SAM-C301",
            "--engine ray needs Flower's simulation extra, which is not installed",
            "pip install 'samaritan[ray]', or use --engine inprocess.",
        )


def run_on_ray(
    federation: Federation, data_dir: Path, ledger_dir: Path | None = None, cpus_per_site: int = 1
) -> Checkpoint:
    """Flower's own simulation engine: each site in a Ray worker, GPUs shared out if there are any.

    Every worker builds its own model, so memory grows with the number of workers.

    Raises:
        ConfigError: When the extra is not installed.
        SamaritanError: As `run_rounds`.
    """
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    import torch
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)  # its notice that run_simulation is old
    finished: list[Checkpoint] = []
    faults: list[Exception] = []

    # Flower swallows what a ServerApp raises in a simulation; it is brought out by hand.
    workers = max(1, len(os.sched_getaffinity(0)) // cpus_per_site)
    app = make_server_app(replace(federation, at_once=workers), finished.append, faults.append)
    nodes = len(federation.sites) + len(federation.observers)
    gpus = torch.cuda.device_count() / nodes
    try:
        run_simulation(
            app,
            make_client_app(
                functools.partial(_worker_site, federation.run_dir, data_dir, ledger_dir)
            ),
            num_supernodes=nodes,
            backend_config={
                "client_resources": {"num_cpus": cpus_per_site, "num_gpus": min(1.0, gpus)}
            },
        )
    except Exception:
        if not faults:
            raise
    finally:
        ray.shutdown()
    if faults:
        raise faults[0]
    if not finished:
        raise FederationError(
            "SAM-F104", "Flower's simulation engine ended without a result", "See its log above."
        )
    return finished[0]


def _worker_site(run_dir: Path, data_dir: Path, ledger_dir: Path | None, context: Context) -> Site:
    return _worker_sites(run_dir, data_dir, ledger_dir)[partition_id(context)]


@functools.cache
def _worker_sites(run_dir: Path, data_dir: Path, ledger_dir: Path | None) -> list[Site]:
    """The sites of a Ray worker; built once and kept between messages."""
    config: Config = load_config(run_dir / "config.yaml")
    study = read_study(config, data_dir)
    model = build_adapted(config, len(study.classes))
    return in_front_of(
        build_agents(study, model, model.state(), study.cache(), run_dir, ledger_dir)
    )
