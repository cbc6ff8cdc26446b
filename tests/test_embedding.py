"""node/embedding.py and embed_queue.py: turns of many requests, whose each gets its own; drawn histories, no clock."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import BadInput, ComputeFailed
from model.step import Priority
from node.cache import Cache
from node.embed_queue import (
    CLASS_WEIGHT,
    STRETCH,
    TURN_BYTES_FIRST,
    TURN_S,
    TURN_TEXTS_MAX,
    EmbedJob,
    EmbedQueue,
    EmbedTurn,
    cost_of,
)
from node.embedding import Embedding
from node.errors import BadRequest, InternalError, NoRoom, TooMany
from node.kept_answers import Kept
from node.requester import OWN, Requester, of_client, of_peer
from node.work import Embedded, EmbedWork
from tests.fake_runtime import TALE, FakeRuntime, vector_of

WHO = [OWN, of_client("203.0.113.9"), of_peer("a", is_good=True), *(of_peer(n, is_good=False) for n in "bcd")]


def asked(*texts: str | tuple[int, ...], **marks: bool) -> EmbedWork:
    return EmbedWork(request_id="q", texts=texts, **marks)


@dataclass
class Desk:
    """An Embedding over a fake runtime, without a node around it."""

    runtime: FakeRuntime = field(default_factory=lambda: FakeRuntime(embed_s=0.001))
    cache_bytes: int = 1_000_000
    ended: Counter[int] = field(default_factory=Counter)  # of each request, by its number

    def __post_init__(self) -> None:
        self.cache = Cache[Kept](self.cache_bytes)
        self.embedding = Embedding(self.runtime, self.cache, peer="me")
        self._numbers = itertools.count()

    def admit(self, work: EmbedWork, who: Requester = OWN) -> EmbedJob:
        number = next(self._numbers)
        return self.embedding.admit(work, who, lambda: self.ended.update([number]))

    def turn(self, *, is_held: bool = False, share: float = 1.0) -> EmbedTurn | None:
        turn = self.embedding.take(is_held=is_held, share=share)
        if turn is not None:
            self.embedding.carry_out(turn)
            self.embedding.settle(turn)
        return turn

    def all(self) -> int:
        turns = 0
        while self.turn() is not None:
            turns += 1
            assert turns < 10_000
        return turns


def is_right(job: EmbedJob) -> bool:
    result = job.result
    return (
        isinstance(result, Embedded)
        and result.vectors == tuple(map(vector_of, job.work.texts))
        and result.prompt_tokens == sum(map(len, job.work.texts))
        and len(result.truncated) == len(job.work.texts)
        and (result.served_by, result.model) == ("me", "tale")
    )


TEXT = st.one_of(st.text("abä🙂", min_size=1, max_size=30), st.lists(st.integers(1, 9), min_size=1).map(tuple))
WORK = st.tuples(st.sampled_from(WHO), st.lists(TEXT, min_size=1, max_size=12), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_every_request_ends_once_with_its_own_vectors(data: st.DataObject) -> None:
    desk, jobs, left = Desk(cache_bytes=data.draw(st.sampled_from([0, 20_000]))), list[EmbedJob](), set[int]()
    for act in data.draw(
        st.lists(st.sampled_from(["ask", "ask", "turn", "leave", "fail", "bad", "held"]), max_size=40)
    ):
        match act:
            case "ask" | "bad":
                who, texts, keep = data.draw(WORK)
                if act == "bad":
                    texts.insert(data.draw(st.integers(0, len(texts))), "")
                try:
                    jobs.append(desk.admit(asked(*texts, keep=keep), who))
                except NoRoom:
                    continue
            case "turn" | "held":
                desk.turn(is_held=act == "held", share=data.draw(st.sampled_from([0.5, 1.0])))
            case "fail":
                desk.runtime.embed_error = ComputeFailed("nan")  # of nobody knows which
                desk.turn()
                desk.runtime.embed_error = None
            case "leave" if jobs:
                place = data.draw(st.integers(0, len(jobs) - 1))
                left.add(place)
                desk.embedding.leave(jobs[place])
    desk.all()
    for place, job in enumerate(jobs):
        assert desk.ended[place] <= 1
        if place not in left:
            assert desk.ended[place] == 1
        match job.result:
            case Embedded():
                assert is_right(job)
            case BadRequest():
                assert "" in job.work.texts
            case InternalError():
                pass
            case _:
                assert place in left
    assert len(desk.embedding) == desk.embedding.queued_bytes == 0


def test_texts_of_several_requests_share_a_pass() -> None:
    desk = Desk()
    jobs = [desk.admit(asked(letter)) for letter in "abcdefgh"]
    assert desk.all() == 1
    assert desk.runtime.embedded == [8]
    assert all(map(is_right, jobs))


def test_a_bad_text_ends_its_own_request_and_spoils_no_other_turn() -> None:
    desk = Desk()
    good, bad, other = desk.admit(asked("a", "b")), desk.admit(asked("c", "")), desk.admit(asked("d"))
    desk.turn()
    assert isinstance(bad.result, BadRequest)
    assert bad.result.param == "input"
    turn = desk.turn()
    assert turn is not None
    assert {text.job for text in turn.texts} == {good, other}
    assert is_right(good)
    assert is_right(other)


def test_when_nobody_knows_whose_text_failed_each_request_goes_on_alone() -> None:
    desk = Desk()
    jobs = [desk.admit(asked(letter)) for letter in "abc"]
    desk.runtime.embed_error = ComputeFailed("nan")
    desk.turn()
    assert [job.result for job in jobs] == [None] * 3
    desk.turn()  # of one request now, which it must be
    assert isinstance(jobs[0].result, InternalError)
    desk.runtime.embed_error = None
    desk.all()
    assert [is_right(job) for job in jobs] == [False, True, True]
    assert desk.runtime.embedded == [3, 1, 1, 1]


def test_a_single_text_does_not_wait_behind_256() -> None:
    """Nor behind many such requests, of the same client or of others."""
    for who in WHO:
        desk = Desk()
        for other in WHO:
            desk.admit(asked(*(f"text {number} of many" for number in range(256))), other)
        for _ in range(5):
            desk.turn()
        late = desk.admit(asked("short"), who)
        turns = 0
        while late.result is None:
            desk.turn()
            turns += 1
        assert turns <= 2, who


def served(queue: EmbedQueue, turns: int) -> Counter[Requester]:
    taken: Counter[Requester] = Counter()
    for _ in range(turns):
        for job, place in queue.take(is_held=False).texts:
            taken[job.requester] += cost_of(job.work.texts[place])
    return taken


def job_of(who: Requester, *texts: str) -> EmbedJob:
    job = EmbedJob(work=asked(*texts), requester=who, on_end=lambda: None, facts=TALE, made=[None] * len(texts))
    job.pending.extend(range(len(texts)))
    return job


@given(st.lists(st.integers(1, 60), min_size=6, max_size=6))
def test_shares_are_by_class_and_then_by_requester(lengths: list[int]) -> None:
    """However long a requester's texts are and however many requests it has."""
    queue = EmbedQueue()
    for number, (who, length) in enumerate(zip(WHO, lengths, strict=True)):
        for _ in range(1 + number % 3):
            queue.add(job_of(who, *["x" * length] * 256))
    taken = served(queue, 20)
    slack = max(map(cost_of, ["x" * 60])) + 1
    for priority in Priority:
        shares = [taken[who] for who in WHO if who.priority == priority]
        assert max(shares) - min(shares) <= slack
    weighted = [sum(taken[who] for who in WHO if who.priority == p) / CLASS_WEIGHT[p] for p in Priority]
    assert max(weighted) - min(weighted) <= slack


def test_a_turn_is_as_long_as_fits_its_time() -> None:
    queue, s_per_byte = EmbedQueue(), 2e-5
    queue.add(job_of(OWN, *["x" * 84] * 256))
    for _ in range(8):
        turn = queue.take(is_held=False)
        queue.took(turn, turn.cost * s_per_byte)
    assert 0.5 * TURN_S <= turn.cost * s_per_byte <= TURN_S
    half = queue.take(is_held=False, share=0.5)
    assert half.cost * s_per_byte <= 0.5 * TURN_S
    queue.took(half, half.cost * s_per_byte * 10)  # others came: it is slower now
    assert queue.take(is_held=False).cost * s_per_byte * 10 <= TURN_S


def test_on_a_slow_machine_a_turn_is_still_worth_a_pass_but_not_at_any_price() -> None:
    for s_per_byte, cost in ((8e-4, 384), (1e-2, 40), (1.0, 20)):
        queue = EmbedQueue()
        queue.add(job_of(OWN, *["x" * 4] * 256))  # 20 bytes each
        for _ in range(8):
            turn = queue.take(is_held=False)
            queue.took(turn, turn.cost * s_per_byte)
        assert cost - 20 < turn.cost <= cost
        assert turn.cost * s_per_byte <= STRETCH * TURN_S or len(turn.texts) == 1


def test_a_turn_has_a_bound_whatever_time_there_is() -> None:
    queue = EmbedQueue()
    for _ in range(4):
        queue.add(job_of(OWN, *["x"] * 256))
    first = queue.take(is_held=False)
    assert first.cost <= TURN_BYTES_FIRST
    assert len(first.texts) > 1
    queue.turn_bytes = 1 << 20
    assert len(queue.take(is_held=False).texts) == TURN_TEXTS_MAX
    huge = EmbedQueue()
    huge.add(job_of(OWN, "x" * 100_000, "y"))
    assert len(huge.take(is_held=False).texts) == 1, "what is larger than a turn has one of its own"


def test_one_requester_may_have_half_of_the_queue_but_this_machine_all() -> None:
    queue, greedy = EmbedQueue(), of_client("203.0.113.9")
    for _ in range(32):
        queue.add(job_of(greedy, "a"))
    with pytest.raises(TooMany):
        queue.add(job_of(greedy, "a"))
    for _ in range(32):
        queue.add(job_of(OWN, "a"))
    with pytest.raises(NoRoom):
        queue.add(job_of(OWN, "a"))


# --- what is kept ---


def test_a_text_that_was_embedded_is_not_embedded_again() -> None:
    desk = Desk()
    desk.admit(asked("a", "b", (1, 2), keep=True))
    desk.all()
    again, mixed = desk.admit(asked((1, 2), "a", keep=True)), desk.admit(asked("a", "new", "b", keep=True))
    assert is_right(again)
    assert mixed.result is None
    desk.all()
    assert is_right(mixed)
    assert desk.runtime.embedded == [3, 1]
    assert desk.cache.statistics().hits == {"embedding": 4}
    assert desk.ended == {0: 1, 1: 1, 2: 1}


def test_private_and_unmarked_requests_neither_keep_nor_find() -> None:
    desk = Desk()
    for marks in ({}, {"private": True}, {"keep": True, "private": True}):
        desk.admit(asked("a", **marks))
        desk.all()
    assert desk.cache.statistics().entries == 0
    desk.admit(asked("a", keep=True))
    desk.all()
    desk.admit(asked("a", private=True, keep=True))
    desk.all()
    assert desk.runtime.embedded == [1] * 5


def test_a_request_has_vectors_of_one_revision_only() -> None:
    """What was found of the weights before, when those after came between."""
    desk = Desk()
    desk.admit(asked("a", "b", keep=True))
    desk.all()
    job = desk.admit(asked("a", "c", "b", keep=True))
    assert not desk.embedding.has_next(is_held=True), "it has not begun, so a switch need not wait for it"
    desk.runtime.facts = replace(TALE, revision="r2")
    desk.cache.forget((desk.runtime.facts,))
    desk.all()
    assert is_right(job)
    assert isinstance(job.result, Embedded)
    assert job.result.revision == "r2"
    assert desk.runtime.embedded == [2, 1, 2]
    fresh = desk.admit(asked("a", keep=True))
    assert isinstance(fresh.result, Embedded)
    assert fresh.result.revision == "r2"


def test_what_has_begun_goes_on_while_new_requests_are_held_back() -> None:
    desk = Desk()
    begun = desk.admit(asked(*"abcdefghij" * 10))
    desk.turn()
    late = desk.admit(asked("z"))
    while desk.turn(is_held=True) is not None:
        pass
    assert is_right(begun)
    assert late.result is None


def test_padding_is_told() -> None:
    desk = Desk()
    desk.admit(asked("a" * 10, "b" * 30))
    desk.all()
    figures = desk.embedding.statistics()
    assert (figures.requests, figures.texts, figures.tokens, figures.padded_tokens) == (1, 2, 40, 60)
    assert (figures.passes, figures.turns, figures.waiting) == (1, 1, 0)
    assert figures.padding_share == pytest.approx(1 / 3, abs=1e-3)


def test_an_empty_text_of_one_request_is_its_fault() -> None:
    desk = Desk()
    desk.runtime.embed_error = BadInput("a text is too odd")
    job = desk.admit(asked("a"))
    desk.turn()
    assert isinstance(job.result, BadRequest)
