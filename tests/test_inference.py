"""node/inference.py, remote.py and serving.py: whole nodes over the loopback network, on a mock clock."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from node.front import Route, RouteHint
from tests.fake_runtime import FakeRuntime
from tests.node_swarm import AUTO, Got, Node, Swarm, ask, eventually, expected, work

LOCAL, REMOTE = RouteHint(route=Route.LOCAL), RouteHint(route=Route.REMOTE)


@pytest.fixture
async def swarm(autojump_clock: MockClock) -> AsyncIterator[Swarm]:
    async with Swarm().running() as running:
        yield running


def at(node: Node) -> RouteHint:
    return RouteHint(peer=node.id)


async def test_a_node_answers_by_its_own_engine(swarm: Swarm) -> None:
    node = await swarm.start(FakeRuntime())
    got = await ask(node, work("hello", 9))
    assert got.is_right("hello", 9)
    assert got.started[0].served_by == node.id
    assert got.finished is not None
    assert (got.finished.reason, got.finished.prompt_tokens) == ("length", 5)


async def test_a_node_without_a_model_answers_through_a_peer(swarm: Swarm) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    got = await ask(door, work("hello", 9))
    assert got.is_right("hello", 9)
    assert got.started[0].served_by == peer.id
    assert door.inference.statistics().completion_tokens == 9
    assert peer.serving.served == 1
