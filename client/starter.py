"""Starts a courier for every message: Flower's SuperExec, whose couriers have imported all before.

Flower starts a program anew for each message, which imports for more than a second. Here a process
that has done so once makes a copy of itself (`multiprocessing`'s forkserver). Nothing but couriers
is started, whatever the server asks for, and the token of a task is on no command line. The private
names of Flower that this needs live here; flwr is pinned for them.
"""

from __future__ import annotations

from multiprocessing import forkserver, get_context
from typing import Any

import flwr.supercore.superexec.run_superexec as superexec
from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult, SubprocessExecutor

from client import courier


class _Couriers(SubprocessExecutor):
    """In place of Flower's executor."""

    def __init__(self) -> None:
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([courier.__name__])
        forkserver.ensure_running()

    def get_eligible_capacity(self, *_: Any, **__: Any) -> tuple[set[TaskType], set[str]]:
        """Only what a site is there for."""
        return {TaskType.CLIENT_APP}, set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Starts a courier."""
        if spec.task_type is not TaskType.CLIENT_APP:
            return LaunchResult.failed("a site starts couriers and nothing else")
        task = (spec.runtime_api_address, spec.token)
        self._context.Process(target=courier.carry, args=task, daemon=True).start()
        return LaunchResult.accepted()


def main() -> None:
    """Starts couriers until it is told to stop."""
    vars(superexec).update(get_executor=lambda *_, **__: _Couriers())
    flower_superexec()


if __name__ == "__main__":
    main()
