"""Provisioning: certificates that TLS takes, kits that keep their keys, requests and refusals."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import ssl
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from client.settings import SiteSettings
from samaritan.audit.policy import SitePolicy
from samaritan.errors import ConfigError, SamaritanError, StorageError, TrustError
from samaritan.keys import Identity, make_identity
from samaritan.lock import locked
from samaritan.provision import authority as authority_module
from samaritan.provision import certificates, kits, requests
from samaritan.provision.authority import entries, members, open_authority, read_register
from samaritan.provision.certificates import Signer
from samaritan.provision.kit import Kit, load_kit
from samaritan.provision.kits import provision, refresh_kits
from samaritan.provision.project import folder_name, load_project
from samaritan.provision.requests import (
    accept_certificate,
    fingerprint,
    kit_fingerprints,
    make_request,
    sign_request,
)
from server.settings import ServerSettings

ROOT = Path(__file__).resolve().parents[1]
NOW = datetime(2027, 3, 1, 12, tzinfo=UTC)
MARY = "St. Mary's / Köln"
TREE: dict[str, Any] = {
    "project": "liver",
    "title": "Liver lesions",
    "server": {"hosts": ["localhost", "127.0.0.1", "::1"], "port": 9444},
    "sites": [{"name": "Northside", "contact": "Dr. A"}, {"name": MARY, "valid_days": 180}],
    "contacts": ["Centre, +49 30 1"],
}


@pytest.fixture(autouse=True)
def _quick_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on the disk having the files."""
    monkeypatch.setattr("samaritan.files.os.fsync", lambda descriptor: None)


@pytest.fixture
def describe(tmp_path: Path) -> Callable[..., Path]:
    """Writes project.yaml: ``describe(keys="shipped")``."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "project.yaml"
        path.write_text(yaml.safe_dump({**TREE, **changes}, allow_unicode=True))
        return path

    return write


@pytest.fixture
def out(describe: Callable[..., Path], tmp_path: Path) -> Path:
    """A consortium whose sites make their own keys."""
    provision(describe(), tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def trial(describe: Callable[..., Path], tmp_path: Path) -> Path:
    """A consortium whose sites find their keys in their kits."""
    provision(describe(keys="shipped"), tmp_path / "trial")
    return tmp_path / "trial"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[datetime], None]:
    """Sets the time that certificates are made and judged by."""
    return lambda moment: monkeypatch.setattr(certificates, "now", lambda: moment)


def code_of(call: Callable[[], Any]) -> str:
    """The code of the error that a call ends with."""
    with pytest.raises(SamaritanError) as caught:
        call()
    return caught.value.code


def site_folder(out: Path, name: str = "Northside") -> Path:
    return out / "sites" / folder_name(name)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def hospital(out: Path, tmp_path: Path, name: str = "Northside", folder: str = "") -> Kit:
    """The kit of a site as it arrives there, unpacked from its archive."""
    home = tmp_path / (folder or f"at {folder_name(name)}")
    with zipfile.ZipFile(site_folder(out, name).with_name(f"{folder_name(name)}.zip")) as archive:
        archive.extractall(home)
    return load_kit(home / folder_name(name), "site")


def admitted(out: Path, tmp_path: Path, name: str = "Northside") -> Kit:
    """A site that has made its keys and got its certificate."""
    kit = hospital(out, tmp_path, name)
    signed = sign_request(out / "authority", make_request(kit))
    accept_certificate(kit, signed.certificate)
    return kit


# project.yaml


def test_the_example_of_the_page_is_a_project(tmp_path: Path) -> None:
    page = (ROOT / "docs/provisioning.md").read_text("utf-8")
    (example,) = re.findall(r"^```yaml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    path = tmp_path / "project.yaml"
    path.write_text(example)
    project = load_project(path)
    assert project.names() == ("Northside", "St. Mary's")
    assert (project.days("Northside"), project.days("St. Mary's")) == (397, 180)
    assert folder_name("St. Mary's") in page


def test_what_is_left_out_has_defaults(describe: Callable[..., Path]) -> None:
    tree = {"project": "p", "title": "T", "server": {"hosts": ["h"]}, "sites": [{"name": "A"}]}
    path = describe()
    path.write_text(yaml.safe_dump(tree))
    project = load_project(path)
    assert (project.keys, project.server.port, project.contacts) == ("at-site", 9443, ())
    assert project.days("A") == project.days("server") == project.valid_days == 397
    path = describe(valid_days=10, server={"hosts": ["h"], "valid_days": 20})
    project = load_project(path)
    assert [project.days(name) for name in ("Northside", MARY, "server")] == [10, 180, 20]


def test_all_faults_of_a_project_come_together(describe: Callable[..., Path]) -> None:
    path = describe(
        project="Liver 1",
        titel="x",
        server={"hosts": ["https://h", "10.0.0.256"], "prot": 1, "port": 0},
        sites=[{"nmae": "A"}, {"name": "server"}, {"name": "B\u202e"}, {"name": " C"}],
        keys="both",
        contacts=["two\nlines"],
    )
    with pytest.raises(TrustError) as caught:
        load_project(path)
    assert caught.value.code == "SAM-K001"
    lines = caught.value.message.splitlines()
    assert lines[0] == f"{path} has 13 faults:"
    keys = {line.removeprefix("  - ").partition(": ")[0] for line in lines[1:]}
    assert keys == {
        "project", "titel", "server.hosts.0", "server.hosts.1", "server.prot", "server.port",
        "sites.0.nmae", "sites.0.name", "sites.1.name", "sites.2.name", "sites.3.name", "keys",
        "contacts.0",
    }  # fmt: skip
    assert "  - titel: unknown key; did you mean title?" in lines
    assert "  - server.prot: unknown key; did you mean server.port?" in lines
    assert "  - sites.0.nmae: unknown key; did you mean sites.name?" in lines
    assert "  - sites.0.name: is missing" in lines


@pytest.mark.parametrize(
    "name",
    [
        "",
        "a\tb",
        "a\x00",
        "a\u200bb",
        "a\u2028b",
        "a ",
        "x" * 65,
        "ü" * 33,
        "Server",
        "ｓｅｒｖｅｒ",
        5,
    ],
)
def test_a_name_that_no_site_may_have(describe: Callable[..., Path], name: Any) -> None:
    with pytest.raises(TrustError, match=r"sites\.0\.name"):
        load_project(describe(sites=[{"name": name}]))


@pytest.mark.parametrize("pair", [("A", "A"), ("north", "North"), ("Ä", "A\u0308"), ("ﬁ", "FI")])
def test_names_that_look_alike_are_refused(
    describe: Callable[..., Path], pair: tuple[str, str]
) -> None:
    with pytest.raises(TrustError, match="sites: names must differ in more than letter case"):
        load_project(describe(sites=[{"name": name} for name in pair]))


@pytest.mark.parametrize("name", ["x" * 64, "北" * 21, "..", "a/b", "%2E", "C:\\", "Ä-Ö"])
def test_names_become_folders_of_their_own(
    describe: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    out = tmp_path / "out"
    provision(describe(sites=[{"name": name}], keys="shipped"), out)
    assert [path.name for path in (out / "sites").iterdir() if path.is_dir()] == [folder_name(name)]
    assert load_kit(site_folder(out, name), "site").card.name == name
    certificate = certificates.read_certificate(site_folder(out, name) / "site.crt")
    assert certificates.common_names(certificate.subject) == [name]


@pytest.mark.parametrize(
    "host", ["", "a b", "-a.de", "a..de", "a:1", "h/x", "1.2.3", "*.de", "ü.de"]
)
def test_a_host_that_is_none(describe: Callable[..., Path], host: str) -> None:
    with pytest.raises(TrustError, match=r"server\.hosts\.0"):
        load_project(describe(server={"hosts": [host]}))


def test_hosts_are_written_as_certificates_write_them(describe: Callable[..., Path]) -> None:
    hosts = load_project(
        describe(server={"hosts": ["FL.Example.org", "2001:DB8:0::1"]})
    ).server.hosts
    assert hosts == ("fl.example.org", "2001:db8::1")
    for twice in (["a.de", "A.de"], ["::1", "0:0::1"]):
        with pytest.raises(TrustError, match="named twice"):
            load_project(describe(server={"hosts": twice}))


def test_there_is_somebody(describe: Callable[..., Path]) -> None:
    with pytest.raises(TrustError, match=r"(?s)server\.hosts: is empty.*sites: is empty"):
        load_project(describe(server={"hosts": []}, sites=[]))


def test_a_file_that_is_no_yaml_makes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "project.yaml"
    path.write_text("a: [")
    with pytest.raises(ConfigError):
        provision(path, tmp_path / "out")
    path.write_text("project: x")
    assert code_of(lambda: provision(path, tmp_path / "out")) == "SAM-K001"
    assert not (tmp_path / "out").exists()


# TLS


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, host: str = "localhost") -> Any:
    """Both ends of a handshake in memory; what the server knows of the client afterwards."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=host),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    waiting = list(ends)
    for _ in range(10):
        for end in list(waiting):
            try:
                end.do_handshake()
                waiting.remove(end)
            except ssl.SSLWantReadError:
                pass
        if not waiting:
            return ends[1].getpeercert()
    raise AssertionError("the handshake does not end")


def server_side(kit: Path, crl: bool = True, authority: Path | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(kit / "server.crt", kit / "server.key")
    context.load_verify_locations(authority or kit / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if crl:
        context.load_verify_locations(kit / "crl.pem")
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def client_side(kit: Path, with_key: bool = True) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(kit / "ca.crt")
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    if with_key:
        context.load_cert_chain(kit / "site.crt", kit / "site.key")
    return context


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_server_and_sites_know_each_other_by_their_kits(trial: Path, host: str) -> None:
    for name in ("Northside", MARY):
        seen = handshake(server_side(trial / "server"), client_side(site_folder(trial, name)), host)
        assert (("commonName", name),) in seen["subject"]
        assert (("organizationName", "liver"),) in seen["subject"]


def test_processes_of_the_server_meet_on_its_own_machine(
    describe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    provision(describe(keys="shipped", server={"hosts": ["fl.example.org"]}), out)
    for host in ("fl.example.org", "localhost", "127.0.0.1"):
        handshake(server_side(out / "server"), client_side(site_folder(out)), host)
    assert load_kit(site_folder(out), "site").card.host == "fl.example.org"
    assert provision(out / "authority/project.yaml", out).changed == ()


def test_sites_refuse_a_server_under_another_name(trial: Path) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)hostname"):
        handshake(server_side(trial / "server"), client_side(site_folder(trial)), "example.org")


def test_the_server_refuses_who_shows_no_certificate(trial: Path) -> None:
    with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
        handshake(server_side(trial / "server"), client_side(site_folder(trial), with_key=False))


def test_each_end_refuses_another_authority(
    trial: Path, describe: Callable[..., Path], tmp_path: Path
) -> None:
    provision(describe(keys="shipped"), tmp_path / "other")  # of the same name
    other = tmp_path / "other"
    with pytest.raises(
        ssl.SSLCertVerificationError, match=r"local issuer|signature failure|self-signed"
    ):
        handshake(server_side(other / "server"), client_side(site_folder(trial)))
    # A foreign site that has got hold of the right ca.crt, which is no secret.
    foreign_site = client_side(site_folder(trial), with_key=False)
    foreign = site_folder(other)
    foreign_site.load_cert_chain(foreign / "site.crt", foreign / "site.key")
    with pytest.raises(
        ssl.SSLCertVerificationError, match=r"local issuer|signature failure|self-signed"
    ):
        handshake(server_side(trial / "server", crl=False), foreign_site)


def test_a_site_cannot_play_the_server_nor_the_server_a_site(trial: Path) -> None:
    site, server = site_folder(trial), trial / "server"
    impostor = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    impostor.load_cert_chain(site / "site.crt", site / "site.key")
    victim = client_side(site, with_key=False)
    victim.check_hostname = False  # the purpose alone has to stop it
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(impostor, victim)
    client = client_side(site, with_key=False)
    client.load_cert_chain(server / "server.crt", server / "server.key")
    with pytest.raises(ssl.SSLCertVerificationError, match="purpose"):
        handshake(server_side(server), client)


def test_a_site_cannot_issue_certificates(trial: Path, tmp_path: Path) -> None:
    site = site_folder(trial)
    key = ec.generate_private_key(ec.SECP384R1())
    own = Signer(
        certificates.read_private(site / "site.key"),
        certificates.read_certificate(site / "site.crt"),
    )
    forged = certificates.certify_site(own, key.public_key(), "liver", MARY, certificates.now(), 9)
    (tmp_path / "site.crt").write_bytes(certificates.pem(forged) + (site / "site.crt").read_bytes())
    (tmp_path / "site.key").write_bytes(certificates.pkcs8(key))
    shutil.copy(site / "ca.crt", tmp_path)
    with pytest.raises(ssl.SSLCertVerificationError, match=r"(?i)invalid CA certificate"):
        handshake(server_side(trial / "server", crl=False), client_side(tmp_path))


def test_a_revoked_site_is_refused_and_no_other(trial: Path) -> None:
    server, site = trial / "server", site_folder(trial)
    handshake(server_side(server), client_side(site))
    with open_authority(trial / "authority") as opened:
        opened.revoke("Northside")
    handshake(server_side(server), client_side(site))  # the server has the old list
    assert "server/crl.pem" in refresh_kits(trial / "authority")
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        handshake(server_side(server), client_side(site))
    handshake(server_side(server), client_side(site_folder(trial, MARY)))


def test_revoking_takes_every_certificate_that_was_ever_renewed(trial: Path) -> None:
    server, site = trial / "server", site_folder(trial)
    first = (site / "site.crt").read_bytes()
    with open_authority(trial / "authority") as opened:
        opened.renew("Northside")
    refresh_kits(trial / "authority")
    second = (site / "site.crt").read_bytes()
    assert first != second
    for certificate in (first, second):  # the old one is good until its end
        (site / "site.crt").write_bytes(certificate)
        handshake(server_side(server), client_side(site))
    with open_authority(trial / "authority") as opened:
        opened.revoke("Northside")
    refresh_kits(trial / "authority")
    for certificate in (first, second):
        (site / "site.crt").write_bytes(certificate)
        with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
            handshake(server_side(server), client_side(site))


def test_certificates_end(
    describe: Callable[..., Path], tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    past = datetime.now(UTC).replace(microsecond=0) - timedelta(days=200)
    clock(past)
    out = tmp_path / "out"
    provision(describe(keys="shipped"), out)  # Mary's is good for 180 days
    server = server_side(out / "server")
    handshake(server, client_side(site_folder(out)))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(server, client_side(site_folder(out, MARY)))
    clock(past + timedelta(days=200))
    with open_authority(out / "authority") as opened:
        opened.renew(MARY)
    refresh_kits(out / "authority")
    handshake(server_side(out / "server"), client_side(site_folder(out, MARY)))


def test_the_servers_certificate_ends_for_sites_too(
    describe: Callable[..., Path], tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(datetime.now(UTC).replace(microsecond=0) - timedelta(days=100))
    out = tmp_path / "out"
    hosts = {"hosts": ["localhost"], "valid_days": 99}
    provision(describe(keys="shipped", server=hosts), out)
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        handshake(server_side(out / "server"), client_side(site_folder(out)))


def test_a_revocation_that_was_cut_short_reaches_the_kits_with_the_next_command(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admitted(out, tmp_path)
    with monkeypatch.context() as patched, open_authority(out / "authority") as opened:
        patched.setattr(type(opened), "write_revocations", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened.revoke("Northside")
    assert members(out / "authority")["Northside"].revoked
    refresh_kits(out / "authority")
    revoked = x509.load_pem_x509_crl((out / "server/crl.pem").read_bytes())
    assert len(list(revoked)) == 1


def test_a_list_of_revocations_lasts_as_long_as_what_it_may_revoke(
    describe: Callable[..., Path], tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(NOW)
    out = tmp_path / "out"
    sites = [{"name": "A", "valid_days": 900}, {"name": "B"}]
    provision(describe(keys="shipped", sites=sites), out)
    crl = x509.load_pem_x509_crl((out / "server/crl.pem").read_bytes())
    assert crl.next_update_utc == NOW + timedelta(days=900)
    authority = certificates.read_certificate(out / "authority/ca.crt")
    assert crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    clock(NOW + timedelta(days=1000))  # all have ended, and still a list can be made
    with open_authority(out / "authority") as opened:
        opened.revoke("A")
    crl = x509.load_pem_x509_crl((out / "authority/crl.pem").read_bytes())
    assert crl.next_update_utc == NOW + timedelta(days=1001)
    (entry,) = crl
    assert (
        entry.serial_number
        == certificates.read_certificate(site_folder(out, "A") / "site.crt").serial_number
    )


def test_what_stands_in_certificates(
    describe: Callable[..., Path], tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(NOW)
    out = tmp_path / "out"
    provision(describe(keys="shipped"), out)
    authority = certificates.read_certificate(out / "authority/ca.crt")
    server = certificates.read_certificate(out / "server/server.crt")
    site = certificates.read_certificate(site_folder(out, MARY) / "site.crt")

    basic = {
        c.serial_number: c.extensions.get_extension_for_class(x509.BasicConstraints)
        for c in (authority, server, site)
    }
    assert all(extension.critical for extension in basic.values())
    assert [extension.value.ca for extension in basic.values()] == [True, False, False]
    assert basic[authority.serial_number].value.path_length == 0
    usage = [c.extensions.get_extension_for_class(x509.KeyUsage).value for c in (authority, site)]
    assert [(u.key_cert_sign, u.crl_sign, u.digital_signature) for u in usage] == [
        (True, True, False),
        (False, False, True),
    ]

    curves = [c.public_key().curve.name for c in (authority, server, site)]  # type: ignore[union-attr]
    assert curves == ["secp384r1", "secp256r1", "secp384r1"]
    hour = timedelta(hours=1)
    assert {c.not_valid_before_utc for c in (authority, server, site)} == {NOW - hour}
    assert authority.not_valid_after_utc.year == 2037
    assert server.not_valid_after_utc == NOW + timedelta(days=397)
    assert site.not_valid_after_utc == NOW + timedelta(days=180)
    assert certificates.server_hosts(server) == {"localhost", "127.0.0.1", "::1"}
    (uri,) = site.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert uri.value == "urn:samaritan:liver:site:St.%20Mary%27s%20%2F%20K%C3%B6ln"
    assert len({authority.serial_number, server.serial_number, site.serial_number}) == 3
    assert min(authority.serial_number, server.serial_number) > 2**100  # drawn, not counted
    assert certificates.days_left(site.not_valid_after_utc, NOW + hour) == 179


def test_nothing_outlives_its_authority(
    out: Path, tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    end = certificates.read_certificate(out / "authority/ca.crt").not_valid_after_utc
    request = make_request(hospital(out, tmp_path))
    clock(end - timedelta(days=3))
    assert sign_request(out / "authority", request).not_after == end
    clock(end)
    assert code_of(lambda: sign_request(out / "authority", request)) == "SAM-K109"
    with open_authority(out / "authority") as opened:
        assert code_of(lambda: opened.renew("server")) == "SAM-K109"
    assert code_of(lambda: provision(out / "authority/project.yaml", out)) == "SAM-K109"


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl")
def test_openssl_agrees(trial: Path, tmp_path: Path) -> None:
    site, authority = site_folder(trial), trial / "authority"
    shutil.copy(authority / "ca.crt", tmp_path / "both.pem")
    with (tmp_path / "both.pem").open("ab") as file:
        file.write((authority / "crl.pem").read_bytes())
    check = [
        "openssl",
        "verify",
        "-x509_strict",
        "-crl_check",
        "-CAfile",
        str(tmp_path / "both.pem"),
    ]
    subprocess.run([*check, "-purpose", "sslclient", site / "site.crt"], check=True)
    subprocess.run([*check, "-purpose", "sslserver", trial / "server/server.crt"], check=True)
    asked = ["openssl", "x509", "-in", site / "ca.crt", "-noout", "-fingerprint", "-sha256"]
    shown = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    digits = shown.strip().partition("=")[2].replace(":", "").lower()
    ours = kit_fingerprints(load_kit(site, "site"))["authority"]
    assert digits.startswith(ours.replace(" ", ""))


# Kits


def test_kits_hold_what_is_promised(out: Path, trial: Path) -> None:
    site = {"kit.yaml", "ca.crt", "plan.pub", "site.yaml", "README.md", *kits.UNITS["site"]}
    shipped = {"site.crt", "site.key", "node.key", "node.pub", "identity.key"}
    server = {
        "kit.yaml", "ca.crt", "server.crt", "server.key", "crl.pem", "superexec.secret",
        "control.secret", "server.yaml", "plan.pub", "README.md", *kits.UNITS["server"],
    }  # fmt: skip
    own = {"project.yaml", "ca.crt", "ca.key", "plan.key", "plan.pub", "issued.json", "crl.pem"}
    for folder, extra in ((out, set()), (trial, shipped)):
        assert set(contents(folder / "server")) == server
        issued = {"issued/server/server.crt"}
        for name in ("Northside", MARY):
            assert set(contents(site_folder(folder, name))) == site | extra
            issued |= {f"issued/{folder_name(name)}/site.crt"} if extra else set()
        assert set(contents(folder / "authority")) == own | issued
    card = load_kit(site_folder(out, MARY), "site").card
    assert (card.name, card.host, card.port, card.project) == (MARY, "localhost", 9444, "liver")
    plan = make_identity(out / "authority/plan.key").public.hex()
    assert card.plan_signer == plan == load_kit(out / "server", "server").card.plan_signer
    assert (out / "server/plan.pub").read_text().strip() == plan
    assert load_kit(out / "server", "server").card.name == "server"


def test_secrets_can_be_read_by_their_owner_alone(out: Path, trial: Path) -> None:
    secret = ("*.key", "*.secret", "*.zip")
    for folder in (out, trial):
        found = [path for pattern in secret for path in folder.rglob(pattern)]
        assert len(found) == (8 if folder == out else 14)
        assert {mode(path) for path in found} == {0o600}
        kits = [folder / "authority", folder / "server", *(folder / "sites").glob("*/")]
        assert {mode(path) for path in kits} == {0o700}
        assert mode(folder / "server/server.crt") == 0o644
    drawn = [
        (folder / f"server/{name}.secret").read_bytes()
        for folder in (out, trial)
        for name in ("superexec", "control")
    ]
    assert len(set(drawn)) == 4
    assert {len(base64.b64decode(value, validate=True)) for value in drawn} == {48}
    assert not any(b"\n" in value for value in drawn)


def test_archives_keep_modes_and_order(trial: Path, tmp_path: Path) -> None:
    kits = {trial / "server": trial / "server.zip"}
    kits |= {
        site_folder(trial, n): trial / "sites" / f"{folder_name(n)}.zip"
        for n in ("Northside", MARY)
    }
    for folder, path in kits.items():
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            assert archive.testzip() is None
        assert infos[0].filename == f"{folder.name}/"
        assert {i.filename for i in infos[1:]} == {
            f"{folder.name}/{name}" for name in contents(folder)
        }
        for info in infos:
            assert info.create_system == 3
            assert (info.external_attr >> 16) & 0o777 == mode(folder.parent / info.filename)
            assert info.date_time == (1980, 1, 1, 0, 0, 0)
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-q", trial / "server.zip", "-d", tmp_path / "x"], check=True)
        assert mode(tmp_path / "x/server") == 0o700
        assert mode(tmp_path / "x/server/server.key") == 0o600
        assert contents(tmp_path / "x/server") == contents(trial / "server")


def private_parts(folder: Path) -> list[bytes]:
    """What must stay where it is: the private number of every key in a folder, in its forms."""
    parts = []
    for path in folder.rglob("*.key"):
        content = path.read_bytes()
        if content.startswith(b"-----"):
            number = certificates.read_private(path).private_numbers().private_value
            parts += [number.to_bytes(48, "big"), content.splitlines()[2]]
        else:
            parts.append(content)
    return parts


def test_keys_made_at_a_site_are_nowhere_else(out: Path, tmp_path: Path) -> None:
    kit = admitted(out, tmp_path)
    # Somebody tries it out in the coordinator's own copy of a kit.
    copy = load_kit(site_folder(out, MARY), "site")
    sign_request(out / "authority", make_request(copy))
    provision(out / "authority/project.yaml", out)
    secrets = private_parts(kit.folder) + private_parts(copy.folder)
    assert len(secrets) == 10
    archives = [*out.rglob("*.zip")]
    kept = [*(out / "authority").rglob("*"), *(out / "server").rglob("*"), *archives]
    for path in (path for path in kept if path.is_file()):
        assert not any(part in path.read_bytes() for part in secrets), path
    keys = {path.name for path in (out / "authority").rglob("*.key")}
    assert keys == {"ca.key", "plan.key"}
    for path in archives:
        private = b"PRIVATE KEY" in path.read_bytes()
        assert private == (path.name == "server.zip")  # which is the server's own
    authority_keys = private_parts(out / "authority")
    for path in (*archives, *(out / "server").rglob("*"), *(out / "sites").rglob("*")):
        assert not path.is_file() or not any(part in path.read_bytes() for part in authority_keys)


def check_key_files(folder: Path) -> None:
    node = serialization.load_ssh_private_key((folder / "node.key").read_bytes(), None)
    tls = serialization.load_pem_private_key((folder / "site.key").read_bytes(), None)
    public = serialization.load_ssh_public_key((folder / "node.pub").read_bytes())
    certificate = certificates.read_certificate(folder / "site.crt")
    assert isinstance(node, ec.EllipticCurvePrivateKey)
    assert isinstance(node.curve, ec.SECP384R1)
    assert b"BEGIN OPENSSH PRIVATE KEY" in (folder / "node.key").read_bytes()
    assert (folder / "site.key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert node.public_key() == tls.public_key() == public == certificate.public_key()
    assert len((folder / "identity.key").read_bytes()) == 32
    if shutil.which("ssh-keygen"):
        said = subprocess.run(
            ["ssh-keygen", "-y", "-f", folder / "node.key"], check=True, capture_output=True
        ).stdout
        assert said.split()[:2] == (folder / "node.pub").read_bytes().split()[:2]


def test_the_key_of_a_site_is_one_key_in_two_forms(trial: Path, out: Path, tmp_path: Path) -> None:
    check_key_files(site_folder(trial, MARY))
    check_key_files(admitted(out, tmp_path).folder)


def test_the_server_key_is_in_the_form_that_tls_libraries_read(trial: Path) -> None:
    key = serialization.load_pem_private_key((trial / "server/server.key").read_bytes(), None)
    certificate = certificates.read_certificate(trial / "server/server.crt")
    assert key.public_key() == certificate.public_key()


@pytest.mark.parametrize("keys", ["at-site", "shipped"])
def test_provisioning_again_changes_nothing(
    describe: Callable[..., Path], tmp_path: Path, keys: str
) -> None:
    out = tmp_path / "out"
    first = provision(describe(keys=keys), out)
    before = contents(out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert set(first.made) == set(before)
    assert (first.changed, first.unchanged, first.absent) == ((), (), ())
    again = provision(out / "authority/project.yaml", out)
    assert contents(out) == before
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (again.made, again.changed, again.absent) == ((), (), ())
    assert set(again.unchanged) == set(before)
    assert again.authority_fingerprint == first.authority_fingerprint
    assert again.plan_fingerprint == first.plan_fingerprint
    assert again.awaiting == (() if keys == "shipped" else ("Northside", MARY))


@pytest.mark.parametrize("keys", ["at-site", "shipped"])
def test_a_new_site_is_added_and_the_old_ones_keep_everything(
    describe: Callable[..., Path], tmp_path: Path, keys: str
) -> None:
    out = tmp_path / "out"
    provision(describe(keys=keys), out)
    settings = site_folder(out) / "site.yaml"
    settings.write_text("data: /mine\n")
    provision(describe(keys=keys), out)  # packs the settings
    before = contents(out)
    sites = [{"name": "East"}, *TREE["sites"]]
    done = provision(describe(keys=keys, sites=sites, title="Another title"), out)
    after = contents(out)
    assert settings.read_text() == "data: /mine\n"
    changed = {path for path in before if after[path] != before[path]}
    texts = {path for path in before if path.endswith("README.md")}
    archives = {path for path in before if path.endswith(".zip")}
    lists = {"authority/issued.json", "authority/project.yaml"}
    assert changed == set(done.changed)
    assert changed <= texts | archives | lists | {"authority/crl.pem", "server/crl.pem"}
    assert texts <= changed
    assert {path for path in after if path not in before} == set(done.made)
    assert "sites/East/kit.yaml" in done.made
    assert ("sites/East/identity.key" in done.made) == (keys == "shipped")
    assert (out / "authority/project.yaml").read_bytes() == describe(
        keys=keys, sites=sites, title="Another title"
    ).read_bytes()


def test_other_hosts_bring_the_server_a_new_certificate_of_the_same_key(
    trial: Path, describe: Callable[..., Path]
) -> None:
    before = contents(trial)
    hosts = {"hosts": ["localhost", "fl.example.org"], "port": 9444}
    done = provision(describe(keys="shipped", server=hosts), trial)
    after = contents(trial)
    assert before["server/server.key"] == after["server/server.key"]
    handshake(server_side(trial / "server"), client_side(site_folder(trial)), "fl.example.org")
    # Sites go on as they are: they connect to the first host, and that has not changed.
    assert {path for path in done.changed if path.startswith("sites/")} == set()
    hosts = {"hosts": ["fl.example.org"], "port": 443}
    done = provision(describe(keys="shipped", server=hosts), trial)
    assert "sites/Northside/kit.yaml" in done.changed
    card = load_kit(site_folder(trial), "site").card
    assert (card.host, card.port) == ("fl.example.org", 443)
    assert before["sites/Northside/site.key"] == (site_folder(trial) / "site.key").read_bytes()


def test_another_version_alone_changes_no_card(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(out)
    monkeypatch.setattr(kits, "__version__", "9.9.9")
    assert provision(out / "authority/project.yaml", out).changed == ()
    assert contents(out) == before


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"project": "kidney"}, "project was liver and is kidney"),
        ({"keys": "at-site"}, "keys was shipped and is at-site"),
        ({"sites": TREE["sites"][1:]}, "the site Northside is gone"),
        ({"sites": [{"name": "NORTHSIDE"}, TREE["sites"][1]]}, "the site Northside is gone"),
    ],
)
def test_changes_that_certificates_contradict_are_refused(
    trial: Path, describe: Callable[..., Path], changes: dict[str, Any], word: str
) -> None:
    before = contents(trial)
    with pytest.raises(TrustError, match=word) as caught:
        provision(describe(**{"keys": "shipped", **changes}), trial)
    assert caught.value.code == "SAM-K002"
    assert contents(trial) == before
    # Nor does the authority work with a description that was changed behind its back.
    (trial / "authority/project.yaml").write_bytes(
        describe(**{"keys": "shipped", **changes}).read_bytes()
    )
    assert code_of(lambda: refresh_kits(trial / "authority")) == "SAM-K002"


def test_a_site_leaves_the_description_once_it_is_revoked(
    trial: Path, describe: Callable[..., Path]
) -> None:
    with open_authority(trial / "authority") as opened:
        opened.revoke("Northside")
    before = contents(site_folder(trial))
    provision(describe(keys="shipped", sites=TREE["sites"][1:]), trial)
    assert contents(site_folder(trial)) == before
    states = {entry.name: entry.state for entry in entries(trial / "authority")}
    assert states == {"server": "valid", MARY: "valid", "Northside": "revoked"}
    crl = x509.load_pem_x509_crl((trial / "server/crl.pem").read_bytes())
    assert len(list(crl)) == 1


def test_a_folder_with_something_else_is_left_alone(
    describe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "server").mkdir(parents=True)
    (out / "server/server.key").write_text("precious")
    assert code_of(lambda: provision(describe(), out)) == "SAM-K003"
    assert contents(out) == {"server/server.key": b"precious"}


def test_the_description_may_lie_in_the_folder(
    describe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "liver"
    out.mkdir()
    path = describe().rename(out / "project.yaml")
    provision(path, out)
    assert (out / "authority/ca.crt").is_file()


def test_kits_that_were_moved_away_are_not_made_again(
    trial: Path, describe: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.move(trial / "server", tmp_path / "server machine")
    shutil.move(site_folder(trial), tmp_path / "site machine")
    again = provision(describe(keys="shipped"), trial)
    assert again.absent == ("server", "sites/Northside")
    assert not (trial / "server").exists()
    assert not site_folder(trial).exists()
    assert len(read_register(trial / "authority").server) == 1
    with open_authority(trial / "authority") as opened:  # which needs the public key only
        opened.renew("server")
        opened.renew("Northside")
    shutil.copy(trial / "authority/issued/server/server.crt", tmp_path / "server machine")
    shutil.copy(trial / "authority/issued/Northside/site.crt", tmp_path / "site machine")
    handshake(server_side(tmp_path / "server machine"), client_side(tmp_path / "site machine"))


@pytest.mark.parametrize("name", ["site.key", "kit.yaml"])
def test_a_kit_without_its_key_does_not_stop_a_revocation(trial: Path, name: str) -> None:
    (site_folder(trial) / name).unlink()
    (trial / "server/server.key").unlink()
    with open_authority(trial / "authority") as opened:
        opened.revoke("Northside")
    before = contents(trial)
    assert refresh_kits(trial / "authority") == ()
    assert contents(trial) == before


def test_a_damaged_card_is_written_anew(out: Path) -> None:
    card = site_folder(out) / "kit.yaml"
    before = card.read_bytes()
    card.write_text("kit: [")
    assert provision(out / "authority/project.yaml", out).changed == ("sites/Northside/kit.yaml",)
    assert card.read_bytes() == before


def test_a_foreign_folder_beside_an_authority_is_not_taken_for_a_kit(
    trial: Path, describe: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.rmtree(trial / "server")
    provision(describe(keys="shipped"), tmp_path / "other")
    shutil.copytree(tmp_path / "other/server", trial / "server")
    before = contents(trial / "server")
    refresh_kits(trial / "authority")
    provision(describe(keys="shipped"), trial)
    assert contents(trial / "server") == before


@pytest.mark.parametrize(
    "name", ["ca.key", "ca.crt", "plan.key", "plan.pub", "project.yaml", "issued.json"]
)
def test_a_damaged_authority_is_not_mended_with_new_keys(
    trial: Path, describe: Callable[..., Path], name: str
) -> None:
    folder = trial / "authority"
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    before = contents(trial)
    assert code_of(lambda: refresh_kits(folder)) == "SAM-K102"
    if name != "project.yaml":  # which is given again
        assert code_of(lambda: provision(describe(keys="shipped"), trial)) == "SAM-K102"
        assert contents(trial) == before
    (folder / name).write_bytes(content)
    assert refresh_kits(folder) == ()


@pytest.mark.parametrize(("name", "made"), [("ca.key", "ca.crt"), ("plan.key", "plan.pub")])
def test_a_lost_key_is_noticed_before_anything_was_issued(
    describe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    made: str,
) -> None:
    out = tmp_path / "out"
    last = 0
    while not (out / "authority" / made).exists():
        with monkeypatch.context() as patch, contextlib.suppress(Outage):
            failing_writes(patch, last)
            provision(describe(), out)
        last += 1
    assert not read_register(out / "authority").server
    (out / "authority" / name).unlink()
    assert code_of(lambda: provision(describe(), out)) == "SAM-K102"
    assert not (out / "authority" / name).exists()


@pytest.mark.parametrize("name", ["ca.key", "plan.key"])
def test_keys_of_another_authority_are_noticed(trial: Path, out: Path, name: str) -> None:
    shutil.copy(out / "authority" / name, trial / "authority" / name)
    assert code_of(lambda: refresh_kits(trial / "authority")) == "SAM-K102"


def test_what_is_no_authority_is_refused(tmp_path: Path) -> None:
    for call in (refresh_kits, members, entries):
        assert code_of(lambda call=call: call(tmp_path)) == "SAM-K101"
    (tmp_path / "issued.json").write_text('{"format": 2}')
    assert code_of(lambda: members(tmp_path)) == "SAM-K102"


def test_one_process_at_a_time_works_in_an_authority(
    trial: Path, describe: Callable[..., Path], tmp_path: Path
) -> None:
    with locked(trial / "authority"):
        for call in (
            lambda: provision(describe(keys="shipped"), trial),
            lambda: refresh_kits(trial / "authority"),
            lambda: sign_request(trial / "authority", make_request(hospital(trial, tmp_path))),
        ):
            assert code_of(call) == "SAM-S110"


class Outage(Exception):
    """What a test stops a command with."""


def failing_writes(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Lets so many files be written and no more."""
    from samaritan import files

    count = 0

    def write(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        if count > last:
            raise Outage
        files.write_atomically(*arguments, **options)

    for module in ("provision.authority", "provision.kits", "provision.requests", "keys"):
        monkeypatch.setattr(f"samaritan.{module}.write_atomically", write)


@pytest.mark.parametrize("keys", ["at-site", "shipped"])
def test_a_provisioning_that_was_stopped_goes_on_with_the_keys_it_has(
    describe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    path = describe(keys=keys, sites=TREE["sites"][:1])
    stopped = 0
    while True:
        out = tmp_path / f"out {stopped}"
        with monkeypatch.context() as patch:
            failing_writes(patch, stopped)
            try:
                provision(path, out)
                break
            except Outage:
                pass
        secret = {
            name: content
            for name, content in contents(out).items()
            if name.endswith((".key", ".secret"))
        }
        done = provision(path, out)
        after = contents(out)
        assert {name: after[name] for name in secret} == secret
        assert done.absent == ()
        made = {name.removeprefix("server/") for name in after}
        assert made >= {*kits.SERVER_FILES, "server.zip"}
        register = read_register(out / "authority")
        newest = certificates.read_certificate(out / "authority/issued/server/server.crt")
        assert register.server[-1].serial == certificates.serial(newest)
        if keys == "shipped":
            handshake(server_side(out / "server"), client_side(site_folder(out)))
            known = members(out / "authority")["Northside"]
            assert known.node_key == (site_folder(out) / "node.pub").read_text().strip()
        assert provision(path, out).changed == ()
        stopped += 1
    assert stopped > 20


def test_a_signature_that_was_not_recorded_does_not_exist(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = make_request(hospital(out, tmp_path))
    with monkeypatch.context() as patch:
        failing_writes(patch, 0)
        with pytest.raises(Outage):
            sign_request(out / "authority", request)
    assert members(out / "authority") == {}
    with monkeypatch.context() as patch:
        failing_writes(patch, 1)  # recorded, and then no certificate
        with pytest.raises(Outage):
            sign_request(out / "authority", request)
    assert not (out / "authority/issued/Northside").exists()
    sign_request(out / "authority", request)
    serials = [grant.serial for grant in read_register(out / "authority").sites["Northside"]]
    assert len(set(serials)) == 2
    with open_authority(out / "authority") as opened:
        opened.revoke("Northside")
    crl = x509.load_pem_x509_crl((out / "authority/crl.pem").read_bytes())
    assert {f"{entry.serial_number:040x}" for entry in crl} == set(serials)


def test_a_revocation_that_was_stopped_is_done_by_repeating_it(
    trial: Path, monkeypatch: pytest.MonkeyPatch, clock: Callable[[datetime], None]
) -> None:
    with open_authority(trial / "authority") as opened, monkeypatch.context() as patch:
        failing_writes(patch, 1)
        with pytest.raises(Outage):
            opened.revoke("Northside")
    assert not list(x509.load_pem_x509_crl((trial / "authority/crl.pem").read_bytes()))
    date = read_register(trial / "authority").sites["Northside"][-1].revoked
    assert date is not None
    clock(date + timedelta(days=3))
    with open_authority(trial / "authority") as opened:
        assert opened.revoke("Northside") == date
    (entry,) = x509.load_pem_x509_crl((trial / "authority/crl.pem").read_bytes())
    assert entry.revocation_date_utc == date


# Texts


def uncommented(text: str) -> Any:
    """A settings file with every key set to the value it shows."""
    return yaml.safe_load(re.sub(r"^#(?=(?:  )?[a-z_]+:)", "", text, flags=re.MULTILINE))


def test_settings_show_every_key_with_its_default(out: Path) -> None:
    text = (site_folder(out, MARY) / "site.yaml").read_text()
    assert yaml.safe_load(text) == {"data": "/path/to/cases"}
    shown = uncommented(text)
    assert shown.keys() == SiteSettings.model_fields.keys()
    assert shown["policy"].keys() == SitePolicy.model_fields.keys()
    assert SiteSettings.model_validate(shown) == SiteSettings(data="/path/to/cases")
    text = (out / "server/server.yaml").read_text()
    assert yaml.safe_load(text) is None
    shown = uncommented(text)
    assert shown.keys() == ServerSettings.model_fields.keys()
    assert ServerSettings.model_validate(shown) == ServerSettings()


def test_a_site_learns_what_its_people_ask(
    describe: Callable[..., Path], tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    clock(NOW)
    provision(describe(), tmp_path / "out")
    provision(describe(keys="shipped"), tmp_path / "trial")
    at_site = (site_folder(tmp_path / "out", MARY) / "README.md").read_text()
    shipped = (site_folder(tmp_path / "trial", MARY) / "README.md").read_text()
    for text in (at_site, shipped):
        assert f"# Kit of {MARY} for Liver lesions" in text
        assert "| outgoing | `localhost`, TCP port 9444 |" in text
        assert "| incoming | none |" in text
        assert "2037-02-28" in text  # the authority's end
        assert "- Centre, +49 30 1" in text
        assert "{" not in text
    assert "180 days after it is signed" in at_site
    assert "samaritan site request" in at_site
    assert (NOW + timedelta(days=180)).strftime("%Y-%m-%d") in shipped
    assert "Use this kit for trials only" in shipped
    server = (tmp_path / "out/server/README.md").read_text()
    assert "TCP port 9444 of localhost, 127.0.0.1, ::1" in server
    assert (NOW + timedelta(days=397)).strftime("%Y-%m-%d") in server


def test_texts_promise_nothing() -> None:
    for path in (ROOT / "samaritan/provision/templates").iterdir():
        words = re.findall(
            r"\b(compliant|compliance|anonymous|secure(?! aggregation))\b", path.read_text().lower()
        )
        assert not words, path.name


def test_templates_are_part_of_the_package() -> None:
    assert '"provision/templates/*"' in (ROOT / "pyproject.toml").read_text()


# Requests


def test_request_sign_accept(out: Path, tmp_path: Path) -> None:
    kit = hospital(out, tmp_path, MARY)
    request = make_request(kit)
    assert request == kit.path("request.json")
    assert {mode(kit.path(name)) for name in ("site.key", "node.key", "identity.key")} == {0o600}
    assert members(out / "authority") == {}
    signed = sign_request(out / "authority", request)
    assert signed.certificate == out / "authority/issued" / folder_name(MARY) / "site.crt"
    sent = tmp_path / "from the coordinator.crt"
    shutil.copy(signed.certificate, sent)
    assert accept_certificate(kit, sent) == signed.not_after
    check_key_files(kit.folder)
    seen = handshake(server_side(out / "server"), client_side(kit.folder))
    assert (("commonName", MARY),) in seen["subject"]

    identity = make_identity(kit.path("identity.key")).public
    assert signed.fingerprint == fingerprint(identity) == kit_fingerprints(kit)["identity"]
    (member,) = members(out / "authority").values()
    assert member.name == signed.site == MARY
    assert member.node_key == kit.path("node.pub").read_text().strip()
    assert member.identity == identity.hex()
    assert (member.not_after, member.revoked) == (signed.not_after, False)
    with pytest.raises(dataclasses.FrozenInstanceError):
        member.revoked = True  # type: ignore[misc]
    with open_authority(out / "authority") as opened:
        opened.revoke(MARY)
    assert members(out / "authority")[MARY] == dataclasses.replace(member, revoked=True)


def test_fingerprints_are_for_people() -> None:
    said = fingerprint(b"key")
    assert re.fullmatch(r"([0-9a-f]{4} ){7}[0-9a-f]{4}", said)
    assert hashlib.sha256(b"key").hexdigest().startswith(said.replace(" ", ""))


def test_site_and_coordinator_read_out_the_same(out: Path, tmp_path: Path) -> None:
    kit = hospital(out, tmp_path)
    told = provision(out / "authority/project.yaml", out)
    prints = kit_fingerprints(kit)
    assert prints == {
        "authority": told.authority_fingerprint, "plan_signer": told.plan_fingerprint
    }  # fmt: skip
    kit.path("ca.crt").write_bytes((out / "server/server.crt").read_bytes())
    assert kit_fingerprints(kit)["authority"] != told.authority_fingerprint


def test_keys_at_a_site_are_made_once(out: Path, tmp_path: Path) -> None:
    kit = hospital(out, tmp_path)
    make_request(kit)
    names = ("site.key", "node.key", "node.pub", "identity.key")
    before = {name: kit.path(name).read_bytes() for name in names}
    make_request(kit)
    assert {name: kit.path(name).read_bytes() for name in names} == before
    public = certificates.read_private(kit.path("site.key")).public_key()
    for name in ("node.key", "site.key", "node.pub"):  # each can be had from the others
        kit.path(name).unlink()
        make_request(kit)
        assert name != "site.key" or kit.path(name).read_bytes() == before[name]
        before["node.key"] = (
            kit.path("node.key").read_bytes() if name == "node.key" else before["node.key"]
        )
        for other in set(names) - {name}:
            assert kit.path(other).read_bytes() == before[other]
        assert certificates.read_private(kit.path("node.key")).public_key() == public
        assert certificates.read_private(kit.path("site.key")).public_key() == public
    before["node.pub"] = before["node.pub"].strip() + b" somebody@northside\n"
    kit.path("node.pub").write_bytes(before["node.pub"])
    make_request(kit)
    assert kit.path("node.pub").read_bytes() == before["node.pub"]


def new_key(curve: ec.EllipticCurve | None = None) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve or ec.SECP384R1())


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("site.key", lambda: certificates.pkcs8(new_key()), "SAM-K145"),
        ("node.key", lambda: certificates.openssh(new_key()), "SAM-K145"),
        ("node.pub", lambda: certificates.node_key(new_key().public_key()).encode(), "SAM-K145"),
        ("node.pub", lambda: b"", "SAM-K145"),
        ("site.key", lambda: b"", "SAM-K122"),
        ("node.key", lambda: b"-----BEGIN OPENSSH PRIVATE KEY-----", "SAM-K122"),
        ("identity.key", lambda: b"short", "SAM-P301"),
        ("site.key", lambda: Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption()), "SAM-K122"),
    ],
)  # fmt: skip
def test_keys_at_a_site_that_cannot_be_used_stay_as_they_are(
    out: Path, tmp_path: Path, name: str, content: Callable[[], bytes], code: str
) -> None:
    kit = hospital(out, tmp_path)
    make_request(kit)
    kit.path("request.json").unlink()
    kit.path(name).write_bytes(content())
    before = contents(kit.folder)
    assert code_of(lambda: make_request(kit)) == code
    assert contents(kit.folder) == before


def test_a_site_does_not_go_on_with_a_key_of_another_kind(out: Path, tmp_path: Path) -> None:
    kit = hospital(out, tmp_path)
    kit.path("site.key").write_bytes(certificates.pkcs8(new_key(ec.SECP256R1())))
    assert code_of(lambda: make_request(kit)) == "SAM-K125"


Forge = Callable[..., Path]


@pytest.fixture
def forge(out: Path, tmp_path: Path) -> Forge:
    """Writes a request with other content, rightly signed: ``forge(key, identity, site="x")``."""

    def write(
        key: ec.EllipticCurvePrivateKey | None = None,
        identity: Identity | None = None,
        **changes: Any,
    ) -> Path:
        key, identity = key or new_key(), identity or Identity(Ed25519PrivateKey.generate())
        site = changes.get("site", "Northside")
        tree = {
            "project": "liver",
            "site": site,
            "csr": certificates.make_request(key, "liver", site),
            "node_key": certificates.node_key(key.public_key()),
            "identity": identity.public.hex(),
        }
        request = requests.Request(**{**tree, **changes})
        signature = identity.sign(request.message()).hex()
        path = tmp_path / "request.json"
        path.write_text(json.dumps({**request.model_dump(), "signature": signature}))
        return path

    return write


@pytest.fixture
def refused(out: Path) -> Iterator[Callable[[Path], str]]:
    """The code of a request that is not signed; the authority is as before."""
    folder = out / "authority"

    def check(path: Path) -> str:
        before = contents(folder)
        code = code_of(lambda: sign_request(folder, path))
        assert contents(folder) == before
        return code

    return check  # type: ignore[return-value]


def test_a_forged_request_would_be_signed(forge: Forge, out: Path) -> None:
    # What is refused below is refused for its fault, not for being forged.
    assert sign_request(out / "authority", forge()).site == "Northside"


@pytest.mark.parametrize("field", ["project", "site", "csr", "node_key", "identity", "signature"])
def test_a_request_that_was_changed_on_the_way(
    forge: Forge, refused: Callable[[Path], str], field: str, tmp_path: Path
) -> None:
    path = forge()
    one = json.loads(path.read_text())
    other = json.loads(forge(site=MARY, project="kidney").read_text())
    path.write_text(json.dumps({**one, field: other[field]}))
    assert refused(path) == "SAM-K143"


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: "nothing",
        lambda tree: [],
        lambda tree: {**tree, "format": 2},
        lambda tree: {**tree, "more": 1},
        lambda tree: {**tree, "identity": tree["identity"][:-1]},
        lambda tree: {**tree, "signature": tree["signature"].upper() + "00"},
        lambda tree: {key: value for key, value in tree.items() if key != "format"},
        lambda tree: {key: value for key, value in tree.items() if key != "signature"},
        lambda tree: {key: value for key, value in tree.items() if key != "csr"},
    ],
)
def test_a_file_that_is_no_request(
    forge: Forge, refused: Callable[[Path], str], change: Callable[[Any], Any]
) -> None:
    path = forge()
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    assert refused(path) == "SAM-K141"


def test_other_files_are_no_requests(refused: Callable[[Path], str], tmp_path: Path) -> None:
    (tmp_path / "request.json").write_bytes(b"\xff\xfe{")
    assert refused(tmp_path / "request.json") == "SAM-K141"
    assert refused(tmp_path / "missing.json") == "SAM-K141"
    assert refused(tmp_path) == "SAM-K141"


def test_a_request_for_another_project_or_site(
    forge: Forge, refused: Callable[[Path], str]
) -> None:
    assert refused(forge(project="kidney")) == "SAM-K142"
    assert refused(forge(site="Southside")) == "SAM-K103"
    assert refused(forge(site="northside")) == "SAM-K103"
    assert refused(forge(site="server")) == "SAM-K103"


PEM_HEAD = "-----BEGIN CERTIFICATE REQUEST-----"


def test_a_request_whose_parts_do_not_belong_together(
    forge: Forge, refused: Callable[[Path], str]
) -> None:
    key = new_key()
    good = certificates.make_request(key, "liver", "Northside")
    der = bytearray(x509.load_pem_x509_csr(good.encode()).public_bytes(serialization.Encoding.DER))
    der[-1] ^= 1  # in the signature, whose form stays right
    unsigned = f"{PEM_HEAD}\n{base64.b64encode(der).decode()}\n{PEM_HEAD.replace('BEGIN', 'END')}\n"
    assert x509.load_pem_x509_csr(unsigned.encode()).public_key() == key.public_key()
    assert refused(forge(key, csr=unsigned)) == "SAM-K123"
    assert refused(forge(key, csr="")) == "SAM-K123"
    assert refused(forge(key, csr=certificates.make_request(key, "liver", MARY))) == "SAM-K124"
    assert (
        refused(forge(key, csr=certificates.make_request(new_key(), "liver", "Northside")))
        == "SAM-K144"
    )
    other = certificates.node_key(new_key().public_key())
    assert refused(forge(key, node_key=other)) == "SAM-K144"
    assert refused(forge(key, node_key="")) == "SAM-K144"
    # Equal keys are equal texts, and nothing else reaches a plan.
    assert (
        refused(forge(key, node_key=certificates.node_key(key.public_key()) + " x")) == "SAM-K144"
    )
    assert refused(forge(new_key(ec.SECP256R1()))) == "SAM-K125"


def test_a_request_for_a_certificate_is_for_one_name(
    forge: Forge, refused: Callable[[Path], str]
) -> None:
    key = new_key()
    names = [x509.NameAttribute(NameOID.COMMON_NAME, name) for name in ("Northside", MARY)]
    for subject in (x509.Name(names), x509.Name([])):
        builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
        csr = builder.sign(key, certificates.SHA384()).public_bytes(serialization.Encoding.PEM)
        assert refused(forge(key, csr=csr.decode())) == "SAM-K124"


def test_a_site_chooses_nothing_but_its_key(forge: Forge, out: Path) -> None:
    key = new_key()
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "kidney"),
                x509.NameAttribute(NameOID.COMMON_NAME, "Northside"),
            ]
        )
    )
    builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
    builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
    csr = builder.sign(key, certificates.SHA384()).public_bytes(serialization.Encoding.PEM)
    signed = sign_request(out / "authority", forge(key, csr=csr.decode()))
    issued = certificates.read_certificate(signed.certificate)
    assert issued.subject == certificates._name("liver", "Northside")
    assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = issued.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [type(name) for name in names] == [x509.UniformResourceIdentifier]


def test_keys_of_another_site_are_refused(
    forge: Forge, refused: Callable[[Path], str], out: Path
) -> None:
    key, identity = new_key(), Identity(Ed25519PrivateKey.generate())
    sign_request(out / "authority", forge(key, identity))
    assert refused(forge(key, site=MARY)) == "SAM-K108"
    assert refused(forge(identity=identity, site=MARY)) == "SAM-K108"
    with open_authority(out / "authority") as opened:
        opened.revoke("Northside")
    assert refused(forge(key, site=MARY)) == "SAM-K108"


def test_other_keys_need_a_revocation_first(
    forge: Forge, refused: Callable[[Path], str], out: Path
) -> None:
    folder = out / "authority"
    key, identity = new_key(), Identity(Ed25519PrivateKey.generate())
    first = sign_request(folder, forge(key, identity))
    again = sign_request(folder, forge(key, identity))  # the same keys: a renewal
    assert first.serial != again.serial
    assert refused(forge(new_key(), identity)) == "SAM-K106"
    assert refused(forge(key, None)) == "SAM-K106"
    with open_authority(folder) as opened:
        opened.revoke("Northside")
    assert refused(forge(key, identity)) == "SAM-K107"
    assert refused(forge(key, None)) == "SAM-K107"
    second = new_key()
    sign_request(folder, forge(second, identity))
    member = members(folder)["Northside"]
    assert (member.revoked, member.identity) == (False, identity.public.hex())
    assert member.node_key == certificates.node_key(second.public_key())
    crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
    assert {f"{entry.serial_number:040x}" for entry in crl} == {first.serial, again.serial}
    assert refused(forge(key, identity)) == "SAM-K107"  # for ever


def test_renewal(out: Path, tmp_path: Path, clock: Callable[[datetime], None]) -> None:
    folder = out / "authority"
    with open_authority(folder) as opened:
        assert code_of(lambda: opened.renew("Northside")) == "SAM-K104"
        assert code_of(lambda: opened.revoke("Northside")) == "SAM-K104"
        for name in ("Southside", "../server", "northside"):
            assert code_of(lambda name=name: opened.renew(name)) == "SAM-K103"
            assert code_of(lambda name=name: opened.revoke(name)) == "SAM-K103"
        assert code_of(lambda: opened.revoke("server")) == "SAM-K103"
    kit = admitted(out, tmp_path)
    before = members(folder)["Northside"]
    clock(before.not_after + timedelta(days=1))  # late, and still possible
    with open_authority(folder) as opened:
        issued = opened.renew("Northside")
        path = opened.certificate("Northside")
    after = members(folder)["Northside"]
    assert after == dataclasses.replace(before, not_after=issued.not_valid_after_utc)
    assert accept_certificate(kit, path) == after.not_after
    with open_authority(folder) as opened:
        opened.revoke("Northside")
        assert code_of(lambda: opened.renew("Northside")) == "SAM-K105"


@pytest.mark.parametrize(
    "case",
    [
        "other authority",
        "other site",
        "other key",
        "server",
        "late",
        "early",
        "no certificate",
        "no key",
    ],
)
def test_a_site_accepts_its_own_certificate_alone(
    out: Path,
    describe: Callable[..., Path],
    tmp_path: Path,
    clock: Callable[[datetime], None],
    case: str,
) -> None:
    kit = admitted(out, tmp_path)
    good = members(out / "authority")["Northside"]
    path = out / "authority/issued/Northside/site.crt"
    code = "SAM-K147"
    if case == "other authority":
        provision(describe(), tmp_path / "other")
        path = sign_request(tmp_path / "other/authority", kit.path("request.json")).certificate
        code = "SAM-K146"
    elif case == "other site":
        # Of the right key, as only a wrong authority would sign it.
        with open_authority(out / "authority") as opened:
            key = certificates.read_private(kit.path("site.key")).public_key()
            wrong = certificates.certify_site(
                opened._signer, key, "liver", MARY, certificates.now(), 9
            )
        path = tmp_path / "wrong.crt"
        path.write_bytes(certificates.pem(wrong))
    elif case == "other key":
        other = hospital(out, tmp_path, folder="again")
        with open_authority(out / "authority") as opened:
            opened.revoke("Northside")
        sign_request(out / "authority", make_request(other))
    elif case == "server":
        path = out / "server/server.crt"
    elif case == "late":
        clock(good.not_after)
        code = "SAM-K148"
    elif case == "early":
        clock(certificates.now() - timedelta(hours=2))
        code = "SAM-K148"
    elif case == "no certificate":
        path, code = kit.path("site.key"), "SAM-K121"
    else:
        kit.path("site.key").unlink()
        code = "SAM-K149"
    before = contents(kit.folder)
    assert code_of(lambda: accept_certificate(kit, path)) == code
    assert contents(kit.folder) == before


def test_the_list_says_what_is_to_be_done(
    out: Path, tmp_path: Path, clock: Callable[[datetime], None]
) -> None:
    folder = out / "authority"
    start = certificates.now()
    clock(start)
    assert [entry.state for entry in entries(folder)] == [
        "valid",
        "awaiting request",
        "awaiting request",
    ]
    sign_request(folder, make_request(hospital(out, tmp_path, MARY)))  # 180 days
    states = {}
    for days in (150, 151, 179, 180):
        clock(start + timedelta(days=days))
        states[days] = entries(folder)[2]
    assert [(s.state, s.days_left) for s in states.values()] == [
        ("valid", 30), ("expiring", 29), ("expiring", 1), ("expired", 0)
    ]  # fmt: skip
    with open_authority(folder) as opened:
        opened.revoke(MARY)
    entry = entries(folder)[2]
    assert (entry.name, entry.state, entry.serial) == (MARY, "revoked", states[150].serial)
    assert authority_module.authority_entry(folder).state == "valid"


def test_a_revoked_site_of_a_trial_may_make_keys_elsewhere(trial: Path, tmp_path: Path) -> None:
    folder = trial / "authority"
    with open_authority(folder) as opened:
        opened.revoke("Northside")
    kit = hospital(trial, tmp_path)
    for name in ("site.key", "node.key", "node.pub", "site.crt"):
        kit.path(name).unlink()
    signed = sign_request(folder, make_request(kit))
    old = (site_folder(trial) / "site.crt").read_bytes()
    refresh_kits(folder)
    assert (site_folder(trial) / "site.crt").read_bytes() == old  # whose key is still there
    accept_certificate(kit, signed.certificate)
    handshake(server_side(trial / "server"), client_side(kit.folder))


# Commands


def test_the_commands_from_end_to_end(
    samaritan: Any, describe: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = samaritan("provision", describe(), "--out", out)
    assert done.code == 0, done.err
    for part in (
        "made",
        "server.zip",
        "Northside.zip to the site",
        "awaiting the requests of Northside",
    ):
        assert part in done.out
    again = samaritan("provision", describe(), "--out", out, "--json")
    told = json.loads(again.out)
    assert (told["made"], told["changed"], told["awaiting"]) == ([], [], ["Northside", MARY])
    assert told["authority_fingerprint"] in done.out
    assert "authority/ca.key" in told["unchanged"]
    text = samaritan("provision", describe(), "--out", out).out
    assert f"unchanged authority, server, sites/Northside, sites/{folder_name(MARY)}" in text

    authority = out / "authority"
    kit = hospital(out, tmp_path)
    request = make_request(kit)
    signed = samaritan("authority", "sign", authority, request)
    assert signed.code == 0, signed.err
    assert kit_fingerprints(kit)["identity"] in signed.out
    path = authority / "issued/Northside/site.crt"
    assert f"copy into the kit on the machine of Northside: {path}" in signed.out
    assert f"copy into the kit on the machine of server: {authority / 'crl.pem'}" in signed.out
    accept_certificate(kit, path)
    handshake(server_side(out / "server"), client_side(kit.folder))

    listed = json.loads(samaritan("authority", "list", authority, "--json").out)
    rows = {row["name"]: row for row in listed["certificates"]}
    assert [rows[n]["state"] for n in ("server", "Northside", MARY)] == [
        "valid",
        "valid",
        "awaiting request",
    ]
    assert (
        datetime.fromisoformat(rows["Northside"]["not_after"])
        == members(authority)["Northside"].not_after
    )
    lines = samaritan("authority", "list", authority).out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "server",
        "Northside",
        MARY,
        "the authority itself",
    ]

    before = contents(out)
    renewed = samaritan("authority", "renew", authority, "server", "--json")
    told = json.loads(renewed.out)
    assert "server/server.crt" in told["changed"]
    assert "server.zip" in told["changed"]
    assert set(told["copy"]["server"]) == {
        str(authority / "issued/server/server.crt"),
        str(authority / "crl.pem"),
    }
    assert contents(out)["server/server.key"] == before["server/server.key"]
    assert (out / "server/server.crt").read_bytes() == (
        authority / "issued/server/server.crt"
    ).read_bytes()
    handshake(server_side(out / "server"), client_side(kit.folder))

    revoked = samaritan("authority", "revoke", authority, "Northside")
    assert "Northside: revoked on" in revoked.out
    assert "server/crl.pem" in revoked.out
    with pytest.raises(ssl.SSLCertVerificationError, match="revoked"):
        handshake(server_side(out / "server"), client_side(kit.folder))


def test_a_command_that_cannot_ends_with_one_error(
    samaritan: Any, out: Path, describe: Callable[..., Path], tmp_path: Path
) -> None:
    for arguments, code in (
        (("authority", "list", tmp_path), "SAM-K101"),
        (("authority", "renew", out / "authority", "Southside"), "SAM-K103"),
        (("authority", "sign", out / "authority", describe(project="kidney")), "SAM-K141"),
        (("provision", tmp_path / "project.yaml", "--out", out), "SAM-K002"),
        (("authority", "revoke", out / "authority", "Northside"), "SAM-K104"),
    ):
        done = samaritan(*arguments)
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith(f"error: {code}")
        assert "Traceback" not in done.err


def test_what_was_revoked_is_told_though_no_kit_can_be_written(samaritan: Any, trial: Path) -> None:
    (trial / "server/README.md").unlink()
    (trial / "server/README.md").mkdir()
    done = samaritan("authority", "revoke", trial / "authority", "Northside")
    assert (done.code, "Northside: revoked on" in done.out) == (1, True)
    assert done.err.startswith("error: SAM-S")
    (trial / "server/README.md").rmdir()
    again = samaritan("authority", "revoke", trial / "authority", "Northside")
    assert (again.code, "server.zip" in again.out) == (0, True)


def test_a_full_disk_is_told(
    out: Path, describe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("samaritan.files.os.fsync", full)
    with pytest.raises(StorageError):
        provision(describe(sites=[*TREE["sites"], {"name": "East"}]), out)
