"""What Ollama's clients may send to /api/chat, /api/generate, /api/embed, /api/embeddings and /api/show.

Rules: core. As schema.py; options too are strict. What is not asked for is as at every route here (temperature 1,
no top_k, no penalty) and not as an Ollama model file has it. Options about the machine are the business of who runs
it and refused; num_ctx is taken and changes nothing, since no prompt is ever cut here: one that does not fit is an
error. keep_alive is taken: a model stays for as long as its node serves it; only 0, which asks to put it away, is
refused.

Source: Ollama docs/api.md ("Generate a chat completion", "Generate embeddings", "Show model information"), docs/
modelfile.mdx ("Valid parameters and values"); ollama-python 0.6 ollama/_types.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from node import work
from node.errors import BadRequest
from node.tools import TOOLS_MAX, Tooling
from node.web.schema import DIMENSIONS_MAX, Body, Generation, messages_of
from node.web.schema_called import Turn, call_turn, result_turn, tool_of, with_calls_joined
from node.web.schema_parts import Logprobs, Stops, Temperature, TopK, TopP, object_of, shown
from node.web.schema_shown import OllamaMessages, OllamaTexts, shown_as
from node.web.schema_tools import Name, check_calls, check_messages, tooling_of

CONTEXT_TOKENS_MAX = 1 << 24  # above any model's
LATEST = ":latest"
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = frozenset({"role", "content", "tool_calls", "tool_name"})
OPERATORS = ("pull", "push", "create", "copy", "delete", "blobs/{digest:path}")  # routes for who runs a node
UNLIMITED = (-1, 0)  # num_predict: until the model ends, as Ollama has it when nothing is said

_WORDLESS: tuple[object, ...] = ("",)
# Ollama's fields that we do not offer -> the values that ask for nothing
NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "context": ([],),
    "format": _WORDLESS,
    "height": (),
    "images": ([],),
    "steps": (),
    "suffix": _WORDLESS,
    "template": _WORDLESS,
    "think": (False,),
    "width": (),
}
# options of the same kind
OPTIONS_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "mirostat": (0,),
    "penalize_newline": (True,),
    "repeat_last_n": (-1,),  # penalties look at the whole text here
    "tfs_z": (1, 1.0),
    "typical_p": (1, 1.0),
}
REFUSALS: Mapping[str, str] = {
    "context": "context is not offered by this node: send the conversation to /api/chat",
    "format": "format is not offered by this node on Ollama's routes yet: leave it out",
    "think": "think is not offered by this node: leave it out, or send false",
}


class Options(BaseModel):
    """What Ollama has under `options`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    num_ctx: int | None = Field(default=None, ge=1, le=CONTEXT_TOKENS_MAX)
    num_predict: int | None = Field(default=None, ge=-1, le=work.TOKENS_MAX)
    seed: int | None = Field(default=None, ge=-(1 << 63), lt=1 << 64)
    temperature: Temperature = 1.0
    top_k: TopK = 0
    top_p: TopP = 1.0
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repeat_penalty: float = Field(default=1.0, gt=0.0, le=10.0)
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    stop: str | Stops = Field(default_factory=list)


def _without_neutral(value: object) -> object:
    """Options without what asks for nothing. Raises BadRequest."""
    if not isinstance(value, dict):
        return value
    given = {key: each for key, each in value.items() if each is not None}
    for key in given.keys() - Options.model_fields.keys():
        param = f"options.{str(key)[:60]}"
        if key not in OPTIONS_NEUTRAL:
            offered = ", ".join(sorted(Options.model_fields))
            raise BadRequest(f"{param} is not offered by this node; the options are {offered}", param=param)
        if not any(given[key] == each and type(given[key]) is type(each) for each in OPTIONS_NEUTRAL[key]):
            raise BadRequest(
                f"{param} is {shown(given[key])}, which this node does not offer: leave it out", param=param
            )
        del given[key]
    return given


class OllamaBody(Body):
    """What all of Ollama's routes share. `model` is a must, as at Ollama."""

    neutral: ClassVar[Mapping[str, tuple[object, ...]]] = NEUTRAL
    refusals: ClassVar[Mapping[str, str]] = REFUSALS

    model: Annotated[str, Field(min_length=1, max_length=200)]

    def model_asked(self, served: frozenset[str] = frozenset()) -> str | None:
        """The model by the name that the network has for it: as it was said, or without `:latest`. None: default."""
        name = self.model
        if name not in served and name.endswith(LATEST) and len(name) > len(LATEST):
            name = name.removesuffix(LATEST)
        return None if name == "default" else name


class OllamaWork(OllamaBody):
    """What all routes share that make something."""

    options: Options = Options()
    keep_alive: str | int | float | None = None

    @field_validator("options", mode="before")
    @classmethod
    def _options(cls, value: object) -> object:
        return _without_neutral(value)

    @field_validator("keep_alive")
    @classmethod
    def _keep_alive(cls, value: str | int | float | None) -> str | int | float | None:
        digits = value.rstrip("hmnsuµ") if isinstance(value, str) else value
        if digits in (0, "0"):
            raise BadRequest(
                f"keep_alive is {shown(value)}: a model stays for as long as its node serves it, and no client can put "
                "it away; leave it out",
                param="keep_alive",
            )
        return value


class OllamaGeneration(OllamaWork):
    """What /api/chat and /api/generate share."""

    stream: bool = True  # Ollama's own default
    logprobs: bool = False
    top_logprobs: Logprobs | None = None

    def logprobs_asked(self) -> int | None:
        """None for none, else how many alternatives. Raises BadRequest."""
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None

    def generation(self, model: str | None) -> Generation:
        """The sampling that it asks for."""
        options = self.options
        return Generation(
            model=model,
            max_tokens=None if options.num_predict in UNLIMITED else options.num_predict,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
            repetition_penalty=options.repeat_penalty,
            presence_penalty=options.presence_penalty,
            frequency_penalty=options.frequency_penalty,
            seed=options.seed,
            stop=options.stop,
        )


class OllamaFunction(BaseModel):
    """A function of the client's."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class OllamaTool(BaseModel):
    """The one kind of tool."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    type: Literal["function"] = "function"
    function: OllamaFunction


class OllamaChatRequest(OllamaGeneration):
    """POST /api/chat. Without messages it asks that the model be loaded."""

    messages: Annotated[list[Any], shown_as(OllamaMessages)] = Field(default_factory=list)
    tools: list[OllamaTool] = Field(default_factory=list, max_length=TOOLS_MAX)

    def tooling(self) -> Tooling | None:
        """What may be called in the answer. Raises BadRequest, TooLarge."""
        functions = [one.function for one in self.tools]
        return tooling_of([tool_of(one.name, one.description, one.parameters, None) for one in functions], None, None)

    def turns(self) -> tuple[work.Message, ...]:
        """The chat. Raises BadRequest, TooLarge."""
        check_messages(len(self.messages))
        turns: list[Turn] = []
        waiting: list[tuple[str, str]] = []  # ids and names of calls without a result: Ollama has no ids
        for index, value in enumerate(self.messages):
            param = f"messages.{index}"
            message = object_of(value, param, MESSAGE_KEYS)
            role, content = message.get("role"), message.get("content") or ""
            if not isinstance(role, str) or role not in ROLES:
                raise BadRequest(f"{param}.role is {shown(role)}, wanted one of {', '.join(ROLES)}", param=param)
            if not isinstance(content, str):
                raise BadRequest(f"{param}.content is {shown(content)}, wanted a string", param=f"{param}.content")
            if role == "tool" and waiting:
                named = [call for call in waiting if call[1] == message.get("tool_name")]
                waiting.remove(done := (named or waiting)[0])
                turns.append(result_turn(done[0], content, param))
                continue
            turns.append({"role": role, "content": content})
            for call in _calls(message.get("tool_calls"), role, param, len(turns)):
                turns.append(call)
                waiting += [(one["id"], one["function"]["name"]) for one in call["tool_calls"]]
            check_calls(len(waiting))
        return messages_of(with_calls_joined(turns))


def _calls(values: object, role: str, param: str, turn: int) -> list[Turn]:
    """The calls of an assistant's message, named by their place."""
    if values in (None, []):
        return []
    where = f"{param}.tool_calls"
    if not isinstance(values, list) or role != "assistant":
        raise BadRequest(f"{where} is {shown(values)} of role {role}, wanted a list, of the assistant's", param=where)
    calls = []
    for index, value in enumerate(values):
        function = object_of(value, where, frozenset({"function", "id", "type"})).get("function")
        called = object_of(function, f"{where}.{index}.function", frozenset({"name", "arguments", "index"}))
        call_id = f"{turn % 10**5:05d}{index % 10**4:04d}"  # nine digits, which every template takes
        calls.append(call_turn(call_id, called.get("name"), called.get("arguments", {}), f"{where}.{index}"))
    return calls


class OllamaGenerateRequest(OllamaGeneration):
    """POST /api/generate. Without a prompt it asks that the model be loaded. raw: no template."""

    prompt: str = ""
    system: str = ""
    raw: bool = False

    def turns(self) -> tuple[work.Message, ...]:
        """The prompt as a chat of one turn. Raises TooLarge."""
        turns = [{"role": "system", "content": self.system}] if self.system else []
        return messages_of([*turns, {"role": "user", "content": self.prompt}])


class OllamaEmbedRequest(OllamaWork):
    """POST /api/embed. truncate: a text that is too long is cut, else an error."""

    input: Annotated[Any, shown_as(OllamaTexts)]
    truncate: bool = True
    dimensions: int | None = Field(default=None, ge=1, le=DIMENSIONS_MAX)


class OllamaEmbeddingsRequest(OllamaWork):
    """POST /api/embeddings, the old form: one text."""

    prompt: str = Field(min_length=1)


class OllamaShowRequest(OllamaBody):
    """POST /api/show."""

    verbose: bool = False
