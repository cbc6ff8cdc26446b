"""gossip/blob_files.py under a fetch: full disks, bounds, links, a disk that is slow."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from crypto.digest import digest
from crypto.disk import SYSTEM, System
from gossip.blob_fetching import FetchConfig
from gossip.blob_serving import ServingConfig
from gossip.blob_wire import (
    here_frame,
)
from gossip.blobs import Blobs, BlobsConfig
from gossip.donors import DonorsConfig
from gossip.errors import CannotStore
from gossip.transfer import Manifest, manifest_of
from p2p.transport import Stream
from tests.blob_world import (
    BLOB,
    CONTENT,
    FETCH,
    MANIFEST,
    RAW,
    SMALL,
    asked,
    begin,
    honest,
    inline,
    piece,
    says,
    world,
)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


# ---- the disk ----


class Full(System):
    """A disk with room for so many writes."""

    def __init__(self, writes: int) -> None:
        self.left = writes

    def write_at(self, handle: int, content: bytes | memoryview, start: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write_at(handle, content, start)


async def test_a_full_disk_is_one_clear_error_and_what_is_there_counts(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with world(tmp_path, system=Full(7)) as there:
        donors = [await there.donor(honest) for _ in range(3)]
        peers = [donor.peer_id for donor in donors]
        with pytest.raises(CannotStore, match=r"\.part: No space left"):
            await there.me.blobs.fetch(BLOB, peers)
        await trio.sleep(1)
        assert there.me.transport.statistics().streams_open == 0
        there.me.config = replace(there.me.config, system=SYSTEM)
        me = there.me.again()
        assert (await me.blobs.fetch(BLOB, peers)).read_bytes() == CONTENT
        assert me.blobs.statistics().fetched["chunks_resumed"] == 7


async def test_the_folder_is_bounded_and_so_is_a_blob(tmp_path: Path, autojump_clock: MockClock) -> None:
    other = manifest_of(bytes(SMALL), SMALL)
    async with world(tmp_path, folder_bytes_max=len(CONTENT) + len(RAW) + 1000) as there:
        donor = await there.donor(honest)
        await there.me.blobs.fetch(BLOB, [donor.peer_id])
        second = await there.donor(says(here_frame(other.encode())))
        with pytest.raises(CannotStore, match="forget a blob"):
            await there.me.blobs.fetch(digest(other.encode()), [second.peer_id])
        there.me.config = replace(there.me.config, fetch=replace(FETCH, blob_bytes_max=len(CONTENT) - 1))
        await there.me.blobs.forget(BLOB)
        with pytest.raises(CannotStore, match="fetches at most"):
            await there.me.again().blobs.fetch(BLOB, [donor.peer_id])


async def test_a_link_in_the_folder_is_not_followed(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with world(tmp_path) as there:
        donor = await there.donor(honest)
        victim = tmp_path / "victim"
        victim.write_bytes(b"mine")
        there.me.config.folder.mkdir()
        there.me.part().symlink_to(victim)
        with pytest.raises(CannotStore):
            await there.me.blobs.fetch(BLOB, [donor.peer_id])
        assert victim.read_bytes() == b"mine"


async def test_memory_is_bounded_while_the_disk_is_slow(tmp_path: Path, autojump_clock: MockClock) -> None:
    sent = 0

    async def fast(stream: Stream) -> None:
        nonlocal sent
        await begin(stream)
        while True:
            ask = await asked(stream)
            await stream.send(piece(ask))
            sent += 1

    async def slow_disk(function: Callable[..., Any], *arguments: Any) -> Any:
        if function.__name__ == "write":
            await trio.sleep_forever()
        return await inline(function, *arguments)

    async with world(tmp_path) as there:
        donors = [await there.donor(fast) for _ in range(3)]
        me = Blobs(there.me.transport, there.me.transport, there.me.config, blocking=slow_disk)
        with trio.move_on_after(3):
            await me.fetch(BLOB, [donor.peer_id for donor in donors])
        assert sent <= 1 + 2 * 4 + 1 + FETCH.transfer.asks_max  # written, waiting, one held, on their way


def test_bad_bounds_are_refused(tmp_path: Path) -> None:
    for make in (
        lambda: ServingConfig(streams_max=0),
        lambda: ServingConfig(upload_bytes_per_s=0),
        lambda: FetchConfig(answer_s=0),
        lambda: DonorsConfig(donors_max=0),
        lambda: DonorsConfig(patience_s=0),
        lambda: BlobsConfig(folder=tmp_path, fetches_max=0),
    ):
        with pytest.raises(ValueError, match="wanted"):
            make()


def test_the_manifest_of_these_tests_has_small_chunks() -> None:
    assert isinstance(MANIFEST, Manifest)
    assert MANIFEST.count == 41
