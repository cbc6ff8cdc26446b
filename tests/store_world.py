"""A memory for tests: made events, a clock that is set by hand, the raw bytes and rows of its file."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crypto.identity import Identity
from node.events import Event, Inference, Note, State
from node.retention import Retention
from node.store import Store

IDENTITY = Identity(bytes(range(32)))
T0_MS = 1_800_000_000_000


class World:
    """One memory in a folder, opened as often as wanted."""

    def __init__(self, folder: Path, retention: Retention | None = None) -> None:
        self.path = folder / "memory.db"
        self.retention = retention
        self.now_ms = T0_MS

    def open(self, *, full_text: bool = True, retention: Retention | None = None) -> Store:
        return Store(
            self.path,
            IDENTITY,
            retention=retention or self.retention,
            full_text=full_text,
            wall_clock_ms=lambda: self.now_ms,
        )

    def tamper(self, question: str, values: Sequence[Any] = ()) -> None:
        """Change a closed file as whoever has it may."""
        with sqlite3.connect(self.path, isolation_level=None) as db:
            if values:
                db.execute(question, values)
            else:
                db.executescript(question)
        db.close()

    def rows(self, question: str) -> list[Any]:
        """Of a closed file."""
        with sqlite3.connect(self.path) as db:
            found = db.execute(question).fetchall()
        db.close()
        return found

    def raw(self) -> bytes:
        """All bytes of the file and its log, read by another process: a read here would let go of the lock."""
        read = "import sys, pathlib\nfor p in sys.argv[1:]: sys.stdout.buffer.write(pathlib.Path(p).read_bytes())"
        paths = [str(each) for each in self.path.parent.glob("memory.db*")]
        return subprocess.run([sys.executable, "-c", read, *paths], check=True, capture_output=True).stdout

    def crashed(self, folder: Path) -> World:
        """The same files as a kill leaves them now."""
        folder.mkdir()
        for each in self.path.parent.glob("memory.db*"):
            shutil.copy(each, folder)
        other = World(folder, self.retention)
        other.now_ms = self.now_ms
        return other


def note(text: str, subject: str = "", ts_ms: int = T0_MS) -> Event:
    return Event(ts_ms=ts_ms, body=Note(text=text, subject=subject))


def state(value: float = 1.0, ts_ms: int = T0_MS, subject: str = "") -> Event:
    figures = {"latency_ms": value, "peers": 3.0}
    return Event(ts_ms=ts_ms, body=State(figures=figures, words={"revision": "r1"}, subject=subject))


def inference(ts_ms: int = T0_MS, outcome: str = "ok", text: str | None = None, subject: str = "") -> Event:
    body = Inference(
        model="default",
        revision="r1",
        prompt_tokens=10,
        answer_tokens=4,
        duration_ms=250,
        outcome=outcome,
        text=text,
        subject=subject,
    )
    return Event(ts_ms=ts_ms, body=body)
