"""What the process tells of itself, and the lag of its loop."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from node.process import LOOK_EVERY_S, SLEPT_S, Process


@pytest.fixture
async def process() -> AsyncIterator[Process]:
    process = Process()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(process.watch)
        await trio.testing.wait_all_tasks_blocked()
        yield process
        nursery.cancel_scope.cancel()


async def test_a_loop_that_comes_in_time_has_no_lag(process: Process, mock_clock: MockClock) -> None:
    for _ in range(10):
        mock_clock.jump(LOOK_EVERY_S)
        await trio.testing.wait_all_tasks_blocked()
    told = process.lag_s.read()
    assert (told.count, told.sum) == (10, 0.0)


async def test_each_look_that_a_standing_loop_missed_counts(process: Process, mock_clock: MockClock) -> None:
    mock_clock.jump(5 * LOOK_EVERY_S)  # the loop stood still for five looks: the first comes four late, the last none
    await trio.testing.wait_all_tasks_blocked()
    told = process.lag_s.read()
    assert told.count == 5
    assert told.sum == pytest.approx((4 + 3 + 2 + 1) * LOOK_EVERY_S)


async def test_sleep_of_the_machine_is_no_lag(process: Process, mock_clock: MockClock) -> None:
    mock_clock.jump(SLEPT_S * 100)
    await trio.testing.wait_all_tasks_blocked()
    assert process.lag_s.read().count <= SLEPT_S / LOOK_EVERY_S
    mock_clock.jump(LOOK_EVERY_S)
    await trio.testing.wait_all_tasks_blocked()
    assert process.lag_s.read().sum == pytest.approx(0.0)


async def test_the_figures_are_the_machines(process: Process) -> None:
    told = process.told()
    assert told["rss_bytes"] > 1 << 20
    assert told["cpu_s"] > 0
    assert told["open_files"] > 2
    assert told["threads"] >= 1
    assert told["started_s"] > 1_600_000_000
