"""From a relayed connection to a direct one (DCUtR): both sides dial at once, each from the port it listens on.

Rules: libp2p's words and none of its code. Only public TCP addresses are dialled, at most ADDRESSES_MAX of one peer, at
most once in PUNCH_EVERY_S and PUNCHES_MAX at once: a peer that names somebody else's address costs it a few SYNs. The
one that was reached through the relay begins, and takes the server's part of the handshake. Where it fails the relayed
connection stays; where it works that one is closed RELAY_GRACE_S later, as new streams take the direct one.

Around: libp2p dials every address that the peer names, private ones too, and 20 of them; learns its own addresses from
any single peer; and cannot dial from our listening port, which it shares with nobody.

Source: libp2p specs, relay/DCUtR.md; RFC 5382 section 7 (TCP simultaneous open through NATs).
"""

from __future__ import annotations

import socket
from collections import OrderedDict
from typing import Any

import trio
from libp2p.custom_types import TProtocol
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch
from libp2p.security.pnet.protector import new_protected_conn
from multiaddr import Multiaddr

from crypto.identity import PeerId
from p2p.address import Scope, is_relayed, parse_address
from p2p.errors import BadAddress, RemoteProtocolError, Unreachable
from p2p.guard import Drops
from p2p.guard_circuit import ByteStream
from p2p.guard_hop import read, write
from p2p.guard_relay import GuardedRelay, OpenNet
from p2p.guard_socket import GuardedSocket
from p2p.guard_stream import Traffic
from p2p.guard_swarm import GuardedSwarm, close_connection, seen_at, socket_of
from p2p.interfaces import multiaddr_text

DCUTR = "/libp2p/dcutr"
ADDRESSES_MAX = 4  # of ours that we name, and of a peer's that are dialled
START_S = 1.0  # after the relayed connection: its first words go first
PUNCH_S = 8.0  # for both SYNs, with two repetitions of the system's
AGAIN_S = 0.3  # after a refusal: a router that was not ready yet
PUNCH_EVERY_S = 300.0  # with one peer
PUNCHES_MAX = 4  # at once
PEERS_MAX = 1024  # whose last time is remembered
UNSEEN_S = 20.0  # until somebody may have told us at which address we are seen
RELAY_GRACE_S = 10.0


class Puncher:
    """Upgrades relayed connections of one host. `counts` of its drops say what came of it."""

    def __init__(self, swarm: GuardedSwarm, relay: GuardedRelay, traffic: Traffic, open_net: OpenNet) -> None:
        self._swarm = swarm
        self._relay = relay
        self._traffic = traffic
        self._open_net = open_net
        self._drops: Drops = swarm.drops
        self._last: OrderedDict[PeerId, float] = OrderedDict()
        self._led: set[PeerId] = set()
        self._running = 0

    def serve(self, host: Any) -> None:
        """Take a peer's wish for a direct connection from now on."""
        host.set_stream_handler(TProtocol(DCUTR), self._answer)

    async def begin(self, peer: PeerId) -> None:
        """A peer came to us through a relay: try for a direct connection, again and again while there is none.

        What goes wrong is counted. Ends with the relayed connection.
        """
        if peer in self._led:
            return
        self._led.add(peer)
        try:
            await trio.sleep(START_S)
            while self._swarm.get_connections(ID.from_base58(peer)) and not self._has_direct(peer):
                own = self._own()
                if own and self._may(peer):
                    self._running += 1
                    try:
                        await self._drops.contain("punch_broken", self._lead, peer, own)
                    finally:
                        self._running -= 1
                await trio.sleep(PUNCH_EVERY_S if own else UNSEEN_S)
        finally:
            self._led.discard(peer)

    async def _lead(self, peer: PeerId, own: list[bytes]) -> None:
        stream = self._bytes(await self._open_net(peer, DCUTR))
        try:
            asked = trio.current_time()
            await write(stream, HolePunch(type=HolePunch.CONNECT, ObsAddrs=own))
            theirs = await self._addresses(stream, peer)
            rtt_s = trio.current_time() - asked
            await write(stream, HolePunch(type=HolePunch.SYNC))
            await trio.sleep(rtt_s / 2)
            await self._punch(peer, theirs, initiator=False)
        finally:
            await stream.reset()

    async def _answer(self, net: Any) -> None:
        """The other side leads."""
        peer = PeerId(net.muxed_conn.peer_id.to_base58())
        stream, own = self._bytes(net), self._own()
        if not is_relayed(seen_at(net.swarm_conn)) or not own or not self._may(peer):
            self._drops.count("punch_not_now")
            return await stream.reset()
        self._running += 1
        try:
            theirs = await self._addresses(stream, peer)
            await write(stream, HolePunch(type=HolePunch.CONNECT, ObsAddrs=own))
            if (await read(stream, HolePunch)).type != HolePunch.SYNC:
                raise RemoteProtocolError("a hole punch without its SYNC")
            await self._punch(peer, theirs, initiator=True)
        finally:
            self._running -= 1

    async def _addresses(self, stream: ByteStream, peer: PeerId) -> list[tuple[str, int]]:
        """Where a peer says that it can be reached, what is public of it. Raises RemoteProtocolError for nothing."""
        said = await read(stream, HolePunch)
        found = []
        for raw in said.ObsAddrs[:ADDRESSES_MAX] if said.type == HolePunch.CONNECT else []:
            try:
                address = parse_address(f"{Multiaddr(raw)}/p2p/{peer}", checked=peer)
            except (BadAddress, ValueError):
                continue
            if address.scope is Scope.PUBLIC and address.relay is None:
                found.append((address.host, address.port))
        if not found:
            raise RemoteProtocolError("a hole punch without a public address")
        return found

    async def _punch(self, peer: PeerId, targets: list[tuple[str, int]], *, initiator: bool) -> None:
        with trio.move_on_after(PUNCH_S):
            async with trio.open_nursery() as nursery:
                for ip, port in targets:
                    nursery.start_soon(self._try, peer, ip, port, initiator, nursery.cancel_scope)
        if not self._has_direct(peer):
            self._drops.count("punch_failed")
            return
        self._relay.punched += 1
        await trio.sleep(RELAY_GRACE_S)
        await self._close_relayed(peer)

    async def _try(self, peer: PeerId, ip: str, port: int, initiator: bool, others: trio.CancelScope) -> None:
        """Dial one address until it answers or the other side's dial has come in."""
        while not self._has_direct(peer):
            try:
                stream = await self._connect(ip, port)
            except OSError:
                await trio.sleep(AGAIN_S)
                continue
            if await self._drops.contain("punch_handshake", self._upgrade, stream, peer, initiator):
                others.cancel()
            return

    async def _connect(self, ip: str, port: int) -> trio.SocketStream:
        """A TCP connection from the port that we listen on. Raises OSError."""
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        own = next((each for each in self._bound() if (":" in each[0]) == (":" in ip)), None)
        if own is None:
            raise OSError(f"no listener of the family of {ip}")
        opened, connected = trio.socket.socket(family, socket.SOCK_STREAM), False
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            await opened.bind(own)
            await opened.connect((ip, port))
            connected = True
        finally:
            if not connected:
                opened.close()
        return trio.SocketStream(opened)

    async def _upgrade(self, stream: trio.SocketStream, peer: PeerId, initiator: bool) -> None:
        """Handshake with roles that both sides know. Raises Unreachable, and what libp2p raises."""
        wire, done = GuardedSocket(stream, self._drops), False
        try:
            raw: Any = RawConnection(wire, initiator)
            if initiator:
                guarded = raw if self._swarm.psk is None else new_protected_conn(raw, self._swarm.psk)
                await self._swarm.upgrade_outbound_raw_conn(guarded, ID.from_base58(peer))
                done = True
                return
            muxed = await self._swarm.upgrade_inbound_raw_conn(raw, Multiaddr(multiaddr_text(*_remote(wire))))
            if muxed.peer_id != ID.from_base58(peer):
                raise Unreachable(f"another peer than {peer} answers there")
            done = True
        finally:
            if not done:
                wire.abort()

    async def _close_relayed(self, peer: PeerId) -> None:
        if self._has_direct(peer):
            for conn in self._swarm.get_connections(ID.from_base58(peer)):
                if is_relayed(seen_at(conn)):
                    await close_connection(conn)

    def _has_direct(self, peer: PeerId) -> bool:
        live = [conn for conn in self._swarm.get_connections(ID.from_base58(peer)) if not conn.is_closed]
        return any(not is_relayed(seen_at(conn)) for conn in live)

    def _may(self, peer: PeerId) -> bool:
        now, last = trio.current_time(), self._last.get(peer)
        if self._running >= PUNCHES_MAX or (last is not None and now - last < PUNCH_EVERY_S):
            return False
        self._last[peer] = now
        self._last.move_to_end(peer)
        if len(self._last) > PEERS_MAX:
            self._last.popitem(last=False)
        return True

    def _own(self) -> list[bytes]:
        """Where our routers show us, if they keep the port, as home routers mostly do."""
        ports = dict.fromkeys((":" in ip, port) for ip, port in self._bound())
        texts = [multiaddr_text(ip, port) for ip in self._relay.observed for v6, port in ports if v6 == (":" in ip)]
        return [Multiaddr(text).to_bytes() for text in texts[:ADDRESSES_MAX]]

    def _bound(self) -> list[tuple[str, int]]:
        """IP and port of our listeners that are not loopback's."""
        found = []
        for text in self._relay.listening():
            _, _, ip, _, port = text.split("/")
            if ip not in ("127.0.0.1", "::1"):
                found.append((ip, int(port)))
        return found

    def _bytes(self, net: Any) -> ByteStream:
        peer = PeerId(net.muxed_conn.peer_id.to_base58())
        return ByteStream(net, peer, self._traffic, self._drops, socket_of(net.swarm_conn).abort)


def _remote(wire: GuardedSocket) -> tuple[str, int]:
    remote = wire.get_remote_address()
    if remote is None:
        raise Unreachable("the connection was gone at once")
    return remote
