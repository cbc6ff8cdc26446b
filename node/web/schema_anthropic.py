"""What Anthropic's clients may send to POST /v1/messages, and how it becomes work.

Rules: core. As schema.py: strict, unknown fields named, what we do not offer taken only with a value that asks for
nothing. `cache_control` asks only that a prefix be kept, and prefixes are; so it is taken and changes nothing.
Consecutive turns of one role are one turn, as at Anthropic. A last turn of the assistant's would have to be gone on
with, which chat templates do not do: it is refused, as by Anthropic's own newer models.

Source: Claude API reference, "Create a Message", "Count tokens in a Message", "Prefill not supported".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from node import work
from node.errors import BadRequest
from node.web.schema import Body, Generation, messages_of
from node.web.schema_parts import PartKinds, Stops, Temperature, Tokens, TopK, TopP, object_of, shown, text_of

USER_ID_CHARS_MAX = 512
ROLES = ("user", "assistant", "system")
MESSAGE_KEYS = frozenset({"role", "content"})
TEXT_PARTS: PartKinds = {"text": frozenset({"cache_control", "citations"})}
TURNS_BETWEEN = "\n\n"  # between turns that become one, and between the parts of a system prompt
TOOLS_REFUSED = "tools in Anthropic's shape are not offered by this node yet: leave tools and tool_choice out"

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
    "tool_choice": ({"type": "auto"}, {"type": "none"}),
    "tools": ([],),
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


class Conversation(Body):
    """POST /v1/messages/count_tokens, and what /v1/messages shares with it."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL
    refusals: ClassVar[Mapping[str, str]] = {
        "tools": TOOLS_REFUSED,
        "tool_choice": TOOLS_REFUSED,
        "thinking": "thinking is not offered by this node: leave it out, or send {'type': 'disabled'}",
    }

    messages: list[Any] = Field(min_length=1)
    system: Any = None
    cache_control: CacheControl | None = None

    def turns(self) -> tuple[work.Message, ...]:
        """The chat, with the system prompt in front. Raises BadRequest, TooLarge."""
        turns: list[dict[str, str]] = []
        if self.system is not None:
            text = text_of(self.system, "system", TEXT_PARTS, between=TURNS_BETWEEN)
            turns.append({"role": "system", "content": text})
        for index, value in enumerate(self.messages):
            param = f"messages.{index}"
            message = object_of(value, param, MESSAGE_KEYS)
            role = message.get("role")
            if not isinstance(role, str) or role not in ROLES:
                raise BadRequest(
                    f"{param}.role is {shown(role)}, wanted one of {', '.join(ROLES)}", param=f"{param}.role"
                )
            text = text_of(message.get("content"), f"{param}.content", TEXT_PARTS)
            if turns and turns[-1]["role"] == role:
                turns[-1]["content"] += TURNS_BETWEEN + text
            else:
                turns.append({"role": role, "content": text})
        if turns[-1]["role"] == "assistant":
            raise BadRequest(
                "the last message is the assistant's: no model here goes on with one (prefill); end with the user's",
                param="messages",
            )
        return messages_of(turns)


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
