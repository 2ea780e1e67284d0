"""Flower's own simulation engine runs the same apps to the same adapter."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from samaritan.config import Config, load_config
from samaritan.errors import FederationError
from simulation.run import simulate

# Everything that a site or the server remembers: a worker has answered for other sites before.
OVERRIDES = [
    "rounds=3",
    "data.sites=3",
    "data.cases_per_site=3",
    "training.slices_per_case=4",
    "training.scaffold=true",
    "model.image_size=32",
    "federation.sites_per_round=2",
    "personal.parts=[decoder]",
    "wire.up={top_k: 0.1, numbers: int4}",
    "wire.down={numbers: int8}",
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A Ray worker has one thread; sums depend on how many parts a batch is cut into."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(Path("configs/demo.yaml"), OVERRIDES)


def test_ray_and_in_process_agree_to_the_last_bit(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra samaritan[ray] is not installed")
    summaries = {e: simulate(config, tmp_path / e, engine=e) for e in ("inprocess", "ray")}
    kept = [
        {
            str(path.relative_to(tmp_path / e)): path.read_bytes()
            for folder in ("adapter", "sites")
            for path in (tmp_path / e / folder).rglob("*.safetensors")
        }
        for e in summaries
    ]
    assert kept[0] == kept[1]
    assert len(kept[0]) > 7  # one adapter, and of each site an adapter and notes
    assert summaries["ray"]["engine"] == "ray"
    for name in ("rounds", "final"):
        ours, theirs = summaries["inprocess"][name], summaries["ray"][name]
        if name == "final":
            assert ours == theirs
        else:
            assert [r["dice_mean"] for r in ours] == [r["dice_mean"] for r in theirs]
            assert {s["status"] for r in theirs for s in r["sites"].values()} == {"ok"}


@pytest.mark.slow
def test_a_fault_inside_the_ray_engine_comes_out_as_itself(config: Config, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra samaritan[ray] is not installed")
    training = config.training.model_copy(update={"learning_rate": 1e30, "slices_per_case": 16})
    wrong = config.model_copy(update={"training": training})
    with pytest.raises(FederationError) as caught:
        simulate(wrong, tmp_path / "run", engine="ray")
    assert caught.value.code == "SAM-F102"
    assert "SAM-T102" in caught.value.message
