"""A site as a server meets it: what it is asked is written down, and what it answers passes a gate.

The same class stands in front of the agent in a simulation and in a hospital.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from client.agent import Metrics, SiteAgent
from client.outbox import Outbox
from client.redaction import RedactedError, redact
from samaritan.audit.gate import Gate, outlet
from samaritan.errors import AuditError, FederationError
from samaritan.keys import Identity
from samaritan.messages import Answer, Instruction, Request, sealed

_LONGEST = 128

FindAgent = Callable[[Request], SiteAgent]
"""Who does the work of a request; raises SamaritanError where nobody may."""


@dataclass(frozen=True)
class Site:
    """One hospital.

    Attributes:
        name: Of the site.
        find: Leads to the agent of the study that a request is about.
        gate: The way out, with the log and the hospital's policy.
        identity: Seals what leaves; None in a simulation.
        outbox: Keeps answers that may have been lost on the way; None in a simulation.
    """

    name: str
    find: FindAgent
    gate: Gate
    identity: Identity | None = None
    outbox: Outbox | None = None

    def answer(self, request: Request) -> Answer:
        """The answer to a request, written to the log before it leaves.

        Raises:
            RedactedError: For any fault, with all of it that may leave; the log has it too.
        """
        try:
            self._note(request)
            agent = self.find(request)
            self._require_same_site(request)
            answer = self._answer(agent, request)
            shapes = {name: tuple(value.shape) for name, value in agent.initial.items()}
            allowed = outlet(agent.config, shapes, request, self.name)
            if self.identity is not None:
                answer = replace(
                    answer, seal=self.identity.sign(sealed(request, self.name, answer))
                )
            self.gate.let_out(answer, allowed, request)
        except Exception as error:
            fault = redact(error)
            self._note_refusal(request, fault)
            raise fault from None
        return answer

    def _require_same_site(self, request: Request) -> None:
        """A copy of a site, or one from a backup, knows less than the server does."""
        known, log = request.known_answer, self.gate.log
        if known and not log.holds_answer(known):
            raise AuditError(
                "SAM-A209",
                f"the server has an answer of this site that {log.path} does not have",
                "Another machine has answered with a copy of this kit, or the log was lost or "
                "brought back from a backup. Find the other copy and stop it; put the newest log "
                "in place. If the log is lost and the hospital decides to go on without it, write "
                f'"answer_sha256":"{known}" into a file {log.path.with_name("lost.txt")}.',
            )

    def _answer(self, agent: SiteAgent, request: Request) -> Answer:
        if self.outbox is None:
            return ask_agent(agent, request)
        answer = self.outbox.find(request, agent.cases_sha256)
        if answer is None:
            answer = ask_agent(agent, request)
            self.outbox.keep(request, agent.cases_sha256, answer)
        return answer

    def _note(self, request: Request) -> None:
        payload = request.payload
        received = {} if payload is None else {
            "payload_sha256": hashlib.sha256(payload).hexdigest(),
            "payload_bytes": len(payload),
        }  # fmt: skip
        self.gate.log.append(
            "request",
            kind=request.kind,
            message=_cut(request.message_id),
            plan=_cut(request.plan_sha256),
            round=request.server_round,
            state=_cut(request.instruction.state_sha256) if request.instruction else "",
            **received,
        )

    def _note_refusal(self, request: Request, fault: RedactedError) -> None:
        with contextlib.suppress(AuditError):  # where the log itself is at fault
            self.gate.log.append(
                "refused",
                kind=request.kind,
                message=_cut(request.message_id),
                plan=_cut(request.plan_sha256),
                round=request.server_round,
                code=fault.code,
                reference=fault.reference,
            )


def _cut(text: str) -> str:
    """Names of the server's making, no longer than any hash: it must not fill the disk."""
    return text[:_LONGEST]


def ask_agent(agent: SiteAgent, request: Request) -> Answer:
    """What an agent answers.

    Raises:
        SamaritanError: As the agent; SAM-F207 for a question that lacks a part.
    """
    if request.kind == "hello":
        return Answer(texts=agent.hello())
    instruction = _required(request)
    if request.kind == "evaluate":
        return _told(None, agent.evaluate(request.payload, instruction))
    step = request.step
    if request.kind == "secure_sum":
        if step is None:
            raise _incomplete(request)
        return Answer(step=replace(step, data=agent.secure_sum(step, instruction)))
    update, told = agent.train(request.payload, instruction, *(() if step is None else (step,)))
    return _told(update, told)


def _told(update: bytes | None, told: Metrics) -> Answer:
    texts = {name: value for name, value in told.items() if isinstance(value, str)}
    numbers = {name: value for name, value in told.items() if not isinstance(value, str)}
    return Answer(update, numbers, texts)


def _required(request: Request) -> Instruction:
    if request.instruction is None:
        raise _incomplete(request)
    return request.instruction


def _incomplete(request: Request) -> FederationError:
    return FederationError(
        "SAM-F207",
        f"a request of kind {request.kind} lacks a part",
        "Give server and sites the same version of Samaritan.",
    )
