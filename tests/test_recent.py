"""node/recent.py: speeds, shares and percentiles are those of what was measured, and of nothing else."""

from __future__ import annotations

import math

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from node.inference import Timed
from node.recent import FLOWS_MAX, SAMPLE_S, SAMPLES_MAX, TIMES_MAX, WINDOW_S, Flows, Recent, Totals
from node.work import AnswerItem, Finished, Piece, Started


@given(st.lists(st.floats(min_value=0.0001, max_value=100.0), min_size=1, max_size=60))
def test_percentiles_are_measured_times(times: list[float]) -> None:
    recent = Recent()
    for seconds in times:
        recent.first_token(1.0, seconds)
    told = recent.told(2.0)["first_token_s"]
    assert told["n"] == len(times)
    for percent in (50, 95, 99):
        value = told[f"p{percent}"]
        assert value in {round(each, 5) for each in times}
        assert sum(round(each, 5) <= value for each in times) >= math.ceil(percent / 100 * len(times))


def test_what_was_not_measured_is_none() -> None:
    told = Recent().told(0.0)
    assert told["tokens_out_per_s"] is None
    assert told["first_token_s"] == told["token_s"] == {"n": 0, "p50": None, "p95": None, "p99": None}


def test_times_of_before_the_window_and_beyond_the_bound_are_forgotten() -> None:
    recent = Recent()
    recent.token(0.0, 9.0)
    recent.token(WINDOW_S, 1.0)
    assert recent.told(WINDOW_S + 1)["token_s"]["n"] == 1
    for _ in range(TIMES_MAX + 5):
        recent.first_token(WINDOW_S, 0.5)
    assert recent.told(WINDOW_S)["first_token_s"]["n"] == TIMES_MAX


def test_speeds_are_differences_over_the_time_that_passed() -> None:
    recent = Recent()
    recent.sample(10.0, Totals(tokens_out=100, ended=5))  # what was before the first sample counts nowhere
    recent.sample(10.5, Totals(tokens_out=999))  # too early: nothing
    recent.sample(14.0, Totals(tokens_out=180, tokens_made=40, ended=9, errors=1))
    [sample] = recent.samples
    assert (sample.number, sample.seconds, sample.ended, sample.errors) == (1, 4.0, 4, 1)
    assert (sample.tokens_out_s, sample.tokens_made_s) == (20.0, 10.0)
    told = recent.told(14.0)
    assert (told["window_s"], told["ended"], told["errored"]) == (4, 4, 1)
    assert (told["tokens_out_per_s"], told["requests_per_s"]) == (20.0, 1.0)


def test_a_speed_is_of_the_last_samples_and_the_window_has_a_bound() -> None:
    recent = Recent()
    for number in range(SAMPLES_MAX + 21):
        recent.sample(number * SAMPLE_S, Totals(tokens_out=max(0, number - SAMPLES_MAX - 15) * 10, ended=number))
    assert len(recent.samples) == SAMPLES_MAX
    assert recent.samples[-1].number == SAMPLES_MAX + 20
    told = recent.told(0.0)
    assert (told["window_s"], told["ended"]) == (WINDOW_S, SAMPLES_MAX)
    assert told["tokens_out_per_s"] == 10 / SAMPLE_S


def test_a_counter_that_begins_again_makes_no_negative_speed() -> None:
    recent = Recent()
    recent.sample(0.0, Totals(tokens_made=500))
    recent.sample(SAMPLE_S, Totals(tokens_made=3))  # the server behind the node was started again
    assert recent.samples[-1].tokens_made_s == 0.0


def test_flows_count_both_ways_and_forget_the_idle() -> None:
    flows = Flows(flows_max=3)
    with flows.to("busy"), flows.out_of("busy"):
        for name in "abcd":
            with flows.to(name):
                pass
        flow = flows.of("busy")
        assert (flow.to_now, flow.to_total, flow.from_now, flow.from_total) == (1, 1, 1, 1)
        assert flows.of("a").to_total == flows.of("b").to_total == 0  # put out
        assert flows.of("d").to_total == 1
    assert (flows.of("busy").to_now, flows.of("busy").from_now) == (0, 0)
    with pytest.raises(ValueError, match="gone"), flows.to("d"):
        raise ValueError("gone")
    assert flows.of("d").to_now == 0
    assert FLOWS_MAX == 1024


async def test_an_answer_is_timed_as_its_client_sees_it(autojump_clock: MockClock) -> None:
    recent = Recent()

    async def answer(*steps: float | AnswerItem) -> None:
        send, receive = trio.open_memory_channel[AnswerItem | Exception](100)
        timed = Timed(send, recent, trio.current_time())  # type: ignore[arg-type]
        with receive:
            for step in steps:
                if isinstance(step, float):
                    await trio.sleep(step)
                else:
                    await timed.send(step)

    def started(*, cached: bool = False) -> Started:
        return Started(served_by="peer", model="m", revision="r", prompt_tokens=1, cached=cached)

    end = Finished(reason="stop", prompt_tokens=1, completion_tokens=5)
    one, two = Piece(tokens=(1,), text="a"), Piece(tokens=(2, 3), text="bc")
    await answer(0.25, started(), 0.75, one, 0.5, two, 0.5, two, 7.0, end)
    told = recent.told(trio.current_time())
    assert told["first_token_s"]["p50"] == pytest.approx(1.0)
    assert told["token_s"]["p50"] == pytest.approx(0.25)  # four tokens in the second after the first; then silence
    assert recent.tokens_out == 5
    await answer(started(cached=True), one, two, end)  # kept from before: counts as tokens, tells nothing of speed
    await answer(0.1, started(), Piece(tokens=(), text="x"), one, end)  # one token: no time between tokens
    told = recent.told(trio.current_time())
    assert (told["first_token_s"]["n"], told["token_s"]["n"], recent.tokens_out) == (2, 1, 9)
