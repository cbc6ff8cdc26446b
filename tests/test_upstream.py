"""node/upstream.py over real HTTP: what is asked, what comes back, and every way in which the server can fail."""

from __future__ import annotations

import dataclasses
import gzip
import math
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

import node.upstream_answer
import node.upstream_health
from crypto.identity import PeerId
from gossip.messages import Capacity
from node.errors import (
    BadRequest,
    ConfigError,
    NoRoom,
    NotReady,
    PeerFailed,
    RequestError,
    TooLarge,
    UnknownModel,
)
from node.judge import Judge
from node.upstream import Upstream
from node.upstream_http import BODY_BYTES_MAX, Server, retry_after_s
from node.upstream_stream import EVENT_BYTES_MAX, Garbled
from node.upstream_watch import UpstreamConfig
from node.work import (
    UNKNOWN_TOKEN,
    AnswerItem,
    EmbedWork,
    Finished,
    GenerateWork,
    Message,
    Piece,
    Progress,
    Sampling,
    Started,
)
from tests.upstream_server import FakeServer, chat_prompt, expected, served, vector_of

pytestmark = pytest.mark.slow
PATIENCE_S = 30  # hang guard
KINDS = ("vllm", "llama.cpp", "llama-cpp-python", "ollama", "openai")
US = PeerId("12D3KooWus")


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.upstream_health, "LOOK_S", 0.3)


@dataclass
class Here:
    """A running Upstream and its server."""

    upstream: Upstream
    server: FakeServer
    stop_server: Callable[[], None]
    changes: list[int] = field(default_factory=list)  # free slots at each

    async def items(self, asked: GenerateWork) -> list[AnswerItem | RequestError]:
        async with self.upstream.generate(asked) as items:
            return [item async for item in items]

    async def error(self, asked: GenerateWork) -> RequestError:
        """The one error of a request, on admission or as its last item."""
        try:
            items = await self.items(asked)
        except RequestError as exc:
            return exc
        assert isinstance(items[-1], RequestError), items
        return items[-1]

    @property
    def free(self) -> int:
        return self.upstream.statistics().slots_free


@asynccontextmanager
async def running(config: UpstreamConfig | None = None, key: str | None = None, **fields: Any) -> AsyncIterator[Here]:
    server = FakeServer(**fields)
    async with served(server) as stop, trio.open_nursery() as nursery:
        made: list[Here] = []
        upstream = Upstream(
            Server(server.url, key),
            config or UpstreamConfig(),
            peer=US,
            on_change=lambda: made[0].changes.append(made[0].free) if made else None,
        )
        await nursery.start(upstream.run)
        made.append(Here(upstream, server, stop))
        yield made[0]
        nursery.cancel_scope.cancel()


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not true():  # noqa: ASYNC110  # of things that know no trio
            await trio.sleep(0.01)


def work(prompt: str = "once", most: int = 20, **changes: Any) -> GenerateWork:
    fields: dict[str, Any] = {"request_id": "q", "text": prompt, "sampling": Sampling(max_tokens=most)}
    return GenerateWork(**{**fields, **changes})


def chat(*contents: str, most: int = 20, **changes: Any) -> GenerateWork:
    messages = tuple(Message(role="user", content=each) for each in contents)
    return work(most=most, text=None, messages=messages, **changes)


def rest_of(asked: GenerateWork, said: str, tokens: int) -> dict[str, Any]:
    return {"delivered": (UNKNOWN_TOKEN,) * tokens, "delivered_chars": len(said), "delivered_text": said}


def text(items: list[AnswerItem | RequestError]) -> str:
    return "".join(item.text for item in items if isinstance(item, Piece))


def count(items: list[AnswerItem | RequestError]) -> int:
    return sum(len(item.tokens) for item in items if isinstance(item, Piece))


def judged(asked: GenerateWork, items: list[AnswerItem | RequestError]) -> None:
    """As a peer judges it."""
    judge = Judge(US, Capacity(), asked, 0.0)
    for item in items:
        if isinstance(item, Finished):
            judge.end(item)
        else:
            assert not isinstance(item, RequestError)
            judge.take(item, 1.0)


# --- answers ---


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens_an_event", [1, 3])
async def test_an_answer_of_each_kind_of_server(kind: str, tokens_an_event: int) -> None:
    async with running(kind=kind, tokens_an_event=tokens_an_event) as here:
        for asked, wanted in (
            (work("once", 21), expected("once", 21)),
            (chat("who", "are you", most=21), expected(chat_prompt("who", "are you"), 21)),
        ):
            items = await here.items(asked)
            assert isinstance(items[0], Started)
            assert text(items) == wanted
            assert isinstance(items[-1], Finished)
            assert items[-1].completion_tokens == 21 == count(items)
            assert items[-1].prompt_tokens > 0
            judged(asked, items)
        assert here.upstream.requests_running == 0
        assert here.upstream.statistics().finished == 2


async def test_a_server_that_counts_nothing() -> None:
    async with running(kind="llama-cpp-python", no_usage=True) as here:
        items = await here.items(work(most=9))
        assert items[-1] == Finished(reason="length", prompt_tokens=0, completion_tokens=9)
        judged(work(most=9), items)


async def test_logprobs() -> None:
    async with running(kind="vllm") as here:
        sampling = Sampling(max_tokens=4, logprobs=1)
        for asked in (work(sampling=sampling), chat("x", sampling=sampling)):
            items = await here.items(asked)
            logprobs = [one for item in items if isinstance(item, Piece) for one in item.logprobs]
            assert len(logprobs) == 4
            assert all(one.logprob == -0.5 and one.top == (("a", -1.0),) for one in logprobs)


async def test_vllm_and_llama_cpp_take_token_ids() -> None:
    for kind in ("vllm", "llama.cpp"):
        async with running(kind=kind) as here:
            items = await here.items(work(text=None, tokens=tuple(map(ord, "once"))))
            assert text(items) == expected("once", 20)


async def test_how_far_it_is_is_told_while_it_reads() -> None:
    async with running(kind="llama.cpp", before_s=1.2) as here:
        items = await here.items(work(most=2))
        kinds = [type(item) for item in items]
        assert kinds[0] is Started
        assert Progress in kinds[: kinds.index(Piece)]


# --- going on with another's answer ---


@pytest.mark.parametrize("kind", KINDS)
async def test_text_is_gone_on_with_from_anywhere(kind: str) -> None:
    whole = expected("once", 20)
    async with running(kind=kind) as here:
        for at in range(1, 20, 3):
            said = expected("once", at)
            asked = work(**rest_of(work(), said, at))
            items = await here.items(asked)
            assert said + text(items) == whole
            assert isinstance(items[-1], Finished)
            assert items[-1].completion_tokens == 20
            judged(asked, items)


@pytest.mark.parametrize("trims", [True, False], ids=["its template trims", "it does not"])
@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
async def test_a_chat_is_gone_on_with_from_anywhere(kind: str, trims: bool) -> None:
    prompt = chat_prompt("hi")
    whole = expected(prompt, 40)
    assert "\n\n" in whole
    async with running(kind=kind, trims=trims) as here:
        for at in range(1, 40):
            said = expected(prompt, at)
            asked = chat("hi", most=40, **rest_of(work(), said, at))
            items = await here.items(asked)
            assert (said + text(items)).startswith(whole[: len(said) + 10])
            assert whole.startswith(said + text(items)), "what is made again costs a token of the end"
            judged(asked, items)


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
@pytest.mark.parametrize("lack", [{"continues": False}, {"echoes": True}], ids=["begins anew", "says it again"])
async def test_a_version_that_does_not_go_on_is_found_out(kind: str, lack: dict[str, Any]) -> None:
    async with running(kind=kind, **lack) as here:
        assert here.upstream.told()["answers"]["continues"] is False
        asked = chat("hi", **rest_of(work(), "w5", 1))
        assert isinstance(await here.error(asked), PeerFailed)
        assert not here.server.bodies("/v1/chat/completions")
        port = int(here.server.url.rpartition(":")[2])
        here.stop_server()
        await until(lambda: not here.upstream.accepting)
        here.server.continues, here.server.echoes = True, False  # it comes back as another version
        async with served(here.server, port):
            await until(lambda: here.upstream.accepting)
            assert isinstance((await here.items(asked))[-1], Finished)


@pytest.mark.parametrize("kind", ["llama-cpp-python", "ollama", "openai"])
async def test_where_a_chat_cannot_be_gone_on_with_that_is_said(kind: str) -> None:
    async with running(kind=kind) as here:
        error = await here.error(chat("hi", **rest_of(work(), " w5", 1)))
        assert isinstance(error, PeerFailed)
        assert not here.server.bodies("/v1/chat/completions"), "it was not even asked"


async def test_an_answer_that_was_whole_needs_no_server() -> None:
    async with running() as here:
        items = await here.items(work(**rest_of(work(), expected("once", 20), 20)))
        assert items[-1] == Finished(reason="length", prompt_tokens=0, completion_tokens=20)
        assert not here.server.bodies("/v1/completions")


async def test_tokens_of_an_engine_are_not_taken_for_text() -> None:
    async with running() as here:
        error = await here.error(work(delivered=(1, 2), delivered_chars=7))
        assert isinstance(error, PeerFailed)


# --- leaving ---


async def test_who_leaves_frees_the_server() -> None:
    async with running(step_s=0.02) as here:
        async with here.upstream.generate(work(most=2_000)) as items:
            async for item in items:
                if isinstance(item, Piece):
                    break
            assert here.server.running == 1
        await until(lambda: here.server.running == 0)
        assert here.server.left == 1
        await until(lambda: here.upstream.statistics().cancelled == 1)
        assert here.upstream.requests_running == 0


async def test_who_leaves_before_the_first_word_frees_the_server() -> None:
    async with running(before_s=60.0) as here:
        async with here.upstream.generate(work()):
            await until(lambda: here.server.running == 1)
        await until(lambda: here.server.running == 0)


async def test_connections_are_used_again() -> None:
    """A new one for each answer costs round trips, and over https much more."""
    async with running() as here:
        seen = set[int]()
        for _ in range(5):
            await here.items(work(most=3))
            pool = here.upstream._watch.server._client._transport._pool  # type: ignore[attr-defined]
            seen |= {id(connection) for connection in pool.connections}
        assert len(seen) <= 2


async def test_a_client_that_reads_slowly_holds_the_server_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.upstream.PIECES_HELD", 4)
    async with running(step_s=0.0) as here:
        async with here.upstream.generate(work(most=500)) as items:
            await until(lambda: items.statistics().current_buffer_used == 4)
            got = [item async for item in items]
        assert text(got) == expected("once", 500)


# --- room ---


async def test_no_more_than_its_slots_are_there_at_a_time_and_the_others_wait() -> None:
    async with running(kind="llama.cpp", slots=2, step_s=0.02) as here:
        assert here.upstream.has_room()
        answers: list[list[AnswerItem | RequestError]] = []

        async def ask(number: int) -> None:
            answers.append(await here.items(work(f"q{number}", 80)))

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(ask, number)
            await until(lambda: here.upstream.statistics().queue_length == 3)
            assert not here.upstream.has_room()
            assert here.free == 0
        assert here.server.most_running == 2
        assert sorted(map(text, answers)) == sorted(expected(f"q{number}", 80) for number in range(5))
        waited = [items for items in answers if any(isinstance(item, Progress) for item in items)]
        assert max(item.queue_position for items in waited for item in items if isinstance(item, Progress)) >= 2
        await until(lambda: here.changes[-1] == 2)
        assert 0 in here.changes


async def test_who_waited_while_the_weights_changed_goes_elsewhere() -> None:
    async with running(kind="llama.cpp", slots=1, step_s=0.02) as here, trio.open_nursery() as nursery:
        nursery.start_soon(here.items, work(most=30))
        await until(lambda: here.server.running == 1)
        async with here.upstream.generate(work("next")) as items:
            watch = here.upstream._watch
            facts = dataclasses.replace(watch.found.facts, revision="said:other")
            watch.identity = dataclasses.replace(watch.found, main=dataclasses.replace(watch.found.main, facts=facts))
            got = [item async for item in items]
        assert isinstance(got[-1], PeerFailed)
        assert len(here.server.bodies("/v1/completions")) == 1
        nursery.cancel_scope.cancel()


async def test_a_queue_that_is_too_long_is_refused() -> None:
    async with running(kind="llama.cpp", slots=1, before_s=60.0) as here, trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(here.items, work())
        await until(lambda: here.upstream.statistics().queue_length == 2)
        error = await here.error(work())
        assert isinstance(error, NoRoom)
        assert error.retry_after_s
        nursery.cancel_scope.cancel()


async def test_the_operators_number_counts() -> None:
    async with running(UpstreamConfig(slots=7), kind="llama.cpp", slots=3) as here:
        assert here.free == here.upstream.statistics().slots_total == 7


async def test_what_vllm_says_of_itself_is_what_is_offered() -> None:
    async with running(kind="vllm", kv_used=0.5) as here:
        await until(lambda: here.upstream.statistics().kv_tokens_free == 8_000)
        assert here.upstream.has_room()
        here.server.waiting = 3
        await until(lambda: not here.upstream.has_room())
        assert here.free == 0
        assert here.upstream.statistics().queue_length == 3


async def test_llama_cpp_python_is_asked_one_thing_at_a_time() -> None:
    """It interrupts an answer when any other call comes, of a list of models even."""
    async with running(kind="llama-cpp-python", step_s=0.05) as here:
        answers: list[str] = []

        async def ask() -> None:
            answers.append(text(await here.items(work(most=30))))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        assert answers == [expected("once", 30)] * 3
        assert here.server.disturbed == 0


async def test_llama_cpp_pythons_other_clients_are_not_disturbed() -> None:
    async with running(kind="llama-cpp-python", step_s=0.05) as here, Server(here.server.url, None) as other:
        body = {"model": "tale", "prompt": "once", "max_tokens": 40, "stream": True}
        looks = len(here.server.seen_keys)
        async with other.stream("/v1/completions", body) as content:
            assert b"[DONE]" in b"".join([part async for part in content])
        assert len(here.server.seen_keys) > looks + 1, "it was looked at meanwhile"
        assert here.server.disturbed == 0


# --- failures ---

MEANINGS: list[tuple[int, type[RequestError]]] = [
    (400, BadRequest),
    (422, BadRequest),
    (413, TooLarge),
    (404, UnknownModel),
    (401, NotReady),
    (403, NotReady),
    (429, NoRoom),
    (503, NoRoom),
    (500, PeerFailed),
    (502, PeerFailed),
    (302, PeerFailed),
]


@pytest.mark.parametrize(("status", "kind"), MEANINGS)
async def test_what_each_status_means(status: int, kind: type[RequestError]) -> None:
    async with running() as here:
        here.server.status, here.server.error = status, "as it says"
        error = await here.error(work())
        assert type(error) is kind
        if kind in (BadRequest, TooLarge, UnknownModel, NoRoom):
            assert "as it says" in error.message
        if kind in (NoRoom, NotReady):
            assert error.retry_after_s
        assert sum(here.upstream.told()["failures"].values()) >= (status != 413)


async def test_who_is_full_gets_time_and_then_answers_again() -> None:
    async with running() as here:
        here.server.status, here.server.retry_after = 503, "2"
        assert isinstance(await here.error(work()), NoRoom)
        assert here.free == 0
        assert not here.upstream.accepting
        refused = await here.error(work())
        assert isinstance(refused, NoRoom)
        assert refused.retry_after_s is not None
        assert 1.0 <= refused.retry_after_s <= 2.0
        assert len(here.server.bodies("/v1/completions")) == 1, "it was left alone"
        here.server.status = 200
        await until(lambda: here.upstream.accepting)
        assert text(await here.items(work())) == expected("once", 20)


async def test_a_key_that_is_refused_is_the_operators_to_mend_and_told_to_nobody() -> None:
    async with running(key="s3cret-key-of-ours") as here:
        here.server.key = "another"
        error = await here.error(work())
        assert isinstance(error, NotReady)
        told = here.upstream.told()
        assert told["state"] == "refused"
        assert "--backend-key-file" in told["problem"]
        assert "s3cret" not in f"{told}{error.message}"
        assert "Incorrect API key" not in f"{told}{error.message}", "what it says of a key may have parts of it"
        here.server.key = None
        here.server.status, here.server.error = 400, "Incorrect API key provided: Bearer s3cret-key-of-ours"
        await until(lambda: not here.upstream.told()["problem"] or here.upstream._watch.health.failures["look"] > 0)
        here.server.status = 200
        await until(lambda: here.upstream.accepting)
        here.server.status = 400
        error = await here.error(work())
        assert isinstance(error, BadRequest)
        assert "s3cret" not in error.message
        assert "[key]" in error.message


async def test_the_key_is_sent() -> None:
    async with running(key="good") as here:
        await here.items(work(most=2))
        assert set(here.server.seen_keys) == {"Bearer good"}
    async with running() as here:
        assert set(here.server.seen_keys) == {None}


@pytest.mark.parametrize("after", [0, 1, 7])
async def test_a_stream_that_is_cut_is_a_failure_and_never_an_end(after: int) -> None:
    async with running() as here:
        here.server.cut_after = after
        items = await here.items(work())
        assert isinstance(items[-1], PeerFailed | NotReady)
        assert not any(isinstance(item, Finished) for item in items)
        assert text(items) == expected("once", after)
        assert text(await here.items(work())) == expected("once", 20)


@pytest.mark.parametrize("after", [0, 3])
async def test_done_without_a_reason_is_no_end(after: int) -> None:
    """llama-cpp-python says so when another request interrupts an answer."""
    async with running() as here:
        here.server.done_after = after
        items = await here.items(work())
        assert isinstance(items[-1], PeerFailed)
        assert "broke off" in items[-1].message


RAW = {
    "garbage": b"\x00\xff\x00 garbage \r\n\r\n" * 10,
    "no json": b"data: {nonsense}\n\n",
    "an error": b'data: {"error": {"message": "CUDA out of memory"}}\n\n',
    "a huge line": b"data: " + b"x" * (EVENT_BYTES_MAX + 10),
    "a huge event": b"data: xxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n" * (EVENT_BYTES_MAX // 30),
    "nothing": b"",
    "comments": b": ping\n\n" * 1_000,
    "too deep": b"data: " + b"[" * 200_000 + b"\n\n",
    "too much": b'data: {"choices": [{"text": "' + b"x" * 100_000 + b'"}]}\n\n',
    "filtered": b'data: {"choices": [{"text": "a", "finish_reason": "content_filter"}]}\n\ndata: [DONE]\n\n',
}


@pytest.mark.parametrize("raw", RAW.values(), ids=RAW.keys())
async def test_whatever_is_streamed_ends_in_one_clear_error(raw: bytes) -> None:
    async with running() as here:
        here.server.raw = raw
        error = await here.error(work())
        assert isinstance(error, PeerFailed)
        assert len(error.message) < 700
        here.server.raw = None
        assert text(await here.items(work())) == expected("once", 20)


async def test_silence_in_mid_answer_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.upstream_answer, "STALL_S", 0.3)
    async with running(freeze_after=4) as here:
        items = await here.items(work())
        assert text(items) == expected("once", 4)
        assert isinstance(items[-1], PeerFailed)
        assert "nothing for" in items[-1].message
        await until(lambda: here.server.running == 0)


async def test_comments_are_no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.upstream_answer, "STALL_S", 0.3)
    async with running() as here:

        async def pings(path: str, asked: Any, send: Any) -> None:
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": [(b"content-type", b"text/event-stream")]})
            await send(
                {"type": "http.response.body", "body": b'data: {"choices":[{"text":"a"}]}\n\n', "more_body": True}
            )
            while True:
                await send({"type": "http.response.body", "body": b": ping\n\n", "more_body": True})
                await trio.sleep(0.05)

        monkeypatch.setattr(here.server, "_events", pings)
        assert isinstance(await here.error(work()), PeerFailed)


async def test_a_first_token_that_does_not_come_leaves_time_for_another_peer() -> None:
    async with running(before_s=60.0) as here:
        error = await here.error(work(remaining_ms=1_000))
        assert isinstance(error, PeerFailed)
        assert "no token within" in error.message
        await until(lambda: here.server.running == 0)


async def test_an_answer_that_is_no_stream_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as here:

        async def page(path: str, asked: Any, receive: Any, send: Any) -> None:
            start = {"type": "http.response.start", "status": 200}
            await send({**start, "headers": [(b"content-type", b"text/html")]})
            await send({"type": "http.response.body", "body": b"<html>log in</html>", "more_body": False})

        monkeypatch.setattr(here.server, "_stream", page)
        error = await here.error(work())
        assert isinstance(error, PeerFailed)
        assert "text/html" in error.message


async def test_a_server_that_ends_and_comes_back() -> None:
    async with running(step_s=0.02) as here:
        port = int(here.server.url.rpartition(":")[2])
        async with here.upstream.generate(work(most=2_000)) as items:
            got = list[AnswerItem | RequestError]()
            async for item in items:
                got.append(item)
                if count(got) == 5:
                    here.stop_server()
        assert isinstance(got[-1], PeerFailed)
        assert (await here.error(work())).retryable
        await until(lambda: not here.upstream.accepting)
        refused = await here.error(work())
        assert isinstance(refused, NotReady)
        assert refused.message == "the server behind this node is down", "it was not even tried"
        assert refused.retry_after_s
        assert here.free == 0
        assert here.upstream.statistics().kv_tokens_free == 0
        assert here.upstream.serves("tale", None, "causal"), "the model stays on the list, with no room"
        assert "is down" in here.upstream.told()["problem"]
        async with served(here.server, port):
            await until(lambda: here.upstream.accepting)
            assert text(await here.items(work(most=9))) == expected("once", 9)
            assert here.free > 0
            assert not here.upstream.told()["problem"]
            here.upstream.draining = True
            assert isinstance(await here.error(work()), NotReady)


async def test_a_server_that_freezes_stops_those_who_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.upstream_http.ANSWER_S", 0.2)
    async with running(before_s=60.0) as here, trio.open_nursery() as nursery:
        errors: list[RequestError] = []

        async def ask() -> None:
            errors.append(await here.error(work()))

        nursery.start_soon(ask)
        await until(lambda: here.server.running == 1)

        async def never(*_: object) -> None:
            await trio.sleep_forever()

        monkeypatch.setattr(FakeServer, "__call__", never)
        await until(lambda: bool(errors))
        assert isinstance(errors[0], PeerFailed)
        assert "is down" in errors[0].message
        nursery.cancel_scope.cancel()


async def test_a_server_that_has_another_model_now_is_stated_anew() -> None:
    async with running(kind="llama.cpp") as here:
        before = here.upstream.revision
        port = int(here.server.url.rpartition(":")[2])
        here.stop_server()
        await until(lambda: not here.upstream.accepting)
        here.server.models = ("other",)
        async with served(here.server, port):
            await until(lambda: here.upstream.accepting)
            assert here.upstream.facts("causal") is not None
            assert here.upstream.runtime.facts.name == "other"
            assert here.upstream.revision != before
            assert isinstance(await here.error(work(model="tale")), UnknownModel)
            assert isinstance(await here.error(work(revision=before)), UnknownModel)


async def test_a_model_that_is_gone_is_a_problem_and_no_crash() -> None:
    async with running(UpstreamConfig(model="tale"), models=("tale", "other")) as here:
        here.server.models = ("other",)
        await until(lambda: not here.upstream.accepting)
        assert "has no model 'tale'" in here.upstream.told()["problem"]
        here.server.models = ("tale",)
        await until(lambda: here.upstream.accepting)


# --- the start ---


async def test_it_waits_for_a_server_that_is_not_there_yet() -> None:
    server = FakeServer()
    async with served(server) as stop:
        stop()
    port = int(server.url.rpartition(":")[2])
    upstream = Upstream(Server(server.url, None), UpstreamConfig(), peer=US, on_change=lambda: None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upstream.run)
        await until(lambda: "is down" in upstream.told()["problem"])
        server.status = 503  # it loads
        async with served(server, port):
            await until(lambda: "503" in upstream.told()["problem"])
            assert not upstream.accepting
            server.status = 200
            await until(lambda: upstream.accepting)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("config", "fields", "wanted"),
    [
        (UpstreamConfig(), {"models": ("a", "b")}, "it has 2 models, choose one by --model NAME: a, b"),
        (UpstreamConfig(model="c"), {"models": ("a", "b")}, "no model 'c'; it has a, b"),
        (UpstreamConfig(), {"key": "k"}, "--backend-key-file"),
        (UpstreamConfig(), {"status": 404}, "is this its address"),
        (UpstreamConfig(), {"status": 301}, "redirects elsewhere"),
        (UpstreamConfig(), {"has_text": False, "has_chat": False, "embeds": False}, "answers neither"),
        (UpstreamConfig(model="tale", embedding_model="tale"), {"embeds": False}, "makes no vectors"),
    ],
    ids=["several", "unknown", "key", "address", "redirect", "no model of ours", "no vectors"],
)
async def test_what_cannot_work_is_said_at_once(config: UpstreamConfig, fields: dict[str, Any], wanted: str) -> None:
    server = FakeServer(**fields)
    async with served(server):
        upstream = Upstream(Server(server.url, None), config, peer=US, on_change=lambda: None)
        with pytest.raises(ConfigError) as caught:
            await upstream.run()
        assert wanted in str(caught.value)


async def test_a_server_of_chats_takes_no_text() -> None:
    async with running(has_text=False) as here:
        assert text(await here.items(chat("hi"))) == expected(chat_prompt("hi"), 20)
        error = await here.error(work())
        assert isinstance(error, BadRequest)
        assert "takes chats only" in error.message


# --- vectors ---


def embed(*texts: str | tuple[int, ...]) -> EmbedWork:
    return EmbedWork(request_id="q", texts=texts)


async def test_vectors_have_length_one_and_the_texts_order() -> None:
    async with running() as here:
        texts = tuple("x" * length for length in range(1, 40))
        embedded = await here.upstream.embed(embed(*texts))
        for each, vector in zip(texts, embedded.vectors, strict=True):
            values, wanted = struct.unpack("<3f", vector), vector_of(each)
            assert math.hypot(*values) == pytest.approx(1.0)
            assert values[0] / values[1] == pytest.approx(wanted[0] / wanted[1], rel=1e-5)
        assert (embedded.dimensions, embedded.prompt_tokens, embedded.served_by) == (3, 78, US)
        assert [len(body["input"]) for body in here.server.bodies("/v1/embeddings")][-3:] == [16, 16, 7]
        assert here.upstream.requests_running == 0


async def test_whether_a_text_was_cut_is_known_or_said_to_be_unknown() -> None:
    for kind, wanted in (("vllm", (False, False)), ("ollama", (False, None))):
        async with running(kind=kind, context=100) as here:
            assert (await here.upstream.embed(embed("short", "long " * 50))).truncated == wanted


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 0, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 5, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0, 2.0]}],
        [{"index": 0, "embedding": [0.0]}, {"index": 1, "embedding": [1.0]}],
        [{"index": 0, "embedding": [1.7e308, 1.7e308]}, {"index": 1, "embedding": [1.0, 0.0]}],
        [{"index": 0, "embedding": []}, {"index": 1, "embedding": []}],
        [{"index": 0, "embedding": "AAAA"}, {"index": 1, "embedding": "AAAA"}],
    ],
    ids=["none", "one", "twice", "elsewhere", "lengths", "zero", "infinite", "empty", "base64"],
)
async def test_vectors_that_are_none_are_refused(rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running() as here:
        monkeypatch.setattr(here.server, "_answer", lambda path, asked: (200, {"data": rows}))
        with pytest.raises(PeerFailed):
            await here.upstream.embed(embed("a", "b"))


async def test_texts_and_token_ids_do_not_mix() -> None:
    async with running() as here:
        assert (await here.upstream.embed(embed((1, 2)))).vectors
        with pytest.raises(BadRequest, match="not both"):
            await here.upstream.embed(embed("a", (1, 2)))


async def test_a_server_without_vectors_serves_none() -> None:
    async with running(embeds=False) as here:
        assert here.upstream.facts("encoder") is None
        assert not here.upstream.runtime.facts.embeds
        with pytest.raises(UnknownModel):
            await here.upstream.embed(embed("a"))


async def test_another_model_may_make_the_vectors() -> None:
    config = UpstreamConfig(model="tale", embedding_model="vectors")
    async with running(config, models=("tale", "vectors")) as here:
        names = {facts.name: (facts.kind, facts.embeds) for facts in here.upstream.runtime.all_facts()}
        assert names == {"tale": ("causal", False), "vectors": ("encoder", True)}
        assert (await here.upstream.embed(embed("a"))).model == "vectors"
        assert here.server.bodies("/v1/embeddings")[-1]["model"] == "vectors"


async def test_a_server_of_vectors_alone_is_an_encoder() -> None:
    async with running(has_text=False, has_chat=False) as here:
        assert here.upstream.runtime.facts.kind == "encoder"
        assert here.upstream.facts("causal") is None
        assert (await here.upstream.embed(embed("a"))).vectors


def test_retry_after_in_both_forms() -> None:
    assert retry_after_s("7") == 7.0
    assert retry_after_s("Thu, 01 Jan 1970 00:00:00 GMT") == 0.0
    for none in (None, "", "soon", "-1", "1.5", "²"):
        assert retry_after_s(none) is None


# --- the door ---


async def replied(monkeypatch: pytest.MonkeyPatch, headers: list[tuple[bytes, bytes]], body: bytes) -> str:
    """What a look at a server says that answers so."""

    async def page(self: FakeServer, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            return
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    monkeypatch.setattr(FakeServer, "__call__", page)
    server = FakeServer()
    async with served(server), Server(server.url, None) as door:
        with pytest.raises(Garbled) as caught:
            await door.get("/v1/models")
    return str(caught.value)


async def test_a_body_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a body of over" in await replied(monkeypatch, [], b" " * (BODY_BYTES_MAX + 1))


async def test_nothing_compressed_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes could become gigabytes."""
    body = gzip.compress(b'{"data": []}')
    assert "compressed" in await replied(monkeypatch, [(b"content-encoding", b"gzip")], body)


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    async with running() as here:
        assert text(await here.items(work(most=3))) == expected("once", 3)
