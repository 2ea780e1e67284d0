"""What a real federation costs beyond training: three sites on loopback, vit_b resident at each.

    python -m benchmarks.deployment [--base tiny] [--rounds 4]

Kits are provisioned, everything is started from them, and a run goes through nginx, TLS and Flower.
The overhead of a round is its time at the server minus that of its slowest site, which trains and
scores. All processes share this machine, so that on few cores starting Flower's processes three
times over is in it too. The base has random weights: its numbers do not matter here.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from samaritan.data.phantoms import CLASSES, write_phantoms
from samaritan.models.bases import BASES
from samaritan.models.sam import construct
from tests.federations import Consortium, split_by_site

SITES = {"site_01": "Ahus", "site_02": "Bern", "site_03": "Chur"}


def main() -> None:
    """Runs one federation and prints its rounds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="vit_b", choices=["vit_b", "tiny"])
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), arguments.base, arguments.rounds)


def measure(folder: Path, base: str, rounds: int) -> None:
    """One run from provisioning to its end; prints what its rounds cost."""
    write_phantoms(folder / "phantoms", 3, 2, 0)
    split_by_site(folder / "phantoms", folder / "data", SITES)
    checkpoint = folder / "vit_b.safetensors"
    settings = {} if base == "tiny" else {"checkpoint": str(checkpoint)}
    if base == "vit_b":
        torch.manual_seed(0)
        save_file(construct(BASES["vit_b"].shape, 3).state_dict(), checkpoint)
    (folder / "c").mkdir()
    data = {name: folder / "data" / name for name in SITES.values()}
    consortium = Consortium(folder / "c", data, settings)
    server = consortium.server / "server.yaml"
    if settings:
        server.write_text(server.read_text() + f"checkpoint: {checkpoint}\n")
    try:
        plan = consortium.plan("overhead", configuration(base, rounds, settings))
        consortium.start_all()
        consortium.run(plan, timeout=3600)
        report(consortium, base)
    finally:
        consortium.stop()


def configuration(base: str, rounds: int, settings: dict[str, Any]) -> dict[str, Any]:
    """FLAP-SAM at 224 pixels and rank 32; two steps a round, since training is not measured."""
    return {
        "rounds": rounds,
        "model": {"base": base, **({"image_size": 224} if base == "vit_b" else {}), **settings},
        "peft": {"preset": "flap-sam", "rank": 32 if base == "vit_b" else 8},
        "data": {"classes": CLASSES, "slice_axis": "axial", "pixel_mm": 12.0},
        "training": {"slices_per_case": 2, "batch_size": 2, "precision": "fp32"},
        "federation": {"min_sites": 3, "wait_s": 180},
    }


def report(consortium: Consortium, base: str) -> None:
    """Seconds of each round, and what of them no site accounts for."""
    events = consortium.events("overhead", "round_finished")
    cores = len(os.sched_getaffinity(0))
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    print(f"{cpu}, {cores} cores, no GPU, {datetime.now(UTC):%d %B %Y}")
    print(f"base {base}, three sites on this machine, through nginx and TLS")
    print("round       s  slowest site s  overhead s   up MB  down MB")
    overheads = []
    for event in events:
        sites = event["sites"].values()
        slowest = max(site["seconds"] for site in sites)
        overheads.append(event["seconds"] - slowest)
        up, down = (sum(site[key] for site in sites) / 1e6 for key in ("bytes_up", "bytes_down"))
        print(
            f"{event['round']:>5} {event['seconds']:>7.2f} {slowest:>15.2f} {overheads[-1]:>11.2f} "
            f"{up:>7.2f} {down:>8.2f}"
        )
    print(f"overhead a round: median {statistics.median(overheads):.2f} s")
    for name in consortium.sites:
        loaded = consortium.log(name, "study_loaded")
        print(
            f"{name}: base loaded {len(loaded)} time in {len(consortium.log(name, 'request'))} "
            f"requests, in {loaded[0]['milliseconds'] / 1000:.1f} s, "
            f"{loaded[0]['peak_rss_bytes'] / 2**20:.0f} MiB; at the end of the run "
            f"{_resident_mib(consortium.pid(consortium.site(name), 'agent')):.0f} MiB"
        )
    print(json.dumps({"overhead_s": [round(x, 2) for x in overheads]}))


def _resident_mib(process: int) -> float:
    """Memory of the agent now: what a second copy of the base would show in."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    (resident,) = (line.split()[1] for line in lines if line.startswith("VmRSS:"))
    return int(resident) / 2**10


if __name__ == "__main__":
    main()
