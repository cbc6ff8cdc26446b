"""The memory's file: how it is opened, locked, laid out, indexed, wiped and moved aside.

Rules: shell, sync; with node/store.py the door to sqlite3. Write-ahead log, synchronous=FULL: a commit that returned
survives kill -9 and, where the disk keeps its word, power loss. A failed flush is not repeated on the same bytes:
SQLite writes a failed commit's frames, and a failed checkpoint's pages, anew (fsyncgate). locking_mode=EXCLUSIVE: one
process, and no -shm file. secure_delete zeroes what is deleted; temporary tables stay in memory; the index of words has
no copy of the text, and `wipe` merges it into one segment, since a deletion there is at first a second entry.
A damaged file is moved with its log to NAME.corrupt-N, never overwritten.
Source: sqlite.org/wal.html, fts5.html 6 ("optimize"), pragma.html; SECURITY.md F17 and 3.3, rule 2.
"""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from crypto.disk import ASIDE_MAX, SYSTEM, System, write_whole
from crypto.envelope import ENVELOPE_BYTES_MAX
from crypto.errors import BadEncoding
from crypto.identity import PeerId
from node.chain import Head, head_or_none
from node.errors import StoreLocked
from node.events import decode_body, searchable

APPLICATION_ID: Final = 0x4F414D31  # "OAM1", so that `file` and we know it
FILE_VERSION: Final = 1
INDEX_FORM: Final = "fts5-1"  # what node.events.searchable gives, and the tokenizer; another one is built anew
PAGE_BYTES: Final = 4_096
CACHE_KIB: Final = 16_384
HEAD_END: Final = ".head"
SPARE_END: Final = ".spare-wal"
SPARE_BYTES_MAX: Final = 256 << 20  # no transaction of ours is that large
LOG_BYTES_MAX: Final = 16 << 20  # what the write-ahead log is cut back to; it is checkpointed each 1,000 pages
_log = logging.getLogger(__name__)

_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT",
    """CREATE TABLE IF NOT EXISTS events (
        id INTEGER PRIMARY KEY, ts_ms INTEGER NOT NULL, kind TEXT NOT NULL, subject TEXT, nonce BLOB, body BLOB,
        body_digest BLOB NOT NULL, prev_hash BLOB NOT NULL, hash BLOB NOT NULL, erased_by INTEGER) STRICT""",
    "CREATE INDEX IF NOT EXISTS events_kind ON events (kind)",
    "CREATE INDEX IF NOT EXISTS events_subject ON events (subject) WHERE subject IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS events_erased ON events (erased_by) WHERE erased_by IS NOT NULL",
    "CREATE TABLE IF NOT EXISTS vectors (id INTEGER PRIMARY KEY, vector BLOB NOT NULL) STRICT",
)
_WORDS: Final = "CREATE VIRTUAL TABLE words USING fts5(text, content='', columnsize=0)"


class Damaged(Exception):
    """The file is no memory of ours, or not a whole one: says what was found."""


def open_file(path: Path, bytes_max: int) -> sqlite3.Connection:
    """Open or make it, and lock it until it is closed. Blocks the thread.

    Raises StoreLocked, Damaged, sqlite3.Error (codes tell a damaged file from a failing disk), OSError.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _spare_log(path)
    if not path.exists():  # else the lock of another connection of this process would end with our handle
        os.close(SYSTEM.append_to(path))  # 0600, and SQLite gives its log the same
    with ExitStack() as undo:
        db = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        undo.callback(db.close)
        try:
            _prepare(db, path, bytes_max)
        except sqlite3.OperationalError as exc:
            if primary_code(exc) not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
                raise
            raise StoreLocked(
                f"the memory {path} is open in another process; a node's memory has one writer: "
                "stop the other node, or give this one a data directory of its own"
            ) from exc
        undo.pop_all()
    return db


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def _spare_log(path: Path) -> None:
    """A copy of the write-ahead log that a kill left: SQLite throws away a log whose header is damaged.

    It goes once the file is found whole (`opened`), and stays with a file that is moved aside.
    """
    log, spare = _beside(path, "-wal"), _beside(path, SPARE_END)
    try:
        if not log.exists() or not log.stat().st_size or spare.exists():
            return
        handle = SYSTEM.open_part(spare)
        try:
            SYSTEM.write_at(handle, SYSTEM.read(log, SPARE_BYTES_MAX), 0)
        finally:
            os.close(handle)
    except OSError as exc:  # a full disk: the log itself is still there
        spare.unlink(missing_ok=True)
        _log.warning("the log of %s is not copied before it is opened: %s", path, exc)


def opened(path: Path) -> None:
    """The file is whole: the copy of its log is not needed. Raises OSError."""
    _beside(path, SPARE_END).unlink(missing_ok=True)


def write_head(path: Path, raw: bytes) -> None:
    """Keep the signed head beside the file too: a log that is cut off would take the head in it along."""
    try:
        write_whole(_beside(path, HEAD_END), raw, over=True)
    except OSError as exc:
        _log.warning("the head of %s is not kept beside it: %s", path, exc)


def read_head(path: Path, peer_id: PeerId) -> Head | None:
    """The head beside the file; None when there is none of this peer's."""
    try:
        return head_or_none(SYSTEM.read(_beside(path, HEAD_END), ENVELOPE_BYTES_MAX), peer_id)
    except FileNotFoundError:
        return None
    except OSError as exc:
        _log.warning("the head beside %s cannot be read: %s", path, exc)
        return None


def _prepare(db: sqlite3.Connection, path: Path, bytes_max: int) -> None:
    for setting in (
        "locking_mode=EXCLUSIVE", f"page_size={PAGE_BYTES}", "auto_vacuum=INCREMENTAL", "secure_delete=ON",
        "temp_store=MEMORY", "trusted_schema=OFF", "cell_size_check=ON", f"cache_size=-{CACHE_KIB}",
        f"journal_size_limit={LOG_BYTES_MAX}",
    ):  # fmt: skip
        db.execute(f"PRAGMA {setting}")
    db.execute("BEGIN EXCLUSIVE")
    db.execute("COMMIT")
    (mode,) = db.execute("PRAGMA journal_mode=WAL").fetchone()
    if mode != "wal":
        raise Damaged(f"its journal is {mode!a} and cannot be made a write-ahead log")
    db.execute("PRAGMA synchronous=FULL")
    db.execute(f"PRAGMA max_page_count={bytes_max // PAGE_BYTES}")
    (application,), (version,) = (
        db.execute("PRAGMA application_id").fetchone(),
        db.execute("PRAGMA user_version").fetchone(),
    )
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if tables and (application, version) != (APPLICATION_ID, FILE_VERSION):
        raise Damaged(
            f"{path.name} is of application {application:#x} version {version}, wanted {APPLICATION_ID:#x} version "
            f"{FILE_VERSION}: another program or a newer node wrote it"
        )
    if tables:
        return
    db.execute("BEGIN IMMEDIATE")
    for line in (*_SCHEMA, f"PRAGMA application_id={APPLICATION_ID}", f"PRAGMA user_version={FILE_VERSION}"):
        db.execute(line)
    db.execute("COMMIT")


def primary_code(exc: sqlite3.Error) -> int:
    """SQLite's result code without its extension; 0 when the error is Python's own."""
    code: int = getattr(exc, "sqlite_errorcode", 0)
    return code & 0xFF


def is_damage(exc: sqlite3.Error) -> bool:
    """Whether the file is at fault, not the disk. The index of words alone can be made anew."""
    return primary_code(exc) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) and not is_index_damage(exc)


def is_index_damage(exc: sqlite3.Error) -> bool:
    """Whether it is the index of words that is damaged."""
    return getattr(exc, "sqlite_errorcode", 0) == sqlite3.SQLITE_CORRUPT_VTAB


def get_meta(db: sqlite3.Connection, key: str) -> object:
    """A value of the file's own; None when there is none."""
    found = db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return found[0] if found else None


def put_meta(db: sqlite3.Connection, key: str, value: object) -> None:
    """Within the caller's transaction."""
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))


# --- the index of words ---


def make_index(db: sqlite3.Connection, *, wanted: bool) -> bool:
    """See that the index is there and of our form; whether it is. Without FTS5 there is none, and that is noted.

    Building it anew takes a second for some 20,000 events. Raises sqlite3.Error.
    """
    has_fts5 = db.execute("SELECT 1 FROM pragma_module_list WHERE name = 'fts5'").fetchone() is not None
    if not (wanted and has_fts5):
        drop_index(db)
        return False
    if get_meta(db, "index") == INDEX_FORM:
        return True
    db.execute("BEGIN IMMEDIATE")
    db.execute("DROP TABLE IF EXISTS words")
    db.execute(_WORDS)
    for event_id, kind, body in db.execute("SELECT id, kind, body FROM events WHERE body IS NOT NULL"):
        text = text_of_row(kind, body)
        if text:
            db.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (event_id, text))
    put_meta(db, "index", INDEX_FORM)
    db.execute("COMMIT")
    return True


def drop_index(db: sqlite3.Connection) -> None:
    """Note that the index does not hold all any more: it is built anew when the file is next opened."""
    if get_meta(db, "index") != "none":
        put_meta(db, "index", "none")


def text_of_row(kind: str, body: bytes) -> str:
    """What the index has of a row; of a body that does not decode, nothing: `verify` names it."""
    try:
        return searchable(decode_body(kind, body))
    except BadEncoding:
        return ""


def unindex(db: sqlite3.Connection, event_id: int, text: str) -> None:
    """Take an event out of the index, which has no copy of the text and needs the very same one."""
    if text:
        db.execute("INSERT INTO words (words, rowid, text) VALUES ('delete', ?, ?)", (event_id, text))


def shrink(db: sqlite3.Connection, pages: int) -> None:
    """Give so many free pages back to the disk. Outside a transaction; raises sqlite3.Error."""
    db.executescript(f"PRAGMA incremental_vacuum({pages})")  # `execute` steps once, which is one page


def wipe(db: sqlite3.Connection, *, index: bool) -> None:
    """Leave nothing of what was deleted: one segment without deletions, then an empty write-ahead log.

    Takes seconds for an index of a million events. Raises sqlite3.Error; then it is to be done again.
    """
    if index:
        db.execute("INSERT INTO words (words) VALUES ('optimize')")
    (busy, _, _) = db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert not busy, "there is no other reader: the file is locked"


# --- a damaged file ---


def head_of_aside(path: Path, peer_id: PeerId) -> Head | None:
    """The last signed head of a file that was moved aside, if it can be read. Leaves the file as it is."""
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?immutable=1", uri=True)
    except sqlite3.Error:
        return None
    try:
        raw = get_meta(db, "head")
    except sqlite3.Error:
        return None
    finally:
        db.close()
    return head_or_none(raw, peer_id) if isinstance(raw, bytes) else None


def move_aside(path: Path, system: System = SYSTEM) -> Path:
    """Move the file with its log to the first free NAME.corrupt-N. Raises OSError; then the file stands.

    The log goes first: a file without its log is an older whole one, a log without its file would be thrown away.
    """
    for number in range(1, ASIDE_MAX + 1):
        aside = path.with_name(f"{path.name}.corrupt-{number}")
        pairs = [(_beside(path, end), _beside(aside, end)) for end in (SPARE_END, "-wal", "-shm", "")]
        if any(os.path.lexists(new) for _, new in pairs):
            continue
        for old, new in pairs:
            if os.path.lexists(old):
                system.rename(old, new)
        system.sync_folder(path.parent)
        return aside
    raise OSError(errno.EISDIR, f"{ASIDE_MAX} damaged files stand beside {path} already: look at them, and move them")
