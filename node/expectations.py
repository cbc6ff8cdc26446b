"""What a node's decisions may take from its self-state: a figure that it foretells, if such foretellings held.

Rules: core, pure. A prediction counts for its own period and one more, in case its successor is late, and only once
OUTCOMES_MIN of its kind were measured and at least INSIDE_MIN of them lay inside the interval that was to hold them;
else there is none, and whoever decides does as if nothing were foretold.
Source: SELF.md, "Used".
"""

from __future__ import annotations

from typing import Final, Protocol

from node.consciousness import ConsciousnessState, Forecasts
from node.prediction import Expected, Prediction

OUTCOMES_MIN: Final = 5
INSIDE_MIN: Final = 0.5  # of intervals that are meant to hold 0.8


class Itself(Protocol):
    """The part of node.self_face.SelfFace that is asked."""

    @property
    def state(self) -> ConsciousnessState:
        """What was measured, now."""

    @property
    def prediction(self) -> Prediction | None:
        """What is expected of the period under way."""


def expected(itself: Itself | None, name: str, now_ms: int) -> Expected | None:
    """What the node expects of this figure now; None: nothing that it may rely on."""
    prediction = None if itself is None else itself.prediction
    if itself is None or prediction is None or now_ms > 2 * prediction.to_ms - prediction.from_ms:
        return None
    forecasts: Forecasts = getattr(itself.state.self_prediction_error, name)
    if (forecasts.outcomes or 0) < OUTCOMES_MIN or (forecasts.inside or 0.0) < INSIDE_MIN:
        return None
    return prediction.figures.get(name)
