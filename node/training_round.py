"""A round of training that was committed, as it is told.

Rules: core, data only; node/training_weights.py makes it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTold:
    """A committed round, for people. held_out_loss: of the weights that it made, on this node's own text.

    root: the name of those weights as this node has them (hex): equal at all members; '' where a run names them once in
    some rounds (Plan.named_every).
    """

    round: int
    revision: str
    root: str
    contributed: tuple[str, ...]
    sat_out: tuple[str, ...]
    missing: tuple[str, ...]
    not_counted: dict[str, str]  # peer -> why its part has no weight
    reasons: dict[str, str]  # the same, in a word
    rule: str
    why: str
    moved: float
    seconds: float
    held_out_before: float | None = None  # of the weights before it
    held_out_loss: float | None = None
