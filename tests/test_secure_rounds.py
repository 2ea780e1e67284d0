"""Rounds under secure aggregation: real sites, real messages, faults at every stage."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from flwr.app import MessageType

from client.agent import SiteAgent
from client.masking import Masking
from samaritan.config import parse_config
from samaritan.errors import FederationError, PrivacyError, TrainingError
from samaritan.models.vectors import flat, length, unflat
from samaritan.wire import METRICS, payload_of, read_masking_step
from server.checkpoints import read_round
from simulation.grid import InProcessGrid
from simulation.run import simulate

SITES = ["site_01", "site_02", "site_03", "site_04"]
SMALL = {
    "rounds": 1,
    "model": {"image_size": 32},
    "peft": {"rank": 2},
    "data": {"source": "phantoms", "sites": 4, "cases_per_site": 2, "slice_axis": "axial"},
    "training": {"slices_per_case": 1, "batch_size": 4, "precision": "fp32"},
    "federation": {
        "weighting": "uniform", "secure_aggregation": True, "clip_norm": 50.0, "retry_wait_s": 0,
    },
}  # fmt: skip


def settings(**sections):
    tree = {key: dict(v) if isinstance(v, dict) else v for key, v in SMALL.items()}
    for key, value in sections.items():
        tree[key] = tree[key] | value if isinstance(value, dict) and key in tree else value
    return parse_config(tree)


def events(folder, kind):
    lines = (folder / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def statuses(summary, number=0):
    return {name: s["status"] for name, s in summary["rounds"][number]["sites"].items()}


def change(folder, number=1):
    return read_round(folder / "checkpoints", number).adapter


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    simulate(settings(federation={"secure_aggregation": False}), folder)
    return folder


@pytest.fixture
def seen(monkeypatch):
    """Every answer that reaches the server."""
    answers = []
    original = InProcessGrid.send_and_receive

    def listening(self, messages, **more):
        for message in original(self, messages, **more):
            answers.append(message)
            yield message

    monkeypatch.setattr(InProcessGrid, "send_and_receive", listening)
    return answers


def test_a_vector_and_its_tensors_are_the_same_numbers():
    state = {"b": torch.randn(2, 3), "a": torch.randn(4), "c": torch.randn(())}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    vector = flat(state)
    assert length(shapes) == len(vector) == 11
    assert torch.equal(vector[:4].float(), state["a"])
    again = unflat(vector, shapes)
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert len(flat({})) == 0


def test_the_sum_is_that_of_the_open_run_and_the_server_sees_no_update(plain, seen, tmp_path):
    summary = simulate(settings(), tmp_path / "run")
    assert statuses(summary) == dict.fromkeys(SITES, "ok")
    assert summary["privacy"] == {"secure_aggregation": True}
    with_masks, without = change(tmp_path / "run"), change(plain)
    step = 4 * 50.0 / 2**31
    for name, value in without.items():
        assert (with_masks[name] - value).abs().max() <= step + 1e-7 * value.abs().max(), name
    updates = [m for m in seen if m.metadata.message_type == MessageType.TRAIN]
    assert len(updates) == 4
    for message in updates:
        assert set(message.content.metric_records[METRICS]) == {
            "num-examples", "train-loss", "steps", "seconds"
        }  # fmt: skip
        counts = np.bincount(np.frombuffer(payload_of(message), np.uint8), minlength=256)
        expected = counts.sum() / 256
        assert ((counts - expected) ** 2 / expected).sum() < 400  # 255 are likely, 400 one in 10^8
    one, two = (np.frombuffer(payload_of(m)[32:], np.uint32) for m in updates[:2])
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.01
    assert summary["rounds"][0]["aggregation_error"] is None


def failing(monkeypatch, stage, site="site_02"):
    """One site fails in a stage, as often as it is asked."""
    error = TrainingError("SAM-T102", "planted")
    if stage == "masked":
        original = SiteAgent.train

        def train(self, payload, instruction, step=None):
            if self.site == site:
                raise error
            return original(self, payload, instruction, step)

        monkeypatch.setattr(SiteAgent, "train", train)
        return
    answer = Masking.step

    def step(self, asked, instruction):
        if self.site == site and asked.stage == stage:
            raise error
        return answer(self, asked, instruction)

    monkeypatch.setattr(Masking, "step", step)


@pytest.mark.parametrize("stage", ["keys", "shares", "masked", "agreement", "opening"])
def test_a_site_may_fail_in_any_stage(stage, tmp_path, monkeypatch, plain):
    failing(monkeypatch, stage)
    summary = simulate(settings(), tmp_path / "run")
    in_the_sum = stage in ("agreement", "opening")
    assert statuses(summary) == dict.fromkeys(SITES, "ok") | (
        {} if in_the_sum else {"site_02": "failed: SAM-T102"}
    )
    with_masks, without = change(tmp_path / "run"), change(plain)
    same = all(torch.allclose(with_masks[n], without[n], atol=1e-6) for n in without)
    assert same == in_the_sum
    assert not events(tmp_path / "run", "secure_sum_failed")


def test_two_sites_left_of_four_are_too_few_and_the_run_can_be_resumed(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        failing(patched, "masked", "site_02")
        failing(patched, "masked", "site_03")
        with pytest.raises(FederationError, match="2 of 4 sites answered, 3 are needed") as caught:
            simulate(settings(), tmp_path / "run")
    assert caught.value.code == "SAM-F108"
    assert len(events(tmp_path / "run", "secure_sum_failed")) == 3
    summary = simulate(settings(), tmp_path / "run", resume=True)
    assert statuses(summary) == dict.fromkeys(SITES, "ok")


def test_an_attempt_that_failed_before_shares_were_opened_is_made_again(tmp_path, monkeypatch):
    tries = []
    answer = Masking.step

    def step(self, asked, instruction):
        if asked.stage == "agreement" and len(tries) < 2:
            tries.append(asked.attempt)
            raise TrainingError("SAM-T102", "planted")
        return answer(self, asked, instruction)

    monkeypatch.setattr(Masking, "step", step)
    summary = simulate(settings(), tmp_path / "run")
    assert statuses(summary) == dict.fromkeys(SITES, "ok")
    (failed,) = events(tmp_path / "run", "secure_sum_failed")
    assert failed["code"] == "SAM-P220"


def test_a_round_whose_shares_were_opened_is_lost_and_the_next_goes_on(tmp_path, monkeypatch):
    """As after a server that was killed between the sum and its checkpoint."""
    config = settings(rounds=2)
    with monkeypatch.context() as patched:

        def killed(*arguments):
            raise KeyboardInterrupt

        patched.setattr("server.rounds.save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            simulate(config, tmp_path / "run")
    summary = simulate(config, tmp_path / "run", resume=True)
    assert statuses(summary) == dict.fromkeys(SITES, "failed: SAM-P206")
    assert statuses(summary, 1) == dict.fromkeys(SITES, "ok")
    assert [e["round"] for e in events(tmp_path / "run", "round_lost")] == [1]
    first = read_round(tmp_path / "run" / "checkpoints", 1).adapter
    second = read_round(tmp_path / "run" / "checkpoints", 2).adapter
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_an_update_in_a_sum_that_stayed_closed_does_not_count_as_used(tmp_path, monkeypatch):
    """Four of seven open the first attempt, one too few; the other three mask once more, and are
    too few for the federation. What they noted in that round led nowhere."""
    first = []
    answer = Masking.step

    def step(self, asked, instruction):
        if asked.stage == "opening":
            first.append(asked.attempt)
            if asked.attempt == first[0] and self.site > "site_04":
                raise TrainingError("SAM-T102", "planted")
        return answer(self, asked, instruction)

    monkeypatch.setattr(Masking, "step", step)
    summary = simulate(settings(data={"sites": 7}), tmp_path / "run")
    told = summary["rounds"][0]["sites"]
    assert {told[f"site_0{n}"]["status"] for n in (1, 2, 3, 4)} == {"failed: SAM-P206"}
    assert {told[f"site_0{n}"]["status"] for n in (5, 6, 7)} == {"late: no sum"}
    assert {site["update_sha256"] for site in told.values()} == {""}
    codes = [event["code"] for event in events(tmp_path / "run", "secure_sum_failed")]
    assert codes == ["SAM-P308"] or codes == ["SAM-P220", "SAM-P308"]


def test_a_site_gives_no_update_without_masks(tmp_path, monkeypatch):
    """A server that asks as if nothing had been agreed to gets nothing."""
    original = SiteAgent.train
    monkeypatch.setattr(SiteAgent, "train", lambda self, p, i, step=None: original(self, p, i))
    with pytest.raises(FederationError) as caught:
        simulate(settings(), tmp_path / "run")
    assert "SAM-F108" in caught.value.code
    event = events(tmp_path / "run", "secure_sum_failed")[0]
    assert event["code"] == "SAM-P220"


def test_a_long_update_is_shortened_by_the_site_itself(tmp_path, plain):
    limit = 1e-3
    simulate(settings(federation={"clip_norm": limit}), tmp_path / "run")
    begin = read_round(plain / "checkpoints", 1)
    after = change(tmp_path / "run")
    start = _beginning(plain)
    moved = flat({n: after[n] - start[n] for n in after}).norm()
    free = flat({n: begin.adapter[n] - start[n] for n in after}).norm()
    assert 0 < moved <= limit * 1.01
    assert free > 10 * limit


def _beginning(folder):
    from samaritan.models.adapter import build_adapted
    from simulation.study import read_study

    config = settings()
    return build_adapted(config, len(read_study(config, folder / "data").classes)).state()


def test_noise_and_masks_work_together_and_a_retry_costs_nothing_more(tmp_path, monkeypatch):
    failing_once = []
    answer = Masking.step

    def step(self, asked, instruction):
        if asked.stage == "agreement" and len(failing_once) < 2:
            failing_once.append(1)
            raise PrivacyError("SAM-P218", "planted")
        return answer(self, asked, instruction)

    monkeypatch.setattr(Masking, "step", step)
    private = {
        "unit": "patient", "epsilon": 30, "records": 10, "sampling_rate": 0.5,
        "steps_per_round": 2, "slices_per_patient": 1, "noise_multiplier": 1.0,
    }  # fmt: skip
    summary = simulate(settings(strategy="ffa", privacy=private), tmp_path / "run")
    assert statuses(summary) == dict.fromkeys(SITES, "ok")
    assert len(events(tmp_path / "run", "secure_sum_failed")) == 1
    assert summary["privacy"]["secure_aggregation"]
    for site in SITES:
        (path,) = (tmp_path / "run" / "sites" / site / "ledger").glob("*.jsonl")
        kinds = [json.loads(line)["type"] for line in path.read_text().splitlines()]
        assert kinds == ["genesis", "reserve", "commit"]
        assert summary["rounds"][0]["sites"][site]["ledger"]


def test_what_sites_send_beside_the_update_is_small(seen, tmp_path):
    summary = simulate(settings(), tmp_path / "run")
    steps = [read_masking_step(m) for m in seen if m.has_content()]
    assert {s.stage for s in steps if s is not None} == {"keys", "shares", "agreement", "opening"}
    open_bytes = 4 * summary["peft"]["trainable_parameters"]
    for site in summary["rounds"][0]["sites"].values():
        assert site["bytes_up"] < 1.1 * open_bytes
