"""The life of /api/v1/events: one snapshot for all, what changed for each, and an end that is said."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.recent import SAMPLE_S, Totals
from node.web.app import build_app
from node.web.live import EVERY_S, KEEP_ALIVE_S, PEERS_TOLD_MAX, SLOW_S, WATCHERS_EACH_MAX, WATCHERS_MAX, Live
from tests.fake_front import FakeFront
from tests.fake_self import FakeSelf
from tests.test_web_stream import Call

ROUND = {
    "round": 3,
    "held_out_loss": 3.25,
    "seconds": 14.512345,
    "contributed": ["a", "b"],
    "missing": ["c"],
    "not_counted": {},
    "rule": "adaptive",
}


class Counted(FakeFront):
    """Counts how often it was asked; `status_more` changes what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = self.peers_asked = 0
        self.status_more: dict[str, Any] = {}
        self.peer_count = 1

    def status(self) -> dict[str, Any]:
        self.asked += 1
        return {**super().status(), **self.status_more}

    def peers(self) -> list[dict[str, Any]]:
        self.peers_asked += 1
        [row] = super().peers()
        return [{**row, "peer_id": f"peer{n:04}", "rtt_ms": n, "connected": n % 2 == 0} for n in range(self.peer_count)]


def watch() -> Call:
    call = Call("/api/v1/events", {})
    call.scope["method"] = "GET"
    return call


@asynccontextmanager
async def watching(front: FakeFront, *calls: Call) -> AsyncIterator[trio.Event]:
    """Pages that watch, in the background; yields what ends them."""
    stop = trio.Event()
    app = build_app(front, Random(7), stop=stop)

    async def run(call: Call) -> None:
        await app(call.scope, call.receive, call.send)  # type: ignore[arg-type]
        call.done = True

    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            for call in calls:
                nursery.start_soon(run, call)
            yield stop
            stop.set()


def events(call: Call) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in call.text().splitlines() if line.startswith("data: ")]


async def test_the_first_event_has_all_the_next_ones_what_changed(autojump_clock: MockClock) -> None:
    front, call = Counted(), watch()
    front.recent.sample(0.0, Totals())
    front.recent.sample(SAMPLE_S, Totals(tokens_out=8))
    async with watching(front, call):
        await trio.sleep(EVERY_S * 2.5)
        front.status_more = {"inference": {"requests": 7}}
        front.recent.sample(2 * SAMPLE_S, Totals(tokens_out=9))
        await trio.sleep(EVERY_S * 2)
    first, second, third, end = events(call)
    assert call.headers()["content-type"].startswith("text/event-stream")
    assert first["self"] is False
    assert {"node", "health", "load", "model", "peers", "models", "training", "rounds", "uptime_s"} <= set(first)
    assert [sample["tokens_out_s"] for sample in first["history"]] == [4.0]
    assert (set(second), set(third)) == ({"sample"}, {"load"})
    assert (second["sample"]["number"], third["load"]["requests"]) == (2, 7)
    assert end == {"why": "the node is stopping"}
    assert call.done


async def test_many_pages_cost_one_snapshot_a_second_and_none_costs_nothing(autojump_clock: MockClock) -> None:
    front, calls = Counted(), [watch() for _ in range(8)]
    async with watching(front, *calls):
        await trio.sleep(EVERY_S * 3.5)
        assert (front.peers_asked, front.asked) == (4, 2)  # the status, which is dear, every other second
        for call in calls:
            call.leave()
        await trio.sleep(EVERY_S * 5)
        assert (front.peers_asked, front.asked) == (4, 2)
        assert all(call.done for call in calls)


async def test_while_nothing_changes_a_comment_keeps_the_line(autojump_clock: MockClock) -> None:
    call = watch()
    async with watching(Counted(), call):
        await trio.sleep(KEEP_ALIVE_S * 2.5)
        assert call.text().count(": keep-alive\n\n") == 2
        assert len(events(call)) == 1


async def test_who_missed_samples_gets_them_all(autojump_clock: MockClock) -> None:
    front = Counted()
    live = Live(front, frozenset({"/api/v1/self"}))
    live.look(0.0)
    _, seen = live.event(0)
    front.status_more = {"inference": {"requests": 1}}
    live.look(1.0)
    front.status_more = {"inference": {"requests": 2}}
    front.recent.sample(0.0, Totals())
    front.recent.sample(2.0, Totals())
    live.look(2.0)
    event, now_seen = live.event(seen)
    told = json.loads(event.split(b"data: ")[1])
    assert now_seen == 3
    assert told["load"]["requests"] == 2
    assert len(told["history"]) == 1
    assert "node" not in told
    assert live.event(now_seen) == (b"", now_seen)


async def test_more_pages_than_the_bound_are_refused_in_words(autojump_clock: MockClock) -> None:
    calls = [watch() for _ in range(WATCHERS_MAX + 1)]
    async with watching(Counted(), *calls):
        await trio.sleep(0.5)
        refused = [call for call in calls if call.done]
        assert [call.sent[0][1]["status"] for call in refused] == [503]
        assert "WATCHERS_MAX" in refused[0].text()
        assert refused[0].headers()["retry-after"] == "10"


async def test_one_client_of_elsewhere_leaves_places_for_others(autojump_clock: MockClock) -> None:
    calls, other, here = [watch() for _ in range(WATCHERS_EACH_MAX + 1)], watch(), watch()
    for call in calls:
        call.scope["client"] = ("203.0.113.9", 4711)
    other.scope["client"] = ("198.51.100.7", 4711)
    async with watching(Counted(), *calls, other, here):
        await trio.sleep(0.5)
        refused = [call for call in calls if call.done]
        assert [call.sent[0][1]["status"] for call in refused] == [503]
        assert not other.done
        assert not here.done


async def test_a_place_is_given_back(autojump_clock: MockClock) -> None:
    front, first, second = Counted(), [watch() for _ in range(WATCHERS_EACH_MAX)], watch()
    for call in (*first, second):
        call.scope["client"] = ("203.0.113.9", 4711)
    async with watching(front, *first):
        await trio.sleep(0.5)
    app = build_app(front, Random(7))
    async with trio.open_nursery() as nursery:
        for call in first:
            fresh = watch()
            fresh.scope["client"] = call.scope["client"]
            nursery.start_soon(app, fresh.scope, fresh.receive, fresh.send)
            await trio.sleep(0.1)
            fresh.leave()
            await trio.sleep(EVERY_S * 2)
        nursery.start_soon(app, second.scope, second.receive, second.send)
        await trio.sleep(0.5)
        assert second.sent[0][1]["status"] == 200
        nursery.cancel_scope.cancel()


async def test_who_asks_for_the_head_alone_gets_it_and_takes_no_place(autojump_clock: MockClock) -> None:
    call = watch()
    call.scope["method"] = "HEAD"
    async with watching(Counted(), call):
        await trio.sleep(0.5)
        assert call.done
    assert call.headers()["content-type"].startswith("text/event-stream")


async def test_with_many_peers_the_list_is_cut_and_made_less_often(autojump_clock: MockClock) -> None:
    front, call = Counted(), watch()
    front.peer_count = 300
    async with watching(front, call):
        await trio.sleep(SLOW_S * 2 - 0.5)
    assert front.peers_asked == 2
    peers = events(call)[0]["peers"]
    assert (peers["count"], len(peers["rows"])) == (300, PEERS_TOLD_MAX)
    assert [row["rtt_ms"] for row in peers["rows"][:3]] == [0, 2, 4]  # connected ones first, by their round trip


async def test_rounds_of_training_are_told_short(autojump_clock: MockClock) -> None:
    front, call = Counted(), watch()
    front.trains.tells = {**front.trains.tells, "run": {"name": "tales"}, "rounds": [ROUND]}
    async with watching(front, call):
        await trio.sleep(0.5)
    [round_told] = events(call)[0]["rounds"]
    assert (round_told["loss"], round_told["contributed"], round_told["missing"]) == (3.25, 2, ["c"])
    assert "rounds" not in events(call)[0]["training"]


@pytest.mark.parametrize("leave", [Call.leave, lambda call: None], ids=["client", "node"])
async def test_a_stream_leaves_nothing_behind(autojump_clock: MockClock, leave: Callable[[Call], None]) -> None:
    call = watch()
    before = trio.lowlevel.current_statistics().tasks_living
    async with watching(Counted(), call):
        await trio.sleep(1.5)
        leave(call)
        await trio.sleep(0.1)
    assert call.done
    assert trio.lowlevel.current_statistics().tasks_living == before


async def test_the_panel_of_the_nodes_own_state_is_there_exactly_when_it_keeps_a_memory(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    front, with_memory = FakeFront(), FakeFront()
    with_memory.itself = itself = FakeSelf(tmp_path)
    for each, expected in ((front, False), (with_memory, True)):
        call = watch()
        async with watching(each, call):
            await trio.sleep(2 * EVERY_S)
        assert events(call)[0]["self"] is expected
    itself.close()
