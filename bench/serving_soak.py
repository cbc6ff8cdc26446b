"""`python -m bench.serving --soak SECONDS`: one engine under mixed load, cancels and overload; what it keeps of it.

Rules: requests of random lengths, of several requesters and classes, some with the same beginning, greedy and sampled,
with stop strings, logprobs, delivered tokens; some are wrong on purpose. Mostly a few more are asked than run;
every BURST_EVERY steps so many that the engine refuses them. CANCEL of those that are there is cancelled at a step,
wherever it stands. Every request that was taken in has to end in exactly one way. At the end half of what is there is
cancelled, the rest runs out, and nothing may be left. Memory: as bench.soak judges it, from runs of JUDGED_S on.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import psutil

from bench.harness import Row
from bench.serving_asks import Shape, ids
from bench.serving_model import SLOTS, Served
from bench.soak import FLAT, MIB, theil_sen
from model.engine import Engine
from model.errors import BadInput, EngineFull
from model.requests import GenerationRequest, Output, SamplingParameters
from model.step import Priority

KV_TOKENS: Final = 4_096  # less than 16 of the longest need, so that memory runs short too
QUEUE_MAX: Final = 32
BURST_EVERY: Final = 100  # steps
CANCEL: Final = 0.004  # of the requests that are there, at each step
LONG, PROMPT_MAX, PROMPT_LONG_MAX, NEW_MAX = 0.05, 128, 1_024, 96
SHARED, SHARED_PREFIXES, PREFIX_TOKENS = 0.3, 4, 192
WRONG: Final = 0.05
REQUESTERS: Final = ("", "a", "b", "c")
PRIVATE: Final = 0.1
SAMPLES: Final = 60  # of memory in a run, one a minute at most
SETTLED: Final = 0.25  # of a run: until then caches fill
JUDGED_S: Final = 1_200.0


@dataclass(slots=True)
class Traffic:
    """Requests, one like no other."""

    rng: random.Random
    shape: Shape
    made: int = 0
    prefixes: list[tuple[int, ...]] = field(default_factory=list)

    def request(self) -> GenerationRequest:
        """The next one."""
        self.made += 1
        rng = self.rng
        if len(self.prefixes) < SHARED_PREFIXES:
            self.prefixes.append(ids(rng, PREFIX_TOKENS, self.shape))
        longest = PROMPT_LONG_MAX if rng.random() < LONG else PROMPT_MAX
        prompt = ids(rng, rng.randint(1, longest), self.shape)
        if rng.random() < SHARED:
            prompt = rng.choice(self.prefixes) + prompt
        new = rng.randint(1, NEW_MAX)
        delivered = ids(rng, rng.randint(1, new), self.shape) if rng.random() < SHARED else ()
        sampling = SamplingParameters(
            max_tokens=new,
            temperature=rng.choice((0.0, 0.8)),
            top_p=rng.choice((1.0, 0.9)),
            seed=rng.randrange(1 << 30),
            stop=rng.choice(((), ("w77", "w8 w9"))),
            logprobs=rng.choice((None, None, 2)),
        )
        if rng.random() < WRONG:
            prompt = rng.choice(((), (self.shape.vocabulary,), prompt * (1 + self.shape.context // len(prompt))))
        return GenerationRequest(
            request_id=str(self.made),
            prompt=prompt,
            delivered=delivered,
            sampling=sampling,
            requester=rng.choice(REQUESTERS),
            priority=rng.choice(tuple(Priority)),
            private=rng.random() < PRIVATE,
        )


class Soak:
    """One engine and its load; counts: what became of the requests."""

    def __init__(self, engine: Engine, shape: Shape, seed: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._rng, self._clock = engine, random.Random(seed), clock
        self._traffic = Traffic(random.Random(seed + 1), shape)
        self.live: dict[str, int] = {}  # request -> tokens so far
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.rss_mb: list[tuple[float, float]] = []  # (hours, MiB)

    def run(self, seconds: float) -> None:
        """Load for so long, then until nothing is left."""
        process, began, due = psutil.Process(), self._clock(), 0.0
        every_s = min(60.0, seconds / SAMPLES)
        while (now := self._clock() - began) < seconds:
            if now >= due:
                due = now + every_s
                self.rss_mb.append((now / 3600, process.memory_info().rss / MIB))
                print(f"{now:7.0f} s  {self.rss_mb[-1][1]:7.1f} MiB  {dict(self.counts)}", flush=True)
            self._ask()
            self._cancel(CANCEL)
            self._step()
        self._cancel(0.5)
        while self._engine.has_work:
            self._step()
        self.rss_mb.append(((self._clock() - began) / 3600, process.memory_info().rss / MIB))
        self._check()

    def _ask(self) -> None:
        if self.counts["steps"] % BURST_EVERY == BURST_EVERY - 1:
            for _ in range(SLOTS + QUEUE_MAX + 8):
                self._add()
        elif len(self.live) < SLOTS + 4:
            self._add()

    def _add(self) -> None:
        request = self._traffic.request()
        try:
            self._engine.add(request)
        except EngineFull:
            self.counts["refused"] += 1
        except BadInput:
            self.counts["wrong"] += 1
        else:
            self.counts["accepted"] += 1
            self.live[request.request_id] = len(request.delivered)

    def _cancel(self, share: float) -> None:
        for name in [name for name in self.live if self._rng.random() < share]:
            self._engine.cancel(name)
            del self.live[name]
            self.counts["cancelled"] += 1

    def _step(self) -> None:
        self.counts["steps"] += 1
        for output in self._engine.step():
            self._take(output)

    def _take(self, output: Output) -> None:
        if output.request_id not in self.live:
            self.faults.append(f"an output for {output.request_id}, which had ended: {output}")
            return
        self.live[output.request_id] += len(output.tokens)
        self.counts["tokens"] += len(output.tokens)
        if output.error is not None:
            self.faults.append(f"{output.request_id} failed: {output.error}")
        if output.error is not None or output.finish is not None:
            self.counts["failed" if output.error is not None else "finished"] += 1
            del self.live[output.request_id]

    def _check(self) -> None:
        """What must hold once the engine has no work."""
        told, counts = self._engine.statistics(), self.counts
        left = {
            "requests without an end": len(self.live),
            "slots": told.slots_total - told.slots_free,
            "requests in the queue": told.queue_length,
            "tokens of KV memory": told.kv_tokens_total - told.kv_tokens_free,
        }
        self.faults += [f"{count} {name} are left" for name, count in left.items() if count]
        ours = (counts["finished"], counts["failed"], counts["cancelled"])
        if ours != (theirs := (told.finished, told.failed, told.cancelled)):
            self.faults.append(f"finished, failed, cancelled: {ours} were seen, the engine counts {theirs}")
        if counts["accepted"] != sum(ours):
            self.faults.append(f"{counts['accepted']} were taken in, {sum(ours)} ended")


def judged(seconds: float) -> str:
    """Whether a run of so long says something of memory."""
    return "does not grow" if seconds >= JUDGED_S else f"is judged in runs of {JUDGED_S:.0f} s and more"


def soaked(served: Served, shape: Shape, seconds: float, seed: int) -> tuple[list[Row], list[str]]:
    """The figures of a soak, and what is wrong."""
    soak = Soak(served.engine(kv_tokens=KV_TOKENS, queue_max=QUEUE_MAX), shape, seed)
    soak.run(seconds)
    points = [(hours, mb) for hours, mb in soak.rss_mb if hours * 3600 >= seconds * SETTLED]
    slope = theil_sen(points)
    if seconds >= JUDGED_S and slope > FLAT["rss_mb"]:
        soak.faults.append(f"memory grows by {slope:.1f} MiB an hour, wanted at most {FLAT['rss_mb']:g}")
    counts, path = soak.counts, served.path
    rows = [
        Row(figure="seconds", value=seconds, unit=f"s, {path}", better="higher"),
        *(
            Row(figure=name, value=counts[name], unit="requests", better="higher")
            for name in ("accepted", "finished", "cancelled", "refused", "wrong")
        ),
        Row(figure="failed", value=counts["failed"], unit="requests", better="lower"),
        Row(figure="tokens", value=counts["tokens"], unit="made", better="higher"),
        Row(figure="rss_mb_settled", value=points[0][1], unit="MiB", better="lower"),
        Row(figure="rss_mb_max", value=max(mb for _, mb in soak.rss_mb), unit="MiB", better="lower"),
        Row(figure="rss_mb_per_hour", value=slope, unit="MiB/h", better="lower"),
        Row(figure="faults", value=len(soak.faults), unit="found", better="lower"),
    ]
    return rows, soak.faults
