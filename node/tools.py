"""Functions that a model may call, and its calls, as they travel with a request: the wire form is here.

Rules: core. Everything has a bound with a name. What is JSON of the client's own (a function's parameters, a call's
arguments) travels as one text, so that it costs a frame one element however much is in it, and its keys keep their
order; it is read where a template wants it. A chat is what its messages say: a result names the call that it is of.
Source: OpenAI API reference, "Create chat completion" (tools, tool_choice); transformers' chat templates, "Tool use".
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta, Struct

from node.errors import BadRequest

TOOLS_MAX: Final = 128  # OpenAI's own
TOOLS_CHARS_MAX: Final = 200_000  # of all functions of a request together: as much as a prompt
CALLS_MAX: Final = 128  # in one message
CALLS_CHAT_MAX: Final = 512  # in all messages of a request
ARGUMENTS_CHARS_MAX: Final = 200_000
NAME_PATTERN: Final = "^[a-zA-Z0-9_-]{1,64}$"  # OpenAI's own

FunctionName = Annotated[str, Meta(pattern=NAME_PATTERN)]
CallId = Annotated[str, Meta(min_length=1, max_length=64)]
JsonText = Annotated[str, Meta(max_length=ARGUMENTS_CHARS_MAX)]


class Tool(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A function: parameters is its JSON schema, as text."""

    name: FunctionName
    description: Annotated[str, Meta(max_length=TOOLS_CHARS_MAX)] | None = None
    parameters: JsonText | None = None


class Tooling(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What may be called in an answer. choice: the model chooses, or must call one. function: it must call this one.
    parallel: several calls in one answer are wanted."""

    tools: Annotated[tuple[Tool, ...], Meta(min_length=1, max_length=TOOLS_MAX)]
    choice: Literal["auto", "required"] = "auto"
    function: FunctionName | None = None
    parallel: bool = True

    @property
    def is_free(self) -> bool:
        """Whether the model may answer without a call."""
        return self.choice == "auto" and self.function is None


class ToolCall(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One call of a function. arguments: JSON, as the model wrote it."""

    id: CallId
    name: FunctionName
    arguments: JsonText


def functions_of(tooling: Tooling) -> list[dict[str, Any]]:
    """The functions as templates and servers take them. Raises BadRequest for parameters that are no JSON object."""
    told = []
    for tool in tooling.tools:
        function: dict[str, Any] = {"name": tool.name}
        if tool.description is not None:
            function["description"] = tool.description
        if tool.parameters is not None:
            function["parameters"] = json_object(tool.parameters, f"the parameters of {tool.name}", "tools")
        told.append({"type": "function", "function": function})
    return told


def json_object(text: str, what: str, param: str) -> dict[str, Any]:
    """A JSON object out of its text; of an empty text, the empty one. Raises BadRequest."""
    try:
        value = msgspec.json.decode(text.strip() or "{}")
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"{what} are no JSON: {str(exc)[:100]}; send an object", param=param) from exc
    if not isinstance(value, dict):
        raise BadRequest(f"{what} are a JSON {type(value).__name__}; send an object", param=param)
    return value
