"""node/recorder.py: the memory's queue and thread, what is lost and said, the end. A real store; acts run inline."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node import recorder_thread
from node.errors import NotReady
from node.events import Event, Kept, Lost, Note, State
from node.recorder import FLUSH_S, QUEUE_MAX, RETAIN_FIRST_S, Recorder
from node.recorder_thread import RETRY_S
from node.retention import DAY_MS, Retention, Term
from node.self_recall import Recall
from tests.store_world import IDENTITY, T0_MS, World, note, state


async def inline(act: Callable[[], Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return act()


@asynccontextmanager
async def recording(folder: Path, **changes: Any) -> AsyncIterator[Recorder]:
    """A recorder whose acts run on the loop, and whose wall clock goes with Trio's."""
    made = {"hop": inline, "wall_clock_ms": lambda: T0_MS + round(1000 * trio.current_time()), **changes}
    recorder = Recorder(folder / "memory.db", IDENTITY, **made)
    async with trio.open_nursery() as nursery:
        await nursery.start(recorder.run)
        try:
            yield recorder
        finally:
            recorder.end()


def kept(folder: Path) -> list[Kept]:
    """All events of a closed memory, oldest first."""
    store = World(folder).open()
    try:
        assert store.verify() is None
        return store.recent(None, 1000)[::-1]
    finally:
        store.close()


def told(events: list[Kept]) -> list[object]:
    return [event.body.text if isinstance(event.body, Note) else event.kind for event in events]


async def test_what_is_noted_is_written_within_a_second_and_in_order(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with recording(tmp_path) as recorder:
        ids: list[int] = []
        for n in range(3):
            recorder.note(note(f"n{n}"), ids.append)
        assert recorder.statistics().queued == 3
        await trio.sleep(FLUSH_S + 0.1)
        assert (ids, recorder.statistics().queued) == ([1, 2, 3], 0)
        recorded = recorder.recorded
        assert recorded is not None
        assert (recorded.entries, recorded.head_id) == (3, 3)
    assert told(kept(tmp_path)) == ["n0", "n1", "n2"]


async def test_who_waits_is_written_at_once_with_what_was_before_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with recording(tmp_path) as recorder:
        await trio.sleep(10)
        began = trio.current_time()
        recorder.note(note("before"))
        assert await recorder.written(note("now")) == 2
        assert trio.current_time() - began < FLUSH_S / 2


async def test_a_question_sees_what_was_noted_before_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with recording(tmp_path) as recorder:
        recorder.note(note("hello there"))
        found = await recorder.ask(lambda store: store.search("hello", 5))
        assert [event.id for event in found] == [1]
        with pytest.raises(ValueError, match="a vector of shape"):
            await recorder.ask(lambda store: store.nearest([0.0], 1))
        assert await recorder.ask(lambda store: store.recent(None, 5))  # a bad question costs nobody else


async def test_what_the_queue_cannot_hold_is_counted_and_told(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with recording(tmp_path) as recorder:
        ids: list[int] = []
        for n in range(QUEUE_MAX + 7):
            recorder.note(state(float(n)), ids.append)
        assert ids == [0] * 7
        assert recorder.statistics().queued == QUEUE_MAX
        assert recorder.statistics().dropped == {"state": 7}
        recorder.note_lost("peer", 3)
        await trio.sleep(5)
    store = World(tmp_path).open()
    (lost,) = store.recent("lost", 5)
    assert isinstance(lost.body, Lost)
    assert lost.body.counts == {"state": 7, "peer": 3}
    assert store.statistics().entries == QUEUE_MAX + 1
    store.close()


async def test_a_flood_of_what_is_not_kept_is_one_event_a_minute(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with recording(tmp_path) as recorder:
        for n in range(130):
            recorder.note_lost("peer", 1)
            recorder.note(note(f"n{n}"))
            await trio.sleep(1)
    lost = [event.body for event in kept(tmp_path) if isinstance(event.body, Lost)]
    assert 2 <= len(lost) <= 3
    assert sum(body.counts["peer"] for body in lost) == 130


async def test_an_event_out_of_its_bounds_costs_itself_alone(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with recording(tmp_path) as recorder:
        recorder.note(note("good"))
        recorder.note(Event(ts_ms=T0_MS, body=State(figures={"BAD NAME": 1.0})))
        with pytest.raises(NotReady, match="it is not remembered"):
            await recorder.written(note("x" * 20_000))
        assert await recorder.written(note("good too")) == 2
        assert recorder.statistics().dropped == {"state": 1, "note": 1}
    assert told(kept(tmp_path)) == ["good", "good too"]


async def test_the_end_writes_the_rest_though_all_around_is_cancelled(tmp_path: Path) -> None:
    """In a real thread, which the end waits for."""
    recorder = Recorder(tmp_path / "memory.db", IDENTITY)
    threads: set[str] = set()
    async with trio.open_nursery() as nursery:
        await nursery.start(recorder.run)
        await recorder.ask(lambda _: threads.add(threading.current_thread().name))
        nursery.cancel_scope.cancel()
        recorder.note(note("last"))
        recorder.end()
    assert threads != {threading.main_thread().name}
    assert recorder.statistics().cpu_s > 0
    assert told(kept(tmp_path)) == ["last"]
    with pytest.raises(NotReady, match="the memory is closed"):
        await recorder.ask(lambda store: store.recent(None, 1))
    with pytest.raises(NotReady, match="not remembered"):
        await recorder.written(note("too late"))


async def test_a_memory_that_another_process_holds_is_said_and_taken_up_when_it_is_free(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(recorder_thread.time, "monotonic", lambda: now_s[0])
    other = World(tmp_path).open()
    async with recording(tmp_path) as recorder:
        recorder.note(note("kept for later"))
        with pytest.raises(NotReady, match="open in another process"):
            await recorder.written(note("now"))
        with pytest.raises(NotReady, match="the memory is not open"):
            await recorder.ask(lambda store: store.recent(None, 1))
        assert recorder.file_status().reason == "locked"
        assert "is open in another process" in recorder.problem
        assert recorder.statistics().queued == 1
        other.close()
        now_s[0] += RETRY_S
        await trio.sleep(2 * RETRY_S)
        assert recorder.problem == ""
        assert recorder.file_status().since_s is None
    assert told(kept(tmp_path)) == ["kept for later"]


async def fill(recorder: Recorder) -> None:
    for _ in range(200):
        await recorder.written(note("y" * 12_000))


async def test_a_disk_that_fails_is_said_and_nobody_waits_for_it(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with recording(tmp_path, retention=Retention(bytes_max=1 << 20)) as recorder:
        with pytest.raises(NotReady, match="cannot be written: database or disk is full"):
            await fill(recorder)
        status = recorder.file_status()
        assert status.reason == "not_written"
        assert status.failures["not_written"] > 0
        assert status.since_s is not None
        assert "the node goes on without remembering" in status.problem
        assert await recorder.ask(lambda store: store.recent(None, 1))


async def test_retention_goes_on_by_itself(tmp_path: Path, autojump_clock: MockClock) -> None:
    terms = {**Retention().terms, "state": Term(age_ms=DAY_MS, rows_max=10)}
    async with recording(tmp_path, retention=Retention(terms=terms)) as recorder:
        for n in range(50):
            recorder.note(state(float(n)))
        await trio.sleep(RETAIN_FIRST_S + 20)
        assert len(await recorder.ask(lambda store: store.recent("state", 100))) == 10
    assert [event.kind for event in kept(tmp_path)].count("hour") == 1


async def test_work_goes_between_the_steps_of_a_verification_which_ends_all_the_same(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with recording(tmp_path) as recorder, trio.open_nursery() as nursery:
        for n in range(2000):
            recorder.note(state(float(n)))
        written: list[int] = []

        async def write_on() -> None:
            while True:
                written.append(await recorder.written(note("between")))

        nursery.start_soon(write_on)
        told = await Recall(recorder, lambda: None).verify()
        assert told["is_whole"]
        assert told["fault"] is None
        assert len(written) >= 2
        nursery.cancel_scope.cancel()
