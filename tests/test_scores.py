"""Scores: averages of what peers' deltas were worth."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.gate import ONE
from model.scores import FALL_MAX_NATS, PEERS_MAX, ROUNDS_MAX, Scores


def test_the_first_score_is_taken_as_it_is_and_later_ones_by_a_quarter() -> None:
    scores = Scores()
    assert scores.note("a", 1, 0.5) == ONE // 2
    assert scores.note("a", 2, 0.1) == ONE // 2 + (int(0.1 * ONE) - ONE // 2) // 4
    assert scores.published(2) == {"a": scores.note("b", 2, 0.5) + (int(0.1 * ONE) - ONE // 2) // 4}


@pytest.mark.parametrize(("fall", "counts"), [(math.nan, -1), (-math.inf, -1), (math.inf, 1), (-9.0, -1)])
def test_one_round_is_bounded(fall: float, counts: int) -> None:
    assert Scores().note("a", 1, fall) == int(counts * FALL_MAX_NATS * ONE)


def test_a_peer_that_turns_bad_is_known_after_few_rounds() -> None:
    scores = Scores()
    for round_index in range(50):
        scores.note("a", round_index, 0.02)
    falls = [scores.note("a", 50 + at, -0.02) for at in range(4)]
    assert falls[0] > 0 > falls[-1]


def test_who_is_not_scored_for_long_starts_anew() -> None:
    scores = Scores()
    scores.note("a", 1, 1.0)
    assert scores.published(1 + ROUNDS_MAX) == {"a": ONE}
    assert scores.published(2 + ROUNDS_MAX) == {}
    assert scores.note("a", 2 + ROUNDS_MAX, -0.5) == -ONE // 2


def test_the_one_not_scored_for_longest_makes_room() -> None:
    scores = Scores()
    scores.note("old", 1, 0.5)
    scores.note("used", 1, 0.5)
    for at in range(PEERS_MAX - 2):
        scores.note(f"p{at}", 1, 0.5)
    scores.note("used", 2, 0.5)
    scores.note("new", 2, 0.5)
    published = scores.published(2)
    assert len(published) == PEERS_MAX
    assert "old" not in published
    assert {"used", "new", "p0"} <= published.keys()


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 300), st.floats())))
def test_a_restart_changes_nothing(history: list[tuple[str, int, float]]) -> None:
    scores = Scores()
    for peer, round_index, fall in history:
        assert abs(scores.note(peer, round_index, fall)) <= FALL_MAX_NATS * ONE
    again = Scores.load(json.loads(json.dumps(scores.dump())))
    assert again.published(150) == scores.published(150)
    assert again.note("a", 301, 0.25) == scores.note("a", 301, 0.25)
