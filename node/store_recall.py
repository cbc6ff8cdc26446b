"""Questions to the memory: the newest of a kind, of a subject, by words, by likeness of vectors.

Rules: shell, sync; on a connection of node/store.py. Each answer is bounded and newest first, so that a word that
stands in a million events costs no more than one that stands in ten; only likeness looks at all, VECTORS_MAX of them.
A question is words, never FTS5's query language: whatever a stranger types is quoted.
Source: sqlite.org/fts5.html 3.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from crypto.errors import BadEncoding
from node.events import Body, Kept, decode_body
from node.store_file import text_of_row

RECALL_MAX: Final = 1_000  # events of one answer
SEARCH_WORDS_MAX: Final = 16  # of one question; the rest is not looked at
SCAN_ROWS_MAX: Final = 10_000  # the newest events that a search without an index looks through
DIMS_MAX: Final = 4_096
VECTORS_MAX: Final = 20_000  # compared one by one: 31 MB of 384 dimensions
_BATCH: Final = 4_096  # vectors in memory at once
_FIELDS: Final = "e.id, e.ts_ms, e.kind, e.body, e.hash"


def _kept(row: tuple[int, int, str, bytes | None, bytes]) -> Kept:
    event_id, ts_ms, kind, raw, own = row
    return Kept(id=event_id, ts_ms=ts_ms, kind=kind, body=body_of(kind, raw), hash=own)


def body_of(kind: str, raw: bytes | None) -> Body | None:
    """None when it was forgotten, and when it does not decode: then `verify` names it."""
    if raw is None:
        return None
    try:
        return decode_body(kind, raw)
    except BadEncoding:
        return None


def recent(db: sqlite3.Connection, kind: str | None, n: int) -> list[Kept]:
    """The newest n, of one kind or of all."""
    where = "" if kind is None else "WHERE e.kind = ?"
    question = f"SELECT {_FIELDS} FROM events e {where} ORDER BY e.id DESC LIMIT ?"
    return [_kept(row) for row in db.execute(question, (*([] if kind is None else [kind]), min(n, RECALL_MAX)))]


def by_subject(db: sqlite3.Connection, subject: str, n: int) -> list[Kept]:
    """The newest n of this subject."""
    question = f"SELECT {_FIELDS} FROM events e WHERE e.subject = ? ORDER BY e.id DESC LIMIT ?"
    return [_kept(row) for row in db.execute(question, (subject, min(n, RECALL_MAX)))]


def words_of(text: str) -> list[str]:
    """What is looked for: words in lower case, without signs."""
    return re.findall(r"\w+", text.lower())[:SEARCH_WORDS_MAX]


def search(db: sqlite3.Connection, text: str, n: int, *, index: bool) -> list[Kept]:
    """The newest n whose text has all these words; none for a question without words."""
    words = words_of(text)
    if not words:
        return []
    if not index:
        return list(_scan(db, words, min(n, RECALL_MAX)))
    question = f"""SELECT {_FIELDS} FROM (SELECT rowid AS id FROM words WHERE words MATCH ? ORDER BY rowid DESC LIMIT ?)
        AS found JOIN events e ON e.id = found.id ORDER BY e.id DESC"""
    quoted = " ".join(f'"{word}"' for word in words)  # \w has no quotation mark
    return [_kept(row) for row in db.execute(question, (quoted, min(n, RECALL_MAX)))]


def _scan(db: sqlite3.Connection, words: list[str], n: int) -> Iterator[Kept]:
    """Without FTS5: the newest SCAN_ROWS_MAX only, one by one."""
    newest = f"SELECT {_FIELDS} FROM events e WHERE e.body IS NOT NULL ORDER BY e.id DESC LIMIT ?"
    for row in db.execute(newest, (SCAN_ROWS_MAX,)):
        if n == 0:
            return
        if set(words) <= set(re.findall(r"\w+", text_of_row(row[2], row[3]).lower())):
            n -= 1
            yield _kept(row)


def _unit(vector: Sequence[float]) -> npt.NDArray[np.float32]:
    """At length 1. Raises ValueError for a vector without a direction."""
    x_D = np.asarray(vector, np.float32)
    if x_D.ndim != 1 or not 1 <= x_D.size <= DIMS_MAX or not np.isfinite(x_D).all() or not x_D.any():
        raise ValueError(f"a vector of shape {x_D.shape} came, wanted 1 to {DIMS_MAX} finite numbers, not all zero")
    x_D = x_D / np.abs(x_D).max()  # so that the squares neither overflow nor vanish
    unit_D: npt.NDArray[np.float32] = (x_D / np.linalg.norm(x_D)).astype(np.float32)
    return unit_D


def put_vector(db: sqlite3.Connection, event_id: int, vector: Sequence[float]) -> bool:
    """Keep an event's embedding, at length 1; False when the event is not there or was forgotten.

    The oldest goes when there are more than VECTORS_MAX. Raises ValueError for a vector without a direction.
    """
    x_D = _unit(vector)
    if not db.execute("SELECT 1 FROM events WHERE id = ? AND body IS NOT NULL", (event_id,)).fetchone():
        return False
    db.execute("INSERT OR REPLACE INTO vectors VALUES (?, ?)", (event_id, x_D.astype("<f4").tobytes()))
    (count,) = db.execute("SELECT count(*) FROM vectors").fetchone()
    if count > VECTORS_MAX:
        db.execute(
            "DELETE FROM vectors WHERE id IN (SELECT id FROM vectors ORDER BY id LIMIT ?)", (count - VECTORS_MAX,)
        )
    return True


def nearest(db: sqlite3.Connection, vector: Sequence[float], n: int) -> list[tuple[float, Kept]]:
    """(cosine, event) of the n most alike, among the vectors of as many dimensions. Looks at each of them."""
    x_D = _unit(vector)
    best: list[tuple[float, int]] = []
    rows = db.execute("SELECT id, vector FROM vectors WHERE length(vector) = ?", (4 * x_D.size,))
    while batch := rows.fetchmany(_BATCH):
        y_BD = np.frombuffer(b"".join(blob for _, blob in batch), "<f4").reshape(len(batch), x_D.size)
        likeness_B = y_BD @ x_D
        first_K = np.argsort(-likeness_B, kind="stable")[: min(n, RECALL_MAX)]
        best += [(float(likeness_B[at]), batch[at][0]) for at in first_K.tolist()]
        best = sorted(best, key=lambda each: (-each[0], -each[1]))[: min(n, RECALL_MAX)]
    found = []
    for like, event_id in best:
        row = db.execute(f"SELECT {_FIELDS} FROM events e WHERE e.id = ?", (event_id,)).fetchone()
        if row is not None:
            found.append((max(-1.0, min(1.0, like)), _kept(row)))
    return found
