"""Bytes of an ordered stream <-> frames: a 4-byte big-endian length, then that many bytes.

Rules: core. The length is checked as soon as it is there, before a byte of content is kept, so a reader holds at
most one frame of FRAME_BYTES_MAX and one chunk. A frame is whole or absent; the bytes of a large one are copied once.
After an error a reader stays broken.

Source: NETWORK.md "Our rules" 5.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.transport import FRAME_BYTES_MAX

LENGTH_BYTES: Final = 4
GATHER_BYTES: Final = 16_384  # smaller chunks are copied together, larger ones kept as they are


def frame_head(content: bytes) -> bytes:
    """What goes before a frame's content on the wire. Raises LocalProtocolError over FRAME_BYTES_MAX."""
    if len(content) > FRAME_BYTES_MAX:
        raise LocalProtocolError(f"a frame of {len(content)} bytes, at most {FRAME_BYTES_MAX} may be sent")
    return len(content).to_bytes(LENGTH_BYTES, "big")


def encode_frame(content: bytes) -> bytes:
    """One frame's bytes on the wire. Raises LocalProtocolError over FRAME_BYTES_MAX."""
    return frame_head(content) + content


class FrameReader:
    """Collects the bytes of one stream and gives out the frames that are complete."""

    __slots__ = ("_bytes_max", "_failure", "_pieces", "_size", "_unread")

    def __init__(self, bytes_max: int = FRAME_BYTES_MAX) -> None:
        """`bytes_max`: the largest content of a frame, at most FRAME_BYTES_MAX."""
        assert 0 < bytes_max <= FRAME_BYTES_MAX, "a reader takes no more than a writer may send"
        self._pieces: deque[memoryview | bytearray] = deque()  # joined once, when a frame is complete
        self._unread = 0  # bytes in them
        self._size: int | None = None  # of the frame whose length was read
        self._bytes_max = bytes_max
        self._failure: str | None = None

    @property
    def bytes_pending(self) -> int:
        """Bytes of an incomplete frame; a stream that ends while this is over 0 was cut."""
        return self._unread if self._size is None else self._unread + LENGTH_BYTES

    def feed(self, chunk: bytes | bytearray | memoryview) -> list[bytes]:
        """Take the next bytes of the stream, give the frames they complete, in order.

        A chunk may be kept without copying it: its owner must not change it any more.
        Raises RemoteProtocolError when a length is over the bound, at this and every later call; frames that the
        same chunk completed are dropped with it, since the peer is dropped too.
        """
        if self._failure is not None:
            raise RemoteProtocolError(self._failure)
        self._keep(chunk)
        frames: list[bytes] = []
        while True:
            if self._size is None:
                if self._unread < LENGTH_BYTES:
                    return frames
                self._size = self._checked(int.from_bytes(self._take(LENGTH_BYTES), "big"))
            if self._unread < self._size:
                return frames
            frames.append(self._take(self._size))
            self._size = None

    def _checked(self, size: int) -> int:
        if size > self._bytes_max:
            self._failure = f"a frame of {size} bytes was announced, at most {self._bytes_max} are allowed"
            self._pieces.clear()
            self._unread = 0
            raise RemoteProtocolError(self._failure)
        return size

    def _keep(self, chunk: bytes | bytearray | memoryview) -> None:
        """Append a chunk; small ones are gathered, so that a frame in single bytes costs no object for each."""
        self._unread += len(chunk)
        last = self._pieces[-1] if self._pieces else None
        if len(chunk) >= GATHER_BYTES:
            self._pieces.append(memoryview(chunk))
        elif isinstance(last, bytearray):
            last += chunk
        else:
            self._pieces.append(bytearray(chunk))

    def _take(self, n: int) -> bytes:
        """Exactly n of the bytes that are there."""
        self._unread -= n
        taken: list[bytes | memoryview | bytearray] = []
        while n > 0:
            first = self._pieces[0]
            if len(first) <= n:
                taken.append(self._pieces.popleft())
            elif isinstance(first, bytearray):
                taken.append(first[:n])
                del first[:n]  # in constant time
            else:
                taken.append(first[:n])
                self._pieces[0] = first[n:]
            n -= len(taken[-1])
        return b"".join(taken)
