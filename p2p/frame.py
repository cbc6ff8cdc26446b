"""Bytes of an ordered stream <-> frames: a 4-byte big-endian length, then that many bytes.

Rules: core. The length is checked as soon as it is there, before a byte of content is kept, so a reader holds at
most one frame of FRAME_BYTES_MAX and one chunk. A frame is whole or absent. After an error a reader stays broken.

Source: NETWORK.md "Our rules" 5.
"""

from __future__ import annotations

from typing import Final

from p2p.errors import LocalProtocolError, RemoteProtocolError
from p2p.transport import FRAME_BYTES_MAX

LENGTH_BYTES: Final = 4


def encode_frame(content: bytes) -> bytes:
    """One frame's bytes on the wire. Raises LocalProtocolError over FRAME_BYTES_MAX."""
    if len(content) > FRAME_BYTES_MAX:
        raise LocalProtocolError(f"a frame of {len(content)} bytes, at most {FRAME_BYTES_MAX} may be sent")
    return len(content).to_bytes(LENGTH_BYTES, "big") + content


class FrameReader:
    """Collects the bytes of one stream and gives out the frames that are complete."""

    __slots__ = ("_buffer", "_bytes_max", "_failure")

    def __init__(self, bytes_max: int = FRAME_BYTES_MAX) -> None:
        """`bytes_max`: the largest content of a frame, at most FRAME_BYTES_MAX."""
        assert 0 < bytes_max <= FRAME_BYTES_MAX, "a reader takes no more than a writer may send"
        self._buffer = bytearray()
        self._bytes_max = bytes_max
        self._failure: str | None = None

    @property
    def bytes_pending(self) -> int:
        """Bytes of an incomplete frame; a stream that ends while this is over 0 was cut."""
        return len(self._buffer)

    def feed(self, chunk: bytes | bytearray | memoryview) -> list[bytes]:
        """Take the next bytes of the stream, give the frames they complete, in order.

        Raises RemoteProtocolError when a length is over the bound, at this and every later call; frames that the
        same chunk completed are dropped with it, since the peer is dropped too.
        """
        if self._failure is not None:
            raise RemoteProtocolError(self._failure)
        buffer = self._buffer
        buffer += chunk
        frames: list[bytes] = []
        start = 0
        while len(buffer) - start >= LENGTH_BYTES:
            size = int.from_bytes(buffer[start : start + LENGTH_BYTES], "big")
            if size > self._bytes_max:
                self._failure = f"a frame of {size} bytes was announced, at most {self._bytes_max} are allowed"
                buffer.clear()
                raise RemoteProtocolError(self._failure)
            end = start + LENGTH_BYTES + size
            if len(buffer) < end:
                break
            with memoryview(buffer) as view:  # one copy, not two
                frames.append(bytes(view[start + LENGTH_BYTES : end]))
            start = end
        del buffer[:start]
        return frames
