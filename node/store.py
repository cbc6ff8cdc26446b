"""The node's memory: a hash-chained log of events that is searched, condensed, forgotten and verified.

Rules: shell, sync, blocking; one caller at a time: it is to run in one worker thread, which need not stay the same.
Whoever has many events hands them over together: an append is one flush. Nothing here raises for what the disk does,
except `forget`, whose caller must know. The index of words and the vectors are made from events and stand outside
the chain; damage there costs recall, not history. Of a tail cut off, `verify` sees what the signed head names.
Source: SELF.md, "Memory"; SECURITY.md F17, 3.3.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from crypto.errors import BadEncoding
from node import store_check, store_pruning, store_recall
from node.chain import Check, Fault
from node.errors import StoreUnavailable
from node.events import Event, Kept, encode_body
from node.store_file import Damaged, get_meta, put_meta, shrink
from node.store_log import EventLog

VACUUM_PAGES: Final = 1_000  # given back to the disk after a step of retention


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatistics:
    """How the memory fares. `degraded` and `set_aside` are sentences, empty when well."""

    path: str
    entries: int
    bytes: int
    last_write_ms: int | None
    head_id: int
    head_hash: str
    index: str  # "fts5", or "scan": the newest store_recall.SCAN_ROWS_MAX are looked through
    vectors: int
    degraded: str
    lost: dict[str, int]  # kind -> events that no `lost` event names yet
    set_aside: str


class Store(EventLog):
    """One node's memory. `close` it; a kill costs nothing that was acknowledged."""

    def put_vector(self, event_id: int, vector: Sequence[float]) -> bool:
        """Keep an event's embedding for `nearest`; False: the event is not there, or it cannot be written now.

        Raises ValueError for a vector that is not 1 to store_vectors.DIMS_MAX finite numbers, not all zero.
        """
        from node import store_vectors  # numpy

        return self._run(lambda db: store_vectors.put_vector(db, event_id, vector), False)

    # --- recall: newest first, at most store_recall.RECALL_MAX; empty when the file cannot be read ---

    def recent(self, kind: str | None, n: int) -> list[Kept]:
        """The newest n of a kind; None: of all kinds."""
        return self._run(lambda db: store_recall.recent(db, kind, n), [])

    def by_subject(self, subject: str, n: int) -> list[Kept]:
        """The newest n of a subject."""
        return self._run(lambda db: store_recall.by_subject(db, subject, n), [])

    def search(self, text: str, n: int) -> list[Kept]:
        """The newest n whose text has all these words, in any order; whatever the text is, it does not raise."""
        return self._run(lambda db: store_recall.search(db, text, n, index=self._index), [])

    def nearest(self, vector: Sequence[float], n: int) -> list[tuple[float, Kept]]:
        """(cosine, event) of the n whose vectors are most alike. Raises ValueError as `put_vector`."""
        from node import store_vectors  # numpy

        return self._run(lambda db: store_vectors.nearest(db, vector, n), [])

    # --- taking away ---

    def forget(self, subject: str) -> int:
        """Erase every body of this subject, its vectors and words, from the file and its log; how many there were.

        Their places in the chain stay. What was on the disk before may outlive this in the disk's own unused blocks,
        and in copies of the file. Takes seconds for a large memory. Raises StoreUnavailable when it is not all done:
        it is finished by the next call, or at the next start.
        """
        if not subject:
            raise ValueError("an empty subject came: say which conversation, account or peer is to be forgotten")
        count = 0
        while True:
            erased = self._run(lambda db: self._forget_some(db, subject), -1)
            if erased < 0:
                raise StoreUnavailable(f"{count} events are forgotten, more are not yet: {self._degraded}")
            if erased == 0:
                break
            count += erased
            self._epoch += 1
        if not self._outside(lambda db: self._wipe(db) if get_meta(db, "unwiped") else None):
            raise StoreUnavailable(f"{count} events are forgotten, their traces are not wiped yet: {self._degraded}")
        return count

    def _forget_some(self, db: sqlite3.Connection, subject: str) -> int:
        assert self._tail is not None, "opened"
        vouch = store_pruning.erase(db, subject, self._tail.id + 1, index=self._index)
        if vouch is None:
            return 0
        put_meta(db, "unwiped", 1)
        self._insert(db, [(Event(ts_ms=self._clock_ms(), body=vouch), encode_body(vouch))])
        self._sign(db)
        return sum(last - first + 1 for first, last in vouch.ranges)

    def retain(self, now_ms: int) -> int:
        """One step of retention: how many events went. Call it again while it is over 0, and then once an hour."""
        removed = self._run(lambda db: self._retain_some(db, now_ms), 0)
        if removed:
            self._epoch += 1
            self._outside(lambda db: shrink(db, VACUUM_PAGES))
        return removed

    def _retain_some(self, db: sqlite3.Connection, now_ms: int) -> int:
        tail = self._tail
        assert tail is not None, "opened"
        ids = store_pruning.due(db, self._retention, tail.counts, now_ms)
        if not ids:
            return 0
        try:
            left, removed = store_pruning.prune(db, ids, now_ms, index=self._index)
        except BadEncoding as exc:
            raise Damaged(f"its last checkpoint is not what was written: {exc}") from exc
        self._tail = replace(tail, counts=tail.counts - removed)
        self._insert(db, [(event, encode_body(event.body)) for event in left])
        self._sign(db)
        return removed.total()

    # --- telling ---

    def verification(self) -> Verification:
        """A walk over the whole chain, to be stepped while the node does other things between."""
        return Verification(self)

    def verify(self) -> Fault | None:
        """The walk in one go: the first event that is wrong and why, or None. Minutes for a million events."""
        walk = self.verification()
        while not walk.done:
            walk.step()
        return walk.fault

    def statistics(self, sizes_of: StoreStatistics | None = None) -> StoreStatistics:
        """A snapshot, from memory but for the sizes, which are read from the file unless they are given."""

        def sizes(db: sqlite3.Connection) -> tuple[int, int]:
            (pages,), (size,) = db.execute("PRAGMA page_count").fetchone(), db.execute("PRAGMA page_size").fetchone()
            (vectors,) = db.execute("SELECT count(*) FROM vectors").fetchone()
            return pages * size, vectors

        if sizes_of is None:
            size_bytes, vectors = self._run(sizes, (0, 0))
        else:
            size_bytes, vectors = sizes_of.bytes, sizes_of.vectors
        tail = self._tail
        return StoreStatistics(
            path=str(self.path),
            entries=tail.counts.total() if tail else 0,
            bytes=size_bytes,
            last_write_ms=self._last_write_ms,
            head_id=tail.id if tail else 0,
            head_hash=tail.hash.hex() if tail else "",
            index="fts5" if self._index else "scan",
            vectors=vectors,
            degraded=self._degraded,
            lost=dict(self._lost),
            set_aside=self._set_aside,
        )


class Verification:
    """One walk over a store's chain; `step` until it is `done`, then `fault` is the answer."""

    def __init__(self, store: Store) -> None:
        """Nothing is read yet."""
        self._store, self._aside = store, store._set_aside
        self._check: Check | None = None
        self._epoch = 0
        self._after_id: int | None = None
        self.done = False
        self.fault: Fault | None = None

    def step(self) -> None:
        """Read up to store_check.VERIFY_ROWS rows; it begins anew when events were taken away meanwhile."""
        if not self.done:
            unreadable: Fault | None = Fault(0, "the file cannot be read")
            self.fault = self._store._run(self._step, unreadable)
            if self._store._set_aside != self._aside:  # and what was read since is another chain
                self.fault = Fault(0, self._store._set_aside)
            self.done = self.done or self.fault is not None

    def _step(self, db: sqlite3.Connection) -> Fault | None:
        if self._check is None or self._epoch != self._store._epoch:
            begun = store_check.begin(db, self._store._identity.peer_id)
            if isinstance(begun, Fault):
                return begun
            self._check, self._epoch, self._after_id = begun, self._store._epoch, None
        before = self._after_id
        self._after_id, fault = store_check.step(db, self._check, before)
        if fault is None and self._after_id == before:
            self.done = True
            fault = self._check.finish()
        return fault
