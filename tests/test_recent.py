"""node/recent.py: speeds and counts are those of what was measured, and of nothing else."""

from __future__ import annotations

import pytest

from node.recent import FLOWS_MAX, SAMPLE_S, SAMPLES_MAX, WINDOW_S, Flows, Recent, Totals


def test_what_was_not_measured_is_none() -> None:
    assert Recent().told()["tokens_out_per_s"] is None


def test_speeds_are_differences_over_the_time_that_passed() -> None:
    recent = Recent()
    recent.sample(10.0, Totals(tokens_out=100, ended=5))  # what was before the first sample counts nowhere
    recent.sample(10.5, Totals(tokens_out=999))  # too early: nothing
    recent.sample(14.0, Totals(tokens_out=180, tokens_made=40, ended=9, errors=1))
    [sample] = recent.samples
    assert (sample.number, sample.seconds, sample.ended, sample.errors) == (1, 4.0, 4, 1)
    assert (sample.tokens_out_s, sample.tokens_made_s) == (20.0, 10.0)
    told = recent.told()
    assert (told["window_s"], told["ended"], told["errored"]) == (4, 4, 1)
    assert (told["tokens_out_per_s"], told["requests_per_s"]) == (20.0, 1.0)


def test_a_speed_is_of_the_last_samples_and_the_window_has_a_bound() -> None:
    recent = Recent()
    for number in range(SAMPLES_MAX + 21):
        recent.sample(number * SAMPLE_S, Totals(tokens_out=max(0, number - SAMPLES_MAX - 15) * 10, ended=number))
    assert len(recent.samples) == SAMPLES_MAX
    assert recent.samples[-1].number == SAMPLES_MAX + 20
    told = recent.told()
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


def test_the_window_is_one_of_time_also_where_samples_come_late() -> None:
    recent = Recent()
    for number in range(40):
        recent.sample(number * 20.0, Totals(ended=number))
    assert recent.told()["window_s"] == WINDOW_S
