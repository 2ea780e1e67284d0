"""Fixtures that several test modules share."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

WritePair = Callable[..., tuple[Path, Path]]


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Bytes name no test: packed ones hold the second of packing, and each worker would differ."""
    return argname if isinstance(val, bytes) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked:
        import torch

        if not torch.cuda.is_available():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with the real MRI: $SAMARITAN_DATA, else ../shared/data beside the checkout."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SAMARITAN_DATA", default))
    if not (folder / "msd_hippocampus" / "manifest.csv").is_file():
        pytest.skip(f"no real data at {folder}; set SAMARITAN_DATA to run this test")
    return folder


@pytest.fixture
def write_pair(tmp_path: Path) -> WritePair:
    """Write an image and its label as NIfTI: ``write_pair("a", image=..., label=..., ...)``.

    Files land in ``images/`` and ``labels/`` of ``tmp_path``; the defaults are random numbers and a
    box, the same for the same name.
    """

    def write(
        name: str = "case",
        *,
        shape: tuple[int, ...] = (8, 9, 7),
        affine: Any = None,
        image: Any = None,
        label: Any = None,
        label_affine: Any = None,
    ) -> tuple[Path, Path]:
        rng = np.random.default_rng(list(name.encode()))
        affine = np.eye(4) if affine is None else affine
        image = rng.normal(100, 20, shape).astype(np.float32) if image is None else image
        if label is None:
            label = np.zeros(shape, np.uint8)
            label[2:5, 2:6, 2:4] = 1
        paths = []
        for folder, array, matrix in (
            ("images", image, affine),
            ("labels", label, affine if label_affine is None else label_affine),
        ):
            path = tmp_path / folder / f"{name}.nii.gz"
            path.parent.mkdir(exist_ok=True)
            nib.save(nib.Nifti1Image(array, matrix), path)
            paths.append(path)
        return paths[0], paths[1]

    return write


@pytest.fixture(scope="session")
def randomise() -> Callable[[Any, int], None]:
    """Give every parameter of a module a random value, the position tables above all.

    The official classes start position tables at zero, where they cannot tell right from wrong.
    """
    import torch

    def fill(module: Any, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "rel_pos" in name or "pos_embed" in name:
                    parameter.normal_(0, 0.5, generator=generator)
                elif parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    return fill


@pytest.fixture(scope="session")
def mini_file(tmp_path_factory: pytest.TempPathFactory, randomise: Any) -> Path:
    """A checkpoint of a SAM of a few thousand parameters, with SAM's own three masks."""
    import torch
    from safetensors.torch import save_file

    from samaritan.models.sam import SamShape, construct

    torch.manual_seed(5)
    sam = construct(SamShape(**_MINI), 3)
    randomise(sam, 5)
    path = tmp_path_factory.mktemp("mini") / "mini.safetensors"
    save_file(sam.state_dict(), path)
    return path


@pytest.fixture
def mini(mini_file: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hyper-parameters of a small SAM with windows, registered as base ``mini``."""
    from samaritan.models.bases import BASES, Base
    from samaritan.models.sam import SamShape

    spec = Base(
        SamShape(**_MINI), image_size=64, patch=4, checkpoint=("mini.safetensors", "0" * 64)
    )
    monkeypatch.setitem(BASES, "mini", spec)
    return spec


@pytest.fixture(scope="session")
def config_on() -> Callable[..., Any]:
    """Configurations on a base of a file: ``config_on("mini", path, seed=1, peft={"rank": 2})``."""
    from samaritan.config import parse_config

    def config(base: str, file: Path, **sections: Any) -> Any:
        tree: dict[str, Any] = {
            "model": {"base": base, "checkpoint": str(file)},
            "peft": {"rank": 4},
            "training": {"precision": "fp32"},
        }
        for name, value in sections.items():
            tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
        return parse_config(tree)

    return config


@pytest.fixture
def mini_config(mini: Any, mini_file: Path, config_on: Callable[..., Any]) -> Callable[..., Any]:
    """Configurations on the base ``mini``: ``mini_config(seed=1, peft={"rank": 2})``."""
    return functools.partial(config_on, "mini", mini_file)


@pytest.fixture(scope="session")
def check_steps() -> Callable[..., None]:
    """Two steps move what is trained, and nothing else: ``check_steps(model, 40, rate=1.0)``."""
    import torch

    from samaritan.training.losses import SegmentationLoss

    def check(model: Any, side: int, rate: float) -> None:
        everything = dict(model.base.model.named_parameters())
        trained = {id(p) for p in model.trained.values()}
        before = {name: p.detach().clone() for name, p in everything.items()}
        optimiser = torch.optim.SGD(everything.values(), lr=rate)
        generator = torch.Generator().manual_seed(16)
        images = torch.rand((2, 3, side, side), generator=generator)
        labels = torch.randint(0, 3, (2, side, side), generator=generator)
        for step in (1, 2):
            optimiser.zero_grad()
            SegmentationLoss(0.5)(model.segmenter(images), labels).backward()
            for name, parameter in everything.items():
                assert (parameter.grad is not None) == (id(parameter) in trained), name
                if "lora_A" in name:  # B = 0 hides A in the first step
                    assert bool(parameter.grad.abs().sum() > 0) == (step == 2), name
                elif id(parameter) in trained:
                    assert parameter.grad.abs().sum() > 0, name
            optimiser.step()
        for name, parameter in everything.items():
            moved = not torch.equal(parameter, before[name])
            assert moved == (id(parameter) in trained) or "lora_A" in name, name

    return check


@pytest.fixture
def adapted_mini(mini_config: Callable[..., Any]) -> Callable[..., Any]:
    """Adapted models on ``mini``, on the CPU; ``stir`` replaces the fresh adapter by noise."""
    import torch

    from samaritan.models.adapter import build_adapted

    def build(classes: int = 2, stir: float = 0.0, **sections: Any) -> Any:
        model = build_adapted(mini_config(**sections), classes, torch.device("cpu"))
        generator = torch.Generator().manual_seed(17)
        with torch.no_grad():
            for parameter in model.trained.values():
                parameter.add_(stir * torch.randn(parameter.shape, generator=generator))
        return model

    return build


_MINI: dict[str, Any] = {
    "width": 32, "depth": 3, "heads": 2, "global_blocks": (1,), "patch": 4, "window": 5,
    "decoder_width": 32, "decoder_mlp": 64, "decoder_heads": 2, "iou_width": 32, "image_size": 64,
}  # fmt: skip


@pytest.fixture(scope="session")
def vit_b_file(tmp_path_factory: pytest.TempPathFactory, randomise: Any) -> Iterator[Path]:
    """A checkpoint with the names and shapes of SAM ViT-B and random values (375 MB)."""
    import torch
    from safetensors.torch import save_file

    from samaritan.models.bases import BASES
    from samaritan.models.sam import construct

    torch.manual_seed(6)
    sam = construct(BASES["vit_b"].shape, 3)
    randomise(sam, 6)
    path = tmp_path_factory.mktemp("vit_b") / "vit_b.safetensors"
    save_file(sam.state_dict(), path)
    yield path
    path.unlink()  # pytest keeps the folders of three sessions


ROOT = Path(__file__).resolve().parents[1]

# Federations without data or model, the command line in this process, and one finished run.


class Bare:
    """An agent without log and gate, as couriers meet sites."""

    def __init__(self, agent: Any) -> None:
        self.agent = agent

    def answer(self, request: Any) -> Any:
        from client.redaction import redact
        from client.site import ask_agent

        try:
            return ask_agent(self.agent, request)
        except Exception as error:
            raise redact(error) from None


@pytest.fixture
def bare() -> type[Bare]:
    return Bare


class FakeSite:
    """An agent that adds a number to the whole adapter, and in some rounds does something else.

    Args:
        site: Its name.
        config: The configuration it agreed to.
        add: What it adds.
        examples: The weight it claims.
        instead: What it does instead in a round: an exception to raise, or a pair to answer with.
        hello: Changes of its answer to the roll call.
    """

    def __init__(
        self,
        site: str,
        config: Any,
        add: float = 1.0,
        *,
        examples: float = 1,
        instead: dict[int, Any] | None = None,
        hello: dict[str, str] | None = None,
    ) -> None:
        self.site, self.config, self.add, self.examples = site, config, add, examples
        self.instead, self.changes = instead or {}, hello or {}
        self.asked: list[int] = []
        self.exchange: Any = None
        self.begin(fake_adapter())

    def answer(self, request: Any) -> Any:
        return Bare(self).answer(request)

    def begin(self, adapter: Any) -> None:
        """Gives it the adapter before the first round."""
        from client.exchange import Exchange, KnownStates

        self.exchange = Exchange(self.site, self.config, adapter, KnownStates(2))

    def hello(self) -> dict[str, str]:
        from samaritan import __version__
        from samaritan.config import config_sha256

        return {
            "site": self.site,
            "samaritan": __version__,
            "config-sha256": config_sha256(self.config),
            "base-sha256": FAKE_BASE,
            "adapter-sha256": self.exchange.beginning_sha256,
        } | self.changes

    def train(self, payload: Any, instruction: Any) -> Any:
        adapter = self.exchange.receive(payload, instruction)
        update, metrics = self.learn(adapter, instruction)
        return self.exchange.send(update, {}, instruction)[0], metrics

    def learn(self, adapter: Any, instruction: Any) -> Any:
        import torch

        self.asked.append(instruction.server_round)
        answer = self.instead.get(instruction.server_round)
        if isinstance(answer, BaseException):
            raise answer
        if answer is not None:
            return answer(adapter) if callable(answer) else answer
        update = {name: torch.full_like(value, self.add) for name, value in adapter.items()}
        update["b"] *= 1 + 1e-6 * instruction.server_round  # no update comes twice
        loss = 1 / instruction.server_round
        return update, {
            "num-examples": self.examples, "train-loss": loss, "steps": 2, "seconds": 0.0
        }  # fmt: skip

    def evaluate(self, payload: Any, instruction: Any) -> Any:
        adapter = self.exchange.receive(payload, instruction)
        value = next(iter(adapter.values())).flatten()[0].item()
        return {"dice": min(1.0, abs(value) / 100), "num-cases": 2, "seconds": 0.0}


def fake_adapter() -> Any:
    """What fake sites train: two tensors of zeros."""
    import torch

    return {"a": torch.zeros(2, 3), "b": torch.zeros(4)}


FAKE_BASE = "ba5e" * 16


@pytest.fixture
def fake_site() -> type[FakeSite]:
    return FakeSite


@pytest.fixture
def fake_federation(tmp_path: Path) -> Callable[..., Any]:
    """A federation of fake sites: ``fake_federation(config, ["a", "b"], on_round=...)``."""
    from server.federation import Federation

    def make(config: Any, sites: Any, folder: str = "run", **more: Any) -> Any:
        run_dir = tmp_path / folder
        run_dir.mkdir(exist_ok=True)
        return Federation(config, FAKE_BASE, fake_adapter(), list(sites), run_dir, **more)

    return make


@dataclass(frozen=True)
class Finished:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def samaritan(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Finished]:
    """Run the command line in this process: ``samaritan("simulate", path, "--json")``."""
    from samaritan.cli.main import main

    def run(*arguments: Any) -> Finished:
        monkeypatch.setattr(sys, "argv", ["samaritan", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        out, err = capfd.readouterr()
        return Finished(code, out, err)

    return run


SMALL_RUN = """\
# samaritan simulate small.yaml
name: small
rounds: 3
model: {image_size: 32}
peft: {rank: 2}
data: {source: phantoms, sites: 2, cases_per_site: 2, slice_axis: axial}
training: {slices_per_case: 2, batch_size: 4, precision: fp32}
federation: {wait_s: 1}
"""


@pytest.fixture(scope="session")
def small_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose run takes seconds."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(SMALL_RUN, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished_run(
    small_config: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder of one run by the real command in a process of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    command = [
        sys.executable, "-m", "samaritan.cli.main", "simulate", small_config, "--out", folder,
        "--json",
    ]  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder, done
