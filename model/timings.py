"""How long an engine's requests wait, are read in and are answered, and how much its steps take in.

Rules: core; who owns it tells the time (seconds of one monotonic clock). It knows a request from when it came until it
ended, and by its id only. A step that reads no prompt costs it one observation, however many answers run.
Source: vLLM V1, `vllm/v1/metrics/stats.py`: queued until scheduled, prefill to the first token, decode to the end.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from model.histogram import REQUEST_S, STEP_TOKENS, Distribution, Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTimings:
    """A snapshot, since start. queue_s: from a request's coming to its first run; prefill_s: from there to its first
    token; decode_s: from there to its end, of those that finished; step_tokens: tokens read and made in a step."""

    queue_s: Distribution
    prefill_s: Distribution
    decode_s: Distribution
    step_tokens: Distribution


class Timings:
    """The histograms, and when each request entered the stage that it is in."""

    def __init__(self) -> None:
        self._queue_s, self._prefill_s, self._decode_s = (Histogram(REQUEST_S) for _ in range(3))
        self._step_tokens = Histogram(STEP_TOKENS)
        self._queued: dict[str, float] = {}
        self._reading: dict[str, float] = {}
        self._answering: dict[str, float] = {}

    def came(self, name: str, now: float) -> None:
        """A request waits for its turn."""
        self._queued[name] = now

    def runs(self, names: Iterable[str], now: float) -> None:
        """These run from now on; not for the first time, if they were preempted."""
        for name in names:
            came = self._queued.pop(name, None)
            if came is not None:
                self._queue_s.observe(now - came)
                self._reading[name] = now

    def stepped(self, tokens: int, wrote: Container[str], now: float) -> None:
        """A step is over: so many tokens went through, and these requests have a new one."""
        if tokens:
            self._step_tokens.observe(tokens)
        if not self._reading:
            return
        for name in [name for name in self._reading if name in wrote]:
            self._prefill_s.observe(now - self._reading.pop(name))
            self._answering[name] = now

    def ended(self, name: str, now: float, *, is_finished: bool) -> None:
        """A request has left, finished or otherwise."""
        self._queued.pop(name, None)
        self._reading.pop(name, None)
        first = self._answering.pop(name, None)
        if first is not None and is_finished:
            self._decode_s.observe(now - first)

    def __len__(self) -> int:
        """How many requests it knows."""
        return len(self._queued) + len(self._reading) + len(self._answering)

    def read(self) -> EngineTimings:
        """What was measured so far."""
        return EngineTimings(
            queue_s=self._queue_s.read(),
            prefill_s=self._prefill_s.read(),
            decode_s=self._decode_s.read(),
            step_tokens=self._step_tokens.read(),
        )
