"""The routes of sealed requests: pass one on to the peer that it is for, and say what key to seal to.

Rules: what passes is opaque here, and nothing of it is kept or logged. The answer is frames, each after its length in 4
bytes, big endian; length 0 is a sign of life. The head is held until the peer's first frame, so that what fails before
is a plain HTTP error; what fails later is a last frame of kind KIND_RELAY with the same JSON. When the client goes, the
work is cancelled at once.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from crypto.identity import PEER_ID_CHARS_MAX
from crypto.sealing import KEY_BYTES, KIND_LAST, REQUEST_ID_BYTES
from node.errors import PeerFailed, RequestError, WrongSealingKey
from node.front import Front
from node.sealed import KIND_RELAY, SEALED_BYTES_MAX, SEALED_BYTES_MIN, SealedCall, base64_of
from node.web.answers import GRACE_S, out_of_time, unless_gone, wait_gone
from node.web.asker import asker_of
from node.web.door import REQUEST_ID_KEY, read_body
from node.web.errors import error_answer, error_object
from node.web.schema import parse
from node.web.schema_sealed import SealedRequest

LENGTH_BYTES = 4  # before each frame
CONTENT_TYPE = "application/vnd.openagi.sealed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What to pass on, to whom, for which client, and within which time."""

    call: SealedCall
    peer: str
    account: str
    deadline_s: float


class Sealed:
    """See the module."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def key(self, request: Request) -> Response:
        """A peer's present sealing key, as its identity signed it."""
        peer = request.path_params["peer"][: PEER_ID_CHARS_MAX + 1]
        deadline_s = asker_of(request.scope).deadline_s
        await read_body(request.scope, request.receive)
        statement = await unless_gone(request.receive, lambda: self._front.sealing_key(peer), deadline_s=deadline_s)
        told = {"peer": peer, "statement": base64.b64encode(statement).decode()}
        return Response(msgspec.json.encode(told), 200, {"cache-control": "no-store"}, "application/json")

    async def sealed(self, request: Request) -> ASGIApp:
        asker = asker_of(request.scope)
        asked = parse(await read_body(request.scope, request.receive), SealedRequest)
        call = SealedCall(
            request_id=base64_of(asked.request_id, "request_id", least=REQUEST_ID_BYTES, most=REQUEST_ID_BYTES),
            key=base64_of(asked.key, "key", least=KEY_BYTES, most=KEY_BYTES),
            sealed=base64_of(asked.sealed, "sealed", least=SEALED_BYTES_MIN, most=SEALED_BYTES_MAX),
            remaining_ms=max(1, int(asker.deadline_s * 1000)),
        )
        errand = Errand(call=call, peer=asked.peer, account=asker.hint.account, deadline_s=asker.deadline_s)
        return SealedStream(self._front, errand)


class SealedStream:
    """An ASGI response: the frames of one sealed answer."""

    def __init__(self, front: Front, errand: Errand) -> None:
        self._front, self._errand = front, errand
        self._head_sent = False
        self._is_whole = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass frames on to the end. Returns early, the work cancelled, when the client goes away."""

        async def watch(cancel_scope: trio.CancelScope) -> None:
            await wait_gone(receive)
            cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, nursery.cancel_scope)
            error: RequestError | None = None
            with trio.move_on_after(self._errand.deadline_s + GRACE_S) as limit:
                error = await self._pass_on(send)
            if limit.cancelled_caught:
                error = out_of_time(self._errand.deadline_s)
            await self._finish(send, error, scope[REQUEST_ID_KEY])
            nursery.cancel_scope.cancel()

    async def _pass_on(self, send: Send) -> RequestError | None:
        errand = self._errand
        try:
            async with self._front.sealed(errand.call, errand.peer, errand.account) as frames:
                async for frame in frames:
                    await self._send(send, frame)
                    self._is_whole = frame[:1] == bytes((KIND_LAST,))
        except RequestError as exc:
            return exc
        return None

    async def _send(self, send: Send, frame: bytes) -> None:
        if not self._head_sent:
            headers = {
                "content-type": CONTENT_TYPE,
                "cache-control": "no-store",
                "x-accel-buffering": "no",  # nginx must not hold frames back
                "x-served-by": self._errand.peer,
            }
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": 200, "headers": pairs})
            self._head_sent = True
        body = len(frame).to_bytes(LENGTH_BYTES, "big") + frame
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _finish(self, send: Send, error: RequestError | None, request_id: str) -> None:
        if error is None and not self._is_whole:
            error = cut(self._errand.peer)
        if error is not None and not self._head_sent:
            status, headers, _ = error_answer(error, request_id, "")
            pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
            await send({"type": "http.response.start", "status": status, "headers": pairs})
            await send({"type": "http.response.body", "body": _told(error, request_id)})
            return
        if error is not None:
            await self._send(send, bytes((KIND_RELAY,)) + _told(error, request_id))
        await send({"type": "http.response.body", "body": b""})


def cut(peer: str) -> PeerFailed:
    """The error of an answer that stopped without its last frame."""
    return PeerFailed(f"{peer} ended the answer before its last frame; seal the request anew to ask again")


def _told(error: RequestError, request_id: str) -> bytes:
    """An error as JSON, with the peer's present key where that is what is wrong."""
    more = {}
    if isinstance(error, WrongSealingKey):
        more["sealing_key"] = base64.b64encode(error.statement).decode()
    return msgspec.json.encode({**error_object(error, request_id), **more})
