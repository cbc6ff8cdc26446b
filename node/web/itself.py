"""The routes of the node's own state and memory: /api/v1/self, /api/v1/memory.

Rules: they parse, ask node/self_face.py, and shape what came. The state is for who may read figures; the memory for the
operator alone, at this machine or by an ADMIN key (node/web/operator.py): it holds what people wrote. A walk over the
chain takes minutes for a million events: its answer begins after BEGIN_S and has white space, which JSON allows before
a value, every KEEP_ALIVE_S until the walk is over, so that nothing between takes it for dead; a walk that fails after
its answer has begun ends it with the error's object. It ends when its client leaves. WALKS_MAX at a time.
Source: SELF.md, "Surface"; RFC 8259 section 2 (white space).
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from node.errors import NoRoom, RequestError
from node.front import Front
from node.self_face import Question, SelfFace
from node.web.answers import wait_gone
from node.web.caller import Need
from node.web.door import REQUEST_ID_KEY, read_body
from node.web.errors import NotFound, error_answer, error_object
from node.web.operator import check_is_operator
from node.web.schema import parse
from node.web.schema_itself import ForgetAsked, HistoryAsked, NoteRequest, NothingAsked, RecallAsked, asked_of

BEGIN_S: Final = 5.0  # so long a walk's end decides the status; a proxy waits 30 s and more for a head
KEEP_ALIVE_S: Final = 10.0  # as sse.py
WALKS_MAX: Final = 1  # it reads the whole file, in the thread that remembers
WALK_RETRY_S: Final = 10.0
NO_MEMORY: Final = "this node keeps no memory (--no-memory): start it without that, and ask again"
HEADERS: Final = {"content-type": "application/json", "cache-control": "no-store"}


class Itself:
    """See the module."""

    def __init__(self, front: Front) -> None:
        self._front = front
        self._walks = 0

    async def told(self, request: Request) -> Response:
        """GET /api/v1/self."""
        asked_of(request.query_params.multi_items(), NothingAsked)
        return _json(itself_of(self._front).told())

    async def history(self, request: Request) -> Response:
        """GET /api/v1/self/history."""
        asked = asked_of(request.query_params.multi_items(), HistoryAsked)
        return _json(await itself_of(self._front).history(tuple(dict.fromkeys(asked.path)), asked.n))

    async def recall(self, request: Request) -> Response:
        """GET /api/v1/memory."""
        _check_is_operator(request)
        asked = asked_of(request.query_params.multi_items(), RecallAsked)
        question = Question(query=asked.q, kind=asked.kind, subject=asked.subject, by=asked.by, n=asked.n)
        return _json({"events": await itself_of(self._front).recall(question)})

    async def note(self, request: Request) -> Response:
        """POST /api/v1/memory."""
        _check_is_operator(request)
        asked = parse(await read_body(request.scope, request.receive), NoteRequest)
        return _json({"id": await itself_of(self._front).note(asked.text, asked.subject)})

    async def forget(self, request: Request) -> Response:
        """DELETE /api/v1/memory."""
        _check_is_operator(request)
        asked = asked_of(request.query_params.multi_items(), ForgetAsked)
        return _json({"forgotten": await itself_of(self._front).forget(asked.subject)})

    async def verify(self, request: Request) -> ASGIApp:
        """GET /api/v1/memory/verify. Raises NoRoom."""
        _check_is_operator(request)
        asked_of(request.query_params.multi_items(), NothingAsked)
        itself = itself_of(self._front)
        await trio.lowlevel.checkpoint()
        if request.method != "GET":
            return Response(headers=HEADERS)
        if self._walks >= WALKS_MAX:
            raise NoRoom(
                f"as many walks over the memory are under way as may be (WALKS_MAX {WALKS_MAX}): wait for it to end",
                retry_after_s=WALK_RETRY_S,
            )
        return _Walk(self, itself)


class _Walk:
    """An ASGI response: what a walk over the chain finds."""

    def __init__(self, owner: Itself, itself: SelfFace) -> None:
        self._owner = owner
        self._itself = itself
        self._found: dict[str, Any] | RequestError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Walk and tell; given up when the client leaves."""

        async def watch(cancel_scope: trio.CancelScope) -> None:
            await wait_gone(receive)
            cancel_scope.cancel()

        self._owner._walks += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, nursery.cancel_scope)
                ended = trio.Event()
                nursery.start_soon(self._walk, ended)
                await self._tell(scope, ended, send)
                nursery.cancel_scope.cancel()
        finally:
            self._owner._walks -= 1

    async def _walk(self, ended: trio.Event) -> None:
        try:
            self._found = await self._itself.verify()
        except RequestError as exc:
            self._found = exc
        ended.set()

    async def _tell(self, scope: Scope, ended: trio.Event, send: Send) -> None:
        with trio.move_on_after(BEGIN_S):
            await ended.wait()
        request_id = scope[REQUEST_ID_KEY]
        if isinstance(self._found, RequestError):
            status, headers, body = error_answer(self._found, request_id, scope["path"])
            await _send(send, status, headers, body)
            return
        if self._found is not None:
            await _send(send, 200, HEADERS, msgspec.json.encode(self._found))
            return
        await _begin(send, 200, HEADERS)
        while not ended.is_set():
            await send({"type": "http.response.body", "body": b"\n", "more_body": True})
            with trio.move_on_after(KEEP_ALIVE_S):
                await ended.wait()
        found = self._found
        told = error_object(found, request_id) if isinstance(found, RequestError) else found
        await send({"type": "http.response.body", "body": msgspec.json.encode(told)})


def itself_of(front: Front) -> SelfFace:
    """What the node knows of itself. Raises NotFound: it keeps no memory."""
    itself = front.itself
    if itself is None:
        raise NotFound(NO_MEMORY)
    return itself


def _check_is_operator(request: Request) -> None:
    """Raises Forbidden."""
    check_is_operator(request, Need.ADMIN, "memory", "what this node remembers is read and changed")


async def _begin(send: Send, status: int, headers: dict[str, str]) -> None:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


async def _send(send: Send, status: int, headers: dict[str, str], body: bytes) -> None:
    await _begin(send, status, {**headers, "content-length": str(len(body))})
    await send({"type": "http.response.body", "body": body})


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
