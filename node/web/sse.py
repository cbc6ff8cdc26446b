"""Streams the answers of one request as they come, in the client's protocol (writer.py).

Rules: the response head is held until the first answer has started, so that an error before that is a plain HTTP
error and the headers name who serves; but no longer than HEAD_HOLD_S, so that a proxy sees life. While nothing
comes, something that clients pass over says so. What is ready together goes out as one event. The end is always
explicit: every protocol has a word for a complete answer and one for a failure. When the client goes, the work is
cancelled at once.

Source: WHATWG HTML, "Server-sent events"; exo src/exo/master/api.py (keep-alive and prefill comments).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import trio
from starlette.types import Receive, Scope, Send

from node.errors import RequestError
from node.front import Front, RouteHint
from node.tools import ToolCall
from node.web.answers import GRACE_S as GRACE_S
from node.web.answers import ITEMS_QUEUED_MAX, Told, feed, out_of_time, wait_gone
from node.web.errors import error_answer
from node.web.shapes import Answer, Head
from node.web.writer import AnswerWriter
from node.work import Finished, GenerateWork, Piece, Progress, Started, TokenLogprob

HEAD_HOLD_S = 15.0  # half of the shortest common proxy timeout (30 s)
KEEP_ALIVE_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """What to stream, and how."""

    request_id: str
    works: Sequence[GenerateWork]
    hint: RouteHint
    writer: AnswerWriter
    deadline_s: float


class EventStream:
    """An ASGI response: one request's answers as they come."""

    def __init__(self, front: Front, request: StreamRequest) -> None:
        self._front = front
        self._request = request
        self._writer = request.writer
        now = trio.current_time()
        self._answers = [Answer(index=index, asked_s=now) for index in range(len(request.works))]
        asked = request.works[0].model or "default"
        self._head = Head(request_id=request.request_id, created_s=int(time.time()), model=asked, revision="")
        self._opened = False
        self._head_sent = False
        self._events: list[bytes] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream to the end. Returns early, all work cancelled, when the client goes away."""
        request = self._request

        async def watch(cancel_scope: trio.CancelScope) -> None:
            await wait_gone(receive)
            cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            with trio.move_on_after(request.deadline_s + GRACE_S) as limit:
                error = await self._run(send)
            if limit.cancelled_caught:
                error = out_of_time(request.deadline_s)
            await self._finish(send, error, scope["path"])
            nursery.cancel_scope.cancel()

    async def _run(self, send: Send) -> RequestError | None:
        """Answer all; the first error, when there is one."""
        error = None
        told, items = trio.open_memory_channel[Told](ITEMS_QUEUED_MAX)
        async with trio.open_nursery() as nursery:
            async with told:
                for index, work in enumerate(self._request.works):
                    nursery.start_soon(feed, self._front, index, work, self._request.hint, told.clone())
            async with items:
                error = await self._write(items, send)
                nursery.cancel_scope.cancel()  # while there is somebody to send to: the others may have errors too
        return error

    async def _write(self, items: trio.MemoryReceiveChannel[Told], send: Send) -> RequestError | None:
        told_at = trio.current_time()
        held_until = told_at + HEAD_HOLD_S
        while any(answer.finished is None for answer in self._answers):
            batch: list[Told] = []
            until = told_at + KEEP_ALIVE_S
            with trio.move_on_at(until if self._head_sent else min(held_until, until)):
                batch = await _receive_ready(items)
            told = len(self._events)
            error = self._take(batch)
            if error is not None:
                return error
            if len(self._events) > told:
                told_at = trio.current_time()
            elif trio.current_time() >= until:
                self._events.append(self._writer.idle(self._head))
                told_at = trio.current_time()
            if self._head_sent or self._opened or trio.current_time() >= held_until:
                await self._send(send)
        return None

    def _take(self, batch: list[Told]) -> RequestError | None:
        """Turn items into events, text of one answer that is ready together as one. The first error ends it."""
        text: dict[int, list[Piece]] = {}
        for index, item in batch:
            if isinstance(item, RequestError):
                self._flush(text)
                return item
            if isinstance(item, Piece):
                text.setdefault(index, []).append(item)
                continue
            self._flush(text)
            if isinstance(item, Progress):
                self._say(self._writer.progress(index, item))
                continue
            answer = self._answers[index]
            fresh = answer.started is None
            answer.take(item, trio.current_time())
            if isinstance(item, Started) and fresh:
                self._open(answer, item)
            elif isinstance(item, ToolCall):
                assert self._opened, "the node told of an answer before Started"
                self._say(self._writer.call(self._head, answer, item))
            elif isinstance(item, Finished):
                assert self._opened, "the node told of an answer before Started"
                self._say(self._writer.ending(self._head, answer, item))
        self._flush(text)
        return None

    def _open(self, answer: Answer, started: Started) -> None:
        if not self._opened:
            self._head = replace(self._head, model=started.model, revision=started.revision)
            self._opened = True
        self._say(self._writer.opening(self._head, answer))

    def _flush(self, text: dict[int, list[Piece]]) -> None:
        for index, pieces in text.items():
            assert self._opened, "the node told of an answer before Started"
            answer = self._answers[index]
            if answer.first_s is None:
                answer.first_s = trio.current_time()
            joined = "".join(piece.text for piece in pieces)
            logprobs: list[TokenLogprob] = [one for piece in pieces for one in piece.logprobs]
            if joined or logprobs:
                self._say(self._writer.piece(self._head, answer, joined, logprobs))
        text.clear()

    def _say(self, event: bytes) -> None:
        if event:
            self._events.append(event)

    async def _send(self, send: Send, *, more: bool = True) -> None:
        if not self._head_sent:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            self._head_sent = True
        body, self._events = b"".join(self._events), []
        if body or not more:
            await send({"type": "http.response.body", "body": body, "more_body": more})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"content-type", self._writer.media_type.encode()),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx must not hold events back
        ]
        for name, value in {**served_headers(self._answers), **self._writer.headers(self._head)}.items():
            headers.append((name.encode(), value.encode()))
        return headers

    async def _finish(self, send: Send, error: RequestError | None, path: str) -> None:
        if error is not None and not self._head_sent:
            status, headers, body = error_answer(error, self._request.request_id, path)
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": status, "headers": pairs})
            await send({"type": "http.response.body", "body": body})
            return
        if error is not None:
            self._events.append(self._writer.failure(self._head, error))
        else:
            self._events.append(self._writer.closing(self._head, self._answers))
        await self._send(send, more=False)


def served_headers(answers: Sequence[Answer]) -> dict[str, str]:
    """x-served-by and x-model-revision of what has started so far, several separated by commas; x-cache when all of it
    was kept from earlier requests."""
    started = [answer.started for answer in answers if answer.started is not None]
    if not started:
        return {}
    headers = {
        "x-served-by": ", ".join(dict.fromkeys(one.served_by for one in started)),
        "x-model-revision": ", ".join(dict.fromkeys(one.revision for one in started)),
    }
    return {**headers, "x-cache": "hit"} if all(one.cached for one in started) else headers


async def _receive_ready(items: trio.MemoryReceiveChannel[Told]) -> list[Told]:
    """Wait for one item, and take what else is there already."""
    batch = [await items.receive()]
    while len(batch) < ITEMS_QUEUED_MAX:
        try:
            batch.append(items.receive_nowait())
        except (trio.WouldBlock, trio.EndOfChannel):
            break
    return batch
