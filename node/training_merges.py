"""Committed rounds of a run, as facts of the node's self-state, each once.

Rules: core. A round is told when its loss was measured, or when none will be: a later round is there, the run tells no
losses, or LOOKS_MAX looks were in vain.
Source: SELF.md, `learning`; node/training_weights.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, Protocol

from node.facts import Merged
from node.training_round import RoundTold

LOOKS_MAX: Final = 6  # at intervals of SAMPLE_S: judging takes seconds, and waits for requests


class Rounds(Protocol):
    """Where committed rounds are told, the oldest first."""

    @property
    def run(self) -> str:
        """Its id, hex."""

    @property
    def rounds(self) -> Iterable[RoundTold]:
        """The newest, oldest first."""


class Merges:
    """Of the run that this node is in."""

    def __init__(self) -> None:
        self._run, self._told, self._looks = "", -1, 0

    def since(self, weights: Rounds, *, is_last: bool) -> list[Merged]:
        """Rounds that were not told yet, oldest first. is_last: there is no later look."""
        run, rounds = weights.run, weights.rounds
        if run != self._run:
            self._run, self._told, self._looks = run, -1, 0
        fresh = [each for each in rounds if each.round > self._told]
        if fresh and fresh[-1].held_out_loss is None and not is_last:
            self._looks += 1
            if self._looks < LOOKS_MAX:
                fresh.pop()
        if fresh:
            self._told, self._looks = fresh[-1].round, 0
        return [_merged(run, each) for each in fresh]


def _merged(run: str, told: RoundTold) -> Merged:
    reasons = Counter(word.replace(" ", "_") for word in told.reasons.values())
    return Merged(
        run=run,
        round=told.round,
        accepted=len(told.contributed),
        rejected=dict(reasons),
        loss_before_nats=told.held_out_before,
        loss_after_nats=told.held_out_loss,
    )
