"""The routes that make text: /v1/chat/completions, /v1/completions, /api/v1/model/inference.

Rules: one GenerateWork per answer; answer i of a request has its seed plus i, so that the whole can be made again.
A request that names no seed draws one. A request that names no token limit gets the default, but at most half of
the model's context, so that a small model does not refuse what nobody asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from node.errors import BadRequest
from node.front import Front
from node.web.answers import gather, unless_gone
from node.web.asker import asker_of
from node.web.door import REQUEST_ID_KEY, read_body
from node.web.embeddings import Embeddings
from node.web.schema import (
    CHAT_TOKENS_DEFAULT,
    CHOICES_MAX,
    COMPLETION_TOKENS_DEFAULT,
    ChatRequest,
    CompletionRequest,
    Defaults,
    Generation,
    InferenceRequest,
    Prompt,
    messages_of,
    parse,
    prompts_of,
)
from node.web.self_tools import SelfTools
from node.web.shapes import Answer, ChatShape, CompletionShape, Head, usage_of
from node.web.sse import EventStream, StreamRequest, served_headers
from node.web.writer import AnswerWriter, ChunkWriter
from node.work import TEXTS_MAX, GenerateWork


class Generations:
    """See the module."""

    def __init__(
        self,
        front: Front,
        rng: Random,
        embeddings: Embeddings,
        defaults: Defaults | None = None,
        *,
        self_tools: SelfTools | None = None,
    ) -> None:
        """self_tools: who looks for the node's own functions in chats; None: they are any function."""
        self._front = front
        self._self_tools = self_tools
        self._defaults = defaults or Defaults()
        self._rng = rng
        self._embeddings = embeddings

    async def chat(self, request: Request) -> ASGIApp:
        asked = parse(await read_body(request.scope, request.receive), ChatRequest)
        logprobs = asked.logprobs_asked()
        tooling = asked.tooling()
        own = None if self._self_tools is None else self._self_tools.of(request, tooling)
        prompts = [{"messages": messages_of(asked.messages), "tools": tooling if own is None else None}]
        works = self.works(request, asked, prompts, tokens_default=CHAT_TOKENS_DEFAULT, logprobs=logprobs)
        writer = ChunkWriter(shape=ChatShape(logprobs=asked.logprobs, n=asked.n), include_usage=asked.usage_in_stream())
        front = None if own is None else cast(Front, own)
        return await self.answer(request, works, writer, stream=asked.stream, front=front)

    async def completions(self, request: Request) -> ASGIApp:
        asked = parse(await read_body(request.scope, request.receive), CompletionRequest)
        texts = prompts_of(asked.prompt, "prompt", count_max=CHOICES_MAX, empty_allowed=True)
        prompts = [_prompt_field(text) for text in texts]
        works = self.works(request, asked, prompts, tokens_default=COMPLETION_TOKENS_DEFAULT, logprobs=asked.logprobs)
        shape = CompletionShape(logprobs=asked.logprobs is not None, n=asked.n)
        writer = ChunkWriter(shape=shape, include_usage=asked.usage_in_stream())
        return await self.answer(request, works, writer, stream=asked.stream)

    async def inference(self, request: Request) -> Response:
        """Text or embeddings, by the kind of the model."""
        began_s = time.monotonic()
        asked = parse(await read_body(request.scope, request.receive), InferenceRequest)
        if asked.n > 1:
            raise BadRequest("n is not offered here; send the text several times", param="n")
        several = isinstance(asked.text, list)
        texts = prompts_of(asked.text, "text", count_max=TEXTS_MAX)
        if self._kind(asked.model_asked()) == "encoder":
            told, headers = await self._embeddings.inference(request, asked.model_asked(), texts, several=several)
        else:
            told, headers = await self._inference_text(request, asked, texts, several=several)
        told["latency_ms"] = round((time.monotonic() - began_s) * 1000, 3)
        return Response(msgspec.json.encode(told), 200, headers, media_type="application/json")

    async def _inference_text(
        self, request: Request, asked: InferenceRequest, texts: Sequence[Prompt], *, several: bool
    ) -> tuple[dict[str, Any], dict[str, str]]:
        works = self.works(
            request, asked, [_prompt_field(text) for text in texts], tokens_default=CHAT_TOKENS_DEFAULT, logprobs=None
        )
        answers = await self._gather(request, works, self._front)
        made = ["".join(answer.text) for answer in answers]
        reasons = [answer.finished.reason if answer.finished else None for answer in answers]
        told = {
            "model": _each(one.started.model for one in answers if one.started),
            "revision": _each(one.started.revision for one in answers if one.started),
            "model_type": "causal",
            "text": made if several else made[0],
            "finish_reason": reasons if several else reasons[0],
            "truncated": [False] * len(answers) if several else False,  # a prompt that does not fit is an error
            "usage": usage_of(answers),
            "served_by": _each(one.started.served_by for one in answers if one.started),
        }
        return told, served_headers(answers)

    async def answer(
        self,
        request: Request,
        works: Sequence[GenerateWork],
        writer: AnswerWriter,
        *,
        stream: bool,
        front: Front | None = None,
    ) -> ASGIApp:
        """The response to a request: as it comes, or whole. front: who answers, if not all requests' front.

        Raises RequestError, ClientGone."""
        request_id, front = request.scope[REQUEST_ID_KEY], front or self._front
        if stream:
            asker = asker_of(request.scope)
            wanted = StreamRequest(
                request_id=request_id, works=works, hint=asker.hint, writer=writer, deadline_s=asker.deadline_s
            )
            return EventStream(front, wanted)
        answers = await self._gather(request, works, front)
        started = answers[0].started
        assert started is not None, "the node told of an answer before Started"
        head = Head(request_id=request_id, created_s=int(time.time()), model=started.model, revision=started.revision)
        headers = {**served_headers(answers), **writer.headers(head)}
        return Response(writer.whole(head, answers), 200, headers, media_type="application/json")

    async def _gather(self, request: Request, works: Sequence[GenerateWork], front: Front) -> list[Answer]:
        asker = asker_of(request.scope)
        return await unless_gone(request.receive, lambda: gather(front, works, asker.hint), deadline_s=asker.deadline_s)

    def works(
        self,
        request: Request,
        asked: Generation,
        prompts: Sequence[dict[str, Any]],
        *,
        tokens_default: int,
        logprobs: int | None,
    ) -> list[GenerateWork]:
        """One a prompt and choice, in order. `prompts`: for each the field of GenerateWork that holds it. Raises
        BadRequest."""
        count = len(prompts) * asked.n
        if count > CHOICES_MAX:
            raise BadRequest(
                f"{len(prompts)} prompts with n = {asked.n} make {count} answers, at most {CHOICES_MAX} at a time",
                param="n",
            )
        asker = asker_of(request.scope)  # a bad header is found before any work is made
        asked = self._defaults.applied(asked)
        is_repeatable = asked.temperature == 0 or asked.seed is not None
        request_id, seed = request.scope[REQUEST_ID_KEY], self._rng.getrandbits(62)
        tokens = self._tokens_default(asked.model_asked(), self._defaults.max_tokens or tokens_default)
        return [
            GenerateWork(
                request_id=request_id if count == 1 else f"{request_id}-{index}",
                model=asked.model_asked(),
                sampling=asked.sampling(index=index, seed=seed, tokens_default=tokens, logprobs=logprobs),
                remaining_ms=max(1, int(asker.deadline_s * 1000)),
                private=asker.private,
                keep=asker.keeps and is_repeatable,
                **prompts[index // asked.n],
            )
            for index in range(count)
        ]

    def _tokens_default(self, model: str | None, wanted: int) -> int:
        name = model or self._front.default_model("causal")
        contexts = [row.context_tokens for row in self._front.models() if row.id == name and row.context_tokens > 0]
        return max(1, min(wanted, *(context // 2 for context in contexts))) if contexts else wanted

    def _kind(self, model: str | None) -> str:
        """What a model does; of one that nobody serves, causal, so that its error comes from the node."""
        if model is None:
            return "encoder" if self._front.default_model("causal") is None else "causal"
        return next((row.kind for row in self._front.models() if row.id == model), "causal")


def _each(names: Iterable[str]) -> str:
    """Each name once: several texts may be answered by several peers, under several revisions of one model."""
    return ", ".join(dict.fromkeys(names))


def _prompt_field(prompt: Prompt) -> dict[str, Any]:
    return {"text": prompt} if isinstance(prompt, str) else {"tokens": prompt}
