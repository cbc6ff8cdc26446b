"""Blobs by digest: what a blob is made of, and fetching it in chunks from several donors at once.

Rules: core. A blob's id is the digest of its manifest, which names the digest of every chunk: nothing is believed that
was not compared, and a donor that sent other bytes is named and gets no more asks. Each chunk has one owner at a
time: missing, asked of one donor, or done. An answer that is late counts against its donor and is still welcome.
Unanswered asks are few, for each donor and in all. What is stored already is not asked for again.

Source: BEP 3 (pieces by digest); IPFS bitswap; NETWORK.md "Our rules" 4, 5.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated

from msgspec import Meta, Struct

from crypto.canonical import Limits, convert, decode_canonical, encode_struct
from crypto.digest import DIGEST_BYTES, Digest, digest
from crypto.errors import BadEncoding
from crypto.identity import PeerId
from gossip.errors import RemoteProtocolError

CHUNK_BYTES = 1 << 19  # with its envelope well below a frame; large enough that asking costs little
CHUNK_BYTES_MIN = 1 << 10
CHUNK_BYTES_MAX = 1_000_000  # a chunk and what is around it fit one frame
CHUNKS_MAX = 16_384  # a manifest of 512 KiB: 8 GiB in chunks of CHUNK_BYTES
DROPPED_MAX = 1024  # donors dropped in one transfer; after so many nobody new is let in
LOOK_MAX = 1024  # missing chunks looked at for one decision
BLOB_BYTES_MAX = CHUNKS_MAX * CHUNK_BYTES_MAX
MANIFEST_BYTES_MAX = CHUNKS_MAX * DIGEST_BYTES + 256
_MANIFEST = Limits(
    bytes_max=MANIFEST_BYTES_MAX, bin_max=CHUNKS_MAX * DIGEST_BYTES, items_max=8, array_max=0, depth_max=1
)


class Manifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a blob is made of. `chunks`: their digests, one after the other; how many there are bounds the rest."""

    blob_bytes: Annotated[int, Meta(ge=0)]
    chunk_bytes: Annotated[int, Meta(ge=CHUNK_BYTES_MIN, le=CHUNK_BYTES_MAX)]
    chunks: bytes

    @property
    def count(self) -> int:
        """How many chunks there are."""
        return len(self.chunks) // DIGEST_BYTES

    def digest_of(self, index: int) -> Digest:
        """The digest of one chunk."""
        return Digest(self.chunks[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])

    def span(self, index: int) -> tuple[int, int]:
        """Where a chunk begins in the blob, and its length in bytes. Only the last is shorter."""
        start = index * self.chunk_bytes
        return start, min(self.chunk_bytes, self.blob_bytes - start)

    def covering(self, start: int, length: int) -> range:
        """The chunks that hold these bytes of the blob; bytes past its end are nowhere."""
        end = min(start + length, self.blob_bytes)
        if not 0 <= start < end:
            return range(0)
        return range(start // self.chunk_bytes, -(-end // self.chunk_bytes))

    def encode(self) -> bytes:
        """Its canonical bytes, whose digest is the blob's id."""
        return encode_struct(self)

    @property
    def blob(self) -> Digest:
        """The blob's id."""
        return digest(self.encode())


def manifest_of(content: bytes | memoryview, chunk_bytes: int = CHUNK_BYTES) -> Manifest:
    """The manifest of a blob in memory."""
    view = memoryview(content)
    starts = range(0, len(content), chunk_bytes)
    return Manifest(
        blob_bytes=len(content),
        chunk_bytes=chunk_bytes,
        chunks=b"".join(digest(view[start : start + chunk_bytes]) for start in starts),
    )


def decode_manifest(raw: bytes, blob: Digest) -> Manifest:
    """The manifest of a blob that was asked for by its id. Raises RemoteProtocolError for anything else."""
    if len(raw) > MANIFEST_BYTES_MAX or digest(raw) != blob:
        raise RemoteProtocolError("these bytes are not the manifest of that blob: their digest is another")
    try:
        manifest = convert(decode_canonical(raw, _MANIFEST), Manifest)
    except BadEncoding as exc:
        raise RemoteProtocolError(f"a blob's id names what is no manifest: {exc}") from exc
    if len(manifest.chunks) != DIGEST_BYTES * -(-manifest.blob_bytes // manifest.chunk_bytes):
        raise RemoteProtocolError(
            f"a manifest of {manifest.blob_bytes} bytes in chunks of {manifest.chunk_bytes} came with"
            f" {len(manifest.chunks)} bytes of digests"
        )
    return manifest


def verified(manifest: Manifest, chunks: Iterable[tuple[int, bytes]]) -> frozenset[int]:
    """Which of these stored chunks are what the manifest says: where a transfer that was cut goes on."""
    return frozenset(
        index
        for index, content in chunks
        if 0 <= index < manifest.count and digest(content) == manifest.digest_of(index)
    )


# ---- fetching ----


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferConfig:
    """Bounds of one transfer. Times are seconds."""

    donors_max: int = 32
    asks_per_donor_max: int = 4  # unanswered, late ones included
    asks_max: int = 32  # unanswered, in all: so many chunks may be in memory at once
    answer_s: float = 20.0  # then the chunk is asked of another donor
    lates_max: int = 3  # unanswered after answer_s, in a row: too slow

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        for name in ("donors_max", "asks_per_donor_max", "asks_max", "lates_max"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} came, wanted at least 1")
        if not self.answer_s > 0:
            raise ValueError(f"answer_s = {self.answer_s} came, wanted more than 0 seconds")


@dataclass(frozen=True, slots=True)
class Ask:
    """Ask a donor for one chunk: `length` bytes of the blob from `start`."""

    donor: PeerId
    index: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Store:
    """Keep a chunk that was compared with its digest."""

    index: int
    content: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Drop:
    """Ask this donor no more. `lied`: it sent what is not the chunk, which lowers its standing; else it was slow."""

    donor: PeerId
    reason: str
    lied: bool


@dataclass(frozen=True, slots=True)
class Finished:
    """Every wanted chunk is stored."""


Effect = Ask | Store | Drop | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferStatistics:
    """A snapshot: chunks, and donors by what became of them."""

    done: int
    asked: int
    missing: int
    donors: int
    dropped: dict[PeerId, str] = field(default_factory=dict)


@dataclass(slots=True)
class _Donor:
    holds: frozenset[int] | None  # None: all
    asked: dict[int, float] = field(default_factory=dict)  # chunk -> when its answer is late
    late: dict[int, float] = field(default_factory=dict)  # asked of others meanwhile; when it counts again
    lates: int = 0  # since its last good answer

    @property
    def unanswered(self) -> int:
        return len(self.asked) + len(self.late)

    def may_have(self, index: int) -> bool:
        return self.holds is None or index in self.holds

    def may_give(self, index: int) -> bool:
        return self.may_have(index) and index not in self.late


class Transfer:
    """Fetches one blob, or some chunks of it. Times are monotonic seconds of the caller."""

    def __init__(
        self,
        manifest: Manifest,
        config: TransferConfig,
        *,
        wanted: Iterable[int] | None = None,
        stored: Iterable[int] = (),
    ) -> None:
        """`wanted`: None for all chunks. `stored`: those that an earlier transfer stored, compared already."""
        self._manifest = manifest
        self._config = config
        every = range(manifest.count) if wanted is None else wanted
        self._wanted = frozenset(every)
        assert all(0 <= index < manifest.count for index in self._wanted), "a chunk that the blob does not have"
        self._missing = dict.fromkeys(sorted(self._wanted - frozenset(stored)))  # not asked of anyone now, in order
        self._done = len(self._wanted) - len(self._missing)
        self._donors: dict[PeerId, _Donor] = {}
        self._dropped: dict[PeerId, str] = {}

    @property
    def finished(self) -> bool:
        """Whether every wanted chunk is stored."""
        return self._done == len(self._wanted)

    def joined(self, donor: PeerId, now: float, holds: Iterable[int] | None = None) -> list[Effect]:
        """A peer can give chunks: all, or those it `holds`. One that was dropped, or one too many, is not asked."""
        if donor in self._dropped:
            return []
        full = len(self._donors) >= self._config.donors_max or len(self._dropped) >= DROPPED_MAX
        if donor not in self._donors and full:
            return []
        holding = None if holds is None else self._wanted.intersection(holds)
        if donor in self._donors:
            self._donors[donor].holds = holding
        else:
            self._donors[donor] = _Donor(holding)
        return self._ask(now)

    def left(self, donor: PeerId, now: float) -> list[Effect]:
        """A donor is gone; what it was asked for is asked of others. It may join again."""
        self._release(donor)
        return self._ask(now)

    def received(self, donor: PeerId, index: int, content: bytes | memoryview, now: float) -> list[Effect]:
        """A donor sent a chunk: stored when it is the one, else the donor is dropped."""
        state = self._donors.get(donor)
        if state is None:
            return []  # dropped, or gone: its last words count for nothing
        if index not in state.asked and index not in state.late:
            return self._drop(donor, f"sent chunk {index}, for which it was not asked", now, lied=True)
        _, length = self._manifest.span(index)
        if len(content) != length:
            return self._drop(donor, f"sent {len(content)} bytes for chunk {index} of {length}", now, lied=True)
        if digest(content) != self._manifest.digest_of(index):
            return self._drop(donor, f"sent other bytes for chunk {index}", now, lied=True)
        state.lates = 0
        state.late.pop(index, None)
        mine = state.asked.pop(index, None) is not None
        if not mine and not self._take_over(index):
            return self._ask(now)  # another was faster
        self._done += 1
        effects: list[Effect] = [Store(index, content)]
        return [*effects, Finished()] if self.finished else effects + self._ask(now)

    def tick(self, now: float) -> list[Effect]:
        """Ask others for what is late, and drop who is late too often."""
        effects: list[Effect] = []
        for donor, state in tuple(self._donors.items()):
            over = [index for each in (state.asked, state.late) for index, until in each.items() if until <= now]
            for index in over:
                if state.asked.pop(index, None) is not None:
                    self._missing[index] = None
                state.late[index] = now + self._config.answer_s
                state.lates += 1
            if state.lates >= self._config.lates_max:
                effects += self._drop(donor, f"left {state.lates} asks without an answer", now, lied=False)
        return effects + self._ask(now)

    def deadline(self) -> float:
        """When `tick` has something to do; infinity when nothing is asked."""
        times = (each for state in self._donors.values() for each in (state.asked, state.late))
        return min((until for each in times for until in each.values()), default=float("inf"))

    def starved(self) -> frozenset[int]:
        """Missing chunks that no donor is believed to have: more donors are wanted."""
        return frozenset(i for i in self._missing if not any(state.may_have(i) for state in self._donors.values()))

    def statistics(self) -> TransferStatistics:
        """A snapshot."""
        return TransferStatistics(
            done=self._done,
            asked=self._asked(),
            missing=len(self._missing),
            donors=len(self._donors),
            dropped=dict(self._dropped),
        )

    def _asked(self) -> int:
        return sum(len(state.asked) for state in self._donors.values())

    def _take_over(self, index: int) -> bool:
        """A late answer came: whoever is asked for the chunk now is late in its turn, without blame. False: done."""
        if index in self._missing:
            del self._missing[index]
            return True
        for state in self._donors.values():
            if (until := state.asked.pop(index, None)) is not None:
                state.late[index] = until
                return True
        return False

    def _drop(self, donor: PeerId, reason: str, now: float, *, lied: bool) -> list[Effect]:
        self._release(donor)
        self._dropped[donor] = reason
        return [Drop(donor, reason, lied), *self._ask(now)]

    def _release(self, donor: PeerId) -> None:
        state = self._donors.pop(donor, None)
        if state is not None:
            self._missing.update(dict.fromkeys(state.asked))

    def _ask(self, now: float) -> list[Effect]:
        """Ask for the first missing chunks, each of the least busy donor that may have it, within the bounds."""
        config, effects = self._config, list[Effect]()
        room = config.asks_max - sum(state.unanswered for state in self._donors.values())
        for index in tuple(islice(self._missing, LOOK_MAX)):
            free = [each for each in self._donors.items() if each[1].unanswered < config.asks_per_donor_max]
            if room <= 0 or not free:
                break
            ready = [(state.unanswered, donor) for donor, state in free if state.may_give(index)]
            if ready:
                donor = min(ready)[1]
                del self._missing[index]
                self._donors[donor].asked[index] = now + config.answer_s
                effects.append(Ask(donor, index, *self._manifest.span(index)))
                room -= 1
            else:  # nobody for it now: look at others first next time
                del self._missing[index]
                self._missing[index] = None
        return effects
