"""What decisions take from the self-state: a prediction of now that has held so far, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from node.consciousness import ConsciousnessState, Forecasts, SelfPrediction
from node.expectations import INSIDE_MIN, OUTCOMES_MIN, expected
from node.prediction import Expected, Prediction

ACTIVE = Expected(value=2.0, naive=1.0, low=0.5, high=3.5)


@dataclass
class Self:
    """A self-state of these figures."""

    state: ConsciousnessState
    prediction: Prediction | None


def itself(outcomes: int | None = OUTCOMES_MIN, inside: float | None = 0.8, *, told: bool = True) -> Self:
    held = SelfPrediction(active_requests=Forecasts(outcomes=outcomes, inside=inside))
    prediction = Prediction(from_ms=1_000, to_ms=2_000, figures={"active_requests": ACTIVE})
    return Self(ConsciousnessState(self_prediction_error=held), prediction if told else None)


def test_a_prediction_that_held_is_read() -> None:
    assert expected(itself(), "active_requests", 1_500) is ACTIVE
    assert expected(itself(), "latency_s", 1_500) is None  # of which nothing is foretold


@pytest.mark.parametrize(
    "of",
    [
        None,
        itself(told=False),
        itself(outcomes=OUTCOMES_MIN - 1),
        itself(outcomes=None, inside=None),
        itself(inside=INSIDE_MIN - 0.01),
    ],
    ids=["no self-state", "no prediction", "too few outcomes", "never measured", "it did not hold"],
)
def test_what_has_not_held_is_not(of: Self | None) -> None:
    assert expected(of, "active_requests", 1_500) is None


def test_an_old_prediction_is_none() -> None:
    assert expected(itself(), "active_requests", 3_000) is ACTIVE
    assert expected(itself(), "active_requests", 3_001) is None
