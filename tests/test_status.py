"""The status pages: what they say in every state, to people, to monitoring and to Prometheus."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.common.serde import user_config_to_proto
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.run_pb2 import Run, RunStatus
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from client import halves
from client import standing as site_standing
from client.approvals import Approvals, roles_of
from client.diary import Diary
from client.home import SOCKET, site_identity, site_log
from client.processes import site_programs
from client.settings import load_settings as load_site_settings
from client.standing import agent_answers
from client.status import status_app as site_app
from samaritan import __version__
from samaritan.config import parse_config
from samaritan.errors import DeploymentError
from samaritan.keys import make_identity
from samaritan.plan import Plan, PlannedBase, PlannedSite, read_plan, sign_plan, write_plan
from samaritan.privacy.accounting import epsilon_of
from samaritan.privacy.plan import privacy_plan
from samaritan.provision.kit import Kit, load_kit
from samaritan.provision.kits import provision
from samaritan.provision.project import folder_name
from samaritan.watch.follow import Follower
from samaritan.watch.pages import Recent, stylesheet
from server import standing
from server.bundle import PLAN_KEY
from server.home import plan_file, run_folder
from server.processes import server_programs
from server.progress import Progress
from server.settings import load_settings as load_server_settings
from server.spending import Spending, reckon
from server.standing import Watch
from server.status import status_app

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NOW = datetime(2026, 11, 28, 14, 0, tzinfo=UTC)
SITES = ("Northside", "St. Mary's", "Köln")
HOSTILE = "<script>alert(1)</script> & \"q\" 'a'"
TURNED = "safe\u202egnp.exe"

# ---- made-up kits ----------------------------------------------------------------------------


def make_kits(folder: Path, sites: Sequence[str]) -> Path:
    project = {
        "project": "trial",
        "title": "Trial",
        "server": {"hosts": ["localhost"], "port": 19543},
        "sites": [{"name": name} for name in sites],
        "keys": "shipped",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "project.yaml").write_text(yaml.safe_dump(project, allow_unicode=True), "utf-8")
    provision(folder / "project.yaml", folder / "kits")
    return folder / "kits"


def make_plan(kits: Path, sites: Sequence[str], study: str = "liver", **config: Any) -> Plan:
    """A plan of these sites, signed, with the settings of one for the phantoms."""
    tree: dict[str, Any] = {
        "name": study,
        "rounds": 10,
        "data": {"classes": {"liver": 1}},
        "federation": {"min_sites": len(sites)},
    }
    planned = {}
    for name in sites:
        site = kits / "sites" / folder_name(name)
        identity = make_identity(site / "identity.key").public.hex()
        planned[name] = PlannedSite(identity=identity, node=(site / "node.pub").read_text().strip())
    plan = Plan(
        schema=1,
        study=study,
        title=f"Study {study}",
        created=date(2026, 11, 1),
        valid_until=config.pop("valid_until", date(2027, 11, 1)),
        samaritan=__version__,
        bundle_sha256="b" * 64,
        config=parse_config(tree | config),
        base=PlannedBase(name="tiny", sha256="a" * 64),
        sites=planned,
    )
    signed = sign_plan(plan, make_identity(kits / "authority/plan.key"))
    path = plan_file(load_kit(kits / "server", "server"), plan.sha256)
    path.parent.mkdir(exist_ok=True)
    write_plan(path, signed)
    return plan


class Story:
    """The events of a run, a minute or so apart, ending now.

    Args:
        sites: That train.
        scale: How much each one's Dice is better.
    """

    def __init__(self, sites: Sequence[str], rounds: int = 10, first: int = 1) -> None:
        self.sites = list(sites)
        self.events: list[dict[str, Any]] = []
        self.add("run_started", first_round=first, rounds=rounds, sites=self.sites)

    def add(self, event: str, after: float = 1.0, **fields: Any) -> Story:
        self.events.append({"after": after, "event": event, **fields})
        return self

    def roll(self, present: Sequence[str] | None = None, refused: Sequence[str] = ()) -> Story:
        here = self.sites if present is None else list(present)
        return self.add("roll_call", 8, present=here, refused=list(refused))

    def begin(self, number: int) -> Story:
        return self.add("round_started", 0.1, round=number, sites=self.sites, resting=[])

    def finish(self, number: int, status: Mapping[str, str] | None = None, **more: Any) -> Story:
        sites = {
            name: {
                "train_loss": 1 / number,
                "dice": dice_of(number, place),
                "num_examples": 20.0 + 7 * place,
                "bytes_up": 1_299_325,
                "bytes_down": 1_299_817,
                "status": "ok",
            }
            for place, name in enumerate(self.sites)
        }
        for name, said in (status or {}).items():
            sites[name] |= {"status": said, "dice": None, "num_examples": None, "bytes_up": 431}
        known = [e["dice"] for e in sites.values() if e["dice"] is not None]
        entry = {
            "round": number,
            "seconds": 61.0 + number % 7,
            "dice_mean": sum(known) / len(known) if known else None,
            "sites": sites,
        }
        return self.add("round_finished", 61 + number % 7, **(entry | more))

    def rounds(self, first: int, last: int) -> Story:
        for number in range(first, last + 1):
            self.begin(number).finish(number)
        return self

    def write(self, kit: Kit, plan: Plan, end: datetime = NOW) -> Path:
        path = run_folder(kit, plan) / "events.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        moment = end - timedelta(seconds=sum(event["after"] for event in self.events))
        with path.open("w", encoding="utf-8") as file:
            for event in self.events:
                moment += timedelta(seconds=event["after"])
                fields = {key: value for key, value in event.items() if key != "after"}
                line = {"time": moment.isoformat(timespec="milliseconds"), **fields}
                file.write(json.dumps(line) + "\n")
        return path


def dice_of(number: int, place: int) -> float:
    return 0.9 - 0.6 / (number + 0.5) - 0.02 * place + 0.006 * ((number * 7 + place) % 5)


class FakeLink:
    """A SuperLink without one: nodes and runs as Flower would tell them.

    Args:
        plan: Of the nodes that may connect.
        away: When sites were there last.
        runs: Status and ending of the runs of plans, oldest first.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        away: Mapping[str, datetime | None] | None = None,
        runs: Sequence[tuple[Plan, str, str]] = (),
    ) -> None:
        self._nodes = []
        for number, (name, site) in enumerate(() if plan is None else plan.sites.items()):
            gone = (away or {}).get(name, NOW)
            status = "online" if name not in (away or {}) else "offline" if gone else "registered"
            self._nodes.append(
                NodeInfo(
                    node_id=number + 1,
                    name=name,
                    status=status,
                    public_key=pem_of(site.node),
                    last_activated_at=(NOW - timedelta(hours=3)).isoformat(),
                    last_deactivated_at=gone.isoformat() if gone and status == "offline" else "",
                )
            )
        self._runs = [
            Run(
                run_id=number,
                pending_at=f"2026-11-28T10:00:{number:02d}+00:00",
                override_config=user_config_to_proto({PLAN_KEY: plan.sha256}),
                status=RunStatus(status=status, sub_status=ended),
            )
            for number, (plan, status, ended) in enumerate(runs)
        ]

    def nodes(self) -> list[NodeInfo]:
        return self._nodes

    def runs(self) -> list[Run]:
        return self._runs


def pem_of(node_key: str) -> bytes:
    key = load_ssh_public_key(node_key.encode())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


UP = {
    name: {"state": "running", "seconds": 11_300, "pid": 7, "message": ""}
    for name in ("link", "proxy", "apps", "status")
}


@dataclasses.dataclass
class World:
    """Kits of three sites whose processes and SuperLink are made up."""

    kits: Path
    monkeypatch: pytest.MonkeyPatch
    now: datetime = NOW

    @property
    def kit(self) -> Kit:
        return load_kit(self.kits / "server", "server")

    def set(self, link: FakeLink | str, processes: Mapping[str, Any] = UP) -> None:
        """What the SuperLink says, or why it says nothing, and which processes there are."""

        @contextlib.contextmanager
        def connect(*_: Any) -> Iterator[FakeLink]:
            if isinstance(link, str):
                raise DeploymentError("SAM-N301", link)
            yield link

        self.monkeypatch.setattr(standing, "connect", connect)
        self.monkeypatch.setattr(standing, "states", lambda _: dict(processes))

    def watch(self, **more: Any) -> Watch:
        return Watch(self.kit, clock=lambda: self.now, **more)

    def look(self) -> dict[str, Any]:
        return self.watch().look()

    def client(self, **more: Any) -> TestClient:
        return TestClient(status_app(self.kit, self.watch(**more)), base_url="http://127.0.0.1")


# ---- scenes ----------------------------------------------------------------------------------


def nothing(world: World) -> str:
    world.set(FakeLink())
    return "Ready. No study has been run here yet."


def down(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    Story(SITES).roll().rounds(1, 3).begin(4).write(world.kit, plan, NOW - timedelta(hours=5))
    world.set("the SuperLink does not answer on 127.0.0.1:8000 (ConnectError)", {})
    return "Nothing runs on the server. Study liver has 3 of 10 rounds done."


def waiting(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    Story(SITES).write(world.kit, plan, NOW - timedelta(seconds=70))
    world.set(FakeLink(plan, {"Köln": None}, [(plan, "running", "")]))
    return "Waiting for the sites: the study has 3, and a round needs 3."


def running(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    story = Story(SITES).roll().rounds(1, 2)
    story.begin(3).add("site_failed", 30, round=3, site="Köln", status="failed: SAM-F204")
    story.finish(3, {"Köln": "failed: SAM-F204"}).begin(4).finish(4).begin(5)
    story.write(world.kit, plan, NOW - timedelta(seconds=40))
    world.set(FakeLink(plan, runs=[(plan, "running", "")]))
    return "Running round 5 of 10."


def paused(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    story = Story(SITES).roll().rounds(1, 6).begin(7)
    story.add("site_late", 900, round=7, site="Köln", status="late: no answer in 881 s")
    why = "1 sites are online after 600 s, 3 needed"
    story.add("run_paused", 600, code="SAM-F101", rounds_done=6, message=why)
    story.write(world.kit, plan, NOW - timedelta(minutes=22))
    gone = {"Köln": NOW - timedelta(minutes=47), "St. Mary's": NOW - timedelta(days=2, hours=3)}
    world.set(FakeLink(plan, gone, [(plan, "finished", "failed")]))
    return f"Paused with 6 of 10 rounds done: SAM-F101 {why}."


def failed(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    why = "cannot write /kit/runs/liver/checkpoints/round_4.safetensors: No space left on device"
    story = Story(SITES).roll().rounds(1, 3).begin(4)
    story.add("run_failed", 30, code="SAM-S101", message=why).write(world.kit, plan)
    world.set(FakeLink(plan, runs=[(plan, "finished", "failed")]))
    return f"Failed with 3 of 10 rounds done: SAM-S101 {why}."


def finished(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    story = Story(SITES).roll().rounds(1, 10)
    story.add("run_finished", rounds=10, adapter_of_round=10).add("summary_written", 2)
    story.write(world.kit, plan, NOW - timedelta(hours=16))
    world.set(
        FakeLink(plan, {"Köln": NOW - timedelta(hours=15)}, [(plan, "finished", "completed")])
    )
    return f"Finished: all 10 rounds are done, mean Dice {mean_dice(10):.3f}."


def died(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    Story(SITES).roll().rounds(1, 3).begin(4).write(world.kit, plan, NOW - timedelta(minutes=9))
    world.set(FakeLink(plan, runs=[(plan, "finished", "failed")]))
    return "The process of the run ended without a word, with 3 of 10 rounds done."


def stopped(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    Story(SITES).roll().rounds(1, 3).begin(4).write(world.kit, plan, NOW - timedelta(minutes=9))
    world.set(FakeLink(plan, runs=[(plan, "finished", "stopped")]))
    return "Stopped by hand with 3 of 10 rounds done."


def silent(world: World) -> str:
    plan = make_plan(world.kits, SITES)
    Story(SITES).roll().rounds(1, 3).begin(4).write(world.kit, plan, NOW - timedelta(minutes=2))
    processes = UP | {"link": UP["link"] | {"state": "backoff", "pid": 0, "message": "exited"}}
    world.set("the SuperLink does not answer on 127.0.0.1:8000 (ConnectError)", processes)
    return "The SuperLink does not answer, so nobody knows whether the run goes on; " \
        "3 of 10 rounds done."  # fmt: skip


def private(world: World) -> str:
    privacy = {
        "unit": "patient", "epsilon": 8.0, "records": dict(zip(SITES, (120, 90, 60), strict=True)),
        "noise_multiplier": 1.0, "sampling_rate": 0.05,
    }  # fmt: skip
    plan = make_plan(world.kits, SITES, privacy=privacy)
    story = Story(SITES).roll().rounds(1, 5)
    story.begin(6).add("site_left", round=6, site="Köln", reason="privacy budget spent")
    story.finish(6, {"Köln": "failed: SAM-P101"}).begin(7)
    for event in story.events:
        if event["event"] == "round_finished":
            event["dice_mean"] = None
            for site in event["sites"].values():
                site |= {"dice": None, "train_loss": None}
    story.write(world.kit, plan)
    world.set(FakeLink(plan, runs=[(plan, "running", "")]))
    return "Running round 7 of 10."


def thousand(world: World) -> str:
    plan = make_plan(world.kits, SITES, "long", rounds=1500)
    make_plan(world.kits, SITES, "other")
    Story(SITES).roll().rounds(1, 1000).begin(1001).write(world.kit, plan)
    world.set(FakeLink(plan, runs=[(plan, "running", "")]))
    return "Running round 1001 of 1500."


SCENES: dict[str, tuple[str, Callable[[World], str]]] = {
    "nothing": ("idle", nothing), "down": ("down", down), "waiting": ("starting", waiting),
    "running": ("running", running), "paused": ("paused", paused), "failed": ("failed", failed),
    "finished": ("finished", finished), "died": ("failed", died), "stopped": ("stopped", stopped),
    "silent": ("unknown", silent), "private": ("running", private),
    "thousand": ("running", thousand),
}  # fmt: skip


def mean_dice(number: int) -> float:
    return sum(dice_of(number, place) for place in range(3)) / 3


@pytest.fixture(scope="module")
def made_kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("trial"), SITES)


@pytest.fixture
def world(made_kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    kits = tmp_path / "kits"
    shutil.copytree(made_kits, kits)
    return World(kits, monkeypatch)


# ---- the server's page -----------------------------------------------------------------------


class Page(HTMLParser):
    """The text of a page, and what it is made of."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._skip = 0
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip += tag == "style"

    def handle_endtag(self, tag: str) -> None:
        self._skip -= tag == "style"

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.words.append(data)


def assert_sound(html: str) -> Page:
    """Nothing of the page runs, loads or leads elsewhere; every table tells what its cells are."""
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed", "form", "base"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            assert name != "style"
            if name in ("href", "src", "action"):
                assert value is not None
                assert value.startswith(("/", "#", "data:,")), value
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"] for t, a in page.tags if t == "a" and str(a["href"]).startswith("#")}
    assert links <= {f"#{name}" for name in ids}
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert sum(t == "table" for t, _ in page.tags) == sum(t == "caption" for t, _ in page.tags)
    return page


def said(text: str) -> str:
    """A sentence as the text of a page has it: in pieces around links and commands."""
    return re.sub(r"\s+", " ", re.sub(r"(SAM-[A-Z]\d{3})", r" \1 ", text)).strip()


@pytest.mark.parametrize("name", SCENES)
def test_the_page_says_how_it_stands(world: World, name: str) -> None:
    state, scene = SCENES[name]
    sentence = scene(world)
    client = world.client()
    answer = client.get("/")
    assert answer.status_code == 200
    page = assert_sound(answer.text)
    assert said(sentence) in page.text
    told = client.get("/status.json").json()
    assert (told["state"]["state"], told["state"]["sentence"]) == (state, sentence)
    assert "nan" not in page.text.lower().split()
    assert "None" not in page.text.split()


def test_what_is_not_known_is_called_unknown(world: World) -> None:
    silent(world)
    told = world.look()
    assert {site["status"] for site in told["sites"].values()} == {"unknown"}
    page = assert_sound(world.client().get("/").text)
    assert "Sites connected unknown" in page.text
    assert "keeps ending and is started again and again; run/link.log says why" in page.text
    waiting(world)
    told = world.look()
    assert all(site["dice"] is None for site in told["sites"].values())
    text = assert_sound(world.client().get("/").text).text
    assert "Köln never connected none yet none yet nothing yet nothing yet unknown" in text


def test_a_site_says_when_it_was_there_last(world: World) -> None:
    paused(world)
    told = world.look()
    assert told["sites"]["Köln"]["last_seen"] == (NOW - timedelta(minutes=47)).isoformat()
    assert told["attention"] == ["Not connected: Köln, St. Mary's; a round needs 3."]
    text = assert_sound(world.client().get("/").text).text
    assert "not connected last seen 47 min ago, 13:13 UTC" in text
    assert "not connected last seen 2 days ago, 26 Nov, 11:00 UTC" in text
    assert "late: no answer in 881 s round 7" in text
    assert "Start the missing sites and resume." in text  # docs/errors.md of SAM-F101


def test_rounds_sites_and_bytes_are_counted(world: World) -> None:
    running(world)
    told = world.look()
    (run,) = told["runs"]
    assert [entry["number"] for entry in run["history"]] == [1, 2, 3, 4]
    assert [entry["answered"] for entry in run["history"]] == [3, 3, 2, 3]
    assert (run["round"], run["under_way"], run["rounds"]) == (4, 5, 10)
    assert run["pace_s"] == 63.5
    köln = told["sites"]["Köln"]
    assert köln["bytes_up"] == 3 * 1_299_325 + 431
    assert köln["bytes_down"] == 4 * 1_299_817
    assert köln["examples"] == 34
    assert köln["dice"] == pytest.approx(dice_of(4, 2))
    (trouble,) = run["troubles"]
    assert (trouble["site"], trouble["what"], trouble["last_round"]) == (
        "Köln", "failed: SAM-F204", 3,
    )  # fmt: skip
    text = assert_sound(world.client().get("/").text).text
    assert "about 6 min more at the pace of the last ones" in text
    assert "SAM-F204 A site cannot read what the server sent." in text


def test_a_resumed_run_forgets_the_rounds_it_does_again(world: World) -> None:
    plan = make_plan(world.kits, SITES)
    story = Story(SITES).roll().rounds(1, 5)
    again = {"first_round": 4, "rounds": 10, "sites": list(SITES)}
    story.add("run_started", 60, **again).roll().begin(4)
    story.write(world.kit, plan)
    world.set(FakeLink(plan, runs=[(plan, "running", "")]))
    (run,) = world.look()["runs"]
    assert run["round"] == 3
    assert run["sentence"] == "Running round 4 of 10."
    assert world.look()["sites"]["Köln"]["bytes_up"] == 5 * 1_299_325  # they did travel


def test_a_run_that_ended_early_says_why(world: World) -> None:
    plan = make_plan(world.kits, SITES)
    story = Story(SITES).roll().rounds(1, 6)
    story.add("stopped_early", round=6, best=[4, 0.8], reason="no better Dice")
    story.add("run_finished", rounds=6, adapter_of_round=4).write(world.kit, plan)
    world.set(FakeLink(plan, runs=[(plan, "running", "")]))
    assert world.look()["state"]["sentence"] == "All rounds are done; the server writes the result."
    story.add("summary_written").write(world.kit, plan)
    world.set(FakeLink(plan, runs=[(plan, "finished", "completed")]))
    dice = f"{mean_dice(6):.3f}"
    sentence = f"Finished early, with 6 of 10 rounds: no better Dice, mean Dice {dice}."
    state = world.look()["state"]
    assert state["sentence"] == sentence
    assert (
        state["advice"] == f"The report is `runs/liver-{plan.sha256[:8]}/report.html` in the kit."
    )


def test_a_round_that_takes_too_long_is_pointed_out(world: World) -> None:
    running(world)
    assert "longer" not in world.look()["state"]["sentence"]
    world.now = NOW + timedelta(minutes=10)
    late = "Running round 5 of 10. It takes longer than those before, which took about 1 min 04 s"
    assert world.look()["state"]["sentence"].startswith(late)


def test_the_same_trouble_is_one_row(world: World) -> None:
    plan = make_plan(world.kits, SITES)
    story = Story(SITES).roll()
    for number in range(1, 101):
        for site in ("Köln", "Northside"):
            story.add("site_failed", round=number, site=site, status="failed: SAM-T102")
    story.write(world.kit, plan)
    world.set(FakeLink(plan))
    (run,) = world.look()["runs"]
    keys = ("site", "times", "first_round", "last_round")
    rows = [tuple(trouble[key] for key in keys) for trouble in run["troubles"]]
    assert rows == [("Northside", 100, 1, 100), ("Köln", 100, 1, 100)]
    assert "1 to 100 (100 times)" in assert_sound(world.client().get("/").text).text


def test_names_of_other_institutions_do_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    world = World(make_kits(tmp_path, (HOSTILE, "B", "C")), monkeypatch)
    plan = make_plan(world.kits, (HOSTILE, "B", "C"))
    story = Story((HOSTILE, TURNED, "B\x1b[31m")).roll(refused=[f"site {TURNED}: <img src=x>"])
    story.rounds(1, 2).begin(3)
    story.add("site_failed", round=3, site=TURNED, status="failed: <b>SAM-F204</b>\u2066")
    story.add("run_paused", code="SAM-F102", message=f"{HOSTILE} {TURNED}\x00 `<i>` \ud800")
    story.write(world.kit, plan)
    link = FakeLink(plan, {HOSTILE: None})
    link.nodes().append(NodeInfo(node_id=9, name=TURNED, status="online"))
    world.set(link, UP | {"<u>": UP["link"] | {"message": "<script>", "state": "fatal"}})
    client = world.client()
    html, told = client.get("/").text, client.get("/status.json").text
    page = assert_sound(html)
    assert HOSTILE in page.text
    assert "`<i>`" not in page.text
    assert not {tag for tag, _ in page.tags} & {"b", "i", "u", "img"}
    for text in (html, json.dumps(json.loads(told), ensure_ascii=False)):
        assert not re.search("[\u202a-\u202e\u2066-\u2069\x00\x1b\ud800]", text)
    assert "safe\ufffdgnp.exe" in page.text
    names = {s.labels["site"] for s in samples(client) if "site" in s.labels}
    assert names == {HOSTILE, "B", "C", "safe\ufffdgnp.exe"}


def test_events_of_any_shape_are_survived(world: World) -> None:
    plan = make_plan(world.kits, SITES)
    path = Story(SITES).roll().rounds(1, 1).write(world.kit, plan)
    with path.open("ab") as file:
        for event in (
            {"event": 7}, {"event": "round_finished", "round": "x", "sites": [1]}, [], "text",
            {"event": "round_finished", "round": 2, "sites": {"Köln": 3}, "dice_mean": True},
            {"event": "site_failed", "site": None, "status": {}}, {"event": "roll_call"},
            {"event": "run_started", "first_round": None}, {"event": "sites_recalled", "sites": 1},
            {"event": "round_started", "round": 1e300, "time": "yesterday"},
        ):  # fmt: skip
            file.write(json.dumps(event).encode() + b"\n")
        file.write(b'{"event": "round_finished", "round": 3, "dice_mean": NaN}\n')
        file.write(b"\xff\xfe broken\n" + b"[" * 100_000 + b"\n")
        file.write(b'{"event": "run_paused", "code": "half a li')
    world.set(FakeLink(plan))
    assert_sound(world.client().get("/").text)
    assert world.look()["runs"][0]["history"][-1]["dice"] is None


def test_a_thousand_rounds_stay_readable_and_quick(world: World) -> None:
    thousand(world)
    client = world.client()
    client.get("/status.json")
    begun = time.monotonic()
    html = client.get("/?still=1").text
    assert time.monotonic() - begun < 1
    page = assert_sound(html)
    assert "1000 of 1500" in page.text
    assert "The last 12 of 1000 rounds" in page.text
    assert "Study other is known here and has not begun." in page.text
    assert len(html) < 60_000
    points = re.search(r'<polyline class="line" points="([^"]+)"', html)
    assert points is not None
    assert 100 < len(points[1].split()) <= 330
    assert len(client.get("/status.json").json()["runs"][0]["history"]) == 1000


def test_a_long_log_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    story = Story([f"site {n}" for n in range(30)]).rounds(1, 1)
    line = json.dumps(story.events[-1] | {"time": NOW.isoformat()}).encode() + b"\n"
    count = 50_000_000 // len(line) + 1
    path.write_bytes(line * count)
    follower = Follower(path, Progress, Progress.take)
    assert follower.read().sites["site 3"].bytes_up == count * 1_299_325
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        follower.read()
        times.append(time.perf_counter() - begun)
    assert min(times) < 0.005
    with path.open("ab") as file:
        file.write(line)
    begun = time.perf_counter()
    assert follower.read().sites["site 3"].bytes_up == (count + 1) * 1_299_325
    assert time.perf_counter() - begun < 0.1


def test_a_log_is_followed_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    follower = Follower(path, list, lambda found, entry: found.append(entry["n"]))
    assert follower.read() == []
    path.write_bytes(b'{"n": 1}\n{"n": 2')
    assert follower.read() == [1]
    with path.open("ab") as file:
        file.write(b"}\nno json\n[3]\n")
    assert follower.read() == [1, 2]
    path.write_bytes(b'{"n": 8}\n')  # shorter: another log
    assert follower.read() == [8]
    other = tmp_path / "other"
    other.write_bytes(b'{"n": 9}\n{"n": 10}\n')
    other.replace(path)
    assert follower.read() == [9, 10]
    path.unlink()
    assert follower.read() == []
    path.write_bytes(b'{"n": 11}\n')
    assert follower.read() == [11]


# ---- budgets and ends ------------------------------------------------------------------------


def test_budgets_are_reckoned_by_the_plan(world: World) -> None:
    private(world)
    spending = Spending()
    watch = world.watch(spending=spending)
    first = watch.look()["sites"]["Northside"]["budget"]
    assert first["epsilon"] == 8
    assert first["left"] is None  # the page does not wait for it
    found = wait_for(lambda: known_budgets(watch))
    plan = read_plan(next(world.kit.path("plans").iterdir())).plan
    promised = privacy_plan(plan.config, "Northside")
    spent = epsilon_of([promised.spending(7)], promised.delta).pld  # asked in round 7 too
    assert found["Northside"]["rounds"] == 7
    assert found["Northside"]["spent"] == pytest.approx(spent)
    assert found["Northside"]["left"] == pytest.approx(8 - spent)
    client = TestClient(status_app(world.kit, watch), base_url="http://127.0.0.1")
    text = assert_sound(client.get("/").text).text
    assert f"{8 - spent:.2f} of 8" in text
    assert "The site's own ledger decides" in text
    assert "spent, it says" in text  # of the site that has left
    assert "Mean Dice not told the plan keeps scores at the sites" in text


def test_sites_that_are_the_unit_share_a_budget(world: World) -> None:
    privacy = {"unit": "site", "epsilon": 6.0, "records": 3, "noise_multiplier": 8.0}
    plan = make_plan(world.kits, SITES, privacy=privacy, strategy="fedavg")
    Story(SITES).roll().rounds(1, 2).write(world.kit, plan)
    world.set(FakeLink(plan))
    watch = world.watch(spending=Spending())
    shared = wait_for(lambda: (s := shared_budget(watch))["left"] is not None and s)
    promised = privacy_plan(plan.config, "")
    assert shared["rounds"] == 2
    assert shared["spent"] == pytest.approx(epsilon_of([promised.spending(2)], promised.delta).pld)
    assert all(site["budget"] is None for site in watch.look()["sites"].values())


def test_a_budget_that_cannot_be_reckoned_stays_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parse_config(
        {"privacy": {"unit": "patient", "epsilon": 1.0, "records": {"a": 10}}}
    )  # fmt: skip
    assert reckon(config, "b", 1) is None
    assert Spending().spent("p", config, {"b": []})["b"].left == 1.0


def known_budgets(watch: Watch) -> dict[str, Any] | None:
    found = {name: site["budget"] for name, site in watch.look()["sites"].items()}
    return found if all(budget["left"] is not None for budget in found.values()) else None


def shared_budget(watch: Watch) -> dict[str, Any]:
    found: dict[str, Any] = watch.look()["runs"][0]["privacy"]["shared"]
    return found


def wait_for(condition: Callable[[], Any]) -> Any:
    end = time.monotonic() + 120
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.2)
    return found


def test_what_ends_soon_is_pointed_out(world: World) -> None:
    running(world)
    told = world.look()
    assert told["attention"] == []
    ends = told["certificates"]
    assert ends["server_days"] > 300
    assert ends["list_days"] > 7
    assert all(site["certificate_days"] is None for site in told["sites"].values())
    assert "Certificate" not in assert_sound(world.client().get("/").text).text
    world.now = NOW + timedelta(days=ends["list_days"] - 2)
    assert any("crl.pem) ends in" in text for text in world.look()["attention"])
    world.now = NOW + timedelta(days=ends["server_days"] + 2)
    looked = world.look()["attention"]
    assert "The certificate of the server has ended: no site can connect." in "".join(looked)
    assert "The plan was valid until 2027-11-01: all sites refuse it." in looked
    assert "no longer valid" in assert_sound(world.client().get("/").text).text


def test_certificates_of_sites_are_read_where_the_kit_has_them(world: World) -> None:
    running(world)
    shutil.copytree(world.kits / "authority/issued", world.kits / "server/issued")
    told = world.look()
    days = told["sites"]["St. Mary's"]["certificate_days"]
    assert days > 300
    assert f"{days} days" in assert_sound(world.client().get("/").text).text
    world.now = NOW + timedelta(days=days - 3)
    assert any(
        "The certificate of St. Mary's ends in" in text for text in world.look()["attention"]
    )


def test_what_cannot_be_read_is_said_and_stops_nothing(world: World) -> None:
    running(world)
    world.kit.path("plans", "broken.json").write_text("{}")
    world.kit.path("server.crt").write_text("no certificate")
    world.kit.path("crl.pem").unlink()
    told = world.look()
    assert told["state"]["sentence"] == "Running round 5 of 10."
    said_of = " ".join(told["attention"])
    for part in ("SAM-K301", "broken.json", "SAM-K121", "crl.pem cannot be read"):
        assert part in said_of
    assert told["certificates"]["server_days"] is None


def test_nodes_are_told_apart_by_their_keys(world: World) -> None:
    plan = make_plan(world.kits, SITES)
    world.now = NOW
    link = FakeLink(plan, {"Northside": NOW - timedelta(hours=1)})
    for node in link.nodes():
        node.name = {"Northside": "Köln", "Köln": "Northside"}.get(node.name, node.name)
    link.nodes().append(NodeInfo(node_id=7, name="Gone", status="unregistered"))
    world.set(link)
    told = world.look()["sites"]
    assert {name: site["status"] for name, site in told.items()} == {
        "Northside": "offline", "St. Mary's": "online", "Köln": "online",
    }  # fmt: skip


# ---- health and metrics ----------------------------------------------------------------------


def test_health_is_well_or_says_what_is_wrong(world: World) -> None:
    running(world)
    answer = world.client().get("/health")
    assert (answer.status_code, answer.json()) == (200, {"ok": True})
    for scene, part in (
        (silent, "The SuperLink does not answer"),
        (down, "No process of the server runs."),
    ):
        scene(world)
        answer = world.client().get("/health")
        assert answer.status_code == 503
        assert answer.json()["ok"] is False
        assert any(part in text for text in answer.json()["problems"])
    for state in ("starting", "backoff", "fatal", "stopped", "exited"):
        world.set(FakeLink(), UP | {"proxy": UP["proxy"] | {"state": state}})
        (problem,) = world.client().get("/health").json()["problems"]
        assert problem.startswith("Process proxy ")
    paused(world)  # is a state of the study, not of the machine
    assert world.client().get("/health").status_code == 200


def samples(client: TestClient) -> list[Any]:
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(answer.text)
    return [sample for family in families for sample in family.samples]


def test_metrics_are_those_of_the_page(world: World) -> None:
    running(world)
    found = {(s.name, tuple(s.labels.values())): s.value for s in samples(world.client())}
    plan = world.look()["run"]
    assert found["samaritan_up", ()] == 1
    assert found["samaritan_process_up", ("link",)] == 1
    assert found["samaritan_rounds_done", (plan, "liver")] == 4
    assert found["samaritan_rounds_planned", (plan, "liver")] == 10
    assert found["samaritan_run_state", (plan, "running", "liver")] == 1
    assert found["samaritan_dice_mean", (plan, "liver")] == pytest.approx(mean_dice(4))
    assert found["samaritan_site_connected", ("Köln",)] == 1
    assert found["samaritan_site_sent_bytes_total", ("Köln",)] == 3 * 1_299_325 + 431
    assert found["samaritan_last_round_timestamp_seconds", (plan, "liver")] == pytest.approx(
        NOW.timestamp() - 40.1
    )
    silent(world)
    names = {s.name for s in samples(world.client())}
    assert "samaritan_site_connected" not in names  # unknown is left out
    assert "samaritan_site_last_seen_timestamp_seconds" not in names


def test_metrics_without_their_library_say_how_to_get_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing(world)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    answer = world.client().get("/metrics")
    assert answer.status_code == 404
    assert answer.text.count("\n") == 1
    assert "pip install 'samaritan[metrics]'" in answer.text


# ---- the web server --------------------------------------------------------------------------


def test_the_web_server_only_shows(world: World) -> None:
    running(world)
    client = world.client()
    before = {path: path.stat().st_mtime_ns for path in world.kits.rglob("*")}
    for path in ("/", "/health", "/status.json", "/metrics"):
        assert client.get(path).status_code == 200
        assert client.head(path).status_code == 200
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
            assert client.request(method, path).status_code == 405
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"
        assert headers["x-content-type-options"] == "nosniff"
    assert client.get("/run/link.log").status_code == 404
    assert client.get("/%2e%2e/control.secret").status_code == 404
    elsewhere = TestClient(client.app, base_url="http://attacker.example")
    assert elsewhere.get("/status.json").status_code == 400
    assert {path: path.stat().st_mtime_ns for path in world.kits.rglob("*")} == before


def test_the_style_is_the_one_the_policy_allows(world: World) -> None:
    nothing(world)
    answer = world.client().get("/")
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src 'sha256-{digest}'" in answer.headers["content-security-policy"]
    assert "url(" not in style
    assert "@import" not in style


def test_the_page_loads_itself_anew_unless_told_not_to(world: World) -> None:
    nothing(world)
    client = world.client()
    assert '<meta http-equiv="refresh" content="15">' in client.get("/").text
    assert "http-equiv" not in client.get("/?still=1").text


def test_colours_can_be_told_from_the_paper() -> None:
    sheet = stylesheet()
    roots = re.findall(r":root \{(.*?)\}", sheet, re.DOTALL)
    found = [dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6})", root)) for root in roots]
    light, dark = found[0] | found[2], found[0] | found[1] | found[2] | found[3]
    for colours in (light, dark):
        for name in ("ink", "muted", "note", "good", "bad", "wait"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, (name, colours[name])


def contrast(one: str, other: str) -> float:
    """By WCAG 2."""

    def light(colour: str) -> float:
        parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
        red, green, blue = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    high, low = sorted((light(one), light(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_looks_are_shared_for_a_few_seconds() -> None:
    now, looks = 100.0, []

    def look() -> dict[str, Any]:
        looks.append(now)
        return {"n": len(looks)}

    recent = Recent(look, clock=lambda: now)
    assert [recent.get()["n"] for _ in range(5)] == [1] * 5
    now += 2.9
    assert recent.get()["n"] == 1
    now += 0.2
    assert recent.get()["n"] == 2


def test_a_look_that_hangs_is_made_known() -> None:
    now, gate, entered = 100.0, threading.Event(), threading.Event()
    hangs = False

    def look() -> dict[str, Any]:
        if hangs:
            entered.set()
            gate.wait(60)
        return {"n": 1}

    recent = Recent(look, clock=lambda: now)
    assert recent.get() == {"n": 1}
    hangs, now = True, now + 5
    thread = threading.Thread(target=recent.get, daemon=True)
    thread.start()
    assert entered.wait(10)
    assert recent.get() == {"n": 1}  # the value before, at once
    now += 60
    with pytest.raises(DeploymentError, match="SAM-N502"):
        recent.get()
    gate.set()
    thread.join(10)


def test_a_fault_is_an_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = world.watch()

    def look() -> Any:
        raise DeploymentError("SAM-N502", "a disk hangs")

    monkeypatch.setattr(watch, "look", look)
    client = TestClient(status_app(world.kit, watch), base_url="http://127.0.0.1")
    assert client.get("/").status_code == 503
    answer = client.get("/health")
    assert answer.status_code == 503
    assert answer.json() == {"ok": False, "problems": ["SAM-N502  a disk hangs"]}


@pytest.mark.parametrize("kind", ["dead", "hanging"])
def test_a_superlink_that_is_gone_holds_nothing_up(
    made_kits: Path, tmp_path: Path, kind: str
) -> None:
    kits = tmp_path / "kits"
    shutil.copytree(made_kits, kits)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        (kits / "server/server.yaml").write_text(f"link_port: {port}\n")
        if kind == "dead":
            listening.close()
        begun = time.monotonic()
        told = Watch(load_kit(kits / "server", "server")).look()
        assert time.monotonic() - begun < (2 if kind == "dead" else 5)
    assert told["link"]["answers"] is False
    assert "does not answer" in told["link"]["fault"]
    assert told["state"]["state"] == "down"


def test_the_command_says_the_same(world: World, samaritan: Any) -> None:
    paused(world)
    done = samaritan("server", "status", world.kit.folder)
    assert done.code == 0
    assert done.out.startswith("PAUSED  Paused with 6 of 10 rounds done: SAM-F101 1 sites are")
    for part in (
        "  to do: Start the missing sites", "  look:  Not connected: Köln, St. Mary's",
        "link       running", "Köln        offline  last seen", "round 7: late: no answer in 881 s",
        "6 of 10 rounds done",
    ):  # fmt: skip
        assert part in done.out, done.out
    told = json.loads(samaritan("server", "status", world.kit.folder, "--json").out)
    assert {"processes", "sites", "runs", "state"} <= told.keys()
    for scene in (silent, down):
        scene(world)
        done = samaritan("server", "status", world.kit.folder)
        assert done.code == 1
        assert "sites unknown: the SuperLink does not answer" in done.out


def test_codes_of_sites_are_explained(world: World, samaritan: Any) -> None:
    plan = make_plan(world.kits, SITES)
    why = "2 of 3 sites are ready and all have answered, 3 needed (site Köln: failed: SAM-K305)"
    story = Story(SITES).add("run_paused", 3, code="SAM-F103", rounds_done=0, message=why)
    story.write(world.kit, plan, NOW - timedelta(minutes=2))
    world.set(FakeLink(plan, runs=[(plan, "finished", "failed")]))
    done = samaritan("server", "status", world.kit.folder)
    advice = next(line for line in done.out.splitlines() if line.startswith("  to do: "))
    assert "Start the missing sites" in advice
    assert "samaritan site approve" in advice
    story = Story(SITES).roll().rounds(1, 2).begin(3).finish(3, {"Köln": "failed: SAM-F203"})
    story.write(world.kit, plan, NOW - timedelta(seconds=40))
    world.set(FakeLink(plan, runs=[(plan, "running", "")]))
    done = samaritan("server", "status", world.kit.folder)
    assert "round 3: failed: SAM-F203" in done.out
    assert done.out.count("\n  SAM-F203: ") == 1


def test_supervisors_know_the_pages(world: World) -> None:
    kit = world.kit
    programs = {
        p.name: p for p in server_programs(kit, load_server_settings(kit.path("server.yaml")))
    }
    assert programs["status"].before == max(p.before for p in programs.values()) == 40
    assert programs["status"].command[1:] == ("-m", "server.status", str(kit.folder))
    site = load_kit(world.kits / "sites/Northside", "site")
    site.path("site.yaml").write_text("data: /nowhere\n")
    settings = load_site_settings(site.path("site.yaml"))
    assert "status" not in {p.name for p in site_programs(site, settings)}
    settings = settings.model_copy(update={"status_port": 9999})
    (program,) = [p for p in site_programs(site, settings) if p.name == "status"]
    assert program.before == 40
    assert program.command[1:] == ("-m", "client.status", str(site.folder))


# ---- a site's page ---------------------------------------------------------------------------

SITE_UP = {
    name: {"state": "running", "seconds": 11_300, "pid": 7, "message": ""}
    for name in ("agent", "node", "courier", "status")
}


@dataclasses.dataclass
class SiteWorld:
    """The kit of one site whose processes are made up, and a plan for it."""

    kit: Kit
    plan: Plan
    monkeypatch: pytest.MonkeyPatch
    now: datetime = NOW

    def __post_init__(self) -> None:
        self.settings()
        self.set()
        self.log = site_log(self.kit, site_identity(self.kit))

    def settings(self, **more: Any) -> None:
        tree = {"data": "/nowhere/at/all", **more}
        self.kit.path("site.yaml").write_text(yaml.safe_dump(tree))
        old = (NOW - timedelta(days=9)).timestamp()
        os.utime(self.kit.path("site.yaml"), (old, old))

    def set(self, answers: bool = True, processes: Mapping[str, Any] = SITE_UP) -> None:
        self.monkeypatch.setattr(halves, "site_states", lambda _: dict(processes))
        self.monkeypatch.setattr(site_standing, "agent_answers", lambda _: answers)

    def approve(self, role: str = "site", key: Any = None) -> None:
        settings = load_site_settings(self.kit.path("site.yaml"))
        identity = site_identity(self.kit)
        approvals = Approvals(self.kit, roles_of(settings.policy, identity))
        signed = sign_plan(
            self.plan, make_identity(self.kit.folder.parents[1] / "authority/plan.key")
        )
        approvals.approve(signed, role, key or identity)

    def ask(self, kind: str, number: int = 0, message: str = "m1") -> None:
        self.log.append(
            "request", kind=kind, message=message, plan=self.plan.sha256, round=number, state=""
        )

    def leave(self, kind: str, number: int = 0, size: int = 0, message: str = "m1") -> None:
        names = {"train": ["num-examples"], "evaluate": ["dice", "num-cases"]}.get(kind, [])
        tensors = {"tensors": [["a.lora_A", [8, 128], "fp32", 4096]]} if size else {}
        self.log.append(
            "egress", kind=kind, message=message, plan=self.plan.sha256, round=number,
            bytes=size, numbers=dict.fromkeys(names, "1"), texts={}, **tensors,
        )  # fmt: skip

    def refuse(self, kind: str, code: str, message: str = "m1", number: int = 0) -> None:
        self.log.append(
            "refused", kind=kind, message=message, plan=self.plan.sha256, round=number,
            code=code, reference="0badcafe",
        )  # fmt: skip

    def watch(self) -> site_standing.Watch:
        return site_standing.Watch(self.kit, clock=lambda: self.now)

    def look(self) -> dict[str, Any]:
        return self.watch().look()

    def client(self) -> TestClient:
        return TestClient(site_app(self.kit, self.watch()), base_url="http://127.0.0.1")


@pytest.fixture
def site(made_kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteWorld:
    kits = tmp_path / "kits_of_a_site"
    shutil.copytree(made_kits, kits)
    kit = load_kit(kits / "sites/Northside", "site")
    return SiteWorld(kit, make_plan(kits, SITES), monkeypatch)


def site_unapproved(site: SiteWorld) -> str:
    return "Running, and no valid plan is approved here: every request is refused."


def site_down(site: SiteWorld) -> str:
    site.set(answers=False, processes={})
    return "The agent does not answer: this site takes part in nothing."


def site_starting(site: SiteWorld) -> str:
    site.set(answers=False, processes=SITE_UP | {"agent": SITE_UP["agent"] | {"seconds": 9}})
    return "The agent is starting; it answers in a minute at most."


def site_broken(site: SiteWorld) -> str:
    bad = SITE_UP["node"] | {"state": "backoff", "pid": 0, "message": "Exited too quickly"}
    site.set(processes=SITE_UP | {"node": bad})
    return (
        "The agent is there, and node is not as it should be: the server may not reach this site."
    )


def site_ready(site: SiteWorld) -> str:
    site.approve()
    site.log.append("started", samaritan=__version__)
    for number in (1, 2):
        site.ask("train", number)
        site.leave("train", number, 1_298_912)
        site.ask("evaluate", number, "m2")
        site.leave("evaluate", number, message="m2")
    return "Ready: waiting for the server to ask."


def site_working(site: SiteWorld) -> str:
    site_ready(site)
    site.ask("hello", message="m3")
    site.refuse("hello", "SAM-K309", "m3")
    site.ask("train", 3, "m4")
    return "At work on training, round 3 of liver."


def site_closed(site: SiteWorld) -> str:
    site.settings(policy={"hours": ["Mon-Fri 19:00-06:00"]})
    site.approve()
    return (
        "Outside the hours of this site (Mon-Fri 19:00-06:00): requests are refused until they "
        "begin."
    )


def site_dry(site: SiteWorld) -> str:
    site.settings(policy={"dry_run": True})
    site.approve()
    site.ask("train", 1)
    site.log.append("dry_run", kind="train", message="m1", bytes=1_298_912)
    site.refuse("train", "SAM-A203", number=1)
    return "Dry run: the work is done and logged, and nothing leaves."


SITE_SCENES: dict[str, tuple[str, Callable[[SiteWorld], str]]] = {
    "unapproved": ("idle", site_unapproved), "down": ("down", site_down),
    "starting": ("starting", site_starting), "broken": ("failed", site_broken),
    "ready": ("ready", site_ready), "working": ("running", site_working),
    "closed": ("closed", site_closed), "dry": ("dry run", site_dry),
}  # fmt: skip


@pytest.mark.parametrize("name", SITE_SCENES)
def test_a_site_says_how_it_stands(site: SiteWorld, name: str) -> None:
    state, scene = SITE_SCENES[name]
    sentence = scene(site)
    client = site.client()
    page = assert_sound(client.get("/").text)
    assert sentence in page.text
    told = client.get("/status.json").json()
    assert (told["state"]["state"], told["state"]["sentence"]) == (state, sentence)
    healthy = name not in ("down", "starting", "broken")
    assert client.get("/health").status_code == (200 if healthy else 503)
    assert {s.value for s in samples(client) if s.name == "samaritan_up"} == {float(healthy)}


def test_a_site_shows_what_left_it(site: SiteWorld) -> None:
    site_working(site)
    client = site.client()
    text = assert_sound(client.get("/").text).text
    assert "Tensors that left, in total 2.5 MiB in 4 answers" in text
    assert "All of scoring 2 answers, no tensor" in text
    assert "All of training 2.5 MiB in 2 answers" in text
    assert "scoring, round 2 of liver" in text
    assert ": dice, num-cases" in text  # numbers left too, and are named
    assert "SAM-K309" in text
    assert "0badcafe" in text
    log = client.get("/status.json").json()["log"]
    assert log["total"] == {"answers": 4, "bytes": 2 * 1_298_912}
    assert log["by_plan"] == {site.plan.sha256: {"answers": 4, "bytes": 2 * 1_298_912}}
    assert (log["asked"]["kind"], log["asked"]["round"], log["open"]) == ("train", 3, True)
    found = {(s.name, tuple(s.labels.values())): s.value for s in samples(client)}
    assert found["samaritan_egress_bytes_total", ("train",)] == 2 * 1_298_912
    assert found["samaritan_refused_requests_total", ("SAM-K309", "hello")] == 1
    assert found["samaritan_working", ()] == 1
    site.leave("train", 3, 77, "m4")
    later = site.look()["log"]
    assert (later["open"], later["total"]["bytes"]) == (False, 2 * 1_298_912 + 77)


def test_what_a_dry_run_kept_did_not_leave(site: SiteWorld) -> None:
    site_dry(site)
    log = site.look()["log"]
    assert (log["held"], log["total"], log["left"]) == (1, {"answers": 0, "bytes": 0}, None)
    text = assert_sound(site.client().get("/").text).text
    assert "Dry run on: nothing leaves" in text
    assert "Last thing that left none" in text


def test_a_site_shows_who_has_approved_and_who_has_not(site: SiteWorld, tmp_path: Path) -> None:
    keys = {role: make_identity(tmp_path / f"{role}.key") for role in ("ethics", "it")}
    policy = {"approvers": {role: key.public.hex() for role, key in keys.items()}}
    site.settings(policy=policy)
    site.approve("it", keys["it"])
    told = site.look()
    assert told["state"]["state"] == "idle"
    assert told["attention"] == ["Plan liver waits for the approval of ethics."]
    text = assert_sound(site.client().get("/").text).text
    assert f"it, {date.today()}" in text
    assert "missing: ethics" in text
    site.approve("ethics", keys["ethics"])
    assert site.look()["state"]["state"] == "ready"
    forged = site.kit.path("approvals", site.plan.sha256, "ethics.json")
    forged.write_text(forged.read_text().replace('"role": "ethics"', '"role": "it"'))
    assert site.look()["plans"][0]["missing"] == ["ethics"]


def test_settings_that_the_agent_has_not_read_are_pointed_out(site: SiteWorld) -> None:
    site_ready(site)
    assert site.look()["attention"] == []
    now = datetime.now(UTC).timestamp() + 60
    os.utime(site.kit.path("site.yaml"), (now, now))
    (line,) = site.look()["attention"]
    assert line.startswith("site.yaml was changed after the agent started")
    site.log.append("stopped", samaritan=__version__)
    assert site.look()["attention"] == []


def test_ends_at_a_site_are_pointed_out(site: SiteWorld) -> None:
    site_ready(site)
    days = site.look()["certificate_days"]
    assert days > 300
    site.now = NOW + timedelta(days=days - 10)
    assert "The certificate of this site ends in" in "".join(site.look()["attention"])
    site.now = NOW + timedelta(days=days + 10)
    assert "has ended: ask the coordinator" in "".join(site.look()["attention"])
    site.kit.path("site.crt").unlink()
    told = site.look()
    assert told["certificate_days"] is None
    assert "unknown" in assert_sound(site.client().get("/").text).text


def test_a_site_without_readable_settings_still_tells(site: SiteWorld) -> None:
    site_ready(site)
    site.kit.path("site.yaml").write_text("dat: 3\n")
    told = site.look()
    assert told["policy"] is None
    assert any("SAM-N103" in text for text in told["attention"])
    assert told["log"]["total"]["answers"] == 4
    assert "Unknown: site.yaml cannot be read." in assert_sound(site.client().get("/").text).text


def test_processes_of_another_user_are_unknown(site: SiteWorld) -> None:
    site.settings(courier_user="courier")
    site.set(processes={name: SITE_UP[name] for name in ("agent", "status")})
    site.monkeypatch.setattr(halves, "_may_look", lambda run: run.parent.name != "courier")
    assert site.look()["unseen"] == ["node", "courier"]
    assert "node, courier: unknown" in assert_sound(site.client().get("/").text).text


def test_a_half_that_is_gone_is_missed(site: SiteWorld, samaritan: Any) -> None:
    """Its supervisor was killed, and with it all that could say so."""
    site_ready(site)
    site.settings(courier_user="courier")
    site.monkeypatch.setattr(halves, "_may_look", lambda run: True)
    site.set(processes={name: SITE_UP[name] for name in ("node", "courier")}, answers=False)
    assert "Process agent does not run; run/agent.log says why." in site.look()["problems"]
    done = samaritan("site", "status", site.kit.folder)
    assert done.code == 1
    assert "agent      down" in done.out
    site.monkeypatch.setattr(halves, "_may_look", lambda run: run.parent.name == "courier")
    done = samaritan("site", "status", site.kit.folder)
    assert done.code == 0
    assert "agent: another user's; root sees them all" in done.out


def test_a_log_of_any_shape_is_survived(site: SiteWorld) -> None:
    site_ready(site)
    with site.kit.path("log/site.jsonl").open("ab") as file:
        for entry in (
            {"type": "egress", "bytes": "many", "numbers": 3, "tensors": "x", "kind": HOSTILE},
            {"type": "request"}, {"type": ["x"]}, {"type": "refused", "code": TURNED, "round": 1e9},
        ):  # fmt: skip
            file.write(json.dumps(entry).encode() + b"\n")
    html = site.client().get("/").text
    assert HOSTILE in assert_sound(html).text
    assert "\u202e" not in html


def test_only_an_agent_that_works_answers(tmp_path: Path) -> None:
    path = tmp_path.joinpath(*SOCKET)
    path.parent.mkdir()
    assert agent_answers(path) is False
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert agent_answers(path) is False  # nobody listens
        server.listen()
        begun = time.monotonic()
        assert agent_answers(path, 0.3) is False  # somebody does, and hangs
        assert time.monotonic() - begun < 2
        server.accept()[0].close()

        def serve() -> None:
            connection, _ = server.accept()
            assert connection.recv(9) == b""
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert agent_answers(path) is True
        thread.join()


def test_a_diary_forgets_its_open_request_when_the_agent_ends() -> None:
    diary = Diary()
    for entry in ({"type": "request", "message": "a"}, {"type": "refused", "message": "b"}):
        diary.take(entry)
    assert diary.open
    diary.take({"type": "started", "time_utc": "2026-11-28T10:00:00+00:00"})
    assert (diary.open, diary.started) == (False, "2026-11-28T10:00:00+00:00")


def test_a_sites_page_loads_neither_torch_nor_flower() -> None:
    code = (
        "import sys, client.status; print(sorted({'torch', 'flwr', 'numpy'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- as processes, and in a browser ----------------------------------------------------------


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@pytest.mark.parametrize("role", ["server", "site"])
def test_a_page_runs_where_nothing_else_does(made_kits: Path, tmp_path: Path, role: str) -> None:
    kits = tmp_path / "kits"
    shutil.copytree(made_kits, kits)
    kit = kits / ("server" if role == "server" else "sites/Northside")
    port = free_port()
    settings = {"status_port": port} | ({"link_port": free_port()} if role == "server" else {})
    settings |= {} if role == "server" else {"data": "/nowhere"}
    (kit / f"{role}.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "server.status" if role == "server" else "client.status", kit]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            answer = wait_for(lambda: asked(f"http://127.0.0.1:{port}/health"))
            assert answer.status_code == 503
            assert answer.json()["problems"]
            page = assert_sound(httpx.get(f"http://127.0.0.1:{port}/").text)
            assert "Processes on this machine No process is running." in page.text
            with socket.socket() as outside:  # it listens on one address of loopback alone
                assert outside.connect_ex(("127.0.0.2", port)) != 0
            taken = subprocess.run(command, capture_output=True, text=True, check=False)
            assert taken.returncode == 1
            assert taken.stderr.startswith("error: SAM-N501  the status page cannot listen on 127")
        finally:
            process.send_signal(signal.SIGTERM)
            _, noise = process.communicate(timeout=30)
    assert noise == ""


def asked(address: str) -> httpx.Response | None:
    try:
        return httpx.get(address)
    except httpx.TransportError:
        return None


def test_a_site_without_a_port_has_no_page(site: SiteWorld) -> None:
    from client.status import main

    with pytest.raises(DeploymentError, match="SAM-N503"):
        main(site.kit.folder)


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an app on loopback."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def chromium(address: str, profile: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}",
         "--enable-logging=stderr", *more, address],
        capture_output=True, text=True, timeout=120, check=True,
        env=os.environ | {"HOME": str(profile)},
    )  # fmt: skip


@pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium binary on PATH (apt-get install chromium)"
)
def test_both_pages_open_in_chromium(world: World, site: SiteWorld, tmp_path: Path) -> None:
    pages = {"server": (world.client().app, paused(world)), "site": (site.client().app, "")}
    pages["site"] = (pages["site"][0], site_working(site))
    for name, (app, sentence) in pages.items():
        picture = tmp_path / f"{name}.png"
        with served(app) as address:
            dom = chromium(f"{address}/?still=1", tmp_path / f"{name}-a", "--dump-dom")
            shot = chromium(
                address, tmp_path / f"{name}-b", "--window-size=1200,1500",
                "--virtual-time-budget=3000", f"--screenshot={picture}",
            )  # fmt: skip
        page = assert_sound(dom.stdout)
        assert said(sentence) in page.text
        for done in (dom, shot):
            assert "CONSOLE" not in done.stderr, done.stderr
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 30_000  # a blank one has a tenth of that
