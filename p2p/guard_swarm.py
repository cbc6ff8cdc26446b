"""The swarm: who is let in, for how long, and that nobody is dialled behind our back.

Rules: an inbound connection holds its place from accept until it closes or yields it, no longer. libp2p never dials by
itself: p2p/peering.py decides. A connection that has been silent, though pinged, is closed.

Source: NETWORK.md section 0 (2), section 4; SECURITY.md F7, F10.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import trio
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.exceptions import SwarmException
from libp2p.network.swarm import Swarm
from libp2p.stream_muxer.yamux.yamux import FLAG_SYN, TYPE_PING, YAMUX_HEADER_FORMAT

from crypto.identity import PeerId
from p2p.admission import Admission, Refusal, Ticket
from p2p.guard import ContainedTasks, Drops
from p2p.guard_circuit import CircuitSocket
from p2p.guard_socket import GuardedSocket
from p2p.host_config import HostConfig
from p2p.interfaces import multiaddr_text

CLOSE_S = 1.0  # for a parting word to the peer
_PING = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_PING, FLAG_SYN, 0, 0)


class _NoConnector(AutoConnector):  # type: ignore[misc]  # libp2p's types are not followed
    """Connects nobody, remembers nothing.

    Around: libp2p dials peers it has heard of every 30 s and after each disconnect, whatever the watermarks say.
    """

    async def run_background_task(self, nursery: trio.Nursery) -> None:
        """Not started."""

    async def maybe_connect(self) -> None:
        """Nobody."""

    def record_disconnect(self, peer_id: Any) -> None:
        """Nothing."""


class GuardedSwarm(Swarm):  # type: ignore[misc]  # libp2p's types are not followed
    """A swarm with admission, contained tasks and no dialling of its own."""

    def __init__(self, *args: Any, config: HostConfig, drops: Drops, **kwargs: Any) -> None:
        self.drops = drops
        self.admission = Admission(config)
        self.is_known: Callable[[PeerId], bool] = lambda _peer: False  # whom places are kept for
        self._scopes: dict[Ticket, trio.CancelScope] = {}
        self._tickets: dict[trio.lowlevel.Task, Ticket] = {}  # of the handshake that a task carries out
        super().__init__(*args, **kwargs)
        self.auto_connector = _NoConnector(self)

    @property
    def manager(self) -> Any:
        """The service's manager, whose tasks are contained."""
        return ContainedTasks(super().manager, self.drops)

    async def _handle_inbound_connection(self, read_write_closer: GuardedSocket, maddr: Any) -> None:
        """One inbound connection, from accept until it is closed.

        Around: libp2p holds the place, and a task, until the swarm stops, so that it is deaf after a few hundred
        connections; and idle sockets can take every place for the length of the handshake timeout.
        """
        remote = read_write_closer.get_remote_address()
        verdict, yielding = self.admission.open(remote[0] if remote else "?", trio.current_time())
        if yielding is not None:
            self.drops.count("pending_yielded")
            self._scopes[yielding].cancel()
        if isinstance(verdict, Refusal):
            self.drops.count(verdict.reason)
            read_write_closer.abort()
            return
        task, closed = trio.lowlevel.current_task(), False
        try:
            with trio.CancelScope() as scope:
                self._scopes[verdict] = scope
                self._tickets[task] = verdict
                muxed = await self.upgrade_inbound_raw_conn(RawConnection(read_write_closer, False), maddr)
                await muxed.event_closed.wait()
                closed = True
        finally:
            if not closed:
                read_write_closer.abort()  # its readers see the end, and libp2p takes the rest away
            del self._tickets[task], self._scopes[verdict]
            self.admission.close(verdict)

    async def add_conn(self, muxed_conn: Any, direction: str = "unknown") -> Any:
        """Take a connection whose handshake is done. Raises SwarmException when there is no place for it.

        Around: libp2p counts all connections alike, so that strangers can take every place, those of our own dials
        too.
        """
        ticket = self._tickets.get(trio.lowlevel.current_task()) if direction == "inbound" else None
        if ticket is not None:
            known = self.is_known(PeerId(muxed_conn.peer_id.to_base58()))
            refusal, yielding = self.admission.establish(ticket, known=known)
            if yielding is not None:
                self.drops.count("place_yielded")
                self._scopes[yielding].cancel()
            if refusal is not None:
                self.drops.count(refusal.reason)
                raise SwarmException(f"no place for an inbound connection: {refusal.reason}")
        return await super().add_conn(muxed_conn, direction=direction)

    async def dial_peer(self, peer_id: Any) -> list[Any]:
        """The live connections to a peer. Raises SwarmException when there is none.

        Around: libp2p dials whatever address it once heard when a stream is wanted, one address a peer, after 250 ms
        of waiting, and then not for a minute.
        """
        live = [conn for conn in self.get_connections(peer_id) if not conn.is_closed]
        if not live:
            raise SwarmException(f"not connected to {peer_id}")
        return live

    async def watch_health(self, interval_s: float) -> None:
        """Ping connections on which nothing arrived for an interval, and close those on which nothing did in the next:
        within three intervals of the last word. Never returns.

        Around: libp2p's yamux pings are not answered for, so that a frozen peer stays connected for ever; its own
        health monitor asks one connection after another and dials replacements by itself.
        """
        heard: dict[Any, int] = {}
        pinged: set[Any] = set()
        async with trio.open_nursery() as nursery:
            while True:
                await trio.sleep(interval_s)
                live = {conn: socket_of(conn) for conn in self.get_connections() if not conn.is_closed}
                heard = {conn: count for conn, count in heard.items() if conn in live}
                pinged &= live.keys()
                for conn, socket in live.items():
                    if heard.get(conn) != socket.bytes_in:
                        heard[conn] = socket.bytes_in
                        pinged.discard(conn)
                    elif conn in pinged:
                        self.drops.count("peer_silent")
                        nursery.start_soon(close_connection, conn)
                    else:
                        pinged.add(conn)
                        nursery.start_soon(self.drops.contain, "ping_failed", conn.muxed_conn._write_frame, _PING)


def socket_of(conn: Any) -> GuardedSocket | CircuitSocket:
    """What is under a connection: through encryption, and through the pre-shared key's layer when there is one."""
    raw = conn.muxed_conn.secured_conn.conn.read_writer.read_write_closer
    raw = getattr(raw, "_conn", raw)
    socket = raw.stream
    assert isinstance(socket, GuardedSocket | CircuitSocket), f"{type(socket)} under a connection: libp2p changed"
    return socket


def seen_at(conn: Any) -> str | None:
    """The multiaddr at which a connection's other end is seen; of a relayed one the relay's, with /p2p-circuit."""
    socket = socket_of(conn)
    if isinstance(socket, CircuitSocket):
        return socket.seen_at
    remote = socket.get_remote_address()
    return None if remote is None else multiaddr_text(*remote)


async def close_connection(conn: Any) -> None:
    """Close a connection: a parting word if the peer takes one within CLOSE_S, the end in any case.

    Shielded, as half a closing leaves a dead connection in libp2p's tables. Takes CLOSE_S and a little.
    """
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_abort_later, socket_of(conn))
            await conn.close()
            nursery.cancel_scope.cancel()


async def _abort_later(socket: GuardedSocket) -> None:
    await trio.sleep(CLOSE_S)
    socket.abort()
