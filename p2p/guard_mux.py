"""yamux: how much a peer may make us hold.

Rules: a peer that sends past the window it was given is dropped with its connection. Windows grow to WINDOW_BYTES_MAX
and no further, so that twice that is more than any honest peer can have on the way.

Source: NETWORK.md section 4 (receive window not enforced); hashicorp/yamux spec.md, flow control.
"""

from __future__ import annotations

from typing import Any

import libp2p.stream_muxer.yamux.yamux
import trio
from libp2p.transport.upgrader import TransportUpgrader

from p2p.guard import WINDOW_BYTES_MAX, Drops
from p2p.guard_noise import GuardedSession

STREAM_BYTES_MAX = 2 * WINDOW_BYTES_MAX  # unread on one stream
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
        assert muxed.stream_buffers == {}, "yamux changed: look at this workaround again"
        muxed.stream_buffers = _Buffers(self._drops)
        return muxed


class _Buffers(dict[int, bytearray]):
    """yamux' table of unread bytes, whose buffers know their bounds."""

    def __init__(self, drops: Drops) -> None:
        super().__init__()
        self.drops = drops

    def __setitem__(self, number: int, buffer: bytearray) -> None:
        super().__setitem__(number, _Buffer(self, buffer))


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
