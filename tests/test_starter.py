"""The starter of couriers and the node, as real processes."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.supercore.constant import TaskType

ROOT = Path(__file__).resolve().parents[1]
MARK = "a-token-that-only-the-node-may-see"

START = """
import sys
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec
from client.starter import _Couriers

couriers = _Couriers()
able, _ = couriers.get_eligible_capacity(set(TaskType))
print([task.name for task in able], flush=True)
for line in sys.stdin:
    name, token = line.split()
    spec = ExecutionSpec(TaskType[name], sys.argv[1], token, True, None, False, None, False, 1)
    print(couriers.launch(spec).status.name, flush=True)
"""


class Node(http.server.ThreadingHTTPServer):
    """Takes what a courier asks, answers nothing, and remembers it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Asked)
        self.asked: list[str] = []


class Asked(http.server.BaseHTTPRequestHandler):
    server: Node

    def do_POST(self) -> None:
        self.server.asked.append(f"{self.path} {self.headers}")
        time.sleep(60)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def node() -> Iterator[Node]:
    server = Node()
    server.daemon_threads = True
    server.block_on_close = False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def below(parent: int) -> dict[int, bytes]:
    """Command lines of all processes below one."""
    found: dict[int, bytes] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            status = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(status[1]) == parent and status[0] != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
                found |= below(int(entry.name))
        except OSError:
            continue
    return found


@pytest.fixture
def starter(node: Node, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", START, f"127.0.0.1:{node.server_port}"],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(tmp_path)},
    )  # fmt: skip
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(20)


def launched(starter: subprocess.Popen[str], task: str, token: str) -> str:
    assert starter.stdin is not None
    assert starter.stdout is not None
    starter.stdin.write(f"{task} {token}\n")
    starter.stdin.flush()
    return starter.stdout.readline().strip()


def wait_for(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def test_couriers_are_started_and_nothing_else(node: Node, starter: subprocess.Popen[str]) -> None:
    assert starter.stdout is not None
    assert starter.stdout.readline().strip() == "['CLIENT_APP']"
    before = below(starter.pid)
    for task in TaskType:
        if task is not TaskType.CLIENT_APP:
            assert launched(starter, task.name, "t") == "FAILED"
    assert set(below(starter.pid)) == set(before)
    assert launched(starter, "CLIENT_APP", MARK) == "ACCEPTED"
    wait_for(lambda: node.asked, "the courier asks the node")
    assert any(MARK in told for told in node.asked)
    after = below(starter.pid)
    assert len(after) == len(before) + 1
    assert not any(MARK.encode() in line for line in after.values())


def test_a_courier_takes_no_second_to_start(node: Node, starter: subprocess.Popen[str]) -> None:
    """Flower's own takes as long as its imports; the measure is what these take here and now."""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import client.courier"], cwd=ROOT, check=True)
    imports = time.monotonic() - begun
    assert launched(starter, "CLIENT_APP", "first") == "['CLIENT_APP']"
    wait_for(lambda: node.asked, "the first courier asks")
    node.asked.clear()
    begun = time.monotonic()
    launched(starter, "CLIENT_APP", MARK)
    wait_for(lambda: any(MARK in told for told in node.asked), "the second courier asks")
    assert time.monotonic() - begun < imports / 2


def test_a_courier_goes_when_its_starter_is_told_to_go(
    node: Node, starter: subprocess.Popen[str]
) -> None:
    launched(starter, "CLIENT_APP", MARK)
    wait_for(lambda: node.asked, "the courier asks the node")
    all_of_them = [starter.pid, *below(starter.pid)]
    os.killpg(starter.pid, signal.SIGTERM)  # as its supervisor does
    starter.wait(20)
    wait_for(lambda: not any(map(is_alive, all_of_them)), "all have ended")


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


RETURNS = """
import sys, threading, time
import client.node as node

def flower_supernode():
    threading.Thread(target=time.sleep, args=(600,)).start()
    if sys.argv[1] != "returns":
        sys.exit(int(sys.argv[1]))

node.flower_supernode, node._AGAIN_S = flower_supernode, 0.1
node.main()
"""


@pytest.mark.parametrize("end", ["returns", "1", "305"])
def test_a_node_that_flower_gave_up_ends_for_its_supervisor(end: str) -> None:
    """Flower returns from a line that broke in a handshake, and leaves a thread running."""
    done = subprocess.run([sys.executable, "-c", RETURNS, end], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
