"""gossip/finder.py: who serves a model is found two hops away, in bounded time, whatever neighbours answer."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from crypto.identity import Identity
from gossip.finder import ANSWER_S
from gossip.finding import (
    FIND_ADVERTS_MAX,
    FIND_PROTOCOL,
    FOUND_ADVERTS,
    ONWARD_BURST,
    ONWARD_S,
    SAMPLE_S,
    SEARCH_S,
    UNKNOWN_S,
    Find,
    find_of,
    find_to_wire,
)
from gossip.messages import Advert, seal_advert
from gossip.pace import FIND_BURST
from gossip.standing import Verdict
from p2p.errors import StreamClosed, Unreachable
from p2p.loopback import LoopbackNetwork
from p2p.transport import Stream
from tests.gossip_swarm import CAPACITY, Node, connect, node, until, wall_clock_ms


@pytest.fixture
def network() -> LoopbackNetwork:
    return LoopbackNetwork(random.Random(5))


async def chain(stack: AsyncExitStack, network: LoopbackNetwork, count: int) -> list[Node]:
    """Nodes in a row, none of which passes gossip on; the last one serves "tale"."""
    nodes = [await stack.enter_async_context(node(network)) for _ in range(count)]
    for each in nodes:
        each.gossip._hearing.flow.share = 0.0
    for one, other in pairwise(nodes):
        await connect(one, other)
    await trio.sleep(1.0)
    nodes[-1].gossip.offer(CAPACITY)
    await trio.sleep(1.0)
    return nodes


@pytest.mark.parametrize(("hops", "found"), [(1, True), (2, True), (3, True), (4, False)])
async def test_a_model_is_found_at_most_two_askings_away(
    network: LoopbackNetwork, autojump_clock: MockClock, hops: int, found: bool
) -> None:
    async with AsyncExitStack() as stack:
        nodes = await chain(stack, network, hops + 1)
        assert (nodes[-1].peer in nodes[0].sees()) == (hops == 1)
        began = trio.current_time()
        assert await nodes[0].gossip.find("tale") == found
        assert trio.current_time() - began <= SEARCH_S
        assert (nodes[-1].peer in nodes[0].sees()) == found


async def test_a_sample_tells_of_who_is_too_far_to_be_heard(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with AsyncExitStack() as stack:
        nodes = await chain(stack, network, 3)
        assert nodes[2].peer not in nodes[0].sees()
        await until(lambda: nodes[2].peer in nodes[0].sees(), 2 * SAMPLE_S)


class Stranger:
    """A peer that answers questions as its test wants."""

    def __init__(self, *answers: bytes, closes: bool = True) -> None:
        self.answers, self.closes = answers, closes
        self.asked: list[Find] = []

    async def __call__(self, stream: Stream) -> None:
        self.asked.append(find_of(await stream.receive()))
        for each in self.answers:
            await stream.send(each)
        if self.closes:
            await stream.close()
        else:
            await trio.sleep_forever()


async def test_nobody_knows_and_the_next_question_costs_nothing(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    stranger = Stranger()
    async with node(network) as here, network.join(Identity.make()) as there:
        there.serve(FIND_PROTOCOL, stranger)
        await here.transport.dial(there.addresses()[0])
        assert not await here.gossip.find("tale")
        assert stranger.asked == [Find(model="tale", limit=FOUND_ADVERTS, onward=True)]
        assert not await here.gossip.find("tale")
        assert len(stranger.asked) == 1
        await trio.sleep(UNKNOWN_S)
        assert not await here.gossip.find("tale")
        assert len([find for find in stranger.asked if find.model]) == 2


async def test_a_node_that_has_just_started_waits_for_its_first_neighbour(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as door, node(network) as server:
        server.gossip.offer(CAPACITY)
        async with trio.open_nursery() as nursery:

            async def ask(model: str | None) -> None:
                began = trio.current_time()
                assert await door.gossip.find(model)
                assert 1.0 <= trio.current_time() - began < 1.5

            nursery.start_soon(ask, "tale")
            nursery.start_soon(ask, None)
            await trio.sleep(1.0)
            await connect(door, server)


async def test_a_node_that_stays_alone_says_so_in_time(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as alone:
        began = trio.current_time()
        assert not await alone.gossip.find(None)
        assert trio.current_time() - began == SEARCH_S
        assert not await alone.gossip.find(None)
        assert trio.current_time() - began == SEARCH_S  # the next one is told at once


async def test_those_who_ask_for_the_same_wait_together(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    stranger = Stranger(closes=False)
    async with node(network) as here, network.join(Identity.make()) as there:
        there.serve(FIND_PROTOCOL, stranger)
        await here.transport.dial(there.addresses()[0])
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(here.gossip.find, "tale")
        assert trio.current_time() - began == SEARCH_S  # and no longer than for one
        assert len(stranger.asked) == 1


async def test_a_search_ends_when_gossip_brings_what_it_is_for(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as here, node(network) as server, network.join(Identity.make()) as silent:
        silent.serve(FIND_PROTOCOL, Stranger(closes=False))
        await here.transport.dial(silent.addresses()[0])
        await connect(here, server)
        await trio.sleep(3.0)
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.gossip.find, "tale")
            await trio.sleep(1.0)
            server.gossip.offer(CAPACITY)
        assert 1.0 <= trio.current_time() - began < 2.0 < SEARCH_S


async def test_a_search_that_is_given_up_leaves_nothing(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    stranger = Stranger(closes=False)
    async with node(network) as here, network.join(Identity.make()) as there:
        there.serve(FIND_PROTOCOL, stranger)
        await here.transport.dial(there.addresses()[0])
        with trio.move_on_after(0.5):
            await here.gossip.find("tale")
        assert here.gossip._finder._under_way == {}


async def test_who_answers_with_rubbish_is_blamed(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as here, network.join(Identity.make()) as there:
        there.serve(FIND_PROTOCOL, Stranger(b"rubbish"))
        await here.transport.dial(there.addresses()[0])
        assert not await here.gossip.find("tale")
        assert here.gossip.standing.score(there.peer_id, trio.current_time()) < 0


async def test_more_answers_than_asked_for_are_not_read(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    adverts = [
        seal_advert(
            Identity.make(),
            Advert(instance="0" * 16, started_ms=0, agent="t", capacity=CAPACITY),
            network="main",
            sequence=number,
            time_ms=wall_clock_ms(),
        )
        for number in range(3 * FOUND_ADVERTS)
    ]
    async with node(network) as here, network.join(Identity.make()) as there:
        there.serve(FIND_PROTOCOL, Stranger(*adverts))
        await here.transport.dial(there.addresses()[0])
        assert await here.gossip.find("tale")
        assert len(here.sees()) == FOUND_ADVERTS


async def ask(here: Node, there: Node, raw: bytes) -> list[bytes]:
    """Ask as a peer that is no node of ours might."""
    stream = await here.transport.open_stream(there.peer, FIND_PROTOCOL)
    await stream.send(raw)
    answers = []
    try:
        while True:
            answers.append(await stream.receive())
    except StreamClosed:
        return answers


async def test_a_question_is_answered_with_no_more_than_it_asks_for(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(node(network)) for _ in range(6)]
        for each in nodes:
            each.gossip.offer(CAPACITY)
        for each in nodes[1:]:
            await connect(nodes[0], each)
        await trio.sleep(2.0)
        assert len(await ask(nodes[1], nodes[0], find_to_wire(Find(limit=3)))) == 3
        assert len(await ask(nodes[1], nodes[0], find_to_wire(Find(model="tale", limit=4)))) == 4
        assert len(await ask(nodes[1], nodes[0], find_to_wire(Find(limit=FIND_ADVERTS_MAX)))) == 6
        assert await ask(nodes[1], nodes[0], find_to_wire(Find(model="other"))) == []
        (own,) = await ask(nodes[0], nodes[1], find_to_wire(Find(model="tale", limit=1)))
        assert own == nodes[1].gossip._own.raw  # who serves it says so itself


async def test_rubbish_for_a_question_is_blamed(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as one, node(network) as other:
        await connect(one, other)
        with pytest.raises(Unreachable):
            await ask(one, other, b"rubbish")
        assert other.gossip.standing.score(one.peer, trio.current_time()) < 0


async def test_who_asks_too_often_is_not_answered(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    async with node(network) as one, node(network) as other:
        await connect(one, other)
        for _ in range(int(FIND_BURST)):
            await ask(one, other, find_to_wire(Find()))
        with pytest.raises(Unreachable):
            await ask(one, other, find_to_wire(Find()))
        assert other.gossip.statistics().drops["searched_too_often"] == 1
        assert other.gossip.standing.verdict(one.peer, trio.current_time()) is Verdict.FINE


async def test_a_question_that_never_comes_is_not_waited_for(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with node(network) as one, node(network) as other:
        await connect(one, other)
        stream = await one.transport.open_stream(other.peer, FIND_PROTOCOL)
        with trio.fail_after(ANSWER_S + 1.0), pytest.raises((StreamClosed, Unreachable)):
            await stream.receive()


async def test_who_asks_is_not_asked_back(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    asker, other = Stranger(), Stranger()
    async with (
        node(network) as middle,
        network.join(Identity.make()) as one,
        network.join(Identity.make()) as two,
    ):
        for transport, stranger in ((one, asker), (two, other)):
            transport.serve(FIND_PROTOCOL, stranger)
            await transport.dial(middle.transport.addresses()[0])
        stream = await one.open_stream(middle.peer, FIND_PROTOCOL)
        await stream.send(find_to_wire(Find(model="tale", limit=5, onward=True)))
        with pytest.raises(StreamClosed):
            await stream.receive()
        assert [find for find in asker.asked if find.model] == []
        assert [find for find in other.asked if find.model] == [Find(model="tale", limit=5)]


async def test_nobody_can_have_us_ask_without_end(network: LoopbackNetwork, autojump_clock: MockClock) -> None:
    asked = Stranger()
    async with AsyncExitStack() as stack:
        middle = await stack.enter_async_context(node(network))
        there = await stack.enter_async_context(network.join(Identity.make()))
        there.serve(FIND_PROTOCOL, asked)
        await there.dial(middle.transport.addresses()[0])
        for asker in range(4):
            transport = await stack.enter_async_context(network.join(Identity.make()))
            await transport.dial(middle.transport.addresses()[0])
            for number in range(8):
                stream = await transport.open_stream(middle.peer, FIND_PROTOCOL)
                await stream.send(find_to_wire(Find(model=f"m{asker}.{number}", onward=True)))
                with pytest.raises(StreamClosed):
                    await stream.receive()
        assert len([find for find in asked.asked if find.model]) == ONWARD_BURST


async def test_a_neighbour_that_says_nothing_holds_nobody_up(
    network: LoopbackNetwork, autojump_clock: MockClock
) -> None:
    async with (
        node(network) as here,
        node(network) as middle,
        network.join(Identity.make()) as silent,
    ):
        silent.serve(FIND_PROTOCOL, Stranger(closes=False))
        await silent.dial(middle.transport.addresses()[0])
        await connect(here, middle)
        began = trio.current_time()
        assert await ask(here, middle, find_to_wire(Find(model="tale", onward=True))) == []
        assert trio.current_time() - began == ONWARD_S
        await silent.dial(here.transport.addresses()[0])
        async with node(network) as server:
            for each in (here, middle, server):
                each.gossip._hearing.flow.share = 0.0
            server.gossip.offer(CAPACITY)
            await trio.sleep(1.0)
            await connect(server, middle)
            await trio.sleep(1.0)
            began = trio.current_time()
            assert await here.gossip.find("tale")
            assert trio.current_time() - began < 0.5  # though the silent one was asked too
