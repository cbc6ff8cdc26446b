"""What lies between the nodes of a loopback network: faults, blocked paths, and the streams that run over them.

Rules: time is trio's clock, chance is the rng it is given. A frame is delayed, but neither lost nor reordered inside
its stream, as over TCP. What a blocked path holds back arrives when it opens; that includes a reset.

Source: NETWORK.md section 4 for the manners that are copied: half-open connections, 256 KiB windows, a
writer that gives up after a stall.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import trio

from crypto.identity import PeerId
from p2p.errors import LocalProtocolError, StreamClosed, Unreachable
from p2p.transport import FRAME_BYTES_MAX

WINDOW_BYTES = 256 * 1024  # a sender waits while this much is unread, as in yamux


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """What the network does to traffic. Pairs are (least, most) seconds, drawn evenly; chances are 0 to 1."""

    stream_delay_s: tuple[float, float] = (0.0, 0.0)
    gossip_delay_s: tuple[float, float] = (0.0, 0.0)
    gossip_loss: float = 0.0  # per hop
    gossip_duplicate: float = 0.0  # chance that a receiver is called twice
    gossip_reorder: float = 0.0  # chance that a message is held for up to `gossip_late_s` more
    gossip_late_s: float = 1.0
    stall_s: float = math.inf  # a sender without room for so long resets its stream
    dial_timeout_s: float = 5.0  # of a dial, or a stream's opening, over a blocked path


@dataclass(slots=True, kw_only=True)
class Counts:
    """What passed through one node."""

    traffic: Counter[str] = field(default_factory=Counter)  # frames_in, frames_out, bytes_in, bytes_out
    drops: Counter[str] = field(default_factory=Counter)  # reason -> count

    def frame(self, direction: str, size_bytes: int) -> None:
        """Count a frame that came "in" or went "out"."""
        self.traffic[f"frames_{direction}"] += 1
        self.traffic[f"bytes_{direction}"] += size_bytes


class Wire:
    """The medium: its faults, and which paths are blocked."""

    def __init__(self, rng: random.Random, faults: Faults) -> None:
        self.rng = rng
        self.faults = faults
        self.cut: set[tuple[PeerId, PeerId]] = set()  # (sender, receiver)
        self.frozen: set[PeerId] = set()
        self.opened = trio.lowlevel.ParkingLot()  # waits for a path to open

    def blocked(self, sender: PeerId, receiver: PeerId) -> bool:
        """Whether nothing passes from one peer to the other now."""
        return sender in self.frozen or receiver in self.frozen or (sender, receiver) in self.cut

    def draw_s(self, bounds_s: tuple[float, float]) -> float:
        """A delay between the bounds; chance is left alone when there is nothing to draw."""
        return self.rng.uniform(*bounds_s) if bounds_s[1] > 0 else 0.0

    def happens(self, chance: float) -> bool:
        """Whether something of this chance happens now."""
        return chance > 0 and self.rng.random() < chance

    async def round_trip(self, here: PeerId, there: PeerId) -> None:
        """There and back. Raises Unreachable when the path stays blocked for `dial_timeout_s`."""
        with trio.move_on_after(self.faults.dial_timeout_s) as patience:
            await trio.sleep(2 * self.draw_s(self.faults.stream_delay_s))
            while self.blocked(here, there) or self.blocked(there, here):
                await self.opened.park()
        if patience.cancelled_caught:
            raise Unreachable(f"{there} did not answer within {self.faults.dial_timeout_s} s")


class LoopbackStream:
    """One end of a stream; see p2p.transport.Stream. It holds the frames that are on their way to it."""

    def __init__(self, wire: Wire, peers: tuple[PeerId, PeerId], counts: Counts) -> None:
        """`peers`: (near, far). The maker sets `far` and adds the stream to its `homes`."""
        self._wire = wire
        self._near, self._peer = peers
        self._counts = counts
        self.far: LoopbackStream
        self.homes: tuple[set[LoopbackStream], ...] = ()  # sets of live streams, left when the stream is over
        self._frames: deque[tuple[float, bytes]] = deque()  # (when it arrives, frame)
        self._unread_bytes = 0
        self._closed = False  # we send no more
        self._failure = ""  # why it broke, as far as this end knows
        self._was_reset = False  # by this end
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def peer(self) -> PeerId:
        return self._peer

    async def send(self, frame: bytes) -> None:
        if len(frame) > FRAME_BYTES_MAX:
            raise LocalProtocolError(f"a frame of {len(frame)} bytes, at most {FRAME_BYTES_MAX} may be sent")
        if self._closed and not self._failure:
            raise LocalProtocolError(f"the stream to {self._peer} was closed here and sends no more")
        sent = False
        try:
            await trio.lowlevel.checkpoint()
            await self._wait_for_room()
            self.far._put(bytes(frame))
            self._counts.frame("out", len(frame))
            sent = True
        finally:
            if not sent:
                self.reset_nowait()

    async def receive(self) -> bytes:
        if self._frames or self._failure or self.far._closed:
            await trio.lowlevel.checkpoint()
        while True:
            self._check()
            cut_off = self._cut_off()
            if self._frames and not cut_off:
                wait_s = self._frames[0][0] - trio.current_time()
                if wait_s <= 0:
                    return self._take()
                with trio.move_on_after(wait_s):
                    await self._changed.park()
            elif self.far._closed and not cut_off:
                raise StreamClosed(f"{self._peer} ended the stream")
            else:
                await self._changed.park()

    async def close(self) -> None:
        self.close_nowait()
        await trio.lowlevel.checkpoint()

    async def reset(self) -> None:
        self.reset_nowait()
        await trio.lowlevel.cancel_shielded_checkpoint()

    def close_nowait(self) -> None:
        """End our direction; what was sent arrives."""
        self._closed = True
        if self.far._closed:
            self._leave()
            self.far._leave()
        self.far.wake()

    def reset_nowait(self) -> None:
        """Drop the stream at once, both ways."""
        if not self._failure:
            self._was_reset = True
            self.fail("it was reset here")
            self.far.wake()

    def fail(self, reason: str) -> None:
        """The stream is broken, as this end knows from now on; what was not read is dropped."""
        self._failure = self._failure or reason
        self._frames.clear()
        self._unread_bytes = 0
        self._leave()
        self._changed.unpark_all()

    def wake(self) -> None:
        """Something changed at the other end, or on the path."""
        if self.far._was_reset and not self._failure and not self._cut_off():
            self.fail("it was reset there")
        self._changed.unpark_all()

    def _cut_off(self) -> bool:
        return self._wire.blocked(self._peer, self._near)

    def _check(self) -> None:
        if self._failure:
            raise Unreachable(f"the stream to {self._peer} broke: {self._failure}")

    async def _wait_for_room(self) -> None:
        self._check()
        if self.far._unread_bytes < WINDOW_BYTES:
            return
        with trio.move_on_after(self._wire.faults.stall_s) as patience:
            while self.far._unread_bytes >= WINDOW_BYTES:
                await self._changed.park()
                self._check()
        if patience.cancelled_caught:
            self._counts.drops["stalled"] += 1
            raise Unreachable(f"{self._peer} took nothing for {self._wire.faults.stall_s} s")

    def _put(self, frame: bytes) -> None:
        """Take a frame from the other end, for later."""
        if self._failure:  # a reset of ours that the sender has not heard of
            return
        arrives = trio.current_time() + self._wire.draw_s(self._wire.faults.stream_delay_s)
        self._frames.append((arrives, frame))
        self._unread_bytes += len(frame)
        self._changed.unpark_all()

    def _take(self) -> bytes:
        _, frame = self._frames.popleft()
        self._unread_bytes -= len(frame)
        self._counts.frame("in", len(frame))
        self.far.wake()
        return frame

    def _leave(self) -> None:
        for home in self.homes:
            home.discard(self)


def stream_pair(wire: Wire, near: tuple[PeerId, Counts], far: tuple[PeerId, Counts]) -> tuple[LoopbackStream, ...]:
    """Both ends of a new stream."""
    here = LoopbackStream(wire, (near[0], far[0]), near[1])
    there = LoopbackStream(wire, (far[0], near[0]), far[1])
    here.far, there.far = there, here
    return here, there
