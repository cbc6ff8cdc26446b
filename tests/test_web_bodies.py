"""Bodies of a MiB that would hold the loop for seconds: how many there are is looked at before what each one is."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from node.errors import BadRequest, TooLarge
from node.tools import CALLS_CHAT_MAX, CALLS_MAX
from node.web.schema import ERRORS_MAX, ChatRequest, messages_of, parse
from node.web.schema_ollama import OllamaChatRequest
from node.web.schema_responses import INCLUDES_MAX, ResponsesRequest
from node.work import MESSAGES_MAX

WRONG: dict[str, Any] = {"role": "nobody"}


def ollama(messages: list[dict[str, Any]]) -> None:
    parse(msgspec.json.encode({"model": "fairy", "messages": messages}), OllamaChatRequest).turns()


def test_ollamas_messages_are_counted_before_each_result_finds_its_call() -> None:
    with pytest.raises(TooLarge, match=f"{MESSAGES_MAX + 1} messages"):
        ollama([WRONG] * (MESSAGES_MAX + 1))
    calls = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}] * CALLS_CHAT_MAX}
    with pytest.raises(TooLarge, match=f"hold {CALLS_CHAT_MAX + 1} calls"):
        ollama([calls, {**calls, "tool_calls": calls["tool_calls"][:1]}, WRONG])


def test_calls_of_a_message_are_counted_before_each_is_read() -> None:
    with pytest.raises(TooLarge, match=f"has {CALLS_MAX + 1} calls"):
        messages_of([{"role": "assistant", "tool_calls": [{"wrong": 1}] * (CALLS_MAX + 1)}])


@pytest.mark.parametrize(
    "fields", [{}, {"metadata": {}}, {"stream_options": {}}, {"tools": [{"type": "function", "function": {}}]}]
)
def test_of_more_faults_than_anybody_makes_only_their_number_is_told(fields: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    place: Any = body
    for name in fields:
        place = body[name] if isinstance(body[name], dict) else body[name][0]["function"]
    place |= {f"k{number}": 1 for number in range(2 * ERRORS_MAX)}
    with pytest.raises(BadRequest, match=r"200[01] fields are unknown or wrong; the fields are .*messages"):
        parse(msgspec.json.encode(body), ChatRequest)


def test_what_is_to_be_included_is_counted() -> None:
    with pytest.raises(BadRequest, match="at most") as caught:
        parse(msgspec.json.encode({"input": "hi", "include": [1] * (INCLUDES_MAX + 1)}), ResponsesRequest)
    assert caught.value.param == "include"
