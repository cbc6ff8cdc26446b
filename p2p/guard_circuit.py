"""A relayed connection's bytes: one yamux stream to a relay, with the face of a socket below encryption.

Rules: as in guard_socket.py: a write is whole or the circuit is over, a read of n bytes gives n bytes or fewer at the
end, `abort` is sync and whoever reads or writes sees the end. A relay that takes nothing for STALL_S is as good
as gone. Nobody but the two ends can read what goes through: Noise runs on top of this.

Source: libp2p specs, relay/circuit-v2.md ("the relayed connection").
"""

from __future__ import annotations

from typing import Any

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.io.abc import ReadWriteCloser
from libp2p.io.exceptions import ConnectionClosedError

from p2p.errors import P2PError
from p2p.guard_socket import READ_BYTES, WRITE_STALL_BYTES, lock_without_pause
from p2p.guard_stream import Libp2pStream

STALL_S = 15.0  # the relay may slow us down; in this time it takes WRITE_STALL_BYTES or the circuit is over


class ByteStream(Libp2pStream):
    """A yamux stream as bytes instead of frames. One task reads; writers take turns."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._left = bytearray()
        self._write_lock = trio.Lock()  # two writers at once would mix records

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of it; waiting for the peer's window has no end of its own. If cut short, the stream is reset.

        Raises Unreachable.
        """
        view, sent = memoryview(data), 0
        await lock_without_pause(self._write_lock)
        try:
            while sent < len(view):
                room = await self._wait_window()
                piece = view[sent : sent + room]
                with trio.CancelScope(shield=True):  # bounded by the socket's WRITE_STALL_S
                    await self._frames.write_data(self._muxed, b"", piece)
                sent += len(piece)
                self._traffic.bytes_out += len(piece)
                self.progress(len(piece))
        except BaseLibp2pError as exc:
            raise self._break(f"the stream to {self.peer} broke while sending", exc) from exc
        finally:
            self._write_lock.release()
            if sent < len(view):
                await self.reset()

    async def read(self, n: int | None = None) -> bytes:
        """n bytes (at most READ_BYTES), with None what is there, at least one. Cancelled: nothing is lost.

        Raises StreamClosed (the end), Unreachable (broken).
        """
        wanted = 1 if n is None else min(n, READ_BYTES)
        while len(self._left) < wanted:
            piece = await self._read()
            self._left += piece
            self._traffic.bytes_in += len(piece)
            with trio.CancelScope(shield=True):
                await self._refill()
        taken = bytes(self._left if n is None else self._left[:wanted])
        del self._left[: len(taken)]
        return taken

    def progress(self, size: int) -> None:
        """`size` bytes were taken by the peer's window."""


class CircuitSocket(ByteStream, ReadWriteCloser):  # type: ignore[misc]  # libp2p's types are not followed
    """One relayed connection, below encryption; see GuardedSocket, whose place it takes.

    `seen_at`: the relay's address and id, then /p2p-circuit. `over` is set when nothing more will come or go.
    """

    def __init__(self, *args: Any, seen_at: str) -> None:
        super().__init__(*args)
        self.bytes_in = 0
        self.seen_at = seen_at
        self.over = trio.Event()
        self._reading: trio.CancelScope | None = None
        self._stall: trio.CancelScope | None = None
        self._taken = 0

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, even when cancelled meanwhile. Raises ConnectionClosedError (gone, or stalled)."""
        if self.over.is_set():
            raise ConnectionClosedError("the circuit is closed", transport="relay")
        with trio.move_on_after(STALL_S) as stall:
            stall.shield = True
            self._stall, self._taken = stall, 0
            try:
                await super().write(data)
            except P2PError as exc:
                self.abort()
                raise ConnectionClosedError(str(exc), transport="relay") from exc
        if stall.cancelled_caught:
            if not self.over.is_set():
                self._drops.count("relay_stalled")
                self.abort()
            raise ConnectionClosedError(f"the relay took too little in {STALL_S} s", transport="relay")

    def progress(self, size: int) -> None:
        self._taken += size
        if self._stall is not None and self._taken >= WRITE_STALL_BYTES:
            self._stall.deadline, self._taken = trio.current_time() + STALL_S, 0

    async def read(self, n: int | None = None) -> bytes:
        """As GuardedSocket.read; nothing at the end. Raises ConnectionClosedError."""
        if self.over.is_set():
            await trio.lowlevel.checkpoint()
            return b""
        with trio.CancelScope() as self._reading:
            try:
                piece = await super().read(n)
            except P2PError as exc:
                self.abort()
                raise ConnectionClosedError(str(exc), transport="relay") from exc
        if self._reading.cancelled_caught:
            return b""
        self.bytes_in += len(piece)
        return piece

    def abort(self) -> None:
        """The end, at once; the stream itself is reset by whoever keeps the circuit."""
        self.over.set()
        if self._reading is not None:
            self._reading.cancel()
        if self._stall is not None:
            self._stall.cancel()

    async def close(self) -> None:
        """The end; what was written still goes out."""
        await super().close()
        self.abort()

    def get_remote_address(self) -> tuple[str, int] | None:
        """None: libp2p takes an IP address and a port only."""
        return None
