"""How late a Trio loop's own ticker is while the engine decodes in a worker thread for users of the same loop.

Rules: the node's own loop (node/hosting.py), one step of the engine a hop, and one task for each user that takes the
items of its answers and asks again. The same ticker without users, in the same minute, is what stands beside.
"""

from __future__ import annotations

import random
from typing import Final

import trio

from bench.serving_asks import Shape, mixed
from bench.serving_model import KV_TOKENS, Served
from model.config import RuntimeConfig
from model.runtime import Runtime
from node.errors import RequestError
from node.hosting import Hosting
from node.work import GenerateWork, Sampling

TICK_S: Final = 0.005
SETTLE_S: Final = 0.5  # until all users have their first token


def lags_s(served: Served, shape: Shape, users: int, seconds: float, seed: int) -> list[float]:
    """How late each tick of so many seconds was, while so many users ask."""
    runtime = Runtime(served.loaded, None, RuntimeConfig(slots=max(1, users), kv_tokens=KV_TOKENS))
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
