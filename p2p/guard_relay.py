"""Circuit relay v2 on the wire: carrying for others, a place at a relay of ours, and connections through relays.

Rules: libp2p's messages and none of its relay code. p2p/relay.py decides what we carry. A circuit comes in only through
a relay at which we hold a place, is bounded in number before its handshake and after, and whoever is at its other end
proves its key as on any connection. A relay is always reached directly. Every task here ends with its stream.

Around: libp2p's relay gives places to whatever peer id a message names, so that one peer can take them all; keeps a
silent circuit beyond its time; loses streams of a peer's second circuit; lets a cancelled write spoil the connection
below; takes circuits from any relay without bound; and a dialler of it reserves a place at each relay it dials through.

Source: libp2p specs, relay/circuit-v2.md.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.connection_types import ConnectionType
from libp2p.custom_types import TProtocol
from libp2p.exceptions import BaseLibp2pError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.rcmgr.metrics import Direction
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Limit, Reservation, Status, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as WirePeer
from libp2p.security.pnet.protector import new_protected_conn
from multiaddr import Multiaddr

from crypto.identity import PeerId
from p2p.address import CIRCUIT_END, is_relayed, seen_group
from p2p.errors import P2PError, Refused, StreamClosed, Unreachable
from p2p.guard import LINGER_S, Drops
from p2p.guard_circuit import STALL_S, ByteStream, CircuitSocket
from p2p.guard_hop import ended, mapped, peer_of, read, sentence, status_answer, wire_id, write
from p2p.guard_stream import Traffic
from p2p.guard_swarm import GuardedSwarm, seen_at, socket_of
from p2p.relay import Circuit, No, RelayDesk, RelayLimits

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"
CARRY_BYTES = 65_536  # of one circuit before the next one's turn
PENDING_MAX = 8  # circuits to us whose handshake is not done
CIRCUITS_IN_MAX = 64  # circuits to us
PLACE_S_MIN, PLACE_S_MAX = 120.0, 3600.0  # a place whose end is told by a clock unlike ours
_STATUSES = {
    "relay_off": Status.PERMISSION_DENIED,
    "relay_rate": Status.RESOURCE_LIMIT_EXCEEDED,
    "relay_reservations": Status.RESERVATION_REFUSED,
    "relay_reservations_of_group": Status.RESERVATION_REFUSED,
    "relay_no_reservation": Status.NO_RESERVATION,
    "relay_to_itself": Status.PERMISSION_DENIED,
    "relay_circuits": Status.RESOURCE_LIMIT_EXCEEDED,
    "relay_circuits_of_peer": Status.RESOURCE_LIMIT_EXCEEDED,
}
OpenNet = Callable[[PeerId, str], Awaitable[Any]]  # a negotiated libp2p stream; raises Unreachable, Refused


class GuardedRelay:
    """Both roles of circuit relay v2 on one host. Places of ours are kept alive by p2p/reaching.py."""

    def __init__(self, swarm: GuardedSwarm, limits: RelayLimits | None, traffic: Traffic, open_net: OpenNet) -> None:
        """`limits`: None carries nothing for others. Run `keep` before `dial`."""
        self.desk = RelayDesk(limits or RelayLimits(), offered=limits is not None)
        self._swarm = swarm
        self._drops: Drops = swarm.drops
        self._traffic = traffic
        self._open_net = open_net
        self._own = PeerId(swarm.get_peer_id().to_base58())
        self._places: dict[PeerId, str] = {}  # relay -> the circuit address of ours there
        self._found: tuple[str, ...] = ()
        self.observed: tuple[str, ...] = ()  # IP addresses at which public peers see us
        self.punched = 0  # relayed connections that became direct ones
        self._pending = 0
        self._circuits_in = 0
        self._nursery: trio.Nursery | None = None

    def serve(self, host: Any) -> None:
        """Take both protocols' streams from now on."""
        host.set_stream_handler(TProtocol(HOP), self._answer_hop)
        host.set_stream_handler(TProtocol(STOP), self._answer_stop)

    async def keep(self) -> None:
        """Hold the circuits that we dial, until cancelled. Opens its own nursery."""
        async with trio.open_nursery() as self._nursery:
            await trio.sleep_forever()

    def addresses(self) -> tuple[str, ...]:
        """Where others reach us though we do not listen there: through routers and relays."""
        return (*self._found, *self._places.values())

    def announce(self, addresses: tuple[str, ...]) -> None:
        """Tell others of these addresses too, given without our id."""
        bound = set(self.listening())
        self._found = tuple(f"{each}/p2p/{self._own}" for each in addresses if each not in bound)

    def dialled_at(self, peer: PeerId) -> str | None:
        """Where we dialled a peer that is connected directly, without its id; None when it came to us."""
        for conn in self._swarm.get_connections(ID.from_base58(peer)):
            if conn.direction is Direction.OUTBOUND and not is_relayed(where := seen_at(conn)):
                return where
        return None

    async def probe(self, address: str) -> None:
        """Connect, let the peer prove its key, disconnect. Raises Unreachable. Cancelled: nothing is left."""
        target, _, peer = address.rpartition("/p2p/")
        with mapped(address):
            raw = await self._swarm.transport_manager.transport_for_dialing(Multiaddr(target)).dial(Multiaddr(target))
            try:
                guarded = raw if self._swarm.psk is None else new_protected_conn(raw, self._swarm.psk)
                await self._swarm.upgrader.upgrade_security(guarded, True, ID.from_base58(peer))
            finally:
                raw.stream.abort()

    def gone(self, peer: PeerId) -> None:
        """The last direct connection to a peer went down: the places that hung on it are over."""
        self._places.pop(peer, None)
        self.desk.gone(peer)

    # -- as client ----------------------------------------------------------------------------------------------

    async def reserve(self, relay: PeerId, relay_address: str) -> float:
        """Take a place at a connected relay, or keep it: for how many seconds. Raises Unreachable, Refused.

        `relay_address`: where others reach the relay, without its id.
        """
        with mapped(f"no place at the relay {relay}"):
            async with ended(await self._stream(relay, HOP)) as stream:
                await write(stream, HopMessage(type=HopMessage.RESERVE))
                answer = await read(stream, HopMessage)
                if answer.status != Status.OK:
                    self._places.pop(relay, None)
                    raise Refused(f"the relay {relay} refused: {sentence(answer.status)}")
        self._places[relay] = f"{relay_address}/p2p/{relay}{CIRCUIT_END}/p2p/{self._own}"
        return min(max(answer.reservation.expire - time.time(), PLACE_S_MIN), PLACE_S_MAX)

    def leave(self, relay: PeerId) -> None:
        """Tell nobody of this place any more; the relay forgets it in its own time."""
        self._places.pop(relay, None)

    async def dial(self, relay: PeerId, relay_address: str, peer: PeerId) -> None:
        """Connect to a peer through a connected relay. Raises Unreachable, Refused. Cancelled: nothing is left."""
        assert self._nursery is not None, "keep() runs first"
        with mapped(f"cannot reach {peer} through the relay {relay}"):
            net = await self._stream_to(relay, HOP)
            circuit, connected = self._circuit(net, f"{relay_address}/p2p/{relay}{CIRCUIT_END}"), False
            try:
                await write(circuit, HopMessage(type=HopMessage.CONNECT, peer=WirePeer(id=wire_id(peer))))
                answer = await read(circuit, HopMessage)
                if answer.status != Status.OK:
                    raise Refused(f"the relay {relay} did not connect us to {peer}: {sentence(answer.status)}")
                raw: Any = _raw(circuit, initiator=True)
                if self._swarm.psk is not None:
                    raw = new_protected_conn(raw, self._swarm.psk)
                await self._swarm.upgrade_outbound_raw_conn(raw, ID.from_base58(peer))
                connected = True
            finally:
                if not connected:
                    circuit.abort()
                    await circuit.reset()
            self._nursery.start_soon(self._hold, circuit)

    async def _hold(self, circuit: CircuitSocket) -> None:
        try:
            await circuit.over.wait()
        finally:
            await circuit.reset()

    async def _answer_stop(self, net: Any) -> None:
        """A relay connects somebody to us; lives as long as the circuit. What is wrong with it is counted."""
        relay = PeerId(net.muxed_conn.peer_id.to_base58())
        circuit = self._circuit(net, f"{seen_at(net.swarm_conn)}/p2p/{relay}{CIRCUIT_END}")
        try:
            if await self._drops.contain("relay_stop_failed", self._stop_words, circuit, relay, net):
                await circuit.close()
            else:
                await circuit.reset()
        finally:
            circuit.abort()

    async def _stop_words(self, circuit: CircuitSocket, relay: PeerId, net: Any) -> None:
        asked = await read(circuit, StopMessage)
        status = self._stop_status(relay, net, asked)
        if status != Status.OK:
            return await write(circuit, StopMessage(type=StopMessage.STATUS, status=status))
        self._circuits_in += 1
        try:
            await self._take_circuit(circuit, ID(asked.peer.id))
        finally:
            self._circuits_in -= 1

    def _stop_status(self, relay: PeerId, net: Any, asked: StopMessage) -> Any:
        if not asked.HasField("type") or asked.type != StopMessage.CONNECT or peer_of(asked.peer.id) is None:
            self._drops.count("relay_malformed")
            return Status.MALFORMED_MESSAGE
        if relay not in self._places or _over_a_relay(net):
            self._drops.count("relay_unasked")
            return Status.PERMISSION_DENIED
        if self._pending >= PENDING_MAX or self._circuits_in >= CIRCUITS_IN_MAX:
            self._drops.count("relay_circuits_in")
            return Status.RESOURCE_LIMIT_EXCEEDED
        return Status.OK

    async def _take_circuit(self, circuit: CircuitSocket, source: ID) -> None:
        """Handshake, then wait for the end."""
        self._pending += 1  # without a pause since the bound was looked at
        try:
            await write(circuit, StopMessage(type=StopMessage.STATUS, status=Status.OK))
            raw = _raw(circuit, initiator=False)
            muxed = await self._swarm.upgrade_inbound_raw_conn(raw, Multiaddr(circuit.seen_at))
        finally:
            self._pending -= 1
        if muxed.peer_id != source:
            self._drops.count("relay_named_another")
            return
        await circuit.over.wait()

    # -- as relay -----------------------------------------------------------------------------------------------

    async def _answer_hop(self, net: Any) -> None:
        """One request of a peer; lives as long as the circuit that it asked for."""
        peer = PeerId(net.muxed_conn.peer_id.to_base58())
        stream = self._bytes(net)
        if await self._drops.contain("relay_hop_failed", self._hop_words, stream, peer, net):
            await stream.close()
        else:
            await stream.reset()

    async def _hop_words(self, stream: ByteStream, peer: PeerId, net: Any) -> None:
        asked = await read(stream, HopMessage)
        if _over_a_relay(net):
            self._drops.count("relay_over_relay")
            await write(stream, status_answer(Status.PERMISSION_DENIED))
        elif asked.HasField("type") and asked.type == HopMessage.RESERVE:
            await write(stream, self._reserved(peer, net))
        elif asked.type == HopMessage.CONNECT and (target := peer_of(asked.peer.id)) is not None:
            await self._connect(stream, peer, target)
        else:
            self._drops.count("relay_malformed")
            await write(stream, status_answer(Status.MALFORMED_MESSAGE))

    def _reserved(self, peer: PeerId, net: Any) -> HopMessage:
        now = trio.current_time()
        until = self.desk.reserve(peer, seen_group(seen_at(net.swarm_conn)), now)
        if isinstance(until, No):
            self._drops.count(until.reason)
            return status_answer(_STATUSES[until.reason])
        own = [Multiaddr(f"{each}/p2p/{self._own}").to_bytes() for each in self.listening()]
        answer = status_answer(Status.OK)
        answer.reservation.CopyFrom(Reservation(expire=int(time.time() + until - now), addrs=own))
        answer.limit.CopyFrom(self._limit())
        return answer

    def listening(self) -> list[str]:
        """The multiaddrs that we listen on."""
        return [str(each) for listener in self._swarm.listeners.values() for each in listener.get_addrs()]

    def _limit(self) -> Limit:
        limits = self.desk.limits
        return Limit(duration=int(limits.circuit_s), data=limits.circuit_bytes_max)

    async def _connect(self, source: ByteStream, peer: PeerId, target: PeerId) -> None:
        circuit = self.desk.open(peer, target, trio.current_time())
        if isinstance(circuit, No):
            self._drops.count(circuit.reason)
            return await write(source, status_answer(_STATUSES[circuit.reason]))
        try:
            try:
                end = await self._stop_stream(peer, target)
            except (P2PError, BaseLibp2pError, trio.TooSlowError):
                self._drops.count("relay_target_failed")
                return await write(source, status_answer(Status.CONNECTION_FAILED))
            async with ended(end):
                answer = status_answer(Status.OK)
                answer.limit.CopyFrom(self._limit())
                await write(source, answer)
                await self._carry(source, end, circuit)
        finally:
            self.desk.close(circuit)

    async def _stop_stream(self, peer: PeerId, target: PeerId) -> ByteStream:
        """A stream to the target, which has taken the circuit. Raises P2PError."""
        stream, taken = await self._stream(target, STOP), False
        try:
            ask = StopMessage(type=StopMessage.CONNECT, peer=WirePeer(id=wire_id(peer)), limit=self._limit())
            await write(stream, ask)
            answer = await read(stream, StopMessage)
            if answer.status != Status.OK:
                raise Refused(f"{target} does not take the circuit: {sentence(answer.status)}")
            taken = True
        finally:
            if not taken:
                await stream.reset()
        return stream

    async def _carry(self, source: ByteStream, target: ByteStream, circuit: Circuit) -> None:
        """Copy both ways until one end is done, or the circuit has had its time or its bytes."""
        with trio.move_on_after(circuit.until - trio.current_time()) as time_scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._copy, source, target, circuit, nursery.cancel_scope)
                nursery.start_soon(self._copy, target, source, circuit, nursery.cancel_scope)
        if time_scope.cancelled_caught:
            self.desk.overdue()
            self._drops.count("relay_circuit_time")
        await source.reset()

    async def _copy(self, come: ByteStream, go: ByteStream, circuit: Circuit, both: trio.CancelScope) -> None:
        try:
            while True:
                piece = memoryview(await come.read())
                for start in range(0, len(piece), CARRY_BYTES):
                    part = piece[start : start + CARRY_BYTES]
                    wait_s = self.desk.spend(circuit, len(part), trio.current_time())
                    if isinstance(wait_s, No):
                        self._drops.count(wait_s.reason)
                        return both.cancel()
                    await trio.sleep(wait_s)
                    with trio.fail_after(2 * STALL_S):
                        await go.write(part)
        except StreamClosed:
            await go.close()
            both.deadline = min(both.deadline, trio.current_time() + LINGER_S)
        except Unreachable:
            both.cancel()
        except trio.TooSlowError:
            self._drops.count("relay_stalled")
            both.cancel()

    # -- streams ------------------------------------------------------------------------------------------------

    async def _stream_to(self, peer: PeerId, protocol: str) -> Any:
        net = await self._open_net(peer, protocol)
        if _over_a_relay(net):
            await self._bytes(net).reset()
            raise Refused(f"{peer} is itself behind a relay")
        return net

    async def _stream(self, peer: PeerId, protocol: str) -> ByteStream:
        return self._bytes(await self._stream_to(peer, protocol))

    def _bytes(self, net: Any) -> ByteStream:
        return ByteStream(*self._parts(net))

    def _circuit(self, net: Any, seen_at: str) -> CircuitSocket:
        return CircuitSocket(*self._parts(net), seen_at=seen_at)

    def _parts(self, net: Any) -> tuple[Any, ...]:
        peer = PeerId(net.muxed_conn.peer_id.to_base58())
        return net, peer, self._traffic, self._drops, socket_of(net.swarm_conn).abort


def _over_a_relay(net: Any) -> bool:
    return is_relayed(seen_at(net.swarm_conn))


def _raw(circuit: CircuitSocket, *, initiator: bool) -> RawConnection:
    return RawConnection(circuit, initiator, ConnectionType.RELAYED, [Multiaddr(circuit.seen_at)])
