"""The clients that people have, as they use them, against a real port: anthropic, openai's responses, ollama."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
import trio

from node.errors import NoRoom, PeerFailed
from tests.fake_front import PEER, tale, told
from tests.test_web_serve import Served, served

T = TypeVar("T")
HELLO = [{"role": "user", "content": "hello"}]
TALE = "Once upon a time"

pytestmark = pytest.mark.slow


def kit(name: str) -> Any:
    return pytest.importorskip(name, reason=f"pip install -e '.[clients]' has {name}")


class Clients:
    """One vendor's two clients of one node."""

    def __init__(self, node: Served, sync: Any, awaited: Any) -> None:
        self.node = node
        self.sync = sync
        self.awaited = awaited

    async def __call__(self, use: Callable[[Any], T]) -> T:
        """Use the sync client in a thread."""
        return await trio.to_thread.run_sync(use, self.sync)


@asynccontextmanager
async def vendor(name: str, node: Served) -> AsyncIterator[Clients]:
    module, url = kit(name), f"http://127.0.0.1:{node.port}"
    if name == "ollama":
        clients = Clients(node, module.Client(host=url), module.AsyncClient(host=url))
    else:
        keys = {"base_url": url if name == "anthropic" else f"{url}/v1", "api_key": "none", "max_retries": 0}
        kinds = ("Anthropic", "AsyncAnthropic") if name == "anthropic" else ("OpenAI", "AsyncOpenAI")
        clients = Clients(node, *(getattr(module, kind)(**keys) for kind in kinds))
    try:
        yield clients
    finally:
        clients.sync.close()
        await clients.awaited.close()


@pytest.fixture
async def anthropic() -> AsyncIterator[Clients]:
    async with served() as node, vendor("anthropic", node) as clients:
        yield clients


@pytest.fixture
async def openai() -> AsyncIterator[Clients]:
    async with served() as node, vendor("openai", node) as clients:
        yield clients


@pytest.fixture
async def ollama() -> AsyncIterator[Clients]:
    async with served() as node, vendor("ollama", node) as clients:
        yield clients


ASKED: dict[str, Any] = {"model": "fairy", "max_tokens": 5, "messages": HELLO}


async def test_anthropic_whole(anthropic: Clients) -> None:
    anthropic.node.front.script = lambda work: told(["Once", " upon"])
    message = await anthropic(lambda client: client.messages.create(**ASKED, system="Be brief."))
    assert [block.text for block in message.content] == ["Once upon"]
    assert (message.stop_reason, message.usage.input_tokens, message.usage.output_tokens) == ("end_turn", 3, 2)
    assert message._request_id.startswith("req-")
    raw = await anthropic.awaited.messages.with_raw_response.create(**ASKED)
    assert raw.headers["x-served-by"] == PEER
    assert (await raw.parse()).content == message.content
    counted = await anthropic.awaited.messages.count_tokens(model="fairy", messages=HELLO)
    assert counted.input_tokens == 3


async def test_anthropic_streams(anthropic: Clients) -> None:
    def use(client: Any) -> tuple[str, Any]:
        with client.messages.stream(**ASKED) as stream:
            return "".join(stream.text_stream), stream.get_final_message()

    text, message = await anthropic(use)
    assert text == message.content[0].text == TALE
    assert (message.stop_reason, message.usage.output_tokens) == ("max_tokens", 4)
    async with anthropic.awaited.messages.stream(**ASKED) as stream:
        assert "".join([text async for text in stream.text_stream]) == TALE
    kinds = [event.type async for event in await anthropic.awaited.messages.create(**ASKED, stream=True)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


async def test_anthropic_errors(anthropic: Clients) -> None:
    module = kit("anthropic")

    def failing(client: Any) -> None:
        with pytest.raises(module.NotFoundError, match="nope") as unknown:
            client.messages.create(**{**ASKED, "model": "nope"})
        assert unknown.value.request_id.startswith("req-")
        with pytest.raises(module.BadRequestError, match="no tools"):
            client.messages.create(**ASKED, tool_choice={"type": "any"})

    await anthropic(failing)
    anthropic.node.front.script = lambda work: [*tale(["Once"], step_s=0.05)[:-1], 0.05, PeerFailed("the peer died")]
    text: list[str] = []

    async def stream() -> None:
        async with anthropic.awaited.messages.stream(**ASKED) as pieces:
            async for piece in pieces.text_stream:
                text.append(piece)

    with pytest.raises(module.APIStatusError, match="the peer died"):
        await stream()
    assert text == ["Once"]


async def test_responses_whole(openai: Clients) -> None:
    openai.node.front.script = lambda work: told(["Once", " upon"])
    asked = {"model": "fairy", "input": HELLO, "instructions": "Be brief.", "store": False}
    logprobs = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    response = await openai(lambda client: client.responses.create(**asked, **logprobs))
    assert (response.output_text, response.status) == ("Once upon", "completed")
    assert response.output[0].content[0].logprobs[0].token == "Once"
    assert response.usage.total_tokens == 5
    again = [*HELLO, *response.output, {"role": "user", "content": "more"}]
    assert (await openai.awaited.responses.create(model="fairy", input=again)).output_text == "Once upon"
    roles = [message.role for message in openai.node.front.works[-1].messages or ()]
    assert roles == ["user", "assistant", "user"], "what came may be sent back as it is"


async def test_responses_streams(openai: Clients) -> None:
    openai.node.front.script = lambda work: told(["Once", " upon"])

    def use(client: Any) -> tuple[str, Any]:
        with client.responses.stream(model="fairy", input="hello") as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            return text, stream.get_final_response()

    text, final = await openai(use)
    assert text == final.output_text == "Once upon"
    stream = await openai.awaited.responses.create(model="fairy", input="hello", stream=True)
    events = [event async for event in stream]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")


async def test_responses_errors(openai: Clients) -> None:
    module = kit("openai")

    def failing(client: Any) -> None:
        with pytest.raises(module.NotFoundError, match="stores no responses"):
            client.responses.retrieve("resp_1")
        with pytest.raises(module.BadRequestError, match="stores no responses"):
            client.responses.create(model="fairy", input="x", previous_response_id="resp_1")

    await openai(failing)
    openai.node.front.script = lambda work: [*tale(["Once"], step_s=0.05)[:-1], 0.05, PeerFailed("the peer died")]
    async with openai.awaited.responses.stream(model="fairy", input="hello") as stream:
        events = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.error.message == "the peer died"


async def test_ollama_chat_and_generate(ollama: Clients) -> None:
    def use(client: Any) -> None:
        whole = client.chat("fairy:latest", messages=HELLO, options={"temperature": 0, "num_predict": 4})
        assert (whole.message.content, whole.done_reason, whole.eval_count) == (TALE, "length", 4)
        assert whole.total_duration >= whole.eval_duration
        parts = list(client.chat("fairy", messages=HELLO, stream=True, keep_alive="5m"))
        assert "".join(part.message.content for part in parts) == TALE
        assert [part.done for part in parts[-2:]] == [False, True]
        assert client.generate("fairy", "hello", system="Be brief.").response == TALE
        assert client.generate("fairy").done_reason == "load"

    await ollama(use)
    stream = await ollama.awaited.generate("fairy", "hello", raw=True, stream=True)
    assert "".join([part.response async for part in stream]) == TALE
    assert (await ollama.awaited.chat("fairy", messages=HELLO)).message.content == TALE


async def test_ollama_embeds_and_tells(ollama: Clients) -> None:
    def use(client: Any) -> None:
        assert client.embed("org/enc", ["a", "b"]).embeddings[0] == pytest.approx([0.6, 0.8, 0.0])
        assert client.embeddings("org/enc", "a").embedding == pytest.approx([0.6, 0.8, 0.0])
        [fairy, encoder] = client.list().models
        assert (fairy.model, encoder.model, fairy.size) == ("fairy", "org/enc", None)
        assert client.ps().models[0].context_length == 1024
        assert client.show("fairy").capabilities == ["completion"]

    await ollama(use)
    assert len((await ollama.awaited.list()).models) == 2


async def test_ollama_errors(ollama: Clients) -> None:
    module = kit("ollama")

    def failing(client: Any) -> None:
        with pytest.raises(module.ResponseError, match="served are: fairy") as unknown:
            client.show("nope")
        assert unknown.value.status_code == 404
        with pytest.raises(module.ResponseError, match="said by who runs it"):
            client.pull("nope")

    await ollama(failing)
    ollama.node.front.script = lambda work: [NoRoom("every peer is full")]
    with pytest.raises(module.ResponseError, match="every peer is full"):
        await ollama.awaited.chat("fairy", messages=HELLO)
    ollama.node.front.script = lambda work: [*tale(["Once"], step_s=0.05)[:-1], 0.05, PeerFailed("the peer died")]
    text: list[str] = []

    async def stream() -> None:
        async for part in await ollama.awaited.chat("fairy", messages=HELLO, stream=True):
            text.append(part.message.content)

    with pytest.raises(module.ResponseError, match="the peer died"):
        await stream()
    assert text == ["Once"]


async def test_a_stream_that_is_left_frees_the_slot() -> None:
    for name in ("anthropic", "openai", "ollama"):
        async with served() as node, vendor(name, node) as clients:
            node.front.script = lambda work: tale(["x"] * 2000, step_s=0.02)

            def use(client: Any, name: str = name) -> None:
                stream = {
                    "anthropic": lambda: client.messages.create(**ASKED, stream=True),
                    "openai": lambda: client.responses.create(model="fairy", input="hello", stream=True),
                    "ollama": lambda: client.chat("fairy", messages=HELLO, stream=True),
                }[name]()
                with contextlib.closing(stream):
                    for _, _ in zip(stream, range(6), strict=False):
                        pass

            await clients(use)
            await node.idle()
            assert node.front.cancelled == 1, name
