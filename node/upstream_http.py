"""The door to a server behind this node: HTTP by httpx, bounded, and every way it can fail as a Trouble.

Rules: no redirect is followed, no proxy or netrc of the environment is used, nothing compressed is taken. The key goes
into one header and nowhere else: no error, log or status has it. A body has a bound, a stream's lines have one
(node/upstream_stream.py). How long a stream may be silent is its reader's to say; everything else has a time here.
Source: httpx docs "Async support" (Trio), "Timeouts"; RFC 9110 section 10.2.3 (Retry-After).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx
import msgspec
import trio

from node.upstream_stream import MESSAGE_CHARS_MAX, Garbled, message_of

CONNECT_S = 5.0
ANSWER_S = 10.0  # for a small answer: facts, figures
WRITE_S = 30.0  # for one write of a request
BODY_BYTES_MAX = 4 << 20  # of facts and figures: vLLM's metrics are 100 KB
ERROR_BYTES_MAX = 64 << 10
IDLE_MAX = 32  # connections kept
KEPT_S = 30.0
EVENT_STREAM: Final = "text/event-stream"


class Trouble(Exception):
    """The server gave no answer that can be used."""


class Unreached(Trouble):
    """It cannot be reached, or the connection broke. is_gone: nothing listens there."""

    def __init__(self, message: str, *, is_gone: bool = False) -> None:
        super().__init__(message)
        self.is_gone = is_gone


class Answered(Trouble):
    """It answered with an error."""

    def __init__(self, status: int, message: str, retry_after_s: float | None) -> None:
        super().__init__(f"HTTP {status}: {message}")
        self.status = status
        self.message = message
        self.retry_after_s = retry_after_s


class Server:
    """One server's HTTP. Use it as a context manager, inside trio."""

    def __init__(self, base: str, key: str | None) -> None:
        """base: the URL before /v1. key: for the Authorization header."""
        self.base = base
        self._key = key
        headers = {"accept-encoding": "identity", "user-agent": "openagi-node"}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        self._client = httpx.AsyncClient(
            headers=headers,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(None, connect=CONNECT_S, write=WRITE_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=IDLE_MAX, keepalive_expiry=KEPT_S),
        )

    async def __aenter__(self) -> Server:
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.move_on_after(1.0, shield=True):
            await self._client.aclose()

    async def get(self, path: str) -> bytes:
        """A small body. Raises Trouble, Garbled."""
        with _in_time(ANSWER_S):
            return await self._whole("GET", path, None, BODY_BYTES_MAX)

    async def post(self, path: str, body: Any, *, within_s: float, bytes_max: int = BODY_BYTES_MAX) -> bytes:
        """The body of an answer to a JSON body. Raises Trouble, Garbled."""
        with _in_time(within_s):
            return await self._whole("POST", path, body, bytes_max)

    @asynccontextmanager
    async def stream(self, path: str, body: Any) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of an event stream. Raises Trouble, Garbled. Leaving closes the connection, unless it ended."""
        async with self._sent("POST", path, body) as response:
            kind = response.headers.get("content-type", "")
            if not kind.lower().startswith(EVENT_STREAM):
                raise Garbled(f"it was asked for a stream and answers with {kind[:100] or 'no content type'!r}")
            yield self._bytes(response)

    async def _bytes(self, response: httpx.Response) -> AsyncIterator[bytes]:
        with _mapped():
            async for content in response.aiter_raw():
                yield content

    async def _whole(self, method: str, path: str, body: Any, bytes_max: int) -> bytes:
        async with self._sent(method, path, body) as response:
            return await self._read(response, bytes_max)

    async def _read(self, response: httpx.Response, bytes_max: int) -> bytes:
        content = bytearray()
        async for part in self._bytes(response):
            content += part
            if len(content) > bytes_max:
                raise Garbled(f"a body of over {bytes_max} bytes")
        return bytes(content)

    @asynccontextmanager
    async def _sent(self, method: str, path: str, body: Any) -> AsyncIterator[httpx.Response]:
        """An answer with status 200, its body not read yet."""
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if body is None else {"content-type": "application/json"}
        with _mapped():
            request = self._client.build_request(method, self.base + path, content=content, headers=headers)
            response = await self._client.send(request, stream=True)
        try:
            if response.status_code != 200:
                raise await self._error(response)
            if response.headers.get("content-encoding", "identity") != "identity":
                raise Garbled("it sends compressed content that was not asked for")
            yield response
        finally:
            with trio.move_on_after(1.0, shield=True):
                await response.aclose()

    async def _error(self, response: httpx.Response) -> Answered:
        status = response.status_code
        if 300 <= status < 400:
            return Answered(status, "it redirects elsewhere, which is not followed: give the address it is at", None)
        told: object = ""
        try:
            with trio.move_on_after(ANSWER_S):
                told = msgspec.json.decode(await self._read(response, ERROR_BYTES_MAX))
        except (ValueError, RecursionError, Garbled, Trouble):
            told = ""
        message = message_of(told)
        if self._key is not None:
            message = message.replace(self._key, "[key]")
        return Answered(status, message[:MESSAGE_CHARS_MAX], retry_after_s(response.headers.get("retry-after")))


def retry_after_s(value: str | None) -> float | None:
    """A Retry-After header in seconds from now; None for none that can be read."""
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


@contextmanager
def _in_time(seconds: float) -> Iterator[None]:
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Unreached(f"no answer within {seconds:.0f} s")


@contextmanager
def _mapped() -> Iterator[None]:
    """What httpx raises, as ours. Its words may hold an address and never a header."""
    try:
        yield
    except httpx.ConnectError as exc:
        raise Unreached(f"nothing answers there: {str(exc)[:200]}", is_gone=True) from exc
    except httpx.TimeoutException as exc:
        raise Unreached(f"{type(exc).__name__}: it takes no bytes, or no connection") from exc
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as exc:
        raise Unreached(f"the connection broke: {str(exc)[:200] or type(exc).__name__}") from exc
