"""When a node does not train: the operator said so, it is not its hour, it runs on its battery, or it will be busy.

Rules: core; what the clock, the battery and the node's own prediction say comes in. Requests come first anyway, since
training borrows the engine's thread between them; but a round that is worked at in the gaps of a busy hour is late for
everybody, and each loan holds up who comes meanwhile. So a node that expects to be busy sits rounds out and says so.
Requests active on average are their rate times their latency (Little's law), so that what training itself costs them
is in the figure. It goes on below a lower load than it stopped at, and changes its mind seldom. However busy, it
trains for GRANT_S after each STARVED_S, so that a network that is always busy still learns.
Source: TRAINING.md 6; J. D. C. Little, "A proof for the queuing formula L = lambda W" (1961).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from node.prediction import Expected

BUSY_REQUESTS: Final = 0.7  # active on average: the thread is free for less than a third of the time
QUIET_REQUESTS: Final = 0.3
STAY_S: Final = 30.0  # between two changes of mind: about a round's work
STARVED_S: Final = 1_800.0
GRANT_S: Final = 300.0
HOURS_PATTERN = r"([01]?[0-9]|2[0-3])-([01]?[0-9]|2[0-4])"


@dataclass(frozen=True, slots=True, kw_only=True)
class PausePolicy:
    """hours: local, from and to, over midnight if from is later; None: at any hour. on_battery: train there too.
    expects: active requests, as the node foretells itself; None: nothing is known, or load is to be no reason."""

    hours: tuple[int, int] | None = None
    on_battery: bool = False
    expects: Callable[[], Expected | None] = lambda: None

    def why(self, *, paused: bool, hour: int, plugged: bool | None, load: str = "") -> str:
        """Why not to train now; '' when nothing speaks against it. plugged: None when there is no battery. load: what
        LoadRoom says."""
        if paused:
            return "paused by the operator: `python -m node train resume` goes on"
        if self.hours is not None and not _within(hour, self.hours):
            return f"it trains from {self.hours[0]} to {self.hours[1]} o'clock only (train_hours)"
        if plugged is False and not self.on_battery:
            return "the machine runs on its battery (train_on_battery allows that)"
        return load


class LoadRoom:
    """Whether the load that the node expects leaves room to train. `now` is monotonic seconds."""

    def __init__(self, stay_s: float = STAY_S) -> None:
        self._stay_s, self._is_busy = stay_s, False
        self._since = self._granted_at = float("-inf")

    def why(self, expected: Expected | None, now: float) -> str:
        """Why not to train now; '' when there is room. expected: active requests; None: nothing is known, so there
        is. To be asked as often as one likes."""
        if expected is None:
            self._turn(False, now)
            return ""
        if now >= self._since + self._stay_s:
            self._turn(expected.value >= (QUIET_REQUESTS if self._is_busy else BUSY_REQUESTS), now)
        if not self._is_busy or self._is_granted(now):
            return ""
        return (
            f"its predicted load leaves no room: {expected.value:.1f} requests are expected at a time, and it goes on "
            f"below {QUIET_REQUESTS} (train_when_busy trains all the same)"
        )

    def _turn(self, is_busy: bool, now: float) -> None:
        if is_busy != self._is_busy:
            self._is_busy, self._since = is_busy, now

    def _is_granted(self, now: float) -> bool:
        """Whether it has rested so long that it trains for a while."""
        if now >= max(self._since, self._granted_at + GRANT_S) + STARVED_S:
            self._granted_at = now
        return now < self._granted_at + GRANT_S


def hours_of(text: str) -> tuple[int, int]:
    """ "22-6" -> (22, 6). Raises ValueError that says what is wanted."""
    found = re.fullmatch(HOURS_PATTERN, text)
    if found is None or int(found[1]) == int(found[2]):
        raise ValueError(f"{text!r} is not FROM-TO in hours of the day, as 22-6")
    return int(found[1]), int(found[2])


def _within(hour: int, hours: tuple[int, int]) -> bool:
    begin, end = hours
    return begin <= hour < end if begin < end else hour >= begin or hour < end
