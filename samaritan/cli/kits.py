"""What the commands of a deployment have in common: which kit is meant."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

KIT_VARIABLE = "SAMARITAN_KIT"

KitFolder = Annotated[
    Path | None,
    # The courier may enter the kit and not list it.
    typer.Argument(
        help=f"Start-up kit; ${KIT_VARIABLE} or this folder when left out.", readable=False
    ),
]

KitOption = Annotated[
    Path | None,
    typer.Option(
        "--kit",
        help=f"Start-up kit; ${KIT_VARIABLE} or this folder when left out.",
        readable=False,
    ),
]


def kit_folder(given: Path | None) -> Path:
    """The kit that is meant."""
    return given or Path(os.environ.get(KIT_VARIABLE, "."))


def states_table(states: dict[str, dict[str, object]]) -> str:
    """The processes of a kit, one line each."""
    if not states:
        return "nothing is running"
    return "\n".join(
        f"{name:<10} {told['state']:<10} {told['seconds']:>8} s  {told['message'] or ''}".rstrip()
        for name, told in states.items()
    )
