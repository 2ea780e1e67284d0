"""The site's part in secure sums: what the server asks is checked against what was agreed to.

Progress lies in a file between two steps, so that they may be answered by different processes; a
second file notes every answer for good, so that none is given twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from samaritan.codecs import decode
from samaritan.config import CodecConfig, Config
from samaritan.errors import PrivacyError
from samaritan.files import write_atomically
from samaritan.keys import load_identity
from samaritan.messages import Instruction, MaskingStep
from samaritan.models.vectors import flat
from samaritan.privacy.secure_sum import Member, Record, agreed_terms


@dataclass(frozen=True)
class Masking:
    """One site in all secure sums of a run.

    Attributes:
        site: Its name.
        config: The configuration the hospital agreed to.
        home: Holds the site's key and the two files.
        identities: The public key of every site that trains, as this site knows it.
    """

    site: str
    config: Config
    home: Path
    identities: Mapping[str, bytes]

    def step(self, asked: MaskingStep, instruction: Instruction) -> bytes:
        """The answer to a step before or after the update: keys, shares, agreement or opening.

        Raises:
            PrivacyError: SAM-P303 for a step there is none of; else as `Member`.
        """
        member = self._member(asked, instruction)
        match asked.stage:
            case "keys":
                answer = member.keys()
            case "shares":
                answer = member.shares(asked.data)
            case "agreement":
                answer = member.agreement(asked.data)
            case "opening":
                answer = member.opening(asked.data)
            case _:
                raise PrivacyError(
                    "SAM-P303",
                    f"site {self.site} was asked for the step {asked.stage!r} of a secure sum",
                    "Give server and sites the same version of Samaritan.",
                )
        self._keep(member, asked.stage == "opening")
        return answer

    def mask(
        self,
        update: bytes,
        shapes: Mapping[str, tuple[int, ...]],
        asked: MaskingStep,
        instruction: Instruction,
    ) -> bytes:
        """An update under masks, shortened to the norm that was agreed to.

        Args:
            update: From `Exchange.send`; it stays at the site.
            shapes: Of its tensors.
            asked: With what the other sites have sent this one.
            instruction: From the server.

        Raises:
            PrivacyError: SAM-P310 in another step; else as `Member`.
        """
        if asked.stage != "masked":
            raise PrivacyError(
                "SAM-P310",
                f"site {self.site} was asked for its masked update in the step {asked.stage!r}",
                "Give server and sites the same version of Samaritan.",
            )
        state, _ = decode(update, shapes, CodecConfig())
        member = self._member(asked, instruction)
        vector = flat(state)
        limit = member.terms.clip
        vector *= min(1.0, limit / max(float(vector.norm()), limit))
        masked = member.masked(asked.data, vector.numpy())
        self._keep(member)
        return masked

    def _member(self, asked: MaskingStep, instruction: Instruction) -> Member:
        """As the file left it; anew for the first step of an attempt.

        Attempt, length and state are the server's to choose; members mask only with those who were
        told the same.
        """
        terms = agreed_terms(
            self.config,
            instruction.server_round,
            asked.attempt,
            asked.length,
            instruction.state_sha256,
        )
        return Member(
            self.site,
            load_identity(self.home / "identity.key"),
            self.identities,
            terms,
            Record(self.home / "secure_sums.jsonl"),
            None if asked.stage == "keys" else self._progress(),
        )

    @property
    def _file(self) -> Path:
        return self.home / "secure_sum.progress"

    def _progress(self) -> bytes:
        try:
            return self._file.read_bytes()
        except OSError as error:
            raise PrivacyError(
                "SAM-P304",
                f"site {self.site} is in no secure sum",
                "It was restarted in between; it takes part again from the next attempt.",
            ) from error

    def _keep(self, member: Member, done: bool = False) -> None:
        if done:
            self._file.unlink(missing_ok=True)
        else:
            write_atomically(self._file, member.save(), private=True)
