"""node/inference.py and remote.py: whole nodes over the loopback network; who answers, who takes over, who waits."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio
from trio.testing import MockClock

from gossip.breaker import State
from model.errors import ComputeFailed
from node.errors import BadRequest, DeadlinePassed, NoRoom, NotReady, PeerFailed, RequestError, UnknownModel
from node.front import Route, RouteHint
from node.judge import ACCEPT_S, STALL_S
from node.pursuit import HURRY_S
from node.work import EmbedWork, GenerateWork, Piece, Progress
from p2p.errors import RemoteError
from tests.fake_runtime import FakeRuntime, facts, vector_of
from tests.node_swarm import AUTO, Got, Node, Swarm, ask, eventually, expected, prefer, work

LOCAL, REMOTE = RouteHint(route=Route.LOCAL), RouteHint(route=Route.REMOTE)
LONG = 60  # tokens: six seconds of the fake engine


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm().running() as running:
        yield running


def at(node: Node) -> RouteHint:
    return RouteHint(peer=node.id)


async def started(got: Got, within_s: float = 10, tokens: int = 1) -> None:
    await eventually(lambda: len(got.tokens) >= tokens, within_s)


# --- who answers ---


async def test_a_node_answers_by_its_own_engine(swarm: Swarm, autojump_clock: MockClock) -> None:
    node = await swarm.start(FakeRuntime())
    got = await ask(node, work("hello", 9))
    assert got.is_right("hello", 9)
    assert got.started[0].served_by == node.id
    assert got.finished is not None
    assert (got.finished.reason, got.finished.prompt_tokens) == ("length", 5)


async def test_a_node_without_a_model_answers_through_a_peer(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime(ends_at=7))
    await swarm.settled()
    got = await ask(door, work("hello", 9))
    assert got.text == expected("hello", 7)
    assert got.finished is not None
    assert got.finished.reason == "stop"
    assert got.started[0].served_by == peer.id
    assert door.inference.statistics().completion_tokens == 7
    assert peer.serving.served == 1
    assert door.network.gossip.observations.is_proven(peer.id)


async def test_where_nothing_is_served_the_error_says_what_to_do(swarm: Swarm, autojump_clock: MockClock) -> None:
    door = await swarm.start()
    error = (await ask(door, work())).error
    assert isinstance(error, UnknownModel)
    assert "--bootstrap" in str(error)


async def test_who_serves_what_nobody_known_serves_is_searched_for(
    swarm: Swarm, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    door, peer = await swarm.start(), await swarm.start()
    searched: list[str] = []

    async def find(model: str) -> bool:
        searched.append(model)
        await trio.sleep(0.5)
        await swarm.start(FakeRuntime())
        await swarm.settled()
        return True

    monkeypatch.setattr(door.network.gossip, "find", find)
    got = await ask(door, work("hello", 9, model="tale"))
    assert got.is_right("hello", 9)
    assert searched == ["tale"]
    assert peer.id not in got.servers


async def test_the_client_chooses_the_route(swarm: Swarm, autojump_clock: MockClock) -> None:
    one, other, third = [await swarm.start(FakeRuntime()) for _ in range(3)]
    door = await swarm.start()
    await swarm.settled()
    for hint, server in ((AUTO, one), (LOCAL, one), (at(one), one), (at(other), other), (at(third), third)):
        got = await ask(one, work(), hint)
        assert got.is_right("hello", 10)
        assert got.started[0].served_by == server.id
    assert (await ask(one, work(), REMOTE)).started[0].served_by != one.id
    for hint, word in ((LOCAL, "x-route is local"), (at(door), "x-peer")):
        error = (await ask(door, work(), hint)).error
        assert isinstance(error, UnknownModel)
        assert word in str(error)
        assert "serves a model for text; served now: " in str(error)
    assert isinstance((await ask(one, work(model="none such"))).error, UnknownModel)
    assert "tale" in str((await ask(one, work(model="none such"))).error)


async def test_a_full_engine_sends_to_a_peer_with_room_else_queues_here(
    swarm: Swarm, autojump_clock: MockClock
) -> None:
    here, peer = await swarm.start(FakeRuntime(slots=1)), await swarm.start(FakeRuntime(slots=1))
    await swarm.settled()
    answers = [Got() for _ in range(3)]
    async with trio.open_nursery() as nursery:
        for number, got in enumerate(answers):
            nursery.start_soon(lambda n, g: ask(here, work(f"q{n}", LONG), got=g), number, got)
            await trio.sleep(1.2)  # an advert's time
    assert [got.started[0].served_by for got in answers] == [here.id, peer.id, here.id]
    assert all(got.is_right(f"q{number}", LONG) for number, got in enumerate(answers))


async def test_no_room_anywhere_says_when_to_try_again(swarm: Swarm, autojump_clock: MockClock) -> None:
    door = await swarm.start()
    peer = await swarm.start(FakeRuntime(slots=1, queue_max=0))
    await swarm.settled()
    async with trio.open_nursery() as nursery:
        got = Got()
        nursery.start_soon(lambda: ask(door, work(tokens=LONG), got=got))
        await started(got)
        refused = await ask(door, work())
        assert isinstance(refused.error, NoRoom)
        assert refused.error.retry_after_s
        assert door.score(peer.id) == 0
    assert got.is_right("hello", LONG)


# --- takeover ---


async def test_a_peer_that_dies_in_mid_stream_is_replaced_without_a_trace(
    swarm: Swarm, autojump_clock: MockClock
) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime()) for _ in range(3)]
    await swarm.settled()
    got, asked = Got(), work("once upon", LONG)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, asked, got=got))
        for count in (7, 20):  # an odd one: half a character is held back there
            await started(got, tokens=count)
            server = next(peer for peer in peers if peer.engine.busy and not peer.scope.cancel_called)
            await swarm.crash(server)
    assert got.is_right("once upon", LONG)
    last = next(peer for peer in peers if not peer.scope.cancel_called)
    assert len(last.engine.added[-1].delivered) >= 20
    assert last.engine.added[-1].delivered_chars > 0
    assert door.inference.counts["takeovers"] == 2


async def test_a_frozen_peer_is_replaced_after_its_patience(swarm: Swarm, autojump_clock: MockClock) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime()) for _ in range(2)]
    await swarm.settled()
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=LONG), got=got))
        await started(got, tokens=10)
        server = next(peer for peer in peers if peer.engine.busy)
        swarm.wire.freeze(server.id)
        count = len(got.tokens)
        took_s = await eventually(lambda: len(got.tokens) > count + 1, 20)
    assert STALL_S <= took_s < STALL_S + 1
    assert got.is_right("hello", LONG)
    assert door.score(server.id) < 0  # SECURITY.md 6: timeout after accept
    assert door.inference.counts["peer_failed:stalled"] == 1


async def test_a_takeover_waits_for_no_silent_peer_while_another_is_there(
    swarm: Swarm, autojump_clock: MockClock
) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime()) for _ in range(3)]
    await swarm.settled()
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=LONG), got=got))
        await started(got, tokens=10)
        first = next(peer for peer in peers if peer.engine.busy)
        silent, third = (peer for peer in peers if peer is not first)
        swarm.wire.partition(door.id, silent.id)  # nobody is told
        prefer(door, silent, third)  # of two it asks the better one
        await swarm.crash(first)
        count = len(got.tokens)
        took_s = await eventually(lambda: len(got.tokens) > count + 1, 20)
    assert HURRY_S <= took_s < HURRY_S + 0.5 < ACCEPT_S
    assert got.is_right("hello", LONG)
    assert door.inference.counts["passed_over"] == 1
    assert door.score(silent.id) == 0  # it may be slow: a hurry blames nobody
    assert third.engine.added


async def test_a_takeover_is_patient_with_the_last_peer(swarm: Swarm, autojump_clock: MockClock) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime()) for _ in range(2)]
    await swarm.settled()
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=LONG), got=got))
        await started(got, tokens=10)
        first = next(peer for peer in peers if peer.engine.busy)
        last = next(peer for peer in peers if peer is not first)
        swarm.wire.partition(door.id, last.id)
        await swarm.crash(first)
        await trio.sleep(HURRY_S + 0.5)
        swarm.wire.heal()
    assert got.is_right("hello", LONG)
    assert door.inference.counts["passed_over"] == 0
    assert len(last.engine.added) == 1


async def test_a_failing_engine_here_is_replaced_by_a_peer(swarm: Swarm, autojump_clock: MockClock) -> None:
    here, peer = await swarm.start(FakeRuntime()), await swarm.start(FakeRuntime())
    await swarm.settled()
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(here, work(tokens=LONG), got=got))
        await started(got, tokens=5)
        here.engine.fails = ComputeFailed("not finite")
    assert got.is_right("hello", LONG)
    assert len(peer.engine.added[0].delivered) >= 5


async def test_an_engine_here_takes_over_from_a_peer(swarm: Swarm, autojump_clock: MockClock) -> None:
    here, peer = await swarm.start(FakeRuntime()), await swarm.start(FakeRuntime())
    await swarm.settled()
    peer.engine.fails = ComputeFailed("not finite")
    blocked = [Got(), Got()]
    async with trio.open_nursery() as nursery:
        for got in blocked:
            nursery.start_soon(lambda g: ask(here, work("fill", 30), LOCAL, got=g), got)
        await started(blocked[1])
        assert (await ask(here, work(tokens=10))).is_right("hello", 10)
    assert here.inference.counts["peer_failed:internal"] == 1


async def test_nobody_left_is_a_clear_error(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=LONG), got=got))
        await started(got, tokens=10)
        await swarm.crash(peer)
    assert isinstance(got.error, PeerFailed)
    assert "tokens" in str(got.error)
    assert "no other live peer serves tale at revision r1" in str(got.error)
    assert expected("hello", LONG).startswith(got.text)


async def test_another_revision_takes_nothing_over(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.start(FakeRuntime(facts=facts(revision="r2")))
    await swarm.settled()
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=LONG, revision="r1"), got=got))
        await started(got, tokens=10)
        await swarm.crash(peer)
    assert isinstance(got.error, PeerFailed)


async def test_a_pinned_peer_has_no_deputy(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer, other = await swarm.start(), await swarm.start(FakeRuntime()), await swarm.start(FakeRuntime())
    await swarm.settled()
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=LONG), at(peer), got=got))
        await started(got, tokens=10)
        await swarm.crash(peer)
    assert isinstance(got.error, PeerFailed)
    assert other.engine.added == []


async def test_half_an_answer_waits_for_room(swarm: Swarm, autojump_clock: MockClock) -> None:
    """Its peer died, the other one is full: it goes on there as soon as there is room, though refused at first."""
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    other = await swarm.start(FakeRuntime(slots=1, queue_max=0))
    await swarm.settled()
    got, filler = Got(), Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(other, work("fill", 80), LOCAL, got=filler))
        await trio.sleep(1)
        nursery.start_soon(lambda: ask(door, work(tokens=LONG), got=got))
        await started(got, tokens=10)
        assert got.started[0].served_by == peer.id
        await swarm.crash(peer)
    assert filler.is_right("fill", 80)
    assert got.is_right("hello", LONG)


# --- patience ---


async def test_a_long_prefill_that_grows_is_left_alone(swarm: Swarm, autojump_clock: MockClock) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime(prefill_chunk=10, step_s=1.0)) for _ in range(2)]
    await swarm.settled()
    prompt = "p" * 600
    got = await ask(door, work(prompt, 3))
    assert got.is_right(prompt, 3)
    assert sum(len(peer.engine.added) for peer in peers) == 1
    assert sum(isinstance(item, Progress) for item in got.items) > 50


async def test_a_place_in_a_queue_that_moves_is_waited_for(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime(slots=1, step_s=0.3))
    await swarm.settled()
    answers = [Got(), Got()]
    async with trio.open_nursery() as nursery:
        for got in answers:
            nursery.start_soon(lambda g: ask(door, work(tokens=50), got=g), got)
    assert all(got.is_right("hello", 50) for got in answers)
    assert len(peer.engine.added) == 2


async def test_the_deadline_ends_it_here_and_at_the_peer(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    began = trio.current_time()
    got = await ask(door, work(tokens=LONG, remaining_ms=2000))
    assert trio.current_time() - began == pytest.approx(2.0)
    assert isinstance(got.error, DeadlinePassed)
    assert f"{len(got.tokens)} tokens were delivered" in str(got.error)
    assert expected("hello", LONG).startswith(got.text)
    await trio.sleep(2 * peer.engine.step_s)
    assert peer.engine.holds == 0


async def test_a_client_that_leaves_frees_the_slot_within_a_step(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime(step_s=1.0))
    await swarm.settled()
    for server, route in ((peer, AUTO), (peer, LOCAL)):
        asker = door if route is AUTO else peer
        with trio.CancelScope() as scope:
            await ask(asker, work(tokens=LONG), route, on_item=lambda got: len(got.tokens) == 3 and scope.cancel())
        await trio.sleep(2 * server.engine.step_s + 0.01)  # the step under way, and the one that begins with the order
        assert server.engine.holds == 0
        assert server.hosting.requests_running == 0
        assert asker.inference.statistics().cancelled == 1
        assert asker.inference.running == 0


async def test_leaving_the_block_early_is_a_cancel(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    async with door.inference.answer(work(tokens=LONG), AUTO) as answer:
        async for item in answer:
            if isinstance(item, Piece):
                break
    await trio.sleep(0.3)
    assert peer.engine.holds == 0
    assert door.inference.statistics().cancelled == 1
    with pytest.raises(ValueError, match="the client's own"):
        async with door.inference.answer(work(), AUTO):
            raise ValueError("the client's own")
    assert door.inference.statistics().cancelled == 2


# --- the caller's fault ---


@pytest.mark.parametrize("bad", [work("x" * 1990, 20), work("", 5)], ids=["too long", "empty"])
async def test_bad_input_is_the_callers_fault_and_asked_once(
    swarm: Swarm, autojump_clock: MockClock, bad: GenerateWork
) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime()) for _ in range(2)]
    await swarm.settled()
    for asker in (door, peers[0]):
        got = await ask(asker, bad)
        assert isinstance(got.error, BadRequest)
    assert sum(peer.infer.statistics().calls_in for peer in peers) == 1
    for peer in peers:
        assert door.score(peer.id) == 0
        assert door.network.gossip.observations.observed(peer.id, trio.current_time()).success == 1.0


async def test_a_request_that_cannot_be_sent_is_nobodys_failure(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    got = await ask(door, work("\U0001f40d" * 200_000, tokens=5, delivered=(2**31 - 1,) * 100_000))
    assert isinstance(got.error, RequestError)
    assert got.error.code in ("bad_request", "too_large")
    assert (await ask(door, work())).is_right("hello", 10)
    assert door.network.gossip.observations.observed(peer.id, trio.current_time()).state is State.CLOSED


# --- the end of a node ---


async def test_draining_finishes_what_runs_and_refuses_what_is_new(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    got, own = Got(), Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=LONG), got=got))
        nursery.start_soon(lambda: ask(peer, work(tokens=LONG), LOCAL, got=own))
        await started(got)
        await started(own)
        peer.hosting.draining = peer.inference.draining = True
        late = await ask(door, work())
        assert isinstance(late.error, NotReady)
        assert isinstance((await ask(peer, work())).error, NotReady)
        with pytest.raises(NotReady):
            await peer.inference.embed(EmbedWork(request_id="q", texts=("a",)), AUTO)
        await peer.inference.wait_idle()
        await peer.hosting.wait_idle()
        assert own.finished is not None
    assert got.is_right("hello", LONG)


async def test_idle_means_that_the_last_piece_was_taken(swarm: Swarm, autojump_clock: MockClock) -> None:
    """The engine is done long before a slow reader is."""
    peer = await swarm.start(FakeRuntime(step_s=0.001))
    got = Got()

    async def read_slowly() -> None:
        async with peer.hosting.generate(work(tokens=20)) as items:
            async for item in items:
                await trio.sleep(0.5)
                got.items.append(item)  # type: ignore[arg-type]  # no error comes

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_slowly)
        await started(got)
        await peer.hosting.wait_idle()
        assert got.is_right("hello", 20)


# --- embeddings ---


def embed_work(*texts: str | tuple[int, ...], **changes: object) -> EmbedWork:
    return EmbedWork(**{"request_id": "q", "texts": texts, **changes})  # type: ignore[arg-type]


async def test_embeddings_here_and_at_a_peer(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    for asker in (door, peer):
        embedded = await asker.inference.embed(embed_work("a", "bc", (1, 2)), AUTO)
        assert embedded.vectors == (vector_of("a"), vector_of("bc"), vector_of((1, 2)))
        assert embedded.served_by == peer.id
        assert asker.inference.statistics().prompt_tokens == 5
    with pytest.raises(UnknownModel):
        await door.inference.embed(embed_work("a"), LOCAL)
    with pytest.raises(BadRequest):
        await door.inference.embed(embed_work("a", ""), AUTO)
    with pytest.raises(BadRequest):
        await peer.inference.embed(embed_work("a", ""), AUTO)
    assert peer.infer.statistics().calls_in == 2


async def test_embeddings_fail_over(swarm: Swarm, autojump_clock: MockClock) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime()) for _ in range(3)]
    await swarm.settled()
    prefer(door, peers[0], *peers[1:])
    peers[0].engine.embed_error = ComputeFailed("not finite")
    assert (await door.inference.embed(embed_work("a"), AUTO)).served_by != peers[0].id
    assert (await peers[0].inference.embed(embed_work("a"), AUTO)).served_by != peers[0].id
    with pytest.raises(RequestError, match="not finite"):
        await peers[0].inference.embed(embed_work("a"), LOCAL)
    with pytest.raises(RequestError, match="not finite"):
        await door.inference.embed(embed_work("a"), at(peers[0]))


@pytest.mark.parametrize("remaining_ms", [20_000, 120_000])
async def test_embeddings_outlive_a_frozen_peer(swarm: Swarm, autojump_clock: MockClock, remaining_ms: int) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime()) for _ in range(2)]
    await swarm.settled()
    prefer(door, *peers)
    swarm.wire.freeze(peers[0].id)
    embedded = await door.inference.embed(embed_work("a", remaining_ms=remaining_ms), AUTO)
    assert embedded.served_by == peers[1].id


async def test_embeddings_have_a_deadline_here_and_at_the_peer(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, peer = await swarm.start(), await swarm.start(FakeRuntime(embed_s=1.0))
    await swarm.settled()
    began = trio.current_time()
    with pytest.raises(RequestError):
        await door.inference.embed(embed_work(*["t"] * 100, remaining_ms=3000), AUTO)
    assert trio.current_time() - began <= 3.0
    await trio.sleep(35)  # one turn of 32 texts
    assert sum(peer.engine.embedded) <= 64
    with pytest.raises(RemoteError) as failure:
        await door.infer.call(
            peer.id, "embed", {"type": "embed", "request_id": "q", "texts": ["t"] * 100, "remaining_ms": 3000}
        )
    assert failure.value.code == "deadline"
