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
from p2p.frame import FrameReader, frame_head
from p2p.guard import RESET_S, SLICE_BYTES, Drops
from p2p.guard_mux import GuardedFrames

WINDOW_POLL_S = 0.1  # between looks at whether a stream whose window is closed has ended: nothing tells its writer


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
        self._frames: GuardedFrames = self._conn.secured_conn
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
        head, body = frame_head(frame), memoryview(frame)
        if not self._sending:
            raise LocalProtocolError("a frame was sent after close")
        size, sent = len(head) + len(body), 0
        try:
            while sent < size:
                await trio.lowlevel.checkpoint_if_cancelled()  # the write gives others their turn
                room = await self._wait_window()
                first = head[sent:room]
                start = max(0, sent - len(head))
                piece = body[start : start + room - len(first)]
                with trio.CancelScope(shield=True):  # bounded by the socket's WRITE_STALL_S
                    await self._frames.write_data(self._muxed, first, piece)
                sent += len(first) + len(piece)
        except BaseLibp2pError as exc:
            raise self._break(f"the stream to {self._peer} broke while sending", exc) from exc
        finally:
            if sent < size:
                await self.reset()
        self._traffic.frames_out += 1
        self._traffic.bytes_out += size

    async def _wait_window(self) -> int:
        """Bytes that may be written now, at least 1. Raises MuxedStreamError when the stream is over."""
        while self._muxed.send_window <= 0:
            if self._muxed.closed or self._muxed.send_closed or self._conn.event_shutting_down.is_set():
                raise MuxedStreamError("the stream ended while its window was closed")
            await self._frames.wait_window(self._muxed, WINDOW_POLL_S)
        return min(int(self._muxed.send_window), SLICE_BYTES)

    async def receive(self) -> bytes:
        """See Stream.receive. Cancelled: nothing is lost."""
        if self._ready:
            await trio.lowlevel.checkpoint()
        while not self._ready:
            self._ready.extend(self._reader.feed(await self._read()))
            with trio.CancelScope(shield=True):
                await self._refill()  # libp2p's own read sends an update a read
        frame = self._ready.popleft()
        self._traffic.frames_in += 1
        self._traffic.bytes_in += len(frame)
        return frame

    async def _read(self) -> bytes | bytearray:
        """Some bytes. Raises StreamClosed (clean end between frames), Unreachable."""
        if self._broken is not None:
            await trio.lowlevel.checkpoint()
            raise Unreachable(self._broken)
        number = self._muxed.stream_id
        try:
            return await self._frames.read_stream(self._muxed)
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
            await self._frames.refill(self._muxed)
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
