"""Answers in the shape of OpenAI's Responses: whole, and as its events.

Rules: core. Text is an output item, a message with one text part; each call is one. Every event has its number. A
response that reached its length is `incomplete`, and its stream ends so; one that failed ends in `response.failed`,
always after `response.created`. Nothing is stored, and every response says so.

Source: OpenAI API reference, "The response object", "Streaming events"; openai-python 3.54 lib/streaming/responses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from node.errors import RequestError
from node.tools import ToolCall
from node.web.errors import row_of
from node.web.shapes import Answer, Head, Json, chat_token
from node.web.writer import CommentsWhileIdle, event
from node.work import Finished, TokenLogprob

STATUSES: Final = {"stop": "completed", "length": "incomplete"}
ERROR_CODES: Final = {429: "rate_limit_exceeded", 400: "invalid_prompt", 413: "invalid_prompt"}


@dataclass(slots=True, kw_only=True)
class _Told:
    """What a stream has told so far. text: of the message that is open, None while none is."""

    events: int = 0
    items: list[Json] = field(default_factory=list)
    text: list[str] | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesWriter(CommentsWhileIdle):
    """/v1/responses. `asked`: what the response repeats of its request."""

    asked: Json
    _told: _Told = field(default_factory=_Told, init=False)

    def opening(self, head: Head, answer: Answer) -> bytes:
        return self._created(head)

    def piece(self, head: Head, answer: Answer, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        opened = self._message_opened(head)
        assert self._told.text is not None, "a message is open"
        self._told.text.append(text)
        self._told.logprobs += logprobs
        tokens = [chat_token(one) for one in logprobs]
        return opened + self._event("response.output_text.delta", **self._place(head), delta=text, logprobs=tokens)

    def call(self, head: Head, answer: Answer, call: ToolCall) -> bytes:
        closed = self._message_closed(head, "completed")
        index, arguments = len(self._told.items), call.arguments
        item = _call(head, index, call)
        place = {"item_id": item["id"], "output_index": index}
        self._told.items.append(item)
        begun = {**item, "arguments": "", "status": "in_progress"}
        return closed + b"".join(
            (
                self._event("response.output_item.added", output_index=index, item=begun),
                self._event("response.function_call_arguments.delta", **place, delta=arguments),
                self._event("response.function_call_arguments.done", **place, name=call.name, arguments=arguments),
                self._event("response.output_item.done", output_index=index, item=item),
            )
        )

    def ending(self, head: Head, answer: Answer, finished: Finished) -> bytes:
        status = STATUSES[finished.reason]
        opened = b"" if self._told.items else self._message_opened(head)  # an answer without a word is a message too
        closed = self._message_closed(head, status)
        response = self._response(head, status, self._told.items, finished)
        return opened + closed + self._event(f"response.{status}", response=response)

    def closing(self, head: Head, answers: Sequence[Answer]) -> bytes:
        return b""

    def failure(self, head: Head, error: RequestError) -> bytes:
        created = b"" if self._told.events else self._created(head)
        output = list(self._told.items)
        if self._told.text is not None:
            part = _part("".join(self._told.text), self._told.logprobs)
            output.append(_message(head, len(output), "incomplete", [part]))
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
        text, output = "".join(answer.text), []
        if text or not answer.calls:
            output.append(_message(head, 0, status, [_part(text, answer.logprobs)]))
        output += [_call(head, index, call) for index, call in enumerate(answer.calls, len(output))]
        return msgspec.json.encode(self._response(head, status, output, answer.finished))

    def _message_opened(self, head: Head) -> bytes:
        """A message, if none is open."""
        if self._told.text is not None:
            return b""
        self._told.text, self._told.logprobs = [], []
        index = len(self._told.items)
        item = _message(head, index, "in_progress", [])
        return b"".join(
            (
                self._event("response.output_item.added", output_index=index, item=item),
                self._event("response.content_part.added", **self._place(head), part=_part("", ())),
            )
        )

    def _message_closed(self, head: Head, status: str) -> bytes:
        """The end of the message, if one is open."""
        if self._told.text is None:
            return b""
        text, index = "".join(self._told.text), len(self._told.items)
        part, place = _part(text, self._told.logprobs), self._place(head)
        item = _message(head, index, status, [part])
        self._told.items.append(item)
        self._told.text = None
        return b"".join(
            (
                self._event("response.output_text.done", **place, text=text, logprobs=part["logprobs"]),
                self._event("response.content_part.done", **place, part=part),
                self._event("response.output_item.done", output_index=index, item=item),
            )
        )

    def _place(self, head: Head) -> Json:
        index = len(self._told.items)
        return {"item_id": _id("msg", head, index), "output_index": index, "content_index": 0}

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
            "previous_response_id": None,
            "store": False,
            "text": {"format": {"type": "text"}},
            "truncation": "disabled",
            **self.asked,
        }


def _id(prefix: str, head: Head, index: int) -> str:
    return f"{prefix}_{head.request_id}" if index == 0 else f"{prefix}_{head.request_id}-{index}"


def _message(head: Head, index: int, status: str, content: list[Json]) -> Json:
    item_id = _id("msg", head, index)
    return {"id": item_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _call(head: Head, index: int, call: ToolCall) -> Json:
    return {
        "id": _id("fc", head, index),
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
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
