"""The fetching half of /openagi/blob/1: one blob, from several donors at once, into a file.

Rules: a shell. One task owns the Transfer and the Donors, which decide; each donor has a reader and a writer, one task
writes the file. Nothing is written that was not compared with its digest, and what was written by an earlier fetch is
compared again. Memory: asks_max chunks on their way, and WRITES_WAITING_MAX that wait for the disk. A donor that lies
or is too slow is reported, named in the error, and asked no more.
Source: BEP 3; NETWORK.md "Our rules" 4, 5.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from crypto.digest import Digest, text_of
from crypto.identity import PeerId
from gossip.blob_files import BlobFolder, Part
from gossip.blob_serving import Blocking, FaultReport, Streams
from gossip.blob_wire import (
    BLOB_PROTOCOL,
    BlobAsk,
    Here,
    Piece,
    RangeAsk,
    Refusal,
    ask_frame,
    decode_answer,
)
from gossip.donors import Donors, DonorsConfig
from gossip.errors import CannotStore, RemoteProtocolError, TooLarge, Unavailable
from gossip.transfer import Ask, Drop, Effect, Finished, Manifest, Store, Transfer, TransferConfig, decode_manifest
from p2p.errors import P2PError, Refused
from p2p.errors import RemoteProtocolError as BadFrame
from p2p.transport import Stream

WRITES_WAITING_MAX = 4
VERIFY_CHUNKS = 64  # compared in one turn of a thread, for which a cancellation waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a fetch is. Donors: those that give now."""

    stored_bytes: int
    blob_bytes: int
    donors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchConfig:
    """Bounds of one fetch. Times are seconds."""

    transfer: TransferConfig = field(default_factory=lambda: TransferConfig(asks_max=16))
    donors: DonorsConfig = field(default_factory=DonorsConfig)
    answer_s: float = 10.0  # to open a stream, and for its first answer
    blob_bytes_max: int = 8 << 30

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        if not self.answer_s > 0:
            raise ValueError(f"answer_s = {self.answer_s} came, wanted more than 0 seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What every fetch of a node shares."""

    streams: Streams
    folder: BlobFolder
    blocking: Blocking
    on_fault: FaultReport
    counts: Counter[str]
    drops: Counter[str]


# ---- what a donor's tasks tell the owner ----


@dataclass(frozen=True, slots=True)
class _Came:
    donor: PeerId
    manifest: bytes
    asks: trio.MemorySendChannel[Ask]


@dataclass(frozen=True, slots=True)
class _Gave:
    donor: PeerId
    piece: Piece


@dataclass(frozen=True, slots=True)
class _Left:
    donor: PeerId
    reason: str
    comes_back: bool
    lied: bool = False


@dataclass(frozen=True, slots=True)
class _Connected:
    donor: PeerId


_Event = _Came | _Gave | _Left | _Connected


class Fetch:
    """One blob on its way. Make it, then `run` it once."""

    def __init__(
        self,
        blob: Digest,
        peers: Iterable[PeerId],
        place: Place,
        config: FetchConfig,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._blob, self._place, self._config, self._on_progress = blob, place, config, on_progress
        self._donors = Donors(peers, config.donors, trio.current_time())
        self._events = trio.open_memory_channel[_Event](0)
        self._writes = trio.open_memory_channel[tuple[int, bytes | memoryview]](WRITES_WAITING_MAX)
        self._giving: dict[PeerId, trio.MemorySendChannel[Ask]] = {}
        self._scopes: dict[PeerId, trio.CancelScope] = {}
        self._manifest: Manifest | None = None
        self._transfer: Transfer | None = None
        self._part: Part | None = None
        self._stored_bytes = 0
        self._written = trio.Event()
        self._failure: Unavailable | CannotStore | None = None

    # ---- the owner ----

    async def run(self) -> None:
        """Fetch it. Raises Unavailable, CannotStore. Cancelled or failed: what was written stays, for the next."""
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await self._own(nursery)
                except (Unavailable, CannotStore) as exc:
                    self._failure = exc
                nursery.cancel_scope.cancel()
        finally:
            if self._part is not None:
                self._part.close()
        if self._failure is not None:
            raise self._failure

    async def _own(self, nursery: trio.Nursery) -> None:
        """Opens tasks in the nursery it is handed. Raises Unavailable, CannotStore."""
        manifest = await self._place.blocking(self._place.folder.manifest, self._blob)
        if manifest is not None:
            await self._begin(manifest)
        nursery.start_soon(self._write_all, nursery.cancel_scope)
        while self._transfer is None or not self._transfer.finished:
            now = trio.current_time()
            for donor in self._donors.due(now):
                nursery.start_soon(self._ask_donor, donor)
            if self._donors.hopeless(now):
                raise Unavailable(self._why_nobody())
            due = math.inf if self._transfer is None else self._transfer.deadline()
            event = None
            with trio.move_on_at(min(due, self._donors.deadline())):
                event = await self._events[1].receive()
            if event is not None:
                await self._take(event)
            if self._transfer is not None:
                await self._perform(self._transfer.tick(trio.current_time()))
        self._writes[0].close()
        await self._written.wait()
        assert self._part is not None
        await self._place.blocking(self._part.finish)

    async def _begin(self, manifest: Manifest) -> None:
        """What is to come is known: open the file, and see what it holds. Raises CannotStore."""
        if manifest.blob_bytes > self._config.blob_bytes_max:
            raise TooLarge(
                f"{text_of(self._blob)} has {manifest.blob_bytes} bytes, this node fetches at most "
                f"{self._config.blob_bytes_max}"
            )
        part = self._part = await self._place.blocking(self._place.folder.open, self._blob, manifest)
        stored: set[int] = set()
        for first in range(0, manifest.count, VERIFY_CHUNKS):
            chunks = range(first, min(first + VERIFY_CHUNKS, manifest.count))
            stored |= await self._place.blocking(part.verified, chunks)
        self._stored_bytes = sum(manifest.span(index)[1] for index in stored)
        self._place.counts["chunks_resumed"] += len(stored)
        self._manifest = manifest
        self._transfer = Transfer(manifest, self._config.transfer, stored=stored)

    async def _take(self, event: _Event) -> None:
        """Act on what came. Raises CannotStore."""
        now = trio.current_time()
        match event:
            case _Came():
                await self._came(event)
            case _Gave(donor, piece):
                if donor in self._giving:
                    await self._gave(donor, piece, now)
            case _Left(donor, reason):
                self._giving.pop(donor, None)
                if event.comes_back:
                    self._donors.failed(donor, reason, now)
                    self._place.drops["donor_failed"] += 1
                else:
                    self._out(donor, reason, lied=event.lied, blame=event.lied)
                if self._transfer is not None:
                    await self._perform(self._transfer.left(donor, now))
            case _Connected(donor):
                self._donors.came(donor, now)

    async def _came(self, event: _Came) -> None:
        """A donor has the blob."""
        if self._manifest is None:
            try:
                manifest = decode_manifest(event.manifest, self._blob)
            except RemoteProtocolError as exc:
                self._end(event.donor)
                return self._out(event.donor, str(exc), lied=True, blame=True)
            await self._place.blocking(self._place.folder.keep_manifest, self._blob, manifest)
            await self._begin(manifest)
        assert self._transfer is not None
        self._giving[event.donor] = event.asks
        await self._perform(self._transfer.joined(event.donor, trio.current_time()))

    async def _gave(self, donor: PeerId, piece: Piece, now: float) -> None:
        """A piece came. What begins where no chunk does was not asked for: the core drops who sends it."""
        assert self._manifest is not None
        assert self._transfer is not None
        index, past = divmod(piece.start, self._manifest.chunk_bytes)
        effects = self._transfer.received(donor, -1 if past else index, piece.content, now)
        if any(isinstance(effect, Store) for effect in effects):
            self._donors.stored(donor, now)
        await self._perform(effects)

    async def _perform(self, effects: list[Effect]) -> None:
        """Waits for the disk only, and only when WRITES_WAITING_MAX chunks wait for it already."""
        for effect in effects:
            match effect:
                case Ask():
                    self._giving[effect.donor].send_nowait(effect)
                case Drop():
                    self._end(effect.donor)
                    self._out(effect.donor, effect.reason, lied=effect.lied, blame=True)
                case Finished():
                    pass
                case Store():
                    assert self._manifest is not None
                    self._place.counts["chunks"] += 1
                    await self._writes[0].send((self._manifest.span(effect.index)[0], effect.content))

    def _end(self, donor: PeerId) -> None:
        self._giving.pop(donor, None)
        scope = self._scopes.get(donor)
        if scope is not None:
            scope.cancel()

    def _out(self, donor: PeerId, reason: str, *, lied: bool, blame: bool) -> None:
        if not self._donors.out(donor, reason):
            return
        self._place.drops["donor_lied" if lied else "donor_slow" if blame else "donor_out"] += 1
        if blame:
            self._place.on_fault(donor, f"as donor of {text_of(self._blob)} it {reason}", lied)

    def _why_nobody(self) -> str:
        kept = ""
        if self._transfer is not None and self._manifest is not None:
            done = self._transfer.statistics().done
            kept = f"; {done} of {self._manifest.count} chunks are kept for the next fetch"
        return f"nobody gave {text_of(self._blob)}: {self._donors.reasons()}{kept}"

    def is_busy(self, peer: PeerId) -> bool:
        """Whether a peer is being asked."""
        return peer in self._scopes

    def wake(self, donor: PeerId) -> None:
        """A peer has connected. Sync; the owner hears of it at its next turn."""
        try:
            self._events[0].send_nowait(_Connected(donor))
        except trio.WouldBlock:
            self._donors.came(donor, trio.current_time())  # the owner is at work, and looks at it when it is done

    # ---- the file ----

    async def _write_all(self, fetch: trio.CancelScope) -> None:
        """Chunks to the file, as many at once as wait. When the disk refuses, the fetch ends."""
        async for first in self._writes[1]:
            pieces = [first]
            for _ in range(WRITES_WAITING_MAX):
                try:
                    pieces.append(self._writes[1].receive_nowait())
                except (trio.WouldBlock, trio.EndOfChannel):
                    break
            assert self._part is not None
            assert self._manifest is not None
            try:
                await self._place.blocking(self._part.write, pieces)
            except CannotStore as exc:
                self._failure = exc
                fetch.cancel()
                return
            written = sum(len(content) for _, content in pieces)
            self._stored_bytes += written
            self._place.counts["bytes"] += written
            self._on_progress(
                Progress(
                    stored_bytes=self._stored_bytes, blob_bytes=self._manifest.blob_bytes, donors=len(self._giving)
                )
            )
        self._written.set()

    # ---- one donor ----

    async def _ask_donor(self, donor: PeerId) -> None:
        """A donor, from the opening of a stream until it leaves, or the owner ends it."""
        left = _Left(donor, "left", True)
        with trio.CancelScope() as scope:
            self._scopes[donor] = scope
            try:
                left = await self._converse(donor)
            except trio.TooSlowError:
                left = _Left(donor, f"did not answer within {self._config.answer_s:g} s", True)
            except Refused as exc:
                left = _Left(donor, f"refused: {exc}", False)
            except (RemoteProtocolError, BadFrame) as exc:
                left = _Left(donor, f"broke the protocol: {exc}", False, lied=True)
            except P2PError as exc:
                left = _Left(donor, f"cannot be reached, or broke off: {exc}", True)
            finally:
                del self._scopes[donor]
        if not scope.cancelled_caught:
            await self._events[0].send(left)

    async def _converse(self, donor: PeerId) -> _Left:
        """Raises TooSlowError, RemoteProtocolError, P2PError."""
        with trio.fail_after(self._config.answer_s):
            stream = await self._place.streams.open_stream(donor, BLOB_PROTOCOL)
        try:
            with trio.fail_after(self._config.answer_s):
                ask = BlobAsk(blob=self._blob, manifest=self._manifest is None)
                await stream.send(ask_frame(ask))
                answer = decode_answer(await stream.receive())
            match answer:
                case Refusal():
                    return _refused(donor, answer)
                case Piece():
                    raise RemoteProtocolError("a piece came before it was asked for")
                case Here(manifest):
                    pass
            send, receive = trio.open_memory_channel[Ask](self._config.transfer.asks_per_donor_max)
            await self._events[0].send(_Came(donor, manifest, send))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_send_asks, stream, receive)
                left = await self._receive_all(donor, stream)
                nursery.cancel_scope.cancel()
            return left
        finally:
            await stream.reset()

    async def _receive_all(self, donor: PeerId, stream: Stream) -> _Left:
        """Pieces to the owner until the donor ends."""
        try:
            while True:
                match decode_answer(await stream.receive()):
                    case Refusal() as refusal:
                        return _refused(donor, refusal)
                    case Here():
                        raise RemoteProtocolError("a manifest came in the place of a piece")
                    case Piece() as piece:
                        await self._events[0].send(_Gave(donor, piece))
        except (RemoteProtocolError, BadFrame) as exc:
            return _Left(donor, f"broke the protocol: {exc}", False, lied=True)
        except P2PError as exc:
            return _Left(donor, f"broke off: {exc}", True)


async def _send_asks(stream: Stream, asks: trio.MemoryReceiveChannel[Ask]) -> None:
    """The donor's asks as they are decided. A stream that breaks is told by its reader."""
    try:
        async for ask in asks:
            await stream.send(ask_frame(RangeAsk(start=ask.start, length=ask.length)))
    except P2PError:
        await stream.reset()


def _refused(donor: PeerId, refusal: Refusal) -> _Left:
    told = {
        Refusal.UNKNOWN: "does not have it",
        Refusal.BUSY: "is busy",
        Refusal.GONE: "has it no more",
    }
    return _Left(donor, told[refusal], refusal is Refusal.BUSY)
