"""What an engine measures of its requests: stages that follow one another, and nothing of who has left."""

from __future__ import annotations

import random

import pytest

from model.timings import Timings


def test_the_stages_of_a_request_follow_one_another() -> None:
    timings = Timings()
    timings.came("a", 1.0)
    timings.runs(["a"], 3.0)
    timings.stepped(16, (), 4.0)  # a chunk of its prompt
    timings.stepped(8, {"a"}, 6.0)
    timings.stepped(1, {"a"}, 9.0)
    timings.ended("a", 10.0, is_finished=True)
    told = timings.read()
    for spread, took_s in ((told.queue_s, 2.0), (told.prefill_s, 3.0), (told.decode_s, 4.0)):
        assert (spread.count, spread.sum) == (1, pytest.approx(took_s))
    assert (told.step_tokens.count, told.step_tokens.sum) == (3, 25.0)


def test_who_was_preempted_has_waited_in_the_queue_once() -> None:
    timings = Timings()
    timings.came("a", 0.0)
    timings.runs(["a"], 1.0)
    timings.runs(["a"], 5.0)
    timings.stepped(1, {"a"}, 6.0)
    told = timings.read()
    assert (told.queue_s.count, told.queue_s.sum) == (1, 1.0)
    assert (told.prefill_s.count, told.prefill_s.sum) == (1, 5.0)


def test_who_did_not_finish_has_no_decode_time() -> None:
    timings = Timings()
    for name in ("left", "failed"):
        timings.came(name, 0.0)
        timings.runs([name], 0.0)
        timings.stepped(1, {name}, 1.0)
        timings.ended(name, 2.0, is_finished=False)
    assert timings.read().decode_s.count == 0


def test_a_step_that_did_nothing_is_none() -> None:
    timings = Timings()
    timings.stepped(0, (), 1.0)
    assert timings.read().step_tokens.count == 0


def test_nothing_is_known_of_who_has_left() -> None:
    rng, timings, here = random.Random(5), Timings(), set[str]()
    for number in range(3000):
        name = f"r{number}"
        here.add(name)
        timings.came(name, number)
        timings.runs(rng.sample(sorted(here), rng.randrange(len(here))), number)
        timings.stepped(1, set(rng.sample(sorted(here), rng.randrange(len(here)))), number)
        for other in rng.sample(sorted(here), max(0, len(here) - rng.randrange(1, 6))):
            timings.ended(other, number, is_finished=rng.random() < 0.5)
            here.remove(other)
        assert len(timings) == len(here)
