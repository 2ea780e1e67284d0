"""`samaritan simulate`: from a configuration and a data folder to a finished run folder."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from samaritan.config import (
    Config,
    config_differences,
    dump_config,
    load_config,
)
from samaritan.data.datasets import TRAIN, VALIDATION
from samaritan.data.phantoms import write_phantoms
from samaritan.errors import ConfigError, StorageError
from samaritan.files import write_atomically
from samaritan.lock import locked
from samaritan.models.adapter import (
    AdaptedModel,
    AdapterState,
    build_adapted,
    save_adapter,
)
from samaritan.models.bases import get_base
from samaritan.models.presets import get_preset
from samaritan.privacy.rules import check_privacy
from samaritan.report.html import write_report
from samaritan.shares import get_sharing
from server.events import append_event
from server.federation import (
    Federation,
    RoundCallback,
    check_sites,
    label_counts,
    shared_budget,
)
from simulation.agents import build_agents, in_front_of
from simulation.baselines import run_baselines
from simulation.engines import require_ray, run_in_process, run_on_ray
from simulation.outcome import cost_of, steps_of, summarise, write_json
from simulation.personal import own_adapters, personal_results
from simulation.privacy import SERVER, privacy_results
from simulation.scoring import score_run
from simulation.study import Study, check_study, read_study
from strategies.optimisers import check_optimiser

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
    ledger_dir: Path | None = None,
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
        ledger_dir: Keeps the privacy ledgers of the sites from run to run; by default each run has
            ledgers, and so budgets, of its own.
        engine: "inprocess" or "ray".
        baselines: Also train local-only, pooled and U-Net models.
        resume: Go on from the last round in the run folder.
        watch: Told how the run goes.

    Returns:
        The content of summary.json.

    Raises:
        SamaritanError: With one clear reason; rounds already done stay in the run folder.
    """
    check_run(config, run_dir, data_dir=data_dir, engine=engine, resume=resume)
    with _alone_in(run_dir):
        return _simulate(config, run_dir, data_dir, ledger_dir, engine, baselines, watch or Watch())


def _simulate(
    config: Config,
    run_dir: Path,
    data_dir: Path | None,
    ledger_dir: Path | None,
    engine: str,
    baselines: bool,
    watch: Watch,
) -> dict[str, Any]:
    begun = time.monotonic()
    study, data_dir = _prepare_study(config, run_dir, data_dir, watch)
    model = build_adapted(config, len(study.classes))
    initial = model.state()
    cache = study.cache()
    if baselines:
        cache.unlabelled(study.cases(TRAIN))  # what the pooled model will ask, before the run
    agents = build_agents(study, model, initial, cache, run_dir, ledger_dir, watch.step)
    _open_run_dir(config, run_dir)
    named = config.model_copy(
        update={"data": config.data.model_copy(update={"classes": study.classes})}
    )
    federation = Federation(
        config,
        model.base.sha256,
        initial,
        study.training_sites,
        run_dir,
        study.observers,
        label_counts(named, initial),
        on_round=watch.round_done,
        identities=next((a.masking.identities for a in agents if a.masking is not None), {}),
        budget=shared_budget(config, study.training_sites, (ledger_dir or run_dir) / "server"),
    )
    budgets = {agent.site: agent.budget for agent in agents if agent.budget is not None}
    if federation.budget is not None:
        budgets[SERVER] = federation.budget
    watch.note(
        f"{len(study.sites)} sites, {len(study.cases(TRAIN))} training and "
        f"{len(study.cases(VALIDATION))} validation cases; {model.parameters():,} of "
        f"{model.base.parameters:,} parameters trained; {config.rounds} rounds"
    )
    training = time.monotonic()
    state = (
        run_on_ray(federation, data_dir, ledger_dir)
        if engine == "ray"
        else run_in_process(federation, in_front_of(agents))
    )
    federated_seconds = time.monotonic() - training
    model.load(state.adapter)
    _save_adapter(run_dir / "adapter", model, state.adapter, study)
    watch.note("scoring every validation case on its native grid")
    adapters = own_adapters(agents, state)
    results = score_run(study, model, cache, adapters, run_dir)
    personal = personal_results(study, model, cache, agents, adapters, watch.note)
    privacy = privacy_results(config, budgets, model.parameters(), state.history)
    steps = {site: steps_of(state, site) for site in study.training_sites}

    def conclude(reference: dict[str, Any] | None) -> dict[str, Any]:
        cost = cost_of(state, agents, engine, time.monotonic() - begun, federated_seconds)
        summary = summarise(study, model, agents, state, results, reference, engine)
        summary |= {"personal": personal, "cost": cost, "privacy": privacy}
        write_json(run_dir / "summary.json", summary)
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


def check_run(
    config: Config,
    run_dir: Path,
    *,
    data_dir: Path | None = None,
    engine: str = "inprocess",
    resume: bool = False,
) -> None:
    """Refuses what `simulate` would refuse before it reads any data or makes any file.

    Raises:
        SamaritanError: For a name that nothing goes by, data that is missing, or a run folder that
            holds something else than the run to resume.
    """
    get_base(config.model.base)
    get_preset(config.peft.preset)
    get_sharing(config.strategy)
    check_optimiser(config)
    check_privacy(config)
    if engine == "ray":
        require_ray()
    if data_dir is None and config.data.source != "phantoms":
        raise ConfigError(
            "SAM-C303", "no data folder given", "Add --data DIR, or set data.source: phantoms."
        )
    _check_run_dir(config, run_dir, resume)


@contextlib.contextmanager
def _alone_in(run_dir: Path) -> Iterator[None]:
    """The run folder, for this process only; empty again when the run is refused at once."""
    existed = run_dir.exists()
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(
            "SAM-S101", f"cannot make {run_dir}: {error.strerror}", "Give --out another folder."
        ) from error
    with locked(run_dir):
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
            "SAM-S107",
            f"there is no run to resume in {run_dir}",
            "Leave --resume out; a folder that is not empty must be emptied first.",
        )
    differences = config_differences(load_config(saved), config)
    if differences:
        raise ConfigError(
            "SAM-C302",
            f"the run in {run_dir} has another configuration:\n  " + "\n  ".join(differences),
            "Resume with the same configuration. A run cannot change its own, not even how many "
            "sites it needs: mend or start these sites, or start anew in another folder.",
        )


def _prepare_study(
    config: Config, run_dir: Path, data_dir: Path | None, watch: Watch
) -> tuple[Study, Path]:
    data_dir = data_dir or _make_phantoms(config, run_dir, watch)
    study = read_study(config, data_dir)
    check_sites(config, study.training_sites, study.observers)
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
