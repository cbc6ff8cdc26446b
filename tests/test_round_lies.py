"""Peers of a run that lie, stall or flood, and disks that hold something else: whom it costs what."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from crypto.digest import Digest, digest
from crypto.identity import Identity, PeerId
from gossip.agreement import Value
from gossip.blob_files import PART
from gossip.blob_wire import BLOB_PROTOCOL, KIND_PIECE
from gossip.errors import CannotStore
from gossip.round_door import HANDED_ON_MAX
from gossip.round_effects import Kept
from gossip.round_history import ASKED_AT_ONCE
from gossip.round_history import announced as announced_by
from gossip.round_service import _has_forgotten
from gossip.round_state import Phase
from gossip.round_store import RoundStore
from gossip.rounds import Committed, Contribution, Header, Manifest, Precommit, Prevote, Statement, sign_statement
from gossip.transfer import manifest_of
from p2p.calls import Incoming
from p2p.transport import Stream
from tests.round_world import NETWORK, SIZE, Member, World
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


# ---- payloads and weights ----


async def silent(_stream: Stream) -> None:
    await trio.sleep_forever()


async def test_a_member_whose_payload_cannot_be_had_keeps_nobody_waiting(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        members[3].transport.serve(BLOB_PROTOCOL, silent)
        await run.until(3, *members[:3])
        assert members[3].id not in names(members[0], 2)
        assert len(members[0].manifests[2].shares) == 3


@pytest.mark.slow
async def test_strangers_whose_payloads_cannot_be_had_take_no_members_place(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """Who has no vote costs nothing to be: many of them must not fill the few places for fetches."""
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=3) for number in range(3)]
        strangers = [await run.start(number, founders=3, work_s=0.1) for number in range(3, 8)]
        for stranger in strangers:
            stranger.transport.serve(BLOB_PROTOCOL, silent)
        began = trio.current_time()
        await run.until(4, *members)
        assert trio.current_time() - began < 4 * 2.5
        assert names(members[0], 3) == {each.id for each in members}


class BadDonor:
    """A stream on which pieces of weights come late, or wrong; payloads come as they should."""

    def __init__(self, stream: Stream, pause_s: float, *, is_wrong: bool) -> None:
        self._stream, self._pause_s, self._is_wrong = stream, pause_s, is_wrong

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def send(self, frame: Any) -> None:
        raw = bytes(frame)
        if raw[0] == KIND_PIECE and len(raw) > SIZE:
            await trio.sleep(self._pause_s)
            raw = raw[:-1] + bytes([raw[-1] ^ self._is_wrong])
        await self._stream.send(raw)


def gives_badly(donor: Member, pause_s: float, *, is_wrong: bool = False) -> None:
    async def serve(stream: Stream) -> None:
        await donor.blobs._serving.serve(BadDonor(stream, pause_s, is_wrong=is_wrong))  # type: ignore[arg-type]

    donor.transport.serve(BLOB_PROTOCOL, serve)


async def test_a_fetch_ends_with_its_round(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        members[3].transport.serve(BLOB_PROTOCOL, silent)
        await run.until(2, *members[:3])
        await trio.sleep(0.5)
        fetching = members[0].service._fetching
        assert fetching is not None
        number = members[0].service.round
        await run.until(number + 1, members[0])
        assert all(header in {each.id for each in members[0].service._averaging.known()} for header in fetching._scopes)  # type: ignore[union-attr]
        assert members[0].blobs.statistics().fetches <= 1


def announced_in(run: World, liar: Member, blob: Digest, number: int) -> Statement:
    """For a round that is not the one to come."""
    body = Header(
        run=liar.service.id,
        round=number,
        base=liar.history.chain.base,
        contribution=Contribution(blob=blob, payload_bytes=7, steps=1, tokens=10),
    )
    return sign_statement(Identity.make(), body, network=NETWORK, sequence=1, time_ms=run.now_ms())


def announced(run: World, liar: Member, blob: Digest, size: int) -> Statement:
    chain = liar.history.chain
    contribution = Contribution(blob=blob, payload_bytes=size, steps=1, tokens=10)
    body = Header(run=chain.run, round=chain.round, base=chain.base, contribution=contribution)
    identity = next(one for one in run.identities if one.peer_id == liar.id)
    return sign_statement(identity, body, network=NETWORK, sequence=run.now_ms(), time_ms=run.now_ms())


async def test_a_payload_is_looked_at_once_and_not_when_its_round_is_decided(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """It is asked for again and again while it is on its way."""
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2) for number in range(2)]
        other = await run.start(4, founders=2, rests=True)
        await run.until(1)
        path = tmp_path / "content"
        path.write_bytes(b"content")
        blob = await other.blobs.offer_file(path)
        await trio.sleep(0.3)
        header, fetching = announced(run, other, blob, 7), members[0].service._fetching
        assert fetching is not None
        members[0].service.heard(header)
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(fetching.fetch, header, (other.id,))
        await trio.sleep(0.2)
        assert members[0].owner.examined.count(other.id) == 1
        averaging = members[0].service._averaging
        assert averaging is not None
        averaging._round.phase, before = Phase.APPLYING, averaging._round.phase
        await fetching.fetch(header, (other.id,))
        averaging._round.phase = before
        assert members[0].owner.examined.count(other.id) == 1
        seen = len(members[0].owner.examined)
        await fetching.fetch(announced_in(run, other, blob, header.body.round + 1), (other.id,))
        assert len(members[0].owner.examined) == seen


async def test_a_try_to_have_a_payload_has_its_time(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A donor may give just enough, all along, not to be dropped."""
    monkeypatch.setattr("gossip.round_fetching.FETCH_S_MIN", 1.0)
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2, work_s=100.0) for number in range(2)]
        other = await run.start(4, founders=2, rests=True, work_s=100.0)
        await trio.sleep(1)
        other.transport.serve(BLOB_PROTOCOL, silent)
        members[0].service.heard(announced(run, other, digest(b"never"), 300))
        await trio.sleep(1.5)
        assert members[0].history.counts["fetch_failed"] == 1
        assert members[0].blobs.statistics().fetches == 0
        assert members[0].blames == []


@pytest.mark.parametrize("what", ["smaller", "larger", "chunks", "huge"])
async def test_a_payload_that_is_not_what_its_header_says_is_refused_by_all(
    tmp_path: Path, autojump_clock: MockClock, what: str
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(1)
        members[3].rests = True
        await trio.sleep(0.2)
        content = random.Random(5).randbytes(401 if what == "huge" else 300)
        path = tmp_path / "content"
        path.write_bytes(content)
        blob = await members[3].blobs.offer_file(path)
        if what == "chunks":  # the same bytes by another name, which nobody could give on
            manifest = manifest_of(content, 1024)
            blob = digest(manifest.encode())
            source = members[3].blobs._serving._offers.popitem()[1]
            source.manifest = manifest
            members[3].blobs._serving._offers[blob] = source
            members[3].blobs._serving._allowed[blob] = lambda _peer: True
        header = announced(run, members[3], blob, len(content) + {"smaller": 5, "larger": -5}.get(what, 0))
        members[0].service.heard(header)
        await trio.sleep(0.5)
        statistics = members[0].service.statistics()
        assert statistics is not None
        assert list(statistics.refused) == [members[3].id]
        assert members[0].blames[0][0] == members[3].id
        assert (blob in members[0].blobs._serving.offered) == (what == "smaller")


async def test_half_a_payload_is_let_go_with_its_round(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Else every stranger could leave some of the disk full for ever."""
    async with world(tmp_path) as run:
        members = [await run.start(number, rounds_kept=1) for number in range(4)]
        await run.until(1)
        header = announced(run, members[3], digest(b"never"), 300)
        number = header.body.round
        folder = tmp_path / members[0].id / "blobs"
        (folder / (digest(b"never").hex() + PART)).write_bytes(b"half")
        members[0].service.heard(header)
        await run.until(number + 4)
        assert not (folder / (digest(b"never").hex() + PART)).exists()
        recent = {Digest(s.blob) for m in members[0].manifests[-3:] for s in m.shares if s.blob is not None}
        assert {Digest(bytes.fromhex(path.name[:64])) for path in folder.iterdir()} <= recent | {
            Digest(each.body.contribution.blob)
            for each in members[0].service.known()
            if isinstance(each.body, Header) and each.body.contribution is not None
        }


async def test_what_a_life_left_is_offered_again_or_removed_by_the_next(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(3)
        await members[0].stop()
        folder = tmp_path / members[0].id / "blobs"
        for number, ending in enumerate(("", PART, ".manifest")):
            (folder / (digest(bytes([number])).hex() + ending)).write_bytes(b"of long ago")
        (folder / "notes.txt").write_bytes(b"of somebody else's")
        members[0] = await run.start(0)
        await trio.sleep(0.3)
        payloads = {Digest(s.blob) for m in members[0].manifests[-2:] for s in m.shares if s.blob is not None}
        assert payloads <= members[0].blobs._serving.offered
        assert not any(
            (folder / (digest(bytes([number])).hex() + end)).exists() for number, end in enumerate(("", PART))
        )
        assert not (folder / (digest(bytes([2])).hex() + ".manifest")).exists()
        assert (folder / "notes.txt").exists()


async def test_what_cannot_be_removed_stays_until_it_can(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number, founders=2, rounds_kept=1) for number in range(2)]
        await run.until(1)
        (tmp_path / members[0].id / "own-0").unlink(missing_ok=True)
        (tmp_path / members[0].id / "own-0").mkdir()  # unlink fails
        await run.until(4)
        assert (tmp_path / members[0].id / "own-0").exists()
        (tmp_path / members[0].id / "own-0").rmdir()
        (tmp_path / members[0].id / "own-0").write_bytes(b"x")
        await run.until(6)
        assert not (tmp_path / members[0].id / "own-0").exists()


@pytest.mark.slow
async def test_donors_that_give_another_state_are_found_out(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(5)
        for liar in members:
            gives_badly(liar, 0.0, is_wrong=True)
        late = await run.start(4)
        sought = set[Digest | None]()
        with trio.fail_after(60):
            while len(sought) < 3:  # None, and the weights of two rounds
                sought.add(late.history._sought)
                await trio.sleep(0.05)
        assert late.blobs.statistics().drops["donor_lied"] > 0
        assert late.owner.round == 0
        for liar in members:
            liar.transport.serve(BLOB_PROTOCOL, liar.blobs._serving.serve)
        await run.until(members[0].owner.round + 3, late)
        assert late.owner.adopted
        assert leftovers(tmp_path, late) == set()
        run.agree()


def leftovers(path: Path, member: Member) -> set[str]:
    """What its blobs hold that is no payload of a late round."""
    statements = member.service.known()
    late = {bytes(s.blob) for m in member.manifests[-6:] for s in m.shares if s.blob is not None}
    late |= set(announced_by(statements))
    return {each.name for each in (path / member.id / "blobs").iterdir() if bytes.fromhex(each.name[:64]) not in late}


async def test_weights_that_are_wrong_are_changed_by_no_round(tmp_path: Path, autojump_clock: MockClock) -> None:
    """Nobody gives the right ones at first: until somebody does, this member stands still."""
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        for other in members[:3]:
            gives_badly(other, 1e9)
        number = members[3].owner.round
        members[3].owner.state_path.write_bytes(random.Random(1).randbytes(SIZE))
        applied = len(members[3].owner.applied)
        await run.until(number + 2, *members[:3])
        for _ in range(100):
            await trio.sleep(0.5)
            if members[3].history.counts["diverged"]:
                break
        assert members[3].history.counts["diverged"] == 1
        stood = members[3].owner.round
        applied = len(members[3].owner.applied)
        for other in members[:3]:
            other.work_s = 300.0  # so that it is behind by little, and could replay that
        with trio.fail_after(60):
            while "a quorum names" not in members[3].history.trouble:  # noqa: ASYNC110  # the patience of a fetch
                await trio.sleep(0.1)
        await trio.sleep(1)
        assert len(members[3].owner.applied) == applied
        assert members[3].history.trouble
        for other in members[:3]:
            other.transport.serve(BLOB_PROTOCOL, other.blobs._serving.serve)
            other.work_s = 1.0
        await run.until(stood + 5, within_s=600)
        assert members[3].owner.adopted
        assert not members[3].history._is_wrong
        assert members[3].owner.weights == members[0].owner.states[members[3].owner.round]
        assert leftovers(tmp_path, members[3]) == set()


@pytest.mark.parametrize("read_at_once", [256, 2])
async def test_what_is_fewer_bytes_is_fetched(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, read_at_once: int
) -> None:
    """All payloads could be had, and are more bytes than the weights."""
    monkeypatch.setattr("gossip.round_history.READ_AT_ONCE", read_at_once)
    async with world(tmp_path) as run:
        members = [await run.start(number, rounds_kept=50) for number in range(4)]
        await run.until(5)
        late = await run.start(4, rounds_kept=50)
        await run.until(8, late)
        assert late.owner.adopted
        assert len(late.owner.applied) < 5
        assert late.manifests[:5] == members[0].manifests[:5]


async def test_wrong_weights_are_made_good_by_those_before_the_same_round(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    """The newest that a quorum names may be those that stand wrong here."""
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(3)
        for member in members:
            member.work_s = 300.0
        await trio.sleep(5)
        number = members[3].service.round
        await members[3].stop()
        (tmp_path / members[3].id / "weights" / f"state-{number}").unlink()

        def is_wrong(member: Member) -> None:
            member.history._is_wrong = True

        members[3] = await run.start(3, prepare=is_wrong)
        await run.until(number, members[3])
        assert members[3].owner.adopted == [number - 1]
        run.agree()


async def test_weights_that_changed_and_cannot_be_kept_end_the_run(tmp_path: Path, autojump_clock: MockClock) -> None:
    """A second try would change them twice."""
    async with world(tmp_path) as run:
        members = [await run.start(number, rounds_kept=9) for number in range(4)]
        await run.until(2)
        await members[3].stop()
        await run.until(4, *members[:3])

        async def full(*_: object) -> None:
            raise CannotStore("no space left")

        async with trio.open_nursery() as nursery:
            before = World(tmp_path, nursery)
            identity = run.identities[3]
            async with run.network.join(identity) as transport:
                before.network = run.network
                member = before._made(identity, transport, run.genesis(4), {"rounds_kept": 9})
                member.owner.apply = full  # type: ignore[method-assign]
                await nursery.start(member.door.calls.run)
                for other in members[:3]:
                    await transport.dial(other.transport.addresses()[0])
                with pytest.raises(CannotStore, match="no space left"):
                    await member.service.run()
                member.history.store.close()
            nursery.cancel_scope.cancel()


# ---- what the disk holds ----


async def test_records_are_loaded_as_often_as_one_likes(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        member = await run.start(0, founders=1)
        await run.until(3)
        await member.stop()
        member = await run.start(0, founders=1)
        await run.until(4)
        await trio.sleep(0.5)
        chain = member.history.chain
        await member.history.load()
        assert member.history.chain == chain


@pytest.mark.parametrize("what", ["another history", "cannot be read"])
async def test_records_of_something_else_are_said_and_end_the_run(
    tmp_path: Path, autojump_clock: MockClock, what: str
) -> None:
    async with world(tmp_path) as run:
        member = await run.start(0, founders=1)
        await run.until(2)
        await member.stop()
        store = RoundStore(tmp_path / member.id, NETWORK)
        store.append(store.records(0, 1)[0] if what == "another history" else b"no record")
        store.close()
        identity = run.identities[0]
        async with run.network.join(identity) as transport:
            again = run._made(identity, transport, run.genesis(1), {})
            with pytest.raises(CannotStore, match=what):
                await again.service.run()
            again.history.store.close()


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
