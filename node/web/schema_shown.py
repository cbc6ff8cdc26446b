"""How GET /openapi.json shows what is read by hand, for better errors than pydantic's: other protocols' messages.

Rules: core. Nothing is parsed with these; tests/test_openapi.py asks with what they allow, and is answered.
Source: Claude API reference, "Create a Message"; OpenAI API reference, "Create a model response"; Ollama API.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, WithJsonSchema


def shown_as(kind: Any) -> WithJsonSchema:
    """What stands in the description of the routes (node/web/schema_openapi.py) for a field that is read by hand."""
    return WithJsonSchema(TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}"))


class _Shown(BaseModel):
    model_config = ConfigDict(extra="forbid")


class AnthropicText(_Shown):
    """Words."""

    type: Literal["text"]
    text: str


class AnthropicToolUse(_Shown):
    """A call that the assistant made."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=64)]
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    input: dict[str, Any]


class AnthropicToolResult(_Shown):
    """What came of it."""

    type: Literal["tool_result"]
    tool_use_id: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Annotated[list[AnthropicText], Field(min_length=1)]


class AnthropicUser(_Shown):
    """What the user says, and what calls gave."""

    role: Literal["user"]
    content: str | Annotated[list[AnthropicText | AnthropicToolResult], Field(min_length=1)]


class AnthropicAssistant(_Shown):
    """What the assistant said before. Never the last message."""

    role: Literal["assistant"]
    content: str | Annotated[list[AnthropicText | AnthropicToolUse], Field(min_length=1)]


AnthropicMessages = Annotated[list[AnthropicUser | AnthropicAssistant], Field(min_length=1)]
AnthropicSystem = str | Annotated[list[AnthropicText], Field(min_length=1)] | None


class ResponsesText(_Shown):
    """Words: input_text of the user's, output_text of the assistant's."""

    type: Literal["input_text", "output_text"]
    text: str


class ResponsesMessage(_Shown):
    """One message."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[list[ResponsesText], Field(min_length=1)]


class ResponsesCall(_Shown):
    """A call that the assistant made."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=64)]
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    arguments: str


class ResponsesResult(_Shown):
    """What came of it."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1, max_length=64)]
    output: str


ResponsesInput = str | Annotated[list[ResponsesMessage | ResponsesCall | ResponsesResult], Field(min_length=1)]


class OllamaMessage(_Shown):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: str


OllamaMessages = list[OllamaMessage]
OllamaTexts = str | Annotated[list[str], Field(min_length=1)]
