"""Processes under a real supervisord: started anew, stopped as one, never left behind."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from supervisor.options import ServerOptions

from samaritan.errors import DeploymentError
from samaritan.operate import places, processes
from samaritan.operate.places import short_folder
from samaritan.operate.processes import Program, configuration, reload, states, stop

ROOT = Path(__file__).resolve().parents[1]
ODD = [
    "plain", "with space", "100%", "%(here", "50%% off", "it's", 'say "hi"', "end'", 'end"',
    "a=b,c", "$HOME", "back\\slash", "Köln", "-n", "#start", ";start", "a#b;c", "[run]", "`id`",
]  # fmt: skip
WAIT_S = 20.0


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    end = time.monotonic() + WAIT_S
    while not (found := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# What supervisord is told.


def read(folder: Path, programs: Sequence[Program]) -> Any:
    """A configuration as supervisord itself reads it."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    path = folder / "run/supervisord.conf"
    path.write_text(configuration(folder, programs), "utf-8")
    options = ServerOptions()
    options.realize(["-c", str(path), "-n"])
    options.process_config(do_usage=False)
    return options


@pytest.fixture(autouse=True)
def _own_temporary_files(tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    """Sockets of long paths lie where the system keeps temporary files; here, of this session."""
    found = tmp_path_factory.getbasetemp() / "t"
    found.mkdir(exist_ok=True)
    monkeypatch.setattr(places.tempfile, "gettempdir", lambda: str(found))


@pytest.mark.parametrize("name", ODD)
def test_supervisord_reads_what_was_meant(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    environment = {"KIT": str(folder), "FILE": str(folder / "x.key"), "EMPTY": "", "ODD": name}
    command = (sys.executable, "-c", "pass", str(folder), name, "", "a b")
    first = Program("first", command, environment, before=20)
    options = read(folder, [first, Program("second", ("true",), before=10)])
    groups = {group.name: group for group in options.process_group_configs}
    (found,) = groups["first"].process_configs
    words = shlex.split(found.command)
    supervisor, mark, *settings = words[3 : words.index("--")]
    assert words[:3] == [sys.executable, "-m", "samaritan.operate.child"]
    assert int(supervisor) == os.getpid()  # supervisord takes the place of the process that asks
    assert mark == str(folder / "run/first.group")
    assert settings == [f"{key}={value}" for key, value in environment.items()]
    assert words[words.index("--") + 1 :] == list(command)
    assert found.directory == str(folder)
    assert found.stdout_logfile == str(folder / "run/first.log")
    assert options.logfile == str(folder / "run/supervisord.log")
    assert options.pidfile == str(folder / "run/supervisord.pid")
    assert (found.priority, groups["second"].priority) == (20, 10)


def test_programs_are_kept_alive_and_their_logs_in_bounds(tmp_path: Path) -> None:
    options = read(tmp_path, [Program("one", ("true",)), Program("two", ("true",), user="nobody")])
    one, two = (group.process_configs[0] for group in options.process_group_configs)
    assert one.autorestart
    assert one.startretries >= 1_000_000
    assert (one.stopasgroup, one.killasgroup, one.redirect_stderr) == (True, True, True)
    assert one.stopwaitsecs == 10
    assert (one.stdout_logfile_maxbytes, one.stdout_logfile_backups) == (10 << 20, 5)
    assert (options.logfile_maxbytes, options.logfile_backups) == (10 << 20, 5)
    assert one.uid is None
    assert two.uid not in (None, 0)
    (server,) = options.server_configs
    assert server["chmod"] == 0o700


# Nothing runs.


def test_of_a_kit_that_does_not_run_there_is_nothing(tmp_path: Path) -> None:
    assert states(tmp_path) == {}
    with pytest.raises(DeploymentError) as caught:
        stop(tmp_path)
    assert caught.value.code == "SAM-N402"
    # What a supervisor left behind that was killed is no supervisor.
    (short_folder(tmp_path) / "supervisor.sock").touch()
    assert states(tmp_path) == {}
    with pytest.raises(DeploymentError) as caught:
        stop(tmp_path)
    assert caught.value.code == "SAM-N402"


# A real supervisord.

LOOP = "import time\nwhile True: time.sleep(0.05)"
START = """
import sys
from pathlib import Path
from samaritan.operate import places, processes
from samaritan.operate.processes import Program
folder, temporary, log_bytes, *programs = sys.argv[1:]
places.tempfile.gettempdir = lambda: temporary
text = processes.configuration
def quick(*arguments):  # running at once; and logs of bytes where that is asked for
    found = text(*arguments).replace("startsecs=2", "startsecs=0")
    return found.replace("maxbytes=10MB", f"maxbytes={log_bytes}") if log_bytes else found
processes.configuration = quick
processes.run(Path(folder), [
    Program(
        name, (sys.executable, f"{folder}/{name}.py"), {"NAME": name, "KIT": folder}, before=before
    )
    for name, before in (("one", 10), ("two", 20))
])
"""


@pytest.fixture
def supervised() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Runs two programs in a folder: ``supervised(folder, code, code, log_bytes=4096)``."""
    started: list[subprocess.Popen[bytes]] = []

    def start(
        folder: Path, *programs: str, log_bytes: int | None = None
    ) -> subprocess.Popen[bytes]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run").mkdir(exist_ok=True)
        for name, code in zip(("one", "two"), programs or (LOOP, LOOP), strict=True):
            (folder / f"{name}.py").write_text(code)
        temporary = places.tempfile.gettempdir()
        process = subprocess.Popen(
            [sys.executable, "-c", START, str(folder), temporary, str(log_bytes or "")],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with contextlib.suppress(OSError):
            process.kill()
        process.communicate()


def both_run(folder: Path) -> dict[str, int]:
    """Process numbers of both programs, once they are what they are to be."""

    def found() -> dict[str, int] | None:
        told = states(folder)
        pids = {name: entry["pid"] for name, entry in told.items() if entry["state"] == "running"}
        lines = [Path(f"/proc/{pid}/cmdline") for pid in pids.values()]
        with contextlib.suppress(OSError):
            if len(pids) == 2 and all(b"operate.child" not in line.read_bytes() for line in lines):
                return pids
        return None

    result: dict[str, int] = wait_for(found, "both programs run")
    return result


def test_a_killed_program_is_started_anew_and_stop_ends_everything(
    tmp_path: Path, supervised: Any
) -> None:
    supervisor = supervised(tmp_path)
    first = both_run(tmp_path)
    told = states(tmp_path)
    assert set(told) == {"one", "two"}
    assert told["one"]["seconds"] >= 0
    assert told["one"]["message"] == ""
    os.kill(first["one"], signal.SIGKILL)
    wait_for(lambda: states(tmp_path)["one"]["pid"] not in (0, first["one"]), "one is back")
    second = both_run(tmp_path)
    assert second["two"] == first["two"]
    assert second["one"] != first["one"]
    stop(tmp_path)
    supervisor.wait(WAIT_S)
    assert states(tmp_path) == {}
    assert not any(map(is_alive, (*first.values(), *second.values())))


def test_what_processes_write_is_the_owners_alone(tmp_path: Path, supervised: Any) -> None:
    code = (
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['KIT'], 'made').write_text('link.db')\n"
        "while True: time.sleep(0.05)\n"
    )
    supervised(tmp_path, code, LOOP)
    both_run(tmp_path)
    assert (places.short_folder(tmp_path) / "supervisor.sock").stat().st_mode & 0o777 == 0o700
    wait_for((tmp_path / "made").exists, "it has written something")
    for name in ("run/supervisord.conf", "run/supervisord.log", "run/one.log", "made"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600, name


def test_a_supervisor_that_is_killed_leaves_nothing_behind(tmp_path: Path, supervised: Any) -> None:
    supervisor = supervised(tmp_path)
    pids = both_run(tmp_path)
    supervisor.kill()
    supervisor.wait(WAIT_S)
    wait_for(lambda: not any(map(is_alive, pids.values())), "its programs have ended")
    # What it left behind is in nobody's way.
    again = supervised(tmp_path)
    assert set(both_run(tmp_path)) == {"one", "two"}
    stop(tmp_path)
    again.wait(WAIT_S)


def test_a_program_whose_supervisor_ended_before_it_began_does_not_begin(tmp_path: Path) -> None:
    from samaritan.operate import child

    made = tmp_path / "a=b=c"
    gone = subprocess.Popen(["true"])
    gone.wait()
    for supervisor, begins in ((gone.pid, False), (os.getpid(), True)):
        command = child.command(
            supervisor, tmp_path / "group", {"MADE": str(made)}, ("sh", "-c", 'touch "$MADE"')
        )
        done = subprocess.run(command, cwd=ROOT, check=False, start_new_session=True)
        assert (done.returncode == 0) == begins
        assert made.exists() == begins


LEAVES_ONE = (
    "import os, pathlib, subprocess, sys, time\n"
    "kit = pathlib.Path(os.environ['KIT'])\n"
    "code = 'import os, pathlib, signal, time; signal.signal(15, lambda *_: None)\\n'\n"
    "code += 'pathlib.Path(f\"deaf-{os.getpid()}\").touch()\\nwhile 1: time.sleep(0.05)'\n"
    "code = code if (kit / 'stubborn').exists() else 'import time; time.sleep(600)'\n"
    "left = subprocess.Popen([sys.executable, '-c', code], cwd=kit)\n"
    "(kit / f'left-{left.pid}').touch()\n"
    "while True: time.sleep(0.05)\n"
)
"""A program with a process that outlives it, as nginx has workers."""


@pytest.mark.parametrize("stubborn", [False, True])
def test_what_a_killed_program_has_left_behind_ends_before_it_is_started_anew(
    tmp_path: Path, supervised: Any, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    if stubborn:
        (tmp_path / "stubborn").touch()
    supervised(tmp_path, LEAVES_ONE, LOOP)
    pids = both_run(tmp_path)

    def left() -> set[int]:
        return {int(path.name.removeprefix("left-")) for path in tmp_path.glob("left-*")}

    (first,) = wait_for(left, "it has one")
    other = subprocess.Popen(["sleep", "600"], cwd=tmp_path, start_new_session=True)
    if stubborn:
        wait_for((tmp_path / f"deaf-{first}").exists, "it takes no notice of SIGTERM")
    os.kill(pids["one"], signal.SIGKILL)
    wait_for(lambda: len(left()) == 2, "it was started anew")
    assert not is_alive(first)
    (second,) = left() - {first}
    assert is_alive(second)
    assert is_alive(pids["two"])
    assert other.poll() is None  # it works in the same folder, and is another's
    other.kill()
    other.wait()
    if stubborn:
        wait_for((tmp_path / f"deaf-{second}").exists, "so does the other")
    stop(tmp_path)
    assert not is_alive(second)


def test_a_group_of_that_number_elsewhere_is_left_alone(tmp_path: Path) -> None:
    from samaritan.operate import child

    other = subprocess.Popen(["sleep", "600"], cwd="/", start_new_session=True)
    mark = tmp_path / "group"
    mark.write_text(" ".join([str(other.pid), *child._machine()]))
    command = child.command(os.getpid(), mark, {}, ("true",))
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True,
        start_new_session=True,
    )  # fmt: skip
    assert done.returncode == 0
    assert other.poll() is None
    assert int(mark.read_text().split()[0]) != other.pid
    other.kill()
    other.wait()


@pytest.mark.parametrize("since", [None, ["another boot", "pid:[1]"]])
def test_a_program_whose_number_was_given_away_before_begins(tmp_path: Path, since: Any) -> None:
    """In a container numbers begin again; a mark may name the very process that reads it."""
    from samaritan.operate import child

    told = " ".join(since or child._machine())
    mark = tmp_path / "group"
    command = child.command(os.getpid(), mark, {}, ("true",))
    neighbour = subprocess.Popen(["sleep", "600"], cwd=tmp_path, start_new_session=True)
    named = neighbour.pid if since else "$$"  # a neighbour's, of an earlier time; else its own
    code = f"printf '%s {told}' {named} > '{mark}'; exec " + shlex.join(command)
    process = subprocess.Popen(
        ["sh", "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )  # fmt: skip
    assert process.wait(20) == 0
    assert mark.read_text().split() == [str(process.pid), *child._machine()]
    assert neighbour.poll() is None
    neighbour.kill()
    neighbour.wait()


def test_a_path_that_supervisord_would_cut_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "kit ; old"
    (folder / "run").mkdir(parents=True)
    with pytest.raises(DeploymentError) as caught:
        processes.run(folder, [])
    assert caught.value.code == "SAM-N406"


def test_a_second_start_is_refused_and_harms_nothing(tmp_path: Path, supervised: Any) -> None:
    supervised(tmp_path)
    pids = both_run(tmp_path)
    before = (tmp_path / "run/supervisord.conf").read_bytes()
    second = supervised(tmp_path)
    said = second.communicate(timeout=WAIT_S)[0].decode()
    assert second.returncode == 1
    assert "SAM-N401" in said
    assert (tmp_path / "run/supervisord.conf").read_bytes() == before
    assert both_run(tmp_path) == pids


def test_a_supervisor_ends_in_good_order_at_sigterm(tmp_path: Path, supervised: Any) -> None:
    code = (
        "import os, signal, sys, time, pathlib\n"
        "def end(*_):\n"
        "    with open(os.environ['KIT'] + '/order', 'a') as f: f.write(os.environ['NAME'] + ' ')\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
        "pathlib.Path(os.environ['KIT'], os.environ['NAME']).touch()\n"
        "while True: time.sleep(0.02)\n"
    )
    supervisor = supervised(tmp_path, code, code)
    pids = both_run(tmp_path)
    wait_for(lambda: (tmp_path / "one").exists() and (tmp_path / "two").exists(), "both are ready")
    supervisor.terminate()
    supervisor.wait(WAIT_S)
    assert (tmp_path / "order").read_text().split() == ["two", "one"]
    assert not any(map(is_alive, pids.values()))


def test_a_program_can_be_told_to_read_its_files_anew(tmp_path: Path, supervised: Any) -> None:
    code = (
        "import os, pathlib, signal, time\n"
        "kit = pathlib.Path(os.environ['KIT'])\n"
        "signal.signal(signal.SIGHUP, lambda *_: (kit / 'read').touch())\n"
        "(kit / 'ready').touch()\n"
        "while True: time.sleep(0.02)\n"
    )
    with pytest.raises(DeploymentError) as caught:
        reload(tmp_path, "one")
    assert caught.value.code == "SAM-N402"
    supervised(tmp_path, code, "pass")
    wait_for((tmp_path / "ready").exists, "it is ready")
    pid = states(tmp_path)["one"]["pid"]
    reload(tmp_path, "one")
    wait_for((tmp_path / "read").exists, "it has read its files")
    assert states(tmp_path)["one"]["pid"] == pid
    with pytest.raises(DeploymentError) as caught:
        reload(tmp_path, "three")
    assert caught.value.code == "SAM-N402"
    assert "three" in caught.value.message


def test_what_a_program_starts_ends_with_it(tmp_path: Path, supervised: Any) -> None:
    code = (
        "import os, subprocess, sys, time\n"
        f"grandchild = subprocess.Popen([sys.executable, '-c', {LOOP!r}])\n"
        "open(os.environ['KIT'] + '/grandchild', 'w').write(str(grandchild.pid))\n"
        "while True: time.sleep(0.05)\n"
    )
    supervised(tmp_path, code, LOOP)
    both_run(tmp_path)
    path = tmp_path / "grandchild"
    grandchild = int(wait_for(lambda: path.exists() and path.read_text(), "it has started one"))
    stop(tmp_path)
    wait_for(lambda: not is_alive(grandchild), "it has ended too")


def test_stop_waits_until_the_last_has_ended_but_not_for_ever(
    tmp_path: Path, supervised: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, signal, sys, time, pathlib\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.0), os._exit(0)))\n"
        "pathlib.Path(os.environ['KIT'], os.environ['NAME']).touch()\n"
        "while True: time.sleep(0.02)\n"
    )
    for folder, patience_s in ((tmp_path / "a", 10), (tmp_path / "b", 0.05)):
        supervised(folder, code, LOOP)
        pids = both_run(folder)
        wait_for((folder / "one").exists, "it is ready")
        monkeypatch.setattr(processes, "_STOP_WAIT_S", patience_s)
        if patience_s > 1:
            stop(folder)
            assert not any(map(is_alive, pids.values()))
        else:
            with pytest.raises(DeploymentError) as caught:
                stop(folder)
            assert caught.value.code == "SAM-N403"


def test_logs_roll_over(tmp_path: Path, supervised: Any) -> None:
    code = "import time\nfor n in range(10**6):\n print('line', n, flush=True); time.sleep(1e-4)"
    supervised(tmp_path, code, LOOP, log_bytes=4096)
    both_run(tmp_path)
    logs = tmp_path / "run"
    wait_for(lambda: (logs / "one.log.5").exists(), "five logs are kept")
    time.sleep(0.3)
    stop(tmp_path)
    found = sorted(path.name for path in logs.glob("one.log*"))
    assert found == ["one.log", *(f"one.log.{number}" for number in range(1, 6))]
    assert all(path.stat().st_size < 20_000 for path in logs.glob("one.log*"))


def test_programs_get_their_environment_and_folder_and_standard_error_is_in_the_log(
    tmp_path: Path, supervised: Any
) -> None:
    folder = tmp_path / 'it\'s 100% "my" kit'
    code = (
        "import os, sys, time\n"
        "print(os.environ['NAME'], os.environ['KIT'], os.getcwd(), file=sys.stderr, flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    supervised(folder, code, LOOP)
    both_run(folder)
    log = folder / "run/one.log"
    wait_for(lambda: log.exists() and log.stat().st_size, "it has said something")
    assert log.read_text() == f"one {folder} {folder}\n"
    stop(folder)


def test_a_kit_with_a_long_path_works(tmp_path: Path, supervised: Any) -> None:
    folder = tmp_path / ("k" * 50) / ("p" * 150)
    assert len(str(folder)) > 200
    supervisor = supervised(folder)
    pids = both_run(folder)
    found = short_folder(folder)
    assert found.parent == Path(places.tempfile.gettempdir())
    assert found.stat().st_mode & 0o777 == 0o700
    assert (found / "supervisor.sock").is_socket()
    stop(folder)
    supervisor.wait(WAIT_S)
    assert not any(map(is_alive, pids.values()))


# Where sockets lie.


def long(folder: Path) -> Path:
    return folder / ("k" * 120)


def test_short_paths_stay_in_the_kit_and_long_ones_have_a_folder_of_their_own(
    tmp_path: Path,
) -> None:
    kit = Path("/tmp") / f"sam-{os.getpid()}"  # noqa: S108
    kit.mkdir()
    try:
        assert short_folder(kit) == kit / "run"
    finally:
        (kit / "run").rmdir()
        kit.rmdir()
    one, two = short_folder(long(tmp_path) / "a"), short_folder(long(tmp_path) / "b")
    assert one != two
    assert one == short_folder(long(tmp_path) / "a")
    assert str(os.geteuid()) in one.name
    for folder in (one, two):
        assert len(os.fsencode(folder / "supervisor.sock")) < 100


def test_the_length_is_counted_in_bytes(tmp_path: Path) -> None:
    umlauts = Path("/tmp") / ("ä" * 40)  # noqa: S108
    assert len(str(umlauts / "run")) < places.LONGEST < len(os.fsencode(umlauts / "run"))
    assert short_folder(umlauts).parent == Path(places.tempfile.gettempdir())


def test_a_folder_that_others_may_enter_is_closed(tmp_path: Path) -> None:
    found = short_folder(long(tmp_path))
    found.chmod(0o777)
    assert short_folder(long(tmp_path)).stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    found = short_folder(long(tmp_path))
    os.chown(found, 4711, 4711)
    with pytest.raises(DeploymentError) as caught:
        short_folder(long(tmp_path))
    assert caught.value.code == "SAM-N404"
    assert found.stat().st_uid == 4711


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    found = short_folder(long(tmp_path))
    found.rmdir()
    (tmp_path / "elsewhere").mkdir()
    found.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DeploymentError) as caught:
        short_folder(long(tmp_path))
    assert caught.value.code == "SAM-N404"
    found.unlink()
    found.touch()
    with pytest.raises((DeploymentError, FileExistsError)):
        short_folder(long(tmp_path))
