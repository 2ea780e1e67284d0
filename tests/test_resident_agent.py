"""The resident agent: frames, socket, approvals, refusals, and what it sends again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import threading
import time
from dataclasses import asdict, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import nibabel
import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from client import service, studies
from client.approvals import Approvals, require_member, roles_of
from client.frames import pack_answer, pack_fault, pack_request, read_answer, read_request
from client.home import site_identity, site_log
from client.outbox import Outbox
from client.redaction import RedactedError, redact
from client.restraint import Restraint
from client.settings import load_settings
from client.site import Site
from client.socket import AgentSocket
from client.studies import Studies
from samaritan import __version__
from samaritan.audit.gate import Gate
from samaritan.audit.policy import SitePolicy
from samaritan.codecs import encode
from samaritan.config import CodecConfig, config_sha256, parse_config
from samaritan.errors import (
    AuditError,
    DataError,
    DeploymentError,
    ModelError,
    SamaritanError,
    TrustError,
)
from samaritan.keys import Identity, is_signed, load_identity, make_identity
from samaritan.messages import Answer, Instruction, MaskingStep, Request, sealed
from samaritan.models.adapter import build_adapted
from samaritan.models.bases import state_sha256
from samaritan.plan import Plan, PlannedBase, PlannedSite, sign_plan, write_plan
from samaritan.provision.kit import load_kit
from samaritan.provision.kits import provision
from tests.federations import SMALL, split_by_site

PLANTED = "/srv/patients/JANE_DOE_1970.nii.gz"


# Frames.

INSTRUCTION = Instruction(2, 7, "c" * 64, "b" * 64, 1.5, "d" * 64, "e" * 64, 1, "f" * 64)
STEP = MaskingStep("masked", 3, 17, b"\x00\xff")
CASES = "a1" * 32


@pytest.mark.parametrize("payload", [None, b"", b"SAM\x01" * 1000])
@pytest.mark.parametrize("step", [None, STEP, replace(STEP, data=b"")])
def test_requests_and_answers_survive_the_socket(payload, step):
    asked = Request("train", "a" * 64, "message", "9" * 64, INSTRUCTION, payload, step, "7" * 64)
    assert read_request(io.BytesIO(pack_request(asked))) == asked
    given = Answer(payload, {"dice": 0.1 + 0.2, "steps": 3}, {"ledger": "a"}, step, b"seal")
    assert read_answer(io.BytesIO(pack_answer(given))) == given
    assert read_answer(io.BytesIO(pack_answer(given))).sha256 == given.sha256


def test_a_fault_comes_out_as_one():
    with pytest.raises(RedactedError) as caught:
        read_answer(io.BytesIO(pack_fault(RedactedError("SAM-D101", "0123abcd"))))
    assert str(caught.value) == "SAM-D101 reference 0123abcd in the site's log"


@given(st.binary(max_size=200))
def test_what_is_no_frame_is_refused_and_never_crashes(data):
    for read in (read_request, read_answer):
        for start in (b"", b"SAM\x01", b"SAM\x01\x02\x00\x00\x00{}"):
            with contextlib.suppress(DeploymentError, EOFError):
                pytest.fail(f"{read(io.BytesIO(start + data))} from noise")


@given(st.integers(0, 400), st.integers(0, 255))
def test_a_changed_byte_never_crashes_a_reader(place, value):
    data = bytearray(pack_request(Request("train", "a" * 64, "m", "b", INSTRUCTION, b"p", STEP)))
    data[place % len(data)] = value
    with contextlib.suppress(DeploymentError, EOFError):
        read_request(io.BytesIO(bytes(data)))


@pytest.mark.parametrize(
    "changes",
    [{"server_round": 1.5}, {"server_round": True}, {"server_round": "1"}, {"timeout_s": 60},
     {"timeout_s": "nan"}, {"state_sha256": 7}, {"ledger": None}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_an_instruction_of_other_types_is_none(changes):
    """A round of 1.004 would be another round to whoever counts, and the same to whoever trains."""
    header = {
        "kind": "train", "plan": "a" * 64, "message": "m", "bundle": "", "step": None, "known": "",
        "instruction": {**asdict(INSTRUCTION)}, "lengths": [None, None],
    }  # fmt: skip

    def framed():
        text = json.dumps(header).encode()
        return io.BytesIO(b"SAM\x01" + len(text).to_bytes(4, "little") + text)

    assert read_request(framed()).instruction == INSTRUCTION
    header["instruction"] |= changes
    with pytest.raises(DeploymentError):
        read_request(framed())
    header["instruction"] = None
    for name, wrong in (("kind", "ping"), ("kind", 1), ("plan", 1), ("message", None)):
        right, header[name] = header[name], wrong
        with pytest.raises(DeploymentError):
            read_request(framed())
        header[name] = right
    assert read_request(framed()).instruction is None


@pytest.mark.parametrize("lengths", [[1 << 40, 0], [-5, 0], [None], "ab", [0, -1], [2.5, 0]])
def test_lengths_that_cannot_be_are_refused_before_anything_is_read(lengths):
    header = json.dumps({"lengths": lengths}).encode()
    frame = b"SAM\x01" + len(header).to_bytes(4, "little") + header

    class Greedy(io.BytesIO):
        def read(self, size=-1, /):
            assert 0 <= size < 1 << 33
            return super().read(size)

    with pytest.raises((DeploymentError, EOFError)):
        read_request(Greedy(frame))


# Answers that were made before.


def train(state="1" * 64, server_round=1, **changes):
    asked = Instruction(server_round, 3, "c" * 64, "b" * 64, 60.0, state)
    return Request("train", "a" * 64, instruction=replace(asked, **changes))


def test_an_answer_is_found_again_for_the_same_question_only(tmp_path):
    outbox, answer = Outbox(tmp_path / "outbox"), Answer(b"update", {"steps": 3})
    assert outbox.find(train(), CASES) is None
    outbox.keep(train(), CASES, answer)
    assert outbox.find(replace(train(), message_id="another", payload=b"x"), CASES) == answer
    for other in (
        train("2" * 64),
        train(server_round=2),
        train(used_round=1),
        train(config_sha256="0" * 64),
        train(timeout_s=61.0),
        replace(train(), kind="evaluate"),
        replace(train(), plan_sha256="0" * 64),
        replace(train(), step=STEP),
    ):
        assert outbox.find(other, CASES) is None
    assert outbox.find(train(), "0" * 64) is None  # somebody is among the cases no more


def test_the_outbox_keeps_two_and_passes_over_a_damaged_one(tmp_path):
    outbox = Outbox(tmp_path)
    for number in (1, 2, 3):
        outbox.keep(train(server_round=number), CASES, Answer(bytes([number])))
        time.sleep(0.01)
    found = [outbox.find(train(server_round=n), CASES) for n in (1, 2, 3)]
    assert [f and f.payload for f in found] == [None, b"\x02", b"\x03"]
    for path in tmp_path.glob("*.answer"):
        assert path.stat().st_mode & 0o777 == 0o600
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
    assert outbox.find(train(server_round=3), CASES) is None


def test_nothing_is_kept_of_a_roll_call_or_of_a_step_of_a_sum(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.keep(Request("hello"), CASES, Answer())
    outbox.keep(replace(train(), kind="secure_sum", step=STEP), CASES, Answer(step=STEP))
    assert not list(tmp_path.iterdir())


# A server that fishes.


def test_a_round_is_answered_from_three_adapters_and_no_more(tmp_path):
    restraint = Restraint(tmp_path / "asked.json")
    for digit in "123":
        for _ in range(5):
            restraint.note(train(digit * 64), 3)
    with pytest.raises(AuditError) as caught:
        Restraint(tmp_path / "asked.json").note(train("4" * 64), 3)
    assert caught.value.code == "SAM-A207"
    restraint.note(train("1" * 64), 3)
    restraint.note(train("4" * 64, server_round=2), 3)
    restraint.note(replace(train("4" * 64), kind="evaluate"), 3)
    restraint.note(Request("hello"), 3)
    # What no agent answers does not fill the disk.
    noted = (tmp_path / "asked.json").read_bytes()
    for junk in (train(server_round=0), train(server_round=4), train("x" * 10**6), train("4" * 63)):
        restraint.note(junk, 3)
    assert (tmp_path / "asked.json").read_bytes() == noted
    (tmp_path / "asked.json").write_text("{")
    with pytest.raises(AuditError) as caught:
        restraint.note(train(), 3)
    assert caught.value.code == "SAM-A208"


# What may leave of a fault.


def test_a_fault_is_redacted_once_and_stays_what_it_is(caplog):
    first = redact(DataError("SAM-D101", PLANTED, PLANTED))
    assert str(first).startswith("SAM-D101 reference ")
    assert PLANTED not in str(first)
    assert redact(first) is first
    assert redact(ValueError(PLANTED)).code == "SAM-F299"
    assert PLANTED in caplog.text


# A kit with data, and a plan.


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    """Kits of three sites with keys, and phantoms for one of them."""
    from samaritan.data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("consortium")
    project = {
        "project": "trial", "title": "Trial", "server": {"hosts": ["localhost"]},
        "sites": [{"name": n} for n in ("Ahus", "Bern", "Chur")], "keys": "shipped",
    }  # fmt: skip
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    provision(folder / "project.yaml", folder / "kits")
    write_phantoms(folder / "phantoms", 3, 4, 0)
    names = {"site_01": "Ahus", "site_02": "Bern", "site_03": "Chur"}
    split_by_site(folder / "phantoms", folder / "data", names)
    return folder


@pytest.fixture
def kit(consortium, tmp_path):
    """A copy of the kit of Ahus."""
    shutil.copytree(consortium / "kits/sites/Ahus", tmp_path / "kit")
    settings(tmp_path / "kit", consortium)
    return load_kit(tmp_path / "kit", "site")


def settings(folder, consortium, **more):
    tree = {"data": str(consortium / "data/Ahus"), "threads": 1, **more}
    (folder / "site.yaml").write_text(yaml.safe_dump(tree))


CONFIG = parse_config(SMALL)


@pytest.fixture(scope="module")
def base_sha256():
    return build_adapted(CONFIG, 3).base.sha256


@pytest.fixture
def plan(consortium, base_sha256):
    """The plan of a study: ``plan({"rounds": 7}, valid_until=...)``."""

    def make(config=None, **changes):
        members = {}
        for name in ("Ahus", "Bern", "Chur"):
            home = consortium / "kits/sites" / name
            identity = make_identity(home / "identity.key").public.hex()
            members[name] = PlannedSite(identity=identity, node=(home / "node.pub").read_text())
        tree = {**SMALL, **(config or {})}
        values = {
            "schema": 1, "study": "liver", "created": date(2026, 1, 1),
            "valid_until": datetime.now(UTC).date() + timedelta(days=30),
            "samaritan": __version__, "bundle_sha256": "9" * 64, "config": parse_config(tree),
            "base": PlannedBase(name="tiny", sha256=base_sha256), "sites": members,
        }  # fmt: skip
        return Plan(**{**values, **changes})

    return make


@pytest.fixture
def signer(consortium) -> Identity:
    return make_identity(consortium / "kits/authority/plan.key")


def approved(kit, plan, signer, policy=None):
    identity = site_identity(kit)
    approvals = Approvals(kit, roles_of(policy or SitePolicy(), identity))
    approvals.approve(sign_plan(plan, signer), "site", identity)
    return approvals


def hello(plan, **changes):
    return Request("hello", **{"plan_sha256": plan.sha256, "bundle_sha256": "9" * 64, **changes})


@pytest.fixture
def ready(kit, consortium):
    """The studies of the kit under its settings: ``ready(policy={...})``."""

    def make(**more):
        settings(kit.folder, consortium, **more)
        found = load_settings(kit.path("site.yaml"))
        identity = site_identity(kit)
        return Studies(kit, found, identity, site_log(kit, identity))

    return make


# Approvals.


def test_an_approval_that_the_log_does_not_have_is_none(kit, plan, signer, samaritan, tmp_path):
    path = tmp_path / "plan.json"
    write_plan(path, sign_plan(plan(), signer))
    kit.path("log").mkdir()
    kit.path("log/site.jsonl").write_text("no log\n")
    done = samaritan("site", "approve", path, "--kit", kit.folder)
    assert (done.code, "SAM-A101" in done.err) == (1, True)
    assert not list(kit.path("approvals").glob("*"))
    kit.path("log/site.jsonl").unlink()
    done = samaritan("site", "approve", path, "--kit", kit.folder)
    assert done.code == 0, done.err
    assert [e["type"] for e in entries(kit)] == ["genesis", "plan_approved"]


def test_a_key_that_is_not_there_is_not_made_by_approving(kit, plan, signer, samaritan, tmp_path):
    path, key = tmp_path / "plan.json", tmp_path / "stick/officer.key"
    write_plan(path, sign_plan(plan(), signer))
    done = samaritan("site", "approve", path, "--kit", kit.folder, "--key", key)
    assert (done.code, "SAM-P301" in done.err) == (1, True)
    assert not key.parent.exists()
    assert samaritan("site", "key", tmp_path / "officer.key").code == 0
    public = make_identity(tmp_path / "officer.key").public.hex()
    done = samaritan("site", "key", tmp_path / "officer.key")
    assert (done.code, public in done.err) == (1, True)


def test_a_key_that_this_user_may_not_read_is_not_called_damaged(tmp_path, monkeypatch):
    """People told to restore it from a backup would replace a good key."""
    make_identity(tmp_path / "a.key")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(PermissionError):
        load_identity(tmp_path / "a.key")


def test_the_status_of_a_site_says_how_its_plans_stand(kit, plan, signer, samaritan):
    approved(kit, plan(), signer)
    over = plan(study="old", valid_until=date(2026, 11, 1))
    approved(kit, over, signer)
    told = samaritan("site", "status", kit.folder).out
    assert f"plan {plan().sha256[:16]}: study liver, approved, valid until" in told
    assert f"plan {over.sha256[:16]}: SAM-K303" in told
    tree = yaml.safe_load(kit.path("site.yaml").read_text()) | {"policy": {"min_cohort": 4}}
    kit.path("site.yaml").write_text(yaml.safe_dump(tree))
    told = samaritan("site", "status", kit.folder).out
    assert f"plan {plan().sha256[:16]}: SAM-A201" in told


def test_a_plan_nobody_approved_is_refused(kit, plan, ready, signer):
    with pytest.raises(TrustError) as caught:
        ready().find(hello(plan()))
    assert caught.value.code == "SAM-K305"
    write_plan(kit.path("plans", f"{plan().sha256}.json"), sign_plan(plan(), signer))
    with pytest.raises(TrustError) as caught:
        ready().find(hello(plan()))
    assert caught.value.code == "SAM-K305"
    assert "lacks the approval of site" in caught.value.message


def test_an_approval_taken_back_holds_at_once(kit, plan, ready, signer):
    approved(kit, plan(), signer)
    studies = ready()
    assert studies.find(hello(plan())).site == "Ahus"
    kit.path("approvals", plan().sha256, "site.json").unlink()
    with pytest.raises(TrustError):
        studies.find(hello(plan()))


@pytest.mark.parametrize("key", ["plan", "site", "role", "time_utc", "signature"])
def test_a_changed_approval_is_none(kit, plan, signer, key):
    approvals = approved(kit, plan(), signer)
    assert approvals.missing(plan().sha256) == []
    path = kit.path("approvals", plan().sha256, "site.json")
    tree = json.loads(path.read_text())
    tree[key] = tree[key][:-1] + ("0" if tree[key][-1] != "0" else "1")
    path.write_text(json.dumps(tree))
    assert approvals.missing(plan().sha256) == ["site"]


def test_two_roles_must_both_approve_with_their_own_keys(kit, plan, ready, signer, tmp_path):
    officer, chief = make_identity(tmp_path / "officer"), make_identity(tmp_path / "chief")
    named = {"officer": officer.public.hex(), "chief": chief.public.hex()}
    studies = ready(policy={"approvers": named})
    approvals = studies.approvals
    signed = sign_plan(plan(), signer)
    for role, key in (("officer", chief), ("chief", site_identity(kit)), ("site", officer)):
        with pytest.raises(TrustError) as caught:
            approvals.approve(signed, role, key)
        assert caught.value.code == "SAM-K304"
    approvals.approve(signed, "officer", officer)
    assert approvals.missing(plan().sha256) == ["chief"]
    with pytest.raises(TrustError, match="lacks the approval of chief"):
        studies.find(hello(plan()))
    approvals.approve(signed, "chief", chief)
    assert studies.find(hello(plan())).site == "Ahus"
    # One's approval under the other's name is no approval.
    folder = kit.path("approvals", plan().sha256)
    (folder / "chief.json").write_bytes((folder / "officer.json").read_bytes())
    assert approvals.missing(plan().sha256) == ["chief"]


def test_two_roles_of_one_key_are_refused(kit, tmp_path):
    key = make_identity(tmp_path / "key").public.hex()
    with pytest.raises(TrustError) as caught:
        roles_of(SitePolicy(approvers={"a": key, "b": key}), site_identity(kit))
    assert caught.value.code == "SAM-K306"


def test_a_plan_of_another_signer_is_refused(kit, plan, ready, tmp_path):
    approved(kit, plan(), make_identity(tmp_path / "stranger"))
    with pytest.raises(TrustError) as caught:
        ready().find(hello(plan()))
    assert caught.value.code == "SAM-K302"


def test_a_plan_under_anothers_name_is_refused(kit, plan, ready, signer):
    other = plan(config={"rounds": 100})
    approved(kit, plan(), signer)
    write_plan(kit.path("plans", f"{plan().sha256}.json"), sign_plan(other, signer))
    with pytest.raises(TrustError) as caught:
        ready().find(hello(plan()))
    assert caught.value.code == "SAM-K305"


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "A" * 64, "a" * 63])
def test_a_plan_is_named_by_its_hash_and_nothing_else(kit, ready, name):
    with pytest.raises(TrustError) as caught:
        ready().find(Request("hello", name))
    assert caught.value.code == "SAM-K305"


def test_a_plan_that_names_other_keys_or_leaves_the_site_out_is_refused(kit, plan):
    identity, node = site_identity(kit), kit.path("node.pub").read_text()
    require_member(plan(), kit, identity, node)
    others = {n: s for n, s in plan().sites.items() if n != "Ahus"}
    bern = plan().sites["Bern"]
    for sites in (
        others,
        {**others, "Ahus": plan().sites["Ahus"].model_copy(update={"identity": "0" * 64})},
        {"Ahus": plan().sites["Ahus"].model_copy(update={"node": bern.node})},
    ):
        with pytest.raises(TrustError) as caught:
            require_member(plan(sites=sites), kit, identity, node)
        assert caught.value.code == "SAM-K307"


# What a study needs before it is answered.


def test_a_study_is_loaded_once_and_the_log_says_so(kit, plan, ready, signer):
    approved(kit, plan(), signer)
    studies = ready()
    agent = studies.find(hello(plan()))
    assert studies.find(hello(plan())) is agent
    assert studies.loaded == plan().sha256
    loaded = [e for e in entries(kit) if e["type"] == "study_loaded"]
    assert len(loaded) == 1
    assert loaded[0]["base_sha256"] == plan().base.sha256
    assert loaded[0]["peak_rss_bytes"] > 1e8
    assert agent.hello()["plan-sha256"] == plan().sha256
    assert {case.site for case in agent.train_cases} == {"Ahus"}


@pytest.fixture
def own_cases(consortium, tmp_path):
    """A copy of the site's cases, and the lines of its manifest."""
    shutil.copytree(consortium / "data/Ahus", tmp_path / "cases")
    return tmp_path / "cases", (tmp_path / "cases/manifest.csv").read_text().splitlines()


def spoil(label):
    """Changes one voxel."""
    image = nibabel.load(label)
    values = np.asarray(image.dataobj).copy()
    values[0, 0, 0] = 1 - values[0, 0, 0]
    nibabel.save(nibabel.Nifti1Image(values, image.affine, image.header), label)


def test_a_study_keeps_the_cases_it_began_with(kit, plan, ready, signer, own_cases):
    folder, (head, *lines) = own_cases
    approved(kit, plan(), signer)

    def load(lines):
        """As after a restart of the agent."""
        (folder / "manifest.csv").write_text("\n".join([head, *lines]) + "\n")
        ready(data=str(folder)).find(hello(plan()))
        return [e for e in entries(kit) if e["type"] == "study_loaded"][-1]

    begun = load(lines[1:])
    assert (begun["cases"], begun["cases_left"]) == (len(lines) - 1, 0)
    assert load(lines[1:])["cases_sha256"] == begun["cases_sha256"]
    # Whoever takes the consent back is out, and that is no fault.
    fewer = load(lines[2:])
    assert (fewer["cases"], fewer["cases_left"]) == (len(lines) - 2, 1)
    assert fewer["cases_sha256"] != begun["cases_sha256"]
    for old, new in (("person_01_003", "pseudonym"), (",train", ",val")):  # of the same files
        with pytest.raises(DataError, match=r"1 changed \("):
            load([lines[1], lines[2].replace(old, new), lines[3]])
    with pytest.raises(DataError, match=r"1 came \(") as caught:
        load(lines)
    assert caught.value.code == "SAM-D311"
    assert load(lines[1:])["cases_left"] == 0  # the first ones may come back
    label = folder / "labels/phantom_01_002.nii.gz"
    spoil(label)
    with pytest.raises(DataError, match=r"1 changed \("):
        load(lines[1:])
    kept = kit.path("state", plan().sha256[:16], "cases.json")
    kept.unlink()
    assert load(lines[1:])["cases_left"] == 0  # as the hint says
    kept.write_text("{")
    with pytest.raises(DataError) as caught:
        load(lines[1:])
    assert caught.value.code == "SAM-D312"


def test_who_leaves_moves_nobody_to_another_split(kit, plan, ready, signer, own_cases):
    folder, (head, *lines) = own_cases
    # Of four people two validate, of three one.
    made = plan({"data": {**SMALL["data"], "val_fraction": 0.4}})
    approved(kit, made, signer)
    undecided = [line.rsplit(",", 1)[0] for line in lines]

    def splits(lines):
        text = "\n".join([head.removesuffix(",split"), *lines]) + "\n"
        (folder / "manifest.csv").write_text(text)
        agent = ready(data=str(folder)).find(hello(made))
        return {case.case_id: case.split for case in (*agent.train_cases, *agent.val_cases)}

    first = splits(undecided)
    assert set(first.values()) == {"train", "val"}
    for number, line in enumerate(undecided):
        if first[line.split(",")[0]] == "train":
            rest = splits(undecided[:number] + undecided[number + 1 :])
            assert rest == {name: first[name] for name in rest}


def test_new_names_for_the_same_images_bring_no_new_budget(kit, plan, ready, signer, own_cases):
    folder, _ = own_cases
    listed = (folder / "manifest.csv").read_text()
    private = {"unit": "patient", "epsilon": 100, "delta": 1e-3, "records": 3,
               "sampling_rate": 0.5, "noise_multiplier": 2.0}  # fmt: skip

    def begin(study, name="person"):
        """The agent of a study of its own, which knows the persons by other names."""
        made = plan({"privacy": private}, study=study)
        approved(kit, made, signer)
        (folder / "manifest.csv").write_text(listed.replace("person", name))
        agent = ready(data=str(folder), policy={"max_epsilon": 100}).find(hello(made))
        assert {case.subject_id[: len(name)] for case in agent.train_cases} == {name}
        beginning = agent.hello()["adapter-sha256"]
        asked = Instruction(1, 3, config_sha256(made.config), made.base.sha256, 60.0, beginning)
        return agent.budget, lambda: agent.train(None, asked)

    budget, work = begin("first")
    assert budget.spent().pld == 0
    work()
    once = budget.spent().pld
    budget, work = begin("second", "patient")
    assert budget.spent().pld == once > 0
    work()
    twice = budget.spent().pld
    assert twice > once
    for study, name in (("third", "person"), ("fourth", "somebody"), ("fifth", "patient")):
        assert begin(study, name)[0].spent().pld == twice


def test_a_case_that_is_touched_while_the_agent_runs_is_not_worked_on(
    kit, plan, ready, signer, own_cases
):
    folder, (head, *lines) = own_cases
    approved(kit, plan(), signer)
    studies = ready(data=str(folder))
    agent = studies.find(hello(plan()))
    assert studies.find(hello(plan())) is agent
    (folder / "manifest.csv").write_text("\n".join([head, *lines[1:]]) + "\n")
    fewer = studies.find(hello(plan()))  # no restart is needed for who takes the consent back
    assert len(fewer.train_cases) == len(agent.train_cases) - 1
    assert fewer.cases_sha256 != agent.cases_sha256
    label = folder / "labels/phantom_01_002.nii.gz"
    spoil(label)
    with pytest.raises(DataError) as caught:
        studies.find(hello(plan()))
    assert caught.value.code == "SAM-D311"
    label.unlink()
    with pytest.raises(SamaritanError):
        studies.find(hello(plan()))


def entries(kit):
    return [json.loads(line) for line in kit.path("log/site.jsonl").read_bytes().splitlines()]


OTHER = {"liver": 1, "kidney": 2, "vessel": 4}
"""The files have 3 where this has 4."""


@pytest.mark.parametrize(
    ("config", "changes", "asked", "more", "code"),
    [
        ({}, {}, {"bundle_sha256": "8" * 64}, {}, "SAM-K308"),
        ({}, {}, {"bundle_sha256": ""}, {}, "SAM-K308"),
        ({}, {"samaritan": "9.9"}, {}, {}, "SAM-K309"),
        ({}, {"valid_until": date(2026, 11, 1)}, {}, {}, "SAM-K303"),
        ({}, {"base": PlannedBase(name="tiny", sha256="0" * 64)}, {}, {}, "SAM-M502"),
        ({}, {}, {}, {"policy": {"strategies": ["svd"]}}, "SAM-A201"),
        ({"federation": {"min_sites": 2}}, {}, {}, {}, "SAM-A201"),
        ({"data": {**SMALL["data"], "classes": OTHER}}, {}, {}, {}, "SAM-D114"),
        ({}, {}, {}, {"data": "/nowhere"}, "SAM-D201"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_before_anything_is_answered(
    kit, plan, ready, signer, config, changes, asked, more, code
):
    made = plan(config, **changes)
    approved(kit, made, signer)
    with pytest.raises(SamaritanError) as caught:
        ready(**more).find(hello(made, **asked))
    assert caught.value.code == code, caught.value
    assert not [e for e in entries(kit) if e["type"] == "study_loaded"]


def test_a_site_answers_in_its_hours_only(kit, plan, ready, signer, monkeypatch):
    approved(kit, plan(), signer)
    found = ready(policy={"hours": ["22:00-06:00"]})
    for hour, is_open in ((23, True), (5, True), (6, False), (12, False)):
        clock = SimpleNamespace(now=lambda hour=hour: datetime(2026, 11, 28, hour))
        monkeypatch.setattr(studies, "datetime", clock)
        if is_open:
            assert found.find(hello(plan())).site == "Ahus"
        else:
            with pytest.raises(AuditError) as caught:
                found.find(hello(plan()))
            assert caught.value.code == "SAM-A202"


def test_a_base_that_needs_a_checkpoint_says_so(kit, plan, ready, signer):
    made = plan(
        {"model": {"base": "vit_b", "image_size": 64}},
        base=PlannedBase(name="vit_b", sha256="0" * 64),
    )
    approved(kit, made, signer)
    with pytest.raises(ModelError) as caught:
        ready().find(hello(made))
    assert caught.value.code == "SAM-M501"


def test_another_study_takes_the_place_of_the_first(kit, plan, ready, signer):
    one, two = plan(), plan({"seed": 5})
    for made in (one, two):
        approved(kit, made, signer)
    found = ready()
    first, second = found.find(hello(one)), found.find(hello(two))
    assert first is not second
    assert found.loaded == two.sha256
    assert first.memory.folder != second.memory.folder


# site.yaml.


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, ["data: is missing"]),
        ({"data": "x", "dat": "y"}, ["dat: unknown key; did you mean data?"]),
        (
            {"data": "x", "threads": 0, "policy": {"min_cohort": 0, "max_rouns": 3}},
            ["threads", "policy.min_cohort", "did you mean policy.max_rounds?"],
        ),
    ],
)
def test_every_fault_of_site_yaml_is_told_at_once(tmp_path, tree, words):
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(DeploymentError) as caught:
        load_settings(tmp_path / "site.yaml")
    assert caught.value.code == "SAM-N103"
    assert all(word in caught.value.message for word in words), caught.value.message


def test_paths_of_site_yaml_are_meant_from_its_folder(tmp_path):
    (tmp_path / "site.yaml").write_text("data: cases\ncheckpoint: /srv/sam.pth\n")
    found = load_settings(tmp_path / "site.yaml")
    assert (found.data, found.checkpoint) == (str(tmp_path / "cases"), "/srv/sam.pth")
    assert found.policy == SitePolicy()


# The process, its socket and its lock.


@pytest.fixture
def listening(kit, consortium, tmp_path):
    """An agent on a socket in this process, in front of a site: ``listening(site)``."""
    with contextlib.ExitStack() as stack:

        def listen(site, **more):
            settings(kit.folder, consortium, **more)
            found = load_settings(kit.path("site.yaml"))
            server = stack.enter_context(service._listening(kit, found, site))
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            stack.callback(server.shutdown)
            return AgentSocket(kit.path("run", "agent.sock"), wait_s=2)

        yield listen


class Echo:
    """A site that answers with what it was asked."""

    def __init__(self):
        self.seen = []

    def answer(self, request):
        self.seen.append(request)
        if request.payload == b"fail":
            raise redact(ValueError(PLANTED))
        if request.payload == b"crash":
            raise ValueError(PLANTED)
        return Answer(request.payload, {"steps": request.server_round})


def test_a_request_goes_through_the_socket_and_the_answer_comes_back(listening):
    site = Echo()
    agent = listening(site)
    asked = Request("train", "a" * 64, "m", "b" * 64, INSTRUCTION, b"x" * 10_000_000, STEP)
    assert agent.answer(asked).payload == asked.payload
    assert site.seen == [asked]
    for word in (b"fail", b"crash"):
        with pytest.raises(RedactedError) as caught:
            agent.answer(replace(asked, payload=word))
        assert PLANTED not in str(caught.value)
        assert caught.value.code == "SAM-F299"
    assert agent.answer(replace(asked, payload=b"on")).payload == b"on"


def test_noise_on_the_socket_is_answered_with_a_code_and_the_agent_goes_on(listening, kit):
    agent = listening(Echo())
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"SAM\x01\xff\xff\xff\xff", b"\x80\x04pickle..."):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(kit.path("run", "agent.sock")))
            raw.sendall(noise)
            raw.shutdown(socket.SHUT_WR)
            raw.recv(1000)
    assert agent.answer(Request("hello", payload=b"on")).payload == b"on"


def test_one_request_is_worked_on_at_a_time(listening):
    class Slow(Echo):
        at_once = most = 0

        def answer(self, request):
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            time.sleep(0.2)
            self.at_once -= 1
            return Answer()

    site = Slow()
    agent = listening(site)
    threads = [threading.Thread(target=agent.answer, args=[Request("hello")]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert site.most == 1


def test_a_courier_that_dies_leaves_the_agent_alive_and_its_answer_in_the_outbox(
    listening, kit, tmp_path
):
    done = threading.Event()

    class Working:
        def answer(self, request):
            time.sleep(0.3)
            done.set()
            return Answer(b"late" * 1_000_000)

    agent = listening(Working())
    raw = socket.socket(socket.AF_UNIX)
    raw.connect(str(kit.path("run", "agent.sock")))
    raw.sendall(pack_request(Request("hello")))
    raw.close()
    assert done.wait(5)
    assert agent.answer(Request("hello")).payload[:4] == b"late"


def test_a_user_who_is_not_the_couriers_gets_nothing(listening, monkeypatch):
    site = Echo()
    agent = listening(site)
    monkeypatch.setattr(service, "peer_user", lambda connection: 4711)
    with pytest.raises(DeploymentError) as caught:
        agent.answer(Request("hello"))
    assert caught.value.code == "SAM-N203"
    assert not site.seen


def test_the_socket_is_the_owners_and_the_couriers_group_only(listening, kit):
    listening(Echo())
    assert kit.path("run", "agent.sock").stat().st_mode & 0o777 == 0o600


def test_a_courier_user_that_does_not_exist_is_told(listening):
    with pytest.raises(DeploymentError) as caught:
        listening(Echo(), courier_user="nobody-of-this-name")
    assert caught.value.code == "SAM-N205"


def test_a_courier_without_an_agent_says_so(tmp_path):
    with pytest.raises(DeploymentError) as caught:
        AgentSocket(tmp_path / "agent.sock", wait_s=0.1).answer(Request("hello"))
    assert caught.value.code == "SAM-N202"


def test_a_courier_waits_for_an_agent_that_is_just_starting(listening, kit):
    agent = AgentSocket(kit.path("run", "agent.sock"), wait_s=10)
    threading.Timer(0.7, lambda: listening(Echo())).start()
    assert agent.answer(Request("hello", payload=b"x")).payload == b"x"


def test_a_socket_with_a_very_long_path_works(tmp_path, consortium):
    import shutil

    folder = tmp_path / ("long" * 25) / "kit"
    shutil.copytree(consortium / "kits/sites/Ahus", folder)
    settings(folder, consortium)
    kit = load_kit(folder, "site")
    assert len(str(kit.path("run", "agent.sock"))) > 108
    with service._listening(kit, load_settings(kit.path("site.yaml")), Echo()) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        agent = AgentSocket(kit.path("run", "agent.sock"), wait_s=2)
        assert agent.answer(Request("hello", payload=b"x")).payload == b"x"
        server.shutdown()


def test_two_agents_of_one_site_are_refused(kit):
    kit.path("state").mkdir()
    with service._alone(kit.path("state")), pytest.raises(DeploymentError) as caught:
        service.serve(kit.folder)
    assert caught.value.code == "SAM-N204"


def test_a_kit_without_keys_says_what_to_do(kit):
    kit.path("identity.key").unlink()
    with pytest.raises(TrustError) as caught:
        service.serve(kit.folder)
    assert caught.value.code == "SAM-K310"


def test_a_log_that_was_changed_keeps_the_agent_from_starting(kit):
    for version in "01":
        site_log(kit, site_identity(kit)).append("started", samaritan=version)
    path = kit.path("log/site.jsonl")
    path.write_bytes(path.read_bytes().replace(b'"samaritan":"0"', b'"samaritan":"2"'))
    with pytest.raises(AuditError) as caught:
        service.serve(kit.folder)
    assert caught.value.code == "SAM-A101"


# A site with everything around its agent.


def test_a_real_site_seals_logs_and_resends(kit, plan, ready, signer, monkeypatch):
    """Training is real; the second time it must not run at all."""
    made = plan()
    approved(kit, made, signer)
    found = ready()
    identity = site_identity(kit)
    gate = Gate(found._log, SitePolicy(), "server:9443")
    site = Site("Ahus", found.find, gate, identity, Outbox(kit.path("state/outbox")))
    said = site.answer(hello(made, message_id="m0"))
    assert is_signed(identity.public, sealed(hello(made, message_id="m0"), "Ahus", said), said.seal)
    asked = Instruction(
        1, 3, config_sha256(made.config), made.base.sha256, 60.0, said.texts["adapter-sha256"]
    )
    first = Request("train", made.sha256, "m1", "9" * 64, asked)
    one = site.answer(first)
    monkeypatch.setattr("client.agent.train_locally", None)
    again = replace(first, message_id="m2")
    two = site.answer(again)
    assert two.payload == one.payload
    assert two.seal != one.seal
    assert is_signed(identity.public, sealed(again, "Ahus", two), two.seal)
    leaving = [e for e in entries(kit) if e["type"] == "egress"]
    assert [(e["kind"], e["message"]) for e in leaving] == [
        ("hello", "m0"), ("train", "m1"), ("train", "m2")
    ]  # fmt: skip
    assert leaving[1]["payload_sha256"] == leaving[2]["payload_sha256"]
    assert sum(e["type"] == "study_loaded" for e in entries(kit)) == 1


def test_a_site_that_lacks_an_answer_the_server_has_is_a_copy_and_says_so(
    kit, plan, ready, signer, tmp_path
):
    """Two kits with the same keys, of which one has answered since they were one."""
    made = plan()
    approved(kit, made, signer)
    shutil.copytree(kit.folder, tmp_path / "copy")
    copy = load_kit(tmp_path / "copy", "site")

    def site_of(kit):
        found = Studies(kit, load_settings(kit.path("site.yaml")), site_identity(kit), log_of(kit))
        return Site("Ahus", found.find, Gate(log_of(kit), SitePolicy()), site_identity(kit))

    def log_of(kit):
        return site_log(kit, site_identity(kit))

    site, other = site_of(kit), site_of(copy)
    said = site.answer(hello(made))
    asked = hello(made, known_answer=said.sha256)
    assert site.answer(asked).texts == said.texts
    assert other.answer(hello(made)).texts == said.texts  # the server does not know any answer yet
    state = said.texts["adapter-sha256"]
    asked = Instruction(1, 3, config_sha256(made.config), made.base.sha256, 60.0, state)
    update = site.answer(Request("train", made.sha256, "m1", "9" * 64, asked))
    for kind in ("hello", "train", "evaluate"):
        with pytest.raises(RedactedError) as caught:
            other.answer(
                Request(kind, made.sha256, "m2", "9" * 64, asked, known_answer=update.sha256)
            )
        assert caught.value.code == "SAM-A209"
    refused = [e["code"] for e in entries(copy) if e["type"] == "refused"]
    assert refused == ["SAM-A209"] * 3
    # The server learns of nothing but answers whether this log has it.
    for text in (entries(kit)[0]["site"], entries(kit)[-1]["prev"], '", "'):
        with pytest.raises(RedactedError):
            site.answer(hello(made, known_answer=text))
    # A log that was moved aside, as its own hint says, still counts; a lost one by decision only.
    shutil.move(kit.path("log/site.jsonl"), kit.path("log/old.jsonl"))
    moved = site_of(kit)
    moved.answer(hello(made, known_answer=update.sha256))
    shutil.rmtree(kit.path("log"))
    lost = site_of(kit)
    with pytest.raises(RedactedError):
        lost.answer(hello(made, known_answer=update.sha256))
    kit.path("log/lost.txt").write_text(f'"answer_sha256":"{update.sha256}"')
    lost.answer(hello(made, known_answer=update.sha256))


def test_a_server_that_asks_for_something_else_gets_codes_and_the_site_stays_well(
    kit, plan, ready, signer
):
    made = plan()
    approved(kit, made, signer)
    found = ready()
    site = Site("Ahus", found.find, Gate(found._log, SitePolicy()), site_identity(kit))
    state = site.answer(hello(made)).texts["adapter-sha256"]
    right = Instruction(1, 3, config_sha256(made.config), made.base.sha256, 60.0, state)
    for changes, code in (
        ({"base_sha256": "0" * 64}, "SAM-F201"),
        ({"rounds": 1000}, "SAM-F201"),
        ({"config_sha256": "0" * 64}, "SAM-F201"),
        ({"server_round": 4}, "SAM-F202"),
        ({"timeout_s": float("nan")}, "SAM-F202"),
        ({"timeout_s": 0.0}, "SAM-F202"),
        ({"state_sha256": "0" * 64}, "SAM-F203"),
    ):
        asked = Request("train", made.sha256, "m", "9" * 64, replace(right, **changes))
        with pytest.raises(RedactedError) as caught:
            site.answer(asked)
        assert caught.value.code == code
    with pytest.raises(RedactedError) as caught:
        site.answer(Request("train", made.sha256, "m", "9" * 64, right, b"crafted"))
    assert caught.value.code == "SAM-F204"
    initial = found.find(hello(made)).initial
    for factor, code in ((50.0, "SAM-F209"), (9.0, None)):
        noise = {
            name: factor * value.square().mean().sqrt().clamp(min=0.1) * torch.ones_like(value)
            for name, value in initial.items()
        }
        made_up = replace(right, state_sha256=state_sha256(noise))
        sent = encode(noise, CodecConfig(), header={}, seed=0)
        asked = Request("evaluate", made.sha256, "m", "9" * 64, made_up, sent)
        if code is None:
            assert "dice" in site.answer(asked).numbers
            continue
        with pytest.raises(RedactedError) as caught:
            site.answer(asked)
        assert caught.value.code == code
    refused = [e["code"] for e in entries(kit) if e["type"] == "refused"]
    assert refused == [
        "SAM-F201", "SAM-F201", "SAM-F201", "SAM-F202", "SAM-F202", "SAM-F202", "SAM-F203",
        "SAM-F204", "SAM-F209",
    ]  # fmt: skip
    assert site.answer(Request("train", made.sha256, "m", "9" * 64, right)).payload


def test_a_server_cannot_fill_the_disk_with_names(kit, plan, ready, signer):
    made = plan()
    approved(kit, made, signer)
    found = ready()
    site = Site("Ahus", found.find, Gate(found._log, SitePolicy()), site_identity(kit))
    asked = Instruction(1, 3, config_sha256(made.config), made.base.sha256, 60.0, "x" * 10**6)
    for request in (
        Request("hello", "x" * 10**6, "m" * 10**6, "9" * 64),
        Request("train", made.sha256, "m", "9" * 64, asked),
        Request("train", made.sha256, "m", "9" * 64, replace(asked, server_round=10**9)),
    ):
        with pytest.raises(RedactedError):
            site.answer(request)
    written = [p for name in ("log", "state") for p in kit.path(name).rglob("*") if p.is_file()]
    assert sum(path.stat().st_size for path in written) < 20_000


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become other users")
def test_the_courier_cannot_read_what_is_the_agents(listening, kit):
    """In a child that gives up root for good: the socket answers, the files do not open."""
    import pwd

    courier = pwd.getpwnam("nobody")
    agent = listening(Echo(), courier_user="nobody")
    for folder in [kit.folder, *Path(kit.folder).parents]:
        if folder.stat().st_uid == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o711)
    kit.path("state").mkdir(mode=0o700, exist_ok=True)
    child = os.fork()
    if child == 0:
        worked = 0
        try:
            os.setgroups([courier.pw_gid])
            os.setgid(courier.pw_gid)
            os.setuid(courier.pw_uid)
            worked += agent.answer(Request("hello", payload=b"x")).payload == b"x"
            for name in ("identity.key", "site.key", "state/x", "log/site.jsonl"):
                try:
                    kit.path(name).read_bytes()
                except (PermissionError, FileNotFoundError) as error:
                    worked += isinstance(error, PermissionError) or name == "log/site.jsonl"
        finally:
            os._exit(worked)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
