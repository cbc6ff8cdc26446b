"""gossip/round_service.py and gossip/round_history.py: members over a network, with disks, kills, cuts and lies."""

from __future__ import annotations

import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from gossip.transfer import manifest_of
from tests.round_world import SIZE, Member, World


@asynccontextmanager
async def world(path: Path) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(path, nursery)
        nursery.cancel_scope.cancel()


def names(member: Member, number: int) -> set[str]:
    """Whose part counts in a round."""
    return {share.peer for share in member.service.history.manifests(number, 1)[0].shares}


async def test_members_commit_rounds_and_hold_the_same_weights(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(5)
        manifests = [member.service.history.manifests(0, 4) for member in members]
        assert all(each == manifests[0] for each in manifests)
        assert all(len(manifest.shares) == 4 for manifest in manifests[0])
        assert all(manifest.root is not None for manifest in manifests[0])
        states = {(member.owner.round, member.owner.weights) for member in members}
        assert len({number for number, _ in states}) == len(states)
        assert all(member.blames == [] for member in members)


async def test_one_member_alone_goes_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        member = await run.start(0, founders=1)
        await run.until(3)
        assert names(member, 2) == {member.id}


async def test_who_dies_is_missed_and_the_others_go_on(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        began = trio.current_time()
        await members[3].stop()
        await run.until(6)
        assert trio.current_time() - began < 5 * 2 * 1.5
        assert members[3].id not in names(members[0], 5)
        assert members[3].id not in members[0].service.history.chain.electors.voters


async def test_after_a_kill_a_member_goes_on_where_its_records_end(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        for _ in range(3):
            await trio.sleep(0.37)
            before = members[3].owner.round
            await members[3].stop()
            members[3] = await run.start(3)
            assert members[3].owner.round >= before
            await run.until(before + 2, *members)
        assert all(member.blames == [] for member in members)
        common = min(member.service.round for member in members)
        manifests = [member.service.history.manifests(0, common) for member in members]
        assert all(each == manifests[0] for each in manifests)


@pytest.mark.parametrize("named_every", [1, 4])
async def test_who_joins_late_takes_a_state_and_becomes_a_voter(
    tmp_path: Path, autojump_clock: MockClock, named_every: int
) -> None:
    async with world(tmp_path) as run:
        run.named_every = named_every
        members = [await run.start(number) for number in range(4)]
        await run.until(12)
        late = await run.start(4)
        await run.until(22)
        assert late.owner.adopted, "it replayed twelve rounds, of which the payloads are gone"
        assert late.owner.applied[0].round > 12 - 2 * named_every
        assert late.id in members[0].service.history.chain.electors.voters
        numbers = {member.owner.round: member.owner.weights for member in members}
        assert late.owner.weights == numbers.get(late.owner.round, late.owner.weights)
        assert late.service.history.manifests(0, 15) == members[0].service.history.manifests(0, 15)


async def test_a_member_a_little_behind_replays_payloads(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number, rounds_kept=8) for number in range(4)]
        await run.until(2)
        await members[3].stop()
        await run.until(4, *members[:3])
        members[3] = await run.start(3, rounds_kept=8)
        await run.until(6)
        assert members[3].owner.adopted == []


async def test_a_poisoned_payload_is_refused_and_named(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number, poisons=number == 3) for number in range(4)]
        await run.until(2, *members[:3])
        assert names(members[0], 1) == {member.id for member in members[:3]}
        assert any(peer == members[3].id and "poison" in what for peer, what in members[0].blames)


async def test_who_sits_out_is_named_and_stays_a_voter(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number, rests=number == 3) for number in range(4)]
        await run.until(4)
        share = next(s for s in members[0].service.history.manifests(3, 1)[0].shares if s.peer == members[3].id)
        assert share.blob is None
        assert members[3].id in members[0].service.history.chain.electors.voters


async def test_who_leaves_votes_no_more_and_a_run_without_members_is_over(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        members[0].leaves = True
        await run.until(5, *members[1:])
        assert members[0].id not in members[1].service.history.chain.electors.voters
        for member in members[1:]:
            member.leaves = True
        with trio.fail_after(60):
            for member in members[1:]:
                await member.ended.wait()


@pytest.mark.parametrize("named_every", [1, 3])
async def test_weights_that_are_not_those_of_a_quorum_are_given_up(
    tmp_path: Path, autojump_clock: MockClock, named_every: int
) -> None:
    async with world(tmp_path) as run:
        run.named_every = named_every
        members = [await run.start(number) for number in range(4)]
        await run.until(3)
        number = members[3].owner.round
        (members[3].owner.state_path).write_bytes(random.Random(1).randbytes(SIZE))
        await run.until(number + 1 + 3 * named_every)
        assert members[3].service.history.counts["diverged"] == 1
        states = {member.owner.round: member.owner.weights for member in members[:3]}
        assert members[3].owner.weights == states.get(members[3].owner.round, members[3].owner.weights)


async def test_who_takes_a_state_learns_whether_its_last_work_was_counted(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number, rounds_kept=1) for number in range(4)]
        await run.until(2)
        for other in members[:3]:
            run.network.partition(members[3].id, other.id)
        stood = members[3].owner.round
        await run.until(stood + 12, *members[:3])
        run.network.heal()
        await run.until(stood + 15, within_s=120)
        assert members[3].owner.passed
        for number, passed in members[3].owner.passed:
            assert passed == members[0].manifests[number]


@pytest.mark.parametrize("named_every", [1, 4])
async def test_a_member_that_was_restarted_gives_the_weights_that_its_disk_has(
    tmp_path: Path, autojump_clock: MockClock, named_every: int
) -> None:
    """The other's folder is gone, and no round ends without both."""
    async with world(tmp_path) as run:
        run.named_every = named_every
        members = [await run.start(number, founders=2) for number in range(2)]
        await run.until(18)
        for member in members:
            await member.stop()
        shutil.rmtree(tmp_path / members[1].id)
        stood = members[0].owner.round
        members = [await run.start(number, founders=2) for number in range(2)]
        await run.until(stood + 2, *members, within_s=300)
        assert members[1].owner.adopted


async def test_weights_that_rotted_on_the_disk_are_not_given_out_after_a_restart(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as run:
        member = await run.start(0, founders=1)
        await run.until(5)
        await member.stop()
        files = member.owner.state_files()
        (sound, _), (rotten, path) = files[-3], files[-2]
        path.write_bytes(path.read_bytes()[::-1])
        again = await run.start(0, founders=1)
        await again.service.opened()
        roots = [each.root for each in again.manifests]
        assert roots[sound] in again.history.payloads._states
        assert roots[rotten] not in again.history.payloads._states
        assert manifest_of(path.read_bytes()).blob not in again.history.payloads._states


async def test_dear_payloads_are_fetched_where_no_weights_were_named_since(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as run:
        run.named_every = 1000
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        await members[3].stop()
        await run.until(9, *members[:3])
        members[3] = await run.start(3)
        await run.until(12, within_s=300)
        assert members[3].owner.adopted == []
        run.agree()


async def test_a_minority_waits_and_comes_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        for other in members[:3]:
            run.network.partition(members[3].id, other.id)
        stood = members[3].owner.round
        await run.until(stood + 4, *members[:3])
        assert members[3].owner.round <= stood + 1
        run.network.heal()
        await run.until(stood + 7, within_s=120)
        common = min(member.service.round for member in members)
        manifests = [member.service.history.manifests(0, common) for member in members]
        assert all(each == manifests[0] for each in manifests)


async def test_a_private_group_hears_its_members_only(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as run:
        run.allowed = frozenset(each.peer_id for each in run.identities[:3])
        members = [await run.start(number, founders=3) for number in range(3)]
        stranger = await run.start(4, founders=3)
        await run.until(3, *members)
        assert stranger.id not in names(members[0], 2)
        assert stranger.owner.round == 0
        assert members[0].door.drops["not_a_member"] > 0


async def test_a_disk_that_is_full_silences_a_member_and_lets_it_go_on_later(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as run:
        members = [await run.start(number) for number in range(4)]
        await run.until(2)
        members[3].disk.is_full = True
        await run.until(6, *members[:3])
        assert "No space left" in members[3].service.history.trouble
        assert members[3].id not in names(members[0], 5)
        members[3].disk.is_full = False
        await run.until(members[0].owner.round + 3, within_s=120)
        assert members[3].service.history.trouble == ""
