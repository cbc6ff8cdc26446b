"""The routes that Ollama's clients ask: to chat, generate, embed, and which models there are.

Rules: /api/tags and /api/ps list what live peers serve, for all of that is loaded somewhere; what only the file of a
model would tell (its size, family, quantization) is left out and not made up. The digest is the revision. What
changes models (pull, create, copy, delete, push) is for who runs a node, and answers so.

Source: Ollama docs/api.md.
"""

from __future__ import annotations

import time
from typing import Any, Final, NoReturn

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from node.errors import BadRequest, UnknownModel
from node.front import Front, ModelRow
from node.web.door import REQUEST_ID_KEY, read_body
from node.web.embeddings import Embeddings, check_dimensions, served_by, vectors_of
from node.web.errors import NotFound
from node.web.generation import Generations
from node.web.ollama_writer import NS, OllamaWriter
from node.web.schema import parse, prompts_of
from node.web.schema_ollama import (
    OPERATORS,
    OllamaBody,
    OllamaChatRequest,
    OllamaEmbeddingsRequest,
    OllamaEmbedRequest,
    OllamaGenerateRequest,
    OllamaGeneration,
    OllamaShowRequest,
)
from node.web.shapes import Head
from node.work import TEXTS_MAX, Embedded

API_VERSION: Final = "0.12.11"  # the Ollama whose API this is (the first with logprobs): clients look for a least one
TOKENS_DEFAULT: Final = 2048  # num_predict is unlimited at Ollama; here half of the context at most, as everywhere


class Ollama:
    """See the module."""

    def __init__(self, front: Front, generations: Generations, embeddings: Embeddings) -> None:
        self._front = front
        self._generations = generations
        self._embeddings = embeddings

    def routes(self) -> list[Route]:
        asked = {
            "chat": self.chat,
            "generate": self.generate,
            "embed": self.embed,
            "embeddings": self.embeddings,
            "show": self.show,
        }
        told = {"tags": self.tags, "ps": self.ps, "version": self.version}
        every = ["GET", "HEAD", "POST", "DELETE"]
        return [
            *(Route(f"/api/{name}", endpoint, methods=["POST"]) for name, endpoint in asked.items()),
            *(Route(f"/api/{name}", endpoint, methods=["GET"]) for name, endpoint in told.items()),
            *(Route(f"/api/{name}", self.for_operators, methods=every) for name in OPERATORS),
        ]

    async def chat(self, request: Request) -> ASGIApp:
        asked = parse(await read_body(request.scope, request.receive), OllamaChatRequest)
        prompt = {"messages": asked.turns(), "tools": asked.tooling()} if asked.messages else None
        return await self._answer(request, asked, prompt, chat=True)

    async def generate(self, request: Request) -> ASGIApp:
        asked = parse(await read_body(request.scope, request.receive), OllamaGenerateRequest)
        if asked.raw and asked.system:
            raise BadRequest("raw takes the prompt as it is, and a system prompt with it has no place", param="system")
        prompt: dict[str, Any] | None = None
        if asked.prompt:
            [text] = prompts_of(asked.prompt, "prompt", count_max=1)
            prompt = {"text": text} if asked.raw else {"messages": asked.turns()}
        return await self._answer(request, asked, prompt, chat=False)

    async def _answer(
        self, request: Request, asked: OllamaGeneration, prompt: dict[str, Any] | None, *, chat: bool
    ) -> ASGIApp:
        model = asked.model_asked(self._served())
        writer = OllamaWriter(model=asked.model, chat=chat, logprobs=asked.logprobs)
        if prompt is None:
            row = self._row(asked)
            head = Head(
                request_id=request.scope[REQUEST_ID_KEY],
                created_s=int(time.time()),
                model=row.id,
                revision=row.revision,
            )
            return Response(writer.loaded(head), 200, media_type="application/json")
        works = self._generations.works(
            request,
            asked.generation(model),
            [prompt],
            tokens_default=TOKENS_DEFAULT,
            logprobs=asked.logprobs_asked(),
        )
        return await self._generations.answer(request, works, writer, stream=asked.stream)

    async def embed(self, request: Request) -> Response:
        began = trio.current_time()
        asked = parse(await read_body(request.scope, request.receive), OllamaEmbedRequest)
        texts = prompts_of(asked.input, "input", count_max=TEXTS_MAX)
        embedded = await self._embeddings.embed(request, asked.model_asked(self._served()), texts)
        check_dimensions(embedded, asked.dimensions)
        if not asked.truncate:
            _check_whole(embedded)
        told = {
            "model": asked.model,
            "embeddings": await vectors_of(embedded, asked.dimensions),
            "total_duration": round((trio.current_time() - began) * NS),
            "prompt_eval_count": embedded.prompt_tokens,
            "truncated": list(embedded.truncated),
        }
        return _json(told, served_by(embedded))

    async def embeddings(self, request: Request) -> Response:
        asked = parse(await read_body(request.scope, request.receive), OllamaEmbeddingsRequest)
        texts = prompts_of(asked.prompt, "prompt", count_max=1)
        embedded = await self._embeddings.embed(request, asked.model_asked(self._served()), texts)
        [vector] = await vectors_of(embedded, None)
        return _json({"embedding": vector}, served_by(embedded))

    async def show(self, request: Request) -> Response:
        row = self._row(parse(await read_body(request.scope, request.receive), OllamaShowRequest))
        completes = ["completion"] if row.kind == "causal" else []
        facts = {
            "general.architecture": row.kind,  # clients look for ARCHITECTURE.context_length
            "general.name": row.id,
            f"{row.kind}.context_length": row.context_tokens,
            "openagi.revision": row.revision,
            "openagi.peers": row.peers,
        }
        capabilities = completes + (["embedding"] if row.embeds else [])
        return _json({"details": {}, "model_info": facts, "capabilities": capabilities})

    async def tags(self, request: Request) -> Response:
        return _json({"models": [_entry(row) for row in self._rows().values()]})

    async def ps(self, request: Request) -> Response:
        entries = [{**_entry(row), "context_length": row.context_tokens} for row in self._rows().values()]
        return _json({"models": entries})

    async def version(self, request: Request) -> Response:
        return _json({"version": API_VERSION})

    async def for_operators(self, request: Request) -> NoReturn:
        """Raises NotFound."""
        raise NotFound(
            f"{request.url.path[:200]} is not offered: which model a node serves is said by who runs it (--model); "
            "what is served now is at /api/tags"
        )

    def _rows(self) -> dict[str, ModelRow]:
        """The first row of each model; this node's own come first."""
        rows: dict[str, ModelRow] = {}
        for row in self._front.models():
            rows.setdefault(row.id, row)
        return rows

    def _served(self) -> frozenset[str]:
        return frozenset(row.id for row in self._front.models())

    def _row(self, asked: OllamaBody) -> ModelRow:
        """The model that a request means. Raises UnknownModel."""
        rows = self._rows()
        name = asked.model_asked(frozenset(rows)) or self._front.default_model("causal")
        if name not in rows:
            raise UnknownModel(
                f"no live peer serves the model {asked.model!r}; served are: {', '.join(rows) or 'none'}",
                param="model",
            )
        return rows[name]


def _entry(row: ModelRow) -> dict[str, Any]:
    return {"name": row.id, "model": row.id, "digest": row.revision, "details": {}, "peers": row.peers}


def _check_whole(embedded: Embedded) -> None:
    """Raises BadRequest when a text was cut, or when nobody can tell."""
    for index, cut in enumerate(embedded.truncated):
        if cut:
            raise BadRequest(
                f"text {index} is longer than {embedded.model} takes, and truncate is false", param="input"
            )
        if cut is None:
            raise BadRequest(
                f"who serves {embedded.model} does not tell whether a text was cut: leave out truncate: false",
                param="truncate",
            )


def _json(told: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(told), 200, headers, media_type="application/json")
