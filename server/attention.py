"""What ends soon or is missing, before it stops a study."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from urllib.parse import unquote

from cryptography import x509

from samaritan.errors import SamaritanError
from samaritan.plan import Plan
from samaritan.provision.certificates import days_left, read_certificate
from samaritan.provision.kit import Kit
from samaritan.report import units
from samaritan.watch.follow import Json
from server.verdict import DOWN, FINISHED, IDLE, UNSEEN, Verdict

ONLINE = "online"
"""Flower's word for a node that is there; others are "registered" and "offline"."""

_CERTIFICATE_DAYS, _LIST_DAYS, _PLAN_DAYS = 30, 7, 7
"""How long before an end people are told of it."""


def certificates_of(kit: Kit, now: datetime, faults: list[str]) -> Json:
    """Days until the certificates end: the server's, its list, and sites' where the kit has copies.

    Args:
        kit: Of the server; copies of sites' certificates lie in `issued`, as at the authority.
        now: Moment of the look.
        faults: Gets what cannot be read.
    """
    found: Json = {"server_days": None, "list_days": None, "list_until": None, "sites": {}}
    try:
        end = read_certificate(kit.path("server.crt")).not_valid_after_utc
        found["server_days"] = days_left(end, now)
    except SamaritanError as error:
        faults.append(f"{error.code} {error.message}")
    try:
        revoked = x509.load_pem_x509_crl(kit.path("crl.pem").read_bytes())
        if revoked.next_update_utc is not None:
            found["list_days"] = days_left(revoked.next_update_utc, now)
            found["list_until"] = revoked.next_update_utc.isoformat()
    except (OSError, ValueError) as error:
        faults.append(f"crl.pem cannot be read: {error}")
    for path in kit.path("issued").glob("*/site.crt"):
        try:
            certificate = read_certificate(path)
        except SamaritanError:
            continue
        found["sites"][unquote(path.parent.name)] = days_left(certificate.not_valid_after_utc, now)
    return found


def attention(
    plan: Plan | None,
    sites: Mapping[str, Json],
    certificates: Json,
    about: Verdict,
    now: datetime,
    faults: list[str],
) -> list[str]:
    """What somebody should look at, in sentences.

    Args:
        plan: Of the study that the page is about.
        sites: As the page has them.
        certificates: From `certificates_of`.
        about: The state of the study.
        now: Moment of the look.
        faults: What could not be read.
    """
    found = list(faults)
    for what, days, limit in (
        ("The certificate of the server", certificates["server_days"], _CERTIFICATE_DAYS),
        ("The list of revoked certificates (crl.pem)", certificates["list_days"], _LIST_DAYS),
    ):
        if days is not None and days < 0:
            found.append(f"{what} has ended: no site can connect. Renew it at the authority.")
        elif days is not None and days < limit:
            found.append(f"{what} ends in {units.plural(days, 'day')}. Renew it at the authority.")
    for name, site in sites.items():
        days = site["certificate_days"]
        if days is not None and days < _CERTIFICATE_DAYS:
            ends = "has ended" if days < 0 else f"ends in {units.plural(days, 'day')}"
            found.append(f"The certificate of {name} {ends}.")
    if plan is None or about.state == FINISHED:
        return found
    left = (plan.valid_until - now.date()).days
    if left < 0:
        found.append(f"The plan was valid until {plan.valid_until}: all sites refuse it.")
    elif left < _PLAN_DAYS:
        found.append(f"The plan is valid until {plan.valid_until} only.")
    if about.state not in (DOWN, IDLE, UNSEEN):
        away = [n for n, s in sites.items() if s["planned"] and s["status"] != ONLINE]
        if away:
            needed = plan.config.federation.min_sites or 0
            here = sum(s["planned"] and s["status"] == ONLINE for s in sites.values())
            short = f"; a round needs {needed}" if here < needed else ""
            found.append(f"Not connected: {', '.join(away)}{short}.")
    return found
