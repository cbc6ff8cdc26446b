"""node/foresight.py and node/admission.py: what is foretold, when a request is declined for it, and the way back."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from model.step import Priority
from node.admission import RETRY_S_MAX, TRIAL_EVERY, TRIAL_S, Admission
from node.errors import NoRoom, RequestError
from node.foresight import (
    ANSWERS_MIN,
    LATER_MAX,
    OUTCOMES_MIN,
    TURNS_MIN,
    Foreseen,
    Foresight,
    Lengths,
    Pace,
    Scores,
    Task,
)
from node.hosting import Hosting
from node.requester import OWN, Requester
from node.work import AnswerItem, Finished, GenerateWork
from tests.fake_runtime import FakeRuntime, Turns
from tests.node_swarm import work

STEP_S = 0.1
PEER = Requester("peer", Priority.PEER)
STRANGER = Requester("stranger", Priority.STRANGER)


def task(made: int = 0, most: int = 20, who: Requester = OWN, *, runs: bool = False, prompt: float = 0.0) -> Task:
    return Task(requester=who, prompt_tokens=prompt, made=made, most=most, runs=runs)


def measured(step_s: float = STEP_S, read_s: float = 0.0, who: Requester = OWN) -> Foresight:
    """An engine whose turns all take so long, with answers of 20 tokens to their limit, foretold rightly."""
    foresight = Foresight()
    for writing in (1, 2):
        for _ in range(TURNS_MIN):
            foresight.pace.note(step_s, writing, 0)
    foresight.pace.note(step_s + 100 * read_s, 1, 100)
    for _ in range(ANSWERS_MIN):
        foresight.answered(who, 20, ended=False)
    told = Foreseen(first_s=step_s, token_s=step_s, low_s=None, high_s=None)
    for _ in range(OUTCOMES_MIN):
        foresight.scored(who, told, 20, told.at(20))
    return foresight


# --- what turns cost ---


def test_the_pace_of_turns_is_by_how_many_write() -> None:
    pace = Pace()
    for _ in range(TURNS_MIN):
        pace.note(0.1, 1, 0)
        pace.note(0.3, 3, 0)
    assert pace.step_s(1) == pytest.approx(0.1)
    assert pace.step_s(2) == pytest.approx(0.2)
    assert pace.step_s(3) == pytest.approx(0.3)
    assert pace.step_s(9) == pytest.approx(0.3)  # more were never seen: not less than that
    assert pace.step_s(0) is None
    assert not pace.is_known  # no prompt was read yet
    pace.note(0.1 + 0.5, 1, 100)
    assert pace.read_s == pytest.approx(0.005)
    assert pace.is_known


def test_fewer_than_were_ever_seen_take_no_longer_than_their_part() -> None:
    pace = Pace()
    pace.note(0.8, 8, 0)
    assert pace.step_s(2) == pytest.approx(0.2)


def test_turns_in_which_nothing_was_done_are_none() -> None:
    pace = Pace()
    for _ in range(100):
        pace.note(1.0, 0, 0)
        pace.note(0.0, 3, 5)
    assert pace.step_s(1) is None
    assert not pace.is_known


# --- how long answers become ---


def test_lengths_of_answers_that_were_cut_short_are_longer() -> None:
    lengths = Lengths()
    for _ in range(9):
        lengths.note(OWN, 10, ended=True)
    assert lengths.at(0.5, 0, 100) == 1  # too few
    for _ in range(9):
        lengths.note(OWN, 50, ended=False)
    assert lengths.at(0.1, 0, 100) == 10
    assert lengths.at(0.9, 0, 100) == 100  # nothing says that it ends before
    assert lengths.at(0.1, 10, 100) == 100  # who is past 10 goes on
    assert lengths.at(0.1, 0, 5) == 5


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 200), st.booleans()), max_size=200),
    st.floats(0.0, 1.0),
    st.integers(0, 300),
    st.integers(1, 300),
)
def test_a_length_is_more_than_is_made_and_within_the_limit(
    answers: list[tuple[int, bool]], share: float, made: int, more: int
) -> None:
    lengths = Lengths()
    for tokens, ended in answers:
        lengths.note(OWN, tokens, ended=ended)
    assert made + 1 <= lengths.at(share, made, made + more) <= made + more


def test_one_peer_gives_a_quarter_of_what_its_class_is_judged_by() -> None:
    lengths, other = Lengths(), Requester("other", Priority.PEER)
    for _ in range(96):
        lengths.note(other, 10, ended=True)
    for _ in range(1_000):
        lengths.note(PEER, 100_000, ended=True)
    assert lengths.at(0.5, 0, 1_000_000) == 10


# --- outcomes ---


def test_bounds_come_from_outcomes_and_from_nothing_else() -> None:
    scores, told = Scores(), Foreseen(first_s=1.0, token_s=0.1, low_s=None, high_s=None)
    for _ in range(OUTCOMES_MIN - 1):
        scores.note(OWN, told, 11, 2.0)
    assert scores.bounds() is None
    scores.note(OWN, told, 11, 2.0)
    assert scores.bounds() == (1.0, 1.0)
    for _ in range(4):
        scores.note(OWN, told, 11, 0.5)
    low, high = scores.bounds() or (0.0, 0.0)
    assert low == pytest.approx(0.25)
    assert high == pytest.approx(1.0)


def test_who_left_without_a_token_would_have_waited_longer() -> None:
    scores, told = Scores(), Foreseen(first_s=1.0, token_s=0.1, low_s=None, high_s=None)
    for _ in range(20):
        scores.note(OWN, told, 0, 0.5)
    assert scores.outcomes == 0
    for _ in range(4):
        scores.note(OWN, told, 1, 2.0)
    low, _ = scores.bounds() or (0.0, 0.0)
    assert low == pytest.approx(2.0)  # not 0.5
    for _ in range(40):
        scores.note(OWN, told, 0, 50.0)
    assert (scores.bounds() or (0.0,))[0] == LATER_MAX


# --- what is foretold ---


def test_nothing_is_foretold_and_no_bound_is_set_before_it_was_measured() -> None:
    assert Foresight().foresee(task(), [], 2) is None
    foresight = measured()
    fresh = Foresight()
    fresh.pace = foresight.pace
    told = fresh.foresee(task(), [task(runs=True)] * 9, 2)
    assert told is not None
    assert told.low_s is None


def test_who_waits_is_foretold_by_what_is_before_it() -> None:
    foresight = measured()
    alone = foresight.foresee(task(), [], 2)
    beside = foresight.foresee(task(), [task(runs=True)], 2)
    behind = foresight.foresee(task(), [task(runs=True), task(made=10, runs=True)], 2)
    far = foresight.foresee(task(), [task(runs=True), task(runs=True), *[task()] * 4], 2)
    assert alone is not None
    assert beside is not None
    assert behind is not None
    assert far is not None
    assert alone.first_s == pytest.approx(STEP_S)
    assert alone.low_s == pytest.approx(20 * STEP_S)
    assert beside.low_s == pytest.approx(20 * STEP_S)
    assert behind.first_s == pytest.approx(10 * STEP_S + STEP_S)
    assert far.low_s == pytest.approx(4 * 20 * STEP_S)


def test_prompts_before_it_are_read_first() -> None:
    foresight = measured(read_s=0.01)
    told = foresight.foresee(task(prompt=50), [task(prompt=200, runs=True)], 2)
    assert told is not None
    assert told.first_s == pytest.approx(2.0 + 0.5 + STEP_S, rel=0.05)


def test_a_class_is_not_held_up_by_those_after_it() -> None:
    foresight = measured()
    crowd = [task(who=STRANGER, runs=True), task(who=STRANGER, runs=True), *[task(who=STRANGER)] * 20]
    own, alike = foresight.foresee(task(), crowd, 2), foresight.foresee(task(), [task(runs=True)] * 2, 2)
    assert own is not None
    assert alike is not None
    # the strangers that run are not put out, and nothing is known of their answers: one token more each
    assert own.first_s <= alike.first_s
    assert own.low_s is not None
    assert own.low_s <= 2 * 20 * STEP_S


def test_who_asks_for_little_does_not_wait_for_all_of_who_asks_for_much() -> None:
    foresight, other = measured(who=PEER), Requester("other", Priority.PEER)
    crowd = [task(who=other, runs=True), task(who=other, runs=True), *[task(who=other)] * 20]
    one, same = foresight.foresee(task(who=PEER), crowd, 2), foresight.foresee(task(who=other), crowd, 2)
    assert one is not None
    assert same is not None
    assert one.first_s == pytest.approx(20 * STEP_S + STEP_S)
    assert same.first_s > 10 * 20 * STEP_S


def test_a_crowd_that_the_node_expects_makes_turns_longer() -> None:
    foresight = measured()
    for _ in range(TURNS_MIN):
        foresight.pace.note(0.4, 4, 0)
    quiet, busy = foresight.foresee(task(), [], 4), foresight.foresee(task(), [], 4, 4.0)
    assert quiet is not None
    assert busy is not None
    assert quiet.low_s == pytest.approx(20 * STEP_S)
    assert busy.low_s == pytest.approx(20 * 0.4)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 60), st.sampled_from((OWN, PEER, STRANGER)), st.booleans()),
        max_size=30,
    ),
    st.integers(1, 8),
    st.floats(0, 20),
)
def test_any_books_give_finite_times_in_order(
    books: list[tuple[int, int, Requester, bool]], slots: int, crowd: float
) -> None:
    others = [task(made, made + more, who, runs=runs) for made, more, who, runs in books]
    told = measured(read_s=0.001).foresee(task(prompt=7), others, slots, crowd)
    assert told is not None
    assert told.low_s is not None
    assert told.high_s is not None
    assert 0.0 < told.first_s <= told.low_s <= told.high_s < 1e6


def test_a_stranger_does_not_decide_what_is_foretold_to_a_user() -> None:
    foresight = measured()
    before = foresight.foresee(task(most=10_000), [], 2)
    told = Foreseen(first_s=STEP_S, token_s=STEP_S, low_s=None, high_s=None)
    for _ in range(200):
        foresight.answered(STRANGER, 100_000, ended=True)
        foresight.scored(STRANGER, told, 20, 1_000.0)
    assert foresight.foresee(task(most=10_000), [], 2) == before


# --- admission, at a hosting ---


@asynccontextmanager
async def host(
    admission: Admission | None = None, **changes: object
) -> AsyncIterator[tuple[Hosting, FakeRuntime, trio.Nursery]]:
    fields: dict[str, object] = {"queue_max": 64, "step_s": STEP_S, **changes}
    runtime = FakeRuntime(**fields)  # type: ignore[arg-type]  # a test's own fields
    async with trio.open_nursery() as nursery:
        hosting = Hosting(runtime, peer="me", on_change=lambda: None, hop=Turns(runtime), admission=admission)
        await nursery.start(hosting.run)
        yield hosting, runtime, nursery
        nursery.cancel_scope.cancel()


async def answered(hosting: Hosting, asked: GenerateWork, who: Requester = OWN) -> list[AnswerItem | RequestError]:
    async with hosting.generate(asked, who) as items:
        return [item async for item in items]


async def warm(hosting: Hosting, count: int = ANSWERS_MIN, tokens: int = 20, who: Requester = OWN) -> None:
    for _ in range(count):
        await answered(hosting, work("hello", tokens), who)


async def test_who_would_surely_miss_its_deadline_is_told_at_once(autojump_clock: MockClock) -> None:
    async with host() as (hosting, runtime, nursery):
        await warm(hosting)
        for _ in range(6):
            nursery.start_soon(answered, hosting, work("hello", 20))
        await trio.sleep(2 * STEP_S)
        hosting.admission._trial_at = trio.current_time()
        began, added = trio.current_time(), len(runtime.added)
        with pytest.raises(NoRoom, match=r"at the soonest \(6 requests are here; .* deadline is in 3.0 s") as caught:
            await answered(hosting, work("hello", 20, remaining_ms=3_000))
        assert trio.current_time() == began
        assert len(runtime.added) == added
        assert len(hosting._waiting.room) == 6
        assert caught.value.retryable
        assert 1.0 <= (caught.value.retry_after_s or 0.0) <= RETRY_S_MAX
        assert hosting.admission.declined == 1
        items = await answered(hosting, work("hello", 20, remaining_ms=30_000))  # with time it is admitted
        assert isinstance(items[-1], Finished)


async def test_nobody_is_declined_before_enough_was_measured(autojump_clock: MockClock) -> None:
    async with host() as (hosting, _, nursery):
        await warm(hosting, OUTCOMES_MIN - 2)
        for _ in range(20):
            nursery.start_soon(answered, hosting, work("hello", 20))
        await trio.sleep(STEP_S)
        items = await answered(hosting, work("hello", 20, remaining_ms=1))
        assert isinstance(items[-1], Finished)
        assert hosting.admission.declined == hosting.admission.trials == 0


async def test_a_limit_that_answers_do_not_reach_is_no_reason(autojump_clock: MockClock) -> None:
    async with host(ends_at=5) as (hosting, _, _nursery):
        await warm(hosting, tokens=500)
        items = await answered(hosting, work("hello", 500, remaining_ms=2_000))
        assert isinstance(items[-1], Finished)
        assert hosting.admission.declined == hosting.admission.trials == 0


async def test_half_an_answer_is_never_declined(autojump_clock: MockClock) -> None:
    async with host() as (hosting, _, nursery):
        await warm(hosting)
        for _ in range(8):
            nursery.start_soon(answered, hosting, work("hello", 20))
        await trio.sleep(STEP_S)
        hosting.admission._trial_at = trio.current_time()
        items = await answered(hosting, work("hello", 20, delivered=(1, 2), remaining_ms=1))
        assert isinstance(items[-1], Finished)
        assert hosting.admission.declined == 0


async def test_an_operator_can_switch_it_off(autojump_clock: MockClock) -> None:
    async with host(Admission(declines=False)) as (hosting, _, nursery):
        await warm(hosting)
        for _ in range(8):
            nursery.start_soon(answered, hosting, work("hello", 20))
        await trio.sleep(STEP_S)
        assert isinstance((await answered(hosting, work("hello", 20, remaining_ms=1)))[-1], Finished)
        assert hosting.admission.declined == hosting.admission.trials == 0
        assert hosting.admission.statistics()["outcomes"] >= ANSWERS_MIN


async def test_a_node_that_thought_itself_slow_finds_out(autojump_clock: MockClock) -> None:
    """Its machine was a hundred times slower while it was measured: every request is declined, and for how long?"""
    async with host() as (hosting, runtime, _nursery):
        runtime.step_s = 100 * STEP_S
        await warm(hosting)
        runtime.step_s = STEP_S
        ends: list[bool] = []
        for _ in range(200):
            try:
                await answered(hosting, work("hello", 20, remaining_ms=4_000))
                ends.append(True)
            except NoRoom:
                ends.append(False)
                await trio.sleep(0.1)
        assert ends.count(False) <= 8 * TRIAL_EVERY
        assert all(ends[-50:])
        assert hosting.admission.trials >= 1


async def test_a_node_whose_outcomes_were_wrong_finds_out() -> None:
    foresight = measured()
    slow = Foreseen(first_s=STEP_S, token_s=STEP_S, low_s=None, high_s=None)
    for _ in range(100):
        foresight.scored(OWN, slow, 20, 50.0)
    late = foresight.foresee(task(), [], 2)
    assert late is not None
    assert late.low_s == pytest.approx(LATER_MAX * 20 * STEP_S)  # not 50: this hour may be better
    for _ in range(4):
        foresight.scored(OWN, slow, 20, 0.5)
    soon = foresight.foresee(task(), [], 2)
    assert soon is not None
    assert soon.low_s == pytest.approx(0.5)


async def test_a_trial_comes_with_time_and_with_numbers(autojump_clock: MockClock) -> None:
    admission = Admission()
    assert admission._may_try(0.0)
    assert [admission._may_try(1.0) for _ in range(TRIAL_EVERY)].count(True) == 1
    assert not admission._may_try(1.0)
    assert admission._may_try(1.0 + TRIAL_S)


async def test_a_flood_of_strangers_has_no_user_declined(autojump_clock: MockClock) -> None:
    async with host() as (hosting, _, nursery):
        await warm(hosting, ANSWERS_MIN)
        await warm(hosting, ANSWERS_MIN, tokens=200, who=STRANGER)
        for number in range(20):
            who = replace(STRANGER, name=f"stranger {number}")
            nursery.start_soon(answered, hosting, work("hello", 200, remaining_ms=1_000_000), who)
        await trio.sleep(STEP_S)
        hosting.admission._trial_at = trio.current_time()
        declined = hosting.admission.declined
        items = await answered(hosting, work("hello", 20, remaining_ms=30_000))
        assert isinstance(items[-1], Finished)
        assert hosting.admission.declined == declined


async def test_what_is_foretold_under_load_comes_true(autojump_clock: MockClock) -> None:
    """A seeded crowd, once with and once without: fewer are late, more are answered, and most outcomes lie inside."""

    async def crowd(*, declines: bool) -> tuple[list[str], Admission]:
        rng, ends, admission = random.Random(5), list[str](), Admission(declines=declines)
        async with host(admission, read_s=0.002, slots=4) as (hosting, _, nursery):

            async def ask(number: int, tokens: int, remaining_ms: int) -> None:
                asked = work("x" * (1 + number % 50), tokens, remaining_ms=remaining_ms)
                with trio.move_on_after(remaining_ms / 1000):
                    try:
                        ends[number] = type((await answered(hosting, asked))[-1]).__name__
                    except NoRoom as exc:
                        ends[number] = "declined" if "foresees" in str(exc) else "full"

            await warm(hosting, 12)
            for number in range(300):
                ends.append("late")
                nursery.start_soon(ask, number, rng.randint(5, 30), rng.randint(1_500, 6_000))
                await trio.sleep(rng.expovariate(2.5))
            await trio.sleep(10.0)
        return ends, admission

    plain, _ = await crowd(declines=False)
    used, admission = await crowd(declines=True)
    assert plain.count("late") > 50
    assert used.count("late") < plain.count("late") / 2
    assert used.count("Finished") > plain.count("Finished")
    assert (admission.foresight.statistics().inside or 0.0) > 0.5
