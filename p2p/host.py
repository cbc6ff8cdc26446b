"""The door to libp2p: a Transport over TCP, Noise and yamux, with gossipsub.

Rules: libp2p is imported in this file and in p2p/guard*.py only, and this file only after the command line is parsed
(it costs a second). Its exceptions end here, mapped. Nothing is dialled but by dial(). Only concrete addresses of real
interfaces are told to others.

Source: NETWORK.md "Our rules" 1-3, 5; libp2p specs.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

import trio
from libp2p.abc import INotifee
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.basic_host import BasicHost
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import ProtocolNotSupportedError
from libp2p.protocol_muxer.multiselect_communicator import MultiselectCommunicator
from libp2p.rcmgr import Direction
from libp2p.tools.anyio_service import background_trio_service
from multiaddr import Multiaddr

from crypto.errors import BadKey
from crypto.identity import Identity, PeerId, public_key_of
from p2p.address import CIRCUIT_END, is_relayed
from p2p.errors import CannotListen, LocalProtocolError, Refused, Unreachable
from p2p.guard import Drops, escalate, install, reset_quietly
from p2p.guard_gossip import GuardedGossipSub, GuardedPubsub
from p2p.guard_host import automatic_addresses, check_listening, make_host
from p2p.guard_punch import Puncher
from p2p.guard_relay import GuardedRelay
from p2p.guard_socket import GuardedTcp
from p2p.guard_stream import Libp2pStream, Traffic
from p2p.guard_swarm import GuardedSwarm, close_connection, seen_at, socket_of
from p2p.host_config import HostConfig
from p2p.transport import (
    GOSSIP_BYTES_MAX,
    GossipReceiver,
    PeerChange,
    PeerWatcher,
    Stream,
    StreamHandler,
    TransportStatistics,
)

STOP_S = 2.0  # to close all connections in order


@asynccontextmanager
async def open_host(identity: Identity, config: HostConfig) -> AsyncIterator[Libp2pTransport]:
    """Opens its own nursery: a listening host, until the block is left; then all its connections are closed.

    Raises CannotListen. The block's own exception comes out as it is, not inside an ExceptionGroup.
    """
    install()
    drops = Drops()
    tcp = GuardedTcp(drops)
    host = make_host(identity, config, tcp, drops)
    with _Unwrapping() as unwrapping:
        async with host.run([Multiaddr(each) for each in config.listen or automatic_addresses(config.port)]):
            check_listening(tcp.listen_errors)
            router = GuardedGossipSub(drops)
            pubsub = GuardedPubsub(host, router, config.topics, drops)
            async with background_trio_service(pubsub), background_trio_service(router), trio.open_nursery() as nursery:
                await pubsub.wait_until_ready()
                nursery.start_soon(host.get_network().watch_health, config.health_interval_s)
                transport = Libp2pTransport(identity.peer_id, config, host, pubsub, nursery)
                nursery.start_soon(transport.relay.keep)
                try:
                    yield transport
                finally:
                    unwrapping.failure = sys.exc_info()[1]
                    await transport._stop()
                    nursery.cancel_scope.cancel()


class _Unwrapping:
    """Lets the block's own exception, or CannotListen, out of the nurseries' groups of one."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        only = exc
        while isinstance(only, BaseExceptionGroup) and len(only.exceptions) == 1:
            only = only.exceptions[0]
        if only is not None and only is not exc and (only is self.failure or isinstance(only, CannotListen)):
            raise only from only.__cause__


class Libp2pTransport:
    """p2p.transport.Transport over libp2p. Made by open_host."""

    def __init__(
        self, peer_id: PeerId, config: HostConfig, host: BasicHost, pubsub: GuardedPubsub, nursery: trio.Nursery
    ) -> None:
        self._peer_id = peer_id
        self._config = config
        self._host = host
        self._swarm: GuardedSwarm = host.get_network()
        self._drops: Drops = self._swarm.drops
        self._pubsub = pubsub
        self._nursery = nursery
        self._traffic = Traffic()
        self._connections: dict[PeerId, set[Any]] = {}
        self._watchers: list[PeerWatcher] = []
        self._dialing: dict[PeerId, trio.Event] = {}
        self._breaches: dict[PeerId, str] = {}  # of connections that we are closing for them
        pubsub.on_flood = self._cut
        self.relay = GuardedRelay(self._swarm, config.relay, self._traffic, self._open_net)
        self.relay.serve(host)
        self._puncher = Puncher(self._swarm, self.relay, self._traffic, self._open_net)
        self._puncher.serve(host)
        self._swarm.register_notifee(_Notifee(self))
        for conn in self._swarm.get_connections():
            self._connected(conn)

    @property
    def peer_id(self) -> PeerId:
        """Who we are."""
        return self._peer_id

    def addresses(self) -> tuple[str, ...]:
        """Where others can dial us: concrete multiaddrs, each ending in /p2p/<our id>."""
        return (*self.relay.addresses(), *(str(each) for each in self._host.get_addrs()))

    def peers(self) -> frozenset[PeerId]:
        """Peers with a live connection."""
        return frozenset(self._connections)

    def remote_address(self, peer: PeerId) -> str | None:
        """The multiaddr a connected peer is seen at, without its own /p2p/; None when not connected.

        Of a peer that is connected both ways the direct one; of a relayed peer its relay's, then /p2p-circuit.
        """
        seen = [where for conn in self._connections.get(peer, ()) if (where := seen_at(conn)) is not None]
        return min(seen, key=is_relayed, default=None)

    def watch(self, watcher: PeerWatcher) -> None:
        """Call `watcher` (sync) at every PeerChange from now on. If it raises, the host ends."""
        self._watchers.append(watcher)

    def keep_places_for(self, is_known: Callable[[PeerId], bool]) -> None:
        """See Transport.keep_places_for."""
        self._swarm.is_known = is_known

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """Run `handler` for each inbound stream of `protocol`; its exceptions reset that stream and no more."""

        async def run(net: Any) -> None:
            stream = self._wrap(net)
            if await self._drops.contain("handler_failed", handler, stream):
                await stream.close()  # the guard sees that the other side ends its direction too
            else:
                await stream.reset()

        self._host.set_stream_handler(TProtocol(protocol), run)

    async def dial(self, address: str) -> PeerId:
        """See Transport.dial. Cancelled: no connection is left half made."""
        target, peer = _parse_address(address)
        if peer == self._peer_id:
            raise Refused(f"{address} is this node itself")
        while peer not in self._connections:
            if (other := self._dialing.get(peer)) is not None:
                await other.wait()  # if that one fails, ours may do: the address can be another
            else:
                await self._dial_now(target, peer, address)
        await trio.lowlevel.checkpoint()
        return peer

    async def _dial_now(self, target: Multiaddr, peer: PeerId, address: str) -> None:
        done = self._dialing[peer] = trio.Event()
        try:
            with trio.fail_after(self._config.dial_s):
                if is_relayed(str(target)):
                    await self._dial_through(str(target).removesuffix(CIRCUIT_END), peer)
                else:
                    await self._swarm.dial_addr(target, ID.from_base58(peer))
        except trio.TooSlowError as exc:
            raise Unreachable(f"{address} did not answer within {self._config.dial_s:g} s") from exc
        except BaseLibp2pError as exc:
            raise Unreachable(f"cannot connect to {address}: {_why(exc)}") from exc
        finally:
            del self._dialing[peer]
            done.set()
        if peer not in self._connections:
            raise Unreachable(f"the connection to {address} was lost at once")

    async def _dial_through(self, relay_address: str, peer: PeerId) -> None:
        """Connect to a peer behind the relay at that address. Raises Unreachable, Refused."""
        relay = await self.dial(relay_address)
        await self.relay.dial(relay, relay_address.rpartition("/p2p/")[0], peer)

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """See Transport.open_stream. Cancelled: the stream is reset."""
        return self._wrap(await self._open_net(peer, protocol))

    async def _open_net(self, peer: PeerId, protocol: str) -> Any:
        if peer not in self._connections:
            await trio.lowlevel.checkpoint()
            raise Unreachable(f"not connected to {peer}")
        net = None
        opened = False
        try:
            with trio.fail_after(self._config.negotiate_s):
                net = await self._swarm.new_stream(ID.from_base58(peer))
                communicator = MultiselectCommunicator(net)
                await self._host.multiselect_client.handshake(communicator)
                await self._host.multiselect_client.try_select(communicator, TProtocol(protocol))
            net.set_protocol(TProtocol(protocol))
            opened = True
        except trio.TooSlowError as exc:
            raise Unreachable(f"{peer} did not open {protocol} within {self._config.negotiate_s:g} s") from exc
        except ProtocolNotSupportedError as exc:
            raise Refused(f"{peer} does not serve {protocol}") from exc
        except BaseLibp2pError as exc:
            raise Unreachable(f"cannot open {protocol} to {peer}: {_why(exc)}") from exc
        finally:
            if net is not None and not opened:
                await reset_quietly(net, self._drops)
        return net

    def _wrap(self, net: Any) -> Libp2pStream:
        peer = PeerId(net.muxed_conn.peer_id.to_base58())
        return Libp2pStream(net, peer, self._traffic, self._drops, socket_of(net.swarm_conn).abort)

    async def disconnect(self, peer: PeerId) -> None:
        """See Transport.disconnect. Takes about a second at most; not cut short by a cancellation."""
        async with trio.open_nursery() as nursery:
            for conn in self._swarm.get_connections(ID.from_base58(peer)):
                nursery.start_soon(close_connection, conn)

    async def subscribe(self, topic: str, receiver: GossipReceiver) -> None:
        """See Transport.subscribe. Raises LocalProtocolError for a topic that HostConfig.topics does not name."""
        if topic not in self._config.topics:
            raise LocalProtocolError(f"topic {topic!r} is not in HostConfig.topics: {sorted(self._config.topics)}")
        own = ID.from_base58(self._peer_id)

        def validate(forwarder: ID, message: Any) -> bool:
            if forwarder == own:
                return True  # ours, on its way out
            if len(message.data) > GOSSIP_BYTES_MAX or list(message.topicIDs) != [topic]:
                self._drops.count("gossip_form")
                return False
            return receiver(PeerId(ID(message.from_id).to_base58()), message.data)

        self._pubsub.set_topic_validator(topic, validate, False)
        await self._pubsub.subscribe(topic)

    async def publish(self, topic: str, payload: bytes) -> None:
        """See Transport.publish."""
        if len(payload) > GOSSIP_BYTES_MAX:
            raise LocalProtocolError(
                f"a gossip message of {len(payload)} bytes, at most {GOSSIP_BYTES_MAX} may be sent"
            )
        await self._drops.contain("publish_failed", self._pubsub.publish, topic, payload)

    def statistics(self) -> TransportStatistics:
        """A snapshot of the counters."""
        traffic = self._traffic
        return TransportStatistics(
            peers=len(self._connections),
            streams_open=traffic.streams_open,
            frames_in=traffic.frames_in,
            frames_out=traffic.frames_out,
            bytes_in=traffic.bytes_in,
            bytes_out=traffic.bytes_out,
            mesh_peers=len(set().union(*self._pubsub.router.mesh.values())),
            drops=dict(self._drops.counts),
        )

    def _connected(self, conn: Any) -> None:
        peer = PeerId(conn.muxed_conn.peer_id.to_base58())
        if conn.is_closed:
            return
        held = self._connections.setdefault(peer, set())
        held.add(conn)
        if is_relayed(seen_at(conn)) and conn.direction is Direction.INBOUND:
            self._nursery.start_soon(self._puncher.begin, peer)
        if len(held) == 1:
            self._tell(PeerChange(peer=peer, connected=True))

    def _disconnected(self, conn: Any) -> None:
        peer = PeerId(conn.muxed_conn.peer_id.to_base58())
        held = self._connections.get(peer, set())
        if conn in held:
            held.discard(conn)
            if all(is_relayed(seen_at(other)) for other in held):
                self.relay.gone(peer)
            if not held:
                del self._connections[peer]
                self._host.get_peerstore().forget(conn.muxed_conn.peer_id)
                self._tell(PeerChange(peer=peer, connected=False, breach=self._breaches.pop(peer, "")))

    def _cut(self, peer: PeerId) -> None:
        """A neighbour floods: close its connections, and tell why."""
        if peer in self._connections:
            self._breaches[peer] = "handed on more gossip than a neighbour may, or forged messages"
            self._nursery.start_soon(self.disconnect, peer)

    def _tell(self, change: PeerChange) -> None:
        for watcher in self._watchers:
            escalate(self._nursery, watcher, change)

    async def _stop(self) -> None:
        """Close every connection at once, in order if that takes less than STOP_S."""
        with trio.move_on_after(STOP_S) as scope:
            scope.shield = True
            async with trio.open_nursery() as nursery:
                for conn in self._swarm.get_connections():
                    nursery.start_soon(close_connection, conn)
        for scope in tuple(self._host._identify_tasks):
            scope.cancel()  # system tasks, which nobody else ends


class _Notifee(INotifee):  # type: ignore[misc]  # libp2p's types are not followed
    """Passes on the two events that matter."""

    def __init__(self, transport: Libp2pTransport) -> None:
        self._transport = transport

    async def connected(self, network: Any, conn: Any) -> None:
        self._transport._connected(conn)

    async def disconnected(self, network: Any, conn: Any) -> None:
        self._transport._disconnected(conn)

    async def opened_stream(self, network: Any, stream: Any) -> None:
        pass

    async def closed_stream(self, network: Any, stream: Any) -> None:
        pass

    async def listen(self, network: Any, multiaddr: Any) -> None:
        pass

    async def listen_close(self, network: Any, multiaddr: Any) -> None:
        pass


def _parse_address(address: str) -> tuple[Multiaddr, PeerId]:
    """A dialable multiaddr and whom it names. Raises Unreachable for anything else."""
    head, _, peer = address.rpartition("/p2p/")
    try:
        public_key_of(peer)
        target = Multiaddr(head)
    except (ValueError, BadKey) as exc:
        raise Unreachable(f"{address!a} is not a multiaddr like /ip4/1.2.3.4/tcp/4001/p2p/12D3Koo...: {exc}") from exc
    return target, PeerId(peer)


def _why(exc: BaseException) -> str:
    """The innermost reason of a chain of libp2p errors, which is the one that helps."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    text = str(exc)[:300] or type(exc).__name__
    return f"another peer answers there ({text})" if "pubkey" in text or "mismatch" in text else text
