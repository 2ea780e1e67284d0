"""Answers that were made and may have been lost on the way: asked again, they are sent again.

Without it a courier that dies, or a server that starts anew, would cost a hospital hours of
training that was done already.
"""

from __future__ import annotations

import hashlib
import io
import logging
from dataclasses import dataclass
from pathlib import Path

from client.frames import pack_answer, read_answer
from samaritan.errors import DeploymentError
from samaritan.files import write_atomically
from samaritan.lines import canonical
from samaritan.messages import Answer, Request

_KEPT = 2
_log = logging.getLogger("samaritan.site")


@dataclass(frozen=True)
class Outbox:
    """The last answers of a site.

    Attributes:
        folder: One file per answer.
    """

    folder: Path

    def find(self, request: Request, cases_sha256: str) -> Answer | None:
        """The answer that was given to the same question before, if it is still there and whole.

        Args:
            request: The question.
            cases_sha256: Over the cases: one that somebody has left is another question.
        """
        path = self._path(request, cases_sha256)
        if path is None or not path.is_file():
            return None
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise ValueError("damaged")
            return read_answer(io.BytesIO(data[32:]))
        except (OSError, ValueError, EOFError, DeploymentError):
            _log.warning("%s is damaged; the work is done again", path)
            return None

    def keep(self, request: Request, cases_sha256: str, answer: Answer) -> None:
        """Keeps an answer before it is sent; the oldest ones make room.

        Raises:
            StorageError: When it cannot be written.
        """
        path = self._path(request, cases_sha256)
        if path is None:
            return
        data = pack_answer(answer)
        write_atomically(path, hashlib.sha256(data).digest() + data, private=True)
        kept = sorted(self.folder.glob("*.answer"), key=lambda p: p.stat().st_mtime_ns)
        for old in kept[:-_KEPT]:
            old.unlink(missing_ok=True)

    def _path(self, request: Request, cases_sha256: str) -> Path | None:
        """Where the answer to a question lies; nowhere for those that are cheap or must be new."""
        asked = request.instruction
        if asked is None or request.kind not in ("train", "evaluate") or request.step is not None:
            return None
        question = {
            "plan": request.plan_sha256,
            "cases": cases_sha256,
            "kind": request.kind,
            "config": asked.config_sha256,
            "round": asked.server_round,
            "state": asked.state_sha256,
            "used": asked.used_round,
            "timeout": repr(asked.timeout_s),
        }
        return self.folder / f"{hashlib.sha256(canonical(question)).hexdigest()[:32]}.answer"
