"""gossip/blobs.py over real libp2p hosts, with direct channels and without, with threads and a real disk."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from crypto.identity import PeerId
from gossip.blobs import Blobs, BlobsConfig
from gossip.errors import Unavailable
from p2p.direct import Direct, DirectConfig
from p2p.host import Libp2pTransport
from tests.libp2p_peers import node, until

pytestmark = pytest.mark.slow
CONTENT = random.Random(2).randbytes(6_000_001)
PATIENCE_S = 60  # hang guard


@asynccontextmanager
async def blob_node(path: Path, listening: bool) -> AsyncIterator[tuple[Libp2pTransport, Direct, Blobs]]:
    async with node() as transport, trio.open_nursery() as nursery:
        direct = Direct(transport, DirectConfig())
        if listening:
            await nursery.start(direct.run)
        yield transport, direct, Blobs(transport, direct, BlobsConfig(folder=path / transport.peer_id))
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("listening", [True, False])
async def test_a_blob_comes_over_real_hosts(listening: bool, tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(CONTENT)
    faults: list[tuple[PeerId, str, bool]] = []
    async with (
        blob_node(tmp_path, listening) as (one, one_direct, one_blobs),
        blob_node(tmp_path, listening) as (two, two_direct, two_blobs),
        blob_node(tmp_path, False) as (me, my_direct, blobs),
    ):
        blob = await one_blobs.offer_file(file)
        assert two_blobs.offer_bytes(CONTENT) == blob
        for donor in (one, two):
            await me.dial(donor.addresses()[0])
        with trio.fail_after(PATIENCE_S):
            path = await blobs.fetch(blob, [one.peer_id, two.peer_id])
        assert path.read_bytes() == CONTENT
        assert my_direct.counts == ({"opened": 2} if listening else {"fell_back": 2})
        given = [each.statistics().given["bytes"] for each in (one_blobs, two_blobs)]
        assert sum(given) >= len(CONTENT)
        assert min(given) > 0
        await until(lambda: not one_blobs.statistics().streams_serving and not two_blobs.statistics().streams_serving)
        await until(lambda: not one_direct._serving and not two_direct._serving)
        for each in (one_blobs, two_blobs, blobs):
            assert each.statistics().drops == {}
        assert faults == []


@pytest.mark.parametrize("listening", [True, False])
async def test_a_fetch_is_left_and_taken_up_again_over_real_hosts(listening: bool, tmp_path: Path) -> None:
    async with (
        blob_node(tmp_path, listening) as (one, _, one_blobs),
        blob_node(tmp_path, False) as (me, _, blobs),
    ):
        blob = one_blobs.offer_bytes(CONTENT)
        await me.dial(one.addresses()[0])
        with trio.CancelScope() as scope, trio.fail_after(PATIENCE_S):
            await blobs.fetch(blob, [one.peer_id], lambda progress: progress.stored_bytes > 2e6 and scope.cancel())
        assert scope.cancelled_caught
        await until(lambda: not one_blobs.statistics().streams_serving)
        with trio.fail_after(PATIENCE_S):
            assert (await blobs.fetch(blob, [one.peer_id])).read_bytes() == CONTENT
        assert blobs.statistics().fetched["chunks_resumed"] >= 3
        one_blobs.withdraw(blob)
        await blobs.forget(blob)
        with trio.fail_after(PATIENCE_S), pytest.raises(Unavailable, match="does not have it"):
            await blobs.fetch(blob, [one.peer_id])
