"""Questions to the memory: the newest of a kind, of a subject, by words.

Rules: shell, sync; on a connection of node/store.py. Each answer is bounded and newest first, so that a word that
stands in a million events costs no more than one that stands in ten. By likeness: node/store_vectors.py.
A question is words, never FTS5's query language: whatever a stranger types is quoted.
Source: sqlite.org/fts5.html 3.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from typing import Final

from crypto.errors import BadEncoding
from node.events import Body, Kept, decode_body
from node.store_file import text_of_row

RECALL_MAX: Final = 1_000  # events of one answer
SEARCH_WORDS_MAX: Final = 16  # of one question; the rest is not looked at
SCAN_ROWS_MAX: Final = 10_000  # the newest events that a search without an index looks through
FIELDS: Final = "e.id, e.ts_ms, e.kind, e.body, e.hash"


def kept(row: tuple[int, int, str, bytes | None, bytes]) -> Kept:
    """The event of a row of FIELDS."""
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
    question = f"SELECT {FIELDS} FROM events e {where} ORDER BY e.id DESC LIMIT ?"
    return [kept(row) for row in db.execute(question, (*([] if kind is None else [kind]), min(n, RECALL_MAX)))]


def by_subject(db: sqlite3.Connection, subject: str, n: int) -> list[Kept]:
    """The newest n of this subject."""
    question = f"SELECT {FIELDS} FROM events e WHERE e.subject = ? ORDER BY e.id DESC LIMIT ?"
    return [kept(row) for row in db.execute(question, (subject, min(n, RECALL_MAX)))]


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
    question = f"""SELECT {FIELDS} FROM (SELECT rowid AS id FROM words WHERE words MATCH ? ORDER BY rowid DESC LIMIT ?)
        AS found JOIN events e ON e.id = found.id ORDER BY e.id DESC"""
    quoted = " ".join(f'"{word}"' for word in words)  # \w has no quotation mark
    return [kept(row) for row in db.execute(question, (quoted, min(n, RECALL_MAX)))]


def _scan(db: sqlite3.Connection, words: list[str], n: int) -> Iterator[Kept]:
    """Without FTS5: the newest SCAN_ROWS_MAX only, one by one."""
    newest = f"SELECT {FIELDS} FROM events e WHERE e.body IS NOT NULL ORDER BY e.id DESC LIMIT ?"
    for row in db.execute(newest, (SCAN_ROWS_MAX,)):
        if n == 0:
            return
        if set(words) <= set(re.findall(r"\w+", text_of_row(row[2], row[3]).lower())):
            n -= 1
            yield kept(row)
