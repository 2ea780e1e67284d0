"""How updates combine, and what the server makes of any answer a site may send."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from samaritan.codecs import encode
from samaritan.config import CodecConfig, Config
from samaritan.errors import ConfigError
from samaritan.models.bases import state_sha256
from samaritan.wire import content
from simulation.grid import InProcessGrid
from strategies.fedavg import fedavg
from strategies.replies import Expected, read_evaluate_reply, read_train_reply
from strategies.rules import RULES, get_rule
from strategies.update import Situation, Update

InProcessGrid(ClientApp(), 0)  # sets who this process is; Flower makes no Message before

SHAPES = {"a": (2, 3), "b": (4,)}
METRICS = {"num-examples": 3, "train-loss": 0.5, "steps": 2, "seconds": 0.1}
PLANTED = "/secret/patient_007"


def random_update(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy((rng.normal(size=shape) * scale).astype(np.float32))
        for name, shape in SHAPES.items()
    }


def ones(value=1.0):
    return {name: torch.full(shape, value) for name, shape in SHAPES.items()}


# FedAvg.


def mean_of(pairs):
    """FedAvg of pairs of update and weight."""
    updates = [Update(f"site {i}", ones(0.0), d, w) for i, (d, w) in enumerate(pairs)]
    return fedavg(updates, Situation(ones(0.0), 1, Config()))


def test_fedavg_is_the_weighted_mean_in_float64():
    updates, weights = [random_update(i, 10.0**i) for i in range(5)], [1, 7, 2, 40, 3]
    mean = mean_of(zip(updates, weights, strict=True))
    for name in SHAPES:
        stack = np.stack([u[name].numpy().astype(np.float64) for u in updates])
        expected = np.average(stack, axis=0, weights=weights).astype(np.float32)
        np.testing.assert_allclose(mean[name].numpy(), expected, rtol=1.2e-7)
        assert mean[name].dtype == torch.float32


def test_fedavg_does_not_lose_small_updates_beside_large_ones():
    mean = mean_of([(ones(1e8), 1), (ones(1.0), 1), (ones(-1e8), 1)])
    assert torch.allclose(mean["a"], torch.full((2, 3), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("sites", [1, 3, 10])
def test_equal_updates_average_to_themselves(sites):
    update = random_update(0)
    mean = mean_of([(update, 1 + i) for i in range(sites)])
    assert all(torch.allclose(mean[n], update[n], rtol=1.2e-7, atol=0) for n in SHAPES)


def test_only_the_proportion_of_weights_counts():
    updates = [random_update(i) for i in range(3)]
    small = mean_of(zip(updates, [1, 2, 3], strict=True))
    large = mean_of(zip(updates, [1e6, 2e6, 3e6], strict=True))
    assert all(torch.allclose(small[n], large[n], rtol=1.2e-7) for n in SHAPES)


def test_the_mean_does_not_depend_on_the_order_of_sites():
    pairs = [(random_update(i, 10.0 ** (i - 3)), 1 + i) for i in range(6)]
    forward, backward = mean_of(pairs), mean_of(reversed(pairs))
    assert all(torch.allclose(forward[n], backward[n], rtol=1.2e-7, atol=0) for n in SHAPES)


def test_no_update_gives_no_mean_and_inputs_stay_as_they_were():
    assert mean_of([]) == {}
    update = ones()
    mean_of([(update, 2.0), (ones(3.0), 1.0)])
    assert torch.equal(update["a"], torch.ones(2, 3))


def test_where_a_site_has_no_say_the_others_mean_is_taken():
    start, situation = ones(0.0), Situation(ones(0.0), 1, Config())
    rows = {"a": torch.tensor([[1.0], [0.0]])}
    first = Update("first", start, ones(1.0), 1.0, rows)
    second = Update("second", start, ones(4.0), 2.0, {"b": torch.zeros(())})
    mean = fedavg([first, second], situation)
    assert torch.equal(mean["a"], torch.tensor([[3.0] * 3, [4.0] * 3]))
    assert torch.equal(mean["b"], torch.ones(4))
    nobody = fedavg([Update("a", start, ones(), 1.0, {"b": torch.zeros(())})], situation)
    assert torch.equal(nobody["b"], torch.zeros(4))


def test_an_unknown_rule_lists_the_rules():
    with pytest.raises(ConfigError) as caught:
        get_rule("magic")
    assert all(name in caught.value.hint for name in RULES)


# Replies.

EXPECTED = Expected(3, "5" * 64, SHAPES, CodecConfig())
HEADER = {"round": "3", "state": "5" * 64}


def reply(records=None, error=None):
    question = Message(content(), message_type="train", dst_node_id=5)
    question.metadata.__dict__.update(_message_id="m", _run_id=1, _src_node_id=1)
    if error is not None:
        return Message(error, reply_to=question)
    return Message(records, reply_to=question)


def payload(update, header=HEADER):
    return encode(update, CodecConfig(), header=header, seed=0)


def raw(update, header=HEADER):
    """A payload that `encode` would not write."""
    at = {n: t.clone() for n, t in update.items()}
    data = bytearray(payload({n: torch.zeros_like(t) for n, t in at.items()}, header))
    numbers = torch.cat([at[name].flatten() for name in sorted(at)])
    data[-4 * len(numbers) :] = numbers.numpy().tobytes()
    return bytes(data)


def train_reply(update=None, metrics=None, header=HEADER):
    data = update if isinstance(update, bytes) else payload(update or ones(), header)
    return reply(content(data, metrics=METRICS | (metrics or {})))


def without(name):
    return {n: t for n, t in ones().items() if n != name}


def with_value(value):
    update = ones()
    update["a"][1, 2] = value
    return update


def junk():
    records = RecordDict()
    records["arrays"] = ConfigRecord({PLANTED: PLANTED})
    records[PLANTED] = MetricRecord({PLANTED: [1, 2]})
    return records


def listed_metrics():
    records = content(payload(ones()))
    records["metrics"] = MetricRecord({"num-examples": [1, 2], "train-loss": 0.5})
    return records


OTHER = "refused: the message is about tensors of other names or shapes"
BAD_ANSWERS = {
    "error": (reply(error=Error(code=2, reason=f"<ValueError>:<'{PLANTED}'>")), "failed: error 2"),
    "coded error": (reply(error=Error(code=2, reason="x SAM-T102 y")), "failed: SAM-T102"),
    "error without text": (reply(error=Error(code=9)), "failed: error 9"),
    "lost question": (reply(error=Error(code=3)), "failed: the question was lost on the way"),
    "no update": (reply(content(metrics=METRICS)), "refused: no update"),
    "no metrics": (reply(content(payload(ones()))), "num-examples is missing"),
    "nothing": (reply(RecordDict()), "refused: no update"),
    "junk": (reply(junk()), "unreadable"),
    "metrics in lists": (reply(listed_metrics()), "unreadable"),
    "flower's arrays": (
        reply(RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros((2, 3)))})})),
        "unreadable",
    ),
    "no file": (train_reply(PLANTED.encode()), "refused: the message is"),
    "missing tensor": (train_reply(without("a")), OTHER),
    "extra tensor": (train_reply(ones() | {PLANTED: torch.ones(1)}), OTHER),
    "renamed tensor": (train_reply(without("a") | {"A": torch.ones(2, 3)}), OTHER),
    "wrong shape": (train_reply(ones() | {"a": torch.ones(3, 2)}), OTHER),
    "NaN": (train_reply(raw(with_value(math.nan))), "refused: a is not finite"),
    "infinite": (train_reply(raw(with_value(-math.inf))), "refused: a is not finite"),
    "1e30": (train_reply(with_value(-1e30)), "refused: a moves by 1e+30"),
    "another adapter": (
        train_reply(header=HEADER | {"state": "6" * 64}),
        "refused: trained from another adapter",
    ),
    "another codec": (
        train_reply(encode(ones(), CodecConfig(numbers="int8"), header=HEADER, seed=0)),
        "refused: the codec of the message is not the one agreed on",
    ),
    "last round's": (train_reply(header=HEADER | {"round": "2"}), "late: an update of another"),
    "no header": (train_reply(header={}), "late: an update of another"),
    "no examples": (train_reply(metrics={"num-examples": 0}), "num-examples is 0"),
    "negative examples": (train_reply(metrics={"num-examples": -3}), "num-examples is -3"),
    "NaN examples": (train_reply(metrics={"num-examples": math.nan}), "num-examples is nan"),
    "too many examples": (train_reply(metrics={"num-examples": 1e12}), "num-examples is 1e+12"),
    "NaN loss": (train_reply(metrics={"train-loss": math.nan}), "train-loss is nan"),
    "infinite seconds": (train_reply(metrics={"seconds": math.inf}), "seconds is inf"),
    "negative steps": (train_reply(metrics={"steps": -1}), "steps is -1"),
    "missing loss": (
        reply(content(payload(ones()), metrics={"num-examples": 1})),
        "train-loss is missing",
    ),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_bad_answer_gets_a_status_and_no_update(case):
    message, expected = BAD_ANSWERS[case]
    noted, update = read_train_reply(message, EXPECTED)
    assert update is None
    assert not noted.ok
    assert expected in noted.status
    assert noted.metrics == {}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_nothing_a_site_words_itself_is_in_a_status(case):
    noted, _ = read_train_reply(BAD_ANSWERS[case][0], EXPECTED)
    assert "secret" not in noted.status
    assert "patient" not in noted.status
    assert len(noted.status) < 100


def test_a_good_answer_keeps_its_update_and_only_known_metrics():
    message = train_reply(random_update(1), {PLANTED: 1.0})
    noted, update = read_train_reply(message, EXPECTED)
    assert noted.ok
    assert set(noted.metrics) == set(METRICS)
    assert all(torch.equal(update[n], random_update(1)[n]) for n in SHAPES)
    assert noted.size_bytes > 0
    assert noted.update_sha256 == state_sha256(random_update(1))


def test_a_sites_former_update_in_a_new_envelope_is_refused():
    former = replace(EXPECTED, former_sha256=state_sha256(random_update(1)))
    noted, update = read_train_reply(train_reply(random_update(1)), former)
    assert (noted.status, update) == ("refused: the site's former update again", None)
    assert read_train_reply(train_reply(random_update(2)), former)[0].ok


@pytest.mark.parametrize(
    ("metrics", "status"),
    [
        ({"dice": 2.0, "num-cases": 1}, "dice is 2"),
        ({"dice": -0.1, "num-cases": 1}, "dice is -0.1"),
        ({"dice": math.nan, "num-cases": 1}, "dice is nan"),
        ({"dice": 0.5, "num-cases": -1}, "num-cases is -1"),
        ({"dice": 0.5, "num-cases": math.inf}, "num-cases is inf"),
        ({"dice": 0.5}, "num-cases is missing"),
        (None, "num-cases is missing"),
    ],
)
def test_a_bad_score_gets_a_status(metrics, status):
    noted = read_evaluate_reply(reply(content(metrics=metrics)))
    assert not noted.ok
    assert status in noted.status


def test_a_site_without_validation_cases_has_no_score_and_is_fine():
    noted = read_evaluate_reply(reply(content(metrics={"num-cases": 0, "seconds": 0.1})))
    assert noted.ok
    assert "dice" not in noted.metrics
