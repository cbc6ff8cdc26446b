"""The routes that make vectors: /v1/embeddings, and /api/v1/model/inference of an encoder.

Rules: vectors travel as little-endian fp32. Fewer dimensions are the first ones, made unit length again. A text that
was cut to the model's length is reported as such. Vectors are written one at a time with a checkpoint between, as
many numbers as text would hold the loop.

Source: OpenAI API reference, "Create embeddings"; Matryoshka representations (arXiv 2205.13147) for `dimensions`.
"""

from __future__ import annotations

import base64
import math
import sys
from array import array
from collections.abc import Sequence
from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response

from node.errors import BadRequest
from node.front import Front
from node.web.answers import unless_gone
from node.web.asker import asker_of
from node.web.door import REQUEST_ID_KEY, read_body
from node.web.schema import EmbeddingsRequest, Prompt, parse, prompts_of
from node.work import TEXTS_MAX, Embedded, EmbedWork


class Embeddings:
    """See the module."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def embeddings(self, request: Request) -> Response:
        asked = parse(await read_body(request.scope, request.receive), EmbeddingsRequest)
        texts = prompts_of(asked.input, "input", count_max=TEXTS_MAX)
        embedded = await self.embed(request, asked.model_asked(), texts)
        check_dimensions(embedded, asked.dimensions)
        rows = []
        for index, vector in enumerate(embedded.vectors):
            values = floats_of(vector, asked.dimensions)
            told: object = list(values)
            if asked.encoding_format == "base64":
                told = base64.b64encode(bytes_of(values)).decode()
            row = {"object": "embedding", "index": index, "embedding": told, "truncated": embedded.truncated[index]}
            rows.append(msgspec.Raw(msgspec.json.encode(row)))
            await trio.lowlevel.checkpoint()
        body = {"object": "list", "data": rows, "model": embedded.model, "usage": _usage(embedded)}
        return Response(msgspec.json.encode(body), 200, served_by(embedded), media_type="application/json")

    async def inference(
        self, request: Request, model: str | None, texts: Sequence[Prompt], *, several: bool
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """The answer of /api/v1/model/inference, without its latency, and its headers."""
        embedded = await self.embed(request, model, texts)
        vectors = await vectors_of(embedded, None)
        told = {
            "model": embedded.model,
            "revision": embedded.revision,
            "model_type": "encoder",
            "embeddings": vectors if several else vectors[0],
            "truncated": list(embedded.truncated) if several else embedded.truncated[0],
            "usage": _usage(embedded),
            "served_by": embedded.served_by,
        }
        return told, served_by(embedded)

    async def embed(self, request: Request, model: str | None, texts: Sequence[Prompt]) -> Embedded:
        """Vectors of these texts. Raises RequestError, ClientGone."""
        asker = asker_of(request.scope)
        work = EmbedWork(
            request_id=request.scope[REQUEST_ID_KEY],
            model=model,
            texts=tuple(texts),
            remaining_ms=max(1, int(asker.deadline_s * 1000)),
            private=asker.private,
            keep=asker.keeps,
        )
        return await unless_gone(
            request.receive, lambda: self._front.embed(work, asker.hint), deadline_s=asker.deadline_s
        )


def check_dimensions(embedded: Embedded, dimensions: int | None) -> None:
    """Raises BadRequest when a model has fewer dimensions than were asked for."""
    if dimensions is not None and dimensions > embedded.dimensions:
        raise BadRequest(f"dimensions is {dimensions}, {embedded.model} has {embedded.dimensions}", param="dimensions")


async def vectors_of(embedded: Embedded, dimensions: int | None) -> list[msgspec.Raw]:
    """The vectors as lists of JSON numbers."""
    vectors = []
    for vector in embedded.vectors:
        vectors.append(msgspec.Raw(msgspec.json.encode(list(floats_of(vector, dimensions)))))
        await trio.lowlevel.checkpoint()
    return vectors


def floats_of(vector: bytes, dimensions: int | None) -> array[float]:
    """The numbers of a little-endian fp32 vector; its first `dimensions` at unit length when that is not None."""
    values = array("f", vector)
    if sys.byteorder == "big":
        values.byteswap()
    if dimensions is None or dimensions >= len(values):
        return values
    values = values[:dimensions]
    length = math.sqrt(math.fsum(value * value for value in values))
    return array("f", (value / length for value in values)) if length > 0 else values


def bytes_of(values: array[float]) -> bytes:
    """Little-endian fp32."""
    if sys.byteorder == "big":
        values = values[:]
        values.byteswap()
    return values.tobytes()


def _usage(embedded: Embedded) -> dict[str, int]:
    return {"prompt_tokens": embedded.prompt_tokens, "total_tokens": embedded.prompt_tokens}


def served_by(embedded: Embedded) -> dict[str, str]:
    """The headers that say who made the vectors, by which weights."""
    return {"x-served-by": embedded.served_by, "x-model-revision": embedded.revision}
