"""Whatever other vendors' clients send becomes work within its bounds or a refusal that says what is wrong."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from node import work
from node.errors import BadRequest, TooLarge
from node.web.schema import Body, Generation, parse
from node.web.schema_anthropic import Conversation, MessagesRequest
from node.web.schema_ollama import (
    NEUTRAL,
    OPTIONS_NEUTRAL,
    OllamaChatRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaGeneration,
    OllamaShowRequest,
    Options,
)
from node.web.schema_responses import ResponsesRequest

KINDS: list[type[Body]] = [
    Conversation,
    MessagesRequest,
    ResponsesRequest,
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaEmbedRequest,
    OllamaShowRequest,
]
WORDS = st.sampled_from(["", "a", "text", "input_text", "user", "assistant", "system", "tool", "message", "5m", "0"])
LEAVES = st.none() | st.booleans() | st.integers(-2, 10) | st.floats(allow_nan=False, allow_infinity=False) | WORDS
KEYS = st.sampled_from(["role", "content", "type", "text", "id", "x", *Options.model_fields, *OPTIONS_NEUTRAL])
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=8
)
TURNS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": VALUES}), max_size=3
)


@st.composite
def bodies(draw: st.DrawFn) -> tuple[type[Body], dict[str, Any]]:
    """A kind, and an object of its fields and neutral ones with anything in them."""
    kind = draw(st.sampled_from(KINDS))
    names = st.sampled_from([*kind.model_fields, *kind.neutral, "x"])
    body = draw(st.dictionaries(names, VALUES, max_size=4))
    likely = {"model": "fairy", "max_tokens": 5, "input": "a", "messages": draw(TURNS)}
    return kind, {**{key: value for key, value in likely.items() if key in kind.model_fields}, **body}


def made_of(asked: Body) -> tuple[Generation | None, tuple[work.Message, ...]]:
    match asked:
        case MessagesRequest() | ResponsesRequest():
            return asked.generation(), asked.turns()
        case OllamaChatRequest() | OllamaGenerateRequest():
            return asked.generation(asked.model_asked()), asked.turns()
        case Conversation():
            return None, asked.turns()
    return None, ()


@pytest.mark.slow
@given(bodies())
def test_anything_is_work_or_a_refusal(drawn: tuple[type[Body], dict[str, Any]]) -> None:
    kind, body = drawn
    try:
        asked = parse(json.dumps(body).encode(), kind)
        generation, turns = made_of(asked)
        if isinstance(asked, ResponsesRequest | OllamaGeneration):
            asked.logprobs_asked()
    except (BadRequest, TooLarge):
        return
    assert all(message.role in ("system", "user", "assistant", "tool") for message in turns)
    if generation is not None:
        sampling = generation.sampling(index=0, seed=1, tokens_default=16)
        assert msgspec.convert(msgspec.to_builtins(sampling), work.Sampling) == sampling


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_neutral_is_no_field(kind: type[Body]) -> None:
    assert not kind.neutral.keys() & kind.model_fields.keys()
    assert kind.refusals.keys() <= kind.neutral.keys(), "a sentence that nobody reads"


def test_neutral_options_are_no_options() -> None:
    assert not OPTIONS_NEUTRAL.keys() & Options.model_fields.keys()
    assert "options" not in NEUTRAL
