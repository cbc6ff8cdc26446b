"""gossip/flow.py: what a node hears and passes on stays the same in a network of any size, and grows back."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gossip.flow import (
    CROWDED_PER_S,
    HEARD_PER_S,
    PASSED_ON_BURST,
    PASSED_ON_PER_S,
    SHARE_MIN,
    STRETCH_MAX,
    Flow,
)
from gossip.messages import ADVERT_LIFE_MS, ADVERT_LIFE_MS_MAX


def live(flow: Flow, publishers: float, seconds: int, *, begin: int = 0, refresh_s: float = 10.0) -> float:
    """`publishers` speak as we do, and all pass on what we pass on. Returns what was heard a second at the end."""
    owed = heard = 0.0
    for second in range(begin, begin + seconds):
        flow.tick(float(second))
        heard = publishers * flow.share / (refresh_s * flow.stretch)
        owed += heard
        while owed >= 1.0:
            owed -= 1.0
            flow.passes_on(0.0, float(second))
    return heard


def test_a_small_network_is_heard_in_full() -> None:
    flow = Flow()
    live(flow, 30, 600)
    assert (flow.stretch, flow.share) == (1.0, 1.0)
    assert flow.life_ms == ADVERT_LIFE_MS


def test_more_peers_speak_less_often_before_anybody_goes_unheard() -> None:
    flow = Flow()
    heard = live(flow, 200, 900)
    assert heard <= HEARD_PER_S * 1.1
    assert 1.0 < flow.stretch < STRETCH_MAX
    assert flow.share == 1.0
    assert flow.life_ms == round(ADVERT_LIFE_MS * flow.stretch)


@pytest.mark.parametrize("publishers", [1_000, 10_000, 100_000])
def test_in_a_crowd_what_is_heard_does_not_grow(publishers: int) -> None:
    flow = Flow()
    heard = live(flow, publishers, 3_000)
    assert flow.life_ms <= ADVERT_LIFE_MS_MAX
    assert flow.share >= SHARE_MIN
    if publishers * SHARE_MIN / (10 * STRETCH_MAX) < CROWDED_PER_S:
        assert heard <= CROWDED_PER_S * 1.2


def test_it_grows_back_when_the_crowd_has_gone() -> None:
    flow = Flow()
    live(flow, 10_000, 2_000)
    assert flow.share < 1.0
    live(flow, 20, 2_000, begin=2_000)
    assert (flow.stretch, flow.share) == (1.0, 1.0)


def test_a_sudden_crowd_is_not_passed_on_whole() -> None:
    flow = Flow()
    passed = sum(flow.passes_on(0.0, 0.0) for _ in range(10_000))
    assert passed == PASSED_ON_BURST
    assert sum(flow.passes_on(0.0, 1.0) for _ in range(1_000)) == PASSED_ON_PER_S


def test_in_a_crowd_it_is_always_the_same_peers_that_are_passed_on() -> None:
    flow = Flow()
    flow.share = 0.25
    assert [flow.passes_on(place, 0.0) for place in (0.1, 0.24, 0.26, 0.9)] == [True, True, False, False]


@example([(0.0, 0), (2e-309, 1)])  # so short a time tells no rate
@given(st.lists(st.tuples(st.floats(0, 1e5), st.integers(0, 500)), max_size=60))
def test_whatever_comes_it_stays_within_its_bounds(steps: list[tuple[float, int]]) -> None:
    flow, now = Flow(), 0.0
    for wait_s, heard in steps:
        for _ in range(heard):
            flow.passes_on(0.5, now)
        now += wait_s
        flow.tick(now)
        assert 1.0 <= flow.stretch <= STRETCH_MAX
        assert SHARE_MIN <= flow.share <= 1.0
        assert ADVERT_LIFE_MS <= flow.life_ms <= ADVERT_LIFE_MS_MAX
        assert flow.statistics().heard_per_s >= 0.0
