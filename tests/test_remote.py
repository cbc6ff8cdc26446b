"""node/remote.py against peers that lie: whatever comes, another peer answers, and the liar is worse off."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from crypto.identity import PeerId
from gossip.breaker import State
from gossip.messages import Capacity
from node.errors import NoRoom, PeerFailed, RequestError
from node.front import RouteHint
from node.judge import FIRST_TOKEN_SHARE, STALL_S, STALL_S_MAX, STALL_UNMEASURED_S, stall_s
from node.work import REMAINING_MS_MAX, Embedded, EmbedWork, Finished, GenerateWork, Piece, Progress, Started, to_wire
from p2p.calls import Incoming
from p2p.errors import RemoteError
from tests.fake_runtime import DIMENSIONS, FakeRuntime, text_of, token_at, vector_of
from tests.node_swarm import AUTO, Got, Node, Swarm, ask, prefer, work

PROMPT = (1, 2, 3)
TOKENS = 6
Script = Callable[["Liar", Incoming], Awaitable[Any]]


class Liar:
    """A peer with a script in place of its engine."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.id = PeerId("")
        self.asked = 0

    async def __call__(self, incoming: Incoming) -> Any:
        self.asked += 1
        return await self.script(self, incoming)

    async def open(self, incoming: Incoming, **changes: Any) -> None:
        fields = {"served_by": self.id, "model": "tale", "revision": "r1", "prompt_tokens": len(PROMPT), **changes}
        await incoming.send(to_wire(Started(**fields)))

    async def tell(self, incoming: Incoming, begin: int, end: int) -> None:
        """The right tokens and text."""
        for position in range(begin, end):
            before, after = text_of(PROMPT, position), text_of(PROMPT, position + 1)
            token = token_at(PROMPT, position)
            await incoming.send(to_wire(Piece(tokens=(token,), text=after.removeprefix(before))))


def finished(tokens: int, prompt_tokens: int = len(PROMPT)) -> Any:
    return to_wire(Finished(reason="length", prompt_tokens=prompt_tokens, completion_tokens=tokens))


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm().running() as running:
        yield running


async def door_liar_honest(swarm: Swarm, script: Script, method: str = "generate") -> tuple[Node, Liar, Node]:
    door, liar = await swarm.start(), Liar(script)
    lying = await swarm.start(FakeRuntime(), lies={method: liar})
    honest = await swarm.start(FakeRuntime())
    liar.id = lying.id
    await swarm.settled()
    prefer(door, lying, honest)
    return door, liar, honest


def asked(tokens: int = TOKENS, **changes: Any) -> GenerateWork:
    return replace(work(tokens=tokens), text=None, **{"tokens": PROMPT, **changes})


# --- breaches of the protocol ---


async def too_many(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await me.tell(incoming, 0, TOKENS + 1)
    return finished(TOKENS + 1)


async def wrong_revision(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming, revision="r666")
    await me.tell(incoming, 0, TOKENS)
    return finished(TOKENS)


async def wrong_model(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming, model="another")
    return finished(0)


async def wrong_name(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming, served_by="somebody else")
    return finished(0)


async def wrong_count(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await me.tell(incoming, 0, 3)
    return finished(TOKENS)


async def other_prompt(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await me.tell(incoming, 0, 3)
    return finished(3, prompt_tokens=1 << 50)


async def garbage(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await incoming.send([1, None, {"type": b"piece"}])


async def unknown_kind(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await incoming.send({"type": "harangue", "text": "x"})


async def garbage_at_the_end(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await me.tell(incoming, 0, TOKENS)
    return "done"


async def piece_first(me: Liar, incoming: Incoming) -> Any:
    await me.tell(incoming, 0, 1)


async def only_an_end(me: Liar, incoming: Incoming) -> Any:
    return finished(0)


async def started_twice(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await me.open(incoming)


async def finished_as_item(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await incoming.send(finished(0))


async def a_flood_of_text(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    while True:
        await incoming.send(to_wire(Piece(tokens=(), text="x" * 50_000)))


async def prefills_too_much(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    steps = 0
    while True:
        steps += 1
        await incoming.send(to_wire(Progress(engine_steps=steps, prefilled_tokens=steps, queue_position=0)))
        await trio.sleep(1)


BREACHES = [
    too_many,
    wrong_revision,
    wrong_model,
    wrong_name,
    wrong_count,
    other_prompt,
    garbage,
    unknown_kind,
    garbage_at_the_end,
    piece_first,
    only_an_end,
    started_twice,
    finished_as_item,
    a_flood_of_text,
    prefills_too_much,
]


@pytest.mark.parametrize("script", BREACHES, ids=lambda script: script.__name__)
async def test_a_breach_goes_to_another_peer_and_on_the_record(
    swarm: Swarm, script: Script, autojump_clock: MockClock
) -> None:
    door, liar, honest = await door_liar_honest(swarm, script)
    got = await ask(door, asked(model="tale", revision="r1"))
    assert liar.asked == 1
    assert got.error is None
    assert (len(got.tokens), len(got.started)) == (TOKENS, 1)
    if script is not a_flood_of_text:
        assert got.text == text_of(PROMPT, TOKENS)
    assert honest.serving.served == 1
    assert door.score(liar.id) < 0
    assert door.inference.counts["peer_failed:protocol"] == 1
    observed = door.network.gossip.observations.observed(liar.id, trio.current_time())
    assert observed.state is State.OPEN


# --- no breach, and no answer ---


async def silent(me: Liar, incoming: Incoming) -> Any:
    await trio.sleep_forever()


async def stops(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    await me.tell(incoming, 0, 3)
    await trio.sleep_forever()


async def same_progress(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    while True:
        await incoming.send(to_wire(Progress(engine_steps=9, prefilled_tokens=1, queue_position=0)))
        await trio.sleep(0.5)


async def steps_without_tokens(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    steps = 0
    while True:
        steps += 1
        await incoming.send(to_wire(Progress(engine_steps=steps, prefilled_tokens=len(PROMPT), queue_position=0)))
        await trio.sleep(0.5)


async def empty_pieces(me: Liar, incoming: Incoming) -> Any:
    await me.open(incoming)
    while True:
        await incoming.send(to_wire(Piece(tokens=(), text="")))
        await trio.sleep(0.5)


@pytest.mark.parametrize(
    "script", [silent, stops, same_progress, steps_without_tokens, empty_pieces], ids=lambda script: script.__name__
)
async def test_who_does_no_work_is_replaced(swarm: Swarm, script: Script, autojump_clock: MockClock) -> None:
    door, liar, honest = await door_liar_honest(swarm, script)
    began, got = trio.current_time(), Got()
    await ask(door, asked(), got=got)
    assert got.error is None
    assert got.text == text_of(PROMPT, TOKENS)
    assert got.started[0].served_by == (honest.id if script is silent else liar.id)
    assert trio.current_time() - began < STALL_S + 2
    assert sum(isinstance(item, Progress) for item in got.items) <= STALL_S / 0.5 + 1
    assert (door.score(liar.id) < 0) is (script is not silent)
    assert door.inference.counts["peer_failed:stalled"] == 1


async def promises(me: Liar, incoming: Incoming) -> Any:
    """Progress that grows for ever."""
    await me.open(incoming)
    steps = 0
    while True:
        steps += 1
        await incoming.send(to_wire(Progress(engine_steps=steps, prefilled_tokens=0, queue_position=1)))
        await trio.sleep(0.5)


async def test_progress_without_end_leaves_time_for_another(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, liar, honest = await door_liar_honest(swarm, promises)
    began = trio.current_time()
    got = await ask(door, asked(remaining_ms=40_000))
    assert got.text == text_of(PROMPT, TOKENS)
    assert trio.current_time() - began == pytest.approx(40 * FIRST_TOKEN_SHARE, abs=2)
    assert door.score(liar.id) < 0
    assert honest.serving.served == 1


# --- errors as answers ---


async def test_an_answer_whose_last_record_was_lost_ends_right(swarm: Swarm, autojump_clock: MockClock) -> None:
    async def dies_at_the_end(me: Liar, incoming: Incoming) -> Any:
        await me.open(incoming)
        await me.tell(incoming, 0, TOKENS)
        raise RemoteError("internal", "out of luck", retryable=True)

    door, _, honest = await door_liar_honest(swarm, dies_at_the_end)
    got = await ask(door, asked())
    assert got.text == text_of(PROMPT, TOKENS)
    assert len(got.tokens) == TOKENS
    assert len(honest.engine.added[0].delivered) == TOKENS


async def test_what_a_liar_delivered_is_not_the_clients_fault(swarm: Swarm, autojump_clock: MockClock) -> None:
    """It gave a token that is none, and broke off; the next peer refuses to go on after that."""

    async def poison(me: Liar, incoming: Incoming) -> Any:
        await me.open(incoming)
        await incoming.send(to_wire(Piece(tokens=((1 << 31) - 1,), text="x")))
        raise RemoteError("internal", "out of luck", retryable=True)

    door, _, _ = await door_liar_honest(swarm, poison)
    got = await ask(door, asked())
    assert isinstance(got.error, PeerFailed)
    assert "cannot be continued" in str(got.error)


@pytest.mark.parametrize("code", ["no_room", "busy", "not_ready", "deadline", "internal", "unknown_model", "nonsense"])
async def test_a_peers_error_is_not_the_end(swarm: Swarm, code: str, autojump_clock: MockClock) -> None:
    async def refuses(me: Liar, incoming: Incoming) -> Any:
        raise RemoteError(code, "no", retryable=True)

    door, liar, honest = await door_liar_honest(swarm, refuses)
    got = await ask(door, asked())
    assert got.text == text_of(PROMPT, TOKENS)
    assert honest.serving.served == 1
    assert door.score(liar.id) == 0
    pinned = await ask(door, asked(), RouteHint(peer=liar.id))
    assert isinstance(pinned.error, RequestError)
    assert (pinned.error.retry_after_s is not None) is (code in ("no_room", "busy", "not_ready"))


async def test_one_that_was_full_is_asked_again_for_half_an_answer(swarm: Swarm, autojump_clock: MockClock) -> None:
    """Two refusals, and the third time there is room."""
    engine = FakeRuntime()

    async def full_at_first(me: Liar, incoming: Incoming) -> Any:
        if me.asked < 3:
            raise RemoteError("no_room", "full", retryable=True)
        return await lying.serving.handlers()["generate"](incoming)

    door, liar = await swarm.start(), Liar(full_at_first)
    first = await swarm.start(FakeRuntime())
    await swarm.settled()
    got = Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, work(tokens=60), got=got))
        await trio.sleep(1)
        lying = await swarm.start(engine, lies={"generate": liar})
        await swarm.settled(door)
        await swarm.crash(first)
    assert got.is_right("hello", 60)
    assert liar.asked == 3


# --- vectors ---


def embedded(me: Liar, **changes: Any) -> Any:
    fields = {
        "served_by": me.id,
        "model": "tale",
        "revision": "r1",
        "dimensions": DIMENSIONS,
        "vectors": (vector_of("a"),),
        "truncated": (False,),
        "prompt_tokens": 1,
    }
    return to_wire(Embedded(**{**fields, **changes}))


VECTOR_LIES: dict[str, dict[str, Any]] = {
    "no vector": {"vectors": ()},
    "too many": {"vectors": (vector_of("a"),) * 2},
    "no flag": {"truncated": ()},
    "short": {"vectors": (b"abc",)},
    "long": {"dimensions": 65_536},
    "not a number": {"vectors": (b"\x00\x00\xc0\x7f" * DIMENSIONS,)},
    "another's name": {"served_by": "somebody"},
    "another model": {"model": "another"},
}


@pytest.mark.parametrize("lie", VECTOR_LIES.values(), ids=VECTOR_LIES)
async def test_false_vectors_are_not_taken(swarm: Swarm, lie: dict[str, Any], autojump_clock: MockClock) -> None:
    async def lies(me: Liar, incoming: Incoming) -> Any:
        return embedded(me, **lie)

    door, liar, honest = await door_liar_honest(swarm, lies, "embed")
    answer = await door.inference.embed(EmbedWork(request_id="q", model="tale", texts=("a",)), AUTO)
    assert liar.asked == 1
    assert answer.vectors == (vector_of("a"),)
    assert answer.served_by == honest.id
    assert door.score(liar.id) < 0


def test_patience_grows_with_the_longest_honest_step() -> None:
    def speeds(prefill: float, decode: float) -> Capacity:
        return Capacity(prefill_tok_s=prefill, decode_tok_s=decode)

    assert stall_s(speeds(1000.0, 100.0)) == STALL_S
    assert stall_s(speeds(25.6, 100.0)) == pytest.approx(15.0)
    assert stall_s(speeds(1000.0, 0.1)) == pytest.approx(15.0)
    assert stall_s(speeds(0.001, 0.001)) == STALL_S_MAX
    assert stall_s(speeds(0.0, 0.0)) == STALL_UNMEASURED_S


async def test_a_peer_that_keeps_embeddings_to_itself_leaves_time_for_another(
    swarm: Swarm, autojump_clock: MockClock
) -> None:
    async def never(me: Liar, incoming: Incoming) -> Any:
        await trio.sleep_forever()

    door, liar, honest = await door_liar_honest(swarm, never, "embed")
    embedded = await door.inference.embed(EmbedWork(request_id="q", texts=("a",), remaining_ms=20_000), AUTO)
    assert (liar.asked, embedded.served_by) == (1, honest.id)


async def test_pieces_that_say_nothing_are_not_passed_on(swarm: Swarm, autojump_clock: MockClock) -> None:
    async def chatter(me: Liar, incoming: Incoming) -> Any:
        await me.open(incoming)
        for position in range(TOKENS):
            await incoming.send(to_wire(Piece(tokens=(), text="")))
            await me.tell(incoming, position, position + 1)
        return finished(TOKENS)

    door, liar, _ = await door_liar_honest(swarm, chatter)
    got = await ask(door, asked())
    assert got.started[0].served_by == liar.id
    assert [len(item.tokens) for item in got.items if isinstance(item, Piece)] == [1] * TOKENS


async def test_a_peer_that_takes_no_more_calls_of_ours_is_full_not_faulty(
    swarm: Swarm, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("p2p.calls.CALLS_MAX", 1)
    door, peer = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    route, first = RouteHint(peer=peer.id), Got()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ask(door, asked(60), route, got=first))
        while not first.started:  # noqa: ASYNC110  # on a mock clock
            await trio.sleep(0.05)
        second = await ask(door, asked(), route)
        assert isinstance(second.error, NoRoom)
        assert second.error.retry_after_s
    assert first.finished is not None
    assert (await ask(door, asked(), route)).finished is not None


async def test_a_request_may_have_the_longest_time_there_is(swarm: Swarm, autojump_clock: MockClock) -> None:
    door, _ = await swarm.start(), await swarm.start(FakeRuntime())
    await swarm.settled()
    assert (await ask(door, asked(remaining_ms=REMAINING_MS_MAX))).finished is not None
