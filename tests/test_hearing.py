"""gossip/hearing.py: who is heard, what is passed on, who is cut off."""

from __future__ import annotations

from crypto.identity import Identity, PeerId
from gossip.directory import Directory, Own
from gossip.hearing import OVER_QUOTA_BLAMES, Hearing
from gossip.messages import Advert, Capacity, seal_advert
from gossip.pace import PEER_BURST
from gossip.standing import Fault, Standing, Verdict

NOW_MS = 1_800_000_000_000
IDENTITY, OTHER = Identity(b"1" * 32), Identity(b"2" * 32)


class Ear:
    """A Hearing, and what it wants done."""

    def __init__(self) -> None:
        own = Identity(b"0" * 32).peer_id
        self.standing = Standing()
        self.directory = Directory(own=Own(peer=own, instance="0" * 32, first_sequence=1), network="main")
        self.verdicts: list[tuple[PeerId, Verdict]] = []
        self.hearing = Hearing(
            self.directory,
            self.standing,
            on_verdict=lambda peer, verdict, _reason: self.verdicts.append((peer, verdict)),
            on_duplicate=lambda _what: None,
        )

    def heard(self, raw: bytes, publisher: PeerId = IDENTITY.peer_id, now: float = 0.0) -> bool:
        return self.hearing.heard(publisher, raw, now, NOW_MS + int(now * 1000))


def advert(sequence: int, *, slots: int = 1, identity: Identity = IDENTITY) -> bytes:
    what = Advert(instance="ab" * 16, started_ms=1, agent="test", capacity=Capacity(slots_total=slots, accepting=True))
    return seal_advert(identity, what, network="main", sequence=sequence, time_ms=NOW_MS)


def test_what_is_new_is_passed_on_once() -> None:
    ear = Ear()
    assert ear.heard(advert(5))
    assert not ear.heard(advert(5)), "a duplicate"
    assert not ear.heard(advert(4)), "an old one"
    assert ear.verdicts == []


def test_a_contradiction_bans_and_is_passed_on_once_for_all_to_see() -> None:
    ear = Ear()
    assert ear.heard(advert(5, slots=1))
    assert ear.heard(advert(5, slots=2)), "the proof goes on"
    assert ear.verdicts == [(IDENTITY.peer_id, Verdict.BANNED)]
    assert ear.directory.offer_of(IDENTITY.peer_id, 0.0) is None
    assert not ear.heard(advert(5, slots=3)), "once is enough"
    assert ear.hearing.drops["banned"] == 1


def test_a_contradiction_told_by_another_is_the_speakers_fault() -> None:
    ear = Ear()
    ear.heard(advert(5))
    assert not ear.heard(advert(6), publisher=OTHER.peer_id)
    assert ear.verdicts == [(OTHER.peer_id, Verdict.BANNED)]


def test_who_speaks_too_much_is_cut_off_within_seconds() -> None:
    ear, number = Ear(), 0
    while not ear.verdicts:
        number += 1
        ear.heard(advert(number), now=number / 50)
        assert number < 150, "three seconds of fifty messages each"
    assert number > PEER_BURST
    assert ear.verdicts[0] == (IDENTITY.peer_id, Verdict.DISCONNECT)
    assert ear.hearing.drops["over_quota"] > OVER_QUOTA_BLAMES


def test_many_faults_at_once_make_one_verdict() -> None:
    ear = Ear()
    ear.hearing.blame(IDENTITY.peer_id, Fault.OVER_QUOTA, "too much", 0.0, times=30)
    assert ear.verdicts == [(IDENTITY.peer_id, Verdict.DISCONNECT)]
    assert ear.standing.score(IDENTITY.peer_id, 0.0) == 30 * Fault.OVER_QUOTA.value


def test_in_a_crowd_only_a_share_is_passed_on_and_contradictions_always() -> None:
    ear = Ear()
    ear.hearing.flow.share = 0.0
    assert not ear.heard(advert(5, slots=1))
    assert ear.hearing.drops["not_passed_on_in_a_crowd"] == 1
    assert ear.directory.offer_of(IDENTITY.peer_id, 0.0) is not None
    assert ear.heard(advert(5, slots=2)), "the proof goes on"
