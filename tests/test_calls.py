"""Calls over a loopback network: results, items, cancellation, breaks, breaches, and nothing left behind."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
import trio.testing

from crypto import canonical
from crypto.canonical import Limits, Value
from crypto.identity import Identity, PeerId
from p2p import call_stream, calls, rpc
from p2p.calls import Calls, Handler, Incoming
from p2p.errors import LocalProtocolError, P2PError, Refused, RemoteError, RemoteProtocolError, Unreachable
from p2p.loopback import LoopbackNetwork, LoopbackTransport
from p2p.loopback_wire import Faults
from p2p.transport import Stream

PROTOCOL = "/test/rpc/1"
WIDE = Limits(bytes_max=1 << 20, str_max=1 << 20, bin_max=1 << 20)
HANG_S = 10_000.0  # of the mock clock, which jumps there at once when nothing else can happen


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0)


@dataclass
class Peer:
    """One node with calls on it, and what its handlers saw."""

    node: LoopbackTransport
    calls: Calls
    seen: list[str] = field(default_factory=list)
    gate: trio.Event = field(default_factory=trio.Event)

    @property
    def id(self) -> PeerId:
        return self.node.peer_id


class Net:
    """A loopback network whose peers answer a fixed set of methods."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.network = LoopbackNetwork(random.Random(1), faults)

    @asynccontextmanager
    async def peer(self, handlers: Mapping[str, Handler] | None = None) -> AsyncIterator[Peer]:
        with trio.fail_after(HANG_S):
            async with self.network.join(Identity.make()) as node, trio.open_nursery() as nursery:
                peer = Peer(node, Calls(node, PROTOCOL, {}, limits=WIDE))
                peer.calls = Calls(node, PROTOCOL, handlers if handlers is not None else methods(peer), limits=WIDE)
                await nursery.start(peer.calls.run)
                yield peer
                nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def pair(self, handlers: Mapping[str, Handler] | None = None) -> AsyncIterator[tuple[Peer, Peer]]:
        """(caller, callee), connected."""
        async with self.peer() as caller, self.peer(handlers) as callee:
            await caller.node.dial(callee.node.addresses()[0])
            yield caller, callee


def methods(peer: Peer) -> dict[str, Handler]:
    async def echo(incoming: Incoming) -> Value:
        return incoming.body

    async def count(incoming: Incoming) -> Value:
        assert isinstance(incoming.body, int)
        for number in range(incoming.body):
            await incoming.send(number)
            peer.seen.append(f"sent {number}")
        return "counted"

    async def wait(incoming: Incoming) -> Value:
        peer.seen.append("began")
        try:
            await peer.gate.wait()
        finally:
            peer.seen.append("ended")
        return "waited"

    async def refuse(incoming: Incoming) -> Value:
        raise RemoteError("full", "no room here", retryable=True)

    async def refuse_inside(incoming: Incoming) -> Value:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await refuse(incoming)
        return None

    async def fail(incoming: Incoming) -> Value:
        raise ValueError("a bug")

    async def unsendable(incoming: Incoming) -> Value:
        return {1, 2}  # type: ignore[return-value]  # what the test is about

    async def whoami(incoming: Incoming) -> Value:
        return [incoming.peer, incoming.method]

    named = (echo, count, wait, refuse, refuse_inside, fail, unsendable, whoami)
    return {handler.__name__: handler for handler in named}


async def settle() -> None:
    await trio.testing.wait_all_tasks_blocked()


def assert_idle(*peers: Peer) -> None:
    """No call is left anywhere."""
    for peer in peers:
        statistics = peer.calls.statistics()
        assert (statistics.calls_out_open, statistics.calls_in_open) == (0, 0)


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [None, True, -1, 2**63, 1.5, "ä", b"\0", [], [1, [2]], {"a": {"b": b"c"}}])
async def test_a_call_brings_its_result(body: Value, clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        assert await caller.calls.call(callee.id, "echo", body) == body
        assert_idle(caller, callee)


async def test_a_handler_knows_who_calls_what(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        assert await caller.calls.call(callee.id, "whoami", None) == [caller.id, "whoami"]


async def test_items_come_in_order_and_then_the_result(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        async with caller.calls.open(callee.id, "count", 1000) as outgoing:
            with pytest.raises(LocalProtocolError):
                _ = outgoing.result
            assert [item async for item in outgoing] == list(range(1000))
            assert outgoing.result == "counted"
        assert_idle(caller, callee)


async def test_call_drops_items(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        assert await caller.calls.call(callee.id, "count", 1000) == "counted"


async def test_many_calls_share_one_stream(clock: trio.abc.Clock) -> None:
    async with Net(Faults(stream_delay_s=(0.0, 0.2))).pair() as (caller, callee):
        results: dict[int, Value] = {}

        async def one(number: int) -> None:
            results[number] = await caller.calls.call(callee.id, "echo", number)

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(one, number)
        assert results == {number: number for number in range(60)}
        assert caller.node.statistics().streams_open == 1
        assert caller.calls.statistics().streams_out == callee.calls.statistics().streams_in == 1
        assert_idle(caller, callee)


async def test_both_sides_may_open_at_once(clock: trio.abc.Clock) -> None:
    async with Net(Faults(stream_delay_s=(0.1, 0.1))).pair() as (left, right):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(left.calls.call, right.id, "count", 3)
                nursery.start_soon(right.calls.call, left.id, "count", 3)
        for peer in (left, right):
            assert (peer.calls.statistics().streams_out, peer.calls.statistics().streams_in) == (1, 1)
        assert_idle(left, right)


async def test_a_call_on_an_open_stream_takes_no_time(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        began = trio.current_time()
        for _ in range(10):
            await caller.calls.call(callee.id, "echo", "x")
        assert trio.current_time() == began  # nothing here sleeps


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["refuse", "refuse_inside"])
async def test_a_handler_answers_with_an_error(method: str, clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        with pytest.raises(RemoteError, match="no room here") as caught:
            await caller.calls.call(callee.id, method, None)
        assert (caught.value.code, caught.value.retryable) == ("full", True)
        assert_idle(caller, callee)


@pytest.mark.parametrize("method", ["fail", "unsendable"])
async def test_a_bug_in_a_handler_is_logged_and_answered(
    method: str, clock: trio.abc.Clock, caplog: pytest.LogCaptureFixture
) -> None:
    async with Net().pair() as (caller, callee):
        with pytest.raises(RemoteError) as caught:
            await caller.calls.call(callee.id, method, None)
        assert caught.value.code == "internal"
        assert "a bug" not in caught.value.message  # the other side learns nothing of our insides
        assert method in caplog.text
        assert await caller.calls.call(callee.id, "echo", 1) == 1
        assert_idle(caller, callee)


async def test_an_unknown_method_is_said_to_be(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        with pytest.raises(RemoteError, match="nothing") as caught:
            await caller.calls.call(callee.id, "nothing", None)
        assert (caught.value.code, caught.value.retryable) == ("unknown_method", False)


async def test_an_unknown_protocol_is_refused(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.peer() as caller, net.network.join(Identity.make()) as bare:
        await caller.node.dial(bare.addresses()[0])
        with pytest.raises(Refused):
            await caller.calls.call(bare.peer_id, "echo", None)
        assert caller.calls.statistics().streams_out == 0


async def test_a_peer_that_is_not_connected_is_unreachable(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.peer() as caller, net.peer() as other:
        with pytest.raises(Unreachable, match="not connected"):
            await caller.calls.call(other.id, "echo", None)
        await caller.node.dial(other.node.addresses()[0])
        assert await caller.calls.call(other.id, "echo", 1) == 1


@pytest.mark.parametrize("body", [float("nan"), 1 << 70, {1: 2}, object(), "x" * (1 << 20)])
async def test_a_body_that_cannot_be_sent_is_our_own_fault(body: Value, clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        with pytest.raises(LocalProtocolError):
            await caller.calls.call(callee.id, "echo", body)
        assert await caller.calls.call(callee.id, "echo", 1) == 1
        assert_idle(caller, callee)


async def test_calls_need_to_run(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.peer() as caller, net.network.join(Identity.make()) as bare:
        await caller.node.dial(bare.addresses()[0])
        idle = Calls(bare, PROTOCOL, {}, limits=WIDE)
        with pytest.raises(Unreachable, match="not running"):
            await idle.call(caller.id, "echo", None)


# -- leaving early ----------------------------------------------------------------------------------------------------


async def test_cancelling_a_call_cancels_its_handler(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        with trio.move_on_after(1):
            await caller.calls.call(callee.id, "wait", None)
        await settle()
        assert callee.seen == ["began", "ended"]
        assert_idle(caller, callee)


async def test_a_peer_is_busy_while_a_call_to_it_or_from_it_is_under_way(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(caller.calls.call, callee.id, "wait", None)
            await settle()
            assert caller.calls.is_busy(callee.id)
            assert callee.calls.is_busy(caller.id)
            nursery.cancel_scope.cancel()
        await settle()
        assert not caller.calls.is_busy(callee.id)
        assert not callee.calls.is_busy(caller.id)


async def test_leaving_the_block_cancels_the_handler(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        async with caller.calls.open(callee.id, "count", 10**6) as outgoing:
            async for item in outgoing:
                if item == 5:
                    break
        await settle()
        sent = len(callee.seen)
        await settle()
        assert len(callee.seen) == sent <= 6 + rpc.WINDOW
        assert_idle(caller, callee)
        with pytest.raises(LocalProtocolError):
            _ = outgoing.result


async def test_an_error_in_the_block_comes_out_and_cancels(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        with pytest.raises(ZeroDivisionError):  # noqa: PT012  # the block is what is tested
            async with caller.calls.open(callee.id, "wait", None):
                await settle()
                raise ZeroDivisionError
        await settle()
        assert callee.seen == ["began", "ended"]


async def test_a_cancel_that_overtakes_the_handlers_start_stops_it(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        await caller.calls.call(callee.id, "echo", None)
        async with caller.calls.open(callee.id, "wait", None):
            pass
        await settle()
        assert_idle(caller, callee)
        assert "began" not in callee.seen or callee.seen[-1] == "ended"


async def test_a_cancelled_iteration_loses_no_item(clock: trio.abc.Clock) -> None:
    async with Net(Faults(stream_delay_s=(0.0, 0.3))).pair() as (caller, callee):
        got: list[Value] = []
        async with caller.calls.open(callee.id, "count", 200) as outgoing:
            while True:
                with trio.move_on_after(0.05):
                    async for item in outgoing:
                        got.append(item)
                    break
        assert got == list(range(200))


async def test_a_call_cancelled_while_the_stream_opens_leaves_nothing(clock: trio.abc.Clock) -> None:
    async with Net(Faults(stream_delay_s=(1.0, 1.0))).pair() as (caller, callee):
        with trio.move_on_after(0.5):
            await caller.calls.call(callee.id, "wait", None)
        assert await caller.calls.call(callee.id, "echo", 1) == 1  # the same opening serves the next call
        assert callee.seen == []
        assert caller.node.statistics().streams_open == 1
        assert_idle(caller, callee)


# -- credit -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_slow_reader_holds_its_own_call_and_no_other(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        async with caller.calls.open(callee.id, "count", 10_000) as outgoing:
            await settle()
            assert len(callee.seen) == rpc.WINDOW
            assert await caller.calls.call(callee.id, "echo", 1) == 1
            async for item in outgoing:
                assert item is not None
                assert len(callee.seen) - int(str(item)) <= 2 * rpc.WINDOW
        assert len(callee.seen) == 10_000


async def test_large_items_cost_more_and_never_stick(clock: trio.abc.Clock) -> None:
    sizes = [100_000, 1, 131_000, 131_000, 60_000, 131_000, 3]

    async def large(incoming: Incoming) -> Value:
        for size in sizes:
            await incoming.send(bytes(size))
        return None

    async with Net().pair({"large": large}) as (caller, callee):
        with trio.fail_after(1):
            async with caller.calls.open(callee.id, "large", None) as outgoing:
                await settle()
                assert [len(item) async for item in outgoing if isinstance(item, bytes)] == sizes


async def test_an_item_that_is_too_large_is_a_bug_of_the_handler(clock: trio.abc.Clock) -> None:
    async def large(incoming: Incoming) -> Value:
        await incoming.send(bytes(rpc.ITEM_UNITS_MAX * rpc.UNIT_BYTES))
        return None

    async with Net().pair({"large": large}) as (caller, callee):
        with pytest.raises(RemoteError, match="large failed there"):
            await caller.calls.call(callee.id, "large", None)


def unsent_bytes(peer: Peer) -> list[int]:
    """What waits for the writers of a peer's streams, inbound then outbound."""
    streams = [stream for streams in peer.calls._in.values() for stream in streams]
    return [stream.outbox._unsent_bytes for stream in (*streams, *peer.calls._out.values())]


async def test_results_wait_for_room_in_the_outbox(clock: trio.abc.Clock) -> None:
    blob = bytes(900_000)

    async def give(incoming: Incoming) -> Value:
        return blob

    net = Net()
    async with net.pair({"give": give}) as (caller, callee):
        got: list[Value] = []

        async def one() -> None:
            got.append(await caller.calls.call(callee.id, "give", None))

        await one()
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(one)
            await trio.testing.wait_all_tasks_blocked()
            net.network.partition(callee.id, caller.id, both_ways=False)
            for _ in range(20):
                nursery.start_soon(one)
            await settle()
            assert unsent_bytes(callee)[0] < call_stream.OUTBOX_BYTES_MAX + len(blob) + 100
            assert callee.calls.statistics().calls_in_open > 10
            net.network.heal()
        assert got == [blob] * 41
        assert_idle(caller, callee)


@pytest.mark.parametrize("how", ["crash", "thaw"])
async def test_calls_wait_for_room_in_the_outbox(how: str, clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.pair() as (caller, callee), trio.open_nursery() as nursery:
        await caller.calls.call(callee.id, "echo", None)
        net.network.freeze(callee.id)
        ends: list[object] = []

        async def one() -> None:
            try:
                ends.append(len(str(await caller.calls.call(callee.id, "echo", "x" * 900_000))))
            except Unreachable as exc:
                ends.append(type(exc))

        for _ in range(20):
            nursery.start_soon(one)
        await settle()
        assert unsent_bytes(caller)[0] < call_stream.OUTBOX_BYTES_MAX + 1_000_000
        assert caller.calls.statistics().calls_out < 10  # the others wait
        getattr(net.network, how)(callee.id)
        await settle()
        assert ends == ([Unreachable] * 20 if how == "crash" else [900_000] * 20)
        assert_idle(caller, callee)


# -- bounds -----------------------------------------------------------------------------------------------------------


async def test_calls_over_the_bound_of_handlers_are_answered_busy(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee), trio.open_nursery() as nursery:
        for _ in range(calls.HANDLERS_MAX):
            nursery.start_soon(caller.calls.call, callee.id, "wait", None)
        await settle()
        with pytest.raises(RemoteError) as caught:
            await caller.calls.call(callee.id, "echo", None)
        assert (caught.value.code, caught.value.retryable) == ("busy", True)
        assert callee.calls.statistics().drops["busy"] == 1
        callee.gate.set()
        await settle()
        assert await caller.calls.call(callee.id, "echo", 1) == 1
        assert_idle(caller, callee)


async def test_a_peer_that_ends_no_call_gets_no_more_of_them(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.pair() as (caller, callee):
        await caller.calls.call(callee.id, "echo", None)
        net.network.freeze(callee.id)
        for _ in range(rpc.CALLS_MAX):
            with trio.move_on_after(0.001):
                await caller.calls.call(callee.id, "echo", None)
        with pytest.raises(Refused, match=str(rpc.CALLS_MAX)):
            await caller.calls.call(callee.id, "echo", None)
        net.network.thaw(callee.id)
        await settle()
        assert_idle(caller, callee)
        assert await caller.calls.call(callee.id, "echo", 1) == 1


async def test_of_a_peers_streams_the_oldest_gives_way(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        streams = []
        for _ in range(calls.STREAMS_IN_MAX + 1):
            streams.append(await caller.node.open_stream(callee.id, PROTOCOL))
            await settle()
        with pytest.raises(Unreachable), trio.fail_after(1):
            await streams[0].receive()
        await streams[-1].send(rpc.encode_frame(rpc.Call(1, "echo", "still")))
        assert rpc.decode_frame(await streams[-1].receive()) == rpc.End(1, "still")
        assert callee.calls.statistics().streams_in == calls.STREAMS_IN_MAX
        assert callee.calls.statistics().drops == {"streams_over_bound": 1}


# -- breaks -----------------------------------------------------------------------------------------------------------


async def begin_waiting(caller: Peer, callee: Peer, nursery: trio.Nursery, number: int) -> list[P2PError]:
    """Start calls that wait; the list fills with what they end in."""
    ends: list[P2PError] = []

    async def one() -> None:
        try:
            await caller.calls.call(callee.id, "wait", None)
        except P2PError as exc:
            ends.append(exc)

    for _ in range(number):
        nursery.start_soon(one)
    await settle()
    return ends


@pytest.mark.parametrize("how", ["crash", "break_connections", "disconnect"])
async def test_a_break_ends_all_calls_and_handlers(how: str, clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.pair() as (caller, callee), trio.open_nursery() as nursery:
        ends = await begin_waiting(caller, callee, nursery, 5)
        match how:
            case "crash":
                net.network.crash(callee.id)
            case "break_connections":
                net.network.break_connections(caller.id, callee.id)
            case _:
                await caller.node.disconnect(callee.id)
        await settle()
        assert [type(end) for end in ends] == [Unreachable] * 5
        assert len({id(end) for end in ends}) == 5
        assert callee.seen.count("ended") == 5
        assert_idle(caller, callee)
        assert caller.calls.statistics().streams_out == callee.calls.statistics().streams_in == 0


async def test_the_stream_is_opened_again_after_a_break(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.pair() as (caller, callee):
        for number in range(3):
            assert await caller.calls.call(callee.id, "echo", number) == number
            net.network.break_connections(caller.id, callee.id)
            with pytest.raises(Unreachable):
                await caller.calls.call(callee.id, "echo", number)
            await caller.node.dial(callee.node.addresses()[0])
        assert await caller.calls.call(callee.id, "echo", 9) == 9


async def test_items_that_came_before_a_break_are_read_before_it(clock: trio.abc.Clock) -> None:
    async def three(incoming: Incoming) -> Value:
        for number in range(3):
            await incoming.send(number)
        await trio.sleep_forever()
        return None

    net = Net()
    async with net.pair({"three": three}) as (caller, callee):
        got: list[Value] = []
        async with caller.calls.open(callee.id, "three", None) as outgoing:
            await settle()
            net.network.crash(callee.id)
            with pytest.raises(Unreachable):  # noqa: PT012
                async for item in outgoing:
                    got.append(item)
        assert got == [0, 1, 2]


async def test_stopping_the_callee_ends_calls_and_handlers(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.peer() as caller, trio.open_nursery() as nursery:
        async with net.peer() as callee:
            await caller.node.dial(callee.node.addresses()[0])
            ends = await begin_waiting(caller, callee, nursery, 3)
        await settle()
        assert [type(end) for end in ends] == [Unreachable] * 3
        assert callee.seen.count("ended") == 3


async def test_stopping_the_caller_ends_its_calls_and_their_handlers(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.peer() as callee, net.network.join(Identity.make()) as node, trio.open_nursery() as nursery:
        caller = Peer(node, Calls(node, PROTOCOL, {}, limits=WIDE))
        async with trio.open_nursery() as running:
            await running.start(caller.calls.run)
            await node.dial(callee.node.addresses()[0])
            ends = await begin_waiting(caller, callee, nursery, 3)
            running.cancel_scope.cancel()
        await settle()
        assert [type(end) for end in ends] == [Unreachable] * 3
        assert callee.seen.count("ended") == 3
        with pytest.raises(Unreachable):
            await caller.calls.call(callee.id, "echo", None)


async def test_stopping_the_callees_calls_alone_ends_calls_and_handlers(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.peer() as caller, net.network.join(Identity.make()) as node, trio.open_nursery() as nursery:
        callee = Peer(node, Calls(node, PROTOCOL, {}, limits=WIDE))
        callee.calls = Calls(node, PROTOCOL, methods(callee), limits=WIDE)
        async with trio.open_nursery() as running:
            await running.start(callee.calls.run)
            await caller.node.dial(node.addresses()[0])
            ends = await begin_waiting(caller, callee, nursery, 3)
            running.cancel_scope.cancel()
        await settle()
        assert [type(end) for end in ends] == [Unreachable] * 3
        assert callee.seen.count("ended") == 3
        with pytest.raises(Unreachable):  # its node lives, and nobody there answers any more
            await caller.calls.call(node.peer_id, "echo", None)
        assert node.statistics().streams_open == 0


class SlowToReset:
    """A stream, and the transport that opens it, whose reset takes a while and is not shielded by itself."""

    peer = Identity.make().peer_id

    def __init__(self, reset_s: float) -> None:
        self.reset_s = reset_s
        self.was_reset = False

    async def open_stream(self, peer: PeerId, protocol: str) -> SlowToReset:
        await trio.lowlevel.checkpoint()
        return self

    def serve(self, protocol: str, handler: object) -> None:
        pass

    async def send(self, frame: bytes) -> None:
        await trio.lowlevel.checkpoint()

    async def receive(self) -> bytes:
        await trio.sleep_forever()
        return b""

    async def reset(self) -> None:
        await trio.sleep(self.reset_s)
        self.was_reset = True


@pytest.mark.parametrize(("reset_s", "is_done"), [(0.5, True), (3600.0, False)])
async def test_stopping_resets_streams_within_a_bound(reset_s: float, is_done: bool, clock: trio.abc.Clock) -> None:
    slow = SlowToReset(reset_s)
    stopped = Calls(slow, PROTOCOL, {}, limits=WIDE)  # type: ignore[arg-type]  # as much of a transport as this needs
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        await nursery.start(stopped.run)
        with trio.move_on_after(0.1):
            await stopped.call(slow.peer, "echo", None)
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began <= 0.1 + call_stream.RESET_S_MAX
    assert slow.was_reset is is_done


async def test_a_frozen_peer_holds_up_nobody_else(clock: trio.abc.Clock) -> None:
    net = Net()
    async with net.pair() as (caller, frozen), net.peer() as lively:
        await caller.node.dial(lively.node.addresses()[0])
        await caller.calls.call(frozen.id, "echo", None)
        net.network.freeze(frozen.id)
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(caller.calls.call, frozen.id, "echo", bytes(900_000))
            await settle()
            began = trio.current_time()
            assert await caller.calls.call(lively.id, "count", 100) == "counted"
            assert trio.current_time() == began
            nursery.cancel_scope.cancel()
        assert_idle(lively)


async def test_a_new_stream_to_a_frozen_peer_gives_up(clock: trio.abc.Clock) -> None:
    net = Net(Faults(dial_timeout_s=3600))
    async with net.pair() as (caller, frozen):
        net.network.freeze(frozen.id)
        began = trio.current_time()
        with pytest.raises(Unreachable):
            await caller.calls.call(frozen.id, "echo", None)
        assert trio.current_time() - began == pytest.approx(calls.OPEN_S_MAX)


# -- breaches ---------------------------------------------------------------------------------------------------------


BREACHES = {
    "garbage": b"\xc1",
    "not a frame": canonical.encode(["call"]),
    "a callee's frame": rpc.encode_frame(rpc.End(1, None)),
    "cancel of nothing": rpc.encode_frame(rpc.Cancel(1)),
    "credit for nothing": rpc.encode_frame(rpc.Credit(1, 1)),
    "same id twice": rpc.encode_frame(rpc.Call(7, "wait", None)),
    "too much credit": rpc.encode_frame(rpc.Credit(7, 1)),
}


@pytest.mark.parametrize("name", BREACHES)
async def test_a_caller_that_breaks_the_rules_is_dropped(name: str, clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        stream = await caller.node.open_stream(callee.id, PROTOCOL)
        if name in ("same id twice", "too much credit"):
            await stream.send(rpc.encode_frame(rpc.Call(7, "wait", None)))
        await stream.send(BREACHES[name])
        with pytest.raises(Unreachable):
            await stream.receive()
        await settle()
        assert callee.calls.statistics().drops["rule_broken"] == 1
        assert callee.seen.count("began") == callee.seen.count("ended")
        assert await caller.calls.call(callee.id, "echo", 1) == 1  # the peer's other streams go on
        assert_idle(caller, callee)


@pytest.mark.parametrize(
    "answer",
    [
        b"\xc1",
        rpc.encode_frame(rpc.Call(1, "echo", None)),
        rpc.encode_frame(rpc.End(2, None)),
        rpc.encode_frame(rpc.Item(1, bytes(rpc.WINDOW * rpc.UNIT_BYTES)), WIDE),
    ],
)
async def test_a_callee_that_breaks_the_rules_ends_its_calls_so(answer: bytes, clock: trio.abc.Clock) -> None:
    async def lie(stream: Stream) -> None:
        await stream.receive()
        await stream.send(answer)
        await trio.sleep_forever()

    net = Net()
    async with net.peer() as caller, net.network.join(Identity.make()) as liar:
        liar.serve(PROTOCOL, lie)
        await caller.node.dial(liar.addresses()[0])
        with pytest.raises(RemoteProtocolError):
            await caller.calls.call(liar.peer_id, "echo", None)
        await settle()
        assert caller.calls.statistics().drops == {"rule_broken": 1}
        assert caller.node.statistics().streams_open == liar.statistics().streams_open == 0


async def test_a_stream_closed_under_a_call_is_unreachable(clock: trio.abc.Clock) -> None:
    async def leave(stream: Stream) -> None:
        await stream.receive()

    net = Net()
    async with net.peer() as caller, net.network.join(Identity.make()) as leaver:
        leaver.serve(PROTOCOL, leave)
        await caller.node.dial(leaver.addresses()[0])
        with pytest.raises(Unreachable, match="ended the stream"):
            await caller.calls.call(leaver.peer_id, "echo", None)
        await settle()
        assert caller.calls.statistics().drops == {}


@pytest.mark.slow
async def test_a_peer_that_asks_and_never_reads_is_dropped(clock: trio.abc.Clock) -> None:
    async with Net().pair() as (caller, callee):
        stream = await caller.node.open_stream(callee.id, PROTOCOL)
        method = "x" * rpc.METHOD_CHARS_MAX
        with pytest.raises(Unreachable):  # noqa: PT012
            for number in range(1, 10 * call_stream.OUTBOX_FRAMES_MAX):
                await stream.send(rpc.encode_frame(rpc.Call(number, method, None)))
        await settle()
        assert callee.calls.statistics().drops["rule_broken"] == 1
        assert callee.calls.statistics().streams_in == 0


# -- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_random_cancels_leave_nothing_behind(clock: trio.abc.Clock) -> None:
    rng = random.Random(2)
    net = Net(Faults(stream_delay_s=(0.0, 0.05)))
    async with net.pair() as (caller, callee):
        callee.gate.set()

        async def one(method: str, patience_s: float) -> None:
            body = 40 if method == "count" else None
            with trio.move_on_after(patience_s):
                try:
                    async with caller.calls.open(callee.id, method, body) as outgoing:
                        async for _ in outgoing:
                            if rng.random() < 0.01:
                                break
                except (RemoteError, Refused):
                    pass

        tasks_before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(20):
            async with trio.open_nursery() as nursery:
                for _ in range(50):
                    nursery.start_soon(one, rng.choice(["echo", "count", "wait", "refuse"]), rng.uniform(0, 0.3))
        await trio.sleep(1)
        assert_idle(caller, callee)
        assert caller.node.statistics().streams_open == callee.node.statistics().streams_open == 1
        # the one long-lived stream: its keeper, its writer; there its handler and its writer
        assert trio.lowlevel.current_statistics().tasks_living - tasks_before <= 4
        assert await caller.calls.call(callee.id, "echo", 1) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
async def test_under_faults_every_call_ends_and_nothing_is_left(seed: int, clock: trio.abc.Clock) -> None:
    """Three peers call each other while connections break, freeze and part; a call ends as promised, or in time."""
    rng = random.Random(seed)
    net = Net(Faults(stream_delay_s=(0.0, 0.2)))
    async with net.peer() as a, net.peer() as b, net.peer() as c:
        peers = [a, b, c]
        for peer in peers:
            peer.gate.set()
        outcomes: list[str] = []

        async def connect() -> None:
            for here, there in ((a, b), (b, c), (c, a)):
                try:
                    await here.node.dial(there.node.addresses()[0])
                except Unreachable:
                    pass

        async def caller(here: Peer) -> None:
            for number in range(25):
                there = rng.choice([peer for peer in peers if peer is not here])
                method, body = rng.choice([("echo", number), ("count", 20), ("wait", None), ("refuse", None)])
                outcome = "out of time"
                with trio.move_on_after(rng.choice([0.05, 1.0, 20.0])):
                    try:
                        result = await here.calls.call(there.id, method, body)
                        assert result == {"echo": number, "count": "counted", "wait": "waited"}[method]
                        outcome = "result"
                    except RemoteError as exc:
                        outcome = "result" if (method, exc.code) == ("refuse", "full") else f"{method}: {exc.code}"
                    except (Unreachable, Refused):
                        outcome = "unreachable"
                outcomes.append(outcome)

        async def chaos() -> None:
            while True:
                await trio.sleep(rng.uniform(0, 2))
                one, two = (peer.id for peer in rng.sample(peers, 2))
                match rng.randrange(5):
                    case 0:
                        net.network.break_connections(one, two)
                    case 1:
                        net.network.partition(one, two, both_ways=rng.random() < 0.5)
                    case 2:
                        net.network.freeze(one)
                    case 3:
                        await rng.choice(peers).node.disconnect(one)
                    case _:
                        net.network.heal()
                        for peer in peers:
                            net.network.thaw(peer.id)
                        await connect()

        await connect()
        async with trio.open_nursery() as disturbing:
            disturbing.start_soon(chaos)
            async with trio.open_nursery() as nursery:
                for peer in peers:
                    for _ in range(3):
                        nursery.start_soon(caller, peer)
            disturbing.cancel_scope.cancel()
        net.network.heal()
        for peer in peers:
            net.network.thaw(peer.id)
        await connect()
        await trio.sleep(60)

        assert len(outcomes) == 9 * 25
        assert set(outcomes) <= {"result", "out of time", "unreachable"}
        assert {"result"} < set(outcomes), "the faults were too mild or too hard to show anything"
        assert_idle(*peers)
        for here in peers:
            assert here.calls.statistics().drops.keys() <= {"streams_over_bound", "answered_full"}
            for there in peers:
                if here is not there:
                    assert await here.calls.call(there.id, "echo", 1) == 1
            statistics = here.calls.statistics()
            assert statistics.streams_out == 2
            assert here.node.statistics().streams_open == statistics.streams_out + statistics.streams_in
