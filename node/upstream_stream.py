"""What a server behind this node streams: bytes -> events -> chunks, bounded and strict.

Rules: core. Any bytes give events and chunks, or Garbled; what a chunk has beyond what is read here is ignored, for
servers differ. One choice only (index 0). Text that a server keeps apart as reasoning is not of the answer; that it
came is work.
Source: WHATWG HTML, "Server-sent events"; OpenAI API reference, "The chat completion chunk object", "The completion
object"; llama.cpp tools/server/README.md (timings, prompt_progress); vLLM stream_options.continuous_usage_stats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from node.work import LOGPROBS_MAX, TokenLogprob

EVENT_BYTES_MAX = 1 << 20  # one event's data, or one line: a chunk with 20 logprobs of 4,096 tokens fits
DONE: Final = b"[DONE]"
LOGPROB_MIN = -9999.0  # stands for minus infinity, which no wire form carries
TOKEN_TEXT_CHARS_MAX = 1024  # of a logprob's token
MESSAGE_CHARS_MAX = 500  # of what a server says of an error

Count = Annotated[int, Meta(ge=0, le=1 << 53)]


class Garbled(Exception):
    """What the server sends is not the protocol."""


class Events:
    """The data of each event, in order, however the bytes are cut."""

    def __init__(self) -> None:
        self._line = bytearray()  # one that has not ended
        self._content: list[bytes] = []
        self._bytes = 0
        self._has_content = False
        self._is_after_cr = False
        self._is_first = True

    def feed(self, content: bytes) -> list[bytes]:
        """The events that end in these bytes. Raises Garbled for one beyond EVENT_BYTES_MAX."""
        events = list[bytes]()
        if self._is_after_cr and content:
            self._is_after_cr = False
            content = content.removeprefix(b"\n")
        for line in content.splitlines(keepends=True):
            if len(self._line) + len(line) > EVENT_BYTES_MAX:
                raise Garbled(f"a line of over {EVENT_BYTES_MAX} bytes in its stream")
            self._line += line
            if line.endswith((b"\n", b"\r")):
                whole = bytes(self._line).rstrip(b"\r\n")
                self._line.clear()
                event = self._take(whole)
                if event is not None:
                    events.append(event)
        self._is_after_cr = content.endswith(b"\r") if content else self._is_after_cr
        return events

    def _take(self, line: bytes) -> bytes | None:
        """One whole line; the event's data when it is the blank one behind an event."""
        if self._is_first:
            self._is_first, line = False, line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            event = b"\n".join(self._content) if self._has_content else None
            self._content.clear()
            self._bytes, self._has_content = 0, False
            return event
        name, _, value = line.partition(b":")
        if name == b"data":
            value = value.removeprefix(b" ")
            self._bytes += len(value) + 1
            if self._bytes > EVENT_BYTES_MAX:
                raise Garbled(f"an event of over {EVENT_BYTES_MAX} bytes in its stream")
            self._content.append(value)
            self._has_content = True
        return None


class _Top(Struct):
    token: str = ""
    logprob: float | None = None


class _ContentLogprob(Struct):
    token: str = ""
    logprob: float | None = None
    top_logprobs: list[_Top] | None = None


class _Logprobs(Struct):
    """Both shapes: `content` of chat (llama.cpp has it in completions too), parallel lists of completions."""

    content: list[_ContentLogprob] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float | None] | None] | None = None


class _Function(Struct):
    name: str | None = None
    arguments: Any = None


class _CallPart(Struct):
    index: Count = 0
    function: _Function | None = None


class _Delta(Struct):
    content: str | None = None
    tool_calls: list[_CallPart] | None = None
    reasoning_content: Any = None
    reasoning: Any = None


class _Choice(Struct):
    index: Count = 0
    delta: _Delta | None = None
    text: str | None = None
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Usage(Struct):
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None


class _Prefill(Struct):
    total: Count = 0
    processed: Count = 0


class _Timings(Struct):
    cache_n: Count = 0
    prompt_n: Count = 0
    predicted_n: Count | None = None


class _Event(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: _Timings | None = None
    prompt_progress: _Prefill | None = None
    error: Any = None


_events: Final = msgspec.json.Decoder(_Event)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPart:
    """A part of an answer's call number `index`: the name comes once, the arguments in pieces of their JSON."""

    index: int
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """What one event tells. completion_tokens: all so far; prompt_tokens: as this server cut them; None: not told."""

    text: str = ""
    calls: tuple[CallPart, ...] = ()
    has_reasoning: bool = False
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: str | None = None
    prompt_tokens: int | None = None
    prefilled_tokens: int | None = None
    completion_tokens: int | None = None


def chunk_of(content: bytes, *, top: int | None) -> Chunk:
    """An event's JSON as a chunk; top: how many alternatives of each token are wanted, None: no logprobs.

    Raises Garbled, also for an error that the server streams.
    """
    try:
        event = _events.decode(content)
    except (ValueError, RecursionError) as exc:
        raise Garbled(f"an event of its stream cannot be read: {str(exc)[:200]}") from exc
    if event.error:
        raise Garbled(f"it broke off with an error: {message_of(event.error)}")
    choice = next((one for one in event.choices or () if one.index == 0), _Choice())
    delta, timings, prefill = choice.delta or _Delta(), event.timings, event.prompt_progress
    usage = event.usage or _Usage()
    prompt_tokens, completion_tokens = usage.prompt_tokens, usage.completion_tokens
    if prefill is not None:
        prompt_tokens = prefill.total
    elif timings is not None:
        prompt_tokens = timings.cache_n + timings.prompt_n
    if timings is not None and timings.predicted_n is not None:
        completion_tokens = timings.predicted_n
    return Chunk(
        text=(delta.content if choice.delta is not None else choice.text) or "",
        calls=tuple(_call_part(part) for part in delta.tool_calls or ()),
        has_reasoning=bool(delta.reasoning_content or delta.reasoning),
        logprobs=() if top is None or choice.logprobs is None else _logprobs(choice.logprobs, top),
        finish=choice.finish_reason,
        prompt_tokens=prompt_tokens,
        prefilled_tokens=None if prefill is None else min(prefill.processed, prefill.total),
        completion_tokens=completion_tokens,
    )


def _call_part(part: _CallPart) -> CallPart:
    function = part.function or _Function()
    told = function.arguments
    # some servers give the object itself, all at once
    arguments = told if isinstance(told, str) else "" if told is None else msgspec.json.encode(told).decode()
    return CallPart(index=part.index, name=function.name or "", arguments=arguments)


def message_of(told: object) -> str:
    """What a server says of an error, out of whichever shape its body has: one line, cut, all of it printable."""
    for _ in range(4):
        if isinstance(told, dict):
            told = next((told[key] for key in ("error", "message", "detail", "msg") if told.get(key)), "")
        elif isinstance(told, list):
            told = told[0] if told else ""
        else:
            break
    text = told if isinstance(told, str) else ""
    shown = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * MESSAGE_CHARS_MAX])
    return " ".join(shown.split())[:MESSAGE_CHARS_MAX] or "it does not say why"


def _logprobs(told: _Logprobs, top: int) -> tuple[TokenLogprob, ...]:
    count = min(top, LOGPROBS_MAX)
    if told.content is not None:
        return tuple(
            TokenLogprob(
                text=one.token[:TOKEN_TEXT_CHARS_MAX],
                logprob=_finite(one.logprob),
                top=tuple(
                    (each.token[:TOKEN_TEXT_CHARS_MAX], _finite(each.logprob)) for each in one.top_logprobs or ()
                )[:count],
            )
            for one in told.content
        )
    tokens, chosen = told.tokens or [], told.token_logprobs or []
    tops = told.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(chosen) == len(tops):
        raise Garbled(f"logprobs of {len(chosen)} tokens for {len(tokens)}")
    return tuple(
        TokenLogprob(
            text=token[:TOKEN_TEXT_CHARS_MAX],
            logprob=_finite(logprob),
            top=tuple(
                (text[:TOKEN_TEXT_CHARS_MAX], _finite(value))
                for text, value in sorted((best or {}).items(), key=lambda each: -_finite(each[1]))[:count]
            ),
        )
        for token, logprob, best in zip(tokens, chosen, tops, strict=True)
    )


def _finite(logprob: float | None) -> float:
    return LOGPROB_MIN if logprob is None or not logprob > LOGPROB_MIN else min(logprob, 0.0)
