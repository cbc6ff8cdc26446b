"""Admission by when a request would be answered, ablated; a part of bench/selfstate.py.

Rules: the node's own Hosting, once declining and once not, under the same seeded arrivals at an overload: prompts,
limits, classes and deadlines are drawn beforehand. In `made` the engine is a made one, whose turns take as long as a
small CPU's, on a clock that jumps; in `real` it is the embedded engine with the model that comes with the node, in real
time. A request is a miss when it was admitted and its deadline passed before its last token; what was made of it is
waste. Wrongly declined is what was declined with, and answered in time without.
"""

from __future__ import annotations

import math
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass

import trio
from trio.testing import MockClock

from bench.harness import Row
from model.config import RuntimeConfig
from model.fair_share import Account
from model.requests import EngineStatistics, GenerationRequest, Output, Progress
from model.runtime import Runtime
from model.scheduler import Scheduler
from model.step import Outcome, Priority, SchedulerConfig
from node.admission import Admission
from node.errors import NoRoom, RequestError
from node.hosting import Hosting
from node.requester import OWN, Requester
from node.work import Finished, GenerateWork, Piece, Sampling
from tests.fake_runtime import FakeRuntime, Turns

OTHERS = (*(Requester(f"peer {number}", Priority.PEER) for number in range(3)), Requester("new", Priority.STRANGER))
WARM = 24  # requests before any is counted
OVERLOAD = 1.7  # times the tokens a second that the engine was seen to make
SLOTS = 8
QUEUE = 64
LIMIT = 256  # of those who name none
STEP_S, WRITE_S, READ_S = 0.02, 0.002, 0.0005  # a turn, and in it a token written and one read
MADE_S = OVERLOAD * 5.2  # requests a second; the made engine answers about 5.2
MADE_PATIENCE_S = (2.0, 14.0)


@dataclass(slots=True, kw_only=True)
class Case:
    """One request, and what became of it."""

    at_s: float
    work: GenerateWork
    who: Requester
    is_declined: bool = False
    is_refused: bool = False  # by the queue's bounds
    is_answered: bool = False
    tokens: int = 0
    waited_s: float = 0.0

    @property
    def is_missed(self) -> bool:
        """Whether it was let in for nothing."""
        return not (self.is_declined or self.is_refused or self.is_answered)


class Machine(FakeRuntime):
    """The node's own scheduler over a machine whose turns are made: they take longer the more answers run and the more
    is read, and each answer ends at a length of its own. The machine's time is Trio's (`Turns`)."""

    def __init__(self) -> None:
        super().__init__(slots=SLOTS, queue_max=QUEUE)
        self.scheduler = Scheduler(SchedulerConfig(slots=SLOTS, queue_max=QUEUE, blocks=4_096))
        self.asks: dict[str, tuple[int, int, str]] = {}  # tokens of its answer; at how many it ends, and why

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    def add(self, request: GenerationRequest) -> None:
        most = request.sampling.max_tokens
        self.scheduler.add(request.request_id, request.prompt, most, Account(request.priority, request.requester))
        end = length_of(request.prompt)
        self.asks[request.request_id] = 0, min(most, end), "stop" if end <= most else "length"

    def step(self) -> list[Output]:
        plan, outputs = self.scheduler.plan(), list[Output]()
        read = sum(span.end - span.begin for span in plan.chunks)
        seconds = STEP_S + WRITE_S * len(plan.decodes) + READ_S * read
        self.takes_s += seconds
        sampled = [span.request_id for span in (*plan.decodes, *plan.chunks) if span.samples]
        for name in sampled:
            made, end, why = self.asks[name]
            self.asks[name] = made + 1, end, why
            outputs.append(Output(request_id=name, tokens=(7,), text="w ", finish=None if made + 1 < end else why))
        ended = frozenset(output.request_id for output in outputs if output.finish is not None)
        self.scheduler.took(Outcome(sampled=dict.fromkeys(sampled, 7), finished=ended, seconds=seconds))
        return outputs

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id)

    def progress(self, request_id: str) -> Progress:
        return self.scheduler.progress(request_id)

    def statistics(self) -> EngineStatistics:
        now = self.scheduler.statistics()
        return EngineStatistics(
            slots_total=SLOTS, slots_free=now.slots_free, queue_length=now.queue_length, queue_max=QUEUE,
            kv_tokens_total=1 << 18, kv_tokens_free=1 << 18, steps=now.steps, decoded_tokens=now.decoded,
            prefilled_tokens=now.prefilled, queried_tokens=now.queried, reused_tokens=now.reused,
        )  # fmt: skip


def length_of(prompt: tuple[int, ...]) -> int:
    """About 40 tokens, log-normal, by the prompt."""
    return max(1, min(LIMIT, int(30 * math.exp(0.7 * random.Random(hash(prompt)).gauss(0.0, 1.0)))))


def cases(seed: int, seconds: float, requests_s: float, patience_s: tuple[float, float]) -> list[Case]:
    """Poisson arrivals; two in five name a limit, two in five are this node's own clients'."""
    rng, at_s, found = random.Random(seed), 0.0, list[Case]()
    while (at_s := at_s + rng.expovariate(requests_s)) < seconds:
        limit = rng.randint(8, 80) if rng.random() < 0.4 else LIMIT
        text = "Once upon a time " + "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(5, 160)))
        work = GenerateWork(
            request_id=f"r{len(found)}",
            text=text,
            sampling=Sampling(max_tokens=limit, seed=len(found)),
            remaining_ms=int(1000 * rng.uniform(*patience_s)),
        )
        found.append(Case(at_s=at_s, work=work, who=OWN if rng.random() < 0.4 else rng.choice(OTHERS)))
    return found


async def asked(hosting: Hosting, case: Case) -> None:
    """To its end, or to its deadline."""
    began = trio.current_time()
    with trio.move_on_after(case.work.remaining_ms / 1000):
        try:
            async with hosting.generate(case.work, case.who) as items:
                async for item in items:
                    if isinstance(item, RequestError):
                        case.is_refused = True
                    elif isinstance(item, Piece):
                        case.tokens += len(item.tokens)
                    elif isinstance(item, Finished):
                        case.is_answered = True
        except NoRoom as exc:
            case.is_declined = "foresees" in exc.message
            case.is_refused = not case.is_declined
    case.waited_s = trio.current_time() - began


async def driven(hosting: Hosting, some: list[Case]) -> float:
    """All of them, each at its time; seconds that it took."""
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for case in some:
            await trio.sleep_until(began + case.at_s)
            nursery.start_soon(asked, hosting, case)
    return trio.current_time() - began


async def hosted(hosting: Hosting, act: Callable[[], Awaitable[None]]) -> None:
    """Act while it runs."""
    async with trio.open_nursery() as nursery:
        await nursery.start(hosting.run)
        await act()
        nursery.cancel_scope.cancel()


def warm(seed: int) -> list[Case]:
    """A few that have all the time they want."""
    return cases(1_000_000 + seed, 3.0 * WARM, 1.0, (1e4, 1e4))[:WARM]


async def warmed(hosting: Hosting, some: list[Case]) -> float:
    """Ask them SLOTS at a time; the tokens a second that came."""
    began = trio.current_time()
    for at in range(0, len(some), SLOTS):
        async with trio.open_nursery() as nursery:
            for case in some[at : at + SLOTS]:
                nursery.start_soon(asked, hosting, case)
    return sum(case.tokens for case in some) / (trio.current_time() - began)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One overload, to its end."""

    cases: list[Case]
    admission: Admission
    took_s: float


def made(seed: int, seconds: float, *, declines: bool) -> Run:
    """With the made engine: WARM answers, then the arrivals."""
    admission, some, took = Admission(declines=declines), cases(seed, seconds, MADE_S, MADE_PATIENCE_S), list[float]()

    async def main() -> None:
        runtime = Machine()
        hosting = Hosting(runtime, peer="b", on_change=lambda: None, hop=Turns(runtime), admission=admission)

        async def act() -> None:
            await warmed(hosting, warm(seed))
            took.append(await driven(hosting, some))

        await hosted(hosting, act)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    return Run(cases=some, admission=admission, took_s=took[0])


class Real:
    """The embedded engine with the model that comes with the node; loaded once."""

    def __init__(self) -> None:
        self._runtime = Runtime.load("default", RuntimeConfig(threads=1, slots=SLOTS))
        self._tok_s: float | None = None  # at WARM answers, the first time

    def run(self, seed: int, seconds: float, *, declines: bool) -> Run:
        """As `made`; how many come, and how patient they are, follows from the speed that is measured first."""
        admission, some, took = Admission(declines=declines), list[Case](), list[float]()

        async def main() -> None:
            hosting = Hosting(self._runtime, peer="b", on_change=lambda: None, cache_mb=0, admission=admission)

            async def act() -> None:
                first = warm(seed)
                tok_s = await warmed(hosting, first)
                self._tok_s = self._tok_s or tok_s
                mean = sum(case.tokens for case in first) / len(first)
                alone_s = mean * SLOTS / self._tok_s
                rate = OVERLOAD * self._tok_s / mean
                some.extend(cases(seed, seconds, rate, (0.5 * alone_s, 4.0 * alone_s)))
                took.append(await driven(hosting, some))

            await hosted(hosting, act)

        trio.run(main)
        return Run(cases=some, admission=admission, took_s=took[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Runs in sum; shares in percent."""

    asked: int
    missed: float  # of those let in
    wasted: float  # of all tokens made
    answered: float  # in time, of all
    answered_s: float
    declined: float  # of all
    wrongly: float  # of all
    waited_s: float  # mean of those that got no answer
    error_s: float
    inside: float


def told(runs: list[Run], without: list[Run]) -> Told:
    """What runs came to, beside the same where nobody is declined."""
    every = [case for run in runs for case in run.cases]
    other = [case for run in without for case in run.cases]
    let_in = [case for case in every if not (case.is_declined or case.is_refused)]
    missed = [case for case in every if case.is_missed]
    wrongly = sum(
        one.is_declined and two.is_answered for one, two in zip(every, other, strict=False) if one.work == two.work
    )
    in_vain_s = [case.waited_s for case in every if not case.is_answered]
    statistics = [run.admission.foresight.statistics() for run in runs]
    return Told(
        asked=len(every),
        missed=100 * len(missed) / len(let_in),
        wasted=100 * sum(case.tokens for case in missed) / max(1, sum(case.tokens for case in every)),
        answered=100 * sum(case.is_answered for case in every) / len(every),
        answered_s=sum(case.is_answered for case in every) / sum(run.took_s for run in runs),
        declined=100 * sum(case.is_declined for case in every) / len(every),
        wrongly=100 * wrongly / len(every),
        waited_s=sum(in_vain_s) / max(1, len(in_vain_s)),
        error_s=sum(each.error_s or 0.0 for each in statistics) / len(statistics),
        inside=100 * sum(each.inside or 0.0 for each in statistics) / len(statistics),
    )


def compared(run: Callable[..., Run], seeds: int, seconds: float) -> tuple[Told, Told]:
    """With and without, each seed after the other."""
    pairs = [(run(seed, seconds, declines=True), run(seed, seconds, declines=False)) for seed in range(seeds)]
    with_it, without = [one for one, _ in pairs], [two for _, two in pairs]
    return told(with_it, without), told(without, without)


def rows(name: str, run: Callable[..., Run], seeds: int, seconds: float) -> Iterator[Row]:
    """The figures; the rival is the same node without."""
    used, plain = compared(run, seeds, seconds)

    def row(figure: str, unit: str, better: str) -> Row:
        value, beside = getattr(used, figure), getattr(plain, figure)
        return Row(
            figure=f"admission_{name}_{figure}",
            value=value,
            unit=unit,
            better="higher" if better == "higher" else "lower",
            rival="admits everybody",
            rival_value=beside,
        )

    yield row("missed", "% of those let in missed their deadline", "lower")
    yield row("wasted", "% of tokens made for nobody", "lower")
    yield row("waited_s", "s that who got no answer waited, mean", "lower")
    yield row("answered", f"% of {used.asked} answered in time", "higher")
    yield row("answered_s", "answers in time a second", "higher")
    for figure, unit in (("declined", "% declined at once"), ("wrongly", "% declined that would have been in time")):
        yield Row(figure=f"admission_{name}_{figure}", value=getattr(used, figure), unit=unit, better="lower")
    yield Row(figure=f"admission_{name}_error_s", value=used.error_s, unit="s, mean error", better="lower")
    yield Row(figure=f"admission_{name}_inside", value=used.inside, unit="% of outcomes inside", better="higher")
