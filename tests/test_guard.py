"""p2p/guard*.py: each workaround, with a test that is red without it."""

from __future__ import annotations

import logging
import random
import struct
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import libp2p.network.connection.swarm_connection
import libp2p.utils
import libp2p.utils.varint
import pytest
import trio
import trio.testing
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError, ParseError
from libp2p.io.exceptions import ConnectionClosedError, IncompleteReadError, MessageTooLarge
from libp2p.network.stream.exceptions import StreamError
from libp2p.peer.id import ID
from libp2p.pubsub.pb import rpc_pb2
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_DATA, YAMUX_HEADER_FORMAT
from libp2p.utils import encode_varint_prefixed
from multiaddr import Multiaddr

from crypto.identity import Identity, PeerId
from p2p import guard
from p2p.errors import StreamClosed, Unreachable
from p2p.guard import Drops, guarded_stream_handler
from p2p.guard_mux import STREAM_BYTES_MAX
from p2p.guard_socket import WRITE_STALL_S, GuardedSocket
from p2p.guard_store import ADDRESSES_MAX, PROTOCOLS_MAX, GuardedPeerStore
from p2p.guard_swarm import _PING
from p2p.transport import FRAME_BYTES_MAX, Stream
from tests.libp2p_peers import TOPIC, bare_connection, node, raw_socket, stranger, until

slow = pytest.mark.slow
RPC = "/openagi/rpc/1"
THEIRS = ("/meshsub/1.1.0", "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0")


async def echo(stream: Stream) -> None:
    try:
        while True:
            await stream.send(await stream.receive())
    except (StreamClosed, Unreachable):
        pass


# ---- exceptions ----


@slow
async def test_a_handler_that_raises_ends_its_stream_only() -> None:
    async with node() as alice, node() as bob:

        async def fail(stream: Stream) -> None:
            await stream.receive()
            raise ValueError("a bug")

        bob.serve("/openagi/bad/1", fail)
        bob.serve(RPC, echo)
        peer = await alice.dial(bob.addresses()[0])
        good = await alice.open_stream(peer, RPC)
        for _ in range(3):
            bad = await alice.open_stream(peer, "/openagi/bad/1")
            await bad.send(b"x")
            with pytest.raises(Unreachable):
                await bad.receive()
        await good.send(b"still here")
        assert await good.receive() == b"still here"
        assert bob.statistics().drops == {"handler_failed": 3}
        assert bob.statistics().streams_open == 1


@slow
@pytest.mark.parametrize("protocol", ["/meshsub/1.1.0", "/ipfs/id/push/1.0.0", "/ipfs/ping/1.0.0", RPC])
async def test_random_frames_end_their_stream_only(protocol: str) -> None:
    chance = random.Random(7)
    async with node() as bob:
        bob.serve(RPC, echo)
        await bob.subscribe(TOPIC, lambda peer, payload: True)
        async with stranger(bob) as eve:
            for _ in range(20):
                stream = await eve.stream(protocol)
                await stream.write(encode_varint_prefixed(chance.randbytes(64)))
                await stream.close_write()
            assert await eve.alive()


@slow
async def test_a_published_message_that_does_not_decode_is_contained() -> None:
    async with node() as bob:
        await bob.subscribe(TOPIC, lambda peer, payload: True)
        async with stranger(bob) as eve:
            message = rpc_pb2.Message(
                data=b"x",
                topicIDs=[TOPIC],
                from_id=b"\x12\x20" + bytes(32),
                seqno=b"1",
                key=b"\xff" * 9,
                signature=b"s",
            )
            stream = await eve.stream("/meshsub/1.1.0")
            await stream.write(encode_varint_prefixed(rpc_pb2.RPC(publish=[message]).SerializeToString()))
            await until(lambda: bob.statistics().drops.get("task_failed"))
            assert await eve.alive()


@slow
async def test_a_gossip_stream_that_failed_is_tried_again() -> None:
    async with node() as alice, node() as bob:
        handlers = bob._host.multiselect.handlers
        kept = handlers.pop(TProtocol("/meshsub/1.1.0"))
        for one in (alice, bob):
            await one.subscribe(TOPIC, lambda peer, payload: True)
        await alice.dial(bob.addresses()[0])
        await until(bob.peers)
        await trio.sleep(1.0)  # both have tried, and alice failed
        handlers[TProtocol("/meshsub/1.1.0")] = kept
        await until(lambda: alice.statistics().mesh_peers == bob.statistics().mesh_peers == 1)


@slow
async def test_gossip_goes_on_after_its_stream_broke() -> None:
    heard: list[bytes] = []
    async with node() as alice, node() as bob:
        for one in (alice, bob):
            await one.subscribe(TOPIC, lambda peer, payload: heard.append(payload) or True)  # type: ignore[func-returns-value]  # a list
        await alice.dial(bob.addresses()[0])
        await until(lambda: alice.statistics().mesh_peers == bob.statistics().mesh_peers == 1)
        peers = alice._pubsub.peers
        broken = peers[ID.from_base58(bob.peer_id)]
        await broken.reset()
        await alice.publish(TOPIC, b"lost")
        await until(lambda: peers.get(ID.from_base58(bob.peer_id)) not in (None, broken))
        await until(lambda: alice.statistics().mesh_peers == 1)
        await alice.publish(TOPIC, b"after")
        await until(lambda: b"after" in heard)


@slow
async def test_a_gossip_receiver_that_raises_is_contained() -> None:
    async with node() as alice, node() as bob:

        def fail(peer: str, payload: bytes) -> bool:
            raise ValueError("a bug")

        await alice.subscribe(TOPIC, lambda peer, payload: True)
        await bob.subscribe(TOPIC, fail)
        await alice.dial(bob.addresses()[0])
        await trio.sleep(1.5)
        await alice.publish(TOPIC, b"x")
        await until(lambda: bob.statistics().drops.get("task_failed"))
        await bob.dial(alice.addresses()[0])
        assert bob.peers() == {alice.peer_id}


async def test_a_background_loop_that_fails_starts_again(autojump_clock: trio.testing.MockClock) -> None:
    runs: list[float] = []

    class Manager:
        is_running = False

        def run_daemon_task(self, run: Any, *args: object, name: str) -> None:
            nursery.start_soon(run, *args)

    async def beat() -> None:
        runs.append(trio.current_time())
        if len(runs) < 3:
            raise ValueError("a bug")

    drops = Drops()
    async with trio.open_nursery() as nursery:
        guard.ContainedTasks(Manager(), drops).run_daemon_task(beat)
    assert len(runs) == 3
    assert drops.counts == {"daemon_failed": 2}


async def test_the_handler_guard_resets_and_shares_streams_out() -> None:
    class Net:
        def __init__(self) -> None:
            self.resets = 0
            self.muxed_conn = SimpleNamespace(peer_id="eve")

        async def reset(self) -> None:
            self.resets += 1
            raise ConnectionClosedError("gone")

    drops, release = Drops(), trio.Event()

    async def inner(net: Net) -> None:
        await release.wait()
        raise ExceptionGroup("several", [ValueError("a"), OSError("b")])

    handle = guarded_stream_handler(inner, drops, 2)
    nets = [Net() for _ in range(4)]
    async with trio.open_nursery() as nursery:
        for net in nets:
            nursery.start_soon(handle, net)
        await trio.testing.wait_all_tasks_blocked()
        assert sum(net.resets for net in nets) == 2
        release.set()
    assert [net.resets for net in nets] == [1, 1, 1, 1]
    assert drops.counts == {"streams_per_peer": 2, "handler_failed": 2, "reset_failed": 4}


@slow
async def test_a_watcher_that_raises_ends_the_host() -> None:
    def fail(change: object) -> None:
        raise ZeroDivisionError("our own bug")

    with pytest.raises(ExceptionGroup) as caught:  # noqa: PT012
        async with node() as alice, node() as bob:
            bob.watch(fail)
            await alice.dial(bob.addresses()[0])
            await trio.sleep(5)
    assert caught.group_contains(ZeroDivisionError)


# ---- reads ----


class Pieces:
    """A reader that gives a byte at a time and then its end."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.asked_max = raw, 0

    async def read(self, n: int) -> bytes:
        self.asked_max = max(self.asked_max, n)
        piece, self.raw = self.raw[:1], self.raw[1:]
        return piece


@pytest.mark.parametrize("holder", guard._READ_EXACTLY_HOLDERS, ids=lambda holder: str(holder.__name__))
async def test_reads_take_as_many_pieces_as_it_takes(holder: Any) -> None:
    guard.install()
    assert await holder.read_exactly(Pieces(bytes(range(256)) * 2), 500) == (bytes(range(256)) * 2)[:500]
    with pytest.raises(IncompleteReadError) as caught:
        await holder.read_exactly(Pieces(b"abc"), 4)
    assert (caught.value.expected_bytes, caught.value.received_bytes) == (4, 3)
    assert not caught.value.is_clean_close


@pytest.mark.parametrize("holder", guard._READ_DELIM_HOLDERS, ids=lambda holder: str(holder.__name__))
async def test_negotiation_lines_are_bounded(holder: Any) -> None:
    guard.install()
    assert await holder.read_delim(Pieces(libp2p.utils.encode_delim(b"/noise"))) == b"/noise"
    for claim in (1025, 1 << 30, 1 << 40, 1 << 63):
        reader = Pieces(libp2p.utils.varint.encode_uvarint(claim) + b"x" * 2000)
        with pytest.raises(MessageTooLarge):
            await holder.read_delim(reader)
        assert reader.asked_max == 1
    for bad in (b"\x00", b"\x03abc", b"\xff" * 11):
        with pytest.raises(ParseError):
            await holder.read_delim(Pieces(bad))


@slow
async def test_an_unauthenticated_length_closes_the_connection_at_once() -> None:
    async with node(upgrade_s=60.0) as bob:
        with trio.fail_after(10):
            async with await raw_socket(bob) as stream:
                await stream.send_all(libp2p.utils.varint.encode_uvarint(1 << 40) + b"x" * 100)
                try:
                    while await stream.receive_some():
                        pass
                except trio.BrokenResourceError:
                    pass  # closed with our bytes unread: the system says reset


async def test_a_socket_reads_what_was_asked_and_loses_nothing_when_cancelled() -> None:
    ours, theirs = await connected_sockets()
    socket = GuardedSocket(ours, Drops())
    with trio.move_on_after(0.05):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(socket.read, 6)
            await theirs.send_all(b"abcd")
    await theirs.send_all(b"efgh")
    assert await socket.read(6) == b"abcdef"
    await theirs.send_all(b"i")
    await theirs.aclose()
    assert await socket.read(1) == b"g"
    assert await socket.read(100) == b"hi"
    assert await socket.read(1) == b""
    assert socket.bytes_in == 9
    await socket.close()


# ---- writes ----


async def connected_sockets() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    ours = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
    theirs = await listener.accept()
    await listener.aclose()
    return ours, theirs


async def test_a_write_is_whole_although_cancelled() -> None:
    ours, theirs = await connected_sockets()
    socket, size = GuardedSocket(ours, Drops()), 8 << 20
    got = 0

    async def drain() -> None:
        nonlocal got
        while got < size:
            got += len(await theirs.receive_some(1 << 20))

    with trio.move_on_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            with trio.CancelScope() as scope:
                scope.cancel()
                await socket.write(bytes(size))
    assert got == socket.bytes_out == size
    await socket.close()
    await theirs.aclose()


async def test_a_peer_that_takes_nothing_loses_the_connection(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = await connected_sockets()
    drops = Drops()
    socket = GuardedSocket(ours, drops)
    started = trio.current_time()
    with pytest.raises(ConnectionClosedError, match="took too little"):
        await socket.write(bytes(64 << 20))
    assert trio.current_time() - started == pytest.approx(WRITE_STALL_S)
    assert drops.counts == {"write_stalled": 1}
    with pytest.raises(ConnectionClosedError):
        await socket.write(b"x")
    await theirs.aclose()


@slow
async def test_cancelled_sends_leave_the_connection_whole() -> None:
    chance = random.Random(3)
    async with node() as alice, node() as bob:

        async def take(stream: Stream) -> None:
            try:
                while True:
                    assert len(await stream.receive()) == FRAME_BYTES_MAX
            except (StreamClosed, Unreachable):
                pass

        bob.serve("/openagi/blob/1", take)
        bob.serve(RPC, echo)
        peer = await alice.dial(bob.addresses()[0])
        sibling = await alice.open_stream(peer, RPC)
        cut = 0
        with trio.fail_after(60):
            for number in range(30):
                stream = await alice.open_stream(peer, "/openagi/blob/1")
                with trio.move_on_after(chance.random() * 0.02) as scope:
                    for _ in range(8):
                        await stream.send(bytes(FRAME_BYTES_MAX))
                cut += scope.cancelled_caught
                await stream.reset()
                await sibling.send(b"%d" % number)
                assert await sibling.receive() == b"%d" % number
        assert cut > 3
        assert alice.peers() == {peer}
        assert "handler_failed" not in bob.statistics().drops


@slow
async def test_a_cut_frame_resets_its_stream() -> None:
    async with node() as alice, node() as bob:
        ends: list[Exception] = []

        async def late(stream: Stream) -> None:
            await started.wait()
            try:
                while True:
                    await stream.receive()
            except (StreamClosed, Unreachable) as exc:
                ends.append(exc)

        started = trio.Event()
        bob.serve(RPC, late)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
        with trio.move_on_after(0.3) as scope:
            for _ in range(4):  # the window holds a quarter of one to two: one of them waits for the reader
                await stream.send(bytes(FRAME_BYTES_MAX))
        assert scope.cancelled_caught
        started.set()
        await until(lambda: ends)
        assert isinstance(ends[0], Unreachable)


@slow
async def test_a_reader_that_stalls_for_long_does_not_lose_the_stream() -> None:
    async with node() as alice, node() as bob:
        got: list[int] = []

        async def stall(stream: Stream) -> None:
            await trio.sleep(6)  # libp2p's own writer gives up after 5
            got.append(len(await stream.receive()))

        bob.serve(RPC, stall)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
        await stream.send(bytes(FRAME_BYTES_MAX))
        await until(lambda: got)
        assert got == [FRAME_BYTES_MAX]


@slow
async def test_reading_small_frames_sends_nothing_back() -> None:
    async with node(health_interval_s=60.0) as alice, node(health_interval_s=60.0) as bob:
        got: list[bytes] = []

        async def collect(stream: Stream) -> None:
            while True:
                got.append(await stream.receive())

        bob.serve(RPC, collect)
        stream = await alice.open_stream(await alice.dial(bob.addresses()[0]), RPC)
        await trio.sleep(2)  # identify and gossip have said their first words
        (conn,) = bob._swarm.get_connections()
        socket = conn.muxed_conn.secured_conn.conn.read_writer.read_write_closer.stream
        before = socket.bytes_out
        for number in range(50):
            await stream.send(b"%d" % number)
        await until(lambda: len(got) == 50)
        assert socket.bytes_out - before < 50 * 20  # a window update each would be 30 bytes each


@slow
async def test_reading_gossip_sends_nothing_back() -> None:
    async with node(health_interval_s=60.0) as alice, node(health_interval_s=60.0) as bob:
        got: list[bytes] = []

        def receive(_peer: PeerId, raw: bytes) -> bool:
            got.append(raw)
            return True

        await alice.subscribe(TOPIC, lambda _peer, _raw: True)
        await bob.subscribe(TOPIC, receive)
        await alice.dial(bob.addresses()[0])
        await trio.sleep(3)  # identify and the mesh
        (conn,) = bob._swarm.get_connections()
        socket = conn.muxed_conn.secured_conn.conn.read_writer.read_write_closer.stream
        before = socket.bytes_out
        for number in range(1, 51):
            await alice.publish(TOPIC, b"%d" % number)
            await until(lambda wanted=number: len(got) == wanted)
        assert socket.bytes_out - before < 50 * 20  # two window updates each would be 60 bytes each


# ---- connections ----


@slow
async def test_a_closed_inbound_connection_gives_its_place_back() -> None:
    async with node(connections_max=8, inbound_max=8, places_kept=0) as bob:
        for _ in range(40):
            async with bare_connection(bob):
                pass
            await until(lambda: not bob._swarm.get_connections())
        await until(lambda: not bob._swarm._scopes)


@slow
async def test_320_inbound_connections_one_after_the_other_are_all_served() -> None:
    async with node() as bob:
        for number in range(320):
            async with bare_connection(bob) as muxed:
                assert muxed.peer_id == ID.from_base58(bob.peer_id), number
        await until(lambda: not bob._swarm.get_connections(), 30)
        assert bob.statistics().drops == {}
        async with node() as alice:
            await alice.dial(bob.addresses()[0])


@slow
async def test_silent_sockets_do_not_keep_an_honest_peer_out() -> None:
    async with node(upgrade_s=60.0, pending_max=8) as bob, node() as alice, trio.open_nursery() as nursery:
        closed = 0

        async def sit() -> None:
            nonlocal closed
            async with await raw_socket(bob) as stream:
                while await stream.receive_some():
                    pass
                closed += 1

        for _ in range(40):
            nursery.start_soon(sit)
        await until(lambda: bob.statistics().drops.get("pending_yielded", 0) == closed == 32)
        with trio.fail_after(10):
            await alice.dial(bob.addresses()[0])
        nursery.cancel_scope.cancel()


@slow
async def test_one_address_has_few_unfinished_connections() -> None:
    async with node(upgrade_s=60.0, pending_loopback_max=4) as bob, trio.open_nursery() as nursery:

        async def sit() -> None:
            async with await raw_socket(bob):
                await trio.sleep_forever()

        for _ in range(10):
            nursery.start_soon(sit)
        await until(lambda: bob.statistics().drops.get("pending_per_ip") == 6)
        nursery.cancel_scope.cancel()


@slow
async def test_strangers_hold_neither_the_kept_places_nor_those_of_our_own_dials() -> None:
    async with (
        node(connections_max=3, inbound_max=2, places_kept=1) as bob,
        node() as friend,
        node() as other,
        node() as far,
    ):
        bob.keep_places_for({friend.peer_id, other.peer_id}.__contains__)
        async with bare_connection(bob) as first:
            await until(lambda: len(bob.peers()) == 1)
            async with bare_connection(bob):
                await until(lambda: bob.statistics().drops.get("no_place") == 1)
            await friend.dial(bob.addresses()[0])
            await other.dial(bob.addresses()[0])
            await until(lambda: bob.statistics().drops.get("place_yielded") == 1)
            with trio.fail_after(10):
                try:
                    while await first.secured_conn.read(100):
                        pass
                except BaseLibp2pError:
                    pass  # the stranger was sent away
            await until(lambda: bob.peers() == {friend.peer_id, other.peer_id})
            assert await bob.dial(far.addresses()[0]) == far.peer_id
            await until(lambda: bob.peers() == {friend.peer_id, other.peer_id, far.peer_id})


@slow
async def test_an_unfinished_handshake_ends_in_time() -> None:
    async with node(upgrade_s=0.5) as bob, await raw_socket(bob) as stream:
        with trio.fail_after(10):
            try:
                while await stream.receive_some():
                    pass
            except trio.BrokenResourceError:
                pass
        await until(lambda: not bob._swarm._scopes)


@slow
async def test_a_failed_dial_does_not_block_the_next() -> None:
    identity = Identity.make()
    async with node() as alice:
        async with node(identity) as bob:
            address = bob.addresses()[0]
        with pytest.raises(Unreachable):
            await alice.dial(address)
        async with node(identity, listen=(address.partition("/p2p/")[0],)):
            assert await alice.dial(address) == identity.peer_id


@slow
async def test_the_address_that_was_asked_is_dialled() -> None:
    async with node() as alice, node() as bob:
        port = await closed_port()
        with pytest.raises(Unreachable):
            await alice.dial(f"/ip4/127.0.0.1/tcp/{port}/p2p/{bob.peer_id}")
        for _ in range(3):
            await alice.dial(bob.addresses()[0])
            await alice.disconnect(bob.peer_id)


async def closed_port() -> int:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    await listener.aclose()
    return int(listener.socket.getsockname()[1]) if listener.socket.fileno() >= 0 else 1


@slow
async def test_dials_do_not_wait_for_other_addresses() -> None:
    async with node() as alice, node() as bob:
        started = trio.current_time()
        for _ in range(40):
            await alice.dial(bob.addresses()[0])
            for conn in alice._swarm.get_connections():
                await conn.muxed_conn.secured_conn.close()
            await until(lambda: not alice.peers())
        assert trio.current_time() - started < 40 * 0.45  # 0.1 s are libp2p's pause in closing, 0.25 s would be added


@slow
async def test_nobody_is_dialled_but_by_us() -> None:
    async with node() as alice, node() as bob:
        await alice.dial(bob.addresses()[0])
        alice._host.get_peerstore().add_addrs(ID.from_base58(bob.peer_id), [Multiaddr(bob.addresses()[0])], 600)
        await alice.disconnect(bob.peer_id)
        alice._host.get_peerstore().add_addrs(ID.from_base58(bob.peer_id), [Multiaddr(bob.addresses()[0])], 600)
        with pytest.raises(Unreachable):
            await alice.open_stream(bob.peer_id, RPC)
        with pytest.raises(Exception, match="not connected"):
            await alice._swarm.new_stream(ID.from_base58(bob.peer_id))
        await alice._swarm.auto_connector.maybe_connect()
        alice._swarm._schedule_auto_connect()
        await trio.sleep(0.5)
        assert alice.peers() == bob.peers() == frozenset()


@slow
async def test_a_silent_peer_is_dropped_and_an_idle_one_is_not() -> None:
    async with node(health_interval_s=0.3) as bob, node() as alice, bare_connection(bob):
        await alice.dial(bob.addresses()[0])
        await until(lambda: len(bob.peers()) == 2)
        await until(lambda: len(bob.peers()) == 1, 20)
        await trio.sleep(2)
        assert bob.peers() == {alice.peer_id}
        assert bob.statistics().drops["peer_silent"] == 1


@slow
async def test_who_speaks_is_not_pinged() -> None:
    async with node(health_interval_s=0.5) as bob, node(health_interval_s=60.0) as alice:
        bob.serve(RPC, echo)
        peer = await alice.dial(bob.addresses()[0])
        await until(bob.peers)
        (conn,) = bob._swarm.get_connections()
        pings: list[float] = []
        write_frame = conn.muxed_conn._write_frame

        async def counting(frame: bytes) -> None:
            if frame == _PING:
                pings.append(trio.current_time())
            await write_frame(frame)

        conn.muxed_conn._write_frame = counting
        stream = await alice.open_stream(peer, RPC)
        for _ in range(20):
            await stream.send(b"a word")
            await stream.receive()
            await trio.sleep(0.1)
        assert pings == []
        await stream.close()
        await until(lambda: pings)  # and who is silent is


@slow
async def test_disconnecting_a_peer_that_takes_nothing_is_bounded() -> None:
    async with node(health_interval_s=60.0) as bob, bare_connection(bob):
        await until(bob.peers)
        (peer,) = bob.peers()
        (conn,) = bob._swarm.get_connections()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bob._drops.contain, "stuck", conn.muxed_conn._write_frame, bytes(64 << 20))
            await trio.sleep(0.2)
            with trio.fail_after(15):
                await bob.disconnect(peer)
        assert bob.peers() == frozenset()
        assert bob.statistics().drops == {"stuck": 1}  # the socket was closed before its write stalled


@slow
async def test_a_peer_past_its_window_is_dropped() -> None:
    async with node() as bob, bare_connection(bob) as muxed:
        bob.serve(RPC, hang)
        secured = muxed.secured_conn
        lines = b"".join(map(libp2p.utils.encode_delim, (b"/multistream/1.0.0", RPC.encode())))
        await secured.write(struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, FLAG_SYN, 1, len(lines)) + lines)
        frame = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, 1, 60_000) + bytes(60_000)
        sent = 0
        with trio.fail_after(30):
            try:
                while bob.statistics().drops.get("window_exceeded", 0) == 0:
                    await secured.write(frame)
                    sent += len(frame)
            except ConnectionClosedError:
                pass
        await until(lambda: not bob.peers())
        assert bob.statistics().drops["window_exceeded"] == 1
        assert sent < STREAM_BYTES_MAX + (16 << 20)  # and what the system's buffers hold


async def hang(stream: Stream) -> None:
    await trio.sleep_forever()


@slow
async def test_a_peer_has_a_share_of_streams() -> None:
    async with node(streams_per_peer_max=5) as bob:
        bob.serve(RPC, hang)
        async with stranger(bob) as eve:
            for _ in range(12):
                stream = await eve.host.get_network().new_stream(eve.peer)
                await stream.write(b"\x13/multistream/1.0.0\n")
            await until(lambda: bob.statistics().drops.get("streams_per_peer", 0) >= 7)


@slow
@pytest.mark.parametrize(
    "protocol", ["/meshsub/1.1.0", "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0", "/ipfs/id/push/1.0.0", RPC]
)
async def test_a_stream_that_the_peer_ends_is_ended_here_too(protocol: str) -> None:
    async with node() as bob:
        bob.serve(RPC, echo)
        async with stranger(bob) as eve:
            stream = await eve.stream(protocol)
            await stream.close_write()
            with trio.fail_after(15), pytest.raises(StreamError):  # noqa: PT012
                while True:
                    await stream.read(1000)
            number = stream.muxed_stream.stream_id
            (conn,) = bob._swarm.get_connections()
            await until(lambda: number not in conn.muxed_conn.streams and number not in conn.muxed_conn.stream_events)


@slow
async def test_a_stream_that_the_peer_never_ends_is_ended_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "LINGER_S", 0.5)
    async with node() as bob:
        async with stranger(bob) as eve:
            for _ in range(10):
                await eve.stream("/ipfs/id/1.0.0")
            await until(lambda: bob.statistics().drops.get("stream_not_ended") == 10)
            (conn,) = bob._swarm.get_connections()
            await until(lambda: len(conn.muxed_conn.streams) <= 2)


@slow
async def test_a_stream_that_never_says_its_protocol_ends() -> None:
    async with node(negotiate_s=1.0) as bob:
        async with stranger(bob) as eve:
            stream = await eve.host.get_network().new_stream(eve.peer)
            await stream.read(100)  # the greeting
            with trio.fail_after(10), pytest.raises(StreamError):
                await stream.read(100)


# ---- memory ----


def test_what_is_known_of_a_peer_is_bounded_and_our_key_stays() -> None:
    own, eve = (ID.from_base58(Identity.make().peer_id) for _ in range(2))
    store = GuardedPeerStore(own, Drops())
    store.peer_data_map[own] = store.peer_data_map.get(own) or _peer_data()
    for round_number in range(5):
        store.add_addrs(eve, [Multiaddr(f"/ip4/10.0.{round_number}.{n}/tcp/1") for n in range(200)], 600)
    store.set_protocols(eve, ["/p/" + "x" * 500] + [f"/p/{n}" for n in range(500)])
    store.add_protocols(eve, [f"/q/{n}" for n in range(500)])
    assert len(store.addrs(eve)) == ADDRESSES_MAX
    assert len(store.get_protocols(eve)) == PROTOCOLS_MAX
    for n in range(3000):
        store.add_addrs(ID(n.to_bytes(34, "big")), [Multiaddr("/ip4/10.0.0.1/tcp/1")], 600)
    assert len(store.peer_data_map) <= store.max_peers
    assert own in store.peer_data_map
    assert eve not in store.peer_data_map


def _peer_data() -> Any:
    from libp2p.peer.peerdata import PeerData

    return PeerData()


@slow
async def test_a_peer_is_forgotten_when_it_leaves() -> None:
    async with node() as bob:
        async with node() as alice:
            await alice.dial(bob.addresses()[0])
            bob.serve(RPC, echo)
            store = bob._host.get_peerstore()
            await until(lambda: ID.from_base58(alice.peer_id) in store.peer_data_map)
        await until(lambda: not bob.peers())
        await trio.sleep(0.2)
        assert list(store.peer_data_map) == [ID.from_base58(bob.peer_id)]


# ---- noise of the other kind ----


@slow
async def test_libp2p_does_not_write_into_our_log(caplog: pytest.LogCaptureFixture) -> None:
    async with node() as alice, node() as bob:
        peer = await alice.dial(bob.addresses()[0])
        with pytest.raises(Exception, match="does not serve"):
            await alice.open_stream(peer, "/no/1")
        await alice.disconnect(peer)
    libp2p.network.connection.swarm_connection.logging.warning("from a file that uses the root logger")
    libp2p_lines = Counter(record.name for record in caplog.records if not record.name.startswith("p2p"))
    assert {name: n for name, n in libp2p_lines.items() if name.startswith(("libp2p", "root"))} == {}


def test_what_was_replaced_is_still_there_to_replace() -> None:
    """When a new libp2p has moved these, `install` asserts; when it has mended them, drop ours."""
    guard.install()
    source = Path(libp2p.utils.varint.__file__).read_text()
    delim = source[source.index("async def read_delim") :]
    assert "read_varint_prefixed_bytes(reader)" in delim[:300], "libp2p bounds negotiation now: drop guard.read_delim"
    exactly = Path(libp2p.utils.varint.__file__).parents[1].joinpath("io/utils.py").read_text()
    assert "DEFAULT_RETRY_READ_COUNT = 100" in exactly, "libp2p reads to the end now: drop guard.read_exactly"
    assert logging.getLogger("libp2p").level == logging.CRITICAL
