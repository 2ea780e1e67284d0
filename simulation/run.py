"""`samaritan simulate`: from a configuration and a data folder to a finished run folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from client.agent import SiteAgent
from samaritan import __version__
from samaritan.config import (
    Config,
    config_differences,
    config_sha256,
    dump_config,
    load_config,
)
from samaritan.data.phantoms import write_phantoms
from samaritan.data.slices import CaseCache, PreparedCase
from samaritan.data.transforms import normalise_intensity
from samaritan.data.volume import read_image
from samaritan.errors import ConfigError, StorageError
from samaritan.files import write_atomically
from samaritan.models.adapter import (
    AdaptedModel,
    AdapterState,
    build_adapted,
    card_of,
    save_adapter,
)
from samaritan.models.bases import get_base
from samaritan.models.presets import get_preset
from samaritan.report.facts import oracle_mark
from samaritan.report.html import write_report
from samaritan.report.overlay import draw_overlay
from samaritan.report.summary import case_entries, final_scores
from samaritan.training.evaluate import CaseScores, evaluate_cases, true_indices
from server.checkpoints import Checkpoint
from server.events import append_event
from server.rounds import Federation, RoundCallback, overhead_seconds
from simulation.baselines import run_baselines
from simulation.engines import require_ray, run_in_process, run_on_ray
from simulation.study import TRAIN, VALIDATION, Study, check_study, read_study
from strategies.rules import get_rule

_PHANTOMS, _PHANTOMS_PARTIAL = "data", "data.partial"


@dataclass(frozen=True)
class Watch:
    """Who is told how the run goes; every part may stay silent.

    Attributes:
        note: One line of text.
        case_checked: Cases done, all cases, case id.
        step: Site, step, steps, loss.
        round_done: A round as summary.json holds it.
    """

    note: Callable[[str], None] = lambda text: None
    case_checked: Callable[[int, int, str], None] | None = None
    step: Callable[[str, int, int, float], None] | None = None
    round_done: RoundCallback | None = None


def simulate(
    config: Config,
    run_dir: Path,
    *,
    data_dir: Path | None = None,
    engine: str = "inprocess",
    baselines: bool = False,
    resume: bool = False,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Runs a federation on this machine and writes its run folder.

    Everything that can be refused is refused before the run folder is made.

    Args:
        config: The run.
        run_dir: Run folder; must be new or empty unless `resume` is set.
        data_dir: Data folder; phantoms are made in the run folder where the configuration says so.
        engine: "inprocess" or "ray".
        baselines: Also train local-only, pooled and U-Net models.
        resume: Go on from the last round in the run folder.
        watch: Told how the run goes.

    Returns:
        The content of summary.json.

    Raises:
        SamaritanError: With one clear reason; rounds already done stay in the run folder.
    """
    watch = watch or Watch()
    begun = time.monotonic()
    _check_choices(config, engine)
    _check_run_dir(config, run_dir, resume)
    with _clean_unless_opened(run_dir):
        study, data_dir = _prepare_study(config, run_dir, data_dir, watch)
        model = build_adapted(config, len(study.classes))
        initial = model.state()
        cache = study.cache()
        agents = study.agents(model, cache, watch.step)
        _open_run_dir(config, run_dir)
    federation = Federation(
        config,
        model.base.sha256,
        initial,
        study.training_sites,
        run_dir,
        study.observers,
        watch.round_done,
    )
    watch.note(
        f"{len(study.sites)} sites, {len(study.cases(TRAIN))} training and "
        f"{len(study.cases(VALIDATION))} validation cases; {model.parameters():,} of "
        f"{model.base.parameters:,} parameters trained; {config.rounds} rounds"
    )
    training = time.monotonic()
    state = (
        run_on_ray(federation, data_dir) if engine == "ray" else run_in_process(federation, agents)
    )
    federated_seconds = time.monotonic() - training
    model.load(state.adapter)
    _save_adapter(run_dir / "adapter", model, state.adapter, study)
    watch.note("scoring every validation case on its native grid")
    results = _score(study, model, cache, run_dir)
    steps = {site: _steps(state, site) for site in study.training_sites}

    def conclude(reference: dict[str, Any] | None) -> dict[str, Any]:
        cost = _cost(state, agents, engine, time.monotonic() - begun, federated_seconds)
        summary = _summary(study, model, agents, state, results, reference, engine)
        summary["cost"] = cost
        _write_json(run_dir / "summary.json", summary)
        write_report(run_dir)
        return summary

    # Before the baselines too: they take longer than the federation, and may be stopped.
    summary = conclude(None)
    if baselines:
        summary = conclude(run_baselines(study, model, cache, initial, steps, watch.note))
    append_event(
        run_dir / "events.jsonl",
        "summary_written",
        dice_mean=summary["final"]["dice_mean"],
        oracle_prompts=config.evaluation.prompts,
    )
    return summary


def _check_choices(config: Config, engine: str) -> None:
    """Refuses names that nothing goes by, before any work is done."""
    get_base(config.model.base)
    get_preset(config.peft.preset)
    get_rule(config.strategy)
    if engine == "ray":
        require_ray()


@contextlib.contextmanager
def _clean_unless_opened(run_dir: Path) -> Iterator[None]:
    """Takes away what was made in a run folder when the run is refused before it begins."""
    existed = run_dir.exists()
    try:
        yield
    except BaseException:
        if not (run_dir / "config.yaml").exists():
            for name in (_PHANTOMS, _PHANTOMS_PARTIAL):
                shutil.rmtree(run_dir / name, ignore_errors=True)
            if not existed:
                with contextlib.suppress(OSError):
                    run_dir.rmdir()
        raise


def _check_run_dir(config: Config, run_dir: Path, resume: bool) -> None:
    if run_dir.is_file():
        raise StorageError("SAM-S105", f"{run_dir} is a file", "Give --out a folder.")
    saved = run_dir / "config.yaml"
    if not resume:
        if run_dir.exists() and any(run_dir.iterdir()):
            raise StorageError(
                "SAM-S106",
                f"{run_dir} is not empty",
                "Give --out another folder, or --resume to go on with the run in this one.",
            )
        return
    if not saved.is_file():
        raise StorageError(
            "SAM-S107", f"there is no run to resume in {run_dir}", "Leave --resume out."
        )
    differences = config_differences(load_config(saved), config)
    if differences:
        raise ConfigError(
            "SAM-C302",
            f"the run in {run_dir} has another configuration:\n  " + "\n  ".join(differences),
            "Resume with the same configuration, or start anew in another folder.",
        )


def _prepare_study(
    config: Config, run_dir: Path, data_dir: Path | None, watch: Watch
) -> tuple[Study, Path]:
    if data_dir is None and config.data.source != "phantoms":
        raise ConfigError(
            "SAM-C303", "no data folder given", "Add --data DIR, or set data.source: phantoms."
        )
    data_dir = data_dir or _make_phantoms(config, run_dir, watch)
    study = read_study(config, data_dir)
    check_study(study, data_dir, watch.case_checked)
    return study, data_dir


def _make_phantoms(config: Config, run_dir: Path, watch: Watch) -> Path:
    """Phantoms go into the run folder under a temporary name, so that they are whole or absent."""
    target = run_dir / _PHANTOMS
    if target.is_dir():
        return target
    watch.note(f"making {config.data.sites} x {config.data.cases_per_site} phantom volumes")
    partial = run_dir / _PHANTOMS_PARTIAL
    try:
        shutil.rmtree(partial, ignore_errors=True)
        write_phantoms(partial, config.data.sites, config.data.cases_per_site, config.seed)
        partial.replace(target)
    except OSError as error:
        raise StorageError(
            "SAM-S101", f"cannot write phantoms to {run_dir}: {error.strerror}", "Free space."
        ) from error
    return target


def _open_run_dir(config: Config, run_dir: Path) -> None:
    write_atomically(run_dir / "config.yaml", dump_config(config).encode())


def _save_adapter(directory: Path, model: AdaptedModel, state: AdapterState, study: Study) -> None:
    try:
        save_adapter(directory, model, state, study.config, study.classes)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            "SAM-S101", f"cannot write {directory}: {error}", "Free space, then use --resume."
        ) from error


def _score(study: Study, model: AdaptedModel, cache: CaseCache, run_dir: Path) -> list[CaseScores]:
    """Final scores of every validation case, with overlays of the worst, median and best."""
    kept: dict[str, tuple[PreparedCase, NDArray[np.uint8]]] = {}

    def keep(prepared: PreparedCase, prediction: NDArray[np.uint8], scores: CaseScores) -> None:
        kept[prepared.case.case_id] = (prepared, prediction)

    results = evaluate_cases(
        model.segmenter,
        cache,
        study.cases(VALIDATION),
        study.config.evaluation,
        surfaces=True,
        on_case=keep,
    )
    prompts = study.config.evaluation.prompts
    _write_json(run_dir / "cases.json", case_entries(results, prompts))
    ranked = sorted((r for r in results if r.dice == r.dice), key=lambda r: r.dice)
    chosen: dict[str, CaseScores] = {}
    if ranked:
        chosen = {"worst": ranked[0], "median": ranked[len(ranked) // 2], "best": ranked[-1]}
    entries = []
    for rank, result in chosen.items():
        path = run_dir / "overlays" / f"{rank}.png"
        path.parent.mkdir(exist_ok=True)
        title = f"{rank.capitalize()} case{oracle_mark(prompts)}"
        _draw(path, *kept[result.case.case_id], cache, title)
        entries.append(
            {
                "file": f"overlays/{rank}.png",
                "title": title,
                "case_id": result.case.case_id,
                "site": result.case.site,
                "dice": result.dice,
            }
        )
    _write_json(run_dir / "overlays.json", entries)
    return results


def _draw(
    path: Path,
    prepared: PreparedCase,
    prediction: NDArray[np.uint8],
    cache: CaseCache,
    title: str,
) -> None:
    case = prepared.case
    image = normalise_intensity(read_image(case.image, case.case_id).array)
    classes = {name: index for index, name in enumerate(cache.classes, 1)}
    draw_overlay(
        path,
        image,
        true_indices(prepared, cache),
        prediction,
        prepared.grid.spacing_mm,
        classes,
        title,
    )


def _steps(state: Checkpoint, site: str) -> int:
    return int(sum(r["sites"].get(site, {}).get("steps") or 0 for r in state.history))


def _summary(
    study: Study,
    model: AdaptedModel,
    agents: Sequence[SiteAgent],
    state: Checkpoint,
    results: Sequence[CaseScores],
    reference: dict[str, Any] | None,
    engine: str,
) -> dict[str, Any]:
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
        "rounds": state.history,
        "final": final,
        "baselines": reference,
        "gain": _gain(final, reference),
        "privacy": None,
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


def _cost(
    state: Checkpoint, agents: Sequence[SiteAgent], engine: str, wall: float, federated: float
) -> dict[str, Any]:
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
        "overhead_seconds_per_round": overhead_seconds(state.history),
        "hardware": _hardware(),
    }


def _hardware() -> str:
    """Processor, cores and GPU, for the reader of a number."""
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.processor()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{name or platform.machine()}, {cores} cores{gpu}, torch {torch.__version__}"


def _write_json(path: Path, value: Any) -> None:
    write_atomically(path, (json.dumps(value, indent=1, allow_nan=False) + "\n").encode())
