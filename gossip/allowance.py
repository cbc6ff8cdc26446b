"""How fast bytes may go out: so many a second, and a little at once.

Rules: core. Whoever spends is told how long to wait before it sends; those who wait are served in the order in which
they asked, because each one's time lies after the last one's.
Source: the generic cell rate algorithm (ITU-T I.371).
"""

from __future__ import annotations


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
