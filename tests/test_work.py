"""node/work.py: the wire form of requests and answers: there and back, bounded, strict."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crypto.canonical import decode, encode
from node.work import (
    MESSAGES_MAX,
    REMAINING_MS_MAX,
    STOPS_MAX,
    TEXTS_MAX,
    TOKENS_MAX,
    WORK_LIMITS,
    AnswerItem,
    Embedded,
    EmbedWork,
    Finished,
    GenerateWork,
    Message,
    Piece,
    Progress,
    Sampling,
    Started,
    TokenLogprob,
    from_wire,
    to_wire,
)
from p2p.errors import RemoteProtocolError
from p2p.rpc import Call, decode_frame, encode_frame

STRUCTS = [
    GenerateWork(request_id="q", messages=(Message(role="user", content="hé"),), sampling=Sampling(stop=("a",))),
    GenerateWork(request_id="q", tokens=(1, 2), delivered=(3,), delivered_chars=2, model="m", revision="r"),
    EmbedWork(request_id="q", texts=("a", (1, 2, 3))),
    GenerateWork(request_id="q", text="a", private=True),
    EmbedWork(request_id="q", texts=("a",), keep=True),
    Started(served_by="p", model="m", revision="r", prompt_tokens=3, cached=True),
    Started(served_by="p", model="m", revision="r", prompt_tokens=3),
    Progress(engine_steps=1, prefilled_tokens=2, queue_position=3),
    Piece(tokens=(1,), text="x", logprobs=(TokenLogprob(text="x", logprob=-0.5, top=(("y", -1.5),)),)),
    Finished(reason="stop", prompt_tokens=1, completion_tokens=2),
    Embedded(
        served_by="p",
        model="m",
        revision="r",
        dimensions=2,
        vectors=(b"\x00" * 8,),
        truncated=(False,),
        prompt_tokens=1,
    ),
]


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: type(struct).__name__)
def test_there_and_back_over_the_real_encoding(struct: Any) -> None:
    assert from_wire(decode(encode(to_wire(struct)), WORK_LIMITS), type(struct)) == struct


def test_token_ids_of_a_request_travel_as_bytes() -> None:
    assert to_wire(STRUCTS[1])["tokens"] == ids(1, 2)
    assert to_wire(STRUCTS[1])["delivered"] == ids(3)
    assert to_wire(STRUCTS[2])["texts"] == ["a", ids(1, 2, 3)]
    assert to_wire(STRUCTS[0])["tokens"] is None


def test_the_largest_prompt_and_the_longest_chat_fit_a_frame() -> None:
    tokens = tuple(range(70_000, 70_000 + TOKENS_MAX))
    chat = (Message(role="user", content="\u4e00" * 200),) * MESSAGES_MAX
    for work in (
        GenerateWork(request_id="q", tokens=tokens),
        GenerateWork(request_id="q", delivered=tokens[1:], tokens=(1,)),
        GenerateWork(request_id="q", messages=chat, sampling=Sampling(stop=("a",) * STOPS_MAX)),
        GenerateWork(request_id="q", text="\U0001f600" * 200_000),
        EmbedWork(request_id="q", texts=("\u4e00" * 1300,) * TEXTS_MAX),
    ):
        raw = encode_frame(Call(1, "m", to_wire(work)), WORK_LIMITS)
        assert from_wire(decode_frame(raw, WORK_LIMITS).body, type(work)) == work  # type: ignore[union-attr]


def test_a_mark_that_is_not_set_is_not_there() -> None:
    for struct in STRUCTS:
        wire = to_wire(struct)
        for mark in ("private", "keep", "cached"):
            assert (mark in wire) == (getattr(struct, mark, False) is True)
    plain = {"type": "generate", "request_id": "q", "text": "a"}
    assert from_wire(plain, GenerateWork).may_be_kept is False
    for marks, may in (({"keep": True}, True), ({"keep": True, "private": True}, False), ({"private": True}, False)):
        assert from_wire({**plain, **marks}, GenerateWork).may_be_kept is may
    with pytest.raises(RemoteProtocolError, match="private"):
        from_wire({**plain, "private": 1}, GenerateWork)


@pytest.mark.parametrize(
    "struct", [each for each in STRUCTS if isinstance(each, AnswerItem)], ids=lambda struct: type(struct).__name__
)
def test_an_answers_item_is_known_by_its_tag(struct: Any) -> None:
    assert from_wire(to_wire(struct), AnswerItem) == struct  # type: ignore[arg-type]  # a union is a type here


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: type(struct).__name__)
def test_unknown_missing_and_mistyped_fields_are_named(struct: Any) -> None:
    wire = to_wire(struct)
    with pytest.raises(RemoteProtocolError, match="extra"):
        from_wire({**wire, "extra": 1}, type(struct))
    with pytest.raises(RemoteProtocolError, match="does not fit"):
        from_wire({"type": wire["type"]}, type(struct))
    for name in wire:
        with pytest.raises(RemoteProtocolError, match="does not fit"):
            from_wire({**wire, name: {"a": object()}}, type(struct))


def ids(*tokens: int) -> bytes:
    return b"".join(token.to_bytes(4, "little") for token in tokens)


BAD_WORK: list[dict[str, Any]] = [
    {"request_id": "x" * 65},
    {"remaining_ms": 0},
    {"remaining_ms": REMAINING_MS_MAX + 1},
    {"tokens": ids(1 << 31)},
    {"tokens": [1]},
    {"tokens": ids(1) + b"\0"},
    {"tokens": "abcd"},
    {"tokens": bytes(4 * TOKENS_MAX + 4)},
    {"delivered": bytes(4 * TOKENS_MAX + 4)},
    {"tokens": bytes(4 * TOKENS_MAX), "delivered": ids(1)},
    {"delivered": None},
    {"delivered_chars": -1},
    {"messages": []},
    {"messages": [{"role": "u", "content": ""}] * (MESSAGES_MAX + 1)},
    {"messages": [{"role": "", "content": ""}]},
    {"sampling": {"max_tokens": 0}},
    {"sampling": {"max_tokens": TOKENS_MAX + 1}},
    {"sampling": {"temperature": math.nan}},
    {"sampling": {"temperature": -0.1}},
    {"sampling": {"top_p": 0.0}},
    {"sampling": {"top_p": math.inf}},
    {"sampling": {"repetition_penalty": 0.0}},
    {"sampling": {"seed": 1 << 63}},
    {"sampling": {"stop": ["x"] * (STOPS_MAX + 1)}},
    {"sampling": {"stop": [""]}},
    {"sampling": {"stop": ["x" * 257]}},
    {"sampling": {"logprobs": 21}},
]


@pytest.mark.parametrize("change", BAD_WORK, ids=lambda change: str(change)[:50])
def test_every_bound_of_a_request_holds(change: dict[str, Any]) -> None:
    with pytest.raises(RemoteProtocolError):
        from_wire({"type": "generate", "request_id": "q", **change}, GenerateWork)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        ["a"] * (TEXTS_MAX + 1),
        ["x" * 200_001],
        [[1]],
        [b"abc"],
        [ids(1 << 31)],
        [None],
        [bytes(4 * TOKENS_MAX), ids(1)],
    ],
    ids=lambda t: str(t)[:20],
)
def test_every_bound_of_texts_holds(texts: Any) -> None:
    with pytest.raises(RemoteProtocolError):
        from_wire({"type": "embed", "request_id": "q", "texts": texts}, EmbedWork)


def test_an_ends_reason_is_one_of_two() -> None:
    with pytest.raises(RemoteProtocolError):
        from_wire({"type": "finished", "reason": "bored", "prompt_tokens": 1, "completion_tokens": 1}, Finished)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), 1 << 63)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["type", "tokens", "text", "logprobs", "reason", "served_by"]) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(values, st.sampled_from(["piece", "started", "progress", "finished", "x"]))
def test_whatever_comes_is_an_item_or_one_error(value: object, tag: str) -> None:
    if isinstance(value, dict):
        value = {**value, "type": tag}
    try:
        item = from_wire(value, AnswerItem)  # type: ignore[arg-type]  # a union is a type here
    except RemoteProtocolError:
        return
    assert isinstance(item, Started | Progress | Piece | Finished)
