"""Hypercorn in our nursery, over real sockets on loopback: who leaves, dawdles, floods or lies costs nobody else."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any

import h11
import pytest
import trio

from node.web.app import build_app
from node.web.door import BODY_BYTES_MAX, Door
from node.web.serve import HEAD_BYTES_MAX, ServeLimits, _Server, serve
from p2p.errors import CannotListen
from tests.fake_front import FakeFront, Step, finished, started, tale

HANG_S = 20.0  # a guard: nothing here takes this long
STEP_S = 0.02  # the engine step of the fake


class Served:
    """A front behind a real port."""

    def __init__(self, front: FakeFront, door: Door, port: int, stop: trio.Event, nursery: trio.Nursery) -> None:
        self.front = front
        self.door = door
        self.port = port
        self.stop = stop
        self.nursery = nursery

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def post(self, path: str, body: object, **headers: str) -> trio.SocketStream:
        """A connection on which this request was just sent."""
        stream = await self.connect()
        raw = json.dumps(body).encode()
        lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(raw)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        await stream.send_all("\r\n".join([*lines, "", ""]).encode() + raw)
        return stream

    async def idle(self) -> None:
        """Wait until the front has nothing left to do."""
        await self.front.until(lambda front: front.running == 0)


@asynccontextmanager
async def served(limits: ServeLimits | None = None) -> AsyncIterator[Served]:
    front, stop = FakeFront(), trio.Event()
    door = build_app(front, Random(7))
    with trio.fail_after(HANG_S):
        async with trio.open_nursery() as nursery:
            run = partial(serve, door, "127.0.0.1", 0, limits=limits, stop=stop)
            port = await nursery.start(run)
            yield Served(front, door, port, stop, nursery)
            nursery.cancel_scope.cancel()


async def read_all(stream: trio.SocketStream) -> bytes:
    parts = bytearray()
    try:
        async for part in stream:
            parts += part
    except trio.BrokenResourceError:
        pass
    return bytes(parts)


async def read_until(stream: trio.SocketStream, wanted: bytes) -> bytes:
    parts = bytearray()
    while wanted not in parts:
        part = await stream.receive_some()
        assert part, f"closed before {wanted!r} came: {bytes(parts)!r}"
        parts += part
    return bytes(parts)


def endless(step_s: float = STEP_S) -> list[Step]:
    return tale(["x"] * 2000, step_s=step_s)


async def test_it_answers_and_tells_the_real_port() -> None:
    async with served() as node:
        stream = await node.post("/v1/completions", {"prompt": "a"}, connection="close")
        answer = await read_all(stream)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"Once upon a time" in answer
        assert b"\r\nserver:" not in answer.lower()


async def test_keep_alive_serves_several_requests_on_one_connection() -> None:
    async with served() as node:
        stream = await node.connect()
        for _ in range(3):
            await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
            assert b'{"status":"ok"}' in await read_until(stream, b"}")


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}, {"stream": True, "n": 4}], ids=str)
async def test_a_client_that_goes_frees_the_slot_within_a_step(body: dict[str, Any]) -> None:
    async with served() as node:
        node.front.script = lambda work: endless()
        stream = await node.post("/v1/completions", {"prompt": "a", **body})
        await node.front.until(lambda front: front.running == body.get("n", 1))
        await trio.sleep(5 * STEP_S)
        steps = node.front.steps
        await stream.aclose()
        await node.idle()
        # generous: the close itself takes a moment on a busy machine
        assert node.front.steps - steps < 50 * body.get("n", 1)
        assert node.front.cancelled == body.get("n", 1)


@pytest.mark.parametrize("body", [{"stream": True}, {"stream": False}], ids=str)
async def test_a_client_that_goes_during_silence_frees_the_slot(body: dict[str, Any]) -> None:
    async with served() as node:
        node.front.script = lambda work: [started(), 3600.0, finished(0)]
        stream = await node.post("/v1/completions", {"prompt": "a", **body})
        await node.front.until(lambda front: front.running == 1)
        await stream.aclose()
        await node.idle()
        assert node.front.cancelled == 1


async def test_a_client_that_resets_the_connection_frees_the_slot() -> None:
    async with served() as node:
        node.front.script = lambda work: endless()
        stream = await node.post("/v1/completions", {"prompt": "a", "stream": True})
        await read_until(stream, b"data: ")
        stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        stream.socket.close()
        await node.idle()
        assert node.front.cancelled == 1


@pytest.mark.slow
async def test_a_client_that_stops_reading_is_cut_off() -> None:
    """Hypercorn's write is shielded from cancellation: unbounded, it would hold the slot and the node's stop."""
    async with served(ServeLimits(write_s_max=0.5)) as node:
        node.front.script = lambda work: tale(["x" * 10_000] * 2000)
        stream = await node.post("/v1/completions", {"prompt": "a", "stream": True})
        await node.front.until(lambda front: front.running == 1)
        await node.idle()
        assert node.front.cancelled == 1
        await stream.aclose()


async def test_cancelling_the_server_ends_a_write_that_nobody_reads() -> None:
    async with served(ServeLimits(write_s_max=3600.0)) as node:
        node.front.script = lambda work: tale(["x" * 10_000] * 2000)
        stream = await node.post("/v1/completions", {"prompt": "a", "stream": True})
        seen = -1
        while seen != node.front.items:  # until the sockets' buffers are full
            seen = node.front.items
            await trio.sleep(0.05)
        node.nursery.cancel_scope.cancel()
    assert node.front.running == 0
    await stream.aclose()


async def test_stop_lets_requests_finish_and_takes_no_new_ones() -> None:
    async with served() as node:
        node.front.script = lambda work: tale(["x"] * 10, step_s=STEP_S)
        idle = await node.connect()
        busy = await node.post("/v1/completions", {"prompt": "a"})
        await node.front.until(lambda front: front.running == 1)
        node.stop.set()
        with trio.fail_after(ServeLimits().idle_s_max / 2):  # at once, not by the idle time
            assert b"xxxxxxxxxx" in await read_all(busy)
            assert await read_all(idle) == b""
        with pytest.raises(OSError, match="connect"):
            await node.connect()


async def test_stop_cuts_what_does_not_finish() -> None:
    async with served(ServeLimits(drain_s_max=0.1)) as node:
        node.front.script = lambda work: endless()
        busy = await node.post("/v1/completions", {"prompt": "a"})
        await node.front.until(lambda front: front.running == 1)
        node.stop.set()
        assert await read_all(busy) == b""
        await node.idle()


async def test_a_slow_head_is_cut_off() -> None:
    async with served(ServeLimits(idle_s_max=0.2)) as node:
        stream = await node.connect()

        async def dribble() -> None:
            try:
                for byte in b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx-long: " + b"a" * 1000:
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(0.02)
            except trio.BrokenResourceError:
                pass

        node.nursery.start_soon(dribble)
        assert b"200" not in await read_all(stream)


async def test_a_large_head_is_refused() -> None:
    async with served() as node:
        stream = await node.connect()
        await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * (HEAD_BYTES_MAX + 1))
        with trio.fail_after(ServeLimits().idle_s_max / 2):  # by its size, not by the idle time
            assert (await read_all(stream)).startswith(b"HTTP/1.1 431")


async def test_a_huge_body_gets_its_413_and_not_a_reset() -> None:
    """Closing with bytes unread resets the connection, and the client never sees why."""
    async with served() as node:
        for declared in (b"content-length: %d" % (4 * BODY_BYTES_MAX), b"transfer-encoding: chunked"):
            stream = await node.connect()
            await stream.send_all(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + declared + b"\r\n\r\n")
            part = b"x" * 65536
            framed = part if b"length" in declared else b"10000\r\n" + part + b"\r\n"
            for _ in range(64):
                await stream.send_all(framed)
            if b"chunked" in declared:
                await stream.send_all(b"0\r\n\r\n")
            answer = await read_all(stream)
            assert answer.startswith(b"HTTP/1.1 413"), answer[:100]
            assert b"BODY_BYTES_MAX" in answer
            assert b"connection: close" in answer


async def test_connections_are_bounded_and_freed() -> None:
    async with served(ServeLimits(connections_max=3, connections_per_address_max=2)) as node:
        first = await node.post("/v1/completions", {"prompt": "a"})
        await read_until(first, b"Once upon")
        second = await node.post("/v1/completions", {"prompt": "a"})
        await read_until(second, b"Once upon")
        assert node.door.counts.connections == 2
        third = await node.post("/v1/completions", {"prompt": "a"})  # the first has waited longest for its next request
        await read_until(third, b"Once upon")
        assert await read_all(first) == b""
        assert node.door.counts.connections == 2
        assert node.door.counts.drops["connection_yielded"] == 1
        with trio.fail_after(ServeLimits().idle_s_max / 2):  # a closed connection must not live on as an idle one
            await third.aclose()
            while node.door.counts.connections == 2:  # noqa: ASYNC110  # the server tells nobody
                await trio.sleep(0.01)
        fourth = await node.post("/v1/completions", {"prompt": "a"})
        assert b"Once upon" in await read_until(fourth, b"Once upon")


async def test_who_is_being_answered_yields_to_nobody() -> None:
    async with served(ServeLimits(connections_max=3, connections_per_address_max=2)) as node:
        node.front.script = lambda work: endless()
        busy = [await node.post("/v1/completions", {"prompt": "a", "stream": True}) for _ in range(2)]
        for stream in busy:
            await read_until(stream, b"data: ")
        assert await read_all(await node.connect()) == b""
        assert node.door.counts.drops["connections_full"] == 1
        assert node.front.running == 2


async def test_an_honest_client_is_served_beside_more_dribblers_than_there_are_places() -> None:
    async with served(ServeLimits(connections_max=8, connections_per_address_max=8)) as node:
        dribblers = [await node.connect() for _ in range(20)]
        for stream in dribblers[-8:]:
            await stream.send_all(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        answer = await read_all(await node.post("/v1/completions", {"prompt": "a"}, connection="close"))
        assert b"Once upon a time" in answer
        assert node.door.counts.drops["connection_yielded"] == 13


async def test_many_small_headers_are_refused_before_they_cost() -> None:
    async with served() as node:
        for many in (b"a:b\r\n" * 10_000, b"x-%d: y\r\n" % 7 * 5_000, b"cookie: a=b\r\n" * 3_000):
            stream = await node.connect()
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n" + many + b"\r\n")
            assert not (await read_all(stream)).startswith((b"HTTP/1.1 2", b"HTTP/1.1 5"))
        assert len(many) > HEAD_BYTES_MAX


async def test_a_small_body_that_is_refused_costs_no_connection() -> None:
    async with served() as node:
        stream = await node.connect()
        for _ in range(3):
            await stream.send_all(b"POST /nowhere HTTP/1.1\r\nhost: localhost\r\ncontent-length: 4\r\n\r\nabcd")
            assert b"connection: close" not in await read_until(stream, b"there is no route")


@pytest.mark.parametrize(
    "raw",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9),
        b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
        b"http2-settings: \r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
        b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n\x81\x85abcdefgh",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        b"GET /%ff%00 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET //evil.example/ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"CONNECT evil.example:443 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"HEAD /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"\x00" * 300,
    ],
    ids=lambda raw: repr(raw[:24]),
)
async def test_whatever_one_client_sends_the_next_is_served(raw: bytes) -> None:
    async with served(ServeLimits(idle_s_max=0.2)) as node:
        stream = await node.connect()
        await stream.send_all(raw)
        answer = await read_all(stream)
        assert not answer.startswith((b"HTTP/1.1 101", b"HTTP/1.1 5", bytes(3)))
        assert b" 101 " not in answer[:20]
        other = await node.connect()
        await other.send_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert b'"ok"' in await read_until(other, b"}")
        assert node.door.counts.drops["connection_failed"] == 0


class BrokenSocket:
    """A connection inside which something fails that is no matter of the network."""

    family = trio.socket.AF_INET
    closed = False

    def getpeername(self) -> tuple[str, int]:
        return ("127.0.0.1", 1)

    getsockname = getpeername

    def close(self) -> None:
        self.closed = True


class BrokenStream:
    def __init__(self) -> None:
        self.socket = BrokenSocket()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        raise h11.LocalProtocolError("from inside Hypercorn")

    async def send_eof(self) -> None:
        raise trio.ClosedResourceError

    async def aclose(self) -> None:
        self.socket.close()


async def test_a_failing_connection_is_counted_and_closed_alone(caplog: pytest.LogCaptureFixture) -> None:
    """The guard itself: an exception out of Hypercorn must not end the node."""
    door = build_app(FakeFront(), Random(7))
    stream = BrokenStream()
    await _Server(door, ServeLimits()).serve(stream)  # type: ignore[arg-type]
    assert stream.socket.closed
    assert door.counts.drops["connection_failed"] == 1
    assert door.counts.connections == 0
    assert "from inside Hypercorn" in caplog.text


async def test_a_taken_port_is_one_clear_sentence() -> None:
    async with served() as node:
        with pytest.raises(CannotListen, match=rf"127.0.0.1:{node.port} is taken .* --http"):
            await serve(node.door, "127.0.0.1", node.port)
    with pytest.raises(CannotListen, match="cannot serve HTTP on"):
        await serve(node.door, "198.51.100.1", 0)
