"""Start-up kits: one folder and one archive for the server and for each site.

Keys are made once and never again. Everything else in a kit follows from project.yaml and the
authority, and is written anew wherever it differs.
"""

from __future__ import annotations

import base64
import hashlib
import io
import secrets
import zipfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from samaritan import __version__
from samaritan.errors import TrustError
from samaritan.files import write_atomically
from samaritan.provision import certificates
from samaritan.provision.authority import Authority, make_authority, open_authority
from samaritan.provision.kit import Card
from samaritan.provision.project import SERVER, Project, folder_name, load_project
from samaritan.provision.requests import certificate_fingerprint, fingerprint, site_keys

AUTHORITY = "authority"

HOMES = "/srv/samaritan"
"""Where the units of systemd expect kits; each project has a folder there."""

UNITS = {
    SERVER: {
        "start.sh": "server.start.sh",
        "compose.yaml": "server.compose.yaml",
        "docker/Dockerfile.cpu": "Dockerfile.cpu",
        "systemd/samaritan-server.service": "samaritan-server.service",
        "systemd/sysusers.d/samaritan-server.conf": "server.sysusers.conf",
        "systemd/tmpfiles.d/samaritan-server.conf": "server.tmpfiles.conf",
    },
    "site": {
        "start.sh": "site.start.sh",
        "compose.yaml": "site.compose.yaml",
        "compose.cuda.yaml": "site.compose.cuda.yaml",
        "docker/Dockerfile.cpu": "Dockerfile.cpu",
        "docker/Dockerfile.cuda": "Dockerfile.cuda",
        "systemd/samaritan-agent.service": "samaritan-agent.service",
        "systemd/samaritan-courier.service": "samaritan-courier.service",
        "systemd/sysusers.d/samaritan-site.conf": "site.sysusers.conf",
        "systemd/tmpfiles.d/samaritan-site.conf": "site.tmpfiles.conf",
    },
}
"""How administrators run a kit: files of a kit by role, with their templates."""

SERVER_FILES = (
    "kit.yaml", "ca.crt", "server.crt", "server.key", "crl.pem", "superexec.secret",
    "control.secret", "server.yaml", "plan.pub", "README.md", *UNITS[SERVER],
)  # fmt: skip
SITE_FILES = ("kit.yaml", "ca.crt", "plan.pub", "site.yaml", "README.md", *UNITS["site"])
SHIPPED_FILES = ("site.crt", "site.key", "node.key", "node.pub", "identity.key")
"""What a site's kit holds too where its private keys are made for it."""

_SECRETS = ("superexec.secret", "control.secret")
_SECRET_BYTES = 48

_TEXTS = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Provisioned:
    """What `provision` found and did; paths are relative to its folder.

    Attributes:
        project: Its short name.
        keys: "at-site" or "shipped".
        made: New files.
        changed: Files that now say something else.
        unchanged: All others, every key among them that was there before.
        absent: Folders of kits with keys that are not here any more, and are not made again.
        awaiting: Sites whose request is still to come.
        authority_fingerprint: Of ca.crt, which sites compare.
        plan_fingerprint: Of the key that signs plans, which sites compare.
    """

    project: str
    keys: str
    made: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    absent: tuple[str, ...]
    awaiting: tuple[str, ...]
    authority_fingerprint: str
    plan_fingerprint: str


def provision(project_file: Path, out: Path) -> Provisioned:
    """Makes the authority of a consortium and a kit for its server and each of its sites.

    Run again, it adds what is new in project.yaml and changes no key.

    Args:
        project_file: The description of the consortium.
        out: Empty, missing, or from an earlier time.

    Raises:
        ConfigError: When the description cannot be read.
        TrustError: SAM-K003 when the folder holds something else, and what `make_authority` and
            `Authority.issue_site` raise.
        StorageError: When it cannot be written, or another process works there.
    """
    project = load_project(project_file)
    folder = out / AUTHORITY
    # The description itself may lie there.
    others = out.is_dir() and any(
        path.resolve() != project_file.resolve() for path in out.iterdir()
    )
    if others and not folder.is_dir():
        raise TrustError(
            "SAM-K003",
            f"{out} is not empty and holds no authority",
            "Name a new folder with --out, or the one of an earlier `samaritan provision`.",
        )
    before = _contents(out, project)
    with make_authority(folder, project_file) as authority:
        authority.require_valid()
        _make_server(authority, out / SERVER)
        for site in project.names():
            _make_site(authority, site, _site_folder(out, site))
        authority.write_revocations()
        absent = _write_kits(authority, out)
        after = _contents(out, project)
        return Provisioned(
            project=project.project,
            keys=project.keys,
            made=tuple(path for path in after if path not in before),
            changed=_changed(before, after),
            unchanged=tuple(path for path in after if before.get(path) == after[path]),
            absent=tuple(path.relative_to(out).as_posix() for path in absent),
            awaiting=tuple(s for s in project.names() if s not in authority.register.sites),
            authority_fingerprint=certificate_fingerprint(folder / "ca.crt"),
            plan_fingerprint=fingerprint(bytes.fromhex(_plan_signer(authority))),
        )


def refresh_kits(folder: Path) -> tuple[str, ...]:
    """Brings the kits beside an authority to what it has issued and revoked.

    Kits that were moved elsewhere are left out.

    Args:
        folder: `authority` in what `provision` wrote.

    Returns:
        Files that changed, relative to the folder around the authority.

    Raises:
        TrustError: What `open_authority` raises.
        StorageError: When it cannot be written, or another process works there.
    """
    out = folder.resolve().parent
    with open_authority(folder) as authority:
        before = _contents(out, authority.project)
        authority.write_revocations()  # one that ended in the middle has left the list behind
        _write_kits(authority, out)
        return _changed(before, _contents(out, authority.project))


def _make_server(authority: Authority, folder: Path) -> None:
    """Makes the server's key and secrets, once, and its certificate whenever its hosts change."""
    issued = authority.certificate(SERVER)
    if issued.is_file():
        hosts = certificates.server_hosts(certificates.read_certificate(issued))
        if hosts != set(authority.project.server.certified_hosts):
            authority.renew(SERVER)
        return
    _begin_kit(authority, SERVER, folder)
    key_path = folder / "server.key"
    if not key_path.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        write_atomically(key_path, certificates.pkcs8(key), private=True)
    for name in _SECRETS:
        if not (folder / name).exists():
            secret = base64.b64encode(secrets.token_bytes(_SECRET_BYTES))
            write_atomically(folder / name, secret, private=True)
    authority.issue_server(certificates.read_private(key_path).public_key())


def _make_site(authority: Authority, site: str, folder: Path) -> None:
    """Makes the folder of a site, and its keys and certificate where they are shipped."""
    shipped = authority.project.keys == "shipped"
    # Keys that were shipped and have left this folder are not made a second time.
    if shipped and authority.certificate(site).is_file():
        return
    _begin_kit(authority, site, folder)
    if shipped:
        key, identity = site_keys(folder)
        authority.issue_site(site, key.public_key(), identity.public.hex())


def _begin_kit(authority: Authority, name: str, folder: Path) -> None:
    """Makes a folder that only its owner can read; its kit.yaml says whose it is."""
    folder.parent.mkdir(exist_ok=True)
    folder.mkdir(0o700, exist_ok=True)
    _write_card(authority, name, folder)


def _write_kits(authority: Authority, out: Path) -> list[Path]:
    """Writes what is not secret into every kit that is here.

    Returns:
        Folders of kits that are not.
    """
    shipped = authority.project.keys == "shipped"
    kits = {out / SERVER: SERVER}
    kits |= {_site_folder(out, site): site for site in authority.project.names()}
    absent = []
    for folder, name in kits.items():
        key = "server.key" if name == SERVER else "site.key" if shipped else "kit.yaml"
        if not _is_kit(folder, _plan_signer(authority)) or not (folder / key).is_file():
            absent.append(folder)
        elif name == SERVER:
            _write_server_kit(authority, folder)
            _pack(folder, SERVER_FILES)
        else:
            _write_site_kit(authority, name, folder)
            _pack(folder, SITE_FILES + SHIPPED_FILES if shipped else SITE_FILES)
    return absent


def _is_kit(folder: Path, plan_signer: str) -> bool:
    """Whether a folder is a kit of this consortium, and not something else of that name."""
    card = _card(folder)
    return card is not None and card.plan_signer == plan_signer


def _card(folder: Path) -> Card | None:
    try:
        return Card.model_validate(yaml.safe_load((folder / "kit.yaml").read_text("utf-8")))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _write_server_kit(authority: Authority, folder: Path) -> None:
    _write_card(authority, SERVER, folder)
    for name, source in (
        ("ca.crt", authority.folder / "ca.crt"),
        ("plan.pub", authority.folder / "plan.pub"),
        ("crl.pem", authority.folder / "crl.pem"),
        ("server.crt", authority.certificate(SERVER)),
    ):
        _write(folder / name, source.read_bytes())
    _write_texts(authority, SERVER, folder)


def _write_site_kit(authority: Authority, site: str, folder: Path) -> None:
    _write_card(authority, site, folder)
    for name in ("ca.crt", "plan.pub"):
        _write(folder / name, (authority.folder / name).read_bytes())
    if authority.project.keys == "shipped":
        issued = authority.certificate(site)
        key = certificates.read_private(folder / "site.key").public_key()
        # A site that was revoked may have made new keys elsewhere.
        if certificates.read_certificate(issued).public_key() == key:
            _write(folder / "site.crt", issued.read_bytes())
    _write_texts(authority, site, folder)


def _write_card(authority: Authority, name: str, folder: Path) -> None:
    """Writes kit.yaml; one that differs in the version alone is left as it is."""
    project = authority.project
    card = Card(
        role="server" if name == SERVER else "site",
        project=project.project,
        name=name,
        host=project.server.hosts[0],
        port=project.server.port,
        plan_signer=_plan_signer(authority),
        samaritan=__version__,
    )
    old = _card(folder)
    if old is None or old.model_copy(update={"samaritan": __version__}) != card:
        tree = card.model_dump(mode="json")
        text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
        write_atomically(folder / "kit.yaml", text.encode())


def _write_texts(authority: Authority, name: str, folder: Path) -> None:
    """Writes the texts of a kit, and the settings unless there are some: people edit them."""
    role = SERVER if name == SERVER else "site"
    project = authority.project
    made_here = name == SERVER or project.keys == "shipped"
    facts: dict[str, Any] = {
        "project": project,
        "name": name,
        "host": project.server.hosts[0],
        "port": project.server.port,
        "home": f"{HOMES}/{project.project}/{role}",
        "days": project.days(name),
        "authority_until": _end(authority.folder / "ca.crt"),
        # Of a site that makes its own keys, the coordinator's copy of the kit has no certificate.
        "certificate_until": _end(authority.certificate(name)) if made_here else None,
    }
    _write(folder / "README.md", _TEXTS.get_template(f"{role}.md").render(facts).encode())
    for path, template in UNITS[role].items():
        _write(folder / path, _TEXTS.get_template(template).render(facts).encode())
    (folder / "start.sh").chmod(0o755)
    if not (folder / f"{role}.yaml").exists():
        _write(folder / f"{role}.yaml", _TEXTS.get_template(f"{role}.yaml").render(facts).encode())


def _pack(folder: Path, names: tuple[str, ...]) -> None:
    """Writes the archive of a kit beside it: these files alone, with their modes.

    Equal kits make equal archives: no times, a fixed order, and no compression, which differs
    between versions of its library. A kit that lacks a file is no kit and is not packed.
    """
    paths = [folder / name for name in names]
    if not all(path.is_file() for path in paths):
        return
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in (folder, *paths):
            mode = path.stat().st_mode
            end = "/" if path == folder else f"/{path.relative_to(folder).as_posix()}"
            entry = zipfile.ZipInfo(folder.name + end)
            entry.create_system = 3  # where modes mean something
            entry.external_attr = mode << 16
            archive.writestr(entry, b"" if path == folder else path.read_bytes())
    _write(folder.with_name(f"{folder.name}.zip"), packed.getvalue(), private=True)


def _write(path: Path, content: bytes, *, private: bool = False) -> None:
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content, private=private)


def _contents(out: Path, project: Project) -> dict[str, str]:
    """The hash of each file that provisioning knows, by its path; others may lie beside them."""
    paths = [path for path in (out / AUTHORITY).rglob("*") if path.is_file()]
    kits = {out / SERVER: SERVER_FILES}
    kits |= {_site_folder(out, site): SITE_FILES + SHIPPED_FILES for site in project.names()}
    for folder, names in kits.items():
        paths += [folder / name for name in names] + [folder.with_name(f"{folder.name}.zip")]
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_file()
    }


def _changed(before: dict[str, str], after: dict[str, str]) -> tuple[str, ...]:
    return tuple(path for path in before if after.get(path, before[path]) != before[path])


def _site_folder(out: Path, site: str) -> Path:
    return out / "sites" / folder_name(site)


def _plan_signer(authority: Authority) -> str:
    return (authority.folder / "plan.pub").read_text().strip()


def _end(certificate: Path) -> datetime:
    return certificates.read_certificate(certificate).not_valid_after_utc
