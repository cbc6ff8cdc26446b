"""How often a figure fell into which range: a Histogram that counts, and the Distribution that is read of it.

Rules: core. The ranges are fixed when it is made, so that its size is: one number a range, whatever comes. An
observation is a search among some twenty bounds and two additions, cheap enough for each token of an answer. What is
read is a copy: it may go to another thread.
Source: the ranges are those of vLLM V1 (`vllm/v1/metrics/loggers.py`), whose dashboards people have, with finer ones
below for small models; Prometheus, `histogram_quantile`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_S = (
    *(0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
STEP_TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)

LAG_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a Histogram held at a moment. counts: for each bound what was at most that and over the one before, and
    last what was over all."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float

    @property
    def count(self) -> int:
        """How many observations there were."""
        return sum(self.counts)

    def cumulative(self) -> tuple[int, ...]:
        """For each bound, and last for no bound, how many were at most that."""
        return tuple(accumulate(self.counts))

    def quantile(self, share: float) -> float | None:
        """What this share (0 to 1) of the observations is at most, taken to lie evenly within a range; None: there is
        none. Of what was over all bounds only the last bound is known."""
        total = self.count
        if not total:
            return None
        wanted, before = share * total, 0
        for place, bound in enumerate(self.bounds):
            here = self.counts[place]
            if here and before + here >= wanted:
                low = self.bounds[place - 1] if place else 0.0
                return low + (bound - low) * (wanted - before) / here
            before += here
        return self.bounds[-1]


class Histogram:
    """Counts observations by range. One thread observes; any may read."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """bounds: the upper ends of the ranges, ascending; what is over the last has a range of its own."""
        assert bounds == tuple(sorted(set(bounds))), f"bounds that do not ascend: {bounds}"
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """A value came, so many times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def read(self) -> Distribution:
        """What it holds now."""
        return Distribution(self._bounds, tuple(self._counts), self._sum)


def merged(parts: Iterable[Distribution], bounds: tuple[float, ...]) -> Distribution:
    """All parts, which have these bounds, as one."""
    counts, total = [0] * (len(bounds) + 1), 0.0
    for part in parts:
        assert part.bounds == bounds, "only like is added to like"
        counts = [ours + theirs for ours, theirs in zip(counts, part.counts, strict=True)]
        total += part.sum
    return Distribution(bounds, tuple(counts), total)
