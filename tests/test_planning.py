"""Plans: what makes none, what is signed, and that nothing else than what was signed is read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from samaritan import __version__
from samaritan.audit.log import Log
from samaritan.config import config_sha256, load_config, parse_config
from samaritan.errors import SamaritanError, TrustError
from samaritan.keys import Identity, is_signed, load_identity, make_identity
from samaritan.lines import canonical
from samaritan.models.bases import get_base
from samaritan.plan import (
    Plan,
    PlannedBase,
    PlannedSite,
    SignedPlan,
    read_plan,
    require_current,
    sign_plan,
    write_plan,
)
from samaritan.provision.authority import members, open_authority
from samaritan.provision.kits import provision
from samaritan.provision.requests import fingerprint
from server import planning
from server.bundle import bundle_sha256
from server.planning import make_plan

SITES = ("Ahus", "Bern", "Chur", "Doha")
TODAY = date(2027, 3, 1)
CONFIG: dict[str, Any] = {
    "name": "liver",
    "rounds": 3,
    "model": {"image_size": 32},
    "peft": {"rank": 2},
    "data": {"source": "folder", "classes": {"liver": 1, "vessel": 2}},
    "federation": {"min_sites": 3},
}
STUDY: dict[str, Any] = {
    "study": "liver-1",
    "title": "Liver",
    "purpose": "To find\nlesions.",
    "contacts": ["Dr. A", "Dr. Ö"],
    "ethics": ["EK 12/2027"],
    "valid_days": 30,
    "config": "run.yaml",
}


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on the disk having the files."""
    monkeypatch.setattr("samaritan.files.os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def consortium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A consortium of four sites with certificates."""
    folder = tmp_path_factory.mktemp("consortium")
    project = {
        "project": "liver",
        "title": "Liver",
        "server": {"hosts": ["localhost"], "port": 9443},
        "sites": [{"name": name} for name in SITES],
        "keys": "shipped",
    }
    (folder / "project.yaml").write_text(yaml.safe_dump(project))
    provision(folder / "project.yaml", folder / "kits")
    return folder / "kits"


@pytest.fixture
def make(consortium: Path, tmp_path: Path) -> Callable[..., SignedPlan]:
    """A signed plan: ``make({"sites": [...]}, {"rounds": 4}, "training.seed=1")``."""

    def plan(
        study: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        *overrides: str,
        authority: Path | None = None,
    ) -> SignedPlan:
        tree = {k: v for k, v in {**STUDY, **(study or {})}.items() if v is not None}
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(tree), "utf-8")
        merged = {**CONFIG}
        for key, value in (config or {}).items():
            merged[key] = {**CONFIG.get(key, {}), **value} if isinstance(value, dict) else value
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(merged), "utf-8")
        where = authority or consortium / "authority"
        return make_plan(tmp_path / "study.yaml", where, list(overrides), TODAY)

    return plan


@pytest.fixture(scope="module")
def base_sha256() -> str:
    from samaritan.models.adapter import build_adapted

    return build_adapted(parse_config(CONFIG), 2).base.sha256


def error_of(call: Callable[[], Any]) -> SamaritanError:
    with pytest.raises(SamaritanError) as caught:
        call()
    return caught.value


# From a description to a plan.


def test_a_plan_says_all_that_will_be_done(
    make: Any, consortium: Path, tmp_path: Path, base_sha256: str
) -> None:
    signed = make()
    plan, known = signed.plan, members(consortium / "authority")
    assert (plan.study, plan.title, plan.purpose) == ("liver-1", "Liver", "To find\nlesions.")
    assert (plan.contacts, plan.ethics) == (("Dr. A", "Dr. Ö"), ("EK 12/2027",))
    assert (plan.created, plan.valid_until) == (TODAY, date(2027, 3, 31))
    assert (plan.samaritan, plan.bundle_sha256) == (__version__, bundle_sha256())
    assert plan.base == PlannedBase(name="tiny", sha256=base_sha256)
    assert plan.config == load_config(tmp_path / "run.yaml")
    assert plan.config_sha256 == config_sha256(plan.config)
    assert plan.sites == {
        name: PlannedSite(identity=known[name].identity, node=known[name].node_key)
        for name in SITES
    }
    assert (plan.training_sites, plan.observers) == (SITES, ())
    assert signed.signer == make_identity(consortium / "authority/plan.key").public
    assert signed.signer.hex() == (consortium / "authority/plan.pub").read_text().strip()


def test_all_sites_are_those_of_the_project(make: Any, consortium: Path, tmp_path: Path) -> None:
    """One that is still to send its request is not left out in silence."""
    authority = tmp_path / "authority"
    shutil.copytree(consortium / "authority", authority)
    assert set(make({"sites": None}, authority=authority).plan.sites) == set(
        members(consortium / "authority")
    )
    project = yaml.safe_load((authority / "project.yaml").read_text())
    project["sites"].append({**project["sites"][0], "name": "Newcomer"})
    (authority / "project.yaml").write_text(yaml.safe_dump(project))
    error = error_of(lambda: make({"sites": None}, authority=authority))
    assert (error.code, "Newcomer has no certificate" in error.message) == ("SAM-K312", True)


def test_a_site_whose_certificate_has_ended_is_in_no_plan(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "now", lambda: datetime(2099, 1, 1, tzinfo=UTC))
    error = error_of(make)
    assert (error.code, "had one until" in error.message) == ("SAM-K312", True)


@pytest.mark.parametrize("name", ["plan.key", "plan.pub", "ca.crt"])
def test_an_authority_that_is_not_whole_signs_nothing_and_gets_no_new_key(
    make: Any, consortium: Path, tmp_path: Path, name: str
) -> None:
    authority = tmp_path / "authority"
    shutil.copytree(consortium / "authority", authority)
    (authority / name).unlink()
    assert error_of(lambda: make(authority=authority)).code == "SAM-K102"
    assert not (authority / name).exists()


def test_a_plan_takes_the_place_of_no_other_file(
    make: Any, consortium: Path, tmp_path: Path, samaritan: Any
) -> None:
    make()  # writes the descriptions
    words = ("plan", "make", tmp_path / "study.yaml", "--authority", consortium / "authority")
    before = (tmp_path / "run.yaml").read_text()
    done = samaritan(*words, "--out", tmp_path / "run.yaml")
    assert (done.code, "SAM-K315" in done.err) == (1, True)
    assert (tmp_path / "run.yaml").read_text() == before
    for _ in range(2):  # a plan may be made again
        done = samaritan(*words, "--out", tmp_path / "plan.json")
        assert (done.code, "held plan" in done.out) == (0, False)
    other = samaritan(*words, "--out", tmp_path / "plan.json", "--set", "seed=77")
    assert "held plan" in other.out
    assert "and does no more" in other.out


def test_sites_can_be_chosen_and_some_may_only_score(make: Any) -> None:
    study = {"sites": ["Doha", "Ahus", "Bern", "Chur"]}
    plan = make(study, {"data": {"held_out_sites": ["Bern"]}}).plan
    assert plan.training_sites == ("Ahus", "Chur", "Doha")
    assert plan.observers == ("Bern",)
    assert set(make({"sites": ["Ahus", "Bern", "Chur"]}).plan.sites) == {"Ahus", "Bern", "Chur"}


def test_the_key_of_each_site_stands_beside_its_fingerprint(
    make: Any, consortium: Path, tmp_path: Path, samaritan: Any
) -> None:
    """It is what `samaritan audit log verify --key` takes."""
    signed = make(None, {"data": {"held_out_sites": ["Bern"]}})
    write_plan(tmp_path / "plan.json", signed)
    public = load_identity(consortium / "sites" / "Bern" / "identity.key").public
    told = f"{fingerprint(public)} (key {public.hex()}) (only scores)"
    done = samaritan("plan", "show", tmp_path / "plan.json")
    assert (done.code, f"  Bern: {told}\n" in done.out) == (0, True)
    done = samaritan("plan", "show", tmp_path / "plan.json", "--json")
    assert json.loads(done.out)["sites"]["Bern"] == told
    log = Log(tmp_path / "log.jsonl", {"site": "Bern", "key": public.hex()}).path
    key = re.findall(
        r"Bern: .*\(key (\w+)\)", samaritan("plan", "show", tmp_path / "plan.json").out
    )
    assert samaritan("audit", "log", "verify", log, "--key", *key).code == 0


def test_overrides_are_in_the_plan(make: Any) -> None:
    assert make(None, None, "rounds=7").plan.config.rounds == 7


def test_a_path_never_gets_into_a_plan(
    make: Any, mini: Any, mini_file: Path, tmp_path: Path
) -> None:
    import hashlib

    digest = hashlib.sha256(mini_file.read_bytes()).hexdigest()
    model = {"base": "mini", "checkpoint": str(mini_file), "checkpoint_sha256": digest}
    signed = make(None, {"model": model | {"image_size": 64}})
    assert signed.plan.config.model.checkpoint is None
    assert signed.plan.config.model.checkpoint_sha256 is None
    assert signed.plan.base.name == "mini"
    write_plan(tmp_path / "plan.json", signed)
    text = (tmp_path / "plan.json").read_text()
    assert str(mini_file) not in text
    assert str(tmp_path) not in text
    # The hash of the weights says which file is meant: another file, another plan.
    assert get_base("mini") is mini
    assert len(signed.plan.base.sha256) == 64
    assert signed.plan.base.sha256 != make().plan.base.sha256


@pytest.mark.parametrize(
    ("study", "code", "said"),
    [
        ({"titel": "x"}, "SAM-C309", "titel"),
        ({"sites": "Ahus"}, "SAM-C309", "sites"),
        ({"valid_days": 0}, "SAM-C309", "valid_days"),
        ({"valid_days": 4000}, "SAM-C309", "valid_days"),
        ({"config": None}, "SAM-C309", "config"),
        ({"study": None}, "SAM-C309", "study"),
        ({"study": "../up"}, "SAM-K313", "study"),
        ({"study": ""}, "SAM-K313", "study"),
        ({"study": "a" * 65}, "SAM-K313", "study"),
        ({"config": "nowhere.yaml"}, "SAM-C101", "nowhere.yaml"),
        ({"sites": ["Ahus", "Bern", "Chur", "Oslo"]}, "SAM-K312", "Oslo has no certificate"),
        ({"sites": []}, "SAM-C226", "0 sites are asked"),
        ({"sites": ["Ahus", "Bern"]}, "SAM-C226", "3 usable replies"),
        ({"title": "Liver \x1b[2K\x1b[1A rounds: 1"}, "SAM-K313", "printable"),
        ({"purpose": "to find \u202e lesions"}, "SAM-K313", "printable"),
        ({"contacts": ["\x07"]}, "SAM-K313", "printable"),
        ({"ethics": ["EK\r"]}, "SAM-K313", "printable"),
    ],
)
def test_a_description_with_faults_makes_no_plan(
    make: Any, study: dict[str, Any], code: str, said: str
) -> None:
    error = error_of(lambda: make(study))
    assert error.code == code
    assert said in error.message


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"data": {"classes": None}}, "SAM-K313", "config.data.classes must name"),
        ({"data": {"source": "phantoms"}}, "SAM-K313", "must leave the cases to the sites"),
        ({"data": {"held_out_sites": ["Oslo"]}}, "SAM-K313", "held_out_sites names Oslo"),
        ({"federation": {"min_sites": None}}, "SAM-K313", "min_sites must say how many"),
        ({"federation": {"min_sites": 5}}, "SAM-C226", "needs 5 usable replies"),
        ({"data": {"held_out_sites": ["Ahus", "Bern"]}}, "SAM-C226", "2 sites are asked"),
        ({"federation": {"sites_per_round": 2}}, "SAM-C226", "2 sites are asked"),
        ({"federation": {"weighting": {"Oslo": 1.0}}}, "SAM-C228", "Oslo"),
        ({"peft": {"site_ranks": {"Oslo": 4}}}, "SAM-C228", "Oslo"),
        ({"roundz": 3}, "SAM-C103", "roundz"),
        ({"rounds": 0}, "SAM-C103", "rounds"),
        ({"model": {"base": "vit_b"}}, "SAM-M", ""),
        ({"model": {"base": "vit_z"}}, "SAM-C202", "vit_z"),
        ({"peft": {"preset": "nothing"}}, "SAM-C201", "nothing"),
        ({"strategy": "nothing"}, "SAM-C2", "nothing"),
    ],
)
def test_a_configuration_that_cannot_be_makes_no_plan(
    make: Any, config: dict[str, Any], code: str, said: str
) -> None:
    error = error_of(lambda: make(None, config))
    assert error.code.startswith(code)
    assert said in error.message


def test_a_partition_of_pretend_sites_makes_no_plan(make: Any) -> None:
    error = error_of(lambda: make(None, {"data": {"partition": "iid", "sites": 3}}))
    assert error.code in ("SAM-K313", "SAM-C103")


def test_a_revoked_site_is_in_no_plan(make: Any, consortium: Path, tmp_path: Path) -> None:
    import shutil

    own = tmp_path / "kits"
    shutil.copytree(consortium, own)
    with open_authority(own / "authority") as authority:
        authority.revoke("Chur")
    for study in (None, {"sites": ["Chur", "Ahus", "Bern"]}):
        error = error_of(lambda study=study: make(study, authority=own / "authority"))
        assert (error.code, "Chur was revoked" in error.message) == ("SAM-K312", True)
    others = {"sites": ["Ahus", "Bern", "Doha"]}
    assert set(make(others, authority=own / "authority").plan.sites) == {"Ahus", "Bern", "Doha"}


# What a plan may say.


def tree_of(**changes: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "schema": 1,
        "study": "trial",
        "created": TODAY.isoformat(),
        "valid_until": "2027-03-31",
        "samaritan": __version__,
        "bundle_sha256": "b" * 64,
        "config": parse_config(CONFIG).model_dump(mode="json"),
        "base": {"name": "tiny", "sha256": "5" * 64},
        "sites": {
            name: {"identity": name[0].lower() * 64, "node": f"ecdsa {name}"} for name in SITES
        },
    }
    return fields | changes


SITE = {"identity": "a" * 64, "node": "ecdsa x"}


def faults_of(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Plan.model_validate(tree_of(**changes))
    return str(caught.value)


def test_what_the_tree_says_is_a_plan() -> None:
    sites = {**tree_of()["sites"]}
    sites = {name: site | {"identity": f"{n:064x}"} for n, (name, site) in enumerate(sites.items())}
    assert Plan.model_validate(tree_of(sites=sites)).study == "trial"


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"study": "a/b"},
        {"study": ".hidden"},
        {"bundle_sha256": "B" * 64},
        {"bundle_sha256": "b" * 63},
        {"base": {"name": "tiny", "sha256": ""}},
        {"base": {"name": "tiny", "sha256": "5" * 64, "path": "/x"}},
        {"sites": {}},
        {"sites": {"a": {"identity": "x" * 64, "node": "n"}}},
        {"sites": {"a": {"identity": "a" * 64}}},
        {"code": "import os"},
        {"created": "yesterday"},
        {"valid_until": None},
        {"config": {"rounds": -1}},
        {"samaritan": None},
    ],
    ids=str,
)
def test_a_field_that_is_none_is_refused(changes: dict[str, Any]) -> None:
    faults_of(**changes)


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        (SITE, SITE | {"node": "ecdsa y"}, "two sites have the same identity"),
        (SITE, SITE | {"identity": "b" * 64}, "two sites have the same node key"),
        (
            SITE,
            {"identity": "b" * 64, "node": "ecdsa x node@b"},
            "two sites have the same node key",
        ),
    ],
)
def test_two_sites_are_two(one: Any, two: Any, said: str) -> None:
    assert said in faults_of(sites={"a": one, "b": two})


def test_all_faults_are_told_at_once() -> None:
    config = parse_config(
        CONFIG
        | {
            "model": {"checkpoint": "/srv/sam.pth"},
            "data": {"source": "phantoms"},
            "federation": {},
        }
    )
    said = faults_of(config=config.model_dump(mode="json"))
    for part in ("checkpoint is a path", "source: folder", "classes must", "min_sites must"):
        assert part in said


# Signatures.

KEY = Identity(Ed25519PrivateKey.generate())
OTHER = Identity(Ed25519PrivateKey.generate())


def plan_of(**changes: Any) -> Plan:
    sites = {
        name: {"identity": f"{number:064x}", "node": f"ecdsa {name}"}
        for number, name in enumerate(SITES)
    }
    return Plan.model_validate(tree_of(sites=sites) | changes)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    write_plan(path, sign_plan(plan_of(), KEY))
    return path


def test_what_is_written_is_read(written: Path) -> None:
    signed = sign_plan(plan_of(), KEY)
    assert read_plan(written) == read_plan(written, KEY.public) == signed
    assert read_plan(written).plan.sha256 == plan_of().sha256
    assert json.loads(written.read_text())["signer"] == KEY.public.hex()


def test_the_signature_is_over_the_content_and_for_plans_alone(written: Path) -> None:
    signed = read_plan(written)
    content = canonical(signed.plan.model_dump(mode="json", by_alias=True))
    assert is_signed(KEY.public, b"samaritan plan\n" + content, signed.signature)
    assert not is_signed(KEY.public, content, signed.signature)


def test_another_signer_does_not_count(written: Path, tmp_path: Path) -> None:
    assert error_of(lambda: read_plan(written, OTHER.public)).code == "SAM-K302"
    # One who names the right signer, or signs with a key of his own.
    tree = json.loads(written.read_text())
    forged = sign_plan(plan_of(title="another"), OTHER)
    for signer in (KEY.public.hex(), OTHER.public.hex()):
        own = tree | {
            "plan": forged.plan.model_dump(mode="json", by_alias=True),
            "signature": forged.signature.hex(),
            "signer": signer,
        }
        written.write_text(json.dumps(own))
        assert error_of(lambda: read_plan(written, KEY.public)).code == "SAM-K302"
    assert read_plan(written).signer == OTHER.public  # for a look at it


@pytest.mark.parametrize("mask", [0x01, 0x80])
def test_any_other_byte_is_refused(written: Path, mask: int) -> None:
    data = written.read_bytes()
    read_plan(written, KEY.public)
    for place in range(0, len(data), 7):
        changed = bytearray(data)
        changed[place] ^= mask
        written.write_bytes(changed)
        error = error_of(lambda: read_plan(written, KEY.public))
        assert error.code in ("SAM-K301", "SAM-K302"), place


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_what_is_read_is_what_was_signed(written: Path, data: st.DataObject) -> None:
    """However the file is damaged: refused, or the same plan."""
    signed = sign_plan(plan_of(), KEY)
    write_plan(written, signed)
    content = bytearray(written.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content) - 1))
        end = data.draw(st.integers(start, min(len(content), start + 3)))
        content[start:end] = data.draw(st.binary(max_size=3) | st.sampled_from([b" ", b"\n", b"0"]))
    written.write_bytes(content)
    try:
        found = read_plan(written, KEY.public)
    except TrustError as error:
        assert error.code in ("SAM-K301", "SAM-K302")  # noqa: PT017
    else:
        assert found.plan == signed.plan
        assert found.plan.sha256 == signed.plan.sha256


def changed_tree(path: Path, change: Callable[[dict[str, Any]], Any], sign: bool) -> None:
    """Changes the plan in a file, and signs what it then says where that is asked for."""
    tree = json.loads(path.read_text())
    change(tree["plan"])
    if sign:
        tree["signature"] = KEY.sign(b"samaritan plan\n" + canonical(tree["plan"])).hex()
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "leave_out",
    [
        lambda plan: plan.pop("schema"),
        lambda plan: plan.pop("purpose"),
        lambda plan: plan["config"].pop("seed"),
        lambda plan: plan["config"].pop("privacy"),
        lambda plan: plan["config"]["federation"].pop("retries"),
        lambda plan: plan["config"]["model"].pop("checkpoint"),
    ],
)
@pytest.mark.parametrize("sign", [True, False])
def test_a_default_that_was_left_out_is_refused(
    written: Path, leave_out: Callable[[dict[str, Any]], Any], sign: bool
) -> None:
    changed_tree(written, leave_out, sign)
    error = error_of(lambda: read_plan(written, KEY.public))
    assert error.code == "SAM-K301"
    assert "not written as this version writes plans" in error.message


@pytest.mark.parametrize(
    "change",
    [
        lambda plan: plan.update(rounds=4),
        lambda plan: plan["config"].update(code="x"),
        lambda plan: plan["config"]["model"].update(checkpoint="/srv/sam.pth"),
        lambda plan: plan["sites"]["Ahus"].update(node=5),
        lambda plan: plan.update(created="2027-03-01T00:00:00"),
        lambda plan: plan["config"].update(rounds="3"),
        lambda plan: plan["config"].update(rounds=float("inf")),
    ],
)
def test_what_a_plan_cannot_say_is_refused_although_it_is_signed(
    written: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    tree = json.loads(written.read_text())
    change(tree["plan"])
    text = json.dumps(tree["plan"], sort_keys=True, separators=(",", ":"))
    tree["signature"] = KEY.sign(b"samaritan plan\n" + text.encode()).hex()
    written.write_text(json.dumps(tree))
    assert error_of(lambda: read_plan(written, KEY.public)).code in ("SAM-K301", "SAM-K302")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '"plan"', "{}", '{"plan": {}}', '{"plan": [], "signer": 1}', "\0", "9"],
)
def test_what_is_no_plan_is_told_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    assert error_of(lambda: read_plan(path)).code == "SAM-K301"
    assert error_of(lambda: read_plan(tmp_path / "nowhere.json")).code == "SAM-K301"


def test_bytes_that_are_no_text_and_depth_without_end_are_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    for content in (b"\xff\xfe\x00", b"[" * 100_000, b'{"plan":' * 50_000):
        path.write_bytes(content)
        assert error_of(lambda: read_plan(path)).code == "SAM-K301"


def test_the_hash_does_not_depend_on_the_layout(written: Path) -> None:
    tree = json.loads(written.read_text())
    plan = dict(reversed(tree["plan"].items()))
    plan["config"] = dict(reversed(plan["config"].items()))
    written.write_text(json.dumps(dict(reversed((tree | {"plan": plan}).items())), indent=7))
    assert read_plan(written, KEY.public).plan.sha256 == plan_of().sha256


@pytest.mark.parametrize(
    "changes",
    [
        {"study": "trial2"},
        {"title": "t"},
        {"purpose": "p"},
        {"contacts": ["c"]},
        {"ethics": ["e"]},
        {"created": "2027-02-28"},
        {"valid_until": "2027-04-01"},
        {"samaritan": "0"},
        {"bundle_sha256": "c" * 64},
        {"base": {"name": "tiny", "sha256": "6" * 64}},
        {"base": {"name": "tinz", "sha256": "5" * 64}},
        {"config": parse_config(CONFIG | {"seed": 99}).model_dump(mode="json")},
        {"sites": {"a": SITE}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_the_hash_depends_on_everything(changes: dict[str, Any]) -> None:
    assert plan_of(**changes).sha256 != plan_of().sha256
    signature = sign_plan(plan_of(), KEY).signature
    assert sign_plan(plan_of(**changes), KEY).signature != signature


def test_a_plan_counts_until_the_end_of_its_last_day() -> None:
    today = datetime.now(UTC).date()
    require_current(plan_of(valid_until=today.isoformat()))
    require_current(plan_of(valid_until=(today + timedelta(days=1)).isoformat()))
    over = plan_of(valid_until=(today - timedelta(days=1)).isoformat())
    assert error_of(lambda: require_current(over)).code == "SAM-K303"
