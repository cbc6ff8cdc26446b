"""What each peer's deltas have been worth to this node: the fall of its own held-out loss, smoothed over rounds.

Rules: core, no torch. One round's score is noisy (16 sequences), so what a node publishes, and what the gate takes the
median of, is an exponential average in integers, parts of gate.ONE nats. One round counts for at most FALL_MAX_NATS, so
that no single fluke or overflow decides for long. Who is not scored for ROUNDS_MAX rounds starts anew.
Source: Gauntlet (templar); TRAINING.md 4.
"""

from __future__ import annotations

import math
from typing import Final

from model.gate import ONE

SHARE: Final = 4  # a new score counts for 1 / SHARE: three quarters of a reputation are gone after five bad rounds
FALL_MAX_NATS: Final = 1.0  # per 0.2 of a delta; honest ones give hundredths
ROUNDS_MAX: Final = 100  # the model has moved on, and so may have the peer's data
PEERS_MAX: Final = 1_024  # scored by one node; the one not scored for longest is forgotten first


class Scores:
    """The averages of one run, by peer."""

    def __init__(self) -> None:
        self._averages: dict[str, tuple[int, int]] = {}  # peer -> (parts, round), the longest unscored first

    def note(self, peer: str, round_index: int, fall_nats: float) -> int:
        """Take in how far this node's held-out loss fell with the peer's delta; the new average, parts of ONE.

        A fall that is not a number (the loss overflowed) counts as the worst there is.
        """
        bounded = -FALL_MAX_NATS if math.isnan(fall_nats) else max(-FALL_MAX_NATS, min(fall_nats, FALL_MAX_NATS))
        score = int(bounded * ONE)
        known = self._averages.pop(peer, None)
        if known is not None and round_index - known[1] <= ROUNDS_MAX:
            score = known[0] + (score - known[0]) // SHARE
        self._averages[peer] = (score, round_index)
        if len(self._averages) > PEERS_MAX:
            del self._averages[next(iter(self._averages))]
        return score

    def published(self, round_index: int) -> dict[str, int]:
        """peer -> average, parts of ONE, of all scored within the last ROUNDS_MAX rounds."""
        return {peer: parts for peer, (parts, scored) in self._averages.items() if round_index - scored <= ROUNDS_MAX}

    def dump(self) -> list[list[str | int]]:
        """What to save, as plain values."""
        return [[peer, parts, scored] for peer, (parts, scored) in self._averages.items()]

    @classmethod
    def load(cls, rows: list[list[str | int]]) -> Scores:
        """What `dump` gave. Our own file, so that a row that does not fit is a bug."""
        scores = cls()
        for peer, parts, scored in rows:
            assert isinstance(peer, str)
            scores._averages[peer] = (int(parts), int(scored))
        return scores
