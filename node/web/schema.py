"""What clients may send, in OpenAI's shapes, and how it becomes the work of node/work.py.

Rules: core. Unknown fields are refused and named; a field of OpenAI's that we do not offer is taken only with the
value that asks for nothing. null means absent. Every bound is one of node/work.py's or named here. Every refusal is
a BadRequest or TooLarge whose `param` is the field.

Source: OpenAI API reference, "Create chat completion", "Create completion", "Create embeddings"; vLLM's extra
sampling fields (top_k, min_p, repetition_penalty).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Final, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from node import work
from node.errors import BadRequest, TooLarge
from node.tools import ToolCall, Tooling
from node.web.schema_parts import shown
from node.web.schema_shown import shown_as
from node.web.schema_tools import (
    ChatMessages,
    MadeCall,
    ToolChoice,
    Tools,
    calls_of,
    check_calls,
    check_messages,
    tooling_of,
)

CHOICES_MAX = 16  # answers of one request: n times the prompts
CHAT_TOKENS_DEFAULT = 256
COMPLETION_TOKENS_DEFAULT = 16  # OpenAI's own
USER_CHARS_MAX = 512
DEFAULT_MODEL_ALIAS = "default"
DIMENSIONS_MAX = 65_536
ERRORS_MAX = 1_000  # of one body; to tell of one, pydantic writes all of them: 300,000 took seconds
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}

# OpenAI's fields that we do not offer -> the values that ask for nothing
NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


TokenList = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1, max_length=work.TOKENS_MAX)]
Texts = str | list[str] | TokenList | list[TokenList]
_Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = _Stop | Annotated[list[_Stop], Field(max_length=work.STOPS_MAX)] | None
ModelName = Annotated[str, Field(min_length=1, max_length=200)]
Asked = TypeVar("Asked", bound="Strict")


class Strict(BaseModel):
    """A JSON body. A wrong type is an error and never a guess.

    neutral: fields that are taken only with a value that asks for nothing. refusals: what is said of those whose other
    values deserve more than a standing sentence.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    refusals: ClassVar[Mapping[str, str]] = {}


class Body(Strict):
    """A body that names a model."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL

    model: ModelName | None = None

    def model_asked(self) -> str | None:
        """The model by name, None for the default one."""
        return None if self.model == DEFAULT_MODEL_ALIAS else self.model


class Request(Body):
    """What all of OpenAI's routes share."""

    user: str | None = Field(default=None, max_length=USER_CHARS_MAX)


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    include_usage: bool = False
    include_obfuscation: bool = False  # the SDK sends it; we never pad


class Generation(Request):
    """The fields that every route which makes text shares."""

    max_tokens: int | None = Field(default=None, ge=1, le=work.TOKENS_MAX)
    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0, le=1 << 20)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    stop: Annotated[Any, shown_as(Stops)] = None
    n: int = Field(default=1, ge=1, le=CHOICES_MAX)

    def sampling(self, *, index: int, seed: int, tokens_default: int, logprobs: int | None = None) -> work.Sampling:
        """The sampling of answer `index`: its seed is the request's plus the index, so that answers differ."""
        first = seed if self.seed is None else self.seed
        return work.Sampling(
            max_tokens=self.tokens_max() or tokens_default,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            repetition_penalty=self.repetition_penalty,
            seed=(first + index) % (1 << 63),
            stop=stops_of(self.stop),
            logprobs=logprobs,
        )

    def tokens_max(self) -> int | None:
        """The most tokens that the client wants, None when it did not say."""
        return self.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the operator gives to a request that names none; None: as each route has it."""

    max_tokens: int | None = None
    temperature: float | None = None

    def applied(self, asked: Generation) -> Generation:
        """The request, at the operator's temperature if it names none."""
        if self.temperature is None or "temperature" in asked.model_fields_set:
            return asked
        return asked.model_copy(update={"temperature": self.temperature})


class Streamed(Generation):
    """Routes with OpenAI's streaming."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] | None = Field(default=None, max_length=16)

    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Streamed):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Any], shown_as(ChatMessages)] = Field(min_length=1)
    tools: Tools = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: int | None = Field(default=None, ge=1, le=work.TOKENS_MAX)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=work.LOGPROBS_MAX)

    def tokens_max(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def tooling(self) -> Tooling | None:
        """What may be called in the answer. Raises BadRequest, TooLarge."""
        return tooling_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def logprobs_asked(self) -> int | None:
        """None for none, else how many alternatives. Raises BadRequest."""
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Streamed):
    """POST /v1/completions."""

    prompt: Annotated[Any, shown_as(Texts)]
    logprobs: int | None = Field(default=None, ge=0, le=work.LOGPROBS_MAX)


class EmbeddingsRequest(Request):
    """POST /v1/embeddings."""

    input: Annotated[Any, shown_as(Texts)]
    encoding_format: str = Field(default="float", pattern="^(float|base64)$")
    dimensions: int | None = Field(default=None, ge=1, le=DIMENSIONS_MAX)


class InferenceRequest(Generation):
    """POST /api/v1/model/inference: text in, text or embeddings out, by the kind of the model."""

    text: Annotated[Any, shown_as(Texts)]


def parse(body: bytes, kind: type[Asked]) -> Asked:
    """A request of this kind. Raises BadRequest, TooLarge, each naming the field."""
    try:
        raw = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as exc:
        raise BadRequest(f"the body is not JSON: {exc}; wanted an object of {_fields(kind)}") from exc
    if not isinstance(raw, dict):
        raise BadRequest(f"the body is {shown(raw)}, wanted a JSON object with {_fields(kind)}")
    given = {key: value for key, value in raw.items() if value is not None}
    for key in given.keys() & kind.neutral.keys() - kind.model_fields.keys():
        if not any(given[key] == value and type(given[key]) is type(value) for value in kind.neutral[key]):
            standing = f"the field {key!r} is not supported by this node: leave it out"
            raise BadRequest(kind.refusals.get(key, standing), param=key)
        del given[key]
    return fitted(given, kind)


def fitted(given: Mapping[str, object], kind: type[Asked]) -> Asked:
    """The same as a model of this kind. Raises BadRequest, naming the field."""
    try:
        return kind.model_validate(given)
    except ValidationError as exc:
        raise _refusal(exc, kind) from exc


def _refusal(exc: ValidationError, kind: type[BaseModel], within: str = "") -> BadRequest:
    if exc.error_count() > ERRORS_MAX:
        return BadRequest(f"{exc.error_count()} fields are unknown or wrong; the fields are {_fields(kind)}")
    problem = exc.errors(include_url=False, include_context=False)[0]
    # behind the field a union tells which of its kinds did not fit, and they are no fields of the client's
    path = takewhile(lambda part: isinstance(part, int) or _FIELD.fullmatch(part), problem["loc"])
    param = ".".join(str(part) for part in (within, *path) if part != "")[:200] or str(problem["loc"][0])[:200]
    if problem["type"] == "extra_forbidden":
        fields = f"; the fields are {_fields(kind)}" if len(problem["loc"]) == 1 else ": leave it out"
        return BadRequest(f"unknown field {param!r}{fields}", param=param)
    if problem["type"] == "missing":
        odd = [each["loc"][-1] for each in exc.errors(include_url=False) if each["type"] == "extra_forbidden"]
        typed = f", and {shown(odd[0])} is no field" if odd else ""  # a typo is both
        return BadRequest(f"the field {param!r} is missing{typed}", param=param)
    return BadRequest(f"{param} = {shown(problem['input'])}: {problem['msg']}", param=param)


_FIELD: Final = re.compile("[a-z_0-9]+")


def _fields(kind: type[BaseModel]) -> str:
    return ", ".join(sorted(kind.model_fields))


def stops_of(value: object) -> tuple[str, ...]:
    """Stop strings from OpenAI's string or list. Raises BadRequest."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return ()
    if not isinstance(stops, list) or len(stops) > work.STOPS_MAX:
        raise BadRequest(f"stop is {shown(value)}, wanted a string or up to {work.STOPS_MAX} strings", param="stop")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= 256:
            raise BadRequest(f"stop holds {shown(stop)}, wanted strings of 1 to 256 characters", param="stop")
    return tuple(stops)


def messages_of(values: Sequence[object]) -> tuple[work.Message, ...]:
    """The messages of a chat. Raises BadRequest, TooLarge."""
    check_messages(len(values))
    messages = tuple(_message(value, f"messages.{index}") for index, value in enumerate(values))
    calls = [call for message in messages for call in message.tool_calls]
    check_calls(len(calls))
    arguments = sum(len(call.arguments) for call in calls)
    _check_chars(arguments + sum(len(message.content) for message in messages), "messages")
    return messages


def _message(value: object, param: str) -> work.Message:
    if not isinstance(value, dict):
        raise BadRequest(f"{param} is {shown(value)}, wanted an object with role and content", param=param)
    for key in value.keys() - {"role", "content", "name", "refusal", "tool_calls", "tool_call_id"}:
        if value[key] not in (None, []):
            raise BadRequest(f"{param}.{str(key)[:60]} is not supported by this node: leave it out", param=param)
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{param}.role is {shown(role)}, wanted one of {', '.join(ROLES)}", param=f"{param}.role")
    calls, call_id = _calls(value, role, param), value.get("tool_call_id")
    if call_id is not None and (role != "tool" or not isinstance(call_id, str) or not 1 <= len(call_id) <= 64):
        wanted = "the id of a call, of 1 to 64 characters, in a message of role tool"
        raise BadRequest(f"{param}.tool_call_id is {shown(call_id)}, wanted {wanted}", param=f"{param}.tool_call_id")
    content = value.get("content")
    return work.Message(
        role=ROLES[role],
        content="" if calls and content in (None, []) else _content(content, f"{param}.content"),
        tool_calls=calls,
        tool_call_id=call_id,
    )


def _calls(value: dict[str, Any], role: str, param: str) -> tuple[ToolCall, ...]:
    given, param = value.get("tool_calls"), f"{param}.tool_calls"
    if given in (None, []):
        return ()
    if role != "assistant":
        raise BadRequest(f"{param} came in a message of role {role}: only an assistant calls", param=param)
    try:
        return calls_of(given, param)
    except ValidationError as exc:
        raise _refusal(exc, MadeCall, within=param) from exc


def _content(value: object, param: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise BadRequest(f"{param} is {shown(value)}, wanted a string or text parts", param=param)
    parts: list[str] = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise BadRequest(f"{param} holds {shown(part)}; only text parts are supported", param=param)
        parts.append(text)
    return "".join(parts)


Prompt = str | tuple[int, ...]


def prompts_of(value: object, param: str, *, count_max: int, empty_allowed: bool = False) -> tuple[Prompt, ...]:
    """Prompts from a string, token ids, or a list of either. Raises BadRequest, TooLarge.

    `empty_allowed`: an empty string asks for text from nothing; an embedding of nothing is an error.
    """
    if isinstance(value, str) or _is_tokens(value):
        values: list[object] = [value]
    elif isinstance(value, list):
        values = value
    else:
        values = []
    if not values:
        wanted = "a string, a list of strings, token ids or a list of lists of token ids"
        raise BadRequest(f"{param} is {shown(value)}, wanted {wanted}", param=param)
    if len(values) > count_max:
        raise TooLarge(f"{param} holds {len(values)} texts, at most {count_max} are taken at a time", param=param)
    prompts = tuple(_prompt(one, param, empty_allowed) for one in values)
    _check_chars(sum(len(prompt) for prompt in prompts if isinstance(prompt, str)), param)
    return prompts


def _prompt(value: object, param: str, empty_allowed: bool) -> Prompt:
    if isinstance(value, str):
        if not value and not empty_allowed:
            raise BadRequest(f"{param} is empty, wanted at least one character", param=param)
        return value
    if not _is_tokens(value):
        raise BadRequest(f"{param} holds {shown(value)}, wanted a string or a list of token ids", param=param)
    assert isinstance(value, list)
    if len(value) > work.TOKENS_MAX:
        raise TooLarge(f"{param} holds {len(value)} tokens, at most {work.TOKENS_MAX} are taken", param=param)
    return tuple(value)


def _is_tokens(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(type(token) is int and 0 <= token < 1 << 31 for token in value)
    )


def _check_chars(chars: int, param: str) -> None:
    if chars > work.PROMPT_CHARS_MAX:
        raise TooLarge(f"{param} has {chars} characters, at most {work.PROMPT_CHARS_MAX} are taken", param=param)
