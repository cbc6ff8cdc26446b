"""Streams answers as server-sent events, in OpenAI's shapes.

Rules: the response head is held until the first answer has started, so that an error before that is a plain HTTP
error and the headers name who serves; but no longer than HEAD_HOLD_S, so that a proxy sees life. While nothing
comes, comments say so. What is ready together goes out as one event. The end is always explicit: finish reasons
and `[DONE]`, or an `error` event and `[DONE]`. When the client goes, the work is cancelled at once.

Source: WHATWG HTML, "Server-sent events"; exo src/exo/master/api.py (keep-alive and prefill comments).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import trio
from starlette.types import Receive, Scope, Send

from node.errors import RequestError
from node.front import Front, RouteHint
from node.tools import ToolCall
from node.web.answers import GRACE_S as GRACE_S
from node.web.answers import ITEMS_QUEUED_MAX, Told, feed, out_of_time, wait_gone
from node.web.errors import error_answer, error_object
from node.web.shapes import Answer, Head, Json, Shape
from node.work import Finished, GenerateWork, Piece, Progress, Started, TokenLogprob

HEAD_HOLD_S = 15.0  # half of the shortest common proxy timeout (30 s)
KEEP_ALIVE_S = 10.0
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """What to stream, and how."""

    request_id: str
    works: Sequence[GenerateWork]
    hint: RouteHint
    shape: Shape
    include_usage: bool
    deadline_s: float


class EventStream:
    """An ASGI response: one request's answers as events."""

    def __init__(self, front: Front, request: StreamRequest) -> None:
        self._front = front
        self._request = request
        self._answers = [Answer(index=index) for index in range(len(request.works))]
        self._head: Head | None = None
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
            await self._finish(send, error)
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
            nursery.cancel_scope.cancel()
        return error

    async def _write(self, items: trio.MemoryReceiveChannel[Told], send: Send) -> RequestError | None:
        held_until = trio.current_time() + HEAD_HOLD_S
        while any(answer.finished is None for answer in self._answers):
            batch: list[Told] = []
            until = trio.current_time() + KEEP_ALIVE_S
            with trio.move_on_at(until if self._head_sent else min(held_until, until)):
                batch = await _receive_ready(items)
            error = self._take(batch)
            if error is not None:
                return error
            if not batch:
                self._events.append(KEEP_ALIVE)
            if self._head_sent or self._head is not None or trio.current_time() >= held_until:
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
                self._events.append(b": prefill_progress " + msgspec.json.encode(_progress(index, item)) + b"\n\n")
                continue
            fresh = self._answers[index].started is None
            self._answers[index].take(item)
            if isinstance(item, Started) and fresh:
                self._open(index, item)
            elif isinstance(item, ToolCall):
                number = len(self._answers[index].calls) - 1
                self._event(self._request.shape.call(self._opened(), index, item, number))
            elif isinstance(item, Finished):
                self._event(self._request.shape.ending(self._opened(), index, self._answers[index].reason or ""))
        self._flush(text)
        return None

    def _open(self, index: int, started: Started) -> None:
        if self._head is None:
            self._head = Head(
                request_id=self._request.request_id,
                created_s=int(time.time()),
                model=started.model,
                revision=started.revision,
            )
        opening = self._request.shape.opening(self._head, index)
        if opening is not None:
            self._event(opening)

    def _opened(self) -> Head:
        assert self._head is not None, "the node told of an answer before Started"
        return self._head

    def _flush(self, text: dict[int, list[Piece]]) -> None:
        for index, pieces in text.items():
            joined = "".join(piece.text for piece in pieces)
            logprobs: list[TokenLogprob] = [one for piece in pieces for one in piece.logprobs]
            if joined or logprobs:
                self._event(self._request.shape.piece(self._opened(), index, joined, logprobs))
        text.clear()

    def _event(self, chunk: Json) -> None:
        if self._request.include_usage and "usage" not in chunk:
            chunk["usage"] = None
        self._events.append(b"data: " + msgspec.json.encode(chunk) + b"\n\n")

    async def _send(self, send: Send, *, more: bool = True) -> None:
        if not self._head_sent:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            self._head_sent = True
        body, self._events = b"".join(self._events), []
        if body or not more:
            await send({"type": "http.response.body", "body": body, "more_body": more})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),  # nginx must not hold events back
        ]
        for name, value in served_headers(self._answers).items():
            headers.append((name.encode(), value.encode()))
        return headers

    async def _finish(self, send: Send, error: RequestError | None) -> None:
        if error is not None and not self._head_sent:
            status, headers, body = error_answer(error, self._request.request_id)
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": status, "headers": pairs})
            await send({"type": "http.response.body", "body": body})
            return
        if error is not None:
            told = msgspec.json.encode(error_object(error, self._request.request_id))
            self._events.append(b"event: error\ndata: " + told + b"\n\n")
        elif self._request.include_usage:
            self._event(self._request.shape.usage(self._opened(), self._answers))
        self._events.append(DONE)
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


def _progress(index: int, item: Progress) -> Json:
    return {
        "index": index,
        "engine_steps": item.engine_steps,
        "prefilled_tokens": item.prefilled_tokens,
        "queue_position": item.queue_position,
    }
