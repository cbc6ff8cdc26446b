"""node/upstream_health.py: when a server is asked again, and how much room it is said to have."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelFacts
from node.upstream_dialect import DIALECTS, LLAMA_CPP, LLAMA_CPP_PYTHON, OLLAMA, VLLM, Dialect
from node.upstream_facts import Load, Served
from node.upstream_health import (
    AGAIN_S,
    BACKOFF_S,
    FULL_S,
    LOOK_BUSY_S,
    LOOK_S,
    SLOTS_BATCHING,
    SLOTS_DEFAULT,
    Health,
    Room,
    State,
)


def up(now: float = 0.0) -> Health:
    health = Health()
    health.answered(now)
    return health


def test_one_look_that_fails_is_looked_at_again_and_two_are_down() -> None:
    health = up()
    assert health.look_at(0.0, 0.0, is_busy=False) == LOOK_S
    assert health.look_at(0.0, 0.0, is_busy=True) == LOOK_BUSY_S
    health.failed("unreached", "slow", 10.0, is_gone=False)
    assert health.is_up
    assert health.look_at(10.0, 10.0, is_busy=False) == 10.0 + AGAIN_S
    health.failed("unreached", "slow", 12.0, is_gone=False)
    assert (health.state, health.why, health.since) == (State.DOWN, "slow", 12.0)
    health.answered(13.0)
    assert health.is_up
    health.failed("unreached", "slow", 20.0, is_gone=False)
    assert health.is_up, "the failures before are forgotten"


def test_where_nothing_listens_it_is_down_at_once() -> None:
    health = up()
    health.failed("unreached", "refused", 1.0, is_gone=True)
    assert health.state is State.DOWN
    assert health.retry_after_s(1.0) >= 1.0


def test_who_is_down_is_asked_less_and_less_and_at_once_again_after_an_answer() -> None:
    health, now, waits = up(), 0.0, []
    for _ in range(12):
        health.failed("unreached", "refused", now, is_gone=True)
        due = health.look_at(now, now, is_busy=False)
        waits.append(due - now)
        now = due
    assert waits[0] == BACKOFF_S[0]
    assert waits == sorted(waits)
    assert waits[-1] == BACKOFF_S[1]
    health.answered(now)
    health.failed("unreached", "refused", now, is_gone=True)
    assert health.look_at(now, now, is_busy=False) - now == BACKOFF_S[0]


def test_who_is_full_is_left_alone_for_as_long_as_it_says_within_bounds() -> None:
    for said, wanted in ((None, FULL_S[0]), (5.0, 5.0), (1e9, FULL_S[1]), (-3.0, FULL_S[0]), (math.nan, FULL_S[0])):
        health = up()
        health.full("429", said, 100.0)
        assert not health.is_up
        assert health.look_at(100.0, 100.0, is_busy=True) == 100.0 + wanted
        assert health.retry_after_s(100.0) == wanted
        health.answered(100.0 + wanted / 2)
        assert not health.is_up, "an answer that was under way says nothing of room"
        health.answered(100.0 + wanted)
        assert health.is_up


def test_who_refuses_the_key_is_asked_rarely() -> None:
    health = up()
    for _ in range(10):
        health.refused("key", 1.0)
    assert health.state is State.REFUSED
    assert health.look_at(1.0, 1.0, is_busy=False) == 1.0 + BACKOFF_S[1]
    assert health.failures["refused"] == 10


EVENTS = st.sampled_from(["answered", "failed", "gone", "refused", "full"])


@given(st.lists(st.tuples(EVENTS, st.floats(0.0, 100.0)), max_size=30), st.booleans())
def test_after_any_history_it_is_looked_at_within_a_minute_and_an_answer_brings_it_back(
    history: list[tuple[str, float]], is_busy: bool
) -> None:
    health, now = Health(), 0.0
    for event, wait in history:
        now += wait
        match event:
            case "answered":
                health.answered(now)
            case "failed" | "gone":
                health.failed("x", "why", now, is_gone=event == "gone")
            case "refused":
                health.refused("why", now)
            case "full":
                health.full("why", wait, now)
        due = health.look_at(now, now, is_busy=is_busy)
        assert now <= due <= now + max(FULL_S[1], BACKOFF_S[1], LOOK_S)
        assert 1.0 <= health.retry_after_s(now) <= 60.0
        assert health.is_up or health.why
    health.answered(now + 61.0)
    assert health.is_up


def served(dialect: Dialect = OLLAMA, slots: int | None = None) -> Served:
    facts = ModelFacts(name="m", revision="r", kind="causal", context_tokens=100, dtype="x", parameters=0, vocabulary=0)
    return Served(id="m", dialect=dialect, facts=facts, slots=slots)


def room(dialect: Dialect = OLLAMA, slots: int | None = None, wanted: int | None = None) -> Room:
    made = Room(wanted)
    made.of(served(dialect, slots))
    return made


def test_how_many_at_a_time() -> None:
    assert room().slots == SLOTS_DEFAULT
    assert room(VLLM).slots == SLOTS_BATCHING
    assert room(LLAMA_CPP, slots=7).slots == 7
    assert room(LLAMA_CPP, slots=7, wanted=2).slots == 2, "the operator has the last word"
    assert room(LLAMA_CPP_PYTHON, wanted=9).slots == 1, "it interrupts one for the other"


def test_room_is_what_the_server_and_we_leave() -> None:
    here = room(LLAMA_CPP, slots=4)

    def free(own: int = 0, waiting: int = 0, is_up: bool = True) -> tuple[int, int, int]:
        figures = here.statistics(served(LLAMA_CPP), own, waiting, is_up=is_up)
        return figures.slots_free, figures.queue_length, figures.kv_tokens_free

    assert free() == (4, 0, 400)
    assert free(own=3) == (1, 0, 100)
    here.told(Load(running=2, kv_tokens_total=400, kv_tokens_free=200), own=1)  # one is another's
    assert free(own=1) == (2, 0, 200)
    assert free(own=4) == (0, 0, 200)
    assert free(own=4, waiting=3) == (0, 3, 200)
    assert free(is_up=False) == (0, 0, 0)
    here.told(Load(running=1, waiting=2, kv_tokens_free=5), own=0)
    assert free() == (0, 2, 5), "who lets others wait has no room, whatever our count says"


@given(
    st.sampled_from(sorted(DIALECTS)),
    st.none() | st.integers(1, 2_000),
    st.none() | st.integers(1, 64),
    st.lists(
        st.tuples(st.sampled_from(["began", "ended", "came", "told"]), st.integers(0, 50), st.floats(0, 5)), max_size=40
    ),
)
def test_any_history_gives_figures_within_bounds(
    name: str, wanted: int | None, slots: int | None, history: list[tuple[str, int, float]]
) -> None:
    one = served(DIALECTS[name], slots)
    here = Room(wanted)
    here.of(one)
    now, running, steps = 0.0, 0, 0
    for event, number, wait in history:
        now += wait
        if event == "began":
            here.began(now)
            running += 1
        elif event == "ended" and running:
            here.ended(now)
            running -= 1
        elif event == "came" and running:
            here.came(number, now)
        elif event == "told":
            here.told(Load(running=number, waiting=number % 3, steps=number), own=min(running, number))
        figures = here.statistics(one, running, 0, is_up=True)
        assert 0 <= figures.slots_free <= figures.slots_total <= 1_024
        assert math.isfinite(figures.decode_tok_s)
        assert figures.decode_tok_s >= 0
        assert figures.steps >= steps, "steps are what peers wait by"
        steps = figures.steps


def test_speed_is_tokens_over_the_time_in_which_answers_flow() -> None:
    here, now = room(), 0.0
    for _ in range(3):
        here.began(now)
        for _ in range(100):
            now += 0.02
            here.came(1, now)
        here.ended(now)
        now += 60.0  # idle time is nobody's speed
    assert here.statistics(served(), 0, 0, is_up=True).decode_tok_s == pytest.approx(50.0, rel=0.05)
