"""Seeded histories of crashes, freezes, partitions and cancels over five nodes: every request ends, once, and right.

A seed replays its history; what must hold is checked of every request and, when all is quiet again, of every node.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import MockClock

from model.errors import ComputeFailed
from node.front import Route, RouteHint
from node.work import Started
from tests.fake_runtime import FakeRuntime
from tests.node_swarm import AUTO, Got, Node, Swarm, ask, expected, work

pytestmark = pytest.mark.slow
SEEDS, SOAK_SEEDS = 15, 50  # 3 s each; `pytest -m soak` runs the rest
HISTORY_S = 40.0
DEADLINE_S = 20.0
QUIET_S = 30.0


@dataclass
class Request:
    """One request of a history: what was asked of whom, and what came of it."""

    node: Node
    prompt: str
    tokens: int
    got: Got = field(default_factory=Got)
    left: bool = False
    began: float = 0.0
    ended: float | None = None


class History:
    """What happens to a swarm under one seed."""

    def __init__(self, swarm: Swarm, seed: int) -> None:
        self.swarm, self.rng = swarm, random.Random(seed)
        self.requests: list[Request] = []
        self.crashes = 0

    def alive(self) -> list[Node]:
        return [node for node in self.swarm.nodes if not node.scope.cancel_called]

    async def run(self, nursery: trio.Nursery) -> None:
        acts = [self.ask, self.ask, self.ask, self.ask, self.crash, self.freeze, self.cut, self.heal, self.fail]
        end = trio.current_time() + HISTORY_S
        while trio.current_time() < end:
            await self.rng.choice(acts)(nursery)
            await trio.sleep(self.rng.expovariate(1.0))
        for node in self.alive():
            self.swarm.wire.thaw(node.id)
        self.swarm.wire.heal()

    async def ask(self, nursery: trio.Nursery) -> None:
        node = self.rng.choice(self.alive())
        request = Request(node, f"prompt {len(self.requests)}", self.rng.randint(1, 60), began=trio.current_time())
        self.requests.append(request)
        stays_s = self.rng.choice([float("inf"), float("inf"), self.rng.uniform(0.0, 5.0)])
        route = self.rng.choice([AUTO, AUTO, AUTO, RouteHint(route=Route.REMOTE), RouteHint(route=Route.LOCAL)])
        nursery.start_soon(self._client, request, route, stays_s)

    async def _client(self, request: Request, route: RouteHint, stays_s: float) -> None:
        asked = work(request.prompt, request.tokens, remaining_ms=int(DEADLINE_S * 1000))
        with trio.move_on_after(stays_s) as stays:
            await ask(request.node, asked, route, got=request.got)
            request.ended = trio.current_time()
        request.left = stays.cancelled_caught

    async def crash(self, _nursery: trio.Nursery) -> None:
        """One of the three that serve; a door's own clients would die with it."""
        serving = [node for node in self.alive() if node.runtime is not None]
        busy = [node for node in serving if not node.inference.running]
        if len(serving) > 1 and busy and self.rng.random() < 0.5:
            self.crashes += 1
            await self.swarm.crash(self.rng.choice(busy))

    async def freeze(self, _nursery: trio.Nursery) -> None:
        node = self.rng.choice(self.alive())
        self.swarm.wire.freeze(node.id)

    async def cut(self, _nursery: trio.Nursery) -> None:
        one, other = self.rng.sample(self.alive(), 2)
        self.swarm.wire.partition(one.id, other.id, both_ways=self.rng.random() < 0.7)

    async def heal(self, _nursery: trio.Nursery) -> None:
        self.swarm.wire.heal()
        for node in self.alive():
            self.swarm.wire.thaw(node.id)

    async def fail(self, _nursery: trio.Nursery) -> None:
        node = self.rng.choice(self.alive())
        if node.runtime is not None and node.runtime.has_work:
            node.runtime.fails = ComputeFailed("drawn")


@pytest.mark.parametrize(
    "seed",
    [*range(SEEDS), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(SEEDS, SOAK_SEEDS))],
)
async def test_every_request_ends_once_and_right(seed: int, autojump_clock: MockClock) -> None:
    async with Swarm(seed).running() as swarm:
        for _ in range(2):
            await swarm.start()
        for _ in range(3):
            await swarm.start(FakeRuntime(prefill_chunk=5))
        await swarm.settled()
        history = History(swarm, seed)
        async with trio.open_nursery() as nursery:
            await history.run(nursery)
        await trio.sleep(QUIET_S)
        for request in history.requests:
            check(request)
        for node in history.alive():
            check_quiet(node)


def check(request: Request) -> None:
    """It ended in one way, in time, and what came is the start of the one right answer."""
    got, whole = request.got, expected(request.prompt, request.tokens)
    assert [request.left, got.error is not None, got.finished is not None].count(True) == 1, request
    assert whole.startswith(got.text)
    assert len(got.tokens) <= request.tokens
    assert sum(isinstance(item, Started) for item in got.items) <= 1
    if got.finished is not None:
        assert got.is_right(request.prompt, request.tokens)
    if request.ended is not None:
        assert request.ended - request.began <= DEADLINE_S + 0.01


def check_quiet(node: Node) -> None:
    """Nothing is left of any request, and the counters agree."""
    counts, figures = node.inference.counts, node.inference.statistics()
    assert node.inference.running == 0
    errors = sum(n for name, n in counts.items() if name.startswith("error:"))
    assert counts["requests"] == counts["finished"] + counts["cancelled"] + errors == figures.requests
    rows = node.state.measured().models
    assert sum(sum(row.finished.values()) + row.embedded for row in rows) == counts["finished"]
    assert sum(row.cancelled for row in rows) == counts["cancelled"]
    assert sum(sum(row.errors.values()) for row in rows) == errors
    assert sum(row.request_s.count + row.embed_s.count for row in rows) == counts["finished"]
    assert sum(row.generation_tokens for row in rows) >= counts["completion_tokens"]
    assert node.infer.statistics().calls_in_open == 0
    if node.runtime is not None:
        assert node.runtime.holds == 0
        assert node.hosting.requests_running == 0
