"""What came to the server, line by line, so that each site's log can be held against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from flwr.app import Message

from samaritan.audit.log import Log, entries
from samaritan.keys import is_signed
from samaritan.messages import Answer, Request, sealed
from samaritan.wire import message_bytes, read_answer
from strategies.replies import error_reference, error_status


@dataclass(frozen=True)
class Ingress:
    """The server's way in.

    Attributes:
        log: Of the server.
        signers: Public key of each site whose answers must be sealed; none in a simulation.
        last: Hash of the last answer of each of these sites.
    """

    log: Log
    signers: Mapping[str, bytes] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.signers:
            for entry, _ in entries(self.log.path.read_bytes()):
                if entry["type"] == "ingress":
                    self.last[entry["site"]] = entry["answer_sha256"]

    def addressed(self, request: Request, site: str | None) -> Request:
        """A request as a site is to get it: with what it must remember of itself."""
        return replace(request, known_answer=self.last.get(site or "", ""))

    def admits(self, site: str, request: Request, message: Message) -> bool:
        """Writes down what a site answered; False where it is not sealed by that site.

        Raises:
            AuditError: When the log cannot be written; nothing may be done with the answer then.
        """
        asked = message.metadata.reply_to_message_id
        told = {
            "site": site,
            "kind": request.kind,
            "round": request.server_round,
            "plan": request.plan_sha256,
            "message": asked,
        }
        if message.has_error():
            reference = error_reference(message)
            self.log.append("error", status=error_status(message), reference=reference, **told)
            return True
        try:
            answer = read_answer(message)
        except Exception as error:  # an answer of any shape may come
            self.log.append("unreadable", reason=type(error).__name__, **told)
            return not self.signers  # in a simulation whoever reads it says what is wrong
        right = not self.signers or self._sealed(site, request, asked, answer)
        self.log.append(
            "ingress" if right else "forged",
            answer_sha256=answer.sha256,
            bytes=message_bytes(message),
            seal=answer.seal.hex(),
            **told,
        )
        if right and self.signers:
            self.last[site] = answer.sha256
        return right

    def _sealed(self, site: str, request: Request, asked: str, answer: Answer) -> bool:
        signed = Request(request.kind, request.plan_sha256, asked)
        return is_signed(self.signers[site], sealed(signed, site, answer), answer.seal)
