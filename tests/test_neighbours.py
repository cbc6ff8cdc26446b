"""p2p/neighbours.py: how much gossip a neighbour may hand on."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.identity import PeerId
from p2p.neighbours import (
    NEIGHBOURS_MAX,
    SIGNATURES_BURST,
    SIGNATURES_PER_S,
    UNITS_BURST,
    UNITS_PER_S,
    WAIT_S_MAX,
    Neighbours,
)

EVE, BOB = PeerId("eve"), PeerId("bob")


def test_a_flood_is_out_within_three_seconds_and_few_signatures_are_checked() -> None:
    neighbours, now, checked = Neighbours(), 0.0, 0
    while not neighbours.is_out(EVE, now):
        checked += neighbours.may_check(EVE, now)
        assert neighbours.may_check(BOB, now), "another has a share of its own"
        now += 1 / 150
        for _ in range(60):
            checked += neighbours.may_check(EVE, now)
        assert now < 3.0
    assert checked <= SIGNATURES_BURST + SIGNATURES_PER_S * now + 1


def test_one_burst_is_forgiven() -> None:
    neighbours = Neighbours()
    for _ in range(int(SIGNATURES_BURST) + 500):
        neighbours.may_check(EVE, 0.0)
    assert not neighbours.is_out(EVE, 0.0)
    for _ in range(int(SIGNATURES_BURST) + 500):
        neighbours.may_check(EVE, 60.0)
    assert not neighbours.is_out(EVE, 60.0)


def test_forged_messages_are_strikes() -> None:
    neighbours = Neighbours()
    neighbours.strike(EVE, 0.0)
    neighbours.strike(EVE, 0.5)
    assert not neighbours.is_out(EVE, 0.5), "one a second counts"
    neighbours.strike(EVE, 2.0)
    assert neighbours.is_out(EVE, 2.0)


def test_to_come_back_at_once_is_no_new_chance() -> None:
    neighbours = Neighbours()
    for now in (0.0, 1.5):
        neighbours.strike(EVE, now)
    assert neighbours.is_out(EVE, 3.1)
    assert not neighbours.is_out(EVE, 60.0)


def test_reading_is_slowed_to_a_rate() -> None:
    neighbours, now, units = Neighbours(), 0.0, 0
    while now < 60.0:
        wait_s = neighbours.read(EVE, 50, now)
        assert wait_s <= WAIT_S_MAX
        units += 50
        now += wait_s + 0.001
    assert units <= UNITS_BURST + UNITS_PER_S * 60 + 50


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2), st.integers(0, 300)), max_size=12))
def test_no_more_is_granted_than_the_rate(history: list[tuple[float, int]]) -> None:
    neighbours, now, granted = Neighbours(), 0.0, 0
    for wait_s, count in history:
        now += wait_s
        granted += sum(neighbours.may_check(EVE, now) for _ in range(count))
    assert granted <= SIGNATURES_BURST + SIGNATURES_PER_S * now + 1


def test_ten_thousand_neighbours_take_no_room() -> None:
    neighbours = Neighbours()
    for number in range(10_000):
        neighbours.read(PeerId(str(number)), 1, float(number))
    assert len(neighbours) == NEIGHBOURS_MAX
