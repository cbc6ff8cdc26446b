"""The faults of the loopback network: what each one does, and that a seed replays them."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from crypto.identity import Identity, PeerId
from p2p.errors import LocalProtocolError, StreamClosed, Unreachable
from p2p.loopback import LoopbackNetwork, LoopbackTransport
from p2p.loopback_wire import WINDOW_BYTES, Faults
from p2p.transport import PeerChange, Stream

Clock = trio.testing.MockClock
PROTOCOL = "/test/stream/1"
TOPIC = "topic"
IDENTITIES = [Identity(bytes([number] * 32)) for number in range(4)]


@pytest.fixture
def clock() -> trio.testing.MockClock:
    # pytest-trio takes a clock only from a test's own arguments.
    return trio.testing.MockClock(autojump_threshold=0)


@asynccontextmanager
async def pair(network: LoopbackNetwork) -> AsyncIterator[tuple[LoopbackTransport, LoopbackTransport]]:
    """(dialer, listener), connected."""
    async with network.join(IDENTITIES[0]) as left, network.join(IDENTITIES[1]) as right:
        await left.dial(right.addresses()[0])
        yield left, right


def network(seed: int = 1, **faults: object) -> LoopbackNetwork:
    return LoopbackNetwork(random.Random(seed), Faults(**faults))  # type: ignore[arg-type]  # the tests name them


class Kept:
    """A handler that hands its stream to the test."""

    def __init__(self, node: LoopbackTransport) -> None:
        self._send, self._receive = trio.open_memory_channel[Stream](10)
        node.serve(PROTOCOL, self)

    async def __call__(self, stream: Stream) -> None:
        self._send.send_nowait(stream)
        await trio.sleep_forever()

    async def ends(self, opener: LoopbackTransport, peer: PeerId) -> tuple[Stream, Stream]:
        """(the opener's end, the handler's end) of a new stream."""
        near = await opener.open_stream(peer, PROTOCOL)
        return near, await self._receive.receive()


async def arrives(stream: Stream, frame: bytes) -> None:
    with trio.fail_after(0.01):
        assert await stream.receive() == frame


async def assert_silent(stream: Stream, seconds: float = 60) -> None:
    with trio.move_on_after(seconds):
        pytest.fail(f"{await stream.receive()!r} came")


async def test_delay_keeps_the_order(clock: Clock) -> None:
    async with pair(network(stream_delay_s=(0.1, 2.0))) as (left, right):
        near, far = await Kept(right).ends(left, right.peer_id)
        began = trio.current_time()
        for number in range(50):
            await near.send(b"%d" % number)
        assert trio.current_time() == began
        assert [await far.receive() for _ in range(50)] == [b"%d" % number for number in range(50)]
        assert 0.1 <= trio.current_time() - began <= 2.0


async def test_a_partition_holds_frames_until_it_heals(clock: Clock) -> None:
    net = network()
    async with pair(net) as (left, right):
        near, far = await Kept(right).ends(left, right.peer_id)
        net.partition(left.peer_id, right.peer_id)
        await near.send(b"x")
        await far.send(b"y")
        await assert_silent(near)
        await assert_silent(far)
        assert left.peers() == {right.peer_id}  # nobody is told
        net.heal(left.peer_id, right.peer_id)
        await arrives(far, b"x")
        await arrives(near, b"y")


async def test_a_one_way_partition_holds_one_way(clock: Clock) -> None:
    net = network()
    async with pair(net) as (left, right):
        near, far = await Kept(right).ends(left, right.peer_id)
        net.partition(left.peer_id, right.peer_id, both_ways=False)
        await near.send(b"x")
        await far.send(b"y")
        await arrives(near, b"y")
        await assert_silent(far)
        net.heal()
        await arrives(far, b"x")


async def test_a_blocked_path_lets_no_end_of_a_stream_through(clock: Clock) -> None:
    net = network()
    async with pair(net) as (left, right):
        kept = Kept(right)
        reset, reset_far = await kept.ends(left, right.peer_id)
        closed, closed_far = await kept.ends(left, right.peer_id)
        net.partition(left.peer_id, right.peer_id, both_ways=False)
        await reset.reset()
        await closed.close()
        await assert_silent(reset_far)
        await reset_far.send(b"into the void")
        await assert_silent(closed_far)
        net.heal()
        with pytest.raises(Unreachable):
            await reset_far.receive()
        with pytest.raises(StreamClosed):
            await closed_far.receive()


async def test_a_lost_connection_is_told_when_the_path_opens(clock: Clock) -> None:
    net = network()
    async with pair(net) as (left, right):
        near, _ = await Kept(right).ends(left, right.peer_id)
        changes: list[PeerChange] = []
        left.watch(changes.append)
        net.partition(left.peer_id, right.peer_id)
        net.crash(right.peer_id)
        await assert_silent(near)
        assert left.peers() == {right.peer_id}
        assert changes == []
        net.heal()
        assert left.peers() == frozenset()
        assert changes == [PeerChange(peer=right.peer_id, connected=False)]
        with pytest.raises(Unreachable):
            await near.receive()


@pytest.mark.parametrize("how", ["partition", "freeze"])
async def test_a_blocked_path_takes_no_dial_and_no_stream(how: str, clock: Clock) -> None:
    net = network(dial_timeout_s=7.0)
    async with pair(net) as (left, right), net.join(IDENTITIES[2]) as third:
        right.serve(PROTOCOL, Kept(right))
        if how == "freeze":
            net.freeze(right.peer_id)
        else:
            net.partition(left.peer_id, right.peer_id)
            net.partition(third.peer_id, right.peer_id, both_ways=False)
        for attempt in (left.open_stream(right.peer_id, PROTOCOL), third.dial(right.addresses()[0])):
            began = trio.current_time()
            with pytest.raises(Unreachable):
                await attempt
            assert trio.current_time() - began == 7.0
        net.thaw(right.peer_id)
        net.heal()
        await third.dial(right.addresses()[0])
        await left.open_stream(right.peer_id, PROTOCOL)


async def test_a_frozen_peer_is_half_open_and_goes_on_when_thawed(clock: Clock) -> None:
    net = network()
    async with pair(net) as (left, right):
        near, far = await Kept(right).ends(left, right.peer_id)
        net.freeze(right.peer_id)
        await near.send(b"x")
        await far.send(b"y")
        await assert_silent(near, 3600)
        assert left.peers() == {right.peer_id}
        net.thaw(right.peer_id)
        await arrives(far, b"x")
        await arrives(near, b"y")


async def test_a_crash_breaks_streams_and_the_node_can_come_back(clock: Clock) -> None:
    net = network()
    async with net.join(IDENTITIES[0]) as left:
        async with net.join(IDENTITIES[1], port=7777) as right:
            await left.dial(right.addresses()[0])
            near, _ = await Kept(right).ends(left, right.peer_id)
            net.crash(right.peer_id)
            with pytest.raises(Unreachable):
                await near.receive()
            with pytest.raises(Unreachable):
                await left.dial(right.addresses()[0])
            with pytest.raises(Unreachable):
                await right.dial(left.addresses()[0])
            async with net.join(IDENTITIES[1], port=7777) as again:
                await left.dial(again.addresses()[0])
                assert left.peers() == {right.peer_id}
        assert left.peers() == frozenset()


async def test_a_taken_port_is_refused(clock: Clock) -> None:
    net = network()
    async with net.join(IDENTITIES[0], port=7777):
        with pytest.raises(LocalProtocolError, match="7777"):
            async with net.join(IDENTITIES[1], port=7777):
                pass


async def test_two_nodes_may_have_one_identity(clock: Clock) -> None:
    net = network()
    async with net.join(IDENTITIES[0]) as one, net.join(IDENTITIES[0]) as copy, net.join(IDENTITIES[1]) as other:
        await one.dial(other.addresses()[0])
        await copy.dial(other.addresses()[0])
        assert other.peers() == {one.peer_id}
        await one.disconnect(other.peer_id)
        assert other.peers() == {one.peer_id}


async def test_a_sender_may_be_made_to_give_up(clock: Clock) -> None:
    async with pair(network(stall_s=5.0)) as (left, right):
        near, far = await Kept(right).ends(left, right.peer_id)
        await near.send(bytes(WINDOW_BYTES))
        began = trio.current_time()
        with pytest.raises(Unreachable):
            await near.send(b"x")
        assert trio.current_time() - began == 5.0
        assert left.statistics().drops == {"stalled": 1}
        with pytest.raises(Unreachable):
            await far.receive()


async def test_the_blocks_own_error_comes_out_as_it_is(clock: Clock) -> None:
    with pytest.raises(ZeroDivisionError):
        async with network().join(IDENTITIES[0]):
            raise ZeroDivisionError


# -- gossip -----------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def swarm(net: LoopbackNetwork, heard: Callable[[int, bytes], None]) -> AsyncIterator[list[LoopbackTransport]]:
    """Three subscribers in a triangle; `heard` is told (which, payload)."""
    async with net.join(IDENTITIES[0]) as a, net.join(IDENTITIES[1]) as b, net.join(IDENTITIES[2]) as c:
        nodes = [a, b, c]
        for number, node in enumerate(nodes):

            def receive(peer: PeerId, payload: bytes, number: int = number) -> bool:
                heard(number, payload)
                return True

            await node.subscribe(TOPIC, receive)
        await a.dial(b.addresses()[0])
        await b.dial(c.addresses()[0])
        await c.dial(a.addresses()[0])
        yield nodes


async def gossip_history(net: LoopbackNetwork, messages: int = 200) -> list[tuple[int, bytes]]:
    history: list[tuple[int, bytes]] = []
    async with swarm(net, lambda number, payload: history.append((number, payload))) as nodes:
        for number in range(messages):
            await nodes[0].publish(TOPIC, b"%d" % number)
            await trio.sleep(0.01)
        await trio.sleep(10)
    return history


async def test_each_takes_a_message_once(clock: Clock) -> None:
    history = await gossip_history(network())
    assert sorted(history) == sorted((node, b"%d" % number) for node in (1, 2) for number in range(200))


async def test_gossip_can_be_lost(clock: Clock) -> None:
    history = await gossip_history(network(gossip_loss=0.5))
    assert 200 < len(history) < 360  # two paths to each: a quarter or so is lost


async def test_gossip_can_come_twice(clock: Clock) -> None:
    history = await gossip_history(network(gossip_duplicate=0.5))
    assert len(set(history)) == 400
    assert len(history) > 450


async def test_gossip_can_come_out_of_order(clock: Clock) -> None:
    history = [payload for node, payload in await gossip_history(network(gossip_reorder=0.3)) if node == 1]
    assert len(history) == 200
    assert history != sorted(history, key=int)


async def test_gossip_does_not_cross_a_partition(clock: Clock) -> None:
    net = network()
    history: list[int] = []
    async with swarm(net, lambda number, payload: history.append(number)) as nodes:
        net.partition(nodes[0].peer_id, nodes[1].peer_id)
        net.partition(nodes[2].peer_id, nodes[1].peer_id)
        await nodes[0].publish(TOPIC, b"x")
        await trio.sleep(60)
        assert history == [2]
        net.heal()
        await nodes[0].publish(TOPIC, b"y")
        await trio.sleep(60)
        assert sorted(history) == [1, 2, 2]
        assert nodes[0].statistics().drops == {"gossip_blocked": 1}


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_seed_replays_a_run(seed: int, clock: Clock) -> None:
    faults: dict[str, object] = {
        "gossip_loss": 0.2,
        "gossip_duplicate": 0.2,
        "gossip_reorder": 0.2,
        "gossip_delay_s": (0.0, 0.3),
    }
    first = await gossip_history(network(seed, **faults), messages=50)
    assert await gossip_history(network(seed, **faults), messages=50) == first
    assert await gossip_history(network(seed + 10, **faults), messages=50) != first
