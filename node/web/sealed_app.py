"""Answers an opened request by the very routes, checks and errors that a plain one meets at the HTTP door.

Rules: no socket, no door: who asks was let in where it came from. The request's plain text says path and body; route,
account and time come from how it was brought. What the routes send becomes the sealed answer's head and body.
"""

from __future__ import annotations

import secrets
from random import Random
from typing import Any

import trio
from starlette.types import Message

from node.errors import RequestError
from node.front import Front
from node.sealed import SealedHead, SealedText, read_text
from node.sealed_serving import Reply, SealedAsk
from node.web.app import application, work_routes
from node.web.asker import DEADLINE_S_MAX, SEALED_KEY
from node.web.door import COUNTS_KEY, REQUEST_ID_KEY, WebCounts
from node.web.embeddings import Embeddings
from node.web.errors import error_answer
from node.web.generation import Generations
from node.web.schema import Defaults


class SealedApp:
    """Implements node.sealed_serving.Answerer."""

    def __init__(self, front: Front, rng: Random, defaults: Defaults) -> None:
        """defaults: what requests get that do not say, as at the HTTP door."""
        embeddings = Embeddings(front)
        self._app = application(work_routes(Generations(front, rng, embeddings, defaults), embeddings))
        self._counts = WebCounts()

    async def __call__(self, ask: SealedAsk, reply: Reply) -> None:
        """Answer in full: also an error is an answer, and has its last part. If cancelled, it has none."""
        request_id = f"req-{secrets.token_hex(12)}"
        try:
            text = read_text(ask.content)
        except RequestError as exc:
            status, headers, body = error_answer(exc, request_id, "")
            await reply.head(SealedHead(status=status, headers=headers))
            await reply.body(body, is_last=True)
            return
        exchange = _Exchange(bytes(text.body), reply)
        await self._app(self._scope(ask, text, request_id), exchange.receive, exchange.send)

    def _scope(self, ask: SealedAsk, text: SealedText, request_id: str) -> dict[str, Any]:
        seconds = min(max(ask.deadline_s, 0.001), DEADLINE_S_MAX)
        headers = {"x-private": str(text.private).lower(), "x-timeout-s": f"{seconds:.3f}"}
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": text.path,
            "raw_path": text.path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
            "client": None,
            "server": None,
            SEALED_KEY: ask.hint,
            REQUEST_ID_KEY: request_id,
            COUNTS_KEY: self._counts,
        }


class _Exchange:
    """One request and its answer, as the routes see them: the body has come, and nobody leaves."""

    def __init__(self, body: bytes, reply: Reply) -> None:
        self._body: bytes | None = body
        self._reply = reply

    async def receive(self) -> Message:
        if self._body is None:
            await trio.sleep_forever()  # who leaves has its whole answer cancelled
        await trio.lowlevel.checkpoint()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            pairs = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message["headers"]]
            await self._reply.head(SealedHead(status=message["status"], headers=dict(pairs)))
            return
        await self._reply.body(bytes(message.get("body", b"")), is_last=not message.get("more_body", False))
