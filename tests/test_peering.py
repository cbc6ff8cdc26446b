"""Peering over the loopback network and a mock clock: bootstrap, reconcile, refuse, measure, storm, twins."""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from crypto.disk import System
from crypto.identity import Identity, PeerId
from p2p.address import Scope, parse_address
from p2p.book import Book, Source
from p2p.bootstrap import BookFile, BootstrapPeer, bootstrap_peer, read_bootstrap_file
from p2p.calls import Calls
from p2p.dialling import dial_reason
from p2p.errors import BadAddress, BadFile, Refused, RemoteError, Unreachable
from p2p.hello import INSTANCES_MAX, PROTOCOL_VERSION, RPC_PROTOCOL, Hello, Instances, objection, read_hello, to_value
from p2p.loopback import Faults, LoopbackNetwork
from p2p.mdns import Sighting
from p2p.peering import CALM_S, DIALS_MAX, PEERS_FEW, RECONCILE_S, SAVE_AGAIN_S, SAVE_EVERY_S
from p2p.roster import PINGS_MISSED_MAX, REFUSED_WAIT_S, Roster
from p2p.rpc import Call, encode_frame
from p2p.transport import Transport
from tests.peering_swarm import Node, Swarm, missing_address, until

HANG_TURNS = 3000  # of 10 ms in a thread: a hang guard


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    network = LoopbackNetwork(random.Random(7), Faults(stream_delay_s=(0.001, 0.01)))
    async with trio.open_nursery() as nursery:
        yield Swarm(network, nursery)
        nursery.cancel_scope.cancel()


# --- joining


async def test_two_nodes_meet_by_bootstrap_and_measure_each_other(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    b = await swarm.start(a.address)
    took = await until(lambda: a.id in b.peering.peers() and b.id in a.peering.peers())
    assert took < 1.0
    await until(lambda: a.peering.rtt_ms(b.id) is not None and b.peering.rtt_ms(a.id) is not None)
    assert 2.0 <= (b.peering.rtt_ms(a.id) or 0) <= 20.0
    (row,) = b.status.peers
    assert (row.peer, row.direction, row.phase, row.agent) == (a.id, "out", "greeted", "test")
    (boot,) = b.status.bootstrap
    assert (boot.state, boot.reason, boot.note, boot.tries) == ("connected", "", "a friend", 1)
    assert a.status.peers[0].direction == "in"
    assert b.status.connected == b.status.known == 1
    msgspec.json.encode(b.status.to_dict())


async def test_peers_of_a_peer_become_known_and_connected(autojump_clock: MockClock, swarm: Swarm) -> None:
    hub = await swarm.start()
    rest = [await swarm.start(hub.address) for _ in range(4)]
    everybody = {hub.id, *(node.id for node in rest)}
    await until(lambda: all(node.peering.peers() | {node.id} == everybody for node in rest), 60.0)


async def test_alone_it_says_which_bootstrap_peer_failed_and_why(autojump_clock: MockClock, swarm: Swarm) -> None:
    there = await swarm.start()
    nobody, wrong = missing_address(), f"{there.address.rsplit('/', 1)[0]}/{Identity.make().peer_id}"
    node = await swarm.start(nobody, wrong)
    await until(lambda: all(row.state == "failed" for row in node.status.bootstrap))
    first, second = node.status.bootstrap
    assert "nobody listens" in first.reason
    assert there.id in second.reason
    assert node.status.connected == 0


@pytest.mark.slow
async def test_it_bootstraps_again_whenever_it_is_alone(autojump_clock: MockClock, swarm: Swarm) -> None:
    hub_identity = Identity.make()
    hub = await swarm.start(identity=hub_identity, port=4001)
    node = await swarm.start(hub.address)
    for outage_s in (1.0, 30.0, 600.0, 7200.0):
        await until(lambda: node.peering.peers() == {hub_identity.peer_id})
        hub.scope.cancel()
        await until(lambda: not node.peering.peers())
        await trio.sleep(outage_s)
        assert node.status.bootstrap[0].state == "failed"
        hub = await swarm.start(identity=hub_identity, port=4001)
        took = await until(lambda: node.peering.peers() == {hub_identity.peer_id})
        assert took <= 15.0 * 1.5 + RECONCILE_S


async def test_a_bootstrap_file_may_name_the_node_itself(autojump_clock: MockClock, swarm: Swarm) -> None:
    identity = Identity.make()
    own = f"/ip4/127.0.0.1/tcp/4001/p2p/{identity.peer_id}"
    elsewhere = f"/ip4/10.9.9.9/tcp/4001/p2p/{identity.peer_id}"
    node = await swarm.start(own, elsewhere, identity=identity, port=4001)
    await trio.sleep(60.0)
    here, there = node.status.bootstrap
    assert (here.state, here.reason) == ("this node", "names this node itself")
    assert "copied data directory" in there.reason
    assert here.tries == there.tries == 0


class Names(trio.abc.HostnameResolver):
    """The name server of the tests."""

    async def getaddrinfo(self, host: Any, port: Any, family: Any = 0, *rest: Any) -> Any:
        await trio.lowlevel.checkpoint()
        if host != b"node.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = [(socket.AF_INET6, ("::1", port, 0, 0)), (socket.AF_INET, ("127.0.0.1", port))]
        return [(kind, 1, 6, "", where) for kind, where in found if family in (0, kind)]

    async def getnameinfo(self, *rest: Any) -> Any:
        raise AssertionError("nobody asks")


async def test_a_name_is_resolved_and_each_of_its_addresses_tried(autojump_clock: MockClock, swarm: Swarm) -> None:
    trio.socket.set_custom_hostname_resolver(Names())
    a = await swarm.start(port=4001)
    good, bad = (f"/dns/{name}/tcp/4001/p2p/{a.id}" for name in ("node.example", "nowhere.example"))
    b = await swarm.start(good)
    await until(lambda: a.id in b.peering.peers())
    assert b.status.bootstrap[0].state == "connected"
    assert b.status.peers[0].direction == "out"
    c = await swarm.start(bad)
    await until(lambda: c.status.bootstrap[0].reason)
    assert c.status.bootstrap[0].reason == "the name nowhere.example cannot be resolved: Name or service not known"


def test_a_bootstrap_file_may_be_nested_as_deep_as_it_likes(tmp_path: Path) -> None:
    file = tmp_path / "peers.json"
    for depth in (10, *range(700, 1000, 5), 100_000):
        file.write_text('[{"addr": ' + "[" * depth + "]" * depth + "}]")
        with pytest.raises(BadFile):
            read_bootstrap_file(file)


def test_dial_reasons_are_found_under_groups_and_causes() -> None:
    address = parse_address(missing_address())
    deep = Unreachable("all attempts failed")
    deep.__cause__ = ExceptionGroup("all", [ValueError(), OSError(errno.ECONNREFUSED, "x")])
    assert dial_reason(deep, address) == (
        "connection refused: nothing listens at /ip4/127.0.0.1/tcp/9; is that node running, at that port?"
    )
    assert "firewall" in dial_reason(OSError(errno.ETIMEDOUT, "x"), address)
    assert dial_reason(Unreachable("another peer answers there"), address) == "another peer answers there"
    loop = Unreachable("round")
    loop.__cause__ = loop
    assert dial_reason(loop, address) == "round"


# --- refusing


async def test_another_network_is_refused_on_both_sides_with_the_reason(
    autojump_clock: MockClock, swarm: Swarm
) -> None:
    a = await swarm.start(network="main")
    b = await swarm.start(a.address, network="x")
    await until(lambda: a.peering.refusals() and b.peering.refusals())
    await until(lambda: not a.transport.peers() and not b.transport.peers(), 5.0)
    assert a.peering.refusals()[0].reason == "other network 'x' while ours is 'main'"
    assert b.peering.refusals()[0].reason == "other network 'main' while ours is 'x'"
    assert b.peering.refusals()[0].address == a.address
    assert b.status.bootstrap[0].state == "failed"
    assert b.status.bootstrap[0].reason == "other network 'main' while ours is 'x'"
    assert not a.peering.peers()
    assert not b.peering.peers()


async def test_a_refused_peer_is_left_alone_and_connect_says_why(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start(network="main")
    b = await swarm.start(a.address, network="x")
    await until(b.peering.refusals)
    await trio.sleep(REFUSED_WAIT_S - 60.0)
    assert b.status.bootstrap[0].tries == 1
    with pytest.raises(Refused, match="other network 'main' while ours is 'x'"):
        await b.peering.connect(a.id)
    await until(lambda: b.status.bootstrap[0].tries == 2, 120.0)


async def test_a_refusal_is_forgotten_when_the_peer_comes_back_right(autojump_clock: MockClock, swarm: Swarm) -> None:
    identity = Identity.make()
    a = await swarm.start()
    wrong = await swarm.start(a.address, identity=identity, network="x")
    await until(a.peering.refusals)
    wrong.scope.cancel()
    right = await swarm.start(a.address, identity=identity)
    await until(lambda: right.id in a.peering.peers())
    assert a.peering.refusals() == ()
    assert not a.book.held(right.id, trio.current_time())


async def test_another_version_is_refused_whatever_else_it_says(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    async with plain_peer(swarm, {}) as (transport, calls):
        await transport.dial(a.address)
        answer = await calls.call(a.id, "hello", {"protocol": 2, "network": ["something", "new"]})
        assert answer["refused"] == "other protocol version 2 while ours is 1"
        await until(lambda: a.id not in transport.peers(), 5.0)
        (refusal,) = a.peering.refusals()
        assert refusal.reason == "other protocol version 2 while ours is 1"


async def test_a_peer_that_answers_nonsense_is_refused(autojump_clock: MockClock, swarm: Swarm) -> None:
    async def nonsense(call: Any) -> Any:
        await trio.lowlevel.checkpoint()
        return {"protocol": 1, "network": "main", "agent": "x" * 1000}

    async with plain_peer(swarm, {"hello": nonsense}) as (transport, _):
        a = await swarm.start(transport.addresses()[0])
        await until(a.peering.refusals)
        assert "broke the protocol: not a Hello" in a.peering.refusals()[0].reason
        await until(lambda: not transport.peers(), 5.0)


@pytest.mark.parametrize(
    "body", [None, 5, {}, {"protocol": True}, {"protocol": 1, "network": "main"}, {"protocol": "1"}]
)
async def test_a_caller_of_nonsense_is_told_and_dropped(autojump_clock: MockClock, swarm: Swarm, body: Any) -> None:
    a = await swarm.start()
    async with plain_peer(swarm, {}) as (transport, calls):
        await transport.dial(a.address)
        with pytest.raises(RemoteError, match="not a Hello") as caught:
            await calls.call(a.id, "hello", body)
        assert caught.value.code == "bad_hello"
        await until(lambda: a.id not in transport.peers(), 5.0)


async def test_a_plain_libp2p_client_may_stay(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    async with swarm.network.join(Identity.make()) as client:
        await client.dial(a.address)
        await trio.sleep(300.0)
        assert a.id in client.peers()
        assert a.status.peers[0].phase == "foreign"
        assert a.peering.peers() == frozenset()


async def test_a_client_that_greets_and_serves_no_rpc_may_stay(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    hello = Hello(protocol=1, network="main", agent="client/1", instance="a" * 32, addresses=[])
    async with swarm.network.join(Identity.make()) as client:
        await client.dial(a.address)
        stream = await client.open_stream(a.id, RPC_PROTOCOL)
        await stream.send(encode_frame(Call(1, "hello", to_value(hello))))
        await stream.receive()
        await trio.sleep(300.0)
        assert a.id in client.peers()
        assert client.peer_id in a.peering.peers()


async def test_an_expelled_peer_is_neither_dialled_nor_received(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    b = await swarm.start(a.address)
    await until(lambda: b.id in a.peering.peers() and a.id in b.peering.peers())
    a.peering.expel(b.id, "false inference", 100.0)
    await until(lambda: not a.transport.peers(), 5.0)
    await until(lambda: any("false inference" in row.reason for row in b.peering.refusals()))
    assert not a.peering.peers()


# --- keeping


async def test_a_frozen_peer_is_dropped_after_missed_pings(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    b = await swarm.start(a.address)
    await until(lambda: a.id in b.peering.peers())
    swarm.network.freeze(a.id)
    assert await until(lambda: not b.peering.peers()) < 60.0
    assert f"{PINGS_MISSED_MAX} pings" in b.status.bootstrap[0].reason or "answer" in b.status.bootstrap[0].reason
    swarm.network.thaw(a.id)
    await until(lambda: a.id in b.peering.peers(), 60.0)


async def test_a_peer_that_answers_pings_with_an_error_lives(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    async with plain_peer(swarm, {}) as (transport, calls):
        await transport.dial(a.address)
        hello = Hello(protocol=1, network="main", agent="t", instance="a" * 32, addresses=[])
        await calls.call(a.id, "hello", to_value(hello))
        await trio.sleep(120.0)
        assert transport.peer_id in a.peering.peers()
        assert a.peering.rtt_ms(transport.peer_id) is not None


async def test_a_partition_heals(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    b = await swarm.start(a.address)
    await until(lambda: a.id in b.peering.peers())
    swarm.network.partition(a.id, b.id)
    await until(lambda: not b.peering.peers() and not a.peering.peers(), 120.0)
    await trio.sleep(600.0)
    swarm.network.heal()
    assert await until(lambda: a.id in b.peering.peers() and b.id in a.peering.peers(), 60.0) < 40.0


async def test_the_reconciler_finds_what_the_watcher_missed(autojump_clock: MockClock, swarm: Swarm) -> None:
    class Deaf:
        """A transport that never says who came and went."""

        def __init__(self, inner: Transport) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def watch(self, watcher: Any) -> None:
            pass

    a = await swarm.start(wrap=Deaf)
    b = await swarm.start(a.address)
    await until(lambda: b.id in a.peering.peers(), 2 * RECONCILE_S)
    b.scope.cancel()
    await until(lambda: not a.status.peers, 2 * RECONCILE_S)


@pytest.mark.slow
async def test_a_peer_that_cuts_us_off_is_not_dialled_in_a_circle(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    b = await swarm.start(a.address)

    async with trio.open_nursery() as nursery:

        async def cutter() -> None:
            while True:
                await until(lambda: a.id in b.peering.peers(), 3600.0)
                swarm.network.break_connections(a.id, b.id)

        nursery.start_soon(cutter)
        await trio.sleep(300.0)
        nursery.cancel_scope.cancel()
    assert 10 <= b.status.bootstrap[0].tries <= 60  # every 15 s or so, not every moment


@pytest.mark.slow
async def test_no_more_than_four_dials_at_once(autojump_clock: MockClock, swarm: Swarm) -> None:
    busy = most = 0

    class Counting:
        def __init__(self, inner: Transport) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        async def dial(self, address: str) -> PeerId:
            nonlocal busy, most
            busy += 1
            most = max(most, busy)
            try:
                await trio.sleep(1.0)
                return await self._inner.dial(address)
            finally:
                busy -= 1

    others = [await swarm.start() for _ in range(12)]
    node = await swarm.start(*(other.address for other in others[:8]), wrap=Counting)
    for other in others[8:]:
        node.book.add(parse_address(other.address), Source.ADVERT, trio.current_time())
    async with trio.open_nursery() as nursery:  # those asked for at once count as well
        for other in others[8:]:
            nursery.start_soon(node.peering.connect, other.id)
    await until(lambda: len(node.peering.peers()) == 12)
    assert most == DIALS_MAX


async def test_with_a_few_peers_it_dials_the_others_one_by_one(autojump_clock: MockClock, swarm: Swarm) -> None:
    others = [await swarm.start(peers_target=0, outbound_min=0) for _ in range(PEERS_FEW + 3)]
    began = trio.current_time()
    node = await swarm.start(*(other.address for other in others))
    await until(lambda: len(node.peering.peers()) >= PEERS_FEW)
    assert trio.current_time() - began < CALM_S
    for more in range(1, 4):
        await until(lambda wanted=more: len(node.peering.peers()) >= PEERS_FEW + wanted)
        assert trio.current_time() - began >= more * CALM_S


async def test_connect_reaches_a_known_peer_and_says_why_it_cannot(autojump_clock: MockClock, swarm: Swarm) -> None:
    a, b = await swarm.start(), await swarm.start(peers_target=0, outbound_min=0)
    with pytest.raises(Unreachable, match="no address of"):
        await b.peering.connect(a.id)
    gone = parse_address(missing_address())
    b.book.add(gone, Source.ADVERT, trio.current_time())
    with pytest.raises(Unreachable, match="nobody listens"):
        await b.peering.connect(gone.peer)
    b.book.add(parse_address(a.address), Source.ADVERT, trio.current_time())
    await b.peering.connect(a.id)
    await b.peering.connect(a.id)
    await until(lambda: a.id in b.peering.peers())


async def test_adverts_teach_no_nearer_address_than_our_peers(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    stranger = Identity.make().peer_id
    told_addresses = [f"/ip4/192.168.7.7/tcp/1/p2p/{stranger}", f"/ip4/8.8.8.8/tcp/1/p2p/{stranger}", "rubbish"]
    a.peering.learn(stranger, told_addresses)
    assert [address.host for address in a.book.addresses(stranger, 0.0)] == ["8.8.8.8"]
    b = await swarm.start(a.address)
    await until(lambda: b.id in a.peering.peers())
    a.peering.learn(stranger, told_addresses)
    assert {address.host for address in a.book.addresses(stranger, 0.0)} == {"8.8.8.8", "192.168.7.7"}


async def test_addresses_are_given_to_greeted_peers_only_and_not_often(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    b = await swarm.start(a.address)
    await until(lambda: b.id in a.peering.peers())
    async with plain_peer(swarm, {}) as (transport, calls):
        await transport.dial(a.address)
        with pytest.raises(RemoteError, match="say hello first"):
            await calls.call(a.id, "peers", {})
        hello = Hello(protocol=1, network="main", agent="t", instance="a" * 32, addresses=[])
        await calls.call(a.id, "hello", to_value(hello))
        answer = await calls.call(a.id, "peers", {})
        assert answer == {"peers": [{"peer": b.id, "addresses": [b.address]}]}
        with pytest.raises(RemoteError, match="at most every 10 s"):
            await calls.call(a.id, "peers", {})


async def test_nobody_sends_others_to_a_host_that_is_not_its_own(autojump_clock: MockClock, swarm: Swarm) -> None:
    """An address that a peer claims at another host than it is seen at is not passed on before it has worked."""
    a = await swarm.start(peers_target=0, outbound_min=0)
    async with plain_peer(swarm, {}) as (liar, calls):
        await liar.dial(a.address)
        victim = f"/ip4/8.8.8.8/tcp/80/p2p/{liar.peer_id}"
        hello = Hello(protocol=1, network="main", agent="t", instance="a" * 32, addresses=[victim])
        await calls.call(a.id, "hello", to_value(hello))
        async with plain_peer(swarm, {}) as (other, other_calls):
            await other.dial(a.address)
            await other_calls.call(a.id, "hello", to_value(msgspec.structs.replace(hello, addresses=[])))
            assert await other_calls.call(a.id, "peers", {}) == {"peers": []}


# --- the storm


@pytest.mark.slow
async def test_a_storm_of_32_nodes_settles(autojump_clock: MockClock, swarm: Swarm) -> None:
    hub = await swarm.start()
    nodes = [hub]
    started = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def one() -> None:
            nodes.append(await swarm.start(hub.address))

        for _ in range(31):
            nursery.start_soon(one)
    assert trio.current_time() - started < 1.0
    took = await until(lambda: min(len(node.peering.peers()) for node in nodes) >= 8, 120.0)
    assert took < 60.0
    await trio.sleep(10.0)
    assert min(len(node.peering.peers()) for node in nodes) >= 8
    assert len(reachable(nodes)) == 32
    hub.scope.cancel()
    nodes.remove(hub)
    await trio.sleep(10.0)
    assert min(len(node.peering.peers()) for node in nodes) >= 8  # nobody needs the hub any more
    assert len(reachable(nodes)) == 31


def reachable(nodes: list[Node]) -> set[PeerId]:
    by_id = {node.id: node for node in nodes}
    found, edge = {nodes[0].id}, [nodes[0].id]
    while edge:
        for peer in by_id[edge.pop()].peering.peers() - found:
            if peer in by_id:
                found.add(peer)
                edge.append(peer)
    return found


# --- twins


async def test_a_third_node_tells_two_twins_of_each_other(autojump_clock: MockClock, swarm: Swarm) -> None:
    hub = await swarm.start()
    identity = Identity.make()
    first = await swarm.start(hub.address, identity=identity)
    await until(lambda: hub.id in first.peering.peers())
    second = await swarm.start(hub.address, identity=identity)
    await until(lambda: first.duplicates or second.duplicates, 120.0)
    (message,) = first.duplicates or second.duplicates
    assert identity.peer_id in message
    assert "keys identity rotate" in message
    assert hub.id in message
    assert message in (first.status.duplicate, second.status.duplicate)


async def test_a_restart_is_no_twin(autojump_clock: MockClock, swarm: Swarm) -> None:
    hub = await swarm.start()
    identity = Identity.make()
    for _ in range(4):
        node = await swarm.start(hub.address, identity=identity)
        await until(lambda: identity.peer_id in hub.peering.peers())
        await trio.sleep(60.0)
        assert node.duplicates == []
        node.scope.cancel()
        await until(lambda: not hub.peering.peers())


async def test_a_twin_on_the_lan_is_seen_by_mdns_once(autojump_clock: MockClock, swarm: Swarm) -> None:
    node = await swarm.start()
    own = parse_address(node.address)
    sighting = Sighting(peer=node.id, network="main", protocol=1, instance=f"{1:032x}", addresses=(own,))
    node.peering.sighted(sighting)
    assert node.duplicates == []  # ourselves
    twin = Sighting(
        peer=node.id,
        network="main",
        protocol=1,
        instance="f" * 32,
        addresses=(parse_address(f"/ip4/10.0.0.9/tcp/4002/p2p/{node.id}"),),
    )
    node.peering.sighted(twin)
    node.peering.sighted(twin)
    (message,) = node.duplicates
    assert "/ip4/10.0.0.9/tcp/4002" in message


def test_instances() -> None:
    instances, peer = Instances(), PeerId("p")
    assert instances.heard(peer, "a") == ""
    assert instances.heard(peer, "a") == ""
    assert instances.heard(peer, "b") == ""  # a restart, as far as anybody can tell
    assert instances.heard(peer, "a") == "b"
    assert instances.heard(peer, "b") == "a"
    for index in range(100):
        assert instances.heard(peer, str(index)) == ""
    assert instances.heard(peer, str(99 - INSTANCES_MAX)) == ""  # forgotten
    assert instances.heard(peer, "99") == str(99 - INSTANCES_MAX)


# --- the LAN


async def test_a_node_seen_on_the_lan_is_dialled(autojump_clock: MockClock, swarm: Swarm) -> None:
    a, b = await swarm.start(), await swarm.start()
    for one, other in ((a, b), (b, a)):
        one.peering.sighted(
            Sighting(
                peer=other.id,
                network="main",
                protocol=1,
                instance="c" * 32,
                addresses=(parse_address(other.address),),
            )
        )
    assert await until(lambda: b.id in a.peering.peers() and a.id in b.peering.peers()) < 3.0


async def test_another_network_on_the_lan_is_noted_and_left_alone(autojump_clock: MockClock, swarm: Swarm) -> None:
    a, b = await swarm.start(), await swarm.start(network="x")
    seen = Sighting(peer=b.id, network="x", protocol=1, instance="c" * 32, addresses=(parse_address(b.address),))
    a.peering.sighted(seen)
    await trio.sleep(30.0)
    assert a.transport.peers() == frozenset()
    assert a.peering.refusals()[0].reason == "other network 'x' while ours is 'main'"


async def test_a_lie_on_the_lan_does_not_part_us_from_a_peer(autojump_clock: MockClock, swarm: Swarm) -> None:
    a = await swarm.start()
    b = await swarm.start(a.address)
    await until(lambda: b.id in a.peering.peers())
    lie = Sighting(peer=b.id, network="x", protocol=1, instance="c" * 32, addresses=(parse_address(b.address),))
    a.peering.sighted(lie)
    assert b.id in a.peering.peers()
    await trio.sleep(30.0)
    assert b.id in a.peering.peers()
    assert a.peering.refusals() == ()


# --- words


def test_objections_are_sentences() -> None:
    hello = Hello(protocol=PROTOCOL_VERSION, network="main", agent="", instance="a" * 16, addresses=[])
    assert objection("main", hello) == ""
    assert objection("main", 2) == "other protocol version 2 while ours is 1"
    assert objection("x", hello) == "other network 'main' while ours is 'x'"
    assert objection("main", msgspec.structs.replace(hello, refused="spam")) == "it refused us: spam"
    assert read_hello(to_value(hello)) == hello


# --- the roster


def test_the_newest_refusals_are_kept() -> None:
    roster = Roster(random.Random(0))
    for index in range(1000):
        roster.refuse(PeerId(str(index)), "why", "", float(index))
    assert len(roster.refusals()) == 256
    assert roster.refusals()[-1].peer == "999"


# --- the disk


async def test_the_book_outlives_the_node(autojump_clock: MockClock, swarm: Swarm, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "address_book.json"
    a = await swarm.start()
    b = await swarm.start(a.address, book_path=path)
    await until(lambda: a.id in b.peering.peers())
    b.scope.cancel()
    await until(path.exists)
    again = await swarm.start(book_path=path)  # knows no bootstrap peer
    assert await until(lambda: a.id in again.peering.peers()) < RECONCILE_S
    assert list(path.parent.iterdir()) == [path]


async def test_a_spoiled_book_is_put_aside_and_said(autojump_clock: MockClock, swarm: Swarm, tmp_path: Path) -> None:
    path = tmp_path / "address_book.json"
    path.write_bytes(b"\x00 not json")
    node = await swarm.start(book_path=path)
    file = node.peering.file_status()
    assert file is not None
    assert "moved aside" in file.set_aside
    assert (tmp_path / "address_book.json.corrupt-1").read_bytes() == b"\x00 not json"


def test_a_whole_file_that_is_no_book_is_put_aside(tmp_path: Path) -> None:
    path, book = tmp_path / "book.json", Book(Identity.make().peer_id, random.Random(0))
    file = BookFile(path)
    assert file.save(b'{"version":1}')
    file.load(book, 0.0)
    assert "not an address book" in file.status().set_aside
    assert not path.exists()


class Full(System):
    """A disk with no room until told otherwise."""

    full = True

    def write(self, handle: int, content: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(handle, content)


async def test_a_full_disk_is_said_and_tried_again_soon(mock_clock: MockClock, swarm: Swarm, tmp_path: Path) -> None:
    """The clock stands still but for the jumps: what happens after one was due within it."""
    disk = Full()
    node = await swarm.start(book_path=tmp_path / "book.json", system=disk)

    async def after(seconds: float, reason: str, writes: int) -> None:
        mock_clock.jump(seconds)
        for _ in range(HANG_TURNS):
            file = node.peering.file_status()
            assert file is not None
            if (file.reason, file.writes) == (reason, writes):
                return
            await trio.to_thread.run_sync(time.sleep, 0.01)
        pytest.fail(f"{seconds:g} s later: {file}")

    await after(SAVE_EVERY_S, "no_space", 0)
    disk.full = False
    await after(SAVE_AGAIN_S, "", 1)
    await after(SAVE_EVERY_S, "", 2)


# --- the bootstrap file


def test_the_bootstrap_file(tmp_path: Path) -> None:
    path, text = tmp_path / "bootstrap_peers.json", missing_address()
    path.write_text("[]\n")
    assert read_bootstrap_file(path) == ()
    path.write_text(f'[{{"addr": "{text}", "note": "Ann"}}, {{"addr": " {text}"}}]')
    assert read_bootstrap_file(path) == (BootstrapPeer(address=parse_address(text), note="Ann"),)


def test_the_projects_own_bootstrap_file_is_valid() -> None:
    assert read_bootstrap_file(Path(__file__).parent.parent / "bootstrap_peers.json") == ()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "must be a JSON list"),
        ("{}", "must be a JSON list"),
        ("[\n  {\n", "not JSON: Input data was truncated"),
        ("[\n  {\n x", "not JSON.*line 3"),
        ("\xff", "not JSON"),
        ("[1]", r"entry 1 \(line 1\): 1 is not an object"),
        ('[\n {"addr": 5}\n]', r'entry 1 \(line 2\): "addr" is 5, not a text'),
        ('[{"note": "x"}]', '"addr" is missing'),
        ('[{"addr": "/ip4/1.2.3.4/tcp/5"}]', "does not say which peer"),
        ('[{"addr": "/ip4/1.2.3.4/tcp/5", "nte": ""}]', "unknown key 'nte'"),
        ('[{"addr": "GOOD", "note": 5}]', '"note" must be a text'),
        ('[{"addr": "GOOD", "note": "a, [b] {c} \\"d\\""},\n\n{"addr": "x"}]', r"1 bad of 2.*entry 2 \(line 3\): 'x'"),
        ('[{"addr": "y"},\n{"addr": "x"}]', r"2 bad of 2.*entry 1 \(line 1\).*entry 2 \(line 2\)"),
        ("[" + "1," * 300 + "1]", "at most 256"),
        ("[]" + " " * (1 << 20), "over 1048576 bytes"),
    ],
)
def test_a_bad_bootstrap_file_is_refused_with_line_and_reason(tmp_path: Path, content: str, wanted: str) -> None:
    path = tmp_path / "bootstrap_peers.json"
    path.write_bytes(content.replace("GOOD", missing_address()).encode("latin-1"))
    with pytest.raises(BadFile, match=f"(?s){path}.*{wanted}"):
        read_bootstrap_file(path)


def test_a_missing_bootstrap_file_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="No such file"):
        read_bootstrap_file(tmp_path / "none.json")
    with pytest.raises(BadAddress):
        bootstrap_peer("10.0.0.1:4001")


@asynccontextmanager
async def plain_peer(swarm: Swarm, handlers: dict[str, Any]) -> AsyncIterator[tuple[Any, Calls]]:
    """A peer without peering: what it says is the test's."""
    async with swarm.network.join(Identity.make()) as transport:
        calls = Calls(transport, RPC_PROTOCOL, handlers)
        async with trio.open_nursery() as nursery:
            await nursery.start(calls.run)
            yield transport, calls
            nursery.cancel_scope.cancel()


# ---- peers behind relays ----


class Seen:
    """A transport that says other things of where it is and where it sees others."""

    def __init__(self, transport: Any, more: Callable[[Any], list[str]], at: str | None = None) -> None:
        self._transport, self._more, self._at = transport, more, at

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def addresses(self) -> tuple[str, ...]:
        return (*self._transport.addresses(), *self._more(self._transport))

    def remote_address(self, peer: PeerId) -> str | None:
        there: str | None = self._transport.remote_address(peer)
        return there if there is None or self._at is None else self._at


def shared(node: Node, peer: PeerId) -> list[str]:
    """What a node would tell others of a peer."""
    told = node.book.share(trio.current_time(), Scope.PUBLIC, 32, Identity.make().peer_id)
    return next((texts for known, texts in told if known == peer), [])


async def test_a_relay_tells_others_of_who_is_behind_it(swarm: Swarm, autojump_clock: MockClock) -> None:
    relay = await swarm.start(ip="11.0.1.1")
    behind = f"{relay.address}/p2p-circuit/p2p/"
    other = behind.replace(relay.id, Identity.make().peer_id)
    node = await swarm.start(
        relay.address,
        ip="11.0.2.1",
        wrap=lambda transport: Seen(transport, lambda inner: [behind + inner.peer_id, other + inner.peer_id]),
    )
    await until(lambda: relay.id in node.peering.peers() and node.id in relay.peering.peers())
    assert set(shared(relay, node.id)) == {f"{behind}{node.id}", node.transport.addresses()[0]}, "not of other relays'"


async def test_a_peer_behind_a_relay_is_not_at_the_relays_host(swarm: Swarm, autojump_clock: MockClock) -> None:
    third = f"/ip4/11.0.9.9/tcp/4001/p2p/{Identity.make().peer_id}/p2p-circuit"
    victim = await swarm.start(ip="11.0.1.1", wrap=lambda transport: Seen(transport, lambda _: [], third))
    claims = ["/ip4/11.0.9.9/tcp/22/p2p/", "/ip4/192.168.1.1/tcp/80/p2p/"]
    node = await swarm.start(
        victim.address,
        ip="11.0.2.1",
        wrap=lambda transport: Seen(transport, lambda inner: [claim + inner.peer_id for claim in claims]),
    )
    await until(lambda: node.id in victim.peering.peers())
    assert shared(victim, node.id) == []
    known = [address.host for address in victim.book.addresses(node.id, trio.current_time())]
    assert "192.168.1.1" not in known, "a relayed peer cannot have us dial our LAN"
