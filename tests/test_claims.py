"""gossip/claims.py and claims_hearing.py: what peers say of themselves is bounded, aged, and only a hint."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from crypto.envelope import SKEW_MS, seal
from crypto.identity import Identity, PeerId
from gossip.breaker import State
from gossip.claims import AGREES_FACTOR, ANSWERS_MIN, LIFE_MS_MIN, Agreement, Claims, Heard, agreement, hint
from gossip.claims_hearing import (
    CLAIM_EVERY_S,
    LOOKED_AT_BURST,
    PASSED_ON_BURST,
    TOO_FAST_BURST,
    ClaimsHearing,
)
from gossip.directory import Directory, Own
from gossip.hearing import Hearing
from gossip.observations import Observations, Observed
from gossip.routing import ALIKE_SHARE, Candidate, rank
from gossip.standing import Fault, Standing, Verdict
from gossip.summaries import SUMMARY_BYTES_MAX, SUMMARY_DOMAIN, SUMMARY_LIFE_MS, SelfSummary, seal_summary
from gossip.view import Preference
from tests.test_routing import NEED, offer, peer

NOW_MS = 1_800_000_000_000
OWN = Identity(b"0" * 32)
IDENTITY, OTHER = Identity(b"1" * 32), Identity(b"2" * 32)
IDLE = SelfSummary(busy=0.0, queued=0.0, loop_lag_ms=0.0, first_token_s=0.2)
BUSY = SelfSummary(busy=1.0, queued=1.0, loop_lag_ms=900.0, first_token_s=0.2)


def raw_of(
    summary: SelfSummary = IDLE, *, sequence: int = 1, identity: Identity = IDENTITY, now: float = 0.0, **changes: Any
) -> bytes:
    told = {"network": "main", "time_ms": NOW_MS + int(now * 1000), **changes}
    return seal_summary(identity, summary, sequence=sequence, **told)


class Table:
    """Claims, fed at a time."""

    def __init__(self, **changes: Any) -> None:
        self.claims = Claims(OWN.peer_id, "main", **changes)

    def receive(self, raw: bytes, now: float = 0.0, publisher: Identity = IDENTITY, **changes: Any) -> Heard:
        return self.claims.receive(raw, publisher.peer_id, now, NOW_MS + int(now * 1000), **changes).heard

    def of(self, identity: Identity = IDENTITY, now: float = 0.0) -> SelfSummary | None:
        claim = self.claims.claim_of(identity.peer_id, now)
        return None if claim is None else claim.summary


# --- what is taken ---


def test_the_newest_is_kept_and_no_older_one() -> None:
    table = Table()
    assert table.receive(raw_of(IDLE, sequence=5)) is Heard.ACCEPTED
    assert table.receive(raw_of(IDLE, sequence=5)) is Heard.DUPLICATE
    assert table.receive(raw_of(BUSY, sequence=4)) is Heard.STALE
    assert table.receive(raw_of(BUSY, sequence=5)) is Heard.CONTRADICTION
    assert table.of() == IDLE
    assert table.receive(raw_of(BUSY, sequence=6)) is Heard.ACCEPTED
    assert table.of() == BUSY
    assert table.claims.statistics(3).heard == {
        "accepted": 2, "duplicate": 1, "stale": 1, "contradiction": 1
    }  # fmt: skip


def test_only_its_own_words_are_taken_of_a_peer() -> None:
    table = Table()
    assert table.receive(raw_of(identity=OTHER)) is Heard.WRONG_SENDER
    assert table.receive(raw_of(identity=OWN), publisher=OWN) is Heard.OWN
    assert table.receive(raw_of(network="test")) is Heard.WRONG_NETWORK
    assert table.receive(raw_of()[:-1] + b"\x00") is Heard.BAD_SIGNATURE
    advert = seal(
        IDENTITY, domain="advert", network="main", sequence=1, time_ms=NOW_MS, expires_ms=NOW_MS + 1, body=b"\x80"
    )
    assert table.receive(advert) is Heard.BAD_SIGNATURE
    assert table.of() is table.of(OTHER) is table.of(OWN) is None


def test_size_is_looked_at_before_anything_else() -> None:
    body = b"\xc4\xff" * SUMMARY_BYTES_MAX
    fields = {"domain": SUMMARY_DOMAIN, "network": "main", "sequence": 1, "time_ms": NOW_MS, "expires_ms": NOW_MS + 9}
    assert Table().receive(seal(IDENTITY, body=body, **fields)) is Heard.TOO_LARGE  # type: ignore[arg-type]
    assert Table().receive(bytes(SUMMARY_BYTES_MAX + 1)) is Heard.TOO_LARGE
    assert Table().receive(bytes(SUMMARY_BYTES_MAX)) is Heard.MALFORMED
    assert Table().receive(seal(IDENTITY, body=b"\xc0", **fields)) is Heard.MALFORMED  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.binary(max_size=SUMMARY_BYTES_MAX + 50))
def test_any_bytes_are_taken_or_refused(raw: bytes) -> None:
    assert Table().receive(raw) in (Heard.MALFORMED, Heard.TOO_LARGE)


def test_a_claim_ends_with_its_life() -> None:
    table = Table()
    table.receive(raw_of())
    assert table.of(now=SUMMARY_LIFE_MS / 1000 - 0.1) == IDLE
    assert table.of(now=SUMMARY_LIFE_MS / 1000) is None
    table.claims.tick(SUMMARY_LIFE_MS / 1000)
    assert len(table.claims) == 0


def test_one_that_is_replayed_late_lives_no_longer_than_it_said() -> None:
    table, late_s = Table(), SUMMARY_LIFE_MS / 1000 - 50
    assert table.receive(raw_of(), now=late_s) is Heard.ACCEPTED
    assert table.of(now=late_s + 49.9) == IDLE
    assert table.of(now=late_s + 50.1) is None


def test_one_of_another_time_is_nobodys_fault() -> None:
    ahead, over_s = SKEW_MS / 1000 + 1, (SUMMARY_LIFE_MS + SKEW_MS) / 1000 + 1
    ear = Ear()
    ear.known.add(IDENTITY.peer_id)
    assert not ear.heard(raw_of(now=ahead))
    assert not ear.heard(raw_of(), now=over_s)
    assert ear.claims.statistics(0).heard == {"other_time": 2}
    assert ear.verdicts == []
    assert set(ear.standing.statistics(0.0).faults.values()) == {0}


def test_a_summary_that_says_that_it_lives_for_ever_does_not() -> None:
    long_ms = 20 * 86_400_000
    raw = seal(
        IDENTITY, domain=SUMMARY_DOMAIN, network="main", sequence=1, time_ms=NOW_MS, expires_ms=NOW_MS + long_ms,
        body=b"\x80",
    )  # fmt: skip
    table = Table()
    assert table.receive(raw) is Heard.ACCEPTED
    assert table.of(now=3600.0) is None
    assert Table().receive(raw, now=3600.0) is Heard.OTHER_TIME
    behind = seal(
        IDENTITY, domain=SUMMARY_DOMAIN, network="main", sequence=1, time_ms=NOW_MS, expires_ms=NOW_MS + 20_000,
        body=b"\x80",
    )  # fmt: skip
    slow = Table()
    assert slow.receive(behind, now=59.0) is Heard.ACCEPTED, "its clock may be behind"
    assert slow.of(now=59.0 + LIFE_MS_MIN / 1000 - 0.1) is not None
    assert slow.of(now=59.0 + LIFE_MS_MIN / 1000) is None


def test_the_table_is_bounded_and_who_is_protected_stays() -> None:
    identities = [Identity(bytes([number]) * 32) for number in range(1, 8)]
    table = Table(claims_max=3, protected=lambda who: who == identities[0].peer_id)
    for number, each in enumerate(identities):
        assert table.receive(raw_of(identity=each), publisher=each, now=float(number)) is Heard.ACCEPTED
    assert [table.of(each, 7.0) is not None for each in identities] == [True, *[False] * 4, True, True]
    assert table.claims.statistics(0).evicted == 4
    full = Table(claims_max=1, protected=lambda _who: True)
    full.receive(raw_of())
    assert full.receive(raw_of(identity=OTHER), publisher=OTHER) is Heard.FULL
    assert full.receive(raw_of(BUSY, sequence=2)) is Heard.ACCEPTED


def test_who_was_heard_lately_outlasts_who_was_not() -> None:
    identities = [Identity(bytes([number]) * 32) for number in range(1, 4)]
    table = Table(claims_max=2)
    for sequence, each in ((1, identities[0]), (1, identities[1]), (2, identities[0]), (1, identities[2])):
        table.receive(raw_of(identity=each, sequence=sequence), publisher=each)
    assert [table.of(each) is not None for each in identities] == [True, False, True]


@pytest.mark.parametrize(
    ("before", "after", "is_broken"),
    [((7, b"a"), (7, b"a"), False), ((7, b"a"), (9, b"b"), False), ((7, b"a"), (7, b"b"), True),
     ((7, b"a"), (6, b"a"), True), ((7, b"a"), None, False), (None, (1, b"a"), False)],
)  # fmt: skip
def test_a_memory_that_was_given_another_past_is_seen(before: Any, after: Any, is_broken: bool) -> None:
    table = Table()
    for sequence, head in ((1, before), (2, after)):
        told = {} if head is None else {"head_id": head[0], "head_hash": head[1] * 32}
        table.receive(raw_of(SelfSummary(**told), sequence=sequence))
    claim = table.claims.claim_of(IDENTITY.peer_id, 0.0)
    assert claim is not None
    assert claim.is_head_broken is is_broken
    assert table.claims.statistics(0).heads_broken == is_broken


# --- who is listened to ---


class Ear:
    """A ClaimsHearing, and what it wants done."""

    def __init__(self) -> None:
        self.standing, self.known = Standing(), set[PeerId]()
        directory = Directory(own=Own(peer=OWN.peer_id, instance="0" * 32, first_sequence=1), network="main")
        self.verdicts: list[tuple[PeerId, Verdict]] = []
        self.hearing = Hearing(
            directory,
            self.standing,
            on_verdict=lambda who, verdict, _reason: self.verdicts.append((who, verdict)),
            on_duplicate=lambda _what: None,
        )
        self.claims = Claims(OWN.peer_id, "main")
        self.ear = ClaimsHearing(self.claims, self.hearing, Preference(b""), lambda who, _now: who in self.known)

    def heard(self, raw: bytes, now: float = 0.0, publisher: Identity = IDENTITY) -> bool:
        return self.ear.heard(publisher.peer_id, raw, now, NOW_MS + int(now * 1000))


@pytest.fixture
def ear() -> Ear:
    made = Ear()
    made.known |= {IDENTITY.peer_id, OTHER.peer_id}
    return made


def test_what_is_new_is_passed_on_once(ear: Ear) -> None:
    assert ear.heard(raw_of())
    assert not ear.heard(raw_of(), 31.0)
    assert ear.heard(raw_of(sequence=2, now=62.0), 62.0)
    assert ear.verdicts == []


def test_strangers_and_the_banned_are_not_heard(ear: Ear) -> None:
    stranger = Identity(b"3" * 32)
    assert not ear.heard(raw_of(identity=stranger), publisher=stranger)
    ear.hearing.blame(OTHER.peer_id, Fault.FATAL, "a lie", 0.0)
    assert not ear.heard(raw_of(identity=OTHER), publisher=OTHER)
    assert len(ear.claims) == 0
    assert ear.hearing.drops == {"summary_of_a_stranger": 1, "banned": 1}


def test_one_in_thirty_seconds_is_taken_of_a_peer(ear: Ear) -> None:
    for number in range(1, 5):
        now = CLAIM_EVERY_S / 4 * number
        ear.heard(raw_of(sequence=number, now=now), now)
    claim = ear.claims.claim_of(IDENTITY.peer_id, CLAIM_EVERY_S)
    assert claim is not None
    assert claim.sequence == 1
    assert ear.hearing.drops == {"summary_over_quota": 3}
    assert ear.verdicts == []
    assert set(ear.standing.statistics(0.0).faults.values()) == {0}, "a restart is no flood"
    assert ear.heard(raw_of(sequence=9, now=38.0), 38.0)


def test_whoever_says_three_times_too_much_for_ever_is_banned_in_the_end(ear: Ear) -> None:
    for number in range(300):
        now = CLAIM_EVERY_S / 3 * number
        ear.heard(raw_of(sequence=number + 1, now=now), now)
    assert ear.verdicts[-1] == (IDENTITY.peer_id, Verdict.BANNED)
    assert 1 < ear.claims.statistics(0).heard["accepted"] < 20


def test_a_flood_costs_its_standing_and_ends_in_seconds(ear: Ear) -> None:
    now, sequence = 0.0, 0
    while not ear.verdicts:
        now, sequence = now + 0.01, sequence + 1
        ear.heard(raw_of(sequence=sequence, now=now), now)
        assert now < 5.0
    assert ear.verdicts == [(IDENTITY.peer_id, Verdict.DISCONNECT)]
    assert ear.claims.statistics(0).heard == {"accepted": 1}
    claim = ear.claims.claim_of(IDENTITY.peer_id, now)
    assert claim is not None
    assert claim.sequence == 1, "what is looked at to find out whom to blame is not kept"
    assert sequence > TOO_FAST_BURST


def test_whoever_replays_what_a_peer_said_blames_nobody(ear: Ear) -> None:
    old = [raw_of(sequence=number) for number in range(1, 50)]
    assert ear.heard(raw_of(sequence=99))
    for number in range(2_000):
        assert not ear.heard(old[number % len(old)], 0.01 * number)
    assert ear.verdicts == []
    assert set(ear.standing.statistics(0.0).faults.values()) == {0}


@pytest.mark.parametrize(
    ("raw", "fault"),
    [(b"rubbish", "malformed"), (bytes(2_000), "malformed"), (raw_of(network="test"), "malformed"),
     (raw_of()[:-1] + b"\x00", "fatal"), (raw_of(identity=OTHER), "fatal")],
)  # fmt: skip
def test_a_broken_summary_is_a_breach(ear: Ear, raw: bytes, fault: str) -> None:
    assert not ear.heard(raw)
    faults = ear.standing.statistics(0.0).faults
    assert {name: count for name, count in faults.items() if count} == {fault: 1}
    assert ear.standing.score(OTHER.peer_id, 0.0) == 0.0, "only who published it is to blame"


def test_two_words_under_one_sequence_are_a_breach(ear: Ear) -> None:
    assert ear.heard(raw_of(IDLE))
    assert not ear.heard(raw_of(BUSY), CLAIM_EVERY_S)
    assert ear.standing.statistics(0.0).faults["malformed"] == 1


def test_of_many_peers_no_more_is_looked_at_or_passed_on_than_there_is_room_for(ear: Ear) -> None:
    identities = [Identity(bytes([number, 7]) * 16) for number in range(100)]
    ear.known |= {each.peer_id for each in identities}
    passed_on = sum(ear.heard(raw_of(identity=each), publisher=each) for each in identities)
    assert passed_on == PASSED_ON_BURST
    assert ear.claims.statistics(0).heard == {"accepted": LOOKED_AT_BURST}
    assert ear.hearing.drops["summaries_over_quota"] == 100 - LOOKED_AT_BURST


def test_in_a_crowd_only_a_share_goes_on(ear: Ear) -> None:
    ear.hearing.flow.share = 0.0
    assert not ear.heard(raw_of())
    assert len(ear.claims) == 1, "it is known here all the same"
    assert ear.hearing.drops == {"summary_not_passed_on": 1}


# --- what a claim is good for ---

OBSERVED = Observed(
    state=State.CLOSED, proven=True, in_flight=0, answers=ANSWERS_MIN, rtt_s=0.02, first_token_s=0.22, tok_s=50.0,
    success=1.0, refusing=False, connected=True,
)  # fmt: skip


def observed(**changes: Any) -> Observed:
    fields = {name: getattr(OBSERVED, name) for name in OBSERVED.__dataclass_fields__}
    return Observed(**{**fields, **changes})


def test_a_claim_that_observation_bears_out_is_a_hint() -> None:
    assert agreement(IDLE, OBSERVED) is Agreement.AGREES
    assert (hint(IDLE, OBSERVED), hint(BUSY, OBSERVED)) == (1.0, -1.0)
    assert hint(replace(IDLE, busy=0.25), OBSERVED) == 0.5
    assert hint(SelfSummary(first_token_s=0.2), OBSERVED) == 0.0, "it says nothing of how busy it is"


@pytest.mark.parametrize(
    "changes",
    [{"answers": ANSWERS_MIN - 1}, {"answers": 0, "first_token_s": None}, {"first_token_s": None}, {"success": 0.89},
     {"state": State.OPEN}, {"state": State.PROBING}],
    ids=str,
)  # fmt: skip
def test_without_enough_of_our_own_a_claim_is_nothing(changes: dict[str, Any]) -> None:
    seen = observed(**changes)
    assert agreement(IDLE, seen) is Agreement.UNKNOWN
    assert hint(IDLE, seen) == 0.0


@pytest.mark.parametrize(
    ("claimed_s", "seen"),
    [(0.0, {}), (0.01, {}), (1.0, {}), (0.2, {"first_token_s": 2.0}), (0.2, {"refusing": True})],
    ids=str,
)
def test_a_claim_that_observation_contradicts_is_nothing(claimed_s: float, seen: dict[str, Any]) -> None:
    claim = replace(IDLE, first_token_s=claimed_s)
    assert agreement(claim, observed(**seen)) is Agreement.DISAGREES
    assert hint(claim, observed(**seen)) == 0.0


def test_disagreement_is_counted_once_a_claim() -> None:
    table = Table()
    table.receive(raw_of())
    for _ in range(10):
        assert table.claims.hint(IDENTITY.peer_id, observed(first_token_s=9.0), 1.0) == 0.0
    table.receive(raw_of(sequence=2))
    for _ in range(10):
        table.claims.hint(IDENTITY.peer_id, OBSERVED, 1.0)
    assert table.claims.statistics(0).judged == {"disagrees": 1, "agrees": 1}
    assert table.claims.hint(OTHER.peer_id, OBSERVED, 1.0) == 0.0
    assert table.claims.hint(IDENTITY.peer_id, OBSERVED, 1e6) == 0.0, "its life is over"


shares = st.one_of(st.none(), st.floats(0.0, 1.0))
seconds = st.one_of(st.none(), st.floats(0.0, 1e4))
summaries = st.builds(SelfSummary, busy=shares, queued=shares, loop_lag_ms=seconds, first_token_s=seconds)
observations = st.builds(
    observed,
    state=st.sampled_from(State),
    answers=st.integers(0, 50),
    first_token_s=seconds,
    rtt_s=seconds,
    success=st.floats(0.0, 1.0),
    refusing=st.booleans(),
)


@settings(deadline=None)
@given(summaries, observations)
def test_a_hint_is_small_and_needs_agreement(claim: SelfSummary, seen: Observed) -> None:
    assert -1.0 <= hint(claim, seen) <= 1.0
    if hint(claim, seen):
        assert agreement(claim, seen) is Agreement.AGREES
        assert claim.first_token_s is not None
        assert seen.first_token_s is not None
        assert seen.answers >= ANSWERS_MIN
        at_peer_s = max(0.0, seen.first_token_s - (seen.rtt_s or 0.0))
        assert claim.first_token_s <= AGREES_FACTOR * at_peer_s + 0.05 * AGREES_FACTOR


def claims_of(told: dict[int, SelfSummary]) -> Any:
    """Claims.hint over such a table of claims."""
    by_peer = {peer(number): summary for number, summary in told.items()}
    return lambda who, seen, _now: hint(by_peer[who], seen) if who in by_peer else 0.0


def order(seed: int, seen: Observations, told: dict[int, SelfSummary], peers: int) -> list[Candidate]:
    found = rank(NEED, [offer(n) for n in range(peers)], seen, 1.0, random.Random(seed), claims_of(told))
    assert isinstance(found, tuple)
    return list(found)


def served(seen: Observations, number: int, first_token_s: float, times: int = ANSWERS_MIN) -> None:
    """The peer answered us so often, each time alike."""
    for _ in range(times):
        seen.started(peer(number), 0.0)
        seen.first_token(peer(number), first_token_s)
        seen.finished(peer(number), 11, 0.2, 0.0)
        seen.ended(peer(number), 0.0)


@settings(deadline=None)
@given(st.integers(), st.lists(summaries, min_size=6, max_size=6), st.integers(0, ANSWERS_MIN - 1))
def test_a_claim_alone_changes_nothing(seed: int, told: list[SelfSummary], times: int) -> None:
    """Of peers that we have too little of our own on, none is asked sooner or later for what it says."""
    seen = Observations()
    for number in range(3):
        served(seen, number, 0.2, times)
    plain = order(seed, seen, {}, 6)
    assert order(seed, seen, dict(enumerate(told)), 6) == plain


@settings(max_examples=200, deadline=None)
@given(st.integers(), st.lists(summaries, min_size=5, max_size=5), st.permutations(range(5)))
def test_a_claim_never_lifts_a_peer_above_one_that_observation_rates_better(
    seed: int, told: list[SelfSummary], places: list[int]
) -> None:
    seen = Observations()
    for number, place in enumerate(places):
        served(seen, number, 0.2 * 2.0**place)
    costs = sorted(each.cost_s for each in order(seed, seen, {}, 5))
    assert all(more > less * (1 + ALIKE_SHARE) for less, more in pairwise(costs))
    plain = [each.peer for each in order(seed, seen, {}, 5)]
    assert [each.peer for each in order(seed, seen, dict(enumerate(told)), 5)] == plain


def firsts(told: dict[int, SelfSummary], first_token_s: tuple[float, float] = (0.2, 0.2)) -> int:
    """Of 400 draws, in how many peer 1 of two is asked first."""
    seen = Observations()
    for number, each_s in enumerate(first_token_s):
        served(seen, number, each_s)
    return sum(order(seed, seen, told, 2)[0].peer == peer(1) for seed in range(400))


def test_between_equals_the_one_that_says_it_is_idle_goes_first() -> None:
    plain = firsts({})
    assert firsts({0: BUSY, 1: IDLE}) > 370 > 230 > plain > 170
    assert firsts({0: IDLE, 1: BUSY}) < 30
    assert firsts({1: IDLE}) == firsts({0: BUSY}) == plain, "silence is no fault, and talk no merit"
    assert firsts({0: IDLE, 1: IDLE}) == plain


def test_between_equals_a_claim_that_is_not_borne_out_is_not_heard() -> None:
    liar = replace(IDLE, first_token_s=0.0)
    assert firsts({0: BUSY, 1: liar}) == firsts({})


def test_a_better_one_stays_first_whatever_is_claimed() -> None:
    assert firsts({0: BUSY, 1: replace(IDLE, first_token_s=0.4)}, (0.2, 0.4)) == firsts({}, (0.2, 0.4)) < 30
