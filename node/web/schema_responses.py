"""What OpenAI's clients may send to POST /v1/responses, and how it becomes work.

Rules: core. As schema.py. Nothing is stored here: what asks for that, or for something stored, is refused with a
sentence. OpenAI stores unless told not to; here a request that says nothing is not stored, and its answer says so.

Source: OpenAI API reference, "Create a model response"; OpenAI's openai-python 3.54 types/responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from node import work
from node.errors import BadRequest
from node.tools import TOOLS_MAX, Tooling
from node.web.schema import USER_CHARS_MAX, Generation, Request, messages_of
from node.web.schema_called import Turn, call_turn, result_turn, tool_of, with_calls_joined
from node.web.schema_parts import Logprobs, PartKinds, Temperature, Tokens, TopP, object_of, shown, text_of
from node.web.schema_shown import ResponsesInput, shown_as
from node.web.schema_tools import FunctionChoice, FunctionName, Name, tooling_of

METADATA_MAX = 16
ROLES = ("system", "developer", "user", "assistant")
INCLUDE_LOGPROBS = "message.output_text.logprobs"
INCLUDES = {INCLUDE_LOGPROBS, "reasoning.encrypted_content"}  # of the second there is nothing to include
INCLUDES_MAX = 16  # OpenAI has seven
MESSAGE_KEYS = frozenset({"type", "role", "content", "id", "status", "phase"})
CALL_KEYS = frozenset({"type", "call_id", "name", "arguments", "id", "status"})
RESULT_KEYS = frozenset({"type", "call_id", "output", "id", "status"})
TEXT_PARTS: PartKinds = {
    "input_text": frozenset({"prompt_cache_breakpoint"}),
    "output_text": frozenset({"annotations", "logprobs"}),
}
NOT_STORED = (
    "this node stores no responses, so it cannot {what}: send the whole conversation as input, and store: false or no "
    "store at all"
)

# fields that we do not offer -> the values that ask for nothing
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "reasoning": ({}, {"effort": "none"}, {"effort": None}),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "text": ({}, {"format": {"type": "text"}}, {"format": {"type": "text"}, "verbosity": "medium"}),
    "truncation": ("disabled",),
}


class StreamOptions(BaseModel):
    """We never pad, so there is nothing to switch off."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    include_obfuscation: bool = False


class ResponsesTool(BaseModel):
    """A function of the client's. Tools that OpenAI runs itself have other types, and are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    type: Literal["function"]
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesChoice(BaseModel):
    """That this function is to be called."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    type: Literal["function"]
    name: Name


class ResponsesRequest(Request):
    """POST /v1/responses."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL
    refusals: ClassVar[Mapping[str, str]] = {
        "background": NOT_STORED.format(what="answer in the background"),
        "conversation": NOT_STORED.format(what="go on with a conversation"),
        "previous_response_id": NOT_STORED.format(what="go on after an earlier one"),
        "prompt": NOT_STORED.format(what="know a prompt by its id"),
        "store": NOT_STORED.format(what="keep this one"),
        "text": "only plain text is offered: leave text out, or send {'format': {'type': 'text'}}",
        "truncation": "what does not fit is an error here and never cut: leave truncation out, or send 'disabled'",
    }

    input: Annotated[Any, shown_as(ResponsesInput)]
    instructions: str | None = None
    tools: list[ResponsesTool] = Field(default_factory=list, max_length=TOOLS_MAX)
    tool_choice: Literal["none", "auto", "required"] | ResponsesChoice | None = None
    parallel_tool_calls: bool | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_logprobs: Logprobs | None = None
    include: list[str] = Field(default_factory=list, max_length=INCLUDES_MAX)
    stream: bool = False
    stream_options: StreamOptions | None = None
    metadata: dict[str, str] = Field(default_factory=dict, max_length=METADATA_MAX)
    # what `user` is being replaced by; bounded and not used
    safety_identifier: str | None = Field(default=None, max_length=USER_CHARS_MAX)
    prompt_cache_key: str | None = Field(default=None, max_length=USER_CHARS_MAX)

    def logprobs_asked(self) -> int | None:
        """None for none, else how many alternatives. Raises BadRequest."""
        for name in self.include:
            if name not in INCLUDES:
                raise BadRequest(f"include holds {shown(name)}; offered is {INCLUDE_LOGPROBS}", param="include")
        if INCLUDE_LOGPROBS in self.include:
            return self.top_logprobs or 0
        if self.top_logprobs:
            raise BadRequest(f"top_logprobs needs include: [{INCLUDE_LOGPROBS!r}]", param="top_logprobs")
        return None

    def tooling(self) -> Tooling | None:
        """What may be called in the answer. Raises BadRequest, TooLarge."""
        tools = [tool_of(one.name, one.description, one.parameters, one.strict) for one in self.tools]
        choice = self.tool_choice
        if isinstance(choice, ResponsesChoice):
            named = FunctionChoice(type="function", function=FunctionName(name=choice.name))
            return tooling_of(tools, named, self.parallel_tool_calls)
        return tooling_of(tools, choice, self.parallel_tool_calls)

    def turns(self) -> tuple[work.Message, ...]:
        """The chat, with the instructions in front. Raises BadRequest, TooLarge."""
        turns: list[Turn] = []
        if self.instructions is not None:
            turns.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            turns.append({"role": "user", "content": self.input})
        elif isinstance(self.input, list) and self.input:
            turns += [_turn(item, f"input.{index}") for index, item in enumerate(self.input)]
        else:
            raise BadRequest(f"input is {shown(self.input)}, wanted a string or a list of messages", param="input")
        return messages_of(with_calls_joined(turns))

    def generation(self) -> Generation:
        """The sampling that it asks for."""
        return Generation(
            model=self.model, max_tokens=self.max_output_tokens, temperature=self.temperature, top_p=self.top_p
        )


def _turn(item: object, param: str) -> Turn:
    kind = item.get("type", "message") if isinstance(item, dict) else "message"
    if kind == "function_call":
        call = object_of(item, param, CALL_KEYS)
        return call_turn(call.get("call_id"), call.get("name"), call.get("arguments"), param)
    if kind == "function_call_output":
        result = object_of(item, param, RESULT_KEYS)
        return result_turn(result.get("call_id"), text_of(result.get("output"), f"{param}.output", TEXT_PARTS), param)
    if kind != "message":
        raise BadRequest(
            f"{param} is an item of type {shown(kind)}; offered are message, function_call and function_call_output",
            param=param,
        )
    message = object_of(item, param, MESSAGE_KEYS)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRequest(f"{param}.role is {shown(role)}, wanted one of {', '.join(ROLES)}", param=f"{param}.role")
    return {"role": role, "content": text_of(message.get("content"), f"{param}.content", TEXT_PARTS)}
