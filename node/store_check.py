"""The walk of node/chain.py's Check over the file, in steps.

Rules: shell, sync; on a connection of node/store.py. A step reads VERIFY_ROWS rows. Events may be appended between
steps; when some are taken away (forgotten, pruned) the walk begins anew, since what vouches for the rest is new.
"""

from __future__ import annotations

import sqlite3
from typing import Final

from crypto.errors import BadEncoding
from crypto.identity import PeerId
from node.chain import Check, Fault, Row, head_or_none
from node.events import Forgotten
from node.store_file import get_meta
from node.store_pruning import last_pruned
from node.store_recall import body_of

VERIFY_ROWS: Final = 250  # of one step: some 50 ms
COLUMNS: Final = "id, ts_ms, kind, subject, nonce, body, body_digest, prev_hash, hash, erased_by"


def begin(db: sqlite3.Connection, peer_id: PeerId) -> Check | Fault:
    """A walk that has seen nothing yet, or the fault that makes it needless."""
    try:
        pruned = last_pruned(db)
    except BadEncoding as exc:
        (event_id,) = db.execute("SELECT max(id) FROM events WHERE kind = 'pruned'").fetchone()
        return Fault(event_id, f"the last checkpoint is not what was written: {exc}")
    raw = get_meta(db, "head")
    head = head_or_none(raw, peer_id) if isinstance(raw, bytes) else None
    if head is None and db.execute("SELECT 1 FROM events LIMIT 1").fetchone():
        return Fault(0, "the signed head is missing, damaged, or of another node")
    forgotten = {
        event_id: body
        for event_id, raw in db.execute("SELECT id, body FROM events WHERE kind = 'forgotten'")
        if isinstance(body := body_of("forgotten", raw), Forgotten)
    }
    return Check(pruned=pruned, forgotten=forgotten, head=head)


def step(db: sqlite3.Connection, check: Check, after_id: int | None) -> tuple[int | None, Fault | None]:
    """Feed it the rows after this id (None: from the first, whatever its id); (the last id read, what is wrong).

    The same id comes back when no row was left.
    """
    where, values = ("", ()) if after_id is None else ("WHERE id > ?", (after_id,))
    for found in db.execute(f"SELECT {COLUMNS} FROM events {where} ORDER BY id LIMIT ?", (*values, VERIFY_ROWS)):
        after_id = found[0]
        fault = check.feed(Row(*found))
        if fault:
            return after_id, fault
    return after_id, None
