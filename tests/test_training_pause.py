"""When a node does not train: at no hour but its own, not on the battery, not when it was told."""

from __future__ import annotations

import pytest

from node.training_pause import PausePolicy, hours_of


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
