"""A start-up kit: the folder from which a server or a site is started, with its keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from samaritan.config import Section
from samaritan.errors import DeploymentError


class Card(Section):
    """The content of kit.yaml: whose kit this is. It holds no secret."""

    kit: Literal[1] = 1
    role: Literal["server", "site"]
    project: str
    name: str
    """Of the site; `server` for the server."""
    host: str
    """Where sites reach the server: the first of its names."""
    port: int = Field(ge=1, le=65535)
    plan_signer: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Public Ed25519 key that signs the plans of this consortium."""
    samaritan: str
    """The version that made the kit."""


@dataclass(frozen=True)
class Kit:
    """A kit on the disk.

    Attributes:
        folder: Absolute.
        card: Its kit.yaml.
    """

    folder: Path
    card: Card

    def path(self, *names: str) -> Path:
        """A file of the kit."""
        return self.folder.joinpath(*names)


def load_kit(folder: Path, role: str) -> Kit:
    """Reads a kit.

    Args:
        folder: Holds kit.yaml.
        role: "server" or "site", as the caller needs it.

    Raises:
        DeploymentError: SAM-N101 when the folder is no kit, SAM-N102 when it is one of another
            role.
    """
    path = folder / "kit.yaml"
    try:
        tree: Any = yaml.safe_load(path.read_text("utf-8"))
        card = Card.model_validate(tree)
    except (OSError, ValueError, yaml.YAMLError, ValidationError) as error:
        raise DeploymentError(
            "SAM-N101",
            f"{folder} is no start-up kit: {path.name} {_reason(error)}",
            "Name the folder that `samaritan provision` made, with --kit or as the argument; where "
            "a site has two users, work as the agent's.",
        ) from error
    if card.role != role:
        raise DeploymentError(
            "SAM-N102",
            f"{folder} is the kit of a {card.role}, and that of a {role} is needed",
            f"Name the {role}'s kit.",
        )
    return Kit(folder.resolve(), card)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror}"
    return "is damaged, or of another version"
