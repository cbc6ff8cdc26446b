"""The functions of a chat that the node itself answers: its self-report, and for its operator what it remembers.

Rules: only where the operator has said --self-report, only for a request that names the function among its tools, and
only for who may read the same over HTTP. The node puts its own description in place of the client's, answers the
model's call from its records, and has the model go on, ROUNDS_MAX times at most; the client sees text, and the calls of
its own functions. A call beside one of the client's is left out: the client answers, and the model may call again. The
records go to no peer: such a request is answered by this node's own model. Called by tool_choice, the report is the
answer, word for word, without any model.
Source: OpenAI API reference, "Create chat completion" (tools, tool_choice).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec
import trio
from starlette.requests import Request

from node.errors import BadRequest, RequestError
from node.front import Front, Route, RouteHint
from node.self_face import SelfFace
from node.self_report import RECALL, REPORT, TOOLS, about_of, question_of, recalled, report
from node.tool_calls import Reading
from node.tools import ToolCall, Tooling
from node.web.asker import asker_of
from node.web.caller import Caller, Need
from node.web.door import CALLER_KEY
from node.web.errors import Forbidden
from node.web.itself import itself_of
from node.web.operator import check_is_operator
from node.work import AnswerItem, Finished, GenerateWork, Message, Piece, Started

ROUNDS_MAX: Final = 3  # calls that are answered before the model must do without
Told = AnswerItem | ToolCall


class SelfTools:
    """Looks whether a chat names the node's own functions."""

    def __init__(self, front: Front, *, is_on: bool) -> None:
        self._front = front
        self._is_on = is_on

    def of(self, request: Request, tooling: Tooling | None) -> SelfFront | None:
        """Who answers a chat that does; None: it does not, or the operator has not said so.

        Raises Forbidden, NotFound (no memory), BadRequest (asked of a peer, or what cannot be told without a model).
        """
        if not self._is_on or tooling is None:
            return None
        own = frozenset(tool.name for tool in tooling.tools if tool.name in TOOLS)
        if not own:
            return None
        caller: Caller | None = request.scope.get(CALLER_KEY)
        if caller is None or not caller.may(Need.METRICS):
            raise Forbidden(f"the function {sorted(own)[0]} wants the scope metrics", param="tools", code="lacks_scope")
        if RECALL in own:
            check_is_operator(request, Need.ADMIN, "memory", "what this node remembers is told")
        hint = asker_of(request.scope).hint
        if hint.route is Route.REMOTE or hint.peer is not None:
            raise BadRequest(
                f"the function {sorted(own)[0]} tells this node's records, which go to no peer: "
                "leave out x-route and x-peer, or the function",
                param="x-route",
            )
        if tooling.function == RECALL:
            raise BadRequest(
                f"tool_choice names {RECALL}, and what is to be recalled is for the model to say: let it choose, or "
                "ask GET /api/v1/memory?q=",
                param="tool_choice",
            )
        return SelfFront(self._front, itself_of(self._front), own, tooling)


@dataclass(slots=True)
class _Spent:
    """What the rounds of one answer have cost so far."""

    prompt: int = 0
    made: int = 0


class SelfFront:
    """The Front of one chat whose model may call the node's own functions. All else is asked of the front itself."""

    def __init__(self, front: Front, itself: SelfFace, own: frozenset[str], tooling: Tooling) -> None:
        self._front = front
        self._itself = itself
        self._own = own
        told = tuple(TOOLS[tool.name] if tool.name in own else tool for tool in tooling.tools)
        self._tooling = msgspec.structs.replace(tooling, tools=told)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._front, name)

    @asynccontextmanager
    async def answer(self, work: GenerateWork, route: RouteHint) -> AsyncIterator[AsyncIterator[Told]]:
        """See node.front.Front; the client's calls come as such among the items. The work's tools are left as they
        are: who asks here takes no calls out of the text."""
        send, receive = trio.open_memory_channel[Told | RequestError](0)
        failed: RequestError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._run, work, replace(route, route=Route.LOCAL), send)
            try:
                async with receive:
                    yield _items(receive)
            except RequestError as exc:  # the nursery would wrap it
                failed = exc
            nursery.cancel_scope.cancel()
        if failed is not None:
            raise failed

    async def _run(
        self, work: GenerateWork, route: RouteHint, told: trio.MemorySendChannel[Told | RequestError]
    ) -> None:
        async with told:
            try:
                if self._tooling.function == REPORT:
                    await self._report(told)
                else:
                    await self._rounds(msgspec.structs.replace(work, tools=self._tooling, keep=False), route, told)
            except RequestError as exc:
                await told.send(exc)

    async def _report(self, told: trio.MemorySendChannel[Told | RequestError]) -> None:
        """The answer without a model."""
        served_by = str(self._front.status()["node"]["peer_id"])
        await told.send(Started(served_by=served_by, model=REPORT, revision="records", prompt_tokens=0))
        await told.send(Piece(tokens=(), text=report(self._itself.told())))
        await told.send(Finished(reason="stop", prompt_tokens=0, completion_tokens=0))

    async def _rounds(
        self, work: GenerateWork, route: RouteHint, told: trio.MemorySendChannel[Told | RequestError]
    ) -> None:
        spent, began, left = _Spent(), trio.current_time(), work
        for number in range(ROUNDS_MAX + 1):
            if number == ROUNDS_MAX:
                left = msgspec.structs.replace(left, tools=self._without())
            call, said = await self._round(left, route, told, spent, number)
            tokens = work.sampling.max_tokens - spent.made
            if call is None:
                return
            if tokens < 1:
                await told.send(Finished(reason="length", prompt_tokens=spent.prompt, completion_tokens=spent.made))
                return
            assert left.messages is not None, "a chat"
            elapsed_ms = int((trio.current_time() - began) * 1000)
            left = msgspec.structs.replace(
                left,
                request_id=f"{work.request_id}-{number + 1}",  # so that its calls have other ids
                messages=(
                    *left.messages,
                    Message(role="assistant", content=said, tool_calls=(call,)),
                    Message(role="tool", content=await self._answered(call), tool_call_id=call.id),
                ),
                tools=None if left.tools is None else msgspec.structs.replace(left.tools, choice="auto", function=None),
                sampling=msgspec.structs.replace(work.sampling, max_tokens=tokens),
                remaining_ms=max(1, work.remaining_ms - elapsed_ms),
            )

    async def _round(
        self,
        work: GenerateWork,
        route: RouteHint,
        told: trio.MemorySendChannel[Told | RequestError],
        spent: _Spent,
        number: int,
    ) -> tuple[ToolCall | None, str]:
        """One answer of the model's: the call that the node is to answer, and what was said before. None: it was the
        last, and has been told to its end, if it had one."""
        reading, mine, others, said = Reading(work), list[ToolCall](), 0, list[str]()
        finished: Finished | None = None
        async with self._front.answer(work, route) as items:
            async for item in items:
                for part in reading.take(item):
                    match part:
                        case ToolCall() if part.name in self._own:
                            mine.append(part)
                        case Finished():
                            finished = part
                        case Started() if number:
                            pass
                        case _:
                            others += isinstance(part, ToolCall)
                            said += [part.text] if isinstance(part, Piece) else []
                            await told.send(part)
        if finished is None:
            return None, ""  # who asks says that it stopped without an end
        spent.prompt, spent.made = spent.prompt + finished.prompt_tokens, spent.made + finished.completion_tokens
        if mine and not others and finished.reason == "stop" and number < ROUNDS_MAX:
            return mine[0], "".join(said)
        end = Finished(reason=finished.reason, prompt_tokens=spent.prompt, completion_tokens=spent.made)
        await told.send(end)
        return None, ""

    def _without(self) -> Tooling | None:
        """The client's functions alone."""
        left = tuple(tool for tool in self._tooling.tools if tool.name not in self._own)
        return msgspec.structs.replace(self._tooling, tools=left, choice="auto", function=None) if left else None

    async def _answered(self, call: ToolCall) -> str:
        """Raises RequestError."""
        if call.name == REPORT:
            return report(self._itself.told(), about_of(call))
        question = question_of(call)
        if question is None:
            return "Nothing was asked: call it with a query of words."
        return recalled(await self._itself.recall(question))


async def _items(receive: trio.MemoryReceiveChannel[Told | RequestError]) -> AsyncIterator[Told]:
    async for item in receive:
        if isinstance(item, RequestError):
            raise item
        yield item
