"""The task that looks at the node's model from within: held-out text and fixed probes, at intervals, when nobody waits.

Rules: one short act at a time in the engine's thread, and only while no request is here (Hosting.borrow). Looks and
probes are each paced by what they have cost so far, in CPU time measured here: together at most LOOK_SHARE plus
PROBE_SHARE of one CPU's time since the start, and one look or round ahead of it. Slices of text come in order, one
after another; nothing is drawn by chance. What fails is counted and, once of a kind, logged; the node goes on.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from crypto.disk import FileStatus
from model.errors import ModelError
from model.look import held_out_slices
from model.requests import Looked, Openness
from node.averages import binned
from node.consciousness import NATS_MAX, ConsciousnessState
from node.errors import RequestError
from node.facts import Fact, Generated, HeldOut
from node.hosting import Hosting
from node.self_probing import GaveWay, OffLoop, Probing

FIRST_S: Final = 10.0  # after the start: whoever waited for the node is served first
LOOK_EVERY_S: Final = 60.0
LOOK_SLICES: Final = 4  # of held-out text, 64 tokens each
LOOK_SHARE: Final = 0.003  # of one CPU's time
PIECES: Final = (64, 32, 16, 8)  # tokens a pass: the most with which one costs less than PASS_CPU_S
PASS_CPU_S: Final = 0.05
PROBE_EVERY_S: Final = 6 * 3600.0
PROBE_MERGED_S: Final = 600.0  # since the last, once other weights have come
PROBE_SHARE: Final = 0.002
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class LookStatistics:
    """What looks and probes did and cost since the start. *_cpu_s: CPU time of this process while they ran; *_due_s:
    until the next may begin; *_left: given up, for somebody who came or weights that changed; piece_tokens: of a pass;
    pass_cpu_s_max: of the most expensive one; failures: by the error's name."""

    looks: int
    looks_left: int
    look_tokens: int
    look_cpu_s: float
    look_due_s: float
    piece_tokens: int
    pass_cpu_s_max: float
    probes: int
    probes_stored: int
    probes_left: int
    probe_cpu_s: float
    probe_due_s: float
    failures: dict[str, int]


class Pace:
    """When what has cost so much may begin again: at `share` of the time since the start, by its own measurement."""

    def __init__(self, share: float, now: float) -> None:
        self._share, self._start, self._last = share, now, -math.inf
        self.spent_s = 0.0

    def ended(self, now: float) -> None:
        """One has ended."""
        self._last = now

    def due(self, every_s: float) -> float:
        """When the next may begin, every_s after the last or later."""
        return max(self._last + every_s, self._start + self.spent_s / self._share)


class Looks:
    """Looks at one hosted model while `run` runs; `tell` is called (sync) with each fact."""

    def __init__(
        self,
        hosting: Hosting,
        tell: Callable[[Fact], None],
        folder: Path,
        *,
        state: Callable[[], ConsciousnessState] = ConsciousnessState,
        cpu_s: Callable[[], float] = time.process_time,
        off_loop: OffLoop = trio.to_thread.run_sync,
    ) -> None:
        """folder: where the first round of probes is kept. state: the node's, now: how many rounds were merged, and how
        many looks came before this start. cpu_s: CPU time of the process; off_loop: where the disk is waited for."""
        self._hosting, self._tell, self._state, self._cpu_s = hosting, tell, state, cpu_s
        self._reading = _Reading(hosting, cpu_s)
        self._probing = Probing(hosting, folder, lambda: state().learning.merges or 0, off_loop)
        self._look_pace, self._probe_pace = Pace(LOOK_SHARE, 0.0), Pace(PROBE_SHARE, 0.0)
        self._counts: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self._seen = Openness()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look and probe at intervals. Cancelled, it leaves nothing of its own in the engine."""
        now = trio.current_time()
        self._look_pace, self._probe_pace = Pace(LOOK_SHARE, now), Pace(PROBE_SHARE, now)
        self._reading.begin_behind(self._state().surprise.looks or 0)
        task_status.started()
        await self._probing.open()
        await trio.sleep(FIRST_S)
        while True:
            if trio.current_time() >= self._probe_due() and self._probing.may_ask:
                await self._probe()
            if trio.current_time() >= self._look_due() and not self._hosting.draining:
                await self._look()
            wait_s = self._look_due() - trio.current_time()
            await trio.sleep(min(max(wait_s, 1.0), LOOK_EVERY_S))

    def generated(self) -> Generated | None:
        """What the engine judged of its own tokens since this was last asked; None: nothing."""
        told, before = self._hosting.statistics().openness, self._seen
        if told is None or told.tokens <= before.tokens:
            return None
        self._seen, tokens = told, told.tokens - before.tokens
        return Generated(
            tokens=tokens,
            entropy_sum_nats=max(0.0, told.entropy_sum_nats - before.entropy_sum_nats),
            margin_sum=min(float(tokens), max(0.0, told.margin_sum - before.margin_sum)),  # rounding may step over
        )

    def statistics(self) -> LookStatistics:
        """A snapshot, in the loop's thread."""
        now, counts, reading = trio.current_time(), self._counts, self._reading
        return LookStatistics(
            looks=counts["looks"],
            looks_left=counts["looks_left"],
            look_tokens=counts["look_tokens"],
            look_cpu_s=self._look_pace.spent_s,
            look_due_s=max(0.0, self._look_due() - now),
            piece_tokens=reading.piece,
            pass_cpu_s_max=reading.pass_cpu_s_max,
            probes=counts["probes"],
            probes_stored=self._probing.stored,
            probes_left=counts["probes_left"],
            probe_cpu_s=self._probe_pace.spent_s,
            probe_due_s=max(0.0, self._probe_due() - now),
            failures=dict(self._failures),
        )

    def file(self) -> FileStatus:
        """How the file of the first probes fares."""
        return self._probing.file.status()

    # within

    def _look_due(self) -> float:
        """Never for a model that makes no text: there is nothing to be surprised."""
        return math.inf if self._hosting.facts("causal") is None else self._look_pace.due(LOOK_EVERY_S)

    def _probe_due(self) -> float:
        is_other = self._probing.probed not in ("", self._hosting.revision)
        return self._probe_pace.due(PROBE_MERGED_S if is_other else PROBE_EVERY_S)

    async def _look(self) -> None:
        before_s = self._reading.cpu_s
        try:
            fact = await self._reading.look()
        except ModelError as exc:
            self._failed(exc)
        else:
            if fact is None:
                self._counts["looks_left"] += 1
            else:
                self._counts["looks"] += 1
                self._counts["look_tokens"] += sum(each.tokens for each in fact.bins or ())
                self._tell(fact)
        finally:
            self._look_pace.spent_s += self._reading.cpu_s - before_s
        self._look_pace.ended(trio.current_time())

    async def _probe(self) -> None:
        before_s = self._cpu_s()
        try:
            fact = await self._probing.ask()
        except GaveWay:
            self._counts["probes_left"] += 1
            return  # asked on once nobody is here, and it is paid for
        except (ModelError, RequestError) as exc:
            self._failed(exc)
        else:
            if fact is not None:
                self._counts["probes"] += 1
                self._tell(fact)
        finally:
            self._probe_pace.spent_s += self._cpu_s() - before_s
        self._probe_pace.ended(trio.current_time())

    def _failed(self, error: ModelError | RequestError) -> None:
        name = type(error).__name__
        self._failures[name] += 1
        if self._failures[name] == 1:
            _log.warning("a look at the model failed, and is left out: %s", error)


class _Reading:
    """Looks at held-out text, a few slices each, one after another."""

    def __init__(self, hosting: Hosting, cpu_s: Callable[[], float]) -> None:
        self.piece = PIECES[0]
        self.cpu_s = self.pass_cpu_s_max = 0.0
        self._hosting, self._clock_s = hosting, cpu_s
        self._slices = held_out_slices()
        self._next = 0  # place of a slice; after the last comes the first

    def begin_behind(self, looks: int) -> None:
        """So many came before this start."""
        self._next = looks * LOOK_SLICES % len(self._slices)

    async def look(self) -> HeldOut | None:
        """The next slices; None: the weights changed meanwhile. Raises ModelError; then the next look goes on behind
        these slices."""
        begin, self._next = self._next, self._next + LOOK_SLICES
        revision, nats, judged = self._hosting.revision, 0.0, list[tuple[float, bool]]()
        for place in range(begin, begin + LOOK_SLICES):
            looked = await self._read(self._slices[place % len(self._slices)])
            if looked is None or looked.revision != revision:
                return None
            nats += looked.nats
            judged += looked.judged
        nll_nats = min(nats / len(judged), NATS_MAX)  # weights that are broken are told as that, and end no node
        return HeldOut(nll_nats=nll_nats, bins=binned(judged))

    async def _read(self, text: str) -> Looked | None:
        work = _Work(self._hosting.runtime.looking(text, self.piece), self._clock_s)
        try:
            while not work.has_ended:
                await self._hosting.borrow(work.carry_on)
        finally:
            work.passes.close()
            self.cpu_s += math.fsum(work.costs_s)
            self.pass_cpu_s_max = max(self.pass_cpu_s_max, *work.costs_s, 0.0)
        self.piece = _sized(self.piece, max(work.costs_s))
        return work.looked


def _sized(piece: int, pass_cpu_s: float) -> int:
    """The next slice's piece, after one whose most expensive pass cost so much."""
    at = PIECES.index(piece)
    if pass_cpu_s > PASS_CPU_S:
        return PIECES[min(at + 1, len(PIECES) - 1)]
    return PIECES[max(at - 1, 0)] if pass_cpu_s < PASS_CPU_S / 3 else piece


@dataclass(slots=True)
class _Work:
    """The passes over one slice, what each cost, and what came of them."""

    passes: Generator[None, None, Looked | None]
    clock_s: Callable[[], float]
    costs_s: list[float] = field(default_factory=list)
    looked: Looked | None = None
    has_ended: bool = False

    def carry_on(self) -> None:
        """In the engine's thread: one pass. Raises ModelError."""
        began_s = self.clock_s()
        try:
            next(self.passes)
        except StopIteration as end:
            self.looked, self.has_ended = end.value, True
        finally:
            self.costs_s.append(self.clock_s() - began_s)
