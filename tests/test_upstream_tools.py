"""Calls of functions as servers stream them, through node/upstream.py and a node's own door, whole and in pieces."""

from __future__ import annotations

import json
from typing import Any

import pytest

from node.errors import PeerFailed
from node.tool_calls import Reading
from node.tools import ARGUMENTS_CHARS_MAX, CALLS_MAX, Tool, ToolCall, Tooling
from node.upstream_stream import chunk_of
from node.upstream_telling import Telling
from node.work import Finished, GenerateWork, Message, Piece, Sampling, Started
from tests.test_upstream import running

TOOLING = Tooling(tools=(Tool(name="weather"), Tool(name="put")))
WORK = GenerateWork(
    request_id="q", messages=(Message(role="user", content="hi"),), tools=TOOLING, sampling=Sampling(max_tokens=200)
)


def event(finish: str | None = None, **delta: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}).encode()


def part(index: int, arguments: object = None, name: str | None = None) -> dict[str, Any]:
    return {"index": index, "id": f"c{index}", "type": "function", "function": {"name": name, "arguments": arguments}}


PIECES = [  # as vLLM and llama.cpp have them
    event(role="assistant", content="I look."),
    event(tool_calls=[part(0, "", "weather")]),
    event(tool_calls=[part(0, '{"town": ')]),
    event(tool_calls=[part(0, '"Köln </tool_call>"}')]),
    event(tool_calls=[part(1, "{}", "put")]),
    event("tool_calls"),
]
AT_ONCE = [event("stop", content="I look.", tool_calls=[part(0, {"town": "Köln"}, "weather"), part(1, "{}", "put")])]


def told(events: list[bytes], work: GenerateWork = WORK) -> list[Any]:
    started = Started(served_by="p", model="m", revision="r", prompt_tokens=0, calls="hermes")
    telling = Telling(work, started)
    items = [item for each in events for item in telling.take(chunk_of(each, top=None), 1)]
    return [*items, *telling.end()]


@pytest.mark.parametrize(
    ("events", "town"), [(PIECES, "Köln </tool_call>"), (AT_ONCE, "Köln")], ids=["pieces", "whole"]
)
def test_calls_of_a_server_reach_the_client_as_they_are(events: list[bytes], town: str) -> None:
    items = told(events)
    assert isinstance(items[-1], Finished)
    assert items[-1].completion_tokens == sum(len(item.tokens) for item in items if isinstance(item, Piece))
    reading = Reading(WORK)
    read = [part for item in items for part in reading.take(item)]
    calls = [part for part in read if isinstance(part, ToolCall)]
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("weather", {"town": town}), ("put", {})]
    assert "".join(part.text for part in read if isinstance(part, Piece)) == "I look."


def test_a_call_is_told_when_it_is_whole_and_half_of_one_never() -> None:
    items = told([*PIECES[:-1], event("length")])
    text = "".join(item.text for item in items if isinstance(item, Piece))
    assert text.count("<tool_call>") == 2
    telling = Telling(WORK, Started(served_by="p", model="m", revision="r", prompt_tokens=0, calls="hermes"))
    sent = [item for each in PIECES[:4] for item in telling.take(chunk_of(each, top=None), 1)]
    assert "".join(item.text for item in sent if isinstance(item, Piece)) == "I look."
    with pytest.raises(PeerFailed, match="broke off"):
        telling.end()


def test_calls_beyond_their_bounds_end_the_answer() -> None:
    with pytest.raises(PeerFailed, match="a call of over"):
        told([event(tool_calls=[part(0, "x" * ARGUMENTS_CHARS_MAX, "put")]), event(tool_calls=[part(0, "x")])])
    with pytest.raises(PeerFailed, match="over 128 calls"):
        told([event(tool_calls=[part(n, "{}", "put") for n in range(CALLS_MAX + 2)])])


def test_calls_that_nobody_asked_for_are_passed_over() -> None:
    plain = GenerateWork(request_id="q", messages=WORK.messages)
    items = told(PIECES, plain)
    assert "".join(item.text for item in items if isinstance(item, Piece)) == "I look."


@pytest.mark.slow
async def test_tools_go_to_the_server_and_its_calls_come_back() -> None:
    body = b"".join(b"data: " + each + b"\n\n" for each in PIECES) + b"data: [DONE]\n\n"
    async with running(kind="vllm", raw=body) as here:
        items = await here.items(WORK)
        asked = here.server.bodies("/v1/chat/completions")[-1]
    assert [tool["function"]["name"] for tool in asked["tools"]] == ["weather", "put"]
    assert isinstance(items[0], Started)
    assert items[0].calls == "hermes"
    reading = Reading(WORK)
    calls = [part for item in items for part in reading.take(item) if isinstance(part, ToolCall)]  # type: ignore[arg-type]
    assert [call.name for call in calls] == ["weather", "put"]
