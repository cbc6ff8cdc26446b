"""POST /v1/responses as OpenAI's clients send it: what becomes work, what comes back, what is refused and how."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from msgspec.structs import replace

from node import work
from node.errors import NoRoom, PeerFailed
from node.web.schema_responses import INCLUDE_LOGPROBS, NEUTRAL
from tests.fake_front import PEER, finished, tale, told
from tests.test_web_anthropic import events_of
from tests.test_web_routes import Bench, error_of

ASKED = {"model": "fairy", "input": "hello"}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.http:
        yield bench


async def test_a_response_whole(bench: Bench) -> None:
    bench.script(*tale(["Once", " upon"])[:-1], finished(2, "stop"))
    response = await bench.post("/v1/responses", {**ASKED, "metadata": {"a": "b"}, "temperature": 0.5})
    assert response.headers["x-served-by"] == PEER
    body = response.json()
    assert body["id"].startswith("resp_req-")
    assert (body["object"], body["status"], body["model"]) == ("response", "completed", "fairy")
    assert (body["store"], body["error"], body["incomplete_details"]) == (False, None, None)
    assert (body["metadata"], body["temperature"]) == ({"a": "b"}, 0.5)
    [item] = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "Once upon", "annotations": [], "logprobs": []}]
    assert {key: body["usage"][key] for key in ("input_tokens", "output_tokens", "total_tokens")} == {
        "input_tokens": 3,
        "output_tokens": 2,
        "total_tokens": 5,
    }


async def test_an_answer_that_reached_its_length_is_incomplete(bench: Bench) -> None:
    body = (await bench.post("/v1/responses", ASKED)).json()
    assert body["status"] == body["output"][0]["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    streamed = events_of((await bench.post("/v1/responses", {**ASKED, "stream": True})).text)
    assert streamed[-1][0] == "response.incomplete"
    assert streamed[-1][1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}


async def test_a_response_as_events(bench: Bench) -> None:
    bench.script(*told(["Once", " upon"]))
    asked = {**ASKED, "stream": True, "include": [INCLUDE_LOGPROBS], "top_logprobs": 2}
    response = await bench.post("/v1/responses", asked)
    events = events_of(response.text)
    assert all(name == data["type"] for name, data in events)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    names = [name for name, _ in events if name != "response.output_text.delta"]
    assert names == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    data = dict(events)
    deltas = [one for name, one in events if name == "response.output_text.delta"]
    assert "".join(one["delta"] for one in deltas) == data["response.output_text.done"]["text"] == "Once upon"
    tokens = [token["token"] for one in deltas for token in one["logprobs"]]
    assert tokens == [token["token"] for token in data["response.output_text.done"]["logprobs"]] == ["Once", " upon"]
    final = data["response.completed"]["response"]
    assert final["output"] == [data["response.output_item.done"]["item"]]
    assert final["usage"]["total_tokens"] == 5
    assert {one["response"]["id"] for name, one in events if "response" in one} == {final["id"]}
    assert {one["item_id"] for name, one in events if "item_id" in one} == {final["output"][0]["id"]}


async def test_what_becomes_of_the_fields(bench: Bench) -> None:
    asked = {
        "model": "default",
        "instructions": "Be brief.",
        "input": [
            {"role": "developer", "content": "a"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "b"}]},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "c", "annotations": [], "logprobs": []}],
            },
            {"role": "user", "content": "d"},
        ],
        "max_output_tokens": 7,
        "temperature": 0,
        "top_p": 0.9,
        "user": "me",
        "safety_identifier": "me",
        "prompt_cache_key": "mine",
        "include": ["reasoning.encrypted_content"],
        **{field: values[0] for field, values in NEUTRAL.items() if values},
    }
    assert (await bench.post("/v1/responses", asked)).status_code == 200
    [done] = bench.front.works
    assert [(one.role, one.content) for one in done.messages or ()] == [
        ("system", "Be brief."),
        ("system", "a"),
        ("user", "b"),
        ("assistant", "c"),
        ("user", "d"),
    ]
    assert done.keep, "greedy answers may be kept, as at every route"
    assert replace(done.sampling, seed=0) == work.Sampling(max_tokens=7, temperature=0.0, top_p=0.9)


@pytest.mark.parametrize(
    ("fields", "param", "word"),
    [
        ({"store": True}, "store", "stores no responses"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"conversation": "conv_1"}, "conversation", "stores no responses"),
        ({"background": True}, "background", "stores no responses"),
        ({"prompt": {"id": "p"}}, "prompt", "stores no responses"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type", "function"),
        ({"tool_choice": "required"}, "tool_choice", "there are no tools"),
        ({"truncation": "auto"}, "truncation", "never cut"),
        ({"text": {"format": {"type": "json_object"}}}, "text", "only plain text"),
        ({"reasoning": {"effort": "high"}}, "reasoning", "not supported"),
        ({"seed": 1}, "seed", "unknown field"),
        ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata", "at most 16"),
        ({"include": ["file_search_call.results"]}, "include", INCLUDE_LOGPROBS),
        ({"top_logprobs": 2}, "top_logprobs", INCLUDE_LOGPROBS),
        ({"input": None}, "input", "missing"),
        ({"input": []}, "input", "wanted a string or a list of messages"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0", "offered are message"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input.0.role", "developer"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input.0.content.0",
            "read text only: input_text or output_text",
        ),
    ],
    ids=str,
)
async def test_what_is_refused_is_named(bench: Bench, fields: dict[str, Any], param: str, word: str) -> None:
    error = error_of(await bench.post("/v1/responses", {**ASKED, **fields}), 400)
    assert error["param"] == param
    assert word in error["message"]
    assert bench.front.works == []


async def test_there_is_nothing_to_get_or_delete(bench: Bench) -> None:
    for response in (
        await bench.get("/v1/responses/resp_1"),
        await bench.http.delete("/v1/responses/resp_1"),
        await bench.post("/v1/responses/resp_1/cancel", {}),
    ):
        assert "stores no responses" in error_of(response, 404)["message"]


async def test_a_failure_before_the_start_is_a_status(bench: Bench) -> None:
    bench.script(NoRoom("full"))
    error_of(await bench.post("/v1/responses", {**ASKED, "stream": True}), 503)


async def test_a_failure_in_mid_stream_is_the_last_event(bench: Bench) -> None:
    bench.script(*tale(["Once"])[:-1], PeerFailed("the peer died", param="x"))
    events = events_of((await bench.post("/v1/responses", {**ASKED, "stream": True})).text)
    name, data = events[-1]
    assert name == "response.failed"
    assert data["sequence_number"] == len(events) - 1
    response = data["response"]
    assert response["status"] == "failed"
    assert response["error"]["code"] == "server_error"
    assert response["error"]["message"] == "the peer died"
    assert response["output"][0]["content"][0]["text"] == "Once", "what came is not lost"
    assert "response.completed" not in [name for name, _ in events]
