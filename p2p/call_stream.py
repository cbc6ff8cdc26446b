"""One end of one rpc stream while it lives: its reader, its writer, the frames that wait, why it is over.

Rules: shell. One task reads and one writes; a frame is posted by a sync call and sent at once, so nobody's cancellation
falls inside a write. The first failure ends both tasks, wakes whoever waits for room, and the stream is reset.

Source: NETWORK.md "Our rules" 5 (one writer a stream).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field

import trio

from crypto.canonical import Limits
from crypto.identity import PeerId
from p2p.errors import P2PError, RemoteProtocolError, StreamBreach, StreamClosed, Unreachable
from p2p.rpc import Frame, Role, Rpc
from p2p.transport import Stream

OUTBOX_BYTES_MAX = 2 << 20  # frames waiting for the writer: above it, new calls, items and results wait for room
OUTBOX_FRAMES_MAX = 4096  # and here the other side makes us answer but does not read: it is dropped
RESET_S_MAX = 1.0  # a reset does not wait for the peer; this bounds a transport that does


@dataclass(frozen=True, slots=True, kw_only=True)
class CallsStatistics:
    """A snapshot; counts are since start."""

    streams_out: int
    streams_in: int
    calls_out_open: int  # cancelled ones included, until the peer has ended them
    calls_in_open: int
    calls_out: int
    calls_in: int
    drops: dict[str, int] = field(default_factory=dict)  # reason -> count


class Outbox:
    """The frames that wait for a stream's writer."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._unsent_bytes = 0
        self._stopped = False
        self._posted = trio.lowlevel.ParkingLot()
        self._sent = trio.lowlevel.ParkingLot()

    def post(self, frame: bytes) -> None:
        """Queue a frame to be sent now. Raises RemoteProtocolError when the other side has long stopped reading."""
        if len(self._frames) >= OUTBOX_FRAMES_MAX:
            raise RemoteProtocolError(f"{OUTBOX_FRAMES_MAX} frames wait for a peer that does not read them")
        self._frames.append(frame)
        self._unsent_bytes += len(frame)
        self._posted.unpark()

    async def wait_for_room(self) -> None:
        """Wait while OUTBOX_BYTES_MAX or more is unsent and the stream lives."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while self._unsent_bytes >= OUTBOX_BYTES_MAX and not self._stopped:
            await self._sent.park()

    def stop(self) -> None:
        """Nothing will be sent any more."""
        self._stopped = True
        self._frames.clear()
        self._sent.unpark_all()

    async def write(self, stream: Stream) -> None:
        """Send what is posted until cancelled. Raises as Stream.send does."""
        while True:
            while not self._frames:
                await self._posted.park()
            frame = self._frames.popleft()
            await stream.send(frame)
            self._unsent_bytes -= len(frame)
            self._sent.unpark_all()


class CallStream(ABC):
    """What the caller's and the callee's end have in common."""

    def __init__(self, peer: PeerId, role: Role, limits: Limits) -> None:
        self.peer = peer
        self.rpc = Rpc(role, limits)
        self.failure: P2PError | None = None
        self.outbox = Outbox()
        self.scope = trio.CancelScope()  # of all that happens on the stream

    @abstractmethod
    def take(self, frame: Frame, raw: bytes) -> None:
        """Act on a frame that the rules allow."""

    def post(self, frame: bytes | None) -> None:
        """Send a frame now; on a stream that is over, or with None, do nothing."""
        if frame is None or self.failure is not None:
            return
        try:
            self.outbox.post(frame)
        except RemoteProtocolError as exc:
            self.fail(exc)

    def fail(self, failure: P2PError) -> None:
        """The stream is over; the first reason stays."""
        if self.failure is None:
            self.failure = failure
            self.scope.cancel()
            self.outbox.stop()

    async def pump(self, stream: Stream, nursery: trio.Nursery) -> None:
        """Read and write until the stream is over. Starts its writer in `nursery`, which lies inside `scope`."""
        nursery.start_soon(self._write, stream)
        try:
            while True:
                raw = await stream.receive()
                frame = self.rpc.receive(raw)
                if frame is not None:
                    self.take(frame, raw)
        except StreamClosed:
            self.fail(Unreachable(f"{self.peer} ended the stream"))
        except P2PError as exc:
            self.fail(exc)

    async def drop(self, stream: Stream) -> None:
        """The end of it all: nothing is left of the stream, here and at the peer."""
        self.fail(Unreachable(f"the stream to {self.peer} was ended here"))
        with trio.move_on_after(RESET_S_MAX, shield=True):
            await stream.reset()

    async def _write(self, stream: Stream) -> None:
        try:
            await self.outbox.write(stream)
        except P2PError as exc:
            self.fail(exc)


def again(failure: P2PError) -> P2PError:
    """The same failure for one more call, so that no two calls share a traceback; a breach was told once already."""
    return (StreamBreach if isinstance(failure, RemoteProtocolError) else type(failure))(*failure.args)
