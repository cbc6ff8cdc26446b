"""How often one kind of log line may be written, so that no peer can fill the disk with our log.

Rules: core. A kind is a logger and the text of its line before anything is put into it: our code's choice, never a
peer's. LINES_BURST lines of a kind, then one in LINE_EVERY_S; the next one that is written says how many were left out.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

LINES_BURST = 10.0
LINE_EVERY_S = 10.0
KINDS_MAX = 512  # remembered; the longest unseen is forgotten


class LogPace:
    """One token bucket a kind. Times are monotonic seconds."""

    def __init__(self) -> None:
        self._kinds: OrderedDict[tuple[str, str], tuple[float, float, int]] = (
            OrderedDict()
        )  # lines left, when, left out
        self.left_out: Counter[str] = Counter()  # by logger, since start

    def take(self, logger: str, text: str, now: float) -> int | None:
        """None: leave the line out. Else how many of its kind were left out since the last one that was written."""
        kind = (logger, text)
        lines, at, missing = self._kinds.pop(kind, (LINES_BURST, now, 0))
        lines = min(LINES_BURST, lines + max(0.0, now - at) / LINE_EVERY_S)
        written = lines >= 1.0
        self._kinds[kind] = (lines - 1.0, now, 0) if written else (lines, now, missing + 1)
        if len(self._kinds) > KINDS_MAX:
            self._kinds.popitem(last=False)
        if not written:
            self.left_out[logger] += 1
        return missing if written else None
