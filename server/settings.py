"""server.yaml: what the coordinator says of the server's machine."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from samaritan.config import Section, describe_faults, read_tree
from samaritan.errors import DeploymentError


class ServerSettings(Section):
    """The server's side of a federation."""

    checkpoint: str | None = None
    """File of the base model, for the first adapter and for what is saved; `tiny` needs none."""
    link_port: int = Field(default=8000, ge=1, le=65535)
    """Port of Flower's SuperLink, on this machine only."""
    status_port: int = Field(default=8080, ge=1, le=65535)
    """Port of the status page, on this machine only."""
    listen: str = "0.0.0.0"  # noqa: S104  sites come from elsewhere
    """Address on which the proxy listens for sites, at the port of the kit."""


def load_settings(path: Path) -> ServerSettings:
    """Reads server.yaml; relative paths are meant from its folder.

    Raises:
        DeploymentError: SAM-N104 with every fault of the file.
        ConfigError: When it cannot be read.
    """
    try:
        settings = ServerSettings.model_validate(read_tree(path))
    except ValidationError as error:
        raise DeploymentError(
            "SAM-N104",
            f"{path} has {describe_faults(error, ServerSettings)}",
            "Mend each key; docs/deployment.md explains them.",
        ) from error
    if settings.checkpoint is None:
        return settings
    own = path.parent / Path(settings.checkpoint).expanduser()
    return settings.model_copy(update={"checkpoint": str(own)})
