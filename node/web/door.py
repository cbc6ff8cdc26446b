"""The outermost ASGI application: who may ask, how large and slow a body may be, and a request id for all.

Rules: it stands before routing, so that nothing is parsed for a foreign page. A Host that is a name, and not one of
ours, is DNS rebinding; an Origin that is not the Host is another site's script. A body is counted before it is kept,
and has one deadline from first to last byte. A response that leaves a body unread is followed by a short drain:
closing with bytes unread would reset the connection and take our own error message with it.

Pages of the origins that the operator named are answered with CORS headers; no cookie is ever used, so none is allowed.

Source: SECURITY.md C4, F12, F13; RFC 9112 section 9.6 (lingering close); WHATWG Fetch, "Origin header", "CORS
protocol"; WICG Private Network Access (a public page that asks a node on loopback).
"""

from __future__ import annotations

import ipaddress
import logging
import re
import secrets
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from node.errors import BadRequest, RequestError, TooLarge
from node.web.answers import ClientGone
from node.web.errors import Forbidden, Limited, SlowBody, error_answer

BODY_BYTES_MAX = 1 << 20
BODY_S_MAX = 20.0  # 1 MiB in 20 s is 50 kB/s: slower than any line that could use the answer
DRAIN_BYTES_MAX = 8 << 20
DRAIN_S_MAX = 2.0
SMALL_BYTES_MAX = 64 << 10  # a body so small is read after a refusal, and the connection goes on
REQUEST_ID_KEY = "openagi.request_id"
COUNTS_KEY = "openagi.counts"
CONNECTION_KEY = "openagi.connection"  # of the connection's state: a Connection, when there is one
CALLER_KEY = "openagi.caller"  # a node.web.caller.Caller, from the gate on
PREFLIGHT_S = 600  # how long a browser need not ask again; what browsers keep at most is two hours
ASKED_HEADERS_MAX = 2_000  # characters of header names in a preflight
TOLD_HEADERS = "x-request-id, x-served-by, x-model-revision, x-cache, retry-after"

_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]+")

log = logging.getLogger("node.web")


@dataclass(slots=True)
class WebCounts:
    """Counts since start; every refusal has a reason."""

    requests: int = 0
    connections: int = 0  # open now
    drops: Counter[str] = field(default_factory=Counter)


class Early(Protocol):
    """See node/web/gate.py, Gate.early."""

    def __call__(self, path: str, headers: dict[str, str]) -> Limited | None: ...


class Connection(Protocol):
    """A connection as the door knows it. is_answering: its request is here, and it waits for us, not we for it."""

    is_answering: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DoorConfig:
    """Names and pages that may ask beside loopback and IP addresses (which no DNS answer can rebind)."""

    hosts: frozenset[str] = frozenset()  # host names, lower case, without port
    origins: frozenset[str] = frozenset()  # as https://chat.example, exact


def host_allowed(host: str | None, names: frozenset[str]) -> bool:
    """Whether a Host header names us: an address, localhost, or one of `names`. No header: not a browser."""
    if host is None:
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost") or name in names:
        return True
    try:
        ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def origin_allowed(origin: str | None, host: str | None, origins: frozenset[str]) -> bool:
    """Whether a page may ask: our own (its Origin is our Host), or one that the operator named."""
    if origin is None or origin in origins:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return host is not None and parts.scheme in ("http", "https") and parts.netloc.lower() == host.lower()


def headers_of(scope: Scope) -> dict[str, str]:
    """Header names in lower case; of a repeated header the first counts."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1"))
    return headers


def is_small(length: str) -> bool:
    """Whether a declared content-length is so small that the body may be read after a refusal."""
    return length.isdecimal() and len(length) < 9 and int(length) <= SMALL_BYTES_MAX


async def read_body(scope: Scope, receive: Receive) -> bytes:
    """The whole body. Raises TooLarge, SlowBody, BadRequest (encoded), ClientGone. Cancelled: the rest is unread."""
    headers = headers_of(scope)
    if headers.get("content-encoding", "identity") != "identity":
        raise BadRequest("a compressed body came; send it as plain JSON", param="content-encoding")
    declared = headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared[:20]) > BODY_BYTES_MAX:
        raise too_large(scope)
    body = bytearray()
    with trio.move_on_after(BODY_S_MAX):
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > BODY_BYTES_MAX:
                raise too_large(scope)
            if not message.get("more_body", False):
                return bytes(body)
    scope[COUNTS_KEY].drops["slow_body"] += 1
    raise SlowBody(f"the body did not arrive within {BODY_S_MAX:.0f} s; {len(body)} bytes came")


def too_large(scope: Scope) -> TooLarge:
    scope[COUNTS_KEY].drops["body_too_large"] += 1
    return TooLarge(f"the body is over {BODY_BYTES_MAX} bytes (BODY_BYTES_MAX); send less at a time")


def new_request_id() -> str:
    """A request id, unlike all others."""
    return f"req-{secrets.token_hex(12)}"


async def refuse(scope: Scope, send: Send, error: RequestError) -> None:
    """Answer with an error, whatever of the body is unread."""
    status, headers, body = error_answer(error, scope[REQUEST_ID_KEY], scope["path"])
    headers["content-length"] = str(len(body))
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def cors_headers(origin: str) -> list[tuple[bytes, bytes]]:
    """What lets a page of this origin, which the operator named, read an answer."""
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", TOLD_HEADERS.encode()),
        (b"vary", b"origin"),
    ]


def preflight_headers(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    """The answer to a browser that asks whether a page may send these headers: any, for none is trusted unseen."""
    asked = headers.get("access-control-request-headers", "")
    told = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-max-age", str(PREFLIGHT_S).encode()),
    ]
    if 0 < len(asked) <= ASKED_HEADERS_MAX and _HEADER_NAMES.fullmatch(asked):
        told.append((b"access-control-allow-headers", asked.encode("latin-1")))
    if headers.get("access-control-request-private-network") == "true":
        told.append((b"access-control-allow-private-network", b"true"))
    return told


class Door:
    """See the module. `counts` is shared with `serve`."""

    def __init__(
        self, app: ASGIApp, config: DoorConfig, counts: WebCounts | None = None, early: Early | None = None
    ) -> None:
        """early: what says of a head alone that it is refused (node/web/gate.py); None: nothing is."""
        self.counts = counts or WebCounts()
        self._early = early
        self._app = app
        self._config = config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            self.counts.drops["websocket"] += 1
            await send({"type": "websocket.close", "code": 1008})
            return
        assert scope["type"] == "http", "serve.py starts no lifespan"
        self.counts.requests += 1
        scope[REQUEST_ID_KEY] = new_request_id()
        scope[COUNTS_KEY] = self.counts
        headers = headers_of(scope)
        exchange = _Exchange(scope, receive, send)
        refusal = self._refusal(headers)
        shared = refusal is None and headers.get("origin") in self._config.origins
        if shared:
            exchange.added += cors_headers(headers["origin"])
        if refusal is not None:
            await refuse(scope, exchange.send, refusal)
        elif shared and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await exchange.send({"type": "http.response.start", "status": 204, "headers": preflight_headers(headers)})
            await exchange.send({"type": "http.response.body", "body": b""})
        else:
            await self._app(scope, exchange.receive, exchange.send)
        exchange.end()
        if not exchange.ended:
            self.counts.drops["client_gone"] += 1
        log.debug("%s %s %s -> %s", scope[REQUEST_ID_KEY], scope["method"], scope["path"], exchange.status or "gone")

    def early(
        self, path: str, raw_headers: Iterable[tuple[bytes, bytes]]
    ) -> tuple[int, list[tuple[bytes, bytes]], bytes] | None:
        """Status, headers and body, when this head alone is refused; None: it must come in."""
        if self._early is None:
            return None
        headers = headers_of({"headers": raw_headers})
        error = None if "origin" in headers else self._early(path, headers)
        if error is None or self._refusal(headers) is not None:
            return None
        self.counts.requests += 1
        self.counts.drops[error.counter] += 1
        request_id = new_request_id()
        status, told, body = error_answer(error, request_id, path)
        told |= {"content-length": str(len(body)), "x-request-id": request_id, "x-content-type-options": "nosniff"}
        log.debug("%s refused early: %s", request_id, error.counter)
        return status, [(name.encode(), value.encode()) for name, value in told.items()], body

    def _refusal(self, headers: dict[str, str]) -> RequestError | None:
        host, origin = headers.get("host"), headers.get("origin")
        if not host_allowed(host, self._config.hosts):
            self.counts.drops["foreign_host"] += 1
            return Forbidden(
                f"the Host {_short(host)} is not this node; use its address, or allow the name by --hosts", param="host"
            )
        if not origin_allowed(origin, host, self._config.origins):
            self.counts.drops["foreign_origin"] += 1
            message = f"pages of {_short(origin)} may not use this node; allow it by --origins"
            return Forbidden(message, param="origin")
        return None


class _Exchange:
    """One request and its response, as they pass the door."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.status: int | None = None
        self.ended = False
        self.added = [(b"x-request-id", scope[REQUEST_ID_KEY].encode()), (b"x-content-type-options", b"nosniff")]
        self._receive = receive
        self._send = send
        headers = headers_of(scope)
        length = headers.get("content-length", "0")
        is_sized = "transfer-encoding" not in headers
        self._body_read = length == "0" and is_sized
        self._is_small = is_sized and is_small(length)
        self._connection: Connection | None = scope.get("state", {}).get(CONNECTION_KEY)
        self._note()

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._body_read = True
            self._note()
        return message

    def end(self) -> None:
        """The request is over; the connection may have another."""
        if self._connection is not None:
            self._connection.is_answering = False

    def _note(self) -> None:
        if self._connection is not None:
            self._connection.is_answering = self._body_read

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            closing = [] if self._body_read or self._is_small else [(b"connection", b"close")]
            message = {**message, "headers": [*message.get("headers", ()), *self.added, *closing]}
        ending = message["type"] == "http.response.body" and not message.get("more_body", False)
        if ending and not self._body_read:
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b""}
        await self._send(message)
        self.ended = self.ended or ending

    async def _drain(self) -> None:
        drained = 0
        with trio.move_on_after(DRAIN_S_MAX):
            while not self._body_read and drained < DRAIN_BYTES_MAX:
                drained += len((await self.receive()).get("body", b""))


def _short(text: str | None) -> str:
    return repr((text or "")[:100])
