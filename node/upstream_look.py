"""Looks at a server behind this node: asks what it has, what it can do, and how busy it is.

Rules: shell of node/upstream_facts.py, which reads the answers. A route that a server does not have is no failure.
What a model can do is tried, with one token and one word, for no server says it; and whether a chat is gone on with in
the middle: older servers begin a new message instead, and llama.cpp says the message again, unless told not to.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import trio

from model.config import ModelFacts
from node.errors import PeerFailed
from node.upstream_dialect import LLAMA_CPP, OLLAMA, VLLM
from node.upstream_facts import (
    OWNERS,
    Load,
    Served,
    Told,
    Unfit,
    chosen,
    decoded,
    load_of_metrics,
    load_of_slots,
    model_ids,
    served_of,
)
from node.upstream_http import Answered, Server
from node.upstream_stream import DONE, Events, Garbled, chunk_of
from node.work import TEXTS_MAX

PROBE_S = 120.0  # Ollama loads a model when it is first asked
TRY_LATER = frozenset({408, 425, 429, 502, 503, 504})
VECTORS_BYTES_MAX = 16 << 20  # of an answer with EMBED_TEXTS_PER_ASK vectors
EMBED_TEXTS_PER_ASK = 16
DIMENSIONS_MAX = 65_536
BEGUN = "Once there was"  # half a message, for the trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """What the main model was seen to do. continues: a chat in the middle of a message."""

    text: bool
    chat: bool
    embeds: bool
    continues: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What the server is to this node: the main model, the one for vectors, and what they can do.

    Keeps to node.backend.Served.
    """

    main: Served
    vectors: Served | None
    abilities: Abilities

    @property
    def facts(self) -> ModelFacts:
        """Of the main model."""
        return self.main.facts

    @property
    def embedding_facts(self) -> ModelFacts:
        """Of the model that makes vectors."""
        return (self.vectors or self.main).facts

    @property
    def device(self) -> str:
        """The kind of server."""
        return self.main.dialect.name

    @property
    def linears(self) -> None:
        """That server's own affair."""

    def all_facts(self) -> tuple[ModelFacts, ...]:
        """Of every model that this node states."""
        if self.vectors is None or self.vectors is self.main:
            return (self.main.facts,)
        return (self.main.facts, self.vectors.facts)

    def device_free_bytes(self) -> int:
        """Nobody tells."""
        return 0

    def accelerator_bytes(self) -> None:
        """That server's, not this process's."""

    def is_same(self, main: Served, vectors: Served | None) -> bool:
        """Whether these are the same weights under the same names."""
        own = None if self.vectors is self.main else self.vectors
        return _weights(main) == _weights(self.main) and _weights(vectors) == _weights(own)

    def at(self, main: Served) -> Identity:
        """The same, with what may change while it runs."""
        facts = replace(self.main.facts, context_tokens=main.facts.context_tokens)
        fresh = replace(self.main, facts=facts, slots=main.slots)
        return replace(self, main=fresh, vectors=fresh if self.vectors is self.main else self.vectors)


def _weights(served: Served | None) -> tuple[str, str] | None:
    return None if served is None else (served.id, served.facts.revision)


async def look(
    server: Server, wanted: str | None, wanted_vectors: str | None, node: str
) -> tuple[Served, Served | None]:
    """The main model, and the other one for vectors when one is wanted. Raises Trouble, Garbled, Unfit."""
    models = decoded(await server.get("/v1/models"))
    model_ids(models)
    known = any(isinstance(row, dict) and row.get("owned_by") in OWNERS for row in models["data"])
    version = None if known else await _optional(server, "/api/version")
    ids = [chosen(models, wanted)]
    if wanted_vectors is not None:
        ids.append(chosen(models, wanted_vectors))
    found = [await _served(server, models, version, each, node) for each in ids]
    return found[0], found[1] if len(found) > 1 else None


async def _served(server: Server, models: Any, version: Any, model_id: str, node: str) -> Served:
    told = Told(models=models, version=version)
    name = served_of(told, model_id, node).dialect.name
    if name == LLAMA_CPP.name:
        told = replace(told, props=await _optional(server, "/props"))
    elif name == OLLAMA.name:
        show = await _optional(server, "/api/show", {"model": model_id})
        told = replace(
            told, show=show, tags=await _optional(server, "/api/tags"), ps=await _optional(server, "/api/ps")
        )
    return served_of(told, model_id, node)


async def load(server: Server, served: Served) -> Load:
    """How busy it is; of a server that does not say only that it is there. Raises Trouble, Garbled, Unfit."""
    if served.dialect.is_alone:
        await _is_there(server)
        return Load()
    try:
        if served.dialect.name == VLLM.name:
            return load_of_metrics((await server.get("/metrics")).decode(errors="replace"), served.id)
        if served.dialect.name == LLAMA_CPP.name:
            return load_of_slots(decoded(await server.get("/slots")))
    except Answered as exc:
        if exc.status in TRY_LATER or exc.status in (401, 403):
            raise
    await server.get("/v1/models")
    return Load()


async def _is_there(server: Server) -> None:
    """Whether anything answers, asked where nobody is disturbed. Raises Unreached, Garbled."""
    try:
        await server.get("/health")
    except Answered:
        pass  # that there is no such route is an answer


async def identified(server: Server, main: Served, vectors: Served | None) -> Identity:
    """Tries what the models can do. Raises Trouble, Garbled, Unfit."""
    one_word = {"model": main.id, "max_tokens": 1}
    text = await _can(server, "/v1/completions", {**one_word, "prompt": "a"})
    chat = text or await _can(
        server, "/v1/chat/completions", {**one_word, "messages": [{"role": "user", "content": "a"}]}
    )
    embeds = await _can(server, "/v1/embeddings", {"model": (vectors or main).id, "input": ["a"]})
    if vectors is not None and not embeds:
        raise Unfit(f"its model {vectors.id!r} makes no vectors: choose another with --embedding-model")
    if not chat and not embeds:
        raise Unfit(f"its model {main.id!r} answers neither completions nor chats nor embeddings")
    continues = chat and await _continues(server, main)
    if not continues:
        main = replace(main, dialect=replace(main.dialect, continues_chat=None))
    own = embeds and vectors is None
    facts = replace(main.facts, kind="causal" if chat else "encoder", embeds=own)
    if vectors is not None:
        vectors = replace(vectors, facts=replace(vectors.facts, kind="encoder", embeds=True))
    main = replace(main, facts=facts)
    abilities = Abilities(text=text, chat=chat, embeds=embeds, continues=continues)
    return Identity(main=main, vectors=main if own else vectors, abilities=abilities)


async def _can(server: Server, path: str, body: dict[str, Any]) -> bool:
    try:
        await server.post(path, body, within_s=PROBE_S)
    except Answered as exc:
        if exc.status in TRY_LATER or exc.status in (401, 403):
            raise
        return False
    return True


async def _continues(server: Server, main: Served) -> bool:
    """Whether the prompt of a chat that ends in half a message ends there, and the answer does not begin with it."""
    if main.dialect.continues_chat is None:
        return False
    messages = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": BEGUN}]
    asked = {"model": main.id, "messages": messages, **main.dialect.continues_chat}
    if main.dialect.name == LLAMA_CPP.name:
        told = await _optional(server, "/apply-template", asked)
    else:
        ids = await _optional(server, "/tokenize", asked)
        tokens = ids.get("tokens") if isinstance(ids, dict) else None
        told = await _optional(server, "/detokenize", {"model": main.id, "tokens": tokens})
    prompt = told.get("prompt") if isinstance(told, dict) else None
    if not isinstance(prompt, str) or not prompt.endswith(BEGUN):
        return False
    events, text = Events(), ""
    with trio.move_on_after(PROBE_S):
        try:
            async with server.stream("/v1/chat/completions", {**asked, "max_tokens": 1, "stream": True}) as content:
                async for part in content:
                    text += "".join(chunk_of(event, top=None).text for event in events.feed(part) if event != DONE)
        except (Answered, Garbled):
            return False
        return not text.startswith(BEGUN)
    return False


async def _optional(server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
    """The JSON of a route that is not everywhere; None where it is not, or is something else."""
    try:
        content = await (server.get(path) if body is None else server.post(path, body, within_s=PROBE_S))
        return decoded(content)
    except (Answered, Garbled, Unfit):
        return None


class _Row(msgspec.Struct):
    embedding: list[float]
    index: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Vectors(msgspec.Struct):
    data: list[_Row]
    usage: _Usage | None = None


async def vectors_of(
    server: Server, model_id: str, texts: tuple[str | tuple[int, ...], ...], within_s: float
) -> tuple[list[bytes], int]:
    """Vectors of length 1 as little-endian fp32, in the texts' order, and the tokens read.

    At most EMBED_TEXTS_PER_ASK texts. Raises Trouble, Garbled, PeerFailed.
    """
    assert 0 < len(texts) <= min(EMBED_TEXTS_PER_ASK, TEXTS_MAX)
    body = {"model": model_id, "input": list(texts)}
    content = await server.post("/v1/embeddings", body, within_s=within_s, bytes_max=VECTORS_BYTES_MAX)
    try:
        told = msgspec.json.decode(content, type=_Vectors)
    except (ValueError, RecursionError) as exc:
        raise Garbled(f"its vectors cannot be read: {str(exc)[:200]}") from exc
    placed = {position if row.index is None else row.index: row for position, row in enumerate(told.data)}
    rows = [placed[position] for position in range(len(texts)) if position in placed]
    if not len(rows) == len(told.data) == len(texts):
        raise Garbled(f"{len(told.data)} vectors came for {len(texts)} texts, or not one for each")
    sizes = {len(row.embedding) for row in rows}
    if len(sizes) != 1 or not 1 <= max(sizes) <= DIMENSIONS_MAX:
        raise Garbled(f"vectors of {sorted(sizes)[:5]} dimensions came, wanted one length")
    tokens = told.usage.prompt_tokens if told.usage is not None else 0
    return [unit(row.embedding) for row in rows], max(0, tokens)


def unit(vector: list[float]) -> bytes:
    """A vector at length 1, as little-endian fp32. Raises PeerFailed for one that has no direction."""
    length = math.hypot(*vector)
    if not 0.0 < length < float("inf"):
        raise PeerFailed("the server behind this node made a vector that is zero or not finite")
    return struct.pack(f"<{len(vector)}f", *(value / length for value in vector))
