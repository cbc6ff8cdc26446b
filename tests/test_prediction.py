"""What a node foretells of itself, how it is scored, and the arithmetic of its self-state."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from node.averages import (
    BINS,
    Bin,
    binned,
    calibration_error,
    cosine,
    equal_share,
    gaps_of,
    mixed,
    spread,
    weight_of,
)  # fmt: skip
from node.consciousness import ConsciousnessState
from node.errors import BadFigure
from node.facts import Happened
from node.memory import apply
from node.prediction import (
    FORETOLD,
    LEVEL_WEIGHT,
    SKILL_LEAST,
    Expected,
    Prediction,
    Predictor,
    resumed,
    score,
    skill_of,
)  # fmt: skip
from tests.facts_world import AMOUNTS

PERIOD_MS = 60_000


def lived(values: list[float]) -> tuple[Predictor, ConsciousnessState]:
    """A node that foretells each period's latency, and measures it."""
    predictor, state = Predictor(), ConsciousnessState()
    for at, value in enumerate(values):
        foretold = predictor.predict(at * PERIOD_MS, PERIOD_MS)
        state = apply(Happened(outcome=score(foretold, {"latency_s": value}, at)), state)
        predictor = predictor.observed({"latency_s": value})
    return predictor, state


def test_nothing_is_foretold_before_two_periods_were_measured() -> None:
    predictor = Predictor()
    assert predictor.predict(0, PERIOD_MS).figures == {}
    predictor = predictor.observed({"latency_s": 2.0})
    assert predictor.predict(0, PERIOD_MS).figures == {}
    told = predictor.observed({"latency_s": 4.0, "live_peers": 1.0}).predict(5, PERIOD_MS)
    assert told == Prediction(
        from_ms=5,
        to_ms=5 + PERIOD_MS,
        figures={"latency_s": Expected(value=3.0, naive=4.0, low=0.0, high=3.0 + 1.61 * 2.0)},
    )


def test_errors_are_scored_in_their_unit_and_against_as_now() -> None:
    figures = {"latency_s": Expected(value=3.0, naive=5.0, low=2.0, high=4.0)}
    told = Prediction(from_ms=0, to_ms=1, figures=figures)
    one = score(told, {"latency_s": 3.5, "live_peers": 2.0}, 7).figures
    assert one.keys() == {"latency_s"}
    assert (one["latency_s"].error, one["latency_s"].naive_error, one["latency_s"].is_inside) == (0.5, -1.5, True)
    assert score(told, {"latency_s": 4.5}, 7).figures["latency_s"].is_inside is False
    assert (skill_of(0.5, 1.5), skill_of(1.0, 0.0)) == (pytest.approx(2 / 3), None)
    assert skill_of(1e15, 5e-324) == SKILL_LEAST


def test_intervals_hold_the_share_that_they_are_meant_to() -> None:
    """Errors of a fixed set that is as uneven as Laplace's: about 0.8 inside, and better than "as now"."""
    quantiles = [
        math.copysign(math.log(1 - abs(2 * ((n * 37 % 100) + 0.5) / 100 - 1)), (n * 37 % 100) - 50) for n in range(600)
    ]
    _, state = lived([20.0 + 2.0 * each for each in quantiles])
    told = state.self_prediction_error.latency_s
    assert told.outcomes == 598
    assert told.inside is not None
    assert told.skill is not None
    assert 0.7 <= told.inside <= 0.9
    assert told.skill > 0.1
    assert state.self_prediction_error.live_peers.outcomes is None


def test_a_walk_is_foretold_best_by_as_now_and_the_node_says_so() -> None:
    _, state = lived([float(n) for n in range(200)])
    told = state.self_prediction_error.latency_s
    assert told.naive_error == pytest.approx(1.0)
    assert told.skill is not None
    assert told.skill < -1.0  # an exponential mean lags a slope by 1/LEVEL_WEIGHT


@settings(max_examples=60, deadline=None)
@given(st.lists(AMOUNTS, min_size=2, max_size=30))
def test_levels_stay_within_what_was_measured_and_outlive_a_restart(values: list[float]) -> None:
    predictor, _ = lived(values)
    told = predictor.predict(0, PERIOD_MS)
    each = told.figures["latency_s"]
    assert min(values) <= each.value <= max(values)
    assert 0.0 <= each.low <= each.value <= each.high
    again = resumed(told).predict(0, PERIOD_MS).figures["latency_s"]
    assert (again.value, again.naive) == (each.value, each.naive)
    assert again.high == pytest.approx(each.high)
    after = resumed(told).observed({"latency_s": 1.0}).levels["latency_s"].value
    assert after == pytest.approx(each.value + LEVEL_WEIGHT * (1.0 - each.value))


def test_figures_that_are_none_are_refused_before_they_are_averaged() -> None:
    for bad in (math.nan, math.inf, -1.0, 1e300):
        with pytest.raises(BadFigure):
            Predictor().observed({"latency_s": bad})
    with pytest.raises(BadFigure, match="mood"):
        Predictor().observed({"mood": 1.0})
    with pytest.raises(BadFigure, match="foretold are"):
        score(Prediction(from_ms=0, to_ms=1, figures={}), {"mood": 1.0}, 1)
    with pytest.raises(BadFigure, match="ends before"):
        Prediction(from_ms=2, to_ms=1, figures={})
    assert len(FORETOLD) == 4


# --- arithmetic ---


def test_the_calibration_error_of_an_example_worked_by_hand() -> None:
    """Bins of 0.1: (0.8, 0.9] has 0.85 and 0.9, one right: gap 1.75 - 1 = 0.75. (0.5, 0.6] has 0.6, 0.6 and 0.55, all
    right: gap 1.75 - 3 = -1.25. (0, 0.1] has 0 and 0.1, none right: gap 0.1. ECE = (0.75 + 1.25 + 0.1) / 7 = 0.3."""
    bins = binned([(0.85, True), (0.9, False), (0.6, True), (0.6, True), (0.55, True), (0.0, False), (0.1, False)])
    assert [each.tokens for each in bins] == [2, 0, 0, 0, 0, 3, 0, 0, 2, 0]
    assert calibration_error(gaps_of(bins), 7) == pytest.approx(0.3)
    guo = sum(
        each.tokens / 7 * abs(each.correct / each.tokens - each.confidence_sum / each.tokens)
        for each in bins
        if each.tokens
    )
    assert calibration_error(gaps_of(bins), 7) == pytest.approx(guo)
    assert calibration_error((0.0,) * BINS, 0) is None
    assert binned([(1.0, True)])[-1] == Bin(tokens=1, confidence_sum=1.0, correct=1)
    for bad in (math.nan, -0.1, 1.1):
        with pytest.raises(BadFigure):
            binned([(bad, True)])
    for wrong in (
        {"correct": 3},
        {"confidence_sum": 2.5},
        {"confidence_sum": math.nan},
        {"correct": -1},
        {"tokens": 1 << 41},
    ):
        with pytest.raises(BadFigure):
            Bin(**{"tokens": 2, "confidence_sum": 1.0, "correct": 1, **wrong})  # type: ignore[arg-type]  # of both kinds


def test_likeness_of_vectors_and_answers() -> None:
    assert cosine([1.0, 0.0], [1.0, 1.0]) == pytest.approx(math.sqrt(0.5))
    assert cosine([1e300, 0.0], [-1e300, 0.0]) == -1.0
    assert cosine([1.7e308, 1.7e308], [1.7e308, 1.7e308]) == pytest.approx(1.0)
    assert cosine([5e-324, 0.0], [1.0, 0.0]) == 1.0
    assert cosine([0.0], [1.0]) is None
    with pytest.raises(BadFigure, match="1 and 2"):
        cosine([1.0], [1.0, 2.0])
    with pytest.raises(BadFigure, match="finite"):
        cosine([math.nan], [1.0])
    assert (equal_share([1, 2, 3, 4], [1, 9, 3]), equal_share([], [])) == (0.5, None)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=40))
def test_means_and_variances_are_those_of_a_list_until_the_window(values: list[float]) -> None:
    mean, variance = values[0], 0.0
    for seen, value in enumerate(values[1:], 1):
        weight = weight_of(1, seen, 100)
        mean, variance = mixed(mean, value, weight), spread(mean, variance, value, weight)
    wanted = math.fsum(values) / len(values)
    assert mean == pytest.approx(wanted, abs=1e-6)
    assert variance == pytest.approx(math.fsum((each - wanted) ** 2 for each in values) / len(values), abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(AMOUNTS, AMOUNTS, st.floats(0, 1))
def test_a_mean_never_steps_over_its_ends(mean: float, value: float, weight: float) -> None:
    assert min(mean, value) <= mixed(mean, value, weight) <= max(mean, value)
    assert mixed(1e6, 0.1, 1.0) == 0.1  # 0.1 - 1e6 is rounded, and 1e6 more of it is less than 0.1


def test_the_weight_of_many_at_once_is_that_of_one_after_the_other() -> None:
    assert (weight_of(1, 0, 100), weight_of(5, 0, 100)) == (1.0, 1.0)
    assert weight_of(1, 10**9, 100) == pytest.approx(0.01)
    assert weight_of(100, 10**9, 100) == pytest.approx(1 - 0.99**100)
