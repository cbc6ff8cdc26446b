"""What Anthropic's clients may send to POST /v1/messages, and how it becomes work.

Rules: core. As schema.py: strict, unknown fields named, what we do not offer taken only with a value that asks for
nothing. `cache_control` asks only that a prefix be kept, and prefixes are; so it is taken and changes nothing.
Consecutive turns of one role are one turn, as at Anthropic. A last turn of the assistant's would have to be gone on
with, which chat templates do not do: it is refused, as by Anthropic's own newer models.

Source: Claude API reference, "Create a Message", "Count tokens in a Message", "Prefill not supported".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from node import work
from node.errors import BadRequest
from node.tools import TOOLS_MAX, Tooling
from node.web.schema import Body, Generation, messages_of
from node.web.schema_called import Turn, call_turn, result_turn, tool_of, with_calls_joined
from node.web.schema_parts import PartKinds, Stops, Temperature, Tokens, TopK, TopP, object_of, shown, text_of
from node.web.schema_shown import AnthropicMessages, AnthropicSystem, shown_as
from node.web.schema_tools import FunctionChoice, FunctionName, Name, ToolChoice, tooling_of

USER_ID_CHARS_MAX = 512
ROLES = ("user", "assistant", "system")
MESSAGE_KEYS = frozenset({"role", "content"})
TEXT_PARTS: PartKinds = {"text": frozenset({"cache_control", "citations"})}
CALL_KEYS = frozenset({"type", "id", "name", "input", "cache_control", "caller"})
RESULT_KEYS = frozenset({"type", "tool_use_id", "content", "is_error", "cache_control"})
TURNS_BETWEEN = "\n\n"  # between turns that become one, and between the parts of a system prompt

# Anthropic's fields that we do not offer -> the values that ask for nothing
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "container": (),
    "context_management": (),
    "diagnostics": (),
    "inference_geo": (),
    "mcp_servers": ([],),
    "output_config": ({},),
    "service_tier": ("auto", "standard_only"),
    "speed": ("standard",),
    "thinking": ({"type": "disabled"},),
}


class Metadata(BaseModel):
    """Who asks, in the client's words; bounded and not used."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    user_id: str | None = Field(default=None, max_length=USER_ID_CHARS_MAX)


class CacheControl(BaseModel):
    """That the prefix be kept."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class AnthropicTool(BaseModel):
    """A function of the client's. Tools that Anthropic runs itself have other types, and are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    name: Name
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] = "custom"
    strict: bool | None = None
    cache_control: CacheControl | None = None


class AnthropicToolChoice(BaseModel):
    """Whether something is to be called, and what."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    type: Literal["auto", "any", "none", "tool"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False


class Conversation(Body):
    """POST /v1/messages/count_tokens, and what /v1/messages shares with it."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL
    refusals: ClassVar[Mapping[str, str]] = {
        "thinking": "thinking is not offered by this node: leave it out, or send {'type': 'disabled'}",
    }

    messages: Annotated[list[Any], shown_as(AnthropicMessages)] = Field(min_length=1)
    system: Annotated[Any, shown_as(AnthropicSystem)] = None
    tools: list[AnthropicTool] = Field(default_factory=list, max_length=TOOLS_MAX)
    tool_choice: AnthropicToolChoice | None = None
    cache_control: CacheControl | None = None

    def tooling(self) -> Tooling | None:
        """What may be called in the answer. Raises BadRequest, TooLarge."""
        tools = [tool_of(one.name, one.description, one.input_schema, one.strict) for one in self.tools]
        choice = self.tool_choice
        if choice is None or choice.type == "auto":
            asked: ToolChoice = "auto"
        elif choice.type == "tool":
            if choice.name is None:
                raise BadRequest("tool_choice names no tool: send its name", param="tool_choice.name")
            asked = FunctionChoice(type="function", function=FunctionName(name=choice.name))
        else:
            asked = "required" if choice.type == "any" else "none"
        return tooling_of(tools, asked, choice is None or not choice.disable_parallel_tool_use)

    def turns(self) -> tuple[work.Message, ...]:
        """The chat, with the system prompt in front. Raises BadRequest, TooLarge."""
        turns: list[Turn] = []
        if self.system is not None:
            text = text_of(self.system, "system", TEXT_PARTS, between=TURNS_BETWEEN)
            turns.append({"role": "system", "content": text})
        for index, value in enumerate(self.messages):
            for turn in _turns(value, f"messages.{index}"):
                last = turns[-1] if turns else {"role": None}
                if last["role"] == turn["role"] != "tool" and not last.get("tool_calls") and not turn.get("tool_calls"):
                    last["content"] += TURNS_BETWEEN + turn["content"]
                else:
                    turns.append(turn)
        turns = with_calls_joined(turns)
        if turns[-1]["role"] == "assistant":
            raise BadRequest(
                "the last message is the assistant's: no model here goes on with one (prefill); end with the user's",
                param="messages",
            )
        return messages_of(turns)


def _turns(value: object, param: str) -> list[Turn]:
    """One message: results first, as Anthropic wants them, then text, then calls."""
    message = object_of(value, param, MESSAGE_KEYS)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{param}.role is {shown(role)}, wanted one of {', '.join(ROLES)}", param=f"{param}.role")
    turns, texts = [], []
    own = {"assistant": "tool_use", "user": "tool_result"}.get(role)
    for index, part in enumerate(content if isinstance(content, list) else ()):
        where = f"{param}.content.{index}"
        if not isinstance(part, dict) or part.get("type") != own:
            texts.append(part)
        elif own == "tool_use":
            call = object_of(part, where, CALL_KEYS)
            turns.append(call_turn(call.get("id"), call.get("name"), call.get("input"), where))
        else:
            result = object_of(part, where, RESULT_KEYS)
            text = text_of(result.get("content") or "", f"{where}.content", TEXT_PARTS)
            turns.append(result_turn(result.get("tool_use_id"), text, where))
    if turns and not texts:
        return turns
    said = {"role": role, "content": text_of(texts if turns else content, f"{param}.content", TEXT_PARTS)}
    return [said, *turns] if own == "tool_use" else [*turns, said]


class MessagesRequest(Conversation):
    """POST /v1/messages."""

    max_tokens: Tokens
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = 0
    stop_sequences: Stops = Field(default_factory=list)
    stream: bool = False
    metadata: Metadata | None = None

    def generation(self) -> Generation:
        """The sampling that it asks for."""
        return Generation(
            model=self.model,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop_sequences,
        )
