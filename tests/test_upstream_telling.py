"""node/upstream_telling.py: whatever a server streams, what peers and clients get keeps to the rules of an answer."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto.identity import PeerId
from gossip.messages import Capacity
from node.errors import BadRequest, PeerFailed, RequestError
from node.judge import TOKEN_CHARS_MAX, Judge
from node.upstream_stream import Chunk
from node.upstream_telling import Telling
from node.work import (
    UNKNOWN_TOKEN,
    AnswerItem,
    Finished,
    GenerateWork,
    Piece,
    Progress,
    Sampling,
    Started,
    TokenLogprob,
    item_from_wire,
    to_wire,
)

US = PeerId("12D3KooWus")
LOGPROB = TokenLogprob(text="a", logprob=-0.5)


def work(tokens: int = 9, **changes: Any) -> GenerateWork:
    return GenerateWork(
        request_id="q", text="hi", sampling=Sampling(max_tokens=tokens, **changes.pop("sampling", {})), **changes
    )


def begun(said: str, count: int, **changes: Any) -> GenerateWork:
    fields = {"delivered": (UNKNOWN_TOKEN,) * count, "delivered_chars": len(said), "delivered_text": said}
    return work(**fields, **changes)


def told(asked: GenerateWork, chunks: list[Chunk], seam: str = "") -> list[AnswerItem]:
    telling = Telling(asked, Started(served_by=US, model="m", revision="said:x", prompt_tokens=0))
    telling.joins_after(seam)
    items = [item for chunk in chunks for item in telling.take(chunk, steps=1)]
    return items + telling.end()


def text(items: list[AnswerItem]) -> str:
    return "".join(item.text for item in items if isinstance(item, Piece))


def tokens(items: list[AnswerItem]) -> int:
    return sum(len(item.tokens) for item in items if isinstance(item, Piece))


def judged(asked: GenerateWork, items: list[AnswerItem]) -> None:
    """As a peer judges it, over the wire's own form."""
    judge = Judge(US, Capacity(), asked, 0.0)
    for item in items:
        assert item_from_wire(to_wire(item)) == item
        if isinstance(item, Finished):
            judge.end(item)
        else:
            judge.take(item, 1.0)


def test_a_chunk_is_a_token_until_the_end_says_more() -> None:
    chunks = [Chunk(text="a"), Chunk(text="b"), Chunk(finish="stop"), Chunk(prompt_tokens=4, completion_tokens=5)]
    items = told(work(), chunks)
    assert (text(items), tokens(items)) == ("ab", 5)
    assert items[-1] == Finished(reason="stop", prompt_tokens=4, completion_tokens=5)
    judged(work(), items)


def test_servers_that_count_while_they_stream_are_believed() -> None:
    chunks = [Chunk(text="a", completion_tokens=1, prompt_tokens=4), Chunk(text="bcd", completion_tokens=4)]
    items = told(work(), [*chunks, Chunk(finish="length", completion_tokens=4)])
    assert [len(item.tokens) for item in items if isinstance(item, Piece)] == [1, 3]
    assert items[0] == Started(served_by=US, model="m", revision="said:x", prompt_tokens=4)
    assert items[-1] == Finished(reason="length", prompt_tokens=4, completion_tokens=4)


def test_a_server_that_counts_nothing_is_counted() -> None:
    items = told(work(), [Chunk(text="a"), Chunk(text=""), Chunk(text="b", finish="stop")])
    assert items[-1] == Finished(reason="stop", prompt_tokens=0, completion_tokens=2)


def test_what_it_reads_of_the_prompt_is_progress() -> None:
    chunks = [
        Chunk(prompt_tokens=10, prefilled_tokens=4),
        Chunk(prompt_tokens=10, prefilled_tokens=99),
        Chunk(text="a"),
    ]
    items = told(work(), [*chunks, Chunk(finish="stop")])
    assert [type(item) for item in items] == [Started, Progress, Progress, Piece, Finished]
    assert isinstance(items[0], Started)
    assert items[0].prompt_tokens == 10
    assert isinstance(items[2], Progress)
    assert items[2].prefilled_tokens == 10
    judged(work(), items)


def test_what_it_thinks_is_work_and_no_text() -> None:
    items = told(work(), [Chunk(has_reasoning=True), Chunk(has_reasoning=True), Chunk(text="a"), Chunk(finish="stop")])
    assert (text(items), tokens(items)) == ("a", 3)


@pytest.mark.parametrize("finish", [None, "content_filter", "error", "abort"])
def test_what_ends_without_an_end_is_broken_off(finish: str | None) -> None:
    with pytest.raises(PeerFailed, match=r"broke off after 1 tokens|ended the answer by"):
        told(work(), [Chunk(text="a"), Chunk(finish=finish)])


def test_more_than_was_asked_for_is_refused() -> None:
    flood = [Chunk(text="x" * TOKEN_CHARS_MAX)] * 3
    with pytest.raises(PeerFailed, match="characters for 2 tokens"):
        told(work(tokens=2), flood)


def test_logprobs_that_were_asked_for_and_do_not_come_are_said() -> None:
    asked = work(sampling={"logprobs": 2})
    with pytest.raises(BadRequest, match="no logprobs"):
        told(asked, [Chunk(text="a")])
    items = told(asked, [Chunk(text="ab", logprobs=(LOGPROB, LOGPROB), finish="stop")])
    assert tokens(items) == 2
    assert told(work(), [Chunk(text="a", logprobs=(LOGPROB,), finish="stop")])[1] == Piece(
        tokens=(UNKNOWN_TOKEN,), text="a"
    )


def test_the_rest_of_an_answer_counts_on() -> None:
    asked = begun("abc", 3)
    items = told(asked, [Chunk(text="d"), Chunk(finish="stop"), Chunk(prompt_tokens=9, completion_tokens=1)])
    assert text(items) == "d"
    assert items[-1] == Finished(reason="stop", prompt_tokens=6, completion_tokens=4)
    judged(asked, items)


def test_an_answer_that_was_whole_ends_at_once() -> None:
    telling = Telling(begun("abc", 9), Started(served_by=US, model="m", revision="said:x", prompt_tokens=0))
    items = telling.whole()
    assert items[-1] == Finished(reason="length", prompt_tokens=0, completion_tokens=9)
    judged(begun("abc", 9), items)


@pytest.mark.parametrize(
    "chunks", [["\n\n and"], ["\n", "\n", " and"], ["\n", "\n and"]], ids=["at once", "in three", "in two"]
)
def test_white_space_that_the_client_has_is_made_again_and_not_given_again(chunks: list[str]) -> None:
    asked = begun("so:\n\n", 2)
    items = told(asked, [*(Chunk(text=each) for each in chunks), Chunk(finish="stop")], seam="\n\n")
    assert text(items) == " and"
    judged(asked, items)


@pytest.mark.parametrize("chunks", [[" and"], ["\n and"], [""], ["\n"]], ids=["other", "less", "none", "cut"])
def test_a_rest_that_does_not_join_is_refused(chunks: list[str]) -> None:
    with pytest.raises(PeerFailed, match="does not join"):
        told(begun("so:\n\n", 2), [*(Chunk(text=each) for each in chunks), Chunk(finish="stop")], seam="\n\n")


CHUNKS = st.builds(
    Chunk,
    text=st.text(max_size=4) | st.just("x" * 3_000),
    has_reasoning=st.booleans(),
    logprobs=st.lists(st.just(LOGPROB), max_size=3).map(tuple),
    finish=st.sampled_from([None, None, None, "stop", "length", "tool_calls", "content_filter", "strange"]),
    prompt_tokens=st.none() | st.integers(0, 50),
    prefilled_tokens=st.none() | st.integers(0, 50),
    completion_tokens=st.none() | st.integers(0, 10_000),
)


@given(
    st.lists(CHUNKS, max_size=12),
    st.integers(1, 6_000),
    st.text(max_size=9),
    st.integers(0, 5),
    st.none() | st.integers(0, 2),
)
def test_whatever_comes_no_peer_is_right_to_call_us_a_liar(
    chunks: list[Chunk], most: int, said: str, delivered: int, logprobs: int | None
) -> None:
    count = min(delivered, most) if said else 0
    said = said if count else ""
    asked = begun(said, count, tokens=most, sampling={"logprobs": logprobs})
    seam = said[len(said.rstrip()) :]
    try:
        items = told(asked, chunks, seam)
    except RequestError:
        return
    judged(asked, items)
    whole = "".join(chunk.text for chunk in chunks)
    assert seam + text(items) == whole or (not whole and not text(items)), "no text is lost, changed or told twice"
