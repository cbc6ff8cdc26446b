"""A look at the file of a memory that no node has open: whether its chain is whole. It changes nothing.

Rules: shell, sync, blocking; read only, so that a damaged file stays where it is for its node to find, and what a kill
left in the write-ahead log is read and stays there. It checks what the store checks on opening and all that `verify`
walks. While it looks no node can open the file.
Source: sqlite.org/wal.html 7 ("Read-Only Databases"); node/store_log.py, `_read_tail`.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crypto.identity import PeerId
from node.chain import Check, Fault
from node.errors import StoreLocked, StoreUnavailable
from node.store_check import begin, step
from node.store_file import APPLICATION_ID, FILE_VERSION, is_damage, primary_code, read_head

MEMORY_FILE: Final = "memory.db"  # in the data directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was found. fault: the first event that is wrong; None: the chain is whole."""

    events: int
    head_id: int
    head_hash: str
    fault: Fault | None


def look(path: Path, peer_id: PeerId) -> Look:
    """Walk the whole chain of this file of this peer's. Minutes for a million events.

    Raises StoreLocked (a node has it open), StoreUnavailable (there is none, or it cannot be read)."""
    if not path.is_file():
        raise StoreUnavailable(f"there is no memory at {path}: name the node's own folder by --data-dir")
    made = [each for end in ("-shm", "-wal") if not (each := path.with_name(path.name + end)).exists()]
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=0, isolation_level=None)
    try:
        db.execute("BEGIN")
        found = _look(db, path, peer_id)
        _tidy(made)
        return found
    except sqlite3.DatabaseError as exc:
        if primary_code(exc) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise StoreLocked(f"the memory {path} is open in another process, and only that one can read it") from exc
        if is_damage(exc):
            return Look(events=0, head_id=0, head_hash="", fault=Fault(0, f"the file cannot be read: {exc}"))
        raise StoreUnavailable(f"the memory {path} cannot be read: {exc}") from exc
    finally:
        db.close()


def _tidy(made: list[Path]) -> None:
    """Take away what SQLite makes for who reads, while the lock is ours: behind it, a node's own may stand there."""
    for each in made:
        try:
            if each.suffix == ".db-shm" or not each.stat().st_size:
                each.unlink()
        except OSError:  # it was not made; or Windows keeps what is open, and the next opening uses it
            continue


def _look(db: sqlite3.Connection, path: Path, peer_id: PeerId) -> Look:
    """Raises sqlite3.Error."""
    (application,), (version,) = (
        db.execute("PRAGMA application_id").fetchone(),
        db.execute("PRAGMA user_version").fetchone(),
    )
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if not tables:  # a kill came before anything was written
        return Look(events=0, head_id=0, head_hash="", fault=_beside(db, path, peer_id, 0))
    if (application, version) != (APPLICATION_ID, FILE_VERSION):
        why = f"it is of application {application:#x} version {version}: another program or another node wrote it"
        return Look(events=0, head_id=0, head_hash="", fault=Fault(0, why))
    (events,) = db.execute("SELECT count(*) FROM events").fetchone()
    tail = db.execute("SELECT id, hash FROM events ORDER BY id DESC LIMIT 1").fetchone() or (0, b"")
    fault = _walk(db, peer_id) or _beside(db, path, peer_id, tail[0])
    head_hash = tail[1].hex() if isinstance(tail[1], bytes) else ""
    return Look(events=events, head_id=tail[0], head_hash=head_hash, fault=fault)


def _walk(db: sqlite3.Connection, peer_id: PeerId) -> Fault | None:
    check: Check | Fault = begin(db, peer_id)
    if isinstance(check, Fault):
        return check
    before: int | None = None
    while True:
        after, fault = step(db, check, before)
        if fault is not None:
            return fault
        if after == before:
            return check.finish()
        before = after


def _beside(db: sqlite3.Connection, path: Path, peer_id: PeerId, last_id: int) -> Fault | None:
    """What the signed head beside the file says against it: a log that was cut off takes the head in it along."""
    head = read_head(path, peer_id)
    if head is None:
        return None
    if last_id < head.id:
        return Fault(last_id + 1, f"the signed head beside the file names event {head.id}: the end was cut off")
    own = db.execute("SELECT hash FROM events WHERE id = ?", (head.id,)).fetchone()
    if own is not None and own[0] != head.hash:
        return Fault(head.id, "it is not the event that the signed head beside the file names")
    return None
