"""Functions and their calls in other vendors' shapes, as schema.py and schema_tools.py have them.

Rules: core. A vendor's tools become OpenAI's, so that one place decides what is taken (schema_tools.tooling_of); turns
become OpenAI's messages, calls and results in their order.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from node.errors import BadRequest
from node.tools import ToolCall
from node.web.schema_parts import shown
from node.web.schema_tools import FunctionDefinition, FunctionTool

Turn = dict[str, Any]
ROOM = (
    32  # levels that an answer may have around a call's arguments: what is nested as deep as can be read is no object
)


def tool_of(name: str, description: str | None, parameters: dict[str, Any] | None, strict: bool | None) -> FunctionTool:
    """OpenAI's tool."""
    function = FunctionDefinition(name=name, description=description, parameters=parameters, strict=strict)
    return FunctionTool(type="function", function=function)


def call_turn(call_id: object, name: object, arguments: object, param: str) -> Turn:
    """An assistant's turn that is one call; arguments is a JSON object, or its text. Raises BadRequest."""
    if isinstance(arguments, dict):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except (ValueError, RecursionError) as exc:
            raise BadRequest(f"{param} cannot be passed on: {str(exc)[:100]}", param=param) from exc
    if not isinstance(call_id, str) or not isinstance(name, str) or not isinstance(arguments, str):
        raise BadRequest(
            f"{param} is a call of {shown(name)} with id {shown(call_id)} and arguments {shown(arguments)}; wanted are "
            "its id, its name and a JSON object",
            param=param,
        )
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": call_id, "type": "function", "function": function}],
    }


def result_turn(call_id: object, content: str, param: str) -> Turn:
    """A call's result. Raises BadRequest."""
    if not isinstance(call_id, str):
        raise BadRequest(f"{param} is the result of call {shown(call_id)}, wanted the id of a call", param=param)
    return {"role": "tool", "content": content, "tool_call_id": call_id}


def with_calls_joined(turns: list[Turn]) -> list[Turn]:
    """The assistant's turns that follow each other as one, when the later one is calls."""
    joined: list[Turn] = []
    for turn in turns:
        if turn.get("tool_calls") and joined and joined[-1]["role"] == "assistant":
            joined[-1].setdefault("tool_calls", []).extend(turn["tool_calls"])
        else:
            joined.append(turn)
    return joined


def arguments_of(call: ToolCall) -> dict[str, Any]:
    """A call's arguments as an object, as Anthropic's and Ollama's clients want them. What is none, or nested too
    deep, which only a server behind a node may say, is told under a name of its own and not lost."""
    try:
        text = call.arguments.strip() or "{}"
        msgspec.json.decode("[" * ROOM + text + "]" * ROOM)
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        value = call.arguments
    return value if isinstance(value, dict) else {"arguments": value}
