"""How often a site answers about one round: a server must not try one adapter after another on it.

A server that asks for the same round again, because an answer was lost, names the same state. One
that names ever new states is fishing: each update, or score, tells a little more about the data.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from samaritan.errors import AuditError
from samaritan.files import write_atomically
from samaritan.messages import Request

_HASH = re.compile(r"[0-9a-f]{64}")
_MOST = 3
"""States in one round: the one, and what a server may come to that lost a checkpoint or two."""


@dataclass(frozen=True)
class Restraint:
    """What a site was asked in one study.

    Attributes:
        path: Keeps it through restarts.
    """

    path: Path

    def note(self, request: Request, rounds: int) -> None:
        """Notes a request to train or to score, before it is answered.

        Args:
            request: What no agent would answer anyway is not noted: it would fill the disk.
            rounds: Of the study.

        Raises:
            AuditError: SAM-A207 when the round was asked with too many other states.
            StorageError: When it cannot be written.
        """
        asked = request.instruction
        if asked is None or request.kind not in ("train", "evaluate"):
            return
        if not (1 <= asked.server_round <= rounds and _HASH.fullmatch(asked.state_sha256)):
            return
        known = self._known()
        states = known.setdefault(f"{request.kind}/{asked.server_round}", [])
        if asked.state_sha256 in states:
            return
        if len(states) >= _MOST:
            raise AuditError(
                "SAM-A207",
                f"round {asked.server_round} was asked to {request.kind} from {len(states)} other "
                "adapters before",
                "Nothing was computed. Ask the coordinator what the server is doing; if there is a "
                f"good reason, remove {self.path}.",
            )
        states.append(asked.state_sha256)
        write_atomically(self.path, json.dumps(known).encode(), private=True)

    def _known(self) -> dict[str, list[str]]:
        try:
            known: dict[str, list[str]] = json.loads(self.path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise AuditError(
                "SAM-A208",
                f"{self.path} is damaged; it says how often the server has asked",
                "Compare the site's log with the coordinator's, then remove the file.",
            ) from error
        return known
