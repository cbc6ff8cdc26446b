"""When a node does not train: at no hour but its own, not on the battery, not when told, not when it is busy."""

from __future__ import annotations

import pytest

from node.prediction import Expected
from node.training_pause import (
    BUSY_REQUESTS,
    GRANT_S,
    QUIET_REQUESTS,
    STARVED_S,
    STAY_S,
    LoadRoom,
    PausePolicy,
    hours_of,
)


@pytest.mark.parametrize(
    ("text", "open_hours"),
    [
        ("22-6", {22, 23, 0, 1, 2, 3, 4, 5}),
        ("9-17", set(range(9, 17))),
        ("0-24", set(range(24))),
        ("23-0", {23}),
        ("23-24", {23}),
        ("00-1", {0}),
        ("7-07", None),
    ],
)
def test_hours_are_from_and_to_and_may_pass_midnight(text: str, open_hours: set[int] | None) -> None:
    if open_hours is None:
        with pytest.raises(ValueError, match="FROM-TO"):
            hours_of(text)
        return
    policy = PausePolicy(hours=hours_of(text))
    found = {hour for hour in range(24) if not policy.why(paused=False, hour=hour, plugged=True)}
    assert found == open_hours


@pytest.mark.parametrize(
    "text", ["", "22", "22-", "-6", "24-6", "22-25", "6-6", "a-b", "22 - 6", "22-6\n", "٣-4", "3-٤"]
)
def test_what_is_no_hours_is_refused_in_words(text: str) -> None:
    with pytest.raises(ValueError, match="is not FROM-TO in hours of the day, as 22-6"):
        hours_of(text)


def test_at_any_hour_without_hours() -> None:
    assert all(not PausePolicy().why(paused=False, hour=hour, plugged=True) for hour in range(24))
    assert "from 22 to 6 o'clock" in PausePolicy(hours=(22, 6)).why(paused=False, hour=12, plugged=True)


@pytest.mark.parametrize("plugged", [None, True, False])
@pytest.mark.parametrize("on_battery", [True, False])
def test_a_battery_pauses_unless_it_may_be_used(plugged: bool | None, on_battery: bool) -> None:
    why = PausePolicy(on_battery=on_battery).why(paused=False, hour=0, plugged=plugged)
    assert bool(why) == (plugged is False and not on_battery)
    assert not why or "train_on_battery" in why


def test_the_operators_word_comes_first() -> None:
    why = PausePolicy(hours=(22, 6)).why(paused=True, hour=12, plugged=False)
    assert "train resume" in why


def foretold(value: float) -> Expected:
    return Expected(value=value, naive=value, low=0.0, high=2 * value)


def test_a_busy_node_does_not_train_and_says_why() -> None:
    room = LoadRoom()
    assert room.why(foretold(BUSY_REQUESTS - 0.01), 100.0) == ""
    why = room.why(foretold(2.5), 100.0)
    assert "2.5 requests are expected at a time" in why
    assert "train_when_busy" in why
    assert PausePolicy().why(paused=False, hour=0, plugged=None, load=why) == why
    assert PausePolicy().expects() is None  # unless somebody foretells it
    assert "train resume" in PausePolicy().why(paused=True, hour=0, plugged=None, load=why)


def test_what_is_not_foretold_pauses_nothing() -> None:
    room = LoadRoom()
    assert room.why(None, 0.0) == ""
    assert room.why(foretold(9.0), 0.0)
    assert room.why(None, 1.0) == ""  # the prediction is late: nothing is known


def test_it_goes_on_below_a_lower_load_than_it_stopped_at() -> None:
    room = LoadRoom()
    assert room.why(foretold(BUSY_REQUESTS), 0.0)
    assert room.why(foretold(QUIET_REQUESTS), STAY_S)
    assert not room.why(foretold(QUIET_REQUESTS - 0.01), 2 * STAY_S)
    assert not room.why(foretold(BUSY_REQUESTS - 0.01), 4 * STAY_S)


def test_it_changes_its_mind_seldom() -> None:
    room, changes, before = LoadRoom(), 0, ""
    for second in range(600):
        now = room.why(foretold(5.0 if second % 2 else 0.0), float(second))
        changes += bool(now) != bool(before)
        before = now
    assert 2 <= changes <= 600 / STAY_S + 1


def test_a_node_that_is_always_busy_trains_a_part_of_its_time() -> None:
    room = LoadRoom()
    trains = [not room.why(foretold(9.0), float(second)) for second in range(0, 6 * 3600)]
    assert not any(trains[: int(STARVED_S)])
    share = sum(trains) / len(trains)
    assert share == pytest.approx(GRANT_S / (STARVED_S + GRANT_S), rel=0.2)
