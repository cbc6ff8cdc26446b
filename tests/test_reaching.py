"""p2p/reaching.py over the loopback network: nodes that ask each other, answer each other, and look for relays."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
import trio
from trio.testing import MockClock

from crypto.identity import Identity, PeerId
from p2p.calls import Calls
from p2p.errors import RemoteError
from p2p.hello import RPC_PROTOCOL
from p2p.loopback import LoopbackNetwork, LoopbackTransport
from p2p.reach import ANSWER_EVERY_S
from p2p.reaching import Reaching
from tests.fake_outside import FakeOutside

PLACE_S = 600.0


@dataclass
class Node:
    transport: LoopbackTransport
    outside: FakeOutside
    reaching: Reaching
    calls: Calls
    told: list[float]

    @property
    def id(self) -> PeerId:
        return self.transport.peer_id


class Net:
    """Nodes at addresses of their own, on one network, all greeted."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.wire = LoopbackNetwork(random.Random(3))
        self.open: set[str] = set()
        self.relays: set[PeerId] = set()
        self._nursery = nursery

    async def start(self, ip: str, *, reachable: bool = True, relay: bool = False) -> Node:
        identity = Identity.make()
        if reachable:
            self.open.add(f"/ip4/{ip}/tcp/4001/p2p/{identity.peer_id}")
        if relay:
            self.relays.add(identity.peer_id)
        node: Node = await self._nursery.start(self._run, identity, ip)
        return node

    async def _run(self, identity: Identity, ip: str, *, task_status: trio.TaskStatus[Node]) -> None:
        async with self.wire.join(identity, ip=ip, port=4001) as transport, trio.open_nursery() as nursery:
            outside, told = FakeOutside(self.open, self.relays, place_s=PLACE_S), []

            async def tell(calls: Calls) -> None:
                await trio.lowlevel.checkpoint()
                told.append(trio.current_time())

            reaching = Reaching(transport, outside, transport.peers, tell)
            calls = Calls(transport, RPC_PROTOCOL, reaching.handlers())
            await nursery.start(calls.run)
            await nursery.start(reaching.run, calls)
            task_status.started(Node(transport, outside, reaching, calls, told))

    async def join(self, node: Node, *others: Node) -> None:
        for other in others:
            await node.transport.dial(other.transport.addresses()[0])
            node.outside.dialled[other.id] = other.transport.addresses()[0].rpartition("/p2p/")[0]


@pytest.fixture
async def net() -> AsyncIterator[Net]:
    async with trio.open_nursery() as nursery:
        yield Net(nursery)
        nursery.cancel_scope.cancel()


async def test_a_public_node_finds_out_and_takes_no_relay(net: Net, autojump_clock: MockClock) -> None:
    node, *others = [await net.start(f"11.0.{number}.1", relay=True) for number in range(1, 4)]
    await net.join(node, *others)
    await trio.sleep(30)
    status = node.reaching.status()
    assert status.verdict == "public"
    assert status.public_addresses == ("/ip4/11.0.1.1/tcp/4001",)
    assert (status.relays, node.outside.reserved) == ({}, [])
    assert node.outside.announced == ("/ip4/11.0.1.1/tcp/4001",)
    assert status.carried["offered"]


async def test_a_hidden_node_takes_two_places_tells_of_them_and_renews_them(
    net: Net, autojump_clock: MockClock
) -> None:
    node = await net.start("11.0.1.1", reachable=False)
    relays = [await net.start(f"11.0.{number}.1", relay=True) for number in range(2, 5)]
    await net.join(node, *relays)
    await trio.sleep(10)
    status = node.reaching.status()
    assert status.verdict == "relayed"
    assert "0 of 3 reached 11.0.1.1" in status.reason
    assert len(status.relays) == 2
    assert len(node.told) == 2, "the peers heard of both new addresses"
    assert not status.carried["offered"], "who is hidden relays for nobody"
    await trio.sleep(0.75 * PLACE_S)
    assert len(node.outside.reserved) == 4
    await trio.sleep(PLACE_S)
    assert len(node.reaching.status().relays) == 2
    assert len(node.told) == 2, "a renewed place is no news"


async def test_a_relay_that_dies_is_replaced(net: Net, autojump_clock: MockClock) -> None:
    node = await net.start("11.0.1.1", reachable=False)
    relays = [await net.start(f"11.0.{number}.1", relay=True) for number in range(2, 5)]
    await net.join(node, *relays)
    await trio.sleep(10)
    before = set(node.reaching.status().relays)
    dead = next(relay for relay in relays if relay.id in before)
    net.wire.crash(dead.id)
    await trio.sleep(1)
    after = set(node.reaching.status().relays)
    assert len(after) == 2
    assert dead.id not in after


async def test_without_a_relay_the_status_says_what_to_do(net: Net, autojump_clock: MockClock) -> None:
    node = await net.start("11.0.1.1", reachable=False)
    others = [await net.start(f"11.0.{number}.1") for number in range(2, 4)]
    await net.join(node, *others)
    await trio.sleep(10)
    status = node.reaching.status()
    assert status.verdict == "unreachable"
    assert "it has no place left" in status.reason
    assert "forward its TCP port" in status.advice
    assert "--bootstrap" in status.advice
    assert status.counts["places_refused"] >= 2


async def test_a_node_that_becomes_public_gives_its_places_back(net: Net, autojump_clock: MockClock) -> None:
    node = await net.start("11.0.1.1", reachable=False)
    relays = [await net.start(f"11.0.{number}.1", relay=True) for number in range(2, 4)]
    await net.join(node, *relays)
    await trio.sleep(10)
    assert len(node.reaching.status().relays) == 2
    net.open.add(f"/ip4/11.0.1.1/tcp/4001/p2p/{node.id}")
    await trio.sleep(2000)
    assert node.reaching.status().verdict == "public"
    assert set(node.outside.left) == {relay.id for relay in relays}


async def test_a_machine_alone_on_its_loopback_takes_no_relay(net: Net, autojump_clock: MockClock) -> None:
    node = await net.start("127.0.0.1", reachable=False)
    other = await net.start("127.0.0.2", relay=True)
    await net.join(node, other)
    await trio.sleep(100)
    assert node.outside.reserved == []


# ---- what others may have us do ----


async def asked(node: Node, other: Node, body: object) -> object:
    return await node.calls.call(other.id, "reach", body)  # type: ignore[arg-type]  # what a peer may send


async def test_a_dial_back_goes_to_the_asker_alone_and_seldom(net: Net, autojump_clock: MockClock) -> None:
    eve, victim = await net.start("11.0.1.1"), await net.start("11.0.2.1")
    await eve.transport.dial(victim.transport.addresses()[0])
    await trio.sleep(ANSWER_EVERY_S + 30)
    before = len(victim.outside.probed)
    for bad in ({"ports": [25], "ip": "8.8.8.8"}, {"ports": ["8.8.8.8:25"]}, {"addresses": ["/ip4/8.8.8.8/tcp/25"]}):
        with pytest.raises(RemoteError, match="not an Ask"):
            await asked(eve, victim, bad)
    await asked(eve, victim, {"ports": [1, 2, 3, 4]})
    assert all(text.startswith("/ip4/11.0.1.1/tcp/") for text in victim.outside.probed)
    assert all(text.endswith(f"/p2p/{eve.id}") for text in victim.outside.probed)
    for _ in range(20):
        with pytest.raises(RemoteError, match="at most every"):
            await asked(eve, victim, {"ports": [1, 2, 3, 4]})
    assert len(victim.outside.probed) == before + 4
    assert victim.reaching.status().counts["asks_not_now"] == 20


async def test_a_peer_behind_a_relay_is_not_dialled_back(net: Net, autojump_clock: MockClock) -> None:
    eve, victim = await net.start("11.0.1.1"), await net.start("11.0.2.1")
    await eve.transport.dial(victim.transport.addresses()[0])
    relayed = f"/ip4/11.0.9.1/tcp/4001/p2p/{Identity.make().peer_id}/p2p-circuit"
    for link in victim.transport.links:
        link.address_of[eve.transport] = relayed
    before = len(victim.outside.probed)
    with pytest.raises(RemoteError, match="through a relay"):
        await asked(eve, victim, {"ports": [4001]})
    assert len(victim.outside.probed) == before


@pytest.mark.parametrize(
    "answer",
    [
        {"ip": "11.0.1.1", "reached": [22]},  # a port that was not asked for
        {"ip": "nonsense", "reached": [4001]},
        {"ip": "0.0.0.0", "reached": [4001]},
        {"ip": "11.0.1.1", "reached": True},
        None,
    ],
)
async def test_a_senseless_answer_counts_for_nothing(net: Net, autojump_clock: MockClock, answer: object) -> None:
    node = await net.start("11.0.1.1", reachable=False)
    liars = [await net.start(f"11.0.{number}.1") for number in range(2, 6)]

    async def lie(call: object) -> object:
        await trio.lowlevel.checkpoint()
        return answer

    for liar in liars:
        liar.calls._handlers["reach"] = lie  # type: ignore[assignment]  # what a peer may answer
    await net.join(node, *liars)
    await trio.sleep(300)
    status = node.reaching.status()
    assert status.verdict in ("unknown", "unreachable")
    assert status.public_addresses == ()
    assert node.outside.announced == ()
