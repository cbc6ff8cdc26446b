"""Runs the answers of one HTTP request: several at a time, one clear end, and none once the client has gone.

Rules: Hypercorn only queues `http.disconnect`, it cancels nothing, and Starlette's `is_disconnected` is never true
under Trio; so whoever works for a client watches `receive` beside the work. The first RequestError of any answer
ends the others and is the request's one end. A deadline backs up the node's own by GRACE_S.

Source: Hypercorn 0.18 hypercorn/trio/tcp_server.py, hypercorn/protocol/http_stream.py; pgjones/hypercorn#210.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import trio
from starlette.types import Receive

from node.errors import DeadlinePassed, InternalError, RequestError
from node.front import Front, RouteHint
from node.tool_calls import Reading
from node.tools import ToolCall
from node.web.shapes import Answer
from node.work import AnswerItem, Finished, GenerateWork

GRACE_S = 2.0  # the node's own deadline error comes first and says more
ITEMS_QUEUED_MAX = 64  # between the answers and a slow client; then the answers wait

Result = TypeVar("Result")
# index of the answer, and what came of it
Told = tuple[int, AnswerItem | ToolCall | RequestError]


class ClientGone(Exception):
    """The client has closed its connection: there is nobody to answer, and nothing is sent."""


async def wait_gone(receive: Receive) -> None:
    """Return when the client has closed the connection. The request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(receive: Receive, work: Callable[[], Awaitable[Result]], *, deadline_s: float) -> Result:
    """Do the work, cancelled at once when the client goes away or the time is over.

    Raises: ClientGone, DeadlinePassed, and RequestError from the work.
    """
    result: Result | None = None
    error: RequestError | None = None
    done = gone = False

    async def watch(scope: trio.CancelScope) -> None:
        nonlocal gone
        await wait_gone(receive)
        gone = True
        scope.cancel()

    with trio.move_on_after(deadline_s + GRACE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            try:
                result = await work()
                done = True
            except RequestError as exc:
                error = exc
            nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    if done:
        return result  # type: ignore[return-value]  # done says that it is a Result
    if gone:
        raise ClientGone
    raise out_of_time(deadline_s)


def out_of_time(deadline_s: float) -> DeadlinePassed:
    """The error of an answer that took longer than the client gave it."""
    return DeadlinePassed(f"no complete answer within {deadline_s:g} s; ask for fewer tokens, or raise x-timeout-s")


async def gather(front: Front, works: Sequence[GenerateWork], hint: RouteHint) -> list[Answer]:
    """All answers, whole. Raises the first RequestError; the others are then cancelled."""
    now = trio.current_time()
    answers = [Answer(index=index, asked_s=now) for index in range(len(works))]
    failed: list[RequestError] = []

    async def collect(answer: Answer, work: GenerateWork, scope: trio.CancelScope) -> None:
        reading = Reading(work)
        try:
            async with front.answer(work, hint) as items:
                async for item in items:
                    for told in reading.take(item):
                        answer.take(told, trio.current_time())
            if answer.finished is None:
                raise unfinished(work)
        except RequestError as exc:
            failed.append(exc)
            scope.cancel()

    async with trio.open_nursery() as nursery:
        for answer, work in zip(answers, works, strict=True):
            nursery.start_soon(collect, answer, work, nursery.cancel_scope)
    if failed:
        raise failed[0]
    return answers


async def feed(
    front: Front, index: int, work: GenerateWork, hint: RouteHint, told: trio.MemorySendChannel[Told]
) -> None:
    """Send one answer's items, its calls among them, in order, ending in its Finished or its error. Closes `told`."""
    reading = Reading(work)
    async with told:
        try:
            async with front.answer(work, hint) as items:
                finished = False
                async for item in items:
                    finished = finished or isinstance(item, Finished)
                    for part in reading.take(item):
                        await told.send((index, part))
            if not finished:
                raise unfinished(work)
        except RequestError as exc:
            await told.send((index, exc))


def unfinished(work: GenerateWork) -> InternalError:
    """An answer that stopped without its end: a bug, never passed on as a complete answer."""
    return InternalError(f"the answer of {work.request_id} stopped without an end; please report it with the log")
