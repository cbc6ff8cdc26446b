"""Payloads and weights of a run that cannot be had or are not what was named; disks that hold something else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from crypto.digest import Digest, digest
from crypto.identity import Identity
from gossip.blob_files import PART
from gossip.blob_wire import BLOB_PROTOCOL, KIND_PIECE
from gossip.errors import CannotStore
from gossip.round_history import announced as announced_by
from gossip.round_state import Phase
from gossip.round_store import RoundStore
from gossip.rounds import Contribution, Header, Statement, sign_statement
from gossip.transfer import manifest_of
from p2p.transport import Stream
from tests.round_world import NETWORK, SIZE, Member, World, announced
from tests.test_round_service import names, world

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
