"""Answers in the shape of Anthropic's Messages: whole, and as its events.

Rules: core. A text block is opened by its first text and ended by a call, a call is one block, whole; an answer that
says nothing has one empty text block. Token counts of the last message_delta are the true ones;
those of message_start are what was known then. A stop string is told as `stop_sequence` only when it is known which
ended the answer, and an answer does not say that: without that it is `end_turn`.

Source: Claude API reference, "Create a Message", "Streaming messages" (order of events, ping, error).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import msgspec

from node.errors import RequestError
from node.tools import ToolCall
from node.web.errors import anthropic_error
from node.web.schema_called import arguments_of
from node.web.shapes import Answer, Head, Json
from node.web.writer import CommentsWhileIdle, event
from node.work import Finished, TokenLogprob

STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
PING: Final = event({"type": "ping"}, "ping")


@dataclass(slots=True, kw_only=True)
class _Blocks:
    """What a stream has told so far."""

    closed: int = 0
    is_open: bool = False  # a text block


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesWriter(CommentsWhileIdle):
    """/v1/messages."""

    _blocks: _Blocks = field(default_factory=_Blocks, init=False)

    def headers(self, head: Head) -> dict[str, str]:
        return {"request-id": head.request_id}

    def opening(self, head: Head, answer: Answer) -> bytes:
        assert answer.started is not None, "the node told of an answer before Started"
        message = _message(head, [], None, _usage(answer.started.prompt_tokens, 0))
        return _event({"type": "message_start", "message": message})

    def piece(self, head: Head, answer: Answer, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        return self._opened() + self._delta({"type": "text_delta", "text": text}) if text else b""

    def call(self, head: Head, answer: Answer, call: ToolCall) -> bytes:
        arguments = msgspec.json.encode(arguments_of(call)).decode()
        return b"".join(
            (
                self._closed(),
                self._start({"type": "tool_use", "id": call.id, "name": call.name, "input": {}}),
                self._delta({"type": "input_json_delta", "partial_json": arguments}),
                self._stop(),
            )
        )

    def ending(self, head: Head, answer: Answer, finished: Finished) -> bytes:
        blocks = self._closed() if self._blocks.closed or self._blocks.is_open else self._opened() + self._closed()
        delta = {"stop_reason": STOP_REASONS[answer.reason or ""], "stop_sequence": None}
        usage = _usage(finished.prompt_tokens, finished.completion_tokens)
        return blocks + _event({"type": "message_delta", "delta": delta, "usage": usage})

    def closing(self, head: Head, answers: Sequence[Answer]) -> bytes:
        return _event({"type": "message_stop"})

    def failure(self, head: Head, error: RequestError) -> bytes:
        return event(anthropic_error(error, head.request_id), "error")

    def idle(self, head: Head) -> bytes:
        return PING

    def whole(self, head: Head, answers: Sequence[Answer]) -> bytes:
        [answer] = answers
        finished = answer.finished
        assert finished is not None, "only complete answers are told whole"
        text = "".join(answer.text)
        content: list[Json] = [{"type": "text", "text": text}] if text or not answer.calls else []
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_of(call)} for call in answer.calls
        ]
        usage = _usage(finished.prompt_tokens, finished.completion_tokens)
        return msgspec.json.encode(_message(head, content, STOP_REASONS[answer.reason or ""], usage))

    def _opened(self) -> bytes:
        """A text block, if none is open."""
        if self._blocks.is_open:
            return b""
        self._blocks.is_open = True
        return self._start({"type": "text", "text": ""})

    def _closed(self) -> bytes:
        """The end of the text block, if one is open."""
        if not self._blocks.is_open:
            return b""
        self._blocks.is_open = False
        return self._stop()

    def _start(self, block: Json) -> bytes:
        return _event({"type": "content_block_start", "index": self._blocks.closed, "content_block": block})

    def _delta(self, delta: Json) -> bytes:
        return _event({"type": "content_block_delta", "index": self._blocks.closed, "delta": delta})

    def _stop(self) -> bytes:
        self._blocks.closed += 1
        return _event({"type": "content_block_stop", "index": self._blocks.closed - 1})


def _message(head: Head, content: list[Json], reason: str | None, usage: Json) -> Json:
    return {
        "id": f"msg_{head.request_id}",
        "type": "message",
        "role": "assistant",
        "model": head.model,
        "content": content,
        "stop_reason": reason,
        "stop_sequence": None,
        "usage": usage,
    }


def _usage(input_tokens: int, output_tokens: int) -> Json:
    return {"input_tokens": input_tokens, "output_tokens": output_tokens}


def _event(told: Json) -> bytes:
    return event(told, told["type"])
