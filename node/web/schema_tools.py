"""Functions that a chat may call, in OpenAI's shapes, and how they become the wire form of node/tools.py.

Rules: core. As node/web/schema.py: strict, unknown fields refused and named, every refusal a BadRequest or TooLarge
whose `param` is the field. What cannot be promised is refused: nothing here holds a model to a schema (strict: true).
Source: OpenAI API reference, "Create chat completion" (tools, tool_choice, parallel_tool_calls, messages).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from node.errors import BadRequest, TooLarge
from node.tools import (
    ARGUMENTS_CHARS_MAX,
    CALLS_CHAT_MAX,
    CALLS_MAX,
    NAME_PATTERN,
    TOOLS_CHARS_MAX,
    TOOLS_MAX,
    Tool,
    ToolCall,
    Tooling,
    json_object,
)
from node.work import MESSAGES_MAX

Name = Annotated[str, Field(pattern=NAME_PATTERN)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class FunctionDefinition(_Strict):
    """A function that the model may call; parameters is a JSON schema."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None  # true is refused: see the module


class FunctionTool(_Strict):
    """The one kind of tool."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(_Strict):
    """By name."""

    name: Name


class FunctionChoice(_Strict):
    """That this function is to be called."""

    type: Literal["function"]
    function: FunctionName


class CalledFunction(_Strict):
    """What an assistant's message says of a call; arguments is JSON as text."""

    name: Name
    arguments: str = Field(max_length=ARGUMENTS_CHARS_MAX)


class MadeCall(_Strict):
    """A call in an assistant's message."""

    id: str = Field(min_length=1, max_length=64)
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)
    type: Literal["text"]
    text: str


Content = str | Annotated[list[TextPart], Field(min_length=1)]


class AskedText(_Strict):
    """What somebody says to the model."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: str | None = None


class AskedAnswer(_Strict):
    """What the assistant said."""

    role: Literal["assistant"]
    content: Content
    name: str | None = None
    refusal: None = None
    tool_calls: list[MadeCall] = []


class AskedCalls(_Strict):
    """What the assistant called."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: list[MadeCall] = Field(min_length=1, max_length=CALLS_MAX)


class AskedResult(_Strict):
    """What came of a call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str | None = Field(default=None, min_length=1, max_length=64)
    name: str | None = None


ChatMessages = Annotated[list[AskedText | AskedAnswer | AskedCalls | AskedResult], Field(min_length=1)]
Tools = Annotated[list[FunctionTool], Field(max_length=TOOLS_MAX)]
ToolChoice = Literal["none", "auto", "required"] | FunctionChoice


def tooling_of(tools: Sequence[FunctionTool], choice: ToolChoice | None, parallel: bool | None) -> Tooling | None:
    """What may be called, None: nothing. Raises BadRequest, TooLarge."""
    name = choice.function.name if isinstance(choice, FunctionChoice) else None
    if not tools and (name is not None or choice == "required"):
        raise BadRequest("tool_choice wants a call and there are no tools: send tools", param="tool_choice")
    told = tuple(_tool(tool.function, index) for index, tool in enumerate(tools))
    names = {tool.name for tool in told}
    if len(names) < len(told):
        raise BadRequest("tools has two functions of one name: give each its own", param="tools")
    if name is not None and name not in names:
        raise BadRequest(f"tool_choice names {name}, tools has {', '.join(sorted(names))}", param="tool_choice")
    chars = sum(len(tool.name) + len(tool.description or "") + len(tool.parameters or "") for tool in told)
    if chars > TOOLS_CHARS_MAX:
        raise TooLarge(f"tools has {chars} characters, at most {TOOLS_CHARS_MAX} are taken", param="tools")
    if not told or choice == "none":  # the model never hears of them
        return None
    return Tooling(
        tools=told,
        choice="required" if choice == "required" else "auto",
        function=name,
        parallel=parallel is not False,
    )


def _tool(function: FunctionDefinition, index: int) -> Tool:
    if function.strict:
        param = f"tools.{index}.function.strict"
        raise BadRequest(f"{param} is true, and nothing here holds a model to a schema: leave it out", param=param)
    parameters = None if function.parameters is None else _text_of(function.parameters, f"tools.{index}")
    return Tool(name=function.name, description=function.description, parameters=parameters)


def _text_of(value: dict[str, Any], param: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"{param} cannot be passed on: {str(exc)[:100]}", param=param) from exc


_MADE: Final = TypeAdapter(list[MadeCall])


def calls_of(given: object, param: str) -> tuple[ToolCall, ...]:
    """The calls of an assistant's message. Raises BadRequest, TooLarge, pydantic's ValidationError."""
    if isinstance(given, list) and len(given) > CALLS_MAX:  # before each is looked at
        raise TooLarge(f"{param} has {len(given)} calls, at most {CALLS_MAX} are taken", param=param)
    calls = _MADE.validate_python(given)
    for index, call in enumerate(calls):
        json_object(call.function.arguments, f"{param}.{index}.function.arguments", param)
    return tuple(ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments) for call in calls)


def check_messages(count: int) -> None:
    """Raises TooLarge."""
    if count > MESSAGES_MAX:
        raise TooLarge(f"{count} messages came, at most {MESSAGES_MAX} are taken", param="messages")


def check_calls(count: int) -> None:
    """Of all messages together. Raises TooLarge."""
    if count > CALLS_CHAT_MAX:
        raise TooLarge(f"messages hold {count} calls, at most {CALLS_CHAT_MAX} are taken", param="messages")
