"""Whether a server behind this node can be asked now, how much it can take, and when to look again.

Rules: core. UP answers; FULL said 429 or 503 and is left alone for as long as it asked; DOWN does not answer, or not in
the protocol: it is asked again after a wait that doubles; REFUSED does not take our key: only its operator can help,
and it is asked as rarely as one that is down. One failed look makes nobody DOWN, a second one does, and so does a
refused connection. While it is not UP, nothing is offered.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from model.requests import EngineStatistics
from node.upstream_facts import SLOTS_MAX, Load, Served

LOOK_S = 5.0  # between looks at one that answers and is idle
LOOK_BUSY_S = 1.0  # at its figures, while it works for us
AGAIN_S = 1.0  # after a look that failed
BACKOFF_S = (0.5, 30.0)  # the first wait, and the longest
FULL_S = (1.0, 60.0)  # what is believed of a Retry-After
FAILURES_MAX = 2  # of looks in a row
SLOTS_DEFAULT = 4  # of a server that does not say: llama.cpp and Ollama have 4, or fewer
SLOTS_BATCHING = 32  # of vLLM: it runs up to 256, and says itself when it lets requests wait
QUEUE_PER_SLOT = 2  # gossip.routing's: a longer queue is no room
RATE_WINDOW_S = 2.0  # of work, for one measurement
RATE_WINDOW_S_MIN = 0.2  # of the very first answer
RATE_SHARE = 0.5  # of the newest measurement


class State(Enum):
    """How the server is."""

    STARTING = "starting"
    UP = "up"
    FULL = "full"
    DOWN = "down"
    REFUSED = "refused"


class Health:
    """What became of the looks at a server and of requests to it. Times are seconds of one clock."""

    def __init__(self) -> None:
        self.state = State.STARTING
        self.why = "it was not asked yet"
        self.since = -math.inf
        self.failures: Counter[str] = Counter()
        self._failed = 0  # looks in a row
        self._wait_s = BACKOFF_S[0]
        self._until = -math.inf  # when to look again, if not UP

    @property
    def is_up(self) -> bool:
        """Whether it takes requests."""
        return self.state is State.UP

    def answered(self, now: float) -> None:
        """It answered a look, or gave a whole answer."""
        self._failed, self._wait_s = 0, BACKOFF_S[0]
        if self.state is not State.FULL or now >= self._until:
            self._become(State.UP, "", now)

    def failed(self, reason: str, why: str, now: float, *, is_gone: bool) -> None:
        """It did not answer, or not in the protocol. is_gone: nothing listens there."""
        self.failures[reason] += 1
        self._failed += 1
        if self._failed < FAILURES_MAX and not is_gone and self.state in (State.UP, State.FULL):
            self._until = now + AGAIN_S
            return
        self._back_off(State.DOWN, why, now)

    def refused(self, why: str, now: float) -> None:
        """It does not take our key."""
        self.failures["refused"] += 1
        self._back_off(State.REFUSED, why, now)

    def full(self, why: str, retry_after_s: float | None, now: float) -> None:
        """It takes no more for now."""
        self.failures["full"] += 1
        wait_s = FULL_S[0] if retry_after_s is None or not math.isfinite(retry_after_s) else retry_after_s
        self._become(State.FULL, why, now)
        self._until = now + min(max(wait_s, FULL_S[0]), FULL_S[1])

    def look_at(self, last: float, now: float, *, is_busy: bool) -> float:
        """When to look next; last: when it was looked at."""
        if self.state is not State.UP:
            return max(self._until, last)
        if self._failed:
            return self._until
        return last + (LOOK_BUSY_S if is_busy else LOOK_S)

    def retry_after_s(self, now: float) -> float:
        """What a client is told to wait."""
        return min(max(self._until - now, FULL_S[0]), FULL_S[1])

    def _back_off(self, state: State, why: str, now: float) -> None:
        self._become(state, why, now)
        self._until = now + self._wait_s
        self._wait_s = min(2 * self._wait_s, BACKOFF_S[1])

    def _become(self, state: State, why: str, now: float) -> None:
        if state is not self.state:
            self.since = now
        self.state, self.why = state, why


@dataclass(slots=True)
class _Window:
    """Tokens that came while at least one answer ran."""

    tokens: int = 0
    seconds: float = 0.0
    began: float = 0.0
    running: int = 0


class Room:
    """How much the server can take: what it says, what we have there, and what was measured of both."""

    def __init__(self, slots: int | None) -> None:
        """slots: as the operator set it; None: what the server says, else a default."""
        self._wanted = slots
        self.slots = slots or SLOTS_DEFAULT
        self.steps = 0  # grows with every sign of work
        self.finished = self.failed = self.cancelled = self.tokens = 0
        self._load = Load()
        self._own_then = 0  # of ours, when the load was told
        self._window = _Window()
        self._decode_tok_s = 0.0

    def of(self, served: Served) -> None:
        """The server says what it is."""
        if served.dialect.is_alone:
            self.slots = 1
        else:
            default = SLOTS_BATCHING if served.dialect.name == "vllm" else SLOTS_DEFAULT
            self.slots = min(self._wanted or served.slots or default, SLOTS_MAX)

    def told(self, load: Load, own: int) -> None:
        """The server says how busy it is, while we have `own` requests there."""
        if load.steps != self._load.steps:
            self.steps += 1
        self._load, self._own_then = load, own

    def began(self, now: float) -> None:
        """The first token of an answer came."""
        self._window.running += 1
        if self._window.running == 1:
            self._window.began = now

    def ended(self, now: float) -> None:
        """It ended, in whichever way."""
        self._measure(now)
        self._window.running -= 1

    def came(self, tokens: int, now: float) -> None:
        """Something came of an answer."""
        self.steps += 1
        self.tokens += tokens
        self._window.tokens += tokens
        if now - self._window.began + self._window.seconds >= RATE_WINDOW_S:
            self._measure(now)

    def _measure(self, now: float) -> None:
        window = self._window
        window.seconds += max(0.0, now - window.began)
        window.began = now
        if window.seconds >= (RATE_WINDOW_S if self._decode_tok_s else RATE_WINDOW_S_MIN):
            rate, before = window.tokens / window.seconds, self._decode_tok_s
            self._decode_tok_s = rate if not before else before + RATE_SHARE * (rate - before)
            window.tokens, window.seconds = 0, 0.0

    def statistics(self, served: Served | None, own: int, waiting: int, *, is_up: bool) -> EngineStatistics:
        """In the words of an engine. own: of our requests there; waiting: of ours here, for a place there.

        No speed of reading is stated: peers make of it how long a step of our own engine may take, and this is another.
        """
        load, context = self._load, served.facts.context_tokens if served is not None else 0
        others = max(0, (load.running or 0) - self._own_then)
        free = max(0, self.slots - own - others) if is_up and not load.waiting else 0
        assumed = free * context  # where it tells nothing: a whole context for each free place
        kv_free = assumed if load.kv_tokens_free is None else load.kv_tokens_free
        return EngineStatistics(
            slots_total=self.slots,
            slots_free=free,
            queue_length=waiting + load.waiting,
            queue_max=QUEUE_PER_SLOT * self.slots,
            kv_tokens_total=load.kv_tokens_total or self.slots * context,
            kv_tokens_free=kv_free if is_up else 0,
            steps=self.steps,
            decode_tok_s=self._decode_tok_s,
            decoded_tokens=self.tokens,
            finished=self.finished,
            failed=self.failed,
            cancelled=self.cancelled,
        )
