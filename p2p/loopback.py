"""A network inside one process, with faults on demand: the Transport that tests and simulations run on.

Rules: it passes the same tests/test_transport.py as the real one. Time is trio's clock (a MockClock in tests), chance
is the `rng` it is given, so a seed replays a run. Gossip spreads over connections from subscriber to subscriber, each
takes a message once, and loss, delay, doubling and reordering befall it at each hop.

Source: libp2p specs, pubsub/README.md (flooding to subscribed peers); tigerbeetle src/testing/packet_simulator.zig.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import random
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import trio

from crypto.identity import Identity, PeerId
from p2p.errors import LocalProtocolError, Refused, Unreachable
from p2p.loopback_wire import Counts, Faults, LoopbackStream, Wire, stream_pair
from p2p.transport import (
    GOSSIP_BYTES_MAX,
    GossipReceiver,
    PeerChange,
    PeerWatcher,
    StreamHandler,
    TransportStatistics,
)

STREAMS_MAX = 1024  # of one connection
GOSSIP_QUEUE_MAX = 4096  # messages on their way to one node
GOSSIP_SEEN_MAX = 8192  # ids of messages that a node remembers, so as to take each once
PORT_FIRST = 10_000  # of listeners
EPHEMERAL_FIRST = 50_000  # of dialers: where a listener sees them

_log = logging.getLogger(__name__)


class LoopbackNetwork:
    """The nodes of one process and the wire between them. `wire.faults` may be replaced while it runs."""

    def __init__(self, rng: random.Random, faults: Faults | None = None) -> None:
        self.wire = Wire(rng, faults or Faults())
        self.listeners: dict[str, LoopbackTransport] = {}  # by address without /p2p/
        self.serial = itertools.count()
        self._ports = itertools.count(PORT_FIRST)
        self._links: set[_Link] = set()

    @asynccontextmanager
    async def join(
        self, identity: Identity, *, ip: str = "127.0.0.1", port: int | None = None
    ) -> AsyncIterator[LoopbackTransport]:
        """Opens its own nursery: a running node of this network, until the block is left.

        The block's own exception comes out as it is, not inside an ExceptionGroup.
        """
        address = f"/ip4/{ip}/tcp/{next(self._ports) if port is None else port}"
        if address in self.listeners:
            raise LocalProtocolError(f"{address} is taken; give another port")
        try:
            async with trio.open_nursery() as nursery:
                node = LoopbackTransport(self, identity.peer_id, address, nursery)
                self.listeners[address] = node
                nursery.start_soon(node.deliver_gossip)
                try:
                    yield node
                finally:
                    self._end(node)
                    nursery.cancel_scope.cancel()
        except ExceptionGroup as group:
            if len(group.exceptions) > 1:
                raise
            raise group.exceptions[0] from group.exceptions[0].__cause__

    # -- faults, by peer ------------------------------------------------------------------------------------------

    def partition(self, a: PeerId, b: PeerId, *, both_ways: bool = True) -> None:
        """Hold back everything from `a` to `b` (and back); gossip is lost. Nobody is told."""
        self.wire.cut |= {(a, b), (b, a)} if both_ways else {(a, b)}

    def heal(self, a: PeerId | None = None, b: PeerId | None = None) -> None:
        """End one partition, or all of them; what was held back arrives."""
        self.wire.cut -= {(a, b), (b, a)} if a is not None and b is not None else set(self.wire.cut)
        self._paths_opened()

    def freeze(self, peer: PeerId) -> None:
        """Stop a peer like SIGSTOP: nothing moves to it or from it, and nobody is told."""
        self.wire.frozen.add(peer)

    def thaw(self, peer: PeerId) -> None:
        """Let a frozen peer go on."""
        self.wire.frozen.discard(peer)
        self._paths_opened()

    def crash(self, peer: PeerId) -> None:
        """Kill a peer: its streams break at the others, and whatever it asks of its transport fails."""
        self.wire.frozen.discard(peer)
        for node in [node for node in self.listeners.values() if node.peer_id == peer]:
            self._end(node)

    def break_connections(self, a: PeerId, b: PeerId) -> None:
        """Break the connections between two peers; both are told at once."""
        for link in [link for link in self._links if {node.peer_id for node in link.ends} == {a, b}]:
            self.unlink(link, None)

    # -- for the nodes --------------------------------------------------------------------------------------------

    def link(self, dialer: LoopbackTransport, listener: LoopbackTransport) -> None:
        """Connect two nodes and tell both."""
        port = EPHEMERAL_FIRST + next(self.serial) % (65_536 - EPHEMERAL_FIRST)
        link = _Link(dialer, listener, f"{dialer.address.rsplit('/', 1)[0]}/{port}")
        self._links.add(link)
        for node in link.ends:
            node.link_up(link)

    def unlink(self, link: _Link, by: LoopbackTransport | None) -> None:
        """Drop a connection. The other end is told once the path from `by` is open; by=None tells both now."""
        link.lost_by = link.lost_by or by
        for node in link.ends:
            if by is None or node is by or not self.wire.blocked(by.peer_id, node.peer_id):
                node.link_down(link)
        if not any(link in node.links for node in link.ends):
            self._links.discard(link)

    def _end(self, node: LoopbackTransport) -> None:
        if self.listeners.get(node.address) is node:
            del self.listeners[node.address]
        node.ended = True
        for link in list(node.links):
            self.unlink(link, node)

    def _paths_opened(self) -> None:
        self.wire.opened.unpark_all()
        for link in list(self._links):
            if link.lost_by is not None:
                self.unlink(link, link.lost_by)
            for stream in list(link.streams):
                stream.wake()


class _Link:
    """One connection of two nodes and the live stream ends on it."""

    def __init__(self, dialer: LoopbackTransport, listener: LoopbackTransport, dialer_address: str) -> None:
        self.ends = (dialer, listener)
        self.address_of = {dialer: dialer_address, listener: listener.address}
        self.streams: set[LoopbackStream] = set()
        self.lost_by: LoopbackTransport | None = None

    def other(self, node: LoopbackTransport) -> LoopbackTransport:
        return self.ends[1] if node is self.ends[0] else self.ends[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """A message of gossip."""

    message_id: int
    origin: PeerId
    topic: str
    payload: bytes


class LoopbackTransport:
    """One node; see p2p.transport.Transport."""

    def __init__(self, network: LoopbackNetwork, peer_id: PeerId, address: str, nursery: trio.Nursery) -> None:
        self._network = network
        self._peer_id = peer_id
        self.address = address
        self._nursery = nursery
        self.ended = False
        self.links: list[_Link] = []
        self.counts = Counts()
        self._streams: set[LoopbackStream] = set()
        self._watchers: list[PeerWatcher] = []
        self._handlers: dict[str, StreamHandler] = {}
        self._receivers: dict[str, GossipReceiver] = {}
        self._inbox: list[tuple[float, int, _Message, bool]] = []  # heap of (arrives, serial, message, doubled)
        self._inbox_changed = trio.Event()
        self._seen: OrderedDict[int, None] = OrderedDict()

    @property
    def peer_id(self) -> PeerId:
        return self._peer_id

    def addresses(self) -> tuple[str, ...]:
        return (f"{self.address}/p2p/{self._peer_id}",)

    def peers(self) -> frozenset[PeerId]:
        return frozenset(link.other(self).peer_id for link in self.links)

    def remote_address(self, peer: PeerId) -> str | None:
        link = self._link_to(peer)
        return link.address_of[link.other(self)] if link is not None else None

    def watch(self, watcher: PeerWatcher) -> None:
        self._watchers.append(watcher)

    def keep_places_for(self, is_known: Callable[[PeerId], bool]) -> None:
        """There are places for all."""

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        self._handlers[protocol] = handler

    async def dial(self, address: str) -> PeerId:
        await trio.lowlevel.checkpoint()
        self._check_running()
        bare, _, peer = address.rpartition("/p2p/")
        there = PeerId(peer)
        if there == self._peer_id:
            raise Refused(f"{address} is this node's own identity")
        if there not in self.peers():
            await self._network.wire.round_trip(self._peer_id, there)
            self._check_running()
            listener = self._network.listeners.get(bare)
            if listener is None:
                raise Unreachable(f"nobody listens at {address}")
            if listener.peer_id != there:
                raise Unreachable(f"{listener.peer_id} answers at {address}")
            if there not in self.peers():  # it may have dialled us meanwhile
                self._network.link(self, listener)
        return there

    async def open_stream(self, peer: PeerId, protocol: str) -> LoopbackStream:
        await trio.lowlevel.checkpoint()
        link = self._live_link(peer)
        await self._network.wire.round_trip(self._peer_id, peer)
        if link not in self.links:
            raise Unreachable(f"the connection to {peer} broke while a stream was opened")
        node = link.other(self)
        handler = node._handlers.get(protocol)
        if handler is None:
            raise Refused(f"{peer} does not serve {protocol}")
        if len(link.streams) >= 2 * STREAMS_MAX:
            raise Refused(f"{STREAMS_MAX} streams are open on the connection to {peer}")
        near, far = stream_pair(self._network.wire, (self._peer_id, self.counts), (peer, node.counts))
        for stream, owner in ((near, self), (far, node)):
            stream.homes = (link.streams, owner._streams)
            for home in stream.homes:
                home.add(stream)
        node._nursery.start_soon(node._handle, handler, far)
        return near

    async def disconnect(self, peer: PeerId) -> None:
        for link in [link for link in self.links if link.other(self).peer_id == peer]:
            self._network.unlink(link, self)
        await trio.lowlevel.checkpoint()

    async def subscribe(self, topic: str, receiver: GossipReceiver) -> None:
        await trio.lowlevel.checkpoint()
        self._receivers[topic] = receiver

    async def publish(self, topic: str, payload: bytes) -> None:
        if len(payload) > GOSSIP_BYTES_MAX:
            raise LocalProtocolError(f"{len(payload)} bytes of gossip, at most {GOSSIP_BYTES_MAX} may be published")
        await trio.lowlevel.checkpoint()
        message_id = next(self._network.serial)
        self._remember(message_id)
        self._spread(_Message(message_id=message_id, origin=self._peer_id, topic=topic, payload=bytes(payload)))

    def statistics(self) -> TransportStatistics:
        traffic = self.counts.traffic
        return TransportStatistics(
            peers=len(self.peers()),
            streams_open=len(self._streams),
            frames_in=traffic["frames_in"],
            frames_out=traffic["frames_out"],
            bytes_in=traffic["bytes_in"],
            bytes_out=traffic["bytes_out"],
            mesh_peers=len(self.peers()),  # it floods
            drops=dict(self.counts.drops),
        )

    # -- connections and streams ------------------------------------------------------------------------------------

    def link_up(self, link: _Link) -> None:
        """A connection to this node came up."""
        peer = link.other(self).peer_id
        is_first = peer not in self.peers()
        self.links.append(link)
        if is_first:
            self._tell(PeerChange(peer=peer, connected=True))

    def link_down(self, link: _Link) -> None:
        """A connection of this node is gone, with its streams. A no-op when it was gone before."""
        if link not in self.links:
            return
        self.links.remove(link)
        for stream in link.streams & self._streams:
            stream.fail("the connection was lost")
        peer = link.other(self).peer_id
        if peer not in self.peers():
            self._tell(PeerChange(peer=peer, connected=False))

    def _tell(self, change: PeerChange) -> None:
        for watcher in list(self._watchers):
            watcher(change)

    def _check_running(self) -> None:
        if self.ended:
            raise Unreachable("this node has ended")

    def _link_to(self, peer: PeerId) -> _Link | None:
        return next((link for link in self.links if link.other(self).peer_id == peer), None)

    def _live_link(self, peer: PeerId) -> _Link:
        self._check_running()
        link = self._link_to(peer)
        if link is None:
            raise Unreachable(f"not connected to {peer}")
        return link

    async def _handle(self, handler: StreamHandler, stream: LoopbackStream) -> None:
        """Run a peer's handler; this is the guard around it."""
        try:
            await handler(stream)
        except Exception:
            _log.exception("the handler of a stream from %s failed", stream.peer)
            self.counts.drops["handler_failed"] += 1
            stream.reset_nowait()
        else:
            stream.close_nowait()

    # -- gossip ---------------------------------------------------------------------------------------------------

    async def deliver_gossip(self) -> None:
        """Hand each message to its receiver when it arrives. Runs for the node's whole life."""
        while True:
            wait_s = self._inbox[0][0] - trio.current_time() if self._inbox else float("inf")
            if wait_s <= 0:
                _, _, message, doubled = heapq.heappop(self._inbox)
                self._receive_gossip(message, doubled=doubled)
                continue
            self._inbox_changed = trio.Event()
            with trio.move_on_after(wait_s):
                await self._inbox_changed.wait()

    def _receive_gossip(self, message: _Message, *, doubled: bool) -> None:
        receiver = self._receivers.get(message.topic)
        if receiver is None or message.origin == self._peer_id or (message.message_id in self._seen and not doubled):
            return
        self._remember(message.message_id)
        if receiver(message.origin, message.payload) and not doubled:
            self._spread(message)

    def _remember(self, message_id: int) -> None:
        self._seen[message_id] = None
        if len(self._seen) > GOSSIP_SEEN_MAX:
            self._seen.popitem(last=False)

    def _spread(self, message: _Message) -> None:
        wire = self._network.wire
        for link in self.links:
            node = link.other(self)
            if message.topic not in node._receivers or message.message_id in node._seen:
                continue
            if wire.blocked(self._peer_id, node.peer_id):
                self.counts.drops["gossip_blocked"] += 1
            elif wire.happens(wire.faults.gossip_loss):
                self.counts.drops["gossip_lost"] += 1
            else:
                node._expect(message, doubled=False)
                if wire.happens(wire.faults.gossip_duplicate):
                    node._expect(message, doubled=True)

    def _expect(self, message: _Message, *, doubled: bool) -> None:
        """Put a message into the inbox, to arrive when the faults say."""
        wire = self._network.wire
        if len(self._inbox) >= GOSSIP_QUEUE_MAX:
            self.counts.drops["gossip_queue_full"] += 1
            return
        arrives = trio.current_time() + wire.draw_s(wire.faults.gossip_delay_s)
        if wire.happens(wire.faults.gossip_reorder):
            arrives += wire.rng.uniform(0, wire.faults.gossip_late_s)
        heapq.heappush(self._inbox, (arrives, next(self._network.serial), message, doubled))
        self._inbox_changed.set()
