"""node/upstream_stream.py: any bytes, cut anywhere, give events and chunks or one error."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.upstream_stream import (
    EVENT_BYTES_MAX,
    LOGPROB_MIN,
    MESSAGE_CHARS_MAX,
    Events,
    Garbled,
    chunk_of,
    message_of,
)
from node.work import TokenLogprob

LINES = st.text(st.characters(exclude_characters="\r\n", codec="utf-8"), max_size=20)
ENDS = st.sampled_from(["\n", "\r", "\r\n"])


def cut(content: bytes, places: list[int]) -> list[bytes]:
    marks = sorted({0, len(content), *(place % (len(content) + 1) for place in places)})
    return [content[begin:end] for begin, end in pairwise(marks)]


def events_of(parts: list[bytes]) -> list[bytes]:
    events = Events()
    return [event for part in parts for event in events.feed(part)]


@given(
    st.lists(st.tuples(st.lists(LINES, min_size=1, max_size=3), st.lists(LINES, max_size=2)), max_size=5),
    ENDS,
    st.lists(st.integers(0, 10_000), max_size=20),
)
def test_events_come_whole_however_they_are_cut(
    wanted: list[tuple[list[str], list[str]]], end: str, places: list[int]
) -> None:
    text = ""
    for lines, comments in wanted:
        text += "".join(f":{comment}{end}" for comment in comments) + f"event: x{end}"
        text += "".join(f"data: {line}{end}" for line in lines) + end
    assert events_of(cut(text.encode(), places)) == ["\n".join(lines).encode() for lines, _ in wanted]


@given(st.binary(max_size=300), st.lists(st.integers(0, 400), max_size=30))
def test_any_bytes_give_the_same_events_however_they_are_cut(content: bytes, places: list[int]) -> None:
    assert events_of(cut(content, places)) == events_of([content])


def test_what_the_standard_says_of_the_edges() -> None:
    assert events_of([b"\xef\xbb\xbfdata: a\n\n"]) == [b"a"]
    assert events_of([b"data\n\ndata:\n\ndata:  two\n\n"]) == [b"", b"", b" two"]
    assert events_of([b"data: a\r", b"\n\r", b"\ndata: b\n\n"]) == [b"a", b"b"]
    assert events_of([b"data: no end\n"]) == []
    assert events_of([b": only a comment\n\n\n"]) == []


@pytest.mark.parametrize("line", [b"data: ", b"", b"event: "], ids=["data", "bare", "other"])
def test_a_line_that_never_ends_is_refused(line: bytes) -> None:
    events = Events()
    events.feed(line)
    for _ in range(EVENT_BYTES_MAX // 65_536 - 1):
        events.feed(b"x" * 65_536)
    with pytest.raises(Garbled, match="a line of over"):
        events.feed(b"x" * 65_537)


def test_an_event_of_many_lines_is_refused() -> None:
    events = Events()
    for _ in range(EVENT_BYTES_MAX // 65_536):
        events.feed(b"data: " + b"x" * 65_535 + b"\n")
    with pytest.raises(Garbled, match="an event of over"):
        events.feed(b"data: x\n")


def event(**content: Any) -> bytes:
    return json.dumps(content).encode()


def test_chunks_of_both_routes() -> None:
    chat = chunk_of(event(choices=[{"index": 0, "delta": {"content": "hé"}, "finish_reason": None}]), top=None)
    text = chunk_of(event(choices=[{"index": 0, "text": "hé", "finish_reason": "stop"}], id="x", more={}), top=None)
    assert (chat.text, chat.finish) == ("hé", None)
    assert (text.text, text.finish) == ("hé", "stop")
    assert chunk_of(event(choices=[{"delta": {"reasoning_content": "hm"}}]), top=None).has_reasoning
    assert chunk_of(event(choices=[{"index": 1, "text": "another's"}]), top=None).text == ""
    assert chunk_of(event(choices=[{"delta": {"role": "assistant", "content": None}}]), top=None).text == ""


def test_what_servers_count() -> None:
    usage = chunk_of(event(choices=[], usage={"prompt_tokens": 3, "completion_tokens": 9}), top=None)
    assert (usage.prompt_tokens, usage.completion_tokens) == (3, 9)
    timings = {"cache_n": 2, "prompt_n": 5, "predicted_n": 4, "prompt_per_second": 80.5, "predicted_ms": 1.5}
    timed = chunk_of(event(choices=[{"text": "a"}], timings=timings), top=None)
    assert (timed.prompt_tokens, timed.completion_tokens) == (7, 4)
    progress = chunk_of(event(choices=[], prompt_progress={"total": 9, "processed": 4, "cache": 0}), top=None)
    assert (progress.prompt_tokens, progress.prefilled_tokens) == (9, 4)


def test_logprobs_of_both_shapes() -> None:
    content = [
        {
            "token": "a",
            "logprob": -0.5,
            "top_logprobs": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -9}],
        }
    ]
    wanted = (TokenLogprob(text="a", logprob=-0.5, top=(("a", -0.5),)),)
    assert chunk_of(event(choices=[{"text": "a", "logprobs": {"content": content}}]), top=1).logprobs == wanted
    lists = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -9.0, "a": -0.5}], "text_offset": [0]}
    assert chunk_of(event(choices=[{"text": "a", "logprobs": lists}]), top=1).logprobs == wanted
    assert chunk_of(event(choices=[{"text": "a", "logprobs": lists}]), top=None).logprobs == ()
    lists = {"tokens": ["a"], "token_logprobs": [None]}
    assert chunk_of(event(choices=[{"text": "a", "logprobs": lists}]), top=0).logprobs[0].logprob == LOGPROB_MIN


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b'{"choices": "none"}',
        b'{"choices": [{"text": 5}]}',
        b'{"choices": [{"text": "\\ud800"}]}',
        b'{"usage": {"prompt_tokens": -1}}',
        b'{"usage": {"completion_tokens": 1e400}}',
        b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": []}}]}',
        b'{"error": {"message": "out of memory"}}',
        b'{"error": "out of memory"}',
    ],
    ids=lambda content: repr(content[:30]),
)
def test_what_is_no_chunk_is_garbled(content: bytes) -> None:
    with pytest.raises(Garbled):
        chunk_of(content, top=3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["choices", "delta", "text", "content", "usage", "timings", "logprobs", "error", "index"])
            | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@given(JSON)
def test_any_json_gives_a_chunk_or_is_garbled(content: Any) -> None:
    try:
        chunk = chunk_of(json.dumps(content).encode(), top=2)
    except Garbled:
        return
    assert all(math.isfinite(one.logprob) for one in chunk.logprobs)


@given(JSON)
def test_a_message_is_one_short_printable_line(content: Any) -> None:
    said = message_of(content)
    assert 0 < len(said) <= MESSAGE_CHARS_MAX
    assert said.isprintable()


def test_messages_in_the_shapes_that_servers_have() -> None:
    assert message_of({"error": {"message": "too\nlong", "code": 400}}) == "too long"
    assert message_of({"error": "no such model"}) == "no such model"
    assert message_of({"detail": [{"msg": "a field", "loc": []}]}) == "a field"
    assert message_of({"object": "error", "message": "older vLLM"}) == "older vLLM"
    assert message_of({}) == "it does not say why"
