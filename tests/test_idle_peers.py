"""Connections made for requests go when nobody needs them, so that who is asked by many does not run out of places."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from crypto.identity import Identity, PeerId
from p2p.address import parse_address
from p2p.book import Source
from p2p.hello import Hello
from p2p.loopback import LoopbackNetwork
from p2p.loopback_wire import Faults
from p2p.roster import IDLE_S, Roster
from tests.peering_swarm import Node, Swarm, until

TARGET = 4


def roster_of(company: int, lent: int, *, target: int = TARGET) -> Roster:
    """So many peers for company, and so many dialled for requests, the first of these used last."""
    roster = Roster(random.Random(0), target=target, outbound_min=TARGET)
    for number in range(company + lent):
        peer = PeerId(f"p{number}")
        roster.connected(peer, 0.0, address(number))
        roster.greet(peer, Hello(protocol=1, network="main", agent="t", instance="0" * 16, addresses=[]), 0.0)
        if number >= company:
            roster.used(peer, float(company + lent - number), dialled=True)
    return roster


def address(number: int):  # type: ignore[no-untyped-def]
    return parse_address(f"/ip4/20.0.{number}.1/tcp/1/p2p/{Identity(bytes([number] * 32)).peer_id}")


def gone(roster: Roster, now: float, busy: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    roster.is_busy = lambda peer: peer in busy
    errands = roster.idle(now)
    assert all(errand.blameless for errand in errands)
    return [errand.peer for errand in errands]


def test_who_was_not_needed_longest_goes_until_there_are_few_enough() -> None:
    assert gone(roster_of(3, 4), IDLE_S + 10) == ["p6", "p5", "p4"]


def test_company_is_kept_and_so_is_what_fits() -> None:
    assert gone(roster_of(9, 0), 1e6) == []
    assert gone(roster_of(2, 2), 1e6) == []
    assert gone(roster_of(0, 3), 1e6) == []


def test_who_was_dialled_for_a_request_does_not_fill_the_places_of_company() -> None:
    """Else whoever asked once for what one peer serves stays connected to it for ever."""
    roster = roster_of(3, 4, target=16)
    assert gone(roster, IDLE_S + 10) == ["p6", "p5", "p4"]
    for peer in ("p6", "p5", "p4"):
        roster.lost(PeerId(peer))
    assert roster.wanted() == 12
    assert gone(roster, 1e6) == []


def test_what_was_needed_lately_is_kept() -> None:
    assert gone(roster_of(4, 3), IDLE_S + 1.0) == ["p6"]
    assert gone(roster_of(4, 3), IDLE_S) == []


def test_what_is_busy_is_kept() -> None:
    assert gone(roster_of(4, 3), 1e6, {"p6", "p4"}) == ["p5"]


def test_a_peer_that_was_company_before_it_was_needed_is_kept() -> None:
    roster = roster_of(5, 0)
    roster.used(PeerId("p0"), 1.0)
    assert gone(roster, 1e6) == []


def test_nobody_is_let_go_twice() -> None:
    roster = roster_of(4, 2)
    assert len(gone(roster, 1e6)) == 2
    assert gone(roster, 1e6) == []


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    network = LoopbackNetwork(random.Random(7), Faults(stream_delay_s=(0.001, 0.01)))
    async with trio.open_nursery() as nursery:
        yield Swarm(network, nursery)
        nursery.cancel_scope.cancel()


async def connected(door: Node, servers: list[Node]) -> None:
    for server in servers:
        door.book.add(parse_address(server.address), Source.ADVERT, trio.current_time())
        await door.peering.connect(server.id)


async def test_a_node_lets_go_and_can_come_back(autojump_clock: MockClock, swarm: Swarm) -> None:
    servers = [await swarm.start(peers_target=0, outbound_min=0) for _ in range(3)]
    door = await swarm.start(peers_target=1, outbound_min=1)
    await connected(door, servers)
    assert len(door.peering.peers() | door.transport.peers()) == 3
    await until(lambda: len(door.transport.peers()) == 1, 2 * IDLE_S)
    assert trio.current_time() >= IDLE_S
    assert door.status.drops["let_go"] == 2
    again = door.book.due(trio.current_time(), exclude=frozenset(), groups=Counter(), alone=False, limit=9)
    assert {each.peer for each in again} == {server.id for server in servers}  # nothing is held against them
    for server in servers:
        await door.peering.connect(server.id)
    assert len(door.transport.peers()) == 3


async def test_a_node_keeps_what_works(autojump_clock: MockClock, swarm: Swarm) -> None:
    servers = [await swarm.start(peers_target=0, outbound_min=0) for _ in range(3)]
    door = await swarm.start(peers_target=1, outbound_min=1)
    door.peering.keep_while(lambda peer: peer == servers[0].id)
    await connected(door, servers)
    await trio.sleep(3 * IDLE_S)
    assert door.transport.peers() == {servers[0].id}
