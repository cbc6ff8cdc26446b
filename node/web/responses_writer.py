"""Answers in the shape of OpenAI's Responses: whole, and as its events.

Rules: core. One output item, a message with one text part. Every event has its number. A response that reached its
length is `incomplete`, and its stream ends so; one that failed ends in `response.failed`, always after
`response.created`. Nothing is stored, and every response says so.

Source: OpenAI API reference, "The response object", "Streaming events"; openai-python 3.54 lib/streaming/responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from node.errors import RequestError
from node.web.errors import row_of
from node.web.shapes import Answer, Head, Json, chat_token
from node.web.writer import CommentsWhileIdle, event
from node.work import Finished, TokenLogprob

STATUSES: Final = {"stop": "completed", "length": "incomplete"}
ERROR_CODES: Final = {429: "rate_limit_exceeded", 400: "invalid_prompt", 413: "invalid_prompt"}


@dataclass(slots=True, kw_only=True)
class _Told:
    """What a stream has told so far."""

    events: int = 0
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesWriter(CommentsWhileIdle):
    """/v1/responses. `asked`: what the response repeats of its request."""

    asked: Json
    _told: _Told = field(default_factory=_Told, init=False)

    def opening(self, head: Head, answer: Answer) -> bytes:
        return b"".join(
            (
                self._created(head),
                self._event("response.output_item.added", output_index=0, item=_item(head, "in_progress", [])),
                self._event("response.content_part.added", **_place(head), part=_part("", ())),
            )
        )

    def piece(self, head: Head, answer: Answer, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        self._told.text.append(text)
        self._told.logprobs += logprobs
        tokens = [chat_token(one) for one in logprobs]
        return self._event("response.output_text.delta", **_place(head), delta=text, logprobs=tokens)

    def ending(self, head: Head, answer: Answer, finished: Finished) -> bytes:
        status, text = STATUSES[finished.reason], "".join(self._told.text)
        part = _part(text, self._told.logprobs)
        item = _item(head, status, [part])
        return b"".join(
            (
                self._event("response.output_text.done", **_place(head), text=text, logprobs=part["logprobs"]),
                self._event("response.content_part.done", **_place(head), part=part),
                self._event("response.output_item.done", output_index=0, item=item),
                self._event(f"response.{status}", response=self._response(head, status, [item], finished)),
            )
        )

    def closing(self, head: Head, answers: Sequence[Answer]) -> bytes:
        return b""

    def failure(self, head: Head, error: RequestError) -> bytes:
        created = b"" if self._told.events else self._created(head)
        output = []
        if self._told.text:
            output = [_item(head, "incomplete", [_part("".join(self._told.text), self._told.logprobs)])]
        response = self._response(head, "failed", output, None)
        response["error"] = {
            "code": ERROR_CODES.get(row_of(error).status, "server_error"),
            "message": error.message,
            "param": error.param,
            "type": row_of(error).type,
        }
        return created + self._event("response.failed", response=response)

    def whole(self, head: Head, answers: Sequence[Answer]) -> bytes:
        [answer] = answers
        assert answer.finished is not None, "only complete answers are told whole"
        status = STATUSES[answer.finished.reason]
        item = _item(head, status, [_part("".join(answer.text), answer.logprobs)])
        return msgspec.json.encode(self._response(head, status, [item], answer.finished))

    def _created(self, head: Head) -> bytes:
        response = self._response(head, "in_progress", [], None)
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def _event(self, kind: str, **fields: object) -> bytes:
        told = {"type": kind, "sequence_number": self._told.events, **fields}
        self._told.events += 1
        return event(told, kind)

    def _response(self, head: Head, status: str, output: list[Json], finished: Finished | None) -> Json:
        return {
            "id": f"resp_{head.request_id}",
            "object": "response",
            "created_at": head.created_s,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": head.model,
            "output": output,
            "usage": None if finished is None else _usage(finished),
            "background": False,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
            **self.asked,
        }


def _place(head: Head) -> Json:
    return {"item_id": f"msg_{head.request_id}", "output_index": 0, "content_index": 0}


def _item(head: Head, status: str, content: list[Json]) -> Json:
    return {
        "id": f"msg_{head.request_id}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def _part(text: str, logprobs: Sequence[TokenLogprob]) -> Json:
    tokens = [chat_token(one) for one in logprobs]
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": tokens}


def _usage(finished: Finished) -> Json:
    return {
        "input_tokens": finished.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": finished.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": finished.prompt_tokens + finished.completion_tokens,
    }
