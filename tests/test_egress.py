"""Nothing leaves a site that its plan and its policy do not name, and nothing without its line."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import re
from dataclasses import replace
from datetime import date, datetime, timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load

from client.redaction import RedactedError
from client.site import Site, ask_agent
from samaritan.audit.gate import Gate, outlet
from samaritan.audit.hours import Hours
from samaritan.audit.log import Log, entries
from samaritan.audit.policy import SitePolicy, allows_tensor, require_agreement
from samaritan.audit.verify import verify_log
from samaritan.codecs import encode
from samaritan.config import CodecConfig, parse_config
from samaritan.errors import AuditError, DataError, FederationError
from samaritan.keys import is_signed, make_identity
from samaritan.messages import Answer, Instruction, MaskingStep, Request, sealed
from samaritan.plan import Plan
from samaritan.privacy.secure_sum.messages import Agreement, Envelope, Keys, Opening, Shares

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {"a": (2, 3), "b": (4,)}
STATE = "5" * 64
HEADER = {"round": "2", "state": STATE}
HASH = "0123456789abcdef" * 4
SITE = "St. Mary's"
PATIENT = "Doe^Jane"
PATH = "/data/patient_007.nii.gz"

PLAIN = parse_config({"rounds": 3})
PRIVATE = parse_config(
    {
        "rounds": 3,
        "strategy": "ffa",
        "privacy": {"unit": "patient", "records": 40, "scores": "withheld"},
    }
)
MASKED = parse_config(
    {"rounds": 3, "federation": {"secure_aggregation": True, "weighting": "uniform"}}
)
NUMBERS = {"num-examples": 7, "train-loss": 0.5, "steps": 4, "seconds": 1.25}
SCORES = {"dice": 0.75, "num-cases": 3, "seconds": 0.5}
LAST_SCORES = {**SCORES, "hd95-mm": 2.5, "nsd": 0.5}


def config_of(**sections):
    return parse_config({"rounds": 3} | sections)


def question(kind, stage=None):
    step = stage and MaskingStep(stage, 1, 10, b"from the server")
    asked = None if kind == "hello" else Instruction(2, 3, HASH, HASH, 60.0, STATE)
    return Request(kind, "f" * 64, "message-7", "", asked, None, step)


def tensors(shapes=None):
    generator = torch.Generator().manual_seed(3)
    return {n: torch.randn(s, generator=generator) for n, s in (shapes or SHAPES).items()}


def update(codec=None, header=None, shapes=None):
    return encode(tensors(shapes), codec or CodecConfig(), header=header or HEADER, seed=1)


def hello():
    hashes = ("config-sha256", "base-sha256", "adapter-sha256", "plan-sha256")
    return {"site": SITE, "samaritan": "0.1.0"} | dict.fromkeys(hashes, HASH)


KEYS = Keys(
    site=SITE, sealing=b"s" * 32, masking=b"m" * 32, commitment=b"c" * 32, signature=b"x" * 64
)
SEALED = Envelope(sealed=b"e" * 48, hashes=(b"1" * 32, b"2" * 32))
STEPS = {
    "keys": KEYS.pack(),
    "shares": Shares(envelopes={"A": SEALED, "B": SEALED}).pack(),
    "agreement": Agreement(signature=b"x" * 64).pack(),
    "opening": Opening(own_masks={"A": b"o" * 16}, masking_seeds={"B": b"m" * 16}).pack(),
}


def step_answer(stage, data=None):
    return Answer(step=MaskingStep(stage, 1, 10, STEPS[stage] if data is None else data))


# Each kind of answer that is to leave: configuration, question, answer.
ALLOWED = {
    "hello": (PLAIN, question("hello"), Answer(texts=hello())),
    "evaluate": (PLAIN, question("evaluate"), Answer(numbers=SCORES)),
    "evaluate nothing": (PRIVATE, question("evaluate"), Answer()),
    "train": (PLAIN, question("train"), Answer(update(), NUMBERS)),
    "train without a loss": (PLAIN, question("train"), Answer(update(), {"num-examples": 7})),
    "private": (
        PRIVATE,
        question("train"),
        Answer(update(), {"num-examples": 40, "steps": 10}, {"ledger": HASH}),
    ),
    "masked": (MASKED, question("train", "masked"), Answer(bytes(32 + 4 * 10), NUMBERS)),
    "scaffold": (
        config_of(training={"scaffold": True}),
        question("train"),
        Answer(update(shapes=SHAPES | {"control/a": (2, 3), "control/b": (4,)}), NUMBERS),
    ),
} | {
    f"step {stage}": (MASKED, question("secure_sum", stage), step_answer(stage)) for stage in STEPS
}
CODECS = {
    "fp16": {"numbers": "fp16"},
    "bf16": {"numbers": "bf16"},
    "int8": {"numbers": "int8"},
    "int4": {"numbers": "int4"},
    "top_k": {"top_k": 0.5},
    "low_rank": {"low_rank": 1},
    "all": {"low_rank": 1, "top_k": 0.25, "numbers": "int4"},
}
LARGE = {"a": (30, 40), "b": (500,)}
ALLOWED |= {
    f"train {name}": (
        config_of(wire={"up": codec}),
        question("train"),
        Answer(update(CodecConfig(**codec), shapes=LARGE), NUMBERS),
    )
    for name, codec in CODECS.items()
}


def shapes_of(name):
    return LARGE if name.removeprefix("train ") in CODECS else SHAPES


@pytest.fixture
def gate(tmp_path):
    def make(**policy):
        log = Log(tmp_path / "log.jsonl", {"site": SITE})
        return Gate(log, SitePolicy(**policy), "server.example:9092")

    return make


def written(gate):
    return [entry for entry, _ in entries(gate.log.path.read_bytes())]


def let_out(gate, case, shapes=None):
    config, request, answer = case
    allowed = outlet(config, shapes or SHAPES, request, SITE)
    gate.let_out(answer, allowed, request)


def stopped(gate, case, code="SAM-A204", shapes=None):
    """The message of the refusal; nothing is in the log."""
    before = gate.log.path.read_bytes()
    with pytest.raises(AuditError, match=code) as error:
        let_out(gate, case, shapes)
    assert error.value.code == code
    assert gate.log.path.read_bytes() == before
    return error.value.message


# What is allowed.


@pytest.mark.parametrize("name", ALLOWED)
def test_what_was_agreed_to_leaves_with_its_line(gate, name):
    passed = gate()
    let_out(passed, ALLOWED[name], shapes_of(name))
    _, request, answer = ALLOWED[name]
    entry = written(passed)[-1]
    payload, step = answer.payload, answer.step
    assert entry["type"] == "egress"
    assert (entry["kind"], entry["message"]) == (request.kind, "message-7")
    assert (entry["plan"], entry["destination"]) == ("f" * 64, "server.example:9092")
    assert entry["round"] == (0 if request.kind == "hello" else 2)
    assert entry["answer_sha256"] == answer.sha256
    assert entry["numbers"] == {n: repr(v) for n, v in answer.numbers.items()}
    assert entry["texts"] == dict(answer.texts)
    assert entry["bytes"] == len(payload or b"") + len(step.data if step else b"")
    assert ("payload_sha256" in entry) == (payload is not None)
    if payload is not None:
        assert entry["payload_sha256"] == hashlib.sha256(payload).hexdigest()
        assert entry["payload_bytes"] == len(payload)
    if step is not None:
        assert entry["step"] == {
            "stage": step.stage, "attempt": 1, "length": 10, "bytes": len(step.data),
            "sha256": hashlib.sha256(step.data).hexdigest(),
        }  # fmt: skip
    else:
        assert "step" not in entry


def test_the_line_of_an_update_lists_its_tensors(gate):
    passed = gate()
    let_out(passed, ALLOWED["train"])
    entry, payload = written(passed)[-1], ALLOWED["train"][2].payload
    assert entry["tensors"] == [["a", [2, 3], "fp32", 24], ["b", [4], "fp32", 16]]
    assert entry["codec"] == {"low_rank": None, "top_k": None, "numbers": "fp32"}
    parts = load(payload)  # by the library alone
    assert sum(t.numel() * t.element_size() for t in parts.values()) == sum(
        size for *_, size in entry["tensors"]
    )
    everything = torch.cat([tensors()["a"].flatten(), tensors()["b"]])
    assert torch.equal(parts["numbers"], everything)


def test_the_line_of_scaffold_lists_controls(gate):
    passed = gate()
    let_out(passed, ALLOWED["scaffold"])
    names = [tensor[0] for tensor in written(passed)[-1]["tensors"]]
    assert names == ["a", "b", "control/a", "control/b"]


@pytest.mark.parametrize(("name", "width"), [("fp16", 2), ("bf16", 2), ("int8", None)])
def test_the_line_tells_the_bytes_of_each_tensor_where_it_has_its_own(gate, name, width):
    passed = gate()
    let_out(passed, ALLOWED[f"train {name}"], LARGE)
    entry = written(passed)[-1]
    sizes = {t[0]: t[3] for t in entry["tensors"]}
    assert sizes == {n: width and width * math.prod(s) for n, s in LARGE.items()}
    assert {t[2] for t in entry["tensors"]} == {name}


@pytest.mark.parametrize("name", ["top_k", "low_rank", "all"])
def test_the_line_tells_no_bytes_of_tensors_that_a_codec_mixes(gate, name):
    passed = gate()
    let_out(passed, ALLOWED[f"train {name}"], LARGE)
    entry = written(passed)[-1]
    assert {t[3] for t in entry["tensors"]} == {None}
    codec = CODECS[name]
    assert entry["codec"]["low_rank"] == codec.get("low_rank")
    assert entry["codec"]["top_k"] == (repr(codec["top_k"]) if "top_k" in codec else None)
    assert all(t[1] == list(LARGE[t[0]]) for t in entry["tensors"])


def test_the_line_of_an_update_under_masks_lists_what_is_under_them(gate):
    passed = gate()
    let_out(passed, ALLOWED["masked"])
    entry = written(passed)[-1]
    assert entry["tensors"] == [
        ["a", [2, 3], "uint32 under masks", 24],
        ["b", [4], "uint32 under masks", 16],
    ]
    assert entry["payload_bytes"] == 32 + 24 + 16


def test_lines_hold_no_number_but_whole_ones(gate):
    """Floats may be written in more than one way, and a line is hashed."""
    passed = gate()
    for name, case in ALLOWED.items():
        let_out(passed, case, shapes_of(name))

    def fractions(value):
        if isinstance(value, dict | list):
            inner = value.values() if isinstance(value, dict) else value
            return any(map(fractions, inner))
        return isinstance(value, float)

    assert not any(map(fractions, written(passed)))


def test_only_what_is_sent_in_a_round_may_leave(gate):
    """A strategy that takes turns sends half of the tensors."""
    config = config_of(strategy="rolora")
    shapes = {"blocks.0.lora_A": (2, 3), "blocks.0.lora_B": (3, 2)}
    for server_round, due in ((1, "lora_B"), (2, "lora_A")):
        name = f"blocks.0.{due}"
        other = next(n for n in shapes if n != name)
        request = question("train")
        asked = replace(request.instruction, server_round=server_round)
        request = replace(request, instruction=asked)
        header = HEADER | {"round": str(server_round)}
        right = Answer(update(header=header, shapes={name: shapes[name]}), NUMBERS)
        wrong = Answer(update(header=header, shapes={other: shapes[other]}), NUMBERS)
        let_out(gate(), (config, request, right), shapes)
        stopped(gate(), (config, request, wrong), shapes=shapes)


def test_personal_parts_may_not_leave(gate):
    config = config_of(personal={"parts": ["decoder"]})
    shapes = {"image_encoder.a": (2,), "mask_decoder.b": (3,)}
    allowed = outlet(config, shapes, question("train"), SITE)
    assert dict(allowed.tensors) == {"image_encoder.a": (2,)}
    stopped(
        gate(), (config, question("train"), Answer(update(shapes=shapes), NUMBERS)), shapes=shapes
    )


# What is not.


def changed(name, **changes):
    config, request, answer = ALLOWED[name]
    return config, request, replace(answer, **changes)


def with_numbers(name, **numbers):
    answer = ALLOWED[name][2]
    named = {key.replace("_", "-"): value for key, value in numbers.items()}
    return changed(name, numbers={**answer.numbers, **named})


def with_texts(name, **texts):
    answer = ALLOWED[name][2]
    named = {key.replace("_", "-"): value for key, value in texts.items()}
    return changed(name, texts={**answer.texts, **named})


def framed(payload, change):
    """An update whose head was written by somebody else."""
    length = int.from_bytes(payload[:8], "little")
    text = change(payload[8 : 8 + length].rstrip(b" "))
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload[8 + length :]


def rewritten(payload, change):
    """An update whose head has the entries that `change` makes of them."""

    def apply(text):
        tree = json.loads(text)
        return json.dumps(change(tree) or tree, separators=(",", ":")).encode()

    return framed(payload, apply)


UPDATE = update()


def in_metadata(**fields):
    return lambda tree: tree["__metadata__"].update(fields)


HEADS = {
    "an extra key": rewritten(UPDATE, in_metadata(patient=PATIENT)),
    "a missing key": rewritten(UPDATE, lambda tree: tree["__metadata__"].pop("state") and None),
    "another round": update(header=HEADER | {"round": "1"}),
    "another state": update(header=HEADER | {"state": PATIENT}),
    "blanks at its end": framed(UPDATE, lambda text: text + b" " * 800),
    "tabs at its end": framed(UPDATE, lambda text: text + b"\t\n\t "),
    "blanks within": framed(UPDATE, lambda text: json.dumps(json.loads(text)).encode()),
    "blanks within the codec": rewritten(
        UPDATE,
        in_metadata(**{"samaritan-codec": json.dumps(json.loads(CodecConfig().model_dump_json()))}),
    ),
    "letters written otherwise": framed(
        UPDATE, lambda text: text.replace(b"round", b"\\u0072ound")
    ),
    "an unknown field of a tensor": rewritten(
        UPDATE, lambda tree: tree["numbers"].update(note=PATIENT)
    ),
    "fields in another order": rewritten(
        UPDATE, lambda tree: tree | {"numbers": dict(reversed(tree["numbers"].items()))}
    ),
    "keys in another order": rewritten(
        UPDATE, lambda tree: tree | {"__metadata__": dict(reversed(tree["__metadata__"].items()))}
    ),
    "tensors first": rewritten(UPDATE, lambda tree: dict(reversed(tree.items()))),
}

STOPPED = {
    "an extra number": with_numbers("train", age=51),
    "an extra number with scores": with_numbers("evaluate", train_loss=0.5),
    "a number in the roll call": with_numbers("hello", num_examples=7),
    "a loss under privacy": with_numbers("private", train_loss=0.5),
    "a time under privacy": with_numbers("private", seconds=1.5),
    "a score under privacy": (PRIVATE, question("evaluate"), Answer(numbers=SCORES)),
    "NaN": with_numbers("train", train_loss=math.nan),
    "infinity": with_numbers("train", train_loss=-math.inf),
    "a text as a number": with_numbers("train", train_loss=PATIENT),
    "true as a number": with_numbers("train", steps=True),
    "a number that writes itself": with_numbers("train", steps=torch.tensor(4)),
    "a number of another kind": with_numbers("train", steps=type("Named", (float,), {})(4)),
    "a number without end": with_numbers("train", steps=int.from_bytes(PATIENT.encode() * 2)),
    "a number without end below": with_numbers("train", steps=-(1 << 63)),
    "an extra text": with_texts("train", patient=PATIENT),
    "an extra text in the roll call": with_texts("hello", note="hello"),
    "a ledger without privacy": with_texts("train", ledger=HASH),
    "a ledger that is a name": with_texts("private", ledger=PATIENT),
    "another site's name": with_texts("hello", site="South Clinic"),
    "a name like the site's": with_texts("hello", site="St, Mary's"),
    "a name with a line more": with_texts("hello", site=SITE + "\n"),
    "a patient as a site": with_texts("hello", site=PATIENT),
    "a path as a version": with_texts("hello", samaritan=PATH),
    "a long version": with_texts("hello", samaritan="1" * 40),
    "a path as a hash": with_texts("hello", base_sha256=PATH),
    "a long hash": with_texts("hello", base_sha256=HASH + "0"),
    "a hash with a line more": with_texts("hello", base_sha256=HASH + "\n"),
    "capitals in a hash": with_texts("hello", base_sha256=HASH.upper()),
    "bytes as a text": with_texts("hello", base_sha256=HASH.encode()),
    "an update in the roll call": changed("hello", payload=UPDATE),
    "an update with scores": changed("evaluate", payload=UPDATE),
    "an update with a step": changed("step keys", payload=UPDATE),
    "empty bytes in the roll call": changed("hello", payload=b""),
    "a missing tensor": changed("train", payload=update(shapes={"a": (2, 3)})),
    "an extra tensor": changed("train", payload=update(shapes=SHAPES | {"c": (1,)})),
    "a renamed tensor": changed("train", payload=update(shapes={"a": (2, 3), "c": (4,)})),
    "another shape": changed("train", payload=update(shapes={"a": (3, 2), "b": (4,)})),
    "another codec": changed("train", payload=update(CodecConfig(numbers="fp16"))),
    "another codec of the same size": changed("train", payload=update(CodecConfig(low_rank=2))),
    "garbage": changed("train", payload=b"\x80\x04garbage" * 20),
    "nothing": changed("train", payload=b""),
    "a pickle": changed("train", payload=b"\x80\x04K\x01."),
    "bytes behind the update": changed("train", payload=UPDATE + PATIENT.encode()),
    "a byte behind the update": changed("train", payload=UPDATE + b"\0"),
    "an update cut short": changed("train", payload=UPDATE[:-1]),
    "an open update where masks are due": changed("masked", payload=UPDATE),
    "an update under masks where none are due": changed("train", payload=bytes(32 + 4 * 10)),
    "a longer update under masks": changed("masked", payload=bytes(32 + 4 * 11)),
    "a shorter update under masks": changed("masked", payload=bytes(32 + 4 * 9)),
    "a byte more under masks": changed("masked", payload=bytes(32 + 4 * 10 + 1)),
    "a step with an update": changed("masked", step=step_answer("keys").step),
    "a step in the roll call": changed("hello", step=step_answer("keys").step),
    "no step where one is due": changed("step keys", step=None),
    "a step of another stage": changed("step keys", step=step_answer("shares").step),
    "a step of another attempt": changed("step keys", step=MaskingStep("keys", 2, 10, KEYS.pack())),
    "a step of another length": changed("step keys", step=MaskingStep("keys", 1, 11, KEYS.pack())),
    "a step without a question": (MASKED, question("secure_sum"), step_answer("keys")),
    "a number with a step": with_numbers("step keys", steps=1),
    "a step in its wrong form": changed("step keys", step=step_answer("keys", b"patient").step),
    "the form of another step": changed(
        "step keys", step=step_answer("keys", STEPS["agreement"]).step
    ),
    "a step with blanks": changed("step keys", step=step_answer("keys", STEPS["keys"] + b" ").step),
    "a step of nobody": changed(
        "step keys",
        step=step_answer("keys", KEYS.model_copy(update={"site": PATIENT}).pack()).step,
    ),
    "a step of an unknown stage": (
        MASKED,
        question("secure_sum", "masked"),
        Answer(step=MaskingStep("masked", 1, 10, b"x")),
    ),
    "a long step": changed("step keys", step=step_answer("keys", bytes((1 << 20) + 1)).step),
    "a long seal": changed("hello", seal=bytes(65)),
    "a short seal": changed("hello", seal=PATIENT.encode()),
} | {f"a head with {name}": changed("train", payload=data) for name, data in HEADS.items()}


@pytest.mark.parametrize("name", STOPPED)
def test_what_was_not_agreed_to_is_stopped(gate, name):
    message = stopped(gate(), STOPPED[name])
    assert PATIENT not in message
    assert PATH not in message
    let_out(gate(), ALLOWED["train"])  # the gate is not shut for good


@pytest.mark.parametrize("codec", CODECS)
def test_the_head_of_every_codec_has_one_form(gate, codec):
    name = f"train {codec}"
    payload = ALLOWED[name][2].payload
    for hidden in (
        framed(payload, lambda text: text + b" " * 64),
        rewritten(payload, lambda tree: dict(reversed(tree.items()))),
        rewritten(payload, in_metadata(patient=PATIENT)),
    ):
        stopped(gate(), changed(name, payload=hidden), shapes=LARGE)


def test_heads_that_say_more_are_readable_to_a_server():
    """So that it is the gate that stops them."""
    from samaritan.codecs import decode

    readable = ("blanks at its end", "an unknown field of a tensor", "blanks within the codec")
    for name in readable:
        assert decode(HEADS[name], SHAPES, CodecConfig())[1] == HEADER


def test_the_largest_allowed_step_is_not_the_reason(gate):
    assert "bytes in a step" in stopped(gate(), STOPPED["a long step"])
    assert "not written as one" in stopped(gate(), STOPPED["a step in its wrong form"])


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ({"metrics": ("num-examples", "steps", "seconds")}, "train"),
        ({"metrics": ()}, "evaluate"),
        ({"tensors": ("a",)}, "train"),
        ({"tensors": ("b*",)}, "masked"),
        ({"tensors": ()}, "train"),
    ],
)
def test_the_policy_of_the_hospital_wins(gate, policy, name):
    assert "policy." in stopped(gate(**policy), ALLOWED[name])
    let_out(gate(), ALLOWED[name])


def test_a_policy_that_names_all_of_it_lets_it_out(gate):
    let_out(gate(metrics=tuple(NUMBERS), tensors=("a", "?")), ALLOWED["train"])


def test_an_answer_that_is_too_large_is_stopped_before_it_is_read(gate):
    size = len(UPDATE)
    exact = gate(max_message_mb=size / 1e6)
    let_out(exact, ALLOWED["train"])
    small = gate(max_message_mb=(size - 1) / 1e6)
    assert f"{size} bytes" in stopped(small, ALLOWED["train"], "SAM-A205")
    stopped(small, changed("train", payload=b"x" * size), "SAM-A205")
    data = len(STEPS["shares"])
    stopped(gate(max_message_mb=(data - 1) / 1e6), ALLOWED["step shares"], "SAM-A205")
    let_out(gate(max_message_mb=data / 1e6), ALLOWED["step shares"])


def test_a_dry_run_keeps_the_answer_and_says_what_would_have_left(gate):
    kept = gate(dry_run=True)
    with pytest.raises(AuditError, match="SAM-A203"):
        let_out(kept, ALLOWED["train"])
    genesis, dry = written(kept)
    assert (genesis["type"], dry["type"]) == ("genesis", "dry_run")
    let_out(replace(kept, policy=SitePolicy()), ALLOWED["train"])
    egress = written(kept)[-1]
    own = ("type", "seq", "prev", "time_utc")
    assert {k: v for k, v in dry.items() if k not in own} == {
        k: v for k, v in egress.items() if k not in own
    }
    stopped(kept, STOPPED["an extra number"])


def test_a_full_disk_lets_nothing_out(gate, monkeypatch):
    passed = gate()
    monkeypatch.setattr(os, "write", full_disk)
    stopped(passed, ALLOWED["train"], "SAM-A102")


def test_the_line_is_on_the_disk_before_the_answer_may_leave(gate, monkeypatch):
    passed, sync, done = gate(), os.fsync, []

    def fsync(descriptor):
        done.append(("synced", passed.log.path.read_bytes().count(b'"type":"egress"')))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    let_out(passed, ALLOWED["train"])
    done.append(("let out", 1))
    assert done == [("synced", 1), ("synced", 1), ("let out", 1)]


NAMES = st.sampled_from([*NUMBERS, *SCORES, *hello(), "ledger", "age", "", PATIENT])
VALUES = st.one_of(
    st.floats(), st.integers(), st.booleans(), st.none(), st.text(max_size=9), st.binary(max_size=9)
)
TEXTS = st.one_of(
    st.sampled_from([SITE, HASH, "0.1.0", PATH, PATIENT, HASH + "\n"]), st.text(max_size=70), VALUES
)
PAYLOADS = st.one_of(
    st.none(),
    st.sampled_from([UPDATE, *HEADS.values(), bytes(32 + 40)]),
    st.binary(max_size=200),
    st.builds(
        lambda at, byte: (
            UPDATE[: at % len(UPDATE)] + bytes([byte]) + UPDATE[at % len(UPDATE) + 1 :]
        ),
        st.integers(0, 10_000),
        st.integers(0, 255),
    ),
)
MASKING = st.one_of(
    st.none(),
    st.builds(
        MaskingStep,
        st.sampled_from([*STEPS, "masked", PATIENT]),
        st.integers(0, 2),
        st.sampled_from([10, 11]),
        st.one_of(st.sampled_from([*STEPS.values()]), st.binary(max_size=80)),
    ),
)
ANSWERS = st.builds(
    Answer,
    PAYLOADS,
    st.dictionaries(NAMES, VALUES, max_size=4),
    st.dictionaries(NAMES, TEXTS, max_size=4),
    MASKING,
    st.sampled_from([b"", bytes(64), b"x"]),
)


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    answer=ANSWERS,
    name=st.sampled_from(["hello", "evaluate", "train", "private", "masked", "step keys"]),
)
def test_no_answer_of_any_shape_passes_with_anything_unlisted(gate, answer, name):
    config, request, right = ALLOWED[name]
    watched = gate()
    before = watched.log.path.read_bytes()
    try:
        let_out(watched, (config, request, answer))
    except AuditError as error:
        if error.code != "SAM-A204" or watched.log.path.read_bytes() != before:
            raise
        return
    assert answer.numbers.keys() <= right.numbers.keys()
    assert all(type(v) in (int, float) and math.isfinite(v) for v in answer.numbers.values())
    for key, text in answer.texts.items():
        pattern = {"site": re.escape(SITE), "samaritan": r"[0-9][0-9a-z.+]{0,31}"}.get(
            key, "[0-9a-f]{64}"
        )
        assert key in right.texts
        assert re.fullmatch(pattern, text)
    assert (answer.step is None) == (right.step is None)
    assert answer.payload is None or (right.payload is not None and request.kind == "train")
    if name in ("train", "private") and answer.payload is not None:
        # Of a readable update only the numbers are free.
        assert answer.payload[: len(UPDATE) - 40] == UPDATE[: len(UPDATE) - 40]
        assert len(answer.payload) == len(UPDATE)
    assert written(watched)[-1]["answer_sha256"] == answer.sha256


# The site in front of its agent.


class Agent:
    """Answers as it is told."""

    def __init__(self, **answers):
        self.config, self.answers = PLAIN, answers
        self.initial = {name: torch.zeros(shape) for name, shape in SHAPES.items()}

    def _say(self, kind):
        answer = self.answers.get(kind)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def hello(self):
        return self._say("hello") or hello()

    def train(self, payload, instruction, *step):
        return self._say("train") or (UPDATE, NUMBERS)

    def evaluate(self, payload, instruction):
        return self._say("evaluate") or SCORES

    def secure_sum(self, step, instruction):
        return self._say("secure_sum") or STEPS[step.stage]


@pytest.fixture
def site(gate):
    def make(agent=None, identity=None, find=None, **policy):
        found = agent or Agent()
        return Site(SITE, find or (lambda request: found), gate(**policy), identity)

    return make


@pytest.mark.parametrize("kind", ["hello", "train", "evaluate"])
def test_a_question_and_its_answer_are_written_down(site, kind):
    asked = site()
    answer = asked.answer(question(kind))
    _, request, egress = written(asked.gate)
    assert request["type"] == "request"
    assert egress["type"] == "egress"
    for entry in (request, egress):
        assert (entry["kind"], entry["message"], entry["plan"]) == (kind, "message-7", "f" * 64)
        assert entry["round"] == (0 if kind == "hello" else 2)
    assert request["state"] == ("" if kind == "hello" else STATE)
    assert "payload_sha256" not in request
    assert egress["answer_sha256"] == answer.sha256
    assert verify_log(asked.gate.log.path).whole


def test_what_came_in_is_written_down_by_its_hash(site):
    asked = site()
    asked.answer(replace(question("train"), payload=b"from the server"))
    request = written(asked.gate)[1]
    assert request["payload_sha256"] == hashlib.sha256(b"from the server").hexdigest()
    assert request["payload_bytes"] == 15


def test_an_answer_is_made_of_what_the_agent_says(site):
    assert site().answer(question("train")) == Answer(UPDATE, NUMBERS)
    assert site().answer(question("evaluate")) == Answer(numbers=SCORES)
    assert site().answer(question("hello")) == Answer(texts=hello())
    private = Agent(train=(UPDATE, {"num-examples": 40, "steps": 2, "ledger": HASH}))
    private.config = PRIVATE
    answer = site(private).answer(question("train"))
    assert answer == Answer(UPDATE, {"num-examples": 40, "steps": 2}, {"ledger": HASH})
    masked = Agent(train=(bytes(72), NUMBERS))
    masked.config = MASKED
    asked = question("secure_sum", "shares")
    step = replace(asked.step, data=STEPS["shares"])
    assert site(masked).answer(asked) == Answer(step=step)
    assert site(masked).answer(question("train", "masked")) == Answer(bytes(72), NUMBERS)


def test_what_leaves_is_sealed_with_the_key_of_the_site(site, tmp_path):
    key = make_identity(tmp_path / "key")
    answer = site(identity=key).answer(question("train"))
    assert is_signed(key.public, sealed(question("train"), SITE, answer), answer.seal)
    assert not is_signed(key.public, sealed(question("evaluate"), SITE, answer), answer.seal)
    assert site().answer(question("train")).seal == b""


@pytest.mark.parametrize("kind", ["hello", "train", "evaluate"])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("SAM-D101", f"case {PATH}", f"look at {PATH} of {PATIENT}"), "SAM-D101"),
        (ValueError(f"no file {PATH} of {PATIENT}"), "SAM-F299"),
        (KeyError(PATIENT), "SAM-F299"),
    ],
)
def test_of_a_fault_neither_answer_nor_log_hold_more_than_a_code(site, caplog, kind, error, code):
    asked = site(Agent(**{kind: error}))
    with (
        caplog.at_level(logging.ERROR, "samaritan.site"),
        pytest.raises(RedactedError) as fault,
    ):
        asked.answer(question(kind))
    assert fault.value.code == code
    assert fault.value.__cause__ is None
    _, request, refused = written(asked.gate)
    assert (request["type"], refused["type"]) == ("request", "refused")
    assert (refused["code"], refused["reference"]) == (code, fault.value.reference)
    assert (refused["kind"], refused["message"]) == (kind, "message-7")
    assert (refused["plan"], refused["round"]) == ("f" * 64, 0 if kind == "hello" else 2)
    for text in (str(fault.value), repr(fault.value.args), asked.gate.log.path.read_text()):
        assert PATH not in text
        assert PATIENT not in text
        assert "patient" not in text
    assert fault.value.reference in caplog.text  # the people of the site find it there
    assert PATIENT in caplog.text


@pytest.mark.parametrize(
    ("answers", "code"),
    [
        ({"train": (UPDATE, NUMBERS | {"age": 51})}, "SAM-A204"),
        ({"train": (UPDATE, NUMBERS | {"patient": PATIENT})}, "SAM-A204"),
        ({"train": (UPDATE + b"\0", NUMBERS)}, "SAM-A204"),
    ],
)
def test_what_the_gate_stops_is_refused_with_its_code(site, answers, code):
    asked = site(Agent(**answers))
    with pytest.raises(RedactedError, match=code):
        asked.answer(question("train"))
    assert [e["type"] for e in written(asked.gate)] == ["genesis", "request", "refused"]
    assert written(asked.gate)[-1]["code"] == code
    assert PATIENT not in asked.gate.log.path.read_text()


def test_a_dry_run_refuses_and_has_both_lines(site):
    asked = site(dry_run=True)
    with pytest.raises(RedactedError, match="SAM-A203"):
        asked.answer(question("train"))
    kinds = [e["type"] for e in written(asked.gate)]
    assert kinds == ["genesis", "request", "dry_run", "refused"]


def test_a_request_that_nobody_may_work_on_is_refused(site):
    def nobody(request):
        raise AuditError("SAM-A202", f"closed, says {PATIENT}", "come back")

    asked = site(find=nobody)
    with pytest.raises(RedactedError, match="SAM-A202"):
        asked.answer(question("train"))
    assert written(asked.gate)[-1]["code"] == "SAM-A202"
    assert PATIENT not in asked.gate.log.path.read_text()


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_stops_a_site(site, monkeypatch, room):
    """With room for the question too: the answer does not leave without its line."""
    worked, write, calls = [], os.write, []
    agent = Agent()
    agent.train = lambda *_: worked.append(1) or (UPDATE, NUMBERS)
    asked = site(agent)

    def some(descriptor, data):
        calls.append(1)
        return write(descriptor, data) if len(calls) <= room else full_disk()

    monkeypatch.setattr(os, "write", some)
    with pytest.raises(RedactedError, match="SAM-A102"):
        asked.answer(question("train"))
    assert len(worked) == room
    kinds = [e["type"] for e in written(asked.gate)]
    assert kinds == ["genesis", "request"][: room + 1]
    monkeypatch.undo()
    asked.answer(question("train"))
    assert written(asked.gate)[-1]["type"] == "egress"


@pytest.mark.parametrize(
    "request_",
    [
        Request("train"),
        Request("evaluate"),
        Request("secure_sum"),
        Request("secure_sum", instruction=question("train").instruction),
    ],
    ids=str,
)
def test_a_question_that_lacks_a_part_is_refused(request_):
    with pytest.raises(FederationError, match="SAM-F207"):
        ask_agent(Agent(), request_)


# What a hospital allows.


def plan_of(sites=4, held_out=(), **sections):
    names = [f"site{n}" for n in range(sites)]
    tree = {
        "rounds": 10,
        "strategy": "fedavg",
        "data": {"source": "folder", "classes": {"liver": 1}, "held_out_sites": list(held_out)},
        "federation": {"min_sites": 3},
    }
    for name, value in sections.items():
        tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
    return Plan(
        study="liver-1",
        created=date(2026, 11, 1),
        valid_until=date(2027, 11, 1),
        samaritan="0.1.0",
        bundle_sha256="1" * 64,
        config=parse_config(tree),
        base={"name": "vit_b", "sha256": "2" * 64},
        sites={
            name: {"identity": f"{n:064x}", "node": f"ecdsa {n}"} for n, name in enumerate(names)
        },
    )


TENSORS = ("image_encoder.blocks.0.attn.qkv.lora_A", "mask_decoder.tokens.weight")
PATIENTS = {"unit": "patient", "epsilon": 8, "records": 40}
SLICES = PATIENTS | {"unit": "slice"}
NO_BUDGET = {"unit": "patient", "noise_multiplier": 1, "records": 40}

RULES = [
    ("strategies", ("fedavg",), {}, {"strategy": "svd"}),
    ("min_cohort", 3, {}, {"federation": {"min_sites": 2}}),
    ("min_cohort", 4, {"federation": {"min_sites": 4}}, {}),
    ("max_rounds", 10, {}, {"rounds": 11}),
    ("require_privacy", "patient", {"privacy": PATIENTS}, {}),
    ("require_privacy", "patient", {"privacy": PATIENTS}, {"privacy": SLICES}),
    ("require_privacy", "slice", {"privacy": SLICES}, {}),
    ("require_privacy", "slice", {"privacy": PATIENTS}, {"privacy": {"unit": "site"}}),
    ("max_epsilon", 8.0, {"privacy": PATIENTS}, {"privacy": PATIENTS | {"epsilon": 8.1}}),
    ("max_epsilon", 8.0, {}, {"privacy": NO_BUDGET}),
    ("require_secure_aggregation", True, {"federation": {"secure_aggregation": True}}, {}),
    ("numbers", ("fp32", "int8"), {"wire": {"up": {"numbers": "int8"}}},
     {"wire": {"up": {"numbers": "fp16"}}}),
    ("tensors", ("image_encoder.*", "mask_decoder.*"), {}, None),
    ("metrics", (*NUMBERS, *LAST_SCORES), {}, None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "good", "bad"), RULES)
def test_each_rule_refuses_alone(key, value, good, bad):
    policy = SitePolicy(**{key: value})
    require_agreement(policy, plan_of(**good), TENSORS)
    if bad is None:
        return
    with pytest.raises(AuditError, match="SAM-A201") as error:
        require_agreement(policy, plan_of(**bad), TENSORS)
    assert error.value.message.count("\n  - ") == 1
    assert "liver-1" in error.value.message
    if key != "strategies":
        assert f"policy.{key}" in error.value.message or key == "require_secure_aggregation"


def test_a_plan_that_trains_at_too_few_sites_is_refused():
    require_agreement(SitePolicy(), plan_of(sites=4, held_out=["site0"]), TENSORS)
    with pytest.raises(AuditError, match="SAM-A201") as error:
        require_agreement(SitePolicy(), plan_of(sites=4, held_out=["site0", "site1"]), TENSORS)
    assert "2 sites train, policy.min_cohort is 3" in error.value.message
    assert error.value.message.count("\n  - ") == 1


@pytest.mark.parametrize(
    ("patterns", "barred"),
    [
        (("image_encoder.*",), "mask_decoder.tokens.weight,"),
        (("mask_decoder.*",), "lora_A,"),
        (("*.lora_?",), "mask_decoder.tokens.weight,"),
        ((), "lora_A and 1 more,"),
        (("Image_encoder.*",), "lora_A and 1 more,"),
    ],
)
def test_a_plan_with_a_tensor_that_may_not_leave_is_refused(patterns, barred):
    with pytest.raises(AuditError, match=r"policy\.tensors") as error:
        require_agreement(SitePolicy(tensors=patterns), plan_of(), TENSORS)
    assert barred in error.value.message


@pytest.mark.parametrize("told", sorted({*NUMBERS, *LAST_SCORES}))
def test_a_plan_with_a_number_that_may_not_leave_is_refused(told):
    metrics = tuple({*NUMBERS, *LAST_SCORES} - {told})
    with pytest.raises(AuditError, match="SAM-A201") as error:
        require_agreement(SitePolicy(metrics=metrics), plan_of(), TENSORS)
    assert f"its answers hold {told}, policy.metrics" in error.value.message


def test_numbers_that_a_plan_withholds_need_not_be_allowed():
    private = plan_of(privacy=PATIENTS | {"scores": "withheld"})
    require_agreement(SitePolicy(metrics=("num-examples", "steps")), private, TENSORS)
    with pytest.raises(AuditError, match="its answers hold steps,"):
        require_agreement(SitePolicy(metrics=("num-examples",)), private, TENSORS)


def test_all_reasons_are_told_at_once():
    policy = SitePolicy(
        strategies=("svd",), min_cohort=5, max_rounds=9, require_privacy="patient", max_epsilon=1,
        require_secure_aggregation=True, tensors=("image_encoder.*",), numbers=("int8",),
        metrics=(),
    )  # fmt: skip
    plan = plan_of(privacy={"unit": "slice", "epsilon": 2, "records": 40})
    with pytest.raises(AuditError) as error:
        require_agreement(policy, plan, TENSORS)
    assert error.value.message.count("\n  - ") == 10


def test_the_defaults_are_those_of_the_page():
    assert SitePolicy().model_dump() == {
        "strategies": None, "min_cohort": 3, "max_rounds": None, "require_privacy": "none",
        "max_epsilon": None, "require_secure_aggregation": False, "max_message_mb": 64,
        "tensors": ("*",), "numbers": None, "metrics": None, "hours": (), "dry_run": False,
        "approvers": {},
    }  # fmt: skip
    require_agreement(SitePolicy(), plan_of(), TENSORS)
    page = (ROOT / "docs" / "what-leaves.md").read_text("utf-8")
    for key in SitePolicy.model_fields:
        assert f"| `{key}` |" in page


def test_names_of_tensors_are_matched_whole():
    assert allows_tensor(SitePolicy(tensors=("a.*", "b")), "a.x.y")
    assert not allows_tensor(SitePolicy(tensors=("a.*", "b")), "b.x")
    assert not allows_tensor(SitePolicy(tensors=("a.*", "b")), "xa.b")
    assert not allows_tensor(SitePolicy(tensors=()), "b")


# When a site works. 28 November 2026 is a Saturday.


def at(day, time):
    """A day of the week from Monday 23 November 2026."""
    days = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    hour, minute = map(int, time.split(":"))
    return datetime(2026, 11, 23 + days.index(day), hour, minute, 30)


@pytest.mark.parametrize(
    ("windows", "open_at", "closed_at"),
    [
        ([], ["Mon 00:00", "Sun 23:59"], []),
        (["19:00-06:00"], ["Mon 19:00", "Mon 23:59", "Tue 00:00", "Sun 05:59", "Mon 05:59"],
         ["Mon 06:00", "Mon 18:59", "Sun 12:00"]),
        (["08:00-17:30"], ["Mon 08:00", "Sun 17:29"], ["Mon 07:59", "Mon 17:30", "Tue 00:00"]),
        (["Mon-Fri 08:00-17:00"], ["Mon 08:00", "Fri 16:59"], ["Sat 08:00", "Sun 16:59"]),
        (["Mon-Fri 19:00-06:00"],
         ["Mon 19:00", "Tue 05:59", "Fri 23:59", "Sat 00:00", "Sat 05:59"],
         ["Mon 05:59", "Sat 06:00", "Sat 19:00", "Sun 05:00", "Sun 23:00"]),
        (["Sun 22:00-04:00"], ["Sun 22:00", "Mon 03:59"], ["Sun 21:59", "Mon 04:00", "Sun 03:00"]),
        (["Fri-Mon 10:00-12:00"], ["Fri 10:00", "Sun 11:59", "Mon 10:00"],
         ["Tue 11:00", "Thu 11:00"]),
        (["Sat 00:00-23:59"], ["Sat 00:00", "Sat 23:58"], ["Sat 23:59", "Fri 23:58", "Sun 00:00"]),
        (["Sat 00:00-24:00"], ["Sat 00:00", "Sat 23:59"], ["Fri 23:59", "Sun 00:00"]),
        (["Fri 19:00-24:00"], ["Fri 19:00", "Fri 23:59"], ["Fri 18:59", "Sat 00:00", "Thu 23:59"]),
        (["Sat 10:00-11:00", "Sun 12:00-13:00"], ["Sat 10:30", "Sun 12:30"],
         ["Sat 12:30", "Sun 10:30"]),
        (["  sAT-sun 10:00-11:00 "], ["Sat 10:00", "Sun 10:59"], ["Fri 10:00", "Mon 10:00"]),
    ],
)  # fmt: skip
def test_hours_are_windows_of_the_week(windows, open_at, closed_at):
    hours = Hours(windows)
    assert all(hours.open_at(at(*text.split())) for text in open_at)
    assert not any(hours.open_at(at(*text.split())) for text in closed_at)


@pytest.mark.parametrize(
    "window",
    [
        "", "always", "19-06", "19:00", "19:00-24:01", "24:00-06:00", "24:00-24:00",
        "19:60-20:00", "9:00-10:00",
        "10:00-10:00", "Mo 10:00-11:00", "Xyz 10:00-11:00", "Mon-Xyz 10:00-11:00",
        "Mon-Fri10:00-11:00", "Mon,Tue 10:00-11:00", "10:00-11:00 Mon", "10:00-11:00, 12:00-13:00",
        "10:00-11:00\nSat 10:00-11:00", "Mon-Tue-Wed 10:00-11:00",
    ],
)  # fmt: skip
def test_hours_that_cannot_be_read_are_refused(window):
    with pytest.raises(ValueError, match="is no window such as"):
        Hours(["19:00-06:00", window])
    with pytest.raises(ValidationError, match="is no window such as"):
        SitePolicy(hours=("19:00-06:00", window))


@given(
    first=st.integers(0, 6), last=st.integers(0, 6), begin=st.integers(0, 1439),
    length=st.integers(1, 1439), minute=st.integers(0, 7 * 1440 - 1),
)  # fmt: skip
def test_hours_are_what_counting_minutes_says(first, last, begin, length, minute):
    names = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
    end = (begin + length) % 1440
    times = "-".join(f"{time // 60:02}:{time % 60:02}" for time in (begin, end))
    text = f"{names[first]}-{names[last]} {times}"
    days = [(first + n) % 7 for n in range((last - first) % 7 + 1)]
    inside = any((minute - day * 1440 - begin) % (7 * 1440) < length for day in days)
    when = datetime(2026, 11, 23) + timedelta(minutes=minute)
    assert Hours([text]).open_at(when) == inside


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
