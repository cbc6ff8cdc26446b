"""The openai SDK, as people use it, against a real port."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import pytest
import trio

from node.errors import NoRoom, PeerFailed
from tests.fake_front import FakeFront, tale, told
from tests.test_web_serve import Served, served

openai = pytest.importorskip("openai", reason="the openai SDK is not installed: pip install openai")

pytestmark = pytest.mark.slow
T = TypeVar("T")
MESSAGES = [{"role": "user", "content": "hello"}]


class Sdk:
    def __init__(self, node: Served) -> None:
        self.node = node
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{node.port}/v1", api_key="none", max_retries=0)

    async def __call__(self, use: Callable[[Any], T]) -> T:
        """Use the sync client in a thread."""
        return await trio.to_thread.run_sync(use, self.client)


@pytest.fixture
async def sdk() -> AsyncIterator[Sdk]:
    async with served() as node:
        sdk = Sdk(node)
        yield sdk
        sdk.client.close()


async def test_chat(sdk: Sdk) -> None:
    sdk.node.front.script = lambda work: told(["Once", " upon"])
    answer = await sdk(
        lambda client: client.chat.completions.create(
            model="fairy", messages=MESSAGES, logprobs=True, top_logprobs=2, seed=1, temperature=0, max_tokens=4
        )
    )
    assert answer.choices[0].message.content == "Once upon"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs.content[0].token == "Once"
    assert answer.usage.total_tokens == 5
    assert answer.system_fingerprint == "sha256-0123456789ab"


async def test_chat_stream(sdk: Sdk) -> None:
    def use(client: Any) -> tuple[str, Any]:
        text, usage = "", None
        stream = client.chat.completions.create(
            model="fairy", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        for chunk in stream:
            text += "".join(choice.delta.content or "" for choice in chunk.choices)
            usage = chunk.usage or usage
        return text, usage

    text, usage = await sdk(use)
    assert text == "Once upon a time"
    assert usage.completion_tokens == 4


async def test_completions_whole_and_streamed(sdk: Sdk) -> None:
    answer = await sdk(lambda client: client.completions.create(model="fairy", prompt=["a", "b"], n=2, logprobs=1))
    assert len(answer.choices) == 4

    def use(client: Any) -> str:
        stream = client.completions.create(model="fairy", prompt="a", stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    assert await sdk(use) == "Once upon a time"


async def test_embeddings_in_the_sdks_own_base64(sdk: Sdk) -> None:
    answer = await sdk(lambda client: client.embeddings.create(model="org/enc", input=["a", "b"]))
    assert answer.data[0].embedding == pytest.approx([0.6, 0.8, 0.0])
    assert answer.usage.prompt_tokens == 7


async def test_models(sdk: Sdk) -> None:
    assert [model.id for model in await sdk(lambda client: list(client.models.list()))] == ["fairy", "org/enc"]
    assert (await sdk(lambda client: client.models.retrieve("org/enc"))).id == "org/enc"


async def test_errors_are_the_sdks_own_kinds(sdk: Sdk) -> None:
    def failing(kind: type[Exception], **fields: Any) -> Any:
        def use(client: Any) -> Any:
            with pytest.raises(kind) as caught:
                client.chat.completions.create(**{"model": "fairy", "messages": MESSAGES, **fields})
            return caught.value

        return sdk(use)

    error = await failing(openai.BadRequestError, temperature=-1)
    assert error.param == "temperature"
    assert error.code == "bad_request"
    await failing(openai.NotFoundError, model="no-such")
    sdk.node.front.script = lambda work: [NoRoom("every peer is full")]
    error = await failing(openai.InternalServerError)
    assert error.status_code == 503
    assert error.request_id.startswith("req-")


async def test_an_error_in_mid_stream_raises_and_keeps_the_text(sdk: Sdk) -> None:
    sdk.node.front.script = lambda work: [*tale(["Once"], step_s=0.05)[:-1], 0.05, PeerFailed("the peer died")]

    def use(client: Any) -> str:
        text = ""
        stream = iter(client.chat.completions.create(model="fairy", messages=MESSAGES, stream=True))
        while "Once" not in text:
            text += next(stream).choices[0].delta.content or ""
        with pytest.raises(openai.APIError, match="the peer died"):
            next(stream)
        return text

    assert await sdk(use) == "Once"


async def test_closing_a_stream_early_frees_the_slot(sdk: Sdk) -> None:
    sdk.node.front.script = lambda work: tale(["x"] * 2000, step_s=0.02)

    def use(client: Any) -> None:
        stream = client.chat.completions.create(model="fairy", messages=MESSAGES, stream=True)
        for _, _ in zip(stream, range(5), strict=False):
            pass
        stream.close()

    await sdk(use)
    await sdk.node.idle()
    assert sdk.node.front.cancelled == 1


async def test_a_timeout_of_the_sdk_frees_the_slot(sdk: Sdk) -> None:
    sdk.node.front.script = lambda work: [3600.0]

    def use(client: Any) -> None:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).chat.completions.create(model="fairy", messages=MESSAGES)

    await sdk(use)
    await sdk.node.idle()
    assert sdk.node.front.cancelled == 1


def test_the_fake_is_a_front() -> None:
    from node.front import Front

    front: Front = FakeFront()
    assert front.readiness().ready
