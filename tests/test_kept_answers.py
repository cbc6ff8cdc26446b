"""node/kept_answers.py: the same answer again, whole or from where the client stands; by a node and by its peers."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from model.errors import ComputeFailed
from node.cache import Cache
from node.errors import PeerFailed, RequestError, UnknownModel
from node.front import RouteHint
from node.hosting import Hosting
from node.judge import Judge
from node.kept_answers import PIECE_BYTES, PIECE_TOKENS, Answers, Recording, items_of
from node.requester import OWN, Requester, of_client, of_peer
from node.work import (
    AnswerItem,
    Finished,
    GenerateWork,
    Piece,
    Sampling,
    Started,
    TokenLogprob,
    item_from_wire,
    sent_on,
    to_wire,
)
from p2p.errors import RemoteProtocolError
from tests.fake_runtime import TALE, FakeRuntime, text_of
from tests.node_swarm import Got, Swarm, ask, eventually, expected, work
from tests.test_hosting import Host, host


def kept_work(prompt: str = "hello", tokens: int = 10, **changes: Any) -> GenerateWork:
    """A greedy request whose answer may be kept."""
    sampling = Sampling(**{"max_tokens": tokens, "temperature": 0.0, **changes.pop("sampling", {})})
    return work(prompt, tokens, keep=True, sampling=sampling, **changes)


def joined(items: list[AnswerItem | RequestError]) -> tuple[list[int], str]:
    pieces = [item for item in items if isinstance(item, Piece)]
    return [token for piece in pieces for token in piece.tokens], "".join(piece.text for piece in pieces)


def logprob(number: int, alternatives: int) -> TokenLogprob:
    return TokenLogprob(text=f"t{number}", logprob=-1.0 - number, top=((f"other{number}", -2.0),) * alternatives)


# --- what is taken down is what is given again ---


STEPS = st.lists(st.tuples(st.integers(1, 3), st.text("abé🙂", max_size=40)), min_size=1, max_size=120)


@given(STEPS, st.sampled_from([None, 0, 3, 20]), st.data())
def test_from_wherever_the_client_stands(
    steps: list[tuple[int, str]], alternatives: int | None, data: st.DataObject
) -> None:
    cache = Cache[Any](100_000_000)
    answers, asked = Answers(cache, peer="me"), kept_work(sampling={"logprobs": alternatives})
    recording = answers.recording(asked, OWN, TALE)
    assert recording is not None
    tokens, text, made = list[int](), "", list[Piece]()
    for count, fresh in steps:
        ids = tuple(range(len(tokens), len(tokens) + count))
        logprobs = () if alternatives is None else tuple(logprob(number, alternatives) for number in ids)
        made.append(Piece(tokens=ids, text=fresh, logprobs=logprobs))
        recording.take(made[-1])
        tokens += ids
        text += fresh
    answers.keep(recording, 5, "stop")
    had = data.draw(st.integers(0, len(tokens)))
    chars = data.draw(st.integers(0, len(text)))
    items = answers.again(
        msgspec.structs.replace(asked, delivered=tuple(tokens[:had]), delivered_chars=chars), OWN, TALE
    )
    assert items is not None
    assert items[0] == Started(served_by="me", model="tale", revision="r1", prompt_tokens=5, cached=True)
    assert items[-1] == Finished(reason="stop", prompt_tokens=5, completion_tokens=len(tokens))
    assert joined(list(items)) == (tokens[had:], text[chars:])
    told = [each for item in items if isinstance(item, Piece) for each in item.logprobs]
    assert told == [each for piece in made for each in piece.logprobs][had if alternatives is not None else 0 :]
    for item in items:
        if isinstance(item, Piece):
            assert len(item.tokens) <= PIECE_TOKENS
            assert len(msgspec.msgpack.encode(to_wire(item))) <= 2 * PIECE_BYTES
            assert not item.logprobs or len(item.logprobs) == len(item.tokens)
        assert item_from_wire(to_wire(item)) == item if not isinstance(item, Finished) else True


@pytest.mark.parametrize(("alternatives", "letters", "most"), [(None, 4, 64), (20, 4, 8), (None, 1_000, 9)])
def test_a_long_answer_is_given_in_pieces(alternatives: int | None, letters: int, most: int) -> None:
    answers = Answers(Cache[Any](1_000_000_000), peer="me")
    recording = answers.recording(kept_work(), OWN, TALE)
    assert recording is not None
    for number in range(500):
        logprobs = () if alternatives is None else (logprob(number, alternatives),)
        recording.take(Piece(tokens=(number,), text="x" * letters, logprobs=logprobs))
    answers.keep(recording, 5, "length")
    pieces = [item for item in answers.again(kept_work(), OWN, TALE) or () if isinstance(item, Piece)]
    assert most // 2 <= max(len(piece.tokens) for piece in pieces) <= most
    assert max(len(msgspec.msgpack.encode(to_wire(piece))) for piece in pieces) <= PIECE_BYTES
    late = answers.again(kept_work(delivered=tuple(range(400)), delivered_chars=3), OWN, TALE)
    assert late is not None
    assert max(len(item.text) for item in late if isinstance(item, Piece)) <= PIECE_BYTES
    assert joined(list(late)) == (list(range(400, 500)), "x" * (500 * letters - 3))


def test_what_a_client_has_that_is_no_part_of_the_answer_is_not_gone_on_with() -> None:
    recording = Answers(Cache[Any](1_000_000), peer="me").recording(kept_work(), OWN, TALE)
    assert recording is not None
    recording.take(Piece(tokens=(1, 2, 3), text="abc"))
    kept = recording.whole(5, "length")
    assert kept is not None
    for delivered, chars in (((1, 9), 0), ((1, 2, 3, 4), 0), ((1,), 4)):
        asked = kept_work(delivered=delivered, delivered_chars=chars)
        assert items_of(kept, asked, "me", TALE) is None


def test_an_answer_that_is_too_large_is_not_taken_down() -> None:
    recording = Answers(Cache[Any](100_000), peer="me").recording(kept_work(), OWN, TALE)
    assert recording is not None
    for number in range(2_000):
        recording.take(Piece(tokens=(number,), text="word "))
    assert recording.whole(5, "length") is None
    assert held(recording) == 0


def held(recording: Recording) -> int:
    return len(recording._tokens) + len(recording._texts) + len(recording._ends)


# --- at the engine ---


async def twice(here: Host, first: GenerateWork, second: GenerateWork, who: Requester = OWN) -> tuple[Any, Any, int]:
    """Both answers, and how many of the two the engine made."""
    before = len(here.runtime.added)
    got = []
    for asked in (first, second):
        async with here.hosting.generate(asked, who) as items:
            got.append([item async for item in items])
    return got[0], got[1], len(here.runtime.added) - before


async def test_a_greedy_answer_is_given_again_whatever_the_seed(autojump_clock: MockClock) -> None:
    async with host() as here:
        began = trio.current_time()
        once, again, made = await twice(
            here, kept_work(sampling={"seed": 1}), kept_work(sampling={"seed": 2}, request_id="other")
        )
        assert made == 1
        assert trio.current_time() - began <= 1.2, "the second at once"
        assert joined(once) == joined(again)
        assert once[-1] == again[-1] == Finished(reason="length", prompt_tokens=5, completion_tokens=10)
        assert msgspec.structs.replace(again[0], cached=False) == once[0]
        assert here.hosting.answers.cache.statistics().hits == {"completion": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"keep": False},
        {"private": True},
        {"text": "hallo"},
        {"sampling": Sampling(max_tokens=9, temperature=0.0)},
        {"sampling": Sampling(max_tokens=10, temperature=0.5, seed=1)},
        {"sampling": Sampling(max_tokens=10, temperature=0.0, stop=("x",))},
        {"sampling": Sampling(max_tokens=10, temperature=0.0, logprobs=1)},
    ],
    ids=lambda change: str(change)[:50],
)
async def test_what_is_asked_otherwise_is_made_anew(change: dict[str, Any], autojump_clock: MockClock) -> None:
    async with host() as here:
        other = msgspec.structs.replace(kept_work(), **change)
        _, again, made = await twice(here, kept_work(), other)
        assert made == 2
        assert not again[0].cached
        assert (await twice(here, other, kept_work()))[2] == (1 if other.may_be_kept is False else 0)


async def test_a_seed_that_was_chosen_gives_its_own_answer_again(autojump_clock: MockClock) -> None:
    async with host() as here:
        asked = kept_work(sampling={"temperature": 1.0, "seed": 7})
        assert (await twice(here, asked, asked))[2] == 1
        assert (await twice(here, asked, kept_work(sampling={"temperature": 1.0, "seed": 8})))[2] == 1


async def test_nobody_is_answered_with_what_another_asked(autojump_clock: MockClock) -> None:
    async with host() as here:
        for who in (OWN, of_client("203.0.113.9"), of_peer("a", is_good=True), of_peer("b", is_good=False)):
            first, second, made = await twice(here, kept_work(), kept_work(), who)
            assert (first[0].cached, second[0].cached, made) == (False, True, 1)


async def test_only_complete_answers_are_kept(autojump_clock: MockClock) -> None:
    async with host() as here:
        with trio.move_on_after(0.5):
            await here.items(kept_work())
        async with here.hosting.generate(kept_work()) as items:
            got: list[Any] = []
            async for item in items:
                got.append(item)
                if len(got) == 4:
                    here.runtime.fails = ComputeFailed("nan")
        assert isinstance(got[-1], RequestError)
        assert here.hosting.answers.cache.statistics().entries == 0
        tokens, _ = joined(await here.items(kept_work()))
        assert (await twice(here, kept_work(), kept_work()))[2] == 0
        other = kept_work("other", 10, delivered=tuple(tokens[:2]))
        assert (await twice(here, other, kept_work("other", 10)))[2] == 2, "another's tokens are not this model's"


async def test_a_takeover_goes_on_from_what_is_kept_or_by_the_engine(autojump_clock: MockClock) -> None:
    whole = text_of(tuple(map(ord, "hello")), 10)
    async with host() as here:
        tokens, text = joined(await here.items(kept_work()))
        assert text == whole
        for count, chars in ((3, 7), (5, 0), (9, len(whole)), (10, 4), (10, len(whole))):
            rest = await here.items(kept_work(delivered=tuple(tokens[:count]), delivered_chars=chars))
            assert joined(rest) == (tokens[count:], whole[chars:])
            assert rest[-1] == Finished(reason="length", prompt_tokens=5, completion_tokens=10)
        assert len(here.runtime.added) == 1
        odd = await here.items(kept_work(delivered=(tokens[0], 7), delivered_chars=3))
        assert len(here.runtime.added) == 2, "what another model began is gone on with by the engine"
        assert isinstance(odd[-1], Finished)


async def test_new_weights_never_give_an_old_answer(autojump_clock: MockClock) -> None:
    async with host(step_s=0.5) as here:
        await here.items(kept_work())
        async with trio.open_nursery() as nursery:
            got: list[Any] = []

            async def on_the_way() -> None:
                got.extend(await here.items(kept_work("late", 4)))

            nursery.start_soon(on_the_way)
            await trio.sleep(0.7)
            await here.hosting.switch("weights", "r2")
        assert got[0].revision == "r1"
        assert here.hosting.answers.cache.statistics().entries == 0
        for prompt in ("hello", "late"):
            first, second, made = await twice(here, kept_work(prompt, 4), kept_work(prompt, 4))
            assert (first[0].revision, second[0].revision, made) == ("r2", "r2", 1)
        with pytest.raises(UnknownModel):
            await here.items(kept_work(revision="r1"))


def test_an_entry_of_other_weights_is_not_found_even_where_it_was_not_forgotten() -> None:
    cache = Cache[Any](1_000_000)
    answers = Answers(cache, peer="me")
    recording = answers.recording(kept_work(), OWN, TALE)
    assert recording is not None
    recording.take(Piece(tokens=(1,), text="a"))
    answers.keep(recording, 5, "stop")
    assert answers.again(kept_work(), OWN, replace(TALE, revision="r2")) is None
    assert answers.again(kept_work(revision="r2"), OWN, TALE) is None
    assert answers.again(kept_work(revision="r1"), OWN, TALE) is not None


async def test_what_is_kept_is_given_where_the_queue_is_full(autojump_clock: MockClock) -> None:
    async with host(slots=1, queue_max=0) as here, trio.open_nursery() as nursery:
        await here.items(kept_work())
        nursery.start_soon(here.items, work("long", 100))
        await trio.sleep(0.5)
        assert isinstance((await here.items(kept_work()))[-1], Finished)
        nursery.cancel_scope.cancel()


async def test_a_node_that_keeps_nothing_makes_each_answer(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        runtime = FakeRuntime()
        hosting = Hosting(runtime, peer="me", on_change=lambda: None, cache_mb=0)
        await nursery.start(hosting.run)
        for _ in range(2):
            async with hosting.generate(kept_work()) as items:
                assert [item async for item in items]
        assert len(runtime.added) == 2
        nursery.cancel_scope.cancel()


# --- through peers ---


@pytest.fixture
async def swarm() -> AsyncIterator[Swarm]:
    async with Swarm().running() as running:
        yield running


async def test_a_peer_keeps_for_each_door_its_own(swarm: Swarm, autojump_clock: MockClock) -> None:
    server = await swarm.start(FakeRuntime())
    doors = [await swarm.start() for _ in range(2)]
    await swarm.settled()
    for door in doors:
        got = [await ask(door, kept_work()) for _ in range(3)]
        assert all(each.is_right("hello", 10) for each in got)
        assert [each.started[0].cached for each in got] == [False, True, True]
    assert len(server.engine.added) == 2


async def test_a_door_asks_for_nothing_to_be_kept_for_clients_of_elsewhere(
    swarm: Swarm, autojump_clock: MockClock
) -> None:
    """They are one to the peer: what one of them asked would be told to the other."""
    server, door = await swarm.start(FakeRuntime()), await swarm.start()
    await swarm.settled()
    await ask(door, kept_work())
    for account in ("203.0.113.9", "203.0.113.10"):
        got = await ask(door, kept_work(), RouteHint(account=account))
        assert not got.started[0].cached
    assert len(server.engine.added) == 3
    assert sent_on(kept_work(), "203.0.113.9") == msgspec.structs.replace(kept_work(), keep=False)
    # at their own door each finds what it asked itself, and no more
    for account, cached in (("203.0.113.9", False), ("203.0.113.9", True), ("203.0.113.10", False)):
        got = await ask(server, kept_work("there", 5), RouteHint(account=account))
        assert got.started[0].cached is cached


async def test_a_kept_answer_says_nothing_of_a_peers_speed(swarm: Swarm, autojump_clock: MockClock) -> None:
    server, door = await swarm.start(FakeRuntime()), await swarm.start()
    await swarm.settled()
    await ask(door, kept_work())
    before = door.network.gossip.observations.observed(server.id, trio.current_time())
    for _ in range(5):
        await ask(door, kept_work())
    after = door.network.gossip.observations.observed(server.id, trio.current_time())
    assert (after.tok_s, after.first_token_s) == (before.tok_s, before.first_token_s)
    assert before.tok_s is not None


async def test_a_peer_that_answers_a_private_request_with_what_it_kept_breaks_the_protocol() -> None:
    started = Started(served_by="p", model="tale", revision="r1", prompt_tokens=5, cached=True)
    for asked, is_breach in ((kept_work(), False), (kept_work(private=True), True), (work(), True)):
        judge = Judge("p", capacity(), asked, 0.0)  # type: ignore[arg-type]  # a name is a peer here
        if is_breach:
            with pytest.raises(RemoteProtocolError, match="asked not to"):
                judge.take(started, 0.0)
        else:
            assert judge.take(started, 0.0)


def capacity() -> Any:
    from gossip.messages import Capacity

    return Capacity(accepting=True)


async def test_the_peer_that_takes_over_goes_on_from_what_it_kept(swarm: Swarm, autojump_clock: MockClock) -> None:
    door = await swarm.start()
    peers = [await swarm.start(FakeRuntime()) for _ in range(2)]
    await swarm.settled()
    for peer in peers:
        await ask(door, kept_work("once upon", 60), RouteHint(peer=peer.id))
    assert [len(peer.engine.added) for peer in peers] == [1, 1]
    dying = peers[0]
    dying.hosting.answers.cache.forget(())
    got = Got()
    async with trio.open_nursery() as nursery:
        for other in peers[1:]:  # the door asks the one that has forgotten first
            door.network.gossip.observations.rtt(other.id, 60.0)
        door.network.gossip.observations.rtt(dying.id, 0.001)
        nursery.start_soon(lambda: ask(door, kept_work("once upon", 60), got=got))
        await eventually(lambda: len(got.tokens) >= 7, 10)
        await swarm.crash(dying)
    assert got.is_right("once upon", 60)
    assert got.text == expected("once upon", 60)
    assert len(peers[1].engine.added) == 1, "its engine had no part in it"
    assert got.error is None or isinstance(got.error, PeerFailed)
