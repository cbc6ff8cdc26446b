"""gossip/blobs.py over the loopback network: donors that lie, stall, die and come back; resume; cancel."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from crypto.digest import text_of
from gossip.blob_fetching import Progress
from gossip.blob_wire import (
    BLOB_PROTOCOL,
    Refusal,
    here_frame,
    piece_head,
    refusal_frame,
)
from gossip.errors import LocalProtocolError, Unavailable
from gossip.transfer import CHUNK_BYTES, manifest_of
from p2p.errors import P2PError
from p2p.loopback import LoopbackTransport
from p2p.transport import Stream
from tests.blob_world import (
    BLOB,
    CONTENT,
    RAW,
    SMALL,
    Conduct,
    asked,
    begin,
    dies_after,
    honest,
    liar,
    mute,
    piece,
    says,
    slowly,
    staller,
    world,
)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


# ---- the right way ----


async def test_what_was_written_or_fetched_a_moment_ago_is_offered_unread(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    content = random.Random(2).randbytes(CHUNK_BYTES + 5)
    (tmp_path / "state").write_bytes(content)
    async with world(tmp_path) as there:
        one, two = await there.peer(), await there.peer()
        for other in (one, two):
            await there.me.transport.dial(other.transport.addresses()[0])
        await two.transport.dial(one.transport.addresses()[0])
        made_of = manifest_of(content)
        with pytest.raises(LocalProtocolError, match=f"has {len(content)} bytes, {len(content) - 1} were announced"):
            await one.blobs.offer_file(tmp_path / "state", manifest=manifest_of(content[1:]))
        assert await one.blobs.offer_file(tmp_path / "state", manifest=made_of) == made_of.blob
        path = await there.me.blobs.fetch(made_of.blob, [one.id])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("gossip.blob_files.digest", None)
            assert await there.me.blobs.offer_fetched(made_of.blob) == made_of.blob
        one.blobs.withdraw(made_of.blob)
        assert (await two.blobs.fetch(made_of.blob, [there.me.id])).read_bytes() == content
        path.write_bytes(content[::-1])  # it is not any more what was compared: nobody gets it
        again = await there.peer()
        await again.transport.dial(there.me.transport.addresses()[0])
        with pytest.raises(Unavailable):
            await again.blobs.fetch(made_of.blob, [there.me.id])


async def test_a_blob_comes_from_memory_and_from_a_file_as_it_was(tmp_path: Path, autojump_clock: MockClock) -> None:
    content = random.Random(1).randbytes(3 * CHUNK_BYTES + 17)
    (tmp_path / "weights").write_bytes(content[:-1])
    async with world(tmp_path) as there:
        one = await there.peer()
        await there.me.transport.dial(one.transport.addresses()[0])
        for blob, wanted in (
            (one.blobs.offer_bytes(content), content),
            (await one.blobs.offer_file(tmp_path / "weights"), content[:-1]),
            (one.blobs.offer_bytes(b""), b""),
        ):
            seen: list[Progress] = []
            path = await there.me.blobs.fetch(blob, [one.id], seen.append)
            assert path.read_bytes() == wanted
            assert [each.stored_bytes for each in seen][-1:] == [len(wanted)][: len(wanted)]
            assert path.name == blob.hex()
            assert not there.me.part(blob).exists()
        counts = there.me.blobs.statistics()
        assert (counts.fetched["blobs"], counts.fetched["bytes"], counts.fetches) == (3, 2 * len(content) - 1, 0)
        assert counts.drops == {}
        given = one.blobs.statistics()
        assert (given.given["bytes"], given.offered) == (2 * len(content) - 1, 3)
        await trio.sleep(1)
        assert one.blobs.statistics().streams_serving == 0
        assert given.drops == {}
        assert there.me.faults == one.faults == []


async def test_what_is_there_already_is_compared_and_nobody_is_asked(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        donor = await there.donor(honest)
        path = await there.me.blobs.fetch(BLOB, [donor.peer_id])
        assert await there.me.blobs.fetch(BLOB, []) == path
        damaged = bytearray(CONTENT)
        damaged[5 * SMALL] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(Unavailable, match=r"no peer was named.*40 of 41 chunks are kept"):
            await there.me.blobs.fetch(BLOB, [])
        path = await there.me.blobs.fetch(BLOB, [donor.peer_id])
        assert path.read_bytes() == CONTENT
        assert there.me.blobs.statistics().fetched["chunks"] == 42


async def test_donors_share_the_work(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        donors = [await there.donor(slowly(1.0)) for _ in range(4)]
        began = trio.current_time()
        await there.me.blobs.fetch(BLOB, [donor.peer_id for donor in donors])
        assert trio.current_time() - began <= 12  # 41 chunks of a second each


async def test_two_fetches_of_one_blob_share_one_transfer(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        donor = await there.donor(slowly(0.5))
        paths: list[Path] = []

        async def fetch() -> None:
            paths.append(await there.me.blobs.fetch(BLOB, [donor.peer_id]))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fetch)
        assert len(set(paths)) == 1
        assert len(paths) == 3
        assert there.me.blobs.statistics().fetched["chunks"] == 41


async def test_who_waited_goes_on_when_the_first_fetch_is_left(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        donor = await there.donor(slowly(0.5))
        async with trio.open_nursery() as nursery, trio.open_nursery() as first:
            first.start_soon(there.me.blobs.fetch, BLOB, [donor.peer_id])
            await trio.sleep(5)
            nursery.start_soon(there.me.blobs.fetch, BLOB, [donor.peer_id])
            await trio.sleep(5)
            first.cancel_scope.cancel()
        counts = there.me.blobs.statistics().fetched
        assert counts["blobs"] == 1
        assert counts["chunks"] < 41 + 8  # what came before the cut was not fetched again
        assert counts["chunks_resumed"] > 10


# ---- donors that fail ----


async def test_who_gives_and_who_takes_are_busy_with_each_other(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        donor = await there.donor(slowly(0.3))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.me.blobs.fetch, BLOB, [donor.peer_id])
            await trio.sleep(2)
            assert there.me.blobs.is_busy(donor.peer_id)
        assert not there.me.blobs.is_busy(donor.peer_id)


async def test_a_donor_that_dies_is_replaced(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        dying, well = await there.donor(slowly(0.3)), await there.donor(slowly(0.3))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.me.blobs.fetch, BLOB, [dying.peer_id, well.peer_id])
            await trio.sleep(2)
            there.network.crash(dying.peer_id)
        assert (there.me.config.folder / BLOB.hex()).read_bytes() == CONTENT
        assert there.me.blobs.statistics().drops["donor_failed"] >= 1
        assert there.me.faults == []


@pytest.mark.parametrize(
    ("conduct", "lied", "word"),
    [
        (liar, True, "other bytes"),
        (says(here_frame(RAW + b"x")), True, "not the manifest"),
        (says(here_frame(b"")), True, "not the manifest"),
        (says(b""), True, "no answer"),
        (says(b"\x07xyz"), True, "no answer"),
        (says(piece_head(0) + CONTENT[:SMALL]), True, "before it was asked"),
        (staller, False, "without an answer"),
    ],
)
async def test_a_donor_that_lies_or_stalls_is_named_dropped_and_blamed(
    conduct: Conduct, lied: bool, word: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as there:
        eve = await there.donor(conduct)
        with pytest.raises(Unavailable) as caught:
            await there.me.blobs.fetch(BLOB, [eve.peer_id])
        assert word in str(caught.value)
        assert eve.peer_id in str(caught.value)
        assert text_of(BLOB) in str(caught.value)
        assert [(peer, said) for peer, _, said in there.me.faults] == [(eve.peer_id, lied)]
        assert word in there.me.faults[0][1]
        assert there.me.blobs.statistics().drops == {"donor_lied" if lied else "donor_slow": 1}
        bob = await there.donor(honest)
        path = await there.me.blobs.fetch(BLOB, [eve.peer_id, bob.peer_id])
        assert path.read_bytes() == CONTENT


async def chatterer(stream: Stream) -> None:
    """Sends what nobody asked for."""
    await begin(stream)
    await asked(stream)
    await stream.send(piece_head(30 * SMALL) + CONTENT[30 * SMALL : 31 * SMALL])
    await trio.sleep_forever()


async def crooked(stream: Stream) -> None:
    """Sends a piece that begins where no chunk does."""
    await begin(stream)
    ask = await asked(stream)
    await stream.send(piece_head(ask.start + 1) + CONTENT[ask.start + 1 : ask.start + 1 + ask.length])
    await trio.sleep_forever()


async def repeater(stream: Stream) -> None:
    await begin(stream)
    ask = await asked(stream)
    await stream.send(piece(ask))
    await stream.send(piece(ask))
    await trio.sleep_forever()


async def herald(stream: Stream) -> None:
    await begin(stream)
    await stream.send(here_frame(RAW))
    await trio.sleep_forever()


@pytest.mark.parametrize("conduct", [chatterer, crooked, repeater, herald])
async def test_a_donor_that_says_what_was_not_asked_is_dropped(
    conduct: Conduct, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as there:
        eve, bob = await there.donor(conduct), await there.donor(slowly(0.01))
        path = await there.me.blobs.fetch(BLOB, [eve.peer_id, bob.peer_id])
        assert path.read_bytes() == CONTENT
        assert [(peer, lied) for peer, _, lied in there.me.faults] == [(eve.peer_id, True)]


async def test_when_nobody_has_it_the_error_comes_soon_and_says_what_each_did(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as there:
        poor = await there.peer()
        poor.blobs.offer_bytes(b"another")
        await there.me.transport.dial(poor.transport.addresses()[0])
        gone, bare = await there.donor(says(refusal_frame(Refusal.GONE))), await there.donor(honest)
        bare._handlers.clear()
        began = trio.current_time()
        with pytest.raises(Unavailable) as caught:
            await there.me.blobs.fetch(BLOB, [poor.id, gone.peer_id, bare.peer_id])
        assert trio.current_time() - began < 1
        for words in (f"{poor.id} does not have it", f"{gone.peer_id} has it no more", f"{bare.peer_id} refused"):
            assert words in str(caught.value)
        assert there.me.faults == []
        assert poor.blobs.statistics().drops == {"unknown": 1}


@pytest.mark.parametrize("conduct", [mute, dies_after(0), says(refusal_frame(Refusal.BUSY))])
async def test_a_donor_that_never_gives_is_not_tried_for_ever(
    conduct: Conduct, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as there:
        donor = await there.donor(conduct)
        tries = 0
        began = trio.current_time()
        with pytest.raises(Unavailable, match=donor.peer_id):
            await there.me.blobs.fetch(BLOB, [donor.peer_id])
        assert 30 <= trio.current_time() - began < 31
        tries = there.me.blobs.statistics().drops["donor_failed"]
        assert 3 <= tries <= 8


async def test_all_die_and_one_comes_back(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        donors = [await there.donor(slowly(0.5)) for _ in range(2)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there.me.blobs.fetch, BLOB, [donor.peer_id for donor in donors])
            await trio.sleep(4)
            for donor in donors:
                there.network.break_connections(there.me.id, donor.peer_id)
            await trio.sleep(14)
            assert there.me.blobs.statistics().fetches == 1
            await there.me.transport.dial(donors[1].addresses()[0])
            back = trio.current_time()
        assert trio.current_time() - back < 20  # it was asked at once, not when its pause was over
        assert (there.me.config.folder / BLOB.hex()).read_bytes() == CONTENT
        assert there.me.blobs.statistics().fetched["chunks"] == 41


async def test_all_die_for_good_and_the_next_fetch_goes_on_after_a_restart(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as there:
        donors = [await there.donor(dies_after(10)) for _ in range(2)]
        for donor in donors:
            donor.serve(BLOB_PROTOCOL, dying_once(donor))
        with pytest.raises(Unavailable, match=r"(\d+) of 41 chunks are kept for the next fetch"):
            await there.me.blobs.fetch(BLOB, [donor.peer_id for donor in donors])
        before = there.me.blobs.statistics().fetched["chunks"]
        assert before == 20
        part = bytearray(there.me.part().read_bytes())
        part[0] ^= 1  # the machine died, and the disk with it
        there.me.part().write_bytes(part)
        me = there.me.again()
        bob = await there.donor(honest)
        path = await me.blobs.fetch(BLOB, [bob.peer_id])
        assert path.read_bytes() == CONTENT
        counts = me.blobs.statistics().fetched
        assert (counts["chunks_resumed"], counts["chunks"]) == (19, 22)


def dying_once(donor: LoopbackTransport) -> Conduct:
    async def conduct(stream: Stream) -> None:
        donor._handlers.clear()
        try:
            await dies_after(10)(stream)
        except P2PError:
            pass

    return conduct


# ---- leaving ----


@pytest.mark.parametrize("after_s", [0.0, 0.1, 1.0, 3.3, 10.0])
async def test_a_fetch_can_be_left_at_any_point(after_s: float, tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        donors = [await there.donor(slowly(0.5)), await there.donor(mute)]
        with trio.move_on_after(after_s) as scope:
            await there.me.blobs.fetch(BLOB, [donor.peer_id for donor in donors])
        assert scope.cancelled_caught
        await trio.sleep(1)
        assert there.me.transport.statistics().streams_open == 0
        assert there.me.blobs.statistics().fetches == 0
        assert {path.suffix for path in there.me.config.folder.glob("*")} <= {".part", ".manifest"}
        path = await there.me.blobs.fetch(BLOB, [donors[0].peer_id])
        assert path.read_bytes() == CONTENT
        await there.me.blobs.forget(BLOB)
        assert list(there.me.config.folder.iterdir()) == []
