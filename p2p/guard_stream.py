"""One libp2p stream as frames: p2p.transport.Stream.

Rules: a small frame is one write. Slices are whole Noise records and never larger than the window that is open, so no
write waits for the peer's reader inside the shield; waiting for the window is cancellable and has no end of its own.
A frame that was not sent whole resets the stream. A broken connection is never taken for a clean end.

Source: NETWORK.md "Our rules" 5, section 0 (3, 4), section 4.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.stream_muxer.exceptions import MuxedStreamEOF, MuxedStreamError

from crypto.identity import PeerId
from p2p.errors import LocalProtocolError, StreamClosed, Unreachable
from p2p.frame import FrameReader, encode_frame
from p2p.guard import RESET_S, SLICE_BYTES, Drops

READ_BYTES = 1 << 20  # of what is there, in one read
WINDOW_POLL_S = 0.005  # yamux has no event for an opening window; doubled while it stays closed
WINDOW_POLL_S_MAX = 0.1


@dataclass(slots=True)
class Traffic:
    """Counts of one host, shared by its streams."""

    streams_open: int = 0
    frames_in: int = 0
    frames_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Libp2pStream:
    """A stream of frames over one yamux stream. One task sends, one receives."""

    def __init__(self, net: Any, peer: PeerId, traffic: Traffic, drops: Drops, abort: Callable[[], None]) -> None:
        """`abort` closes the socket below: for a peer that does not even take a reset."""
        self._net = net
        self._muxed = net.muxed_stream
        self._conn = net.muxed_stream.conn
        self._peer = peer
        self._traffic = traffic
        self._drops = drops
        self._abort = abort
        self._reader = FrameReader()
        self._ready: deque[bytes] = deque()
        self._sending = True
        self._counted = True
        self._broken: str | None = None
        traffic.streams_open += 1

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""
        return self._peer

    async def send(self, frame: bytes) -> None:
        """See Stream.send. If cancelled, the frame is sent whole or the stream is reset."""
        raw = encode_frame(frame)
        if not self._sending:
            raise LocalProtocolError("a frame was sent after close")
        sent = 0
        try:
            await trio.lowlevel.checkpoint()
            while sent < len(raw):
                room = await self._wait_window()
                piece = raw if len(raw) <= room else raw[sent : sent + room]
                with trio.CancelScope(shield=True):  # bounded by the socket's WRITE_STALL_S
                    await self._muxed.write(piece)
                sent += len(piece)
                if sent < len(raw):
                    await trio.lowlevel.checkpoint()
        except BaseLibp2pError as exc:
            raise self._break(f"the stream to {self._peer} broke while sending", exc) from exc
        finally:
            if sent < len(raw):
                await self.reset()
        self._traffic.frames_out += 1
        self._traffic.bytes_out += len(raw)

    async def _wait_window(self) -> int:
        """Bytes that may be written now, at least 1. Raises MuxedStreamError when the stream is over."""
        poll_s = WINDOW_POLL_S
        while self._muxed.send_window <= 0:
            if self._muxed.closed or self._muxed.send_closed or self._conn.event_shutting_down.is_set():
                raise MuxedStreamError("the stream ended while its window was closed")
            await trio.sleep(poll_s)
            poll_s = min(2 * poll_s, WINDOW_POLL_S_MAX)
        return min(int(self._muxed.send_window), SLICE_BYTES)

    async def receive(self) -> bytes:
        """See Stream.receive. Cancelled: nothing is lost."""
        if self._ready:
            await trio.lowlevel.checkpoint()
        while not self._ready:
            self._ready.extend(self._reader.feed(await self._read()))
            with trio.CancelScope(shield=True):
                # Sends an update only when half the window is used up; libp2p's own read sends one a read.
                await self._refill()
        frame = self._ready.popleft()
        self._traffic.frames_in += 1
        self._traffic.bytes_in += len(frame)
        return frame

    async def _read(self) -> bytes:
        """Some bytes. Raises StreamClosed (clean end between frames), Unreachable."""
        if self._broken is not None:
            await trio.lowlevel.checkpoint()
            raise Unreachable(self._broken)
        number = self._muxed.stream_id
        try:
            return bytes(await self._conn.read_stream(number, READ_BYTES))
        except MuxedStreamEOF as exc:
            # The end of the connection, and a reset whose reader slept, look like an end of the stream too.
            lost = self._muxed.reset_received or self._conn.event_shutting_down.is_set()
            if lost or self._reader.bytes_pending:
                raise self._break(f"the stream from {self._peer} broke", exc) from exc
            raise StreamClosed(f"{self._peer} ended the stream") from exc
        except BaseLibp2pError as exc:
            raise self._break(f"the stream from {self._peer} broke", exc) from exc
        finally:
            if number not in self._conn.streams:
                self._conn.stream_events.pop(number, None)  # a reader that wakes after a reset leaves one behind

    async def _refill(self) -> None:
        try:
            await self._muxed._auto_tune_and_send_window_update(bytes_read=0)
        except BaseLibp2pError:
            pass  # the connection broke; the data is ours already, the next read says it

    def _break(self, what: str, exc: BaseException) -> Unreachable:
        self._broken = f"{what}: {type(exc).__name__} {str(exc)[:200]}".rstrip()
        return Unreachable(self._broken)

    async def close(self) -> None:
        """See Stream.close. Bounded by the socket's stall time."""
        if self._sending:
            self._sending = False
            self._uncount()
            with trio.CancelScope(shield=True):
                await self._drops.contain("close_failed", self._net.close)
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """See Stream.reset. Takes RESET_S at most; a peer that takes no reset loses the connection."""
        self._sending = False
        self._uncount()
        if self._broken is None:
            self._broken = "the stream was reset here"
        with trio.move_on_after(RESET_S) as scope:
            scope.shield = True
            await self._drops.contain("reset_failed", self._net.reset)
        if scope.cancelled_caught:
            self._drops.count("reset_stalled")
            self._abort()

    def _uncount(self) -> None:
        if self._counted:
            self._counted = False
            self._traffic.streams_open -= 1
