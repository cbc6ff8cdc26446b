"""Asks the parts of the node how they are, at intervals and when its phase changes, and closes the periods.

Rules: shell; one task (`run`), which begins the self-state first; `look` is called every second by who looks anyway.
What a part does not measure is None. A sample asks no part for more than it has at hand, and the disk in a thread.
Source: SELF.md, the table of fields; docs/SELF.md.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import trio

from gossip.observations import Observations
from model.histogram import Distribution
from node.consciousness import Body, Load, Social, social_of
from node.errors import BadFigure
from node.facts import Fact, Sampled
from node.inference import Inference
from node.process import Process
from node.self_state import SelfState
from p2p.peering import Peering

SAMPLE_S: Final = 10.0
PERIOD_S: Final = 60.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The parts that are asked. phase, training: one word each; tokens_s: tokens made here a second; facts: what parts
    measured since the last call; begun: called once the memory is read; sampled: after each sample."""

    peer_id: str
    data_dir: Path
    phase: Callable[[], str]
    training: Callable[[], str]
    tokens_s: Callable[[], float | None]
    facts: Callable[[], Iterable[Fact]]
    begun: Callable[[], Awaitable[None]]
    sampled: Callable[[], None]
    process: Process
    inference: Inference
    peering: Peering
    observations: Observations


class Sampler:
    """See the module."""

    def __init__(self, itself: SelfState, sources: Sources) -> None:
        """Make it inside trio, when the node starts."""
        self._itself, self._sources = itself, sources
        self._started_s = trio.current_time()
        self._wake = trio.Event()
        self._lag: Distribution | None = None
        self._process = psutil.Process()
        self._warned = False

    async def run(self) -> None:
        """Sample for as long as the node runs."""
        itself = self._itself
        await itself.begin()
        await self._sources.begun()
        itself.foretell(round(1000 * PERIOD_S), is_first=True)
        period_ends = trio.current_time() + PERIOD_S
        while True:
            disk_free_bytes = await self._disk_free()
            with itself.counting("sampler"):
                itself.stored()
                for fact in self._sources.facts():
                    itself.take(fact)
                self._take(disk_free_bytes)
                self._sources.sampled()
                now = trio.current_time()
                if now >= period_ends:
                    itself.foretell(round(1000 * PERIOD_S))
                    period_ends = now + PERIOD_S
            with trio.move_on_after(min(SAMPLE_S, max(0.0, period_ends - now))):
                await self._wake.wait()
            self._wake = trio.Event()

    def sample_now(self) -> None:
        """Something changed that is to be seen at once."""
        self._wake.set()

    def look(self) -> None:
        """Every second: what a period's means are made of."""
        sources = self._sources
        hosting = sources.inference.hosting
        self._itself.period.looked(None if hosting is None else hosting.requests_running, len(sources.peering.peers()))

    @property
    def uptime_s(self) -> float:
        """Since the start, by the monotonic clock."""
        return trio.current_time() - self._started_s

    # --- one sample ---

    def _take(self, disk_free_bytes: int | None) -> None:
        """A figure that is none, as another server's may be, costs its sample and not the node."""
        try:
            self._itself.take(self._sampled(disk_free_bytes))
        except BadFigure as exc:
            _log.warning("a sample of the node's state is left out: %s", exc)

    def _sampled(self, disk_free_bytes: int | None) -> Sampled:
        sources = self._sources
        hosting = sources.inference.hosting
        return Sampled(
            peer_id=sources.peer_id,
            revision=None if hosting is None else hosting.revision,
            phase=sources.phase(),
            training=sources.training(),
            uptime_s=self.uptime_s,
            load=self._load(),
            body=self._body(disk_free_bytes),
            social=self._social(),
        )

    def _load(self) -> Load:
        hosting, lag_ms = self._sources.inference.hosting, self._lag_ms()
        if hosting is None:
            return Load(loop_lag_ms=lag_ms)
        waiting = hosting.statistics().queue_length
        return Load(
            queue_length=waiting,
            active_requests=max(0, hosting.requests_running - waiting),
            tokens_s=self._sources.tokens_s(),
            loop_lag_ms=lag_ms,
        )

    def _lag_ms(self) -> float | None:
        """The mean lateness of the loop since the last sample."""
        before, now = self._lag, self._sources.process.lag_s.read()
        self._lag = now
        count = now.count - (before.count if before else 0)
        if count <= 0:
            return None
        return 1000 * max(0.0, now.sum - (before.sum if before else 0.0)) / count

    def _body(self, disk_free_bytes: int | None) -> Body:
        hosting = self._sources.inference.hosting
        measures = None if hosting is None else getattr(hosting.runtime, "accelerator_bytes", None)
        return Body(
            rss_bytes=self._process.memory_info().rss,
            accelerator_bytes=None if measures is None else measures(),
            disk_free_bytes=disk_free_bytes,
        )

    def _social(self) -> Social:
        now, seen = trio.current_time(), self._sources.observations
        measured = [seen.measured(peer, now) for peer in seen.peers()]
        return social_of(
            len(self._sources.peering.peers()),
            [(success, None if rtt_s is None else 1000 * rtt_s) for success, rtt_s in measured],
        )

    async def _disk_free(self) -> int | None:
        """In a thread: a disk of the network may take its time."""

        def look() -> tuple[int, float]:
            began_s = time.thread_time()
            free_bytes = shutil.disk_usage(self._sources.data_dir).free
            return free_bytes, time.thread_time() - began_s

        try:
            free_bytes, cpu_s = await trio.to_thread.run_sync(look, abandon_on_cancel=True)
            self._itself.spent("sampler", cpu_s)
            return free_bytes
        except OSError as exc:
            if not self._warned:
                _log.warning("how much is free on the disk of %s is not known: %s", self._sources.data_dir, exc)
            self._warned = True
            return None
