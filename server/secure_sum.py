"""A round under secure aggregation: five questions to every site, and one sum at the end.

The server learns the sum and who is in it. An attempt that fails before shares were opened is made
again; after that a second one would give two sums to subtract from each other, the sites refuse it,
and the round is lost.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence

import torch

from samaritan.errors import FederationError, PrivacyError
from samaritan.messages import MaskingStep
from samaritan.models.vectors import length, unflat
from samaritan.privacy.secure_sum import Coordinator, agreed_terms
from samaritan.wire import read_masking_step
from server.asking import Asking
from server.judgement import ROUND_OPENED
from strategies.replies import Reply, error_status, read_masked_reply
from strategies.update import Update


def summed_update(
    asking: Asking, sites: Sequence[str], identities: Mapping[str, bytes], needed: int
) -> Iterator[Update]:
    """The mean of the sites' updates as one update; none where the round is lost.

    Args:
        asking: Of this round.
        sites: To be asked.
        identities: Public key by site.
        needed: Updates that must be in the sum.

    Raises:
        FederationError: SAM-F108 when no attempt came to a sum.
    """
    settings, number = asking.post.config.federation, asking.instruction.server_round
    failures = 0
    while True:
        staying = [site for site in sites if site not in asking.left]
        try:
            yield _attempt(asking, staying, identities, needed)
            return
        except PrivacyError as error:
            asking.post.event(
                "secure_sum_failed", round=number, code=error.code, message=error.message
            )
            if any(reply.status == ROUND_OPENED for reply in asking.trained.values()):
                asking.post.event("round_lost", round=number, reason="shares were opened before")
                asking.lost = True
                return
            if not set(asking.left) & set(staying):  # else the others may be enough by themselves
                failures += 1
                time.sleep(settings.retry_wait_s * 2 ** (failures - 1))
            if failures > settings.retries:
                raise FederationError(
                    "SAM-F108",
                    f"round {number}: {error.message}",
                    "Mend the sites named above and resume; rounds before this one are kept.",
                ) from error


def _attempt(
    asking: Asking, sites: Sequence[str], identities: Mapping[str, bytes], needed: int
) -> Update:
    """One attempt.

    Raises:
        PrivacyError: When it fails; whoever is to blame has a status in `asking.trained`.
    """
    config, number = asking.post.config, asking.instruction.server_round
    if not sites:
        raise PrivacyError("SAM-P312", "no site is left to ask", "Start the sites.")
    expected = asking.expected(sites[0])  # of all alike: ranks by site are refused before the run
    # Drawn, so that it is another one after the server was restarted, too.
    attempt = 1 + secrets.randbelow(2**31 - 1)
    terms = agreed_terms(config, number, attempt, length(expected.shapes), expected.state_sha256)
    coordinator = Coordinator(terms, {site: identities[site] for site in sites})
    silent = Reply("late: no answer")
    asking.trained |= dict.fromkeys(sites, silent)
    updates: dict[str, Reply] = {}

    def step(stage: str, data: bytes) -> MaskingStep:
        return MaskingStep(stage, attempt, terms.length, data)

    def ask(stage: str, data: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        for site, message in asking.query({s: step(stage, part) for s, part in data.items()}):
            if message.has_error():
                asking.trained[site] = Reply(error_status(message))
                continue
            try:
                answer = read_masking_step(message)
            except (KeyError, TypeError):
                answer = None
            yield site, answer.data if answer else b""

    def masked(deliveries: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        steps = {site: step("masked", part) for site, part in deliveries.items()}
        for site, message in asking.train_masked(steps):
            asking.trained[site], payload = read_masked_reply(message)
            if payload:
                updates[site] = asking.trained[site]
                yield site, payload

    try:
        roster = coordinator.call_roster(ask("keys", dict.fromkeys(sites, b"")))
        there = [site for site in sites if asking.trained[site] is silent]
        deliveries = coordinator.deliver(ask("shares", dict.fromkeys(there, roster)))
        survivors = coordinator.ask_agreement(masked(deliveries))
        names = coordinator.survivors
        if len(names) < needed:
            raise PrivacyError(
                "SAM-P308", f"{len(names)} masked updates came, {needed} are needed",
                "The sum stays closed; the round is tried again.",
            )  # fmt: skip
        request = coordinator.ask_opening(ask("agreement", dict.fromkeys(names, survivors)))
        total = coordinator.total(ask("opening", dict.fromkeys(names, request)))
    except PrivacyError:
        asking.trained |= {s: Reply("late: no sum") for s in sites if asking.trained[s].ok}
        raise
    finally:
        faults = coordinator.faults.items()
        asking.trained |= {site: Reply(f"refused: {error.code}") for site, error in faults}
    # Whatever a site did after its update, the update is in the sum.
    asking.trained |= {site: updates[site] for site in names}
    mean = unflat(torch.from_numpy(total) / len(names), expected.shapes)
    return Update("the sum", asking.post.delivery.start(names[0]), mean, 1.0)
