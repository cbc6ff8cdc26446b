"""gossip/blob_serving.py over the loopback network: ranges, bounds, the allowance, files that change."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from gossip.blob_serving import ServingConfig
from gossip.blob_wire import (
    BLOB_PROTOCOL,
    BlobAsk,
    Here,
    Piece,
    RangeAsk,
    Refusal,
    ask_frame,
    decode_answer,
)
from gossip.errors import LocalProtocolError
from p2p.errors import Unreachable
from tests.blob_world import CONTENT, world


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


# ---- bounds ----


async def test_ranges_out_of_bounds_end_the_stream_and_are_blamed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        one = await there.peer()
        blob = one.blobs.offer_bytes(bytes(3000))
        await there.me.transport.dial(one.transport.addresses()[0])
        for start, length in ((2999, 2), (3000, 1), (0, 3001), (1 << 33, 1)):
            stream = await there.me.transport.open_stream(one.id, BLOB_PROTOCOL)
            await stream.send(ask_frame(BlobAsk(blob=blob, manifest=False)))
            assert decode_answer(await stream.receive()) == Here(b"")
            assert one.blobs.is_busy(there.me.id)
            await stream.send(ask_frame(RangeAsk(start=1, length=2999)))
            assert decode_answer(await stream.receive()) == Piece(1, memoryview(bytes(2999)))
            await stream.send(ask_frame(RangeAsk(start=start, length=length)))
            with pytest.raises(Unreachable):
                await stream.receive()
        assert len(one.faults) == 4
        assert one.blobs.statistics().drops == {"rule_broken": 4}


@pytest.mark.parametrize("frame", [b"", b"\xc0", ask_frame(RangeAsk(start=0, length=1)), b"\x81\xa1a\x01", bytes(99)])
@pytest.mark.parametrize("first", [True, False])
async def test_what_is_no_ask_ends_the_stream(
    frame: bytes, first: bool, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path) as there:
        one = await there.peer()
        blob = one.blobs.offer_bytes(bytes(3000))
        await there.me.transport.dial(one.transport.addresses()[0])
        stream = await there.me.transport.open_stream(one.id, BLOB_PROTOCOL)
        if not first:
            await stream.send(ask_frame(BlobAsk(blob=blob, manifest=False)))
            await stream.receive()
            if frame == ask_frame(RangeAsk(start=0, length=1)):
                frame = ask_frame(BlobAsk(blob=blob, manifest=True))
        await stream.send(frame)
        with pytest.raises(Unreachable):
            await stream.receive()
        assert one.blobs.statistics().drops == {"rule_broken": 1}
        assert [lied for _, _, lied in one.faults] == [True]


async def test_streams_are_few_for_a_peer_and_in_all(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        one = await there.peer(serving=ServingConfig(streams_max=3, streams_per_peer_max=2))
        blob = one.blobs.offer_bytes(bytes(3000))
        for peer in (there.me, await there.peer()):
            await peer.transport.dial(one.transport.addresses()[0])
            answers = []
            for _ in range(3):
                stream = await peer.transport.open_stream(one.id, BLOB_PROTOCOL)
                await stream.send(ask_frame(BlobAsk(blob=blob, manifest=False)))
                answers.append(decode_answer(await stream.receive()))
            assert answers == (
                [Here(b""), Here(b""), Refusal.BUSY] if peer is there.me else [Here(b"")] + 2 * [Refusal.BUSY]
            )
        assert one.blobs.statistics().drops == {"busy": 3}
        await trio.sleep(61)  # they ask nothing
        assert one.blobs.statistics().streams_serving == 0
        assert one.blobs.statistics().drops == {"busy": 3, "too_slow": 3}
        assert (await there.me.blobs.fetch(blob, [one.id])).read_bytes() == bytes(3000)


async def test_streams_that_ask_nothing_keep_nobody_out(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        one = await there.peer(serving=ServingConfig(streams_max=3, streams_per_peer_max=2))
        blob = one.blobs.offer_bytes(bytes(3000))
        for _ in range(4):
            idler = await there.peer()
            await idler.transport.dial(one.transport.addresses()[0])
            for _ in range(3):
                await idler.transport.open_stream(one.id, BLOB_PROTOCOL)
        await trio.sleep(1)
        assert one.blobs.statistics().drops == {"busy": 4}
        await there.me.transport.dial(one.transport.addresses()[0])
        began = trio.current_time()
        await there.me.blobs.fetch(blob, [one.id])
        assert trio.current_time() - began < 1
        await trio.sleep(11)
        assert one.blobs.statistics().drops == {"busy": 4, "too_slow": 8}
        assert one.transport.statistics().streams_open <= 4  # the refused ones, whose openers have not ended them


async def test_a_busy_donor_is_asked_again(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        one = await there.peer(serving=ServingConfig(streams_max=1, idle_s=8.0))
        blob = one.blobs.offer_bytes(CONTENT)
        await there.me.transport.dial(one.transport.addresses()[0])
        stream = await there.me.transport.open_stream(one.id, BLOB_PROTOCOL)
        await stream.send(ask_frame(BlobAsk(blob=blob, manifest=False)))
        assert (await there.me.blobs.fetch(blob, [one.id])).read_bytes() == CONTENT
        assert there.me.blobs.statistics().drops["donor_failed"] >= 2


async def test_a_peer_that_takes_nothing_loses_its_stream(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        one = await there.peer()
        blob = one.blobs.offer_bytes(bytes(2_000_000))
        await there.me.transport.dial(one.transport.addresses()[0])
        stream = await there.me.transport.open_stream(one.id, BLOB_PROTOCOL)
        await stream.send(ask_frame(BlobAsk(blob=blob, manifest=False)))
        for start in range(4):
            await stream.send(ask_frame(RangeAsk(start=start, length=500_000)))
        await trio.sleep(31)
        assert one.blobs.statistics().drops == {"too_slow": 1}
        assert one.blobs.statistics().streams_serving == 0


async def test_what_goes_out_stays_within_the_allowance(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        one = await there.peer(serving=ServingConfig(upload_bytes_per_s=1_000_000, burst_bytes=500_000))
        blobs = [one.blobs.offer_bytes(random.Random(n).randbytes(2_000_000)) for n in range(2)]
        takers = [there.me, await there.peer()]
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for taker, blob in zip(takers, blobs, strict=True):
                await taker.transport.dial(one.transport.addresses()[0])
                nursery.start_soon(taker.blobs.fetch, blob, [one.id])
        assert 3.4 <= trio.current_time() - began <= 3.6  # 4 MB at 1 MB/s, after a burst


async def test_offers_are_bounded_and_end_when_withdrawn(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path, serving=ServingConfig(offers_max=2, memory_bytes_max=100)) as there:
        first = there.me.blobs.offer_bytes(bytes(60))
        assert there.me.blobs.offer_bytes(bytes(60)) == first
        with pytest.raises(LocalProtocolError, match="60 bytes are offered from memory and 41"):
            there.me.blobs.offer_bytes(bytes(41))
        there.me.blobs.offer_bytes(bytes(40))
        with pytest.raises(LocalProtocolError, match="2 blobs are offered already"):
            there.me.blobs.offer_bytes(b"")
        taker = await there.peer()
        await taker.transport.dial(there.me.transport.addresses()[0])
        stream = await taker.transport.open_stream(there.me.id, BLOB_PROTOCOL)
        await stream.send(ask_frame(BlobAsk(blob=first, manifest=True)))
        assert isinstance(decode_answer(await stream.receive()), Here)
        there.me.blobs.withdraw(first)
        there.me.blobs.withdraw(first)
        await stream.send(ask_frame(RangeAsk(start=0, length=1)))
        assert decode_answer(await stream.receive()) is Refusal.GONE


@pytest.mark.parametrize("how", ["changed", "removed", "shortened", "before"])
async def test_a_file_that_is_not_what_was_offered_is_given_no_more(
    how: str, tmp_path: Path, autojump_clock: MockClock
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(CONTENT)
    async with world(tmp_path) as there:
        one = await there.peer()
        blob = await one.blobs.offer_file(file)
        await there.me.transport.dial(one.transport.addresses()[0])
        stream = await there.me.transport.open_stream(one.id, BLOB_PROTOCOL)
        if how != "before":
            await stream.send(ask_frame(BlobAsk(blob=blob, manifest=False)))
            assert decode_answer(await stream.receive()) == Here(b"")
        if how == "removed":
            file.unlink()  # whoever reads goes on
            await stream.send(ask_frame(RangeAsk(start=0, length=9)))
            assert decode_answer(await stream.receive()) == Piece(0, memoryview(CONTENT[:9]))
            stream = await there.me.transport.open_stream(one.id, BLOB_PROTOCOL)
            await stream.send(ask_frame(BlobAsk(blob=blob, manifest=False)))
        elif how == "shortened":
            file.write_bytes(CONTENT[:5])
            await stream.send(ask_frame(RangeAsk(start=9, length=9)))
        else:
            file.write_bytes(bytes(len(CONTENT)))
            ask = BlobAsk(blob=blob, manifest=False) if how == "before" else RangeAsk(start=0, length=9)
            await stream.send(ask_frame(ask))
        assert decode_answer(await stream.receive()) is Refusal.GONE
        assert one.blobs.statistics().offered == 0
