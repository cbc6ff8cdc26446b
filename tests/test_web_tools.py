"""Tools over HTTP: what is taken, how calls are shown, whole and streamed, and what is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from trio.testing import MockClock

from node.web.schema import ChatRequest, messages_of, parse
from node.work import GenerateWork, Piece, Started
from tests.fake_front import PEER, Step, finished, started
from tests.test_web_routes import CHAT, Bench, error_of
from tests.tool_templates import ARGUMENTS, WEATHER, WRITTEN

ASKED = {**CHAT, "tools": [WEATHER]}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.http:
        yield bench


def calling(text: str, form: str | None = "hermes", reason: str = "stop", size: int = 5) -> Any:
    def script(work: GenerateWork) -> Sequence[Step]:
        start = Started(served_by=PEER, model="fairy", revision="r", prompt_tokens=3, calls=form)
        pieces = [Piece(tokens=(n,), text=text[n : n + size]) for n in range(0, len(text), size)]
        return [start, *pieces, finished(len(pieces), reason)]

    return script


def events(body: str) -> list[Any]:
    return [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize("form", ["hermes", "llama", "mistral"])
async def test_calls_are_shown_whole_and_streamed(bench: Bench, autojump_clock: MockClock, form: str) -> None:
    bench.front.script = calling(WRITTEN[form], form)
    choice = (await bench.post("/v1/chat/completions", ASKED)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function"
    assert call["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert bench.front.works[0].tools is not None
    assert json.loads(bench.front.works[0].tools.tools[0].parameters or "") == WEATHER["function"]["parameters"]
    body = (await bench.post("/v1/chat/completions", {**ASKED, "stream": True})).text
    choices = [event["choices"][0] for event in events(body)]
    assert [one["finish_reason"] for one in choices][-1] == "tool_calls"
    (streamed,) = [call for one in choices for call in one["delta"].get("tool_calls", ())]
    assert streamed["index"] == 0
    assert streamed["function"] == {"name": "weather", "arguments": ARGUMENTS}
    assert "".join(one["delta"].get("content") or "" for one in choices) == ""


async def test_text_before_a_call_is_the_content(bench: Bench, autojump_clock: MockClock) -> None:
    bench.front.script = calling(f"I look.\n{WRITTEN['hermes']}\n{WRITTEN['hermes']}")
    message = (await bench.post("/v1/chat/completions", ASKED)).json()["choices"][0]["message"]
    assert message["content"] == "I look."
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    one = (await bench.post("/v1/chat/completions", {**ASKED, "parallel_tool_calls": False})).json()["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1


async def test_broken_calls_and_answers_without_one_are_text(bench: Bench, autojump_clock: MockClock) -> None:
    for text in ('<tool_call>{"name": "weather"', "No need.", '<tool_call>{"name": 1}</tool_call>'):
        bench.front.script = calling(text)
        choice = (await bench.post("/v1/chat/completions", ASKED)).json()["choices"][0]
        assert choice["finish_reason"] == "stop"
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}


async def test_what_was_cut_off_says_so_whatever_it_called(bench: Bench, autojump_clock: MockClock) -> None:
    bench.front.script = calling(WRITTEN["hermes"] + " and", reason="length")
    choice = (await bench.post("/v1/chat/completions", ASKED)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    assert len(choice["message"]["tool_calls"]) == 1


async def test_without_tools_or_with_none_nothing_is_read(bench: Bench, autojump_clock: MockClock) -> None:
    bench.front.script = lambda work: [started(), Piece(tokens=(1,), text=WRITTEN["hermes"]), finished(1, "stop")]
    for asked in (CHAT, {**ASKED, "tool_choice": "none"}, {**CHAT, "tools": []}):
        choice = (await bench.post("/v1/chat/completions", asked)).json()["choices"][0]
        assert choice["message"]["content"] == WRITTEN["hermes"]
        assert bench.front.works[-1].tools is None


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"tools": [function(name="a b")]}, 400, "tools.0.function.name"),
        ({"tools": [function(name="x" * 65)]}, 400, "tools.0.function.name"),
        ({"tools": [function(parameters=[])]}, 400, "tools.0.function.parameters"),
        ({"tools": [function(strict=True)]}, 400, "tools.0.function.strict"),
        ({"tools": [function(more=1)]}, 400, "tools.0.function.more"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools.0.type"),
        ({"tools": [function(), function()]}, 400, "tools"),
        ({"tools": [function(name=f"f{n}") for n in range(129)]}, 400, "tools"),
        ({"tools": [function(description="d" * 200_001)]}, 413, "tools"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
        ({"tools": [function()], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "tool_choice"),
        ({"tools": [function()], "tool_choice": "always"}, 400, "tool_choice"),
        ({"parallel_tool_calls": 1}, 400, "parallel_tool_calls"),
        ({"functions": [{"name": "f"}]}, 400, "functions"),
    ],
)
async def test_a_refusal_names_the_field(
    bench: Bench,
    autojump_clock: MockClock,
    fields: dict[str, Any],
    status: int,
    param: str,
) -> None:
    assert error_of(await bench.post("/v1/chat/completions", {**CHAT, **fields}), status)["param"] == param


def asked(*messages: dict[str, Any]) -> Any:
    body = json.dumps({"messages": messages}).encode()
    return messages_of(parse(body, ChatRequest).messages)


def made(arguments: object = "{}", **fields: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}, **fields}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_messages_with_calls_and_results() -> None:
    messages = asked(made('{"a": 1}'), {"role": "tool", "content": "21", "tool_call_id": "c1"})
    assert messages[0].tool_calls[0].arguments == '{"a": 1}'
    assert messages[0].content == ""
    assert messages[1].tool_call_id == "c1"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        (made("[]"), "messages"),
        (made("{"), "messages"),
        (made({}), "messages.0.tool_calls.0.function.arguments"),
        (made(id=""), "messages.0.tool_calls.0.id"),
        (made(type="x"), "messages.0.tool_calls.0.type"),
        ({**made(), "role": "user"}, "messages.0.tool_calls"),
        ({"role": "tool", "content": "x", "tool_call_id": 1}, "messages.0.tool_call_id"),
        ({"role": "user", "content": "x", "tool_call_id": "c1"}, "messages.0.tool_call_id"),
        ({"role": "assistant", "content": None}, "messages.0.content"),
    ],
)
def test_a_bad_call_or_result_is_named(message: dict[str, Any], param: str) -> None:
    from node.errors import BadRequest

    with pytest.raises(BadRequest) as caught:
        asked(message)
    assert str(caught.value.param).startswith(param)
