"""What leaves the memory: events whose time is over, and those that the operator wants forgotten.

Rules: shell, sync; each function is part of a transaction of node/store.py, which then appends the event that vouches
for what was taken: a `pruned` checkpoint or a `forgotten`. So a kill leaves both or neither. A step is bounded by
rows and bytes. A `forgotten` stays for as long as a row that it vouches for; the checkpoints before the last go.
Source: SELF.md, "Memory"; node/chain.py.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections import Counter
from collections.abc import Mapping
from typing import Final

from crypto.errors import BadEncoding
from node.events import FORGET_ROWS_MAX, Event, Forgotten, Pruned, decode_body
from node.retention import CONDENSED, Retention, condense
from node.store_file import text_of_row, unindex
from node.store_recall import body_of

RETAIN_ROWS_MAX: Final = 1_000  # that go in one step: some 0.3 s, in which the caller's thread does nothing else
RETAIN_BYTES_MAX: Final = 8 << 20  # of bodies in one step
FULL_SHARE: Final = 0.8  # of bytes_max: beyond it the oldest measurements go, whatever their age


def erase(db: sqlite3.Connection, subject: str, by: int, *, index: bool) -> Forgotten | None:
    """Erase up to FORGET_ROWS_MAX bodies of this subject; what vouches for it, which must become event `by`."""
    ranges: list[tuple[int, int]] = []
    question = "SELECT id, kind, body FROM events WHERE subject = ? ORDER BY id LIMIT ?"
    for event_id, kind, body in db.execute(question, (subject, FORGET_ROWS_MAX)).fetchall():
        if index:
            unindex(db, event_id, text_of_row(kind, body))
        db.execute("DELETE FROM vectors WHERE id = ?", (event_id,))
        db.execute(
            "UPDATE events SET body = NULL, nonce = NULL, subject = NULL, erased_by = ? WHERE id = ?", (by, event_id)
        )
        if ranges and ranges[-1][1] == event_id - 1:
            ranges[-1] = (ranges[-1][0], event_id)
        else:
            ranges.append((event_id, event_id))
    return Forgotten(ranges=ranges) if ranges else None


def last_pruned(db: sqlite3.Connection) -> Pruned | None:
    """The checkpoint that holds. Raises BadEncoding when it is not what was written."""
    row = db.execute("SELECT body FROM events WHERE kind = 'pruned' ORDER BY id DESC LIMIT 1").fetchone()
    if row is None:
        return None
    body = decode_body("pruned", row[0] if isinstance(row[0], bytes) else b"")
    if not isinstance(body, Pruned):
        raise BadEncoding("a checkpoint is of another kind")
    return body


def due(db: sqlite3.Connection, retention: Retention, counts: Mapping[str, int], now_ms: int) -> list[int]:
    """Ids of events whose time is over, oldest first: as many as one step takes."""
    found: list[tuple[int, int]] = []
    for kind, term in retention.terms.items():
        if kind == "pruned":
            continue
        spare = "AND NOT EXISTS (SELECT 1 FROM events f WHERE f.erased_by = e.id)" if kind == "forgotten" else ""
        question = f"SELECT id, ts_ms, length(body) FROM events e WHERE kind = ? {spare} ORDER BY id LIMIT ?"
        over = counts.get(kind, 0) - term.rows_max
        for place, (event_id, ts_ms, size) in enumerate(db.execute(question, (kind, RETAIN_ROWS_MAX))):
            if place < over or ts_ms < now_ms - term.age_ms:
                found.append((event_id, size or 0))
    if not found and bytes_used(db) > FULL_SHARE * retention.bytes_max:
        marks = ", ".join("?" * len(CONDENSED))
        oldest = f"SELECT id, length(body) FROM events WHERE kind IN ({marks}) ORDER BY id LIMIT ?"
        found = [(event_id, size or 0) for event_id, size in db.execute(oldest, (*CONDENSED, RETAIN_ROWS_MAX))]
    ids, size_bytes = list[int](), 0
    for event_id, size in sorted(found)[:RETAIN_ROWS_MAX]:
        size_bytes += size
        if ids and size_bytes > RETAIN_BYTES_MAX:
            break
        ids.append(event_id)
    return ids


def bytes_used(db: sqlite3.Connection) -> int:
    """Of the file, without its free pages."""
    (pages,), (free,) = db.execute("PRAGMA page_count").fetchone(), db.execute("PRAGMA freelist_count").fetchone()
    (size,) = db.execute("PRAGMA page_size").fetchone()
    return int((pages - free) * size)


def prune(db: sqlite3.Connection, ids: list[int], now_ms: int, *, index: bool) -> tuple[list[Event], Counter[str]]:
    """Take these out; (what is left of them and the new checkpoint, kind -> how many went).

    Raises BadEncoding when the checkpoint before is damaged: then `verify` names it, and nothing is taken.
    """
    before = last_pruned(db)
    through_id = max(ids[-1], before.through_id if before else 0)
    row = db.execute("SELECT hash FROM events WHERE id = ?", (through_id,)).fetchone()
    if row is None:
        assert before is not None, "only a checkpoint takes events away"
        through_hash = before.through_hash
    else:
        through_hash = row[0]
    old = "SELECT id FROM events WHERE kind = 'pruned' AND id <= ?"
    ids = sorted({*ids, *(event_id for (event_id,) in db.execute(old, (through_id,)))})
    gone, removed = [], Counter[str]()
    for event_id in ids:
        kind, ts_ms, body = db.execute("SELECT kind, ts_ms, body FROM events WHERE id = ?", (event_id,)).fetchone()
        if index and body is not None:
            unindex(db, event_id, text_of_row(kind, body))
        gone.append((kind, ts_ms, body_of(kind, body)))
        removed[kind] += 1
        db.execute("DELETE FROM vectors WHERE id = ?", (event_id,))
        db.execute("DELETE FROM events WHERE id = ?", (event_id,))
    kept, hashes = 0, hashlib.sha256()
    for (own,) in db.execute("SELECT hash FROM events WHERE id <= ? ORDER BY id", (through_id,)):
        kept += 1
        hashes.update(own)
    checkpoint = Pruned(
        through_id=through_id,
        through_hash=through_hash,
        kept_count=kept,
        kept_digest=hashes.digest(),
        removed=dict(removed),
    )
    return [*condense(gone, now_ms), Event(ts_ms=now_ms, body=checkpoint)], removed
