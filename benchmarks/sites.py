"""Does simulating more sites cost more memory, and what does Flower itself cost per round?

    python -m benchmarks.sites [--sites 4 16 64]

One data set of phantoms is dealt out to 4, 16 and 64 pseudo-sites; each run is a process of its
own, and its peak resident memory is the operating system's figure. Every run trains the same number
of slices in all, so that only the number of sites differs. Overhead is the wall time of a round
that no site accounts for: messages, checks, aggregation, checkpoint, events.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

_CONFIG = """
name: sites
rounds: 3
data: {partition: uniform, slice_axis: axial}
training: {slices_per_case: 2, batch_size: 4}
evaluation: {every_rounds: 3}
"""


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
