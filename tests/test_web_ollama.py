"""Ollama's routes as its clients ask them: what becomes work, what comes back, what is refused and how."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import replace as with_fields
from typing import Any

import httpx
import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from node import work
from node.errors import NoRoom, PeerFailed
from node.web.ollama_writer import moment
from node.web.schema_ollama import NEUTRAL, OPTIONS_NEUTRAL
from tests.fake_front import PEER, finished, started, tale, told
from tests.test_web_routes import Bench

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"model": "fairy", "messages": HELLO}
GENERATE = {"model": "fairy", "prompt": "hello"}


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.http:
        yield bench


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.text.splitlines()]


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "code", "request_id"}
    assert body["request_id"] == response.headers["x-request-id"]
    message: str = body["error"]
    return message


def untimed(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.endswith("_duration") and key != "created_at"}


async def test_a_chat_is_streamed_unless_told_otherwise(bench: Bench) -> None:
    response = await bench.post("/api/chat", CHAT)
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.headers["x-served-by"] == PEER
    assert response.headers["x-model-revision"] == "sha256-0123456789ab"
    *pieces, last = lines_of(response)
    assert all(piece["done"] is False and piece["model"] == "fairy" for piece in pieces)
    assert "".join(piece["message"]["content"] for piece in pieces) == "Once upon a time"
    assert untimed(last) == {
        "model": "fairy",
        "message": {"role": "assistant", "content": ""},
        "done": True,
        "done_reason": "length",
        "prompt_eval_count": 3,
        "eval_count": 4,
    }
    [done] = bench.front.works
    assert [(one.role, one.content) for one in done.messages or ()] == [("user", "hello")]


async def test_a_chat_whole(bench: Bench) -> None:
    bench.script(*told(["Once", " upon"]))
    asked = {**CHAT, "model": "fairy:latest", "stream": False, "logprobs": True, "top_logprobs": 2}
    response = await bench.post("/api/chat", asked)
    body = response.json()
    assert body["model"] == "fairy:latest", "as the client called it"
    assert body["message"] == {"role": "assistant", "content": "Once upon"}
    assert (body["done"], body["done_reason"], body["eval_count"]) == (True, "stop", 2)
    assert [token["token"] for token in body["logprobs"]] == ["Once", " upon"]
    assert bench.front.works[0].model == "fairy"
    assert bench.front.works[0].sampling.logprobs == 2


async def test_generate_goes_through_the_template_unless_raw(bench: Bench) -> None:
    *pieces, last = lines_of(await bench.post("/api/generate", {**GENERATE, "system": "Be brief."}))
    assert "".join(piece["response"] for piece in pieces) == "Once upon a time"
    assert (last["response"], last["done"]) == ("", True)
    assert (await bench.post("/api/generate", {**GENERATE, "raw": True, "stream": False})).json()["response"]
    templated, raw = bench.front.works
    assert [(one.role, one.content) for one in templated.messages or ()] == [
        ("system", "Be brief."),
        ("user", "hello"),
    ]
    assert (raw.messages, raw.text) == (None, "hello")


async def test_times_are_what_passed(autojump_clock: MockClock, bench: Bench) -> None:
    second = 1_000_000_000
    bench.script(2.0, started(), 3.0, *tale(["a", "b"], step_s=4.0)[2:-1], 5.0, finished(2))
    for stream in (True, False):
        response = await bench.post("/api/generate", {**GENERATE, "stream": stream})
        last = lines_of(response)[-1]
        assert last["prompt_eval_duration"] == 5 * second
        assert last["eval_duration"] == 9 * second
        assert last["total_duration"] == 14 * second
        assert last["created_at"] == moment(int(trio.current_time())) or last["created_at"].endswith("Z")


def test_a_moment_is_written_as_ollama_does() -> None:
    assert moment(1_700_000_000) == "2023-11-14T22:13:20Z"


async def test_what_becomes_of_the_options(bench: Bench) -> None:
    options = {
        "num_ctx": 8192,
        "num_predict": 7,
        "seed": 5,
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "min_p": 0.1,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "stop": ["x", "y"],
        **{key: values[0] for key, values in OPTIONS_NEUTRAL.items()},
    }
    neutral = {key: values[0] for key, values in NEUTRAL.items() if values}
    asked = {**CHAT, "model": "default", "options": options, "keep_alive": "5m", **neutral}
    assert (await bench.post("/api/chat", asked)).status_code == 200
    [done] = bench.front.works
    assert done.model is None
    assert done.keep, "a seed was chosen"
    assert done.sampling == work.Sampling(
        max_tokens=7,
        seed=5,
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        stop=("x", "y"),
    )


@pytest.mark.parametrize("options", [{}, {"num_predict": -1}, {"num_predict": 0}, {"num_predict": None}], ids=str)
async def test_without_a_limit_an_answer_may_take_half_of_the_context(bench: Bench, options: dict[str, Any]) -> None:
    await bench.post("/api/chat", {**CHAT, "options": options})
    assert replace(bench.front.works[0].sampling, seed=0) == work.Sampling(max_tokens=512)


async def test_a_name_may_carry_latest_and_the_networks_own_names_come_first(bench: Bench) -> None:
    await bench.post("/api/chat", {**CHAT, "model": "fairy:latest"})
    bench.front.rows.append(with_fields(bench.front.rows[0], id="fairy:latest"))
    await bench.post("/api/chat", {**CHAT, "model": "fairy:latest"})
    assert [done.model for done in bench.front.works] == ["fairy", "fairy:latest"]
    assert "fairy:7b" in error_of(await bench.post("/api/chat", {**CHAT, "model": "fairy:7b"}), 404)


@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"model": None}, "'model' is missing"),
        ({"temperature": 0.5}, "unknown field 'temperature'"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"format": "json"}, "format is not offered"),
        ({"think": True}, "think is not offered"),
        ({"images": ["aGk="]}, "'images'"),
        ({"keep_alive": 0}, "no client can put it away"),
        ({"keep_alive": "0s"}, "no client can put it away"),
        ({"keep_alive": []}, "keep_alive"),
        ({"options": {"num_gpu": 1}}, "options.num_gpu is not offered"),
        ({"options": {"mirostat": 2}}, "options.mirostat is 2"),
        ({"options": {"temperature": "hot"}}, "options.temperature"),
        ({"options": {"num_predict": -2}}, "options.num_predict"),
        ({"options": []}, "options"),
        ({"options": {"stop": ["x"] * 9}}, "options.stop"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stream": "yes"}, "stream"),
    ],
    ids=str,
)
async def test_what_is_refused_is_named(bench: Bench, path: str, fields: dict[str, Any], word: str) -> None:
    asked = CHAT if path == "/api/chat" else GENERATE
    assert word in error_of(await bench.post(path, {**asked, **fields}), 400)
    assert bench.front.works == []


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/api/chat", {**CHAT, "messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ("/api/chat", {**CHAT, "messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        ("/api/chat", {**CHAT, "messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "0.images"),
        ("/api/chat", {**CHAT, "messages": [{"role": "assistant", "tool_calls": [{}]}]}, "0.tool_calls"),
        ("/api/chat", {**CHAT, "messages": [{"role": "user", "tool_calls": [{}]}]}, "of the assistant's"),
        ("/api/generate", {**GENERATE, "suffix": "x"}, "'suffix'"),
        ("/api/generate", {**GENERATE, "template": "x"}, "'template'"),
        ("/api/generate", {**GENERATE, "context": [1]}, "send the conversation to /api/chat"),
        ("/api/generate", {**GENERATE, "raw": True, "system": "x"}, "raw takes the prompt as it is"),
        ("/api/embed", {"model": "org/enc"}, "'input' is missing"),
        ("/api/embed", {"model": "org/enc", "input": "x", "dimensions": 4}, "dimensions is 4, org/enc has 3"),
        ("/api/embeddings", {"model": "org/enc", "prompt": ""}, "prompt"),
        ("/api/show", {"model": "fairy", "name": "fairy"}, "unknown field 'name'"),
    ],
    ids=str,
)
async def test_what_is_refused_on_one_route(bench: Bench, path: str, body: dict[str, Any], word: str) -> None:
    assert word in error_of(await bench.post(path, body), 400)
    assert bench.front.works == []


async def test_without_a_prompt_it_is_asked_that_the_model_be_there(bench: Bench) -> None:
    for path, said in (
        ("/api/chat", {"message": {"role": "assistant", "content": ""}}),
        ("/api/generate", {"response": ""}),
    ):
        body = (await bench.post(path, {"model": "fairy:latest"})).json()
        assert untimed(body) == {"model": "fairy:latest", "done": True, "done_reason": "load", **said}
        assert "served are: fairy, org/enc" in error_of(await bench.post(path, {"model": "nope"}), 404)
    assert bench.front.works == []


async def test_embeddings_new_and_old(bench: Bench) -> None:
    response = await bench.post("/api/embed", {"model": "org/enc:latest", "input": ["a", "b"], "dimensions": 2})
    body = response.json()
    assert body["embeddings"] == [pytest.approx([0.6, 0.8]), pytest.approx([1.0, 0.0])]
    assert (body["model"], body["prompt_eval_count"], body["truncated"]) == ("org/enc:latest", 7, [False, False])
    assert body["total_duration"] > 0
    assert response.headers["x-model-revision"] == "sha256-enc"
    old = await bench.post("/api/embeddings", {"model": "org/enc", "prompt": "a", "keep_alive": -1})
    assert old.json() == {"embedding": pytest.approx([0.6, 0.8, 0.0])}
    assert [asked.model for asked in bench.front.embeds] == ["org/enc", "org/enc"]


async def test_a_text_that_is_too_long_is_cut_or_refused_as_asked(bench: Bench) -> None:
    asked = {"model": "org/enc", "input": ["a", "b" * 200]}
    assert (await bench.post("/api/embed", asked)).json()["truncated"] == [False, True]
    assert "text 1 is longer" in error_of(await bench.post("/api/embed", {**asked, "truncate": False}), 400)


async def test_which_models_there_are(bench: Bench) -> None:
    entries = [
        {"name": "fairy", "model": "fairy", "digest": "sha256-0123456789ab", "details": {}, "peers": 2},
        {"name": "org/enc", "model": "org/enc", "digest": "sha256-enc", "details": {}, "peers": 1},
    ]
    assert (await bench.get("/api/tags")).json() == {"models": entries}
    loaded = (await bench.get("/api/ps")).json()["models"]
    assert loaded == [{**entry, "context_length": n} for entry, n in zip(entries, (1024, 256), strict=True)]
    assert (await bench.get("/api/version")).json()["version"].count(".") == 2
    shown = (await bench.post("/api/show", {"model": "fairy:latest"})).json()
    assert shown["capabilities"] == ["completion"]
    facts = shown["model_info"]
    assert facts[f"{facts['general.architecture']}.context_length"] == 1024
    assert (await bench.post("/api/show", {"model": "org/enc"})).json()["capabilities"] == ["embedding"]
    assert "served are: fairy, org/enc" in error_of(await bench.post("/api/show", {"model": "nope"}), 404)


async def test_errors_are_ollamas_on_its_paths_only(bench: Bench) -> None:
    for name in ("pull", "push", "create", "copy", "delete", "blobs/sha256:ab"):
        assert "said by who runs it" in error_of(await bench.post(f"/api/{name}", {"model": "x"}), 404)
    assert "no route" in error_of(await bench.get("/api/nothing"), 404)
    assert "it takes POST" in error_of(await bench.get("/api/chat"), 405)
    assert "evil.example" in error_of(await bench.get("/api/tags", host="evil.example"), 403)
    own = (await bench.post("/api/v1/model/inference", {"txt": "x"})).json()
    assert own["error"]["code"] == "bad_request", "our own routes keep their shape"
    bench.script(NoRoom("full", retry_after_s=2))
    response = await bench.post("/api/chat", CHAT)
    assert error_of(response, 503) == "full"
    assert response.headers["retry-after"] == "2"


async def test_an_error_in_mid_stream_is_the_last_line(bench: Bench) -> None:
    bench.script(*tale(["Once"])[:-1], PeerFailed("the peer died"))
    lines = lines_of(await bench.post("/api/chat", CHAT))
    assert lines[-1]["error"] == "the peer died"
    assert not any(line.get("done") for line in lines)
