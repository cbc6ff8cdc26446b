"""Peers of a run that lie, stall or flood: what they hand on, what a member says of itself. Whom it costs what."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from crypto.digest import digest
from crypto.identity import PeerId
from gossip.agreement import Value
from gossip.round_door import HANDED_ON_MAX
from gossip.round_effects import Kept
from gossip.round_history import ASKED_AT_ONCE
from gossip.round_service import _has_forgotten
from gossip.rounds import Committed, Header, Manifest, Precommit, Prevote, Statement, sign_statement
from p2p.calls import Incoming
from tests.round_world import NETWORK, Member, World, announced
from tests.test_round_service import names, world


def answers(liar: Member, method: str, answer: Callable[[Incoming], Awaitable[Any]]) -> None:
    """This is what it answers from now on."""
    liar.door.calls._handlers[method] = answer


async def hang(_incoming: Incoming) -> None:
    await trio.sleep_forever()


def giving(records: list[bytes], statements: list[bytes], number: int) -> Callable[[Incoming], Awaitable[Any]]:
    async def give(incoming: Incoming) -> Any:
        for raw in records:
            await incoming.send({"record": raw, "statement": None})
        for raw in statements:
            await incoming.send({"record": None, "statement": raw})
        return {"round": number}

    return give


def made_up(run: World, liar: Member, number: int, base: bytes, count: int) -> list[bytes]:
    """Records that one peer signs all alone, each after the one before."""
    raws = []
    for each in range(number, number + count):
        manifest = Manifest(run=liar.service.id, round=each, base=base, shares=(), reports=(digest(b"r"),))
        body = Precommit(run=manifest.run, round=each, base=base, view=0, manifest=manifest.id)
        identity = next(one for one in run.identities if one.peer_id == liar.id)
        vote = sign_statement(identity, body, network=NETWORK, sequence=1, time_ms=run.now_ms())
        raws.append(Committed(manifest=manifest, votes=(vote,)).encode())
        base = manifest.next_base
    return raws


# ---- what peers hand on ----


@pytest.mark.parametrize("count", [1, 2, 3, 64])
async def test_records_that_prove_nothing_end_no_session_and_are_blamed(
    tmp_path: Path, autojump_clock: MockClock, count: int
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2) for number in range(2)]
        liar = await run.start(4, founders=2, rests=True)
        await run.until(1, *members)
        stood = members[0].service._averaging
        chain = members[0].history.chain
        answers(liar, "follow", giving(made_up(run, liar, chain.round, chain.base, count), [], chain.round + count))
        await liar.door.say_behind(members[0].id, members[0].service.id, chain.round + count)
        await trio.sleep(0.3)
        assert members[0].service._averaging is stood
        assert members[0].service._waiting == {}
        assert [peer for peer, _ in members[0].blames] == [liar.id]
        await run.until(4, *members)
        assert all(member.manifests[:3] == members[0].manifests[:3] for member in members)


async def test_old_records_that_somebody_hands_on_again_are_passed_over(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """They may have been new when it began to answer."""
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2) for number in range(2)]
        other = await run.start(4, founders=2, rests=True)
        await run.until(3, *members)
        raws = members[0].history.store.records(0, 3)
        answers(other, "follow", giving(raws, [], 3))
        await members[0].service._follow(other.id)
        assert members[0].blames == []
        await run.until(5, *members)


@pytest.mark.parametrize("what", ["signature", "rubbish", "record"])
async def test_what_is_not_signed_rightly_is_blamed_on_who_hands_it_on(
    tmp_path: Path, autojump_clock: MockClock, what: str
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2) for number in range(2)]
        liar = await run.start(4, founders=2, rests=True)
        await run.until(1, *members)
        await trio.sleep(0.5)
        chain = members[0].history.chain
        body = Header(run=chain.run, round=chain.round, base=chain.base)
        good = sign_statement(run.identities[1], body, network=NETWORK, sequence=1, time_ms=run.now_ms()).raw
        bad = {"signature": good[:-1] + bytes([good[-1] ^ 1]), "rubbish": b"x", "record": good}[what]
        answers(liar, "follow", giving([bad] if what == "record" else [], [] if what == "record" else [bad], 1))
        await members[0].service._follow(liar.id)
        assert [peer for peer, _ in members[0].blames] == [liar.id]
        await run.until(3, *members)


async def test_who_joins_takes_nothing_from_liars_and_all_from_who_is_honest(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossip.round_door.ANSWER_S", 5.0)
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2, rounds_kept=50) for number in range(2)]
        liars = [await run.start(number, founders=2, rests=True) for number in (4, 5)]
        await run.until(3)
        genesis = run.genesis(2)
        answers(liars[0], "follow", giving(made_up(run, liars[0], 0, genesis.base, 64), [], 64))
        answers(liars[1], "follow", hang)
        run.members = [*liars, *members]  # so it meets them in this order

        def liars_first(late: Member) -> None:
            late.history.members_here = lambda: [each.id for each in (*liars, *members)]  # type: ignore[method-assign]

        late = await run.start(6, founders=2, rounds_kept=50, prepare=liars_first)
        await run.until(6, *members, late, within_s=300)
        assert {liars[0].id} <= {peer for peer, _ in late.blames} <= {each.id for each in liars}
        run.members = [*members, late]
        run.agree()


async def test_members_are_asked_in_turn(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Four strangers that always come first would keep a joiner from ever hearing of the run."""
    async with world(tmp_path) as run:
        history = (await run.start(0, founders=1)).history
        here = [PeerId(f"m{number:02}") for number in range(11)]
        history.members_here = lambda: here  # type: ignore[method-assign]
        history._turn = 0
        turns = [history.asked_next() for _ in range(3)]
        assert all(len(set(turn)) == ASKED_AT_ONCE for turn in turns)
        assert set().union(*turns) == set(here)
        history.members_here = lambda: here[:2]  # type: ignore[method-assign]
        assert set(history.asked_next()) == set(here[:2])
        history.members_here = list  # type: ignore[method-assign]
        assert history.asked_next() == []


async def test_one_peer_is_asked_once_at_a_time_whatever_it_says(tmp_path: Path, autojump_clock: MockClock) -> None:
    asked = 0

    async def count(_incoming: Incoming) -> None:
        nonlocal asked
        asked += 1
        await trio.sleep_forever()

    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2) for number in range(2)]
        liar = await run.start(4, founders=2, rests=True)
        await run.until(1, *members)
        await trio.sleep(0.5)
        answers(liar, "follow", count)
        await liar.door.say_behind(members[0].id, members[0].service.id, 0)
        await trio.sleep(0.1)
        assert asked == 0, "it has no record that is not here"
        for _ in range(15):
            await liar.door.say_behind(members[0].id, members[0].service.id, 1 << 30)
        await trio.sleep(0.2)
        assert asked == 1
        await run.until(3, *members)


async def test_what_is_known_already_is_not_looked_at_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A signature costs, and members ask each other for all they know every few seconds."""
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2) for number in range(2)]
        await run.until(1, *members)
        averaging = members[0].service._averaging
        assert averaging is not None
        known = averaging.known()
        while not known:
            await trio.sleep(0.1)
            averaging = members[0].service._averaging
            known = averaging.known() if averaging is not None else ()
        assert averaging is not None
        looked: list[bytes] = []
        members[0].door.handed = looked.append  # type: ignore[method-assign,assignment]
        assert await members[0].service._opened_of([each.raw for each in known], averaging) == []
        assert looked == []


async def test_records_that_come_one_after_the_other_are_applied_in_one_session(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(1)
        for other in members[:3]:
            run.network.partition(members[3].id, other.id)
        number = members[3].service.round
        await run.until(number + 2, *members[:3])
        for member in members:
            member.work_s = 300.0
        stood = members[3].service._averaging
        assert stood is not None
        records = members[0].history.store.records(stood.chain.round, 2)
        first, once = stood.chain.round, giving(records, [], number + 2)

        async def give(incoming: Incoming) -> Any:
            answers(members[0], "follow", hang)
            return await once(incoming)

        answers(members[0], "follow", give)
        members[3].service._waiting[0] = members[3].history.record(records[0])  # of long ago
        run.network.heal(members[3].id, members[0].id)
        await run.until(first + 2, members[3])
        assert members[3].service._averaging is stood
        assert members[3].service._waiting == {}


async def test_what_a_round_was_is_not_told_once_its_record_is_there(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        member = await run.start(0, founders=1)
        change, told = member.owner.apply, list[object]()

        async def look(*arguments: Any) -> None:
            told.append((member.service.round, member.service.known()))
            await change(*arguments)

        member.owner.apply = look  # type: ignore[method-assign]
        await run.until(2)
        assert told[:2] == [(1, ()), (2, ())]


async def test_who_is_no_member_is_not_heard_through_a_member_either(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        run.allowed = frozenset(each.peer_id for each in run.identities[:2])
        members = [await run.start(number, founders=2) for number in range(2)]
        await run.until(1)
        await trio.sleep(0.3)
        chain = members[0].history.chain
        body = Header(run=chain.run, round=chain.round, base=chain.base)
        raw = sign_statement(run.identities[5], body, network=NETWORK, sequence=1, time_ms=run.now_ms()).raw
        answers(members[1], "follow", giving([], [raw], chain.round))
        await members[0].service._follow(members[1].id)
        assert digest(raw) not in {each.id for each in members[0].service.known()}
        assert members[0].blames == []


async def test_when_a_member_may_have_said_what_it_does_not_know(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        member = await run.start(0, founders=1)
        await run.until(2)
        await member.stop()
        history = (await run.start(0, founders=1)).history
        await trio.sleep(0.5)
        number, base = history.chain.round, history.chain.base
        assert [_has_forgotten(history, Kept(round=each, base=base)) for each in (number - 1, number, number + 1)] == [
            False, False, True
        ]  # fmt: skip
        history.store.has_forgotten, history.loaded = True, number
        assert _has_forgotten(history, None)
        assert not _has_forgotten(history, Kept(round=number, base=base))
        history.loaded = number - 1
        assert not _has_forgotten(history, None)


# ---- what a member says of itself ----


async def test_what_is_not_on_the_disk_yet_is_told_to_nobody(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Else a kill would make this member say something else."""
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        members[3].disk.is_full = True
        await trio.sleep(1.2)
        averaging = members[3].service._averaging
        assert averaging is not None
        assert any(each.sender == members[3].id for each in averaging.known()), "it has said nothing yet"
        assert all(each.sender != members[3].id for each in members[3].service.known())
        members[3].disk.is_full = False
        members[3].work_s = 0.5  # it is no voter by now: nobody waits for it
        await run.until(members[0].owner.round + 6, within_s=120)
        assert any(
            members[3].id in names(members[0], number)
            for number in range(members[0].service.round - 3, members[0].service.round)
        )


async def test_what_was_kept_and_handed_on_has_a_bound(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A round that cannot end goes from view to view for hours; the newest votes are what helps."""
    async with world(tmp_path) as run:
        member = await run.start(0, founders=1)
        await run.until(1)
        averaging = member.service._averaging
        assert averaging is not None
        state, chain = averaging._round, averaging.chain

        def said(view: int | None, number: int) -> Statement:
            of: dict[str, Any] = {"run": chain.run, "round": chain.round, "base": chain.base}
            body = Header(**of) if view is None else Prevote(**of, view=view, manifest=None)
            name = digest(f"{view} {number}".encode())
            return Statement(sender=PeerId(f"p{number}"), body=body, raw=name, id=name)

        words = [said(None, 0), *(said(view, number) for view in range(700) for number in range(13))]
        state.statements = {each.id: each for each in words}
        known = state.known()
        assert len(known) == HANDED_ON_MAX
        assert known[0] == words[0]
        assert known[-1] == words[-1]
        chosen = {each.id for each in known}
        assert [each for each in words if each.id in chosen] == list(known), "not in the order in which it came"
        assert min(each.body.view for each in known if isinstance(each.body, Prevote)) == 700 - HANDED_ON_MAX // 13
        state.agreement._valid = (3, Value(digest(b"m"), ()))
        views = Counter(each.body.view for each in state.known() if isinstance(each.body, Prevote))
        assert views[3] == 13, "what the next proposal rests on is lost"
        assert views.total() == HANDED_ON_MAX - 1
        kept = state.kept()
        assert len(kept.heard) == 8192
        member.history.store.keep(Kept(round=kept.round, base=kept.base, agreement=kept.agreement))


# ---- contradiction ----


@pytest.mark.slow
async def test_two_of_seven_that_say_two_things_change_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=7) for number in range(7)]
        for liar in members[5:]:
            tell = liar.door.tell

            async def twice(statement: Statement, liar: Member = liar, tell: Any = tell) -> None:
                await tell(statement)
                body = statement.body
                if isinstance(body, Header) and body.round == liar.history.chain.round:
                    await tell(announced(run, liar, digest(os.urandom(8)), 300))

            liar.door.tell = twice  # type: ignore[method-assign]
        await run.until(3, *members[:5], within_s=120)
        assert {peer for member in members[:5] for peer, what in member.blames if "two statements" in what} == {
            liar.id for liar in members[5:]
        }
        run.members = members[:5]
        run.agree()
