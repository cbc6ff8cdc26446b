"""The life of a stream in time: what goes out while nothing comes, and what ends when the client goes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from node.errors import NoRoom, NotReady
from node.web.answers import ITEMS_QUEUED_MAX
from node.web.app import build_app
from node.web.sse import HEAD_HOLD_S, KEEP_ALIVE_S
from node.work import Progress
from tests.fake_front import FakeFront, Step, finished, started, tale


class Call:
    """One request as a server would carry it: what was sent, with its time; `leave` closes the connection."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.sent: list[tuple[float, dict[str, Any]]] = []
        self.done = False
        self._gone = trio.Event()
        self._body = json.dumps(body).encode()
        self._told = False
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "server": ("127.0.0.1", 1),
            "headers": [(b"host", b"127.0.0.1"), (b"content-length", str(len(self._body)).encode())],
        }

    def leave(self) -> None:
        self._gone.set()

    async def receive(self) -> dict[str, Any]:
        if not self._told:
            self._told = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        await trio.lowlevel.checkpoint()
        self.sent.append((trio.current_time(), message))

    def text(self) -> str:
        return b"".join(m.get("body", b"") for _, m in self.sent).decode()

    def head_at(self) -> float | None:
        return next((at for at, m in self.sent if m["type"] == "http.response.start"), None)

    def headers(self) -> dict[str, str]:
        head = next(m for _, m in self.sent if m["type"] == "http.response.start")
        return {name.decode(): value.decode() for name, value in head["headers"]}


@asynccontextmanager
async def calling(front: FakeFront, path: str, body: dict[str, Any]) -> AsyncIterator[Call]:
    """Run one request in the background; it must have ended by the end of the block, or is waited for."""
    call = Call(path, body)
    app = build_app(front, Random(7))

    async def run() -> None:
        await app(call.scope, call.receive, call.send)  # type: ignore[arg-type]
        call.done = True

    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run)
            yield call


STREAMED = {"prompt": "a", "stream": True}
HELLO = {"messages": [{"role": "user", "content": "a"}]}
MESSAGES = {"max_tokens": 5, **HELLO}
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/messages", {**MESSAGES, "stream": True}),
    ("/v1/responses", {"input": "a", "stream": True}),
    ("/api/chat", {"model": "fairy", **HELLO}),
    ("/api/generate", {"model": "fairy", "prompt": "a"}),
]


async def test_the_head_waits_for_the_start_but_not_for_ever(autojump_clock: MockClock) -> None:
    front = FakeFront(lambda work: [HEAD_HOLD_S * 3, *tale(["x"])])
    began = trio.current_time()
    async with calling(front, "/v1/completions", STREAMED) as call:
        pass
    head_at = call.head_at()
    assert head_at is not None
    assert head_at - began == pytest.approx(HEAD_HOLD_S, abs=0.1)
    assert "x-served-by" not in call.headers()
    assert call.text().startswith(": keep-alive\n\n")
    assert call.text().endswith("data: [DONE]\n\n")


async def test_an_error_after_the_hold_is_an_event(autojump_clock: MockClock) -> None:
    front = FakeFront(lambda work: [HEAD_HOLD_S * 2, NotReady("draining")])
    async with calling(front, "/v1/completions", {**STREAMED, "stream_options": {"include_usage": True}}) as call:
        pass
    assert call.sent[0][1]["status"] == 200
    assert '"code":"not_ready"' in call.text()
    assert call.text().endswith("data: [DONE]\n\n")


async def test_an_error_within_the_hold_is_a_status(autojump_clock: MockClock) -> None:
    front = FakeFront(lambda work: [HEAD_HOLD_S * 0.9, NoRoom("full")])
    async with calling(front, "/v1/completions", STREAMED) as call:
        pass
    assert call.sent[0][1]["status"] == 503


@pytest.mark.parametrize("begins", [[], [started()]])
async def test_several_answers_that_fail_at_once_are_one_error(begins: list[Step], autojump_clock: MockClock) -> None:
    """A node that is full refuses them all: the second error found nobody to be told to, and was taken for a bug."""
    front = FakeFront(lambda work: [*begins, NoRoom("full")])
    async with calling(front, "/v1/completions", {**STREAMED, "n": 16}) as call:
        pass
    assert call.done
    assert (call.sent[0][1]["status"], call.text().count('"code":"no_room"')) == (503, 1)


async def test_silence_is_filled_with_comments(autojump_clock: MockClock) -> None:
    front = FakeFront(lambda work: [started(), KEEP_ALIVE_S * 3.5, *tale(["x"])[1:]])
    async with calling(front, "/v1/completions", STREAMED) as call:
        pass
    assert call.text().count(": keep-alive\n\n") == 3
    assert "x-served-by" in call.headers()


async def test_progress_is_told_as_comments_that_clients_skip(autojump_clock: MockClock) -> None:
    progress = Progress(engine_steps=4, prefilled_tokens=512, queue_position=0)
    front = FakeFront(lambda work: [started(), progress, 1.0, *tale(["x"])[1:]])
    async with calling(
        front, "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}
    ) as call:
        pass
    [line] = [line for line in call.text().splitlines() if line.startswith(": prefill_progress ")]
    assert json.loads(line.removeprefix(": prefill_progress "))["prefilled_tokens"] == 512


IDLE = {
    "/v1/messages": 'event: ping\ndata: {"type":"ping"}\n\n',
    "/v1/responses": ": keep-alive\n\n",
    "/api/chat": '"message":{"role":"assistant","content":""},"done":false}\n',
    "/api/generate": '"response":"","done":false}\n',
}


@pytest.mark.parametrize(("path", "body"), OTHERS)
async def test_every_protocol_has_something_to_say_in_silence(
    path: str, body: dict[str, Any], autojump_clock: MockClock
) -> None:
    front = FakeFront(lambda work: [HEAD_HOLD_S * 2, started(), KEEP_ALIVE_S * 3.5, *tale(["x"])[1:]])
    async with calling(front, path, body) as call:
        pass
    head_at = call.head_at()
    assert head_at is not None
    assert call.text().count(IDLE[path]) >= 5, "also before anybody has begun"
    lines = call.text().splitlines() if path.startswith("/api/") else []
    assert all(json.loads(line)["model"] == "fairy" for line in lines), "each line is an object"


@pytest.mark.parametrize(("path", "body"), OTHERS)
async def test_progress_does_not_silence_a_protocol_without_a_place_for_it(
    path: str, body: dict[str, Any], autojump_clock: MockClock
) -> None:
    step: list[Step] = [KEEP_ALIVE_S * 0.4, Progress(engine_steps=1, prefilled_tokens=1, queue_position=0)]
    front = FakeFront(lambda work: [started(), *step * 10, *tale(["x"])[1:]])
    async with calling(front, path, body) as call:
        pass
    said = [at for at, message in call.sent if message["type"] == "http.response.start" or message["body"]]
    assert max(after - before for before, after in pairwise(said)) <= KEEP_ALIVE_S * 1.5


@pytest.mark.parametrize(("path", "body"), OTHERS)
async def test_every_protocol_has_a_word_for_a_failure_that_comes_late(
    path: str, body: dict[str, Any], autojump_clock: MockClock
) -> None:
    front = FakeFront(lambda work: [HEAD_HOLD_S * 2, NotReady("draining")])
    async with calling(front, path, body) as call:
        pass
    assert call.sent[0][1]["status"] == 200
    last = call.text().strip().splitlines()[-1].removeprefix("data: ")
    assert "draining" in last
    if path == "/v1/responses":
        assert call.text().index("response.created") < call.text().index("response.failed")


def waiting(front: FakeFront) -> bool:
    return front.running > 0


Case = tuple[str, dict[str, Any]]
CASES: list[Case] = [
    ("/v1/completions", STREAMED),
    ("/v1/completions", {**STREAMED, "n": 3}),
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/completions", {"prompt": "a", "n": 3}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ("/api/v1/model/inference", {"text": ["a", "b"]}),
    ("/v1/messages", {**MESSAGES, "stream": True}),
    ("/v1/messages", MESSAGES),
    ("/v1/responses", {"input": "a", "stream": True}),
    ("/api/chat", {"model": "fairy", **HELLO}),
    ("/api/generate", {"model": "fairy", "prompt": "a", "stream": False}),
]
SILENT: list[Callable[[], list[Step]]] = [
    lambda: [3600.0],  # before it started
    lambda: [started(), 3600.0, finished(0)],  # prefill
    lambda: tale(["x"] * 1000, step_s=1.0),  # in mid-answer
]


@pytest.mark.parametrize("silence", SILENT)
@pytest.mark.parametrize(("path", "body"), CASES)
async def test_when_the_client_goes_the_work_ends_at_once(
    path: str, body: dict[str, Any], silence: Callable[[], list[Step]], autojump_clock: MockClock
) -> None:
    front = FakeFront(lambda work: silence())
    async with calling(front, path, body) as call:
        await front.until(waiting)
        await trio.sleep(7.25)
        assert front.running > 0
        left_at = trio.current_time()
        call.leave()
        await front.until(lambda front: front.running == 0)
        assert trio.current_time() == left_at
    assert front.cancelled == len(front.works) > 0
    if not body.get("stream", path == "/api/chat"):
        assert call.sent == []


async def test_when_the_client_goes_the_embedding_ends_at_once(autojump_clock: MockClock) -> None:
    front = FakeFront()
    front.embed_wait_s = 3600.0
    async with calling(front, "/v1/embeddings", {"input": "a"}) as call:
        await front.until(waiting)
        left_at = trio.current_time()
        call.leave()
        await front.until(lambda front: front.running == 0)
        assert trio.current_time() == left_at
    assert front.cancelled == 1
    assert call.sent == []


async def test_a_slow_client_holds_the_answer_back(autojump_clock: MockClock) -> None:
    """The queue between the engine and a client that does not read is bounded: the front is not drained into memory."""
    front = FakeFront(lambda work: tale(["x"] * 500))
    taken = trio.Event()

    class Slow(Call):
        async def send(self, message: dict[str, Any]) -> None:
            await super().send(message)
            if len(self.sent) == 2:
                await taken.wait()

    call = Slow("/v1/completions", STREAMED)
    app = build_app(front, Random(7))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app, call.scope, call.receive, call.send)  # type: ignore[arg-type]
        await trio.sleep(60)
        assert front.running == 1
        assert front.items <= 3 * ITEMS_QUEUED_MAX
        taken.set()
    assert front.items == 502
    assert front.running == front.cancelled == 0
