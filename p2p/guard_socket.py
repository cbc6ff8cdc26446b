"""TCP sockets under libp2p: whole writes, buffered reads, honest listening.

Rules: a write is never cut by a cancellation. A peer that takes less than WRITE_STALL_BYTES in WRITE_STALL_S loses the
connection, because part of a record may be out. A read of n bytes gives n bytes, or fewer at the end.
Listeners do not share a port with anyone, live in the swarm's nursery, and keep the error of a failed bind.

Source: NETWORK.md section 0 (3), section 1 (address pitfalls), section 2 (buffered reads).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
from libp2p.abc import IListener
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.transport.exceptions import OpenConnectionError
from libp2p.transport.tcp.tcp import TCP
from libp2p.utils.multiaddr_utils import extract_ip_from_multiaddr
from multiaddr import Multiaddr

from p2p.guard import Drops
from p2p.interfaces import multiaddr_text

WRITE_STALL_S = 5.0  # a peer that takes nothing for so long is as good as gone
WRITE_STALL_BYTES = 65_536  # what a peer has to take in that time
READ_BYTES = 262_144  # asked of the system at once: several Noise records
LISTEN_BACKLOG = 256


class GuardedSocket(ReadWriteCloser):  # type: ignore[misc]  # libp2p's types are not followed
    """One TCP connection, below encryption.

    Around: (1) a write cancelled between encryption and the socket loses a Noise nonce, or half a record, and with it
    every stream of the connection; (2) two system calls a record; (3) no remote address on IPv6.
    """

    def __init__(self, stream: trio.SocketStream, drops: Drops) -> None:
        self.bytes_in = 0
        self.bytes_out = 0
        self._stream = stream
        self._drops = drops
        self._buffer = bytearray()
        self._write_lock = trio.Lock()  # two writers at once would mix records
        try:
            self._remote: tuple[str, int] | None = tuple(stream.socket.getpeername()[:2])
        except OSError:
            self._remote = None  # gone already: the first read will say so

    async def write(self, data: bytes) -> None:
        """Send all of `data`, even when cancelled meanwhile. Raises ConnectionClosedError (gone, or stalled)."""
        with trio.move_on_after(WRITE_STALL_S) as stall:
            stall.shield = True  # no checkpoint before this line
            try:
                await lock_without_pause(self._write_lock)
                try:
                    await self._send_all(memoryview(data), stall)
                finally:
                    self._write_lock.release()
                self.bytes_out += len(data)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError) as exc:
                raise ConnectionClosedError("connection closed while writing", transport="tcp") from exc
        if stall.cancelled_caught:
            self._drops.count("write_stalled")
            self.abort()
            raise ConnectionClosedError(f"the peer took too little in {WRITE_STALL_S} s", transport="tcp")

    async def _send_all(self, data: memoryview, stall: trio.CancelScope) -> None:
        """Send it with as few system calls as possible; every WRITE_STALL_BYTES taken put the deadline off."""
        sent, wanted = 0, WRITE_STALL_BYTES
        while sent < len(data):
            sent += await self._stream.socket.send(data[sent:])
            if sent >= wanted:
                stall.deadline = trio.current_time() + WRITE_STALL_S
                wanted = sent + WRITE_STALL_BYTES

    async def read(self, n: int | None = None) -> bytes:
        """n bytes (at most READ_BYTES), fewer only at the end, none after it; with None what is there, at least one.

        Cancelled: nothing is lost.
        """
        buffer = self._buffer
        if n is None:
            if not buffer:
                return await self._receive_some()  # not copied
            n = len(buffer)
        wanted = min(n, READ_BYTES)
        while len(buffer) < wanted:
            piece = await self._receive_some()
            if not piece:
                break
            buffer += piece
        taken = bytes(buffer[:wanted])
        del buffer[:wanted]
        return taken

    async def _receive_some(self) -> bytes:
        """What one system call gives; nothing at the end. Raises ConnectionClosedError."""
        try:
            piece = await self._stream.receive_some(READ_BYTES)
        except trio.BrokenResourceError as exc:
            raise ConnectionClosedError("connection reset by the peer", transport="tcp") from exc
        except trio.ClosedResourceError:
            return b""
        self.bytes_in += len(piece)
        return bytes(piece)

    def abort(self) -> None:
        """Close at once, without a word to the peer. Whoever reads or writes sees it closed."""
        self._stream.socket.close()

    async def close(self) -> None:
        """Close; what was written still goes out."""
        await self._stream.aclose()

    def get_remote_address(self) -> tuple[str, int] | None:
        """The other side's IP address and port."""
        return self._remote


async def lock_without_pause(lock: trio.Lock) -> None:
    """Acquire a lock; one that is free without a turn of the scheduler, which the write behind it takes anyway."""
    try:
        lock.acquire_nowait()
    except trio.WouldBlock:
        await lock.acquire()


class GuardedTcp(TCP):  # type: ignore[misc]  # libp2p's types are not followed
    """Makes GuardedSockets for both directions. `listen_errors`: multiaddr -> why its bind failed."""

    def __init__(self, drops: Drops) -> None:
        super().__init__(dns_max_retries=1)
        self.listen_errors: dict[str, OSError] = {}
        self._drops = drops

    async def _dial_resolved(self, maddr: Multiaddr, source: tuple[str, int] | None = None) -> Any:
        ip, port = _ip_and_port(maddr)
        try:
            stream = await trio.open_tcp_stream(ip, port)
        except OSError as exc:
            raise OpenConnectionError(str(exc)) from exc
        return RawConnection(GuardedSocket(stream, self._drops), True)

    def create_listener(self, handler_function: Callable[[GuardedSocket], Awaitable[None]]) -> GuardedListener:
        """A listener for one address, not listening yet."""
        return GuardedListener(handler_function, self._drops, self.listen_errors)


class GuardedListener(IListener):  # type: ignore[misc]  # libp2p's types are not followed
    """Accepts on one address.

    Around: libp2p binds with SO_REUSEPORT, so that two nodes take one port without an error and share its
    connections; only logs a failed bind; and accepts in a system task, whose failure ends the process.
    """

    background_nursery: trio.Nursery  # set by the swarm before it listens

    def __init__(
        self, handler: Callable[[GuardedSocket], Awaitable[None]], drops: Drops, errors: dict[str, OSError]
    ) -> None:
        self._handler = handler
        self._drops = drops
        self._errors = errors
        self._listeners: list[trio.SocketListener] = []
        self._scope = trio.CancelScope()

    async def listen(self, maddr: Multiaddr) -> None:
        """Bind and accept from now on. Raises OSError, which `listen_errors` also keeps."""
        ip, port = _ip_and_port(maddr)
        try:
            self._listeners = list(await trio.open_tcp_listeners(port, host=ip, backlog=LISTEN_BACKLOG))
        except OSError as exc:
            self._errors[str(maddr)] = exc
            raise
        for each in self._listeners:  # after the bind, which stays ours alone: punching dials from this port
            each.socket.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_REUSEPORT, 1)
        self.background_nursery.start_soon(self._accept)

    async def _accept(self) -> None:
        with self._scope:
            await trio.serve_listeners(self._serve, self._listeners)

    async def _serve(self, stream: trio.SocketStream) -> None:
        await self._drops.contain("connection_failed", self._handler, GuardedSocket(stream, self._drops))

    def get_addrs(self) -> tuple[Multiaddr, ...]:
        """The addresses really bound, port included."""
        return tuple(Multiaddr(multiaddr_text(*each.socket.getsockname()[:2])) for each in self._listeners)

    async def close(self) -> None:
        """Accept no more."""
        self._scope.cancel()
        for each in self._listeners:
            await each.aclose()


def _ip_and_port(maddr: Multiaddr) -> tuple[str, int]:
    """The IP address and TCP port of a resolved multiaddr. Raises OpenConnectionError when it has none."""
    ip = extract_ip_from_multiaddr(maddr)
    if ip is None or "tcp" not in {protocol.name for protocol in maddr.protocols()}:
        raise OpenConnectionError(f"{maddr} has no IP address and TCP port")
    return ip, int(maddr.value_for_protocol("tcp"))
