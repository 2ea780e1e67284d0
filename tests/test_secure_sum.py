"""Secure aggregation: the sum is exact, dropouts are survived, and lies are refused."""

from __future__ import annotations

import contextlib
import math
import secrets
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from Crypto.Cipher import ChaCha20
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import chisquare

from samaritan.errors import PrivacyError
from samaritan.keys import Identity
from samaritan.privacy.secure_sum import Coordinator, Member, Record, Terms, least_threshold
from samaritan.privacy.secure_sum.agreement import masking_key
from samaritan.privacy.secure_sum.fixed_point import decode, encode, step_size
from samaritan.privacy.secure_sum.masks import add_mask, own_mask_key, pair_mask_key
from samaritan.privacy.secure_sum.messages import (
    Agreement,
    Delivery,
    Envelope,
    Keys,
    Opening,
    Request,
    Roster,
    Shares,
    Survivors,
)
from samaritan.privacy.secure_sum.progress import Progress
from samaritan.privacy.secure_sum.roster import read_roster, sign_keys

_LENGTH = 300
_CLIP = 2.5
_STAGES = ("shares", "masked", "agreement", "opening")
Away = Mapping[str, Collection[str]]
"""By stage who does not answer in it and later."""


def _name(number: int) -> str:
    return f"site-{number}"


class _Federation:
    """Sites with their own members and records, and a server between them."""

    def __init__(self, sites: int, terms: Terms | None = None) -> None:
        self.terms = terms or Terms("run", 1, 1, _LENGTH, _CLIP)
        self.sites = sorted(_name(number) for number in range(sites))
        self.identity = {site: Identity(Ed25519PrivateKey.generate()) for site in self.sites}
        self.pinned = {site: identity.public for site, identity in self.identity.items()}
        self.records = {site: Record() for site in self.sites}
        self.members = {site: self.member(site) for site in self.sites}
        self.server = Coordinator(self.terms, self.pinned)
        self.values = {site: _values(seed) for seed, site in enumerate(self.sites)}

    def member(self, site: str, record: Record | None = None, **other: Any) -> Member:
        terms = other.pop("terms", self.terms)
        record = record or self.records[site]
        return Member(site, self.identity[site], self.pinned, terms, record, **other)

    # The stages up to some point; each returns what the server sends next.

    def roster(self) -> bytes:
        return self.server.call_roster((s, m.keys()) for s, m in self.members.items())

    def delivery(self, away: Away = {}) -> dict[str, bytes]:  # noqa: B006
        roster = self.roster()
        sites = self._present(self.sites, "shares", away)
        return self.server.deliver((s, self.members[s].shares(roster)) for s in sites)

    def survivors(self, away: Away = {}) -> bytes:  # noqa: B006
        sent = self.delivery(away)
        sites = self._present(sent, "masked", away)
        return self.server.ask_agreement(
            (s, self.members[s].masked(sent[s], self.values[s])) for s in sites
        )

    def request(self, away: Away = {}) -> bytes:  # noqa: B006
        survivors = self.survivors(away)
        sites = self._present(self.server.survivors, "agreement", away)
        return self.server.ask_opening((s, self.members[s].agreement(survivors)) for s in sites)

    def total(self, away: Away = {}) -> NDArray[np.float64]:  # noqa: B006
        request = self.request(away)
        sites = self._present(self.server.survivors, "opening", away)
        return self.server.total((s, self.members[s].opening(request)) for s in sites)

    def expected(self, sites: Collection[str]) -> NDArray[np.float64]:
        """The sum of whole steps, in integers."""
        step = step_size(self.terms.clip, len(self.sites))
        whole = [np.rint(self.values[s].astype(np.float64) / step).astype(np.int64) for s in sites]
        return np.sum(whole, axis=0) * step

    def _present(self, sites: Collection[str], stage: str, away: Away) -> list[str]:
        gone = {s for past in _STAGES[: _STAGES.index(stage) + 1] for s in away.get(past, ())}
        return [site for site in sites if site not in gone]


def _values(seed: int, length: int = _LENGTH, clip: float = _CLIP) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(-clip, clip, length).astype(np.float32)


def _refused(code: str, call: Callable[..., object], *values: Any) -> PrivacyError:
    with pytest.raises(PrivacyError) as caught:
        call(*values)
    assert caught.value.code == code
    assert caught.value.hint
    return caught.value


# The sum


@pytest.mark.parametrize("sites", [3, 5, 10])
def test_the_sum_is_exact(sites: int) -> None:
    federation = _Federation(sites)
    total = federation.total()
    np.testing.assert_array_equal(total, federation.expected(federation.sites))
    assert federation.server.faults == {}
    plain = np.sum([v.astype(np.float64) for v in federation.values.values()], axis=0)
    assert np.abs(total - plain).max() <= sites * step_size(_CLIP, sites) / 2


@pytest.mark.parametrize("stage", _STAGES)
@pytest.mark.parametrize(("sites", "gone"), [(4, 1), (5, 1), (10, 3)])
def test_dropouts_in_any_stage_leave_an_exact_sum(stage: str, sites: int, gone: int) -> None:
    federation = _Federation(sites)
    away = {_name(number) for number in range(0, 2 * gone, 2)}
    total = federation.total({stage: away})
    summed = set(federation.sites) - (away if stage in ("shares", "masked") else set())
    assert set(federation.server.survivors) == summed
    np.testing.assert_array_equal(total, federation.expected(summed))


def test_one_dropout_in_each_stage_of_one_attempt() -> None:
    federation = _Federation(13)  # 9 are needed
    total = federation.total({stage: {_name(number)} for number, stage in enumerate(_STAGES)})
    np.testing.assert_array_equal(
        total, federation.expected(set(federation.sites[:]) - {_name(0), _name(1)})
    )


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("shares", "shares"),
        ("masked", "masked input"),
        ("agreement", "signatures"),
        ("opening", "shares opened"),
    ],
)
def test_too_many_dropouts_stop_the_attempt_and_say_where(stage: str, said: str) -> None:
    federation = _Federation(5)
    error = _refused("SAM-P220", federation.total, {stage: {_name(0), _name(3)}})
    assert f"'{said}': 3 of 5 sites answered, 4 are needed" in error.message


def test_two_sites_cannot_begin() -> None:
    error = _refused("SAM-P220", _Federation(2).roster)
    assert "'keys': 2 of 2 sites answered, 3 are needed" in error.message


def test_an_aborted_attempt_is_followed_by_another() -> None:
    federation = _Federation(4)
    _refused("SAM-P220", federation.total, {"masked": {_name(0), _name(1)}})
    federation.terms = Terms("run", 1, 2, _LENGTH, _CLIP)
    federation.members = {site: federation.member(site) for site in federation.sites}
    federation.server = Coordinator(federation.terms, federation.pinned)
    np.testing.assert_array_equal(federation.total(), federation.expected(federation.sites))


def test_updates_with_noise_that_are_clipped_afterwards_can_be_summed() -> None:
    federation = _Federation(3)
    for site, values in federation.values.items():
        noisy = values + np.random.default_rng(9).normal(scale=_CLIP, size=_LENGTH)
        noisy *= min(1.0, _CLIP / float(np.linalg.norm(noisy)))
        federation.values[site] = noisy.astype(np.float32)
    np.testing.assert_array_equal(federation.total(), federation.expected(federation.sites))


def test_thresholds_leave_no_room_for_two_majorities() -> None:
    assert [least_threshold(n) for n in (3, 4, 5, 6, 7, 9, 10, 30)] == [3, 3, 4, 5, 5, 7, 7, 21]
    assert all(3 * least_threshold(n) > 2 * n and least_threshold(n) <= n for n in range(3, 100))


# Fixed point


@given(
    members=st.integers(3, 30),
    clip=st.floats(1e-6, 1e6),
    data=st.data(),
)
@settings(deadline=None, max_examples=100)
def test_fixed_point_sums_are_exact_and_near(members: int, clip: float, data: Any) -> None:
    step = step_size(clip, members)
    assert math.frexp(step)[0] == 0.5
    assert members * clip / step < 2**31 <= 2.01 * members * clip / step + 4 * members
    unit = st.sampled_from([-1.0, 1.0]) | st.floats(-1, 1)
    vectors = [data.draw(arrays(np.float64, 4, elements=unit)) * clip for _ in range(members)]
    total = np.zeros(4, np.uint32)
    for vector in vectors:
        total += encode(vector, clip, members)
    decoded = decode(total, clip, members)
    whole = sum(np.array([round(v) for v in vector / step], dtype=object) for vector in vectors)
    assert [int(v) for v in decoded / step] == list(whole)
    assert np.abs(decoded - np.sum(vectors, axis=0)).max() <= members * step


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf, 2.51, -2.51])
def test_values_out_of_range_are_refused_with_the_range(fault: float) -> None:
    values = _values(0)
    values[17] = fault
    federation = _Federation(3)
    sent = federation.delivery()
    error = _refused("SAM-P203", federation.members[_name(0)].masked, sent[_name(0)], values)
    assert f"{fault:.6g}" in error.message
    assert "up to 2.5" in error.message


def test_rounding_of_a_clip_in_float32_is_within_range() -> None:
    clip = 0.1  # the next float32 is larger
    encode(np.full(3, np.float32(clip)), clip, 3)
    assert float(np.float32(clip)) > clip


def test_an_update_of_another_shape_is_refused() -> None:
    federation = _Federation(3)
    sent = federation.delivery()[_name(0)]
    _refused("SAM-P204", federation.members[_name(0)].masked, sent, _values(0, 299))


@pytest.mark.parametrize(
    "terms",
    [
        ("", 1, 1, 5, 1.0),
        ("r", 0, 1, 5, 1.0),
        ("r", 1, 0, 5, 1.0),
        ("r", 1, 1, 0, 1.0),
        ("r", 1, 1, 5, math.nan),
        ("r", 1, 1, 5, -1.0),
        ("r", 1, 1, 5, math.inf),
    ],
)
def test_terms_that_make_no_sense_are_refused(terms: tuple[Any, ...]) -> None:
    _refused("SAM-P201", Terms, *terms)


# What the server sees


def _uniform(vector: NDArray[np.uint32]) -> float:
    """Probability of bytes this uneven, were they random."""
    return float(
        chisquare(np.bincount(np.frombuffer(vector.tobytes(), np.uint8), minlength=256))[1]
    )


def test_masked_input_looks_random_even_when_half_of_its_masks_are_known() -> None:
    """A survivor's own mask is opened, a dropped member's pair masks are; never both."""
    length = 100_000
    federation = _Federation(3, Terms("run", 1, 1, length, _CLIP))
    zeros = np.zeros(length, np.float32)
    digest = read_roster(roster := federation.roster(), federation.terms, federation.pinned).digest
    sent = federation.server.deliver((s, m.shares(roster)) for s, m in federation.members.items())
    site, *others = federation.sites
    known = Progress.unpack(federation.members[site].save())
    data = federation.members[site].masked(sent[site], zeros)
    masked = np.frombuffer(data, "<u4", offset=32)
    without_own, without_pairs = masked.copy(), masked.copy()
    add_mask(without_own, own_mask_key(known.own_seed, digest, site), -1)
    for other in others:
        public = Keys.unpack(_keys_in(roster, other).pack()).masking
        key = pair_mask_key(masking_key(known.masking_seed), public, digest, (other, site))
        add_mask(without_pairs, key, -1)
    for vector in (masked, without_own, without_pairs):
        assert _uniform(vector) > 1e-6
        assert len(np.unique(vector)) > 0.99 * length
    add_mask(without_pairs, own_mask_key(known.own_seed, digest, site), -1)
    assert not without_pairs.any()  # nothing else was added: the test knew all masks


def _keys_in(roster: bytes, site: str) -> Keys:
    return next(keys for keys in Roster.unpack(roster).members if keys.site == site)


def test_keystreams_are_those_of_another_library() -> None:
    key = secrets.token_bytes(32)
    vector = np.zeros(40_001, "<u4")
    add_mask(vector, key, 1)
    reference = ChaCha20.new(key=key, nonce=bytes(8)).encrypt(bytes(4 * 40_001))
    assert vector.tobytes() == reference
    add_mask(vector, key, -1)
    assert not vector.any()


def test_masked_input_costs_little_more_than_fp32() -> None:
    federation = _Federation(10, Terms("run", 1, 1, 100_000, _CLIP))
    sent = federation.delivery()
    site = federation.sites[0]
    masked = federation.members[site].masked(sent[site], np.zeros(100_000, np.float32))
    assert len(masked) == 4 * 100_000 + 32


# Lies about keys


def _changed_roster(federation: _Federation, **change: Any) -> bytes:
    return Roster.unpack(federation.roster()).model_copy(update=change).pack()


def test_a_key_that_the_server_exchanged_is_refused() -> None:
    federation = _Federation(4)
    roster = Roster.unpack(federation.roster())
    server = Identity(Ed25519PrivateKey.generate())
    mine = masking_key(bytes(16)).public_key().public_bytes_raw()
    swapped = sign_keys(
        roster.members[2].model_copy(update={"masking": mine}), federation.terms, server
    )
    members = (*roster.members[:2], swapped, roster.members[3])
    false = roster.model_copy(update={"members": members}).pack()
    error = _refused("SAM-P211", federation.members[_name(0)].shares, false)
    assert _name(2) in error.message


@pytest.mark.parametrize("field", ["sealing", "masking", "commitment"])
def test_every_part_of_the_keys_is_signed(field: str) -> None:
    federation = _Federation(3)
    roster = Roster.unpack(federation.roster())
    altered = roster.members[1].model_copy(update={field: secrets.token_bytes(32)})
    members = (roster.members[0], altered, roster.members[2])
    false = roster.model_copy(update={"members": members}).pack()
    _refused("SAM-P211", federation.members[_name(0)].shares, false)


@pytest.mark.parametrize(
    "earlier",
    [
        ("other", 1, 1, _LENGTH, _CLIP),
        ("run", 2, 1, _LENGTH, _CLIP),
        ("run", 1, 2, _LENGTH, _CLIP),
        ("run", 1, 1, 299, _CLIP),
        ("run", 1, 1, _LENGTH, 2.4),
    ],
)
def test_keys_for_other_terms_are_refused(earlier: tuple[Any, ...]) -> None:
    """A replay, or a server that tells sites different settings."""
    federation = _Federation(4)
    roster = Roster.unpack(federation.roster())
    site = _name(3)
    old = Keys.unpack(federation.member(site, Record(), terms=Terms(*earlier)).keys())
    false = roster.model_copy(update={"members": (*roster.members[:3], old)}).pack()
    _refused("SAM-P211", federation.members[_name(0)].shares, false)
    other = Coordinator(federation.terms, federation.pinned)
    with contextlib.suppress(PrivacyError):
        other.call_roster([(site, old.pack())])
    assert other.faults[site].code == "SAM-P211"


def test_a_roster_without_or_with_another_key_of_the_reader_is_refused() -> None:
    federation = _Federation(4)
    roster = Roster.unpack(federation.roster())
    again = Keys.unpack(federation.member(_name(0), Record()).keys())  # genuine, but not the same
    other = roster.model_copy(update={"members": (again, *roster.members[1:])}).pack()
    _refused("SAM-P214", federation.members[_name(0)].shares, other)
    without = roster.model_copy(update={"members": roster.members[:3]}).pack()
    _refused("SAM-P214", federation.members[_name(3)].shares, without)


def test_unknown_doubled_and_unsorted_names_are_refused() -> None:
    federation = _Federation(4)
    members = Roster.unpack(roster := federation.roster()).members
    pinned = dict(federation.pinned)
    del pinned[_name(3)]
    _refused("SAM-P210", read_roster, roster, federation.terms, pinned)
    for order in ((0, 1, 2, 2), (1, 0, 2, 3)):
        false = Roster(threshold=3, members=tuple(members[i] for i in order)).pack()
        _refused("SAM-P212", read_roster, false, federation.terms, federation.pinned)


@pytest.mark.parametrize(("members", "threshold"), [(2, 2), (0, 0), (6, 4), (6, 7), (6, 0)])
def test_few_members_and_low_thresholds_are_refused(members: int, threshold: int) -> None:
    federation = _Federation(6)
    some = Roster.unpack(federation.roster()).members[:members]
    false = Roster(threshold=threshold, members=some).pack()
    _refused("SAM-P209", federation.members[_name(0)].shares, false)


def test_a_degenerate_key_is_refused() -> None:
    federation = _Federation(3)
    site = _name(1)
    keys = Keys.unpack(federation.members[site].keys()).model_copy(update={"sealing": bytes(32)})
    signed = sign_keys(keys, federation.terms, federation.identity[site])
    roster = federation.server.call_roster(
        [(s, federation.members[s].keys()) for s in (_name(0), _name(2))] + [(site, signed.pack())]
    )
    _refused("SAM-P219", federation.members[_name(0)].shares, roster)


# Lies about shares


def test_envelopes_of_other_members_or_rosters_cannot_be_opened() -> None:
    federation = _Federation(4)
    roster = federation.roster()
    shares = {s: Shares.unpack(m.shares(roster)) for s, m in federation.members.items()}
    me = _name(0)
    good = {dealer: shares[dealer].envelopes[me] for dealer in federation.sites}
    for false in (
        shares[_name(1)].envelopes[_name(2)],  # for another
        shares[_name(2)].envelopes[me],  # by another
        good[_name(1)].model_copy(update={"sealed": secrets.token_bytes(48)}),
        good[_name(1)].model_copy(update={"hashes": good[_name(2)].hashes}),
    ):
        member = federation.member(me, Record(), progress=federation.members[me].save())
        delivery = Delivery(envelopes=good | {_name(1): false}).pack()
        error = _refused("SAM-P213", member.masked, delivery, federation.values[me])
        assert _name(1) in error.message


def test_members_who_were_shown_different_thresholds_do_not_go_on() -> None:
    federation = _Federation(4)
    roster = federation.roster()
    higher = Roster.unpack(roster).model_copy(update={"threshold": 4}).pack()
    shown = {_name(0): higher}
    sent = federation.server.deliver(
        (s, m.shares(shown.get(s, roster))) for s, m in federation.members.items()
    )
    for site in federation.sites:
        values = federation.values[site]
        _refused("SAM-P213", federation.members[site].masked, sent[site], values)


def test_a_delivery_of_too_few_or_strange_dealers_is_refused() -> None:
    federation = _Federation(5)
    sent = Delivery.unpack(federation.delivery()[_name(0)]).envelopes
    progress = federation.members[_name(0)].save()
    for dealers in (
        federation.sites[:3],  # 4 are needed
        federation.sites[1:],  # not itself
        [*federation.sites, "stranger"],
    ):
        envelopes = {dealer: sent.get(dealer, sent[_name(1)]) for dealer in dealers}
        member = federation.member(_name(0), Record(), progress=progress)
        delivery = Delivery(envelopes=envelopes).pack()
        _refused("SAM-P215", member.masked, delivery, federation.values[_name(0)])


# Lies about survivors


@pytest.mark.parametrize(
    "survivors",
    [(0, 1), (0, 1, 2), (1, 2, 3, 4), (0, 1, 1, 2), (1, 0, 2, 3), (0, 1, 2, 3, 4, 5)],
    ids=["two", "under the threshold", "not the reader", "double", "unsorted", "stranger"],
)
def test_false_lists_of_survivors_are_not_signed(survivors: tuple[int, ...]) -> None:
    federation = _Federation(5)
    federation.survivors()
    names = tuple(_name(number) for number in survivors)
    false = Survivors(survivors=names).pack()
    _refused("SAM-P215", federation.members[_name(0)].agreement, false)


def test_a_survivor_for_whom_nobody_masked_is_not_signed() -> None:
    federation = _Federation(5)
    federation.survivors({"shares": {_name(4)}})
    false = Survivors(survivors=tuple(federation.sites)).pack()
    _refused("SAM-P215", federation.members[_name(0)].agreement, false)


def test_a_second_list_of_survivors_is_not_signed() -> None:
    federation = _Federation(5)
    survivors = federation.survivors()
    member = federation.members[_name(0)]
    before = member.save()
    member.agreement(survivors)
    _refused("SAM-P208", member.agreement, survivors)
    fewer = Survivors(survivors=tuple(federation.sites[:4])).pack()
    from_copy = federation.member(_name(0), progress=before)
    _refused("SAM-P205", from_copy.agreement, fewer)


def test_members_who_were_told_different_survivors_open_nothing() -> None:
    federation = _Federation(5)
    federation.survivors()
    some = tuple(federation.sites[:4])
    shown = dict.fromkeys(federation.sites, Survivors(survivors=some).pack())
    shown[_name(4)] = shown[_name(3)] = Survivors(survivors=tuple(federation.sites)).pack()
    signatures = {
        site: Agreement.unpack(federation.members[site].agreement(shown[site])).signature
        for site in federation.sites
    }
    request = Request(survivors=some, dropped=(_name(4),), signatures=signatures).pack()
    error = _refused("SAM-P218", federation.members[_name(0)].opening, request)
    assert "3 members have signed" in error.message
    everyone = Request(survivors=tuple(federation.sites), dropped=(), signatures=signatures).pack()
    _refused("SAM-P218", federation.members[_name(3)].opening, everyone)


def test_the_server_cannot_make_up_signatures() -> None:
    federation = _Federation(5)
    request = Request.unpack(federation.request())
    own = request.signatures[_name(0)]
    forged = dict.fromkeys(federation.sites, own) | {"stranger": own}
    false = request.model_copy(update={"signatures": forged}).pack()
    error = _refused("SAM-P218", federation.members[_name(0)].opening, false)
    assert "1 members have signed" in error.message


# Lies about what to open


@pytest.mark.parametrize("victim", [1, 0])
def test_overlapping_lists_are_refused(victim: int) -> None:
    """The attack that flwr 1.41's SecAgg+ answers with both shares of the victim."""
    federation = _Federation(5)
    request = Request.unpack(federation.request({"masked": {_name(4)}}))
    dropped = tuple(sorted({_name(victim), *request.dropped}))
    false = request.model_copy(update={"dropped": dropped}).pack()
    error = _refused("SAM-P216", federation.members[_name(0)].opening, false)
    assert f"{_name(victim)} a survivor and dropped at once" in error.message


@pytest.mark.parametrize(
    ("survivors", "dropped"),
    [
        ((0, 1, 2), (3, 4)),
        ((0, 1, 2), (4,)),
        ((0, 1, 2, 3), ()),
        ((0, 1, 2, 3), (4, 5)),
        ((0, 1, 2, 3, 4), ()),
    ],
)
def test_lists_that_a_member_did_not_sign_are_refused(
    survivors: tuple[int, ...], dropped: tuple[int, ...]
) -> None:
    federation = _Federation(5)
    request = Request.unpack(federation.request({"masked": {_name(4)}}))
    lists = {
        "survivors": tuple(_name(number) for number in survivors),
        "dropped": tuple(_name(number) for number in dropped),
    }
    false = request.model_copy(update=lists).pack()
    _refused("SAM-P217", federation.members[_name(0)].opening, false)


def test_a_request_to_open_is_answered_once_in_a_round() -> None:
    federation = _Federation(3)
    request = federation.request()
    member = federation.members[_name(0)]
    before = member.save()
    member.opening(request)
    _refused("SAM-P208", member.opening, request)
    _refused("SAM-P206", federation.member(_name(0), progress=before).opening, request)
    again = federation.member(_name(0), terms=Terms("run", 1, 2, _LENGTH, _CLIP))
    _refused("SAM-P206", again.keys)
    federation.member(_name(0), terms=Terms("run", 2, 1, _LENGTH, _CLIP)).keys()


def test_a_member_opens_one_share_of_each_and_forgets_its_secrets() -> None:
    federation = _Federation(5)
    request = federation.request({"masked": {_name(4)}})
    member = federation.members[_name(0)]
    before = Progress.unpack(member.save())
    opening = Opening.unpack(member.opening(request))
    assert list(opening.own_masks) == federation.sites[:4]
    assert list(opening.masking_seeds) == [_name(4)]
    after = member.save()
    for secret in (before.sealing, before.masking_seed, before.own_seed):
        assert secret.hex().encode() not in after


# Faulty members


def test_a_wrong_share_is_found_named_and_left_out() -> None:
    federation = _Federation(5)
    request = federation.request({"masked": {_name(4)}})
    answers = {s: federation.members[s].opening(request) for s in federation.server.survivors}
    opened = Opening.unpack(answers[_name(2)])
    wrong = {**opened.own_masks, _name(1): secrets.token_bytes(16)}
    answers[_name(2)] = opened.model_copy(update={"own_masks": wrong}).pack()
    error = _refused("SAM-P220", federation.server.total, answers.items())  # 3 of 4 left
    assert f"{_name(2)}: SAM-P222" in error.message

    larger = _Federation(5)
    request = larger.request()
    answers = {s: larger.members[s].opening(request) for s in larger.sites}
    answers[_name(2)] = opened.model_copy(
        update={"own_masks": dict.fromkeys(larger.sites, bytes(16)), "masking_seeds": {}}
    ).pack()
    total = larger.server.total(answers.items())
    np.testing.assert_array_equal(total, larger.expected(larger.sites))
    assert larger.server.faults.keys() == {_name(2)}
    assert larger.server.faults[_name(2)].code == "SAM-P222"


@pytest.mark.parametrize(("seed", "away"), [("own_seed", ()), ("masking_seed", (_name(1),))])
def test_a_dealer_of_false_shares_is_named(seed: str, away: tuple[str, ...]) -> None:
    federation = _Federation(5)
    roster = federation.roster()
    liar = _name(1)
    kept = Progress.unpack(federation.members[liar].save())
    other = kept.model_copy(update={seed: secrets.token_bytes(16)}).pack()
    federation.members[liar] = federation.member(liar, progress=other)
    sent = federation.server.deliver((s, m.shares(roster)) for s, m in federation.members.items())
    survivors = federation.server.ask_agreement(
        (s, m.masked(sent[s], federation.values[s]))
        for s, m in federation.members.items()
        if s not in away
    )
    sites = federation.server.survivors
    request = federation.server.ask_opening(
        (s, federation.members[s].agreement(survivors)) for s in sites
    )
    answers = [(s, federation.members[s].opening(request)) for s in sites]
    error = _refused("SAM-P223", federation.server.total, answers)
    assert error.message.startswith(liar)


def test_faulty_and_doubled_answers_count_as_none() -> None:
    federation = _Federation(6)  # 5 are needed
    sent = federation.delivery()
    good = {s: federation.members[s].masked(sent[s], federation.values[s]) for s in sent}
    answers = [*good.items(), (_name(1), good[_name(1)]), ("stranger", good[_name(1)])]
    answers[0] = (_name(0), good[_name(0)][:-4])
    survivors = federation.server.ask_agreement(answers)
    assert Survivors.unpack(survivors).survivors == tuple(federation.sites[1:])
    assert federation.server.faults.keys() == {_name(0), _name(1), "stranger"}
    assert {fault.code for fault in federation.server.faults.values()} == {"SAM-P221"}
    request = federation.server.ask_opening(
        (s, federation.members[s].agreement(survivors)) for s in federation.sites[1:]
    )
    total = federation.server.total(
        (s, federation.members[s].opening(request)) for s in federation.sites[1:]
    )
    np.testing.assert_array_equal(total, federation.expected(federation.sites[1:]))


def test_readable_answers_that_say_the_wrong_thing_count_as_none() -> None:
    federation = _Federation(10)  # 7 are needed
    server, members = federation.server, federation.members
    roster = federation.roster()
    shares = {s: m.shares(roster) for s, m in members.items()}
    few = Shares.unpack(shares[_name(0)]).envelopes
    shares[_name(0)] = Shares(envelopes={_name(1): few[_name(1)]}).pack()
    sent = server.deliver(shares.items())
    survivors = server.ask_agreement(
        (s, members[s].masked(sent[s], federation.values[s])) for s in sent
    )
    agreements = {s: members[s].agreement(survivors) for s in server.survivors}
    agreements[_name(1)] = agreements[_name(2)]
    request = server.ask_opening(agreements.items())
    assert _name(1) not in Request.unpack(request).signatures
    openings = {s: members[s].opening(request) for s in server.survivors}
    openings[_name(2)] = Opening(own_masks={}, masking_seeds={}).pack()
    total = server.total(openings.items())
    np.testing.assert_array_equal(total, federation.expected(federation.sites[1:]))
    assert {site: fault.code for site, fault in server.faults.items()} == dict.fromkeys(
        (_name(0), _name(1), _name(2)), "SAM-P221"
    )


def test_masked_input_of_another_attempt_is_not_added() -> None:
    federation, other = _Federation(3), _Federation(3)
    sent = other.delivery()
    foreign = [(s, other.members[s].masked(sent[s], other.values[s])) for s in other.sites]
    federation.delivery()
    _refused("SAM-P220", federation.server.ask_agreement, foreign)
    assert federation.server.faults[_name(0)].code == "SAM-P221"


def test_a_site_cannot_answer_for_another() -> None:
    federation = _Federation(3)
    keys = {s: m.keys() for s, m in federation.members.items()}
    keys[_name(0)], keys[_name(1)] = keys[_name(1)], keys[_name(0)]
    _refused("SAM-P220", federation.server.call_roster, keys.items())
    assert federation.server.faults.keys() == {_name(0), _name(1)}


# Messages


def _garbage(good: bytes) -> list[bytes]:
    first = good.index(b'"')
    return [
        b"",
        b"null",
        secrets.token_bytes(100),
        good[:-1],
        good + b" ",
        good[:first] + b'"extra":1,' + good[first:],
        good.replace(b'"version":1', b'"version":2', 1),
        b"[" * 100_000,
        b" " * 2**21 + good,
    ]


def test_messages_have_one_form_and_nothing_else_is_read() -> None:
    federation = _Federation(3)
    roster = federation.roster()
    shares = [(s, m.shares(roster)) for s, m in federation.members.items()]
    delivery = federation.server.deliver(shares)[_name(0)]
    read: list[tuple[type[Roster | Shares | Delivery], bytes]] = [
        (Roster, roster),
        (Shares, shares[0][1]),
        (Delivery, delivery),
    ]
    for kind, good in read:
        assert kind.unpack(good).pack() == good
        for bad in [*_garbage(good), *(other for reader, other in read if reader is not kind)]:
            _refused("SAM-P202", kind.unpack, bad)
    key = Roster.unpack(roster).members[0].sealing.hex().encode()
    for bad in (roster.replace(key, key.upper()), roster.replace(key, key[:-2])):
        _refused("SAM-P202", Roster.unpack, bad)


@pytest.mark.parametrize("answer", ["shares", "masked", "agreement", "opening"])
@pytest.mark.parametrize("garbage", [b"", b"{}", b"[" * 100_000])
def test_garbage_ends_the_attempt_for_a_member(answer: str, garbage: bytes) -> None:
    federation = _Federation(3)
    before = {
        "shares": federation.roster,
        "masked": federation.delivery,
        "agreement": federation.survivors,
        "opening": federation.request,
    }
    good = before[answer]()
    values = [federation.values[_name(0)]] if answer == "masked" else []
    method = getattr(federation.members[_name(0)], answer)
    good = good[_name(0)] if isinstance(good, dict) else good
    copy = federation.members[_name(0)].save()
    _refused("SAM-P202", method, garbage, *values)
    _refused("SAM-P208", method, good, *values)
    getattr(federation.member(_name(0), progress=copy), answer)(good, *values)  # it was good


def test_the_server_takes_garbage_for_a_dropout() -> None:
    federation = _Federation(4)
    keys = [(s, federation.members[s].keys()) for s in federation.sites[:3]]
    federation.server.call_roster([*keys, (_name(3), b"garbage")])
    assert federation.server.faults[_name(3)].code == "SAM-P202"


# Restarts


def test_a_site_goes_on_in_other_processes(tmp_path: Path) -> None:
    """Every answer by new objects from what was saved, as when each message starts a process."""
    federation = _Federation(4)
    kept: dict[str, bytes | None] = dict.fromkeys(federation.sites)

    def answer(site: str, ask: Callable[[Member], bytes]) -> tuple[str, bytes]:
        record = Record(tmp_path / site / "sums.jsonl")
        member = federation.member(site, record, progress=kept[site])
        data = ask(member)
        kept[site] = member.save()
        return site, data

    server, values = federation.server, federation.values
    roster = server.call_roster(answer(s, lambda m: m.keys()) for s in federation.sites)
    sent = server.deliver(answer(s, lambda m: m.shares(roster)) for s in federation.sites)
    survivors = server.ask_agreement(
        answer(s, lambda m: m.masked(sent[s], values[s]))  # noqa: B023
        for s in federation.sites[1:]
    )
    request = server.ask_opening(
        answer(s, lambda m: m.agreement(survivors)) for s in server.survivors
    )
    total = server.total(answer(s, lambda m: m.opening(request)) for s in server.survivors)
    np.testing.assert_array_equal(total, federation.expected(federation.sites[1:]))
    assert max(len(data) for data in kept.values() if data) < 100_000
    _refused("SAM-P208", answer, _name(1), lambda m: m.opening(request))


def test_a_restarted_site_takes_part_in_an_attempt_once(tmp_path: Path) -> None:
    federation = _Federation(3)
    path = tmp_path / "own" / "sums.jsonl"
    federation.member(_name(0), Record(path)).keys()
    _refused("SAM-P205", federation.member(_name(0), Record(path)).keys)
    second = Terms("run", 1, 2, _LENGTH, _CLIP)
    federation.member(_name(0), Record(path), terms=second).keys()
    assert len(path.read_text().splitlines()) == 2
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("answer", ["shares", "masked"])
def test_an_old_copy_gives_no_second_answer(answer: str) -> None:
    federation = _Federation(3)
    roster = federation.roster()
    copy = federation.members[_name(0)].save()
    shares = [(s, m.shares(roster)) for s, m in federation.members.items()]
    if answer == "shares":
        again = federation.member(_name(0), progress=copy)
        _refused("SAM-P205", again.shares, roster)
        return
    sent = federation.server.deliver(shares)[_name(0)]
    copy = federation.members[_name(0)].save()
    federation.members[_name(0)].masked(sent, _values(0))
    again = federation.member(_name(0), progress=copy)
    _refused("SAM-P205", again.masked, sent, _values(1))


@pytest.mark.parametrize(
    "content", ["{", '["keys", "run", 1]\n', '["keys", "run", "1", 1]\n', "7\n"]
)
def test_a_damaged_record_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "sums.jsonl"
    path.write_text(content)
    _refused("SAM-P207", Record, path)


def test_answers_out_of_order_are_refused() -> None:
    federation = _Federation(3)
    member = federation.members[_name(0)]
    member.keys()
    _refused("SAM-P208", member.keys)
    fresh = federation.member(_name(1))
    _refused("SAM-P208", fresh.opening, b"")


def test_names_of_an_envelope_are_part_of_what_it_is_bound_to() -> None:
    """Lengths are written before parts, so that no two lists of parts read alike."""
    federation = _Federation(3)
    members = read_roster(federation.roster(), federation.terms, federation.pinned)
    assert members.statement(["a", "b"], ["c"]) != members.statement(["a"], ["b", "c"])
    assert members.statement(["ab"], []) != members.statement(["a", "b"], [])
    assert Envelope.model_fields.keys() >= {"sealed", "hashes"}
