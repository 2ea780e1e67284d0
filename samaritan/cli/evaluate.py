"""`samaritan evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from samaritan.cli.console import Progress, print_json


def evaluate(
    adapter: Annotated[Path, typer.Option(help="Adapter folder of a run.")],
    data: Annotated[Path, typer.Option(help="Data folder.")],
    split: Annotated[str, typer.Option(help="Split to score, or `all`.")] = "val",
    out: Annotated[
        Path | None, typer.Option(help="Write summary.json and label maps here.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="The base's checkpoint, if it moved since training.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary.")] = False,
) -> None:
    """Score an adapter on labelled cases, in 3-D on their native grids."""
    import numpy as np
    from numpy.typing import NDArray

    from samaritan.data.datasets import assign_splits, read_dataset
    from samaritan.data.slices import CaseCache, PreparedCase
    from samaritan.data.volume import write_label_map
    from samaritan.errors import DataError
    from samaritan.models.adapter import image_size, load_adapted, read_adapter
    from samaritan.report.facts import oracle_mark
    from samaritan.report.summary import nnunet_summary
    from samaritan.training.evaluate import CaseScores, evaluate_cases, to_label_values

    saved = read_adapter(adapter)
    config = saved.config
    dataset = assign_splits(read_dataset(data), config.data.val_fraction, config.seed)
    cases = [c for c in dataset.cases if split in ("all", c.split)]
    if not cases:
        splits = ", ".join(sorted({c.split for c in dataset.cases}))
        raise DataError(
            "SAM-D307", f"no case is in split {split!r}", f"There are: {splits}; or take `all`."
        )
    model = load_adapted(saved, checkpoint)
    predictions: dict[str, str] = {}
    progress = Progress()

    def on_case(prepared: PreparedCase, indices: NDArray[np.uint8], scores: CaseScores) -> None:
        case_id = scores.case.case_id
        progress.update(f"{case_id}: Dice {scores.dice:.4f}")
        if out is not None:
            predictions[case_id] = f"{case_id}.nii.gz"
            path = out / predictions[case_id]
            write_label_map(path, to_label_values(indices, saved.classes), prepared.native)

    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    try:
        results = evaluate_cases(
            model.segmenter,
            CaseCache(config.data, saved.classes, image_size(config)),
            cases,
            config.evaluation,
            surfaces=True,
            on_case=on_case,
        )
    finally:
        progress.stop()
    prompts = config.evaluation.prompts
    summary = nnunet_summary(results, saved.classes, predictions, prompts)
    if out is not None:
        (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if as_json:
        print_json(summary)
        return
    mean = summary["foreground_mean"]
    typer.echo(
        f"{len(results)} cases: Dice {_text(mean['Dice'])}, HD95 {_text(mean['HD95'])} mm, "
        f"NSD {_text(mean['NSD'])}{oracle_mark(prompts)}"
    )
    for name, value in saved.classes.items():
        typer.echo(f"  {name}: Dice {_text(summary['mean'][str(value)]['Dice'])}")


def _text(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
