"""The privacy ledger: what is charged, and what crashes, old backups and insiders cannot undo."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from samaritan.errors import PrivacyError
from samaritan.keys import Identity
from samaritan.privacy.accounting import Spending, epsilon_of
from samaritan.privacy.cohort import cohort_root, pseudonyms
from samaritan.privacy.ledger import Charge, Cohort, Question, open_ledger, resync, verify

DELTA = 1e-5
PATIENTS = ("anna", "bertha", "clara")
NOISE = 100.0  # as an accountant is quicker with much
ANSWER = b"a noisy update"


@pytest.fixture
def identity() -> Identity:
    return Identity(Ed25519PrivateKey.generate())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "ledger"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return tmp_path / "copy"


def _question(server_round: int = 1, plan: str = "plan") -> Question:
    return Question(plan, server_round, f"model {server_round}")


def _charge(server_round: int = 1, plan: str = "plan", **changes: Any) -> Charge:
    charge = Charge(
        question=_question(server_round, plan),
        run_id="run",
        budget=50.0,
        delta=DELTA,
        noise_multiplier=NOISE,
        clip_norm=1.0,
        sampling_rate=1.0,
        steps=2,
        records_public=300,
        slices_per_patient=8,
    )
    return replace(charge, **changes)


def _epsilon(steps: int) -> float:
    return epsilon_of([Spending(1.0, NOISE, steps)], DELTA).pld


def _rounds(cohort: Cohort, *numbers: int) -> None:
    for number in numbers:
        cohort.commit(cohort.reserve(_charge(number)), ANSWER, 2)


def _fill(folder: Path, identity: Identity, copy: Path | None, *numbers: int) -> str:
    with open_ledger(folder, identity, copy) as ledger:
        cohort = ledger.cohort(PATIENTS)
        _rounds(cohort, *numbers)
        return cohort.head


def _spent(folder: Path, identity: Identity, copy: Path | None = None) -> float:
    with open_ledger(folder, identity, copy) as ledger:
        return ledger.cohort(PATIENTS).spent(DELTA).pld


def _file(folder: Path) -> Path:
    (path,) = folder.glob("*.jsonl")
    return path


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _file(folder).read_bytes().splitlines()]


def _refused(code: str, act: Callable[[], object]) -> PrivacyError:
    with pytest.raises(PrivacyError) as caught:
        act()
    assert caught.value.code == code
    return caught.value


def _in_child(act: Callable[[], object]) -> int:
    """Runs something in a process of its own; its exit status, negative after a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# --- cohorts


def test_the_root_is_that_of_rfc_6962() -> None:
    """The reference vectors of Certificate Transparency."""
    leaves = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657"]
    leaves.append("606162636465666768696a6b6c6d6e6f")
    assert [cohort_root(leaves[:number])[:16] for number in (0, 1, 2, 3, 5, 6, 7, 8)] == [
        "e3b0c44298fc1c14", "6e340b9cffb37a98", "fac54203e7cc696c", "aeb6bcfe274b70a1",
        "4e3bbb1f7b478dcf", "76e67dadbcdf1e10", "ddb89be403809e32", "5dc9da79a70659a9",
    ]  # fmt: skip


def test_pseudonyms_depend_on_the_set_of_patients_and_the_secret_alone() -> None:
    names = pseudonyms(["b", "a", "b"], b"s" * 32)
    assert names == sorted(hmac.digest(b"s" * 32, name, "sha256").hex() for name in (b"a", b"b"))
    assert names == pseudonyms(iter("ab"), b"s" * 32)
    assert set(names).isdisjoint(pseudonyms("ab", b"t" * 32))


def test_no_patient_id_is_written_and_only_the_owner_can_read(
    folder: Path, copy: Path, identity: Identity
) -> None:
    folder.mkdir(0o755)
    _fill(folder, identity, copy, 1)
    for place in (folder, copy, folder / "outbox"):
        assert place.stat().st_mode & 0o777 == 0o700
        for path in (entry for entry in place.iterdir() if entry.is_file()):
            assert path.stat().st_mode & 0o777 == 0o600
            assert not any(name.encode() in path.read_bytes() for name in PATIENTS)


def test_a_cohort_without_patients_is_refused(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        _refused("SAM-P111", lambda: ledger.cohort([]))


# --- charges


def test_a_reservation_charges_all_planned_steps_and_is_never_refunded(
    folder: Path, identity: Identity
) -> None:
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        cohort.reserve(_charge())
        second = cohort.reserve(_charge())
        cohort.commit(second, ANSWER, steps_done=1)
        assert cohort.spent(DELTA).pld == _epsilon(4)
    assert _spent(folder, identity) == _epsilon(4)
    first, second_record = (r for r in _records(folder) if r["type"] == "reserve")
    assert (first["attempt"], second_record["attempt"]) == (1, 2)
    assert first["instance_id"] != second_record["instance_id"]


def test_the_record_says_what_was_promised(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        ledger.cohort(PATIENTS).reserve(_charge(3, sampling_rate=0.25))
    record = _records(folder)[1]
    assert record["n_patients_public"] == 300, "as published, not the three there are"
    assert (record["sigma"], record["sampling"], record["steps_planned"]) == ("100.0", "0.25", 2)
    assert (record["adjacency"], record["unit"], record["round"]) == ("add/remove", "patient", 3)
    spent = epsilon_of([Spending(0.25, NOISE, 2)], DELTA)
    assert float(record["accountant"]["eps_after"]) == spent.pld
    assert float(record["accountant"]["eps_rdp"]) == spent.rdp
    assert float(record["accountant"]["eps_before"]) == 0


def test_the_last_round_within_the_budget_is_the_last(folder: Path, identity: Identity) -> None:
    budget = _epsilon(6)
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        for number in (1, 2, 3):
            cohort.reserve(_charge(number, budget=budget))
        before = _file(folder).read_bytes()
        error = _refused("SAM-P101", lambda: cohort.reserve(_charge(4, budget=budget)))
        assert f"{_epsilon(6):.4f} to {_epsilon(8):.4f}" in error.message
        assert _file(folder).read_bytes() == before
        cohort.reserve(_charge(4, budget=_epsilon(8)))


def test_what_else_is_released_is_charged_too(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        cohort.reserve(_charge(other_releases={"count of cases": Spending(1.0, NOISE, 3)}))
        assert cohort.spent(DELTA).pld == _epsilon(5)


def test_patients_share_their_budget_across_studies_and_cohorts(
    folder: Path, identity: Identity
) -> None:
    with open_ledger(folder, identity) as ledger:
        one, two, three = (ledger.cohort(ids) for ids in ("ab", "bc", "cd"))
        one.reserve(_charge(1, plan="x", run_id="x"))
        two.reserve(_charge(1, plan="y", run_id="y", steps=4))
        assert one.spent(DELTA).pld == two.spent(DELTA).pld == _epsilon(6)
        assert three.spent(DELTA).pld == _epsilon(4), "no patient of the first"
        assert ledger.cohort("e").spent(DELTA).pld == 0
        renamed = _charge(1, plan="z", run_id="z", budget=_epsilon(6))
        _refused("SAM-P101", lambda: one.reserve(renamed))


def test_leaving_a_patient_out_gives_nothing_back(folder: Path, identity: Identity) -> None:
    _fill(folder, identity, None, 1, 2)
    with open_ledger(folder, identity) as ledger:
        fewer, more = ledger.cohort(PATIENTS[1:]), ledger.cohort([*PATIENTS, "dora"])
        assert fewer.spent(DELTA).pld == more.spent(DELTA).pld == _epsilon(4)
        assert fewer.head.startswith("0:")


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("nan")},
        {"noise_multiplier": float("inf")},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.1},
        {"steps": 0},
        {"steps": -3},
        {"steps": 1.5},
        {"delta": 0.0},
        {"delta": 1 / 300},
        {"budget": float("inf")},
        {"budget": float("nan")},
        {"clip_norm": 0.0},
        {"other_releases": {"free": Spending(1.0, float("inf"), 1)}},
    ],
)
def test_a_charge_that_makes_no_sense_is_refused(
    folder: Path, identity: Identity, changes: dict[str, Any]
) -> None:
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        _refused("SAM-P108", lambda: cohort.reserve(_charge(**changes)))
        assert cohort.head.startswith("0:")


def test_a_plan_keeps_its_cap_of_slices_whoever_lowers_it(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        ledger.cohort(PATIENTS).reserve(_charge(1))
        cohort = ledger.cohort(PATIENTS[:2])
        error = _refused("SAM-P106", lambda: cohort.reserve(_charge(2, slices_per_patient=4)))
        assert "4" in error.message
        assert "8" in error.message
        cohort.reserve(_charge(2, plan="other", slices_per_patient=4))


def test_epsilons_of_two_units_are_not_added(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        ledger.cohort(PATIENTS).reserve(_charge(unit="slice"))
        _refused("SAM-P106", lambda: ledger.cohort(PATIENTS).reserve(_charge(2)))


def test_more_work_than_was_charged_is_not_committed(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        one = cohort.reserve(_charge())
        _refused("SAM-P109", lambda: cohort.commit(one, ANSWER, steps_done=3))
        assert cohort.answered(_question()) is None
        cohort.commit(one, ANSWER, steps_done=2)
        _refused("SAM-P109", lambda: cohort.commit(one, b"another", 2))
        other = ledger.cohort(["dora"])
        _refused("SAM-P109", lambda: other.commit(cohort.reserve(_charge(2)), ANSWER, 2))


def test_a_closed_account_stays_charged_and_closed(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        _rounds(cohort, 1)
        cohort.close("consent withdrawn")
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        _refused("SAM-P110", lambda: cohort.reserve(_charge(2)))
        assert cohort.spent(DELTA).pld == _epsilon(2)


# --- answers


def test_the_same_question_gets_the_same_bytes_for_nothing(
    folder: Path, identity: Identity
) -> None:
    head = _fill(folder, identity, None, 1, 2)
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        assert cohort.answered(_question(2)) == ANSWER
        for other in (
            _question(3),
            _question(2, plan="other"),
            replace(_question(2), model_in_hash="another"),
        ):
            assert cohort.answered(other) is None
        assert ledger.cohort(PATIENTS[:2]).answered(_question(2)) is None
        assert cohort.head == head


@pytest.mark.parametrize("damage", [lambda p: p.write_bytes(ANSWER + b"!"), Path.unlink])
def test_a_damaged_or_missing_answer_is_paid_anew(
    folder: Path, identity: Identity, damage: Callable[[Path], object], caplog: Any
) -> None:
    _fill(folder, identity, None, 1)
    damage(folder / "outbox" / hashlib.sha256(ANSWER).hexdigest())
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        assert cohort.answered(_question(1)) is None
        assert "paid for again" in caplog.text
        cohort.commit(cohort.reserve(_charge(1)), b"fresh noise", 2)
        assert cohort.answered(_question(1)) == b"fresh noise"
        assert cohort.spent(DELTA).pld == _epsilon(4)


# --- one process


def test_a_second_process_is_refused_and_told_which_is_the_first(
    folder: Path, identity: Identity
) -> None:
    def second() -> None:
        with open_ledger(folder, identity):
            pass

    with open_ledger(folder, identity):
        error = _refused("SAM-P102", second)
        assert f"process {os.getpid()} " in error.message
        assert _in_child(second) == 1
    assert _in_child(second) == 0, "the lock is gone with its holder"


# --- older, lost and foreign ledgers


@pytest.mark.parametrize("lost", ["lines", "file", "folder"])
def test_an_older_ledger_is_refused_and_resync_charges_what_it_lost(
    folder: Path, copy: Path, identity: Identity, lost: str
) -> None:
    _fill(folder, identity, copy, 1)
    old = _file(folder).read_bytes()
    head = _fill(folder, identity, copy, 2, 3)
    if lost == "lines":
        _file(folder).write_bytes(old)
    elif lost == "file":
        _file(folder).unlink()
    else:
        shutil.rmtree(folder)
    error = _refused("SAM-P103", lambda: _spent(folder, identity, copy))
    assert error.message.startswith("LEDGER ROLLED BACK")
    assert f"samaritan privacy ledger resync {folder} --from {copy}" in error.hint
    assert resync(folder, copy, identity) == {"lines": 4, "file": 7, "folder": 7}[lost]
    assert _spent(folder, identity, copy) == _epsilon(6)
    with open_ledger(folder, identity, copy) as ledger:
        ledger.check_acknowledged(head)


def test_a_copy_that_lacks_lines_is_completed(
    folder: Path, copy: Path, identity: Identity, caplog: Any
) -> None:
    _fill(folder, identity, copy, 1)
    name = _file(folder).name
    lines = (copy / name).read_bytes().splitlines(keepends=True)
    for kept in (b"".join(lines[:-1]), b"".join(lines[:-1]) + lines[-1][:40], b""):
        (copy / name).write_bytes(kept)
        assert [f.what for f in verify(folder, identity.public, copy)] == ["folder and copy differ"]
        assert _spent(folder, identity, copy) == _epsilon(2)
        assert (copy / name).read_bytes() == _file(folder).read_bytes()
    shutil.rmtree(copy)
    caplog.clear()
    assert _spent(folder, identity, copy) == _epsilon(2)
    assert "lacked 3 lines" in caplog.text
    assert verify(folder, identity.public, copy) == []


def test_a_head_that_the_server_knows_is_an_ancestor_or_the_ledger_is_old(
    folder: Path, identity: Identity
) -> None:
    heads = [_fill(folder, identity, None, 1)]
    backup = _file(folder).read_bytes()
    heads += [_fill(folder, identity, None, number) for number in (2, 3)]
    with open_ledger(folder, identity) as ledger:
        for head in heads:
            ledger.check_acknowledged(head)
        _refused("SAM-P103", lambda: ledger.check_acknowledged("f" * 64))
    _file(folder).write_bytes(backup)
    with open_ledger(folder, identity) as ledger:
        ledger.check_acknowledged(heads[0])
        error = _refused("SAM-P103", lambda: ledger.check_acknowledged(heads[2]))
        assert error.message.startswith("LEDGER ROLLED BACK")
        cohort = ledger.cohort(PATIENTS)
        cohort.import_external([Spending(1.0, NOISE, 4)], stands_for=heads[2])
        ledger.check_acknowledged(heads[2])
        _refused("SAM-P103", lambda: ledger.check_acknowledged(heads[1]))
    assert _spent(folder, identity) == _epsilon(6)


def test_ledgers_that_parted_charge_what_either_has(
    folder: Path, copy: Path, tmp_path: Path, identity: Identity
) -> None:
    _fill(folder, identity, copy, 1)
    clone = tmp_path / "clone"
    shutil.copytree(folder, clone)
    _fill(folder, identity, copy, 2, 3)
    foreign = _fill(clone, identity, None, 4)
    _refused("SAM-P103", lambda: _spent(folder, identity, clone))
    kept = _file(clone).read_bytes()
    assert resync(folder, clone, identity) == 2
    assert _spent(folder, identity) == _epsilon(8)
    assert kept in [path.read_bytes() for path in (folder / "aside").iterdir()]
    assert resync(folder, clone, identity) == 0, "nothing is charged twice"
    with open_ledger(folder, identity, clone) as ledger:
        ledger.check_acknowledged(foreign)
    assert _spent(folder, identity, copy) == _epsilon(8), "the copy was only behind"


def test_a_new_key_needs_a_resync_which_charges_all_that_the_old_one_signed(
    folder: Path, tmp_path: Path, identity: Identity
) -> None:
    _fill(folder, identity, None, 1, 2)
    new = Identity(Ed25519PrivateKey.generate())
    error = _refused("SAM-P104", lambda: _spent(folder, new))
    assert "another key" in error.message
    resync(folder, tmp_path / "nothing", new)
    assert _spent(folder, new) == _epsilon(4)


def test_the_secret_is_restored_from_the_copy_and_never_made_anew(
    folder: Path, copy: Path, identity: Identity
) -> None:
    _fill(folder, identity, copy, 1)
    (folder / "secret").unlink()
    assert _spent(folder, identity, copy) == _epsilon(2)
    (folder / "secret").write_bytes(bytes(32))
    _refused("SAM-P107", lambda: _spent(folder, identity, copy))
    _refused("SAM-P107", lambda: resync(folder, copy, identity))
    for place in (folder, copy):
        (place / "secret").write_bytes(bytes(32))
    _refused("SAM-P107", lambda: _spent(folder, identity, copy))
    for place in (folder, copy):
        (place / "secret").unlink()
    _refused("SAM-P107", lambda: _spent(folder, identity, copy))


# --- damage


def _lower_the_noise(lines: list[bytes]) -> None:
    lines[3] = lines[3].replace(b'"sigma":"100.0"', b'"sigma":"200.0"')


def _drop(lines: list[bytes]) -> None:
    del lines[3]


def _swap(lines: list[bytes]) -> None:
    lines[3], lines[4] = lines[4], lines[3]


def _repeat(lines: list[bytes]) -> None:
    lines.insert(3, lines[2])


def _garbage(lines: list[bytes]) -> None:
    lines[3] = b"\xff\x00{" + bytes([10])


def _spaces(lines: list[bytes]) -> None:
    lines[3] = lines[3].replace(b",", b", ", 1)


def _sign_with_another_key(lines: list[bytes]) -> None:
    record = json.loads(lines[3])
    other = Identity(Ed25519PrivateKey.generate())
    del record["signature"]
    record |= {"sigma": "200.0", "key_id": other.public.hex()}
    text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    record["signature"] = other.sign(b"samaritan privacy ledger\n" + text).hex()
    lines[3] = json.dumps(record, sort_keys=True, separators=(",", ":")).encode() + b"\n"


@pytest.mark.parametrize(
    "damage",
    [_lower_the_noise, _drop, _swap, _repeat, _garbage, _spaces, _sign_with_another_key],
)
def test_a_changed_line_is_named_and_refused_and_the_copy_restores_it(
    folder: Path, copy: Path, identity: Identity, damage: Callable[[list[bytes]], None]
) -> None:
    _fill(folder, identity, copy, 1, 2)
    intact = _file(folder).read_bytes()
    lines = intact.splitlines(keepends=True)
    damage(lines)
    _file(folder).write_bytes(b"".join(lines))
    for other in (None, copy):
        error = _refused("SAM-P104", lambda other=other: _spent(folder, identity, other))
        assert error.message.startswith("line 4 of ")
    assert [(f.line, f.file) for f in verify(folder, identity.public)] == [(4, _file(folder).name)]
    assert _file(folder).read_bytes() == b"".join(lines), "nothing is mended in silence"
    resync(folder, copy, identity)
    foreign = damage is _sign_with_another_key  # which may have been this site's: it counts
    assert _spent(folder, identity, copy) >= _epsilon(4)
    assert foreign or _spent(folder, identity, copy) == _epsilon(4)
    assert _file(folder).read_bytes().startswith(intact)


def test_a_line_of_another_history_is_refused_though_this_site_signed_it(
    folder: Path, tmp_path: Path, identity: Identity
) -> None:
    _fill(folder, identity, None, 1)
    clone = tmp_path / "clone"
    shutil.copytree(folder, clone)
    _fill(folder, identity, None, 2)
    with open_ledger(clone, identity) as ledger:
        ledger.cohort(PATIENTS).reserve(_charge(2, steps=1))
    lines = _file(folder).read_bytes().splitlines(keepends=True)
    lines[3] = _file(clone).read_bytes().splitlines(keepends=True)[3]
    _file(folder).write_bytes(b"".join(lines))
    error = _refused("SAM-P104", lambda: _spent(folder, identity))
    assert error.message.startswith("line 5 of ")
    assert error.message.endswith("it does not follow the line before")


def test_the_last_line_is_guarded_by_its_signature(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        ledger.cohort(PATIENTS).reserve(_charge())
    text = _file(folder).read_bytes()
    _file(folder).write_bytes(text.replace(b'"steps_planned":2', b'"steps_planned":1'))
    error = _refused("SAM-P104", lambda: _spent(folder, identity))
    assert "signature" in error.message


def test_one_cohort_cannot_take_the_place_of_another(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        spent, fresh = ledger.cohort(PATIENTS), ledger.cohort(["dora"])
        spent.reserve(_charge())
    shutil.copy(folder / f"{fresh.root}.jsonl", folder / f"{spent.root}.jsonl")
    error = _refused("SAM-P104", lambda: _spent(folder, identity))
    assert error.message.startswith("line 1 of ")
    assert [finding.line for finding in verify(folder, identity.public)] == [1]


def test_charges_after_a_false_line_count_even_without_a_copy(
    folder: Path, tmp_path: Path, identity: Identity
) -> None:
    _fill(folder, identity, None, 1, 2, 3)
    lines = _file(folder).read_bytes().splitlines(keepends=True)
    lines[3] = b"damaged\n"
    _file(folder).write_bytes(b"".join(lines))
    resync(folder, tmp_path / "nothing", identity)
    assert _spent(folder, identity) == _epsilon(4), "the charge in the damaged line is lost"


def test_a_genesis_of_other_patients_is_found(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        root = ledger.cohort(PATIENTS).root
        fields = {"ledger_id": "1", "cohort_root": "00", "pseudonyms": ["00"], "secret_hash": "x"}
        ledger.book.record("00", "genesis", fields)
    found = verify(folder, identity.public)
    assert {(f.file, f.line) for f in found} == {("00.jsonl", 1)}
    assert len(found) == 2
    assert root not in str(found)


@pytest.mark.parametrize("kept", [0.01, 0.3, 0.999])
def test_a_line_cut_short_is_kept_aside_and_noted(
    folder: Path, identity: Identity, kept: float, caplog: Any
) -> None:
    _fill(folder, identity, None, 1)
    whole = _file(folder).read_bytes()
    with open_ledger(folder, identity) as ledger:
        ledger.cohort(PATIENTS).reserve(_charge(2))
    line = _file(folder).read_bytes()[len(whole) :]
    fragment = line[: max(1, int(kept * len(line)))]
    _file(folder).write_bytes(whole + fragment)
    assert [finding.line for finding in verify(folder, identity.public)] == [4]
    assert _spent(folder, identity) == _epsilon(2)
    assert "cut short" in caplog.text
    note = _records(folder)[-1]
    assert note["type"] == "repair"
    assert note["fragment_sha256"] == hashlib.sha256(fragment).hexdigest()
    assert note["fragment_bytes"] == len(fragment)
    (aside,) = (folder / "aside").iterdir()
    assert aside.read_bytes() == fragment
    assert _file(folder).read_bytes().startswith(whole)
    assert verify(folder, identity.public) == []


def test_a_last_line_that_lacks_only_its_end_still_counts(folder: Path, identity: Identity) -> None:
    with open_ledger(folder, identity) as ledger:
        ledger.cohort(PATIENTS).reserve(_charge())
    _file(folder).write_bytes(_file(folder).read_bytes()[:-1])
    assert _spent(folder, identity) == _epsilon(2)


def test_a_line_cut_short_that_the_copy_has_whole_is_a_rollback(
    folder: Path, copy: Path, identity: Identity
) -> None:
    _fill(folder, identity, copy, 1)
    _file(folder).write_bytes(_file(folder).read_bytes()[:-30])
    _refused("SAM-P103", lambda: _spent(folder, identity, copy))
    resync(folder, copy, identity)
    assert _spent(folder, identity, copy) == _epsilon(2)


# --- disks


def test_a_full_disk_stops_before_anything_is_spent(
    folder: Path, copy: Path, identity: Identity
) -> None:
    _fill(folder, identity, copy, 1)
    before = _file(folder).read_bytes()

    def reserve() -> None:
        with open_ledger(folder, identity, copy) as ledger:
            cohort = ledger.cohort(PATIENTS)
            resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, -1))
            _refused("SAM-P105", lambda: cohort.reserve(_charge(2)))
            assert cohort.spent(DELTA).pld == _epsilon(2)
            assert _file(folder).read_bytes() == before, "the part that was written is gone"
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, -1))
            cohort.reserve(_charge(2))

    assert _in_child(reserve) == 0
    assert _spent(folder, identity, copy) == _epsilon(4)
    assert verify(folder, identity.public, copy) == []


def test_a_record_is_on_both_disks_before_anybody_works_on_its_strength(
    folder: Path, copy: Path, identity: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []

    def fsync(descriptor: int) -> None:
        synced.append(
            (str(Path(f"/proc/self/fd/{descriptor}").readlink()), os.fstat(descriptor).st_size)
        )
        _FSYNC(descriptor)

    with open_ledger(folder, identity, copy) as ledger:
        cohort = ledger.cohort(PATIENTS)
        monkeypatch.setattr(os, "fsync", fsync)
        cohort.reserve(_charge())
        monkeypatch.undo()
    paths = [str(path) for path in (_file(folder), folder, _file(copy), copy)]
    assert [path for path, _ in synced] == paths
    assert {size for path, size in synced if path in paths[::2]} == {len(_file(copy).read_bytes())}


def test_a_copy_out_of_reach_stops_before_anything_is_spent(
    folder: Path, copy: Path, identity: Identity
) -> None:
    with open_ledger(folder, identity, copy) as ledger:
        cohort = ledger.cohort(PATIENTS)
        before = _file(folder).read_bytes()
        name = _file(copy)
        name.unlink()
        _refused("SAM-P105", lambda: cohort.reserve(_charge()))
        name.mkdir()
        _refused("SAM-P105", lambda: cohort.reserve(_charge()))
        name.rmdir()
        name.write_bytes(before)
        assert _file(folder).read_bytes() == before
        cohort.reserve(_charge())


def test_a_file_that_somebody_else_changed_is_not_written_to(
    folder: Path, identity: Identity
) -> None:
    with open_ledger(folder, identity) as ledger:
        cohort = ledger.cohort(PATIENTS)
        old = _file(folder).read_bytes()
        cohort.reserve(_charge())
        _file(folder).write_bytes(old)
        _refused("SAM-P105", lambda: cohort.reserve(_charge(2)))


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(
    tmp_path: Path, identity: Identity
) -> None:
    (tmp_path / "file").touch()
    _refused("SAM-P105", lambda: _spent(tmp_path / "file", identity))


# --- crashes


@pytest.fixture
def known_costs() -> None:
    """Fills the cache of the accountant, so that children need not compute."""
    for number in range(100):
        _epsilon(2 * number)


def _site(folder: Path, copy: Path, identity: Identity, work: Path, rounds: Sequence[int]) -> None:
    """What an agent does; the first gradient of a round is on the disk before the round goes on."""
    for number in rounds:
        with open_ledger(folder, identity, copy) as ledger:
            cohort = ledger.cohort(PATIENTS)
            if cohort.answered(_question(number)) is not None:
                continue
            reservation = cohort.reserve(_charge(number))
            descriptor = os.open(work, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            _WRITE(descriptor, b"gradient\n")
            _FSYNC(descriptor)
            os.close(descriptor)
            cohort.commit(reservation, ANSWER + b"%d" % number, 2)


_WRITE, _FSYNC = os.write, os.fsync


def _check_after_crash(folder: Path, copy: Path, identity: Identity, work: Path) -> int:
    """The ledger opens, is sound, and counts no less than was done; how much was done."""
    done = work.read_bytes().count(b"\n") if work.exists() else 0
    with open_ledger(folder, identity, copy) as ledger:
        cohort = ledger.cohort(PATIENTS)
        assert cohort.spent(DELTA).pld >= _epsilon(2 * done)
        charged = sum(r["type"] == "reserve" for r in ledger.book.chains[cohort.root].records)
        assert charged >= done
    assert verify(folder, identity.public, copy) == []
    return done


def _die_at(number: int, half: bool) -> None:
    """From now on the write, sync or rename of that number is the last thing this process does."""
    calls = iter(range(1, 10**6))

    def shim(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            if next(calls) == number:
                if half and real is _WRITE:
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return called

    os.write, os.fsync = shim(os.write), shim(os.fsync)
    Path.replace = shim(Path.replace)  # type: ignore[method-assign]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.usefixtures("known_costs")
def test_a_process_killed_at_any_write_sync_or_rename_leaves_a_sound_ledger(
    folder: Path, copy: Path, tmp_path: Path, identity: Identity, half: bool
) -> None:
    work = tmp_path / "work"

    def site(number: int) -> None:
        _die_at(number, half)
        _site(folder, copy, identity, work, [number])

    for number in range(1, 100):
        status = _in_child(lambda number=number: site(number))
        _check_after_crash(folder, copy, identity, work)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert number > 10, "as many places to die at"
    with open_ledger(folder, identity, copy) as ledger:
        assert ledger.cohort(PATIENTS).answered(_question(number)) is not None


@pytest.mark.usefixtures("known_costs")
def test_a_process_killed_at_random_leaves_a_sound_ledger(
    folder: Path, copy: Path, tmp_path: Path, identity: Identity
) -> None:
    work, seed = tmp_path / "work", random.randrange(10**6)  # noqa: S311
    chance = random.Random(seed)  # noqa: S311
    done = 0
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            _site(folder, copy, identity, work, range(90))
            os._exit(0)
        time.sleep(chance.uniform(0.02, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        now = _check_after_crash(folder, copy, identity, work)
        assert now >= done, seed
        done = now
    assert done > 0


@pytest.fixture(autouse=True)
def _no_umask_surprise() -> Iterator[None]:
    """Modes are our own, whatever the shell's are."""
    old = os.umask(0)
    yield
    os.umask(old)
