"""site.yaml: what a hospital says of itself and allows. It is read by the site alone."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from samaritan.audit.policy import SitePolicy
from samaritan.config import Section, describe_faults, read_tree
from samaritan.errors import DeploymentError


class SiteSettings(Section):
    """The hospital's side of a study."""

    data: str
    """Folder with the site's cases: a manifest.csv, an MSD or an nnU-Net folder."""
    checkpoint: str | None = None
    """File of the base model; plans name its hash. The base `tiny` needs none."""
    threads: int | None = Field(default=None, ge=1)
    """Processor threads of one operation; torch decides when left out."""
    courier_user: str | None = None
    """System user of the courier, which may not read the data; the agent's own when left out."""
    node_port: int = Field(default=9094, ge=1, le=65535)
    """Port between Flower's node and the courier, on this machine only."""
    status_port: int | None = Field(default=None, ge=1, le=65535)
    """Port on this machine for /health, /status and /metrics; none when left out."""
    policy: SitePolicy = Field(default_factory=SitePolicy)


def load_settings(path: Path) -> SiteSettings:
    """Reads site.yaml; relative paths are meant from its folder.

    Raises:
        DeploymentError: SAM-N103 with every fault of the file.
        ConfigError: When it cannot be read.
    """
    try:
        settings = SiteSettings.model_validate(read_tree(path))
    except ValidationError as error:
        raise DeploymentError(
            "SAM-N103",
            f"{path} has {describe_faults(error, SiteSettings)}",
            "Mend each key; docs/site.md explains them.",
        ) from error
    here = path.parent
    return settings.model_copy(
        update={
            "data": str(here / Path(settings.data).expanduser()),
            "checkpoint": settings.checkpoint
            and str(here / Path(settings.checkpoint).expanduser()),
        }
    )
