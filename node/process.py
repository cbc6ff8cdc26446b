"""What this process costs the machine, and how late its loop is.

Rules: shell; one task (`watch`). The loop's lag is told truthfully: looks are due at fixed times, so that those missed
while it stood still count too, each as late as it came. The machine's own sleep is no lag.
Source: Gil Tene, "How NOT to Measure Latency" (coordinated omission); Prometheus, "Process metrics".
"""

from __future__ import annotations

import math
from typing import Any, Final

import psutil
import trio

from model.histogram import LAG_S, Histogram
from node.tallies import percentiles

LOOK_EVERY_S: Final = 0.5
SLEPT_S: Final = 60.0  # who comes back so late was asleep, or stopped by its user


class Process:
    """This process. Figures that the machine does not tell are left out."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self.lag_s = Histogram(LAG_S)

    async def watch(self) -> None:
        """Look how late the loop comes, for as long as the node runs."""
        due = trio.current_time()
        while True:
            due += LOOK_EVERY_S
            await trio.sleep_until(due)
            late_s = trio.current_time() - due
            if late_s > SLEPT_S:
                due += math.floor(late_s / LOOK_EVERY_S) * LOOK_EVERY_S
                continue
            self.lag_s.observe(late_s)

    def told(self) -> dict[str, Any]:
        """What the status says of it, beside the rest of the node."""
        with self._process.oneshot():
            times = self._process.cpu_times()
            told: dict[str, Any] = {
                "rss_bytes": self._process.memory_info().rss,
                "cpu_s": round(times.user + times.system, 3),
                "threads": self._process.num_threads(),
                "started_s": self._process.create_time(),
            }
        if hasattr(self._process, "num_fds"):  # not on Windows
            told["open_files"] = self._process.num_fds()
        return {**told, "loop_lag_s": percentiles(self.lag_s.read())}
