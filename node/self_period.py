"""What a period was like, for its prediction's outcome; what of a state is news; how many events a source may have.

Rules: core. A figure of a period is a mean over what was measured in it, and absent when nothing was. News is a change
of any member of the state that no clock or the machine's ordinary noise makes: the bounds stand in NOISE.
Source: SELF.md, "Self-state and memory"; node/prediction.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from node.consciousness import ConsciousnessState
from node.consciousness_fields import FIELDS, member

# members that move by themselves: (share, amount); a change of more than both is news. None: never
NOISE: Final[dict[str, tuple[float, float] | None]] = {
    "identity.uptime_s": None,
    "memory.entries": None,
    "memory.last_write_ms": None,
    "memory.head_id": None,
    "memory.head_hash": None,
    "load.tokens_s": (0.1, 1.0),
    "load.loop_lag_ms": (0.5, 10.0),
    "body.rss_bytes": (0.05, 4 << 20),
    "body.accelerator_bytes": (0.05, 4 << 20),
    "body.disk_free_bytes": (0.02, 64 << 20),
    "social.success_mean": (0.0, 0.02),  # fading makes it drift
    "social.success_least": (0.0, 0.02),
    "social.rtt_ms": (0.25, 5.0),
}
HOUR_S: Final = 3_600.0


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1


@dataclass(slots=True)
class Period:
    """One period while it lasts: `figures` has the names of node.prediction.FORETOLD."""

    means: dict[str, _Mean] = field(default_factory=dict)

    def answered(self, took_s: float) -> None:
        """A request was answered in full, after so many seconds."""
        self._add("latency_s", max(0.0, took_s))

    def looked(self, active_requests: int | None, live_peers: int) -> None:
        """A look at the node, of several a period. active_requests: None where nothing answers here."""
        if active_requests is not None:
            self._add("active_requests", active_requests)
        self._add("live_peers", live_peers)

    def held_out(self, nll_nats: float) -> None:
        """A look at held-out text, nats a token."""
        self._add("loss_nats", nll_nats)

    def figures(self) -> dict[str, float]:
        """The means of what was measured."""
        return {name: mean.total / mean.count for name, mean in self.means.items()}

    def _add(self, name: str, value: float) -> None:
        self.means.setdefault(name, _Mean()).add(value)


def is_news(before: ConsciousnessState, now: ConsciousnessState) -> bool:
    """Whether the second says anything that the first does not, clocks and noise apart."""
    return any(_moved(row.path, member(before, row.path), member(now, row.path)) for row in FIELDS)


def _moved(path: str, before: object, now: object) -> bool:
    if before == now or (noise := NOISE.get(path, (0.0, 0.0))) is None:
        return False
    if not isinstance(before, int | float) or not isinstance(now, int | float):
        return True
    share, amount = noise
    return abs(now - before) > max(share * abs(before), amount)


class Quota:
    """How many events a source may have in an hour, and all together. Times are monotonic seconds."""

    def __init__(self, each_max: int, all_max: int) -> None:
        self._each_max, self._all_max = each_max, all_max
        self._began_s = float("-inf")
        self._counts: dict[str, int] = {}
        self._all = 0

    def takes(self, source: str, now_s: float) -> bool:
        """Whether one more may be kept; then it is counted."""
        if now_s - self._began_s >= HOUR_S:
            self._began_s, self._all = now_s, 0
            self._counts.clear()
        count = self._counts.get(source, 0)
        if count >= self._each_max or self._all >= self._all_max:
            return False
        self._counts[source] = count + 1
        self._all += 1
        return True
