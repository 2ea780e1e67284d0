"""Fetching checkpoints from a real server on this machine, which misbehaves where it is told to."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import pty
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from samaritan.errors import ModelError
from samaritan.files import cache_dir
from samaritan.models import fetch as module
from samaritan.models.bases import BASES
from samaritan.models.fetch import SOURCES, Fetched, fetch

CONTENT = np.random.default_rng(3).bytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = "sam_test.pth"
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Server:
    """What the server does, and what it was asked.

    Args:
        content: The file.
        etag: Its version.
        ranges: Whether requests for a part get a part.
        if_range: Whether a part of another version than the one wanted is refused.
        cuts: After how many bytes each of the next connections breaks off.
        statuses: What each of the next requests is answered with instead.
        more: Headers that replace others; None leaves one out.
        stall_s: How long it is silent in the midst of the file.
        redirect: Where it sends everyone to.
        shifted: By how many bytes the part it sends is the wrong one.
    """

    content: bytes = CONTENT
    etag: str | None = '"v1"'
    ranges: bool = True
    if_range: bool = True
    cuts: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    more: dict[str, str | None] = field(default_factory=dict)
    stall_s: float = 0
    redirect: str = ""
    shifted: int = 0
    chunked: bool = False
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    url: str = ""

    @property
    def ranges_asked(self) -> list[str | None]:
        return [wanted for _, wanted, _ in self.asked]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, settings: Server, *arguments: Any) -> None:
        self.settings = settings
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        s = self.settings
        wanted, version = self.headers.get("Range"), self.headers.get("If-Range")
        s.asked.append((self.path, wanted, version))
        self.close_connection = True
        if s.redirect:
            return self.answer(302, {"Location": s.redirect}, b"")
        if s.statuses:
            return self.answer(s.statuses.pop(0), {}, b"sorry")
        size, start = len(s.content), 0
        if wanted and s.ranges and not (s.if_range and version not in (None, s.etag)):
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= size:
                return self.answer(416, {"Content-Range": f"bytes */{size}"}, b"")
            start += s.shifted
            return self.answer(
                206, {"Content-Range": f"bytes {start}-{size - 1}/{size}"}, s.content[start:]
            )
        return self.answer(200, {}, s.content)

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        s = self.settings
        usual = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body))}
        self.send_response(status)
        for key, value in (usual | headers | {"ETag": s.etag} | s.more).items():
            if value is not None:
                self.send_header(key, value)
        self.end_headers()
        if s.cuts and status in (200, 206):
            body = body[: s.cuts.pop(0)]
        with contextlib.suppress(OSError):
            if s.stall_s and status in (200, 206):
                self.wfile.write(body[:1000])
                time.sleep(s.stall_s)
                body = body[1000:]
            if s.chunked:
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            self.wfile.write(body)


def serving(settings: Server, context: ssl.SSLContext | None = None) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, settings))
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    settings.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_port}/sam"
    server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


@pytest.fixture
def server() -> Iterator[Server]:
    settings = Server()
    running = serving(settings)
    yield settings
    running.shutdown()
    running.server_close()


@pytest.fixture(autouse=True)
def small_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The published file of vit_b is the small one here; no proxy and no cache of the machine."""
    monkeypatch.setitem(BASES, "vit_b", replace(BASES["vit_b"], checkpoint=(NAME, SHA256)))
    for variable in list(os.environ):
        if variable.lower().endswith("_proxy") or variable == "SSL_CERT_FILE":
            monkeypatch.delenv(variable)
    monkeypatch.setenv("SAMARITAN_CACHE", str(tmp_path / "cache"))


@dataclass
class Fetch:
    """Fetches vit_b into one folder and remembers the news."""

    server: Server
    folder: Path
    notes: list[str] = field(default_factory=list)
    seen: list[tuple[int, int | None]] = field(default_factory=list)

    def __call__(self, **options: Any) -> Fetched:
        return fetch("vit_b", self.folder, **{
            "url_base": self.server.url, "waits_s": (0, 0), "timeout_s": 5,
            "note": self.notes.append, "progress": lambda *news: self.seen.append(news), **options,
        })  # fmt: skip

    def refused(self, code: str, **options: Any) -> ModelError:
        with pytest.raises(ModelError) as caught:
            self(**options)
        assert caught.value.code == code, str(caught.value)
        return caught.value

    @property
    def target(self) -> Path:
        return self.folder / NAME

    @property
    def part(self) -> Path:
        return self.folder / f"{NAME}.part"

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def begin(self, size: int, etag: str = '"v1"', content: bytes = CONTENT) -> None:
        """What an earlier, broken download leaves."""
        self.folder.mkdir()
        self.part.write_bytes(content[:size])
        if etag:
            self.part.with_name(f"{NAME}.part.etag").write_text(etag)


@pytest.fixture
def get(server: Server, tmp_path: Path) -> Fetch:
    return Fetch(server, tmp_path / "models")


def is_whole(get: Fetch) -> bool:
    return get.left() == [NAME] and get.target.read_bytes() == CONTENT


# The straight way.


def test_a_file_is_downloaded_and_nothing_else_is_left(get: Fetch) -> None:
    assert get() == Fetched(get.target, SHA256, len(CONTENT), True, 0)
    assert is_whole(get)
    assert get.server.asked == [(f"/sam/{NAME}", None, None)]
    assert get.seen[0] == (0, len(CONTENT))
    assert get.seen[-1] == (len(CONTENT), len(CONTENT))
    assert get.seen == sorted(get.seen)


def test_a_file_that_is_there_is_not_downloaded_again(get: Fetch) -> None:
    get()
    get.server.asked.clear()
    assert get() == Fetched(get.target, SHA256, len(CONTENT), False, 0)
    assert get.server.asked == []
    assert is_whole(get)


def test_a_file_that_is_there_needs_no_writable_folder(
    get: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    get()
    monkeypatch.setattr(module, "_locked", None)  # as root, permissions would stop nothing
    assert not get().downloaded


def test_another_file_of_that_name_is_never_overwritten(get: Fetch) -> None:
    get.folder.mkdir()
    get.target.write_bytes(b"mine")
    error = get.refused("SAM-M402")
    assert get.target.read_bytes() == b"mine"
    assert get.server.asked == []
    for word in (str(get.target), hashlib.sha256(b"mine").hexdigest(), SHA256):
        assert word in error.message
    assert "--to" in error.hint


def test_the_published_places_are_encrypted() -> None:
    site = "https://dl.fbaipublicfiles.com"
    assert {name for name in SOURCES if not name.startswith("sam2_")} == {"vit_b", "vit_l", "vit_h"}
    for name, place in SOURCES.items():
        sam2 = name.startswith("sam2_hiera_")
        assert place == f"{site}/segment_anything{'_2/092824' if sam2 else ''}"
        assert BASES[name].checkpoint


@pytest.mark.parametrize("name", ["tiny", "vit_x", "", "mini"])
def test_a_base_without_a_published_file(
    mini: Any, server: Server, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ModelError, match="vit_b, vit_l, vit_h") as caught:
        fetch(name, tmp_path / "models", url_base=server.url)
    assert caught.value.code == "SAM-M401"
    assert not (tmp_path / "models").exists()


def test_the_cache_of_the_user(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    assert fetch("vit_b", url_base=server.url + "/").path == cache_dir() / "models" / NAME
    assert server.asked[0][0] == f"/sam/{NAME}"
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("SAMARITAN_CACHE", "~/s")
    assert cache_dir() == Path("/h/s")
    monkeypatch.setenv("SAMARITAN_CACHE", "")
    assert cache_dir() == Path("/x/samaritan")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/h/.cache/samaritan")


# Going on.


def test_an_earlier_download_is_continued(get: Fetch) -> None:
    get.begin(1_234_567)
    assert get().resumed_from == 1_234_567
    assert is_whole(get)
    assert get.server.asked == [(f"/sam/{NAME}", "bytes=1234567-", '"v1"')]
    assert get.seen[0] == (1_234_567, len(CONTENT))


def test_a_cut_connection_is_continued(get: Fetch) -> None:
    get.server.cuts = [1_000_000, 500_000]
    assert get().resumed_from == 0
    assert is_whole(get)
    assert get.server.ranges_asked == [None, "bytes=1000000-", "bytes=1500000-"]
    assert "ended at 1000000 of 3000000 bytes; 1000000 bytes are kept" in " ".join(get.notes)


def test_what_arrived_is_kept_when_every_try_is_cut(get: Fetch) -> None:
    get.server.cuts = [1000, 100, 10]
    error = get.refused("SAM-M406")
    assert "3 times" in error.message
    assert f"1110 bytes are kept in {get.part}" in error.message
    assert "Run this again" in error.hint
    assert get.part.read_bytes() == CONTENT[:1110]
    assert not get.target.exists()
    assert get().resumed_from == 1110
    assert is_whole(get)
    assert get.server.ranges_asked[-1] == "bytes=1110-"


def test_pauses_grow(get: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module.time, "sleep", slept.append)
    get.server.statuses = [503] * 5
    error = get.refused("SAM-M406", waits_s=module.fetch.__kwdefaults__["waits_s"])
    assert slept == [1, 2, 4, 8]
    assert "503" in error.message


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_recovers(get: Fetch, status: int) -> None:
    get.server.statuses = [status, status]
    get()
    assert is_whole(get)


def test_a_silent_server_is_asked_again(get: Fetch) -> None:
    get.server.stall_s = 1.5
    error = get.refused("SAM-M406", timeout_s=0.2, waits_s=())
    assert "no answer in time" in error.message
    assert get.part.read_bytes() == CONTENT[:1000]


def test_a_server_without_ranges_starts_over(get: Fetch) -> None:
    get.begin(1000)
    get.server.ranges = False
    assert get().resumed_from == 0
    assert is_whole(get)
    assert "starting from the beginning" in " ".join(get.notes)


@pytest.mark.parametrize("if_range", [True, False])
def test_a_changed_file_starts_over(get: Fetch, if_range: bool) -> None:
    get.begin(1000, '"v0"', bytes(1000))
    get.server.if_range = if_range
    assert get().resumed_from == 0
    assert is_whole(get)
    assert get.server.asked[0][1:] == ("bytes=1000-", '"v0"')
    assert len(get.server.asked) == (1 if if_range else 2)


def test_a_file_changed_between_two_tries_starts_over(get: Fetch) -> None:
    get.server.content, get.server.etag = bytes(len(CONTENT)), '"v0"'
    get.server.cuts = [1000]

    def change(text: str) -> None:
        get.server.content, get.server.etag = CONTENT, '"v1"'

    get(note=change)
    assert is_whole(get)


@pytest.mark.parametrize("etag", ["", "junk\r\nHost: x", 'W/"v1"'])
def test_without_a_strong_version_the_hash_alone_decides(get: Fetch, etag: str) -> None:
    get.begin(1000, etag)
    get.server.etag = etag if etag.startswith("W/") else None
    assert get().resumed_from == 1000
    assert get.server.asked[0][1:] == ("bytes=1000-", None)
    assert is_whole(get)


def test_a_forgotten_version_is_not_used_again(get: Fetch) -> None:
    get.begin(1000, '"v0"')
    get.server.etag = None
    get.server.cuts = [500]
    get.refused("SAM-M406", waits_s=())
    assert get.left() == [f"{NAME}.part"]


@pytest.mark.parametrize("shifted", [1, -1])
def test_a_part_from_another_place_is_not_appended(get: Fetch, shifted: int) -> None:
    get.begin(1000)
    get.server.shifted = shifted
    get()
    assert is_whole(get)
    assert get.server.ranges_asked == ["bytes=1000-", None]


@pytest.mark.parametrize("told", [None, "nonsense", "bytes */3000000"])
def test_a_part_that_does_not_tell_its_place_is_not_appended(get: Fetch, told: str | None) -> None:
    get.begin(1000)
    get.server.more = {"Content-Range": told}
    assert get().resumed_from == 0
    assert is_whole(get)
    assert get.server.ranges_asked == ["bytes=1000-", None]


def test_a_whole_file_that_calls_itself_a_part_is_not_appended(get: Fetch) -> None:
    get.begin(1000)
    get.server.ranges = False
    get.server.more = {"Content-Range": "bytes 1000-2999999/3000000"}
    assert get().resumed_from == 0
    assert is_whole(get)


def test_a_part_of_a_file_of_unknown_size(get: Fetch) -> None:
    get.begin(1000)
    get.server.more = {"Content-Range": "bytes 1000-2999999/*"}
    assert get().resumed_from == 1000
    assert is_whole(get)


def test_a_complete_part_is_verified_and_gets_its_name(get: Fetch) -> None:
    get.begin(len(CONTENT))
    assert get().resumed_from == len(CONTENT)
    assert is_whole(get)


def test_a_part_that_is_too_long_is_deleted(get: Fetch) -> None:
    get.begin(len(CONTENT) + 5, content=CONTENT + b"12345")
    get.refused("SAM-M407")
    assert get.left() == []


def test_a_size_that_is_not_told(get: Fetch) -> None:
    get.server.more = {"Content-Length": None}
    get()
    assert is_whole(get)
    assert get.seen[-1] == (len(CONTENT), None)


def test_a_file_in_chunks(get: Fetch) -> None:
    get.server.chunked = True
    get.server.more = {"Content-Length": None, "Transfer-Encoding": "chunked"}
    get()
    assert is_whole(get)


# What is refused.


def test_wrong_bytes_are_deleted(get: Fetch) -> None:
    get.server.content = CONTENT[:-1] + b"x"
    error = get.refused("SAM-M407")
    assert SHA256 in error.message
    assert hashlib.sha256(get.server.content).hexdigest() in error.message
    assert get.left() == []
    get.server.content = CONTENT
    assert get().resumed_from == 0


def test_a_part_with_a_wrong_beginning_is_deleted(get: Fetch) -> None:
    get.begin(1000, "", bytes(1000))
    get.refused("SAM-M407")
    assert get.left() == []


@pytest.mark.parametrize("status", [403, 404, 410])
def test_a_refusal_is_told_at_once(get: Fetch, status: int) -> None:
    get.server.statuses = [status] * 9
    error = get.refused("SAM-M405")
    assert str(status) in error.message
    assert f"{get.server.url}/{NAME}" in error.message
    assert len(get.server.asked) == 1
    assert get.left() == []


def test_a_login_page_is_not_the_file_and_costs_no_bytes(get: Fetch) -> None:
    get.begin(1000)
    get.server.content = b"<html>Log in</html>"
    get.server.ranges = False
    get.server.more = {"Content-Type": "text/html; charset=utf-8"}
    assert "a web page" in get.refused("SAM-M405").message
    assert get.part.read_bytes() == CONTENT[:1000]


@pytest.mark.parametrize("status", [201, 203, 206])
def test_an_unasked_status_is_not_the_file(get: Fetch, status: int) -> None:
    get.server.statuses = [status]
    assert str(status) in get.refused("SAM-M405").message


def dead_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def hang_up(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(65536)
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # until the other side closes; else it may see a reset instead


@pytest.mark.parametrize("how", ["refused", "name", "silent", "hangs up"])
def test_offline_is_one_error_with_the_way_round(get: Fetch, how: str) -> None:
    begun = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        if how == "hangs up":
            threading.Thread(target=hang_up, args=(silent,), daemon=True).start()
        url = {
            "refused": f"http://127.0.0.1:{dead_port()}",
            "name": "http://samaritan.invalid",
        }.get(how, f"http://127.0.0.1:{port}")
        error = get.refused("SAM-M404", url_base=url, timeout_s=0.3, waits_s=(60,))
    assert f"{url}/{NAME}" in error.message
    told = {"refused": "refused", "silent": "in time", "hangs up": "closed", "name": "name"}[how]
    assert told in error.message.removeprefix(f"cannot reach {url}/{NAME}: ").lower()
    for words in (NAME, SHA256, str(get.folder), "`samaritan models verify FILE`", "https_proxy"):
        assert words in error.hint
    assert get.left() == []
    assert time.monotonic() - begun < 30


def test_offline_keeps_what_is_there(get: Fetch) -> None:
    get.begin(1000)
    get.refused("SAM-M404", url_base=f"http://127.0.0.1:{dead_port()}")
    assert get.part.read_bytes() == CONTENT[:1000]


def test_a_network_that_goes_away_keeps_what_arrived(get: Fetch, tmp_path: Path) -> None:
    settings = Server(cuts=[1000])
    running = serving(settings)

    def switch_off(text: str) -> None:
        running.shutdown()
        running.server_close()

    error = get.refused("SAM-M406", url_base=settings.url, note=switch_off, waits_s=(0,))
    assert "refused" in error.message
    assert "1000 bytes are kept" in error.message


# Proxies and certificates.


def test_a_proxy_of_the_environment_is_used(get: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", get.server.url.removesuffix("/sam"))
    get(url_base="http://samaritan.invalid")
    assert get.server.asked[0][0] == f"http://samaritan.invalid/{NAME}"
    assert is_whole(get)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that nobody signed, with its key."""
    from ipaddress import IPv4Address

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def encrypted(certificate: Path) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    settings = Server()
    running = serving(settings, context)
    yield settings
    running.shutdown()
    running.server_close()


def test_a_certificate_that_nobody_signed_is_refused(
    get: Fetch, encrypted: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = get.refused("SAM-M410", url_base=encrypted.url)
    assert "self-signed" in error.message
    assert "SSL_CERT_FILE" in error.hint
    assert encrypted.asked == []
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    get(url_base=encrypted.url)
    assert is_whole(get)


def test_a_redirection_stays_encrypted(
    get: Fetch, encrypted: Server, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    encrypted.redirect = f"{get.server.url}/{NAME}"
    assert "unencrypted" in get.refused("SAM-M405", url_base=encrypted.url).message
    assert get.server.asked == []


def test_a_redirection_is_followed_with_the_range(get: Fetch, server: Server) -> None:
    other = Server(redirect=f"{server.url}/elsewhere")
    running = serving(other)
    get.begin(1000)
    get(url_base=other.url)
    running.shutdown()
    running.server_close()
    assert server.asked == [("/sam/elsewhere", "bytes=1000-", '"v1"')]
    assert is_whole(get)


# The disk.


def test_too_little_space_is_told_before_the_download(
    get: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    get.begin(1_000_000)
    usage = type(shutil.disk_usage("/"))
    free = len(CONTENT) - 1_000_000
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(9, 9, free - 1))
    error = get.refused("SAM-M408")
    assert f"{free - 1} bytes free, {free} are needed" in error.message
    assert get.part.stat().st_size == 1_000_000
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage(9, 9, free))
    assert get().resumed_from == 1_000_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_up(get: Fetch) -> None:
    get.folder.mkdir()
    get.part.symlink_to("/dev/full")
    error = get.refused("SAM-M408")
    assert "no space is left" in error.message
    assert "bytes are kept" in error.message


def test_a_file_larger_than_the_system_permits(get: Fetch) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        error = get.refused("SAM-M409")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.strerror(errno.EFBIG) in error.message
    assert get.part.stat().st_size == 100_000
    get()
    assert is_whole(get)


def test_a_folder_that_cannot_be(get: Fetch) -> None:
    get.folder.write_text("a file")
    assert str(get.folder) in get.refused("SAM-M409").message


def test_the_bytes_are_on_the_disk_before_they_get_their_name(
    get: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[Path, bool]] = []
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        path = next(
            path
            for path in (get.part, get.target, get.folder)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
        )
        synced.append((path, get.target.exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    get()
    assert synced == [(get.part, False), (get.folder, True)]


# Two processes.


def test_a_second_process_is_refused_and_disturbs_nothing(get: Fetch) -> None:
    errors = []

    def second(have: int, total: int | None) -> None:
        if not errors and have:
            again = Fetch(get.server, get.folder)
            errors.append(again.refused("SAM-M403"))

    get(progress=second)
    assert str(get.part) in errors[0].message
    assert is_whole(get)
    assert len(get.server.asked) == 1


def test_a_lock_of_another_process_counts_and_ends_with_it(get: Fetch) -> None:
    get.folder.mkdir()
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.flock(f, fcntl.LOCK_EX);"
        "print('locked', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(get.part)], stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout
        other.stdout.readline()
        get.refused("SAM-M403")
        assert get.part.exists()
        other.kill()
    get()
    assert is_whole(get)


@pytest.mark.parametrize("then", ["finishes", "gives up"])
def test_a_process_that_ends_between_opening_and_locking(
    get: Fetch, monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    get.begin(len(CONTENT))
    flock: Callable[[Any, int], None] = fcntl.flock

    def late(file: Any, operation: int) -> None:
        get.part.replace(get.target) if then == "finishes" else get.part.unlink()
        flock(file, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    get.refused("SAM-M403")
    if then == "finishes":
        assert get.target.read_bytes() == CONTENT
    assert get.server.asked == []


def test_a_file_that_another_process_finished_is_kept(
    get: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock: Callable[[Any, int], None] = fcntl.flock

    def late(file: Any, operation: int) -> None:
        get.target.write_bytes(CONTENT)
        flock(file, operation)

    monkeypatch.setattr(module.fcntl, "flock", late)
    assert not get().downloaded
    assert get.server.asked == []
    assert is_whole(get)


# The command line.


def test_the_command_prints_one_json_object(
    samaritan: Any, server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(SOURCES, "vit_b", server.url)
    folder = tmp_path / "to"
    folder.mkdir()
    (folder / f"{NAME}.part").write_bytes(CONTENT[:1000])
    done = samaritan("models", "fetch", "vit_b", "--to", folder, "--json")
    assert done.code == 0, done.err
    expected = {
        "base": "vit_b", "file": str(folder / NAME), "sha256": SHA256, "bytes": len(CONTENT),
        "downloaded": True, "resumed_from": 1000,
    }  # fmt: skip
    assert json.loads(done.out) == expected
    assert "1000 bytes of an earlier download" in done.err
    again = samaritan("models", "fetch", "vit_b", "--to", folder, "--json")
    assert json.loads(again.out) == expected | {"downloaded": False, "resumed_from": 0}


def test_the_command_names_the_file(
    samaritan: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "vit_b", server.url)
    done = samaritan("models", "fetch", "vit_b")
    assert (done.code, done.err) == (0, "checking the SHA-256\n")
    assert done.out.startswith(f"{cache_dir() / 'models' / NAME}: downloaded; 3000000 bytes")
    done = samaritan("models", "fetch", "vit_b")
    assert "nothing downloaded" in done.out


def test_the_command_prints_a_line_now_and_then(
    samaritan: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "vit_b", server.url)
    monkeypatch.setattr("samaritan.cli.console._EVERY_S", 0.0)
    assert "\n  3.0 MB of 3.0 MB\n" in "\n" + samaritan("models", "fetch", "vit_b").err


@pytest.mark.parametrize(("name", "code"), [("tiny", "SAM-M401"), ("vit_b", "SAM-M404")])
def test_a_failure_of_the_command_is_one_error(
    samaritan: Any, monkeypatch: pytest.MonkeyPatch, name: str, code: str
) -> None:
    monkeypatch.setitem(SOURCES, "vit_b", f"http://127.0.0.1:{dead_port()}")
    done = samaritan("models", "fetch", name, "--json")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"error: {code}  ")
    assert "hint: " in done.err
    assert "Traceback" not in done.err


def test_help_and_wrong_usage(samaritan: Any) -> None:
    assert samaritan("models", "fetch", "--help").code == 0
    assert samaritan("models", "fetch").code == 2


ON_A_TERMINAL = """
import sys
from dataclasses import replace
from samaritan.cli.main import main
from samaritan.models.bases import BASES
from samaritan.models.fetch import SOURCES
url, name, sha256 = sys.argv[1:]
SOURCES["vit_b"] = url
BASES["vit_b"] = replace(BASES["vit_b"], checkpoint=(name, sha256))
sys.argv = ["samaritan", "models", "fetch", "vit_b", "--json"]
main()
"""


def test_a_terminal_gets_a_bar_and_stdout_stays_clean(server: Server) -> None:
    ours, theirs = pty.openpty()
    server.cuts = [1_000_000]
    with subprocess.Popen(
        [sys.executable, "-c", ON_A_TERMINAL, server.url, NAME, SHA256],
        stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal
            while piece := os.read(ours, 65536):
                shown += piece
        assert process.stdout
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, shown
    assert json.loads(out)["bytes"] == len(CONTENT)
    assert "━" in shown.decode()
    assert "3.0/3.0 MB" in shown.decode()
    assert b"1000000 bytes are kept" in shown
