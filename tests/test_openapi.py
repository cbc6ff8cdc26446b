"""GET /openapi.json: of every live route, and nothing that an answer has is missing in it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import pydantic
import pytest
from trio.testing import MockClock

from node.front import Readiness
from node.web import schema_answers as answers
from node.web import schema_shown as shapes
from node.web.app import build_app
from node.web.errors import TABLE
from node.web.schema import NEUTRAL, ChatRequest
from node.web.schema_openapi import ROUTES, document, served
from tests.fake_front import FakeFront, told
from tests.test_web_routes import CHAT, Bench
from tests.test_web_tools import ASKED, calling
from tests.tool_templates import WRITTEN


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.http:
        yield bench


def live() -> Any:
    return build_app(FakeFront(), Random(1))._app._app.routes  # type: ignore[attr-defined]


def test_every_live_route_is_described_and_every_described_route_is_live() -> None:
    routes = {(method, path) for path, method in served(live())}
    assert routes == set(ROUTES), "describe it in node/web/schema_openapi.py; what is gone goes there too"


def test_a_route_that_nobody_described_is_in_the_document_all_the_same() -> None:
    from starlette.routing import Route

    paths = document([Route("/new", lambda request: None, methods=["GET"])], "1")["paths"]
    assert paths["/new"]["get"]["responses"].keys() >= {"200", "403", "500"}


async def test_the_document_holds_together(bench: Bench, autojump_clock: MockClock) -> None:
    response = await bench.get("/openapi.json")
    assert response.status_code == 200
    raw, told = response.text, response.json()
    assert told["openapi"].startswith("3.1.")
    schemas = told["components"]["schemas"]
    assert set(re.findall(r'"#/components/schemas/(\w+)"', raw)) <= schemas.keys()
    assert "$defs" not in raw
    chat = told["paths"]["/v1/chat/completions"]["post"]
    statuses = {str(row.status) for row in TABLE.values()}
    assert chat["responses"].keys() == {"200", *statuses}
    assert "retry-after" in chat["responses"]["503"]["headers"]
    assert schemas["ChatRequest"]["properties"].keys() == ChatRequest.model_fields.keys() | NEUTRAL.keys()
    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert told["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["name"] == "model"


ASKS: list[tuple[str, dict[str, Any] | None, type[pydantic.BaseModel]]] = [
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}, answers.ChatCompletion),
    ("/v1/completions", {"prompt": ["a", "b"], "logprobs": 1}, answers.Completion),
    ("/v1/embeddings", {"input": "a"}, answers.EmbeddingList),
    ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}, answers.EmbeddingList),
    ("/api/v1/model/inference", {"text": ["a", "b"]}, answers.InferenceAnswer),
    ("/api/v1/model/inference", {"text": "a", "model": "org/enc"}, answers.InferenceAnswer),
    ("/v1/models", None, answers.ModelList),
    ("/v1/models/org/enc", None, answers.ModelShown),
    ("/healthz", None, answers.Healthy),
    ("/readyz", None, answers.Ready),
    ("/api/v1/peers", None, answers.PeerList),
]


@pytest.mark.parametrize(("path", "body", "kind"), ASKS)
async def test_answers_have_what_the_document_says_and_no_more(
    bench: Bench, autojump_clock: MockClock, path: str, body: dict[str, Any] | None, kind: type[pydantic.BaseModel]
) -> None:
    bench.front.script = lambda work: told(["Once", " upon"])
    response = await (bench.get(path) if body is None else bench.post(path, body))
    assert response.status_code == 200
    kind.model_validate_json(response.text)


async def test_calls_and_errors_have_what_the_document_says(bench: Bench, autojump_clock: MockClock) -> None:
    bench.front.script = calling(WRITTEN["hermes"])
    answers.ChatCompletion.model_validate_json((await bench.post("/v1/chat/completions", ASKED)).text)
    for response in (
        await bench.post("/v1/chat/completions", {}),
        await bench.post("/v1/chat/completions", {**CHAT, "model": "no"}),
        await bench.get("/v1/models/no"),
        await bench.get("/v1/nothing"),
    ):
        answers.ErrorBody.model_validate_json(response.text)
    assert (await bench.get("/v1/models/no")).json()["error"]["models"] == ["fairy", "org/enc"]


async def test_a_node_that_is_loading_says_how_far_it_is(bench: Bench, autojump_clock: MockClock) -> None:
    progress = {"state": "loading", "model": "m", "progress": {"tensors_loaded": 1, "tensors_total": 9}}
    bench.front.ready = Readiness(ready=False, reason="the model is loading", loading=True, progress=progress)
    response = await bench.get("/readyz")
    assert response.status_code == 503
    answers.Unready.model_validate_json(response.text)
    assert response.json()["error"]["loading"] == progress
    assert response.headers["retry-after"] == "1"
    assert json.loads(response.text)["loading"] is True


USER, ASSISTANT = {"role": "user"}, {"role": "assistant"}
SHOWN: list[tuple[str, dict[str, Any], str, Any]] = [
    (
        "/v1/messages",
        {
            "max_tokens": 3,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [
                {**USER, "content": "hi"},
                {**ASSISTANT, "content": [{"type": "tool_use", "id": "c1", "name": "look", "input": {"a": 1}}]},
                {**USER, "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "b"}]},
            ],
        },
        "messages",
        shapes.AnthropicMessages,
    ),
    (
        "/v1/responses",
        {
            "input": [
                {**USER, "content": [{"type": "input_text", "text": "hi"}]},
                {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "b"},
            ]
        },
        "input",
        shapes.ResponsesInput,
    ),
    ("/api/chat", {"model": "fairy", "messages": [{**USER, "content": "hi"}]}, "messages", shapes.OllamaMessages),
    ("/api/embed", {"model": "org/enc", "input": ["a", "b"]}, "input", shapes.OllamaTexts),
]


@pytest.mark.parametrize(("path", "body", "field", "shape"), SHOWN, ids=[each[0] for each in SHOWN])
async def test_what_is_shown_of_a_field_read_by_hand_is_taken(
    bench: Bench, autojump_clock: MockClock, path: str, body: dict[str, Any], field: str, shape: Any
) -> None:
    adapter = pydantic.TypeAdapter(shape)
    adapter.validate_python(body[field])
    response = await bench.post(path, body)
    assert response.status_code == 200, response.text
    shown = (await bench.get("/openapi.json")).json()
    [name] = shown["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"].values()
    told = json.dumps(shown["components"]["schemas"][name.rsplit("/")[-1]]["properties"][field])
    assert "string" in told or "#/components" in told, "anything at all is shown"
