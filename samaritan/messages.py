"""What a server and a site say to each other, whatever carries it.

A request goes to a site, an answer comes back. `samaritan.wire` makes Flower messages of them, and
`client.socket` frames for the way between courier and agent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from samaritan.lines import canonical

Kind = Literal["hello", "train", "evaluate", "secure_sum"]


@dataclass(frozen=True)
class Instruction:
    """What the server asks of a site in one message.

    Attributes:
        server_round: 1 to `rounds`.
        rounds: Rounds of the whole run.
        config_sha256: Of the configuration the server runs.
        base_sha256: Of the base model the adapter belongs to.
        timeout_s: How long local training may take.
        state_sha256: Of the state to work on, which the site has after reading the payload.
        reference_sha256: Of the state the payload is to be added to; empty where the payload is the
            whole state, or where there is none because the site has the state already.
        used_round: The last round in which an update of this site was used, 0 for none. The site
            goes on from what it noted then: an update that was lost or refused has taken nothing.
        ledger: Where the site's privacy ledger stood when the server last heard of it; empty where
            it never did. A site whose ledger does not know this entry has lost what it spent.
    """

    server_round: int
    rounds: int
    config_sha256: str
    base_sha256: str
    timeout_s: float
    state_sha256: str = ""
    reference_sha256: str = ""
    used_round: int = 0
    ledger: str = ""


@dataclass(frozen=True)
class MaskingStep:
    """One step of a secure sum (`samaritan.privacy.secure_sum`), in either direction.

    Attributes:
        stage: "keys", "shares", "masked", "agreement" or "opening".
        attempt: 1 and up, in its round.
        length: Numbers in an update.
        data: What the other side made for this step.
    """

    stage: str
    attempt: int
    length: int
    data: bytes


@dataclass(frozen=True)
class Request:
    """A question of the server.

    Attributes:
        kind: Of the question.
        plan_sha256: The study it is about; empty in a simulation, where there is one only.
        message_id: Flower's name for it.
        bundle_sha256: Of the app bundle that came with it; empty in a simulation.
        instruction: With every question but "hello".
        payload: The state to work on, or what leads to it; None where the site has it.
        step: Of a secure sum.
        known_answer: Hash of the last answer that the server has of this site in this study; empty
            in a simulation, and where it has none. A site whose log has no such answer is a copy of
            another that gave it, or has lost its log.
    """

    kind: Kind
    plan_sha256: str = ""
    message_id: str = ""
    bundle_sha256: str = ""
    instruction: Instruction | None = None
    payload: bytes | None = None
    step: MaskingStep | None = None
    known_answer: str = ""

    @property
    def server_round(self) -> int:
        """The round it is about; 0 for none."""
        return self.instruction.server_round if self.instruction else 0


@dataclass(frozen=True)
class Answer:
    """What a site answers: every byte of it is one of these.

    Attributes:
        payload: An update.
        numbers: By name: losses, scores, counts.
        texts: By name: hashes, versions, the site's name.
        step: Of a secure sum.
        seal: The site's signature over what `sealed` says; empty where nobody asks for one.
    """

    payload: bytes | None = None
    numbers: Mapping[str, float | int] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    step: MaskingStep | None = None
    seal: bytes = b""

    @property
    def sha256(self) -> str:
        """Hash of all but the seal; server and site compute the same."""
        step = self.step
        return answer_hash(
            None if self.payload is None else _hash(self.payload),
            {name: repr(value) for name, value in self.numbers.items()},
            self.texts,
            None if step is None else (step.stage, step.attempt, step.length, _hash(step.data)),
        )


def answer_hash(
    payload: str | None,
    numbers: Mapping[str, str],
    texts: Mapping[str, str],
    step: tuple[str, int, int, str] | None,
) -> str:
    """Hash of an answer, of what a log holds of it.

    Args:
        payload: Hash of the update.
        numbers: As Python writes them.
        texts: As they are.
        step: Of a secure sum: stage, attempt, length and the hash of its data.
    """
    parts = {"payload": payload, "numbers": dict(numbers), "texts": dict(texts), "step": step}
    return _hash(canonical(parts))


def sealed(request: Request, site: str, answer: Answer) -> bytes:
    """What a site signs: which question of which study it answers, and with what."""
    return sealed_fields(request.plan_sha256, request.message_id, request.kind, site, answer.sha256)


def sealed_fields(plan: str, message: str, kind: str, site: str, answer: str) -> bytes:
    """As `sealed`, of what a log holds.

    Args:
        plan: Hash of the plan.
        message: Flower's name of the question.
        kind: Of the question.
        site: Who answers.
        answer: Hash of the answer.
    """
    return b"samaritan answer\n" + canonical(
        {"plan": plan, "message": message, "kind": kind, "site": site, "answer": answer}
    )


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
