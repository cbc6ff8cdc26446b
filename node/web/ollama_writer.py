"""Answers in the shape of Ollama's /api/chat and /api/generate: whole, and as lines of JSON.

Rules: each line is an object of its own; the last has `done`, why, and counts. Ollama has no comments, so a line
without text is sent while nothing comes. Durations are nanoseconds as this door saw them: prompt_eval_duration lasts
until the first token and so holds the wait for room and the way to the peer. What was loaded is not known: no
load_duration.

Source: Ollama docs/api.md, "Generate a chat completion", "Generate a completion", "Conventions"; errors in a stream:
docs/api/errors.mdx.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

import msgspec

from node.errors import RequestError
from node.tools import ToolCall
from node.web.errors import ollama_error
from node.web.schema_called import arguments_of
from node.web.shapes import Answer, Head, Json, chat_token
from node.web.writer import LINES
from node.work import Finished, Progress, TokenLogprob

NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaWriter:
    """/api/chat when `chat`, else /api/generate. `model`: as the client called it, which is how Ollama answers."""

    model: str
    chat: bool
    logprobs: bool
    media_type: str = field(default=LINES, init=False)

    def headers(self, head: Head) -> dict[str, str]:
        return {}

    def opening(self, head: Head, answer: Answer) -> bytes:
        return b""

    def piece(self, head: Head, answer: Answer, text: str, logprobs: Sequence[TokenLogprob]) -> bytes:
        return _line({**self._said(head, text), "done": False, **self._logprobs(logprobs)})

    def call(self, head: Head, answer: Answer, call: ToolCall) -> bytes:
        return _line({**self._said(head, "", [call]), "done": False})

    def ending(self, head: Head, answer: Answer, finished: Finished) -> bytes:
        return _line({**self._said(head, ""), **_end(answer, finished)})

    def closing(self, head: Head, answers: Sequence[Answer]) -> bytes:
        return b""

    def failure(self, head: Head, error: RequestError) -> bytes:
        return _line(ollama_error(error, head.request_id))

    def idle(self, head: Head) -> bytes:
        return _line({**self._said(head, ""), "done": False})

    def progress(self, index: int, progress: Progress) -> bytes:
        return b""

    def whole(self, head: Head, answers: Sequence[Answer]) -> bytes:
        [answer] = answers
        assert answer.finished is not None, "only complete answers are told whole"
        said = self._said(head, "".join(answer.text), answer.calls)
        return msgspec.json.encode({**said, **_end(answer, answer.finished), **self._logprobs(answer.logprobs)})

    def loaded(self, head: Head) -> bytes:
        """The answer to a request without a prompt: the model is there."""
        return _line({**self._said(head, ""), "done": True, "done_reason": "load"})

    def _said(self, head: Head, text: str, calls: Sequence[ToolCall] = ()) -> Json:
        said: Json = {"response": text}
        if self.chat:
            message: Json = {"role": "assistant", "content": text}
            if calls:
                functions = [{"name": call.name, "arguments": arguments_of(call)} for call in calls]
                message["tool_calls"] = [{"function": function} for function in functions]
            said = {"message": message}
        return {"model": self.model, "created_at": moment(head.created_s), **said}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json:
        return {"logprobs": [chat_token(one) for one in logprobs]} if self.logprobs else {}


def moment(seconds: int) -> str:
    """A time of the wall clock as Ollama writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _end(answer: Answer, finished: Finished) -> Json:
    assert answer.finished_s is not None, "the answer is complete"
    first_s = answer.finished_s if answer.first_s is None else answer.first_s
    return {
        "done": True,
        "done_reason": finished.reason,
        "total_duration": round((answer.finished_s - answer.asked_s) * NS),
        "prompt_eval_count": finished.prompt_tokens,
        "prompt_eval_duration": round((first_s - answer.asked_s) * NS),
        "eval_count": finished.completion_tokens,
        "eval_duration": round((answer.finished_s - first_s) * NS),
    }


def _line(told: Json) -> bytes:
    return msgspec.json.encode(told) + b"\n"
