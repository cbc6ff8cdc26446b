"""What the recorder does in its thread: opens the store, appends what waits, does what was asked, and says how it went.

Rules: shell, sync, blocking; one caller at a time. Nothing here raises for what the disk or another process does: a
store that cannot be opened is a sentence in `trouble`, and is tried again after RETRY_S.
Source: node/recorder.py.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from crypto.errors import BadEncoding
from crypto.identity import Identity
from node.errors import StoreLocked
from node.events import Event, Lost
from node.retention import Retention
from node.store import Store, StoreStatistics

BATCH_MAX: Final = 500  # events of one append, below store_log.APPEND_MAX
RETRY_S: Final = 30.0  # until a memory that cannot be opened is tried again
LOST_EVERY_MS: Final = 60_000  # a flood of what is not kept is one event a minute
SIZES_EVERY_S: Final = 60.0  # the statistics' sizes are read from the file

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Waiting:
    """An event in the queue. id: its place in the chain, 0 when it was not written."""

    event: Event
    on_id: Callable[[int], None] | None = None
    done: trio.Event | None = None
    id: int = 0

    def settle(self) -> None:
        """On the loop: whoever waits for it goes on."""
        if self.on_id is not None:
            self.on_id(self.id)
        if self.done is not None:
            self.done.set()


@dataclass(slots=True)
class Unsaid:
    """What the next `lost` event says."""

    counts: Counter[str] = field(default_factory=Counter)
    since_ms: int = 0


@dataclass(slots=True, eq=False)
class Visit:
    """One to the thread. is_said: `unsaid` stands in the chain; refused: kind -> events out of their bounds."""

    act: Callable[[Store], object]
    unsaid: Unsaid
    is_said: bool = False
    settled: list[Waiting] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)


class RecorderThread:
    """The store, as the thread has it. What it says of itself may be read from the loop."""

    def __init__(
        self, path: Path, identity: Identity, retention: Retention | None, clock_ms: Callable[[], int]
    ) -> None:
        self.path, self._identity, self._retention, self._clock_ms = path, identity, retention, clock_ms
        self.told: StoreStatistics | None = None
        self.trouble = ""  # why the file is not open: one sentence
        self.since_s: float | None = None  # since when nothing can be written (Unix seconds)
        self.cpu_s = 0.0
        self.is_closed = False
        self._store: Store | None = None
        self._told_at = self._tried_at = float("-inf")

    @property
    def untold(self) -> StoreStatistics:
        """What is known of the store before it was first opened: nothing."""
        return StoreStatistics(
            path=str(self.path), entries=0, bytes=0, last_write_ms=None, head_id=0, head_hash="", index="", vectors=0,
            degraded="", lost={}, set_aside="",
        )  # fmt: skip

    @property
    def problem(self) -> str:
        """One sentence while nothing can be written; '' otherwise."""
        return self.trouble or ("" if self.told is None else self.told.degraded)

    @property
    def reason(self) -> str:
        """The same in a word."""
        return "" if not self.problem else "locked" if self.trouble else "not_written"

    def work(self, visit: Visit, queue: deque[Waiting]) -> None:
        """Append what waits, up to BATCH_MAX, and do the act. Raises what that raises."""
        began_s = time.thread_time()
        try:
            if (store := self._opened()) is not None:
                self._append(store, queue, visit)
                visit.act(store)
                if visit.act is Store.close:
                    self._store, self.is_closed = None, True
                else:
                    self._tell(store)
        except StoreLocked as exc:
            self._say(str(exc))
        finally:
            if self.trouble:  # who waits for it is told; what nobody waits for stays
                left = [queue.popleft() for _ in range(len(queue))]
                visit.settled += [each for each in left if each.done is not None]
                queue.extendleft(reversed([each for each in left if each.done is None]))
            self.since_s = (self.since_s or time.time()) if self.problem else None
            self.cpu_s += time.thread_time() - began_s

    def _opened(self) -> Store | None:
        """The store; None while another process has it, and after the end."""
        if self.is_closed:
            self._say("the memory is closed: the node has ended")
            return None
        now_s = time.monotonic()
        if self._store is None and now_s - self._tried_at >= RETRY_S:
            self._tried_at = now_s
            try:
                self._store = Store(self.path, self._identity, retention=self._retention, wall_clock_ms=self._clock_ms)
            except StoreLocked as exc:
                self._say(str(exc))
            else:
                self.trouble = ""
        return self._store

    def _say(self, sentence: str) -> None:
        if self.trouble != sentence:
            _log.warning("%s; the node goes on without remembering", sentence)
        self.trouble = sentence

    def _append(self, store: Store, queue: deque[Waiting], visit: Visit) -> None:
        """Raises StoreLocked, and then all of it waits on."""
        batch = [queue[place] for place in range(min(BATCH_MAX, len(queue)))]
        events = [each.event for each in batch]
        unsaid = visit.unsaid
        is_due = bool(unsaid.counts) and (
            visit.act is Store.close or abs(self._clock_ms() - unsaid.since_ms) >= LOST_EVERY_MS
        )
        if is_due:
            body = Lost(reason="more came than is remembered", since_ms=unsaid.since_ms, counts=dict(unsaid.counts))
            events.insert(0, Event(ts_ms=self._clock_ms(), body=body))
        if not events:
            return
        try:
            ids = store.append(events) or (0,) * len(events)
        except BadEncoding:
            ids = tuple(self._append_one(store, event, visit) for event in events)
        self.trouble = ""
        visit.is_said = is_due and bool(ids[0])
        for waiting, event_id in zip(batch, ids[len(ids) - len(batch) :], strict=True):
            waiting.id = event_id
            visit.settled.append(waiting)
            queue.popleft()

    def _append_one(self, store: Store, event: Event, visit: Visit) -> int:
        """Its id, or 0: one event that is out of bounds must not cost the others. Raises StoreLocked."""
        try:
            return next(iter(store.append([event])), 0)
        except BadEncoding as exc:
            _log.error("an event of kind %s is not remembered: %s", event.kind, exc)
            visit.refused[event.kind] += 1
            return 0

    def _tell(self, store: Store) -> None:
        now_s = time.monotonic()
        is_old = self.told is None or now_s - self._told_at >= SIZES_EVERY_S
        self.told = store.statistics(None if is_old else self.told)
        if is_old:
            self._told_at = now_s
