"""The memory's one writer: a bounded queue of events, and the thread in which the store reads and writes.

Rules: shell. `note` never waits: what the queue cannot hold is counted by kind and told in a `lost` event. Whatever
is done in the thread first appends what waits, so that a reader sees what was noted before it asked. One act a hop,
one hop at a time; the queue grows on the loop and shrinks in the thread. Nothing here ends the node. The task outlives
the cancellation of its surroundings until `end`, then appends the rest and closes the file. Nothing else in this
process may open that file while it is open (POSIX locks).
Source: SELF.md, "Memory"; docs/ARCHITECTURE.md, "Memory".
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import trio

from crypto.disk import FileStatus
from crypto.identity import Identity
from node.consciousness import Recorded
from node.errors import NO_ROOM_RETRY_S, NotReady
from node.events import Event
from node.recorder_thread import RETRY_S, RecorderThread, Unsaid, Visit, Waiting
from node.retention import Retention
from node.store import Store, StoreStatistics

QUEUE_MAX: Final = 5_000  # events that wait for the thread: some 10 MB of snapshots
FLUSH_S: Final = 1.0  # so long an event waits for others: a kill costs a second
RETAIN_EVERY_S: Final = 3_600.0
RETAIN_FIRST_S: Final = 60.0  # after the start, which has enough to do
RETAIN_REST_S: Final = 1.0  # between two steps of retention, each a few tenths of a second of the thread
CLOSE_S_MAX: Final = 20.0  # to append the rest and let go of the file, where the disk is slow

T = TypeVar("T")
Hop = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs an act where it may block; not to be cancelled halfway


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderStatistics:
    """queued: events that wait for the thread; dropped: kind -> events that were never written, since start; cpu_s: of
    the thread; store: as after the last act of the thread."""

    queued: int
    dropped: dict[str, int]
    cpu_s: float
    store: StoreStatistics


class Recorder:
    """See the module. `run` it once; `end` it when nothing more is noted."""

    def __init__(
        self,
        path: Path,
        identity: Identity,
        *,
        retention: Retention | None = None,
        hop: Hop | None = None,
        wall_clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        """hop: where the store works; None: in a worker thread of its own."""
        self.clock_ms = wall_clock_ms
        self._thread = RecorderThread(path, identity, retention, wall_clock_ms)
        self._hop: Hop = hop or partial(trio.to_thread.run_sync, limiter=trio.CapacityLimiter(1))
        self._queue: deque[Waiting] = deque()
        self._wake, self._urgent = trio.Event(), trio.Event()
        self._scope = trio.CancelScope(shield=True)
        self._unsaid = Unsaid()
        self._dropped: Counter[str] = Counter()

    # --- for whoever has something to remember ---

    def note(self, event: Event, on_id: Callable[[int], None] | None = None) -> None:
        """Remember it soon. on_id: called on the loop with its id, 0 when it could not be written."""
        self._enqueue(Waiting(event, on_id))

    def hurry(self) -> None:
        """Do not wait for more: what was noted is written at once."""
        self._urgent.set()

    def note_lost(self, kind: str, count: int) -> None:
        """So many events of a kind were not even noted, by a bound of whoever saw them: the chain says so by and by."""
        self._lose(kind, count)

    async def written(self, event: Event) -> int:
        """Remember it now; its id. Raises NotReady: it could not be written. If cancelled, it may be written."""
        waiting = Waiting(event, done=trio.Event())
        assert waiting.done is not None
        self._enqueue(waiting)
        self._urgent.set()
        await waiting.done.wait()
        if not waiting.id:
            raise NotReady(
                f"it is not remembered: {self.problem or 'too much waits to be written'}", retry_after_s=NO_ROOM_RETRY_S
            )
        return waiting.id

    async def ask(self, act: Callable[[Store], T]) -> T:
        """Do something with the store in its thread, for tens of milliseconds. Raises what it raises, and NotReady.

        If cancelled, it was not done, or it was and its result is lost.
        """
        result: list[T] = []
        await self._do(lambda store: result.append(act(store)))
        if not result:
            raise NotReady(f"the memory is not open: {self.problem}", retry_after_s=NO_ROOM_RETRY_S)
        return result[0]

    @property
    def recorded(self) -> Recorded | None:
        """The memory in numbers, after the last act of the thread; None before the first."""
        told = self._thread.told
        if told is None:
            return None
        return Recorded(
            entries=told.entries,
            last_write_ms=told.last_write_ms,
            head_id=told.head_id,
            head_hash=told.head_hash,
        )

    @property
    def problem(self) -> str:
        """One sentence while nothing can be written; '' otherwise."""
        return self._thread.problem

    def statistics(self) -> RecorderStatistics:
        """A snapshot; the store's is of the last act of the thread."""
        return RecorderStatistics(
            queued=len(self._queue),
            dropped=dict(self._dropped),
            cpu_s=self._thread.cpu_s,
            store=self._thread.told or self._thread.untold,
        )

    def file_status(self) -> FileStatus:
        """How the file fares, as the node's other files are told."""
        told = self._thread.told
        lost = sum(self._dropped.values()) + (0 if told is None else sum(told.lost.values()))
        return FileStatus(
            what="memory",
            path=str(self._thread.path),
            writes=0 if told is None else told.head_id,
            saved_s=None if told is None or told.last_write_ms is None else told.last_write_ms / 1000,
            failures={"not_written": lost} if lost else {},
            reason=self._thread.reason,
            problem=self.problem,
            since_s=self._thread.since_s,
            set_aside="" if told is None else told.set_aside,
        )

    # --- the task ---

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is noted until `end`; then append the rest and close. Cancelled from around, it goes on."""
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._retain_hourly)
                task_status.started()
                while True:
                    await self._wake.wait()
                    self._wake = trio.Event()
                    with trio.move_on_after(FLUSH_S):
                        await self._urgent.wait()
                    self._urgent = trio.Event()
                    await self._flush()
                    if self._thread.trouble:  # what waits waits on: the file's owner may go
                        with trio.move_on_after(RETRY_S):
                            await self._urgent.wait()
                        self._wake.set()
        with trio.move_on_after(CLOSE_S_MAX, shield=True):
            await self._flush()
            await self._do(Store.close)
        self._thread.is_closed = True
        for waiting in self._queue:
            self._lose(waiting.event.kind, 1)
            waiting.settle()
        self._queue.clear()

    def end(self) -> None:
        """Nothing more will be noted: `run` ends."""
        self._scope.cancel()

    async def _flush(self) -> None:
        """All that waits, unless the file cannot be opened."""
        await self._do(_nothing)
        while self._queue and not self._thread.trouble:
            await self._do(_nothing)

    async def _retain_hourly(self) -> None:
        """Let go of what is over, in steps: other work goes between."""
        await trio.sleep(RETAIN_FIRST_S)
        while True:
            removed = await self._retained()
            await trio.sleep(RETAIN_REST_S if removed else RETAIN_EVERY_S)

    async def _retained(self) -> int:
        count = [0]

        def step(store: Store) -> None:
            count[0] = store.retain(self.clock_ms())

        await self._do(step)
        return count[0]

    # --- the queue ---

    def _enqueue(self, waiting: Waiting) -> None:
        if len(self._queue) >= QUEUE_MAX or self._thread.is_closed:
            self._lose(waiting.event.kind, 1)
            waiting.settle()
            return
        self._queue.append(waiting)
        self._wake.set()

    def _lose(self, kind: str, count: int) -> None:
        if not self._unsaid.counts:
            self._unsaid.since_ms = self.clock_ms()
        self._unsaid.counts[kind] += count
        self._dropped[kind] += count

    async def _do(self, act: Callable[[Store], object]) -> None:
        """Append what waits, then this. Raises what it raises. Nothing is done while the file cannot be opened."""
        visit = Visit(act=act, unsaid=self._unsaid)
        self._unsaid = Unsaid()
        try:
            await self._hop(partial(self._thread.work, visit, self._queue))
        finally:
            if not visit.is_said and visit.unsaid.counts:
                self._unsaid.counts += visit.unsaid.counts
                self._unsaid.since_ms = visit.unsaid.since_ms
            self._dropped += visit.refused
            for waiting in visit.settled:
                waiting.settle()


def _nothing(_: Store) -> None:
    """What waits is appended, and that is all."""
