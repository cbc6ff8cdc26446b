"""Calls over libp2p: the promises of tests/test_calls.py that depend on the network, kept on real sockets."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from crypto.canonical import Limits, Value
from crypto.identity import Identity
from p2p import rpc
from p2p.calls import Calls, Handler, Incoming
from p2p.errors import Refused, RemoteError, Unreachable
from p2p.transport import Transport

pytestmark = pytest.mark.slow

PROTOCOL = "/test/rpc/1"
WIDE = Limits(bytes_max=1 << 20, str_max=1 << 20, bin_max=1 << 20)
HANG_S = 120.0  # a guard against hanging, not a measure


class Seen:
    """What the callee's handlers saw."""

    def __init__(self) -> None:
        self.began = 0
        self.ended = 0
        self.sent = 0

    def methods(self) -> dict[str, Handler]:
        return {"echo": self.echo, "count": self.count, "wait": self.wait}

    async def echo(self, incoming: Incoming) -> Value:
        return incoming.body

    async def count(self, incoming: Incoming) -> Value:
        assert isinstance(incoming.body, int)
        for number in range(incoming.body):
            await incoming.send(number)
            self.sent += 1
        return "counted"

    async def wait(self, incoming: Incoming) -> Value:
        self.began += 1
        try:
            await trio.sleep_forever()
        finally:
            self.ended += 1
        return None


@asynccontextmanager
async def running(handlers: Mapping[str, Handler]) -> AsyncIterator[tuple[Transport, Calls]]:
    from p2p.host import open_host
    from p2p.host_config import HostConfig

    async with open_host(Identity.make(), HostConfig(listen=("/ip4/127.0.0.1/tcp/0",))) as transport:
        async with trio.open_nursery() as nursery:
            calls = Calls(transport, PROTOCOL, handlers, limits=WIDE)
            await nursery.start(calls.run)
            yield transport, calls
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def pair(seen: Seen) -> AsyncIterator[tuple[Calls, Transport, Calls, Transport]]:
    """The caller's calls and transport, then the callee's."""
    with trio.fail_after(HANG_S):
        async with running({}) as (here, calls), running(seen.methods()) as (there, answering):
            await here.dial(there.addresses()[0])
            yield calls, here, answering, there


async def all_over(*sides: Calls) -> None:
    """Wait until no call is left at either end."""
    await eventually(
        lambda: not any(side.statistics().calls_out_open or side.statistics().calls_in_open for side in sides)
    )


async def eventually(check: Callable[[], bool]) -> None:
    while not check():  # noqa: ASYNC110  # what is checked has no event
        await trio.sleep(0.005)


async def test_results_and_items() -> None:
    async with pair(Seen()) as (calls, here, answering, there):
        assert await calls.call(there.peer_id, "echo", {"a": [1, b"x", None, 1.5]}) == {"a": [1, b"x", None, 1.5]}
        big = bytes(900_000)
        assert await calls.call(there.peer_id, "echo", big) == big
        async with calls.open(there.peer_id, "count", 300) as outgoing:
            assert [item async for item in outgoing] == list(range(300))
        assert outgoing.result == "counted"
        assert here.statistics().streams_open == 1
        await all_over(calls, answering)


async def test_a_cancelled_call_cancels_its_handler_and_the_stream_lives_on() -> None:
    seen = Seen()
    async with pair(seen) as (calls, here, answering, there):
        for number in range(20):
            with trio.move_on_after(0.01):
                await calls.call(there.peer_id, "wait", None)
            assert await calls.call(there.peer_id, "echo", number) == number
        await all_over(calls, answering)
        assert seen.began == seen.ended > 0
        assert here.statistics().streams_open == 1


async def test_a_slow_reader_holds_its_handler_and_nobody_else() -> None:
    seen = Seen()
    async with pair(seen) as (calls, _, answering, there):
        async with calls.open(there.peer_id, "count", 1000) as outgoing:
            await trio.sleep(0.3)
            assert seen.sent == rpc.WINDOW
            assert await calls.call(there.peer_id, "echo", 1) == 1
            assert sum([1 async for _ in outgoing]) == 1000
        await all_over(calls, answering)


async def test_a_broken_connection_ends_calls_and_handlers_and_the_next_call_works() -> None:
    seen = Seen()
    async with pair(seen) as (calls, here, answering, there):
        for breaker, other in ((here, there), (there, here)):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(_unreachable, calls, there)
                await eventually(lambda: seen.began - seen.ended == 5)
                await breaker.disconnect(other.peer_id)
            await all_over(calls, answering)
            assert seen.began == seen.ended
            await eventually(lambda: not here.peers() and not there.peers())
            await here.dial(there.addresses()[0])
            assert await calls.call(there.peer_id, "echo", 1) == 1


async def _unreachable(calls: Calls, there: Transport) -> None:
    with pytest.raises(Unreachable):
        await calls.call(there.peer_id, "wait", None)


async def test_a_caller_that_breaks_the_rules_is_dropped_and_counted() -> None:
    async with pair(Seen()) as (calls, here, answering, there):
        stream = await here.open_stream(there.peer_id, PROTOCOL)
        await stream.send(b"\xc1")
        with pytest.raises(Unreachable):
            await stream.receive()
        await eventually(lambda: answering.statistics().drops == {"rule_broken": 1})
        assert await calls.call(there.peer_id, "echo", 1) == 1


async def test_a_peer_without_the_protocol_refuses() -> None:
    async with pair(Seen()) as (_, here, _, there), trio.open_nursery() as nursery:
        other = Calls(here, "/test/other/1", {})
        await nursery.start(other.run)
        with pytest.raises(Refused):
            await other.call(there.peer_id, "echo", 1)
        nursery.cancel_scope.cancel()


async def test_random_cancels_leave_nothing_behind() -> None:
    """1,000 calls cut short at random; the streams, tasks and calls left are those of one idle stream."""
    rng, seen = random.Random(3), Seen()
    async with pair(seen) as (calls, here, answering, there):
        await calls.call(there.peer_id, "echo", 1)
        tasks_before = trio.lowlevel.current_statistics().tasks_living

        async def one(method: str, patience_s: float) -> None:
            with trio.move_on_after(patience_s):
                try:
                    await calls.call(there.peer_id, method, 20 if method == "count" else None)
                except (RemoteError, Refused):
                    pass

        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(one, rng.choice(["echo", "count", "wait"]), rng.uniform(0, 0.05))
        await all_over(calls, answering)
        assert seen.began == seen.ended
        assert (here.statistics().streams_open, there.statistics().streams_open) == (1, 1)
        assert trio.lowlevel.current_statistics().tasks_living <= tasks_before + 2  # a ping may be on its way
        assert await calls.call(there.peer_id, "echo", 1) == 1
