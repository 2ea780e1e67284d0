"""What a member demands before it masks, signs or opens; the server has only what these let by."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from samaritan.errors import PrivacyError
from samaritan.keys import is_signed
from samaritan.privacy.secure_sum.messages import Request
from samaritan.privacy.secure_sum.roster import Members


def demand_quorum(
    stage: str, names: Sequence[str], allowed: Collection[str], site: str, members: Members
) -> None:
    """A stage goes on with a threshold of known members, this site among them.

    Args:
        stage: What the members have sent.
        names: Of the members who sent it.
        allowed: Who was left before.
        site: Of the reader.
        members: Of this attempt.

    Raises:
        PrivacyError: SAM-P215 otherwise.
    """
    if (
        list(names) != sorted(set(names))
        or not {site} <= set(names) <= set(allowed)
        or len(names) < members.threshold
    ):
        raise PrivacyError(
            "SAM-P215",
            f"{site} is told that {stage} came from {len(names)} members ({', '.join(names)}); "
            f"it goes on with at least {members.threshold} of the {len(allowed)} left before, "
            "each named once and in order, and only if it is one of them",
            "Start another attempt when more sites can be reached.",
        )


def demand_lists(asked: Request, survivors: Sequence[str], masked: Collection[str]) -> None:
    """No member is in both lists, and the lists are those that this site signed.

    Both shares of one member would lay its update bare.

    Args:
        asked: By the server.
        survivors: What this site signed.
        masked: For whom it masked.

    Raises:
        PrivacyError: SAM-P216 for a member in both lists, SAM-P217 for other lists.
    """
    both = set(asked.survivors) & set(asked.dropped)
    if both:
        raise PrivacyError(
            "SAM-P216",
            f"the server calls {', '.join(sorted(both))} a survivor and dropped at once; "
            "it would learn the update of each",
            "No faulty server does this by chance. Stop the run and inspect the server.",
        )
    dropped = tuple(sorted(set(masked) - set(survivors)))
    if asked.survivors != tuple(survivors) or asked.dropped != dropped:
        raise PrivacyError(
            "SAM-P217",
            f"the server wants to open survivors {', '.join(asked.survivors)} and dropped "
            f"{', '.join(asked.dropped) or 'none'}; this site signed {', '.join(survivors)} "
            f"and {', '.join(dropped) or 'none'}",
            "The server has told the sites different things. Start another attempt.",
        )


def demand_signatures(
    asked: Request, masked: Collection[str], members: Members, identities: Mapping[str, bytes]
) -> None:
    """A threshold of survivors has signed the same lists.

    Args:
        asked: By the server.
        masked: For whom this site masked.
        members: Of this attempt.
        identities: Public half by site, from the site's own files.

    Raises:
        PrivacyError: SAM-P218 otherwise.
    """
    statement = members.statement(masked, asked.survivors)
    signed = [
        name
        for name, signature in asked.signatures.items()
        if name in asked.survivors and is_signed(identities[name], statement, signature)
    ]
    if len(signed) < members.threshold:
        raise PrivacyError(
            "SAM-P218",
            f"{len(signed)} members have signed the survivors that this site signed; "
            f"it opens its shares to {members.threshold}",
            "Members were told different survivors, or were cut off. Start another attempt.",
        )
