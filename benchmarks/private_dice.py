"""Dice against epsilon, where one hospital's data are public and the others' are not.

    python -m benchmarks.private_dice HIPPOCAMPUS_DIR OUT_DIR [--seeds 0 1 2] [--variants ...]

Eight patients of the largest of the four pseudo-sites play a public data set: `tiny` is trained on
them without noise and folded into a checkpoint. The other three sites then train a few thousand
numbers of it, openly or under differential privacy whose record is the patient (private_dice.yaml).
The row "start" is the checkpoint as it is: what private data have added is the distance from it.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from samaritan.config import Config, parse_config, read_tree, set_key
from samaritan.files import write_atomically
from samaritan.models.adapter import load_adapted, merged_state, read_adapter
from simulation.outcome import hardware
from simulation.run import simulate

PUBLIC, PATIENTS = "B_float_5e2_late", 8
SETTINGS = Path(__file__).with_suffix(".yaml")
BUDGETS = ("open", "100", "8", "4", "2", "1")


def main() -> None:
    """Runs what is not there yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=["start", *BUDGETS])
    parser.add_argument("--set", dest="overrides", nargs="*", default=[])
    options = parser.parse_args()
    public, private = (split_off(options.data, options.out, own) for own in (True, False))
    checkpoint = pretrained(public, options.out)
    rows = {}
    for variant in options.variants:
        found = [
            run(private, checkpoint, options.out, variant, seed, options.overrides)
            for seed in options.seeds
        ]
        rows[variant] = found
        print(line(variant, found), flush=True)
    write_atomically(options.out / "private_dice.json", json.dumps(rows, indent=1).encode())
    print(hardware())


def split_off(data: Path, out: Path, own: bool) -> Path:
    """A copy of the public site's cases, or of all others'."""
    folder = out / ("public" if own else "private")
    if (folder / "manifest.csv").exists():
        return folder
    with (data / "manifest.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["site"] == PUBLIC) == own]
    if own:
        rows = [r for r in rows if r["split"] == "train"][:PATIENTS] + [
            r for r in rows if r["split"] != "train"
        ]
    for row in rows:
        for key in ("image", "label"):
            target = folder / row[key]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(data / row[key], target)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def pretrained(public: Path, out: Path) -> Path:
    """The checkpoint of `tiny` after training on the public site."""
    path = out / "pretrained.safetensors"
    if not path.exists():
        simulate(configuration("pretraining", 0), out / "pretraining", data_dir=public)
        model = load_adapted(read_adapter(out / "pretraining" / "adapter"))
        save_file(merged_state(model), path)
    return path


def configuration(variant: str, seed: int, overrides: Sequence[str] = ()) -> Config:
    """The configuration of one run; `pretraining` differs by what the file says of it."""
    tree = read_tree(SETTINGS, overrides)
    own = tree.pop("pretraining")
    changes: dict[str, Any] = {"seed": seed}
    if variant == "pretraining":
        changes |= own
    elif variant == "start":
        changes |= {"privacy.unit": "none", "rounds": 1, "training.learning_rate": 1e-12}
    elif variant == "open":
        changes |= {"privacy.unit": "none"}
    else:
        changes |= {"privacy.epsilon": float(variant)}
    for key, value in changes.items():
        set_key(tree, key, value)
    return parse_config(tree)


def run(
    private: Path, checkpoint: Path, out: Path, variant: str, seed: int, overrides: list[str]
) -> dict[str, Any]:
    """Scores and cost of one run, made now or before."""
    folder = out / f"{variant}-{seed}"
    if not (folder / "summary.json").exists():
        config = configuration(
            variant, seed, [f"model.checkpoint={checkpoint.resolve()}", *overrides]
        )
        simulate(config, folder, data_dir=private, resume=folder.exists())
    summary = json.loads((folder / "summary.json").read_text())
    privacy = summary["privacy"]
    return {
        "dice": summary["final"]["dice_mean"],
        "seconds": summary["cost"]["federated_seconds"],
        "parameters": summary["peft"]["trainable_parameters"],
        "epsilon": max(s["epsilon"] for s in privacy["sites"].values()) if privacy else None,
        "noise": max(s["noise_multiplier"] for s in privacy["sites"].values()) if privacy else 0,
    }


def line(variant: str, found: list[dict[str, Any]]) -> str:
    """A row of the table."""
    dice = [entry["dice"] for entry in found]
    spread = statistics.stdev(dice) if len(dice) > 1 else 0.0
    each = " ".join(f"{value:.4f}" for value in dice)
    epsilon = found[0]["epsilon"]
    spent = "-" if epsilon is None else f"{epsilon:.3f}"
    return (
        f"| {variant} | {spent} | {found[0]['noise']:.2f} | {statistics.mean(dice):.4f} | "
        f"{spread:.4f} | {each} | {statistics.mean(e['seconds'] for e in found):.0f} |"
    )


if __name__ == "__main__":
    main()
