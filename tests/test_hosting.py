"""node/hosting.py: the engine's loop, admission, cancellation, embedding between steps, what is told and when."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from model.errors import BadInput, BadModel, ComputeFailed, OutOfMemory
from model.runtime_face import Runtime
from node.embed_queue import EMBED_QUEUE_MAX, TURN_S
from node.engine_words import LOGPROB_MIN
from node.errors import BadRequest, InternalError, NoRoom, NotReady, RequestError, TooLong, UnknownModel
from node.hosting import CHANGE_EVERY_S, PROGRESS_EVERY_S, SWITCH_S, Hosting
from node.hosting_jobs import START_BYTES_PER_TURN, Job, Waiting
from node.requester import OWN
from node.work import (
    UNKNOWN_TOKEN,
    AnswerItem,
    Embedded,
    EmbedWork,
    Finished,
    GenerateWork,
    Message,
    Piece,
    Progress,
    Started,
)
from tests.fake_runtime import FakeRuntime, Turns, facts, text_of, vector_of
from tests.node_swarm import eventually, expected, work


@dataclass
class Host:
    """A running Hosting and what it told."""

    runtime: FakeRuntime
    hosting: Hosting
    changes_s: list[float] = field(default_factory=list)

    async def items(self, asked: GenerateWork) -> list[AnswerItem | RequestError]:
        async with self.hosting.generate(asked) as items:
            return [item async for item in items]


@asynccontextmanager
async def host(**changes: object) -> AsyncIterator[Host]:
    runtime = FakeRuntime(**changes)  # type: ignore[arg-type]  # a test's own fields
    async with trio.open_nursery() as nursery:
        made: list[Host] = []
        hosting = Hosting(
            runtime,
            peer="me",
            on_change=lambda: made[0].changes_s.append(trio.current_time()),
            hop=Turns(runtime),
        )
        made.append(Host(runtime, hosting))
        await nursery.start(hosting.run)
        yield made[0]
        nursery.cancel_scope.cancel()


def test_the_fake_keeps_to_the_face() -> None:
    for name, member in inspect.getmembers(Runtime, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(FakeRuntime, name)).parameters == inspect.signature(member).parameters
    assert isinstance(FakeRuntime().has_work, bool)


async def test_an_answer_is_started_pieces_finished(autojump_clock: MockClock) -> None:
    async with host() as here:
        items = await here.items(work("hello", 5))
        assert isinstance(items[0], Started)
        assert items[0] == Started(served_by="me", model="tale", revision="r1", prompt_tokens=5)
        assert items[-1] == Finished(reason="length", prompt_tokens=5, completion_tokens=5)
        assert "".join(item.text for item in items if isinstance(item, Piece)) == expected("hello", 5)
        assert here.hosting.requests_running == 0


async def test_every_kind_of_prompt(autojump_clock: MockClock) -> None:
    chat = (Message(role="user", content="hi"), Message(role="assistant", content="ho"))
    async with host() as here:
        for asked in (
            replace(work(), text=None, messages=chat),
            replace(work(), text=None, tokens=(1, 2)),
            replace(work(), text="q"),
        ):
            await here.items(asked)
        prompts = [request.prompt for request in here.runtime.added]
        assert prompts == [tuple(map(ord, "user:hi\nassistant:ho\n")), (1, 2), (ord("q"),)]


async def test_an_answer_goes_on_after_what_was_delivered(autojump_clock: MockClock) -> None:
    whole = text_of(tuple(map(ord, "hello")), 8)
    async with host() as here:
        first = await here.items(work("hello", 8))
        tokens = [token for item in first if isinstance(item, Piece) for token in item.tokens]
        for count, chars in ((3, 7), (5, 0), (8, 10), (8, len(whole))):
            rest = await here.items(work("hello", 8, delivered=tuple(tokens[:count]), delivered_chars=chars))
            pieces = [item for item in rest if isinstance(item, Piece)]
            assert [token for piece in pieces for token in piece.tokens] == tokens[count:]
            assert "".join(piece.text for piece in pieces) == whole[chars:]
            assert rest[-1] == Finished(reason="length", prompt_tokens=5, completion_tokens=8)


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (work("", 5), BadRequest),
        (work("x" * 1999, 5), TooLong),
        (work("x", 5, delivered=(60_000,)), BadRequest),
        (work("x", 5, delivered=(UNKNOWN_TOKEN,), delivered_text="w"), BadRequest),
    ],
    ids=["empty", "too long", "unknown token", "a token whose id is not told"],
)
async def test_bad_input_ends_that_request_alone(
    asked: GenerateWork, kind: type[RequestError], autojump_clock: MockClock
) -> None:
    async with host() as here, trio.open_nursery() as nursery:
        ends: list[object] = []

        async def other() -> None:
            ends.extend(await here.items(work("hello", 9)))

        nursery.start_soon(other)
        items = await here.items(asked)
        assert [type(item) for item in items] == [kind]
        await eventually(lambda: bool(ends) and isinstance(ends[-1], Finished), 5)


@pytest.mark.parametrize(
    ("failure", "kind"),
    [(ComputeFailed("nan"), InternalError), (OutOfMemory("full"), InternalError), (BadInput("no"), BadRequest)],
)
async def test_an_engine_that_fails_says_so_once(
    failure: ComputeFailed, kind: type[RequestError], autojump_clock: MockClock
) -> None:
    async with host() as here:
        async with here.hosting.generate(work(tokens=50)) as items:
            got: list[object] = []
            async for item in items:
                got.append(item)
                if len(got) == 5:
                    here.runtime.fails = failure
        assert isinstance(got[-1], kind)
        assert sum(isinstance(item, RequestError | Finished) for item in got) == 1
        assert isinstance((await here.items(work()))[-1], Finished)


async def test_no_room_unknown_model_stopping(autojump_clock: MockClock) -> None:
    async with host(slots=1, queue_max=0) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here.items, work(tokens=20))
        await trio.sleep(0.5)
        assert not here.hosting.has_room()
        with pytest.raises(NoRoom, match="1 requests of class own or lower") as caught:
            await here.items(work())
        assert type(caught.value) is NoRoom
        assert caught.value.retry_after_s
        for asked in (work(model="other"), work(model="tale", revision="r2")):
            with pytest.raises(UnknownModel, match="this node hosts tale"):
                await here.items(asked)
        here.hosting.draining = True
        with pytest.raises(NotReady):
            await here.items(work())


async def test_many_at_once_between_two_steps_are_counted(autojump_clock: MockClock) -> None:
    """has_room must not say yes to a second one before the engine has seen the first."""
    async with host(slots=1, step_s=5.0) as here:
        async with here.hosting.generate(work()):
            assert not here.hosting.has_room()
        assert here.hosting.has_room()


async def test_leaving_frees_the_slot_within_a_step(autojump_clock: MockClock) -> None:
    async with host(step_s=1.0, slots=1) as here, trio.open_nursery() as nursery:
        with trio.move_on_after(2.5):
            await here.items(work(tokens=50))
        nursery.start_soon(here.items, work("next", 2))
        await trio.sleep(0.6)  # the step under way ends, and the next turn begins
        assert len(here.runtime.added) == 2
        assert here.runtime.holds == 1


async def test_one_that_leaves_before_its_start_costs_nothing(autojump_clock: MockClock) -> None:
    async with host() as here:
        async with here.hosting.generate(work()):
            pass
        await trio.sleep(1)
        assert here.runtime.holds == 0
        assert here.hosting.requests_running == 0


async def test_the_same_request_id_twice_is_two_requests(autojump_clock: MockClock) -> None:
    async with host() as here, trio.open_nursery() as nursery:
        ends: list[object] = []

        async def one(prompt: str) -> None:
            items = await here.items(work(prompt, 6))
            ends.append("".join(item.text for item in items if isinstance(item, Piece)) == expected(prompt, 6))

        for prompt in ("a", "b", "a"):
            nursery.start_soon(one, prompt)
        await eventually(lambda: ends == [True] * 3, 10)


async def test_progress_is_told_while_there_is_no_token(autojump_clock: MockClock) -> None:
    async with host(prefill_chunk=10, step_s=0.1) as here:
        items = await here.items(work("p" * 300, 50))
        first_piece = next(place for place, item in enumerate(items) if isinstance(item, Piece))
        told = [item for item in items[:first_piece] if isinstance(item, Progress)]
        assert 2.9 / PROGRESS_EVERY_S - 1 <= len(told) <= 3.0 / PROGRESS_EVERY_S + 1
        assert [item.prefilled_tokens for item in told] == sorted({item.prefilled_tokens for item in told})
        assert not any(isinstance(item, Progress) for item in items[first_piece:])


async def test_those_who_wait_are_told_of_their_place(autojump_clock: MockClock) -> None:
    async with host(slots=1) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here.items, work("first", 30))
        await trio.sleep(0.15)
        items = await here.items(work("second", 3))
        assert isinstance(items[0], Started)
        places = [item.queue_position for item in items if isinstance(item, Progress)]
        assert places[0] == 1
        assert len(places) >= 4


# --- embeddings ---


def texts(count: int, length: int = 1) -> EmbedWork:
    return EmbedWork(request_id="q", texts=tuple(chr(97 + number % 26) * length for number in range(count)))


async def test_embedding_lets_others_step_in_between(autojump_clock: MockClock) -> None:
    """256 texts at once would hold the engine's thread for minutes, and every peer would take us for frozen."""
    async with host(embed_s=0.05) as here, trio.open_nursery() as nursery:
        asked, made = texts(256), list[Embedded]()

        async def embed() -> None:
            made.append(await here.hosting.embed(asked))

        nursery.start_soon(embed)
        at_s: list[float] = []
        async with here.hosting.generate(work(tokens=8)) as items:
            async for item in items:
                if isinstance(item, Piece):
                    at_s.append(trio.current_time())
        assert max(b - a for a, b in pairwise(at_s)) < 2.0
        await eventually(lambda: bool(made), 30)
        assert made[0].vectors == tuple(map(vector_of, asked.texts))
        assert made[0].prompt_tokens == 256
        assert len(made[0].truncated) == 256


async def test_a_turn_takes_the_time_of_a_turn_and_at_least_one_text(autojump_clock: MockClock) -> None:
    """Its length follows from what turns took, on a slow machine and on a fast one."""
    async with host(embed_s=0.01) as here:
        await here.hosting.embed(texts(256, 40))
        assert max(here.runtime.embedded[1:]) <= 1.5 * TURN_S / 0.01
        assert here.runtime.embedded[-2] >= 0.5 * TURN_S / 0.01
        here.runtime.embed_s = 3.0
        here.runtime.embedded.clear()
        await here.hosting.embed(texts(30, 40))
        assert here.runtime.embedded[1:] == [1] * (30 - here.runtime.embedded[0])
        result = await here.hosting.embed(texts(3, 2_500))
        assert result.truncated == (True,) * 3


async def test_embedding_that_is_left_stops(autojump_clock: MockClock) -> None:
    async with host(embed_s=1.0) as here:
        with trio.move_on_after(1.0):
            await here.hosting.embed(texts(256))
        await trio.sleep(300)
        assert len(here.runtime.embedded) == 1
        assert here.hosting.embeds_waiting == 0
        assert len((await here.hosting.embed(texts(1))).vectors) == 1


async def test_embedding_errors(autojump_clock: MockClock) -> None:
    async with host() as here:
        here.runtime.embed_error = BadInput("a text is empty", param="input")
        with pytest.raises(BadRequest, match="empty"):
            await here.hosting.embed(texts(40))
        here.runtime.embed_error = ComputeFailed("nan")
        with pytest.raises(InternalError):
            await here.hosting.embed(texts(40))
        here.runtime.embed_error = None
        here.runtime.facts = facts(embeds=False)
        with pytest.raises(UnknownModel):
            await here.hosting.embed(texts(1))


async def test_the_queue_of_embeddings_is_bounded(autojump_clock: MockClock) -> None:
    async with host(embed_s=1.0) as here, trio.open_nursery() as nursery:
        for _ in range(EMBED_QUEUE_MAX):
            nursery.start_soon(here.hosting.embed, texts(1))
        await trio.sleep(0.5)
        with pytest.raises(NoRoom):
            await here.hosting.embed(texts(1))
        nursery.cancel_scope.cancel()


async def test_idle_waits_for_embeddings_too(autojump_clock: MockClock) -> None:
    async with host(embed_s=1.0) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here.hosting.embed, texts(3))
        await trio.sleep(0.1)
        await here.hosting.wait_idle()
        assert trio.current_time() >= 3.0


# --- what is told ---


async def test_changes_are_told_when_room_changes_and_else_rarely(autojump_clock: MockClock) -> None:
    async with host(step_s=0.01, slots=4) as here:
        await here.items(work(tokens=1000))
        assert 1000 * 0.01 / CHANGE_EVERY_S * 0.8 <= len(here.changes_s) <= 1000 * 0.01 / CHANGE_EVERY_S + 3
        here.changes_s.clear()
        await trio.sleep(5)
        assert here.changes_s == []  # nothing runs, nothing changes
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(here.items, work(tokens=3))
        assert len(here.changes_s) >= 2
        assert here.hosting.statistics().slots_free == 4


async def test_minus_infinity_is_told_as_a_number(autojump_clock: MockClock) -> None:
    async with host(logprob=float("-inf")) as here:
        items = await here.items(replace(work(), sampling=replace(work().sampling, logprobs=1)))
        logprobs = [entry for item in items if isinstance(item, Piece) for entry in item.logprobs]
        assert len(logprobs) == 10
        assert {entry.logprob for entry in logprobs} == {LOGPROB_MIN}
        assert {entry.top[0][1] for entry in logprobs} == {LOGPROB_MIN}


async def test_a_real_thread_works_too() -> None:
    """No mock clock: the default hop."""
    runtime = FakeRuntime()
    async with trio.open_nursery() as nursery:
        hosting = Hosting(runtime, peer="me", on_change=lambda: None)
        await nursery.start(hosting.run)
        with trio.fail_after(20):
            async with hosting.generate(work("hello", 5)) as items:
                got = [item async for item in items]
            assert isinstance(got[-1], Finished)
            assert len((await hosting.embed(texts(40))).vectors) == 40
        nursery.cancel_scope.cancel()


async def test_the_thread_is_lent_while_there_is_no_request(autojump_clock: MockClock) -> None:
    async with host(step_s=1.0) as here:
        learnt_s: list[float] = []

        async def learn() -> None:
            for _ in range(3):
                await here.hosting.borrow(lambda: learnt_s.append(trio.current_time()))
                await trio.sleep(1.0)

        async with trio.open_nursery() as nursery:
            began = trio.current_time()
            nursery.start_soon(learn)
            await trio.sleep(0.5)
            await here.items(work("hello", 5))
            answered_s = trio.current_time()
        assert [at - began for at in learnt_s] == [0.0, answered_s - began, answered_s - began + 1.0]
        assert answered_s - began == 5.5


async def test_a_loan_brings_its_result_or_its_error_and_one_that_was_left_is_not_run(
    autojump_clock: MockClock,
) -> None:
    async with host() as here:
        assert await here.hosting.borrow(lambda: 7) == 7

        def fails() -> None:
            raise OutOfMemory("no room for it")

        with pytest.raises(OutOfMemory, match="no room"):
            await here.hosting.borrow(fails)
        done: list[int] = []
        async with here.hosting.generate(work("hello", 5)):
            with trio.move_on_after(0.01):
                await here.hosting.borrow(lambda: done.append(1))
        await trio.sleep(5)
        assert done == []


async def test_a_loan_that_runs_is_waited_for_by_who_is_cancelled(autojump_clock: MockClock) -> None:
    """What it works on is its owner's again when it has ended, and no sooner."""
    async with host() as here:
        runtime, ended_s = here.runtime, list[float]()

        def long() -> None:
            runtime.takes_s = 5.0

        began_s = trio.current_time()
        with trio.move_on_after(1.0) as scope:
            try:
                await here.hosting.borrow(long)
            finally:
                ended_s.append(trio.current_time() - began_s)
        assert scope.cancelled_caught
        assert ended_s == [5.0]
        assert await here.hosting.borrow(lambda: 7) == 7


async def test_a_loan_that_is_a_bug_ends_the_engine_and_leaves_nobody_waiting(autojump_clock: MockClock) -> None:
    def wrong() -> None:
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with host() as here:
            with trio.fail_after(10):
                await here.hosting.borrow(wrong)


def test_long_prompts_do_not_all_start_in_one_turn() -> None:
    """Each is turned into tokens there, which takes a long one tenths of a second."""
    waiting, sizes = Waiting(), [50_000] * 5 + [1_000_000, 10, 10]
    for number, size in enumerate(sizes):
        send, _ = trio.open_memory_channel[AnswerItem | RequestError](1)
        waiting.starts.append(Job(work=work(), requester=OWN, size=size, send=send, key=str(number)))
    turns = []
    while waiting.starts:
        turns.append([job.size for job in waiting.next_starts()])
    assert [size for turn in turns for size in turn] == sizes
    assert all(len(turn) == 1 or sum(turn) <= START_BYTES_PER_TURN for turn in turns)
    assert [len(turn) for turn in turns] == [2, 2, 1, 1, 2]


async def test_weights_change_between_requests_and_the_new_revision_is_told(autojump_clock: MockClock) -> None:
    async with host(step_s=0.5) as here:
        async with trio.open_nursery() as nursery:
            made: list[list[AnswerItem | RequestError]] = []

            async def ask(text: str) -> None:
                made.append(await here.items(work(text, 6)))

            nursery.start_soon(ask, "first")
            await trio.sleep(0.7)
            await here.hosting.switch("weights", "r2")
            told = len(here.changes_s)
            nursery.start_soon(ask, "second")
        assert here.runtime.adopted == [("ready", "weights")]
        assert told > 0
        assert [items[0].revision for items in made if isinstance(items[0], Started)] == ["r1", "r2"]
        assert not here.hosting.serves("tale", "r1", "causal")


async def test_weights_are_made_ready_between_the_steps_of_a_request(autojump_clock: MockClock) -> None:
    async with host(step_s=0.5, pieces=4, piece_s=0.25) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here.items, work("first", 40))
        nursery.start_soon(here.hosting.switch, "weights", "r2")
        await trio.sleep(3.9)
        before = here.runtime._steps
        assert before == 6  # four of 0.75 s, and others of 0.5; the last has begun
        await trio.sleep(1)
        assert here.runtime._steps == before + 2
        assert here.runtime.adopted == []
        await trio.sleep(17)
        assert here.runtime.adopted == [("ready", "weights")]


async def test_weights_that_do_not_fit_are_an_error_and_change_nothing(autojump_clock: MockClock) -> None:
    async with host(pieces=2) as here:
        with pytest.raises(BadModel, match="of another"):
            await here.hosting.switch(BadModel("of another"), "r2")
        assert here.hosting.revision == "r1"
        await here.items(work("again", 2))


async def test_a_switch_that_is_left_halfway_is_dropped(autojump_clock: MockClock) -> None:
    async with host(pieces=10, piece_s=0.5) as here:
        with trio.move_on_after(2):
            await here.hosting.switch("weights", "r2")
        await here.items(work("again", 2))
        assert here.runtime.pieces_made <= 5
        await here.hosting.switch("others", "r3")
        assert here.runtime.adopted == [("ready", "others")]


async def test_who_never_rests_is_held_back_for_a_switch(autojump_clock: MockClock) -> None:
    async with host(step_s=0.5, slots=2) as here, trio.open_nursery() as nursery:

        async def ask_on(wait_s: float) -> None:
            await trio.sleep(wait_s)
            while True:
                await here.items(work("again", 6))

        nursery.start_soon(ask_on, 0.0)
        nursery.start_soon(ask_on, 1.7)
        await trio.sleep(2)
        began = trio.current_time()
        await here.hosting.switch("weights", "r2")
        assert SWITCH_S <= trio.current_time() - began < SWITCH_S + 5
        await trio.sleep(8)
        assert here.hosting.runtime.facts.revision == "r2"
        assert here.runtime.busy == 2
        nursery.cancel_scope.cancel()


async def test_a_request_for_a_revision_that_has_gone_meanwhile_is_not_answered_by_another(
    autojump_clock: MockClock,
) -> None:
    async with host(step_s=0.5, slots=1) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here.items, work("first", 40))
        await trio.sleep(0.1)
        nursery.start_soon(here.hosting.switch, "weights", "r2")
        await trio.sleep(SWITCH_S + 1)  # held now
        ends = await here.items(replace(work("second", 4), revision="r1"))
        assert isinstance(ends[-1], InternalError)
        assert "r2" in str(ends[-1])


async def test_a_request_that_leaves_while_it_is_held_back_is_never_started(autojump_clock: MockClock) -> None:
    async with host(step_s=0.5, slots=1) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here.items, work("first", 60))
        await trio.sleep(0.1)
        nursery.start_soon(here.hosting.switch, "weights", "r2")
        await trio.sleep(SWITCH_S + 1)  # held now
        with trio.move_on_after(2):
            await here.items(work("second", 4))
        assert here.hosting.details()["queued_bytes"] < 100, "nothing of it is held, however long the switch waits"
        assert not here.hosting._waiting.starts
        await trio.sleep(30)
        assert here.hosting.runtime.facts.revision == "r2"
        await here.items(work("the third", 4))
        assert [len(request.prompt) for request in here.runtime.added] == [len("first"), len("the third")]
