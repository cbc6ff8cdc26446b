"""Servers behind nodes of a network: answers pass from one to the other in the middle, or end in a clear error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

import node.upstream_health
from node.backend import Backend
from node.errors import NoRoom, NotReady, PeerFailed, RequestError
from node.front import Route, RouteHint
from node.upstream import Upstream
from node.upstream_http import Server
from node.upstream_watch import UpstreamConfig
from node.work import SAID, EmbedWork, GenerateWork, Message, Sampling
from tests.fake_runtime import FakeRuntime
from tests.node_swarm import AUTO, Got, Node, Swarm, ask
from tests.upstream_server import FakeServer, chat_prompt, expected, served

pytestmark = pytest.mark.slow
PATIENCE_S = 30  # hang guard
REMOTE = RouteHint(route=Route.REMOTE)
LONG = 120


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.upstream_health, "LOOK_S", 0.3)


class World:
    """A swarm with servers behind some of its nodes."""

    def __init__(self, swarm: Swarm, nursery: trio.Nursery) -> None:
        self.swarm = swarm
        self._nursery = nursery

    async def start(self, **fields: Any) -> tuple[Node, FakeServer, Callable[[], None]]:
        server = FakeServer(**{"step_s": 0.01, **fields})
        stop: Callable[[], None] = await self._nursery.start(_serve, server)

        def backend(made: Node) -> Backend:
            return Upstream(Server(server.url, None), UpstreamConfig(), peer=made.id, on_change=made.offer)

        return await self.swarm.start(backend=backend), server, stop


@asynccontextmanager
async def world() -> AsyncIterator[World]:
    with trio.fail_after(4 * PATIENCE_S):
        async with trio.open_nursery() as nursery, Swarm().running() as swarm:
            yield World(swarm, nursery)
            nursery.cancel_scope.cancel()


async def _serve(server: FakeServer, *, task_status: trio.TaskStatus[Callable[[], None]]) -> None:
    async with served(server) as stop:
        task_status.started(stop)
        await trio.sleep_forever()


async def until(true: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not true():  # noqa: ASYNC110  # of things that know no trio
            await trio.sleep(0.01)


def text(prompt: str = "once", most: int = LONG) -> GenerateWork:
    return GenerateWork(request_id="q", text=prompt, sampling=Sampling(max_tokens=most))


def chat(content: str = "hi", most: int = LONG) -> GenerateWork:
    messages = (Message(role="user", content=content),)
    return GenerateWork(request_id="q", messages=messages, sampling=Sampling(max_tokens=most))


def is_whole(got: Got, prompt: str, most: int = LONG) -> bool:
    """Whether it is the undisturbed answer; white space made again may cost tokens of its end."""
    whole = expected(prompt, most)
    assert got.error is None, got.error
    assert whole.startswith(got.text), (got.text, whole)
    return len(got.text) >= len(whole) - 30 and len(got.started) == 1 and got.finished is not None


async def test_a_node_answers_peers_by_the_server_behind_it() -> None:
    async with world() as here:
        peer, _, _ = await here.start(kind="vllm")
        door = await here.swarm.start()
        await here.swarm.settled(door)
        got = await ask(door, text())
        assert got.text == expected("once", LONG)
        assert got.started[0].served_by == peer.id
        assert got.started[0].revision.startswith(SAID)
        assert door.score(peer.id) == 0
        assert door.inference.statistics().completion_tokens == LONG
        assert door.inference.statistics().prompt_tokens == len("once")
        (row,) = door.state.peers()
        assert (row["models"][0]["name"], row["device"]) == ("tale", "vllm")
        assert (await door.inference.embed(EmbedWork(request_id="e", texts=("a", "b")), AUTO)).served_by == peer.id
        assert door.state.models()[0].embeds


@pytest.mark.parametrize("asked", [text(), chat()], ids=["text", "chat"])
@pytest.mark.parametrize("fault", ["the server is cut", "the server ends", "the node crashes"])
async def test_another_node_with_the_same_weights_goes_on(asked: GenerateWork, fault: str) -> None:
    async with world() as here:
        peers = [await here.start(kind="vllm") for _ in range(2)]
        door = await here.swarm.start()
        await here.swarm.settled(door)
        broken = list[Node]()

        async def disturb(got: Got) -> None:
            await until(lambda: len(got.tokens) > 30)
            made, server, stop = next(each for each in peers if each[1].running)
            broken.append(made)
            if fault == "the server is cut":
                server.cut_after = len(got.tokens) + 5
            elif fault == "the server ends":
                stop()
            else:
                await here.swarm.crash(made)

        got = Got()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disturb, got)
            await ask(door, asked, got=got)
        assert is_whole(got, chat_prompt("hi") if asked.messages else "once")
        assert door.inference.counts["takeovers"] == 1
        other = next(each for each in peers if each[0] is not broken[0])
        (body,) = other[1].bodies("/v1/chat/completions" if asked.messages else "/v1/completions")
        assert body["max_tokens"] < LONG - 30
        assert len(got.tokens) <= LONG


async def test_a_nodes_own_client_is_served_by_others_when_its_server_breaks() -> None:
    async with world() as here:
        (one, server, _), (other, _, _) = [await here.start(kind="ollama") for _ in range(2)]
        await here.swarm.settled()
        server.cut_after = 40
        got = await ask(one, text())
        assert is_whole(got, "once")
        assert got.started[0].served_by == one.id
        assert other.serving.served == 1


async def test_who_only_has_the_same_name_does_not_go_on() -> None:
    """Neither another server of that name nor an engine: nobody knows that their weights are the same."""
    async with world() as here:
        (one, server, _), _ = [await here.start(kind="openai") for _ in range(2)]
        await here.swarm.start(FakeRuntime())
        await here.swarm.settled()
        server.cut_after = 40
        got = await ask(one, text())
        assert isinstance(got.error, PeerFailed)
        assert "no other live peer serves tale at revision said:openai:" in got.error.message
        assert got.text == expected("once", 40)
        assert got.finished is None


async def test_a_chat_that_nobody_can_go_on_with_ends_in_a_clear_error() -> None:
    async with world() as here:
        (one, server, _), (_, other, _) = [await here.start(kind="ollama") for _ in range(2)]
        await here.swarm.settled()
        server.cut_after = 40
        got = await ask(one, chat())
        assert isinstance(got.error, PeerFailed)
        assert got.text == expected(chat_prompt("hi"), 40)
        assert not other.bodies("/v1/chat/completions")


async def test_requests_go_elsewhere_while_a_server_is_down() -> None:
    async with world() as here:
        (one, server, stop), (other, _, _) = [await here.start(kind="vllm") for _ in range(2)]
        door = await here.swarm.start()
        await here.swarm.settled()
        stop()
        await until(lambda: bool(one.state.readiness().degraded))
        assert one.state.readiness().ready, "it is still a door"
        assert "is down" in one.state.readiness().degraded[0]
        for asker in (one, door):
            got = await ask(asker, text(most=5))
            assert got.text == expected("once", 5)
            assert got.started[0].served_by == other.id
        capacity = one.state.capacity()
        assert (capacity.accepting, capacity.slots_free, len(capacity.models)) == (False, 0, 1)
        async with served(server, int(server.url.rpartition(":")[2])):
            await until(lambda: one.state.capacity().accepting)
            got = await ask(one, text(most=5))
            assert got.started[0].served_by == one.id
            assert not one.state.readiness().degraded


async def test_when_all_are_down_the_client_is_told_when_to_try_again() -> None:
    async with world() as here:
        one, _, stop = await here.start()
        door = await here.swarm.start()
        await here.swarm.settled(door)
        stop()
        await until(lambda: bool(one.state.readiness().degraded))
        for asker in (one, door):
            error: RequestError | None = (await ask(asker, text(most=5))).error
            assert isinstance(error, NoRoom | NotReady)
            assert error.retry_after_s


async def test_a_full_server_sends_on_to_peers() -> None:
    async with world() as here:
        (one, _, _), (other, _, _) = [await here.start(kind="llama.cpp", slots=1) for _ in range(2)]
        await here.swarm.settled()
        answers = [Got(), Got()]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: ask(one, text("a"), got=answers[0]))
            await until(lambda: bool(answers[0].tokens))
            await ask(one, text("b"), got=answers[1])
        assert [got.started[0].served_by for got in answers] == [one.id, other.id]
        assert [got.text for got in answers] == [expected("a", LONG), expected("b", LONG)]


async def test_who_leaves_frees_the_server_of_a_peer() -> None:
    async with world() as here:
        _, server, _ = await here.start(step_s=0.05)
        door = await here.swarm.start()
        await here.swarm.settled(door)
        with trio.CancelScope() as scope:
            await ask(door, text(most=1_000), on_item=lambda got: scope.cancel() if len(got.tokens) > 3 else None)
        await until(lambda: server.running == 0)
