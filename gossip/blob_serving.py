"""The serving half of /openagi/blob/1: what this node offers, and to how many, how fast.

Rules: a shell. Nothing is offered that this node's own code did not put here; a peer names a digest, never a place.
Streams are few for each peer, and those that give are few in all; what goes out stays within the allowance; a peer that
asks nothing, or takes nothing, for too long loses its stream. At most one piece a stream is in memory. Every drop is
counted with its reason.
Source: NETWORK.md "Our rules" 4, 5; BEP 3 (upload slots).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import trio

from crypto.digest import Digest, digest
from crypto.identity import PeerId
from gossip.blob_files import Reader, Source
from gossip.blob_wire import (
    HEAD_BYTES,
    BlobAsk,
    RangeAsk,
    Refusal,
    decode_ask,
    here_frame,
    piece_head,
    refusal_frame,
    within,
)
from gossip.errors import LocalProtocolError, RemoteProtocolError
from p2p.allowance import Allowance
from p2p.errors import P2PError, StreamClosed, Unreachable
from p2p.transport import Stream, StreamHandler

Blocking = Callable[..., Awaitable[Any]]  # runs a function that waits for a disk, off the loop
FaultReport = Callable[[PeerId, str, bool], None]  # who, what it did, and whether it lied (else it was slow)


Allowed = Callable[[PeerId], bool]  # whether a peer may have a blob; sync, must not raise


def _anybody(_peer: PeerId) -> bool:
    return True


class Streams(Protocol):
    """What blobs need of a network; p2p.direct.Direct and any Transport have it."""

    def serve(self, protocol: str, handler: StreamHandler) -> None:
        """See Transport.serve."""

    async def open_stream(self, peer: PeerId, protocol: str) -> Stream:
        """See Transport.open_stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """Bounds of what is offered and given. Times are seconds."""

    offers_max: int = 8192
    memory_bytes_max: int = 256 << 20  # of the blobs that are offered from memory
    streams_max: int = 16  # that give; one that has not asked yet takes nobody's place
    streams_per_peer_max: int = 4  # that give, or have not asked yet
    upload_bytes_per_s: float = 100e6  # to all peers together, so that inference and training come first
    burst_bytes: int = 4 << 20
    ask_s: float = 10.0  # for the first ask
    idle_s: float = 60.0  # for the next one
    take_s: float = 30.0  # for the peer to take a piece

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        for name in ("offers_max", "streams_max", "streams_per_peer_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted at least 1")
        for name in ("upload_bytes_per_s", "ask_s", "idle_s", "take_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted more than 0")


class BlobServing:
    """What this node offers. Register `serve` with the network."""

    def __init__(self, config: ServingConfig, blocking: Blocking, on_fault: FaultReport) -> None:
        self._config, self._blocking, self._on_fault = config, blocking, on_fault
        self._offers: dict[Digest, Source] = {}
        self._allowed: dict[Digest, Allowed] = {}
        self._streams: Counter[PeerId] = Counter()  # before their first ask too
        self._giving = 0
        self._allowance = Allowance(config.upload_bytes_per_s, config.burst_bytes)
        self.counts: Counter[str] = Counter()  # streams, pieces and bytes given
        self.drops: Counter[str] = Counter()  # reason -> count

    @property
    def offered(self) -> frozenset[Digest]:
        """The blobs that are offered now."""
        return frozenset(self._offers)

    @property
    def streams(self) -> int:
        """How many streams are served now."""
        return self._giving

    def offer(self, source: Source, allowed: Allowed = _anybody) -> Digest:
        """Give this blob to whoever asks and is allowed it, until it is withdrawn. To others it does not exist.

        Raises LocalProtocolError (over a bound).
        """
        blob = digest(source.manifest.encode())
        others = [each for known, each in self._offers.items() if known != blob]
        if len(others) >= self._config.offers_max:
            raise LocalProtocolError(f"{len(others)} blobs are offered already: withdraw one")
        held = sum(each.held_bytes for each in others)
        if held + source.held_bytes > self._config.memory_bytes_max:
            raise LocalProtocolError(
                f"{held} bytes are offered from memory and {source.held_bytes} are to come, at most "
                f"{self._config.memory_bytes_max} may be: offer a file, or withdraw one"
            )
        self._offers[blob], self._allowed[blob] = source, allowed
        return blob

    def withdraw(self, blob: Digest) -> None:
        """Offer it no more; streams that give it end at their next ask. A no-op when it is not offered."""
        self._offers.pop(blob, None)
        self._allowed.pop(blob, None)

    def is_busy(self, peer: PeerId) -> bool:
        """Whether a peer has a stream open to us."""
        return peer in self._streams

    async def serve(self, stream: Stream) -> None:
        """One stream of a peer's, for its whole life. Cancelled: the stream is reset."""
        peer = stream.peer
        self._streams[peer] += 1
        done = False
        try:
            await self._answer(stream)
            await stream.close()
            done = True
        except StreamClosed:  # the peer has what it wanted
            await stream.close()
            done = True
        except trio.TooSlowError:
            self.drops["too_slow"] += 1
        except RemoteProtocolError as exc:
            self.drops["rule_broken"] += 1
            self._on_fault(peer, str(exc), True)
        except P2PError:
            self.drops["cut"] += 1
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]
            if not done:
                await stream.reset()

    async def _answer(self, stream: Stream) -> None:
        """Raises TooSlowError, RemoteProtocolError, P2PError."""
        if self._streams[stream.peer] > self._config.streams_per_peer_max:
            return await self._refuse(stream, Refusal.BUSY)
        with trio.fail_after(self._config.ask_s):
            ask = decode_ask(await stream.receive(), BlobAsk)
        source = self._offers.get(Digest(ask.blob))
        if source is None or not self._allowed[Digest(ask.blob)](stream.peer):
            return await self._refuse(stream, Refusal.UNKNOWN)
        if self._giving >= self._config.streams_max:
            return await self._refuse(stream, Refusal.BUSY)
        self._giving += 1
        try:
            await self._open(stream, ask, source)
        finally:
            self._giving -= 1

    async def _open(self, stream: Stream, ask: BlobAsk, source: Source) -> None:
        """Raises as _answer."""
        reader = await self._blocking(source.open) if source.blocks else source.open()
        if reader is None:
            return await self._gone(stream, Digest(ask.blob))
        try:
            self.counts["streams"] += 1
            await self._send(stream, here_frame(source.manifest.encode() if ask.manifest else b""))
            await self._give(stream, Digest(ask.blob), source, reader)
        finally:
            reader.close()

    async def _give(self, stream: Stream, blob: Digest, source: Source, reader: Reader) -> None:
        """Ranges until the peer ends. Raises as _answer."""
        while True:
            with trio.fail_after(self._config.idle_s):
                try:
                    raw = await stream.receive()
                except Unreachable:  # it left, and all that it had asked for was sent
                    return
            ask = decode_ask(raw, RangeAsk)
            if not within(ask, source.manifest):
                raise RemoteProtocolError(
                    f"{ask.length} bytes from {ask.start} were asked of a blob of {source.manifest.blob_bytes}"
                )
            if self._offers.get(blob) is not source:
                return await self._refuse(stream, Refusal.GONE)
            await trio.sleep(self._allowance.spend(ask.length, trio.current_time()))
            frame = bytearray(HEAD_BYTES + ask.length)
            frame[:HEAD_BYTES] = piece_head(ask.start)
            room = memoryview(frame)[HEAD_BYTES:]
            if source.blocks:
                whole = await self._blocking(reader.read_into, room, ask.start)
            else:
                whole = reader.read_into(room, ask.start)
            if not whole:
                return await self._gone(stream, blob)
            await self._send(stream, bytes(frame))
            self.counts["pieces"] += 1
            self.counts["bytes"] += ask.length

    async def _gone(self, stream: Stream, blob: Digest) -> None:
        """The file changed: it is not offered any more."""
        self.withdraw(blob)
        await self._refuse(stream, Refusal.GONE)

    async def _refuse(self, stream: Stream, refusal: Refusal) -> None:
        self.drops[refusal.value] += 1
        await self._send(stream, refusal_frame(refusal))

    async def _send(self, stream: Stream, frame: bytes) -> None:
        with trio.fail_after(self._config.take_s):
            await stream.send(frame)
