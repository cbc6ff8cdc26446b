"""Loads driven against an engine in a plain loop: a batch, arrivals at given times, users that ask again.

Rules: one thread. An ask is added as soon as it is due and a step has ended. A request that fails ends the benchmark.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

from bench.serving_asks import Ask, Shape, Told, mixed
from model.engine import Engine
from model.requests import GenerationRequest, Output, SamplingParameters

THINK_S: Final = 0.05  # mean of a user's pause: so that requests come at any moment of a step
Follow = Callable[[int, float], Ask | None]


def request(name: str, ask: Ask) -> GenerationRequest:
    """Greedy, of exactly this length: the model has no end token."""
    return GenerationRequest(
        request_id=name, prompt=ask.prompt, sampling=SamplingParameters(temperature=0.0, max_tokens=ask.new)
    )


class Drive:
    """One load on one engine. The engine is empty before and after."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._engine, self._clock, self._sleep = engine, clock, sleep
        self._asks: list[Ask] = []
        self._due: list[tuple[float, int]] = []  # a heap of (due, number of the ask)
        self._first_s: dict[int, float] = {}
        self._decoding: set[int] = set()
        self._tokens = 0
        self._decode = (0, 0.0, 0.0)  # tokens, wall, CPU

    def run(self, asks: Sequence[Ask], follow: Follow | None = None) -> Told:
        """Until all have ended. follow: who ended, and when, to the ask that comes then. Raises the ModelError of a
        request that failed, or is not taken in."""
        for ask in asks:
            self._put(ask)
        began, began_cpu = self._clock(), time.process_time()
        while self._due or self._engine.has_work:
            self._add_due(self._clock() - began)
            if self._engine.has_work:
                for ended in self._step(began):
                    next_ask = None if follow is None else follow(ended, self._clock() - began)
                    if next_ask is not None:
                        self._put(next_ask)
            else:
                self._sleep(max(0.0, self._due[0][0] - (self._clock() - began)))
        tokens, wall_s, cpu_s = self._decode
        return Told(
            tokens=self._tokens,
            wall_s=self._clock() - began,
            cpu_s=time.process_time() - began_cpu,
            decode_tokens=tokens,
            decode_wall_s=wall_s,
            decode_cpu_s=cpu_s,
            first_s=tuple(self._first_s[number] for number in range(len(self._asks))),
        )

    def _put(self, ask: Ask) -> None:
        heapq.heappush(self._due, (ask.due_s, len(self._asks)))
        self._asks.append(ask)

    def _add_due(self, now_s: float) -> None:
        while self._due and self._due[0][0] <= now_s:
            _, number = heapq.heappop(self._due)
            self._engine.add(request(str(number), self._asks[number]))

    def _step(self, began: float) -> list[int]:
        """One step; who ended in it."""
        is_full = len(self._decoding) == len(self._asks)
        wall, cpu = self._clock(), time.process_time()
        outputs = self._engine.step()
        now, now_cpu = self._clock(), time.process_time()
        made = sum(len(output.tokens) for output in outputs)
        self._tokens += made
        if is_full:
            tokens, wall_s, cpu_s = self._decode
            self._decode = tokens + made, wall_s + now - wall, cpu_s + now_cpu - cpu
        return [number for output in outputs if (number := self._take(output, now - began)) is not None]

    def _take(self, output: Output, now_s: float) -> int | None:
        """Note a request's output; its number if it is the last."""
        if output.error is not None:
            raise output.error
        number = int(output.request_id)
        if output.tokens and number not in self._first_s:
            self._first_s[number] = now_s - self._asks[number].due_s
            self._decoding.add(number)
        if output.finish is None:
            return None
        self._decoding.discard(number)
        return number


def answer(engine: Engine, asks: Sequence[Ask]) -> Told:
    """One load, by the real clock."""
    return Drive(engine).run(asks)


def outcomes(engine: Engine, asks: Mapping[str, Ask]) -> dict[str, list[tuple[int, float]]]:
    """Name -> each token of its answer and the token's log probability. Raises the ModelError of one that failed."""
    for name, ask in asks.items():
        plain = request(name, ask)
        engine.add(replace(plain, sampling=replace(plain.sampling, logprobs=0)))
    made: dict[str, list[tuple[int, float]]] = {name: [] for name in asks}
    while engine.has_work:
        for output in engine.step():
            if output.error is not None:
                raise output.error
            logprobs = [each.logprob for each in output.logprobs]
            made[output.request_id] += zip(output.tokens, logprobs, strict=True)
    return made


def users(engine: Engine, count: int, each: int, rng: random.Random, shape: Shape) -> list[float]:
    """So many users, each of whom asks, reads to the end, pauses, and asks again, `each` times in all.

    Seconds to the first token of all requests but each user's first: those come together.
    """
    owners, asked = list(range(count)), [1] * count

    def follow(ended: int, now_s: float) -> Ask | None:
        user = owners[ended]
        if asked[user] == each:
            return None
        asked[user] += 1
        owners.append(user)
        return mixed(rng, now_s + rng.expovariate(1 / THINK_S), shape)

    first = [mixed(rng, rng.expovariate(1 / THINK_S), shape) for _ in range(count)]
    return list(Drive(engine).run(first, follow).first_s[count:])
