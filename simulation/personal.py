"""What sites keep after the last round: personal parts, and a fine-tuned adapter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from client.agent import SiteAgent
from samaritan.data.slices import CaseCache
from samaritan.models.adapter import AdaptedModel, AdapterState, save_adapter
from samaritan.shares import shares
from samaritan.training.evaluate import evaluate_cases, mean_dice
from server.checkpoints import Checkpoint
from server.judgement import last_used
from simulation.study import Study

ADAPTER = "adapter"


def own_adapters(agents: Sequence[SiteAgent], state: Checkpoint) -> dict[str, AdapterState]:
    """The adapter of each site after the last round, personal parts in their place."""
    history = [entry for entry in state.history if entry["round"] <= state.server_round]
    return {
        agent.site: agent.personalised(state.adapter, last_used(history, agent.site)[0])
        for agent in agents
    }


def personal_results(
    study: Study,
    model: AdaptedModel,
    cache: CaseCache,
    agents: Sequence[SiteAgent],
    adapters: Mapping[str, AdapterState],
    note: Callable[[str], None],
) -> dict[str, Any] | None:
    """Fine-tunes, scores and saves what sites keep; None where they keep nothing.

    Returns:
        `parts` (names of tensors that stayed), `fine_tune_steps`, and after fine-tuning
        `dice_mean` and `dice_per_site`, each site scored on its own validation cases.
    """
    config = study.config
    personal = sorted(shares(config, next(iter(adapters.values())), 1).personal)
    steps = config.personal.fine_tune_steps
    if not personal and not steps:
        return None
    found: dict[str, Any] = {"parts": personal, "fine_tune_steps": steps}
    scores = {}
    for agent in agents:
        adapter = adapters[agent.site]
        if steps and agent.train_cases:
            note(f"{agent.site}: {steps} steps for itself")
            adapter = agent.fine_tune(adapter, steps)
        model.load(adapter)
        scores[agent.site] = evaluate_cases(
            model.segmenter, cache, agent.val_cases, config.evaluation
        )
        save_adapter(agent.memory.folder / ADAPTER, model, model.state(), config, study.classes)
    if steps:
        found["dice_mean"] = mean_dice([s for site in scores.values() for s in site])
        found["dice_per_site"] = {site: mean_dice(s) for site, s in scores.items() if s}
        found["oracle_prompts"] = config.evaluation.prompts
    return found
