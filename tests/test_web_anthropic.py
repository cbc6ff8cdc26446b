"""POST /v1/messages as Anthropic's clients send it: what becomes work, what comes back, what is refused and how."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from node import work
from node.errors import NoRoom, PeerFailed
from node.web.schema_anthropic import NEUTRAL
from tests.fake_front import PEER, finished, started, tale
from tests.test_web_routes import Bench

HELLO = [{"role": "user", "content": "hello"}]
ASKED = {"model": "fairy", "max_tokens": 5, "messages": HELLO}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.http:
        yield bench


def events_of(text: str) -> list[tuple[str, Any]]:
    """Name and data of every event; comments left out."""
    events = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            events.append((lines["event"], json.loads(lines["data"])))
    return events


async def refused(bench: Bench, status: int, path: str = "/v1/messages", **fields: Any) -> dict[str, Any]:
    response = await bench.post(path, {**ASKED, **fields})
    assert response.status_code == status, response.text
    told = response.json()
    assert set(told) == {"type", "error", "request_id"}
    assert told["type"] == "error"
    assert told["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    error: dict[str, Any] = told["error"]
    assert set(error) == {"type", "message"}
    return error


async def test_a_message_whole(bench: Bench) -> None:
    bench.script(*tale(["Once", " upon"])[:-1], finished(2, "stop"))
    response = await bench.post("/v1/messages", ASKED)
    assert response.headers["x-served-by"] == PEER
    assert response.headers["x-model-revision"] == "sha256-0123456789ab"
    assert response.headers["request-id"] == response.headers["x-request-id"]
    told = response.json()
    assert told.pop("id").startswith("msg_req-")
    assert told == {
        "type": "message",
        "role": "assistant",
        "model": "fairy",
        "content": [{"type": "text", "text": "Once upon"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }


async def test_a_message_as_events(bench: Bench) -> None:
    response = await bench.post("/v1/messages", {**ASKED, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert response.headers["x-served-by"] == PEER
    events = events_of(response.text)
    assert all(name == data["type"] for name, data in events)
    names = [name for name, _ in events if name != "content_block_delta"]
    assert names == ["message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop"]
    told = dict(events)
    assert told["message_start"]["message"]["usage"] == {"input_tokens": 3, "output_tokens": 0}
    assert told["message_start"]["message"]["content"] == []
    text = "".join(data["delta"]["text"] for name, data in events if name == "content_block_delta")
    assert text == "Once upon a time"
    assert told["message_delta"]["delta"] == {"stop_reason": "max_tokens", "stop_sequence": None}
    assert told["message_delta"]["usage"] == {"input_tokens": 3, "output_tokens": 4}


async def test_what_becomes_of_the_fields(bench: Bench) -> None:
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    asked = {
        "model": "default",
        "max_tokens": 7,
        "system": [{"type": "text", "text": "Be brief.", **cached}, {"type": "text", "text": "Be kind."}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", **cached}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": [{"type": "text", "text": "d", "citations": None}]},
            {"role": "user", "content": "e"},
        ],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
        "stop_sequences": ["x", "y"],
        "metadata": {"user_id": "somebody"},
        "stream": False,
        **cached,
        **{field: values[0] for field, values in NEUTRAL.items() if values},
    }
    assert (await bench.post("/v1/messages", asked, **{"x-private": "true"})).status_code == 200
    [done] = bench.front.works
    assert [(one.role, one.content) for one in done.messages or ()] == [
        ("system", "Be brief.\n\nBe kind."),
        ("user", "ab\n\nc"),
        ("assistant", "d"),
        ("user", "e"),
    ]
    assert done.model is None
    assert done.private
    assert replace(done.sampling, seed=0) == work.Sampling(
        max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, stop=("x", "y")
    )


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"max_tokens": None}, "'max_tokens' is missing"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"max_tokens": work.TOKENS_MAX + 1}, "max_tokens"),
        ({"n": 2}, "unknown field 'n'"),
        ({"user": "me"}, "unknown field 'user'"),
        ({"metadata": {"name": "me"}}, "metadata.name"),
        ({"temperature": "hot"}, "temperature"),
        ({"stop_sequences": ["x"] * 9}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences.0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0"),
        ({"tools": [{"name": "f", "input_schema": {}, "strict": True}]}, "holds a model to a schema"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice names no tool"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": {}}]}]},
            "text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": 7}]}]}, "id of a call"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking is not offered"),
        ({"container": "c"}, "container"),
        ({"output_config": {"effort": "max"}}, "output_config"),
        ({"cache_control": {"type": "eternal"}}, "cache_control.type"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages.0 is 'hello'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "read text only: text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "x": 1}]}]}, "content.0.x"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "Once"}]}, "prefill"),
        ({"system": 7}, "system is 7"),
        ({"system": [{"type": "text"}]}, "system.0.text"),
    ],
    ids=str,
)
async def test_what_is_refused_is_named(bench: Bench, fields: dict[str, Any], word: str) -> None:
    error = await refused(bench, 400, **fields)
    assert error["type"] == "invalid_request_error"
    assert word in error["message"]
    assert bench.front.works == []


async def test_errors_are_anthropics(bench: Bench) -> None:
    assert (await refused(bench, 404, model="nope"))["type"] == "not_found_error"
    many = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}] * work.MESSAGES_MAX
    assert (await refused(bench, 413, messages=[*many, *HELLO]))["type"] == "request_too_large"
    bench.script(NoRoom("full", retry_after_s=2))
    assert (await refused(bench, 503))["type"] == "overloaded_error"
    response = await bench.post("/v1/messages", {**ASKED, "stream": True})
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["type"] == "overloaded_error"


async def test_routes_and_hosts_are_refused_in_anthropics_shape_too(bench: Bench) -> None:
    for response, status in (
        (await bench.get("/v1/messages"), 405),
        (await bench.get("/v1/messages/batches"), 404),
        (await bench.post("/v1/messages", ASKED, host="evil.example"), 403),
    ):
        assert response.status_code == status
        assert response.json()["type"] == "error"
    assert "type" not in (await bench.get("/v1/messagesx")).json()


async def test_an_error_in_mid_stream_is_the_last_event(bench: Bench) -> None:
    bench.script(*tale(["Once"])[:-1], PeerFailed("the peer died"))
    response = await bench.post("/v1/messages", {**ASKED, "stream": True})
    name, data = events_of(response.text)[-1]
    assert name == data["type"] == "error"
    assert data["error"] == {"type": "overloaded_error", "message": "the peer died"}
    assert data["request_id"] == response.headers["request-id"]
    assert "message_stop" not in response.text


async def test_tokens_are_counted_by_who_would_answer(bench: Bench) -> None:
    response = await bench.post("/v1/messages/count_tokens", {"model": "fairy", "messages": HELLO, "system": "s"})
    assert response.json() == {"input_tokens": 3}
    assert response.headers["x-served-by"] == PEER
    assert response.headers["x-model-revision"] == "sha256-0123456789ab"
    [asked] = bench.front.works
    assert [one.role for one in asked.messages or ()] == ["system", "user"]
    assert asked.sampling.max_tokens == 1
    assert bench.front.cancelled == 1, "the work is left as soon as the prompt is counted"


async def test_tokens_that_only_the_end_tells_are_counted_by_it(bench: Bench) -> None:
    bench.script(replace(started(), prompt_tokens=0), *tale(["x"])[1:])
    response = await bench.post("/v1/messages/count_tokens", {"messages": HELLO})
    assert response.json() == {"input_tokens": 3}
    assert bench.front.cancelled == 0


async def test_tokens_that_nobody_counts_are_no_guess(bench: Bench) -> None:
    bench.script(replace(started(), prompt_tokens=0), replace(finished(1), prompt_tokens=0))
    response = await bench.post("/v1/messages/count_tokens", {"messages": HELLO})
    assert response.status_code == 400
    assert "counts no tokens" in response.json()["error"]["message"]
    assert PEER in response.json()["error"]["message"]


async def test_counting_takes_no_more_than_it_needs(bench: Bench) -> None:
    error = await refused(bench, 400, "/v1/messages/count_tokens")
    assert "unknown field 'max_tokens'" in error["message"]
