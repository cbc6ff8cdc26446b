"""One direct channel as frames: p2p.transport.Stream over a TCP connection of its own.

Rules: a frame that was not sent whole ends the channel, both ways. A connection that ends without a sealed end is
broken, not ended. Waiting for a slow peer is cancellable and has no end of its own: the peer's libp2p connection says
whether it lives, and ends the channel with itself (p2p/direct.py).

Source: NETWORK.md section 2 (direct TCP data channel).
"""

from __future__ import annotations

import weakref

import trio

from crypto.identity import PeerId
from p2p.direct_frames import HEAD_BYTES, KIND_END, TAG_BYTES, Opener, Sealer
from p2p.errors import LocalProtocolError, RemoteProtocolError, StreamClosed, Unreachable
from p2p.transport import FRAME_BYTES_MAX

CLOSE_S = 5.0  # for the peer to take what was sent and our end
LINGER_S = 5.0  # for the peer to end its direction too


class DirectStream:
    """A stream of sealed frames. One task sends, one receives."""

    def __init__(self, socket: trio.SocketStream, peer: PeerId, sealer: Sealer, opener: Opener) -> None:
        """Takes the connection over, and closes it in the end."""
        self._socket = socket.socket
        self._peer = peer
        self._sealer = sealer
        self._opener = opener
        self._buffer = bytearray(HEAD_BYTES + FRAME_BYTES_MAX + TAG_BYTES + HEAD_BYTES)
        self._have = 0
        self._sending = True
        self._broken: str | None = None
        self.over = trio.Event()  # both directions have ended, or the channel broke
        weakref.finalize(self, socket.socket.close)

    @property
    def peer(self) -> PeerId:
        """The authenticated peer at the other end."""
        return self._peer

    async def send(self, frame: bytes) -> None:
        """See Stream.send. If cancelled before the frame was sent whole, the channel is reset."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if not self._sending:
            raise LocalProtocolError("a frame was sent after close")
        if self._broken is not None:
            raise Unreachable(self._broken)
        await self._write(self._sealer.seal(frame))

    async def _write(self, wire: bytes | memoryview) -> None:
        """Send all of it, or reset. Raises Unreachable."""
        view, sent = memoryview(wire), 0
        try:
            while sent < len(view):
                sent += await self._socket.send(view[sent:])
        except (OSError, trio.ClosedResourceError) as exc:
            raise self._break(f"the direct channel to {self._peer} broke while sending", exc) from exc
        finally:
            if sent < len(view):
                self.abort("a frame was cut")

    async def receive(self) -> bytes:
        """See Stream.receive. Cancelled: nothing is lost."""
        if self._opener.ended:
            await trio.lowlevel.checkpoint()
            raise StreamClosed(f"{self._peer} ended the stream")
        if self._broken is not None:
            await trio.lowlevel.checkpoint()
            raise Unreachable(self._broken)
        view = memoryview(self._buffer)
        try:
            await self._fill(HEAD_BYTES)
            size = HEAD_BYTES + self._opener.body_bytes(view[:HEAD_BYTES])
            await self._fill(size)
            content = self._opener.open(view[:HEAD_BYTES], view[HEAD_BYTES:size])
        except RemoteProtocolError as exc:
            self.abort(str(exc))
            raise
        view[: self._have - size] = view[size : self._have]  # at most the next head
        self._have -= size
        if self._opener.ended:
            self._finish()
            raise StreamClosed(f"{self._peer} ended the stream")
        return content

    async def _fill(self, size: int) -> None:
        """Read until so many bytes are there, and at most the next head more. Raises Unreachable."""
        view = memoryview(self._buffer)
        while self._have < size:
            try:
                got = await self._socket.recv_into(view[self._have : max(size, HEAD_BYTES + TAG_BYTES) + HEAD_BYTES])
            except (OSError, trio.ClosedResourceError) as exc:
                raise self._break(f"the direct channel from {self._peer} broke", exc) from exc
            if not got:
                raise self._break(f"the direct channel from {self._peer} was cut", EOFError("no end was sealed"))
            self._have += got

    async def close(self) -> None:
        """End our direction in order. Bounded by CLOSE_S, then the channel is reset."""
        if self._sending and self._broken is None:
            self._sending = False
            with trio.move_on_after(CLOSE_S) as scope:
                scope.shield = True
                try:
                    await self._write(self._sealer.seal(b"", KIND_END))
                except Unreachable:
                    pass  # broken already: there is nothing to end
            self._finish()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        """See Stream.reset."""
        self.abort("the stream was reset here")
        await trio.lowlevel.checkpoint()

    async def linger(self) -> None:
        """Wait until the peer has ended its direction too, for LINGER_S at most, then reset. Drops what still comes."""
        with trio.move_on_after(LINGER_S):
            try:
                while True:
                    await self.receive()
            except (StreamClosed, Unreachable, RemoteProtocolError):
                pass
        self.abort("the stream is over")

    def abort(self, why: str) -> None:
        """Drop the channel at once. Never raises."""
        if self._broken is None:
            self._broken = why
        self._socket.close()
        self.over.set()

    def _finish(self) -> None:
        """Close the connection when both directions have ended."""
        if not self._sending and self._opener.ended:
            self.abort("the stream is over")

    def _break(self, what: str, exc: BaseException) -> Unreachable:
        self.abort(f"{what}: {type(exc).__name__} {str(exc)[:200]}".rstrip())
        return Unreachable(self._broken or what)
