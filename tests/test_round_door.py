"""gossip/round_door.py: what peers may ask of a run, what they answer, and what becomes of those who do otherwise."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from crypto.digest import Digest
from crypto.errors import BadSignature
from crypto.identity import Identity
from gossip.errors import RemoteProtocolError
from gossip.round_door import (
    ANSWER_S,
    ASKED_BURST,
    FOLLOWS_OF_ONE_MAX,
    PLAN_BYTES_MAX,
    RECORDS_A_CALL,
    RECORDS_AT_ONCE,
    ROUND_PROTOCOL,
    RUNS_MAX,
    RoundDoor,
)
from gossip.round_state import HANDED_ON_MAX
from gossip.rounds import sign_statement
from gossip.standing import Fault
from p2p.calls import Incoming
from p2p.errors import RemoteError, Unreachable
from p2p.loopback import LoopbackNetwork
from tests.door_world import NETWORK, OTHER_RUN, RUN, START_MS, Run, statement, town

# ---- what is asked of us ----


ASKED: tuple[Any, ...] = (
    None,
    5,
    "run",
    b"",
    [],
    [RUN, 5],
    {},
    {"run": RUN},
    {"round": 5},
    {"run": RUN, "round": 5, "more": 1},
    {"run": RUN[:-1], "round": 5},
    {"run": RUN.hex(), "round": 5},
    {"run": RUN, "round": -1},
    {"run": RUN, "round": 1 << 41},
    {"run": RUN, "round": 5.0},
    {"run": RUN, "round": "5"},
    {"run": RUN, "round": None},
    {"run": RUN, "round": True},
)


@pytest.mark.parametrize("method", ["follow", "behind"])
async def test_a_question_that_does_not_fit_is_answered_so(autojump_clock: MockClock, method: str) -> None:
    async with town() as place:
        member = await place.member()
        _, _, calls = await place.stranger(member)
        for body in ASKED:
            with pytest.raises(RemoteError) as caught:
                await calls.call(member.id, method, body)
            assert caught.value.code == "bad_request", body
            await trio.sleep(1)
        assert member.run.behinds == []
        assert member.run.read == []
        assert await calls.call(member.id, method, {"run": RUN, "round": 5}) in (None, {"round": 0})


@pytest.mark.parametrize("method", ["follow", "behind"])
async def test_of_another_run_and_to_who_is_not_admitted_nothing_is_said(
    autojump_clock: MockClock, method: str
) -> None:
    async with town() as place:
        member = await place.member()
        _, stranger, calls = await place.stranger(member)

        async def refused(run: Digest) -> bool:
            with pytest.raises(RemoteError) as caught:
                await calls.call(member.id, method, {"run": run, "round": 0})
            return caught.value.code == "unknown_run"

        assert await refused(OTHER_RUN)
        assert await calls.call(member.id, "runs", None) == [b"the plan"]
        member.run.refuses = frozenset([stranger.peer_id])
        assert await refused(RUN)
        assert await calls.call(member.id, "runs", None) == []
        member.door.run = None
        assert await refused(RUN)
        assert await calls.call(member.id, "runs", None) == []
        assert member.run.behinds == []


@pytest.mark.parametrize("method", ["runs", "follow", "behind"])
async def test_each_question_is_within_the_quota_of_its_peer(autojump_clock: MockClock, method: str) -> None:
    async with town() as place:
        member = await place.member()
        _, _, calls = await place.stranger(member)
        _, _, others = await place.stranger(member)
        ask = {"run": RUN, "round": 0}
        for _ in range(int(ASKED_BURST)):
            await calls.call(member.id, method, ask)
        for _ in range(3):
            with pytest.raises(RemoteError) as caught:
                await calls.call(member.id, method, ask)
            assert caught.value.code == "too_often"
            assert caught.value.retryable
        assert member.door.drops["asked_too_often"] == 3
        await others.call(member.id, method, ask)
        await trio.sleep(1)
        await calls.call(member.id, method, ask)
        assert member.blames == []


async def test_records_are_given_from_a_round_on_and_statements_at_their_end(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, asker = await place.member(), await place.member()
        await asker.transport.dial(member.transport.addresses()[0])
        member.run.kept = [bytes([number]) for number in range(RECORDS_A_CALL + 10)]
        member.run.statements = tuple(statement(member.identity, view=view) for view in range(3))
        raws = [each.raw for each in member.run.statements]
        first = await asker.door.follow(member.id, RUN, 0)
        assert (first.records, first.statements) == (member.run.kept[:RECORDS_A_CALL], [])
        assert first.round == RECORDS_A_CALL + 10
        assert all(count == RECORDS_AT_ONCE for _, count in member.run.read)
        rest = await asker.door.follow(member.id, RUN, RECORDS_A_CALL)
        assert (rest.records, rest.statements) == (member.run.kept[RECORDS_A_CALL:], raws)
        ahead = await asker.door.follow(member.id, RUN, 1 << 40)
        assert (ahead.records, ahead.statements) == ([], raws)
        assert [asker.door.handed(raw) for raw in raws] == list(member.run.statements)
        assert asker.blames == member.blames == []


async def test_who_takes_nothing_holds_few_answers_and_not_for_ever(autojump_clock: MockClock) -> None:
    async with town() as place:
        member = await place.member()
        member.run.kept = [bytes(60_000)] * 200
        _, _, calls = await place.stranger(member)
        async with trio.open_nursery() as nursery:
            codes: list[str] = []

            async def hold() -> None:
                async with calls.open(member.id, "follow", {"run": RUN, "round": 0}) as outgoing:
                    await trio.sleep(2 * ANSWER_S)  # reads no item
                    try:
                        async for _ in outgoing:
                            pass
                    except RemoteError as exc:
                        codes.append(exc.code)

            for _ in range(FOLLOWS_OF_ONE_MAX):
                nursery.start_soon(hold)
            await trio.sleep(1)
            assert len(member.run.read) <= FOLLOWS_OF_ONE_MAX * 2
            with pytest.raises(RemoteError) as caught:
                await calls.call(member.id, "follow", {"run": RUN, "round": 0})
            assert caught.value.code == "busy"
        assert codes == ["too_slow"] * FOLLOWS_OF_ONE_MAX
        await calls.call(member.id, "follow", {"run": RUN, "round": 0})
        assert dict(member.door._following) == {}


async def test_a_disk_that_is_failing_is_told_as_such(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with town() as place:
        member = await place.member()
        member.run.is_broken = True
        _, _, calls = await place.stranger(member)
        with pytest.raises(RemoteError) as caught:
            await calls.call(member.id, "follow", {"run": RUN, "round": 0})
        assert (caught.value.code, caught.value.retryable) == ("unavailable", True)
        assert caplog.records == []


async def test_who_is_behind_is_told_to_the_run(autojump_clock: MockClock) -> None:
    async with town() as place:
        member, other = await place.member(), await place.member()
        await other.transport.dial(member.transport.addresses()[0])
        await other.door.say_behind(member.id, RUN, 7)
        assert member.run.behinds == [(other.id, 7)]


async def test_who_breaks_a_rule_of_the_protocol_is_blamed(autojump_clock: MockClock) -> None:
    async with town() as place:
        member = await place.member()
        _, stranger, _ = await place.stranger(member)
        stream = await stranger.open_stream(member.id, ROUND_PROTOCOL)
        await stream.send(b"\xc1")
        await trio.sleep(1)
        assert [(peer, fault) for peer, fault, _ in member.blames] == [(stranger.peer_id, Fault.MALFORMED)]


# ---- what others answer ----


Give = Callable[[Incoming], Awaitable[Any]]


def giving(items: list[Any], result: Any) -> Give:
    async def give(incoming: Incoming) -> Any:
        for item in items:
            await incoming.send(item)
        return result

    return give


def record(raw: bytes = b"r") -> Any:
    return {"record": raw, "statement": None}


def word(raw: bytes = b"s") -> Any:
    return {"record": None, "statement": raw}


@pytest.mark.parametrize(
    ("items", "result"),
    [
        ([record()] * (RECORDS_A_CALL + 1), {"round": 9}),
        pytest.param([word()] * (HANDED_ON_MAX + 1), {"round": 9}, marks=pytest.mark.slow),
        ([{"record": None, "statement": None}], {"round": 9}),
        ([{"record": b"r", "statement": b"s"}], {"round": 9}),
        ([{}], {"round": 9}),
        ([{"record": "text"}], {"round": 9}),
        ([{"record": b"r", "more": 1}], {"round": 9}),
        ([word(bytes(4097))], {"round": 9}),
        ([None], {"round": 9}),
        ([], {"round": -1}),
        ([], {"round": "9"}),
        ([], {"round": 9, "more": 1}),
        ([], None),
        ([], [9]),
    ],
)
async def test_an_answer_that_does_not_fit_is_not_taken(
    autojump_clock: MockClock, items: list[Any], result: Any
) -> None:
    async with town() as place:
        member = await place.member()
        _, liar, _ = await place.stranger(member, {"follow": giving(items, result)})
        with pytest.raises(RemoteProtocolError):
            await member.door.follow(liar.peer_id, RUN, 0)


async def test_as_much_as_was_asked_for_is_taken(autojump_clock: MockClock) -> None:
    async with town() as place:
        member = await place.member()
        items = [record()] * RECORDS_A_CALL + [word()] * 200
        _, giver, _ = await place.stranger(member, {"follow": giving(items, {"round": 9})})
        given = await member.door.follow(giver.peer_id, RUN, 0)
        assert (len(given.records), len(given.statements), given.round) == (RECORDS_A_CALL, 200, 9)


@pytest.mark.parametrize("pace_s", [0.5, 1e9])
async def test_an_answer_that_does_not_end_is_given_up_and_blamed(autojump_clock: MockClock, pace_s: float) -> None:
    """One item now and then, or none at all: nothing else waits for it longer than that."""

    async def give(incoming: Incoming) -> Any:
        for _ in range(HANDED_ON_MAX):
            await incoming.send(word())
            await trio.sleep(pace_s)

    async with town() as place:
        member = await place.member()
        _, liar, _ = await place.stranger(member, {"follow": give, "runs": give, "behind": give})
        for ask in (
            lambda: member.door.follow(liar.peer_id, RUN, 0),
            lambda: member.door.plans(liar.peer_id),
            lambda: member.door.say_behind(liar.peer_id, RUN, 0),
        ):
            began = trio.current_time()
            with pytest.raises(Unreachable, match="did not answer"):
                await ask()
            assert trio.current_time() - began == pytest.approx(ANSWER_S)
        assert [(peer, fault) for peer, fault, _ in member.blames] == [(liar.peer_id, Fault.TIMEOUT)] * 3


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"plan",
        {"plan": b"p"},
        ["text"],
        [b"plan", 1],
        [b"plan", None],
        [bytes(PLAN_BYTES_MAX + 1)],
        [b"p"] * (RUNS_MAX + 1),
    ],
)
async def test_runs_that_do_not_fit_are_not_taken(autojump_clock: MockClock, answer: Any) -> None:
    async with town() as place:
        member = await place.member()
        _, liar, _ = await place.stranger(member, {"runs": giving([], answer)})
        with pytest.raises(RemoteProtocolError):
            await member.door.plans(liar.peer_id)


@pytest.mark.parametrize("answer", [[], [b"one", b"two"], [bytes(PLAN_BYTES_MAX)], [b"p"] * RUNS_MAX])
async def test_runs_that_fit_are_taken(autojump_clock: MockClock, answer: Any) -> None:
    async with town() as place:
        member = await place.member()
        _, peer, _ = await place.stranger(member, {"runs": giving([], answer)})
        assert await member.door.plans(peer.peer_id) == answer


async def test_what_is_handed_on_is_checked_but_not_by_the_clock(autojump_clock: MockClock) -> None:
    async with town() as place:
        member = await place.member()
        ours = statement(Identity.make(), time_ms=1 << 52)  # our clock may be the wrong one
        assert member.door.handed(ours.raw) == ours
        with pytest.raises(BadSignature):
            member.door.handed(ours.raw[:-1] + bytes([ours.raw[-1] ^ 1]))
        with pytest.raises(RemoteProtocolError):
            member.door.handed(b"rubbish")
        other = sign_statement(Identity.make(), ours.body, network="other", sequence=1, time_ms=START_MS)
        with pytest.raises(RemoteProtocolError):
            member.door.handed(other.raw)


async def test_the_run_that_is_here_now_hears_of_connections_and_no_run_of_before() -> None:
    network = LoopbackNetwork(random.Random(1))
    async with network.join(Identity.make()) as here, network.join(Identity.make()) as there:
        door = RoundDoor(here, NETWORK, lambda *_: None, lambda: START_MS)
        first, second = Run(), Run()
        for run in (first, second):
            door.run = run
            peer = await here.dial(there.addresses()[0])
            await here.disconnect(peer)
            door.run = None
        await here.dial(there.addresses()[0])
        assert (first.changes, second.changes) == (2, 2)
