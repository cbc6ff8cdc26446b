"""Calls between peers over rpc.py: one long-lived stream a peer and direction, many calls on it, then handlers.

Rules: shell; what may follow what is rpc.py's to say. The stream to a peer is opened by the first call, and again by
the first after a break; no call is repeated. Leaving a call early posts Cancel, which cancels its handler at the peer.
A broken stream ends its calls with Unreachable and cancels its handlers. A peer that breaks a rule has its stream
reset, our calls on it end with StreamBreach, and the drop is counted. Each call is held by its own credit, and
by nobody else's. `except Exception` stands here once: the guard around a peer's call.

Source: RFC 9113 (multiplexing, flow control); NETWORK.md "Our rules" 5.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import trio

from crypto.canonical import CONTROL, Limits, Value
from crypto.identity import PeerId
from p2p.call_stream import CallsStatistics, CallStream, again
from p2p.errors import LocalProtocolError, P2PError, Refused, RemoteError, RemoteProtocolError, Unreachable
from p2p.rpc import CALLS_MAX, Call, CallId, Cancel, Credit, End, Error, Frame, Item, Role, units_of
from p2p.transport import Stream, Transport

HANDLERS_MAX = 64  # calls of one peer that are answered at a time; more are answered "busy"
STREAMS_IN_MAX = 2  # of one peer, so that a reconnect overlaps; of more, the oldest is a dead end or a flood
OPEN_S_MAX = 10.0  # of a stream's opening, which outlives the call that asked for it

_log = logging.getLogger(__name__)


class Incoming:
    """A call of a peer's, as its handler sees it."""

    def __init__(self, stream: _CalleeStream, call: Call) -> None:
        self.peer = stream.peer
        self.method = call.method
        self.body: Value = call.body
        self.call_id = CallId(call.id)
        self.scope = trio.CancelScope()  # of its handler
        self.credited = trio.lowlevel.ParkingLot()
        self._stream = stream

    async def send(self, item: Value) -> None:
        """Send an item that precedes the result, of at most 128 KiB; wait while the peer's program takes none.

        Raises LocalProtocolError (not plain values, too large). If cancelled, the item is not sent.
        """
        await trio.lowlevel.checkpoint()
        await self._stream.outbox.wait_for_room()
        while (frame := self._stream.rpc.item(self.call_id, item)) is None:
            await self.credited.park()
            await self._stream.outbox.wait_for_room()
        self._stream.post(frame)


# The return value ends the call; RemoteError ends it with that error, any other Exception with code "internal".
Handler = Callable[[Incoming], Awaitable[Value]]
HandlerFor = Callable[[Call, PeerId], Handler]


class Outgoing:
    """A call of ours: iterate over its items, then read its `result`. One task uses it."""

    def __init__(self, stream: _CallerStream, call_id: CallId) -> None:
        self.call_id = call_id
        self.is_over = False
        self._stream = stream
        self._items: deque[tuple[Value, int]] = deque()  # with the units of credit they hold
        self._failure: P2PError | None = None
        self._result: Value = None
        self._changed = trio.lowlevel.ParkingLot()

    def __aiter__(self) -> Outgoing:
        return self

    async def __anext__(self) -> Value:
        """The next item. Raises as Calls.open says. If cancelled, no item is lost."""
        if self._items or self.is_over:
            await trio.lowlevel.checkpoint()
        while not self._items:
            if self._failure is not None:
                raise self._failure
            if self.is_over:
                raise StopAsyncIteration
            await self._changed.park()
        body, units = self._items.popleft()
        self._stream.consumed(self.call_id, units)
        return body

    @property
    def result(self) -> Value:
        """What the handler returned. Raises LocalProtocolError until the items were read to their end."""
        if not self.is_over or self._items or self._failure is not None:
            raise LocalProtocolError("a call has a result once its items were read to their end without an error")
        return self._result

    def take(self, body: Value, units: int) -> None:
        """An item came."""
        self._items.append((body, units))
        self._changed.unpark_all()

    def finish(self, result: Value, failure: P2PError | None = None) -> None:
        """The call is over; items that came before are still to be read."""
        self.is_over, self._result, self._failure = True, result, failure
        self._changed.unpark_all()


class Calls:
    """Calls to peers on one protocol, and the handlers for theirs to us."""

    def __init__(
        self,
        transport: Transport,
        protocol: str,
        handlers: Mapping[str, Handler],
        on_breach: Callable[[PeerId, str], None] = lambda _peer, _what: None,
        limits: Limits = CONTROL,
    ) -> None:
        """`handlers`: by method; a call of any other is answered "unknown_method". on_breach: told who broke a rule.

        limits: of a frame, the same at every peer; over them we raise LocalProtocolError, and a peer breaks a rule.
        """
        self._transport = transport
        self._protocol = protocol
        self._limits = limits
        self._handlers = dict(handlers)
        self._on_breach = on_breach
        self._nursery: trio.Nursery | None = None
        self._out: dict[PeerId, _CallerStream] = {}
        self._in: dict[PeerId, list[_CalleeStream]] = {}
        self._counts: Counter[str] = Counter()
        self._drops: Counter[str] = Counter()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve and call until cancelled; then calls end with Unreachable and handlers are cancelled."""
        assert self._nursery is None, "one run at a time"
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                self._transport.serve(self._protocol, self._serve)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._nursery = None
                for stream in [stream for streams in self._in.values() for stream in streams]:
                    stream.fail(Unreachable("this node ends"))

    async def call(self, peer: PeerId, method: str, body: Value) -> Value:
        """Call and wait for the result; items that precede it are dropped. Raises as `open`.

        If cancelled, the peer is told to stop.
        """
        async with self.open(peer, method, body) as outgoing:
            async for _ in outgoing:
                pass
        return outgoing.result

    @asynccontextmanager
    async def open(self, peer: PeerId, method: str, body: Value) -> AsyncIterator[Outgoing]:
        """Begin a call; iterate over its items, then read its result. Leaving before the end cancels it at the peer.

        Raises, here or from the iteration: Unreachable (not connected, or the stream broke), Refused (the peer does
        not serve this protocol, or has CALLS_MAX calls of ours unfinished), RemoteError (the handler's answer),
        StreamBreach (the peer broke a rule; on_breach is told), LocalProtocolError (the body cannot be sent).
        """
        stream = self._stream_to(peer)
        outgoing = await stream.begin(method, body)
        self._counts["calls_out"] += 1
        try:
            yield outgoing
        finally:
            stream.leave(outgoing)

    def is_busy(self, peer: PeerId) -> bool:
        """Whether a call to or from a peer is under way."""
        caller = self._out.get(peer)
        return bool(caller and caller.rpc.unfinished) or any(stream.answering for stream in self._in.get(peer, ()))

    def statistics(self) -> CallsStatistics:
        """A snapshot of the counters."""
        inbound = [stream for streams in self._in.values() for stream in streams]
        return CallsStatistics(
            streams_out=len(self._out),
            streams_in=len(inbound),
            calls_out_open=sum(stream.rpc.unfinished for stream in self._out.values()),
            calls_in_open=sum(len(stream.answering) for stream in inbound),
            calls_out=self._counts["calls_out"],
            calls_in=self._counts["calls_in"],
            drops=dict(self._drops),
        )

    def _stream_to(self, peer: PeerId) -> _CallerStream:
        """Our stream to a peer, opened if need be by a task that outlives the call that asks."""
        stream = self._out.get(peer)
        if stream is None or stream.failure is not None:
            if self._nursery is None:
                raise Unreachable(f"calls on {self._protocol} are not running on this node")
            stream = self._out[peer] = _CallerStream(peer, self._limits)
            self._nursery.start_soon(self._keep, stream)
        return stream

    async def _keep(self, stream: _CallerStream) -> None:
        """One outbound stream, for its whole life."""
        try:
            await stream.run(self._transport, self._protocol)
        finally:
            stream.fail(Unreachable("this node ends"))
            if self._out.get(stream.peer) is stream:
                del self._out[stream.peer]
        self._count_breach(stream)

    async def _serve(self, raw_stream: Stream) -> None:
        """One inbound stream, for its whole life."""
        if self._nursery is None:
            await raw_stream.reset()
            return
        streams = self._in.setdefault(raw_stream.peer, [])
        while len(streams) >= STREAMS_IN_MAX:
            self._drops["streams_over_bound"] += 1
            streams.pop(0).fail(Unreachable(f"{raw_stream.peer} has opened {STREAMS_IN_MAX} streams since"))
        stream = _CalleeStream(raw_stream.peer, self._limits, self.handler_for, self._drops)
        streams.append(stream)
        try:
            await stream.run(raw_stream)
        finally:
            if stream in streams:
                streams.remove(stream)
            if not streams and self._in.get(stream.peer) is streams:
                del self._in[stream.peer]
        self._count_breach(stream)

    def handler_for(self, call: Call, peer: PeerId) -> Handler:
        """Who answers a peer's call. Raises RemoteError: unknown_method, busy."""
        self._counts["calls_in"] += 1
        handler = self._handlers.get(call.method)
        if handler is None:
            self._drops["unknown_method"] += 1
            raise RemoteError("unknown_method", f"{self._protocol} has no method {call.method!r}", retryable=False)
        if sum(len(stream.answering) for stream in self._in.get(peer, ())) >= HANDLERS_MAX:
            self._drops["busy"] += 1
            raise RemoteError("busy", f"{HANDLERS_MAX} calls of yours are being answered", retryable=True)
        return handler

    def _count_breach(self, stream: CallStream) -> None:
        if isinstance(stream.failure, RemoteProtocolError):
            self._drops["rule_broken"] += 1
            self._on_breach(stream.peer, f"broke a rule of {self._protocol}: {stream.failure}")


class _CallerStream(CallStream):
    """Our end of the stream that we open to a peer."""

    def __init__(self, peer: PeerId, limits: Limits) -> None:
        super().__init__(peer, Role.CALLER, limits)
        self._opened = trio.Event()
        self._calls: dict[int, Outgoing] = {}

    async def run(self, transport: Transport, protocol: str) -> None:
        """Open the stream and keep it until it is over; `failure` then says why."""
        try:
            with trio.fail_after(OPEN_S_MAX):
                stream = await transport.open_stream(self.peer, protocol)
        except trio.TooSlowError:
            return self.fail(Unreachable(f"{self.peer} did not take a stream within {OPEN_S_MAX} s"))
        except P2PError as exc:
            return self.fail(exc)
        try:
            self._opened.set()
            with self.scope:
                async with trio.open_nursery() as nursery:
                    await self.pump(stream, nursery)
        finally:
            await self.drop(stream)

    async def begin(self, method: str, body: Value) -> Outgoing:
        """Begin a call as soon as there is a stream with room. Raises as Calls.open. If cancelled, there is no call."""
        if not self._opened.is_set():
            await self._opened.wait()
        await self.outbox.wait_for_room()
        if self.failure is not None:
            raise again(self.failure)
        if self.rpc.unfinished >= CALLS_MAX:
            raise Refused(f"{self.peer} has {CALLS_MAX} calls of ours unfinished: try another peer, or later")
        call_id, frame = self.rpc.call(method, body)
        outgoing = self._calls[call_id] = Outgoing(self, call_id)
        self.post(frame)
        return outgoing

    def leave(self, outgoing: Outgoing) -> None:
        """The program is done with a call: stop it if it still runs."""
        if not outgoing.is_over:
            del self._calls[outgoing.call_id]
            outgoing.finish(None, LocalProtocolError("this call was left before its end"))
            self.post(self.rpc.cancel(outgoing.call_id))

    def consumed(self, call_id: CallId, units: int) -> None:
        """The program took an item: let the peer send more."""
        self.post(self.rpc.consumed(call_id, units))

    def take(self, frame: Frame, raw: bytes) -> None:
        outgoing = self._calls.get(frame.id)
        if outgoing is None:  # it was left, and this is its end
            return
        if isinstance(frame, Item):
            outgoing.take(frame.body, units_of(raw))
            return
        del self._calls[frame.id]
        if isinstance(frame, End):
            outgoing.finish(frame.body)
        elif isinstance(frame, Error):
            outgoing.finish(None, RemoteError(frame.code, frame.message, retryable=frame.retryable))

    def fail(self, failure: P2PError) -> None:
        super().fail(failure)
        self._opened.set()
        calls, self._calls = self._calls, {}
        for outgoing in calls.values():
            outgoing.finish(None, again(failure))


class _CalleeStream(CallStream):
    """Our end of a stream that a peer opened."""

    def __init__(self, peer: PeerId, limits: Limits, handler_for: HandlerFor, drops: Counter[str]) -> None:
        """`drops` counts calls that end in an error, by its code."""
        super().__init__(peer, Role.CALLEE, limits)
        self._drops = drops
        self.answering: dict[int, Incoming] = {}
        self._handler_for = handler_for
        self._nursery: trio.Nursery

    async def run(self, stream: Stream) -> None:
        """Answer calls until the stream is over; `failure` then says why."""
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    await self.pump(stream, nursery)
        finally:
            await self.drop(stream)

    def take(self, frame: Frame, raw: bytes) -> None:
        if isinstance(frame, Call):
            self._begin(frame)
        elif isinstance(frame, Cancel):
            self.answering[frame.id].scope.cancel()
        elif isinstance(frame, Credit):
            self.answering[frame.id].credited.unpark_all()

    def _begin(self, call: Call) -> None:
        try:
            handler = self._handler_for(call, self.peer)
        except RemoteError as exc:
            self.post(self.rpc.error(CallId(call.id), exc))
            return
        incoming = self.answering[call.id] = Incoming(self, call)
        self._nursery.start_soon(self._answer, handler, incoming)

    async def _answer(self, handler: Handler, incoming: Incoming) -> None:
        """Run a call's handler and end the call."""
        outcome = await self._outcome(handler, incoming)
        await self.outbox.wait_for_room()
        del self.answering[incoming.call_id]
        if not isinstance(outcome, RemoteError):
            try:
                return self.post(self.rpc.end(incoming.call_id, outcome))
            except LocalProtocolError as exc:
                _log.error("the handler of %s returned what cannot be sent: %s", incoming.method, exc)
                outcome = RemoteError("internal", f"the result of {incoming.method} cannot be sent", retryable=True)
        if outcome.code != "cancelled":  # as the caller wished
            self._drops[f"answered_{outcome.code}"] += 1
        self.post(self.rpc.error(incoming.call_id, outcome))

    async def _outcome(self, handler: Handler, incoming: Incoming) -> Value | RemoteError:
        """What a handler returns, or the error that it ends in. The guard around a peer's call."""
        try:
            with incoming.scope:
                return await handler(incoming)
        except Exception as exc:
            error = _remote_error(exc)
            if error is not None:
                return error
            _log.exception("the handler of %s failed for %s", incoming.method, self.peer)
            return RemoteError("internal", f"{incoming.method} failed there; its log says why", retryable=True)
        return RemoteError("cancelled", "cancelled by the caller", retryable=False)


def _remote_error(exc: Exception) -> RemoteError | None:
    """The error a handler means to answer with, also when its own nursery has wrapped it."""
    while isinstance(exc, ExceptionGroup) and len(exc.exceptions) == 1:
        exc = exc.exceptions[0]
    return exc if isinstance(exc, RemoteError) else None
