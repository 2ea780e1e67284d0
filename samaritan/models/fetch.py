"""Downloading a published SAM checkpoint: resumed where it stopped, verified before it is used."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import re
import shutil
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPMessage, HTTPResponse
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from samaritan.errors import ModelError
from samaritan.files import cache_dir, sync_folder
from samaritan.models.bases import BASES
from samaritan.models.checkpoints import file_sha256

SOURCES = dict.fromkeys(
    ("vit_b", "vit_l", "vit_h"), "https://dl.fbaipublicfiles.com/segment_anything"
) | dict.fromkeys(
    ("sam2_hiera_tiny", "sam2_hiera_small", "sam2_hiera_base_plus", "sam2_hiera_large"),
    "https://dl.fbaipublicfiles.com/segment_anything_2/092824",
)
"""Where the checkpoint of a base is published, without the file name."""

_PIECE_BYTES = 2**20
_ETAG = re.compile(r'(W/)?"[\x21\x23-\x7e]*"')
_CONTENT_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS}
"""Refusals that a server takes back by itself, besides all of its own faults (5xx)."""
_FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Fetched:
    """A published checkpoint on this machine.

    Attributes:
        path: The verified file.
        sha256: Its hash.
        size_bytes: Its size.
        downloaded: False when it was there already.
        resumed_from: Bytes of an earlier, broken download that were kept.
    """

    path: Path
    sha256: str
    size_bytes: int
    downloaded: bool
    resumed_from: int


def fetch(
    name: str,
    folder: Path | None = None,
    *,
    url_base: str | None = None,
    note: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int | None], None] = lambda have, total: None,
    waits_s: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    timeout_s: float = 30.0,
) -> Fetched:
    """Downloads the published checkpoint of a base, unless it is there already.

    The bytes go to `<file>.part`, which a later call continues; only a file of the published
    SHA-256 gets its name.

    Args:
        name: A key of `SOURCES`.
        folder: Where to; the folder `models` of the user's cache by default.
        url_base: Fetch from here instead of the published place.
        note: Called with news that stay.
        progress: Called with the bytes that are there and those of the whole file, if known.
        waits_s: Pauses before another try after a broken connection.
        timeout_s: Longest silence of the server.

    Raises:
        ModelError: When there is nothing to fetch under this name, the server or the disk
            refuses, or the bytes are not the published ones.
    """
    published = {n: base.checkpoint for n, base in BASES.items() if base.checkpoint}
    if name not in SOURCES or name not in published:
        raise ModelError(
            "SAM-M401",
            f"no checkpoint is published for the base {name!r}",
            f"Choose one of: {', '.join(n for n in SOURCES if n in published)}.",
        )
    file_name, sha256 = published[name]
    target = (folder or cache_dir() / "models") / file_name
    url = f"{(url_base or SOURCES[name]).rstrip('/')}/{file_name}"
    download = _Download(url, target, sha256, note, progress, waits_s, timeout_s)
    try:
        downloaded = download.run()
        size_bytes = target.stat().st_size
    except OSError as error:  # those of the network have become errors of their own by now
        raise _disk_error(download.part, error) from error
    return Fetched(target.absolute(), sha256, size_bytes, downloaded, download.resumed_from)


class _BrokenError(Exception):
    """Trouble on the way to the server that may pass."""


class _UnreachableError(_BrokenError):
    """The server did not answer at all."""


@dataclass
class _Download:
    url: str
    target: Path
    sha256: str
    note: Callable[[str], None]
    progress: Callable[[int, int | None], None]
    waits_s: Sequence[float]
    timeout_s: float
    resumed_from: int = 0

    @property
    def part(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part")

    @property
    def etag_file(self) -> Path:
        """Says which version of the server's file the bytes in `part` belong to."""
        return self.part.with_name(f"{self.part.name}.etag")

    def run(self) -> bool:
        """Whether anything had to be downloaded to have the file."""
        if self._is_there():
            return False
        with _locked(self.part) as part:
            if self._is_there():  # another process was quicker
                return False
            self.resumed_from = os.fstat(part.fileno()).st_size
            if self.resumed_from:
                self.note(f"going on after the {self.resumed_from} bytes of an earlier download")
            self._download(part)
            os.fsync(part.fileno())
            self._verify()
            self.part.replace(self.target)
            self.etag_file.unlink(missing_ok=True)
            sync_folder(self.target.parent)
        return True

    def _is_there(self) -> bool:
        if not self.target.exists():
            return False
        self.note(f"checking the SHA-256 of {self.target}")
        actual = file_sha256(self.target)
        if actual != self.sha256:
            raise ModelError(
                "SAM-M402",
                f"{self.target} exists and is not the published file: its SHA-256 is {actual}, "
                f"expected {self.sha256}",
                "Delete it or move it away and run this again, or name another folder with --to.",
            )
        return True

    def _verify(self) -> None:
        self.note("checking the SHA-256")
        actual = file_sha256(self.part)
        if actual != self.sha256:
            self.part.unlink()
            self.etag_file.unlink(missing_ok=True)
            raise ModelError(
                "SAM-M407",
                f"what {self.url} sent has SHA-256 {actual}, expected {self.sha256}; "
                "it has been deleted",
                f"Run this again; if that does not help, something on the way alters the file: "
                f"{self._by_hand()}",
            )

    def _download(self, part: io.FileIO) -> None:
        """Fills `part` to the end, with a few tries.

        Raises:
            ModelError: When the server cannot be reached, or breaks off each time.
        """
        for tries, wait_s in enumerate((*self.waits_s, None), start=1):
            try:
                return self._try(part)
            except _BrokenError as fault:
                kept = os.fstat(part.fileno()).st_size
                if isinstance(fault, _UnreachableError) and tries == 1:
                    raise self._offline(fault) from fault
                if wait_s is None:
                    raise ModelError(
                        "SAM-M406",
                        f"the download of {self.url} broke off {tries} times, at last: {fault}; "
                        f"{kept} bytes are kept in {self.part}",
                        "Run this again to go on from there.",
                    ) from fault
                self.note(f"{fault}; {kept} bytes are kept, trying again in {wait_s:g} s")
                time.sleep(wait_s)
        return None

    def _try(self, part: io.FileIO) -> None:
        """Fills `part` to the end over one connection."""
        have = os.fstat(part.fileno()).st_size
        response = self._request(have)
        if response is None:
            return None
        with response:
            if self._continues(response, have):
                return self._receive(response, part, have)
            whole = not have or response.status != HTTPStatus.PARTIAL_CONTENT
            if whole:
                self._expect_whole(response)
            if have:
                self.note("the server does not continue the file; starting from the beginning")
                self.resumed_from = 0
                part.truncate(0)
            if whole:
                self._remember(response)
                return self._receive(response, part, 0)
        return self._try(part)

    def _request(self, have: int) -> HTTPResponse | None:
        """The server's answer to a request for what comes after `have` bytes; None: nothing."""
        request = urllib.request.Request(self.url, headers={"User-Agent": "samaritan"})  # noqa: S310 -- from SOURCES
        if have:
            request.add_header("Range", f"bytes={have}-")
            if (etag := self._etag()) and not etag.startswith("W/"):
                request.add_header("If-Range", etag)
        try:
            answer: HTTPResponse = _opener().open(request, timeout=self.timeout_s)
        except HTTPError as error:
            with error:
                if have and error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                    return None
                raise self._refusal(error) from error
        except (OSError, HTTPException) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise self._untrusted(reason) from error
            raise _UnreachableError(_told(reason)) from error
        return answer

    def _continues(self, response: HTTPResponse, have: int) -> bool:
        """Whether an answer goes on after `have` bytes of the same version of the file."""
        if not have or response.status != HTTPStatus.PARTIAL_CONTENT:
            return False
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        before, now = self._etag(), response.headers.get("ETag")
        return found is not None and int(found[1]) == have and (not before or now in (None, before))

    def _expect_whole(self, response: HTTPResponse) -> None:
        # Login pages of proxies come with status 200.
        page = response.headers.get_content_type() == "text/html"
        if response.status != HTTPStatus.OK or page:
            what = "a web page" if page else f"status {response.status}"
            raise ModelError(
                "SAM-M405", f"{self.url} answered with {what} instead of the file", self._by_hand()
            )

    def _receive(self, response: HTTPResponse, part: io.FileIO, have: int) -> None:
        total = _total_bytes(response, have)
        free = shutil.disk_usage(self.part.parent).free
        if total is not None and total - have > free:
            raise ModelError(
                "SAM-M408",
                f"{self.part.parent} has {free} bytes free, {total - have} are needed for "
                f"{self.target.name}",
                "Free space, or name another folder with --to.",
            )
        self.progress(have, total)
        for piece in _pieces(response, None if total is None else total - have):
            _write(part, piece)
            have += len(piece)
            self.progress(have, total)
        if total is not None and have < total:
            raise _BrokenError(f"the connection ended at {have} of {total} bytes")

    def _etag(self) -> str | None:
        with contextlib.suppress(FileNotFoundError):
            etag = self.etag_file.read_text("utf-8", "replace")
            return etag if _ETAG.fullmatch(etag) else None
        return None

    def _remember(self, response: HTTPResponse) -> None:
        etag = response.headers.get("ETag", "")
        if _ETAG.fullmatch(etag):
            self.etag_file.write_text(etag, "utf-8")
        else:
            self.etag_file.unlink(missing_ok=True)

    def _refusal(self, error: HTTPError) -> Exception:
        told = f"the server answered {error.code} {error.reason}"
        if error.code in _PASSING or error.code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return _BrokenError(told)
        return ModelError("SAM-M405", f"cannot fetch {self.url}: {told}", self._by_hand())

    def _offline(self, fault: _UnreachableError) -> ModelError:
        return ModelError(
            "SAM-M404",
            f"cannot reach {self.url}: {fault}",
            f"Check the network; behind a proxy, set https_proxy. Without a network: "
            f"{self._by_hand()}",
        )

    def _untrusted(self, reason: ssl.SSLCertVerificationError) -> ModelError:
        return ModelError(
            "SAM-M410",
            f"the certificate of {self.url} is not trusted: {reason.verify_message}",
            "Where a proxy of the hospital inspects traffic, let SSL_CERT_FILE name a file with "
            f"its certificate. Else: {self._by_hand()}",
        )

    def _by_hand(self) -> str:
        return (
            f"fetch {self.target.name} (SHA-256 {self.sha256}) on another machine, copy it to "
            f"{self.target.parent.absolute()} and check it with `samaritan models verify FILE`."
        )


class _StayEncrypted(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str,
        headers: HTTPMessage, newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            told = f"{msg}: a redirection to the unencrypted {newurl}"
            raise HTTPError(req.full_url, code, told, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """Checks certificates and takes proxies from the environment."""
    context = ssl.create_default_context()
    return urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=context), _StayEncrypted()
    )


def _total_bytes(response: HTTPResponse, have: int) -> int | None:
    """Size of the whole file, where the server tells."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if have and found and found[2] != "*":
        return int(found[2])
    return None if response.length is None else have + response.length


def _pieces(response: HTTPResponse, left: int | None) -> Iterator[bytes]:
    """The body as it comes, at most `left` bytes of it.

    Raises:
        _BrokenError: When the connection fails; one that only ends is no failure here.
    """
    try:
        while left != 0:
            piece = response.read1(_PIECE_BYTES if left is None else min(left, _PIECE_BYTES))
            if not piece:
                return
            left = None if left is None else left - len(piece)
            yield piece
    except (OSError, HTTPException) as error:
        raise _BrokenError(_told(error)) from error


def _write(part: io.FileIO, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[part.write(rest) :]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[io.FileIO]:
    """Opens a partial file at its end, for this process alone.

    Raises:
        ModelError: When another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking the other process may have finished: this file then
            # bears its final name, and nothing may be added to it.
            mine = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise ModelError(
                "SAM-M403",
                f"another process is writing {path}",
                "Let it finish, then run this again; a finished file is not fetched twice.",
            )
        try:
            yield file
        finally:
            if not os.fstat(file.fileno()).st_size:
                path.unlink(missing_ok=True)


def _disk_error(part: Path, error: OSError) -> ModelError:
    if error.errno in _FULL:
        kept = part.stat().st_size if part.exists() else 0
        return ModelError(
            "SAM-M408",
            f"no space is left in {part.parent}; {kept} bytes are kept in {part.name}",
            "Free space and run this again to go on from there, or name another folder with --to.",
        )
    return ModelError(
        "SAM-M409",
        f"cannot write {error.filename or part}: {error.strerror or error}",
        "Mend the permissions, or name another folder with --to.",
    )


def _told(error: object) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)
