"""GET /openapi.json: what this node takes and gives, as an OpenAPI 3.1 document of its own routes.

Rules: core. Made from what decides: the routes themselves, the models that parse requests, the fields that we take only
with a neutral value, the table of errors. A route that nobody has described here is in it all the same, with its path,
its method and its errors; a test says which that are.
Source: OpenAPI Specification 3.1.1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from node.front import Route as Where
from node.training_wish import Begin, Join
from node.web import schema_answers as answers
from node.web import schema_itself as itself
from node.web.asker import DEADLINE_S_MAX
from node.web.errors import CODES, TABLE
from node.web.schema import (
    Body,
    ChatRequest,
    CompletionRequest,
    EmbeddingsRequest,
    InferenceRequest,
)
from node.web.schema_anthropic import Conversation, MessagesRequest
from node.web.schema_ollama import (
    OPERATORS,
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaShowRequest,
)
from node.web.schema_responses import ResponsesRequest
from node.web.schema_sealed import SealedRequest
from node.web.session import ChallengeAsked, SessionAsked
from node.web.writer import LINES

Json = dict[str, Any]
REF: Final = "#/components/schemas/{model}"
EVENTS: Final = "text/event-stream"
PAGE: Final = "text/html"
JSON: Final = "application/json"
# OpenAPI has no words for a stream's events before 3.2: tools read this as of each event, or of all of them as text
EVENT: Final[Json] = {"description": "events; the data of each is a chunk in OpenAI's shape, of the last one [DONE]"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """One route. asks: its body; gives: its answer's JSON; media: another kind of answer, or one beside JSON.

    query: what may stand behind the question mark. is_asking: x-route and its kin say how it is answered.
    ill: its JSON with a 503, if that is not an error's alone.
    fails: every failure's JSON.
    """

    summary: str
    asks: type[BaseModel] | type[msgspec.Struct] | None = None
    gives: type[BaseModel] | None = None
    media: str = ""
    query: type[BaseModel] | None = None
    is_asking: bool = False
    ill: type[BaseModel] | None = None
    fails: type[BaseModel] = answers.ErrorBody


def _anthropic(summary: str, asks: type[BaseModel], gives: type[BaseModel], *, media: str = "") -> Described:
    failed = answers.AnthropicErrorBody
    return Described(summary=summary, asks=asks, gives=gives, media=media, is_asking=True, fails=failed)


def _ollama(summary: str, asks: type[BaseModel] | None = None, *, media: str = "") -> Described:
    is_asking = asks is not None
    failed = answers.OllamaErrorBody
    return Described(summary=summary, asks=asks, gives=answers.Opened, media=media, is_asking=is_asking, fails=failed)


_NOT_HERE: Final = _ollama("For who runs a node, and always refused")
_NOT_STORED: Final = Described(summary="Nothing is stored, and this is always refused")
ROUTES: Final[dict[tuple[str, str], Described]] = {
    ("POST", "/v1/chat/completions"): Described(
        summary="Answer a chat", asks=ChatRequest, gives=answers.ChatCompletion, media=EVENTS, is_asking=True
    ),
    ("POST", "/v1/completions"): Described(
        summary="Complete a text", asks=CompletionRequest, gives=answers.Completion, media=EVENTS, is_asking=True
    ),
    ("POST", "/v1/embeddings"): Described(
        summary="Vectors of texts", asks=EmbeddingsRequest, gives=answers.EmbeddingList, is_asking=True
    ),
    ("POST", "/api/v1/model/inference"): Described(
        summary="Text or vectors, by the kind of model", asks=InferenceRequest, gives=answers.InferenceAnswer,
        is_asking=True,
    ),
    ("GET", "/v1/models"): Described(summary="Every model that is served now", gives=answers.ModelList),
    ("GET", "/v1/models/{model}"): Described(summary="One of them", gives=answers.ModelShown),
    ("GET", "/healthz"): Described(summary="Whether the process is up", gives=answers.Healthy),
    ("GET", "/readyz"): Described(
        summary="Whether requests are accepted", gives=answers.Ready, ill=answers.Unready
    ),
    ("GET", "/metrics"): Described(summary="Figures for Prometheus", media="text/plain"),
    ("GET", "/openapi.json"): Described(summary="This document", gives=answers.Opened),
    ("GET", "/api/v1/status"): Described(summary="What the node says of itself", gives=answers.Opened),
    ("GET", "/api/v1/peers"): Described(summary="What is known of its peers", gives=answers.PeerList),
    ("GET", "/api/v1/self"): Described(summary="What it measured of itself, with formulas", gives=itself.SelfTold),
    ("GET", "/api/v1/self/history"): Described(
        summary="The newest snapshots of it", gives=itself.HistoryTold, query=itself.HistoryAsked
    ),
    ("GET", "/api/v1/memory"): Described(
        summary="Recall, for the operator", gives=itself.Recalled, query=itself.RecallAsked
    ),
    ("POST", "/api/v1/memory"): Described(
        summary="Remember a text, for the operator", asks=itself.NoteRequest, gives=itself.Noted
    ),
    ("DELETE", "/api/v1/memory"): Described(
        summary="Erase all of a subject, for the operator", gives=itself.ForgottenTold, query=itself.ForgetAsked
    ),
    ("GET", "/api/v1/memory/verify"): Described(
        summary="Walk the whole chain, for the operator; takes as long as it takes", gives=itself.Verified
    ),
    ("GET", "/api/v1/events"): Described(summary="What changed, once a second, as long as it is read", media=EVENTS),
    ("GET", "/api/v1/metrics/model"): Described(summary="Counts and percentiles by model", gives=answers.Opened),
    ("POST", "/api/v1/sealed"): Described(
        summary="A request sealed to a peer (docs/PROTOCOLS.md)", asks=SealedRequest, media="application/octet-stream"
    ),
    ("GET", "/api/v1/peers/{peer}/sealing-key"): Described(summary="A peer's key to seal to", gives=answers.Opened),
    ("POST", "/api/v1/session/challenge"): Described(
        summary="What a wallet is to sign", asks=ChallengeAsked, gives=answers.Opened
    ),
    ("POST", "/api/v1/session"): Described(summary="A session by it", asks=SessionAsked, gives=answers.Opened),
    ("GET", "/"): Described(summary="The dashboard", media=PAGE),
    ("GET", "/chat"): Described(summary="The page that chats", media=PAGE),
    ("GET", "/static/{name}"): Described(summary="What the pages are made of", media="*/*"),
    ("GET", "/api/v1/training"): Described(summary="The run of training", gives=answers.Opened),
    ("POST", "/api/v1/training/start"): Described(summary="Begin a run", asks=Begin, gives=answers.Opened),
    ("POST", "/api/v1/training/join"): Described(summary="Join a run", asks=Join, gives=answers.Opened),
    ("POST", "/api/v1/training/pause"): Described(summary="Train no more for now", gives=answers.Opened),
    ("POST", "/api/v1/training/resume"): Described(summary="Train again", gives=answers.Opened),
    ("POST", "/api/v1/training/leave"): Described(summary="Leave the run", gives=answers.Opened),
    ("POST", "/v1/messages"): _anthropic("Anthropic's Messages", MessagesRequest, answers.Opened, media=EVENTS),
    ("POST", "/v1/messages/count_tokens"): _anthropic("Count a prompt", Conversation, answers.TokenCount),
    ("POST", "/v1/responses"): Described(
        summary="OpenAI's Responses", asks=ResponsesRequest, gives=answers.Opened, media=EVENTS, is_asking=True
    ),
    **{(method, "/v1/responses/{rest}"): _NOT_STORED for method in ("GET", "POST", "DELETE")},
    ("POST", "/api/chat"): _ollama("Ollama's chat", OllamaChatRequest, media=LINES),
    ("POST", "/api/generate"): _ollama("Ollama's completion", OllamaGenerateRequest, media=LINES),
    ("POST", "/api/embed"): _ollama("Ollama's vectors", OllamaEmbedRequest),
    ("POST", "/api/embeddings"): _ollama("Ollama's vector, in its old form", OllamaEmbeddingsRequest),
    ("POST", "/api/show"): _ollama("One model, in Ollama's words", OllamaShowRequest),
    ("GET", "/api/tags"): _ollama("The models, in Ollama's words"),
    ("GET", "/api/ps"): _ollama("The models that are loaded somewhere: all"),
    ("GET", "/api/version"): _ollama("The Ollama whose API this is"),
    **{
        (method, f"/api/{name}".replace(":path}", "}")): _NOT_HERE
        for name in OPERATORS
        for method in ("GET", "POST", "DELETE")
    },
}  # fmt: skip
HEADERS: Final[dict[str, tuple[str, Json]]] = {
    "x-route": ("where the answer comes from", {"enum": [each.value for each in Where]}),
    "x-peer": ("the one peer that is to answer", {"type": "string", "pattern": "^[1-9A-HJ-NP-Za-km-z]{8,128}$"}),
    "x-timeout-s": ("seconds for the answer", {"type": "number", "minimum": 0.001, "maximum": DEADLINE_S_MAX}),
    "x-private": ("nothing of the request is shared with others", {"enum": ["true", "false"]}),
}


def document(routes: Iterable[Route], version: str) -> Json:
    """The document of these routes."""
    schemas = _schemas()
    paths: Json = {}
    for path, method in served(routes):
        described = ROUTES.get((method, path), Described(summary=path))
        paths.setdefault(path, {})[method.lower()] = _operation(path, described)
    return {
        "openapi": "3.1.0",
        "info": {"title": "openagi node", "version": version},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": schemas},
    }


def served(routes: Iterable[Route]) -> list[tuple[str, str]]:
    """(path, method) of each route, as the document writes them."""
    pairs = []
    for route in routes:
        path = route.path.replace(":path}", "}")
        pairs += [(path, method) for method in sorted(route.methods or ()) if method != "HEAD"]
    return pairs


def _operation(path: str, described: Described) -> Json:
    operation: Json = {"summary": described.summary, "responses": _responses(described)}
    parameters = [
        {"name": name.strip("{}"), "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in path.split("/")
        if name.startswith("{")
    ]
    if described.query is not None:
        parameters += _questions(described.query)
    if described.is_asking:
        parameters += [
            {"name": name, "in": "header", "description": told, "schema": schema}
            for name, (told, schema) in HEADERS.items()
        ]
    if parameters:
        operation["parameters"] = parameters
    if described.asks is not None:
        operation["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(described.asks)}}}
    return operation


def _questions(kind: type[BaseModel]) -> list[Json]:
    """The names behind the question mark; one that is a list is repeated."""
    told = kind.model_json_schema()
    return [
        {"name": name, "in": "query", "required": name in told.get("required", ()), "schema": _plain(schema)}
        for name, schema in told["properties"].items()
    ]


def _plain(schema: Json) -> Json:
    """Without null, which no question's value is."""
    kinds = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    return kinds[0] if len(kinds) == 1 else {name: value for name, value in schema.items() if name != "title"}


def _responses(described: Described) -> Json:
    content: Json = {} if described.gives is None else {JSON: {"schema": _ref(described.gives)}}
    if described.media:
        content[described.media] = {"schema": EVENT if described.media == EVENTS else {"type": "string"}}
    told: Json = {"200": {"description": "the answer", **({"content": content} if content else {})}}
    for status in sorted({row.status for row in TABLE.values()}):
        rows = [kind for kind, row in TABLE.items() if row.status == status]
        codes = sorted({code for kind in rows for code in CODES[kind]})
        body = described.ill if described.ill is not None and status == 503 else described.fails
        told[str(status)] = {"description": ", ".join(codes), "content": {JSON: {"schema": _ref(body)}}}
        if any(TABLE[kind].retry_after for kind in rows):
            told[str(status)]["headers"] = {"retry-after": {"schema": {"type": "integer", "minimum": 1}}}
    return told


def _ref(kind: type[BaseModel] | type[msgspec.Struct]) -> Json:
    return {"$ref": REF.format(model=kind.__name__)}


def _schemas() -> Json:
    """Every model that a route names, and those inside them."""
    asked = [each.asks for each in ROUTES.values() if each.asks is not None]
    given = [kind for each in ROUTES.values() for kind in (each.gives, each.ill) if kind is not None]
    failed = [each.fails for each in ROUTES.values()]
    models = dict.fromkeys(kind for kind in (*asked, *given, *failed) if issubclass(kind, BaseModel))
    _, told = models_json_schema([(kind, "validation") for kind in models], ref_template=REF)
    structs = [kind for kind in asked if issubclass(kind, msgspec.Struct)]
    _, of_structs = msgspec.json.schema_components(structs, ref_template=REF.replace("model", "name"))
    schemas: Json = {**told.pop("$defs"), **of_structs}
    _hoist(schemas, schemas)
    for kind in models:
        if issubclass(kind, Body):
            _open(schemas[kind.__name__], kind)
    return schemas


def _open(schema: Json, kind: type[Body]) -> None:
    """What parse() does before the model sees a body: null is absent, and some fields are taken when they ask for
    nothing."""
    for name in schema["properties"].keys() - set(schema.get("required", ())):
        schema["properties"][name] = {"anyOf": [schema["properties"][name], {"type": "null"}]}
    for name, values in kind.neutral.items():
        if name not in kind.model_fields:
            schema["properties"][name] = {"enum": [*values, None], "description": "not offered"}


def _hoist(node: object, schemas: Json) -> None:
    """Definitions that stand inside a field move to the others."""
    if isinstance(node, dict):
        for name, inner in node.pop("$defs", {}).items():
            schemas[name] = inner
            _hoist(inner, schemas)
        for inner in list(node.values()):
            _hoist(inner, schemas)
    elif isinstance(node, list):
        for inner in node:
            _hoist(inner, schemas)
