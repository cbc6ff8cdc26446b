"""Tools between whole nodes over the loopback network: a peer that does not know of them, what a peer tells, is kept
and is held for a request."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace as changed
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from gossip.breaker import State
from node.cache import Cache
from node.errors import PeerFailed
from node.judge import Judge
from node.kept_answers import Answers, key_of_work
from node.requester import OWN
from node.room import held_bytes
from node.tools import Tool, ToolCall, Tooling
from node.work import GENERATE_TOOLS, GenerateWork, Message, Sampling, Started
from p2p.calls import Incoming
from p2p.errors import RemoteError, RemoteProtocolError
from tests.fake_runtime import TALE, FakeRuntime, facts
from tests.node_swarm import Swarm, ask, prefer, work
from tests.test_judge import FAST, PEER

TOOLING = Tooling(tools=(Tool(name="weather"),))
CHAT = (Message(role="user", content="hi"),)


def calling(tokens: int = 4, **changes: Any) -> GenerateWork:
    return replace(work(tokens=tokens), text=None, **{"messages": CHAT, "tools": TOOLING, **changes})


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm().running() as running:
        yield running


async def of_before(incoming: Incoming) -> Any:
    """What p2p.calls says for a node that has no such method."""
    await trio.lowlevel.checkpoint()
    raise RemoteError("unknown_method", "no such method", retryable=False)


async def test_a_peer_that_knows_no_tools_is_passed_over_and_thought_well_of(
    swarm: Swarm, autojump_clock: MockClock
) -> None:
    door, old = await swarm.start(), await swarm.start(FakeRuntime(), lies={GENERATE_TOOLS: of_before})
    await swarm.settled()
    alone = await ask(door, calling())
    assert isinstance(alone.error, PeerFailed)
    assert "no such method" in alone.error.message
    new = await swarm.start(FakeRuntime(facts=facts(calls="hermes")))
    await swarm.settled()
    prefer(door, old, new)
    for _ in range(6):
        got = await ask(door, calling())
        assert got.error is None
        assert got.started[0].served_by == new.id
        assert got.started[0].calls == "hermes"
    seen = door.network.gossip.observations.observed(old.id, trio.current_time())
    assert seen.state is State.CLOSED
    prefer(door, old, new)
    assert (await ask(door, work("hello", 5))).is_right("hello", 5), "without tools it is asked as ever"


async def test_what_is_kept_is_kept_for_the_same_tools(swarm: Swarm, autojump_clock: MockClock) -> None:
    node = await swarm.start(FakeRuntime(facts=facts(calls="hermes")))
    greedy = {"keep": True, "sampling": Sampling(max_tokens=4, temperature=0.0)}
    first, again = await ask(node, calling(**greedy)), await ask(node, calling(**greedy))
    other = await ask(node, calling(**greedy, tools=replace(TOOLING, parallel=False)))
    assert [got.started[0].cached for got in (first, again, other)] == [False, True, False]
    assert again.started[0].calls == "hermes"
    plain = await ask(node, calling(**greedy, tools=None))
    assert (plain.started[0].cached, plain.started[0].calls) == (False, None)
    assert key_of_work(calling(**greedy), TALE, OWN) != key_of_work(calling(**greedy, tools=None), TALE, OWN)
    assert Answers(Cache(1_000), peer="me").again(calling(**greedy), OWN, changed(TALE, calls="hermes")) is None


def test_a_peer_that_tells_of_calls_unasked_breaks_the_protocol() -> None:
    said = Started(served_by=PEER, model="tale", revision="r1", prompt_tokens=2, calls="hermes")
    Judge(PEER, FAST, calling(), 0.0).take(said, 1.0)
    with pytest.raises(RemoteProtocolError, match="was given none"):
        Judge(PEER, FAST, calling(tools=None), 0.0).take(said, 1.0)


def test_what_tools_and_calls_take_is_counted_in_bytes() -> None:
    large = Tooling(tools=(Tool(name="a", description="d" * 1_000, parameters="p" * 2_000),))
    assert 3_000 <= held_bytes(calling(tools=large)) <= 3_500
    call = ToolCall(id="c", name="a", arguments="a" * 2_000)
    assert (
        held_bytes(calling(tools=None, messages=(Message(role="assistant", content="", tool_calls=(call,)),))) >= 2_000
    )
