"""Vectors of the memory's events, and which are most alike.

Rules: shell, sync; on a connection of node/store.py, which imports this when it is first asked: a node without a model
needs no numpy. A question looks at all vectors, VECTORS_MAX of them.
Source: SELF.md, "Memory": recall by embedding.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from node.events import Kept
from node.store_recall import FIELDS, RECALL_MAX, kept

DIMS_MAX: Final = 4_096
VECTORS_MAX: Final = 20_000  # compared one by one: 31 MB of 384 dimensions
_BATCH: Final = 4_096  # vectors in memory at once


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
        row = db.execute(f"SELECT {FIELDS} FROM events e WHERE e.id = ?", (event_id,)).fetchone()
        if row is not None:
            found.append((max(-1.0, min(1.0, like)), kept(row)))
    return found
