"""How much of something may be had in a second, and a little at once: tokens by key, and bytes that wait their turn.

Rules: core. A bucket is asked before anything costly is done for a stranger; buckets are bounded in number, and one
that is forgotten is full again. What is not known beforehand is charged as an estimate and settled afterwards: what
was not used comes back, what was used beyond it is owed. Whoever spends bytes is told how long to wait before it
sends; those who wait are served in the order in which they asked, because each one's time lies after the last one's.
Source: the generic cell rate algorithm (ITU-T I.371).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(slots=True)
class _Bucket:
    tokens: float
    at_s: float


class Buckets:
    """One token bucket for each key; a key that was not heard of for long is forgotten, which only fills its bucket."""

    def __init__(self, *, rate_per_s: float, burst: float, keys_max: int = 4096) -> None:
        assert rate_per_s > 0
        assert burst >= 1
        self._rate_per_s, self._burst, self._keys_max = rate_per_s, burst, keys_max
        self._buckets: dict[Hashable, _Bucket] = {}  # least recently used first

    def take(self, key: Hashable, now: float, cost: float = 1.0) -> bool:
        """Take `cost` tokens; False when there are fewer, and then none is taken."""
        bucket = self._filled(key, now)
        if bucket.tokens < cost:
            return False
        bucket.tokens -= cost
        return True

    def wait_s(self, key: Hashable, now: float, cost: float = 1.0) -> float:
        """Seconds until `take` of this cost succeeds when nobody else takes; infinite when it is over the burst."""
        if cost > self._burst:
            return float("inf")
        return max(0.0, (cost - self._filled(key, now).tokens) / self._rate_per_s)

    def settle(self, key: Hashable, charged: float, used: float) -> None:
        """Of what was taken, give back what was not used; what was used beyond it is owed."""
        assert charged >= 0
        assert used >= 0
        bucket = self._buckets.get(key)
        if bucket is not None:  # a forgotten one is full again
            bucket.tokens = min(self._burst, bucket.tokens + charged - used)

    def _filled(self, key: Hashable, now: float) -> _Bucket:
        bucket = self._buckets.pop(key, None)
        if bucket is None:
            bucket = _Bucket(self._burst, now)
            if len(self._buckets) >= self._keys_max:
                del self._buckets[next(iter(self._buckets))]
        self._buckets[key] = bucket
        if now > bucket.at_s:
            bucket.tokens = min(self._burst, bucket.tokens + (now - bucket.at_s) * self._rate_per_s)
        bucket.at_s = now
        return bucket

    def __len__(self) -> int:
        return len(self._buckets)


class Allowance:
    """Bytes a second. Times are monotonic seconds of the caller."""

    def __init__(self, bytes_per_s: float, burst_bytes: int) -> None:
        """burst_bytes: how much may go at once after a rest."""
        assert bytes_per_s > 0, "the configuration was checked"
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._paid_until = float("-inf")

    def spend(self, size_bytes: int, now: float) -> float:
        """Spend, and say how many seconds to wait before these bytes are sent."""
        self._paid_until = max(self._paid_until, now - self._burst_s) + size_bytes / self._bytes_per_s
        return max(0.0, self._paid_until - now)
