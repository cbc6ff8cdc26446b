"""Every route over ASGI, without a socket: shapes, headers, errors, the door."""

from __future__ import annotations

import base64
import dataclasses
import json
import struct
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import httpx
import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from node.errors import InternalError, NoRoom, NotReady, PeerFailed
from node.front import Readiness, Route
from node.web.app import build_app
from node.web.door import BODY_BYTES_MAX, BODY_S_MAX, DoorConfig
from node.web.schema import Defaults
from node.web.settings import WebConfig
from tests.fake_front import PEER, FakeFront, Step, finished, started, tale, told

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


class Bench:
    """A front, its application, and a client of it."""

    def __init__(self, **config: Any) -> None:
        self.front = FakeFront()
        self.app = build_app(self.front, Random(7), WebConfig(door=DoorConfig(**config)))
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765")

    async def post(self, path: str, body: object, **headers: str) -> httpx.Response:
        return await self.http.post(path, json=body, headers=headers)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.get(path, headers=headers)

    def script(self, *steps: Step) -> None:
        self.front.script = lambda work: list(steps)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.http:
        yield bench


def events_of(response: httpx.Response) -> list[Any]:
    """The data of every event, [DONE] as text; comments left out."""
    datas = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in datas]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert set(error) - {"is_possible", "models", "loading"} == {
        "type",
        "code",
        "message",
        "param",
        "request_id",
        "retryable",
    }
    assert error["request_id"] == response.headers["x-request-id"]
    return error


@pytest.mark.parametrize(
    ("headers", "private", "keep"),
    [
        ({}, False, True),
        ({"x-private": "true"}, True, False),
        ({"x-private": "FALSE"}, False, True),
        ({"cache-control": "max-age=0, No-Store"}, False, False),
        ({"cache-control": "no-cache"}, False, False),
        ({"cache-control": "max-age=0"}, False, True),
        ({"x-forwarded-for": "203.0.113.9"}, False, False),
        ({"via": "1.1 proxy"}, False, False),
    ],
    ids=str,
)
async def test_what_may_be_kept_and_what_is_private(
    bench: Bench, headers: dict[str, str], private: bool, keep: bool
) -> None:
    greedy = {"temperature": 0}
    for path, body in (
        ("/v1/chat/completions", {**CHAT, **greedy}),
        ("/v1/completions", {"prompt": "a", "temperature": 1, "seed": 3}),
        ("/v1/completions", {"prompt": "a", **greedy, "stream": True}),
        ("/api/v1/model/inference", {"text": "a", **greedy}),
    ):
        await bench.post(path, body, **headers)
        work = bench.front.works[-1]
        assert (work.private, work.keep) == (private, keep), path
    await bench.post("/v1/embeddings", {"input": "a"}, **headers)
    embed = bench.front.embeds[-1]
    assert (embed.private, embed.keep) == (private, keep)
    assert {hint.account for hint in bench.front.hints} == {"own"}


async def test_an_answer_that_is_drawn_anew_each_time_is_not_kept(bench: Bench) -> None:
    await bench.post("/v1/chat/completions", CHAT)
    assert not bench.front.works[-1].keep


async def test_x_private_is_true_or_false(bench: Bench) -> None:
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/embeddings", {"input": "a"})):
        error = error_of(await bench.post(path, body, **{"x-private": "perhaps"}), 400)
        assert error["param"] == "x-private"
        assert "wanted true or false" in error["message"]
    assert bench.front.works == bench.front.embeds == []


async def test_clients_of_elsewhere_are_accounts_by_address(bench: Bench) -> None:
    transport = httpx.ASGITransport(app=bench.app, client=("203.0.113.9", 4711))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8765") as elsewhere:
        await elsewhere.post("/v1/completions", json={"prompt": "a"})
        await elsewhere.post("/v1/embeddings", json={"input": "a"})
        await elsewhere.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert {hint.account for hint in bench.front.hints} == {"203.0.113.9"}


async def test_an_answer_that_was_kept_says_so(bench: Bench) -> None:
    bench.script(replace(started(), cached=True), *tale(["Once"])[1:])
    for body in (CHAT, {**CHAT, "stream": True}):
        response = await bench.post("/v1/chat/completions", body)
        assert response.headers["x-cache"] == "hit"
    bench.script(*tale(["Once"]))
    assert "x-cache" not in (await bench.post("/v1/chat/completions", CHAT)).headers


async def test_chat(bench: Bench) -> None:
    response = await bench.post("/v1/chat/completions", CHAT)
    told_back = response.json()
    assert response.status_code == 200
    assert response.headers["x-served-by"] == PEER
    assert response.headers["x-model-revision"] == "sha256-0123456789ab"
    assert told_back["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert told_back["object"] == "chat.completion"
    assert told_back["model"] == "fairy"
    assert told_back["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Once upon a time", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
        }
    ]
    assert told_back["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    [work] = bench.front.works
    assert work.remaining_ms == 120_000
    assert work.messages is not None
    assert work.messages[0].content == "hello"


async def test_completions_take_strings_lists_and_tokens(bench: Bench) -> None:
    response = await bench.post("/v1/completions", {"prompt": ["a", "b"], "n": 2, "seed": 5, "max_tokens": 9})
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert {choice["text"] for choice in choices} == {"Once upon a time"}
    assert response.json()["usage"] == {"prompt_tokens": 6, "completion_tokens": 16, "total_tokens": 22}
    works = sorted(bench.front.works, key=lambda work: work.request_id)
    assert [work.text for work in works] == ["a", "a", "b", "b"]
    assert [work.sampling.seed for work in works] == [5, 6, 7, 8]
    assert len({work.request_id for work in works}) == 4
    await bench.post("/v1/completions", {"prompt": [1, 2, 3]})
    assert bench.front.works[-1].tokens == (1, 2, 3)
    assert bench.front.works[-1].sampling.max_tokens == 16


async def test_a_request_without_a_seed_draws_one(bench: Bench) -> None:
    for _ in range(2):
        await bench.post("/v1/completions", {"prompt": "a"})
    first, second = (work.sampling.seed for work in bench.front.works)
    assert first != second


async def test_the_default_length_fits_a_small_model(bench: Bench) -> None:
    await bench.post("/v1/chat/completions", CHAT)
    assert bench.front.works[-1].sampling.max_tokens == 256
    bench.front.rows[0] = type(bench.front.rows[0])(
        id="fairy", revision="r", kind="causal", peers=1, context_tokens=64, local=True
    )
    await bench.post("/v1/chat/completions", CHAT)
    assert bench.front.works[-1].sampling.max_tokens == 32
    await bench.post("/v1/chat/completions", {**CHAT, "max_tokens": 60})
    assert bench.front.works[-1].sampling.max_tokens == 60


async def test_logprobs(bench: Bench) -> None:
    bench.front.script = lambda work: told(["Once", " up"])
    response = await bench.post("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2})
    [choice] = response.json()["choices"]
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "Once"
    assert first["bytes"] == list(b"Once")
    assert first["top_logprobs"][1]["logprob"] == -9999.0
    assert bench.front.works[-1].sampling.logprobs == 2
    response = await bench.post("/v1/completions", {"prompt": "x", "logprobs": 1})
    [choice] = response.json()["choices"]
    assert choice["logprobs"]["tokens"] == ["Once", " up"]
    assert choice["logprobs"]["text_offset"] == [0, 4]


async def test_stream_of_chat(bench: Bench) -> None:
    response = await bench.post(
        "/v1/chat/completions", {**CHAT, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-served-by"] == PEER
    events = events_of(response)
    assert events[-1] == "[DONE]"
    *chunks, usage = events[:-1]
    assert {chunk["id"] for chunk in chunks} == {f"chatcmpl-{response.headers['x-request-id']}"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Once upon a time"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "length"
    assert chunks[-1]["choices"][0]["delta"] == {}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


async def test_stream_of_completions_with_several_answers(bench: Bench) -> None:
    bench.front.script = lambda work: tale([f"<{work.sampling.seed}>"] * 3, step_s=0.01)
    response = await bench.post("/v1/completions", {"prompt": "a", "n": 3, "seed": 1, "stream": True})
    events = events_of(response)
    assert events.pop() == "[DONE]"
    assert all("usage" not in event for event in events)
    texts = dict.fromkeys(range(3), "")
    for event in events:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == {0: "<1><1><1>", 1: "<2><2><2>", 2: "<3><3><3>"}
    assert [e["choices"][0]["finish_reason"] for e in events].count("length") == 3


async def test_pieces_that_are_ready_together_are_one_event(bench: Bench) -> None:
    """Hypercorn writes some 9,000 events a second: tokens must not each cost one when they come in bursts."""
    words = [f" {n}" for n in range(40)]
    bench.front.script = lambda work: tale(words)
    events = events_of(await bench.post("/v1/completions", {"prompt": "a", "stream": True}))
    assert "".join(c["text"] for e in events[:-1] for c in e["choices"]) == "".join(words)
    assert len(events) < 45


async def test_an_error_before_the_start_is_an_http_error_also_of_a_stream(bench: Bench) -> None:
    bench.script(NoRoom("every peer is full", retry_after_s=3))
    for stream in (False, True):
        response = await bench.post("/v1/chat/completions", {**CHAT, "stream": stream})
        error = error_of(response, 503)
        assert response.headers["retry-after"] == "3"
        assert error["code"] == "no_room"
        assert error["retryable"] is True


async def test_an_error_in_mid_stream_is_an_event_and_the_stream_still_ends(bench: Bench) -> None:
    bench.script(*tale(["Once"], step_s=0.01)[:-1], 0.01, PeerFailed("the peer died and nobody else has the model"))
    response = await bench.post("/v1/chat/completions", {**CHAT, "stream": True})
    assert response.status_code == 200
    *_, error, done = events_of(response)
    assert done == "[DONE]"
    assert error["error"]["code"] == "peer_failed"
    assert error["error"]["request_id"] == response.headers["x-request-id"]
    assert "event: error\ndata: {" in response.text


async def test_an_answer_without_an_end_is_never_passed_on_as_complete(bench: Bench) -> None:
    bench.script(*tale(["Once"])[:-1])
    error_of(await bench.post("/v1/completions", {"prompt": "a"}), 500)
    response = await bench.post("/v1/completions", {"prompt": "a", "stream": True})
    if response.status_code == 200:  # the start had gone out already
        assert events_of(response)[-2]["error"]["code"] == "internal"
    else:
        error_of(response, 500)


async def test_one_failed_answer_ends_the_others(bench: Bench) -> None:
    bench.front.script = lambda work: (
        [started(), InternalError("no")] if work.request_id.endswith("-1") else tale(["x"] * 50, step_s=3600)
    )
    with trio.fail_after(5):
        for stream in (False, True):
            await bench.post("/v1/completions", {"prompt": "a", "n": 3, "stream": stream})
    assert bench.front.running == 0
    assert bench.front.cancelled == 4


async def test_a_bug_is_a_500_with_its_request_id(bench: Bench) -> None:
    def broken(work: object) -> list[Step]:
        raise ZeroDivisionError

    bench.front.script = broken
    error = error_of(await bench.post("/v1/completions", {"prompt": "a"}), 500)
    assert error["code"] == "internal"
    assert error["request_id"] in error["message"]


async def test_unknown_model(bench: Bench) -> None:
    error = error_of(await bench.post("/v1/chat/completions", {**CHAT, "model": "no/such"}), 404)
    assert error["param"] == "model"
    error = error_of(await bench.get("/v1/models/no/such"), 404)
    assert "fairy" in error["message"]


async def test_bad_input_is_400_and_never_422(bench: Bench) -> None:
    assert error_of(await bench.post("/v1/chat/completions", {"messages": []}), 400)["param"] == "messages"
    assert error_of(await bench.post("/v1/chat/completions", {**CHAT, "tools": [1]}), 400)["param"] == "tools.0"
    error_of(await bench.http.post("/v1/completions", content=b"{"), 400)
    for text in ("", [], [""]):
        assert error_of(await bench.post("/api/v1/model/inference", {"text": text}), 400)["param"] == "text"
    error_of(await bench.post("/v1/completions", {"prompt": ["a"] * 9, "n": 2}), 400)
    assert bench.front.works == []


async def test_no_such_route_and_no_such_method(bench: Bench) -> None:
    assert error_of(await bench.get("/v1/nothing"), 404)["code"] == "not_found"
    for path, wanted in (
        ("/completions", "'/v1/completions': the client's base URL is http://HOST:PORT/v1"),
        ("/v1//chat/completions", "'/v1/chat/completions'"),
        ("/v1/v1/messages", "'/v1/messages': the client's base URL is http://HOST:PORT"),
    ):
        assert error_of(await bench.post(path, {}), 404)["message"].split("it is at ")[1].startswith(wanted)
    assert error_of(await bench.get("/v1/nothing"), 404)["message"] == "there is no route '/v1/nothing'"
    response = await bench.get("/v1/completions")
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"


async def test_embeddings_as_floats_and_base64(bench: Bench) -> None:
    response = await bench.post("/v1/embeddings", {"input": ["one", "x" * 101], "model": "org/enc"})
    rows = response.json()["data"]
    assert rows[0]["embedding"] == pytest.approx([0.6, 0.8, 0.0])
    assert [row["truncated"] for row in rows] == [False, True]
    assert [row["index"] for row in rows] == [0, 1]
    assert response.json()["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert response.headers["x-served-by"] == PEER
    response = await bench.post("/v1/embeddings", {"input": [1, 2], "encoding_format": "base64", "dimensions": 1})
    assert struct.unpack("<f", base64.b64decode(response.json()["data"][0]["embedding"])) == (1.0,)
    assert bench.front.embeds[-1].texts == ((1, 2),)
    error = error_of(await bench.post("/v1/embeddings", {"input": "x", "dimensions": 4}), 400)
    assert error["param"] == "dimensions"


async def test_models(bench: Bench) -> None:
    row = bench.front.rows[0]
    bench.front.rows.append(type(row)(id="fairy", revision="other", kind="causal", peers=1, context_tokens=512))
    told_back = (await bench.get("/v1/models")).json()
    assert told_back["object"] == "list"
    assert [model["id"] for model in told_back["data"]] == ["fairy", "org/enc"]
    assert told_back["data"][0]["peers"] == 3
    assert told_back["data"][0]["revisions"][1] == {"revision": "other", "peers": 1}
    assert (await bench.get("/v1/models/org/enc")).json()["kind"] == "encoder"


async def test_inference_of_a_causal_model(bench: Bench) -> None:
    told_back = (await bench.post("/api/v1/model/inference", {"text": "a", "max_tokens": 4})).json()
    assert told_back["text"] == "Once upon a time"
    assert told_back["model_type"] == "causal"
    assert told_back["truncated"] is False
    assert told_back["served_by"] == PEER
    assert told_back["latency_ms"] >= 0
    assert set(told_back) >= {"model", "revision", "usage"}
    told_back = (await bench.post("/api/v1/model/inference", {"text": ["a", "b"]})).json()
    assert told_back["text"] == ["Once upon a time"] * 2


async def test_inference_of_an_encoder(bench: Bench) -> None:
    told_back = (await bench.post("/api/v1/model/inference", {"text": "a", "model": "org/enc"})).json()
    assert told_back["model_type"] == "encoder"
    assert told_back["embeddings"] == pytest.approx([0.6, 0.8, 0.0])
    told_back = (await bench.post("/api/v1/model/inference", {"text": ["a", "b"], "model": "org/enc"})).json()
    assert len(told_back["embeddings"]) == 2
    del bench.front.rows[0]  # a node whose network has an encoder only
    told_back = (await bench.post("/api/v1/model/inference", {"text": "a"})).json()
    assert told_back["model_type"] == "encoder"


async def test_a_request_that_names_none_gets_the_operators_limit_and_temperature() -> None:
    front = FakeFront()
    app = build_app(front, Random(7), WebConfig(defaults=Defaults(max_tokens=77, temperature=0.0)))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1:8765") as http:
        for path, body in (
            ("/v1/chat/completions", CHAT),
            ("/v1/completions", {"prompt": "a"}),
            ("/api/v1/model/inference", {"text": "a"}),
        ):
            await http.post(path, json=body)
            work = front.works[-1]
            assert (work.sampling.max_tokens, work.sampling.temperature) == (77, 0.0), path
            assert work.keep, "greedy by the operator's choice is the same each time"
            await http.post(path, json={**body, "max_tokens": 3, "temperature": 1.5})
            work = front.works[-1]
            assert (work.sampling.max_tokens, work.sampling.temperature) == (3, 1.5), path
        front.rows[0] = dataclasses.replace(front.rows[0], context_tokens=100)  # never more than half of it by itself
        await http.post("/v1/completions", json={"prompt": "a"})
        assert front.works[-1].sampling.max_tokens == 50


async def test_inference_names_each_revision_that_answered(bench: Bench) -> None:
    answers = iter((started(), replace(started(), revision="r2", served_by="12D3other")))
    bench.front.script = lambda work: [next(answers), *tale(["x"])[1:]]
    told_back = (await bench.post("/api/v1/model/inference", {"text": ["a", "b"]})).json()
    assert set(told_back["revision"].split(", ")) == {"sha256-0123456789ab", "r2"}
    assert set(told_back["served_by"].split(", ")) == {PEER, "12D3other"}
    assert told_back["model"] == "fairy"


async def test_inference_has_no_n_for_either_kind(bench: Bench) -> None:
    for model in ("fairy", "org/enc"):
        body = {"text": "a", "model": model, "n": 2}
        assert error_of(await bench.post("/api/v1/model/inference", body), 400)["param"] == "n"
    assert bench.front.works == bench.front.embeds == []


async def test_health_and_readiness(bench: Bench) -> None:
    assert (await bench.get("/healthz")).json() == {"status": "ok"}
    assert (await bench.get("/readyz")).status_code == 200
    bench.front.ready = Readiness(ready=False, reason="loading fairy", loading=True, retry_after_s=4)
    response = await bench.get("/readyz")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "4"
    assert response.json()["loading"] is True
    assert "loading fairy" in response.json()["error"]["message"]
    assert (await bench.get("/healthz")).status_code == 200
    bench.script(NotReady("loading fairy"))
    error_of(await bench.post("/v1/completions", {"prompt": "x"}), 503)


async def test_status_and_peers(bench: Bench) -> None:
    status = (await bench.get("/api/v1/status")).json()
    assert set(status) == {"node", "peering", "gossip", "inference", "model", "readiness", "web"}
    assert status["web"]["requests"] == 1
    assert (await bench.get("/api/v1/peers")).json()["peers"][0]["peer_id"] == PEER


async def test_route_headers_reach_the_front(bench: Bench) -> None:
    await bench.post("/v1/completions", {"prompt": "a"}, **{"x-route": "remote", "x-peer": PEER, "x-timeout-s": "1.5"})
    assert bench.front.hints[-1].route is Route.REMOTE
    assert bench.front.hints[-1].peer == PEER
    assert bench.front.works[-1].remaining_ms == 1500
    for stream in (False, True):
        response = await bench.post("/v1/completions", {"prompt": "a", "stream": stream}, **{"x-route": "moon"})
        assert error_of(response, 400)["param"] == "x-route"


async def test_foreign_pages_and_names_are_refused() -> None:
    bench = Bench(hosts=frozenset({"mine.example"}), origins=frozenset({"https://chat.example"}))
    async with bench.http:
        for headers in (
            {"host": "evil.example:8765"},
            {"origin": "https://evil.example"},
            {"origin": "null"},
        ):
            for path in ("/healthz", "/v1/completions"):
                error_of(await bench.get(path, **headers), 403)
            error_of(await bench.post("/v1/completions", {"prompt": "a"}, **headers), 403)
        assert bench.front.works == []
        assert bench.app.counts.drops == {"foreign_host": 3, "foreign_origin": 6}
        for headers in ({"host": "mine.example"}, {"origin": "https://chat.example"}):
            assert (await bench.get("/healthz", **headers)).status_code == 200
        assert (await bench.get("/healthz", origin="http://127.0.0.1:8765")).status_code == 200


async def test_a_large_body_is_refused_by_its_word_and_by_its_bytes(bench: Bench) -> None:
    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 65536

    error_of(await bench.http.post("/v1/completions", content=b"x" * (BODY_BYTES_MAX + 1)), 413)
    error_of(await bench.http.post("/v1/completions", content=chunks(17)), 413)
    assert bench.app.counts.drops["body_too_large"] == 2
    error_of(await bench.http.post("/v1/completions", content=b"x" * BODY_BYTES_MAX), 400)
    error_of(await bench.http.post("/v1/completions", content=b"x", headers={"content-encoding": "gzip"}), 400)


async def test_a_dribbled_body_has_one_deadline(bench: Bench, autojump_clock: MockClock) -> None:
    async def dribble() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await trio.sleep(2)

    began = trio.current_time()
    response = await bench.http.post("/v1/completions", content=dribble())
    assert error_of(response, 408)["code"] == "slow_body"
    assert trio.current_time() - began < BODY_S_MAX + 5
    assert response.headers["connection"] == "close"
    assert bench.app.counts.drops["slow_body"] == 1


async def test_a_node_that_overruns_the_deadline_is_cut_off(bench: Bench, autojump_clock: MockClock) -> None:
    bench.script(started(), 3600.0, finished(0))
    for stream in (False, True):
        began = trio.current_time()
        response = await bench.post("/v1/completions", {"prompt": "a", "stream": stream}, **{"x-timeout-s": "5"})
        assert trio.current_time() - began < 10
        error = events_of(response)[-2]["error"] if stream else error_of(response, 408)
        assert error["code"] == "deadline"
    assert bench.front.cancelled == 2
    bench.front.embed_wait_s = 3600.0
    error_of(await bench.post("/v1/embeddings", {"input": "a"}, **{"x-timeout-s": "5"}), 408)


async def test_metrics_tell_what_the_status_counts(bench: Bench) -> None:
    await bench.get("/healthz", host="evil.example")
    response = await bench.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'openagi_drops_total{part="web.drops",reason="foreign_host"} 1' in response.text
