"""The egress gate: the last look at an answer before it leaves, and its line in the log.

The gate trusts nobody inside the site either. It reads the bytes that are about to leave, compares
them with what the approved plan and the hospital's policy allow in an answer to that question, and
writes down what they hold before it lets them go.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from samaritan.audit.log import Log
from samaritan.audit.policy import SitePolicy, allows_tensor, numbers_told
from samaritan.codecs import WireError, decode
from samaritan.config import CodecConfig, Config
from samaritan.errors import AuditError, PrivacyError
from samaritan.messages import Answer, MaskingStep, Request
from samaritan.privacy.secure_sum.messages import Agreement, Keys, Message, Opening, Shares
from samaritan.shares import CONTROL, noisy_sites, shares

_HEX = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9][0-9a-z.+]{0,31}")
_LARGEST_WHOLE = 1 << 63
"""Messages hold no larger ones."""
_SEAL_BYTES = 64
_STEP_BYTES = 1 << 20
"""More than any step of a secure sum with thirty sites takes."""
_STEPS: dict[str, type[Message]] = {
    "keys": Keys, "shares": Shares, "agreement": Agreement, "opening": Opening,
}  # fmt: skip


@dataclass(frozen=True)
class Outlet:
    """What an answer to one question may hold.

    Attributes:
        numbers: Names of numbers.
        texts: What each text must look like.
        tensors: Shapes of the tensors of an update, None where none may leave.
        header: What an update must say of itself, and nothing else.
        codec: How an update is written.
        masked_length: Numbers of an update under masks, None where it is sent as it is.
        step: The step of a secure sum that was asked for, None where none was.
        site: Who answers.
    """

    numbers: frozenset[str] = frozenset()
    texts: Mapping[str, re.Pattern[str]] = field(default_factory=dict)
    tensors: Mapping[str, tuple[int, ...]] | None = None
    header: Mapping[str, str] | None = None
    codec: CodecConfig = field(default_factory=CodecConfig)
    masked_length: int | None = None
    step: MaskingStep | None = None
    site: str = ""


def outlet(
    config: Config, shapes: Mapping[str, tuple[int, ...]], request: Request, site: str
) -> Outlet:
    """What the plan's configuration lets out in answer to a question.

    Args:
        config: That was agreed to.
        shapes: Of every tensor of the site's adapter.
        request: From the server.
        site: Its own name.
    """
    if request.kind == "hello":
        hashes = ("config-sha256", "base-sha256", "adapter-sha256", "plan-sha256")
        own = {"site": re.compile(re.escape(site)), "samaritan": _VERSION}
        return Outlet(texts=own | dict.fromkeys(hashes, _HEX))
    if request.kind == "secure_sum":
        return Outlet(step=request.step, site=site)
    numbers = frozenset(numbers_told(config, request.kind))
    if request.kind == "evaluate":
        return Outlet(numbers=numbers)
    sent = shares(config, shapes, request.server_round).sent
    tensors = {name: shapes[name] for name in sorted(sent)}
    if config.training.scaffold:
        tensors |= {CONTROL + name: shapes[name] for name in sorted(sent)}
    state = request.instruction.state_sha256 if request.instruction else ""
    masked = config.federation.secure_aggregation
    return Outlet(
        numbers=numbers,
        texts={"ledger": _HEX} if noisy_sites(config) else {},
        tensors=tensors,
        header={"round": str(request.server_round), "state": state},
        codec=config.wire.up,
        masked_length=sum(map(math.prod, tensors.values())) if masked else None,
    )


@dataclass(frozen=True)
class Gate:
    """One site's way out.

    Attributes:
        log: Of the site.
        policy: The hospital's.
        destination: Who gets what leaves.
    """

    log: Log
    policy: SitePolicy
    destination: str = "server"

    def let_out(self, answer: Answer, allowed: Outlet, request: Request) -> None:
        """Checks an answer, writes its line, and returns when it may leave.

        Raises:
            AuditError: SAM-A204 for anything that was not agreed to, SAM-A205 for an answer that is
                too large, SAM-A203 in a dry run, SAM-A102 when the log cannot be written. Nothing
                may leave then.
        """
        manifest = _manifest(answer, allowed, self.policy) | {
            "kind": request.kind,
            "message": request.message_id,
            "plan": request.plan_sha256,
            "round": request.server_round,
            "destination": self.destination,
            "answer_sha256": answer.sha256,
        }
        if self.policy.dry_run:
            self.log.append("dry_run", **manifest)
            raise AuditError(
                "SAM-A203",
                f"dry run: the answer to {request.kind} was made, logged and kept",
                "Set policy.dry_run: false in site.yaml to take part.",
            )
        self.log.append("egress", **manifest)


def _manifest(answer: Answer, allowed: Outlet, policy: SitePolicy) -> dict[str, Any]:
    """What an answer holds, for the log, after a check of every part.

    Raises:
        AuditError: SAM-A204 or SAM-A205.
    """
    for name, value in answer.numbers.items():
        if name not in allowed.numbers:
            raise _barred(f"the number {name}")
        if policy.metrics is not None and name not in policy.metrics:
            raise _barred(f"the number {name}, which policy.metrics has not")
        if not _is_plain(value):
            raise _barred(f"a number {name} that is not finite, or of another type")
    for name, text in answer.texts.items():
        wanted = allowed.texts.get(name)
        if wanted is None or not isinstance(text, str) or not wanted.fullmatch(text):
            raise _barred(f"the text {name}")
    if len(answer.seal) not in (0, _SEAL_BYTES):
        raise _barred(f"a seal of {len(answer.seal)} bytes")
    step = answer.step
    _require_step(step, allowed)
    size = len(answer.payload or b"") + len(step.data if step else b"")
    if size > policy.max_message_mb * 1e6:
        raise AuditError(
            "SAM-A205",
            f"an answer of {size} bytes, policy.max_message_mb is {policy.max_message_mb:g}",
            "Raise it in site.yaml if the hospital agrees, or ask for a plan with a smaller codec.",
        )
    told: dict[str, Any] = {
        "numbers": {name: repr(value) for name, value in answer.numbers.items()},
        "texts": dict(answer.texts),
        "bytes": size,
    }
    if step is not None:
        told["step"] = {
            "stage": step.stage,
            "attempt": step.attempt,
            "length": step.length,
            "bytes": len(step.data),
            "sha256": hashlib.sha256(step.data).hexdigest(),
        }
    if answer.payload is not None:
        told |= _payload(answer.payload, allowed, policy)
    return told


def _is_plain(value: object) -> bool:
    """Whether this is a number, finite, that server and site write alike."""
    if type(value) is int:
        return abs(value) < _LARGEST_WHOLE
    return type(value) is float and math.isfinite(value)


def _require_step(step: MaskingStep | None, allowed: Outlet) -> None:
    """Refuses any step but the one asked for, in the one form that it has."""
    asked = allowed.step
    if step is None and asked is None:
        return
    if step is None or asked is None or replace(step, data=b"") != replace(asked, data=b""):
        raise _barred("a step of a secure sum that was not asked for")
    if len(step.data) > _STEP_BYTES:
        raise _barred(f"{len(step.data)} bytes in a step of a secure sum")
    form = _STEPS.get(step.stage)
    try:
        made = None if form is None else form.unpack(step.data)
    except PrivacyError:
        made = None
    if made is None or (isinstance(made, Keys) and made.site != allowed.site):
        raise _barred("a step of a secure sum that is not written as one")


def _payload(payload: bytes, allowed: Outlet, policy: SitePolicy) -> dict[str, Any]:
    if allowed.tensors is None:
        raise _barred("an update that was not asked for")
    if barred := [name for name in allowed.tensors if not allows_tensor(policy, name)]:
        raise _barred(f"the tensor {barred[0]}, which policy.tensors has not")
    told = {"payload_sha256": hashlib.sha256(payload).hexdigest(), "payload_bytes": len(payload)}
    if allowed.masked_length is not None:
        if len(payload) != 32 + 4 * allowed.masked_length:
            raise _barred("an update under masks of another length")
        kind = "uint32 under masks"
        return told | {"tensors": _listed(allowed.tensors, kind, 4)}
    try:
        _, header = decode(payload, allowed.tensors, allowed.codec)
    except WireError as error:
        raise _barred(f"an update that is not what the plan names: {error}") from error
    codec = allowed.codec
    if header != allowed.header or not _says_no_more(payload, codec):
        raise _barred("an update with another header than round and state")
    plain = codec.low_rank is None and codec.top_k is None
    width = {"fp32": 4, "fp16": 2, "bf16": 2}.get(codec.numbers) if plain else None
    return told | {
        "codec": codec.model_dump(mode="json") | {"top_k": codec.top_k and repr(codec.top_k)},
        "tensors": _listed(allowed.tensors, codec.numbers, width),
    }


def _says_no_more(payload: bytes, codec: CodecConfig) -> bool:
    """Whether the head of a readable update has its one form: blanks and unknown keys are words."""
    end = 8 + int.from_bytes(payload[:8], "little")
    tree: dict[str, Any] = json.loads(payload[8:end])
    said = tree.pop("__metadata__")
    plain: dict[str, Any] = {"__metadata__": dict(sorted(said.items()))}
    for name, part in sorted(tree.items(), key=lambda item: item[1]["data_offsets"]):
        plain[name] = {key: part[key] for key in ("dtype", "shape", "data_offsets")}
    text = json.dumps(plain, separators=(",", ":")).encode()
    own = said["samaritan-codec"] == codec.model_dump_json()
    return own and payload[8:end] == text + b" " * (-len(text) % 8)


def _listed(
    tensors: Mapping[str, tuple[int, ...]], kind: str, width: int | None
) -> list[list[Any]]:
    """Name, shape, type and bytes of each tensor; bytes are None where a codec mixes them."""
    return [
        [name, list(shape), kind, None if width is None else width * math.prod(shape)]
        for name, shape in sorted(tensors.items())
    ]


def _barred(what: str) -> AuditError:
    return AuditError(
        "SAM-A204",
        f"the egress gate has stopped {what}",
        "Nothing left. This is a fault of the software or an attack: keep the log, tell the "
        "coordinator, and compare the installed version with the plan's.",
    )
