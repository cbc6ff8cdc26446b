"""The route of OpenAI's Responses: POST /v1/responses. Nothing is stored, so there is none to get or delete.

Source: OpenAI API reference, "Create a model response".
"""

from __future__ import annotations

from typing import NoReturn

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import ASGIApp

from node.web.door import read_body
from node.web.errors import NotFound
from node.web.generation import Generations
from node.web.responses_writer import ResponsesWriter
from node.web.schema import CHAT_TOKENS_DEFAULT, parse
from node.web.schema_responses import ResponsesRequest

PATH = "/v1/responses"


class Responses:
    """See the module."""

    def __init__(self, generations: Generations) -> None:
        self._generations = generations

    def routes(self) -> list[Route]:
        return [
            Route(PATH, self.create, methods=["POST"]),
            Route(PATH + "/{rest:path}", self.stored, methods=["GET", "DELETE", "POST"]),
        ]

    async def create(self, request: Request) -> ASGIApp:
        asked = parse(await read_body(request.scope, request.receive), ResponsesRequest)
        logprobs = asked.logprobs_asked()
        prompts = [{"messages": asked.turns(), "tools": asked.tooling()}]
        works = self._generations.works(
            request, asked.generation(), prompts, tokens_default=CHAT_TOKENS_DEFAULT, logprobs=logprobs
        )
        choice = asked.tool_choice
        repeated = {
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "temperature": asked.temperature,
            "tool_choice": "auto" if choice is None else choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "user": asked.user,
        }
        return await self._generations.answer(request, works, ResponsesWriter(asked=repeated), stream=asked.stream)

    async def stored(self, request: Request) -> NoReturn:
        """What needs a store. Raises NotFound."""
        raise NotFound(
            f"there is no {request.method} {request.url.path[:200]}: this node stores no responses; only POST {PATH} "
            "is offered, with the whole conversation as input"
        )
