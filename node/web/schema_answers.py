"""What clients get, described: the models behind the answers' part of GET /openapi.json.

Rules: core. Nothing here makes an answer (node/web/shapes.py and the routes do); tests hold every answer to these
models, which take no field that is not named. What a status tells of the node's parts grows with them and is left open.
Source: OpenAI API reference, "The chat completion object", "The completion object", "The embedding object".
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorFields(_Closed):
    """What went wrong; more_fields only where they are known."""

    type: str
    code: str
    message: str
    param: str | None
    request_id: str
    retryable: bool
    is_possible: Literal[False] = False
    models: list[str] = []
    loading: dict[str, Any] = {}


class ErrorBody(_Closed):
    """Every failure."""

    error: ErrorFields


class Usage(_Closed):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(_Closed):
    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(_Closed):
    content: list[ContentLogprob]
    refusal: None


class ShownFunction(_Closed):
    name: str
    arguments: str


class ShownCall(_Closed):
    id: str
    type: Literal["function"]
    function: ShownFunction


class AssistantMessage(_Closed):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ShownCall] = []


class ChatChoice(_Closed):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(_Closed):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionLogprobs(_Closed):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(_Closed):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class Completion(_Closed):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class EmbeddingUsage(_Closed):
    prompt_tokens: int
    total_tokens: int


class EmbeddingRow(_Closed):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    truncated: bool | None


class EmbeddingList(_Closed):
    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: EmbeddingUsage


class InferenceAnswer(_Closed):
    """text and finish_reason of a causal model, embeddings of an encoder; a list for a list."""

    model: str
    revision: str
    model_type: Literal["causal", "encoder"]
    text: str | list[str] = ""
    finish_reason: str | list[str] = ""
    embeddings: list[float] | list[list[float]] = []
    truncated: bool | list[bool | None] | None
    usage: Usage | EmbeddingUsage
    served_by: str
    latency_ms: float


class ModelRevision(_Closed):
    revision: str
    peers: int


class ModelShown(_Closed):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    revision: str
    kind: Literal["causal", "encoder"]
    peers: int
    context_tokens: int
    local: bool
    embeds: bool
    revisions: list[ModelRevision]


class ModelList(_Closed):
    object: Literal["list"]
    data: list[ModelShown]


class Healthy(_Closed):
    status: Literal["ok"]


class Ready(_Closed):
    ready: bool
    reason: str
    loading: bool
    degraded: list[str]


class Unready(Ready):
    error: ErrorFields


class AnthropicErrorFields(_Closed):
    """What went wrong, in Anthropic's words."""

    type: str
    message: str


class AnthropicErrorBody(_Closed):
    """Every failure under /v1/messages."""

    type: Literal["error"]
    error: AnthropicErrorFields
    request_id: str


class OllamaErrorBody(_Closed):
    """Every failure under /api/, our own /api/v1/ left out."""

    error: str
    code: str
    request_id: str


class TokenCount(_Closed):
    """How long a prompt is."""

    input_tokens: int


class Opened(BaseModel):
    """An object that grows with the node's parts."""

    model_config = ConfigDict(extra="allow")


class PeerList(_Closed):
    peers: list[Opened]
