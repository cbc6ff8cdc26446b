"""How late a Trio loop's own ticker is while the engine decodes in a worker thread for users of the same loop.

Rules: the node's own loop (node/hosting.py), one step of the engine a hop, and one task for each user that takes the
items of its answers and asks again. The same ticker without users, in the same minute, is what stands beside.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final

import trio

from bench.serving_asks import Shape, mixed
from bench.serving_model import Served
from model.config import ModelFacts
from model.engine import Engine
from model.requests import Embeddings, EngineStatistics, GenerationRequest, Output, Progress
from node.errors import RequestError
from node.hosting import Hosting
from node.work import GenerateWork, Sampling

TICK_S: Final = 0.005
SETTLE_S: Final = 0.5  # until all users have their first token


class EngineRuntime:
    """An engine in the shape that a node hosts (model/runtime_face.py): no texts, no vectors, no new weights."""

    def __init__(self, engine: Engine, facts: ModelFacts) -> None:
        self._engine, self.facts, self.embedding_facts, self.device = engine, facts, facts, "cpu"

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self._engine.has_work

    def all_facts(self) -> tuple[ModelFacts, ...]:
        """The one model."""
        return (self.facts,)

    def add(self, request: GenerationRequest) -> None:
        """As Engine.add."""
        self._engine.add(request)

    def step(self) -> list[Output]:
        """As Engine.step."""
        return self._engine.step()

    def cancel(self, request_id: str) -> None:
        """As Engine.cancel."""
        self._engine.cancel(request_id)

    def progress(self, request_id: str) -> Progress:
        """As Engine.progress."""
        return self._engine.progress(request_id)

    def statistics(self) -> EngineStatistics:
        """As Engine.statistics."""
        return self._engine.statistics()

    def render(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Nobody asks in words."""
        raise NotImplementedError

    def encode(self, text: str) -> tuple[int, ...]:
        """Nobody asks in words."""
        raise NotImplementedError

    def embed(self, texts: Sequence[str | Sequence[int]]) -> Embeddings:
        """Nobody asks for vectors."""
        raise NotImplementedError

    def device_free_bytes(self) -> int:
        """Nobody trains."""
        raise NotImplementedError

    def adopt(self, weights: object, revision: str) -> None:
        """Nobody trains."""
        raise NotImplementedError


def lags_s(served: Served, shape: Shape, users: int, seconds: float, seed: int) -> list[float]:
    """How late each tick of so many seconds was, while so many users ask."""
    runtime = EngineRuntime(served.engine(slots=max(1, users)), served.loaded.facts)
    found: list[float] = []

    async def main() -> None:
        hosting = Hosting(runtime, peer="bench", on_change=lambda: None)
        async with trio.open_nursery() as nursery:
            await nursery.start(hosting.run)
            for user in range(users):
                nursery.start_soon(ask_on, hosting, random.Random(seed * 1_000 + user), shape)
            await trio.sleep(SETTLE_S)
            await tick(seconds, found)
            nursery.cancel_scope.cancel()

    trio.run(main)
    return found


async def tick(seconds: float, found: list[float]) -> None:
    """Sleep in short pieces; note by how much each was longer than asked for."""
    until = trio.current_time() + seconds
    while (now := trio.current_time()) < until:
        await trio.sleep(TICK_S)
        found.append(trio.current_time() - now - TICK_S)


async def ask_on(hosting: Hosting, rng: random.Random, shape: Shape) -> None:
    """One user: asks, takes the answer to its end, asks again. Raises RequestError."""
    while True:
        ask = mixed(rng, 0.0, shape)
        work = GenerateWork(
            request_id="bench", tokens=ask.prompt, sampling=Sampling(max_tokens=ask.new, temperature=0.0)
        )
        async with hosting.generate(work) as items:
            async for item in items:
                if isinstance(item, RequestError):
                    raise item
