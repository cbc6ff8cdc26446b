"""What clients get, in OpenAI's shapes: whole answers and the chunks of a stream.

Rules: core. One Shape per route; every chunk of one answer carries the same id, created and model. A chunk that
ends an answer has its finish_reason and no text. Logprobs are finite: -inf becomes LOGPROB_MIN, as at OpenAI.

Source: OpenAI API reference, "The chat completion object", "The chat completion chunk object", "The completion
object", "The embedding object".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from node.tools import ToolCall
from node.work import AnswerItem, Finished, Piece, Progress, Started, TokenLogprob

LOGPROB_MIN = -9999.0

Json = dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Answer:
    """One answer as it grows. Owned by the task that collects it. Times are monotonic seconds, as this door saw it."""

    index: int
    asked_s: float
    first_s: float | None = None  # its first token
    finished_s: float | None = None
    started: Started | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def reason(self) -> str | None:
        """Why it ended: stop, length, or tool_calls; None while it goes on."""
        if self.finished is None:
            return None
        return "tool_calls" if self.calls and self.finished.reason == "stop" else self.finished.reason

    def take(self, item: AnswerItem | ToolCall, now: float) -> None:
        """Note one item."""
        match item:
            case ToolCall():
                self.calls.append(item)
            case Started():
                self.started = self.started or item
            case Piece():
                self.first_s = now if self.first_s is None else self.first_s
                self.text.append(item.text)
                self.logprobs.extend(item.logprobs)
            case Finished():
                self.finished = item
                self.finished_s = now
            case Progress():
                pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every chunk of an answer repeats."""

    request_id: str
    created_s: int
    model: str
    revision: str

    def json(self, object_name: str, prefix: str) -> Json:
        return {
            "id": f"{prefix}-{self.request_id}",
            "object": object_name,
            "created": self.created_s,
            "model": self.model,
            "system_fingerprint": self.revision,
        }


class Shape(Protocol):
    """How one route writes its answers. `logprobs` says whether the client asked for them."""

    def opening(self, head: Head, index: int) -> Json | None:
        """The chunk before any text, when the route has one."""

    def piece(self, head: Head, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        """New text."""

    def call(self, head: Head, index: int, call: ToolCall, number: int) -> Json:
        """A call of a function, the answer's `number`th from 0. Only of requests that have tools."""

    def ending(self, head: Head, index: int, reason: str) -> Json:
        """The end of one answer."""

    def usage(self, head: Head, answers: Sequence[Answer]) -> Json:
        """The last chunk, when the client asked for usage."""

    def whole(self, head: Head, answers: Sequence[Answer]) -> Json:
        """Everything at once."""


def usage_of(answers: Sequence[Answer], *, per_prompt: int = 1) -> Json:
    """Tokens of all answers; the prompt of `per_prompt` answers in a row is one and counted once."""
    prompt = sum(a.finished.prompt_tokens for a in answers[::per_prompt] if a.finished)
    completion = sum(a.finished.completion_tokens for a in answers if a.finished)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatShape:
    """/v1/chat/completions."""

    logprobs: bool
    n: int

    def opening(self, head: Head, index: int) -> Json | None:
        return self._chunk(head, index, {"role": "assistant", "content": ""}, None)

    def piece(self, head: Head, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        return self._chunk(head, index, {"content": text}, None, logprobs)

    def call(self, head: Head, index: int, call: ToolCall, number: int) -> Json:
        return self._chunk(head, index, {"tool_calls": [{"index": number, **_call(call)}]}, None)

    def ending(self, head: Head, index: int, reason: str) -> Json:
        return self._chunk(head, index, {}, reason)

    def usage(self, head: Head, answers: Sequence[Answer]) -> Json:
        usage = usage_of(answers, per_prompt=self.n)
        return {**head.json("chat.completion.chunk", "chatcmpl"), "choices": [], "usage": usage}

    def whole(self, head: Head, answers: Sequence[Answer]) -> Json:
        choices = [
            {
                "index": answer.index,
                "message": _message(answer),
                "logprobs": self._logprobs(answer.logprobs),
                "finish_reason": answer.reason,
            }
            for answer in answers
        ]
        usage = usage_of(answers, per_prompt=self.n)
        return {**head.json("chat.completion", "chatcmpl"), "choices": choices, "usage": usage}

    def _chunk(
        self, head: Head, index: int, delta: Json, reason: str | None, logprobs: Sequence[TokenLogprob] = ()
    ) -> Json:
        told = self._logprobs(logprobs) if logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": reason}
        return {**head.json("chat.completion.chunk", "chatcmpl"), "choices": [choice]}

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> Json | None:
        if not self.logprobs:
            return None
        return {"content": [chat_token(one) for one in logprobs], "refusal": None}


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionShape:
    """/v1/completions. Text offsets count from the start of the chunk's own text, as vLLM's streams do."""

    logprobs: bool
    n: int

    def opening(self, head: Head, index: int) -> Json | None:
        return None

    def piece(self, head: Head, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> Json:
        return self._object(head, [self._choice(index, text, logprobs, None)])

    def call(self, head: Head, index: int, call: ToolCall, number: int) -> Json:
        raise AssertionError("a completion has no tools")

    def ending(self, head: Head, index: int, reason: str) -> Json:
        return self._object(head, [self._choice(index, "", (), reason)])

    def usage(self, head: Head, answers: Sequence[Answer]) -> Json:
        return {**self._object(head, []), "usage": usage_of(answers, per_prompt=self.n)}

    def whole(self, head: Head, answers: Sequence[Answer]) -> Json:
        choices = [
            self._choice(a.index, "".join(a.text), a.logprobs, a.finished.reason if a.finished else None)
            for a in answers
        ]
        return {**self._object(head, choices), "usage": usage_of(answers, per_prompt=self.n)}

    def _object(self, head: Head, choices: list[Json]) -> Json:
        return {**head.json("text_completion", "cmpl"), "choices": choices}

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> Json:
        told = _completion_logprobs(logprobs) if self.logprobs and (logprobs or text) else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason}


def _message(answer: Answer) -> Json:
    """What the assistant said; no content, null, beside calls alone, as at OpenAI."""
    text = "".join(answer.text)
    message: Json = {"role": "assistant", "content": text or (None if answer.calls else ""), "refusal": None}
    if answer.calls:
        message["tool_calls"] = [_call(call) for call in answer.calls]
    return message


def _call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else LOGPROB_MIN


def chat_token(one: TokenLogprob) -> Json:
    """A token's logprob as OpenAI's chats and responses have it."""
    top = [{"token": text, "logprob": _finite(value), "bytes": list(text.encode())} for text, value in one.top]
    own = {"token": one.text, "logprob": _finite(one.logprob), "bytes": list(one.text.encode())}
    return {**own, "top_logprobs": top}


def _completion_logprobs(logprobs: Sequence[TokenLogprob]) -> Json:
    offsets, offset = [], 0
    for one in logprobs:
        offsets.append(offset)
        offset += len(one.text)
    return {
        "tokens": [one.text for one in logprobs],
        "token_logprobs": [_finite(one.logprob) for one in logprobs],
        "top_logprobs": [{text: _finite(value) for text, value in one.top} for one in logprobs],
        "text_offset": offsets,
    }
