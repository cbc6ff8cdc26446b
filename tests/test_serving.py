"""node/serving.py: what peers may call, called by hand over the loopback network."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from gossip.standing import Fault
from model.step import Priority
from node.work import Embedded, Finished, Piece, Started, from_wire, to_wire
from p2p.errors import RemoteError, Unreachable
from tests.fake_runtime import FakeRuntime, vector_of
from tests.node_swarm import Node, Swarm, ask, expected, work


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm().running() as running:
        yield running


async def pair(swarm: Swarm, runtime: FakeRuntime | None) -> tuple[Node, Node]:
    caller, server = await swarm.start(), await swarm.start(runtime)
    return caller, server


async def failure(caller: Node, server: Node, method: str, body: Any) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await caller.infer.call(server.id, method, body)
    return caught.value


async def test_the_wire_form_of_an_answer(swarm: Swarm, autojump_clock: MockClock) -> None:
    caller, server = await pair(swarm, FakeRuntime())
    async with caller.infer.open(server.id, "generate", to_wire(work("hello", 5))) as outgoing:
        items = [item async for item in outgoing]
    assert from_wire(items[0], Started).served_by == server.id
    pieces = [from_wire(item, Piece) for item in items if item["type"] == "piece"]
    assert "".join(piece.text for piece in pieces) == expected("hello", 5)
    assert from_wire(outgoing.result, Finished).completion_tokens == 5
    body = {"type": "embed", "request_id": "q", "texts": ["a", bytes.fromhex("0100000002000000")]}
    embedded = from_wire(await caller.infer.call(server.id, "embed", body), Embedded)
    assert embedded.vectors == (vector_of("a"), vector_of((1, 2)))
    assert server.serving.served == 2


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        "generate",
        {},
        {"type": "embed", "request_id": "q", "texts": ["a"]},
        {"type": "generate", "request_id": "", "text": "x"},
        {"type": "generate", "request_id": "q", "text": "x", "extra": 1},
        {"type": "generate", "request_id": "q", "text": "x", "remaining_ms": 0},
        {"type": "generate", "request_id": "q", "text": "x", "sampling": {"max_tokens": -1}},
        {"type": "generate", "request_id": "q", "text": "x", "delivered": [-1]},
    ],
    ids=str,
)
async def test_a_body_that_does_not_fit_is_refused(swarm: Swarm, body: Any, autojump_clock: MockClock) -> None:
    caller, server = await pair(swarm, FakeRuntime())
    error = await failure(caller, server, "generate", body)
    assert (error.code, error.retryable) == ("bad_request", False)
    assert server.engine.added == []


async def test_who_asks_is_told_to_the_engine(swarm: Swarm, autojump_clock: MockClock) -> None:
    """A peer that has served us goes before strangers, until a fault of its is fresh."""
    caller, server = await pair(swarm, FakeRuntime())
    assert server.runtime is not None

    async def asked(**marks: bool) -> tuple[str, Priority, bool]:
        await caller.infer.call(server.id, "generate", to_wire(work(**marks)))
        request = server.engine.added[-1]
        return request.requester, request.priority, request.private

    assert await asked() == (caller.id, Priority.STRANGER, False)
    observations = server.network.gossip.observations
    observations.started(caller.id, trio.current_time())
    observations.finished(caller.id, 10, 1.0, trio.current_time())
    observations.ended(caller.id, trio.current_time())
    assert await asked(private=True) == (caller.id, Priority.PEER, True)
    server.network.gossip.blame(caller.id, Fault.TIMEOUT, "it let a request down")
    assert await asked() == (caller.id, Priority.STRANGER, False)
    await trio.sleep(1_500)  # two and a half half-lives: it is forgiven
    assert (await asked())[1] is Priority.PEER
    await ask(server, work())
    assert (server.engine.added[-1].requester, server.engine.added[-1].priority) == ("own", Priority.OWN)


async def test_a_peer_that_has_as_much_as_one_may_is_told_that_there_is_no_room(
    swarm: Swarm, autojump_clock: MockClock
) -> None:
    caller, server = await pair(swarm, FakeRuntime(slots=1, queue_max=2))
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(caller.infer.call, server.id, "generate", to_wire(work(tokens=50)))
        await trio.sleep(0.5)
        assert (await failure(caller, server, "generate", to_wire(work()))).code == "no_room"
        assert (await ask(server, work())).is_right("hello", 10)  # its own clients have room left
        nursery.cancel_scope.cancel()


async def test_without_a_model_it_says_so(swarm: Swarm, autojump_clock: MockClock) -> None:
    caller, server = await pair(swarm, None)
    for method, body in (
        ("generate", to_wire(work())),
        ("embed", {"type": "embed", "request_id": "q", "texts": ["a"]}),
    ):
        error = await failure(caller, server, method, body)
        assert (error.code, error.retryable) == ("not_ready", True)
    server.serving.inference = None  # before its parts are wired
    assert (await failure(caller, server, "generate", to_wire(work()))).code == "not_ready"


async def test_it_never_routes_on(swarm: Swarm, autojump_clock: MockClock) -> None:
    """A node without the model refuses a peer, though it could ask a third one: there are no loops."""
    caller, server = await pair(swarm, None)
    third = await swarm.start(FakeRuntime())
    await swarm.settled()
    await failure(caller, server, "generate", to_wire(work()))
    assert third.engine.added == []


async def test_the_callers_time_is_the_deadline_here(swarm: Swarm, autojump_clock: MockClock) -> None:
    caller, server = await pair(swarm, FakeRuntime())
    began = trio.current_time()
    error = await failure(caller, server, "generate", to_wire(work(tokens=500, remaining_ms=2_000)))
    assert error.code == "deadline"
    assert trio.current_time() - began == pytest.approx(2.0, abs=0.01)
    await trio.sleep(2 * server.engine.step_s)
    assert server.engine.holds == 0


@pytest.mark.parametrize("end", ["cancel", "crash", "disconnect"])
async def test_a_caller_that_is_gone_frees_the_slot(swarm: Swarm, end: str, autojump_clock: MockClock) -> None:
    caller, server = await pair(swarm, FakeRuntime())
    async with trio.open_nursery() as nursery:

        async def call() -> None:
            try:
                await caller.infer.call(server.id, "generate", to_wire(work(tokens=500)))
            except Unreachable:
                return

        nursery.start_soon(call)
        await trio.sleep(1)
        assert server.engine.busy == 1
        if end == "cancel":
            nursery.cancel_scope.cancel()
        elif end == "crash":
            await swarm.crash(caller)
        else:
            await caller.network.transport.disconnect(server.id)
        await trio.lowlevel.cancel_shielded_checkpoint()
    await trio.sleep(2 * server.engine.step_s + 0.01)
    assert server.engine.holds == 0
    assert server.hosting.requests_running == 0


async def test_a_slow_caller_holds_up_nobody_else(swarm: Swarm, autojump_clock: MockClock) -> None:
    """The engine writes ahead; what a caller does not read waits here, bounded by its max_tokens."""
    caller, server = await pair(swarm, FakeRuntime(step_s=0.001, slots=2))
    other = await swarm.start()
    async with caller.infer.open(server.id, "generate", to_wire(work(tokens=1500))) as outgoing:
        await anext(outgoing)
        await trio.sleep(10)
        assert server.engine.holds == 0  # its slot is free already
        await other.infer.call(server.id, "generate", to_wire(work(tokens=5)))
        items = [item async for item in outgoing]
    assert sum(item["type"] == "piece" for item in items) == 1500
