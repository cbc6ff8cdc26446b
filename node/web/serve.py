"""Serves the application over HTTP/1.1 with Hypercorn's Trio worker, inside a nursery of ours.

Rules: Hypercorn parses and frames; what it leaves unbounded is bounded here: connections in all and of one address,
writes to a client that does not read, and the harm of one connection's failure. When there is no place, whoever has us
wait longest for the rest of a request yields to the newcomer, of the address that has most. What the door refuses by
its head alone is answered here, without a task for it: that is what a flood costs. HTTP/1.1 only: neither h2c nor
prior-knowledge HTTP/2. Hypercorn shields its writes from cancellation, so a connection is ended by closing its
socket. Slow heads end with the keep-alive time, slow bodies in door.py.

Source: Hypercorn 0.18 hypercorn/trio/run.py, tcp_server.py, hypercorn/protocol/h11.py; SECURITY.md F12.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Event, RawData
from hypercorn.protocol.events import EndBody
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from hypercorn.utils import parse_socket_addr, wrap_app

from node.web.door import CONNECTION_KEY, Door, is_small
from p2p.errors import CannotListen

AGAIN_S = 1.0  # below idle_s_max
HEAD_BYTES_MAX = 16 << 10  # a request line and its headers; h11 looks after each read, so that twice this may pass
BACKLOG = 256
DOOR_KEY = "openagi.door"  # of the connection's state
# what Hypercorn and h11 may raise for what a client sent, or for how it left; all else is a bug and ends the node
FOREIGN = (h11.ProtocolError, OSError, trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)

log = logging.getLogger("node.web")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeLimits:
    """What clients may take. Times in seconds."""

    connections_max: int = 512
    connections_per_address_max: int = 256  # many clients may stand behind one proxy
    idle_s_max: float = 10.0  # between requests, and for a whole head; above the 5 s of httpx, so clients close first
    write_s_max: float = 30.0  # one write to a client that reads nothing
    drain_s_max: float = 30.0  # after `stop`: for requests in flight


async def serve(
    app: Door,
    host: str,
    port: int,
    *,
    limits: ServeLimits | None = None,
    stop: trio.Event | None = None,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop` is set (requests in flight then have drain_s_max) or cancelled (they are cut).

    Started with the port that is really bound. Raises CannotListen.
    """
    listeners = await _listen(host, port)
    server = _Server(app, limits or ServeLimits())
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accept = partial(trio.serve_listeners, server.serve, listeners, handler_nursery=connections)
            await accepting.start(accept)
            task_status.started(listeners[0].socket.getsockname()[1])
            await (trio.Event() if stop is None else stop).wait()
            accepting.cancel_scope.cancel()
        await server.context.terminated.set()  # idle connections close, busy ones after their response
        connections.cancel_scope.deadline = trio.current_time() + server.limits.drain_s_max


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        listeners = list(await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG))
    except OSError as exc:
        if _is_taken(exc):
            raise CannotListen(
                f"the HTTP address {host}:{port} is taken by another program (another node?): "
                "stop it, or choose another by --http HOST:PORT (port 0 takes any free one)"
            ) from exc
        raise CannotListen(f"cannot serve HTTP on {host}:{port}: {exc.strerror or exc}; choose another --http") from exc
    if port == 0:  # a name with several addresses would get several ports
        for listener in listeners[1:]:
            listener.socket.close()
        del listeners[1:]
    return listeners


def _is_taken(exc: BaseException) -> bool:
    """trio wraps the error of each address of a name in a group."""
    if isinstance(exc, BaseExceptionGroup):
        return any(_is_taken(inner) for inner in exc.exceptions)
    if isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE:
        return True
    return exc.__cause__ is not None and _is_taken(exc.__cause__)


class _Server:
    """What all connections share."""

    def __init__(self, app: Door, limits: ServeLimits) -> None:
        self.limits = limits
        self.context = WorkerContext(None)
        self.config = _hypercorn_config(limits)
        self._door = app
        self._counts = app.counts
        self._wrapped = wrap_app(cast(Any, app), self.config.wsgi_max_body_size, "asgi")
        self._of_address: dict[str, dict[_BoundedStream, None]] = {}

    async def serve(self, stream: trio.SocketStream) -> None:
        """Serve one connection to its end. Never raises but for cancellation."""
        connection = _BoundedStream(stream, self.limits.write_s_max)
        try:
            address = str(stream.socket.getpeername()[0])
        except OSError:  # gone already
            connection.abort()
            return
        if not self._make_room(address):
            self._counts.drops["connections_full"] += 1
            connection.abort()
            return
        self._counts.connections += 1
        self._of_address.setdefault(address, {})[connection] = None
        try:
            await self._guarded(connection)
        finally:
            connection.abort()
            self._leave(connection, address)

    def _state(self, connection: _BoundedStream) -> ConnectionState:
        return ConnectionState({CONNECTION_KEY: connection, DOOR_KEY: self._door})

    def _leave(self, connection: _BoundedStream, address: str) -> None:
        """Its place is free; once."""
        held = self._of_address.get(address, {})
        if connection not in held:
            return
        self._counts.connections -= 1
        del held[connection]
        if not held:
            del self._of_address[address]

    def _make_room(self, address: str) -> bool:
        """Whether there is a place for one more of this address, if need be that of one who dawdles."""
        if len(self._of_address.get(address, ())) >= self.limits.connections_per_address_max:
            crowded = address
        elif self._counts.connections >= self.limits.connections_max:
            crowded = max(self._of_address, key=lambda each: len(self._of_address[each]))
        else:
            return True
        waiting = (each for each in self._of_address[crowded] if not each.is_answering)
        longest = min(waiting, key=lambda each: each.since_s, default=None)
        if longest is None:
            return False
        self._counts.drops["connection_yielded"] += 1
        longest.abort()
        self._leave(longest, crowded)
        return True

    async def _guarded(self, connection: _BoundedStream) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_abort_when_cancelled, connection)
                await _Connection(self._wrapped, self.config, self.context, self._state(connection), connection).run()
                nursery.cancel_scope.cancel()
        except* FOREIGN:  # what one client's bytes do to Hypercorn must not end the node
            self._counts.drops["connection_failed"] += 1
            log.exception("an HTTP connection failed and was closed")


async def _abort_when_cancelled(connection: _BoundedStream) -> None:
    """Hypercorn's writes are shielded: only a closed socket ends one that the client does not read."""
    try:
        await trio.sleep_forever()
    finally:
        connection.abort()


class _BoundedStream:
    """A socket stream whose writes end: in order, by the bound, or by `abort`."""

    def __init__(self, stream: trio.SocketStream, write_s_max: float) -> None:
        self.socket = stream.socket
        self._stream = stream
        self._write_s_max = write_s_max
        self._is_answering = False
        self.since_s = trio.current_time()  # when it last had its answer, at first when it came

    @property
    def is_answering(self) -> bool:
        """Whether its request is here, and it waits for us (node/web/door.py says so)."""
        return self._is_answering

    @is_answering.setter
    def is_answering(self, value: bool) -> None:
        if self._is_answering and not value:
            self.since_s = trio.current_time()
        self._is_answering = value

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """At most HEAD_BYTES_MAX: a larger read would bring a larger head past h11's own bound."""
        return await self._stream.receive_some(min(max_bytes or HEAD_BYTES_MAX, HEAD_BYTES_MAX))

    async def send_all(self, content: bytes) -> None:
        """Raises BrokenResourceError, also when the client took nothing for too long (it then is cut off)."""
        with trio.move_on_after(self._write_s_max) as limit:
            await self._stream.send_all(content)
        if limit.cancelled_caught:
            self.abort()
            raise trio.BrokenResourceError(f"the client read nothing for {self._write_s_max} s")

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()

    def abort(self) -> None:
        """Close the socket now; whoever waits on it gets ClosedResourceError."""
        self.socket.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Again:
    """A whole request that was refused by its head, as it came. Who floods sends the same bytes again and again: as
    long as they are refused, they are not parsed anew. Now and then they are, which also winds Hypercorn's clock."""

    door: Door
    raw: bytes
    path: str
    headers: list[tuple[bytes, bytes]]
    until_s: float


def _written(status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> bytes:
    """A whole answer, as h11 writes it."""
    lines = [b"HTTP/1.1 %d " % status, *(name + b": " + value for name, value in headers), b"", body]
    return b"\r\n".join(lines)


class _Http11Only(H11Protocol):
    """Hypercorn's HTTP/1.1 without its ways into HTTP/2 and WebSocket.

    A frame after the upgrade that a refusing application has not answered yet raises LocalProtocolError out of
    Hypercorn's reader, and so would end the node: such a request is an ordinary GET here.
    """

    _again: _Again | None = None
    _chunk = b""  # what was read, when it began with a request

    async def handle(self, event: Event) -> None:
        if isinstance(event, RawData):
            is_between = self._is_between()
            if is_between and self._again is not None and await self._refused_again(self._again, event.data):
                return
            self._chunk = event.data if is_between else b""
        await super().handle(event)

    def _is_between(self) -> bool:
        """Whether no request is under way, and nothing of the next is here."""
        connection = cast(h11.Connection, self.connection)
        return self.stream is None and connection.their_state is h11.IDLE and not connection.trailing_data[0]

    async def _refused_again(self, again: _Again, data: bytes) -> bool:
        """Answer the very request that was refused a moment ago, if it still is: whether it was."""
        if data != again.raw or trio.current_time() >= again.until_s:
            return False
        refused = again.door.early(again.path, again.headers)
        if refused is not None:
            await self.send(RawData(data=_written(*refused)))
        return refused is not None

    async def _check_protocol(self, event: h11.Request) -> None:
        pass

    async def _create_stream(self, request: h11.Request) -> None:
        refused = self._refused(request)
        self._chunk = b""  # another request of the same read did not begin it
        if refused is not None:
            self.stream = cast(Any, _Refused(partial(self._send_whole, *refused)))
            return
        plain = [(name, value) for name, value in request.headers if name != b"upgrade"]
        await super()._create_stream(
            h11.Request(method=request.method, target=request.target, headers=plain, http_version=request.http_version)
        )

    def _refused(self, request: h11.Request) -> tuple[int, list[tuple[bytes, bytes]], bytes] | None:
        """The answer of the door, when it needs no more than the head, and the body has come with it."""
        door: Door | None = self.connection_state.get(DOOR_KEY)
        length = b"0"
        for name, value in request.headers:
            if name == b"content-length":
                length = value
            elif name in (b"transfer-encoding", b"expect"):
                return None
        if door is None or request.method == b"HEAD" or not is_small(length.decode("latin-1")):
            return None  # the answer to HEAD has no body
        body = len(cast(h11.Connection, self.connection).trailing_data[0])
        if body < int(length):
            return None
        path = request.target.partition(b"?")[0].decode("latin-1")
        refused = door.early(path, request.headers)
        if refused is not None and body == int(length) and self._chunk:
            until_s = trio.current_time() + AGAIN_S
            self._again = _Again(door=door, raw=self._chunk, path=path, headers=list(request.headers), until_s=until_s)
        return refused

    async def _send_whole(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole answer in one write, and on to the next request."""
        events = (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage())
        try:
            raw = b"".join(cast(h11.Connection, self.connection).send(event) or b"" for event in events)
        except h11.LocalProtocolError:  # the client broke the protocol meanwhile: its connection closes
            raw = b""
        await self.send(RawData(data=raw))
        await self._maybe_recycle()


class _Refused:
    """In the place of Hypercorn's stream, for a request that was refused: it answers when the body is past."""

    idle = False

    def __init__(self, answer: Callable[[], Awaitable[None]]) -> None:
        self._answer = answer

    async def handle(self, event: object) -> None:
        if isinstance(event, EndBody):
            await self._answer()


class _Connection(TCPServer):
    """Hypercorn's connection, speaking HTTP/1.1 over our bounded stream."""

    def __init__(
        self, app: Any, config: Config, context: WorkerContext, state: ConnectionState, stream: _BoundedStream
    ) -> None:
        super().__init__(app, config, context, state, cast(Any, stream))

    async def run(self) -> None:
        """As TCPServer.run without TLS and without HTTP/2."""
        socket = cast(Any, self.stream).socket
        try:
            client = parse_socket_addr(socket.family, socket.getpeername())
            server = parse_socket_addr(socket.family, socket.getsockname())
            async with TaskGroup() as task_group:
                self._task_group = task_group
                make = cast(Callable[..., H11Protocol], _Http11Only)
                self.protocol = cast(
                    Any,
                    make(
                        self.app,
                        self.config,
                        self.context,
                        task_group,
                        ConnectionState(self.state),
                        False,
                        client,
                        server,
                        self.protocol_send,
                    ),
                )
                await self.protocol.initiate()
                await self.idle_task.restart(task_group, self._idle_timeout)
                await self._read_data()
                await self.idle_task.stop()  # else a closed connection would live on for the whole idle time
        except OSError:
            pass
        finally:
            await self._close()


def _hypercorn_config(limits: ServeLimits) -> Config:
    config = Config()
    config.errorlog = logging.getLogger("node.web.hypercorn")
    config.accesslog = None
    config.include_server_header = False
    config.h11_max_incomplete_size = HEAD_BYTES_MAX
    config.keep_alive_timeout = cast(int, limits.idle_s_max)
    return config
