"""gossip/round_door.py: what peers gossip of a run, ours or another, and what becomes of those who gossip otherwise."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from crypto.envelope import SKEW_MS
from crypto.identity import Identity, PeerId
from gossip.round_door import (
    SAID_BURST,
    SAID_MS_MAX,
    SEEN_MAX,
    RoundDoor,
)
from gossip.rounds import Header, Statement, round_topic, sign_statement
from gossip.standing import Fault
from tests.door_world import BASE, NETWORK, OTHER_RUN, RUN, START_MS, statement, town

# ---- gossip ----


async def test_what_is_gossiped_comes_once_to_the_run_and_goes_on_once(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, (alice, _) = await place.member(), await place.join()
        said = statement(alice)
        assert member.door._heard(alice.peer_id, said.raw)
        assert not member.door._heard(alice.peer_id, said.raw)
        assert member.run.told == [said]
        assert member.door.drops == {"doubled": 1}
        assert member.blames == []


async def test_who_gossips_what_another_signed_is_blamed(autojump_clock: MockClock) -> None:
    async with town() as place:
        member = await place.member()
        alice, mallory = Identity.make(), Identity.make()
        assert not member.door._heard(mallory.peer_id, statement(alice).raw)
        assert [(peer, fault) for peer, fault, _ in member.blames] == [(mallory.peer_id, Fault.MALFORMED)]
        assert member.run.told == []
        assert member.door._heard(alice.peer_id, statement(alice).raw), "it was not Alice who is to be doubted"


async def test_rubbish_is_blamed_on_who_gossips_it(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, alice = await place.member(), Identity.make()
        good = statement(alice).raw
        foreign = sign_statement(alice, statement(alice).body, network="other", sequence=1, time_ms=START_MS).raw
        for raw in (b"", b"rubbish", good[:-1], good[:-1] + bytes([good[-1] ^ 1]), foreign):
            assert not member.door._heard(alice.peer_id, raw)
        assert [fault for _, fault, _ in member.blames] == [Fault.MALFORMED] * 5
        assert member.door.drops == {"malformed": 5}
        assert member.run.told == []


async def test_the_quota_of_gossip_comes_before_any_signature(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, alice, bob = await place.member(), Identity.make(), Identity.make()
        forged = statement(alice).raw[:-8]
        for number in range(int(SAID_BURST)):
            assert not member.door._heard(alice.peer_id, forged + number.to_bytes(8, "big"))
        drops = member.door.drops.copy()
        assert not member.door._heard(alice.peer_id, statement(alice).raw)
        assert not member.door._heard(alice.peer_id, forged + b"over one")
        assert member.door.drops - drops == {"over_quota": 2}
        assert [fault for _, fault, _ in member.blames[-2:]] == [Fault.OVER_QUOTA] * 2
        assert member.door._heard(bob.peer_id, statement(bob).raw)
        await trio.sleep(1)
        assert member.door._heard(alice.peer_id, statement(alice).raw), "it was not looked at, so it is not doubled"


@pytest.mark.slow
async def test_old_words_of_a_member_that_somebody_replays_cost_it_nothing(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, alice = await place.member(), Identity.make()
        for number in range(int(SAID_BURST) + 50):
            old = statement(alice, view=number, time_ms=START_MS - SAID_MS_MAX - 1)
            assert not member.door._heard(alice.peer_id, old.raw)
        assert member.blames == []
        assert member.door._heard(alice.peer_id, statement(alice).raw)


async def test_a_clock_that_is_wrong_is_nobodys_fault(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, alice = await place.member(), Identity.make()
        for time_ms, is_heard in (
            (START_MS + SKEW_MS, True),
            (START_MS + SKEW_MS + 1, False),
            (START_MS - SAID_MS_MAX, True),
            (START_MS - SAID_MS_MAX - 1, False),
        ):
            assert member.door._heard(alice.peer_id, statement(alice, time_ms=time_ms).raw) is is_heard
        assert member.blames == []
        assert member.door.drops == {"of_another_time": 2}


async def test_other_runs_are_forwarded_and_not_kept(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, alice = await place.member(), Identity.make()
        assert member.door._heard(alice.peer_id, statement(alice, run=OTHER_RUN).raw)
        member.door.run = None
        assert member.door._heard(alice.peer_id, statement(alice).raw)
        assert member.run.told == []


async def test_who_is_not_admitted_is_not_heard_in_our_run(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, alice = await place.member(), Identity.make()
        member.run.refuses = frozenset([alice.peer_id])
        assert not member.door._heard(alice.peer_id, statement(alice).raw)
        assert member.door.drops == {"not_a_member": 1}
        assert member.run.told == []
        assert member.door._heard(alice.peer_id, statement(alice, run=OTHER_RUN).raw)


async def test_what_was_seen_is_remembered_up_to_a_bound(autojump_clock: MockClock, monkeypatch: Any) -> None:
    monkeypatch.setattr("gossip.round_door.SEEN_MAX", 3)
    assert SEEN_MAX > 3
    async with town() as place:
        member, alice = await place.member(), Identity.make()
        words = [statement(alice, view=view).raw for view in range(4)]
        assert all(member.door._heard(alice.peer_id, raw) for raw in words)
        assert len(member.door._seen) == 3
        assert not member.door._heard(alice.peer_id, words[3])
        assert member.door._heard(alice.peer_id, words[0])


async def test_a_node_that_does_not_train_hears_nothing(autojump_clock: MockClock) -> None:
    async with town() as place:
        member = await place.member()
        _, transport = await place.join()
        door = RoundDoor(transport, NETWORK, lambda *_: None, lambda: START_MS)
        assert round_topic(NETWORK) not in transport._receivers
        await door.open(member.run)
        receivers = dict(transport._receivers)
        transport._receivers.clear()
        await door.open(member.run)
        assert not transport._receivers, "it subscribed twice"
        transport._receivers.update(receivers)
        assert round_topic(NETWORK) in transport._receivers
        assert door.is_member(PeerId("voter"))
        assert not door.is_member(PeerId("somebody"))


async def test_what_is_told_reaches_who_listens_and_a_failure_is_counted(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, other = await place.member(), await place.member()
        await other.transport.dial(member.transport.addresses()[0])
        said = statement(other.identity)
        await other.door.tell(said)
        await trio.sleep(1)
        assert member.run.told == [said]
        huge = Statement(sender=other.id, body=Header(run=RUN, round=0, base=BASE), raw=bytes(1 << 20), id=RUN)
        await other.door.tell(huge)
        assert other.door.drops == {"publish_failed": 1}
