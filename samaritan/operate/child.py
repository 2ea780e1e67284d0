"""Runs a program that ends when its supervisor does, however the supervisor ends.

Otherwise a supervisor that is killed leaves processes behind that hold ports and locks.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence

_PR_SET_PDEATHSIG = 1


def command(supervisor: int, environment: Mapping[str, str], program: Sequence[str]) -> list[str]:
    """What a supervisor is to start.

    Args:
        supervisor: Its process number.
        environment: Added to its own.
        program: Program and arguments.
    """
    settings = [f"{name}={value}" for name, value in environment.items()]
    return [sys.executable, "-m", __name__, str(supervisor), *settings, "--", *program]


def main() -> None:
    """Becomes the program named by the arguments, see `command`."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != int(sys.argv[1]):  # it ended before it could be asked
        sys.exit(1)
    end = sys.argv.index("--")
    for setting in sys.argv[2:end]:
        name, _, value = setting.partition("=")
        os.environ[name] = value
    program = sys.argv[end + 1 :]
    os.execvp(program[0], program)  # noqa: S606


if __name__ == "__main__":
    main()
