"""The terms of a sum as a configuration has them: one reading for the server and its sites."""

from __future__ import annotations

from samaritan.config import Config, config_sha256
from samaritan.errors import PrivacyError
from samaritan.privacy.secure_sum.terms import FEWEST, Terms


def agreed_terms(
    config: Config, server_round: int, attempt: int, length: int, state_sha256: str
) -> Terms:
    """The terms of one attempt; what is not an argument nobody can choose in a message.

    Args:
        config: That was agreed to.
        server_round: 1 and up.
        attempt: Another one for each try.
        length: Numbers in an update.
        state_sha256: Of what all members start from.

    Raises:
        PrivacyError: SAM-P201 for what cannot be, SAM-P305 without a number as clipping norm.
    """
    limit = config.federation.clip_norm
    if not isinstance(limit, float):
        raise PrivacyError(
            "SAM-P305",
            f"secure aggregation with federation.clip_norm {limit}",
            "Set it to a number; a configuration without is refused before the run.",
        )
    fewest = max(FEWEST, config.federation.min_sites or FEWEST)
    run = config_sha256(config)
    return Terms(run, server_round, attempt, length, limit, state_sha256, fewest)
