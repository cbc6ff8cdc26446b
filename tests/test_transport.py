"""The one suite that every Transport passes: loopback on a mock clock, libp2p on real sockets of 127.0.0.1."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from crypto.identity import Identity, PeerId
from p2p.errors import LocalProtocolError, Refused, StreamClosed, Unreachable
from p2p.loopback import LoopbackNetwork
from p2p.loopback_wire import Faults
from p2p.transport import FRAME_BYTES_MAX, GOSSIP_BYTES_MAX, PeerChange, Stream, Transport

PROTOCOL = "/test/stream/1"
TOPIC = "test/topic"
HANG_S = 120.0  # a guard against hanging, not a measure

Clock = trio.abc.Clock | None
Opener = Callable[[Identity], AbstractAsyncContextManager[Transport]]


def loopback_opener() -> Opener:
    return LoopbackNetwork(random.Random(1)).join


def delayed_opener() -> Opener:
    return LoopbackNetwork(random.Random(1), Faults(stream_delay_s=(0.0, 0.05), gossip_delay_s=(0.0, 0.05))).join


def libp2p_opener() -> Opener:
    from p2p.host import open_host
    from p2p.host_config import HostConfig

    config = HostConfig(listen=("/ip4/127.0.0.1/tcp/0",), topics=frozenset({TOPIC}))
    return lambda identity: open_host(identity, config)


KINDS = {"loopback": loopback_opener, "delayed": delayed_opener, "libp2p": libp2p_opener}


@pytest.fixture(params=["loopback", "delayed", pytest.param("libp2p", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def clock(kind: str) -> Clock:
    """Time jumps over waits, but not where sockets are real. pytest-trio takes it only from a test's own arguments."""
    return None if kind == "libp2p" else trio.testing.MockClock(autojump_threshold=0)


@dataclass
class World:
    """Opens transports of one kind, all on one network, each in its own task until the test ends."""

    opener: Opener
    nursery: trio.Nursery

    async def transport(self, identity: Identity | None = None) -> Transport:
        transport: Transport = await self.nursery.start(self._keep, identity or Identity.make())
        return transport

    async def pair(self) -> tuple[Transport, Transport]:
        """(dialer, listener), connected and both aware of it."""
        left, right = await self.transport(), await self.transport()
        await left.dial(right.addresses()[0])
        await eventually(lambda: left.peer_id in right.peers())
        return left, right

    async def _keep(self, identity: Identity, *, task_status: trio.TaskStatus[Transport]) -> None:
        async with self.opener(identity) as transport:
            task_status.started(transport)
            await trio.sleep_forever()


async def _guard() -> None:
    await trio.sleep(HANG_S)
    raise AssertionError("the test hangs")


@pytest.fixture
async def world(kind: str, nursery: trio.Nursery) -> World:
    nursery.start_soon(_guard)
    return World(KINDS[kind](), nursery)


async def eventually(check: Callable[[], bool]) -> None:
    while not check():  # noqa: ASYNC110  # what is checked has no event
        await trio.sleep(0.005)


async def echo(stream: Stream) -> None:
    """Send back what comes, until the other side ends."""
    try:
        while True:
            await stream.send(await stream.receive())
    except StreamClosed:
        await stream.close()


@dataclass
class Sink:
    """A handler that keeps what came and how it ended, and then waits to be let go."""

    frames: list[bytes] = field(default_factory=list)
    end: list[str] = field(default_factory=list)
    over: trio.Event = field(default_factory=trio.Event)

    async def __call__(self, stream: Stream) -> None:
        try:
            while True:
                self.frames.append(await stream.receive())
        except (StreamClosed, Unreachable) as exc:
            self.end.append(type(exc).__name__)
        finally:
            self.over.set()


async def idle(stream: Stream) -> None:
    await trio.sleep_forever()


# -- connections ------------------------------------------------------------------------------------------------------


async def test_who_we_are_is_the_identity(world: World, clock: Clock) -> None:
    identity = Identity.make()
    transport = await world.transport(identity)
    assert transport.peer_id == identity.peer_id
    assert transport.addresses()
    for address in transport.addresses():
        assert address.endswith(f"/p2p/{identity.peer_id}")
        assert "/0.0.0.0/" not in address
    assert transport.peers() == frozenset()


async def test_a_dial_connects_both(world: World, clock: Clock) -> None:
    left, right = await world.transport(), await world.transport()
    assert await left.dial(right.addresses()[0]) == right.peer_id
    await eventually(lambda: left.peer_id in right.peers())
    assert left.peers() == {right.peer_id}
    assert right.peers() == {left.peer_id}
    assert left.remote_address(right.peer_id) == right.addresses()[0].removesuffix(f"/p2p/{right.peer_id}")
    seen_at = right.remote_address(left.peer_id)
    assert seen_at is not None
    assert seen_at.startswith("/ip4/127.0.0.1/tcp/")
    assert "/p2p/" not in seen_at
    assert left.statistics().peers == right.statistics().peers == 1


async def test_a_second_dial_does_nothing(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    changes: list[PeerChange] = []
    left.watch(changes.append)
    assert await left.dial(right.addresses()[0]) == right.peer_id
    assert await right.dial(left.addresses()[0]) == left.peer_id
    assert changes == []


async def test_watchers_hear_of_each_change(world: World, clock: Clock) -> None:
    left, right = await world.transport(), await world.transport()
    heard: dict[str, list[bool]] = {"left": [], "right": []}
    left.watch(lambda change: heard["left"].append(change.connected))
    right.watch(lambda change: heard["right"].append(change.connected))
    for _ in range(3):
        await left.dial(right.addresses()[0])
        await eventually(lambda: heard["left"][-1:] == heard["right"][-1:] == [True])
        await right.disconnect(left.peer_id)
        await eventually(lambda: heard["left"][-1:] == heard["right"][-1:] == [False])
        assert left.peers() == right.peers() == frozenset()
        assert left.remote_address(right.peer_id) is None
    assert heard["left"] == heard["right"] == [True, False] * 3
    await left.disconnect(right.peer_id)  # a no-op


async def test_both_may_dial_at_once(world: World, clock: Clock) -> None:
    left, right = await world.transport(), await world.transport()
    left.serve(PROTOCOL, echo)
    right.serve(PROTOCOL, echo)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(left.dial, right.addresses()[0])
        nursery.start_soon(right.dial, left.addresses()[0])
    await eventually(lambda: bool(left.peers() and right.peers()))
    for here, there in ((left, right), (right, left)):
        stream = await here.open_stream(there.peer_id, PROTOCOL)
        await stream.send(b"x")
        assert await stream.receive() == b"x"
        await stream.close()


async def test_what_cannot_be_dialled_is_said(world: World, clock: Clock) -> None:
    left, right = await world.transport(), await world.transport()
    other = Identity.make().peer_id
    bare = right.addresses()[0].rpartition("/p2p/")[0]
    for address in (f"/ip4/127.0.0.1/tcp/9/p2p/{other}", f"{bare}/p2p/{other}"):
        with pytest.raises(Unreachable):
            await left.dial(address)
    with pytest.raises(Refused):
        await left.dial(left.addresses()[0])
    assert left.peers() == frozenset()
    assert await left.dial(right.addresses()[0]) == right.peer_id  # what failed before is no obstacle


async def test_a_peer_that_leaves_is_gone(world: World, clock: Clock) -> None:
    left = await world.transport()
    sink = Sink()
    left.serve(PROTOCOL, sink)
    async with world.opener(Identity.make()) as right:
        await right.dial(left.addresses()[0])
        stream = await right.open_stream(left.peer_id, PROTOCOL)
        await stream.send(b"last words")
        await eventually(lambda: sink.frames == [b"last words"])
    await sink.over.wait()
    assert sink.end == ["Unreachable"]
    await eventually(lambda: not left.peers())
    with pytest.raises(Unreachable):
        await left.open_stream(right.peer_id, PROTOCOL)


# -- streams ----------------------------------------------------------------------------------------------------------


async def test_frames_arrive_whole_and_in_order(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    right.serve(PROTOCOL, echo)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    assert stream.peer == right.peer_id
    for size in (0, 1, 2, 100, 65_503, 65_504, 65_524, 65_536, 300_000, FRAME_BYTES_MAX):
        frame = random.Random(size).randbytes(size)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send, frame)
            assert await stream.receive() == frame
    numbers = [b"%d" % number for number in range(300)]

    async def send_all() -> None:
        for number in numbers:
            await stream.send(number)
        await stream.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all)
        assert [await stream.receive() for _ in numbers] == numbers
    with pytest.raises(StreamClosed):
        await stream.receive()


async def test_a_frame_over_the_bound_is_not_sent(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    right.serve(PROTOCOL, echo)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    with pytest.raises(LocalProtocolError):
        await stream.send(bytes(FRAME_BYTES_MAX + 1))
    await stream.send(b"still whole")
    assert await stream.receive() == b"still whole"


async def test_the_handler_knows_its_peer(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    peers: list[PeerId] = []

    async def note(stream: Stream) -> None:
        peers.append(stream.peer)
        await stream.send(b"noted")

    right.serve(PROTOCOL, note)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    assert await stream.receive() == b"noted"
    with pytest.raises(StreamClosed):  # the handler returned
        await stream.receive()
    assert peers == [left.peer_id]


async def test_streams_go_both_ways_over_one_connection(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    left.serve(PROTOCOL, echo)
    right.serve(PROTOCOL, echo)
    for here, there in ((left, right), (right, left)):
        stream = await here.open_stream(there.peer_id, PROTOCOL)
        await stream.send(b"x")
        assert await stream.receive() == b"x"
        await stream.close()


async def test_what_was_sent_before_a_close_arrives(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    sink = Sink()
    right.serve(PROTOCOL, sink)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    frames = [bytes(10_000) for _ in range(15)]
    for frame in frames:
        await stream.send(frame)
    await stream.close()
    await sink.over.wait()
    assert sink.frames == frames
    assert sink.end == ["StreamClosed"]
    with pytest.raises(LocalProtocolError):
        await stream.send(b"after the end")


async def test_after_a_close_the_other_side_may_go_on(world: World, clock: Clock) -> None:
    left, right = await world.pair()

    async def answer_at_the_end(stream: Stream) -> None:
        total = 0
        try:
            while True:
                total += len(await stream.receive())
        except StreamClosed:
            await stream.send(b"%d" % total)
            await stream.close()

    right.serve(PROTOCOL, answer_at_the_end)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    await stream.send(b"12345")
    await stream.close()
    assert await stream.receive() == b"5"
    with pytest.raises(StreamClosed):
        await stream.receive()


async def test_a_reset_ends_both_sides(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    sink = Sink()
    right.serve(PROTOCOL, sink)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    await stream.send(b"one")
    await eventually(lambda: sink.frames == [b"one"])
    await stream.reset()
    await stream.reset()  # again: nothing
    await sink.over.wait()
    assert sink.end == ["Unreachable"]
    with pytest.raises(Unreachable):
        await stream.receive()


async def test_a_reset_by_the_handler_is_seen(world: World, clock: Clock) -> None:
    left, right = await world.pair()

    async def reset(stream: Stream) -> None:
        await stream.receive()
        await stream.reset()

    right.serve(PROTOCOL, reset)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    await stream.send(b"one")
    with pytest.raises(Unreachable):
        await stream.receive()


async def test_a_failing_handler_resets_its_stream_and_no_more(world: World, clock: Clock) -> None:
    left, right = await world.pair()

    async def fail(stream: Stream) -> None:
        await stream.receive()
        raise ValueError("a bug in a handler")

    async def fail_in_a_group(stream: Stream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await fail(stream)

    right.serve("/test/fail/1", fail)
    right.serve("/test/group/1", fail_in_a_group)
    right.serve(PROTOCOL, echo)
    good = await left.open_stream(right.peer_id, PROTOCOL)
    for protocol in ("/test/fail/1", "/test/group/1"):
        bad = await left.open_stream(right.peer_id, protocol)
        await bad.send(b"x")
        with pytest.raises(Unreachable):
            await bad.receive()
    await good.send(b"lives")
    assert await good.receive() == b"lives"
    assert right.statistics().drops["handler_failed"] == 2


async def test_what_the_peer_does_not_serve_is_refused(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    with pytest.raises(Refused):
        await left.open_stream(right.peer_id, PROTOCOL)
    with pytest.raises(Unreachable):
        await left.open_stream(Identity.make().peer_id, PROTOCOL)
    right.serve(PROTOCOL, echo)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    await stream.send(b"x")
    assert await stream.receive() == b"x"


async def test_a_disconnect_breaks_streams(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    sink = Sink()
    right.serve(PROTOCOL, sink)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    await stream.send(b"x")
    await eventually(lambda: bool(sink.frames))
    await left.disconnect(right.peer_id)
    await sink.over.wait()
    assert sink.end == ["Unreachable"]
    with pytest.raises(Unreachable):
        await stream.receive()
    with pytest.raises((Unreachable, LocalProtocolError)):
        await stream.send(b"y")


async def test_a_slow_reader_holds_the_sender_until_it_reads(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    gate = trio.Event()
    sink = Sink()
    sent = 0

    async def slow(stream: Stream) -> None:
        await gate.wait()
        await sink(stream)

    async def send_all(stream: Stream) -> None:
        nonlocal sent
        for _ in range(100):
            await stream.send(bytes(100_000))
            sent += 1
        await stream.close()

    right.serve(PROTOCOL, slow)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send_all, stream)
        await trio.sleep(0.5)
        held_at = sent
        await trio.sleep(0.2)
        assert sent == held_at < 50
        gate.set()
    await sink.over.wait()
    assert len(sink.frames) == sent == 100
    assert sink.end == ["StreamClosed"]


async def test_a_cancelled_receive_loses_nothing(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    right.serve(PROTOCOL, echo)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    for number in range(30):
        with trio.move_on_after(0.001):
            await stream.receive()
            pytest.fail("nothing was sent")
        await stream.send(b"%d" % number)
        assert await stream.receive() == b"%d" % number


async def test_a_cancelled_send_spoils_no_other_stream(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    right.serve("/test/idle/1", idle)
    right.serve(PROTOCOL, echo)
    good = await left.open_stream(right.peer_id, PROTOCOL)
    for number in range(10):
        stuck = await left.open_stream(right.peer_id, "/test/idle/1")
        with trio.move_on_after(0.02):
            while True:
                await stuck.send(bytes(200_000))
        with pytest.raises((Unreachable, LocalProtocolError)):  # not whole, so it was reset
            await stuck.send(b"x")
        await good.send(b"%d" % number)
        assert await good.receive() == b"%d" % number


async def test_many_streams_at_once(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    right.serve(PROTOCOL, echo)
    before = left.statistics().streams_open
    done: list[int] = []

    async def one(number: int) -> None:
        stream = await left.open_stream(right.peer_id, PROTOCOL)
        for _ in range(3):
            await stream.send(b"%d" % number)
            assert await stream.receive() == b"%d" % number
        await stream.close()
        with pytest.raises(StreamClosed):
            await stream.receive()
        done.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(one, number)
    assert sorted(done) == list(range(50))
    await eventually(lambda: left.statistics().streams_open == before)
    await eventually(lambda: right.statistics().streams_open == 0)


async def test_statistics_count_frames_and_bytes(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    right.serve(PROTOCOL, echo)
    stream = await left.open_stream(right.peer_id, PROTOCOL)
    for _ in range(5):
        await stream.send(b"12345678")
        await stream.receive()
    await eventually(lambda: right.statistics().frames_out == 5)
    for transport in (left, right):
        statistics = transport.statistics()
        assert (statistics.frames_in, statistics.frames_out) == (5, 5)
        assert 40 <= statistics.bytes_in <= 80  # with or without the length before each frame
        assert 40 <= statistics.bytes_out <= 80
        assert statistics.streams_open == 1


# -- gossip -----------------------------------------------------------------------------------------------------------


@dataclass
class Ear:
    """A receiver that keeps what it hears."""

    heard: list[tuple[PeerId, bytes]] = field(default_factory=list)
    verdict: bool = True

    def __call__(self, peer: PeerId, payload: bytes) -> bool:
        self.heard.append((peer, payload))
        return self.verdict


async def publish_until(publisher: Transport, payload: bytes, check: Callable[[], bool]) -> None:
    """Publish distinct messages until one is heard: a mesh takes a moment to form."""
    number = 0
    while not check():
        await publisher.publish(TOPIC, payload + b"%d" % number)
        number += 1
        await trio.sleep(0.1)


async def test_gossip_reaches_subscribers_and_not_its_publisher(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    ears = {transport.peer_id: Ear() for transport in (left, right)}
    for transport in (left, right):
        await transport.subscribe(TOPIC, ears[transport.peer_id])
    await publish_until(left, b"hello", lambda: bool(ears[right.peer_id].heard))
    peer, payload = ears[right.peer_id].heard[0]
    assert peer == left.peer_id
    assert payload.startswith(b"hello")
    assert ears[left.peer_id].heard == []


async def test_the_mesh_is_counted(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    for node in (left, right):
        await node.subscribe(TOPIC, Ear())
    await eventually(lambda: left.statistics().mesh_peers == right.statistics().mesh_peers == 1)
    await left.disconnect(right.peer_id)
    await eventually(lambda: left.statistics().mesh_peers == right.statistics().mesh_peers == 0)


async def test_gossip_is_passed_on_with_its_first_senders_name(world: World, clock: Clock) -> None:
    nodes = [await world.transport() for _ in range(3)]
    ears = [Ear() for _ in nodes]
    for node, ear in zip(nodes, ears, strict=True):
        await node.subscribe(TOPIC, ear)
    await nodes[0].dial(nodes[1].addresses()[0])
    await nodes[1].dial(nodes[2].addresses()[0])
    await publish_until(nodes[0], b"far", lambda: bool(ears[2].heard))
    assert {peer for peer, _ in ears[2].heard} == {nodes[0].peer_id}


async def test_gossip_judged_worthless_goes_no_further(world: World, clock: Clock) -> None:
    nodes = [await world.transport() for _ in range(3)]
    ears = [Ear(), Ear(verdict=False), Ear()]
    for node, ear in zip(nodes, ears, strict=True):
        await node.subscribe(TOPIC, ear)
    await nodes[0].dial(nodes[1].addresses()[0])
    await nodes[1].dial(nodes[2].addresses()[0])
    await publish_until(nodes[1], b"own", lambda: bool(ears[2].heard))  # the mesh is there
    await publish_until(nodes[0], b"bad", lambda: len(ears[1].heard) >= 3)
    await trio.sleep(0.5)
    assert {peer for peer, _ in ears[2].heard} == {nodes[1].peer_id}


async def test_gossip_over_its_bound_is_our_own_fault(world: World, clock: Clock) -> None:
    left, right = await world.pair()
    ear = Ear()
    await left.subscribe(TOPIC, Ear())
    await right.subscribe(TOPIC, ear)
    with pytest.raises(LocalProtocolError):
        await left.publish(TOPIC, bytes(GOSSIP_BYTES_MAX + 1))
    await publish_until(left, bytes(GOSSIP_BYTES_MAX - 8), lambda: bool(ear.heard))
