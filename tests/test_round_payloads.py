"""gossip/round_payloads.py: what is offered, for how long, and what is left of it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from crypto.digest import Digest
from gossip.errors import CannotStore, LocalProtocolError
from gossip.round_payloads import STATES_KEPT, Payloads
from gossip.transfer import Manifest, manifest_of
from tests.blob_world import Peer, World

KEPT = 2


@asynccontextmanager
async def place(path: Path) -> AsyncIterator[tuple[Peer, Peer, Payloads]]:
    """One who fetches, a donor, and the payloads of the first."""
    async with AsyncExitStack() as stack:
        town = World(stack, path / "blobs")
        town.me = await town.peer()
        donor = await town.peer()
        await town.me.transport.dial(donor.transport.addresses()[0])
        folder = path / "run"
        folder.mkdir()
        yield town.me, donor, Payloads(town.me.blobs, folder, KEPT, lambda _peer: True)


async def offered(donor: Peer, path: Path, seed: int) -> Digest:
    content = path / f"content-{seed}"
    content.write_bytes(random.Random(seed).randbytes(300))
    return await donor.blobs.offer_file(content)


async def test_a_payload_that_came_is_given_on_until_its_last_round_is_over(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with place(tmp_path) as (me, donor, payloads):
        blob = await offered(donor, tmp_path, 1)
        path = await payloads.get(1, blob, [donor.id], 300)
        assert blob in me.blobs._serving.offered
        assert await payloads.get(3, blob, [], 300) == path  # the same in a later round
        await payloads.over(1 + KEPT)
        assert path.exists()
        assert blob in me.blobs._serving.offered
        await payloads.over(3 + KEPT)
        assert not path.exists()
        assert blob not in me.blobs._serving.offered
        assert payloads._rounds == {}
        assert payloads._paths == {}


async def test_a_payload_whose_file_is_gone_is_fetched_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with place(tmp_path) as (_, donor, payloads):
        blob = await offered(donor, tmp_path, 1)
        path = await payloads.get(1, blob, [donor.id], 300)
        path.unlink()
        assert (await payloads.get(1, blob, [donor.id], 300)).read_bytes() == (tmp_path / "content-1").read_bytes()


def made_of(path: Path) -> Manifest:
    return manifest_of(path.read_bytes())


async def test_more_states_are_offered_where_there_is_room(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with place(tmp_path) as (me, _, made):
        payloads = Payloads(made._blobs, tmp_path, 1, lambda _peer: True, states_kept=4)
        roots = []
        for number in range(6):
            (tmp_path / f"state-{number}").write_bytes(bytes([number]) * 500)
            roots.append(
                await payloads.offer_state(tmp_path / f"state-{number}", made_of(tmp_path / f"state-{number}"))
            )
        assert me.blobs._serving.offered == set(roots[-4:])


async def test_in_a_run_of_very_many_members_payloads_are_let_go_earlier(
    tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossip.round_payloads.OFFERED_MAX", 4)
    async with place(tmp_path) as (me, donor, made):
        payloads = Payloads(made._blobs, tmp_path, 100, lambda _peer: True)
        paths = [
            await payloads.get(number, await offered(donor, tmp_path, number), [donor.id], 300) for number in range(6)
        ]
        assert [path.exists() for path in paths] == [False, False, True, True, True, True]
        assert len(me.blobs._serving.offered) == 4


async def test_a_payload_that_cannot_be_given_on_is_here_all_the_same(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with place(tmp_path) as (me, donor, payloads):
        blob = await offered(donor, tmp_path, 1)

        async def full(*_: object) -> None:
            await trio.lowlevel.checkpoint()
            raise LocalProtocolError("too many are offered")

        me.blobs.offer_fetched = full  # type: ignore[method-assign, assignment]
        assert (await payloads.get(1, blob, [donor.id], 300)).exists()
        assert payloads.has(blob)
        assert "not given on" in caplog.text


async def test_the_newest_states_are_offered(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with place(tmp_path) as (me, _, payloads):
        paths = [tmp_path / f"state-{number}" for number in range(4)]
        for number, path in enumerate(paths):
            path.write_bytes(bytes([number]) * 500)
        roots = [await payloads.offer_state(path, made_of(path)) for path in paths[:3]]
        assert me.blobs._serving.offered == set(roots[-STATES_KEPT:])
        assert await payloads.offer_state(paths[1], made_of(paths[1])) == roots[1]  # again: it is the newest now
        assert me.blobs._serving.offered == {roots[1], roots[2]}
        roots.append(await payloads.offer_state(paths[3], made_of(paths[3])))
        assert me.blobs._serving.offered == {roots[1], roots[3]}


async def test_when_a_run_ends_nothing_is_offered_and_the_files_stay(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with place(tmp_path) as (me, donor, payloads):
        path = await payloads.get(1, await offered(donor, tmp_path, 1), [donor.id], 300)
        payloads.own_path(1).write_bytes(b"own")
        await payloads.add_own(1)
        await payloads.offer_state(tmp_path / "content-1", made_of(tmp_path / "content-1"))
        assert len(me.blobs._serving.offered) >= 2
        payloads.close()
        assert me.blobs._serving.offered == set()
        assert path.exists()
        assert payloads.own_path(1).exists()


async def test_own_payloads_are_removed_when_they_are_old(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with place(tmp_path) as (_, _, payloads):
        for number in range(5):
            payloads.own_path(number).write_bytes(bytes([number]))
        (payloads.own_path(0).parent / "own-notes").write_bytes(b"no number")
        await payloads.over(4)
        assert [payloads.own_path(number).exists() for number in range(5)] == [False] * 3 + [True] * 2
        assert (payloads.own_path(0).parent / "own-notes").exists()


async def test_a_file_that_is_not_there_cannot_be_offered(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with place(tmp_path) as (_, _, payloads):
        with pytest.raises(CannotStore, match="cannot be offered"):
            await payloads.add_own(1)
        with pytest.raises(CannotStore, match="cannot be offered"):
            await payloads.offer_state(tmp_path / "nothing", manifest_of(b"nothing"))


async def test_an_own_payload_that_is_damaged_keeps_no_other_from_being_offered(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with place(tmp_path) as (me, _, payloads):
        payloads.own_path(1).mkdir()
        payloads.own_path(2).write_bytes(b"own")
        await payloads.restore([], [])
        assert len(me.blobs._serving.offered) == 1
