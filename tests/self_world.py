"""A node over loopback that keeps its self-state, and what a test asks of it."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from crypto.identity import Identity
from model.requests import Output
from node.config import NodeConfig
from node.consciousness_fields import member
from node.facts import Fact
from node.front import RouteHint
from node.run import Node
from node.self_state import SelfState
from p2p.loopback import LoopbackNetwork
from tests.fake_outside import FakeOutside
from tests.fake_runtime import FakeRuntime
from tests.node_swarm import work

PATIENCE_S = 30  # hang guard


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not true():  # noqa: ASYNC110  # of things that know no trio
            await trio.sleep(0.01)


class SlowRuntime(FakeRuntime):
    """Its steps take time of the worker thread."""

    def step(self) -> list[Output]:
        time.sleep(0.01)
        return super().step()


@dataclass
class FakeLearner:
    """Implements node.self_wiring.Learner."""

    doing: str = "idle"
    rounds: list[Fact] = field(default_factory=list)

    def merged(self, *, is_last: bool = False) -> list[Fact]:
        given, self.rounds = self.rounds, []
        return given


@dataclass
class Here:
    """A running node, and its self-state."""

    node: Node
    runtime: FakeRuntime
    network: LoopbackNetwork
    learner: FakeLearner = field(default_factory=FakeLearner)

    @property
    def itself(self) -> SelfState:
        assert isinstance(self.node.state.itself, SelfState)
        return self.node.state.itself

    def now(self, path: str) -> Any:
        return member(self.itself.state, path)

    async def sampled(self) -> None:
        """A sample that began after this."""
        before = self.now("identity.uptime_s")
        assert self.node._keeping is not None
        self.node._keeping._sampler.sample_now()
        await until(lambda: self.now("identity.uptime_s") not in (None, before))

    async def ask(self, text: str = "hello", *, account: str = "own", **changes: Any) -> str:
        """One request of a client to its end; its text."""
        said = []
        async with self.node.state.answer(work(text, 5, **changes), RouteHint(account=account)) as items:
            async for item in items:
                said.append(getattr(item, "text", ""))
        return "".join(said)

    async def written(self) -> list[Any]:
        """All that the memory has, oldest first."""
        assert self.node._keeping is not None
        events: list[Any] = await self.node._keeping._recorder.ask(lambda store: store.recent(None, 1000))
        return events[::-1]


@asynccontextmanager
async def living(
    folder: Path,
    *,
    identity: Identity | None = None,
    network: LoopbackNetwork | None = None,
    runtime: FakeRuntime | None = None,
    **changes: Any,
) -> AsyncIterator[Here]:
    """A node until the block ends; then it is cancelled, and its memory closed."""
    network, runtime = network or LoopbackNetwork(random.Random(1)), runtime or SlowRuntime()
    config = NodeConfig(**{"data_dir": folder, "http": "off", "mdns": False, "ready_file": folder / "ready", **changes})
    identity = identity or Identity.load_or_make(folder / "identity.key")
    async with network.join(identity) as transport, trio.open_nursery() as nursery:
        node = Node(config, identity, transport, (), lambda _config: runtime, outside=FakeOutside())
        here = Here(node, runtime, network)
        nursery.start_soon(node.run)
        await until((folder / "ready").exists)
        if node._keeping is not None:
            node._keeping.training = here.learner
            await until(lambda: here.now("identity.phase") == "running")
        yield here
        nursery.cancel_scope.cancel()
