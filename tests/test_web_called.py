"""Functions in Anthropic's, OpenAI's Responses' and Ollama's shapes: what is taken, how calls come, and go back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from node import work
from node.tools import ToolCall
from node.web.schema_called import arguments_of
from tests.test_web_anthropic import events_of
from tests.test_web_clients import HELLO, vendor
from tests.test_web_ollama import lines_of
from tests.test_web_routes import Bench
from tests.test_web_serve import served
from tests.test_web_tools import calling
from tests.tool_templates import ARGUMENTS, WEATHER, WRITTEN

FUNCTION = WEATHER["function"]
SCHEMA = FUNCTION["parameters"]
INPUT = json.loads(ARGUMENTS)
SAID = "Let me look. " + WRITTEN["hermes"]
MESSAGES: dict[str, Any] = {
    "model": "fairy",
    "max_tokens": 50,
    "messages": HELLO,
    "tools": [{"name": "weather", "description": "d", "input_schema": SCHEMA}],
}
RESPONSES: dict[str, Any] = {
    "model": "fairy",
    "input": "hello",
    "tools": [{"type": "function", "name": "weather", "description": "d", "parameters": SCHEMA, "strict": None}],
}
OLLAMA: dict[str, Any] = {"model": "fairy", "messages": HELLO, "tools": [WEATHER]}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.http:
        yield bench


def asked_of(bench: Bench) -> work.GenerateWork:
    asked = bench.front.works[-1]
    assert asked.tools is not None
    [tool] = asked.tools.tools
    assert (tool.name, json.loads(tool.parameters or "")) == ("weather", SCHEMA)
    return asked


async def test_anthropics_calls(bench: Bench) -> None:
    bench.front.script = calling(SAID)
    told = (await bench.post("/v1/messages", MESSAGES)).json()
    assert told["stop_reason"] == "tool_use"
    text, call = told["content"]
    assert text == {"type": "text", "text": "Let me look."}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", INPUT)
    asked_of(bench)
    events = events_of((await bench.post("/v1/messages", {**MESSAGES, "stream": True})).text)
    starts = [data for name, data in events if name == "content_block_start"]
    assert [(one["index"], one["content_block"]["type"]) for one in starts] == [(0, "text"), (1, "tool_use")]
    assert [data["index"] for name, data in events if name == "content_block_stop"] == [0, 1]
    [part] = [data["delta"]["partial_json"] for _, data in events if data.get("delta", {}).get("partial_json")]
    assert json.loads(part) == INPUT
    assert dict(events)["message_delta"]["delta"]["stop_reason"] == "tool_use"


async def test_anthropics_calls_alone_have_no_text(bench: Bench) -> None:
    bench.front.script = calling(WRITTEN["hermes"])
    assert [one["type"] for one in (await bench.post("/v1/messages", MESSAGES)).json()["content"]] == ["tool_use"]
    events = events_of((await bench.post("/v1/messages", {**MESSAGES, "stream": True})).text)
    assert [data["content_block"]["type"] for name, data in events if name == "content_block_start"] == ["tool_use"]


async def test_anthropics_calls_and_results_come_back(bench: Bench) -> None:
    uses = [{"type": "tool_use", "id": f"toolu_{n}", "name": "weather", "input": INPUT} for n in (1, 2)]
    results = [{"type": "tool_result", "tool_use_id": f"toolu_{n}", "content": f"{n} degrees"} for n in (1, 2)]
    results[1]["content"] = [{"type": "text", "text": "2 degrees"}]  # type: ignore[assignment]
    turns = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, *uses]},
        {"role": "user", "content": [*results, {"type": "text", "text": "And now?"}]},
    ]
    choice = {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}
    response = await bench.post("/v1/messages", {**MESSAGES, "messages": turns, "tool_choice": choice})
    assert response.status_code == 200, response.text
    asked = asked_of(bench)
    assert asked.tools is not None
    assert (asked.tools.function, asked.tools.parallel) == ("weather", False)
    _, assistant, *rest = asked.messages or ()
    assert assistant.content == "I look."
    assert [(call.id, json.loads(call.arguments)) for call in assistant.tool_calls] == [
        ("toolu_1", INPUT),
        ("toolu_2", INPUT),
    ]
    assert [(one.role, one.content, one.tool_call_id) for one in rest] == [
        ("tool", "1 degrees", "toolu_1"),
        ("tool", "2 degrees", "toolu_2"),
        ("user", "And now?", None),
    ]
    counted = {key: value for key, value in MESSAGES.items() if key != "max_tokens"}
    assert (await bench.post("/v1/messages/count_tokens", counted)).json() == {"input_tokens": 3}
    asked_of(bench)


async def test_responses_calls(bench: Bench) -> None:
    bench.front.script = calling(SAID)
    told = (await bench.post("/v1/responses", RESPONSES)).json()
    assert told["status"] == "completed"
    message, call = told["output"]
    assert message["content"][0]["text"] == "Let me look."
    assert (call["type"], call["name"], call["arguments"]) == ("function_call", "weather", ARGUMENTS)
    assert told["tools"][0]["name"] == asked_of(bench).tools.tools[0].name  # type: ignore[union-attr]
    events = events_of((await bench.post("/v1/responses", {**RESPONSES, "stream": True})).text)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    done = [data["item"] for name, data in events if name == "response.output_item.done"]
    assert [one["type"] for one in done] == ["message", "function_call"]
    assert events[-1][1]["response"]["output"] == done
    assert dict(events)["response.function_call_arguments.done"]["arguments"] == ARGUMENTS
    added = [data["output_index"] for name, data in events if name == "response.output_item.added"]
    assert added == [0, 1]


async def test_responses_calls_and_results_come_back(bench: Bench) -> None:
    turns = [
        *HELLO,
        {"type": "function_call", "id": "fc_1", "call_id": "a", "name": "weather", "arguments": ARGUMENTS},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": ARGUMENTS, "status": "completed"},
        {"type": "function_call_output", "call_id": "a", "output": "1"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "2"}]},
    ]
    choice = {"type": "function", "name": "weather"}
    response = await bench.post("/v1/responses", {**RESPONSES, "input": turns, "tool_choice": choice})
    assert response.status_code == 200, response.text
    assert response.json()["tool_choice"] == choice
    _, assistant, *rest = asked_of(bench).messages or ()
    assert [call.id for call in assistant.tool_calls] == ["a", "b"], "calls that follow each other are one turn's"
    assert [(one.role, one.content, one.tool_call_id) for one in rest] == [("tool", "1", "a"), ("tool", "2", "b")]


async def test_ollamas_calls(bench: Bench) -> None:
    bench.front.script = calling(SAID)
    told = (await bench.post("/api/chat", {**OLLAMA, "stream": False})).json()
    wanted = [{"function": {"name": "weather", "arguments": INPUT}}]
    assert told["message"] == {"role": "assistant", "content": "Let me look.", "tool_calls": wanted}
    assert told["done_reason"] == "stop"
    asked_of(bench)
    lines = lines_of(await bench.post("/api/chat", OLLAMA))
    assert [line["message"]["tool_calls"] for line in lines if "tool_calls" in line["message"]] == [wanted]


def test_calls_nested_as_deep_as_can_be_read_can_be_written_too() -> None:
    """A peer may say so: what stands around them in the answer made them too deep, and that was a bug's 500."""
    for depth in range(700, 1_000):
        arguments = '{"a":' * depth + "1" + "}" * depth
        told = arguments_of(ToolCall(id="c", name="f", arguments=arguments))
        assert msgspec.json.encode([[[[[[[[told]]]]]]]]), depth


async def test_ollamas_calls_and_results_come_back_without_ids(bench: Bench) -> None:
    calls = [{"function": {"name": name, "arguments": INPUT}} for name in ("weather", "time", "weather")]
    turns = [
        *HELLO,
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "tool_name": "time", "content": "noon"},
        {"role": "tool", "tool_name": "weather", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    response = await bench.post("/api/chat", {**OLLAMA, "messages": turns})
    assert response.status_code == 200, response.text
    _, assistant, *rest = asked_of(bench).messages or ()
    ids = [call.id for call in assistant.tool_calls]
    assert len(set(ids)) == 3
    assert all(len(one) == 9 and one.isdecimal() for one in ids), "as Mistral's templates want them"
    assert assistant.content == "I look."
    assert [(one.content, one.tool_call_id) for one in rest] == [("noon", ids[1]), ("1", ids[0]), ("2", ids[2])]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["anthropic", "openai", "ollama"])
async def test_the_clients_read_calls(name: str) -> None:
    async with served() as node, vendor(name, node) as clients:
        node.front.script = calling(SAID)
        assert await clients(READS[name]) == [("weather", INPUT)] * 2


def _anthropic(client: Any) -> list[tuple[str, Any]]:
    with client.messages.stream(**MESSAGES) as stream:
        streamed = stream.get_final_message()
    blocks = [*client.messages.create(**MESSAGES).content, *streamed.content]
    return [(block.name, block.input) for block in blocks if block.type == "tool_use"]


def _responses(client: Any) -> list[tuple[str, Any]]:
    with client.responses.stream(**RESPONSES) as stream:
        streamed = stream.get_final_response()
    items = [*client.responses.create(**RESPONSES).output, *streamed.output]
    return [(item.name, json.loads(item.arguments)) for item in items if item.type == "function_call"]


def _ollama(client: Any) -> list[tuple[str, Any]]:
    messages = [client.chat(**OLLAMA).message, *(part.message for part in client.chat(**OLLAMA, stream=True))]
    calls = [call.function for message in messages for call in message.tool_calls or ()]
    return [(call.name, dict(call.arguments)) for call in calls]


READS = {"anthropic": _anthropic, "openai": _responses, "ollama": _ollama}
