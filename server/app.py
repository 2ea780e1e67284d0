"""The Flower ServerApp."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.checkpoints import Checkpoint
from server.federation import Federation
from server.rounds import run_rounds


def make_server_app(
    federation: Federation,
    on_finished: Callable[[Checkpoint], None],
    on_failed: Callable[[Exception], None] | None = None,
) -> ServerApp:
    """A ServerApp that runs one federation.

    Args:
        federation: The run.
        on_finished: Receives the last state; Flower itself returns nothing from a ServerApp.
        on_failed: Receives what ended the run early, before it is raised.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            on_finished(run_rounds(grid, federation))
        except Exception as error:
            if on_failed is not None:
                on_failed(error)
            raise

    return app
