"""When a node does not train: the operator said so, it is not its hour, or the machine runs on its battery.

Rules: core; what the clock and the battery say comes in. That requests come first needs no rule here: training borrows
the engine's thread between them.
Source: TRAINING.md 6.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HOURS_PATTERN = r"([01]?[0-9]|2[0-3])-([01]?[0-9]|2[0-4])"


@dataclass(frozen=True, slots=True, kw_only=True)
class PausePolicy:
    """hours: local, from and to, over midnight if from is later; None: at any hour. on_battery: train there too."""

    hours: tuple[int, int] | None = None
    on_battery: bool = False

    def why(self, *, paused: bool, hour: int, plugged: bool | None) -> str:
        """Why not to train now; '' when nothing speaks against it. plugged: None when there is no battery."""
        if paused:
            return "paused by the operator: `python -m node train resume` goes on"
        if self.hours is not None and not _within(hour, self.hours):
            return f"it trains from {self.hours[0]} to {self.hours[1]} o'clock only (train_hours)"
        if plugged is False and not self.on_battery:
            return "the machine runs on its battery (train_on_battery allows that)"
        return ""


def hours_of(text: str) -> tuple[int, int]:
    """ "22-6" -> (22, 6). Raises ValueError that says what is wanted."""
    found = re.fullmatch(HOURS_PATTERN, text)
    if found is None or int(found[1]) == int(found[2]):
        raise ValueError(f"{text!r} is not FROM-TO in hours of the day, as 22-6")
    return int(found[1]), int(found[2])


def _within(hour: int, hours: tuple[int, int]) -> bool:
    begin, end = hours
    return begin <= hour < end if begin < end else hour >= begin or hour < end
