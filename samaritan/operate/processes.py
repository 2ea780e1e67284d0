"""The processes of a kit under supervisord: started anew when they die, logs that roll over.

supervisord (supervisor 4.3) does the work; this writes its configuration and speaks with it over
its socket, which only the kit's owner can open.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
import xmlrpc.client
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samaritan.errors import DeploymentError
from samaritan.files import write_atomically
from samaritan.operate import child
from samaritan.operate.places import RUN, short_folder

_LOG_MB, _LOGS_KEPT = 10, 5
_STOP_WAIT_S = 10
_POLL_S = 0.2
_GROUP = ".group"


@dataclass(frozen=True)
class Program:
    """One process.

    Attributes:
        name: Of it and its log.
        command: Program and arguments; no shell reads them.
        environment: Added to that of the supervisor.
        user: System user, where root starts it; the starter otherwise.
        before: Programs with a smaller number are started before, and stopped after.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    user: str | None = None
    before: int = 100


def run(folder: Path, programs: Sequence[Program]) -> None:
    """Runs programs in the foreground until SIGTERM or SIGINT; does not return.

    Args:
        folder: Of the kit.
        programs: To be kept alive.

    Raises:
        DeploymentError: SAM-N401 when they are running already, SAM-N406 for a path that
            supervisord cannot read.
    """
    if _is_up(folder):
        raise DeploymentError(
            "SAM-N401",
            f"the processes of {folder} are running already",
            "`samaritan server status` or `samaritan site status` shows them; stop them first.",
        )
    if " ;" in str(folder):
        raise DeploymentError(
            "SAM-N406",
            f"supervisord cannot read the path {folder}: a blank and a semicolon begin a comment",
            "Move the kit.",
        )
    path = folder / RUN / "supervisord.conf"
    write_atomically(path, configuration(folder, programs).encode(), private=True)
    # For logs and all that programs write; the key of supervisord is for its own background mode.
    os.umask(0o077)
    supervisord = str(Path(sys.executable).with_name("supervisord"))
    os.execv(supervisord, [supervisord, "--nodaemon", "--configuration", str(path)])  # noqa: S606


def states(folder: Path) -> dict[str, dict[str, Any]]:
    """Each process with its state, seconds up and process number; empty when nothing runs."""
    if not _is_up(folder):
        return {}
    with _supervisor(folder) as supervisor:
        found: Any = supervisor.supervisor.getAllProcessInfo()
    return {
        entry["name"]: {
            "state": entry["statename"].lower(),
            "seconds": max(0, entry["now"] - entry["start"]) if entry["pid"] else 0,
            "pid": entry["pid"],
            "message": entry["spawnerr"],
        }
        for entry in found
    }


def stop(folder: Path) -> None:
    """Stops all processes of a kit and waits until they are gone.

    Raises:
        DeploymentError: SAM-N402 when nothing runs, SAM-N403 when they do not end.
    """
    if not _is_up(folder):
        raise _nothing_runs(folder)
    with _supervisor(folder) as supervisor:
        supervisor.supervisor.shutdown()
    end = time.monotonic() + 3 * _STOP_WAIT_S
    while _is_up(folder, ending=True):
        if time.monotonic() > end:
            raise DeploymentError(
                "SAM-N403",
                f"the processes of {folder} have not ended in {3 * _STOP_WAIT_S} s",
                f"Look at the logs in {folder / RUN}, then end the supervisord process by hand.",
            )
        time.sleep(_POLL_S)
    for mark in (folder / RUN).glob(f"*{_GROUP}"):  # a program may leave some behind
        child.end_group(mark, folder)
        with contextlib.suppress(OSError):
            mark.unlink()


def reload(folder: Path, name: str) -> None:
    """Tells a process to read its files anew (SIGHUP).

    Raises:
        DeploymentError: SAM-N402 when it does not run.
    """
    if not _is_up(folder):
        raise _nothing_runs(folder)
    with _supervisor(folder) as supervisor:
        try:
            supervisor.supervisor.signalProcess(name, "HUP")
        except xmlrpc.client.Fault as error:  # it is down, or has another name
            raise _nothing_runs(folder, f"process {name}") from error


def configuration(folder: Path, programs: Sequence[Program]) -> str:
    """What supervisord reads, which is to run in this process."""
    logs = folder / RUN
    lines = [
        "[unix_http_server]",
        f"file={_escaped(str(_socket(folder)))}",
        "chmod=0700",
        "[supervisord]",
        f"logfile={_escaped(str(logs / 'supervisord.log'))}",
        f"logfile_maxbytes={_LOG_MB}MB",
        f"logfile_backups={_LOGS_KEPT}",
        f"pidfile={_escaped(str(logs / 'supervisord.pid'))}",
        f"childlogdir={_escaped(str(logs))}",
        "[rpcinterface:supervisor]",
        "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
    ]
    for program in programs:
        # The environment goes with the command: supervisord's own key for it knows no quotes.
        mark = logs / f"{program.name}{_GROUP}"
        command = child.command(os.getpid(), mark, program.environment, program.command)
        lines += [
            f"[program:{program.name}]",
            f"command={_escaped(shlex.join(command))}",
            f"directory={_escaped(str(folder))}",
            f"priority={program.before}",
            "autorestart=true",
            "startsecs=2",
            "startretries=1000000",
            f"stopwaitsecs={_STOP_WAIT_S}",
            "stopasgroup=true",
            "killasgroup=true",
            "redirect_stderr=true",
            # This one supervisord expands twice.
            f"stdout_logfile={_escaped(_escaped(str(logs / program.name)))}.log",
            f"stdout_logfile_maxbytes={_LOG_MB}MB",
            f"stdout_logfile_backups={_LOGS_KEPT}",
            *([f"user={program.user}"] if program.user else []),
        ]
    return "\n".join(lines) + "\n"


def _nothing_runs(folder: Path, what: str = "process") -> DeploymentError:
    return DeploymentError("SAM-N402", f"no {what} of {folder} is running", "Nothing to do.")


def _escaped(text: str) -> str:
    """Supervisord expands %(name)s in every value."""
    return text.replace("%", "%%")


def _socket(folder: Path) -> Path:
    return short_folder(folder) / "supervisor.sock"


def _is_up(folder: Path, *, ending: bool = False) -> bool:
    """Whether a supervisor takes commands; one that waits for its processes to end takes none."""
    if not _socket(folder).exists():
        return False
    try:
        with _supervisor(folder) as supervisor:
            supervisor.supervisor.getState()
    except xmlrpc.client.Fault:
        return ending
    except (OSError, xmlrpc.client.Error):
        return False
    return True


@contextlib.contextmanager
def _supervisor(folder: Path) -> Iterator[Any]:
    from supervisor.xmlrpc import SupervisorTransport

    transport = SupervisorTransport(None, None, f"unix://{_socket(folder)}")
    with xmlrpc.client.ServerProxy("http://127.0.0.1", transport) as proxy:
        yield proxy
