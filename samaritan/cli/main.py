"""The command `samaritan`. Heavy imports happen inside commands, so that --help answers at once."""

from __future__ import annotations

import logging
import os

import typer

from samaritan import __version__
from samaritan.cli import (
    audit,
    authority,
    compare,
    data,
    doctor,
    evaluate,
    ledger,
    models,
    plan,
    predict,
    privacy,
    provision,
    server,
    simulate,
    site,
)
from samaritan.cli.console import fail, say
from samaritan.errors import SamaritanError

_INTERRUPTED = 130
"""The status typer ends with after Ctrl-C."""

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Hospitals fine-tune the Segment Anything Model together without sharing an image.",
)
app.command()(simulate.simulate)
app.command()(compare.compare)
app.command()(evaluate.evaluate)
app.command()(predict.predict)
app.command()(doctor.doctor)
app.command()(provision.provision)
app.command()(server.run)
app.add_typer(data.app, name="data", help="Check and describe data folders.")
app.add_typer(models.app, name="models", help="Base models and what is trained on them.")
app.add_typer(privacy.app, name="privacy", help="Plan a privacy budget, look after its ledger.")
privacy.app.add_typer(ledger.app, name="ledger", help="Check and mend the ledger of a site.")
app.add_typer(authority.app, name="authority", help="Certificates: list, sign, renew, revoke.")
app.add_typer(plan.app, name="plan", help="Make, sign and read the plan of a study.")
app.add_typer(server.app, name="server", help="Run the server of a federation.")
app.add_typer(site.app, name="site", help="Run a hospital: keys, approvals, processes.")
app.add_typer(audit.app, name="audit", help="Test what Samaritan claims.")


@app.callback(invoke_without_command=True)
def _version(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Runs the command line; every failure is one message on stderr and exit status 1."""
    # Flower and Samaritan's site log would otherwise print tracebacks of faults told below.
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    logging.getLogger("samaritan").addHandler(logging.NullHandler())
    try:
        app()
    except SamaritanError as error:
        _debug_raise(error)
        fail(str(error))
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            say("interrupted; finished rounds of a run are kept, go on with --resume")
        raise
    except OSError as error:
        _debug_raise(error)
        where = f"{error.filename}: " if error.filename else ""
        fail(
            f"SAM-S108  {where}{error.strerror or error}\n"
            "  hint: check the name, the permissions and the free space."
        )
    except Exception as error:
        _debug_raise(error)
        fail(
            f"SAM-X999  {type(error).__name__}: {error}\n"
            "  hint: this is a fault in Samaritan; SAMARITAN_DEBUG=1 shows where it happened."
        )


def _debug_raise(error: Exception) -> None:
    if os.environ.get("SAMARITAN_DEBUG"):
        raise error


if __name__ == "__main__":
    main()
