"""How an answer is written down for its client: one writer a request, whatever protocol the client speaks.

Rules: core. A writer gives whole events as bytes, b"" where its protocol has none; it never waits, and what it keeps is
of its one request. Who streams (sse.py) owns time and order: opening, pieces, ending of each answer, then closing or
failure once. The writer of OpenAI's chunks is here; those of other protocols are beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import msgspec

from node.errors import RequestError
from node.tools import ToolCall
from node.web.errors import error_object
from node.web.shapes import Answer, Head, Json, Shape
from node.work import Finished, Progress, TokenLogprob

EVENT_STREAM: Final = "text/event-stream; charset=utf-8"
LINES: Final = "application/x-ndjson"
DONE: Final = b"data: [DONE]\n\n"


class AnswerWriter(Protocol):
    """One request's answers in its client's protocol."""

    @property
    def media_type(self) -> str:
        """Of a stream."""

    def headers(self, head: Head) -> dict[str, str]:
        """What this protocol's clients look for beside the headers that every answer has."""

    def opening(self, head: Head, answer: Answer) -> bytes:
        """An answer has started."""

    def piece(self, head: Head, answer: Answer, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        """New text."""

    def call(self, head: Head, answer: Answer, call: ToolCall) -> bytes:
        """The answer calls a function: its newest call. Only of requests that have tools."""

    def ending(self, head: Head, answer: Answer, finished: Finished) -> bytes:
        """One answer is complete."""

    def closing(self, head: Head, answers: Sequence[Answer]) -> bytes:
        """All answers are complete: the end of the stream."""

    def failure(self, head: Head, error: RequestError) -> bytes:
        """The end of a stream that failed after its head was sent."""

    def idle(self, head: Head) -> bytes:
        """Something to send while nothing comes, which clients pass over."""

    def progress(self, index: int, progress: Progress) -> bytes:
        """What is done before the first token, where the protocol has a place for it."""

    def whole(self, head: Head, answers: Sequence[Answer]) -> bytes:
        """Everything at once, as JSON."""


def event(told: Json, name: str | None = None) -> bytes:
    """One server-sent event."""
    line = b"" if name is None else b"event: " + name.encode() + b"\n"
    return line + b"data: " + msgspec.json.encode(told) + b"\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class CommentsWhileIdle:
    """Streams whose clients pass over comments, as the standard says."""

    media_type: str = field(default=EVENT_STREAM, init=False)

    def headers(self, head: Head) -> dict[str, str]:
        return {}

    def call(self, head: Head, answer: Answer, call: ToolCall) -> bytes:
        raise AssertionError("a route that refuses tools got a call")

    def idle(self, head: Head) -> bytes:
        return b": keep-alive\n\n"

    def progress(self, index: int, progress: Progress) -> bytes:
        told = {
            "index": index,
            "engine_steps": progress.engine_steps,
            "prefilled_tokens": progress.prefilled_tokens,
            "queue_position": progress.queue_position,
        }
        return b": prefill_progress " + msgspec.json.encode(told) + b"\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWriter(CommentsWhileIdle):
    """OpenAI's chunks in a route's shape, ended by [DONE]."""

    shape: Shape
    include_usage: bool = False

    def opening(self, head: Head, answer: Answer) -> bytes:
        chunk = self.shape.opening(head, answer.index)
        return b"" if chunk is None else self._chunk(chunk)

    def piece(self, head: Head, answer: Answer, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        return self._chunk(self.shape.piece(head, answer.index, text, logprobs))

    def call(self, head: Head, answer: Answer, call: ToolCall) -> bytes:
        return self._chunk(self.shape.call(head, answer.index, call, len(answer.calls) - 1))

    def ending(self, head: Head, answer: Answer, finished: Finished) -> bytes:
        return self._chunk(self.shape.ending(head, answer.index, answer.reason or finished.reason))

    def closing(self, head: Head, answers: Sequence[Answer]) -> bytes:
        return (event(self.shape.usage(head, answers)) if self.include_usage else b"") + DONE

    def failure(self, head: Head, error: RequestError) -> bytes:
        return event(error_object(error, head.request_id), "error") + DONE

    def whole(self, head: Head, answers: Sequence[Answer]) -> bytes:
        return msgspec.json.encode(self.shape.whole(head, answers))

    def _chunk(self, chunk: Json) -> bytes:
        if self.include_usage and "usage" not in chunk:
            chunk["usage"] = None
        return event(chunk)
