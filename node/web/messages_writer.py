"""Answers in the shape of Anthropic's Messages: whole, and as its events.

Rules: core. One text block, index 0, there from the start. Token counts of the last message_delta are the true ones;
those of message_start are what was known then. A stop string is told as `stop_sequence` only when it is known which
ended the answer, and an answer does not say that: without that it is `end_turn`.

Source: Claude API reference, "Create a Message", "Streaming messages" (order of events, ping, error).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from node.errors import RequestError
from node.web.errors import anthropic_error
from node.web.shapes import Answer, Head, Json
from node.web.writer import CommentsWhileIdle, event
from node.work import Finished, TokenLogprob

STOP_REASONS: Final = {"stop": "end_turn", "length": "max_tokens"}
PING: Final = event({"type": "ping"}, "ping")


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesWriter(CommentsWhileIdle):
    """/v1/messages."""

    def headers(self, head: Head) -> dict[str, str]:
        return {"request-id": head.request_id}

    def opening(self, head: Head, answer: Answer) -> bytes:
        assert answer.started is not None, "the node told of an answer before Started"
        message = _message(head, [], None, _usage(answer.started.prompt_tokens, 0))
        block = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
        return _event({"type": "message_start", "message": message}) + _event(block)

    def piece(self, head: Head, answer: Answer, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        delta = {"type": "text_delta", "text": text}
        return _event({"type": "content_block_delta", "index": 0, "delta": delta}) if text else b""

    def ending(self, head: Head, answer: Answer, finished: Finished) -> bytes:
        delta = {"stop_reason": STOP_REASONS[finished.reason], "stop_sequence": None}
        usage = _usage(finished.prompt_tokens, finished.completion_tokens)
        return b"".join(
            (
                _event({"type": "content_block_stop", "index": 0}),
                _event({"type": "message_delta", "delta": delta, "usage": usage}),
            )
        )

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
        content = [{"type": "text", "text": "".join(answer.text)}]
        usage = _usage(finished.prompt_tokens, finished.completion_tokens)
        return msgspec.json.encode(_message(head, content, STOP_REASONS[finished.reason], usage))


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
