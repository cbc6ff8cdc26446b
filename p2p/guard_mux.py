"""yamux: how much a peer may make us hold, and a short way for the two kinds of frames that carry bulk.

Rules: a peer that sends past the window it was given is dropped with its connection; in frames that libp2p's own code
takes, past twice WINDOW_BYTES_MAX, to which windows grow while a reader keeps up. A data frame that we send is never
larger than the window that the peer has opened. What is not a plain data frame or window update of an open stream goes
to libp2p's own code.

Source: NETWORK.md section 4 (receive window not enforced); hashicorp/yamux spec.md, flow control.
"""

from __future__ import annotations

import struct
from typing import Any

import libp2p.stream_muxer.yamux.yamux
import trio
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import HEADER_SIZE, TYPE_DATA, TYPE_WINDOW_UPDATE, YAMUX_HEADER_FORMAT
from libp2p.transport.upgrader import TransportUpgrader

from p2p.guard import SLICE_BYTES, WINDOW_BYTES_MAX, Drops
from p2p.guard_noise import GuardedSession
from p2p.guard_socket import lock_without_pause

STREAM_BYTES_MAX = 2 * WINDOW_BYTES_MAX  # unread on one stream
READ_BYTES = 1 << 20  # of what is left of an ended stream
CONNECTION_BYTES_MAX = 32 << 20  # unread on all streams of one connection


class GuardedUpgrader(TransportUpgrader):  # type: ignore[misc]  # libp2p's types are not followed
    """Makes connections whose unread bytes are bounded.

    Around: yamux only logs that a peer exceeded its window; 400 MiB were taken into a stream that nobody read.
    """

    def __init__(self, *args: Any, drops: Drops, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._drops = drops

    async def upgrade_security(self, *args: Any, **kwargs: Any) -> Any:
        """The secured connection, reading and writing many records at a time."""
        return GuardedSession(await super().upgrade_security(*args, **kwargs))

    async def upgrade_connection(self, conn: Any, peer_id: Any) -> Any:
        """The multiplexed connection, not started yet."""
        muxed = await super().upgrade_connection(conn, peer_id)
        assert muxed.stream_buffers == muxed.streams == {}, "yamux changed: look at this workaround again"
        muxed.stream_buffers = _Buffers(self._drops)
        muxed.secured_conn = frames = GuardedFrames(muxed, self._drops)
        muxed.streams = _Streams(frames)
        return muxed


class GuardedFrames:
    """The secured connection of one yamux connection, which deals with plain frames before libp2p sees them.

    Around: libp2p's loop writes some fifteen log lines, takes four locks and makes five copies for each data frame; its
    writer polls for an open window every 10 ms.
    """

    def __init__(self, muxed: Any, drops: Drops) -> None:
        self._muxed = muxed
        self._drops = drops
        self._session: GuardedSession = muxed.secured_conn
        self._body_left = 0  # of a frame that libp2p's own loop reads
        self._opened: dict[int, trio.Event] = {}  # stream -> its writer waits for the window

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    async def read(self, n: int | None = None) -> bytes:
        """For libp2p's loop, which asks for a header and then for that frame's body: the frames that are left to it.

        Raises what GuardedSession.read raises, and TooSlowError for a peer past its window: each ends the connection.
        """
        if self._body_left or n != HEADER_SIZE:
            piece = await self._session.read(n)
            self._body_left = max(0, self._body_left - len(piece))
            return piece
        while True:
            header = await self._session.read(HEADER_SIZE)
            if len(header) < HEADER_SIZE:
                return header
            _, kind, flags, number, length = struct.unpack(YAMUX_HEADER_FORMAT, header)
            stream = self._muxed.streams.get(number)
            plain = not flags and stream is not None
            if plain and kind == TYPE_DATA and length <= WINDOW_BYTES_MAX:
                await self._take_data(number, length)
            elif plain and kind == TYPE_WINDOW_UPDATE:
                stream.send_window += length
                if (waiting := self._opened.pop(number, None)) is not None:
                    waiting.set()
            else:
                self._body_left = length if kind == TYPE_DATA else 0
                return header

    async def _take_data(self, number: int, length: int) -> None:
        """Put the body of a data frame where the stream's reader finds it, as it comes; drop it if there is none."""
        muxed = self._muxed
        while length > 0:
            piece = await self._session.read_some(length)
            length -= len(piece)
            stream = muxed.streams.get(number)
            if stream is not None:
                if len(piece) > stream.recv_window:
                    self._drops.count("window_exceeded")
                    raise trio.TooSlowError("the peer sends past its window")
                muxed.stream_buffers[number].extend(piece)
                stream.recv_window -= len(piece)
                if not length or not self._session.unread:
                    muxed.stream_events[number].set()

    async def write_data(self, stream: Any, head: bytes, data: memoryview) -> None:
        """Send head and data as one data frame of at most the stream's window. Raises MuxedStreamError, IOException."""
        muxed, size = self._muxed, len(head) + len(data)
        assert 0 < size <= min(stream.send_window, SLICE_BYTES), "past the peer's window"
        if stream.send_closed or stream.closed:
            raise MuxedStreamError("the stream is closed for sending")
        stream.send_window -= size
        header = struct.pack(YAMUX_HEADER_FORMAT, 0, TYPE_DATA, 0, stream.stream_id, size)
        await lock_without_pause(muxed._write_lock)
        try:
            await self._session.write(data, header + head)
        finally:
            muxed._write_lock.release()

    async def wait_window(self, stream: Any, seconds: float) -> None:
        """Until the peer opens the stream's window, or so long: nothing tells of a stream that ends meanwhile."""
        opened = self._opened.setdefault(stream.stream_id, trio.Event())
        with trio.move_on_after(seconds) as scope:
            await opened.wait()
        if scope.cancelled_caught:
            self._opened.pop(stream.stream_id, None)

    async def read_stream(self, stream: Any) -> bytes | bytearray:
        """What is unread on a stream, at least a byte, without copying it. Raises MuxedStreamEOF, MuxedStreamReset."""
        muxed, number = self._muxed, stream.stream_id
        while not (stream.recv_closed or stream.closed or stream.reset_received or muxed.event_shutting_down.is_set()):
            if muxed.stream_buffers.get(number):
                await trio.lowlevel.checkpoint()
                return muxed.stream_buffers.swap(number) if muxed.stream_buffers.get(number) else b""
            event = muxed.stream_events.get(number)
            if event is None:
                break
            await event.wait()
            if number in muxed.stream_events:
                muxed.stream_events[number] = trio.Event()
        return bytes(await muxed.read_stream(number, READ_BYTES))

    async def refill(self, stream: Any) -> None:
        """Open the stream's window again when half of it is used, wider each time, up to WINDOW_BYTES_MAX."""
        held = stream.recv_window + len(self._muxed.stream_buffers.get(stream.stream_id, b""))
        if 2 * held <= stream.target_recv_window:
            stream.target_recv_window = min(2 * stream.target_recv_window, WINDOW_BYTES_MAX)
            more = stream.target_recv_window - held
            stream.recv_window += more
            await stream.send_window_update(more)


class _Streams(dict[int, Any]):
    """yamux' table of streams, each of which opens its window again as GuardedFrames.refill says.

    Around: libp2p sends an update for each read, and reads a frame's length byte by byte: of the frames on the wire of
    a swarm that only gossips and negotiates, most were updates of a byte.
    """

    def __init__(self, frames: GuardedFrames) -> None:
        super().__init__()
        self._frames = frames

    def __setitem__(self, number: int, stream: Any) -> None:
        assert hasattr(stream, "_auto_tune_and_send_window_update"), "yamux changed: look at this workaround again"

        async def refill(*, bytes_read: int = 0) -> None:
            await self._frames.refill(stream)

        stream._auto_tune_and_send_window_update = refill
        super().__setitem__(number, stream)


class _Buffers(dict[int, bytearray]):
    """yamux' table of unread bytes, whose buffers know their bounds."""

    def __init__(self, drops: Drops) -> None:
        super().__init__()
        self.drops = drops

    def __setitem__(self, number: int, buffer: bytearray) -> None:
        super().__setitem__(number, _Buffer(self, buffer))

    def swap(self, number: int) -> bytearray:
        """Take a stream's unread bytes and leave none."""
        taken = self[number]
        self[number] = bytearray()
        return taken


class _Buffer(bytearray):
    """Unread bytes of one stream."""

    def __init__(self, buffers: _Buffers, start: bytearray) -> None:
        super().__init__(start)
        self._buffers = buffers

    def extend(self, piece: Any) -> None:
        """Take a frame's bytes. Raises TooSlowError, the one exception by which yamux ends a connection."""
        size = len(self) + len(piece)
        if size > libp2p.stream_muxer.yamux.yamux.DEFAULT_WINDOW_SIZE and (
            size > STREAM_BYTES_MAX or sum(map(len, self._buffers.values())) + len(piece) > CONNECTION_BYTES_MAX
        ):
            self._buffers.drops.count("window_exceeded")
            raise trio.TooSlowError("the peer sends past its window")
        super().extend(piece)
