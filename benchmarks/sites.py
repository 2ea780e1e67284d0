"""Does simulating more sites cost more memory, and what does a round cost beside the training?

    OMP_NUM_THREADS=1 python -m benchmarks.sites [--sites 4 16 64]

One data set of phantoms is dealt out to 4, 16 and 64 pseudo-sites; each run is a process of its
own, and its peak resident memory is the operating system's figure. Every run trains the same number
of slices in all, so that only the number of sites differs. Overhead is the wall time of a round
that no site accounts for: messages, checks, aggregation, checkpoint, events.

Then 10 sites that are all asked in each round, beside 100 of which 10 are drawn. Each site has one
case to train and one to score, and none stays in memory, so that a site's work is the same in both.
Times are medians of the rounds after the first; processor time is the one to trust on a busy
machine.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_CONFIG = """
name: sites
rounds: 3
data: {partition: uniform, slice_axis: axial}
training: {slices_per_case: 2, batch_size: 4}
evaluation: {every_rounds: 3}
"""

_ASKED, _MANY = 10, 100
_SAMPLING: dict[str, Any] = {
    "rounds": 6,
    "data": {"source": "phantoms", "cases_per_site": 2, "slice_axis": "axial", "cache_mb": 1},
    "training": {"slices_per_case": 8, "batch_size": 4},
    "federation": {"sites_per_round": _ASKED},
}


@dataclass(frozen=True)
class Rounds:
    """What a round of a run costs.

    Attributes:
        cpu, wall: Seconds.
        overhead: Seconds of wall time that no site accounts for.
        wire: Bytes, up and down.
        asked: Sites.
        cost: Of the run, as in its summary.
    """

    cpu: float
    wall: float
    overhead: float
    wire: float
    asked: float
    cost: dict[str, Any]


def main() -> None:
    """Prints one line per number of sites, then the ratios to the first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "config.yaml").write_text(_CONFIG)
        _write_data(root / "data")
        results = {sites: _run(root, sites) for sites in options.sites}
    first = results[options.sites[0]]["peak_rss_bytes"]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("sites  peak memory MiB  ratio  base copies  overhead s/round  bytes up per site-round")
    for sites, cost in results.items():
        print(
            f"{sites:5d}  {cost['peak_rss_bytes'] / 2**20:15.0f}  "
            f"{cost['peak_rss_bytes'] / first:5.3f}  {cost['frozen_base_copies']:11d}  "
            f"{cost['overhead_seconds_per_round']:16.4f}  {cost['bytes_up'] / sites / 3:23.0f}"
        )
    _print_sampling(_in_new_process(_ASKED), _in_new_process(_MANY))


def _print_sampling(few: Rounds, many: Rounds) -> None:
    print(f"{'per round':24} {_ASKED:>5} sites  {_MANY:>5} sites  ratio")
    for name, one, other in (
        ("sites asked", few.asked, many.asked),
        ("processor s", few.cpu, many.cpu),
        ("wall s", few.wall, many.wall),
        ("overhead s", few.overhead, many.overhead),
        ("KiB on the wire", few.wire / 2**10, many.wire / 2**10),
        ("peak memory MiB", *(run.cost["peak_rss_bytes"] / 2**20 for run in (few, many))),
        ("base copies", *(run.cost["frozen_base_copies"] for run in (few, many))),
    ):
        print(f"{name:24} {one:11.2f}  {other:11.2f}  {other / one:5.2f}")


def _in_new_process(sites: int) -> Rounds:
    """Peak memory is a process's own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_sampled, sites).result()


def _sampled(sites: int) -> Rounds:
    from samaritan.config import parse_config
    from simulation.run import Watch, simulate

    config = parse_config({**_SAMPLING, "data": {**_SAMPLING["data"], "sites": sites}})
    ends = []
    watch = Watch(round_done=lambda entry: ends.append(time.process_time()))
    with tempfile.TemporaryDirectory() as folder:
        summary = simulate(config, Path(folder) / "run", watch=watch)
    later = summary["rounds"][1:]

    def total(entry: dict[str, Any], *keys: str) -> float:
        return sum(float(site[key]) for site in entry["sites"].values() for key in keys)

    return Rounds(
        statistics.median([after - before for before, after in itertools.pairwise(ends)]),
        statistics.median([entry["seconds"] for entry in later]),
        statistics.median([entry["seconds"] - total(entry, "seconds") for entry in later]),
        statistics.median([total(entry, "bytes_up", "bytes_down") for entry in later]),
        statistics.median([len(entry["sites"]) for entry in later]),
        summary["cost"],
    )


def _write_data(folder: Path) -> None:
    from samaritan.data.phantoms import write_phantoms

    write_phantoms(folder, sites=4, cases_per_site=32, seed=0)


def _run(root: Path, sites: int) -> dict[str, float]:
    out = root / f"run_{sites}"
    command = [
        sys.executable, "-m", "samaritan.cli.main", "simulate", str(root / "config.yaml"),
        "--data", str(root / "data"), "--out", str(out), "--set", f"data.sites={sites}",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    cost: dict[str, float] = json.loads((out / "summary.json").read_text())["cost"]
    return cost


if __name__ == "__main__":
    main()
