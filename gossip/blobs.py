"""Blobs between peers: offers what this node's own code chose, fetches by digest from whoever has it.

Rules: a shell, made of a serving and a fetching half (gossip/blob_serving.py, gossip/blob_fetching.py). One blob is
fetched once at a time: who asks for it meanwhile waits for that fetch, and takes it up where it is when it fails or is
left. Fetches are few; more wait. Threads for the disk are few, and its own.
Source: NETWORK.md "Our rules" 4, 5; BEP 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Container, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import trio

from crypto.digest import Digest, text_of
from crypto.disk import SYSTEM, System
from crypto.identity import PeerId
from gossip.blob_fetching import Fetch, FetchConfig, Place, Progress
from gossip.blob_files import BlobFolder, FileSource, MemorySource
from gossip.blob_serving import Allowed, BlobServing, Blocking, FaultReport, ServingConfig, Streams
from gossip.blob_wire import BLOB_PROTOCOL
from gossip.errors import RemoteProtocolError
from gossip.transfer import CHUNK_BYTES, Manifest
from p2p.transport import PeerChange, Transport

DISK_THREADS_MAX = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobsConfig:
    """Bounds of a node's blobs. folder: where fetched ones lie; folder_bytes_max: of all of them, whole or not."""

    folder: Path
    folder_bytes_max: int = 32 << 30
    fetches_max: int = 4  # at a time
    serving: ServingConfig = field(default_factory=ServingConfig)
    fetch: FetchConfig = field(default_factory=FetchConfig)
    system: System = SYSTEM

    def __post_init__(self) -> None:
        """Raises ValueError with what came and what is wanted."""
        if self.fetches_max < 1:
            raise ValueError(f"fetches_max = {self.fetches_max} came, wanted at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobsStatistics:
    """What is offered, given and fetched now; counts and drops since start."""

    offered: int
    streams_serving: int
    fetches: int
    given: dict[str, int]  # streams, pieces, bytes
    fetched: dict[str, int]  # blobs, chunks, chunks_resumed, bytes
    drops: dict[str, int] = field(default_factory=dict)  # reason -> count


class Blobs:
    """A node's part in blobs. Make it inside trio; it serves from then on."""

    def __init__(
        self,
        transport: Transport,
        streams: Streams,
        config: BlobsConfig,
        *,
        on_fault: FaultReport = lambda _peer, _what, _lied: None,
        blocking: Blocking | None = None,
    ) -> None:
        """streams: what bulk goes over, the transport itself or a Direct on it. on_fault: told who lied or stalled.

        blocking: runs what waits for a disk; None: a worker thread, which a cancellation waits for.
        """
        threads = trio.CapacityLimiter(DISK_THREADS_MAX)
        self._config = config
        self._blocking = blocking or partial(trio.to_thread.run_sync, limiter=threads)
        self._serving = BlobServing(config.serving, self._blocking, on_fault)
        self._room = trio.CapacityLimiter(config.fetches_max)
        self._fetched: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()
        self._folder = BlobFolder(config.folder, config.folder_bytes_max, config.system)
        self._place = Place(
            streams=streams,
            folder=self._folder,
            blocking=self._blocking,
            on_fault=on_fault,
            counts=self._fetched,
            drops=self._drops,
        )
        self._running: dict[Digest, trio.Event] = {}
        self._fetches: list[Fetch] = []
        transport.watch(self._peer_changed)
        streams.serve(BLOB_PROTOCOL, self._serving.serve)

    def is_busy(self, peer: PeerId) -> bool:
        """Whether a blob is on its way to or from a peer, or about to be."""
        return self._serving.is_busy(peer) or any(fetch.is_busy(peer) for fetch in self._fetches)

    # ---- offering ----

    def offer_bytes(self, content: bytes) -> Digest:
        """Give these bytes to whoever asks for their digest, until it is withdrawn; hashes them here and now.

        Raises LocalProtocolError (over a bound, and which).
        """
        return self._serving.offer(MemorySource(content))

    async def offer_file(
        self,
        path: Path,
        allowed: Allowed | None = None,
        *,
        named: Digest | None = None,
        manifest: Manifest | None = None,
    ) -> Digest:
        """Give this file to whoever asks for its digest (and is allowed it). When it is changed or removed later, it is
        withdrawn. manifest: what the file is made of, for who wrote it a moment ago; it is not read then.

        Raises LocalProtocolError (over a bound, or changed meanwhile), OSError, RemoteProtocolError (it was fetched as
        `named` and has another digest here: its chunks are not of the usual size). Cancelled: it is not offered.
        """
        source = await self._blocking(FileSource, path, manifest)
        if named is not None and (source.manifest.chunk_bytes != CHUNK_BYTES or source.manifest.blob != named):
            raise RemoteProtocolError(f"{text_of(named)} is not in chunks of {CHUNK_BYTES} bytes")
        return self._serving.offer(source) if allowed is None else self._serving.offer(source, allowed)

    async def offer_fetched(self, blob: Digest, allowed: Allowed | None = None) -> Digest:
        """Give on what `fetch` has brought a moment ago: its chunks were compared then. Raises as `offer_file`."""
        manifest = await self._blocking(self._folder.manifest, blob)
        return await self.offer_file(self._folder.path(blob), allowed, named=blob, manifest=manifest)

    def withdraw(self, blob: Digest) -> None:
        """Offer it no more. A no-op when it is not offered."""
        self._serving.withdraw(blob)

    # ---- fetching ----

    async def fetch(
        self,
        blob: Digest,
        peers: Iterable[PeerId],
        on_progress: Callable[[Progress], None] = lambda _progress: None,
        *,
        bytes_max: int | None = None,
    ) -> Path:
        """The blob as a file of the folder, every chunk compared with its digest; from `peers`, those that have it.

        on_progress is called (sync) as it comes. bytes_max: of this blob, below what is allowed of any.
        Raises Unavailable (says what each peer did), CannotStore (the disk or a bound). Cancelled or failed: HEX.part
        and HEX.manifest stay in the folder, and the next fetch goes on from there, after a restart too; `forget`
        removes them. If another fetch of the same blob runs, this one waits for it without a word of progress, and goes
        on with its own peers when that one ends without the blob.
        """
        async with self._alone(blob), self._room:
            config = self._config.fetch
            if bytes_max is not None:
                config = replace(config, blob_bytes_max=min(bytes_max, config.blob_bytes_max))
            fetch = Fetch(blob, peers, self._place, config, on_progress)
            self._fetches.append(fetch)
            try:
                await fetch.run()
            finally:
                self._fetches.remove(fetch)
        self._fetched["blobs"] += 1
        return self._folder.path(blob)

    def path(self, blob: Digest) -> Path:
        """Where a blob lies once it is whole."""
        return self._folder.path(blob)

    async def forget(self, blob: Digest) -> None:
        """Remove what was fetched of it, once no fetch of it runs. Raises CannotStore."""
        async with self._alone(blob):
            await self._blocking(self._folder.forget, blob)

    async def sweep(self, keep: Container[Digest]) -> frozenset[Digest]:
        """Remove what was fetched, whole or in part, but these and what is fetched now; the whole ones that stay.

        Raises CannotStore.
        """
        running = frozenset(self._running)
        whole: frozenset[Digest] = await self._blocking(
            self._folder.sweep, lambda blob: blob in keep or blob in running
        )
        return whole

    @asynccontextmanager
    async def _alone(self, blob: Digest) -> AsyncIterator[None]:
        """One at a time touches what there is of a blob."""
        while (other := self._running.get(blob)) is not None:
            await other.wait()
        over = self._running[blob] = trio.Event()
        try:
            yield
        finally:
            del self._running[blob]
            over.set()

    def statistics(self) -> BlobsStatistics:
        """A snapshot of the counters."""
        return BlobsStatistics(
            offered=len(self._serving.offered),
            streams_serving=self._serving.streams,
            fetches=len(self._fetches),
            given=dict(self._serving.counts),
            fetched=dict(self._fetched),
            drops=dict(self._serving.drops + self._drops),
        )

    def _peer_changed(self, change: PeerChange) -> None:
        if change.connected:
            for fetch in self._fetches:
                fetch.wake(change.peer)
