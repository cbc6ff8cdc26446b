"""gossip/directory.py: newest wins, nothing old or forged is believed, nothing grows, nothing outlives its time."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

import gossip.directory
from crypto.canonical import encode_struct
from crypto.envelope import seal
from crypto.identity import Identity
from gossip.directory import (
    ENDS_PER_OFFER_MAX,
    EVIDENCE_MAX,
    FLOOR_KEEP_S,
    HANDED_LIFE_MS_MIN,
    OFFSETS_MAX,
    SKEW_MS,
    Directory,
    Outcome,
    Own,
    Receipt,
)
from gossip.messages import (
    ADVERT_DOMAIN,
    ADVERT_LIFE_MS,
    ADVERT_LIFE_MS_MAX,
    GOODBYE,
    Advert,
    Capacity,
    ModelKind,
    ModelOffer,
    seal_advert,
)

IDENTITIES = tuple(Identity.make() for _ in range(6))
US = IDENTITIES[0]
ALICE, BOB, CAROL = IDENTITIES[1:4]
NOW_MS = 1_800_000_000_000
ADVERT_LIFE_S = ADVERT_LIFE_MS / 1000
INSTANCE = "aa" * 8
TALE = ModelOffer(name="tale", revision="r1", kind=ModelKind.CAUSAL, context_tokens=512, dtype="bf16", embeds=True)
OTHER = ModelOffer(name="other", revision="r1", kind=ModelKind.ENCODER, context_tokens=128, dtype="fp32")


def directory(**changes: object) -> Directory:
    settings: dict[str, object] = {
        "own": Own(peer=US.peer_id, instance=INSTANCE, first_sequence=1000),
        "network": "main",
    }
    return Directory(**{**settings, **changes})  # type: ignore[arg-type]


def advert(slots: int = 4, instance: str = INSTANCE, models: tuple[ModelOffer, ...] = (TALE,)) -> Advert:
    capacity = Capacity(models=models, slots_total=slots, slots_free=slots, accepting=True)
    return Advert(instance=instance, started_ms=NOW_MS, agent="test", capacity=capacity)


def said(who: Identity, sequence: int, what: Advert | None = None, time_ms: int = NOW_MS) -> bytes:
    return seal_advert(who, what or advert(), network="main", sequence=sequence, time_ms=time_ms)


def heard(into: Directory, raw: bytes, *, by: Identity | None = None, now: float = 0.0) -> Outcome:
    """Receive at `now`, with a wall clock that agrees."""
    publisher = by.peer_id if by else None
    return into.receive(raw, publisher=publisher, now=now, now_ms=NOW_MS + int(now * 1000)).outcome


def test_an_offer_lives_until_its_time_is_over() -> None:
    book = directory()
    assert heard(book, said(ALICE, 1), by=ALICE) is Outcome.ACCEPTED
    (offer,) = book.offers(0.0)
    assert (offer.peer, offer.capacity.slots_total) == (ALICE.peer_id, 4)
    assert book.deadline(0.0) == ADVERT_LIFE_S
    assert book.offers(ADVERT_LIFE_S - 0.01)
    assert book.offers(ADVERT_LIFE_S) == ()  # even before tick
    assert book.models(ADVERT_LIFE_S) == ()
    assert book.offer_of(ALICE.peer_id, ADVERT_LIFE_S) is None
    assert book.offer_of(ALICE.peer_id, 0.0) == offer
    assert book.tick(ADVERT_LIFE_S) == (ALICE.peer_id,)
    assert book.tick(ADVERT_LIFE_S) == ()


def test_a_shorter_life_is_honoured_and_a_longer_one_is_not() -> None:
    book = directory()
    for who, life_ms in ((ALICE, 5_000), (BOB, 86_400_000)):
        body = said(who, 1)
        raw = seal_with_life(who, life_ms)
        assert body != raw
        assert heard(book, raw, by=who) is Outcome.ACCEPTED
    assert [offer.peer for offer in book.offers(5.0)] == [BOB.peer_id]
    assert book.offers(ADVERT_LIFE_MS_MAX / 1000 - 0.01)
    assert book.offers(ADVERT_LIFE_MS_MAX / 1000) == ()


def seal_with_life(who: Identity, life_ms: int) -> bytes:
    return seal(
        who,
        domain=ADVERT_DOMAIN,
        network="main",
        sequence=1,
        time_ms=NOW_MS,
        expires_ms=NOW_MS + life_ms,
        body=encode_struct(advert()),
    )


def test_the_newest_wins_in_any_order() -> None:
    words = [said(ALICE, n, advert(slots=n)) for n in (1, 2, 3)]
    for order in itertools.permutations(words):
        book = directory()
        for raw in order:
            heard(book, raw)
        assert book.offers(0.0)[0].capacity.slots_total == 3


def test_a_copy_neither_counts_nor_prolongs() -> None:
    book = directory()
    raw = said(ALICE, 1)
    heard(book, raw)
    assert heard(book, raw, now=20.0) is Outcome.DUPLICATE
    assert book.offers(ADVERT_LIFE_S) == ()


def test_a_goodbye_ends_the_offer_and_keeps_the_sequence() -> None:
    book = directory()
    heard(book, said(ALICE, 1))
    assert heard(book, said(ALICE, 2, replace(advert(), capacity=GOODBYE))) is Outcome.ACCEPTED
    assert book.offers(0.0) == ()
    assert book.offer_of(ALICE.peer_id, 0.0) is None
    assert heard(book, said(ALICE, 1)) is Outcome.STALE
    assert book.offers(0.0) == ()


def test_two_statements_under_one_sequence_are_kept_as_evidence() -> None:
    book = directory()
    first, second = said(ALICE, 1, advert(slots=4)), said(ALICE, 1, advert(slots=5))
    heard(book, first)
    assert heard(book, second) is Outcome.EQUIVOCATION
    (evidence,) = book.evidence()
    assert (evidence.peer, evidence.first, evidence.second) == (ALICE.peer_id, first, second)
    assert book.offers(0.0)[0].capacity.slots_total == 4  # the caller decides what a liar deserves


def test_a_copied_identity_is_no_equivocation() -> None:
    book = directory()
    heard(book, said(ALICE, 1))
    assert heard(book, said(ALICE, 1, advert(instance="bb" * 8))) is Outcome.TWO_INSTANCES


def test_evidence_is_bounded() -> None:
    book = directory()
    heard(book, said(ALICE, 1))
    for slots in range(EVIDENCE_MAX + 10):
        heard(book, said(ALICE, 1, advert(slots=100 + slots)))
    assert len(book.evidence()) == EVIDENCE_MAX


def test_replays_after_a_restart_are_refused() -> None:
    book = directory()
    recorded = [said(who, n) for who in (ALICE, BOB) for n in range(1, 51)]
    for raw in recorded:
        heard(book, raw)
    restarted = directory()
    restarted.restore(book.floors(), now=0.0)
    assert {heard(restarted, raw) for raw in recorded} == {Outcome.STALE}
    assert restarted.offers(0.0) == ()
    assert heard(restarted, said(ALICE, 51)) is Outcome.ACCEPTED


def test_a_floor_outlives_every_replay_of_its_advert() -> None:
    """When the sequence is forgotten, the advert itself is refused by its time, also at the worst legal clocks."""
    book = directory()
    raw = said(ALICE, 1, time_ms=NOW_MS + SKEW_MS)  # a clock as far ahead as is allowed
    heard(book, raw)
    now = FLOOR_KEEP_S
    book.tick(now)
    assert book.floors() == {}
    assert heard(book, raw, now=now) is Outcome.EXPIRED


@pytest.mark.parametrize(
    ("time_ms", "outcome"),
    [
        (NOW_MS + SKEW_MS, Outcome.ACCEPTED),
        (NOW_MS + SKEW_MS + 1, Outcome.FUTURE),
        (NOW_MS + 10 * 86_400_000, Outcome.FUTURE),
        (NOW_MS - SKEW_MS - ADVERT_LIFE_MS, Outcome.ACCEPTED),
        (NOW_MS - SKEW_MS - ADVERT_LIFE_MS - 1, Outcome.EXPIRED),
        (NOW_MS - 10 * 86_400_000, Outcome.EXPIRED),
        (0, Outcome.EXPIRED),
    ],
)
def test_clocks_may_differ_a_little(time_ms: int, outcome: Outcome) -> None:
    book = directory()
    raw = said(ALICE, 1, time_ms=time_ms)
    receipt = book.receive(raw, publisher=None, now=0.0, now_ms=NOW_MS)
    assert receipt.outcome is outcome
    if outcome is not Outcome.ACCEPTED:
        assert ALICE.peer_id in receipt.detail
        assert "clock" in receipt.detail


def test_our_own_clock_can_be_judged_by_the_others() -> None:
    book = directory()
    for number, who in enumerate(IDENTITIES[1:4]):
        heard(book, said(who, 1, time_ms=NOW_MS + 40_000 + number), by=who)
    assert book.statistics(0.0).clock_offset_ms == 40_001


def test_also_when_it_is_so_wrong_that_all_are_refused() -> None:
    book = directory()
    for who in IDENTITIES[1:4]:
        assert heard(book, said(who, 1, time_ms=NOW_MS + 600_000), by=who) is Outcome.FUTURE
    assert book.statistics(0.0).clock_offset_ms == 600_000


def test_a_copy_says_nothing_of_its_senders_clock() -> None:
    book = directory()
    assert heard(book, said(ALICE, 1, time_ms=NOW_MS - 20_000)) is Outcome.ACCEPTED
    assert heard(book, said(BOB, 1, time_ms=NOW_MS + 600_000)) is Outcome.FUTURE
    assert book.statistics(0.0).clock_offset_ms is None


def test_clocks_are_remembered_of_few() -> None:
    book = directory()
    for _ in range(OFFSETS_MAX + 5):
        who = Identity.make()
        heard(book, said(who, 1, time_ms=NOW_MS + 600_000), by=who)
    assert len(book._offsets) == OFFSETS_MAX


def test_forged_and_broken_bytes_change_nothing() -> None:
    book = directory()
    raw = said(ALICE, 1)
    broken = bytearray(raw)
    broken[-1] ^= 1
    assert heard(book, bytes(broken)) is Outcome.BAD_SIGNATURE
    assert heard(book, raw, by=BOB) is Outcome.WRONG_SENDER
    assert heard(book, b"") is Outcome.MALFORMED
    assert heard(book, b"x" * 5000) is Outcome.MALFORMED
    foreign = seal_advert(ALICE, advert(), network="elsewhere", sequence=1, time_ms=NOW_MS)
    assert heard(book, foreign) is Outcome.WRONG_NETWORK
    assert book.floors() == {}
    assert sum(book.statistics(0.0).outcomes.values()) == 5


def test_an_unknown_field_is_the_senders_fault() -> None:
    book = directory()
    raw = seal(
        ALICE, domain=ADVERT_DOMAIN, network="main", sequence=1, time_ms=NOW_MS, expires_ms=NOW_MS + 9, body=b"\x80"
    )
    receipt = book.receive(raw, publisher=ALICE.peer_id, now=0.0, now_ms=NOW_MS)
    assert receipt == Receipt(outcome=Outcome.MALFORMED, peer=ALICE.peer_id, detail=receipt.detail)


def test_our_own_words_are_told_from_a_copy_of_us() -> None:
    book = directory()
    assert heard(book, said(US, 1001)) is Outcome.OWN
    assert heard(book, said(US, 999, advert(instance="cc" * 8))) is Outcome.OWN  # from before our restart
    receipt = book.receive(said(US, 1001, advert(instance="cc" * 8)), publisher=None, now=0.0, now_ms=NOW_MS)
    assert receipt.outcome is Outcome.DUPLICATE_IDENTITY
    assert "stop one of the two" in receipt.detail
    assert book.offers(0.0) == ()


def test_a_full_directory_lets_the_oldest_unprotected_go() -> None:
    book = directory(adverts_max=3, protected=lambda peer: peer == ALICE.peer_id)
    for who in IDENTITIES[1:6]:
        assert heard(book, said(who, 1)) is Outcome.ACCEPTED
    assert set(book.floors()) == {ALICE.peer_id, IDENTITIES[4].peer_id, IDENTITIES[5].peer_id}
    assert book.statistics(0.0).evicted == 2


def test_a_directory_full_of_protected_peers_refuses() -> None:
    book = directory(adverts_max=2, protected=lambda _peer: True)
    outcomes = [heard(book, said(who, 1)) for who in IDENTITIES[1:4]]
    assert outcomes == [Outcome.ACCEPTED, Outcome.ACCEPTED, Outcome.FULL]


def test_what_is_over_makes_room_first() -> None:
    book = directory(adverts_max=2)
    heard(book, said(ALICE, 1))
    heard(book, said(BOB, 1, time_ms=NOW_MS + 60_000), now=60.0)
    late = FLOOR_KEEP_S + 1
    carol = said(CAROL, 1, time_ms=NOW_MS + int(late * 1000))
    assert heard(book, carol, now=late) is Outcome.ACCEPTED
    assert set(book.floors()) == {BOB.peer_id, CAROL.peer_id}
    assert book.statistics(late).evicted == 0


def test_offers_and_models_by_name_and_kind() -> None:
    book = directory()
    heard(book, said(ALICE, 1, advert(models=(TALE,))))
    heard(book, said(BOB, 1, advert(models=(replace(TALE, context_tokens=1024), OTHER, OTHER))))
    heard(book, said(CAROL, 1, advert(models=(replace(TALE, revision="r2"),))))
    assert len(book.offers(0.0, model="tale")) == 3
    assert [offer.peer for offer in book.offers(0.0, model="other")] == [BOB.peer_id]
    assert len(book.offers(0.0, kind=ModelKind.ENCODER)) == 3  # two by embeds
    assert book.offers(0.0, model="other", kind=ModelKind.CAUSAL) == ()
    rows = {(row.name, row.revision): row for row in book.models(0.0)}
    assert rows["tale", "r1"].peers == 2
    assert rows["tale", "r1"].context_tokens == 1024
    assert rows["tale", "r2"].peers == rows["other", "r1"].peers == 1


def test_a_forgotten_peer_has_no_offer() -> None:
    book = directory()
    heard(book, said(ALICE, 1))
    book.forget(ALICE.peer_id)
    book.forget(BOB.peer_id)
    assert book.offers(0.0) == ()
    assert heard(book, said(ALICE, 1)) is Outcome.DUPLICATE


def test_recent_adverts_can_be_handed_on() -> None:
    book, other = directory(), directory(own=Own(peer=CAROL.peer_id, instance=INSTANCE, first_sequence=1000))
    heard(book, said(ALICE, 1))
    heard(book, said(BOB, 1), now=1.0)
    assert book.recent(1.0, 1) == [said(BOB, 1)]
    assert [heard(other, raw) for raw in book.recent(1.0, 9)] == [Outcome.ACCEPTED] * 2


# --- histories ---

SPEAK = st.tuples(st.just("speak"), st.integers(1, 3), st.integers(1, 6), st.sampled_from((0, 4, 5)))
WAIT = st.tuples(st.just("wait"), st.floats(0.0, 40.0), st.just(0), st.just(0))
REPLAY = st.tuples(st.just("replay"), st.integers(0, 200), st.just(0), st.just(0))
TICK = st.tuples(st.just("tick"), st.just(0), st.just(0), st.just(0))
RESTART = st.tuples(st.just("restart"), st.just(0), st.just(0), st.just(0))
HISTORIES = st.lists(st.one_of(SPEAK, SPEAK, WAIT, REPLAY, REPLAY, TICK, RESTART), max_size=25)


class Listener:
    """A directory under a history, with the invariants that must hold after each event."""

    def __init__(self, adverts_max: int) -> None:
        self.adverts_max = adverts_max
        self.book = directory(adverts_max=adverts_max)
        self.now = 0.0
        self.recorded: list[bytes] = []
        self.accepted: list[bytes] = []

    def live(self, kind: str, first: float, sequence: int, slots: int) -> None:
        match kind:
            case "wait":
                self.now += first
            case "tick":
                self.book.tick(self.now)
            case "restart":
                floors = self.book.floors()
                self.book = directory(adverts_max=self.adverts_max)
                self.book.restore(floors, self.now)
            case "speak":
                what = advert(slots=slots) if slots else replace(advert(), capacity=GOODBYE)
                raw = said(IDENTITIES[int(first)], sequence, what, NOW_MS + int(self.now * 1000))
                self.recorded.append(raw)
                self.hear(raw)
            case "replay" if self.recorded:
                self.hear(self.recorded[int(first) % len(self.recorded)])

    def hear(self, raw: bytes) -> None:
        before = self.book.floors()
        if heard(self.book, raw, now=self.now) is Outcome.ACCEPTED:
            self.accepted.append(raw)
        after = self.book.floors()
        assert all(after[peer] >= before[peer] for peer in after if peer in before), "a sequence went back"

    def check(self) -> None:
        offers = self.book.offers(self.now)
        assert len(offers) <= len(self.book.floors()) <= self.adverts_max
        for offer in offers:
            assert offer.received_s <= self.now < offer.expires_s <= offer.received_s + ADVERT_LIFE_S
            assert not offer.advert.is_goodbye
            assert offer.sequence == self.book.floors()[offer.peer]
        assert sum(row.peers for row in self.book.models(self.now)) == len(offers)
        assert self.book.deadline(self.now) > self.now


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(HISTORIES)
def test_nothing_is_believed_twice(history: list[tuple[str, float, int, int]]) -> None:
    listener = Listener(adverts_max=4)  # room for all three speakers
    for event in history:
        listener.live(*event)
        listener.check()
    assert len(listener.accepted) == len(set(listener.accepted)), "a replay passed as news"


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(HISTORIES)
def test_a_crowded_directory_keeps_its_bounds(history: list[tuple[str, float, int, int]]) -> None:
    listener = Listener(adverts_max=2)
    for event in history:
        listener.live(*event)
        listener.check()


# --- a network too large to know ---


def test_what_a_third_peer_hands_on_lives_for_what_is_left_of_it() -> None:
    book = directory()
    raw = said(ALICE, 1, time_ms=NOW_MS - 12_000)
    assert heard(book, raw) is Outcome.ACCEPTED
    (offer,) = book.offers(0.0)
    assert (offer.received_s, offer.expires_s) == (-12.0, 18.0)
    # a sender whose clock is behind ours is believed for a while all the same
    assert heard(book, said(BOB, 1, time_ms=NOW_MS - 55_000)) is Outcome.ACCEPTED
    assert book.offer_of(BOB.peer_id, HANDED_LIFE_MS_MIN / 1000 - 0.1) is not None
    assert book.offer_of(BOB.peer_id, HANDED_LIFE_MS_MIN / 1000) is None
    # what the publisher says itself is new, whatever its clock
    assert heard(book, said(CAROL, 1, time_ms=NOW_MS - 55_000), by=CAROL) is Outcome.ACCEPTED
    assert book.offer_of(CAROL.peer_id, ADVERT_LIFE_S - 0.1) is not None


def test_known_bytes_are_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    book, raw = directory(), said(ALICE, 1)
    assert heard(book, raw, by=ALICE) is Outcome.ACCEPTED
    checks: list[bytes] = []
    monkeypatch.setattr(gossip.directory, "open_envelope", lambda raw, **_: checks.append(raw))
    assert heard(book, raw, by=ALICE) is Outcome.DUPLICATE
    assert heard(book, raw) is Outcome.DUPLICATE
    assert checks == []


def test_known_bytes_from_a_publisher_that_did_not_sign_them_are_its_fault() -> None:
    book, raw = directory(), said(ALICE, 1)
    assert heard(book, raw, by=ALICE) is Outcome.ACCEPTED
    assert heard(book, raw, by=BOB) is Outcome.WRONG_SENDER


def test_more_offers_than_there_is_room_for_are_let_go() -> None:
    close = IDENTITIES[1].peer_id
    book = directory(offers_max=8, protected=lambda peer: peer == close)
    for number, who in enumerate([IDENTITIES[1], *(Identity.make() for _ in range(40))]):
        assert heard(book, said(who, 1), by=who) is Outcome.ACCEPTED
        assert len(book.offers(0.0)) <= 9, number
    assert book.offer_of(close, 0.0) is not None
    assert book.statistics(0.0).evicted >= 31
    assert len(book.floors()) == 41  # what they said is not forgotten with the offer


def test_who_speaks_often_is_remembered_once() -> None:
    book = directory(offers_max=4)
    for number in range(1, 200):
        assert heard(book, said(ALICE, number), by=ALICE, now=number / 100) is Outcome.ACCEPTED
        assert len(book._ends) <= 4 * ENDS_PER_OFFER_MAX
        assert len(book._touched) == 1
    assert book.tick(1.99 + ADVERT_LIFE_S - 0.001) == ()
    assert book.tick(1.99 + ADVERT_LIFE_S) == (ALICE.peer_id,)


def test_a_newer_offer_outlives_the_end_of_the_older() -> None:
    book = directory()
    assert heard(book, said(ALICE, 1), by=ALICE) is Outcome.ACCEPTED
    assert heard(book, said(ALICE, 2), by=ALICE, now=20.0) is Outcome.ACCEPTED
    assert book.tick(ADVERT_LIFE_S) == ()
    assert book.offer_of(ALICE.peer_id, ADVERT_LIFE_S) is not None
    assert book.tick(20.0 + ADVERT_LIFE_S) == (ALICE.peer_id,)


def test_a_peer_heard_again_is_remembered_from_then_on() -> None:
    book = directory()
    for who in (ALICE, BOB):
        heard(book, said(who, 1), by=who)
    heard(book, said(ALICE, 2, time_ms=NOW_MS + 100_000), by=ALICE, now=100.0)
    book.tick(FLOOR_KEEP_S)
    assert book.floors() == {ALICE.peer_id: 2}
    book.tick(100.0 + FLOOR_KEEP_S)
    assert book.floors() == {}
