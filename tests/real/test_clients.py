"""People's own clients against real nodes: the node that is asked serves nothing itself, its peer does."""

from __future__ import annotations

import base64
import json
import math
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from node.commands.processes import Cluster, NodeProcess
from tests.real.conftest import eventually
from tests.tiny_models import byte_tokenizer, save_causal, save_encoder
from tests.tool_templates import BRIEF, WEATHER

openai = pytest.importorskip("openai", reason="the openai SDK is not installed: pip install openai")
pytestmark = [pytest.mark.real, pytest.mark.slow]
HANG_S = 300.0
CHAT: list[Any] = [{"role": "user", "content": "Once upon"}]
GREEDY: dict[str, Any] = {"model": "tale", "messages": CHAT, "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NodeProcess]:
    """A node without a model, whose one peer serves a text model with tools and an encoder."""
    root: Path = tmp_path_factory.mktemp("clients")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BRIEF
    save_causal(root / "tale", tokenizer=tokenizer)
    save_encoder(root / "enc")
    with Cluster(root) as nodes:
        server = nodes.start("server", "--model", str(root / "tale"), "--embedding-model", str(root / "enc"))
        server.wait_ready(HANG_S)
        door = nodes.start("door", "--model", "none", join=[server])
        door.wait_ready(HANG_S)
        names = {"tale", "enc"}

        def served() -> bool:
            rows = httpx.get(f"{door.url}/v1/models", timeout=30).json()["data"]
            return {row["id"] for row in rows} >= names

        eventually("the door knows what its peer serves", served, HANG_S)
        yield door


@pytest.fixture
def sdk(door: NodeProcess) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0, timeout=HANG_S) as client:
        yield client


# the openai SDK


def test_chat_whole_streamed_and_again(sdk: Any) -> None:
    answer = sdk.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2, n=2, seed=7)
    first, second = answer.choices
    assert first.message.content == second.message.content, "greedy answers are the same"
    assert len(first.logprobs.content) == answer.usage.completion_tokens // 2
    assert all(len(one.top_logprobs) == 2 and math.isfinite(one.logprob) for one in first.logprobs.content)
    text, reasons, usage = "", [], None
    stream = sdk.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
        usage = chunk.usage or usage
    assert text == first.message.content
    assert reasons == [first.finish_reason]
    assert usage.completion_tokens == answer.usage.completion_tokens // 2


def test_seeds_stops_and_completions(sdk: Any) -> None:
    def made(**fields: Any) -> str:
        answer = sdk.completions.create(model="tale", prompt="Once", max_tokens=12, **fields)
        return str(answer.choices[0].text)

    assert made(seed=3) == made(seed=3)
    whole = made(temperature=0)
    assert whole
    letter = whole[len(whole) // 2]
    assert made(temperature=0, stop=[letter]) == whole[: whole.index(letter)]
    answer = sdk.completions.create(model="tale", prompt=["a", [5, 6]], max_tokens=2, n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_raw_responses_tell_who_answered(sdk: Any, door: NodeProcess) -> None:
    raw = sdk.chat.completions.with_raw_response.create(**GREEDY)
    assert raw.headers["x-served-by"] not in ("", door.peer_id)
    assert raw.headers["x-request-id"].startswith("req-")
    assert raw.headers["x-model-revision"] == raw.parse().system_fingerprint
    with sdk.chat.completions.with_streaming_response.create(**GREEDY) as response:
        assert "choices" in json.loads(response.read())


def test_embeddings_as_floats_and_as_base64(sdk: Any) -> None:
    own = sdk.embeddings.create(model="enc", input=["a", "b"]).data
    assert math.isclose(sum(value * value for value in own[0].embedding), 1.0, rel_tol=1e-3)
    floats = sdk.embeddings.create(model="enc", input="a", encoding_format="float").data[0].embedding
    assert floats == pytest.approx(own[0].embedding, abs=1e-5)
    packed = sdk.embeddings.create(model="enc", input="a", encoding_format="base64").data[0].embedding
    assert len(base64.b64decode(packed)) == 4 * len(floats)
    assert len(sdk.embeddings.create(model="enc", input="a", dimensions=4).data[0].embedding) == 4


def test_models_and_errors_are_the_sdks_own(sdk: Any) -> None:
    assert {model.id for model in sdk.models.list()} >= {"tale", "enc"}
    assert sdk.models.retrieve("tale").object == "model"
    for kind, fields in (
        (openai.BadRequestError, {"temperature": -1}),
        (openai.BadRequestError, {"max_tokens": 5_000}),
        (openai.BadRequestError, {"response_format": {"type": "json_object"}}),
        (openai.NotFoundError, {"model": "no-such"}),
        (openai.APIStatusError, {"messages": [{"role": "user", "content": "x" * 200_001}]}),
    ):
        with pytest.raises(kind) as caught:
            sdk.chat.completions.create(**{**GREEDY, **fields})
        assert caught.value.request_id.startswith("req-")
    with pytest.raises(openai.BadRequestError) as too_long:
        sdk.chat.completions.create(**{**GREEDY, "messages": [{"role": "user", "content": "word " * 2_000}]})
    assert too_long.value.code == "context_length_exceeded"
    assert too_long.value.body["is_possible"] is False
    with pytest.raises(openai.NotFoundError) as unknown:
        sdk.chat.completions.create(**{**GREEDY, "model": "no-such"})
    assert unknown.value.body["is_possible"] is False
    assert set(unknown.value.body["models"]) >= {"tale", "enc"}


def test_timeouts_end_the_request(sdk: Any, door: NodeProcess) -> None:
    with pytest.raises(openai.APITimeoutError):
        sdk.with_options(timeout=0.001).chat.completions.create(**{**GREEDY, "max_tokens": 400})
    status = httpx.get(f"{door.url}/api/v1/status", timeout=60)
    eventually("the request has ended", lambda: status.json()["inference"]["running"] == 0, HANG_S)


def test_the_async_client(door: NodeProcess) -> None:
    import asyncio

    async def use() -> tuple[str, list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", timeout=HANG_S) as client:
            answer = await client.chat.completions.create(**GREEDY)
            several = await asyncio.gather(*(client.chat.completions.create(**GREEDY) for _ in range(4)))
            stream = await client.chat.completions.create(**GREEDY, stream=True)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return text, [one.choices[0].message.content for one in (answer, *several)]

    text, answers = asyncio.run(use())
    assert set(answers) == {text}


# tools


def test_tools_reach_the_peers_template(sdk: Any) -> None:
    plain = sdk.chat.completions.create(**{**GREEDY, "max_tokens": 1})
    told = sdk.chat.completions.create(**{**GREEDY, "max_tokens": 1}, tools=[WEATHER])
    shown = told.usage.prompt_tokens - plain.usage.prompt_tokens
    assert shown > 50, "the tools are in the prompt"
    unseen = sdk.chat.completions.create(**{**GREEDY, "max_tokens": 1}, tools=[WEATHER], tool_choice="none")
    assert unseen.usage.prompt_tokens == plain.usage.prompt_tokens
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Ulm"}'}}
    result = {"role": "tool", "tool_call_id": "abcdefgh1", "content": "21 C"}
    messages = [*CHAT, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    longer = sdk.chat.completions.create(**{**GREEDY, "messages": messages, "max_tokens": 1}, tools=[WEATHER])
    assert longer.usage.prompt_tokens > told.usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="nothing makes tale call"):
        sdk.chat.completions.create(**GREEDY, tools=[WEATHER], tool_choice="required")


# langchain


def test_langchain(door: NodeProcess) -> None:
    langchain = pytest.importorskip(
        "langchain_openai", reason="langchain-openai is not installed: pip install -c constraints.txt -e '.[clients]'"
    )
    options: dict[str, Any] = {"base_url": f"{door.url}/v1", "api_key": "none", "timeout": HANG_S}
    chat = langchain.ChatOpenAI(model="tale", temperature=0, max_tokens=8, **options)
    answer = chat.invoke("Once upon")
    assert answer.response_metadata["finish_reason"] in ("stop", "length")
    assert answer.usage_metadata["output_tokens"] <= 8
    assert "".join(str(chunk.content) for chunk in chat.stream("Once upon")) == answer.content
    assert [each.content for each in chat.batch(["Once upon"] * 3)] == [answer.content] * 3

    def weather(town: str) -> str:
        """The weather in a town."""
        return town

    bound = chat.bind_tools([weather])
    told = bound.invoke("Once upon")
    assert told.usage_metadata["input_tokens"] > answer.usage_metadata["input_tokens"]
    vectors = langchain.OpenAIEmbeddings(model="enc", check_embedding_ctx_length=False, **options)
    assert len(vectors.embed_documents(["a", "b"])) == 2
    assert vectors.embed_query("a") == pytest.approx(vectors.embed_documents(["a"])[0], abs=1e-5)


# curl


def curl(*words: str) -> str:
    try:
        done = subprocess.run(["curl", "-sS", "-i", *words], capture_output=True, timeout=HANG_S, check=True)
    except FileNotFoundError:
        pytest.skip("curl is not installed")
    return done.stdout.decode()


def test_curl(door: NodeProcess) -> None:
    url = f"{door.url}/v1/chat/completions"
    kind = ("-H", "content-type: application/json", "-d")
    whole = curl(url, *kind, json.dumps(GREEDY))
    assert whole.startswith("HTTP/1.1 200")
    assert json.loads(whole.split("\r\n\r\n", 1)[1])["choices"][0]["message"]["role"] == "assistant"
    streamed = curl("-N", url, *kind, json.dumps({**GREEDY, "stream": True}))
    assert "content-type: text/event-stream" in streamed
    assert streamed.rstrip().endswith("data: [DONE]")
    refused = curl(url, *kind, "{")
    assert refused.startswith("HTTP/1.1 400")
    assert "the body is not JSON" in refused
    assert "openapi" in curl(f"{door.url}/openapi.json")


# a node that has no room yet


def test_the_sdk_waits_for_a_node_that_is_full_or_not_ready() -> None:
    """Its own retries, by our Retry-After: on 429 and on 503."""
    from node.errors import NotReady, TooMany
    from tests.fake_front import tale
    from tests.test_web_serve import served

    refusals: list[Any] = [TooMany("one at a time", retry_after_s=1.0), NotReady("loading", retry_after_s=1.0)]

    async def main() -> tuple[str, float]:
        async with served() as node:
            node.front.script = lambda work: [refusals.pop(0)] if refusals else tale(["Once"])
            base, began = f"http://127.0.0.1:{node.port}/v1", trio.current_time()

            def use() -> str:
                with openai.OpenAI(base_url=base, api_key="none", max_retries=2) as client:
                    return str(client.chat.completions.create(model="fairy", messages=CHAT).choices[0].message.content)

            return await trio.to_thread.run_sync(use), trio.current_time() - began

    text, _ = trio.run(main)
    assert text == "Once"
    assert not refusals
