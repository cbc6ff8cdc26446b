"""The event log: the chain of events in its SQLite file, appended durably, and what is done when the disk fails.

Rules: shell, sync, blocking; one caller at a time (node/store.py). `append` is one transaction with a flush: what it
returned ids for survives any kill. Nothing here raises for what the disk does: events that cannot be written are
counted by kind, and a `lost` event says how many once writing works again. The head is signed every HEAD_EVENTS
events, at the first write HEAD_MS after the last, at each checkpoint and at the end.
Source: SELF.md, "Memory"; SECURITY.md F17, 3.3.
"""

from __future__ import annotations

import logging
import secrets
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar

from crypto.digest import NONCE_BYTES
from crypto.identity import Identity
from node.chain import FIRST_PREV, Head, Row, body_digest, chain_hash, head_or_none, sign_head
from node.events import Event, Lost, encode_body, searchable
from node.retention import Retention
from node.store_check import COLUMNS
from node.store_file import (
    Damaged,
    drop_index,
    get_meta,
    head_of_aside,
    is_damage,
    is_index_damage,
    make_index,
    move_aside,
    open_file,
    opened,
    put_meta,
    read_head,
    wipe,
    write_head,
)  # fmt: skip

APPEND_MAX: Final = 1_000  # events of one transaction
HEAD_EVENTS: Final = 256  # what a cut of the tail could hide at most
HEAD_MS: Final = 60_000
VACUUM_PAGES: Final = 1_000  # given back to the disk after a step of retention
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tail:
    """Where the chain ends, as of the last commit."""

    id: int
    hash: bytes
    counts: Counter[str]
    head_id: int
    head_ms: int
    noted_id: int  # of the head that stands beside the file


class EventLog:
    """The chain on disk. `close` it; a kill costs nothing that was acknowledged."""

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        retention: Retention | None = None,
        full_text: bool = True,
        wall_clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """Open or make it. A damaged file is moved aside and said; a disk that fails leaves a degraded memory.

        full_text: False does without FTS5, as a Python that lacks it. Raises StoreLocked.
        """
        self.path, self._identity, self._clock_ms = path, identity, wall_clock_ms
        self._retention = retention or Retention()
        self._full_text = full_text
        self._index = False
        self._db: sqlite3.Connection | None = None
        self._tail: _Tail | None = None
        self._lost: Counter[str] = Counter()
        self._lost_since_ms = 0
        self._degraded = self._set_aside = ""
        self._last_write_ms: int | None = None
        self._replacing = False
        self._epoch = 0  # grows when events are taken away: a verification begins anew
        self._run(lambda db: None, None)

    # --- the file ---

    def _open(self) -> sqlite3.Connection:
        """The connection, with the tail read. Raises what `open_file` does, and Damaged."""
        if self._db is None:
            with ExitStack() as undo:
                db = open_file(self.path, self._retention.bytes_max)
                undo.callback(db.close)
                self._index = make_index(db, wanted=self._full_text)
                self._tail = self._read_tail(db)
                if get_meta(db, "unwiped"):  # a kill came between forgetting and wiping
                    self._wipe(db)
                opened(self.path)
                undo.pop_all()
            self._db = db
        if self._tail is None:
            self._tail = self._read_tail(self._db)
        return self._db

    def _read_tail(self, db: sqlite3.Connection) -> _Tail:
        """Raises Damaged when the end of the chain is not one that we wrote."""
        found = db.execute(f"SELECT {COLUMNS} FROM events ORDER BY id DESC LIMIT 1").fetchone()
        raw = get_meta(db, "head")
        head = head_or_none(raw, self._identity.peer_id) if isinstance(raw, bytes) else None
        beside = read_head(self.path, self._identity.peer_id)
        if found is None:
            if raw is not None or (beside is not None and not self._replacing):  # that of the file moved aside
                raise Damaged(f"it has no event, and a signed head names {beside.id if beside else 'one'}")
            return _Tail(id=0, hash=FIRST_PREV, counts=Counter(), head_id=0, head_ms=0, noted_id=0)
        row = Row(*found)
        if head is None:
            raise Damaged("its signed head is missing, damaged, or of another node")
        if row.hash != chain_hash(row.prev_hash, row.id, row.ts_ms, row.kind, row.body_digest):
            raise Damaged(f"its last event, {row.id}, is not what was written")
        newest = max(head.id, beside.id if beside else 0)
        if row.id < newest:
            raise Damaged(f"its signed head names event {newest} and its last one is {row.id}: the end was cut off")
        if beside is not None:
            own = db.execute("SELECT hash FROM events WHERE id = ?", (beside.id,)).fetchone()
            if own is not None and own[0] != beside.hash:
                raise Damaged(f"its event {beside.id} is not the one that the signed head beside it names")
        counts = Counter(dict(db.execute("SELECT kind, count(*) FROM events GROUP BY kind")))
        return _Tail(id=row.id, hash=row.hash, counts=counts, head_id=head.id, head_ms=0, noted_id=head.id)

    def _run(self, work: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Do it in one transaction; `otherwise` when the disk or the file fails, and then why is in the statistics."""
        for _ in range(2):  # a damaged file, or index, is replaced once
            try:
                db = self._open()
                before = db.total_changes
                db.execute("BEGIN IMMEDIATE")
                result = work(db)
                db.execute("COMMIT")
            except (sqlite3.DatabaseError, Damaged, OSError) as exc:
                if isinstance(exc, sqlite3.IntegrityError | sqlite3.ProgrammingError | sqlite3.DataError):
                    raise  # a bug of ours
                if not self._recovered(exc):
                    return otherwise
            else:
                self._note_head(db)
                if self._degraded and not self._lost and db.total_changes > before:
                    _log.warning("the memory %s is written again", self.path)
                    self._degraded = ""
                return result
            finally:
                if self._db is not None and self._db.in_transaction:  # a bug, or the caller's input: nothing is done
                    self._db.execute("ROLLBACK")
                    self._tail = None
        return otherwise

    def _recovered(self, exc: Exception) -> bool:
        """Undo what failed; whether trying again makes sense."""
        self._tail = None
        if isinstance(exc, sqlite3.Error) and is_index_damage(exc) and self._db is not None:
            self._index = False
            self._rollback()
            try:
                drop_index(self._db)
            except sqlite3.Error as inner:
                return self._fail(inner)
            _log.warning(
                "the index of %s is damaged; searching without it, it is built anew at the next start", self.path
            )
            return True
        if isinstance(exc, Damaged) or (isinstance(exc, sqlite3.Error) and is_damage(exc)):
            return self.set_aside(str(exc))
        return self._fail(exc)

    def _note_head(self, db: sqlite3.Connection) -> None:
        """After the commit, so that what stands beside the file is never ahead of it."""
        tail = self._tail
        if tail is not None and tail.noted_id != tail.head_id:
            raw = get_meta(db, "head")
            assert isinstance(raw, bytes), "signed"
            write_head(self.path, raw)
            self._tail = replace(tail, noted_id=tail.head_id)

    def _rollback(self) -> None:
        if self._db is not None and self._db.in_transaction:
            self._db.execute("ROLLBACK")

    def _fail(self, exc: Exception) -> bool:
        """The disk does not do it. The file is opened anew by the next call, so that nothing half done is trusted."""
        self._close_file()
        sentence = (
            f"the memory {self.path} cannot be written: {exc}; the node goes on without remembering, and counts what "
            "is lost; make room or look at the disk, and it is written again by itself"
        )
        if sentence != self._degraded:
            _log.warning("%s", sentence)
        self._degraded = sentence
        return False

    def _close_file(self) -> None:
        db, self._db, self._tail = self._db, None, None
        if db is not None:
            try:
                db.close()
            except sqlite3.Error as exc:
                _log.warning("the memory %s: %s while it was closed", self.path, exc)

    def set_aside(self, why: str) -> bool:
        """Move the file away, whole, and begin a new chain whose first event says so; whether that was possible.

        For what is damaged, and for a chain that `verify` found changed, when its owner decides so.
        """
        self._close_file()
        if self._replacing:
            return self._fail(OSError(f"the new file is damaged too: {why}"))
        try:
            aside = move_aside(self.path)
        except OSError as exc:
            return self._fail(exc)
        head = read_head(self.path, self._identity.peer_id) or head_of_aside(aside, self._identity.peer_id)
        self._set_aside = f"the memory {self.path} was moved aside to {aside.name}: {why}"
        _log.warning("%s; a new one begins", self._set_aside)
        self._epoch += 1
        now_ms = self._clock_ms()
        first = Lost(
            reason=why[:256],
            since_ms=now_ms,
            counts={},
            file=aside.name[-256:],
            head_id=head.id if head else None,
            head_hash=head.hash if head else None,
        )
        pairs = [(Event(ts_ms=now_ms, body=first), encode_body(first))]
        self._replacing = True
        nothing: tuple[int, ...] = ()
        done = bool(self._run(lambda db: self._insert(db, pairs), nothing))
        self._replacing = False
        return done

    def close(self) -> None:
        """Sign the head and let go of the file. It may be called twice, and nothing else after it."""
        if self._db is not None and self._tail is not None and self._tail.head_id < self._tail.id:
            self._run(self._sign, None)
        self._close_file()

    def _outside(self, work: Callable[[sqlite3.Connection], object]) -> bool:
        """Do what cannot stand in a transaction; False when it failed, and then why is in the statistics."""
        try:
            work(self._open())
        except (sqlite3.DatabaseError, Damaged, OSError) as exc:
            self._recovered(exc)
            return False
        return True

    def _wipe(self, db: sqlite3.Connection) -> None:
        """Raises sqlite3.Error; then the mark stands, and it is done again."""
        wipe(db, index=self._index)
        db.execute("DELETE FROM meta WHERE key = 'unwiped'")

    # --- writing ---

    def append(self, events: Sequence[Event]) -> tuple[int, ...]:
        """Remember these, in this order, durably; their ids. Empty: none of them is, and they are counted as lost.

        At most APPEND_MAX. Raises BadEncoding for an event out of its bounds, before anything is written.
        """
        assert len(events) <= APPEND_MAX, f"{len(events)} events came, at most {APPEND_MAX} are one transaction"
        pairs = [(event, encode_body(event.body)) for event in events]
        if self._lost:
            gap = Lost(reason=self._degraded[:256], since_ms=self._lost_since_ms, counts=dict(self._lost))
            pairs.insert(0, (Event(ts_ms=self._clock_ms(), body=gap), encode_body(gap)))
        nothing: tuple[int, ...] = ()
        ids = self._run(lambda db: self._insert(db, pairs), nothing)
        if not ids and events:
            if not self._lost:
                self._lost_since_ms = self._clock_ms()
            self._lost.update(event.kind for event in events)
            return ()
        if self._lost:
            self._lost.clear()
            self._degraded = ""
            _log.warning("the memory %s is written again; a lost event says what it does not have", self.path)
        return ids[len(ids) - len(events) :]

    def _insert(self, db: sqlite3.Connection, pairs: Iterable[tuple[Event, bytes]]) -> tuple[int, ...]:
        """Within a transaction."""
        tail = self._tail
        assert tail is not None, "opened"
        event_id, prev, counts, ids = tail.id, tail.hash, tail.counts.copy(), list[int]()
        for event, raw in pairs:
            event_id += 1
            nonce = secrets.token_bytes(NONCE_BYTES)
            content = body_digest(raw, nonce)
            own = chain_hash(prev, event_id, event.ts_ms, event.kind, content)
            values = (event_id, event.ts_ms, event.kind, event.body.subject or None, nonce, raw, content, prev, own)
            db.execute(f"INSERT INTO events ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)", values)
            text = searchable(event.body)
            if self._index and text:
                db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (event_id, text))
            counts[event.kind] += 1
            prev = own
            ids.append(event_id)
        self._tail = tail = replace(tail, id=event_id, hash=prev, counts=counts)
        now_ms = self._clock_ms()
        if event_id - tail.head_id >= HEAD_EVENTS or abs(now_ms - tail.head_ms) >= HEAD_MS:
            self._sign(db)
        self._last_write_ms = now_ms
        return tuple(ids)

    def _sign(self, db: sqlite3.Connection) -> None:
        tail, now_ms = self._tail, self._clock_ms()
        assert tail is not None, "opened"
        if tail.id:
            put_meta(db, "head", sign_head(self._identity, Head(id=tail.id, hash=tail.hash), now_ms))
            self._tail = replace(tail, head_id=tail.id, head_ms=now_ms)
