"""project.yaml: a consortium as its coordinator describes it."""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import quote

from pydantic import AfterValidator, Field, ValidationError, field_validator

from samaritan.config import Section, describe_faults, read_tree
from samaritan.errors import TrustError

SERVER = "server"
"""What the server is called where sites have their names; no site may be called so."""

_NAME_BYTES = 64
"""What the common name of a certificate can hold."""

_OWN_HOSTS = ("localhost", "127.0.0.1")

_DNS_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")


def _one_line(text: str) -> str:
    """Refuses text that a terminal, a certificate or a YAML comment would show as something else.

    Characters that are not printable include those that reverse the direction of writing.
    """
    if not text.isprintable() or text != text.strip() or not text:
        raise ValueError("must be one line of printable characters, with no space at its ends")
    return text


def _site_name(name: str) -> str:
    _one_line(name)
    if (size := len(name.encode())) > _NAME_BYTES:
        raise ValueError(f"has {size} bytes in UTF-8, and a certificate holds {_NAME_BYTES}")
    if _alike(name) == SERVER:
        raise ValueError("is the name of the server")
    return name


def _host(host: str) -> str:
    """A host as certificates write it: a DNS name in lower case, or an IP address."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        name = host.lower()
    labels = name.split(".")
    # A name that ends in a number is an address with a slip of the pen.
    if len(name) > 253 or not all(map(_DNS_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise ValueError("is no host name and no IP address; leave out https:// and the port")
    return name


def _alike(name: str) -> str:
    """What names have in common that people or file systems may take for one another."""
    return unicodedata.normalize("NFKC", name).casefold()


def _twice(names: Sequence[str]) -> list[str]:
    """Names that equal another but for letter case and ways of writing a letter."""
    counts = Counter(map(_alike, names))
    return [name for name in names if counts[_alike(name)] > 1]


Line = Annotated[str, Field(max_length=200), AfterValidator(_one_line)]
Days = Annotated[int, Field(ge=1, le=3650)]


class ServerEntry(Section):
    """Where the server runs."""

    hosts: tuple[Annotated[str, AfterValidator(_host)], ...]
    """Names and IP addresses. Sites connect to the first; all are in the certificate."""
    port: int = Field(default=9443, ge=1, le=65535)
    """The one port that sites must reach."""
    valid_days: Days | None = None
    """How long its certificate is good; `valid_days` of the project when left out."""

    @property
    def certified_hosts(self) -> tuple[str, ...]:
        """All names in the certificate: the server's own processes meet on this machine."""
        return (*self.hosts, *(host for host in _OWN_HOSTS if host not in self.hosts))

    @field_validator("hosts")
    @classmethod
    def _distinct(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        if not hosts:
            raise ValueError("is empty")
        if twice := _twice(hosts):
            raise ValueError(f"named twice: {', '.join(twice)}")
        return hosts


class SiteEntry(Section):
    """A hospital."""

    name: Annotated[str, AfterValidator(_site_name)]
    contact: Line | None = None
    """Who answers there, for the coordinator."""
    valid_days: Days | None = None
    """How long its certificate is good; `valid_days` of the project when left out."""


class Project(Section):
    """A consortium."""

    project: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Short name; it is in every certificate and cannot be changed later."""
    title: Line
    """For people."""
    server: ServerEntry
    sites: tuple[SiteEntry, ...]
    keys: Literal["at-site", "shipped"] = "at-site"
    """Whether each site makes its own private keys, or finds them in its kit: for trials."""
    valid_days: Days = 397
    """How long certificates are good."""
    contacts: tuple[Line, ...] = ()
    """Whom sites can ask."""

    @field_validator("sites")
    @classmethod
    def _distinct(cls, sites: tuple[SiteEntry, ...]) -> tuple[SiteEntry, ...]:
        if not sites:
            raise ValueError("is empty")
        if twice := _twice([site.name for site in sites]):
            raise ValueError(f"names must differ in more than letter case: {', '.join(twice)}")
        return sites

    def names(self) -> tuple[str, ...]:
        """Of the sites, as they stand in the file."""
        return tuple(site.name for site in self.sites)

    def days(self, name: str) -> int:
        """How long a new certificate of the server or a site is good."""
        entries = {site.name: site.valid_days for site in self.sites}
        return (entries | {SERVER: self.server.valid_days}).get(name) or self.valid_days


def load_project(path: Path) -> Project:
    """Reads project.yaml.

    Raises:
        ConfigError: When it cannot be read or is no YAML.
        TrustError: SAM-K001 with all its faults.
    """
    try:
        return Project.model_validate(read_tree(path))
    except ValidationError as error:
        raise TrustError(
            "SAM-K001",
            f"{path} has {describe_faults(error, Project)}",
            "Mend each key; docs/provisioning.md has an example.",
        ) from error


def folder_name(site: str) -> str:
    """A name any file system takes; a site's name may hold anything printable."""
    return quote(site, safe="").replace(".", "%2E")
