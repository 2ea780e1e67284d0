"""Runs a program that ends when its supervisor does, however the supervisor ends.

Otherwise a supervisor that is killed leaves processes behind that hold ports and locks. So does a
program that is killed, such as nginx, whose workers go on with what they once have read: what an
earlier one has left behind is ended first.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PATIENCE_S, _POLL_S = 2.0, 0.02


def command(
    supervisor: int, mark: Path, environment: Mapping[str, str], program: Sequence[str]
) -> list[str]:
    """What a supervisor is to start, as the head of a process group.

    Args:
        supervisor: Its process number.
        mark: File that says which process group the program is.
        environment: Added to its own.
        program: Program and arguments.
    """
    settings = [f"{name}={value}" for name, value in environment.items()]
    return [sys.executable, "-m", __name__, str(supervisor), str(mark), *settings, "--", *program]


def main() -> None:
    """Becomes the program named by the arguments, see `command`."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):  # it ended before it could be asked
        sys.exit(1)
    _begin_group(Path(sys.argv[2]))
    end = sys.argv.index("--")
    for setting in sys.argv[3:end]:
        name, _, value = setting.partition("=")
        os.environ[name] = value
    program = sys.argv[end + 1 :]
    os.execvp(program[0], program)  # noqa: S606


def end_group(mark: Path, folder: Path) -> None:
    """Ends what is left of a process group, at first gently.

    Args:
        mark: File that says which one; where it is missing, nothing is done.
        folder: In which its processes work: a number may mean another group by now.
    """
    with contextlib.suppress(OSError, ValueError):
        leader, *since = mark.read_text().split()
        group = int(leader)
        if since != _machine():
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            end = time.monotonic() + _PATIENCE_S
            while (left := list(_left(group, folder))) and time.monotonic() < end:
                for process in left:
                    os.kill(process, number)
                time.sleep(_POLL_S)


def _begin_group(mark: Path) -> None:
    end_group(mark, Path.cwd())
    if os.getpgrp() == os.getpid():
        with contextlib.suppress(OSError):
            mark.write_text(" ".join([str(os.getpid()), *_machine()]))


def _machine() -> list[str]:
    """What is another after a restart of the machine or container, where numbers begin again."""
    return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), _namespace()]


def _namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink())


def _left(group: int, folder: Path) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, belongs, *_ = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            mine = int(entry.name) == os.getpid()
            if int(belongs) != group or state == "Z" or mine:
                continue
            if folder.samefile(entry / "cwd"):
                yield int(entry.name)


if __name__ == "__main__":
    main()
