"""What summary.json says of a run: its scores, its rounds and what they cost."""

from __future__ import annotations

import json
import os
import platform
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from client.agent import SiteAgent
from samaritan import __version__
from samaritan.config import config_sha256
from samaritan.files import write_atomically
from samaritan.models.adapter import AdaptedModel, card_of
from samaritan.report.summary import final_scores
from samaritan.training.evaluate import CaseScores
from server.checkpoints import Checkpoint
from server.history import overhead_seconds, published
from simulation.study import Study


def steps_of(state: Checkpoint, site: str) -> int:
    """The steps a site trained over all rounds."""
    return int(sum(r["sites"].get(site, {}).get("steps") or 0 for r in state.history))


def summarise(
    study: Study,
    model: AdaptedModel,
    agents: Sequence[SiteAgent],
    state: Checkpoint,
    results: Sequence[CaseScores],
    reference: dict[str, Any] | None,
    engine: str,
) -> dict[str, Any]:
    """The content of summary.json but its cost; `reference` holds the baselines, if any."""
    config = study.config
    final = final_scores(results, list(study.classes), config.evaluation)
    return {
        "samaritan": __version__,
        "name": config.name,
        "config_sha256": config_sha256(config),
        "seed": config.seed,
        "engine": engine,
        "base": card_of(model.base),
        "peft": {
            "preset": config.peft.preset,
            "rank": config.peft.rank,
            "trainable_parameters": model.parameters(),
        },
        "strategy": config.strategy,
        "data": {
            "classes": study.classes,
            "pseudo_sites": config.data.pseudo_sites or config.data.partition == "uniform",
            "note": config.data.note,
        },
        "sites": {
            agent.site: {
                "train_cases": len(agent.train_cases),
                "val_cases": len(agent.val_cases),
                "train_subjects": len({c.subject_id for c in agent.train_cases}),
            }
            for agent in agents
        },
        "rounds": [published(entry, config) for entry in state.history],
        "adapter_of_round": state.server_round,
        "final": final,
        "baselines": reference,
        "gain": _gain(final, reference),
    }


def _gain(final: dict[str, Any], reference: dict[str, Any] | None) -> dict[str, float] | None:
    """Federated Dice minus each baseline's."""
    if reference is None or final["dice_mean"] is None:
        return None
    named = {"over_local": "local_only", "over_centralised": "centralised", "over_unet": "unet"}
    return {
        key: final["dice_mean"] - reference[name]["dice_mean"]
        for key, name in named.items()
        if reference[name]["dice_mean"] is not None
    }


def cost_of(
    state: Checkpoint, agents: Sequence[SiteAgent], engine: str, wall: float, federated: float
) -> dict[str, Any]:
    """Time, memory and bytes; `wall` and `federated` are seconds of this process."""
    sites = [s for r in state.history for s in r["sites"].values()]
    # The same weights in memory are one copy, however many agents hold them.
    bases = {next(agent.model.segmenter.model.parameters()).data_ptr() for agent in agents}
    return {
        "wall_seconds": round(wall, 1),
        "federated_seconds": round(federated, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "bytes_up": sum(s["bytes_up"] for s in sites),
        "bytes_down": sum(s["bytes_down"] for s in sites),
        # Ray workers hold copies of their own, which this process cannot see.
        "frozen_base_copies": len(bases) if engine == "inprocess" else None,
        "steps": sum(s["steps"] or 0 for s in sites),
        # Under privacy sites do not tell how long they worked.
        "overhead_seconds_per_round": (
            overhead_seconds(state.history) if agents[0].config.privacy.unit == "none" else None
        ),
        "hardware": hardware(),
    }


def hardware() -> str:
    """Processor, cores and GPU, for the reader of a number."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{name or platform.machine()}, {cores} cores{gpu}, torch {torch.__version__}"


def write_json(path: Path, value: Any) -> None:
    """Writes strict JSON, whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
