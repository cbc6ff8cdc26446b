"""What came of the last five minutes, sample by sample; and between which peers requests go.

Rules: core. Speeds are differences of counters that only grow, over the time between two samples; what has not been
measured is None, not 0. Waiting times are not its business (node/tallies.py).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

SAMPLE_S = 2.0  # a chart of five minutes is then as wide as it has dots on a telephone
SAMPLES_MAX = 150
WINDOW_S = SAMPLE_S * SAMPLES_MAX
SPEED_SAMPLES = 5  # a speed "now" is the mean of so many: of ten seconds
FLOWS_MAX = 1024  # peers whose requests are counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Counts since start. tokens_out: given to own clients, wherever they were made; tokens_made: made here, for
    whomever. ended: own clients' requests that ended, whole or in an error; errors: of these, by no fault of theirs."""

    tokens_out: int = 0
    tokens_made: int = 0
    ended: int = 0
    errors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A stretch of about SAMPLE_S: speeds in 1/s. number counts from 1."""

    number: int
    seconds: float
    tokens_out_s: float
    tokens_made_s: float
    ended: int
    errors: int


class Recent:
    """See the module. Times are monotonic seconds."""

    def __init__(self) -> None:
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self._before: tuple[float, Totals] | None = None

    def sample(self, now: float, totals: Totals) -> None:
        """Take a sample, if the last was SAMPLE_S ago. Called more often than that, it does nothing."""
        if self._before is None:
            self._before = (now, totals)
            return
        since, before = self._before
        seconds = now - since
        if seconds < SAMPLE_S * 0.75:  # a caller that comes every second is early now and then
            return
        self._before = (now, totals)
        self.samples.append(
            Sample(
                number=self.samples[-1].number + 1 if self.samples else 1,
                seconds=round(seconds, 3),
                tokens_out_s=_speed(totals.tokens_out - before.tokens_out, seconds),
                tokens_made_s=_speed(totals.tokens_made - before.tokens_made, seconds),
                ended=max(0, totals.ended - before.ended),
                errors=max(0, totals.errors - before.errors),
            )
        )
        while sum(sample.seconds for sample in self.samples) > WINDOW_S:  # a machine with much to do samples late
            self.samples.popleft()

    def told(self) -> dict[str, Any]:
        """JSON: speeds of the last ten seconds, and counts of the window."""
        last = list(self.samples)[-SPEED_SAMPLES:]
        seconds = sum(sample.seconds for sample in last)

        def speed(amounts: Iterable[float]) -> float | None:
            return round(sum(amounts) / seconds, 3) if seconds else None

        return {
            "window_s": round(sum(sample.seconds for sample in self.samples)),
            "tokens_out_per_s": speed(each.tokens_out_s * each.seconds for each in last),
            "tokens_made_per_s": speed(each.tokens_made_s * each.seconds for each in last),
            "requests_per_s": speed(each.ended for each in last),
            "ended": sum(sample.ended for sample in self.samples),
            "errored": sum(sample.errors for sample in self.samples),
        }


@dataclass(slots=True)
class Flow:
    """Requests between this node and one peer: under way now, and since start."""

    to_now: int = 0
    to_total: int = 0
    from_now: int = 0
    from_total: int = 0


class Flows:
    """Requests to and from each peer; the FLOWS_MAX that something went on with last."""

    def __init__(self, flows_max: int = FLOWS_MAX) -> None:
        self._flows: OrderedDict[str, Flow] = OrderedDict()
        self._flows_max = flows_max

    def of(self, peer: str) -> Flow:
        """All zero for a peer that nothing is known of."""
        return self._flows.get(peer) or Flow()

    @contextmanager
    def to(self, peer: str) -> Iterator[None]:
        """A request goes to the peer, for as long as the block runs."""
        flow = self._touched(peer)
        flow.to_now, flow.to_total = flow.to_now + 1, flow.to_total + 1
        try:
            yield
        finally:
            flow.to_now -= 1

    @contextmanager
    def out_of(self, peer: str) -> Iterator[None]:
        """A request of the peer is served here, for as long as the block runs."""
        flow = self._touched(peer)
        flow.from_now, flow.from_total = flow.from_now + 1, flow.from_total + 1
        try:
            yield
        finally:
            flow.from_now -= 1

    def _touched(self, peer: str) -> Flow:
        flow = self._flows.setdefault(peer, Flow())
        self._flows.move_to_end(peer)
        while len(self._flows) > self._flows_max:
            idle = (name for name, kept in self._flows.items() if not kept.to_now and not kept.from_now)
            if (oldest := next(idle, None)) is None or oldest == peer:
                break  # all of them are under way: bounded by the requests that may be
            del self._flows[oldest]
        return flow


def _speed(amount: int, seconds: float) -> float:
    return round(max(0, amount) / seconds, 2)
