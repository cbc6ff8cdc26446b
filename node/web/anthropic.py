"""The routes that Anthropic's clients ask: /v1/messages and /v1/messages/count_tokens.

Rules: tokens are counted by who would answer, with the model's own template: the request is admitted there for one
token and left as soon as its prompt is counted, so the count is the one that an answer would be told with. A server
behind a node that counts none gets the client a clear error and no guess.

Source: Claude API reference, "Create a Message", "Count tokens in a Message".
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from node.errors import BadRequest
from node.front import Front, RouteHint
from node.web.answers import unfinished, unless_gone
from node.web.asker import asker_of
from node.web.door import REQUEST_ID_KEY, read_body
from node.web.errors import ANTHROPIC_PATH
from node.web.generation import Generations
from node.web.messages_writer import MessagesWriter
from node.web.schema import parse
from node.web.schema_anthropic import Conversation, MessagesRequest
from node.work import Finished, GenerateWork, Sampling, Started


class Anthropic:
    """See the module."""

    def __init__(self, front: Front, generations: Generations) -> None:
        self._front = front
        self._generations = generations

    def routes(self) -> list[Route]:
        return [
            Route(ANTHROPIC_PATH, self.messages, methods=["POST"]),
            Route(f"{ANTHROPIC_PATH}/count_tokens", self.count_tokens, methods=["POST"]),
        ]

    async def messages(self, request: Request) -> ASGIApp:
        asked = parse(await read_body(request.scope, request.receive), MessagesRequest)
        prompts = [{"messages": asked.turns(), "tools": asked.tooling()}]
        works = self._generations.works(
            request, asked.generation(), prompts, tokens_default=asked.max_tokens, logprobs=None
        )
        return await self._generations.answer(request, works, MessagesWriter(), stream=asked.stream)

    async def count_tokens(self, request: Request) -> Response:
        asked = parse(await read_body(request.scope, request.receive), Conversation)
        asker, request_id = asker_of(request.scope), request.scope[REQUEST_ID_KEY]
        work = GenerateWork(
            request_id=request_id,
            model=asked.model_asked(),
            messages=asked.turns(),
            tools=asked.tooling(),
            sampling=Sampling(max_tokens=1, temperature=0.0),
            remaining_ms=max(1, int(asker.deadline_s * 1000)),
            private=asker.private,
        )
        started, tokens = await unless_gone(
            request.receive, lambda: self._counted(work, asker.hint), deadline_s=asker.deadline_s
        )
        if not tokens:
            raise BadRequest(
                f"the server behind {started.served_by} counts no tokens of prompts; another peer may (x-peer), and "
                "every answer says in its usage what it was charged",
                param="model",
            )
        headers = {
            "request-id": request_id,
            "x-served-by": started.served_by,
            "x-model-revision": started.revision,
        }
        return Response(b'{"input_tokens":%d}' % tokens, 200, headers, media_type="application/json")

    async def _counted(self, work: GenerateWork, hint: RouteHint) -> tuple[Started, int]:
        """Who counted, and how many; 0 when nobody did. The work is left at once. Raises RequestError."""
        started: Started | None = None
        async with self._front.answer(work, hint) as items:
            async for item in items:
                if isinstance(item, Started):
                    started = item
                    if item.prompt_tokens:
                        return item, item.prompt_tokens
                elif isinstance(item, Finished) and started is not None:
                    return started, item.prompt_tokens
        raise unfinished(work)
